"""The default model on real prose: run with `pytest -m real_model` after `python convert_weights.py`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import benchmark_kascade_final as benchmark
from attention.sharding import make_mesh
from kascade_core import perplexity_of
from llama_model import LlamaModel, load_weights
from measure.machine import usable_cores
from measure.settings import DEFAULT_TEXT
from measure.texts import read_tokens
from report.results import SUCCESS, UNDECIDED
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

pytestmark = pytest.mark.real_model
GOLDEN = json.loads((Path(__file__).with_name("golden") / "smollm2_perplexity.json").read_text())


@pytest.fixture(scope="module")
def manifest(default_weights):
    return read_manifest(default_weights)


@pytest.fixture(scope="module")
def sample_ids(default_weights, manifest):
    return read_tokens(load_tokenizer(default_weights, manifest.tokenizer), DEFAULT_TEXT, 7000)


@pytest.fixture
def every_core(monkeypatch):
    """As many devices as a run takes, of those that tests have: a fault of XLA's showed on several alone."""
    devices = jax.devices("cpu")[: usable_cores()]
    monkeypatch.setattr(benchmark, "configure_device", lambda device: devices)
    return make_mesh(devices)


def perplexity(folder, manifest, dtype, ids, mesh):
    params = load_weights(folder, manifest, dtype, mesh)
    ids = jnp.asarray([ids], jnp.int32)
    forward = LlamaModel(manifest.config, dtype=dtype).compile(params, ids, mesh)
    return perplexity_of(forward(params, ids).nll)


@pytest.mark.parametrize("window", GOLDEN["windows"], ids=lambda window: f"{window['start']}+{window['length']}")
def test_float32_perplexity_equals_transformers(default_weights, manifest, sample_ids, every_core, window):
    ids = sample_ids[window["start"] : window["start"] + window["length"]]
    got = perplexity(default_weights, manifest, jnp.float32, ids, every_core)
    assert got == pytest.approx(window["perplexity"], rel=1e-3)


def test_bfloat16_perplexity_is_near(default_weights, manifest, sample_ids, every_core):
    window = GOLDEN["windows"][0]
    got = perplexity(default_weights, manifest, jnp.bfloat16, sample_ids[: window["length"]], every_core)
    assert got == pytest.approx(window["perplexity"], rel=5e-3)


def test_the_default_run_reuses_and_stays_under_two_percent(default_weights, every_core, tmp_path):
    path = tmp_path / "out.json"
    assert benchmark.main(["--weights_dir", str(default_weights), "--json", str(path), "--n_runs", "1"]) == 0
    report = json.loads(path.read_text())
    assert sum(row["mode"] == "REUSE" for row in report["schedule"]) >= 18
    assert report["degradation_pct"] < 2
    assert report["density"] < 0.7
    assert report["quality"]["verdict"] in (SUCCESS, UNDECIDED)  # four windows are few
    assert report["quality"]["windows"] == 4
