"""The steps of decoding against a naive loop in float64, at tiles' edges, with other contents where nothing is read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attention import decode, gpu_decode, tpu
from errors import UnsupportedError
from kascade_core import ANCHOR, NO_TILE, REUSE, LayerPlan, Selection

B, K, G, H, M, P = 3, 2, 4, 10, 4, 7
S = P * M
TOLERANCE = 1e-5
SIZES = Selection(M, 4, query_tile=8, anchor_scoring="fast")  # of prefill: a step has a choice per row, of all rows
EDGES = [(M * 5 - 1, M * 5, M * 5 + 1), (0, 1, S - 1)]  # positions of a batch: ragged, at a tile's edge, depth 1, full


def step_inputs(positions, dtype=jnp.float32, shape=(B, K, G, S, H), seed=0):
    """q_BNH, k_ZSH, v_ZSH, positions_B; keys behind a sequence's last are zeros, as in a cache."""
    b, k, g, s, h = shape
    rng = np.random.default_rng(seed)
    q, keys, values = (rng.standard_normal(size) for size in ((b, k * g, h), (b * k, s, h), (b * k, s, h)))
    real = np.arange(s)[None, :, None] <= np.repeat(positions, k)[:, None, None]
    arrays = (jnp.asarray(x, dtype) for x in (q * 2, np.where(real, keys, 0), np.where(real, values, 0)))
    return *arrays, jnp.asarray(positions, jnp.int32)


def naive(q_BNH, k_ZSH, v_ZSH, positions, selection=None, tiles=None, budgets=None):
    """(out_BNH, {(b, k): set of tiles}) in float64, row by row; dense without selection and tiles."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BNH, k_ZSH, v_ZSH))
    heads = k.shape[0] // q.shape[0]
    group, out, chosen = q.shape[1] // heads, np.zeros(q.shape), {}
    for b in range(q.shape[0]):
        seen = int(positions[b]) + 1
        for head in range(heads):
            z, rows = b * heads + head, range(head * group, (head + 1) * group)
            weights = {row: np.exp(k[z, :seen] @ q[b, row] / np.sqrt(q.shape[2])) for row in rows}
            kept = range(seen)
            if selection:
                mass = sum(w / w.sum() for w in weights.values())
                own, size = (seen - 1) // selection.tile_size, selection.tile_size
                order = sorted(range(own), key=lambda t: -mass[t * size : (t + 1) * size].sum())
                sinks = [t for t in range(selection.sink_tiles) if t < own]
                local = [t for t in range(own - selection.local_tiles, own) if t >= 0 and t not in sinks]
                order = [own, *sinks, *local, *(t for t in order if t not in (*sinks, *local))]
                chosen[b, head] = order[: selection.top_k]
            if tiles is not None or selection:
                mine = tiles[b, head] if tiles is not None else chosen[b, head][: budgets and budgets[head]]
                size = (selection or SIZES).tile_size
                kept = [i for i in range(seen) if i // size in mine]
            for row in rows:
                w = weights[row][kept]
                out[b, row] = w @ v[z, kept] / w.sum()
    return out, chosen


def close(got, expected, tolerance=TOLERANCE):
    return np.abs(np.asarray(got, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def sets(tiles_BK1C):
    tiles = np.asarray(tiles_BK1C)[:, :, 0]
    return {(b, k): [t for t in tiles[b, k].tolist() if t != NO_TILE] for b, k in np.ndindex(*tiles.shape[:2])}


@pytest.mark.parametrize("positions", EDGES)
def test_a_dense_step_equals_the_naive_loop(positions):
    inputs = step_inputs(positions)
    assert close(decode.dense_step(*inputs), naive(*inputs)[0])


@pytest.mark.parametrize(
    ("positions", "selection", "budgets"),
    [
        (EDGES[0], SIZES, None),
        (EDGES[1], Selection(M, 4, sink_tiles=0, local_tiles=1), (4, 2)),
        (EDGES[0], Selection(M, 5, sink_tiles=2), (1, 3)),  # fewer than the selection keeps anyway
    ],
)
def test_an_anchor_chooses_and_attends_as_the_naive_loop(positions, selection, budgets):
    q, k, v, at = step_inputs(positions)
    tiles, products = decode.choose_step(q, k, at, selection)
    out, chosen = naive(q, k, v, positions, selection, budgets=budgets)
    assert sets(tiles) == chosen
    assert tiles.shape == (B, K, 1, selection.top_k)
    assert any(len(kept) < position // M + 1 for (b, _), kept in chosen.items() for position in [positions[b]])
    attended = LayerPlan(ANCHOR, budgets=budgets).attended(tiles)
    assert close(decode.anchor_step(products, v, at, attended, selection), out)


@pytest.mark.parametrize("positions", EDGES)
def test_a_reuse_step_attends_through_head_map_and_budgets(positions):
    q, k, v, at = step_inputs(positions)
    tiles, _ = decode.choose_step(q, k, at, SIZES)
    plan = LayerPlan(REUSE, 1, head_map=(1, 0), budgets=(2, 4))
    mine = {(b, head): sets(tiles)[b, 1 - head][: (2, 4)[head]] for b in range(B) for head in range(K)}
    got = decode.reuse_step(q, k, v, at, plan.attended(tiles), SIZES)
    assert close(got, naive(q, k, v, positions, tiles=mine)[0])


@pytest.mark.parametrize("positions", EDGES)
def test_all_tiles_kept_is_dense(positions):
    q, k, v, at = step_inputs(positions)
    tiles, products = decode.choose_step(q, k, at, everything := Selection(M, 99))
    dense = np.asarray(decode.dense_step(q, k, v, at), np.float64)
    assert tiles.shape[-1] == P
    assert close(decode.anchor_step(products, v, at, tiles, everything), dense, 1e-6)
    assert close(decode.reuse_step(q, k, v, at, tiles, everything), dense, 1e-6)


@pytest.mark.parametrize("kind", [ANCHOR, REUSE])
def test_a_tile_that_is_not_chosen_may_hold_anything(kind):
    """An anchor reads all keys to choose, but no other values."""
    q, k, v, at = step_inputs(EDGES[0])
    tiles, products = decode.choose_step(q, k, at, SIZES)
    poisoned = np.ones((B * K, P, M, 1), bool)
    for (b, head), kept in sets(tiles).items():
        poisoned[b * K + head, kept] = False
    assert poisoned.any(axis=(1, 2, 3)).all()
    poison = lambda x: jnp.where(poisoned.reshape(B * K, S, 1), jnp.nan, x)  # noqa: E731
    if kind == ANCHOR:
        step = lambda keys, values: decode.anchor_step(products, values, at, tiles, SIZES)  # noqa: E731
    else:
        step = lambda keys, values: decode.reuse_step(q, keys, values, at, tiles, SIZES)  # noqa: E731
    np.testing.assert_array_equal(step(poison(k), poison(v)), step(k, v))


def test_keys_behind_the_new_token_have_no_weight():
    q, k, v, at = step_inputs(EDGES[0])
    later = np.arange(S)[None, :, None] > np.repeat(EDGES[0], K)[:, None, None]
    k_later, v_later = (jnp.where(later, 9.0, x) for x in (k, v))
    tiles, products = decode.choose_step(q, k, at, SIZES)
    tiles_later, products_later = decode.choose_step(q, k_later, at, SIZES)
    np.testing.assert_array_equal(tiles_later, tiles)
    np.testing.assert_array_equal(
        decode.anchor_step(products_later, v_later, at, tiles, SIZES), decode.anchor_step(products, v, at, tiles, SIZES)
    )
    np.testing.assert_array_equal(decode.dense_step(q, k_later, v_later, at), decode.dense_step(q, k, v, at))
    np.testing.assert_array_equal(
        decode.reuse_step(q, k_later, v_later, at, tiles, SIZES), decode.reuse_step(q, k, v, at, tiles, SIZES)
    )


def test_a_density_keeps_its_share_of_what_each_sequence_sees():
    q, k, _, at = step_inputs((3, 13, 27))
    tiles, _ = decode.choose_step(q, k, at, Selection(M, density=0.5))
    assert {(b, head): len(kept) for (b, head), kept in sets(tiles).items()} == {
        (b, head): count for b, count in enumerate((1, 2, 4)) for head in range(K)
    }


# --- On a TPU ---

PAGED = (2, 2, 3, 256, 128)  # B, K, G, S, H
PAGES = Selection(16, 5)


@pytest.mark.parametrize("positions", [(16 * 9 - 1, 16 * 9), (0, 255)])
def test_the_tpus_steps_interpreted_equal_the_naive_loop(positions, monkeypatch):
    """Ragged sequences and heads as the kernel's sequences, page lists that are no whole number of its blocks."""
    monkeypatch.setattr(tpu, "KEYS_AT_ONCE", 64)  # four pages of 16
    monkeypatch.setattr(tpu, "LARGEST_PAGE", 32)
    q, k, v, at = step_inputs(positions, jnp.bfloat16, PAGED)
    tiles, _ = decode.choose_step(q, k, at, PAGES)
    with pltpu.force_tpu_interpret_mode():
        dense = jax.jit(tpu.dense_step)(q, k, v, at)
        reuse = jax.jit(partial(tpu.reuse_step, selection=PAGES))(q, k, v, at, tiles)
    tolerance = 2 * float(jnp.finfo(jnp.bfloat16).eps)  # the kernel rounds its weights
    assert close(dense, naive(q, k, v, positions)[0], tolerance)
    kept = sets(tiles)
    expected, _ = naive(q, k, v, positions, tiles=kept, selection=PAGES)
    assert close(reuse, expected, tolerance)
    assert dense.dtype == reuse.dtype == jnp.float32


def test_away_from_a_tpu_its_steps_are_xlas():
    q, k, v, at = step_inputs((40, 255), jnp.bfloat16, PAGED)
    tiles, _ = decode.choose_step(q, k, at, PAGES)
    for step, args in ((decode.dense_step, ()), (decode.reuse_step, (tiles, PAGES))):
        expected = step(q, k, v, at, *args)
        np.testing.assert_allclose(step(q, k, v, at, *args, kernel="pallas_tpu"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("selection", "shape", "dtype", "message"),
    [
        (PAGES, (4, 256, 64), jnp.bfloat16, "takes heads of a multiple of 128 numbers, got 64"),
        (Selection(24, 5), (4, 240, 128), jnp.bfloat16, "takes a tile_size of a multiple of 16 as its page, got 24"),
        (PAGES, (4, 256, 128), jnp.float32, "computes with keys in bfloat16, got float32"),
        (Selection(16, 4096), (128, 131072, 128), jnp.bfloat16, "does not hold the page lists of 128 KV heads"),
        (PAGES, (128, 131088, 128), jnp.bfloat16, "sequences, 4227072 bytes; a smaller batch"),
    ],
)
def test_what_paged_attention_does_not_take_is_said(selection, shape, dtype, message):
    decode.check("xla", selection, shape, dtype)
    with pytest.raises(UnsupportedError, match=message):
        decode.check("pallas_tpu", selection, shape, dtype)


def test_paged_attention_takes_the_sizes_of_a_long_batch():
    decode.check("pallas_tpu", Selection(128, 102), (128, 131200, 128), jnp.bfloat16)


# --- On a GPU ---

GPU_SIZES = [  # tile size, tiles of the cache, query heads of a KV head, positions: at tiles' and parts' edges, ragged
    (16, 19, 3, (16 * 5 - 1, 80, 81)),
    (32, 11, 1, (0, 1, 351)),
    (128, 5, 4, (600, 3, 127)),
]


@pytest.mark.parametrize(("tile_size", "tiles", "group", "positions"), GPU_SIZES)
def test_the_gpus_steps_interpreted_equal_the_naive_loop(tile_size, tiles, group, positions):
    """A tile that is not chosen, and what lies behind the new token, may hold anything."""
    selection = Selection(tile_size, 4)
    q, k, v, at = step_inputs(positions, shape=(3, 2, group, tile_size * tiles, 64))
    dense = jax.jit(gpu_decode.dense_step)(q, k, v, at)
    assert close(dense, naive(q, k, v, at)[0])
    chosen = jax.jit(partial(gpu_decode.choose_step, selection=selection))(q, k, at)
    expected, sets_expected = naive(q, k, v, at, selection)
    assert sets(chosen) == sets_expected
    kept = np.zeros((6, tiles), bool)
    for (b, head), mine in sets(chosen).items():
        kept[b * 2 + head, mine] = True
    keys_ZS = np.repeat(kept, tile_size, axis=1) & (
        np.arange(tile_size * tiles)[None] <= np.repeat(positions, 2)[:, None]
    )
    poisoned = (jnp.where(keys_ZS[..., None], x, jnp.nan) for x in (k, v))
    got = jax.jit(partial(gpu_decode.reuse_step, selection=selection))(q, *poisoned, at, chosen)
    assert close(got, expected)
    assert dense.dtype == got.dtype == jnp.float32


def test_the_gpus_steps_see_a_window_as_xlas_do():
    selection = Selection(32, 4, window=100)
    q, k, v, at = step_inputs((350, 64, 200), shape=(3, 2, 3, 32 * 11, 64))
    tiles, _ = decode.choose_step(q, k, at, selection)
    np.testing.assert_array_equal(gpu_decode.choose_step(q, k, at, selection), tiles)
    assert close(gpu_decode.reuse_step(q, k, v, at, tiles, selection), decode.reuse_step(q, k, v, at, tiles, selection))
    assert close(gpu_decode.dense_step(q, k, v, at, 100), decode.dense_step(q, k, v, at, 100))


def test_away_from_a_gpu_its_steps_are_xlas():
    q, k, v, at = step_inputs((40, 255), jnp.bfloat16, PAGED)
    tiles, products = decode.choose_step(q, k, at, PAGES, "pallas_gpu")
    assert products is None  # the anchor attends as a REUSE layer does
    np.testing.assert_array_equal(tiles, decode.choose_step(q, k, at, PAGES)[0])
    for step, args in ((decode.dense_step, ()), (decode.reuse_step, (tiles, PAGES))):
        np.testing.assert_array_equal(step(q, k, v, at, *args, kernel="pallas_gpu"), step(q, k, v, at, *args))


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer JAX also compiles them then, which needs a GPU")
def test_the_gpus_steps_are_made_without_one():
    """As far as Triton's own language, at 128k tokens: no array holds a number for every key but the cache."""
    (b, k, g, s, h), selection = (2, 8, 4, 2**17, 128), Selection(128, density=0.1)
    shapes = ((b, k * g, h), (b * k, s, h), (b * k, s, h))
    args = *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes), jax.ShapeDtypeStruct((b,), jnp.int32)

    def steps(q, keys, values, at):
        tiles, _ = decode.choose_step(q, keys, at, selection, "pallas_gpu")
        dense = decode.dense_step(q, keys, values, at, kernel="pallas_gpu")
        return dense, decode.reuse_step(q, keys, values, at, tiles, selection, "pallas_gpu")

    program = jax.jit(steps).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "kascade_attend_step" in program and "kascade_score_step" in program
    assert f"{g}x{s}xf32" not in program


@pytest.mark.parametrize(
    ("selection", "shape", "dtype", "message"),
    [
        (Selection(24, 5), (4, 240, 128), jnp.bfloat16, "take a tile_size of 16, 32, 64 or 128, got 24"),
        (PAGES, (4, 256, 96), jnp.bfloat16, "take heads of width 64 or 128, got 96"),
        (PAGES, (4, 256, 128), jnp.float32, "take bfloat16 or float16, got float32"),
    ],
)
def test_what_the_gpus_steps_do_not_take_is_said(selection, shape, dtype, message):
    with pytest.raises(UnsupportedError, match=message):
        decode.check("pallas_gpu", selection, shape, dtype)
