"""Opens a checkpoint that others made: a Hugging Face folder, a GGUF file or a Meta folder."""

from __future__ import annotations

import dataclasses
import pickle
import re
import shlex
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from errors import InputError, UnsupportedError, quote
from weights.config import LlamaConfig, RopeScaling, rope_frequencies
from weights.fields import Fields, in_file, read_json, reading
from weights.folder import DTYPES, MANIFEST
from weights.gguf_file import GgufTensor, read_gguf
from weights.tokenizers import TextTokenizer, from_gguf, from_hugging_face, from_meta

# --- Names ---

HUGGING_FACE, GGUF, META = range(3)  # the columns of NAMES
NAMES = {  # ours -> the source's; {i} is the layer
    "tok_embeddings": ("model.embed_tokens.weight", "token_embd.weight", "tok_embeddings.weight"),
    "norm": ("model.norm.weight", "output_norm.weight", "norm.weight"),
    "output": ("lm_head.weight", "output.weight", "output.weight"),
    **{
        ours: (f"model.layers.{{i}}.{hf}.weight", f"blk.{{i}}.{gg}.weight", f"layers.{{i}}.{ours}.weight")
        for ours, hf, gg in (
            ("attention_norm", "input_layernorm", "attn_norm"),
            ("attention.wq", "self_attn.q_proj", "attn_q"),
            ("attention.wk", "self_attn.k_proj", "attn_k"),
            ("attention.wv", "self_attn.v_proj", "attn_v"),
            ("attention.wo", "self_attn.o_proj", "attn_output"),
            ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
            ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
            ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
            ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
        )
    },
}
DROPPED = (  # on purpose: RoPE frequencies, which the config says too (GGUF's are read into it)
    ("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
    ("rope_freqs.weight",),
    ("rope.freqs", "layers.{i}.attention.inner_attention.rope.freqs"),
)
GGUF_CONFIG = {  # GGUF metadata -> Hugging Face config
    "general.architecture": "model_type",
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.attention.sliding_window": "sliding_window",
    "llama.rope.freq_base": "rope_theta",
}
META_CONFIG = {  # Meta's params.json -> Hugging Face config
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
}
SAFETENSORS_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened source. `read(key, shape)` gives one tensor, [out, in], and is told the shape it should have."""

    config: LlamaConfig
    model: str  # display name
    source: str  # identifies the input: its name and size
    dtype: str  # how the matrices are stored; float32 if quantised
    kind: int  # HUGGING_FACE, GGUF or META
    keys: frozenset[str]
    read: Callable[[str, tuple[int, ...]], np.ndarray]
    tokenizer: TextTokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognises a checkpoint and reads everything about it but its tensors.

    Raises:
      InputError: nothing there, or no checkpoint of a known kind, or a damaged one.
      UnsupportedError: a checkpoint of a kind that is known, with an architecture or feature that is not computed.
    """
    with reading(path):
        if path.is_file() and path.suffix not in FOLDER_FILES:
            return _open_gguf(path)
        if (path / "config.json").is_file():
            return _open_hugging_face(path)
        if (path / "params.json").is_file():
            return _open_meta(path)
        raise InputError(_why_no_checkpoint(path))


FOLDER_FILES = (".safetensors", ".pth", ".bin", ".json", ".pt")  # the files of a checkpoint that is a folder


def _why_no_checkpoint(path: Path) -> str:
    """What to type instead of an input that is none."""
    if path.is_file():
        return f"input {path} is one file of a checkpoint; give its folder: --input {shlex.quote(str(path.parent))}"
    if not path.exists():
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
            return (
                f"input {path} does not exist here; if it is a model of the Hugging Face hub, fetch it first: "
                f"hf download {path} --local-dir {path.name}, and then: python convert_weights.py --input {path.name}"
            )
        return f"input {path} does not exist; give a Hugging Face or Meta folder, or a GGUF file"
    if (path / MANIFEST).is_file():
        run = f"python benchmark_kascade_final.py --weights_dir {shlex.quote(str(path))}"
        return f"input {path} is converted already; run it: {run}"
    if files := sorted(path.glob("*.gguf")):
        return f"input {path} is a folder with a GGUF file in it; give the file: --input {shlex.quote(str(files[0]))}"
    return (
        f"input folder {path} is not a checkpoint: expected config.json with model.safetensors (Hugging Face), "
        "params.json with consolidated.NN.pth (Meta), or the path of a GGUF file"
    )


# --- Hugging Face folders ---


def _open_hugging_face(folder: Path) -> Checkpoint:
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise UnsupportedError(f"{folder} is quantised (quantization_config in config.json); give the plain weights")
    with in_file(folder / "config.json"):
        config = LlamaConfig.from_hf(raw)
    files = _safetensors_files(folder)
    shards = _tensors_by_key(files)
    dtypes = {key: shard.get_slice(key).get_dtype() for key, shard in shards.items()}
    for key, dtype in dtypes.items():
        if dtype not in SAFETENSORS_DTYPES:
            supported = ", ".join(SAFETENSORS_DTYPES)
            raise UnsupportedError(f"tensor {quote(key)} is stored as {dtype}; supported are {supported}")
    _check_tied(folder, config, shards)
    return Checkpoint(
        config=config,
        model=_model_name(folder),
        source=_source(folder, files),
        dtype=_common_dtype(SAFETENSORS_DTYPES[dtype] for key, dtype in dtypes.items() if key.endswith("proj.weight")),
        kind=HUGGING_FACE,
        keys=frozenset(shards),
        read=lambda key, shape: shards[key].get_tensor(key),
        tokenizer=from_hugging_face(folder, config.vocab_size),
    )


def _check_tied(folder: Path, config: LlamaConfig, shards: Mapping[str, Any]) -> None:
    keys = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and all(key in shards for key in keys):
        head, embeddings = (shards[key].get_tensor(key) for key in keys)
        if not np.array_equal(head, embeddings):
            raise InputError(f"{folder / 'config.json'} ties {keys[0]} to {keys[1]}, and they differ")


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder} has neither {single.name} nor {index.name}; only safetensors weights are read")
    values = read_json(index)
    with in_file(index):
        weight_map = Fields(values).within("weight_map")
        names = {weight_map.text(key) for key in weight_map.values}
        for name in sorted(names):  # a name with a folder in it would have us read files that nobody has given us
            plain = all(path(name).name == name for path in (PurePosixPath, PureWindowsPath))
            if not plain or not name.endswith(".safetensors"):
                raise InputError(
                    f"weight_map: expected names of .safetensors files in the same folder, got {quote(name)}"
                )
            if not (folder / name).is_file():
                raise InputError(f"{quote(name)} is missing, and weight_map names it")
        if not names:
            raise InputError("weight_map is empty")
    return [folder / name for name in sorted(names)]


def _tensors_by_key(files: Sequence[Path]) -> dict[str, Any]:
    """Every tensor's key with its opened (memory-mapped) safetensors file."""
    shards: dict[str, Any] = {}
    for file in files:
        with in_file(file):
            try:
                shard = safe_open(file, framework="np")
            except SafetensorError as error:
                raise InputError(f"truncated or damaged ({quote(str(error))})") from error
            for key in shard.keys():  # noqa: SIM118 - not a dict
                if key in shards:
                    raise InputError(f"duplicate tensor {quote(key)}: an earlier file holds it too")
                shards[key] = shard
    return shards


# --- GGUF files ---


def _open_gguf(path: Path) -> Checkpoint:
    metadata, tensors = read_gguf(path)
    with in_file(path):
        config = _gguf_config(metadata, tensors)
        if "rope_freqs.weight" in tensors:
            config = with_rope_factors(config, tensors["rope_freqs.weight"].read())
        tokenizer = from_gguf(metadata, config.vocab_size)
    kinds = [tensor.kind.name for tensor in tensors.values() if len(tensor.shape) == 2]
    return Checkpoint(
        config=config,
        model=path.stem,
        source=_source(path, [path]),
        dtype=_common_dtype(SAFETENSORS_DTYPES.get(kind, "quantised") for kind in kinds),
        kind=GGUF,
        keys=frozenset(tensors),
        read=lambda key, shape: tensors[key].read(),
        tokenizer=tokenizer,
    )


def _gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> LlamaConfig:
    if "token_embd.weight" not in tensors:
        raise InputError("missing tensor token_embd.weight")
    for key in GGUF_CONFIG:
        if isinstance(metadata.get(key), list):
            raise UnsupportedError(f"{key} differs from layer to layer: {quote(metadata[key])}")
    scaling = Fields(metadata).text("llama.rope.scaling.type", default="none")
    values = {name: metadata[key] for key, name in GGUF_CONFIG.items() if key in metadata}
    values |= {
        "model_type": values.get("model_type", "unknown"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {"rope_type": "default" if scaling == "none" else scaling},
    }
    config = LlamaConfig.from_hf(values, {name: key for key, name in GGUF_CONFIG.items()})
    only = {"llama.rope.dimension_count": config.head_dim, "llama.attention.value_length": config.head_dim}
    only |= {"llama.rope.scale_linear": 1.0, "llama.expert_count": 0, "split.count": 1}
    for key, legal in only.items():
        if (metadata.get(key) or legal) != legal:
            hint = "; join the files first: llama-gguf-split --merge FIRST_FILE OUTPUT" if key == "split.count" else ""
            raise UnsupportedError(f"{key}={quote(metadata[key])} is not supported; only {legal} is{hint}")
    return config


def with_rope_factors(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Adds the llama3 scaling that divides each RoPE frequency by its factor, [head_dim / 2], as llama.cpp stores it.

    Raises:
      UnsupportedError: the factors are not those of the released models (low 1, high 4, original length 8192).
    """
    if factors.shape == (config.head_dim // 2,) and (factors > 0).all() and np.isfinite(factors).all():
        if (factors == 1).all():
            return config
        scaled = dataclasses.replace(config, rope_scaling=RopeScaling(float(factors.max()), 1.0, 4.0, 8192))
        if np.allclose(factors, rope_frequencies(config) / rope_frequencies(scaled), rtol=1e-4):
            return scaled
    raise UnsupportedError("rope_freqs.weight: expected llama3 scaling with low 1, high 4, original length 8192")


# --- Meta folders ---


def _open_meta(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{i:02d}.pth" for i in range(max(len(files), 1))]
    if [file.name for file in files] != names:
        raise InputError(f"{folder}: expected {names[0]} to {names[-1]}, found {quote([file.name for file in files])}")
    params = read_json(folder / "params.json")
    if params.get("moe"):
        raise UnsupportedError(f"{folder / 'params.json'}: a mixture of experts (moe) is not supported")
    shards = [_load_pth(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        _compare_shards(file, shard, files[0], shards[0])
    with in_file(folder / "params.json"):
        config = _meta_config(params, shards)
    return Checkpoint(
        config=config,
        model=_model_name(folder),
        source=_source(folder, files),
        dtype=_common_dtype(str(array.dtype) for array in shards[0].values() if array.ndim == 2),
        kind=META,
        keys=frozenset(shards[0]),
        read=lambda key, shape: join_shards([shard[key] for shard in shards], shape),
        tokenizer=from_meta(folder, config.vocab_size),
    )


def _compare_shards(
    file: Path, shard: Mapping[str, np.ndarray], first_file: Path, first: Mapping[str, np.ndarray]
) -> None:
    """Every shard holds the same tensors, each a part of the same size."""
    if lacking := sorted(first.keys() ^ shard.keys()):
        raise InputError(f"missing tensor {quote(lacking[0])}: only one of {first_file.name} and {file.name} holds it")
    for key, array in shard.items():
        if array.shape != first[key].shape:
            expected = f"expected {first[key].shape} as in {first_file.name}"
            raise InputError(f"tensor {quote(key)} in {file.name} has shape {array.shape}, {expected}")


OLDEST_TORCH = (2, 6)  # before it, a file could run code even though it is loaded with weights_only (CVE-2025-32434)
PTH_ERRORS = (  # what torch.load raises at damaged bytes, or at bytes made to do harm
    *(RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError),
    *(ArithmeticError, AssertionError, MemoryError, OSError, struct.error),
)


def _load_pth(path: Path) -> dict[str, np.ndarray]:
    """One shard's tensors as memory-mapped arrays."""
    with in_file(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start[:1] == b"\x80" or start[:4] == b"ustar":
            raise InputError(
                "a file in torch's format of before 2020; load it with torch.load and save it with torch.save"
            )
        if start != b"PK\x03\x04":
            raise InputError("truncated or damaged (no zip file, as torch.save writes one)")
        try:
            import torch
        except ImportError as error:
            raise InputError("a PyTorch file, and torch is not installed: pip install torch") from error
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
            raise InputError(f"torch {torch.__version__} does not load it safely: pip install 'torch>=2.6'")
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except PTH_ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"truncated or damaged ({reason[:200]})") from error
        if not isinstance(tensors, dict):
            raise InputError(f"expected a dict of tensors, got {type(tensors).__name__}")
        return {_key(key, tensors): _from_torch(torch, key, tensor, path) for key, tensor in tensors.items()}


def _key(key: Any, tensors: Mapping[Any, Any]) -> str:
    if type(key) is not str:
        raise InputError(f"expected the names of tensors as keys, got {quote(key)} among {len(tensors)}")
    return key


def _from_torch(torch: Any, key: str, tensor: Any, path: Path) -> np.ndarray:
    """The tensor as an array on the same memory."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"expected a dict of tensors, got {type(tensor).__name__} for {quote(key)}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UnsupportedError(
            f"tensor {quote(key)} is stored as {tensor.layout} on {tensor.device}; only plain ones are read"
        )
    if tensor.numel() * tensor.element_size() > path.stat().st_size:  # one number can be shown as many
        raise InputError(f"tensor {quote(key)} has shape {tuple(tensor.shape)}, which is more than the file holds")
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype not in (torch.float16, torch.float32):
        raise UnsupportedError(f"tensor {quote(key)} is stored as {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return tensor.detach().numpy()


def _meta_config(params: Mapping[str, Any], shards: Sequence[Mapping[str, np.ndarray]]) -> LlamaConfig:
    """Adds what params.json does not say: vocabulary and MLP width by the shapes, the rest by LLaMA's generation."""
    embeddings, w1 = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
    for key in (embeddings, w1):
        if key not in shards[0]:
            raise InputError(f"missing tensor {key}")
        if shards[0][key].ndim != 2:
            raise InputError(f"tensor {key} has shape {shards[0][key].shape}, expected two axes")
    fields = Fields(params)
    scaled, rows = fields.boolean("use_scaled_rope", default=False), shards[0][embeddings].shape[0]
    split_by_rows = shards[0][embeddings].shape[1] == fields.integer("dim")  # LLaMA 3; 1 and 2 split columns
    values = {name: params[key] for key, name in META_CONFIG.items() if params.get(key) is not None}
    values |= {
        "vocab_size": rows * len(shards) if split_by_rows else rows,
        "intermediate_size": shards[0][w1].shape[0] * len(shards),
        "max_position_embeddings": 131072 if scaled else 8192 if "rope_theta" in params else 4096,
        "tie_word_embeddings": "output.weight" not in shards[0],
    }
    if scaled:  # 3.1 stretches by 8, the 1B and 3B of 3.2 by 32 without always saying so
        factor = fields.number("rope_scaling_factor", default=32.0 if params["dim"] <= 3072 else 8.0)
        values["rope_parameters"] = {"rope_type": "llama3"} | dataclasses.asdict(RopeScaling(factor, 1.0, 4.0, 8192))
    return LlamaConfig.from_hf(values, {name: key for key, name in META_CONFIG.items()})


def join_shards(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Joins model-parallel shards along the axis that makes `shape` of them; norms are whole in each shard.

    Where no axis does, they are joined along the first, so that the shape shows what is wrong.
    """
    if len(parts) == 1 or parts[0].shape == shape or parts[0].ndim == 0:
        return parts[0]
    by_columns = len(shape) == 2 and parts[0].shape == (shape[0], shape[1] // len(parts))
    return np.concatenate(parts, axis=1 if by_columns else 0)


# --- Tensors ---


def check_names(checkpoint: Checkpoint) -> None:
    """Compares the checkpoint's keys with what its config asks for.

    Raises:
      InputError: a tensor that is unknown or missing.
      UnsupportedError: a bias.
    """
    layers = range(checkpoint.config.num_hidden_layers)
    used = {names[checkpoint.kind] for names in NAMES.values()}
    unused = set(DROPPED[checkpoint.kind])
    if checkpoint.config.tie_word_embeddings:
        unused.add(NAMES["output"][checkpoint.kind])
    wanted, unwanted = ({t.format(i=i) for t in templates for i in layers} for templates in (used - unused, unused))
    for key in sorted(checkpoint.keys - wanted - unwanted):
        if key.endswith(".bias"):
            raise UnsupportedError(f"tensor {quote(key)}: biases are not supported by this LLaMA")
        where = f"{checkpoint.source}: a LLaMA of {len(layers)} layers has none such"
        raise InputError(f"unknown tensor {quote(key)} in {where}")
    if missing := sorted(wanted - checkpoint.keys):
        raise InputError(f"missing tensor {missing[0]} in {checkpoint.source} ({len(missing)} missing in all)")


def read_arrays(
    checkpoint: Checkpoint, shapes: Mapping[str, Any], layer: int | None, dtype: np.dtype, prefix: str = ""
) -> dict[str, Any]:
    """Reads one chunk's tensors into a nested dict like that of its shapes; `layer` is None for the embeddings' chunk.

    Raises:
      InputError: a tensor of another shape, one with NaN or infinity in it, or one too large for `dtype`.
    """
    return {
        name: read_arrays(checkpoint, shape, layer, dtype, f"{prefix}{name}.")
        if isinstance(shape, dict)
        else _read_array(checkpoint, f"{prefix}{name}", layer, shape, dtype)
        for name, shape in shapes.items()
    }


def _read_array(
    checkpoint: Checkpoint, ours: str, layer: int | None, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    key = NAMES[ours][checkpoint.kind].format(i=layer)
    transposed = len(shape) == 2 and ours != "tok_embeddings"  # sources store matrices [out, in]
    stored = shape[::-1] if transposed else shape
    array = checkpoint.read(key, stored)
    if array.shape != stored:
        raise InputError(f"tensor {key} has shape {array.shape}, expected {stored}")
    if not np.isfinite(array).all():
        raise InputError(f"tensor {key} has NaN or infinity in it")
    heads = {"attention.wq": "num_attention_heads", "attention.wk": "num_key_value_heads"}.get(ours)
    if heads and checkpoint.kind != HUGGING_FACE:
        array = half_split_rows(array, getattr(checkpoint.config, heads))
    with np.errstate(over="ignore"):
        result = np.array(array.T if transposed else array, dtype, order="C")  # a copy: sources may be read-only maps
    if not np.isfinite(result).all():
        raise InputError(f"tensor {key} goes up to {np.abs(array).max():.3g}, too large for {dtype}")
    return result


def half_split_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders each head's rows from GGUF's and Meta's RoPE pairs (2i, 2i + 1) to Hugging Face's (i, i + H/2)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# --- Small helpers ---


def _model_name(folder: Path) -> str:
    """A folder's name; in the Hugging Face cache, models--ORG--NAME/snapshots/COMMIT, the model's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _source(path: Path, files: Sequence[Path]) -> str:
    name = path.name if path.is_file() else _model_name(path)
    return f"{name} ({sum(file.stat().st_size for file in files)} bytes)"


def _common_dtype(names: Iterable[str]) -> str:
    """The one dtype that all matrices have; float32 if they differ or are quantised."""
    names = set(names)
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else "float32"
