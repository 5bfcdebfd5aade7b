"""bench/quality_decode.py: what it measures is what whole forwards compute, and an interrupted run goes on."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, repeating_text

from attention.sharding import make_mesh
from bench import quality, quality_decode
from errors import InputError
from llama_model import LlamaModel, load_weights
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

NAME, DEPTH, STEPS = "gqa_llama3_untied", 40, 9
SETTING = quality.Setting("small", quality.search_rule("head", 1), 4, 1)  # a choice per row, as steps have


@pytest.fixture(scope="module")
def weights(folders):
    return folders / NAME


@pytest.fixture(scope="module", autouse=True)
def articles(tmp_path_factory):
    """Four articles; windows of 64 tokens."""
    folder = tmp_path_factory.mktemp("articles")
    for i in range(4):
        words = repeating_text(90, HF_CONFIGS[NAME]["vocab_size"]).split()
        (folder / f"{i}.txt").write_text(" ".join(words[i:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "ARTICLES", folder)
        patch.setattr(quality, "LEAST_TOKENS", 64)
        patch.setattr(quality_decode, "make_mesh", lambda devices: make_mesh(devices[:2]))
        yield


def test_an_article_is_measured_as_whole_forwards_compute_it(weights):
    manifest, mesh = read_manifest(weights), make_mesh(jax.devices()[:2])
    params = load_weights(weights, manifest, jnp.dtype(jnp.float32), mesh)
    articles = quality.read_articles(load_tokenizer(weights, manifest.tokenizer), 2)
    bench = quality.Bench(manifest.config, params, mesh, articles)
    decoding = quality_decode.DecodingBench(bench, DEPTH, STEPS)
    plans = SETTING.rule(bench.calibration(DEPTH, SETTING), 0.5)
    arm = decoding.sparse_arm(SETTING, plans)
    rows = {prefill: decoding.measure(arm, prefill, "0") for prefill in ("sparse", "dense")}
    ids = jnp.asarray(bench.tested["0"][:, : DEPTH + STEPS + 1])
    nll = [
        model.compile(params, ids, mesh)(params, ids).nll[0, DEPTH:]
        for model in (LlamaModel(manifest.config), arm.model)
    ]
    assert rows["sparse"]["log_perplexity"] == pytest.approx(float(np.mean(nll[1] - nll[0])), abs=2e-5)
    assert abs(rows["sparse"]["log_perplexity"] - rows["dense"]["log_perplexity"]) > 1e-4
    assert 0 < rows["sparse"]["density"] < 1
    assert rows["sparse"]["kl"] > 0


def test_an_interrupted_run_goes_on_where_it_was(weights, tmp_path, capsys, monkeypatch):
    flags = ["--weights_dir", str(weights), "--csv", str(tmp_path / "out.csv"), "--density", "0.9", "--windows", "2"]
    sizes = ["--depth", str(DEPTH), "--steps", str(STEPS), "--settings", "search, layer budgets"]
    run, calls = partial(quality_decode.main, [*flags, *sizes]), []

    class Small:
        def __init__(self, *_): ...

        def sparse_arm(self, *_): ...

        def measure(self, _, prefill, window):
            calls.append((prefill, window))
            if len(calls) == 4:
                raise InputError("stopped")
            return {"density": 0.5, "reuse": 1, "log_perplexity": len(calls) / 100, "kl": 0.25, "agree": 1.0}

    monkeypatch.setattr(quality_decode, "DecodingBench", Small)
    any_rule = [dataclasses.replace(setting, rule=lambda *_: ()) for setting in quality.SETTINGS]
    monkeypatch.setattr(quality_decode, "SETTINGS", any_rule)
    with pytest.raises(SystemExit):
        run()
    assert run() == 0
    assert calls == [("sparse", "0"), ("dense", "0"), ("sparse", "2"), ("dense", "2"), ("dense", "2")]
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 40")]
    assert [(row[3], row[6], row[9]) for row in rows] == [
        ("sparse", "+2.00 ± 1.00", "2 |"), ("dense", "+3.50 ± 1.50", "2 |")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "60", "--steps", "4"], "both together below 64, the tokens of an article, got 60 and 4"),
        (["--steps", "0"], "steps at least 1"),
        (["--windows", "0", "--depth", "8", "--steps", "2"], "windows must be at least 1, got 0"),
        (["--density", "nan", "--depth", "8", "--steps", "2"], "density must be above 0 and at most 1, got nan"),
        (["--settings", "baseline: sliding window and sink"], "invalid choice"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        quality_decode.parse_args(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
