"""The texts of a run: calibration and test windows that share no token."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from errors import InputError
from measure.settings import Settings
from weights.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids, int32 [1, T] each, and what stands before each window's text, such as "<s>".

    `calibration` is None where a finished schedule was loaded.
    """

    calibration: jax.Array | None
    test: jax.Array
    prefix: str


def load_windows(
    tokenizer: TextTokenizer, settings: Settings, vocab_size: int, calibrated_on: tuple[int, str] | None = None
) -> Windows:
    """Cuts a calibration and a test window of `seq_len` tokens each.

    Where the tokenizer begins every text with special tokens such as BOS, so does each window, as the model was
    trained; they count.

    Args:
      tokenizer: of the model.
      settings: its texts and seq_len.
      vocab_size: of the model.
      calibrated_on: tokens and `hash_of` the window that a loaded schedule was made from: it is not tested on.

    Raises:
      InputError: a text that cannot be read or is too short, two windows of the same tokens, a tokenizer of another
        model.
    """
    prefix, text, calib_text = list(tokenizer.prefix), settings.text, settings.calib_text
    length = settings.seq_len - len(prefix)
    if length < 1:
        raise InputError(f"seq_len must be above {len(prefix)}, the tokens that begin every window")
    if calibrated_on:
        start = _end_of_calibration(tokenizer, text, *calibrated_on)
        windows = [read_tokens(tokenizer, text, start + length)[start:]]
    elif calib_text is None or calib_text.resolve() == text.resolve():
        ids = read_tokens(tokenizer, text, 2 * length)
        windows = [ids[:length], ids[length:]]
    else:
        windows = [read_tokens(tokenizer, path, length) for path in (calib_text, text)]
    if windows[:-1] == windows[1:] and len(windows) == 2:
        what = "the text repeats itself" if calib_text is None else f"{calib_text} and {text} begin alike"
        raise InputError(f"the calibration and the test window are the same tokens: {what}; give another text")
    if max(map(max, windows)) >= vocab_size:
        raise InputError(f"the tokenizer makes ids above the model's vocabulary of {vocab_size}: it is another model's")
    arrays = [jnp.asarray([prefix + window], jnp.int32) for window in windows]
    return Windows(arrays[0] if len(arrays) == 2 else None, arrays[-1], tokenizer.prefix_text)


def hash_of(ids: jax.Array) -> str:
    """Hex SHA-256 of a window's ids."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def _end_of_calibration(tokenizer: TextTokenizer, text: Path, seq_len: int, sha256: str) -> int:
    """Where unseen tokens of the text begin: after the calibration window if the text begins with it, otherwise at 0."""
    length = seq_len - len(tokenizer.prefix)
    try:
        ids = read_tokens(tokenizer, text, length)
    except InputError:  # shorter than the calibration window, so it cannot begin with it
        return 0
    return length if hash_of(np.array([[*tokenizer.prefix, *ids]])) == sha256 else 0


def read_tokens(tokenizer: TextTokenizer, path: Path, needed: int) -> list[int]:
    """The first `needed` token ids of a text file, without special tokens; no more of the file is read than that takes.

    Raises:
      InputError: the file cannot be read, is not UTF-8, or has fewer tokens.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is not part of the text
            ids = tokenizer.encode_first(file, needed)
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from error
    if len(ids) < needed:
        raise InputError(f"text {path} is too short: it has {len(ids)} tokens, and {needed} are needed")
    return ids
