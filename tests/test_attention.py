"""One conformance suite for every kernel of dense attention, of choosing tiles and of reuse.

The oracle is a naive computation in float64. A kernel's error against it may be at most twice that of the same naive
computation in the kernel's own dtype. The quick tier pairs parameters; their products are marked `full`.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import KERNELS, gpu, tpu_small, xla
from attention.sharding import Layout, compile_ahead, pad_axis
from errors import UnsupportedError
from kascade_core import EXACT, FAST, NO_TILE, Selection, cut_tiles, select_tiles, tile_count


class Shape(NamedTuple):
    """Sizes of an input, of its tiles, and of the blocks that the kernels work in; small ones, so that it has several."""

    B: int
    T: int
    N: int
    K: int
    H: int
    tile_size: int
    top_k: int
    block: int


SHAPES = {
    "xla": [  # grouped, multi-query and multi-head; several blocks, no multiple of the tile, less than a tile, one token
        Shape(2, 61, 6, 2, 10, 4, 3, 32),
        Shape(1, 64, 4, 1, 8, 16, 2, 256),
        Shape(1, 7, 3, 3, 12, 16, 5, 256),
        Shape(2, 1, 4, 2, 6, 3, 1, 256),
        Shape(1, 150, 2, 1, 4, 16, 4, 64),
    ],
    "pallas_tpu": [  # key tiles of 128: several blocks, a rest, less than one tile; smaller ones, of each size
        Shape(1, 300, 4, 2, 64, 128, 2, 256),
        Shape(1, 520, 3, 3, 16, 128, 3, 128),
        Shape(2, 100, 6, 2, 10, 128, 1, 256),
        Shape(1, 300, 4, 2, 64, 16, 4, 256),
        Shape(2, 200, 3, 1, 10, 8, 18, 256),
        Shape(1, 330, 6, 2, 16, 64, 3, 128),
        Shape(1, 700, 2, 1, 128, 32, 18, 256),  # more chosen keys than a block has
    ],
    "pallas_gpu": [  # every size of tile: groups that are no power of two, several tiles in a step, rows in several parts
        Shape(1, 300, 4, 2, 64, 16, 4, 256),
        Shape(2, 100, 3, 1, 64, 32, 2, 256),
        Shape(1, 330, 4, 1, 128, 64, 3, 256),
        Shape(1, 270, 3, 1, 64, 128, 2, 256),
    ],
}
DTYPES = {
    "xla": (jnp.float32, jnp.bfloat16),
    "pallas_tpu": (jnp.float32, jnp.bfloat16),
    "pallas_gpu": (jnp.float16, jnp.bfloat16),
}  # the most exact first
CASES = [(kernel, shape) for kernel, shapes in SHAPES.items() for shape in shapes]
ONE_SHAPE = [  # sixteen tiles, of which the last has a row or three
    ("xla", Shape(1, 61, 6, 2, 10, 4, 3, 32)),
    ("pallas_tpu", Shape(1, 15 * 128 + 3, 2, 1, 8, 128, 3, 256)),
    ("pallas_tpu", Shape(1, 15 * 16 + 3, 2, 1, 8, 16, 3, 256)),
    ("pallas_gpu", Shape(1, 15 * 16 + 3, 2, 1, 64, 16, 3, 256)),
]

XLA, TPU, GPU = (SHAPES[kernel] for kernel in KERNELS)
QUERY_TILES = [  # of the key tile's size, larger, and smaller: every shape once, and a default
    ("xla", XLA[0], 4),
    ("xla", XLA[0], 8),
    ("xla", XLA[1], 8),
    ("xla", XLA[2], 32),
    ("xla", XLA[3], 3),
    ("xla", XLA[4], 8),
    ("pallas_tpu", TPU[0], 32),
    ("pallas_tpu", TPU[1], 128),
    ("pallas_tpu", TPU[2], 128),
    ("pallas_tpu", TPU[3], 64),
    ("pallas_tpu", TPU[4], 8),
    ("pallas_tpu", TPU[5], 16),
    ("pallas_tpu", TPU[6], 32),
    ("pallas_gpu", GPU[0], 8),
    ("pallas_gpu", GPU[0], 16),
    ("pallas_gpu", GPU[1], 64),
    ("pallas_gpu", GPU[2], 64),
    ("pallas_gpu", GPU[3], 128),
]
REUSED = [*QUERY_TILES[::2], QUERY_TILES[13], QUERY_TILES[15]]  # these two share the cases: each has every kernel
CHOSEN = [*QUERY_TILES[1::2], QUERY_TILES[14]]
SIZES = {"xla": (0.5, 1, 2), "pallas_tpu": (0.25, 1, 4), "pallas_gpu": (0.5, 1, 2)}
EVERY_QUERY_TILE = [
    (kernel, shape, int(factor * shape.tile_size))
    for kernel, shape in CASES
    for factor in SIZES[kernel]
    if not factor * shape.tile_size % 1 and (kernel == "xla" or 8 <= factor * shape.tile_size <= 128)
]


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


def quick_in_turns(quick, every, options):
    """Of the quick cases each with one of its options, which take turns; the rest of the product is `full`."""
    chosen = [(*case, *options(case)[i % len(options(case))]) for i, case in enumerate(quick)]
    product = [(*case, *option) for case in every for option in options(case)]
    return [*chosen, *(full(*case) for case in product if case not in chosen)]


def dtypes_in_turns(quick, every):
    return quick_in_turns(quick, every, lambda case: [(dtype,) for dtype in DTYPES[case[0]]])


# --- Running a kernel ---


@functools.cache
def compiled(function, layout, kernel, avals, options):
    args = [jax.ShapeDtypeStruct(*aval) for aval in avals]
    options = dict(options) | ({"kernel": kernel} if kernel else {})
    return compile_ahead(functools.partial(function, layout=layout, **options), args)


def run(function, kernel, shape, q, k, v=None, tiles=None, **options):
    """The function on inputs padded to the shape's small blocks, compiled once for each shape and each set of options."""
    selection = options.get("selection")
    least = selection.block if selection else KERNELS[kernel].LEAST_TILE
    layout = Layout.of(shape.T, least, block=shape.block)
    args = [pad_axis(q, 1, layout.padded), pad_axis(k, 3, layout.padded)]
    args += [] if v is None else [pad_axis(v, 2, layout.padded)]
    args += [] if tiles is None else [pad_axis(tiles, 2, layout.padded // selection.query_tile)]
    avals = tuple((x.shape, x.dtype) for x in args)
    return compiled(function, layout, kernel, avals, tuple(options.items()))(*args)


def dense(kernel, shape, q, k, v, **options):
    return np.asarray(run(attention.dense, kernel, shape, q, k, v, **options)[:, : shape.T])


def choose(kernel, shape, q, k, selection):
    return np.asarray(run(attention.choose, kernel, shape, q, k, selection=selection))[
        :, :, : tile_count(shape.T, selection.query_tile)
    ]


def reuse(kernel, shape, q, k, v, tiles, **options):
    return np.asarray(run(attention.reuse, kernel, shape, q, k, v, tiles, **options)[:, : shape.T])


def inputs(shape, dtype):
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((shape.B, shape.T, shape.N, shape.H), np.float32)
    k = rng.standard_normal((shape.B, shape.K, shape.H, shape.T), np.float32)
    v = rng.standard_normal((shape.B, shape.K, shape.T, shape.H), np.float32)
    return tuple(x.astype(dtype) for x in (q, k, v))


# --- The oracle ---


def naive_probabilities(q, k, visible, dtype):
    """[B, K, G, T, S], softmax over the visible keys."""
    B, T, N, H = q.shape
    K = k.shape[1]
    grouped = np.asarray(q, dtype).reshape(B, T, K, N // K, H)
    scores = np.einsum("BTKGH,BKHS->BKGTS", grouped, np.asarray(k, dtype), dtype=dtype, optimize=True) * dtype(H**-0.5)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive_attention(q, k, v, visible, dtype=np.float64):
    """Attention to `visible` [B, K, 1, T, S] in one dtype throughout."""
    out = np.einsum(
        "BKGTS,BKSH->BTKGH", naive_probabilities(q, k, visible, dtype), np.asarray(v, dtype), dtype=dtype, optimize=True
    )
    return out.reshape(q.shape)


def causal(T, window=None):
    """With a window, each row sees so many keys at most, its own among them."""
    distance = np.arange(T)[:, None] - np.arange(T)
    return ((distance >= 0) & (distance < (window or T)))[None, None, None]


def visible_tiles(tiles, tile_size, query_tile, T):
    """[B, K, 1, T, S]: what attending to these tiles may see."""
    B, K, Q, _ = tiles.shape
    chosen = np.zeros((B, K, Q, tile_count(T, tile_size)), bool)
    for b, k, q in np.ndindex(B, K, Q):
        chosen[b, k, q, [tile for tile in tiles[b, k, q] if tile != NO_TILE]] = True
    spread = chosen.repeat(query_tile, 2).repeat(tile_size, 3)[:, :, None, :T, :T]
    return spread & causal(T)


def own_tiles(q, tile_size, query_tile, T):
    """The key tiles that query tile q lies in."""
    return range(q * query_tile // tile_size, tile_count(min((q + 1) * query_tile, T), tile_size))


def random_tiles(shape, query_tile, seed=0):
    """Any causal choice, its own tiles first and the others in any order, with slots left unused here and there."""
    Q, P = tile_count(shape.T, query_tile), tile_count(shape.T, shape.tile_size)
    slots = min(max(shape.top_k, query_tile // shape.tile_size), P)
    rng = np.random.default_rng(seed)
    tiles = np.full((shape.B, shape.K, Q, slots), NO_TILE, np.int32)
    for b, k, q in np.ndindex(shape.B, shape.K, Q):
        own = own_tiles(q, shape.tile_size, query_tile, shape.T)
        others = rng.permutation(own[0])[: rng.integers(0, slots - len(own) + 1)]
        tiles[b, k, q, : len(own) + len(others)] = [*own, *others]
    return tiles


def naive_choice(q, k, selection):
    """tiles_BKQC, best first: a query tile's own, sinks and local tiles, then by attention mass, in float64."""
    (B, T, _, _), K, M, Y = q.shape, k.shape[1], selection.tile_size, selection.query_tile
    Q, P = tile_count(T, Y), tile_count(T, M)
    mass = np.zeros((B, K, q.shape[2] // K, Q * Y, P * M))
    mass[..., :T, :T] = naive_probabilities(q, k, causal(T, selection.window), np.float64)
    mass = mass.reshape(B, K, -1, Q, Y, P, M)
    if selection.anchor_scoring == FAST:  # four rows, the first and the last among them
        mass = mass[:, :, :, :, [round(i) for i in np.linspace(0, Y - 1, min(4, Y)) // 1]]
    mass = mass.sum((2, 4, 6))
    tiles = np.full((B, K, Q, min(selection.top_k, P)), NO_TILE)
    for b, h, t in np.ndindex(B, K, Q):
        own = own_tiles(t, M, Y, T)
        past = mass[b, h, t, : own[0]]
        past[: selection.sink_tiles] = past[max(own[0] - selection.local_tiles, 0) :] = np.inf
        seen = [
            tile
            for tile in np.argsort(-past, kind="stable")
            if causal(T, selection.window)[0, 0, 0, t * Y, : (tile + 1) * M][tile * M :].any()
        ]
        best = [*own, *seen][: tiles.shape[-1]]
        tiles[b, h, t, : len(best)] = best
    return tiles


def check_error(got, inputs, visible):
    """The house's tolerance: twice the error of the naive computation in the same dtype."""
    exact = naive_attention(*inputs, visible)
    dtype = inputs[0].dtype
    naive = naive_attention(*inputs, visible, np.float32).astype(dtype).astype(np.float64)

    def error(x):
        return np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2))

    assert got.dtype == dtype
    if dtype != jnp.float32:  # probabilities are rounded to it before they meet the values
        rounded = np.asarray(naive_probabilities(*inputs[:2], visible, np.float32), dtype).astype(np.float32)
        values = np.asarray(inputs[2], np.float32)
        naive = np.einsum("BKGTS,BKSH->BTKGH", rounded, values).reshape(exact.shape).astype(dtype)
    assert error(got) <= 2 * error(naive) + np.finfo(np.float32).eps


# --- Conformance ---


DENSE_CASES = [
    *(("xla", XLA[i]) for i in (0, 2, 3, 4)),
    *(("pallas_tpu", TPU[i]) for i in (0, 1)),
    ("pallas_gpu", GPU[2]),
]


@pytest.mark.parametrize(("kernel", "shape", "dtype"), dtypes_in_turns(DENSE_CASES, CASES))
def test_dense_equals_naive(kernel, shape, dtype):
    qkv = inputs(shape, dtype)
    check_error(dense(kernel, shape, *qkv), qkv, causal(shape.T))


@pytest.mark.parametrize(("kernel", "shape", "query_tile", "dtype"), dtypes_in_turns(REUSED, EVERY_QUERY_TILE))
def test_reuse_equals_naive_over_the_chosen_tiles(kernel, shape, query_tile, dtype):
    qkv, tiles = inputs(shape, dtype), random_tiles(shape, query_tile)
    selection = Selection(tile_size=shape.tile_size, query_tile=query_tile)
    got = reuse(kernel, shape, *qkv, tiles, selection=selection)
    check_error(got, qkv, visible_tiles(tiles, shape.tile_size, query_tile, shape.T))


KEPT_AND_SCORING = [(0, 0, EXACT), (1, 0, FAST), (0, 1, FAST), (1, 1, EXACT)]  # sinks, local tiles


@pytest.mark.parametrize(
    ("kernel", "shape", "query_tile", "sink_tiles", "local_tiles", "scoring"),
    quick_in_turns(CHOSEN, EVERY_QUERY_TILE, lambda _: KEPT_AND_SCORING),
)
def test_chosen_tiles_are_the_best_of_a_naive_pooling_in_order(
    kernel, shape, query_tile, sink_tiles, local_tiles, scoring
):
    q, k, _ = inputs(shape, DTYPES[kernel][0])
    kept = max(query_tile // shape.tile_size, 1) + sink_tiles + local_tiles
    sizes = {"tile_size": shape.tile_size, "query_tile": query_tile, "top_k": max(shape.top_k, kept)}
    selection = Selection(**sizes, sink_tiles=sink_tiles, local_tiles=local_tiles, anchor_scoring=scoring)
    np.testing.assert_array_equal(choose(kernel, shape, q, k, selection), naive_choice(q, k, selection))


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype"), quick_in_turns([("xla", XLA[0])], CASES, lambda case: [(DTYPES[case[0]][1],)])
)
def test_an_anchor_attends_to_what_it_chose(kernel, shape, dtype):
    qkv = inputs(shape, dtype)
    selection = Selection(tile_size=shape.tile_size, top_k=shape.top_k, sink_tiles=0)
    out, tiles = run(attention.anchor, kernel, shape, *qkv, selection=selection)
    tiles = np.asarray(tiles)[:, :, : tile_count(shape.T, shape.tile_size)]
    np.testing.assert_array_equal(tiles, choose(kernel, shape, *qkv[:2], selection))
    check_error(out[:, : shape.T], qkv, visible_tiles(tiles, shape.tile_size, shape.tile_size, shape.T))


SMALL = [("xla", XLA[0]), ("pallas_tpu", TPU[0]), ("pallas_tpu", TPU[6]), ("pallas_gpu", GPU[1])]


def all_tiles(shape):
    """Every causal tile, for query tiles of the key tile's size."""
    all_P = np.arange(tile_count(shape.T, shape.tile_size), dtype=np.int32)
    return np.broadcast_to(np.where(all_P <= all_P[:, None], all_P, NO_TILE), (shape.B, shape.K, *[len(all_P)] * 2))


@pytest.mark.parametrize(("kernel", "shape"), [case if case in SMALL else full(*case) for case in CASES])
def test_reuse_of_all_tiles_equals_dense(kernel, shape):
    qkv, selection = inputs(shape, DTYPES[kernel][0]), Selection(tile_size=shape.tile_size)
    check_error(reuse(kernel, shape, *qkv, all_tiles(shape), selection=selection), qkv, causal(shape.T))


WINDOWS = [  # several blocks of keys, some out of sight; a window of no whole tiles, one within a tile, one beyond the text
    ("xla", XLA[4], 16, 41),
    ("xla", XLA[0], 8, 3),
    full("xla", XLA[0], 4, 99),
    ("pallas_tpu", TPU[0], 32, 140),
    ("pallas_tpu", TPU[3], 64, 40),
    full("pallas_tpu", TPU[5], 16, 129),
    full("pallas_tpu", TPU[4], 8, 3),
    ("pallas_gpu", GPU[0], 16, 40),
    full("pallas_gpu", GPU[2], 64, 129),
]


@pytest.mark.parametrize(("kernel", "shape", "query_tile", "window"), WINDOWS)
def test_a_sliding_window_is_a_mask_in_every_mode(kernel, shape, query_tile, window):
    dtype = DTYPES[kernel][0]
    qkv, tiles = inputs(shape, dtype), random_tiles(shape, query_tile)
    seen = causal(shape.T, window)
    check_error(dense(kernel, shape, *qkv, window=window), qkv, seen)
    slots = max(shape.top_k, 1 + query_tile // shape.tile_size)
    selection = Selection(tile_size=shape.tile_size, top_k=slots, query_tile=query_tile, window=window)
    np.testing.assert_array_equal(choose(kernel, shape, *qkv[:2], selection), naive_choice(*qkv[:2], selection))
    got = reuse(kernel, shape, *qkv, tiles, selection=selection)
    check_error(got, qkv, visible_tiles(tiles, shape.tile_size, query_tile, shape.T) & seen)


@pytest.mark.parametrize(("kernel", "shape"), ONE_SHAPE)
def test_reuse_reads_no_other_tile(kernel, shape):
    M, (q, k, v) = shape.tile_size, inputs(shape, DTYPES[kernel][0])
    tiles = random_tiles(shape, M)
    tiles[tiles == 2] = NO_TILE  # nobody sees tile 2, which holds nothing but NaN
    tiles[:, :, 2, 0] = 0  # the rows of tile 2 itself get another
    k[..., 2 * M : 3 * M] = v[:, :, 2 * M : 3 * M] = np.nan
    out = reuse(kernel, shape, q, k, v, tiles, selection=Selection(tile_size=M))
    rows = np.r_[0 : 2 * M, 3 * M : shape.T]
    assert np.isfinite(out[:, rows]).all()


@pytest.mark.parametrize(("kernel", "shape"), ONE_SHAPE)
@pytest.mark.parametrize("kind", ["dense", "choose", "reuse"])
def test_the_future_changes_no_earlier_bit(kind, kernel, shape):
    """Attention from row to row; the choice from query tile to query tile, whose rows share it."""
    M, tiles = shape.tile_size, random_tiles(shape, shape.tile_size)
    selection = Selection(tile_size=M, top_k=shape.top_k)

    def attend(q, k, v):
        if kind == "dense":
            return dense(kernel, shape, q, k, v)
        if kind == "reuse":
            return reuse(kernel, shape, q, k, v, tiles, selection=selection)
        return choose(kernel, shape, q, k, selection).swapaxes(1, 2)  # [B, Q, K, C]

    q, k, v = inputs(shape, DTYPES[kernel][0])
    cut = shape.T // 2 + 1
    before = attend(q, k, v)
    q[:, cut:] += 3
    k[..., cut:] *= -5
    v[:, :, cut:] += 7
    same = before == attend(q, k, v)
    if kind == "choose":
        assert same[:, : cut // M].all()
        assert not same[:, cut // M :].all()
        return
    assert same[:, :cut].all()
    kept = np.any if q.dtype == np.float32 else np.all  # numbers of two bytes can be equal by chance
    assert not kept(same[:, cut:], axis=(0, 2, 3)).any()


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-7), (jnp.bfloat16, 2**-8)])
def test_softmaxs_own_power_of_two_is_numpys(dtype, tolerance):
    x = np.concatenate([-np.geomspace(1e-9, 125, 100_000), [-0.5, -1.5, -125.5]]).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: xla.exp2(x, dtype))(x)).astype(np.float64)
    np.testing.assert_allclose(found, np.exp2(x.astype(np.float64)), rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_largest_score_weighs_one_a_masked_one_nothing_and_nan_stays(dtype):
    x = jnp.array([0, -127, -1e4, xla.UNSEEN, -jnp.inf, jnp.nan], jnp.float32)
    found = np.asarray(jax.jit(lambda x: xla.exp2(x, dtype))(x)).astype(np.float32)
    np.testing.assert_array_equal(found, [1, 0, 0, 0, 0, np.nan])


@pytest.mark.parametrize("kind", ["dense", "reuse"])
def test_no_loop_converts_all_of_a_bfloat16_output(kind):
    """XLA's CPU compiler would, in every step, if it were told to write bfloat16: quadratic in the length."""
    T, N, K, H, selection = 1024, 4, 2, 16, Selection(top_k=4)
    shapes = ((1, T, N, H), (1, K, H, T), (1, K, T, H))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    function = functools.partial(attention.dense, layout=Layout.of(T, 16))
    if kind == "reuse":
        args.append(jax.ShapeDtypeStruct((1, K, T // 16, 4), jnp.int32))
        function = functools.partial(attention.reuse, selection=selection, layout=Layout.of(T, 16))
    program = compile_ahead(function, args).as_text()
    written = re.findall(r"= (\w+)\[([\d,]+)\]\S* dynamic-update-slice\(", program)
    outputs = {dtype for dtype, shape in written if math.prod(map(int, shape.split(","))) == T * N * H}
    assert outputs == {"u16"}


@pytest.mark.parametrize("kind", ["dense", "choose"])
def test_a_blocks_mask_reads_no_blocks_number(kind):
    """XLA's CPU compiler would read it anew for each product, and make no vectors of the mask."""
    T, N, K, H, selection = 1024, 4, 2, 16, Selection(top_k=4)
    shapes = ((1, T, N, H), (1, K, H, T), (1, K, T, H))[: 3 if kind == "dense" else 2]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    options = {"selection": selection} if kind == "choose" else {}
    program = compile_ahead(functools.partial(getattr(attention, kind), layout=Layout.of(T, 16), **options), args)
    computations = program.as_text().split("\n}\n")
    masks = [text for text in computations if "select(" in text and "constant(-1e+30)" in text]
    assert masks
    assert not [text for text in masks if "dynamic-slice(" in text]


@pytest.mark.parametrize(("kernel", "shape"), ONE_SHAPE)
def test_rows_of_padding_choose_nothing(kernel, shape):
    """The last tile, most of it padding of any content, chooses what its real rows choose."""
    q, k, _ = inputs(shape, DTYPES[kernel][0])
    selection = Selection(tile_size=shape.tile_size, top_k=shape.top_k)
    expected = choose(kernel, shape, q, k, selection)
    rng, rows = np.random.default_rng(3), -shape.T % shape.tile_size
    q = np.concatenate([q, 9 * rng.standard_normal((shape.B, rows, *q.shape[2:])).astype(q.dtype)], axis=1)
    k = np.concatenate([k, 9 * rng.standard_normal((*k.shape[:3], rows)).astype(k.dtype)], axis=3)
    np.testing.assert_array_equal(choose(kernel, shape, q, k, selection), expected)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ONE_SHAPE[0],
        ("pallas_tpu", TPU[3]),
        full("pallas_tpu", TPU[1]),
        full("pallas_gpu", GPU[0]),
    ],
)
def test_each_head_attends_to_as_many_tiles_as_its_budget(kernel, shape):
    qkv, tiles = inputs(shape, DTYPES[kernel][0]), random_tiles(shape, shape.tile_size)
    budgets = tuple(range(1, shape.K + 1))
    got = reuse(kernel, shape, *qkv, tiles, selection=Selection(tile_size=shape.tile_size), budgets=budgets)
    tiles = np.asarray(cut_tiles(tiles, budgets))
    check_error(got, qkv, visible_tiles(tiles, shape.tile_size, shape.tile_size, shape.T))


def test_without_a_layout_any_length_is_padded():
    """To the same programs, so to the same bits."""
    shape = Shape(1, 61, 6, 2, 10, 4, 3, 256)
    q, k, v = inputs(shape, jnp.float32)
    options = {"selection": Selection(tile_size=4, top_k=3)}
    out, tiles = compile_ahead(functools.partial(attention.anchor, **options), (q, k, v))(q, k, v)
    padded_out, padded_tiles = run(attention.anchor, "xla", shape, q, k, v, **options)
    np.testing.assert_array_equal(out, padded_out[:, :61])
    np.testing.assert_array_equal(tiles, padded_tiles)
    np.testing.assert_array_equal(compile_ahead(attention.dense, (q, k, v))(q, k, v), dense("xla", shape, q, k, v))


def test_choose_chooses_by_score():
    shape = SHAPES["xla"][0]
    q, k, _ = inputs(shape, jnp.float32)
    selection = Selection(tile_size=shape.tile_size, top_k=shape.top_k)
    scores = run(attention.score, None, shape, q, k, selection=selection)[:, :, :16]
    np.testing.assert_allclose(scores.sum(-1), [[[3 * 4] * 15 + [3 * 1]] * 2] * 2, rtol=1e-6)  # each row's shares are 1
    np.testing.assert_array_equal(select_tiles(scores, selection), choose("xla", shape, q, k, selection))


# --- What a kernel does not take ---


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"tile_size": 192}, "take a tile_size of 256 or another multiple of 128, got 192"),
        (
            {"tile_size": 128, "query_tile": 256},
            "a query_tile that is a multiple of 8 and at most tile_size, 128, got 256",
        ),
        ({"tile_size": 128, "query_tile": 4}, "multiple of 8 and at most tile_size, 128, got 4"),
        ({"tile_size": 48}, "take a tile_size of 8, 16, 32, 64 or a multiple of 128, got 48"),
        ({"tile_size": 16, "query_tile": 4}, "of 16 the TPU kernels take a query_tile of 8, 16, 32, 64, 128, got 4"),
    ],
)
def test_the_tpu_kernels_name_sizes_that_they_take(sizes, match):
    q, k, v = inputs(Shape(1, 300, 2, 1, 8, 0, 0, 0), jnp.float32)
    selection = Selection(**sizes)
    tiles = np.zeros((1, 1, tile_count(300, selection.query_tile), 2), np.int32)
    with pytest.raises(UnsupportedError, match=match):
        attention.choose(q, k, selection=selection, kernel="pallas_tpu")
    with pytest.raises(UnsupportedError, match=match):
        attention.reuse(q, k, v, tiles, selection=selection, kernel="pallas_tpu")
    with pytest.raises(UnsupportedError, match=match):
        attention.check("pallas_tpu", selection, 300, 8, jnp.float32)


def test_tiles_beyond_the_tpus_scalar_memory_are_refused_with_what_would_fit():
    selection = Selection(tile_size=128, query_tile=64, top_k=200)

    def check(selection, length=131072, slots=None):
        attention.check("pallas_tpu", selection, length, 64, jnp.bfloat16, slots=slots)

    check(selection, 32768)
    with pytest.raises(UnsupportedError, match=r"200 tiles for each of 2048 query tiles; top_k up to (\d+) ") as error:
        check(selection)
    fits = int(str(error.value).split("top_k up to ")[1].split()[0])
    check(selection.with_top_k(fits))
    with pytest.raises(UnsupportedError):
        check(selection.with_top_k(fits + 1))
    check(dataclasses.replace(selection, query_tile=128))  # as the message says
    with pytest.raises(UnsupportedError, match=f"{fits + 1} tiles for each"):
        check(selection.with_top_k(fits), slots=fits + 1)  # a head's budget larger than top_k


def test_small_tiles_beyond_the_tpus_scalar_memory_are_refused_with_what_would_fit():
    def check(top_k, query_tile=8, slots=None):
        selection = Selection(tile_size=8, query_tile=query_tile, top_k=top_k)
        attention.check("pallas_tpu", selection, 65536, 64, jnp.bfloat16, slots=slots)

    check(7168)
    with pytest.raises(UnsupportedError, match=r"7169 tiles for each of 16 query tiles; top_k up to 7168 would fit"):
        check(7169)
    check(7169, query_tile=16)  # as the message says
    with pytest.raises(UnsupportedError, match="7169 tiles for each"):
        check(12, slots=7169)


def test_a_head_beyond_the_tpus_vector_memory_is_refused_with_what_would_fit():
    def check(length, head_dim=64, dtype=jnp.bfloat16):
        attention.check("pallas_tpu", Selection(), length, head_dim, dtype)

    check(131072)
    check(131072, None)
    match = r"vector memory holds .* about (\d+) tokens with a tile_size of 16, got 131072 tokens; a tile_size of 128"
    with pytest.raises(UnsupportedError, match=match) as error:
        check(131072, dtype=jnp.float32)
    fits = int(re.search(match, str(error.value)).group(1))
    check(fits - 16, dtype=jnp.float32)
    with pytest.raises(UnsupportedError, match="tokens"):
        check(fits + 16, dtype=jnp.float32)


def test_tiles_of_a_head_beyond_vector_memory_are_copied_from_outside_to_the_same_bits(monkeypatch):
    """In two blocks of keys, of which one is copied while the other is multiplied, and in one."""
    for shape in (TPU[6], TPU[4]):
        qkv, tiles = inputs(shape, jnp.bfloat16), all_tiles(shape)
        options = {"selection": Selection(tile_size=shape.tile_size)}
        with monkeypatch.context() as patched:
            patched.setattr(tpu_small, "_reuse_bytes", lambda *sizes: tpu_small.VMEM_BYTES + 1)
            compiled.cache_clear()
            outside = reuse("pallas_tpu", shape, *qkv, tiles, **options)
        compiled.cache_clear()
        np.testing.assert_array_equal(outside, reuse("pallas_tpu", shape, *qkv, tiles, **options))


def test_dense_on_a_tpu_pads_blocks_of_small_tiles():
    shape = Shape(1, 200, 4, 2, 16, 16, 0, 0)
    q, k, v = inputs(shape, jnp.float32)
    layout = Layout.of(200, 16)
    assert layout.padded % 128
    args = pad_axis(q, 1, layout.padded), pad_axis(k, 3, layout.padded), pad_axis(v, 2, layout.padded)
    out = compile_ahead(functools.partial(attention.dense, layout=layout, kernel="pallas_tpu"), args)(*args)
    assert out.shape[1] == layout.padded
    check_error(np.asarray(out[:, :200]), (q, k, v), causal(200))


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        (Shape(1, 40, 2, 1, 64, 8, 0, 0), jnp.float16, "take a tile_size of 16, 32, 64 or 128, got 8"),
        (Shape(1, 40, 2, 1, 32, 16, 0, 0), jnp.float16, "take heads of width 64 or 128, got 32"),
        (Shape(1, 40, 2, 1, 64, 16, 0, 0), jnp.float32, "take bfloat16 or float16, got float32"),
    ],
)
def test_the_gpu_kernels_name_what_they_take(shape, dtype, match):
    q, k, v = inputs(shape, dtype)
    selection = Selection(tile_size=shape.tile_size)
    tiles = np.zeros((1, 1, 40 // shape.tile_size + 40 % shape.tile_size // 8, 1), np.int32)
    with pytest.raises(UnsupportedError, match=match):
        attention.choose(q, k, selection=selection, kernel="pallas_gpu")
    with pytest.raises(UnsupportedError, match=match):
        attention.reuse(q, k, v, tiles, selection=selection, kernel="pallas_gpu")
    if "tile_size" not in match:
        with pytest.raises(UnsupportedError, match=match):
            attention.dense(q, k, v, kernel="pallas_gpu")


def test_the_gpu_kernels_need_a_recent_gpu():
    attention.check("pallas_gpu", Selection(), 512, None, jnp.float16, "8.0")
    attention.check("pallas_gpu", Selection(), 512, None, jnp.float16)
    with pytest.raises(UnsupportedError, match=r"need compute capability 8.0, got 7.5"):
        attention.check("pallas_gpu", Selection(), 512, None, jnp.float16, "7.5")


def test_xla_takes_every_size():
    attention.check(None, Selection(tile_size=3, query_tile=9), 7, 5, jnp.float32, "1.0", slots=10**6)


def test_bad_arguments_say_what_was_expected():
    q, k, v = inputs(Shape(1, 13, 6, 2, 10, 0, 0, 0), jnp.float32)
    with pytest.raises(UnsupportedError, match="attention kernel 'cuda': expected one of xla, pallas_tpu, pallas_gpu"):
        attention.dense(q, k, v, kernel="cuda")
    with pytest.raises(ValueError, match=r"keys: expected \[1, K, 10, 13\]"):
        attention.dense(q, k.swapaxes(2, 3), v)
    with pytest.raises(ValueError, match=r"values: expected \(1, 2, 13, 10\)"):
        attention.dense(q, k, v.swapaxes(2, 3))
    with pytest.raises(ValueError, match=r"tiles: expected \[B, K, Q, C\] with B, K, Q = \(1, 2, 4\)"):
        attention.reuse(q, k, v, np.zeros((1, 2, 3, 2), np.int32), selection=Selection(tile_size=4))


# --- The GPU's kernels, without a GPU ---


@pytest.mark.parametrize("scoring", [EXACT, full(FAST)])
def test_the_gpu_scores_in_chunks_of_its_scratch(scoring, monkeypatch):
    """The last chunk is not full."""
    shape = Shape(2, 300, 3, 3, 64, 16, 4, 256)
    q, k, _ = inputs(shape, jnp.float16)
    selection = Selection(tile_size=16, top_k=4, anchor_scoring=scoring)
    whole = choose("pallas_gpu", shape, q, k, selection)
    monkeypatch.setattr(gpu, "SCRATCH_BYTES", 100_000)
    compiled.cache_clear()
    np.testing.assert_array_equal(choose("pallas_gpu", shape, q, k, selection), whole)
    compiled.cache_clear()


LOWERED = list(itertools.product([((9, 3), 64), ((32, 8), 128)], gpu.TILE_SIZES, [EXACT, FAST]))
QUICKLY_LOWERED = [LOWERED[i] for i in (0, 3, 12, 15)]  # each size of tile once, heads and scoring in turns


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer JAX also compiles them then, which needs a GPU")
@pytest.mark.parametrize(
    ("model", "tile_size", "scoring"),
    [case if case in QUICKLY_LOWERED else full(*case) for case in LOWERED],
)
def test_the_gpus_programs_are_made_without_one(model, tile_size, scoring):
    """As far as Triton's own language, with no array of T x T even at 128k tokens; no GPU runs it here."""
    ((N, K), head_dim), T = model, 131072
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    args = array(1, T, N, head_dim), array(1, K, head_dim, T), array(1, K, T, head_dim)
    selection = Selection(tile_size=tile_size, top_k=12, anchor_scoring=scoring)
    anchor = functools.partial(attention.anchor, selection=selection, kernel="pallas_gpu")
    program = jax.jit(anchor).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert {*re.findall(r'name = "(kascade_\w+)"', program)} == {"kascade_score", "kascade_reuse"}
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", program)]
    scratch = gpu.SCRATCH_BYTES // 4
    assert max(math.prod(shape) for shape in shapes) <= max(scratch, T * N * head_dim) < T * T


def test_dense_on_a_gpu_is_cudnns(monkeypatch):
    """Its call, answered by XLA: one GPU is where JAX computes."""
    shape, xla = SHAPES["pallas_gpu"][0], jax.nn.dot_product_attention

    def cudnn(*args, implementation, **options):
        assert implementation == "cudnn"
        return xla(*args, implementation="xla", **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    qkv = inputs(shape, jnp.bfloat16)
    check_error(attention.dense(*qkv, kernel="pallas_gpu"), qkv, causal(shape.T))
