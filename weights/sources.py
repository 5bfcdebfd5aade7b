"""Opens a checkpoint that others made: a Hugging Face folder, a GGUF file or a Meta folder."""

from __future__ import annotations

import dataclasses
import pickle
import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from errors import InputError, UnsupportedError, quote
from weights.config import LlamaConfig, RopeFactors, RopeScaling, rope_frequencies
from weights.fields import Fields, in_file, read_json, reading
from weights.folder import DTYPES, MANIFEST
from weights.gguf_file import GgufTensor, read_gguf
from weights.hugging_face import SAFETENSORS_DTYPES, open_hugging_face
from weights.tensors import GGUF, META, Checkpoint, common_dtype, model_name, source_of
from weights.tokenizers import from_gguf, from_meta

GGUF_INTERLEAVED = {  # architectures of GGUF files that are read: whether q and k have RoPE's pairs side by side
    "llama": True,
    "qwen2": False,
    "qwen3": False,
    "phi3": False,
    "smollm3": True,
}
GGUF_CONFIG = {  # GGUF metadata, behind the architecture's name -> Hugging Face config
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
GGUF_ROPE = {  # the same -> rope_parameters
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
MOST_PARTS = 10_000  # of a split file
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
            return open_hugging_face(path)
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


# --- GGUF files ---


def _open_gguf(path: Path) -> Checkpoint:
    files, metadata, tensors = _read_parts(path)
    with in_file(path):
        config = _gguf_config(metadata, tensors)
        if "rope_freqs.weight" in tensors:
            config = with_rope_factors(config, tensors["rope_freqs.weight"].read())
        tokenizer = from_gguf(metadata, config.vocab_size)
    kinds = [tensor.kind.name for tensor in tensors.values() if len(tensor.shape) == 2]
    return Checkpoint(
        config=config,
        model=path.stem,
        source=source_of(path, files),
        dtype=common_dtype(SAFETENSORS_DTYPES.get(kind, "quantised") for kind in kinds),
        kind=GGUF,
        keys=frozenset(tensors),
        read=lambda key, shape: tensors[key].read(),
        tokenizer=tokenizer,
        interleaved=GGUF_INTERLEAVED[metadata["general.architecture"]],
    )


def _read_parts(path: Path) -> tuple[list[Path], dict[str, Any], dict[str, GgufTensor]]:
    """The file, or all parts of a split one: their paths, the first one's metadata, everyone's tensors."""
    metadata, tensors = read_gguf(path)
    with in_file(path):
        count = Fields(metadata).integer("split.count", low=0, high=MOST_PARTS, default=1)
        if count < 2:
            return [path], metadata, tensors
        name = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})", path.stem)
        stem = name[1] if name else path.stem
        files = [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}{path.suffix}") for i in range(count)]
        if absent := [file.name for file in files if not file.is_file()]:
            raise InputError(
                f"split.count={count}, and {quote(absent[0])} is not beside it; "
                "with all parts there, llama-gguf-split --merge FIRST_FILE OUTPUT joins them"
            )
    parts = [(metadata, tensors) if file == path else read_gguf(file) for file in files]
    joined: dict[str, GgufTensor] = {}
    for file, (_, part) in zip(files, parts, strict=True):
        if twice := sorted(joined.keys() & part.keys()):
            raise InputError(f"{file}: duplicate tensor {quote(twice[0])}: an earlier part holds it too")
        joined |= part
    return files, parts[0][0], joined


def _gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> LlamaConfig:
    if "token_embd.weight" not in tensors:
        raise InputError("missing tensor token_embd.weight")
    architecture = Fields(metadata).text("general.architecture", default="unknown")
    if architecture not in GGUF_INTERLEAVED:
        supported = ", ".join(GGUF_INTERLEAVED)
        raise UnsupportedError(f"architecture {quote(architecture)} is not supported; {supported} are")
    start = f"{architecture}."
    own = {key.removeprefix(start): _for_all_layers(key, metadata[key]) for key in metadata if key.startswith(start)}
    windowed = architecture == "llama" and own.get("attention.sliding_window")
    values = {name: own[key] for key, name in GGUF_CONFIG.items() if key in own}
    values |= {
        "model_type": "mistral" if windowed else architecture,  # which llama.cpp counts among the LLaMAs
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _gguf_rope(own, tensors),
    }
    names = {name: f"{start}{key}" for key, name in (GGUF_CONFIG | GGUF_ROPE).items()}
    biases = {"qkv_bias": "blk.0.attn_q.bias", "output_bias": "blk.0.attn_output.bias"}
    config = LlamaConfig.from_hf(values, names)
    config = dataclasses.replace(config, **{field: key in tensors for field, key in biases.items()})
    only = {"rope.dimension_count": config.head_dim, "attention.value_length": config.head_dim, "expert_count": 0}
    for key, legal in only.items():
        if (own.get(key) or legal) != legal:
            raise UnsupportedError(f"{start}{key}={quote(own[key])} is not supported; only {legal} is")
    return config


def _for_all_layers(key: str, value: Any) -> Any:
    """One number for a list of a number for each layer, if they are equal."""
    if key.endswith(("head_count", "head_count_kv", "feed_forward_length")) and isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedError(f"{key} differs from layer to layer: {quote(value)}")
        return value[0]
    return value


def _gguf_rope(own: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """rope_parameters of a GGUF file; without a type, llama.cpp takes a factor as a linear one."""
    rope = {name: own[key] for key, name in GGUF_ROPE.items() if key in own}
    if "rope.scale_linear" in own:
        rope.setdefault("factor", own["rope.scale_linear"])
    rope.setdefault("rope_type", "linear" if rope.get("factor") not in (None, 0, 1) else "none")
    scale = own.get("rope.scaling.attn_factor")
    long, short = (tensors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long and short:
        factors = {"short_factor": short.read().tolist(), "long_factor": long.read().tolist()}
        return rope | factors | {"rope_type": "longrope", "attention_factor": 1.0 if scale is None else scale}
    if scale not in (None, 1):
        raise UnsupportedError(f"rope.scaling.attn_factor={quote(scale)} is not supported without rope_factors tensors")
    return rope | {"rope_type": "default"} if rope["rope_type"] == "none" else rope


def with_rope_factors(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Adds the scaling that divides each RoPE frequency by its factor, [head_dim / 2], as llama.cpp stores it.

    It is llama3's where the factors are those of the released models (low 1, high 4, original length 8192).

    Raises:
      InputError: factors of another number, or that are not above 0.
      UnsupportedError: another scaling beside it.
    """
    if factors.shape != (config.head_dim // 2,) or not (factors > 0).all() or not np.isfinite(factors).all():
        raise InputError(f"rope_freqs.weight: expected {config.head_dim // 2} numbers above 0, got {quote(factors)}")
    if (factors == 1).all():
        return config
    if config.rope_scaling is not None:
        raise UnsupportedError("rope_freqs.weight beside another scaling of RoPE is not supported")
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(float(factors.max()), 1.0, 4.0, 8192))
    if np.allclose(factors, rope_frequencies(config) / rope_frequencies(scaled), rtol=1e-4):
        return scaled
    return dataclasses.replace(config, rope_scaling=RopeFactors(tuple(factors.tolist())))


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
        model=model_name(folder),
        source=source_of(folder, files),
        dtype=common_dtype(str(array.dtype) for array in shards[0].values() if array.ndim == 2),
        kind=META,
        keys=frozenset(shards[0]),
        read=lambda key, shape: join_shards([shard[key] for shard in shards], shape),
        tokenizer=from_meta(folder, config.vocab_size),
        interleaved=True,
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
        "model_type": "mistral" if values.get("sliding_window") else "llama",
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
