"""Dense, anchor and reuse attention on a TPU: Pallas kernels for key tiles of 128 tokens and more.

Smaller tiles are chosen and reused by `attention.tpu_small`.

Reuse has one grid step for each chosen tile; the tiles' indices are prefetched into scalar memory and say which tile is
copied next. Scoring keeps one query tile's sums over all key tiles in vector memory, so that no [T, T] array is made.
Dense is JAX's splash attention. Split over several chips, whose blocks are not contiguous, it is a reuse of all tiles.
Away from a TPU the same kernels are interpreted: correct, and slow. A decoding step is JAX's paged attention, with the
cache's tiles as pages.

All functions take padded inputs and a layout; see `attention`, whose functions they implement. R here is the rows of a
query tile, those of all its KV head's query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from attention import tpu_small
from attention.sharding import Layout, causal_tiles, pad_axis
from attention.tpu_common import (
    LANES,
    MASKED,
    SMEM_BYTES,
    USABLE_SMEM,
    by_query_tile,
    on_tpu_or_interpreted,
    product,
    whole_lanes,
)
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

LEAST_TILE = LANES  # of these kernels: a key tile is a whole number of a vector register's lanes
TILES_AT_ONCE = 8  # key tiles in one step of scoring
SPLASH_BLOCKS = (1024, 512, 256, 128)  # the largest that divides the sequence
LEAST_PAGE = 16  # tokens: the rows of bfloat16 that memory is tiled by, so that pages are a view of the cache
LARGEST_PAGE = 512  # of dense steps, which choose their own
KEYS_AT_ONCE = 1024  # of the pages that one step of paged attention reads


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
    if M < LEAST_TILE:
        tpu_small.check(selection, length, head_dim, dtype, slots)
        return
    if M % LANES:
        raise UnsupportedError(
            f"the TPU kernels take a tile_size of {whole_lanes(M)} or another multiple of {LANES}, got {M}"
        )
    if Y > M or Y % 8:
        raise UnsupportedError(
            f"the TPU kernels take a query_tile that is a multiple of 8 and at most tile_size, {M}, got {Y}"
        )
    slots, query_tiles = slots or selection.slots(tile_count(length, M)), tile_count(length, Y)
    if 4 * query_tiles * (slots + 2) > USABLE_SMEM:
        fits = USABLE_SMEM // (4 * query_tiles) - 2
        raise UnsupportedError(
            f"the TPU's scalar memory of {SMEM_BYTES} bytes does not hold {slots} tiles for each of {query_tiles} "
            f"query tiles; top_k up to {fits} would fit, or a query_tile of {min(2 * Y, M)} or more"
        )


# --- Dense ---


def dense(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None = None
) -> jax.Array:
    """As `attention.dense`."""
    if layout.num_shards > 1:
        return _dense_by_tiles(q_BTNH, k_BKHS, v_BKSH, layout, window)
    T, padded = q_BTNH.shape[1], whole_lanes(q_BTNH.shape[1])
    q_BTNH, k_BKHS, v_BKSH = pad_axis(q_BTNH, 1, padded), pad_axis(k_BKHS, 3, padded), pad_axis(v_BKSH, 2, padded)
    return _splash(q_BTNH, k_BKHS, v_BKSH, window)[:, :T]


def _splash(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, window: int | None) -> jax.Array:
    """JAX's splash attention, for a whole number of lanes."""
    T, N, H = q_BTNH.shape[1:]
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
    out_BNTH = on_tpu_or_interpreted(attend)(q_BNTH, k_BKHS.swapaxes(2, 3), v_BKSH)  # it swaps them back
    return out_BNTH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)


def _dense_by_tiles(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None
) -> jax.Array:
    """Reuse of all causal tiles, for the blocks of one shard, which are not contiguous."""
    Y, M = layout.block, whole_lanes(layout.block)
    tiles_QC = causal_tiles(layout, M, Y)
    padded = tiles_QC.shape[-1] * M
    k_BKHS, v_BKSH = pad_axis(k_BKHS, 3, padded), pad_axis(v_BKSH, 2, padded)
    tiles_BKQC = jnp.broadcast_to(tiles_QC, (*k_BKHS.shape[:2], *tiles_QC.shape))
    return _reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, M, Y, window, layout)


# --- Reuse ---


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """As `attention.reuse`; tiles_BKQC are ascending."""
    M, Y = selection.tile_size, selection.query_tile
    if M < LEAST_TILE:
        return tpu_small.reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, selection, layout)
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype, slots=tiles_BKQC.shape[-1])
    return _reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, M, Y, selection.window, layout)


def _reuse(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    tile_size: int,
    query_tile: int,
    window: int | None,
    layout: Layout,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    M, Y, C = tile_size, query_tile, tiles_BKQC.shape[-1]
    q_ZQRH = by_query_tile(q_BTNH, K, Y)
    _, Q, R, _ = q_ZQRH.shape
    used_ZQ = (tiles_BKQC != NO_TILE).sum(-1).reshape(B * K, Q)
    last_ZQ1 = jnp.take_along_axis(tiles_BKQC.reshape(B * K, Q, C), used_ZQ[..., None] - 1, axis=-1)
    tiles_ZQC = jnp.minimum(tiles_BKQC.reshape(B * K, Q, C), last_ZQ1)  # unused slots repeat the last: no new copy

    def attend(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_reuse_kernel, tile_size=M, query_tile=Y, window=window),
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

    run, rows_Q = on_tpu_or_interpreted(attend), layout.local_positions()[::Y]
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
        scores = product(q_RH, k_ref[...], 1, 0) * q_RH.shape[-1] ** -0.5
        key = tiles_ref[i * (last + 1) + c] * tile_size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        row = rows_ref[i] + lax.rem(lax.broadcasted_iota(jnp.int32, scores.shape, 0), query_tile)
        scores = jnp.where(visible(row, key, window), scores, MASKED)
        top = jnp.maximum(top_ref[...], scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - top)
        shrink = jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * shrink + weights.sum(-1, keepdims=True)
        sum_ref[...] = sum_ref[...] * shrink + product(weights.astype(v_ref.dtype), v_ref[...], 1, 0)

    @pl.when(c == last)
    def _():
        out_ref[0] = (sum_ref[...] / total_ref[...]).astype(out_ref.dtype)


# --- Choosing ---


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """As `attention.choose`."""
    if selection.tile_size < LEAST_TILE:
        return tpu_small.choose(q_BTNH, k_BKHS, selection, layout)
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    B, K, H, _ = k_BKHS.shape
    M, Y = selection.tile_size, selection.query_tile
    offsets = selection.scored_rows()
    q_ZQRH = by_query_tile(q_BTNH, K, Y, offsets)
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

    run, num_tiles = on_tpu_or_interpreted(score), tile_count(layout.length, M)

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
        scores_WR = product(k_ref[...], q_RH, 0, 1) * q_RH.shape[-1] ** -0.5
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


# --- Decoding ---


def check_step(selection: Selection, cache_shape: tuple[int, int, int], dtype: Any) -> None:
    """As `attention.decode.check`: a tile is a page, and a step's lists of pages fit into scalar memory."""
    (Z, S, H), M = cache_shape, selection.tile_size
    if H % LANES:
        raise UnsupportedError(f"the TPU's paged attention takes heads of a multiple of {LANES} numbers, got {H}")
    if M % LEAST_PAGE:
        raise UnsupportedError(
            f"the TPU's paged attention takes a tile_size of a multiple of {LEAST_PAGE} as its page, got {M}"
        )
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise UnsupportedError(f"the TPU's paged attention computes with keys in bfloat16, got {jnp.dtype(dtype)}")
    page = _dense_page(S)
    lists = ((S // page, page), (selection.slots(S // M), M))
    needed = max(4 * Z * _whole_blocks(slots, size) for slots, size in lists)
    if needed > USABLE_SMEM:
        raise UnsupportedError(
            f"the TPU's scalar memory of {SMEM_BYTES} bytes does not hold the page lists of {Z} KV heads of all "
            f"sequences, {needed} bytes; a smaller batch or fewer tiles would fit"
        )


def dense_step(q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """As `attention.decode.dense_step`."""
    Z, S, _ = k_ZSH.shape
    page = _dense_page(S)
    pages_ZC = jnp.broadcast_to(jnp.arange(S // page)[None], (Z, S // page))
    lengths_Z = jnp.repeat(positions_B + 1, Z // q_BNH.shape[0])
    return _attend_to_pages(q_BNH, k_ZSH, v_ZSH, pages_ZC, lengths_Z, page)


def reuse_step(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
) -> jax.Array:
    """As `attention.decode.reuse_step`: only the last page may be partly filled, so the new token's comes last."""
    Z, M = k_ZSH.shape[0], selection.tile_size
    pages_ZC = jnp.sort(tiles_BK1C.reshape(Z, -1), axis=-1)  # own tiles last, then unused slots
    used_ZC = pages_ZC != NO_TILE
    in_last_Z = jnp.repeat(positions_B % M + 1, Z // q_BNH.shape[0])
    lengths_Z = (used_ZC.sum(-1, dtype=jnp.int32) - 1) * M + in_last_Z
    return _attend_to_pages(q_BNH, k_ZSH, v_ZSH, jnp.where(used_ZC, pages_ZC, 0), lengths_Z, M)


def _attend_to_pages(
    q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, pages_ZC: jax.Array, lengths_Z: jax.Array, page: int
) -> jax.Array:
    """Attention to `lengths_Z` keys of the listed pages; each KV head of each sequence is the kernel's sequence."""
    (Z, S, H), C = k_ZSH.shape, pages_ZC.shape[1]
    pages_ZC = pages_ZC + (jnp.arange(Z) * (S // page))[:, None]
    pages_ZC = jnp.pad(pages_ZC, [(0, 0), (0, _whole_blocks(C, page) - C)])
    q_ZGH = q_BNH.astype(jnp.float32).reshape(Z, -1, H) * H**-0.5
    with jax.numpy_dtype_promotion("standard"):  # the kernel multiplies float32 by bfloat16
        out_ZGH = paged_attention(
            q_ZGH,
            *(x_ZSH.reshape(1, -1, page, H) for x_ZSH in (k_ZSH, v_ZSH)),
            lengths_Z,
            pages_ZC,
            pages_per_compute_block=_pages_at_once(page),
        )
    return out_ZGH.reshape(q_BNH.shape)


def _dense_page(size: int) -> int:
    """The largest page of a dense step that divides the cache."""
    return math.gcd(size, LARGEST_PAGE)


def _pages_at_once(page: int) -> int:
    return max(KEYS_AT_ONCE // page, 1)


def _whole_blocks(pages: int, page: int) -> int:
    """The length of a list of so many pages, which the kernel goes through in whole blocks."""
    return tile_count(pages, _pages_at_once(page)) * _pages_at_once(page)
