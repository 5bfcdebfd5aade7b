"""The texts of a run: calibration and test windows that share no token."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from errors import InputError
from measure.settings import DEFAULT_DECODE, MOST_TOKENS, Settings
from weights.tokenizers import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids, int32 [1, T] for each window, and what stands before each one's text, such as "<s>".

    `calibration` is empty where a finished schedule was loaded. `following` holds, for each test window, the tokens
    that follow it in the text, one more than are decoded; fewer windows have some where the text ends.
    """

    calibration: tuple[jax.Array, ...]
    test: tuple[jax.Array, ...]
    prefix: str
    prefix_tokens: int = 0
    following: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class CalibratedOn:
    """Which windows a schedule was made from: how many, of how many tokens each, and `hash_of` their ids."""

    tokens: int
    windows: int
    sha256: str

    @classmethod
    def of(cls, windows: Sequence[jax.Array]) -> CalibratedOn:
        """These windows, all of one length."""
        return cls(windows[0].size, len(windows), hash_of(windows))


def load_windows(
    tokenizer: TextTokenizer, settings: Settings, vocab_size: int, calibrated_on: CalibratedOn | None = None
) -> Windows:
    """Cuts calibration and test windows of `seq_len` tokens each, consecutive and without a common token.

    Where the tokenizer begins every text with special tokens such as BOS, so does each window, as the model was
    trained; they count. The first test window is the one after the calibration part. A number of windows that was
    asked for is kept to; a default takes what the text holds, test windows before calibration windows.

    Args:
      tokenizer: of the model.
      settings: its texts, seq_len and numbers of windows.
      vocab_size: of the model.
      calibrated_on: what a loaded schedule was made from: it is not tested on.

    Raises:
      InputError: a text that cannot be read or is too short, two windows of the same tokens, a tokenizer of another
        model.
    """
    text, calib_text = settings.text, settings.calib_text
    more = DEFAULT_DECODE + 1 if settings.decode is None else settings.decode and settings.decode + 1
    length = settings.seq_len - len(tokenizer.prefix)
    if length < 1:
        raise InputError(f"seq_len must be above {len(tokenizer.prefix)}, the tokens that begin every window")
    least, most = settings.calibration_windows
    least_test, most_test = settings.test_windows
    if calibrated_on:
        start = _end_of_calibration(tokenizer, text, calibrated_on)
        calibration, ids = [], read_tokens(tokenizer, text, start + most_test * length + more)[start:]
        test = _cut(ids[: most_test * length], text, length, least_test)
    elif calib_text is None or calib_text.resolve() == text.resolve():
        ids = read_tokens(tokenizer, text, (most + most_test) * length + more)
        note = f", {least} of them to calibrate on"
        windows = _cut(ids[: (most + most_test) * length], text, length, least + least_test, note)
        start = min(most, max(least, len(windows) - most_test))
        calibration, test, ids = windows[:start], windows[start : start + most_test], ids[start * length :]
    else:
        calibration = _cut(read_tokens(tokenizer, calib_text, most * length), calib_text, length, least)
        ids = read_tokens(tokenizer, text, most_test * length + more)
        test = _cut(ids[: most_test * length], text, length, least_test)
    _check_windows(calibration, test, settings, vocab_size)
    calibration, test = (
        tuple(jnp.asarray([[*tokenizer.prefix, *window]], jnp.int32) for window in windows)
        for windows in (calibration, test)
    )
    following = _following(ids, length, len(test), more, settings)
    return Windows(calibration, test, tokenizer.prefix_text, len(tokenizer.prefix), following)


def _following(
    ids: Sequence[int], length: int, num_windows: int, count: int, settings: Settings
) -> tuple[jax.Array, ...]:
    """int32 [1, count] for each window of `length` ids that has so many after it; none where the default has no room.

    Raises:
      InputError: --decode or --batch asked for it, and fewer windows than are decoded at once have them.
    """
    ends = [end for end in range(length, num_windows * length + 1, length) if end + count <= len(ids)]
    if not ends and settings.decode is None and settings.batch == 1:
        return ()
    if count and len(ends) < settings.batch:
        raise InputError(
            f"text {settings.text} is too short to decode {settings.batch} window(s) at once: {count} tokens must "
            f"follow each, so {settings.batch * length + count - len(ids)} more tokens are needed; ask for a smaller "
            "--decode (0 for none) or --batch, or give another text"
        )
    return tuple(jnp.asarray([ids[end : end + count]], jnp.int32) for end in ends) if count else ()


def _cut(ids: Sequence[int], path: Path, length: int, least: int, note: str = "") -> list[Sequence[int]]:
    """The whole windows of the ids, at least `least`."""
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(windows) < least:
        raise InputError(
            f"text {path} is too short: it holds {len(windows)} window(s) of {length} tokens, and {least} are needed"
            f"{note}; ask for fewer --windows, a smaller --seq_len, or give another text"
        )
    return windows


def _check_windows(
    calibration: Sequence[Sequence[int]], test: Sequence[Sequence[int]], settings: Settings, vocab_size: int
) -> None:
    if any(window in calibration for window in test):
        calib_text, text = settings.calib_text, settings.text
        what = "the text repeats itself" if calib_text is None else f"{calib_text} and {text} begin alike"
        raise InputError(f"the calibration and the test window are the same tokens: {what}; give another text")
    if max(max(window) for window in (*calibration, *test)) >= vocab_size:
        raise InputError(f"the tokenizer makes ids above the model's vocabulary of {vocab_size}: it is another model's")


def hash_of(windows: Sequence[jax.Array]) -> str:
    """Hex SHA-256 of the windows' ids, one after another."""
    return hashlib.sha256(np.concatenate([np.ravel(ids) for ids in windows]).astype("<i4").tobytes()).hexdigest()


def _end_of_calibration(tokenizer: TextTokenizer, text: Path, calibrated_on: CalibratedOn) -> int:
    """Where unseen tokens of the text begin: after the calibration part if the text begins with it, otherwise at 0."""
    length = calibrated_on.tokens - len(tokenizer.prefix)
    needed = length * calibrated_on.windows
    ids = read_tokens(tokenizer, text, needed) if length > 0 else []
    if len(ids) < needed or length < 1:
        return 0
    windows = [np.array([*tokenizer.prefix, *ids[start : start + length]]) for start in range(0, needed, length)]
    return needed if hash_of(windows) == calibrated_on.sha256 else 0


def read_tokens(tokenizer: TextTokenizer, path: Path, most: int) -> list[int]:
    """The first `most` token ids of a text file, or all; no special tokens. No more is read than that takes.

    Raises:
      InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is not part of the text
            return tokenizer.encode_first(file, min(most, MOST_TOKENS))
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from error
