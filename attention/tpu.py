"""Dense, anchor and reuse attention on a TPU: Pallas kernels for key tiles of 128 tokens and more.

Reuse has one grid step for each chosen tile; the tiles' indices are prefetched into scalar memory and say which tile is
copied next. Scoring keeps one query tile's sums over all key tiles in vector memory, so that no [T, T] array is made.
Dense is JAX's splash attention. Split over several chips, whose blocks are not contiguous, it is a reuse of all tiles.
Away from a TPU the same kernels are interpreted: correct, and slow.

All functions take padded inputs and a layout; see `attention`, whose functions they implement. R here is the rows of a
query tile, those of all its KV head's query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from attention.sharding import Layout, causal_tiles, pad_axis
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

LANES = LEAST_TILE = 128  # a key tile is a whole number of a vector register's lanes
TILES_AT_ONCE = 8  # key tiles in one step of scoring
SPLASH_BLOCKS = (1024, 512, 256, 128)  # the largest that divides the sequence
MASKED = -1e30  # a masked score: finite, since all of a row's first block of keys may be masked
SMEM_BYTES = 2**20  # of a core's scalar memory, which holds one KV head's tiles


def check(
    selection: Selection,
    length: int,
    head_dim: int | None,
    dtype: Any,
    capability: str | None = None,
    slots: int | None = None,
) -> None:
    """As `attention.check`: sizes of tiles, and how many of them fit into scalar memory."""
    M, Y = selection.tile_size, selection.query_tile
    if M % LANES:
        fits = tile_count(M, LANES) * LANES
        raise UnsupportedError(f"the TPU kernels take a tile_size of {fits} or another multiple of {LANES}, got {M}")
    if Y > M or Y % 8:
        raise UnsupportedError(
            f"the TPU kernels take a query_tile that is a multiple of 8 and at most tile_size, {M}, got {Y}"
        )
    slots, query_tiles = slots or selection.slots(tile_count(length, M)), tile_count(length, Y)
    needed, usable = 4 * query_tiles * (slots + 2), SMEM_BYTES * 7 // 8  # the compiler keeps some for itself
    if needed > usable:
        fits = usable // (4 * query_tiles) - 2
        raise UnsupportedError(
            f"the TPU's scalar memory of {SMEM_BYTES} bytes does not hold {slots} tiles for each of {query_tiles} "
            f"query tiles; top_k up to {fits} would fit, or a query_tile of {min(2 * Y, M)} or more"
        )


# --- Dense ---


def dense(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None = None
) -> jax.Array:
    """As `attention.dense`."""
    T, N, H = q_BTNH.shape[1:]
    if layout.num_shards > 1:
        return _dense_by_tiles(q_BTNH, k_BKHS, v_BKSH, layout, window)
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, k_layout=splash.QKVLayout.SEQ_MINOR
    )
    causal = splash_mask.CausalMask((T, T))
    seen = splash_mask.LocalMask((T, T), (window - 1, 0), 0) if window else causal
    mask = splash_mask.MultiHeadMask([seen] * N)

    def attend(interpret: bool) -> Callable[..., Any]:
        kernel = splash.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)
        return jax.vmap(kernel)

    q_BNTH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype).transpose(0, 2, 1, 3)
    out_BNTH = _on_tpu_or_interpreted(attend)(q_BNTH, k_BKHS.swapaxes(2, 3), v_BKSH)  # it swaps them back
    return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)


def _dense_by_tiles(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None
) -> jax.Array:
    """Reuse of all causal tiles, for the blocks of one shard, which are not contiguous."""
    Y = layout.block
    tiles_QC = causal_tiles(layout, Y)
    tiles_BKQC = jnp.broadcast_to(tiles_QC, (*k_BKHS.shape[:2], *tiles_QC.shape))
    return _reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, Selection(tile_size=Y, window=window), layout)


# --- Reuse ---


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """As `attention.reuse`; tiles_BKQC are ascending."""
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype, slots=tiles_BKQC.shape[-1])
    return _reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, selection, layout)


def _reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    M, Y, C = selection.tile_size, selection.query_tile, tiles_BKQC.shape[-1]
    q_ZQRH = _by_query_tile(q_BTNH, K, Y)
    _, Q, R, _ = q_ZQRH.shape
    used_ZQ = (tiles_BKQC != NO_TILE).sum(-1).reshape(B * K, Q)
    last_ZQ1 = jnp.take_along_axis(tiles_BKQC.reshape(B * K, Q, C), used_ZQ[..., None] - 1, axis=-1)
    tiles_ZQC = jnp.minimum(tiles_BKQC.reshape(B * K, Q, C), last_ZQ1)  # unused slots repeat the last: no new copy

    def attend(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_reuse_kernel, tile_size=M, query_tile=Y, window=selection.window),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(Q, C),
                in_specs=[
                    pl.BlockSpec((1, R, H), lambda i, c, *_: (i, 0, 0)),
                    pl.BlockSpec((H, M), lambda i, c, rows, used, tiles: (0, tiles[i * C + c])),
                    pl.BlockSpec((M, H), lambda i, c, rows, used, tiles: (tiles[i * C + c], 0)),
                ],
                out_specs=pl.BlockSpec((1, R, H), lambda i, c, *_: (i, 0, 0)),
                scratch_shapes=[pltpu.VMEM((R, width), jnp.float32) for width in (1, 1, H)],
            ),
            out_shape=jax.ShapeDtypeStruct((Q, R, H), q_BTNH.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name="kascade_reuse",
        )

    run, rows_Q = _on_tpu_or_interpreted(attend), layout.local_positions()[::Y]
    heads = (used_ZQ, tiles_ZQC.reshape(B * K, Q * C), q_ZQRH, k_BKHS.reshape(B * K, H, S), v_BKSH.reshape(B * K, S, H))
    out_ZQRH = lax.map(lambda head: run(rows_Q, *head), heads)
    return out_ZQRH.reshape(B, K, Q, N // K, Y, H).transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


def _reuse_kernel(
    rows_ref,
    used_ref,
    tiles_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    top_ref,
    total_ref,
    sum_ref,
    *,
    tile_size,
    query_tile,
    window,
):
    """One chosen key tile of one query tile: a step of online softmax."""
    i, c = pl.program_id(0), pl.program_id(1)
    last = pl.num_programs(1) - 1

    @pl.when(c == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(c < used_ref[i])
    def _():
        q_RH = q_ref[0]
        scores = _product(q_RH, k_ref[...], 1, 0) * q_RH.shape[-1] ** -0.5
        key = tiles_ref[i * (last + 1) + c] * tile_size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        row = rows_ref[i] + lax.rem(lax.broadcasted_iota(jnp.int32, scores.shape, 0), query_tile)
        scores = jnp.where(visible(row, key, window), scores, MASKED)
        top = jnp.maximum(top_ref[...], scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - top)
        shrink = jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * shrink + weights.sum(-1, keepdims=True)
        sum_ref[...] = sum_ref[...] * shrink + _product(weights.astype(v_ref.dtype), v_ref[...], 1, 0)

    @pl.when(c == last)
    def _():
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


# --- Choosing ---


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """As `attention.choose`."""
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    B, K, H, _ = k_BKHS.shape
    M, Y = selection.tile_size, selection.query_tile
    offsets = selection.scored_rows()
    q_ZQRH = _by_query_tile(q_BTNH, K, Y, offsets)
    _, Q, R, _ = q_ZQRH.shape
    P, at_once = layout.padded // M, min(TILES_AT_ONCE, layout.padded // M)
    steps, W = tile_count(P, at_once), at_once * M
    k_ZHS = pad_axis(k_BKHS.reshape(B * K, H, -1), 2, steps * W)
    rows_Q = layout.local_positions()[::Y]
    rows_QR = rows_Q[:, None] + jnp.tile(jnp.asarray(offsets, jnp.int32), R // len(offsets))[None]

    def score(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_score_kernel, length=layout.length, query_tile=Y, window=selection.window),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(Q, steps),
                in_specs=[
                    pl.BlockSpec((1, 1, R), lambda i, j, rows: (i, 0, 0)),
                    pl.BlockSpec((1, R, H), lambda i, j, rows: (i, 0, 0)),
                    pl.BlockSpec((H, W), lambda i, j, rows: (0, jnp.minimum(j, lax.div(rows[i] + Y - 1, W)))),
                ],
                out_specs=pl.BlockSpec((1, steps, at_once), lambda i, j, rows: (i, 0, 0)),
                scratch_shapes=[pltpu.VMEM((steps, n, R), jnp.float32) for n in (1, at_once)],
            ),
            out_shape=jax.ShapeDtypeStruct((Q, steps, at_once), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name="kascade_score",
        )

    run, num_tiles = _on_tpu_or_interpreted(score), tile_count(layout.length, M)

    def choose_head(head: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores_QP = run(rows_Q, rows_QR[:, None], *head).reshape(Q, steps * at_once)[:, :num_tiles]
        return select_tiles(scores_QP, selection, rows_Q // Y)

    tiles_ZQC = lax.map(choose_head, (q_ZQRH, k_ZHS))
    return tiles_ZQC.reshape(B, K, Q, -1)


def _score_kernel(first_ref, row_ref, q_ref, k_ref, out_ref, tops_ref, mass_ref, *, length, query_tile, window):
    """One block of keys for one query tile: each row's sum of exp(score) over each key tile, under the block's maximum.

    A row is a lane. The last step rescales all blocks to one maximum, divides by each row's total and sums the rows.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    _, at_once, rows = mass_ref.shape
    W = k_ref.shape[1]

    @pl.when(j == 0)
    def _():
        tops_ref[...] = jnp.full_like(tops_ref, MASKED)
        mass_ref[...] = jnp.zeros_like(mass_ref)

    @pl.when(j * W < first_ref[i] + query_tile)
    def _():
        q_RH = q_ref[0]
        scores_WR = _product(k_ref[...], q_RH, 0, 1) * q_RH.shape[-1] ** -0.5
        key = j * W + lax.broadcasted_iota(jnp.int32, scores_WR.shape, 0)
        scores_WR = jnp.where(visible(row_ref[0], key, window), scores_WR, MASKED)
        top = scores_WR.max(0, keepdims=True)
        tops_ref[j] = top
        mass_ref[j] = jnp.exp(scores_WR - top).reshape(at_once, W // at_once, rows).sum(1)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        tops = tops_ref[...]
        mass = mass_ref[...] * jnp.exp(tops - tops.max(0, keepdims=True))
        total = mass.sum((0, 1), keepdims=True)
        real = (row_ref[0] < length)[None]  # rows of padding choose nothing
        out_ref[0] = jnp.where(real, mass / total, 0.0).sum(-1)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix product over one axis of each; the result is float32, and float32 inputs are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _by_query_tile(q_BTNH: jax.Array, num_kv_heads: int, query_tile: int, rows: Any = None) -> jax.Array:
    """q_ZQRH: for each KV head and query tile the rows (or the given ones) of all its query heads."""
    B, T, N, H = q_BTNH.shape
    q_BQYKGH = q_BTNH.reshape(B, T // query_tile, query_tile, num_kv_heads, N // num_kv_heads, H)
    if rows is not None and len(rows) < query_tile:
        q_BQYKGH = q_BQYKGH[:, :, rows]
    q_BKQGYH = q_BQYKGH.transpose(0, 3, 1, 4, 2, 5)
    return q_BKQGYH.reshape(B * num_kv_heads, T // query_tile, -1, H)


def _on_tpu_or_interpreted(make: Callable[[bool], Callable[..., Any]]) -> Callable[..., Any]:
    """make(interpret): compiled where the program is lowered for a TPU, interpreted elsewhere."""
    return lambda *args: lax.platform_dependent(*args, tpu=make(False), default=make(True))
