"""Choosing and reusing key tiles of 8 to 64 tokens on a TPU, whose registers and matrix unit take 128 at a time.

One KV head's keys and values stay in vector memory while all its queries pass: one program after the other takes
ROWS tokens of queries. Reuse copies the chosen tiles of each query tile into one block of W keys, which the matrix unit
then multiplies; a key and its value are one row, so that at width 64 they fill the lanes and are copied together. Where
a head does not fit, the tiles are copied from the chip's large memory instead, a block's at once.
Scoring takes the query tiles of a program together, since all of them look at all keys.

`attention.tpu` calls this module for such tiles; functions are as there. R here is the rows of a query tile, those of
all its KV head's query heads; D is the numbers in a row of a key and its value.
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

from attention.sharding import Layout, pad_axis
from attention.tpu_common import LANES, MASKED, USABLE_SMEM, by_query_tile, on_tpu_or_interpreted, product, whole_lanes
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

TILE_SIZES = (8, 16, 32, 64)
QUERY_TILES = (8, 16, 32, 64, 128)
ROWS = 128  # tokens of queries in one program of reuse, and rows of a product in scoring
KEYS_AT_ONCE = 512  # keys in one block
UNROLL = 8  # tiles copied in one step of a loop
VMEM_BYTES = 48 * 2**20  # for what grows with the text, of 64 MiB on a v5p and v7x; v5e and v6e have twice as much
MORE_VMEM = 12 * 2**20  # for what does not
UNUSED = jnp.iinfo(jnp.int32).max // 2  # the place of a key that no row sees


def check(selection: Selection, length: int, head_dim: int | None, dtype: Any, slots: int | None = None) -> None:
    """As `attention.check`: sizes of tiles, and whether one head's keys and values fit into vector memory."""
    M, Y = selection.tile_size, selection.query_tile
    if M not in TILE_SIZES:
        sizes = ", ".join(map(str, TILE_SIZES))
        raise UnsupportedError(f"the TPU kernels take a tile_size of {sizes} or a multiple of {LANES}, got {M}")
    if Y not in QUERY_TILES:
        sizes = ", ".join(map(str, QUERY_TILES))
        raise UnsupportedError(f"with a tile_size of {M} the TPU kernels take a query_tile of {sizes}, got {Y}")
    slots, together = slots or selection.slots(tile_count(length, M)), ROWS // Y
    if 2 * 4 * together * slots > USABLE_SMEM:  # two programs' tiles at a time
        fits = USABLE_SMEM // (8 * together)
        raise UnsupportedError(
            f"the TPU's scalar memory does not hold {slots} tiles for each of {together} query tiles; top_k up to "
            f"{fits} would fit, or a query_tile of {2 * Y} or more"
        )
    needed = _score_bytes(selection, length, head_dim or 1, dtype)
    if needed > VMEM_BYTES:
        fits = length * VMEM_BYTES // needed
        raise UnsupportedError(
            f"the TPU's vector memory holds one head's keys and sums of up to about {fits} tokens with a tile_size of "
            f"{M}, got {length} tokens; a tile_size of {LANES} needs no such room"
        )


def _reuse_bytes(length: int, head_dim: int, dtype: Any) -> int:
    """Of vector memory, for the keys and values of a head; if they do not fit, tiles are copied from outside."""
    return length * whole_lanes(2 * head_dim) * jnp.dtype(dtype).itemsize


def _score_bytes(selection: Selection, length: int, head_dim: int, dtype: Any) -> int:
    """Of vector memory, for the keys of a head, each tile's mass and maximum in each row, and two blocks of results."""
    tiles = tile_count(length, selection.tile_size)
    together = ROWS // len(selection.scored_rows())
    keys = length * whole_lanes(head_dim) * jnp.dtype(dtype).itemsize
    return keys + 4 * tiles * (2 * ROWS + 2 * max(together, 8))


# --- Reuse ---


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """As `attention.reuse`; tiles_BKQC are ascending."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    M, Y, C = selection.tile_size, selection.query_tile, tiles_BKQC.shape[-1]
    check(selection, layout.length, H, q_BTNH.dtype, slots=C)
    Z, P, Q, together = B * K, S // M, T // Y, ROWS // Y
    J, at_once = tile_count(Q, together), min(KEYS_AT_ONCE, whole_lanes(C * M)) // M
    width = H if H % LANES == 0 else 2 * H  # a query's zeros meet the value that shares a row with the key
    kv_ZPMD = jnp.concatenate([k_BKHS.swapaxes(2, 3), v_BKSH], axis=-1).reshape(Z, P, M, 2 * H)
    q_ZQRD = pad_axis(pad_axis(by_query_tile(q_BTNH, K, Y), 3, width), 1, J * together)
    tiles_ZQC = pad_axis(tiles_BKQC.reshape(Z, Q, C), 1, J * together)
    used_ZQ1 = (tiles_ZQC != NO_TILE).sum(-1, keepdims=True, dtype=jnp.int32)
    tiles_ZQC = jnp.minimum(jnp.where(tiles_ZQC == NO_TILE, tiles_ZQC[..., :1], tiles_ZQC), P - 1)  # masked copies
    tiles_ZQC = pad_axis(tiles_ZQC, 2, tile_count(C, at_once) * at_once)
    used_ZJQ1, tiles_ZJQC, q_ZJQRD = (x.reshape(Z, J, together, *x.shape[2:]) for x in (used_ZQ1, tiles_ZQC, q_ZQRD))
    rows_Q = pad_axis(layout.local_positions()[::Y], 0, J * together)
    call = partial(_reuse_call, q_ZJQRD, tiles_ZJQC, kv_ZPMD, at_once, selection)
    out_ZJQRD = on_tpu_or_interpreted(call)(rows_Q, used_ZJQ1, tiles_ZJQC, q_ZJQRD, kv_ZPMD)
    out_BKQGYH = out_ZJQRD.reshape(Z, J * together, -1, width)[:, :Q, :, -H:].reshape(B, K, Q, N // K, Y, H)
    return out_BKQGYH.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


def _reuse_call(
    q_ZJQRD: jax.Array,
    tiles_ZJQC: jax.Array,
    kv_ZPMD: jax.Array,
    at_once: int,
    selection: Selection,
    interpret: bool,
) -> Callable[..., Any]:
    """A function of rows_Q, used_ZJQ1, tiles_ZJQC, q_ZJQRD and kv_ZPMD, for arrays of these shapes."""
    Z, J, together, R, width = q_ZJQRD.shape
    _, P, M, D = kv_ZPMD.shape
    needed = _reuse_bytes(P * M, D // 2, kv_ZPMD.dtype)
    resident = needed <= VMEM_BYTES
    keys = pl.BlockSpec((None, P, M, D), lambda z, j, rows: (z, 0, 0, 0), pipeline_mode=pl.Buffered(1))
    queries = pl.BlockSpec((None, None, together, R, width), lambda z, j, rows: (z, j, 0, 0, 0))
    scalars = [
        pl.BlockSpec((None, None, together, n), lambda z, j, rows: (z, j, 0, 0), memory_space=pltpu.SMEM)
        for n in (1, tiles_ZJQC.shape[-1])
    ]
    return pl.pallas_call(
        partial(_reuse_kernel, query_tile=selection.query_tile, window=selection.window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(Z, J),
            in_specs=[*scalars, queries, keys if resident else pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((2, at_once, M, D), kv_ZPMD.dtype),
                *([] if resident else [pltpu.SemaphoreType.DMA((2,))]),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_ZJQRD.shape, q_ZJQRD.dtype),
        compiler_params=_compiler_params(needed if resident else 0, 2),
        interpret=interpret,
        name="kascade_small_reuse",
    )


def _reuse_kernel(
    rows_ref, used_ref, tiles_ref, q_ref, kv_ref, out_ref, blocks_ref, copied=None, *, query_tile, window
):
    """The query tiles of one program, one after the other: online softmax over blocks of their chosen keys.

    While one block is multiplied, the next is copied. With `copied`, semaphores, keys and values lie outside of vector
    memory.
    """
    together, R, width = q_ref.shape
    _, at_once, M, D = blocks_ref.shape
    first = pl.program_id(1) * together
    copies = (tiles_ref, kv_ref if copied is None else kv_ref.at[pl.program_id(0)], blocks_ref, copied)

    def attend(i, _):
        q_RD, used = q_ref[i], used_ref[i, 0]
        row_R1 = rows_ref[first + i] + lax.rem(lax.broadcasted_iota(jnp.int32, (R, 1), 0), query_tile)
        blocks = pl.cdiv(used, at_once)
        _start_copies(i, 0, *copies)

        def step(block, carry):
            top, total, out = carry
            pl.when(block + 1 < blocks)(lambda: _start_copies(i, block + 1, *copies))
            _wait_for_copies(block, *copies)
            buffer = lax.rem(block, 2)
            k_WD = blocks_ref[buffer, :, :, :width].reshape(at_once * M, width)
            v_WD = blocks_ref[buffer, :, :, D - width :].reshape(at_once * M, width)
            scores = product(q_RD, k_WD, 1, 1) * (D // 2) ** -0.5
            key_1W = _places(tiles_ref, i, block * at_once, used, at_once, M)
            scores = jnp.where(visible(row_R1, key_1W, window), scores, MASKED)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            values = product(weights.astype(v_WD.dtype), v_WD, 1, 0)
            return new_top, total * shrink + weights.sum(-1, keepdims=True), out * shrink + values

        empty = (jnp.full((R, 1), MASKED), jnp.zeros((R, 1)), jnp.zeros((R, width)))
        _, total, out = lax.fori_loop(0, blocks, step, empty)
        out_ref[i] = (out / total).astype(out_ref.dtype)

    lax.fori_loop(0, together, attend, None)


def _start_copies(i, block, tiles_ref, kv_ref, blocks_ref, copied):
    """Copies one block of query tile i's tiles, unused slots as well, so that no number in it is undefined."""
    buffer, at_once = lax.rem(block, 2), blocks_ref.shape[1]

    def copy(c, _):
        tile = tiles_ref[i, block * at_once + c]
        if copied is None:
            blocks_ref[buffer, c] = kv_ref[tile]
        else:
            pltpu.make_async_copy(kv_ref.at[tile], blocks_ref.at[buffer, c], copied.at[buffer]).start()

    lax.fori_loop(0, at_once, copy, None, unroll=math.gcd(at_once, UNROLL))


def _wait_for_copies(block, tiles_ref, kv_ref, blocks_ref, copied):
    """Until all copies of a block are there; a wait asks for the copy's size alone, so any tile stands for all."""
    buffer, at_once = lax.rem(block, 2), blocks_ref.shape[1]

    def wait(c, _):
        pltpu.make_async_copy(kv_ref.at[0], blocks_ref.at[buffer, c], copied.at[buffer]).wait()

    if copied is not None:
        lax.fori_loop(0, at_once, wait, None)


def _places(tiles_ref, i, start, used, at_once, tile_size):
    """key_1W: the places of the keys in the slots from `start` of query tile i, out of sight in slots not in use."""
    lane_1W = lax.broadcasted_iota(jnp.int32, (1, at_once * tile_size), 1)
    slot_1W, offset_1W = lax.div(lane_1W, tile_size), lax.rem(lane_1W, tile_size)

    def place(c, key_1W):
        tile_start = jnp.where(start + c < used, tiles_ref[i, start + c] * tile_size, UNUSED)
        return jnp.where(slot_1W == c, tile_start + offset_1W, key_1W)

    return lax.fori_loop(0, at_once, place, lane_1W, unroll=math.gcd(at_once, UNROLL))


# --- Choosing ---


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """As `attention.choose`."""
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    B, K, H, S = k_BKHS.shape
    Y, offsets = selection.query_tile, selection.scored_rows()
    num_tiles = tile_count(layout.length, selection.tile_size)
    Q, together = q_BTNH.shape[1] // Y, ROWS // len(offsets)
    J = tile_count(Q, together)
    rows_Q = layout.local_positions()[::Y]
    rows_JR = pad_axis(rows_Q[:, None] + jnp.asarray(offsets, jnp.int32)[None], 0, J * together).reshape(J, 1, ROWS)
    q_BQYNH = pad_axis(q_BTNH.reshape(B, Q, Y, *q_BTNH.shape[2:])[:, :, offsets], 1, J * together)
    q_ZJGRH = q_BQYNH.reshape(B, J, ROWS, K, -1, H).transpose(0, 3, 1, 4, 2, 5).reshape(B * K, J, -1, ROWS, H)
    k_ZSH = pad_axis(k_BKHS.swapaxes(2, 3), 2, tile_count(S, KEYS_AT_ONCE) * KEYS_AT_ONCE).reshape(B * K, -1, H)
    score = on_tpu_or_interpreted(
        lambda interpret: _scoring_call(q_ZJGRH.shape[1:], k_ZSH, selection, layout.length, interpret)
    )

    def choose_head(head: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores_JQP = score(rows_JR.max((1, 2)) + 1, rows_JR, *head)
        scores_QP = scores_JQP.reshape(J * together, -1)[:Q, :num_tiles]
        return select_tiles(scores_QP, selection, rows_Q // Y)

    tiles_ZQC = lax.map(choose_head, (q_ZJGRH, k_ZSH))
    return tiles_ZQC.reshape(B, K, Q, -1)


def _scoring_call(
    q_shape: tuple[int, ...], k_ZSH: jax.Array, selection: Selection, length: int, interpret: bool
) -> Callable[..., Any]:
    """One KV head's scores: a function of seen_J, rows_JR, q_JGRH and k_SH."""
    (J, G, R, H), (_, S, _) = q_shape, k_ZSH.shape
    together, P = R // len(selection.scored_rows()), whole_lanes(S // selection.tile_size)
    return pl.pallas_call(
        partial(_score_kernel, tile_size=selection.tile_size, length=length, window=selection.window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(J,),
            in_specs=[
                pl.BlockSpec((None, 1, R), lambda j, seen: (j, 0, 0)),
                pl.BlockSpec((None, G, R, H), lambda j, seen: (j, 0, 0, 0)),
                pl.BlockSpec((S, H), lambda j, seen: (0, 0), pipeline_mode=pl.Buffered(1)),
            ],
            out_specs=pl.BlockSpec((None, together, P), lambda j, seen: (j, 0, 0)),
            scratch_shapes=[pltpu.VMEM((P, R), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((J, together, P), jnp.float32),
        compiler_params=_compiler_params(_score_bytes(selection, S, H, k_ZSH.dtype), 1),
        interpret=interpret,
        name="kascade_small_score",
    )


def _score_kernel(seen_ref, row_ref, q_ref, k_ref, out_ref, tops_ref, mass_ref, *, tile_size, length, window):
    """The scores of one program's query tiles: the sum over query heads and rows of each key tile's share.

    A row is a lane. Of each query head the first pass over the keys sums exp(score) over each key tile, under the
    maximum of its block, and the second divides by the row's total under one maximum.
    """
    G, R, H = q_ref.shape
    at_once = KEYS_AT_ONCE // tile_size
    blocks = pl.cdiv(seen_ref[pl.program_id(0)], KEYS_AT_ONCE)
    groups = pl.cdiv(blocks * at_once, LANES)
    out_ref[...] = jnp.zeros_like(out_ref)
    lax.fori_loop(0, groups, partial(_clear, tops_ref, mass_ref), None)

    def score_head(g, _):
        q_RH = q_ref[g]

        def sum_block(block, carry):
            top, total = carry
            start = pl.multiple_of(block * KEYS_AT_ONCE, KEYS_AT_ONCE)
            scores_WR = product(k_ref[pl.ds(start, KEYS_AT_ONCE)], q_RH, 1, 1) * H**-0.5
            key_W1 = start + lax.broadcasted_iota(jnp.int32, (KEYS_AT_ONCE, 1), 0)
            scores_WR = jnp.where(visible(row_ref[...], key_W1, window), scores_WR, MASKED)
            block_top = scores_WR.max(0, keepdims=True)
            mass = jnp.exp(scores_WR - block_top).reshape(at_once, tile_size, R).sum(1)
            tiles = pl.ds(pl.multiple_of(block * at_once, at_once), at_once)
            tops_ref[tiles] = jnp.broadcast_to(block_top, mass.shape)
            mass_ref[tiles] = mass
            new_top = jnp.maximum(top, block_top)
            block_total = mass.sum(0, keepdims=True) * jnp.exp(block_top - new_top)
            return new_top, total * jnp.exp(top - new_top) + block_total

        empty = jnp.full((1, R), MASKED), jnp.zeros((1, R))
        top, total = lax.fori_loop(0, blocks, sum_block, empty)
        real = jnp.where(row_ref[...] < length, 1 / total, 0.0)  # rows of padding choose nothing
        _add_shares(out_ref, tops_ref, mass_ref, top, real, groups)

    lax.fori_loop(0, G, score_head, None)


def _clear(tops_ref, mass_ref, group, _):
    """Key tiles of the last group that no block reaches have no mass."""
    tiles = pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
    tops_ref[tiles] = jnp.full((LANES, tops_ref.shape[1]), MASKED)
    mass_ref[tiles] = jnp.zeros((LANES, mass_ref.shape[1]))


def _add_shares(out_ref, tops_ref, mass_ref, top_1R, scale_1R, groups):
    """Adds each key tile's share of each row to the query tile that the row belongs to, LANES key tiles at a time."""
    together, R = out_ref.shape[0], top_1R.shape[1]
    shape = (together, R)
    query_tile = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), R // together)
    own_QR = (query_tile == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)

    def add(group, _):
        tiles = pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
        share_PR = mass_ref[tiles] * jnp.exp(tops_ref[tiles] - top_1R) * scale_1R
        out_ref[:, tiles] += product(own_QR, share_PR, 1, 1)

    lax.fori_loop(0, groups, add, None)


def _compiler_params(vmem_bytes: int, grid_axes: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * grid_axes, vmem_limit_bytes=vmem_bytes + MORE_VMEM)
