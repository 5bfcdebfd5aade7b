"""report/compare.py: runs side by side, and the exit code for continuous integration."""

import re
from pathlib import Path

import pytest
import reports

from report.compare import Figure, differences, figures, main, side_by_side
from report.results import Quality, Timing, read_report, write_json


@pytest.fixture
def files(tmp_path):
    """Writes a report for each argument: what it changes in `reports.results`."""

    def write(*changes):
        paths = [tmp_path / f"{name}.json" for name, _ in zip("abc", changes, strict=False)]
        for path, change in zip(paths, changes, strict=True):
            write_json(path, reports.report(**change))
        return list(map(str, paths))

    return write


SLOWER = {"timing": Timing([410.0, 430, 421, 405, 440], [480.0, 495, 491, 488, 502], 1.5, 2.5)}


def test_a_report_does_not_differ_from_itself(files, capsys):
    assert main([*files({}, {}), "--fail_above", "0"]) == 0
    output = capsys.readouterr().out
    assert "The runs have the same settings" in output
    assert "Nothing got worse by more than 0 %." in output
    assert not re.search(r"\| yes \|$", output, re.MULTILINE)
    assert set(re.findall(r"[+-]\d+\.\d+ (?:%|points)", output)) == {"+0.00 %", "+0.00 points"}


def test_what_differs_is_named_with_its_values():
    first, second = reports.report(), reports.report()
    second["config"]["threshold"], second["versions"]["jax"] = 0.5, "99"
    second["config"]["json"] = "another.json"
    second["finished"] = False
    assert differences([first, second]) == [
        ["--threshold", "0.65", "0.5"],
        ["versions jax", first["versions"]["jax"], "99"],
        ["finished", "True", "False"],
    ]


def test_every_guarded_figure_of_a_full_report_is_there():
    names = figures(reports.report())
    for part in ("degradation", "forward of 512 tokens, sparse", "attention alone, reuse", "sweep, 2048 tokens, dense",
                 "decoding after 512, sparse", "decoding at depth 8192, keep all", "at density 0.1, sparse", "task niah_single"):  # fmt: skip
        assert [name for name in names if part in name], part
    assert not [name for name in names if "32768" in name], "a depth that was skipped"


@pytest.mark.parametrize(
    ("before", "after", "change", "beyond"),
    [
        (Figure(2.0, 0.1), Figure(3.0, 0.1), 50, True),
        (Figure(2.0, 0.1, points=True), Figure(2.2, 0.1, points=True), 0.2, False),
        (Figure(2.0), Figure(1.0, 0.1), -50, None),
        (Figure(2.0, samples=[1, 2, 3]), Figure(4.0, samples=[3, 4, 5]), 100, False),
        (Figure(2.0, samples=[1, 2, 3]), Figure(4.0, samples=[3.5, 4, 5]), 100, True),
        (Figure(None), Figure(4.0), None, None),
    ],
)
def test_a_change_is_beyond_the_error_or_not(before, after, change, beyond):
    assert after.change(before) == (None if change is None else pytest.approx(change))
    assert after.beyond_error(before) is beyond


def test_both_set_ups_of_a_task_are_compared_with_the_error_of_their_interval():
    found = figures(reports.report())
    assert len([name for name in found if name.startswith("task vt (")]) == 6
    figure = found["task niah_single (prompt), 1900 tokens, sparse, share"]
    assert (figure.value, figure.guarded) == (0.75, False)
    low, high = reports.tasks()[0].sparse.interval
    assert figure.error == pytest.approx((high - low) / 3.92)


def test_the_exit_code_says_that_a_later_run_is_slower(files, capsys):
    paths = files({}, SLOWER)
    assert main(paths) == 0
    assert main([*paths, "--fail_above", "20"]) == 1
    assert "b.json: forward of 512 tokens, sparse, ms: worse by 25.58 %, above 20" in capsys.readouterr().out
    assert main([*paths, "--fail_above", "26"]) == 0
    assert main([*reversed(paths), "--fail_above", "1"]) == 0, "faster is not worse"


def test_the_exit_code_says_that_a_later_run_degrades_more_in_points(files):
    worse = {"quality": Quality(reports.compared(cost=0.03), [0.5] * 12)}
    paths = files({}, {}, worse)
    before, after = (figures(read_report(Path(path)))["degradation, %"].value for path in (paths[0], paths[2]))
    assert main([*paths, "--fail_above", str(after - before - 0.01)]) == 1
    assert main([*paths, "--fail_above", str(after - before + 0.01)]) == 0


def test_three_reports_stand_side_by_side_and_each_is_compared_with_the_first():
    rows = side_by_side([reports.report(), reports.plain_run().to_json(), reports.report(**SLOWER)])
    assert {len(row) for row in rows} == {8}
    row = next(row for row in rows if row[0] == "forward of 512 tokens, sparse, ms")
    assert row[1:] == ["391", "391", "+0.00 %", "no", "491", "+25.58 %", "yes"]
    depth = next(row for row in rows if "depth 2048, sparse" in row[0])
    assert depth[2:5] == ["", "", ""], "the second has no such figure"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ('{"a": 1}', "is no report of this program"),
        ("[]", "is no report of this program"),
        ('{"format_version": 2, "degradation_pct": 1}', "has format version 2, and this program reads version 3"),
        ('{"format_version": 3, "degradation_pct": 1, "program": "another"}', "is no report of this program"),
        ('{"format_version": 3, "degradation_pct": 1, "program": "kascade benchmark"}', "a report is damaged"),
    ],
)
def test_a_file_that_is_no_report_of_this_version_is_one_sentence(files, tmp_path, capsys, content, message):
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([*files({}), str(other)])
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_one_report_alone_or_a_negative_percentage_is_refused(files, capsys):
    for arguments, message in (
        (files({}), "at least two reports"),
        ([*files({}, {}), "--fail_above=-1"], "at least 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
