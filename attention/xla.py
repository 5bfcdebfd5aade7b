"""Dense, anchor and reuse attention in plain JAX, for every device, dtype and size.

All functions take padded inputs and a layout; see `attention`, whose functions they implement. Products of queries and
keys are scaled where they become exponents: 2^((product - the row's largest) * head_dim^-0.5 * log2(e)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attention.sharding import Layout
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

LEAST_TILE = 1  # tokens of which dense attention's blocks are a multiple
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x LOG2_E)
UNSEEN = -1e30  # a masked product: finite, since a window may hide a row's whole first block of keys
KEYS_AT_ONCE = 1024  # gathered keys in one step of reuse: enough to fill the products, few enough for a core's cache


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


# --- Softmax ---

# 2^f = 1 + c1 f + ... + c5 f^5 for f from -1/2 to 1/2, fitted for the least relative error, 1e-7.
EXP2_COEFFICIENTS = (0.69314700, 0.24022242, 0.055507336, 0.0096715130, 0.0013264727)
INTEGERS = 1.5 * 2**23  # where float32 counts in ones


def exp2(x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """2^x for float32 x <= 0, in `dtype`.

    XLA's CPU compiler takes twice the instructions for the power, and as many again to round it to bfloat16: together
    they were half of dense attention.
    """
    own = functools.partial(_cpu_exp2, dtype=dtype)
    return lax.platform_dependent(x, cpu=own, default=lambda x: jnp.exp2(x).astype(dtype))


def _cpu_exp2(x: jax.Array, dtype: Any) -> jax.Array:
    """The fraction's power by a polynomial, and the whole part in the exponent's bits; exactly 0 from -127 down."""
    x = jnp.maximum(x, -127.0)
    whole = jnp.round(x)
    fraction = x - whole
    power = jnp.zeros_like(x)
    for coefficient in reversed(EXP2_COEFFICIENTS):
        power = (power + coefficient) * fraction
    whole_bits = lax.bitcast_convert_type(whole + INTEGERS, jnp.int32)  # end in the whole part; a cast checks its range
    bits = lax.bitcast_convert_type(power + 1, jnp.int32) + (whole_bits << 23)
    if dtype != jnp.bfloat16:
        return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
    return lax.bitcast_convert_type(((bits + 2**15) >> 16).astype(jnp.int16), jnp.bfloat16)


def exponent(products: jax.Array, largest: jax.Array, head_dim: int) -> jax.Array:
    """The base-2 logarithm of softmax's weights before they are normalised."""
    return (products - largest) * (head_dim**-0.5 * LOG2_E)


def _weights(products_RW: jax.Array, largest_R: jax.Array, head_dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Each row's weights in `dtype`, for the product with the values, and their float32 sum."""
    weights_RW = exp2(exponent(products_RW, largest_R[:, None], head_dim), dtype)
    return weights_RW, weights_RW.sum(-1, dtype=jnp.float32)  # of what is written anyway


# --- Dense ---


def dense(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None = None
) -> jax.Array:
    """Online softmax over square blocks on and below the diagonal (Milakov & Gimelshein, arXiv 1805.02867)."""
    B, K, H, S = k_BKHS.shape
    R = layout.block
    k_ZHS, v_ZSH = as_bits(k_BKHS.reshape(B * K, H, S)), as_bits(v_BKSH.reshape(B * K, S, H))

    def attend(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        q_RH = q_GRH.reshape(-1, H)  # the rows of each query head one after another
        row_R = jnp.tile(jnp.arange(R), len(q_GRH))

        def step(key_block, carry, ahead):
            largest_R, total_R, out_RH = carry
            k_HW = from_bits(lax.dynamic_slice(k_ZHS, (head, 0, key_block * R), (1, H, R))[0], k_BKHS.dtype)
            v_WH = from_bits(lax.dynamic_slice(v_ZSH, (head, key_block * R, 0), (1, R, H))[0], v_BKSH.dtype)
            products_RW = matmul("RH,HW->RW", q_RH, k_HW)
            if ahead is not None:
                is_seen = visible(ahead + row_R[:, None], jnp.arange(R)[None], window)
                products_RW = jnp.where(is_seen, products_RW, UNSEEN)
            new_R = jnp.maximum(largest_R, products_RW.max(-1))
            shrink_R = exp2(exponent(largest_R, new_R, H))
            weights_RW, sum_R = _weights(products_RW, new_R, H, v_WH.dtype)
            values_RH = matmul("RW,WH->RH", weights_RW, v_WH)
            return new_R, total_R * shrink_R + sum_R, out_RH * shrink_R[:, None] + values_RH

        empty = (jnp.full(row_R.shape, -jnp.inf), jnp.zeros(row_R.shape), jnp.zeros(q_RH.shape))
        _, total_R, out_RH = _fold_causal(step, block, empty, R, window)
        return (out_RH / total_R[:, None]).reshape(q_GRH.shape).astype(q_GRH.dtype)

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
    """One pass over the keys: sums weights tile by tile under each block's own maximum, rescaled at the end.

    A row is a column here, so that a tile's keys are added up in vectors of rows (on CPUs an eighth faster).
    Returns finish(scores_QP, query_tiles_Q) of every KV head and block, along one axis of query tiles.
    """
    B, K, H, S = k_BKHS.shape
    R, M, Y = layout.block, selection.tile_size, selection.query_tile
    Q, num_tiles = R // Y, tile_count(layout.length, M)  # query tiles of one block, key tiles with real tokens
    k_ZSH = as_bits(k_BKHS.reshape(B * K, H, S).swapaxes(1, 2))
    rows_QR = jnp.arange(Q)[:, None] * Y + selection.scored_rows()[None]  # all of a block's rows, or a sample
    rows_R = rows_QR.reshape(-1)

    def score_block(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        q_GRH = q_GRH if len(rows_R) == R else q_GRH[:, rows_R]
        G = len(q_GRH)
        q_RH = q_GRH.reshape(-1, H)  # rows of each query head one after another
        row_R = jnp.tile(rows_R, G)

        def step(key_block, carry, ahead):
            tops, mass_PR = carry  # of each row: its largest product in every block of keys, its mass in every tile
            k_WH = from_bits(lax.dynamic_slice(k_ZSH, (head, key_block * R, 0), (1, R, H))[0], k_BKHS.dtype)
            products = matmul("WH,RH->WR", k_WH, q_RH)
            if ahead is not None:
                is_seen = visible(ahead + row_R[None], jnp.arange(R)[:, None], selection.window)
                products = jnp.where(is_seen, products, UNSEEN)
            top = products.max(0, keepdims=True)
            mass = exp2(exponent(products, top, H)).reshape(R // M, M, -1).sum(1)
            return (
                lax.dynamic_update_slice_in_dim(tops, top, key_block, 0),
                lax.dynamic_update_slice_in_dim(mass_PR, mass, key_block * (R // M), 0),
            )

        empty = (jnp.full((S // R, len(row_R)), -jnp.inf), jnp.zeros((S // M, len(row_R))))
        tops, mass_PR = _fold_causal(step, block, empty, R, selection.window)
        mass_PR *= jnp.repeat(exp2(exponent(tops, tops.max(0, keepdims=True), H)), R // M, axis=0)
        share_R = jnp.where(block * R + row_R < layout.length, 1 / mass_PR.sum(0), 0)  # rows of padding choose nothing
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
    k_tiles, v_tiles = (as_bits(x.reshape(B * K * P, M * H)) for x in (k_BKHS.swapaxes(2, 3), v_BKSH))
    query_tiles_Q = layout.local_positions()[::Y] // Y
    # Of each chosen tile its index and its first key, computed before the loop: inside, XLA would compute them anew for
    # every number beside them. An unused slot begins behind all rows.
    is_used = tiles_BKQC != NO_TILE
    index_BKQC = jnp.arange(B * K).reshape(B, K, 1, 1) * P + jnp.where(is_used, tiles_BKQC, 0)
    start_BKQC = jnp.where(is_used, tiles_BKQC * M, S)

    def attend(
        query_tile: jax.Array, _: jax.Array, q_GRH: jax.Array, index_C: jax.Array, start_C: jax.Array
    ) -> jax.Array:
        gathered = [x.at[index_C].get(mode="promise_in_bounds") for x in (k_tiles, v_tiles)]

        def attend_to(k_tiles_C: jax.Array, v_tiles_C: jax.Array) -> jax.Array:
            k_WH, v_WH = (from_bits(x.reshape(C * M, H), v_BKSH.dtype) for x in (k_tiles_C, v_tiles_C))
            key_W = (start_C[:, None] + jnp.arange(M)[None]).reshape(-1)
            place_R = jnp.tile(query_tile * Y + jnp.arange(Y), len(q_GRH))  # of each query head one after another
            products_RW = matmul("RH,WH->RW", q_GRH.reshape(-1, H), k_WH)
            products_RW = jnp.where(visible(place_R[:, None], key_W[None], selection.window), products_RW, UNSEEN)
            largest_R = jnp.maximum(products_RW.max(-1), UNSEEN)  # a bare `max` would take a part of `_weights` with it
            weights_RW, total_R = _weights(products_RW, largest_R, H, v_WH.dtype)
            out_RH = matmul("RW,WH->RH", weights_RW, v_WH)
            return (out_RH / total_R[:, None]).reshape(q_GRH.shape).astype(q_GRH.dtype)

        # A branch of its own: without one XLA reshapes while it gathers, and copies number by number, not in vectors.
        is_padding = query_tile >= tile_count(layout.length, Y)
        return lax.cond(is_padding, lambda *_: jnp.zeros_like(q_GRH), attend_to, *gathered)

    at_once = max(KEYS_AT_ONCE // (C * M), 1)
    return _ungroup(_map_heads(attend, query_tiles_Q, q_BTNH, K, index_BKQC, start_BKQC, at_once=at_once))


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
    each = [jnp.moveaxis(x, 2, 0).reshape(J * B * K, *x.shape[3:]) for x in (as_bits(q_BKJGRH), *more_BKJ)]
    together = next(n for n in range(min(at_once, len(step)), 0, -1) if len(step) % n == 0)

    def one(args: tuple[jax.Array, ...]) -> jax.Array:
        block, head, q_GRH, *more = args
        return as_bits(attend(block, head, from_bits(q_GRH, q_BTNH.dtype), *more))

    batch_size = together if together > 1 else None  # a batch of one would have loops inside keep or take each result
    out = lax.map(one, (blocks_J[step // (B * K)], step % (B * K), *each), batch_size=batch_size)
    out = from_bits(out, q_BTNH.dtype)
    return jnp.moveaxis(out.reshape(J, B, K, *out.shape[1:]), 0, 2)


def as_bits(x: jax.Array) -> jax.Array:
    """Numbers of two bytes as integers, other arrays as they are, for what a loop takes parts of or puts together.

    XLA's CPU compiler (jaxlib 0.10.2) updates no bfloat16 array in place: each step of a loop would convert all of its
    output to float32 and back, which was more than half of the time of `reuse` at 8,192 tokens.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if jnp.issubdtype(x.dtype, jnp.floating) and x.itemsize == 2 else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `as_bits` for an array of this dtype."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def _ungroup(out_BKJGRH: jax.Array) -> jax.Array:
    """Heads and blocks back in the order of q_BTNH."""
    B, K, J, G, R, H = out_BKJGRH.shape
    return out_BKJGRH.transpose(0, 2, 4, 1, 3, 5).reshape(B, J * R, K * G, H)


def _fold_causal(
    step: Callable, block: jax.Array, carry: tuple[jax.Array, ...], width: int, window: int | None
) -> tuple[jax.Array, ...]:
    """Applies step(key_block, carry, ahead) to every block of `width` keys that query block `block` sees.

    Under a window those before it are left out. `ahead` is how many tokens after the keys' block the queries' begins,
    or None where every row sees every key. Of a row's own block it is the constant 0: XLA's CPU compiler makes no
    vectors of a mask that reads `block` for each number, and took four times as long for it as for the block's
    exponentials.
    """
    first = 0 if window is None else jnp.maximum(block * width - window + 1, 0) // width

    def earlier(key_block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return step(key_block, carry, None if window is None else (block - key_block) * width)

    return step(block, lax.fori_loop(first, block, earlier, carry), 0)
