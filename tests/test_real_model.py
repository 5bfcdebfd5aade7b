"""The default model on real prose: run with `pytest -m real_model` after `python convert_weights.py`."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from kascade_layout import make_mesh

import benchmark_kascade_final as benchmark
from kascade_core import compile_forward, perplexity_of
from llama_model import LlamaModel, load_weights

pytestmark = pytest.mark.real_model
GOLDEN = json.loads((Path(__file__).with_name("golden") / "smollm2_perplexity.json").read_text())


@pytest.fixture(scope="module")
def sample_ids(default_weights):
    tokenizer = benchmark.load_tokenizer(default_weights)
    return tokenizer.encode(benchmark.DEFAULT_TEXT.read_text(encoding="utf-8"))


def perplexity(weights, dtype, ids):
    """As the benchmark computes it, the work dealt over every core: a fault of XLA's showed there alone."""
    mesh = make_mesh(benchmark.configure_device("cpu"))
    manifest, params = load_weights(weights, dtype, mesh)
    ids = jnp.asarray([ids], jnp.int32)
    forward, _ = compile_forward(LlamaModel(manifest["config"], dtype=dtype), params, ids, mesh)
    return perplexity_of(forward(params, ids)[0][:, :-1])


def test_the_sample_is_long_enough(sample_ids):
    assert len(sample_ids) >= 5000


@pytest.mark.parametrize("window", GOLDEN["windows"], ids=lambda window: f"{window['start']}+{window['length']}")
def test_float32_perplexity_equals_transformers(default_weights, sample_ids, window):
    ids = sample_ids[window["start"] : window["start"] + window["length"]]
    assert perplexity(default_weights, jnp.float32, ids) == pytest.approx(window["perplexity"], rel=1e-3)


def test_bfloat16_perplexity_is_near(default_weights, sample_ids):
    window = GOLDEN["windows"][0]
    got = perplexity(default_weights, jnp.bfloat16, sample_ids[: window["length"]])
    assert got == pytest.approx(window["perplexity"], rel=5e-3)


def test_the_default_run_reuses_and_stays_under_two_percent(default_weights, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert benchmark.main(["--weights_dir", str(default_weights), "--json", str(path), "--n_runs", "1"]) == 0
    report = json.loads(path.read_text())
    assert sum(row["mode"] == "REUSE" for row in report["schedule"]) >= 18
    assert report["degradation_pct"] < 2
    assert report["density"] < 0.7
    assert "✅✅✅ SUCCESS! <2% degradation achieved!" in capsys.readouterr().out
