"""What a run begins with: the device, the dtype, the tokenizer, and the calibration and test windows of a text."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # only its tokenizers are used: no word on missing PyTorch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the weights folder

import jax
import jax.numpy as jnp
import psutil
from transformers import AutoTokenizer

import kascade_pallas_gpu
import kascade_pallas_tpu
from kascade_core import InputError, Selection

DEFAULT_WEIGHTS = Path("llama_weights_chunked")
DEFAULT_TEXT = Path(__file__).with_name("wikipedia_sample.txt")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


# --- Flags' types ---


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def at_least_one(text: str) -> int:
    """A flag's whole number above 0."""
    return _whole(text, least=1)


def at_least_zero(text: str) -> int:
    """A flag's whole number, 0 or more."""
    return _whole(text, least=0)


def share(text: str) -> float:
    """A flag's number in [0, 1]."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {value}")
    return value


def lengths(text: str) -> list[int]:
    """A flag's token counts, N,N,..., ascending."""
    counts = sorted({at_least_one(part) for part in text.split(",")})
    if counts[-1] >= 2**31:
        raise argparse.ArgumentTypeError(f"positions are 32-bit numbers, got {counts[-1]}")
    return counts


# --- The machine ---


def configure_device(device: str) -> list[jax.Device]:
    """Makes JAX compute on `device` ("cpu", "tpu" or "gpu"). Raises InputError where JAX sees none.

    Every CPU core becomes a device: XLA's own threads inside one device leave much of a machine idle.
    """
    platforms = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}  # with no platform left, JAX fails an assertion
    jax.config.update("jax_platforms", platforms[device])
    with contextlib.suppress(RuntimeError):  # JAX is running already, and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    try:
        return jax.devices(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"JAX sees no {device.upper()} here ({reason}); try --device cpu") from error


def pick_dtype(name: str, device: str) -> str:
    """Resolves "auto": bfloat16 on accelerators and on CPUs with AMX, where it is several times faster than float32.

    Raises:
      InputError: float16 where the hardware does not multiply it.
    """
    if name == "float16" and device != "gpu":
        raise InputError(f"--dtype float16: a {device.upper()} does not multiply it; use bfloat16 or float32")
    if name != "auto":
        return name
    cpuinfo = Path("/proc/cpuinfo")
    has_amx = cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
    return "bfloat16" if device != "cpu" or has_amx else "float32"


def pick_kernel(
    name: str,
    device: str,
    selection: Selection,
    length: int,
    dtype: str,
    head_dim: int | None = None,
    capability: str | None = None,
) -> tuple[str, str]:
    """The implementation of attention, and why: "auto" is the device's own kernels where they take the sizes.

    The GPU's own fall back to XLA also where they were asked for by name. The width of heads and the GPU's compute
    capability are not known yet where they are None.

    Raises:
      NotImplementedError: the TPU's kernels were asked for by name and do not take the sizes; it names some that would
        do.
    """
    own = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
    kernel = own.get(device, "xla") if name == "auto" else name
    try:
        if kernel == "pallas_tpu":
            kascade_pallas_tpu.check_sizes(selection, length)
        if kernel == "pallas_gpu":
            kascade_pallas_gpu.check_sizes(selection.tile_size, head_dim, dtype, capability)
    except NotImplementedError as error:
        if name == "pallas_tpu":
            raise
        return "xla", f"{error}; they would be faster" if name == "auto" else str(error)
    if name == "auto":
        return kernel, f"the one for a {device.upper()}"
    interpreted = kernel not in ("xla", own.get(device))
    return kernel, f"as asked, and interpreted: correct on a {device.upper()}, and slow" if interpreted else "as asked"


def peak_memory(device: jax.Device) -> int | None:
    """The most bytes in use since the start: of the process on a CPU, otherwise of the device; None where unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    return process_peak_memory()


def process_peak_memory() -> int | None:
    """The most bytes that this process has had in memory; None on a system that does not tell."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: jax.Device) -> int | None:
    """Bytes that a computation may still take; None where unknown."""
    if device.platform == "cpu":
        return psutil.virtual_memory().available
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= set(stats) else None


# --- The text ---


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(f"text {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from error


def encode_text(tokenizer: Any, path: Path, needed: int) -> list[int]:
    """The first `needed` token ids of a text file, without special tokens. Raises InputError where it has fewer."""
    text = _read_text(path)
    for part in (text[: 16 * needed], text):  # the start of a long text is enough, unless its tokens are very long
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) >= needed + 16:  # a token or so before the cut may differ from the whole text's
            break
    if len(ids) < needed:
        raise InputError(f"text {path} is too short: it has {len(ids)} tokens, and {needed} are needed")
    return ids[:needed]


def load_windows(
    tokenizer: Any, text: Path, calib_text: Path | None, seq_len: int, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Calibration and test ids, int32 [1, seq_len] each, that share no token of the text.

    Where the tokenizer begins a text with its BOS token, each window does, as the model was trained; it counts.

    Raises:
      InputError: a text that cannot be read or is too short, two texts that begin alike, a tokenizer of another model.
    """
    first = tokenizer.encode("")  # what the tokenizer puts before every text: BOS or nothing
    first = first[:1] if first[:1] == [tokenizer.bos_token_id] else []
    length = seq_len - len(first)
    if calib_text is None or calib_text.resolve() == text.resolve():
        ids = encode_text(tokenizer, text, 2 * length)
        windows = ids[:length], ids[length:]
    else:
        windows = encode_text(tokenizer, calib_text, length), encode_text(tokenizer, text, length)
    if windows[0] == windows[1]:
        raise InputError(f"texts {calib_text or text} and {text} begin alike: the tested tokens would not be unseen")
    if max(map(max, windows)) >= vocab_size:
        raise InputError(f"the tokenizer makes ids above the model's vocabulary of {vocab_size}: it is another model's")
    return tuple(jnp.asarray([first + window], jnp.int32) for window in windows)


def load_tokenizer(weights_dir: Path) -> Any:
    """The tokenizer that convert_weights.py put beside the weights. Raises InputError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(weights_dir)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"weights folder {weights_dir} has no usable tokenizer ({reason}); convert anew") from error


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turns what a user can mend into one sentence on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(2)  # an orderly exit would wait for, or crash, what JAX is still computing
    except (InputError, NotImplementedError, OSError) as error:
        message = " ".join(str(error).split())
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
