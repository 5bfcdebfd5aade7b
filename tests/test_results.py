"""What came out of a run: derived figures, and the report that holds everything."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from kascade_core import ANCHOR, REUSE, LayerPlan, Selection
from llama_model import Comparison
from measure.settings import Settings
from report.results import (
    Layer,
    LimitCheck,
    Machine,
    Model,
    Quality,
    Results,
    SweepRow,
    Timing,
    break_even,
    count_modes,
    settings_to_json,
    write_json,
)

PLANS = (
    LayerPlan(),
    LayerPlan(ANCHOR, budgets=(2, 1), largest_budget=2),
    LayerPlan(REUSE, 1, (1, 0), (1, 1), reason="why"),
)


def quality(dense, sparse, density):
    """Of one window of eight tokens, each of the given perplexities."""
    nll = (np.full(8, math.log(perplexity)) for perplexity in (dense, sparse))
    return Quality([Comparison(*nll, np.zeros(8), np.ones(8, bool))], [density])


def results(**changes):
    values = dict(
        settings=Settings(Selection(8, top_k=3)),
        date="2025-01-01T00:00:00+00:00",
        command=["--tile_size", "8"],
        model=Model("tiny", "a folder", "abc", 7, 3, 28),
        machine=Machine("cpu", "cpu", 2, "Some CPU"),
        prefix="<s>",
        schedule=[Layer(plan, density) for plan, density in zip(PLANS, (1.0, 0.5, 0.25), strict=True)],
        limit_check=LimitCheck((0.01, 0.02)),
        quality=quality(20.0, 20.5, 0.6),
        timing=Timing([10.0, 30.0, 20.0], [40.0, 20.0, 25.0], 1.5, 2.5),
        attention_ms={"dense": [3.0], "reuse": [1.0]},
        sweep=[SweepRow(64, [4.0], [2.0], 0.5, 100), SweepRow(99, skipped="needs 9 GB")],
        peak_memory_bytes=1234,
    )
    return Results(**values | changes)


@pytest.mark.parametrize(
    ("sparse", "density", "verdict"),
    [(20.398, 0.5, "success"), (19, 0.5, "success"), (20.41, 0.5, "failed"), (20, 1.0, "nothing dropped")],
)
def test_the_verdict_is_under_two_percent_and_signed(sparse, density, verdict):
    found = quality(20.0, sparse, density)
    assert found.degradation_pct == pytest.approx((sparse - 20) * 5)
    assert found.verdict == verdict


def test_a_speedup_is_of_the_medians():
    assert results().timing.speedup == pytest.approx(20 / 25)
    assert SweepRow(8, [9.0, 4, 1], [2.0, 2, 5]).speedup == pytest.approx(2)
    assert SweepRow(8, skipped="why").speedup is None


def row(length, dense, sparse):
    return SweepRow(length, [dense], [sparse], 0.5)


@pytest.mark.parametrize(
    ("rows", "between"),
    [
        ([(8, 1, 2), (16, 2, 2), (32, 3, 2)], (16, 32)),
        ([(8, 3, 2), (16, 2, 3), (32, 3, 2)], (16, 32)),
        ([(8, 3, 2), (16, 3, 2)], (None, 8)),
        ([(8, 3, 2), (16, 2, 3)], (16, None)),
        ([], None),
    ],
)
def test_break_even_is_where_sparse_begins_to_stay_faster(rows, between):
    assert break_even([row(*sizes) for sizes in rows] + [SweepRow(64, skipped="needs 9 GB")]) == between


def test_the_report_holds_every_setting():
    settings = Settings(Selection(8, density=0.5), sweep=(64,), text=Path("/a/text.txt"))
    config = settings_to_json(settings)
    expected = dataclasses.asdict(settings)
    expected |= expected.pop("selection") | {"text": "/a/text.txt"}
    assert config == expected
    assert len(config) == len(dataclasses.fields(Settings)) - 1 + len(dataclasses.fields(Selection))


def test_the_report_holds_every_field_of_the_results():
    """So that a field that is added is not forgotten."""
    report = results().to_json()
    renamed = {"settings": "config", "machine": "device", "limit_check": "calibration_degradation_pct"}
    renamed |= {"attention_ms": "timing", "long_context": "long_ppl", "similarity_LL": "similarity"}
    renamed |= {"decoding": "decode", "depths": "decode_depths", "generated": "generate"}
    for field in dataclasses.fields(Results):
        assert renamed.get(field.name, field.name) in report
    assert report["dense"] == {"perplexity": pytest.approx(20), "compile_s": 1.5}
    assert report["sparse"] == {"perplexity": pytest.approx(20.5), "compile_s": 2.5}
    assert report["calibration_degradation_pct"] == pytest.approx(math.expm1(0.015) * 100)
    assert report["layer_types"] == "FFS"
    assert (report["degradation_pct"], report["verdict"]) == (pytest.approx(2.5), "failed")
    assert (report["density"], report["speedup"], report["peak_memory_bytes"]) == (0.6, pytest.approx(0.8), 1234)
    assert report["timing"] == {
        "dense_ms": [10.0, 30.0, 20.0],
        "sparse_ms": [40.0, 20.0, 25.0],
        "attention_ms": {"dense": [3.0], "reuse": [1.0]},
    }
    assert report["sweep"][0]["speedup"] == 2
    assert report["sweep"][1]["skipped"] == "needs 9 GB"
    assert report["sweep_break_even"] == (None, 64)
    assert {"python", "jax", "jaxlib", "flax", "numpy", "tokenizers"} <= set(report["versions"])
    assert report["schedule"][2] == {
        "layer": 2, "mode": "REUSE", "anchor": 1, "head_map": (1, 0), "budgets": (1, 1), "similarity": None,
        "reason": "why", "density": 0.25,
    }  # fmt: skip


def test_modes_are_counted():
    assert count_modes(PLANS) == {"DENSE": 1, "ANCHOR": 1, "REUSE": 1}


def test_a_machine_is_named_by_what_computes():
    assert str(Machine("cpu", "cpu", 2, "Some CPU")) == "2 CPU device(s), Some CPU"
    assert str(Machine("tpu", "TPU v5 lite", 4, "Some CPU")) == "4 TPU device(s), TPU v5 lite"


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_goes_through_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}


def test_a_report_is_json_that_every_reader_takes(tmp_path, capsys):
    write_json(Path("-"), {"a": math.inf, "b": [math.nan, {"c": (1, -math.inf)}]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, {"c": [1, None]}]}
