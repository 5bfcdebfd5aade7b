"""One sentence and exit code 2 for what the user can mend; a traceback for everything else."""

import subprocess
import sys

import pytest

from errors import InputError, Parser, UnsupportedError, exit_on_bad_input, quote


def test_an_unsupported_input_is_an_input_error_and_not_implemented():
    assert issubclass(UnsupportedError, InputError)
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(InputError, ValueError)


def test_an_input_error_is_one_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise InputError("the text\n  is too short")
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: the text is too short\n")


def test_debug_shows_the_traceback():
    with pytest.raises(InputError, match="too short"), exit_on_bad_input(debug=True):
        raise InputError("too short")


@pytest.mark.parametrize("error", [OSError("disk"), NotImplementedError("by JAX"), ValueError("a bug"), KeyError("x")])
def test_an_error_of_the_program_itself_is_not_hidden(error, capsys):
    with pytest.raises(type(error)), exit_on_bad_input():
        raise error
    assert capsys.readouterr().err == ""


def test_an_interrupted_program_says_so_and_ends_at_once():
    code = "from errors import exit_on_bad_input\nwith exit_on_bad_input():\n    raise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: interrupted\n")


def test_a_wrong_flag_is_one_sentence_without_the_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        Parser().parse_args(["--no_such_flag"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --no_such_flag\n"


def test_a_foreign_value_is_quoted_and_cut():
    assert quote("a\nb") == r"'a\nb'"
    assert quote("x" * 198) == f"'{'x' * 198}'"
    assert quote("x" * 999) == f"'{'x' * 199}... (1001 characters)"


def test_a_number_of_more_digits_than_python_writes_is_quoted_by_its_length():
    assert quote(2**32_000) == "a number of about 9600 digits"
