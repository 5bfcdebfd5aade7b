"""Blocks, their zigzag over devices, and attention split over several devices, which computes what one does."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import Shape, causal, check_error, full, inputs, naive_choice, visible_tiles

import attention
from attention import sharding
from attention.sharding import (
    BLOCK,
    ROWS,
    TILES,
    WHOLE,
    Layout,
    causal_tiles,
    compile_ahead,
    gather_keys,
    make_mesh,
    pad_axis,
    place,
    shard,
)
from kascade_core import NO_TILE, Selection, tile_count

LAYOUTS = st.tuples(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 9), st.integers(1, 300))


def test_blocks_are_assigned_in_a_zigzag():
    layout = Layout(length=29, block=4, num_blocks=8, num_shards=2)
    assert layout.blocks_by_shard().tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    spread = layout.spread(jnp.arange(29)[None], 1)
    assert spread[0, :8].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]


@given(LAYOUTS)
def test_a_layout_covers_the_sequence_in_blocks_of_whole_tiles(sizes):
    length, tile_size, num_shards, block = sizes
    layout = Layout.of(length, tile_size, num_shards, block)
    assert layout.padded >= length
    assert layout.block % tile_size == 0
    assert layout.block <= max(block, tile_size)
    blocks = layout.blocks_by_shard()
    assert blocks.shape == (num_shards, layout.num_blocks // num_shards)
    assert sorted(blocks.ravel()) == list(range(layout.num_blocks))


@given(LAYOUTS)
def test_every_shard_sees_as_many_key_blocks_as_the_others(sizes):
    length, tile_size, num_shards, block = sizes
    if length > 2 * num_shards * tile_size:  # shorter ones have less than two blocks for each
        seen = (Layout.of(length, tile_size, num_shards, block).blocks_by_shard() + 1).sum(axis=1)
        assert seen.max() == seen.min()


def test_blocks_have_at_most_256_tokens_unless_a_tile_is_larger():
    assert (BLOCK, Layout.of(2047, 16).block, Layout.of(2047, 300).block) == (256, 256, 300)


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 60), query_tile=st.integers(1, 5), num_shards=st.integers(1, 4), block=st.integers(1, 12))
def test_collect_undoes_spread(length, query_tile, num_shards, block):
    """Along an axis of tokens and along one of query tiles."""
    layout = Layout.of(length, query_tile, num_shards, block)
    tokens = np.arange(3 * length).reshape(3, length)
    np.testing.assert_array_equal(layout.collect(layout.spread(tokens, 1), 1)[:, :length], tokens)
    Q = tile_count(length, query_tile)
    tiles = np.arange(2 * Q * 3).reshape(2, Q, 3)
    np.testing.assert_array_equal(layout.collect(layout.spread(tiles, 1, query_tile), 1)[:, :Q], tiles)


@pytest.mark.parametrize(("num_shards", "rounds", "block"), [(4, 8, 3), (2, 6, 2), (4, 4, 1)])
def test_a_shards_own_part_is_what_collect_gives_and_no_device_holds_the_whole(num_shards, rounds, block):
    layout = Layout(num_shards * rounds * block, block, num_shards * rounds, num_shards)
    mesh = make_mesh(jax.devices()[:num_shards])
    tokens = np.arange(2 * layout.padded * 5).reshape(2, -1, 5)
    assert layout.has_even_parts
    parts = shard(lambda x: layout.own_part(x, 1), mesh, (ROWS,), ROWS)
    got = compile_ahead(parts, (layout.spread(tokens, 1),), mesh)(layout.spread(tokens, 1))
    np.testing.assert_array_equal(got, tokens)
    assert got.addressable_shards[0].data.shape == (2, rounds * block, 5)


def test_parts_are_uneven_where_a_shard_has_fewer_blocks_of_one_than_of_another():
    assert not Layout(length=24, block=2, num_blocks=12, num_shards=4).has_even_parts


def test_each_device_knows_its_positions_and_causal_tiles():
    layout = Layout(length=16, block=4, num_blocks=4, num_shards=2)

    def local(x):
        return layout.local_positions()[None], causal_tiles(layout, 2, 2)[None, None]

    mesh = make_mesh(jax.devices()[:2])
    args = (jnp.zeros((1, 16)),)
    positions, tiles = compile_ahead(shard(local, mesh, ROWS, (ROWS, TILES)), args, mesh)(*args)
    assert positions.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]]
    expected = [[tile if tile <= own else NO_TILE for tile in range(8)] for own in (0, 1, 6, 7, 2, 3, 4, 5)]
    assert tiles[0, 0].tolist() == expected


@pytest.mark.parametrize("axis", [1, 2])
def test_gather_keys_brings_the_sequence_in_its_order(axis):
    layout = Layout.of(22, 2, 2, block=4)
    shape = (3, layout.padded, 5) if axis == 1 else (3, 5, layout.padded)
    keys = np.arange(np.prod(shape)).reshape(shape)
    mesh, spec = make_mesh(jax.devices()[:2]), ROWS if axis == 1 else TILES
    gather = functools.partial(gather_keys, axis=axis, layout=layout)
    args = (place(layout.spread(keys, axis), mesh, spec),)
    np.testing.assert_array_equal(compile_ahead(shard(gather, mesh, spec, WHOLE), args, mesh)(*args), keys)


SPLIT = [  # lengths that are no multiple of the devices' blocks
    ("xla", Shape(2, 203, 6, 2, 10, 8, 3, 16), jnp.float32),
    ("pallas_tpu", Shape(1, 650, 4, 2, 16, 128, 3, 256), jnp.float32),
    ("pallas_tpu", Shape(1, 250, 4, 2, 16, 16, 3, 48), jnp.float32),
    ("pallas_gpu", Shape(1, 150, 3, 1, 64, 16, 3, 32), jnp.float16),
]


def run_split(function, shape, qkv, out_specs):
    """On three devices."""
    layout, mesh = Layout.of(shape.T, shape.tile_size, 3, shape.block), make_mesh(jax.devices()[:3])
    q, k, v = layout.spread(qkv[0], 1), pad_axis(qkv[1], 3, layout.padded), pad_axis(qkv[2], 2, layout.padded)
    args = [place(q, mesh, ROWS), place(k, mesh), place(v, mesh)]
    split = shard(functools.partial(function, layout=layout), mesh, (ROWS, WHOLE, WHOLE), out_specs)
    return layout, compile_ahead(split, args, mesh)(*args)


@pytest.mark.parametrize(("kernel", "shape", "dtype"), SPLIT)
def test_dense_split_over_devices_equals_naive(kernel, shape, dtype):
    qkv = inputs(shape, dtype)
    layout, out = run_split(functools.partial(attention.dense, kernel=kernel), shape, qkv, ROWS)
    check_error(layout.collect(out, 1)[:, : shape.T], qkv, causal(shape.T))


@pytest.mark.parametrize(("kernel", "shape", "dtype"), SPLIT)
def test_a_choice_split_over_devices_equals_naive(kernel, shape, dtype):
    q, k, v = inputs(shape, dtype)
    selection = Selection(tile_size=shape.tile_size, top_k=shape.top_k)

    def choose(q, k, v, layout):
        return attention.choose(q, k, selection=selection, kernel=kernel, layout=layout)

    layout, tiles = run_split(choose, shape, (q, k, v), TILES)
    tiles = layout.collect(tiles, 2)[:, :, : tile_count(shape.T, shape.tile_size)]
    np.testing.assert_array_equal(tiles, naive_choice(q, k, selection))


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype"), [case if case in (SPLIT[0], SPLIT[2]) else full(*case) for case in SPLIT]
)
def test_an_anchor_split_over_devices_attends_to_what_it_chose(kernel, shape, dtype):
    qkv, selection = inputs(shape, dtype), Selection(tile_size=shape.tile_size, top_k=shape.top_k)
    anchor = functools.partial(attention.anchor, selection=selection, kernel=kernel)
    layout, (out, tiles) = run_split(anchor, shape, qkv, (ROWS, TILES))
    tiles = np.asarray(layout.collect(tiles, 2))[:, :, : tile_count(shape.T, shape.tile_size)]
    visible = visible_tiles(tiles, shape.tile_size, shape.tile_size, shape.T)
    check_error(layout.collect(out, 1)[:, : shape.T], qkv, visible)


def test_place_splits_as_it_is_told():
    mesh, array = make_mesh(jax.devices()[:4]), np.arange(2 * 8 * 3).reshape(2, 8, 3)
    for spec, shape in ((WHOLE, (2, 8, 3)), (ROWS, (2, 2, 3))):
        placed = place(array, mesh, spec)
        assert [piece.data.shape for piece in placed.addressable_shards] == [shape] * 4
        np.testing.assert_array_equal(placed, array)
    assert len(place(array, None).devices()) == 1


def test_without_a_mesh_nothing_is_split():
    assert shard(np.sin, None, ROWS, ROWS) is np.sin


def test_a_program_that_is_refused_with_the_option_for_bfloat16_is_compiled_without_it(monkeypatch):
    """XLA's CPU compiler may have no product of bfloat16 for it; which ones differs by version and by machine."""
    monkeypatch.setattr(sharding, "BFLOAT16_OPTIONS", {"xla_no_such_option": "1"})
    ones = jnp.ones((8, 8), jnp.bfloat16)
    np.testing.assert_array_equal(compile_ahead(jnp.matmul, (ones, ones), writes_bfloat16=True)(ones, ones), 8)
    assert not sharding.can_write_bfloat16.__wrapped__(jax.devices()[0])


@pytest.mark.parametrize("mesh", [None, "mesh"])
def test_cpu_programs_are_compiled_with_its_options(mesh, monkeypatch):
    """Their effect is on memory, at lengths that no quick test reaches, and on time."""
    asked = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda function, **options: asked.append(options) or jit(function, **options))
    assert compile_ahead(jnp.sin, (jnp.ones(3),), mesh and make_mesh(jax.devices()))(jnp.ones(3)).shape == (3,)
    assert asked[0]["compiler_options"] == {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_cpu_prefer_vector_width": "512",
    }


class Chip(NamedTuple):
    """A device of a platform that is not here."""

    platform: str


def test_a_tpus_programs_are_compiled_with_those_options_that_its_compiler_has(monkeypatch):
    options = {"xla_tpu_offload_gather_to_sparsecore": "false", "xla_of_another_release": "true"}
    monkeypatch.setattr(sharding, "TPU_OPTIONS", options)
    monkeypatch.setattr(sharding, "_is_known", lambda name, value, device: name in [*options][:1])
    assert sharding.compiler_options(Chip("tpu")) == {"xla_tpu_offload_gather_to_sparsecore": "false"}
    assert sharding.compiler_options(Chip("gpu")) == {}
    sharding.compiler_options.cache_clear()


def test_an_option_is_known_if_the_compiler_takes_it():
    cpu = jax.devices()[0]
    assert sharding._is_known("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_DEFAULT", cpu)
    assert not sharding._is_known("xla_of_another_release", "true", cpu)
    with pytest.raises(jax.errors.JaxRuntimeError, match="nonsense"):  # another error is not taken for an answer
        sharding._is_known("xla_cpu_scheduler_type", "nonsense", cpu)
