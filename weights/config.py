"""The shape of one LLaMA model, and the names and shapes of its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from errors import InputError, UnsupportedError, quote
from weights.fields import LARGEST, Fields

MOST_LAYERS = 1024  # the deepest released LLaMA has 126; a number from a damaged file must not fill the memory
EMBEDDINGS_CHUNK = "embeddings.pkl"


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
class LlamaConfig:
    """The shape of one LLaMA model; every name is that of a Hugging Face `LlamaConfig`.

    Raises:
      InputError: a size below 1, an odd head_dim, or query heads that do not divide into the KV heads' groups.
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
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        fields = Fields(vars(self))
        for field in dataclasses.fields(self)[:8]:
            _size(fields, field.name)
        for name in ("rope_theta", "rms_norm_eps"):
            object.__setattr__(self, name, fields.number(name))
        fields.boolean("tie_word_embeddings")
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
        return _from_fields(cls, {**values, "rope_scaling": scaling and _from_fields(RopeScaling, scaling)})

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
        fields = Fields(config, names=names or {})
        _refuse_unsupported(fields)
        old, new = (fields.object(name, default={}) for name in ("rope_scaling", "rope_parameters"))
        rope = Fields(old | new, fields.called("rope_parameters." if new else "rope_scaling."), fields.names)
        heads, width = _size(fields, "num_attention_heads"), _size(fields, "hidden_size")
        head_dim = fields.integer("head_dim", default=None)
        if head_dim is None and width % heads:
            raise InputError(
                f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}), or have head_dim"
            )
        return cls(
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
            rope_scaling=_rope_scaling_from_hf(rope),
        )


def _size(fields: Fields, name: str) -> int:
    return fields.integer(name, high=MOST_LAYERS if name == "num_hidden_layers" else LARGEST)


def _from_fields(cls: type, values: Mapping[str, Any]) -> Any:
    known = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"{cls.__name__} has unknown fields {quote(unknown)}; known are {', '.join(known)}")
    if missing := [name for name, required in known.items() if required and name not in values]:
        raise InputError(f"{cls.__name__}: {missing[0]} is missing")
    return cls(**values)


def _refuse_unsupported(fields: Fields) -> None:
    architectures = fields.texts("architectures", default=[])
    model_type = fields.text("model_type", default="llama")
    if model_type != "llama" or any(name.lower() != "llamaforcausallm" for name in architectures):
        name = ", ".join(architectures) or model_type
        raise UnsupportedError(
            f"architecture {quote(name)} (model_type {quote(model_type)}) is not supported; only llama is"
        )
    for feature in ("attention_bias", "mlp_bias", "sliding_window"):
        if fields.values.get(feature):
            value = quote(fields.values[feature])
            raise UnsupportedError(f"{fields.called(feature)}={value} is not supported by this LLaMA")
    if (activation := fields.text("hidden_act", default="silu")) not in ("silu", "swish"):  # two names of one function
        raise UnsupportedError(f"hidden_act={quote(activation)} is not supported; only silu is")


def _rope_scaling_from_hf(rope: Fields) -> RopeScaling | None:
    kind = rope.text("rope_type", default=None) or rope.text("type", default="default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedError(f"rope_type {quote(kind)} is not supported; default and llama3 are")
    factors = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return RopeScaling(**factors, original_max_position_embeddings=rope.integer("original_max_position_embeddings"))


def layer_chunk(layer: int) -> str:
    """The file name of one layer's chunk."""
    return f"layer_{layer}.pkl"


def chunk_shapes(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    """Every chunk's file name with the nested dict of shapes it holds; matrices are [in, out]."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    NH = config.num_attention_heads * config.head_dim
    KH = config.num_key_value_heads * config.head_dim
    layer = {
        "attention": {"wq": (D, NH), "wk": (D, KH), "wv": (D, KH), "wo": (NH, D)},
        "feed_forward": {"w1": (D, F), "w2": (F, D), "w3": (D, F)},
        "attention_norm": (D,),
        "ffn_norm": (D,),
    }
    embeddings = {"tok_embeddings": (V, D), "norm": (D,)}
    if not config.tie_word_embeddings:
        embeddings["output"] = (D, V)
    return {EMBEDDINGS_CHUNK: embeddings} | {layer_chunk(i): layer for i in range(config.num_hidden_layers)}


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """float64 [H / 2], radians a token; RoPE (arXiv 2104.09864) with LLaMA 3's scaling where the config has it.

    LLaMA 3.1 divides the frequency of wavelengths above original / low_freq_factor by `factor`, keeps those under
    original / high_freq_factor, and goes over from one to the other linearly in original / wavelength.
    """
    H = config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, H, 2, dtype=np.float64) / H)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
