"""report/tables.py: Markdown, and a CSV file that a run can go on with."""

import pytest

from errors import InputError
from report.tables import ResultsFile, markdown, spread


def test_a_markdown_table_has_a_line_for_each_row_and_escapes_bars():
    table = markdown(("a", "b"), [(1, "x|y"), (2.5, "")])
    assert table == "| a | b |\n|---|---|\n| 1 | x\\|y |\n| 2.5 |  |\n"


def test_a_row_of_another_width_than_the_table_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 cells, got 3: \[1, 2, 3\]"):
        markdown(("a", "b"), [(1, 2, 3)])


def test_a_spread_is_the_median_with_the_extremes():
    assert spread([3, 1, 2.004]) == "2.00 [1.00, 3.00]"
    assert spread([3.14159], 3) == "3.142 [3.142, 3.142]"


def test_a_results_file_goes_on_where_it_was_left(tmp_path):
    path = tmp_path / "results.csv"
    first = ResultsFile(path, ("window", "kl"))
    first.add({"kl": 0.5, "window": "A, b"})
    assert first.has(window="A, b", kl=0.5)
    second = ResultsFile(path, ("window", "kl"))
    assert second.rows == first.rows == [{"window": "A, b", "kl": "0.5"}]
    assert not second.has(window="A")
    second.add({"window": "C", "kl": 1})
    assert path.read_text().splitlines() == ["window,kl", '"A, b",0.5', "C,1"]


def test_a_results_file_of_other_columns_or_of_no_text_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("window,loss\nA,1\n")
    with pytest.raises(InputError, match=r"expected the columns window, kl, got \['window', 'loss'\]"):
        ResultsFile(path, ("window", "kl"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as CSV"):
        ResultsFile(path, ("window", "kl"))


@pytest.mark.parametrize("start", ["\n", "\nwindow,kl\nA,1\n"])
def test_a_results_file_whose_first_line_is_blank_has_no_columns(tmp_path, start):
    path = tmp_path / "results.csv"
    path.write_text(start)
    with pytest.raises(InputError, match=r"expected the columns window, kl, got \[\]"):
        ResultsFile(path, ("window", "kl"))
