"""measure/resume.py and measure/densities.py: schedules at several densities, and rows that an interrupted run had."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import reports
from synthetic import repeating_text

import benchmark_kascade_final as benchmark
import measure.densities
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan
from measure.densities import mapped_layers
from measure.resume import earlier_rows, measure_rows, save_partly
from report.results import SweepRow, read_report, write_json


@pytest.fixture
def saved(tmp_path):
    """The file of a run that was interrupted, and its results."""
    results = reports.results()
    save_partly(tmp_path / "out.json", results)
    return tmp_path / "out.json", results


def test_a_run_that_agrees_goes_on_with_the_rows_that_were_finished(saved):
    path, results = saved
    earlier = earlier_rows(path, results)
    assert list(earlier.densities) == [0.1, 0.2, 0.3, 0.5]
    assert list(earlier.sweep) == [512, 2048], "the skipped length is tried again"
    assert list(earlier.depths) == [512, 2048, 8192]
    assert dataclasses.asdict(earlier.densities[0.2]) == dataclasses.asdict(results.densities[1])


def test_depths_of_a_finished_run_are_measured_anew_and_what_was_asked_for_by_name_is_not(saved):
    path, results = saved
    write_json(path, results.to_json())
    earlier = earlier_rows(path, results)
    assert not earlier.depths and earlier.densities and earlier.sweep


@pytest.mark.parametrize(
    "change",
    [
        {"n_runs": 7},
        {"seq_len": 1024},
        {"kernel": "pallas_gpu"},
        {"selection": dataclasses.replace(reports.results().settings.selection, top_k=7)},
    ],
    ids=str,
)
def test_a_run_with_another_flag_measures_everything(saved, change):
    path, results = saved
    now = reports.replaced(results, settings=reports.replaced(results.settings, **change))
    assert earlier_rows(path, now) == ({}, {}, {})


def test_a_run_of_another_model_text_or_schedule_measures_everything(saved):
    path, results = saved
    texts = results.texts | {"test": reports.replaced(results.texts["test"], ids_sha256="9" * 64)}
    for change in (
        {"model": reports.replaced(results.model, fingerprint="other")},
        {"texts": texts},
        {"schedule": results.schedule[:-1]},
    ):
        assert earlier_rows(path, reports.replaced(results, **change)) == ({}, {}, {})


def test_files_that_a_run_writes_and_further_rows_may_differ(saved):
    path, results = saved
    change = dict(densities=(0.4,), sweep=(99,), depths=(7,), html=path.with_name("page.html"), quiet=True)
    now = reports.replaced(results, settings=reports.replaced(results.settings, **change))
    assert all(earlier_rows(path, now))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format_version": 3, "degradation_pct": 1, "program": "kascade benchmark"}'])  # fmt: skip
def test_a_file_that_is_no_report_has_no_rows(tmp_path, text):
    path = tmp_path / "out.json"
    if text is not None:
        path.write_text(text)
    assert earlier_rows(path, reports.results()) == ({}, {}, {})
    assert earlier_rows(Path("-"), reports.results()) == ({}, {}, {})
    assert earlier_rows(None, reports.results()) == ({}, {}, {})


def test_what_is_missing_is_measured_and_each_row_is_told_as_it_comes():
    rows = {length: SweepRow(length, [1.0], [1.0], 0.5) for length in (8, 16, 32)}
    asked, told = [], []
    measured = measure_rows(
        (8, 16, 32),
        {16: rows[16]},
        lambda length: asked.append(length) or rows[length],
        lambda found, was_there: told.append((len(found), was_there)),
    )
    assert (asked, measured) == ([8, 32], list(rows.values()))
    assert told == [(1, False), (2, True), (3, False)]


@pytest.mark.parametrize(
    ("modes", "layers"),
    [
        ("DDD", []),
        ("DAD", [1]),
        ("DARRAR", [1, 3, 4]),
        ("DARARR", [1, 3, 5]),
    ],
)
def test_the_maps_are_of_the_first_and_last_anchor_and_the_reuse_farthest_from_its_anchor(modes, layers):
    plans, anchor = [], None
    for i, mode in enumerate(modes):
        anchor = i if mode == "A" else anchor
        plans.append(LayerPlan({"D": DENSE, "A": ANCHOR, "R": REUSE}[mode], anchor if mode == "R" else None))
    assert mapped_layers(plans) == layers


# --- Whole runs ---


@pytest.fixture
def flags(folders, tmp_path):
    (tmp_path / "text.txt").write_text(repeating_text(200, 33))
    sizes = [
        "--tile_size",
        "4",
        "--top_k",
        "3",
        "--seq_len",
        "30",
        "--dtype",
        "float32",
        "--n_runs",
        "2",
        "--decode",
        "0",
    ]
    files = ["--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "out.json")]
    return [*sizes, "--threshold", "0.3", "--windows", "1", "--weights_dir", str(folders / "mha_llama3_tied"), *files]


def test_a_run_that_is_interrupted_goes_on_and_measures_only_what_is_missing(flags, tmp_path, monkeypatch, capsys):
    measured = []

    def counted(asked, **rest):
        if asked == 0.9 and not measured[1:]:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(asked)
        return measure.densities.measure_density(asked, **rest)

    monkeypatch.setattr(benchmark, "measure_density", counted)
    monkeypatch.setattr("errors.os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*flags, "--densities", "0.9,0.4"])
    partly = read_report(tmp_path / "out.json")
    assert not partly["finished"] and [row["asked"] for row in partly["densities"]] == [0.4]
    assert benchmark.main([*flags, "--densities", "0.4,0.9"]) == 0
    assert measured == [0.4, "interrupted", 0.9]
    report = read_report(tmp_path / "out.json")
    assert report["finished"] and [row["asked"] for row in report["densities"]] == [0.4, 0.9]
    assert report["densities"][0] == partly["densities"][0]
    assert capsys.readouterr().out.count("(from") == 1


def test_a_schedule_of_a_density_is_as_dense_as_asked_and_has_the_losses_of_a_run_of_its_own(flags, tmp_path):
    """What --densities says of 0.4 is what a run with --density 0.4 says."""
    assert benchmark.main([*flags, "--densities", "0.4"]) == 0
    (row,) = read_report(tmp_path / "out.json")["densities"]
    own = [word if word != "--top_k" else "--density" for word in flags]
    own[own.index("--density") + 1] = "0.4"
    assert benchmark.main(own) == 0
    alone = read_report(tmp_path / "out.json")
    names = ("density", "degradation_pct", "layer_types", "schedule_sha256")
    assert {name: row[name] for name in names} == {
        name: pytest.approx(alone[name], abs=1e-4) if name in names[:2] else alone[name] for name in names
    }
    assert np.isclose(row["kl"], alone["quality"]["kl"]["mean"], atol=1e-6)
