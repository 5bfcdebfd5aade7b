"""Opens a Hugging Face folder: config.json and safetensors, in the names and dtypes that people have."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from errors import InputError, UnsupportedError, quote
from weights.config import LlamaConfig
from weights.fields import Fields, in_file, read_json
from weights.tensors import HUGGING_FACE, NAMES, Checkpoint, common_dtype, model_name, source_of
from weights.tokenizers import from_hugging_face

SAFETENSORS_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
FLOAT8_BLOCK = (128, 128)  # the block of a scale, where the config does not say
WRAPPERS = ("_orig_mod.", "language_model.")  # what torch.compile and models of text and images put into the names
HEAD, EMBEDDINGS = NAMES["output"][HUGGING_FACE], NAMES["tok_embeddings"][HUGGING_FACE]


class Stored(NamedTuple):
    """One tensor in its opened (memory-mapped) file, by the name that it has there."""

    file: Path
    shard: Any
    key: str

    @property
    def dtype(self) -> str:
        """Its dtype as safetensors names it."""
        return self.shard.get_slice(self.key).get_dtype()

    def read(self) -> np.ndarray:
        """Its values; 8-bit ones without their scale."""
        return self._read_float8() if self.dtype in FLOAT8 else self.shard.get_tensor(self.key)

    def _read_float8(self) -> np.ndarray:
        """Past the library, which has no numpy dtype for them; it checked the header when it opened the file."""
        with self.file.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            start, end = json.loads(file.read(size))[self.key]["data_offsets"]
        data = np.memmap(self.file, np.uint8, "r", 8 + size + start, (end - start,))
        return data.view(FLOAT8[self.dtype]).reshape(self.shard.get_slice(self.key).get_shape())


def open_hugging_face(folder: Path) -> Checkpoint:
    """Reads everything about a folder but its tensors; errors as `sources.open_checkpoint`."""
    raw = read_json(folder / "config.json")
    files = _safetensors_files(folder)
    tensors = _tensors_by_key(files)
    with in_file(folder / "config.json"):
        if raw.get("tie_word_embeddings") is None and HEAD not in tensors:
            raw = {**raw, "tie_word_embeddings": True}
        config, warnings = _with_stored_biases(LlamaConfig.from_hf(raw), tensors)
    scales = _float8_scales(folder, raw, tensors)
    block = (raw.get("quantization_config") or {}).get("weight_block_size")

    def read(key: str, shape: tuple[int, ...]) -> np.ndarray:
        array = tensors[key].read()
        return dequantised(key, array, tensors[scales[key]].read(), block) if key in scales else array

    checkpoint = Checkpoint(
        config=config,
        model=model_name(folder),
        source=source_of(folder, files),
        dtype=common_dtype(
            SAFETENSORS_DTYPES.get(stored.dtype, "quantised")
            for key, stored in tensors.items()
            if key.endswith("proj.weight")
        ),
        kind=HUGGING_FACE,
        keys=frozenset(tensors.keys() - scales.values()),
        read=read,
        tokenizer=from_hugging_face(folder, config.vocab_size),
        interleaved=False,
        warnings=warnings,
    )
    _check_dtypes(checkpoint, tensors, scales)
    _check_tied(folder, config, tensors)
    return checkpoint


def _with_stored_biases(config: LlamaConfig, tensors: Mapping[str, Stored]) -> tuple[LlamaConfig, tuple[str, ...]]:
    """Without the biases that the config has and no tensor, as some programs write it, and a warning of them."""
    first = {"qkv_bias": "attention.bq", "output_bias": "attention.bo"}
    keys = {field: NAMES[ours][HUGGING_FACE].format(i=0) for field, ours in first.items() if getattr(config, field)}
    absent = {field: key for field, key in keys.items() if key not in tensors}
    warnings = (f"config.json has biases, and {', '.join(absent.values())} is not stored: none is added",)
    return dataclasses.replace(config, **dict.fromkeys(absent, False)), warnings if absent else ()


def _check_dtypes(checkpoint: Checkpoint, tensors: Mapping[str, Stored], scales: Mapping[str, str]) -> None:
    for key in sorted(checkpoint.wanted() & checkpoint.keys):
        if (dtype := tensors[key].dtype) not in SAFETENSORS_DTYPES and key not in scales:
            supported = ", ".join(SAFETENSORS_DTYPES)
            raise UnsupportedError(f"tensor {quote(key)} is stored as {dtype}; supported are {supported}")


def _check_tied(folder: Path, config: LlamaConfig, tensors: Mapping[str, Stored]) -> None:
    if config.tie_word_embeddings and HEAD in tensors and EMBEDDINGS in tensors:
        head, embeddings = (tensors[key].read() for key in (HEAD, EMBEDDINGS))
        if not np.array_equal(head, embeddings):
            raise InputError(f"{folder / 'config.json'} ties {HEAD} to {EMBEDDINGS}, and they differ")


# --- 8-bit floats ---


def _float8_scales(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, str]:
    """The key of each 8-bit tensor's scale."""
    quantised = [key for key, stored in tensors.items() if stored.dtype in FLOAT8]
    if raw.get("quantization_config") and not quantised:
        raise UnsupportedError(f"{folder} is quantised (quantization_config in config.json); give the plain weights")
    scales = {}
    for key in quantised:
        names = [f"{key}_scale", f"{key}_scale_inv"]
        if found := [name for name in names if name in tensors and tensors[name].dtype in SAFETENSORS_DTYPES]:
            scales[key] = found[0]
        else:
            dtype = tensors[key].dtype
            raise UnsupportedError(f"tensor {quote(key)} is stored as {dtype}, and its scale is missing")
    return scales


def dequantised(key: str, array: np.ndarray, scale: np.ndarray, block: Any) -> np.ndarray:
    """float32: 8-bit values times their scale, which is one for all, for a row, or for a block of rows and columns.

    Raises:
      InputError: the scale fits neither.
    """
    values, scale = array.astype(np.float32), scale.astype(np.float32)
    if scale.size == 1:
        return values * scale.reshape(())
    if scale.shape[0] == values.shape[0] and scale.size == len(values):
        return values * scale.reshape(-1, 1)
    block = FLOAT8_BLOCK if block is None else block
    sizes = [-(-length // step) for length, step in zip(values.shape, block)]
    if list(scale.shape) != sizes:
        raise InputError(
            f"the scale of tensor {quote(key)} has shape {scale.shape}, expected {tuple(sizes)}, a row or one"
        )
    spread = np.repeat(np.repeat(scale, block[0], 0)[: len(values)], block[1], 1)
    return values * spread[:, : values.shape[1]]


# --- Files and names ---


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return _numbered_files(folder, index)
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


def _numbered_files(folder: Path, index: Path) -> list[Path]:
    """model-00001-of-00003.safetensors and its like, whose index is not there."""
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise InputError(f"{folder} has neither model.safetensors nor {index.name}; only safetensors weights are read")
    count = re.fullmatch(r"model-\d+-of-(\d+)", files[0].stem)
    width = len(count[1]) if count else 5
    names = [f"model-{i + 1:0{width}d}-of-{len(files):0{width}d}.safetensors" for i in range(len(files))]
    if [file.name for file in files] != names:
        raise InputError(f"{folder}: expected {names[0]} to {names[-1]}, found {quote([file.name for file in files])}")
    return files


def _tensors_by_key(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor by the name that a plain checkpoint gives it."""
    tensors: dict[str, Stored] = {}
    for stored in _all_tensors(files):
        key = stored.key
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        if key.startswith(("embed_tokens.", "layers.", "norm.", "rotary_emb.")):  # the model without its head
            key = f"model.{key}"
        if key in tensors:
            raise InputError(f"{stored.file}: duplicate tensor {quote(key)}: an earlier file holds it too")
        tensors[key] = stored
    return tensors


def _all_tensors(files: Sequence[Path]) -> Iterator[Stored]:
    for file in files:
        with in_file(file):
            try:
                shard = safe_open(file, framework="np")
            except SafetensorError as error:
                raise InputError(f"truncated or damaged ({quote(str(error))})") from error
        for key in shard.keys():  # noqa: SIM118 - not a dict
            yield Stored(file, shard, key)
