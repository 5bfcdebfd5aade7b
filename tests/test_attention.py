"""One conformance suite for every implementation of the three kinds of attention.

The oracle is a naive loop-free computation in float64. A kernel's error against it may be at most twice that of the
same naive computation in the kernel's own dtype.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import kascade_layout
import numpy as np
import pytest
from kascade_layout import Layout, tile_count

import kascade_kernels as kernels
import kascade_pallas_gpu
from kascade_core import EXACT, FAST, NO_TILE, Selection
from kascade_pallas_tpu import check_sizes

# B, T, N, K, H, tile size, Top-K, and the block that the kernels work in: grouped, multi-query and multi-head; lengths
# of several blocks, that are no multiple of the tile, below one tile, and of one token.
SHAPES = [
    (2, 61, 6, 2, 10, 4, 3, 32),
    (1, 64, 4, 1, 8, 16, 2, 256),
    (1, 7, 3, 3, 12, 16, 5, 256),
    (2, 1, 4, 2, 6, 3, 1, 256),
    (1, 150, 2, 1, 4, 16, 4, 64),
]
TPU_SHAPES = [  # key tiles of 128: several blocks, a rest, less than one tile
    (1, 300, 4, 2, 64, 128, 2, 256),
    (1, 520, 3, 3, 16, 128, 3, 128),
    (2, 100, 6, 2, 10, 128, 1, 256),
]
GPU_SHAPES = [  # every size of tile: groups that are no power of two, several tiles in a step, rows in several parts
    (1, 300, 4, 2, 64, 16, 4, 256),
    (2, 100, 3, 1, 64, 32, 2, 256),
    (1, 330, 4, 1, 128, 64, 3, 256),
    (1, 270, 3, 1, 64, 128, 2, 256),
]
IMPLEMENTED = {"xla": SHAPES, "pallas_tpu": TPU_SHAPES, "pallas_gpu": GPU_SHAPES}
CASES = [(shape, implementation) for implementation, shapes in IMPLEMENTED.items() for shape in shapes]
QUERY_TILES = [  # of the tile's size, larger, and smaller
    *((*case, case[0][5]) for case in CASES),
    *((shape, "xla", 2 * shape[5]) for shape in SHAPES),
    *((shape, "xla", shape[5] // 2) for shape in SHAPES if shape[5] % 2 == 0),
    *((shape, "pallas_tpu", 32) for shape in TPU_SHAPES),
    *((shape, "pallas_gpu", 2 * shape[5]) for shape in GPU_SHAPES[1:3]),
    *((shape, "pallas_gpu", shape[5] // 2) for shape in GPU_SHAPES[::3]),
]
DTYPES = {"xla": [jnp.float32, jnp.bfloat16], "pallas_gpu": [jnp.bfloat16, jnp.float16]}
DTYPES["pallas_tpu"] = DTYPES["xla"]


def with_dtypes(cases):
    """Each case with each dtype that its implementation takes."""
    return [(*case, dtype) for case in cases for dtype in DTYPES[case[1]]]


def finest(implementation):
    """The dtype in which it is most exact."""
    return DTYPES[implementation][-1 if implementation == "pallas_gpu" else 0]


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Small blocks make small inputs span several of them."""
    shape = request.node.callspec.params.get("shape", SHAPES[0]) if hasattr(request.node, "callspec") else SHAPES[0]
    monkeypatch.setattr(kascade_layout, "BLOCK", shape[-1])


def jitted(function):
    """Compiled anew for each call, since the block size is no argument; a selection's fields are keywords of their own."""

    def run(*args, layout=None, implementation=None, **sizes):
        where = {"layout": layout, "implementation": implementation} | (
            {"selection": Selection(**sizes)} if sizes else {}
        )
        return jax.jit(lambda *args: function(*args, **where))(*args)

    return run


dense_attention = jitted(kernels.dense_attention)
choose_tiles = jitted(kernels.choose_tiles)
reuse_attention = jitted(kernels.reuse_attention)
anchor_attention = jitted(kernels.anchor_attention)


def inputs(shape, dtype):
    B, T, N, K, H = shape[:5]
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((B, T, N, H), np.float32)
    k = rng.standard_normal((B, K, H, T), np.float32)
    v = rng.standard_normal((B, K, T, H), np.float32)
    return tuple(x.astype(dtype) for x in (q, k, v))


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


def causal(T):
    return np.tri(T, dtype=bool)[None, None, None]


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
    """Any causal choice with the own tiles in it, sorted, with unused slots also where there were tiles to take."""
    B, T, _, K, _, tile_size, top_k = shape[:7]
    Q, P = tile_count(T, query_tile), tile_count(T, tile_size)
    rng = np.random.default_rng(seed)
    tiles = np.full((B, K, Q, min(max(top_k, query_tile // tile_size), P)), NO_TILE, np.int32)
    for b, k, q in np.ndindex(B, K, Q):
        own = own_tiles(q, tile_size, query_tile, T)
        others = rng.permutation(own[0])[: rng.integers(0, tiles.shape[-1] - len(own) + 1)]
        tiles[b, k, q, : len(others) + len(own)] = sorted([*others, *own])
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


@pytest.mark.parametrize(("shape", "implementation", "dtype"), with_dtypes(CASES))
def test_dense_equals_naive(shape, dtype, implementation):
    qkv = inputs(shape, dtype)
    check_error(dense_attention(*qkv, implementation=implementation), qkv, causal(shape[1]))


@pytest.mark.parametrize(("shape", "implementation", "query_tile", "dtype"), with_dtypes(QUERY_TILES))
def test_reuse_equals_naive_over_the_chosen_tiles(shape, dtype, implementation, query_tile):
    qkv, tiles = inputs(shape, dtype), random_tiles(shape, query_tile)
    sizes = {"tile_size": shape[5], "query_tile": query_tile, "top_k": tiles.shape[-1] + 1}
    got = reuse_attention(*qkv, tiles, implementation=implementation, **sizes)
    check_error(got, qkv, visible_tiles(tiles, shape[5], query_tile, shape[1]))


@pytest.mark.parametrize("sink_tiles", [0, 1])
@pytest.mark.parametrize("scoring", [EXACT, FAST])
@pytest.mark.parametrize(("shape", "implementation", "query_tile"), QUERY_TILES)
def test_chosen_tiles_are_those_of_a_naive_pooling(shape, sink_tiles, query_tile, scoring, implementation):
    B, T, N, K, _, tile_size, top_k = shape[:7]
    top_k = max(top_k, query_tile // tile_size)
    q, k, _ = inputs(shape, finest(implementation))
    Q, P = tile_count(T, query_tile), tile_count(T, tile_size)
    sizes = {"tile_size": tile_size, "query_tile": query_tile, "top_k": top_k, "sink_tiles": sink_tiles}
    got = np.asarray(choose_tiles(q, k, scoring=scoring, implementation=implementation, **sizes))
    mass = np.zeros((B, K, N // K, Q * query_tile, P * tile_size))
    mass[..., :T, :T] = naive_probabilities(q, k, causal(T), np.float64)
    mass = mass.reshape(B, K, N // K, Q, query_tile, P, tile_size)
    if scoring == FAST:  # four rows, the first and the last among them
        mass = mass[:, :, :, :, [round(i) for i in np.linspace(0, query_tile - 1, min(4, query_tile)) // 1]]
    mass = mass.sum((2, 4, 6))
    mass[..., :sink_tiles] = np.inf
    assert got.shape == (B, K, Q, min(top_k, P))
    for b, h, t in np.ndindex(B, K, Q):
        own = own_tiles(t, tile_size, query_tile, T)
        others = np.argsort(-mass[b, h, t, : own[0]], kind="stable")[: top_k - len(own)]
        expected = sorted([*others, *own])
        assert got[b, h, t].tolist() == expected + [NO_TILE] * (got.shape[-1] - len(expected))


@pytest.mark.parametrize(("shape", "implementation", "dtype"), with_dtypes(CASES))
def test_an_anchor_attends_to_what_it_chose(shape, dtype, implementation):
    qkv = inputs(shape, dtype)
    sizes = {"tile_size": shape[5], "top_k": shape[6], "implementation": implementation}
    out, tiles = anchor_attention(*qkv, **sizes)
    np.testing.assert_array_equal(tiles, choose_tiles(*qkv[:2], **sizes))
    check_error(out, qkv, visible_tiles(np.asarray(tiles), shape[5], shape[5], shape[1]))


@pytest.mark.parametrize(("shape", "implementation"), CASES)
def test_all_tiles_chosen_equals_dense(shape, implementation):
    qkv = inputs(shape, finest(implementation))
    out, _ = anchor_attention(*qkv, tile_size=shape[5], top_k=10_000, implementation=implementation)
    check_error(out, qkv, causal(shape[1]))


ONE_SHAPE = [  # sixteen tiles, the last without its last three rows
    ((1, 61, 6, 2, 10, 4, 3, 32), "xla"),
    ((1, 16 * 128 - 3, 2, 1, 8, 128, 3, 256), "pallas_tpu"),
    ((1, 16 * 16 - 3, 2, 1, 64, 16, 3, 256), "pallas_gpu"),
]


@pytest.mark.parametrize(("shape", "implementation"), ONE_SHAPE)
def test_reuse_touches_no_other_tile(shape, implementation):
    (_, T, _, _, _, M, _), (q, k, v) = shape[:7], inputs(shape, finest(implementation))
    tiles = random_tiles(shape, M)
    tiles[tiles == 2] = NO_TILE  # nobody sees tile 2, which holds nothing but NaN
    tiles = np.sort(tiles, axis=-1)
    tiles[:, :, 2, 0] = 0  # the rows of tile 2 itself are left with another
    k[..., 2 * M : 3 * M] = v[:, :, 2 * M : 3 * M] = np.nan
    out = np.asarray(reuse_attention(q, k, v, tiles, tile_size=M, implementation=implementation))
    rows = np.r_[0 : 2 * M, 3 * M : T]
    assert np.isfinite(out[:, rows]).all()


@pytest.mark.parametrize(("shape", "implementation"), ONE_SHAPE)
@pytest.mark.parametrize("kind", ["dense", "anchor", "reuse"])
def test_the_future_changes_no_earlier_bit(kind, shape, implementation):
    """Dense from row to row; sparse from query tile to query tile, whose rows share one choice."""
    T, M, top_k = shape[1], shape[5], shape[6]
    tiles = random_tiles(shape, M)

    def attend(q, k, v):
        if kind == "dense":
            return dense_attention(q, k, v, implementation=implementation)
        if kind == "reuse":
            return reuse_attention(q, k, v, tiles, tile_size=M, implementation=implementation)
        return anchor_attention(q, k, v, tile_size=M, top_k=top_k, implementation=implementation)[0]

    q, k, v = inputs(shape, finest(implementation))
    cut = T // 2
    first_changed = cut if kind != "anchor" else cut // M * M
    before = np.asarray(attend(q, k, v))
    q[:, cut:] += 3
    k[..., cut:] *= -5
    v[:, :, cut:] += 7
    same = before == np.asarray(attend(q, k, v))
    assert same[:, :first_changed].all()
    kept = np.any if q.dtype == np.float32 else np.all  # numbers of two bytes meet by chance
    assert not kept(same[:, cut:], axis=(0, 2, 3)).any()


@pytest.mark.parametrize(("shape", "implementation"), ONE_SHAPE)
def test_rows_of_padding_choose_nothing(shape, implementation):
    """A last tile with three rows of padding, whatever those hold, chooses what its real rows choose."""
    q, k, _ = inputs(shape, finest(implementation))
    (B, T, N, K, H, M, top_k), layout = shape[:7], Layout.of(shape[1], shape[5])
    sizes = {"tile_size": M, "top_k": top_k, "implementation": implementation}
    expected = choose_tiles(q, k, **sizes)
    rng = np.random.default_rng(3)
    q = np.concatenate([q, 9 * rng.standard_normal((B, layout.padded - T, N, H)).astype(q.dtype)], axis=1)
    k = np.concatenate([k, 9 * rng.standard_normal((B, K, H, layout.padded - T)).astype(k.dtype)], axis=3)
    np.testing.assert_array_equal(choose_tiles(q, k, layout=layout, **sizes)[:, :, :16], expected)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"tile_size": 192}, "take a tile_size of 256 or another multiple of 128, got 192"),
        (
            {"tile_size": 128, "query_tile": 256},
            "a query_tile that is a multiple of 8 and at most tile_size, 128, got 256",
        ),
        ({"tile_size": 128, "query_tile": 4}, "multiple of 8 and at most tile_size, 128, got 4"),
    ],
)
def test_the_tpu_kernels_name_sizes_that_they_take(sizes, match):
    q, k, _ = inputs((1, 300, 2, 1, 8), jnp.float32)
    with pytest.raises(NotImplementedError, match=match):
        choose_tiles(q, k, implementation="pallas_tpu", **sizes)


def test_tiles_beyond_the_tpus_scalar_memory_are_refused_with_what_would_do():
    selection = Selection(tile_size=128, query_tile=64, top_k=200)
    check_sizes(selection, 32768)
    with pytest.raises(
        NotImplementedError, match=r"200 tiles for each of 2048 query tiles; top_k up to (\d+) would"
    ) as error:
        check_sizes(selection, 131072)
    fits = int(str(error.value).split("top_k up to ")[1].split()[0])
    check_sizes(dataclasses.replace(selection, top_k=fits), 131072)
    with pytest.raises(NotImplementedError):
        check_sizes(dataclasses.replace(selection, top_k=fits + 1), 131072)
    check_sizes(dataclasses.replace(selection, query_tile=128), 131072)  # as the message says


@pytest.mark.parametrize("scoring", [EXACT, FAST])
def test_the_gpu_scores_in_chunks_of_its_scratch(scoring, monkeypatch):
    """The last chunk is not full."""
    q, k, _ = inputs((2, 300, 3, 3, 64, 16, 4), jnp.float16)
    sizes = {"tile_size": 16, "top_k": 4, "scoring": scoring, "implementation": "pallas_gpu"}
    whole = choose_tiles(q, k, **sizes)
    monkeypatch.setattr(kascade_pallas_gpu, "SCRATCH_BYTES", 100_000)
    np.testing.assert_array_equal(choose_tiles(q, k, **sizes), whole)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer JAX also compiles them then, which needs a GPU")
@pytest.mark.parametrize("scoring", [EXACT, FAST])
@pytest.mark.parametrize("tile_size", kascade_pallas_gpu.TILE_SIZES)
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((32, 8), 128)])
def test_the_gpus_programs_are_made_without_one(heads, head_dim, tile_size, scoring):
    """As far as Triton's own language, with no array of T x T even at 128k tokens; no GPU runs it here."""
    (N, K), T, C = heads, 131072, 12
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    args = array(1, T, N, head_dim), array(1, K, head_dim, T), array(1, K, T, head_dim)
    selection = Selection(tile_size=tile_size, top_k=C, scoring=scoring)

    def anchor(*args):
        return kernels.anchor_attention(*args, selection=selection, implementation="pallas_gpu")

    program = jax.jit(anchor).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert {*re.findall(r'name = "(kascade_\w+)"', program)} == {"kascade_score", "kascade_reuse"}
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", program)]
    scratch = kascade_pallas_gpu.SCRATCH_BYTES // 4
    assert max(math.prod(shape) for shape in shapes) <= max(scratch, T * N * head_dim) < T * T


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((1, 40, 2, 1, 64, 8), jnp.float16, "take a tile_size of 16, 32, 64 or 128, got 8"),
        ((1, 40, 2, 1, 32, 16), jnp.float16, "take heads of width 64 or 128, got 32"),
        ((1, 40, 2, 1, 64, 16), jnp.float32, "take bfloat16 or float16, got float32"),
    ],
)
def test_the_gpu_kernels_name_what_they_take(shape, dtype, match):
    qkv = inputs(shape, dtype)
    with pytest.raises(NotImplementedError, match=match):
        anchor_attention(*qkv, tile_size=shape[5], implementation="pallas_gpu")


def test_dense_on_a_gpu_is_cudnns(monkeypatch):
    """Its call, answered by XLA: one GPU is where JAX computes."""
    shape, xla = GPU_SHAPES[0], jax.nn.dot_product_attention

    def cudnn(*args, implementation, **where):
        assert implementation == "cudnn"
        return xla(*args, implementation="xla", **where)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    qkv = inputs(shape, jnp.bfloat16)
    check_error(dense_attention(*qkv, implementation="pallas_gpu"), qkv, causal(shape[1]))


def test_bad_arguments_say_what_was_expected():
    q, k, v = inputs((1, 13, 6, 2, 10), jnp.float32)
    with pytest.raises(NotImplementedError, match="implementation 'cuda': known are"):
        dense_attention(q, k, v, implementation="cuda")
    with pytest.raises(ValueError, match=r"keys: expected \[1, K, 10, 13\]"):
        dense_attention(q, k.swapaxes(2, 3), v)
    with pytest.raises(ValueError, match=r"values: expected \(1, 2, 13, 10\)"):
        dense_attention(q, k, v.swapaxes(2, 3))
    with pytest.raises(ValueError, match=r"tiles: expected \[B, K, Q, C\] with B, K, Q = \(1, 2, 4\)"):
        reuse_attention(q, k, v, np.zeros((1, 2, 3, 2), np.int32), tile_size=4)
