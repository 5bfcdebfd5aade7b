"""report/tables.py: a report's measurements, a row each, in CSV and Markdown files that grow."""

import contextlib
import csv
import re

import pytest
import reports

import benchmark_kascade_final as benchmark
from errors import InputError
from measure.settings import Settings
from report.tables import COLUMNS, append_csv, append_markdown, check_csv, check_markdown, markdown_row, measurements


def rows_of(report, **where):
    return [row for row in measurements(report) if all(row[name] == value for name, value in where.items())]


def test_every_measurement_of_a_report_is_a_row():
    report = reports.report()
    tests = [row["test"] for row in measurements(report)]
    counts = {"prefill": 2, "density 0.1": 2, "sweep": 4, "decode": 2, "decode depth": 9, "attention alone": 4}
    assert {test: tests.count(test) for test in counts} == counts
    assert tests.count("task vt (prompt)") == tests.count("task vt (question)") == 3
    assert all(
        set(row) == set(COLUMNS) and all(type(cell) is str for cell in row.values()) for row in measurements(report)
    )
    assert {row["model"] for row in measurements(report)} == {"Tiny-12M"}


def test_a_row_has_the_median_of_its_samples_and_the_tokens_that_went_through():
    report = reports.report()
    (row,) = rows_of(report, test="prefill", arm="sparse")
    assert (row["median_ms"], row["min_ms"], row["max_ms"], row["n"], row["tokens"]) == (
        "391",
        "380",
        "402",
        "5",
        "512",
    )
    assert float(row["tokens_per_s"]) == pytest.approx(512 / 0.391, rel=1e-5)
    assert float(row["degradation_pct"]) == pytest.approx(report["degradation_pct"], rel=1e-5)
    assert float(row["error_pct"]) > 0
    (step,) = rows_of(report, test="decode depth", arm="sparse", tokens="2048")
    assert float(step["tokens_per_s"]) == pytest.approx(1000 / 40.5, rel=1e-5)
    assert step["perplexity"] == step["score"] == ""
    (task,) = rows_of(report, test="task niah_single (question)", arm="sparse")
    assert (task["score"], task["density"], task["n"], task["median_ms"]) == ("0.9", "0.2", "40", "")
    assert float(task["score_low"]) < 0.9 < float(task["score_high"])


def test_the_sparse_arms_row_has_every_statistic_of_quality():
    report = reports.report()
    quality = report["quality"]
    sparse, dense = (rows_of(report, test="prefill", arm=arm)[0] for arm in ("sparse", "dense"))
    expected = {f"kl_{name}": value for name, value in quality["kl"].items()}
    single = ("delta_log_ppl", "se_tokens", "se_windows", "same_top1", "same_top1_se", "correlation", "rms_dp")
    expected |= {name: quality[name] for name in single}
    expected |= {"predicted_tokens": quality["tokens"], "windows": 4, "interval_high_pct": quality["interval_pct"][1]}
    assert {name: float(sparse[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (sparse["verdict"], dense["kl_mean"]) == (quality["verdict"], "")
    (one_window,) = rows_of(reports.plain_run().to_json(), test="prefill", arm="sparse")
    assert one_window["se_windows"] == one_window["interval_low_pct"] == ""


def test_the_tokens_that_need_a_long_context_have_rows_where_there_are_any():
    report = reports.report()
    (row,) = rows_of(report, test="long_ppl", arm="sparse")
    assert float(row["perplexity"]) == pytest.approx(report["long_ppl"]["sparse_perplexity"], rel=1e-5)
    assert (row["predicted_tokens"], row["windows"], row["median_ms"]) == ("3", "", "")
    assert not rows_of(report | {"long_ppl": {"tokens": 0}}, test="long_ppl")
    assert not rows_of(report | {"long_ppl": None}, test="long_ppl")


def test_rows_are_added_to_a_file_that_is_there(tmp_path):
    path, rows = tmp_path / "rows.csv", measurements(reports.report())
    append_csv(path, rows)
    append_csv(path, rows[:2])
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [*rows, *rows[:2]]


def test_a_markdown_table_grows_below_one_head(tmp_path):
    path, rows = tmp_path / "rows.md", measurements(reports.report())
    append_markdown(path, rows)
    append_markdown(path, rows[:1])
    lines = path.read_text().splitlines()
    assert lines[0] == markdown_row(COLUMNS)
    assert len(lines) == 2 + len(rows) + 1
    assert lines[-1] == lines[2]


def test_a_files_other_columns_are_refused_before_the_run(tmp_path):
    path = tmp_path / "rows"
    path.write_text("test,tokens\nprefill,512\n")
    with pytest.raises(InputError, match="expected the columns test, tokens"):
        check_csv(path)
    with pytest.raises(InputError, match="expected a table with the columns test, tokens"):
        check_markdown(path)
    for flag, message in (("csv", "expected the columns"), ("markdown", "expected a table")):
        with pytest.raises(InputError, match=message):
            Settings(**{flag: path}).check_files()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as Markdown"):
        check_markdown(path)
    path.write_text("")
    check_csv(path)
    check_markdown(path)


@pytest.mark.parametrize("flag", ["--csv", "--markdown"])
def test_the_command_refuses_another_tables_columns_in_one_sentence_before_it_looks_for_a_model(tmp_path, capsys, flag):
    (tmp_path / "rows").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([flag, str(tmp_path / "rows"), "--weights_dir", str(tmp_path / "none"), "--quiet"])
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*rows: expected (a table with )?the columns .*, got .*a.*b.*\n", error)
    assert (tmp_path / "rows").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("name", ["html", "csv", "markdown"])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path, name):
    for path in (tmp_path / "no" / "file", tmp_path, "/dev/stdout"):
        with pytest.raises(InputError, match=f"{name}: cannot write"):
            Settings(**{name: tmp_path.__class__(path)})


@pytest.mark.parametrize(("name", "is_refused"), [("csv", True), ("markdown", True), ("html", False)])
def test_a_table_that_is_closed_to_us_is_refused_before_the_run(tmp_path, monkeypatch, name, is_refused):
    """The folder is open: a page would be replaced there. The tests' own user may write anything."""
    path = tmp_path / "closed"
    path.touch()
    monkeypatch.setattr("measure.settings.os.access", lambda asked, mode: asked != path)
    with pytest.raises(InputError, match=f"{name}: cannot write") if is_refused else contextlib.nullcontext():
        Settings(**{name: path})


def test_two_reports_in_one_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="csv and json would both write"):
        Settings(json=tmp_path / "x", csv=tmp_path / "." / "x")


def test_a_disk_that_is_full_is_one_sentence(tmp_path, monkeypatch):
    rows = measurements(reports.report())
    for append in (append_csv, append_markdown):
        with pytest.raises(InputError, match="cannot write .*full"):
            append(tmp_path.__class__("/dev/full"), rows)


def test_a_hostile_name_stays_in_its_cell(tmp_path):
    hostile = '=cmd|"x"\n| <script>, "quoted"'
    report = reports.report(model=reports.replaced(reports.results().model, name=hostile))
    append_csv(tmp_path / "a.csv", measurements(report)[:1])
    with (tmp_path / "a.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == '\'=cmd|"x" | <script>, "quoted"'
    append_markdown(tmp_path / "a.md", measurements(report)[:1])
    assert len((tmp_path / "a.md").read_text().splitlines()) == 3
    assert '=cmd\\|"x" \\| &lt;script>, "quoted"' in (tmp_path / "a.md").read_text()
