"""A model run layer by layer equals the model, and what a calibration measures is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, token_ids

from attention.sharding import make_mesh
from kascade_core import ANCHOR, DENSE, KASCADE_CACHE, REUSE, Selection, select_tiles
from llama_model import LlamaConfig, LlamaModel
from measure import layerwise
from measure.layerwise import Calibration, LayerRunner

NAME = "mha_llama3_tied"  # four layers, five KV heads
SELECTION = Selection(tile_size=4, top_k=3)
MAP = (4, 0, 0, 1, 3)


@pytest.fixture(scope="module")
def calibration():
    """Of a random model on ids [1, 37] (ten tiles, the last with one token), on two devices."""
    model = LlamaModel(LlamaConfig.from_hf(HF_CONFIGS[NAME]), selection=SELECTION)
    ids = jnp.asarray(token_ids(NAME)[:1])
    params = jax.tree.map(lambda x: x * 3, {"params": jax.jit(model.init)(jax.random.key(0), ids)["params"]})
    return Calibration(model, params, [ids], make_mesh(jax.devices()[:2]))


@pytest.fixture(scope="module")
def runner(calibration):
    return LayerRunner(calibration.model, calibration.params, 37, calibration.mesh)


def forward(calibration, schedule):
    model = calibration.model.clone(schedule=schedule)
    (ids,) = calibration.windows
    return model.compile(calibration.params, ids, calibration.mesh)(calibration.params, ids)


@pytest.fixture(scope="module")
def dense(calibration):
    return forward(calibration, None)


def test_layer_by_layer_is_the_model(calibration, runner, dense):
    (ids,) = calibration.windows
    x_BTD = runner.run(runner.embed(ids), 0, lambda *_: None)
    same = runner.compare(x_BTD, x_BTD, ids)
    np.testing.assert_allclose(same.dense_nll, dense.nll[0], rtol=1e-4, atol=1e-4)
    assert np.abs(same.kl).max() < 1e-5
    assert same.same_top1.all()
    assert runner.compare(x_BTD, x_BTD, ids, 5).dense_nll == pytest.approx(same.dense_nll[::5], rel=1e-5)


def test_layer_by_layer_attends_as_a_schedule_does(calibration, runner):
    (ids,) = calibration.windows
    schedule = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, MAP), 3: (ANCHOR, None)}
    chosen = {}

    def choose(layer, x_BTD):
        if layer in (1, 3):
            chosen[layer] = select_tiles(runner.scores(layer, x_BTD), SELECTION)
        return {1: chosen.get(1), 2: chosen.get(1, np.zeros((1, 5, 1, 1)))[:, MAP], 3: chosen.get(3)}.get(layer)

    x_BTD = runner.run(runner.embed(ids), 0, choose)
    expected = forward(calibration, schedule)
    np.testing.assert_allclose(runner.compare(x_BTD, x_BTD, ids).sparse_nll, expected.nll[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(chosen[3], expected.tiles[3])


def test_two_streams_are_compared_over_the_whole_vocabulary(calibration, runner, dense):
    """The divergence from the logits themselves, of another stream."""
    (ids,) = calibration.windows
    x_BTD = runner.run(runner.embed(ids), 0, lambda *_: None)
    other_BTD = x_BTD[:, ::-1]
    got = runner.compare(x_BTD, other_BTD, ids)
    logits = np.asarray(jax.jit(calibration.model.apply)(calibration.params, ids))[0]
    a, b = jax.nn.log_softmax(logits[:-1]), jax.nn.log_softmax(logits[::-1][:-1])
    np.testing.assert_allclose(got.kl, (jnp.exp(a) * (a - b)).sum(-1), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got.same_top1, a.argmax(-1) == b.argmax(-1))
    np.testing.assert_allclose(got.sparse_nll, -b[np.arange(36), ids[0, 1:]], rtol=1e-4, atol=1e-4)


def test_scores_are_those_that_tiles_are_chosen_by(calibration):
    (observation,) = calibration.observations
    assert calibration.tiles.keys() == KASCADE_CACHE.keys() == {0, 1, 2, 3}
    for layer, tiles in calibration.tiles.items():
        again = select_tiles(jnp.asarray(observation.scores[layer][None]), SELECTION)
        np.testing.assert_array_equal(again, tiles)
    assert observation.scores.sum(-1) == pytest.approx(1, abs=1e-5)
    assert (observation.importance > 0).all()


def test_each_window_is_observed_and_its_tiles_counted(calibration):
    (ids,) = calibration.windows
    twice = Calibration(calibration.model, calibration.params, [ids, ids[:, ::-1]], calibration.mesh)
    assert twice.tiles[1].shape == (2, 5, 10, 3)
    np.testing.assert_array_equal(twice.tiles[1][:1], calibration.tiles[1])


def test_damage_is_the_divergence_of_a_run_over_the_squared_loss_of_mass(calibration):
    """Computed anew for layer 2, from the model's logits: of ten tiles its query tiles keep the first and their own."""
    (ids,), model, params = calibration.windows, calibration.model, calibration.params
    beta = calibration.damage_factors
    assert beta[0] == 0
    assert (beta[1:] > 0).all()
    alone = {layer: (ANCHOR if layer == 2 else DENSE, None) for layer in range(4)}
    models = model, model.clone(schedule=alone, selection=SELECTION.with_top_k(2))
    step = layerwise.DAMAGE_STEP
    dense, sparse = (jax.nn.log_softmax(jax.jit(m.apply)(params, ids)[0, :-1:step]) for m in models)
    masses = calibration.observations[0].scores[2]
    lost = 1 - np.einsum("KQQ->KQ", masses) - np.where(np.arange(10) > 0, masses[..., 0], 0)
    expected = (jnp.exp(dense) * (dense - sparse)).sum(-1).mean() / np.mean(lost**2)
    assert beta[2] == pytest.approx(float(expected), rel=1e-3)


def test_the_models_own_kernel_and_dtype_are_used(calibration, kernel_calls):
    """Calls of a kernel that is not the default one are counted, and the dtype that it gets."""
    model = calibration.model.clone(kernel="pallas_tpu", dtype=jnp.bfloat16)
    (ids,) = calibration.windows
    runner = LayerRunner(model, calibration.params, 37, calibration.mesh)
    x_BTD = runner.dense(0, runner.embed(ids))
    runner.sparse(1, x_BTD, select_tiles(runner.scores(1, x_BTD), SELECTION))
    assert [name for name, _ in kernel_calls] == ["dense", "reuse"]
    assert {dtype for _, dtype in kernel_calls} == {jnp.dtype("bfloat16")}
