"""Calibration and test windows: unseen, of the asked length, and begun as the tokenizer begins a text."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from errors import InputError
from kascade_core import Selection
from measure.settings import Settings
from measure.texts import CalibratedOn, hash_of, load_windows, read_tokens
from weights.tokenizers import TextTokenizer


def numbers_tokenizer(bos=None):
    """Words that are numbers from 0 to 99, their own ids; with or without BOS."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(str(bos), bos)])
    return TextTokenizer(backend)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(100))))
    return path


def windows(text, calib_text=None, length=5, bos=None, vocab_size=100, calibrated_on=None):
    settings = Settings(text=text, calib_text=calib_text, seq_len=length, windows=1, **sizes(length))
    return load_windows(numbers_tokenizer(bos), settings, vocab_size, calibrated_on)


def sizes(length):
    return {"selection": Selection(tile_size=min(length, 4))}


def both(found):
    """The ids of the only calibration window and of the only test window."""
    (calibration,), (test,) = found.calibration, found.test
    return calibration.tolist(), test.tolist()


def test_calibration_and_test_windows_share_no_token(numbers):
    found = windows(numbers)
    assert both(found) == ([[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]])
    assert found.test[0].dtype == jnp.int32
    assert found.prefix == ""


def test_another_text_to_calibrate_on_leaves_the_whole_test_text(numbers):
    other = numbers.with_name("other.txt")
    other.write_text(" ".join(map(str, range(50, 60))))
    assert both(windows(numbers, other)) == ([[50, 51, 52, 53, 54]], [[0, 1, 2, 3, 4]])


def test_windows_are_never_the_same_text(numbers):
    assert both(windows(numbers, numbers)) == ([[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]])
    copy = numbers.with_name("copy.txt")
    copy.write_text(numbers.read_text())
    with pytest.raises(InputError, match=r"the same tokens: .*copy.txt and .*numbers.txt begin alike"):
        windows(numbers, copy)
    numbers.write_text("1 2 3 " * 20)
    with pytest.raises(InputError, match="the same tokens: the text repeats itself"):
        windows(numbers, length=6)


def test_each_window_begins_with_bos_where_the_tokenizer_does(numbers):
    found = windows(numbers, bos=99)
    assert both(found) == ([[99, 0, 1, 2, 3]], [[99, 4, 5, 6, 7]])
    assert found.prefix == "99"


def test_a_window_has_room_for_more_than_its_beginning(numbers):
    settings = Settings(text=numbers, seq_len=2, **sizes(2))
    tokenizer = numbers_tokenizer()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="98 99 $A", special_tokens=[("98", 98), ("99", 99)]
    )
    with pytest.raises(InputError, match="seq_len must be above 2, the tokens that begin every window"):
        load_windows(tokenizer, settings, 100)


def test_a_loaded_schedules_calibration_tokens_are_not_tested_on(numbers):
    found = windows(numbers, calibrated_on=CalibratedOn.of(windows(numbers, length=4).calibration))
    assert found.calibration == ()
    assert found.test[0].tolist() == [[4, 5, 6, 7, 8]]
    with_bos = CalibratedOn.of(windows(numbers, length=4, bos=99).calibration)
    assert windows(numbers, bos=99, calibrated_on=with_bos).test[0].tolist() == [[99, 3, 4, 5, 6]]
    for other in (CalibratedOn(4, 1, "of another text"), CalibratedOn(101, 1, "of a longer text")):
        assert windows(numbers, calibrated_on=other).test[0].tolist() == [[0, 1, 2, 3, 4]]


def test_a_byte_order_mark_is_not_part_of_the_text(numbers):
    numbers.write_bytes(b"\xef\xbb\xbf" + numbers.read_bytes())
    assert both(windows(numbers))[0] == [[0, 1, 2, 3, 4]]


def test_a_tokenizer_of_another_model_is_refused(numbers):
    with pytest.raises(InputError, match="the tokenizer makes ids above the model's vocabulary of 9"):
        windows(numbers, vocab_size=9)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"1 2 3",
            r"text.txt is too short: it holds 0 window\(s\) of 5 tokens, and 2 are needed, 1 of them to calibrate on",
        ),
        (b"", r"it holds 0 window\(s\) of 5 tokens, and 2 are needed"),
        (b"1 \xff\xfe 2", r"text.txt is not UTF-8 \(invalid start byte at byte 2\); save it as UTF-8"),
        (None, "text.txt cannot be read: No such file or directory"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(tmp_path, content, sentence):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        windows(path)


def test_no_more_is_read_than_needed(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("7 " * 100_000 + "\n" + "8 " * 10)
    assert read_tokens(numbers_tokenizer(), path, 3) == [7, 7, 7]


def test_the_hash_of_windows_is_that_of_their_ids():
    one, other = jnp.array([[1, 2]], jnp.int32), jnp.array([[1, 3]], jnp.int32)
    assert hash_of([one]) != hash_of([other])
    assert hash_of([one, other]) != hash_of([other, one])
    assert hash_of([one]) == hash_of([np.array([1, 2])])


def test_the_sample_is_utf8_prose_of_enough_words():
    text = Path(Settings().text).read_text(encoding="utf-8")
    assert len(text.split()) > 3000
