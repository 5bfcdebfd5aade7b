"""The shape of one LLaMA-like model, what its family's files leave out, and the names and shapes of its arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from errors import InputError, UnsupportedError, quote
from weights.fields import LARGEST, Fields

MOST_LAYERS = 1024  # the deepest released LLaMA has 126; a number from a damaged file must not fill the memory
EMBEDDINGS_CHUNK = "embeddings.pkl"


class Family(NamedTuple):
    """What sets the models of one model_type apart from LLaMA's.

    Attributes:
      defaults: what their config.json may leave out, where transformers then takes another value than for a LLaMA.
      window: whether transformers heeds a sliding_window.
      qkv_bias: whether q, k and v have biases, whatever the config says.
      qk_norm: whether the heads' q and k are normed before RoPE.
      no_rope_interval: if no_rope_layers is left out, every so many layers one has no RoPE; 0 for none.
    """

    defaults: Mapping[str, Any] = {}
    window: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    no_rope_interval: int = 0


_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
FAMILIES = {  # by model_type; the defaults are those of transformers' configuration classes
    "llama": Family(window=False),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": Family(_QWEN, qkv_bias=True),
    "qwen3": Family(_QWEN | {"head_dim": 128}, qk_norm=True),
    "phi3": Family({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "smollm3": Family(
        {"use_sliding_window": False, "rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4}
        | {"max_position_embeddings": 32768},
        no_rope_interval=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3's stretching of the low RoPE frequencies (field names and formula: Hugging Face's "llama3" rope type).

    Raises:
      InputError: a value that is not above 0, or low_freq_factor not below high_freq_factor.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        fields = Fields(vars(self), "rope_scaling.")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            object.__setattr__(self, name, fields.number(name))
        fields.integer("original_max_position_embeddings")
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class RopeFactors:
    """What each RoPE frequency is divided by: what every other kind of scaling comes to.

    Attributes:
      factors: [head_dim / 2].
      attention_factor: cos and sin are multiplied by it.
      long_factors: instead of `factors` where a sequence is longer than original_max_position_embeddings; None if
        there are no others.
      original_max_position_embeddings: tokens; None where nothing depends on it.

    Raises:
      InputError: a value that is not above 0, or no two lists of the same length.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0
    long_factors: tuple[float, ...] | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        fields = Fields(vars(self), "rope_scaling.")
        object.__setattr__(self, "factors", fields.numbers("factors", len(self.factors)))
        object.__setattr__(self, "attention_factor", fields.number("attention_factor"))
        if self.long_factors is not None:
            object.__setattr__(self, "long_factors", fields.numbers("long_factors", len(self.factors)))
            fields.integer("original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of one LLaMA-like model; most names are those of a Hugging Face `LlamaConfig`.

    Attributes:
      qkv_bias, output_bias: whether wq, wk and wv, and wo, have biases.
      qk_norm: whether each head's q and k are normed before RoPE.
      sliding_window: keys that a token attends to, its own among them; None for all before it.
      no_rope_layers: the layers without RoPE.

    Raises:
      InputError: a size below 1, an odd head_dim, query heads that do not divide into the KV heads' groups, RoPE
        factors for another head_dim, or a layer without RoPE that is none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | RopeFactors | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    no_rope_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fields = Fields(vars(self))
        for field in dataclasses.fields(self)[:8]:
            _size(fields, field.name)
        for name in ("rope_theta", "rms_norm_eps"):
            object.__setattr__(self, name, fields.number(name))
        for name in ("tie_word_embeddings", "qkv_bias", "output_bias", "qk_norm"):
            fields.boolean(name)
        fields.integer("sliding_window", default=None)
        object.__setattr__(self, "no_rope_layers", fields.integers("no_rope_layers", 0, self.num_hidden_layers - 1))
        if isinstance(self.rope_scaling, RopeFactors) and len(self.rope_scaling.factors) != self.head_dim // 2:
            raise InputError(f"expected {self.head_dim // 2} RoPE factors, got {len(self.rope_scaling.factors)}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """The inverse of `dataclasses.asdict`, as the manifest stores it.

        Raises:
          InputError: a field that is unknown, missing or senseless.
        """
        scaling = Fields(values).object("rope_scaling", default=None)
        kind = RopeFactors if scaling and "factors" in scaling else RopeScaling
        return _from_fields(cls, {**values, "rope_scaling": scaling and _from_fields(kind, scaling)})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], names: Mapping[str, str] | None = None) -> LlamaConfig:
        """Maps a Hugging Face config.json (as a dict), of old (`rope_scaling`) or new (`rope_parameters`) transformers.

        Args:
          config: the object.
          names: what the file calls these fields, for the errors; a GGUF file has other names.

        Raises:
          UnsupportedError: an architecture, or a feature of one, that this model does not compute.
          InputError: a field that is missing or senseless.
        """
        family = _family(Fields(config, names=names or {}))
        fields = Fields({**family.defaults, **config}, names=names or {})
        _refuse_unsupported(fields, family)
        old, new = (fields.object(name, default={}) for name in ("rope_scaling", "rope_parameters"))
        prefix = "" if names else "rope_parameters." if new else "rope_scaling."
        rope = Fields(old | new, prefix, fields.names)
        heads, width = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
        head_dim = fields.integer("head_dim", default=None)
        if head_dim is None and width % heads:
            raise InputError(
                f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}), or have head_dim"
            )
        bias = fields.boolean("attention_bias", default=False)
        plain = cls(
            vocab_size=_size(fields, "vocab_size"),
            hidden_size=width,
            intermediate_size=_size(fields, "intermediate_size"),
            num_hidden_layers=_size(fields, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
            head_dim=width // heads if head_dim is None else head_dim,
            max_position_embeddings=fields.integer("max_position_embeddings", default=2048),
            rope_theta=rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0)),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            qkv_bias=bias or family.qkv_bias,
            output_bias=bias,
            qk_norm=family.qk_norm,
            sliding_window=_window(fields),
            no_rope_layers=_layers_without_rope(fields, family),
        )
        return dataclasses.replace(plain, rope_scaling=_rope_scaling_from_hf(rope, fields, plain))


def _size(fields: Fields, name: str) -> int:
    return fields.integer(name, high=MOST_LAYERS if name == "num_hidden_layers" else LARGEST)


def _from_fields(cls: type, values: Mapping[str, Any]) -> Any:
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"{cls.__name__} has unknown fields {quote(unknown)}; known are {', '.join(known)}")
    if missing := [name for name, required in known.items() if required and name not in values]:
        raise InputError(f"{cls.__name__}: {missing[0]} is missing")
    return cls(**values)


def _family(fields: Fields) -> Family:
    """The row of FAMILIES. The architectures, if named, are spelled in several ways, and go by model_type."""
    model_type = fields.text("model_type", default="llama")
    architectures = fields.texts("architectures", default=[])
    classes = (f"{model_type}forcausallm", f"{model_type}model")
    if model_type not in FAMILIES or any(name.lower() not in classes for name in architectures):
        name = ", ".join(architectures) or model_type
        raise UnsupportedError(
            f"architecture {quote(name)} (model_type {quote(model_type)}) is not supported; "
            f"{', '.join(FAMILIES)} are, as causal language models"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    features = {"mlp_bias": False, "partial_rotary_factor": 1.0}
    features |= {} if family.window else {"sliding_window": None}
    for feature, plain in features.items():
        if (value := fields.values.get(feature)) and value != plain:
            raise UnsupportedError(f"{fields.called(feature)}={quote(value)} is not supported in this architecture")
    if (activation := fields.text("hidden_act", default="silu")) not in ("silu", "swish"):  # two names of one function
        raise UnsupportedError(f"hidden_act={quote(activation)} is not supported; only silu is")


def _window(fields: Fields) -> int | None:
    """The sliding window of all layers, or None.

    Raises:
      UnsupportedError: some layers have it and some have not.
    """
    window = fields.integer("sliding_window", default=None)
    if window is None or not fields.boolean("use_sliding_window", default=True):
        return None
    first = fields.integer("max_window_layers", low=0, default=0)
    layers = _size(fields, "num_hidden_layers")
    kinds = fields.texts("layer_types", default=None) or ["full_attention"] * first + ["sliding_attention"] * layers
    kinds = set(kinds[:layers])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        name = fields.called("sliding_window")
        raise UnsupportedError(f"{name}={window} in some layers only ({', '.join(sorted(kinds))}) is not supported")
    return window


def _layers_without_rope(fields: Fields, family: Family) -> tuple[int, ...]:
    layers = range(_size(fields, "num_hidden_layers"))
    interval = (
        fields.integer("no_rope_layer_interval", default=family.no_rope_interval) if family.no_rope_interval else 0
    )
    flags = fields.integers("no_rope_layers", 0, 1, default=None) if interval else None  # 1 is a layer with RoPE
    if flags is None:
        return tuple(i for i in layers if interval and (i + 1) % interval == 0)
    if len(flags) < len(layers):
        raise fields.refused("no_rope_layers", f"a list of {len(layers)} numbers, one for each layer")
    return tuple(i for i in layers if not flags[i])


# --- RoPE ---


def _rope_scaling_from_hf(rope: Fields, fields: Fields, config: LlamaConfig) -> RopeScaling | RopeFactors | None:
    """The scaling of a config that has everything else."""
    kind = rope.text("rope_type", default=None) or rope.text("type", default="default")
    if (share := rope.number("partial_rotary_factor", default=1.0)) != 1:
        raise UnsupportedError(f"{rope.called('partial_rotary_factor')}={share} is not supported; only 1 is")
    if kind == "default":
        return None
    if kind == "dynamic":  # within the context, as it was trained
        rope.number("factor")
        return None
    if kind == "linear":
        return RopeFactors((rope.number("factor"),) * (config.head_dim // 2))
    length = fields.integer("original_max_position_embeddings", default=None)
    context = config.max_position_embeddings
    length = length or rope.integer("original_max_position_embeddings", default=context)
    if kind == "llama3":
        factors = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return RopeScaling(**factors, original_max_position_embeddings=length)
    if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in rope.values):  # earlier names of one kind
        return _longrope(rope, config, length)
    if kind == "yarn":
        return _yarn(rope, config, length)
    raise UnsupportedError(
        f"rope_type {quote(kind)} is not supported; default, linear, dynamic, llama3, yarn and longrope are"
    )


def _longrope(rope: Fields, config: LlamaConfig, length: int) -> RopeFactors:
    """LongRoPE's factors (arXiv 2402.13753)."""
    short, long = (rope.numbers(name, config.head_dim // 2) for name in ("short_factor", "long_factor"))
    factor = rope.number("factor", default=config.max_position_embeddings / length)
    default = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 and length > 1 else 1.0
    return RopeFactors(short, rope.number("attention_factor", default=default), long, length)


def _yarn(rope: Fields, config: LlamaConfig, length: int) -> RopeFactors:
    """YaRN's factors (arXiv 2309.00071).

    Frequencies that turn more than beta_fast times over the original length are kept, those that turn less than
    beta_slow times are divided by `factor`; in between one goes over
    into the other linearly with the frequency's number.
    """
    factor = rope.number("factor", default=config.max_position_embeddings / length)
    H, base = config.head_dim, config.rope_theta

    def index_of(turns: float) -> float:
        return H * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = index_of(rope.number("beta_fast", default=32.0))
    high = index_of(rope.number("beta_slow", default=1.0))
    if rope.boolean("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    divided = np.clip((np.arange(H // 2) - low) / ((high - low) or 0.001), 0, 1)
    factors = 1 / (divided / factor + 1 - divided)

    def mscale(scale: float | None) -> float:
        return 0.1 * (scale or 1.0) * math.log(factor) + 1 if factor > 1 else 1.0

    top, bottom = (rope.number(name, default=None) for name in ("mscale", "mscale_all_dim"))
    default = mscale(top) / mscale(bottom) if top and bottom else mscale(None)
    return RopeFactors(tuple(factors.tolist()), rope.number("attention_factor", default=default))


def rope_frequencies(config: LlamaConfig, long: bool = False) -> np.ndarray:
    """float64 [H / 2], radians a token; RoPE (arXiv 2104.09864), scaled where the config has it.

    LLaMA 3.1 divides the frequency of wavelengths above original / low_freq_factor by `factor`, keeps those under
    original / high_freq_factor, and goes over from one to the other linearly in original / wavelength.

    Args:
      config: the model's.
      long: for a sequence longer than the original length, where the scaling has factors for it.
    """
    H = config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, RopeFactors):
        return frequencies / np.array(scaling.long_factors if long and scaling.long_factors else scaling.factors)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


# --- Arrays ---


def layer_chunk(layer: int) -> str:
    """The file name of one layer's chunk."""
    return f"layer_{layer}.pkl"


def chunk_axes(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """Every chunk's file name with the nested dict of what the axes of its arrays count; matrices are [in, out]."""
    attention = {
        "wq": ("embed", "heads"),
        "wk": ("embed", "kv_heads"),
        "wv": ("embed", "kv_heads"),
        "wo": ("heads", "embed"),
    }
    attention |= {"bq": ("heads",), "bk": ("kv_heads",), "bv": ("kv_heads",)} if config.qkv_bias else {}
    attention |= {"bo": ("embed",)} if config.output_bias else {}
    attention |= {"q_norm": ("head_dim",), "k_norm": ("head_dim",)} if config.qk_norm else {}
    layer = {
        "attention": attention,
        "feed_forward": {"w1": ("embed", "mlp"), "w2": ("mlp", "embed"), "w3": ("embed", "mlp")},
        "attention_norm": ("embed",),
        "ffn_norm": ("embed",),
    }
    embeddings = {"tok_embeddings": ("vocab", "embed"), "norm": ("embed",)}
    if not config.tie_word_embeddings:
        embeddings["output"] = ("embed", "vocab")
    return {EMBEDDINGS_CHUNK: embeddings} | {layer_chunk(i): layer for i in range(config.num_hidden_layers)}


def param_axes(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """The same of the parameters in memory, whose matrices are [out, in], as the embedding already is.

    Each output's weights lie side by side so: products of a few rows, which decoding is made of, read them as they are.
    """
    return _map_axes(lambda axes: axes[::-1] if is_turned(axes) else axes, chunk_axes(config))


def is_turned(axes: tuple[str, ...]) -> bool:
    """Whether an array with these axes in a chunk is transposed in memory."""
    return len(axes) == 2 and axes[0] != "vocab"


def chunk_shapes(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """The shapes of the arrays of `chunk_axes`."""
    return _shapes(config, chunk_axes(config))


def param_shapes(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """The shapes of the arrays of `param_axes`."""
    return _shapes(config, param_axes(config))


def _shapes(config: LlamaConfig, tree: Any) -> Any:
    sizes = {
        "embed": config.hidden_size,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }

    return _map_axes(lambda axes: tuple(sizes[axis] for axis in axes), tree)


def _map_axes(function: Callable[[tuple[str, ...]], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map_axes(function, inner) for name, inner in tree.items()}
    return function(tree)
