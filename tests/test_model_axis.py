"""Heads, MLP columns and vocabulary split over the mesh's model axis: the numbers are those of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.model_axis import ModelShards, auto_model_axis
from attention.sharding import keep_on, make_mesh, move, steps_mesh
from errors import InputError
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection
from llama_model import LlamaModel
from measure.layerwise import LayerRunner
from measure.machine import pick_mesh
from measure.quality import compile_comparison
from measure.settings import mesh_axes
from network.cache import KVCache
from weights.config import EMBEDDINGS_CHUNK, LlamaConfig, param_shapes

SIZES = dict(hidden_size=24, intermediate_size=16, num_hidden_layers=3, head_dim=6, max_position_embeddings=128)
MODELS = {
    "more shards than KV heads": LlamaConfig(40, num_attention_heads=8, num_key_value_heads=2, **SIZES),
    "as many KV heads": LlamaConfig(
        41, num_attention_heads=8, num_key_value_heads=8, **SIZES,
        tie_word_embeddings=True, qkv_bias=True, output_bias=True,
    ),
    "KV heads that do not divide": LlamaConfig(
        48, num_attention_heads=24, num_key_value_heads=3, **SIZES, qk_norm=True, no_rope_layers=(2,)
    ),
}  # fmt: skip
SELECTION = Selection(tile_size=4, top_k=3, query_tile=8)
T, STEPS, ROOM = 45, 4, 52
FACTORS = [(d, 8 // (d * m), m) for d in (1, 2, 4, 8) for m in (1, 2, 4, 8) if d * m <= 8]  # data, context, model
QUICK = {
    "more shards than KV heads": (1, 2, 4),
    "as many KV heads": (2, 1, 2),
    "KV heads that do not divide": (1, 1, 2),
}


def plans(config, budgets):
    """Dense, anchor, and a reuse whose head map asks for tiles of other shards."""
    K = config.num_key_value_heads
    schedule = [LayerPlan(DENSE), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, tuple(reversed(range(K))))]
    if not budgets:
        return schedule
    numbers = [tuple(2 + (layer + head) % 3 for head in range(K)) for layer in range(3)]
    return [p if p.mode == DENSE else dataclasses.replace(p, budgets=b) for p, b in zip(schedule, numbers)]


def parameters(config, mesh):
    """Random ones, the same for every mesh."""
    rng, shards, params = np.random.default_rng(0), ModelShards.of(config, mesh), {}
    for name, shapes in param_shapes(config).items():
        chunk = jax.tree.map(
            lambda shape: (rng.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        placed = shards.place_chunk(name, chunk, mesh)
        params |= placed if name == EMBEDDINGS_CHUNK else {name.removesuffix(".pkl"): placed}
    return {"params": params}


def mesh_of(data, context, model):
    return make_mesh(jax.devices()[: data * context * model], data, model)


@functools.cache
def computed(name, factors, budgets=True):
    """Losses, tiles and streams of a forward, then of decoding: four steps, two over given ids, two greedy."""
    config, mesh = MODELS[name], mesh_of(*factors)
    model, params = LlamaModel(config, plans(config, budgets), SELECTION), parameters(config, mesh)
    ids_BT = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, T)), jnp.int32)
    forward = model.compile(params, ids_BT, mesh, with_cache=True)
    output = forward(params, ids_BT)
    cache, few = forward.fill_cache(output, ROOM, mesh, jnp.float32), steps_mesh(mesh, 2)
    shapes = KVCache.shapes(config, 2, ROOM, jnp.float32, few)
    step_params = keep_on(params, few)
    decoder = model.compile_decode(step_params, shapes, STEPS, few)
    next_ids = jnp.concatenate([ids_BT[:, :2], jnp.full((2, 2), -1, jnp.int32)], axis=1)
    decoded = decoder(step_params, *move((next_ids, jnp.full((2,), T, jnp.int32)), few), cache)
    compared = compile_comparison(model, mesh)(params, output.stream, output.stream[:, ::-1], ids_BT)
    exact = (output.tiles, decoded.tiles, decoded.best, compared.same_top1)
    close = (output.nll, output.stream, decoded.stream, compared.kl, compared.dense_nll)
    return jax.device_get((exact, close))


def check_as_on_one_device(name, factors, budgets=True):
    (exact, close), (one_exact, one_close) = computed(name, factors, budgets), computed(name, (1, 1, 1), budgets)
    jax.tree.map(np.testing.assert_array_equal, exact, one_exact)
    for got, expected in zip(close, one_close, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_computes_what_one_device_does(name):
    check_as_on_one_device(name, QUICK[name])


@pytest.mark.full
@pytest.mark.parametrize("budgets", [True, False])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_factorisation_computes_what_one_device_does(name, factors, budgets):
    check_as_on_one_device(name, factors, budgets)


def collectives(program):
    """{kind: how many instructions} of a compiled program."""
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    found = {kind: len(re.findall(rf"= .* {kind}(?:-start)?\(", program.as_text())) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1, 1, 8), {"all-reduce": 2}),  # textbook tensor parallelism: after attention and after the MLP
        ((1, 8, 1), {"all-gather": 2}),  # the layer's keys, and its values
    ],
)
def test_a_layer_talks_no_more_than_it_must(factors, expected):
    config, mesh = MODELS["as many KV heads"], mesh_of(*factors)
    shapes = ModelShards.of(config, mesh).shapes(mesh, jnp.float32)
    schedule = plans(config, budgets=False)[:2] + [LayerPlan(REUSE, 1)]
    forward = LlamaModel(config, schedule, SELECTION).compile(shapes, jax.ShapeDtypeStruct((1, 64), jnp.int32), mesh)
    assert [collectives(program) for program in forward.layers] == [expected] * 3


def test_a_head_map_alone_has_tiles_cross():
    shards = ModelShards(MODELS["as many KV heads"], 4)
    near, far = ((1, 0, 3, 2, 5, 4, 7, 6), (7, 6, 5, 4, 3, 2, 1, 0))
    assert not shards.crosses(LayerPlan(ANCHOR)) and not shards.crosses(LayerPlan(REUSE, 1, near))
    assert shards.crosses(LayerPlan(REUSE, 1, far))
    assert shards.sources(LayerPlan(REUSE, 1, near)).tolist() == [1, 0] * 4
    assert shards.sources(LayerPlan(REUSE, 1, far)).tolist() == list(far)


def test_every_shard_has_the_kv_heads_of_its_query_heads():
    found = {n: ModelShards(MODELS["KV heads that do not divide"], n) for n in (1, 2, 4, 8)}
    assert {n: shards.copies_here for n, shards in found.items()} == {1: 3, 2: 3, 4: 3, 8: 3}
    assert found[1].copies.tolist() == [0, 1, 2] and found[2].copies.tolist() == [0, 0, 1, 1, 2, 2]
    for shards in found.values():
        np.testing.assert_array_equal(shards.copies.repeat(shards.part), np.arange(24) // 8)  # query heads, in order
    assert ModelShards(MODELS["more shards than KV heads"], 8).copies.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_layer_run_from_the_host_is_split_as_well():
    config = MODELS["more shards than KV heads"]
    model, found = LlamaModel(config, selection=SELECTION), []
    for factors in ((1, 1, 1), (1, 2, 4)):
        mesh = mesh_of(*factors)
        runner = LayerRunner(model, parameters(config, mesh), T, mesh)
        x_BTD = runner.embed(jnp.arange(T, dtype=jnp.int32)[None] % 40)
        masses = runner.scores(1, x_BTD)
        tiles = jnp.argsort(-masses, axis=-1)[..., :3].astype(jnp.int32)
        after = runner.sparse(1, x_BTD, tiles)
        kl = runner.compare(runner.dense(1, x_BTD), after, jnp.arange(T, dtype=jnp.int32)[None] % 40).kl
        found.append((masses, after, kl))
    for one, split in zip(*found, strict=True):
        np.testing.assert_allclose(split, one, rtol=1e-4, atol=1e-5)


def test_a_host_gives_each_device_its_own_part():
    config, mesh = MODELS["more shards than KV heads"], mesh_of(1, 2, 4)
    layer = parameters(config, mesh)["params"]["layer_0"]
    parts = {name: layer["attention"][name].addressable_shards[0].data.shape for name in ("wq", "wk", "wo")}
    assert parts == {"wq": (12, 24), "wk": (6, 24), "wo": (24, 12)}
    assert layer["feed_forward"]["w2"].addressable_shards[0].data.shape == (24, 4)


def test_an_axis_that_does_not_divide_is_refused():
    config = MODELS["as many KV heads"]
    with pytest.raises(InputError, match=r"^mesh: model=3 must divide num_attention_heads, 8; 1, 2, 4, 8 do$"):
        ModelShards(config, 3)
    with pytest.raises(InputError, match="must divide intermediate_size, 16; 1, 2, 4, 8 do"):
        ModelShards(MODELS["KV heads that do not divide"], 24)
    with pytest.raises(InputError, match="^mesh: data=3 and model=1 do not divide the 8 devices: give context too$"):
        make_mesh(jax.devices(), data=3)


def test_the_model_axis_is_the_smallest_power_of_two_that_leaves_room():
    """Of 100 bytes a device, weights may take 60."""
    config = dataclasses.replace(MODELS["as many KV heads"], num_attention_heads=24, intermediate_size=24)
    axis = [auto_model_axis(config, weights, 100, 16) for weights in (60, 61, 121, 241, 480)]
    assert axis == [1, 2, 4, 8, 8]


@pytest.mark.parametrize(
    ("weights", "devices", "least"),
    [(481, 16, "no number of them would do, since this model is split in 8 at most"), (241, 4, "8 devices would do")],
)
def test_weights_that_fit_no_mesh_are_an_error_that_says_how_many_devices_would_do(weights, devices, least):
    config = dataclasses.replace(MODELS["as many KV heads"], num_attention_heads=24, intermediate_size=24)
    with pytest.raises(InputError, match=f"do not fit {devices} device.*{least}"):
        auto_model_axis(config, weights, 100, devices)


def test_a_deeper_model_has_no_more_programs():
    """Compiling takes as long for 80 layers as for 16."""

    def programs(num_layers):
        config = dataclasses.replace(MODELS["as many KV heads"], num_hidden_layers=num_layers)
        schedule = {i: (ANCHOR, None) if i % 4 == 1 else (REUSE, i - (i - 1) % 4) for i in range(1, num_layers)}
        model = LlamaModel(config, {0: (DENSE, None)} | schedule, SELECTION)
        forward = model.compile(ModelShards(config).shapes(None, jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32))
        assert len(forward.layers) == num_layers
        return len(forward.programs)

    assert programs(80) == programs(16)


def test_layers_of_equal_budgets_share_a_program_whatever_their_anchor_chose():
    config = dataclasses.replace(MODELS["as many KV heads"], num_hidden_layers=5)
    K = config.num_key_value_heads
    wide, few = (3,) * K, (2,) * K
    anchors = [LayerPlan(ANCHOR, budgets=wide), LayerPlan(ANCHOR, budgets=few)]
    schedule = (LayerPlan(DENSE), *anchors, *(LayerPlan(REUSE, anchor, budgets=few) for anchor in (1, 2)))
    model = LlamaModel(config, schedule, SELECTION)
    forward = model.compile(ModelShards(config).shapes(None, jnp.float32), jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert forward.layers[1] is not forward.layers[2]
    assert forward.layers[3] is forward.layers[4]


def test_the_mesh_is_as_asked_or_made_for_the_weights():
    config = MODELS["as many KV heads"]
    mesh, why = pick_mesh(mesh_axes("model=2,context=3"), jax.devices(), config, "float32")
    assert dict(mesh.shape) == {"data": 1, "context": 3, "model": 2} and why == "as asked"
    assert dict(pick_mesh({}, jax.devices(), config, "float32")[0].shape) == {"data": 1, "context": 8, "model": 1}
    with pytest.raises(InputError, match="^mesh: data=1, context=3, model=4 needs 12 devices, and there are 8$"):
        pick_mesh({"context": 3, "model": 4}, jax.devices(), config, "float32")


@pytest.mark.parametrize(
    "text", ["", "model", "model=0", "model=-1", "model=x", "rows=2", "model=2,model=2", "model=2,"]
)
def test_a_mesh_is_named_by_its_axes(text):
    with pytest.raises(InputError, match="^mesh: expected auto, or sizes of at least 1 of data, context, model"):
        mesh_axes(text)


def test_sequences_that_the_data_axis_does_not_divide_are_computed_all_the_same():
    config, mesh = MODELS["as many KV heads"], mesh_of(2, 2, 1)
    model, params = LlamaModel(config, plans(config, False), SELECTION), parameters(config, mesh)
    ids_BT = jnp.arange(3 * T, dtype=jnp.int32).reshape(3, T) % 41
    whole = model.compile(params, ids_BT, mesh)(params, ids_BT)
    pairs = model.compile(params, ids_BT[:2], mesh)
    for rows in (ids_BT[:2], ids_BT[2:]):
        got = pairs(params, rows)
        first = 0 if len(rows) == 2 else 2
        np.testing.assert_allclose(got.nll, whole.nll[first : first + len(rows)], rtol=1e-5)
        np.testing.assert_array_equal(got.tiles[1], whole.tiles[1][first : first + len(rows)])
