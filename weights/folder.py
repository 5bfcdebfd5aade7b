"""The chunked weights folder: manifest, chunks and their format, and how a folder appears complete or not at all.

A chunk is a pickle of builtin objects alone, nested dicts whose leaves are (dtype name, shape, bytes), and is read by
`weights.plain_pickle`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from errors import InputError, quote
from weights.config import LlamaConfig, chunk_shapes
from weights.fields import Fields, in_file, read_json, reading
from weights.plain_pickle import unpickle

try:
    import fcntl
except ImportError:  # Windows has none: two conversions into one folder are not kept apart there
    fcntl = None

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DEFAULT_WEIGHTS = Path("llama_weights_chunked")
DTYPES = {  # the dtypes that a chunk may hold, by the name the manifest gives them
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LARGEST_FRAMING = 4096  # bytes of a chunk that are not its arrays': names, shapes and instructions, about 400


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of one of DTYPES.

    Raises:
      InputError: another name.
    """
    if name not in DTYPES:
        raise InputError(f"dtype {quote(name)} is not supported; {', '.join(DTYPES)} are")
    return DTYPES[name]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Manifest ---


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What manifest.json says of a weights folder.

    Attributes:
      model: display name.
      source: the checkpoint that it was converted from: name and size.
      dtype: of every array, one of DTYPES.
      config: the model's shape.
      chunks: file name -> {"bytes": size, "sha256": hex}.
      tokenizer: {"file", "bytes", "sha256", "probe_sha256"}, as weights.tokenizers writes it.
      format_version: FORMAT_VERSION.
    """

    model: str
    source: str
    dtype: str
    config: LlamaConfig
    chunks: dict[str, dict[str, Any]]
    tokenizer: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the weights: of their chunks' names and hashes."""
        chunks = sorted((name, entry["sha256"]) for name, entry in self.chunks.items())
        return hashlib.sha256(json.dumps(chunks).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(entry["bytes"] for entry in self.chunks.values())

    def write(self, folder: Path) -> None:
        """Writes manifest.json."""
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=2), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a weights folder's manifest.

    Raises:
      InputError: no such folder, one that is empty or not converted yet, no manifest, or one that cannot be read, is of
        another version, or lists other chunks, or chunks of other sizes, than its config needs.
    """
    path = folder / MANIFEST
    with reading(folder):
        if not path.is_file():
            raise InputError(_why_no_manifest(folder))
    values = Fields(read_json(path))
    with in_file(path):
        version = values.integer("format_version", low=0)
        if version != FORMAT_VERSION:
            raise InputError(
                f"format version {version}, and this program reads version {FORMAT_VERSION}; "
                f"convert the model anew with convert_weights.py --overwrite"
            )
        try:
            return _manifest(values)
        except InputError as error:
            raise InputError(f"{error}; convert the model anew with convert_weights.py --overwrite") from error


def _why_no_manifest(folder: Path) -> str:
    """What to do about something that is given as a weights folder and is none."""
    whole = folder.parent if folder.suffix in (".safetensors", ".pth") and folder.is_file() else folder
    where, convert = f"weights folder {folder}", f"python convert_weights.py --input {shlex.quote(str(whole))}"
    if folder.is_file():
        if folder.suffix in (".gguf", ".safetensors", ".pth"):
            return f"{folder} is a checkpoint's file, not a weights folder; convert it first: {convert}"
        return f"{where} is not a folder; make one with convert_weights.py"
    if not folder.is_dir():
        return f"{where} does not exist; make it with convert_weights.py --output {shlex.quote(str(folder))}"
    if any((folder / name).is_file() for name in ("config.json", "params.json")):
        return f"{folder} is a checkpoint that is not converted yet; convert it first: {convert}"
    what = f"has no {MANIFEST}" if any(folder.iterdir()) else "is empty"
    return f"{where} {what}; make it with convert_weights.py --output {shlex.quote(str(folder))}"


def _manifest(values: Fields) -> Manifest:
    dtype = values.text("dtype")
    if dtype not in DTYPES:
        raise values.refused("dtype", f"one of {', '.join(DTYPES)}")
    config = LlamaConfig.from_dict(values.object("config"))
    chunks, shapes = values.within("chunks"), chunk_shapes(config)
    if unknown := sorted(chunks.values.keys() - shapes.keys()):
        raise InputError(f"lists the chunk {quote(unknown[0])}, which its config does not need")
    for name, shape in shapes.items():
        _check_entry(chunks.within(name), count_scalars(shape) * DTYPES[dtype].itemsize)
    tokenizer = values.within("tokenizer")
    if tokenizer.text("file") != Path(tokenizer.text("file")).name:
        raise tokenizer.refused("file", "the name of a file in the folder")
    tokenizer.integer("bytes")
    for name in ("sha256", "probe_sha256"):
        _check_sha256(tokenizer, name)
    return Manifest(values.text("model"), values.text("source"), dtype, config, chunks.values, tokenizer.values)


def _check_entry(entry: Fields, payload: int) -> None:
    """Compares a chunk's entry with the bytes that its arrays have: a size that cannot be is never read."""
    if not payload < entry.integer("bytes", high=2**60) <= payload + LARGEST_FRAMING:
        raise entry.refused("bytes", f"{payload} to {payload + LARGEST_FRAMING} by the config")
    _check_sha256(entry, "sha256")


def _check_sha256(entry: Fields, name: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", entry.text(name)):
        raise entry.refused(name, "64 hexadecimal digits")


def count_scalars(shapes: Any) -> int:
    """Number of scalars in a nested dict of shapes."""
    return sum(map(count_scalars, shapes.values())) if isinstance(shapes, Mapping) else math.prod(shapes)


# --- Chunks ---


def write_chunk(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a nested dict of arrays; returns the manifest's entry for it, {"bytes", "sha256"}."""
    with path.open("wb") as file:
        written = _Hashed(file)
        pickle.dump(_leaves(arrays), written, protocol=5)
    return {"bytes": written.size, "sha256": written.digest.hexdigest()}


def _leaves(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _leaves(leaf) for name, leaf in tree.items()}
    memory = memoryview(np.ascontiguousarray(tree).reshape(-1).view(np.uint8)).toreadonly()
    return str(tree.dtype), tree.shape, pickle.PickleBuffer(memory)  # which pickle writes as bytes, without a copy


class _Hashed:
    """A file that keeps count of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, part: bytes) -> None:
        self.file.write(part)
        self.digest.update(part)
        self.size += memoryview(part).nbytes


def read_chunks(folder: Path, manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a folder's chunks one after the other: each one's file name and nested dict of arrays.

    The arrays are read-only views of the file's bytes, at any alignment; a chunk is in memory as long as they are used.

    Raises:
      InputError: a chunk is missing, damaged, altered, or not what the manifest says.
    """
    for name, shapes in chunk_shapes(manifest.config).items():
        yield name, _read_chunk(folder / name, manifest.chunks[name], shapes, manifest.dtype)


def _read_chunk(path: Path, entry: Mapping[str, Any], shapes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    try:
        with in_file(path):
            return _arrays(unpickle(_checked_bytes(path, entry)), shapes, dtype, "")
    except InputError as error:
        raise InputError(f"weights chunk {error}; convert the model anew") from error


def _checked_bytes(path: Path, entry: Mapping[str, Any]) -> bytes:
    """A chunk's bytes, after its size and then its SHA-256 were found to be the manifest's."""
    check_size(path, entry)
    try:
        data = path.read_bytes()
    except MemoryError as error:
        raise InputError(f"{entry['bytes']} bytes, more than there is memory for") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise InputError("altered (its SHA-256 differs)")
    return data


def check_size(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises InputError where a chunk is missing or of another size than the manifest says."""
    if not path.is_file():
        raise InputError("missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise InputError(f"{size} bytes, expected {entry['bytes']}")


def check_chunks(folder: Path, manifest: Manifest) -> None:
    """Raises InputError where a chunk's file is missing, of another size than the manifest says, or altered."""
    for name, entry in manifest.chunks.items():
        with in_file(folder / name):
            check_size(folder / name, entry)
            if sha256_of(folder / name) != entry["sha256"]:
                raise InputError("altered (its SHA-256 differs)")


def _arrays(tree: Any, shapes: Mapping[str, Any], dtype: str, where: str) -> dict[str, Any]:
    """Makes the arrays of a chunk, after it was found to hold exactly the named ones, of this dtype; all finite."""
    if type(tree) is not dict or tree.keys() != shapes.keys():
        got = quote(list(tree)) if type(tree) is dict else type(tree).__name__
        raise InputError(f"{where}expected the keys {list(shapes)}, got {got}")
    return {
        name: _arrays(tree[name], shape, dtype, f"{where}{name}/")
        if isinstance(shape, Mapping)
        else _array(tree[name], shape, dtype, f"{where}{name}")
        for name, shape in shapes.items()
    }


def _array(leaf: Any, shape: tuple[int, ...], dtype: str, where: str) -> np.ndarray:
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if type(leaf) is not tuple or [type(part) for part in leaf] != [str, tuple, memoryview]:
        raise InputError(f"{where}: expected (dtype name, shape, bytes)")
    if leaf[:2] != (dtype, shape) or leaf[2].nbytes != size:
        got = f"{quote(leaf[0])} {quote(leaf[1][:5])} of {leaf[2].nbytes} bytes"
        raise InputError(f"{where}: expected {dtype} {shape} of {size} bytes, got {got}")
    array = np.frombuffer(leaf[2], DTYPES[dtype]).reshape(shape)
    if not np.isfinite(array).all():
        raise InputError(f"{where} has NaN or infinite values")
    return array


# --- A folder that appears complete or not at all ---


def check_output(output: Path) -> Path:
    """The path of a folder to make, resolved, after it was found that one can be made there.

    Raises:
      InputError: something that is not ours stands there, or the place cannot be written to.
    """
    try:
        output = Path(os.path.expanduser(output)).resolve()
        if output.is_symlink():  # from Python 3.13 on, resolve raises nothing
            raise RuntimeError("a loop of links")
        stands, filled = output.exists(), output.is_dir() and any(output.iterdir())
    except (OSError, RuntimeError) as error:  # no permission; a loop of links; ~somebody
        raise InputError(f"output folder {output} cannot be used ({error}); give another --output") from error
    if stands and (filled or not output.is_dir()) and not (output / MANIFEST).is_file():
        raise InputError(f"{output} is not a folder that this program made (no {MANIFEST}); give another --output")
    if output.is_mount():
        inside = output / "weights"
        raise InputError(f"{output} is a mount point, which cannot be replaced; give a folder in it, such as {inside}")
    if not filled:  # try now whether a folder can be made, and not after a download
        parent = next(parent for parent in output.parents if parent.exists())
        with _sentence_for(output):
            trial = parent / _temporary(output, "new").name
            trial.mkdir()
            with contextlib.suppress(FileNotFoundError):  # another process, which makes the folder, has tidied up
                trial.rmdir()
    return output


def _temporary(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}")


@contextlib.contextmanager
def claiming(output: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keeps other processes from making the folder `output` meanwhile, and removes what dead ones have left beside it.

    Args:
      output: the folder, resolved.
      waiting: called once if another process is making it; then this one waits until that has ended.

    Raises:
      InputError: the place cannot be written to.
    """
    lock = output.with_name(f".{output.name}.lock")
    with _sentence_for(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock, waiting)
        _remove_leftovers(output)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _locked(path: Path, waiting: Callable[[], None]) -> BinaryIO:
    """The lock file, opened and locked; the system unlocks it when the process ends, however it ends."""
    while True:
        file = path.open("ab")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):  # the owner removes it in the end: then it is another file's lock
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def leftovers(output: Path) -> list[Path]:
    """The temporary folders beside `output`: of a process that is at work or was killed."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(new|old)-\d+")
    return sorted(path for path in output.parent.glob(".*") if pattern.fullmatch(path.name))


def _remove_leftovers(output: Path) -> None:
    """Removes the temporary folders of conversions that were killed, and puts back an old folder that one had moved."""
    for path in leftovers(output):
        if ".old-" in path.name and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `output` that takes its place in the end, or is removed on an error.

    Raises:
      InputError: it cannot be written; `output` is as it was.
    """
    new, old = (_temporary(output, kind) for kind in ("new", "old"))
    with _sentence_for(output):
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


@contextlib.contextmanager
def _sentence_for(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"disk full, {output} is as it was; free some space, or give another --output") from error
        where = Path(error.filename or output.parent)
        where = where.parent if where.name.startswith(f".{output.name}.") else where  # not a temporary folder
        reason = f"{error.strerror or error}: {where}"
        raise InputError(f"cannot make {output} ({reason}); give an --output that you may write to") from error


def check_space(output: Path, num_bytes: int) -> None:
    """Raises InputError where the disk that `output` is to be on has fewer bytes free."""
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise InputError(
            f"{output} needs {num_bytes / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free there; "
            "free some space, or give another --output"
        )
