"""Dense, anchor and reuse attention in plain JAX, for every device, dtype and size.

All functions take padded inputs and a layout; see `attention`, whose functions they implement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention.sharding import Layout
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

LEAST_TILE = 1  # tokens of which dense attention's blocks are a multiple
UNSEEN = -1e30  # a masked score: finite, since a window may hide a row's whole first block of keys
KEYS_AT_ONCE = 2048  # gathered keys in one step of reuse: enough to fill the products, few enough for a core's cache


def check(
    selection: Selection,
    length: int,
    head_dim: int | None,
    dtype: Any,
    capability: str | None = None,
    slots: int | None = None,
) -> None:
    """Takes everything."""


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and result; float32 inputs are not rounded on the way, on any device."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


# --- Dense ---


def dense(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None = None
) -> jax.Array:
    """Online softmax over square blocks on and below the diagonal (Milakov & Gimelshein, arXiv 1805.02867)."""
    B, K, H, S = k_BKHS.shape
    R = layout.block
    k_ZHS, v_ZSH = k_BKHS.reshape(B * K, H, S), v_BKSH.reshape(B * K, S, H)

    def attend(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        def step(key_block, carry, masked):
            top, total, out = carry
            k_HW = lax.dynamic_slice(k_ZHS, (head, 0, key_block * R), (1, H, R))[0]
            scores = matmul("GRH,HW->GRW", q_GRH, k_HW) * H**-0.5
            if masked:
                row_R1, key_1W = block * R + jnp.arange(R)[:, None], key_block * R + jnp.arange(R)[None]
                scores = jnp.where(visible(row_R1, key_1W, window)[None], scores, UNSEEN)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v_WH = lax.dynamic_slice(v_ZSH, (head, key_block * R, 0), (1, R, H))[0]
            values = matmul("GRW,WH->GRH", weights.astype(v_WH.dtype), v_WH)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + values

        empty = (jnp.full(q_GRH.shape[:-1], -jnp.inf), jnp.zeros(q_GRH.shape[:-1]), jnp.zeros(q_GRH.shape))
        _, total, out = _fold_causal(step, block, empty, R, window)
        return (out / total[..., None]).astype(q_GRH.dtype)

    return _ungroup(_map_heads(attend, layout.local_blocks(), q_BTNH, K))


# --- Choosing ---


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """The best key tiles of each query tile, tiles_BKQC."""

    def best(scores_QP: jax.Array, query_tiles_Q: jax.Array) -> jax.Array:
        return select_tiles(scores_QP, selection, query_tiles_Q)

    return _score_blocks(q_BTNH, k_BKHS, selection, layout, best)


def score(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """The masses that `choose` chooses by, scores_BKQP."""
    return _score_blocks(q_BTNH, k_BKHS, selection, layout, lambda scores_QP, _: scores_QP)


def _score_blocks(
    q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout, finish: Callable
) -> jax.Array:
    """One pass over the keys: sums exp(score) tile by tile under each block's own maximum, rescaled at the end.

    A row is a column here, so that a tile's keys are added up in vectors of rows (on CPUs an eighth faster).
    Returns finish(scores_QP, query_tiles_Q) of every KV head and block, along one axis of query tiles.
    """
    B, K, H, S = k_BKHS.shape
    R, M, Y = layout.block, selection.tile_size, selection.query_tile
    Q, num_tiles = R // Y, tile_count(layout.length, M)  # query tiles of one block, key tiles with real tokens
    k_ZSH = k_BKHS.reshape(B * K, H, S).swapaxes(1, 2)
    rows_QR = jnp.arange(Q)[:, None] * Y + selection.scored_rows()[None]  # all of a block's rows, or a sample
    rows_R = rows_QR.reshape(-1)

    def score_block(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        q_GRH = q_GRH if len(rows_R) == R else q_GRH[:, rows_R]
        G = len(q_GRH)
        q_RH = q_GRH.reshape(-1, H)  # rows of each query head one after another
        place_R = jnp.tile(block * R + rows_R, G)

        def step(key_block, carry, masked):
            tops, mass_PR = carry  # of each row: its largest score in every block of keys, its mass in every tile
            k_WH = lax.dynamic_slice(k_ZSH, (head, key_block * R, 0), (1, R, H))[0]
            scores = matmul("WH,RH->WR", k_WH, q_RH) * H**-0.5
            if masked:
                key_W1 = key_block * R + jnp.arange(R)[:, None]
                scores = jnp.where(visible(place_R[None], key_W1, selection.window), scores, UNSEEN)
            top = scores.max(0, keepdims=True)
            mass = jnp.exp(scores - top).reshape(R // M, M, -1).sum(1)
            return (
                lax.dynamic_update_slice_in_dim(tops, top, key_block, 0),
                lax.dynamic_update_slice_in_dim(mass_PR, mass, key_block * (R // M), 0),
            )

        empty = (jnp.full((S // R, len(place_R)), -jnp.inf), jnp.zeros((S // M, len(place_R))))
        tops, mass_PR = _fold_causal(step, block, empty, R, selection.window)
        mass_PR *= jnp.repeat(jnp.exp(tops - tops.max(0, keepdims=True)), R // M, axis=0)
        share_R = jnp.where(place_R < layout.length, 1 / mass_PR.sum(0), 0)  # rows of padding choose nothing
        share_PR = mass_PR * share_R[None]
        scores_PQ = share_PR.reshape(S // M, G, Q, -1).sum((1, 3))[:num_tiles]
        return finish(scores_PQ.T, block * Q + jnp.arange(Q))

    by_block = _map_heads(score_block, layout.local_blocks(), q_BTNH, K)  # [B, K, J, Q, C or P]
    return by_block.reshape(B, K, -1, by_block.shape[-1])


# --- Reuse ---


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """Gathers the chosen tiles of one query tile and KV head at a time and attends to them in two products."""
    B, K, H, S = k_BKHS.shape
    M, Y, C = selection.tile_size, selection.query_tile, tiles_BKQC.shape[-1]
    P = S // M
    k_tiles = k_BKHS.transpose(0, 1, 3, 2).reshape(B * K * P, M, H)  # rows, so that gathering a tile copies one piece
    v_tiles = v_BKSH.reshape(B * K * P, M, H)
    query_tiles_Q = layout.local_positions()[::Y] // Y

    def attend(query_tile: jax.Array, head: jax.Array, q_GRH: jax.Array, tiles_C: jax.Array) -> jax.Array:
        used_C1 = (tiles_C != NO_TILE)[:, None]
        index_C = head * P + jnp.where(used_C1[:, 0], tiles_C, 0)
        k_WH, v_WH = (x.at[index_C].get(mode="promise_in_bounds").reshape(C * M, H) for x in (k_tiles, v_tiles))
        key_W = jnp.where(used_C1, tiles_C[:, None] * M + jnp.arange(M)[None], NO_TILE).reshape(-1)
        place_R = jnp.tile(query_tile * Y + jnp.arange(Y), len(q_GRH))  # the rows of each query head one after another
        scores = matmul("RH,WH->RW", q_GRH.reshape(-1, H), k_WH) * H**-0.5
        scores = jnp.where(visible(place_R[:, None], key_W[None], selection.window), scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = matmul("RW,WH->RH", weights.astype(v_WH.dtype), v_WH)
        return (out / weights.sum(-1, keepdims=True)).reshape(q_GRH.shape).astype(q_GRH.dtype)

    at_once = max(KEYS_AT_ONCE // (C * M), 1)
    return _ungroup(_map_heads(attend, query_tiles_Q, q_BTNH, K, tiles_BKQC, at_once=at_once))


# --- Blocks and heads ---


def _map_heads(
    attend: Callable, blocks_J: jax.Array, q_BTNH: jax.Array, num_kv_heads: int, *more_BKJ: jax.Array, at_once: int = 1
) -> jax.Array:
    """Calls attend(block, head, q_GRH, *more) for every block of queries and every KV head of the batch.

      for block in blocks_J:
        for head in range(B * K):
          out[block, head] = attend(block, head, q of this block and this head's group, each `more` at [b, k, block])

    One head at a time keeps a block's scores in a core's cache; `at_once` runs up to that many steps together.
    Returns [B, K, J, ...].
    """
    B, T, N, H = q_BTNH.shape
    J, K = len(blocks_J), num_kv_heads
    q_BKJGRH = q_BTNH.reshape(B, J, T // J, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    step = jnp.arange(J * B * K)
    each = [jnp.moveaxis(x, 2, 0).reshape(J * B * K, *x.shape[3:]) for x in (_as_bits(q_BKJGRH), *more_BKJ)]
    together = next(n for n in range(min(at_once, len(step)), 0, -1) if len(step) % n == 0)

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        block, head, q_GRH, *more = args
        return _as_bits(attend(block, head, _from_bits(q_GRH, q_BTNH.dtype), *more))

    out = lax.map(one, (blocks_J[step // (B * K)], step % (B * K), *each), batch_size=together)
    out = _from_bits(out, q_BTNH.dtype)
    return jnp.moveaxis(out.reshape(J, B, K, *out.shape[1:]), 0, 2)


def _as_bits(x: jax.Array) -> jax.Array:
    """Numbers of two bytes as integers, other arrays as they are, for what a loop takes parts of or puts together.

    XLA's CPU compiler (jaxlib 0.10.2) updates no bfloat16 array in place: each step of a loop would convert all of its
    output to float32 and back, which was more than half of the time of `reuse` at 8,192 tokens.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if jnp.issubdtype(x.dtype, jnp.floating) and x.itemsize == 2 else x


def _from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_as_bits` for an array of this dtype."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _ungroup(out_BKJGRH: jax.Array) -> jax.Array:
    """Heads and blocks back in the order of q_BTNH."""
    B, K, J, G, R, H = out_BKJGRH.shape
    return out_BKJGRH.transpose(0, 2, 4, 1, 3, 5).reshape(B, J * R, K * G, H)


def _fold_causal(
    step: Callable, block: jax.Array, carry: tuple[jax.Array, ...], width: int, window: int | None
) -> tuple[jax.Array, ...]:
    """Applies step(key_block, carry, masked) to every block of `width` keys that query block `block` sees.

    Only the last is masked; under a window all are, and those before it are left out.
    """
    first = 0 if window is None else jnp.maximum(block * width - window + 1, 0) // width
    carry = lax.fori_loop(first, block, lambda key_block, carry: step(key_block, carry, window is not None), carry)
    return step(block, carry, True)
