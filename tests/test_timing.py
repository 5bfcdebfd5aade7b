"""Attention alone, and a sweep over lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, token_ids

from attention.sharding import make_mesh
from kascade_core import ANCHOR, DENSE, REUSE, Selection
from llama_model import LlamaConfig, LlamaModel, load_weights
from measure import timing
from weights.folder import read_manifest

NAME = "gqa_llama3_untied"
SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (1, 1))}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(jax.devices()[:2])


@pytest.fixture(scope="module")
def model():
    return LlamaModel(LlamaConfig.from_hf(HF_CONFIGS[NAME]), SPARSE, Selection(4, 3))


def test_attention_alone_is_each_kind_with_the_models_kernel_and_dtype(model, mesh, kernel_calls):
    runs = timing.compile_attention(model.clone(kernel="pallas_tpu", dtype=jnp.bfloat16), 30, mesh)
    assert list(runs) == ["dense", "selection", "anchor", "reuse"]
    assert sorted(name for name, _ in kernel_calls) == ["choose", "choose", "dense", "reuse", "reuse"]
    assert {dtype for _, dtype in kernel_calls} == {jnp.dtype("bfloat16")}
    results = {name: run() for name, run in runs.items()}
    np.testing.assert_array_equal(results["selection"], results["anchor"][1])
    np.testing.assert_array_equal(results["reuse"], results["anchor"][0])
    assert (results["reuse"] != results["dense"]).any()


@pytest.fixture(scope="module")
def measured(folders, model, mesh):
    """What a sweep needs of a model, and its row for 40 tokens, more than it is given."""
    ids = jnp.asarray(token_ids(NAME)[:1, :25])
    params = load_weights(folders / NAME, read_manifest(folders / NAME))
    models = {"dense": model.clone(schedule=None), "sparse": model}
    return (models, params, ids, 40, mesh, 2), timing.measure_length(models, params, ids, 40, mesh, 2)


def test_a_length_is_timed_and_its_density_counted(measured):
    _, row = measured
    assert (row.length, len(row.dense_ms), len(row.sparse_ms), row.skipped) == (40, 2, 2, None)
    # ten query tiles, at most three tiles each: 1 + 2 + 8 * 3 of 55 causal pairs, in two of three layers
    assert row.density == pytest.approx((1 + 2 * 27 / 55) / 3)
    assert row.peak_memory_bytes > 1e7


def test_a_length_that_does_not_fit_is_not_run(measured, monkeypatch):
    args, _ = measured
    monkeypatch.setattr(timing, "free_memory", lambda device: 10)
    monkeypatch.setattr(timing, "time_interleaved", None)
    row = timing.measure_length(*args)
    assert row.skipped == "needs 0.0 GB beside the weights, and 0.0 are free"
    assert (row.length, row.dense_ms, row.density) == (40, (), None)


def test_a_machine_that_does_not_tell_its_free_memory_runs_everything(measured, monkeypatch):
    args, row = measured
    monkeypatch.setattr(timing, "free_memory", lambda device: None)
    monkeypatch.setattr(timing, "time_interleaved", lambda runs, n: {name: [1.0] * n for name in runs})
    again = timing.measure_length(*args)
    assert again.density == row.density
    assert again.dense_ms == [1.0, 1.0]
