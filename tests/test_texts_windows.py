"""Windows share no token, begin where calibration ends, and are as many as were asked for or as the text holds."""

import dataclasses

import numpy as np
import pytest

from errors import InputError
from measure.settings import Settings
from measure.texts import CalibratedOn, hash_of, load_windows


class Numbers:
    """A tokenizer whose ids are the numbers of a text; counts how much of a text it was given."""

    def __init__(self, prefix=()):
        self.prefix, self.prefix_text, self.asked = prefix, "<s>" * len(prefix), []

    def encode_first(self, file, needed):
        self.asked.append(needed)
        return [int(word) for word in file.read().split()][:needed]


@pytest.fixture
def numbers(tmp_path):
    def write(first, end, name="numbers.txt"):
        path = tmp_path / name
        path.write_text(" ".join(map(str, range(first, end))))
        return path

    return write


def firsts(windows):
    return [int(ids[0, 0]) for ids in windows]


def settings(text, **values):
    return Settings(text=text, **{"seq_len": 16} | values)


def test_the_default_takes_four_windows_after_the_calibration_part(numbers):
    tokenizer = Numbers()
    windows = load_windows(tokenizer, settings(numbers(0, 200), decode=0), 300)
    assert (firsts(windows.calibration), firsts(windows.test)) == ([0], [16, 32, 48, 64])
    assert all(ids.shape == (1, 16) for ids in (*windows.calibration, *windows.test))
    assert tokenizer.asked == [5 * 16], "no more is tokenised than the windows take"


@pytest.mark.parametrize("tokens, calibration, test", [(32, 1, 1), (79, 1, 3), (80, 1, 4)])
def test_the_default_takes_what_a_short_text_holds(numbers, tokens, calibration, test):
    windows = load_windows(Numbers(), settings(numbers(0, tokens)), 300)
    assert (len(windows.calibration), len(windows.test)) == (calibration, test)


def test_windows_that_were_asked_for_are_taken(numbers):
    windows = load_windows(Numbers(), settings(numbers(0, 200), windows=2, calib_windows=3), 300)
    assert (firsts(windows.calibration), firsts(windows.test)) == ([0, 16, 32], [48, 64])


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(windows=5), r"holds 5 window\(s\) of 16 tokens, and 6 are needed, 1 of them to calibrate on"),
        (dict(calib_windows=5), r"holds 5 window\(s\) of 16 tokens, and 6 are needed, 5 of them to calibrate on"),
        (dict(seq_len=90), r"holds 1 window\(s\) of 90 tokens, and 2 are needed"),
    ],
)
def test_a_text_too_short_for_what_was_asked_says_how_many_windows_it_holds(numbers, asked, message):
    with pytest.raises(InputError, match=message):
        load_windows(Numbers(), settings(numbers(0, 95), **asked), 300)


def test_another_calibration_text_has_its_own_windows(numbers):
    asked = settings(numbers(0, 40), calib_text=numbers(100, 200, "other.txt"), calib_windows=2)
    windows = load_windows(Numbers(), asked, 300)
    assert (firsts(windows.calibration), firsts(windows.test)) == ([100, 116], [0, 16])
    with pytest.raises(InputError, match=r"other.txt is too short: it holds 6 window\(s\).*and 7 are needed"):
        load_windows(Numbers(), dataclasses.replace(asked, calib_windows=7), 300)


def test_every_window_begins_with_the_prefix(numbers):
    windows = load_windows(Numbers(prefix=(250, 251)), settings(numbers(0, 60), windows=2), 300)
    assert [ids[0, :3].tolist() for ids in (*windows.calibration, *windows.test)] == [
        [250, 251, 0], [250, 251, 14], [250, 251, 28],
    ]  # fmt: skip
    assert (windows.prefix, windows.prefix_tokens) == ("<s><s>", 2)


@pytest.mark.parametrize("tokens, calibration, test", [(500, 8, 4), (7 * 16, 3, 4), (5 * 16, 3, 2)])
def test_a_limit_calibrates_on_several_windows_and_leaves_some_to_test(numbers, tokens, calibration, test):
    windows = load_windows(Numbers(), settings(numbers(0, tokens), max_degradation=1.0), 600)
    assert (len(windows.calibration), len(windows.test)) == (calibration, test)


def test_a_limit_needs_windows_to_fit_and_to_check_on(numbers):
    with pytest.raises(InputError, match=r"holds 3 window\(s\).*and 4 are needed, 3 of them to calibrate on"):
        load_windows(Numbers(), settings(numbers(0, 48), max_degradation=1.0), 300)
    with pytest.raises(InputError, match="calib_windows must be at least 3 with max_degradation.*got 2"):
        settings(numbers(0, 48), max_degradation=1.0, calib_windows=2)


def test_no_test_window_has_the_tokens_of_a_calibration_window(tmp_path):
    path = tmp_path / "again.txt"
    path.write_text(" ".join(map(str, [*range(16), *range(50, 66), *range(16)])))
    with pytest.raises(InputError, match="the calibration and the test window are the same tokens"):
        load_windows(Numbers(), settings(path), 300)


@pytest.mark.parametrize("windows", [1, 2])
def test_what_a_loaded_schedule_was_made_from_is_not_tested_on(numbers, windows):
    text = numbers(0, 100)
    made = load_windows(Numbers(), settings(text, calib_windows=windows), 300)
    loaded = settings(text, load_schedule=text, windows=2)
    got = load_windows(Numbers(), loaded, 300, CalibratedOn.of(made.calibration))
    assert got.calibration == () and firsts(got.test) == [16 * windows, 16 * windows + 16]
    other = CalibratedOn(16, windows, hash_of([np.zeros(16)]))
    assert firsts(load_windows(Numbers(), loaded, 300, other).test) == [0, 16]
    longer = CalibratedOn(2**31 - 1, 2**31 - 1, "")
    assert firsts(load_windows(Numbers(), loaded, 300, longer).test) == [0, 16]


@pytest.mark.parametrize("name", ["windows", "calib_windows"])
def test_no_windows_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1 .*got 0"):
        Settings(**{name: 0})


def test_a_loaded_schedule_has_no_calibration_windows(numbers):
    with pytest.raises(InputError, match="calib_windows has no effect with load_schedule"):
        Settings(load_schedule=numbers(0, 5), calib_windows=2)


def test_a_long_context_needs_long_windows():
    with pytest.raises(InputError, match="long_ppl needs a seq_len of at least 1024.*got 512"):
        Settings(long_ppl=True)
