"""The model against transformers' logits, its schedule, its tiles, its loss, and how it is loaded and compiled."""

import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, token_ids

import kascade_core as core
import llama_model
from attention.sharding import Layout, make_mesh
from errors import InputError
from kascade_core import ANCHOR, DENSE, KASCADE_CACHE, REUSE, LayerPlan, Selection, compute_perplexity, perplexity_of
from llama_model import LlamaConfig, LlamaModel, count_parameters, load_weights
from network import layers
from weights.folder import read_manifest

SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (1, 1))}
NAME = "gqa_llama3_untied"  # three layers, two KV heads
SMALL = Selection(tile_size=4, top_k=3, sink_tiles=0)


def load(folder, *args):
    manifest = read_manifest(folder)
    return manifest.config, load_weights(folder, manifest, *args)


@pytest.fixture(scope="module")
def loaded(folders):
    return load(folders / NAME)


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(token_ids(NAME))


def logits_of(model, params, ids):
    return np.asarray(jax.jit(model.apply)(params, jnp.asarray(ids)))


def run(model, params, ids, mesh=None):
    return jax.device_get(model.compile(params, ids, mesh)(params, ids))


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_logits_equal_transformers(folders, name):
    expected = np.load(Path(__file__).with_name("golden") / "logits.npz")[name]
    config, params = load(folders / name)
    got = logits_of(LlamaModel(config), params, token_ids(name))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_tiles_chosen_equals_dense(loaded, ids, dtype):
    config, params = loaded
    dense = LlamaModel(config, selection=Selection(4, 99), dtype=dtype)
    got, expected = (logits_of(model, params, ids) for model in (dense.clone(schedule=SPARSE), dense))
    tolerance = 1e-6 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [
        (None, jnp.float32),
        (SPARSE, jnp.bfloat16),
        ({0: (ANCHOR, None), 1: (REUSE, 0), 2: (ANCHOR, None)}, jnp.float32),
        pytest.param(None, jnp.bfloat16, marks=pytest.mark.full),
        pytest.param(SPARSE, jnp.float32, marks=pytest.mark.full),
    ],
)
def test_the_future_changes_no_earlier_logit(loaded, schedule, dtype):
    """Dense from token to token, sparse from query tile to query tile; to the bit."""
    config, params = loaded
    model = LlamaModel(config, schedule, SMALL, dtype=dtype)
    forward, ids = jax.jit(model.apply), token_ids(NAME)
    before = np.asarray(forward(params, ids))
    for cut in (7, 30, 60):
        changed = ids.copy()
        changed[:, cut:] = (changed[:, cut:] + 1) % config.vocab_size
        same = before == np.asarray(forward(params, changed))
        assert same[:, : cut if schedule is None else cut // 4 * 4].all()
        assert not same[:, cut:].all()


def test_a_schedule_and_its_head_map_change_the_predictions(loaded, ids):
    config, params = loaded
    schedules = (None, SPARSE, {**SPARSE, 2: (REUSE, 1, (1, 0))})
    dense, sparse, swapped = (logits_of(LlamaModel(config, schedule, SMALL), params, ids) for schedule in schedules)
    assert np.abs(dense - sparse).max() > 1e-2
    assert np.abs(sparse - swapped).max() > 1e-3


def test_a_forward_returns_the_last_texts_tiles_and_no_tracer(loaded, ids):
    config, params = loaded
    forward = LlamaModel(config, SPARSE, SMALL).compile(params, ids)
    assert forward.seconds > 0
    found = []
    for text in (ids, (ids * 7 + 3) % config.vocab_size):
        core.publish_tiles(forward(params, text).tiles)
        assert list(KASCADE_CACHE) == [1]
        assert type(KASCADE_CACHE[1]) is np.ndarray
        found.append(KASCADE_CACHE[1])
    assert found[0].shape == (2, 2, 16, 3)
    assert (found[0] != found[1]).any()


def test_a_reuse_layer_attends_to_its_anchors_tiles_through_its_head_map(loaded, ids):
    """As an anchor would that chooses those tiles itself: its scores are replaced by what it is handed."""
    config, params = loaded
    model = LlamaModel(config, SPARSE, SMALL)
    chosen = run(model, params, ids).tiles[1]
    layout = Layout.of(61, SMALL.block)
    rope = llama_model.rope_table(config, layout.local_positions()[None])
    x_BTD = jax.random.normal(jax.random.key(0), (2, layout.padded, config.hidden_size))
    block = llama_model.Block(config, LayerPlan(REUSE, 1, (0, 1)), SMALL, False, jnp.float32, None)
    attend = jax.jit(partial(block.apply, layout=layout, method="attend"))
    blocks = [
        attend({"params": params["params"]["layer_2"]}, x_BTD, rope, tiles)[0]
        for tiles in (model.schedule[2].attended(chosen), chosen[:, [1, 1]], chosen)
    ]
    np.testing.assert_array_equal(blocks[0], blocks[1])
    assert (blocks[0] != blocks[2]).any()


@pytest.mark.parametrize(
    ("schedule", "selection", "num_devices"),
    [
        (None, SMALL, 8),
        (SPARSE, Selection(4, 4, query_tile=8, anchor_scoring="fast"), 2),
        pytest.param(SPARSE, SMALL, 2, marks=pytest.mark.full),
        pytest.param(SPARSE, Selection(4, 4, query_tile=8, anchor_scoring="fast"), 8, marks=pytest.mark.full),
        pytest.param(None, SMALL, 2, marks=pytest.mark.full),
    ],
)
def test_devices_agree(loaded, ids, schedule, selection, num_devices):
    """Split over several devices: the same tiles, and the same losses and streams to rounding."""
    config, params = loaded
    model = LlamaModel(config, schedule, selection, calibrate=True)
    mesh = make_mesh(jax.devices()[:num_devices])
    assert mesh.size == num_devices
    expected, got = (run(model, params, ids, where) for where in (None, mesh))
    np.testing.assert_allclose(got.nll, expected.nll, rtol=1e-5)
    np.testing.assert_allclose(got.stream, expected.stream, rtol=1e-4, atol=1e-5)
    assert got.tiles.keys() == expected.tiles.keys() == {0, 1, 2}
    for layer in got.tiles:
        np.testing.assert_array_equal(got.tiles[layer], expected.tiles[layer])


def test_calibration_chooses_in_every_layer_of_a_dense_forward(loaded, ids):
    config, params = loaded
    model = LlamaModel(config, SPARSE, Selection(16, 12, sink_tiles=0))
    core.calibrate_kascade(model, params, ids, tile_size=4, top_k=3)
    assert list(KASCADE_CACHE) == [0, 1, 2]
    assert {tiles.shape for tiles in KASCADE_CACHE.values()} == {(2, 2, 16, 3)}
    direct = run(LlamaModel(config, None, SMALL, calibrate=True), params, ids)
    dense = logits_of(model.clone(schedule=None), params, ids)
    assert perplexity_of(direct.nll) == pytest.approx(compute_perplexity(dense, ids), rel=1e-6)
    for layer, tiles in direct.tiles.items():
        np.testing.assert_array_equal(tiles, KASCADE_CACHE[layer])


def test_calibration_without_a_top_k_keeps_the_density(loaded, ids):
    config, params = loaded
    model = LlamaModel(config, None, Selection(16, density=0.5))
    core.calibrate_kascade(model, params, ids, tile_size=4, top_k=None)
    assert KASCADE_CACHE[0].shape == (2, 2, 16, 8)


def test_a_model_that_is_not_finite_is_not_calibrated_on(loaded, ids):
    config, params = loaded
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(InputError, match="computes infinities or NaN on the calibration text"):
        core.calibrate_kascade(LlamaModel(config), broken, ids, 4, 3)


@pytest.mark.parametrize(
    ("name", "chunk"), [(NAME, 8), pytest.param(NAME, 1024, marks=pytest.mark.full), ("gqa_default_tied", 10)]
)
def test_the_loss_is_the_perplexity_of_the_logits(folders, monkeypatch, name, chunk):
    """The vocabulary of 50 or 41 tokens in chunks: several and a rest, or one."""
    monkeypatch.setattr(llama_model, "VOCAB_CHUNK", chunk)
    config, params = load(folders / name)
    model, ids = LlamaModel(config), jnp.asarray(token_ids(name))
    output = run(model, params, ids)
    assert output.nll.shape == (2, ids.shape[1] - 1)
    assert output.stream.shape == (*ids.shape, config.hidden_size)
    logits = logits_of(model, params, ids)
    assert perplexity_of(output.nll) == pytest.approx(compute_perplexity(logits, ids), rel=1e-6)
    np.testing.assert_allclose(output.nll, core.token_nll(logits[:, :-1], ids[:, 1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [8, 7, 1])
def test_the_mlp_goes_through_any_number_of_tokens_at_once(loaded, ids, monkeypatch, rows):
    config, params = loaded
    whole = run(LlamaModel(config), params, ids)
    monkeypatch.setattr(layers, "CPU_MLP_ROWS", rows)
    in_chunks = run(LlamaModel(config), params, ids)
    np.testing.assert_allclose(in_chunks.stream, whole.stream, rtol=1e-5, atol=1e-5)


def test_budgets_attend_to_that_many_tiles(loaded, ids):
    """A reuse layer with a larger budget than its anchor's still gets its own number."""
    config, params = loaded
    budgets = {1: (1, 2), 2: (5, 3)}
    plans = (LayerPlan(), LayerPlan(ANCHOR, budgets=budgets[1]), LayerPlan(REUSE, 1, (1, 0), budgets[2]))
    model = LlamaModel(config, plans, SMALL)
    output = run(model, params, ids)
    attended = core.attended_tiles(model.schedule, output.tiles)
    for layer, counts in budgets.items():
        for head, budget in enumerate(counts):
            used = (attended[layer][0, head] != core.NO_TILE).sum(-1)
            np.testing.assert_array_equal(used, np.minimum(np.arange(1, 17), budget))
    plain = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (1, 0))}
    uniform = plain | {1: (ANCHOR, None, None, (3, 3)), 2: (REUSE, 1, (1, 0), (3, 3))}
    expected, equal = (run(LlamaModel(config, schedule, SMALL), params, ids).nll for schedule in (plain, uniform))
    np.testing.assert_allclose(equal, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(output.nll - expected).max() > 1e-3


def test_the_model_is_hashable_and_equal_to_its_like(loaded):
    config, _ = loaded
    model = LlamaModel(config, schedule=SPARSE)
    assert hash(model) == hash(LlamaModel(config, schedule=dict(SPARSE)))
    assert model == model.clone()
    assert model != model.clone(schedule=None)
    reason = [*model.schedule[:2], LayerPlan(REUSE, 1, (1, 1), reason="why")]
    assert model.clone(schedule=reason) == model  # so that a reason compiles nothing anew


def test_the_models_kernel_and_dtype_are_those_of_every_layer(loaded, ids, kernel_calls):
    config, params = loaded
    jax.eval_shape(LlamaModel(config, SPARSE, SMALL, dtype=jnp.bfloat16, kernel="pallas_tpu").apply, params, ids)
    assert [name for name, _ in kernel_calls] == ["dense", "choose", "reuse", "reuse"]
    assert {dtype for _, dtype in kernel_calls} == {jnp.dtype("bfloat16")}


# --- Loading ---


def test_init_makes_the_same_tree_as_the_weights_folder(loaded):
    config, params = loaded
    made = jax.eval_shape(LlamaModel(config).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert count_parameters(made) == count_parameters(params)


def test_weights_come_in_the_dtype_that_is_asked_for(folders):
    _, params = load(folders / NAME)
    assert params["params"]["layer_0"]["attention"]["wq"].dtype == jnp.float32
    _, params = load(folders / NAME, jnp.bfloat16)
    assert params["params"]["layer_0"]["attention"]["wq"].dtype == jnp.bfloat16
    assert params["params"]["layer_0"]["attention_norm"].dtype == jnp.float32


@pytest.mark.parametrize("num_devices", [1, 2])
def test_no_forward_converts_the_table_of_the_vocabulary(folders, ids, num_devices, monkeypatch):
    """XLA's CPU compiler would, where it takes rows of a bfloat16 array; in a loop it would keep a copy."""
    monkeypatch.setattr(llama_model, "VOCAB_CHUNK", 16)
    config, params = load(folders / NAME, jnp.bfloat16)
    table = params["params"]["tok_embeddings"]
    forward = LlamaModel(config, dtype=jnp.bfloat16).compile(params, ids, make_mesh(jax.devices()[:num_devices]))
    text = forward.begin.as_text() + forward.end.as_text()
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (?:convert|fusion|copy)\(", text)
    assert made and f"{table.shape[0]},{table.shape[1]}" not in made


def test_cpu_devices_share_the_weights_memory(folders):
    _, params = load(folders / NAME, None, make_mesh(jax.devices()[:2]))
    for leaf in jax.tree.leaves(params):
        assert len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}) == 1


# --- Compiling ---


LLAMA3 = dict(vocab_size=128256, max_position_embeddings=131072, rope_theta=5e5)
REAL_SHAPES = {  # parameters as published
    "llama-3.2-1b": (1_235_814_400, dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                             num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)),
    "llama-3.1-8b": (8_030_261_248, dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                             num_attention_heads=32, num_key_value_heads=8, head_dim=128)),
    "llama-3.1-70b": (70_553_706_496, dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                              num_attention_heads=64, num_key_value_heads=8, head_dim=128)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", *(pytest.param(name, marks=pytest.mark.full) for name in list(REAL_SHAPES)[1:])]
)
def test_a_released_model_has_its_published_size_and_its_logits_their_shape(name):
    parameters, shape = REAL_SHAPES[name]
    config = LlamaConfig(**LLAMA3, **shape)
    few = {0: (DENSE, None), 1: (ANCHOR, None)} | dict.fromkeys(range(2, config.num_hidden_layers), (REUSE, 1))
    model = LlamaModel(config, few, Selection(128, 2, query_tile=256, sink_tiles=0), dtype=jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 1000), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert count_parameters(params) == parameters
    logits = jax.eval_shape(model.apply, params, ids)
    assert (logits.shape, logits.dtype) == ((1, 1000, 128256), jnp.float32)
    assert math.prod(params["params"]["layer_1"]["attention"]["wk"].shape) == config.hidden_size * 8 * config.head_dim
