"""Dense, anchor and reuse attention, made fast: one public function each, one implementation per backend.

Every function takes q_BTNH, k_BKHS (keys transposed: their product with the queries is several times faster that way
on a CPU) and v_BKSH, all of one dtype, with T = S = the sequence, of any length. Scores, softmax and sums are float32
whatever that dtype is; the output has the dtype of q. Letters as in kascade_core; besides them R is the rows of a
block of queries, W the width of a block of keys, X the query tiles in a block.

`implementation=None` takes the best one for the backend; a name forces it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kascade_core import NO_TILE, select_tiles, tile_count

IMPLEMENTATIONS = ("xla",)
BLOCK = 256  # tokens in a block of queries or of keys, so that a block's scores stay in a core's cache


def dense_attention(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Full causal attention, softmax(q k / sqrt(H)) v. Returns out_BTNH."""
    _check(q_BTNH, k_BKHS, v_BKSH, implementation)
    return _dense_xla(q_BTNH, k_BKHS, v_BKSH)


def choose_tiles(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    *,
    tile_size: int,
    top_k: int,
    sink_tiles: int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """The Top-K key tiles of each KV head and query tile, by attention mass. Returns tiles_BKQC.

    The mass of a key tile is its causal softmax probability (over the whole row, float32), summed over the query
    tile's rows and over the query heads of the group. A query tile's own tile and the first `sink_tiles` of the
    sequence are among the chosen whatever their mass.
    """
    _check(q_BTNH, k_BKHS, None, implementation)
    return _choose_xla(q_BTNH, k_BKHS, tile_size, top_k, sink_tiles)


def reuse_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    *,
    tile_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention to the given tiles only: those are gathered, no other key is touched. Returns out_BTNH."""
    _check(q_BTNH, k_BKHS, v_BKSH, implementation)
    expected = (*k_BKHS.shape[:2], tile_count(q_BTNH.shape[1], tile_size))
    if tiles_BKQC.ndim != 4 or tiles_BKQC.shape[:3] != expected:
        raise ValueError(f"tiles: expected [B, K, Q, C] with B, K, Q = {expected}, got {tiles_BKQC.shape}")
    return _reuse_xla(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, tile_size)


def anchor_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    tile_size: int,
    top_k: int,
    sink_tiles: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses tiles, then attends to them alone. Returns out_BTNH and tiles_BKQC."""
    sizes = {"tile_size": tile_size, "top_k": top_k, "sink_tiles": sink_tiles}
    tiles_BKQC = choose_tiles(q_BTNH, k_BKHS, **sizes, implementation=implementation)
    out_BTNH = reuse_attention(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, tile_size=tile_size, implementation=implementation)
    return out_BTNH, tiles_BKQC


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum with float32 accumulation and result; float32 inputs are not rounded on the way, on any backend."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _check(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array | None, implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(f"attention implementation {implementation!r}: known are {IMPLEMENTATIONS}")
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    if k_BKHS.shape != (B, K, H, T) or N % K:
        raise ValueError(f"keys: expected [{B}, K, {H}, {T}] with K dividing {N} query heads, got {k_BKHS.shape}")
    if v_BKSH is not None and v_BKSH.shape != (B, K, T, H):
        raise ValueError(f"values: expected {(B, K, T, H)}, got {v_BKSH.shape}")


# --- XLA ---


def _group_queries(q_BTNH: jax.Array, num_kv_heads: int, length: int) -> jax.Array:
    """q_BKGTH, its time padded with zeros to `length`."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return _pad(q_BTKGH, 1, length).transpose(0, 2, 3, 1, 4)


def _ungroup(out_BKGTH: jax.Array, length: int) -> jax.Array:
    """The inverse of `_group_queries`."""
    B, K, G, _, H = out_BKGTH.shape
    return out_BKGTH[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(B, length, K * G, H)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _slice(x: jax.Array, axis: int, block: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _fold_causal(step: Callable, block: jax.Array, carry: tuple[jax.Array, ...], R: int) -> tuple[jax.Array, ...]:
    """Folds step(key_block, carry, mask) over the key blocks that query block `block` sees; masks the last alone."""
    carry = lax.fori_loop(0, block, lambda key_block, carry: step(key_block, carry, None), carry)
    return step(block, carry, jnp.tri(R, dtype=bool))


def _scores(q_BKGRH: jax.Array, k_BKHW: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scaled logits, float32, -inf where masked."""
    scores_BKGRW = matmul("BKGRH,BKHW->BKGRW", q_BKGRH, k_BKHW) * q_BKGRH.shape[-1] ** -0.5
    return scores_BKGRW if mask is None else jnp.where(mask, scores_BKGRW, -jnp.inf)


def _dense_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Online softmax over square blocks on and below the diagonal (Milakov & Gimelshein, arXiv 1805.02867)."""
    T, K = q_BTNH.shape[1], k_BKHS.shape[1]
    R = min(BLOCK, T)
    num_blocks = tile_count(T, R)
    q_BKGTH = _group_queries(q_BTNH, K, num_blocks * R)
    k_BKHS, v_BKSH = _pad(k_BKHS, 3, num_blocks * R), _pad(v_BKSH, 2, num_blocks * R)

    def attend(block: jax.Array) -> jax.Array:
        q_BKGRH = _slice(q_BKGTH, 3, block, R)

        def step(key_block, carry, mask):
            top, total, out = carry
            scores = _scores(q_BKGRH, _slice(k_BKHS, 3, key_block, R), mask)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            values = matmul("BKGRW,BKWH->BKGRH", weights.astype(v_BKSH.dtype), _slice(v_BKSH, 2, key_block, R))
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + values

        rows = q_BKGRH.shape[:-1]
        empty = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(q_BKGRH.shape))
        _, total, out = _fold_causal(step, block, empty, R)
        return (out / total[..., None]).astype(q_BTNH.dtype)

    out_BKGTH = _join_blocks(lax.map(attend, jnp.arange(num_blocks)), 3)
    return _ungroup(out_BKGTH, T)


def _join_blocks(blocks: jax.Array, axis: int) -> jax.Array:
    """[blocks, ...] as `lax.map` stacks them, laid end to end along `axis` of one block."""
    moved = jnp.moveaxis(blocks, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _choose_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, M: int, top_k: int, sink_tiles: int) -> jax.Array:
    """One pass over the keys: sums exp(score) tile by tile under each block's own maximum, rescaled at the end."""
    B, T, N, _ = q_BTNH.shape
    K, Q = k_BKHS.shape[1], tile_count(T, M)
    X = max(1, min(BLOCK // M, Q))
    R, num_blocks = X * M, tile_count(Q, X)
    G, P = N // K, num_blocks * X
    q_BKGTH = _group_queries(q_BTNH, K, num_blocks * R)
    k_BKHS = _pad(k_BKHS, 3, num_blocks * R)

    def choose(block: jax.Array) -> jax.Array:
        q_BKGRH = _slice(q_BKGTH, 3, block, R)

        def step(key_block, carry, mask):
            tops_BKGRJ, mass_BKGRP = carry
            scores = _scores(q_BKGRH, _slice(k_BKHS, 3, key_block, R), mask)
            top = scores.max(-1, keepdims=True)
            mass = jnp.exp(scores - top).reshape(B, K, G, R, X, M).sum(-1)
            return (
                lax.dynamic_update_slice_in_dim(tops_BKGRJ, top, key_block, 4),
                lax.dynamic_update_slice_in_dim(mass_BKGRP, mass, key_block * X, 4),
            )

        rows = (B, K, G, R)
        empty = (jnp.full((*rows, num_blocks), -jnp.inf), jnp.zeros((*rows, P)))
        tops_BKGRJ, mass_BKGRP = _fold_causal(step, block, empty, R)
        scale_BKGRJ = jnp.exp(tops_BKGRJ - tops_BKGRJ.max(-1, keepdims=True))
        mass_BKGRP *= jnp.repeat(scale_BKGRJ, X, axis=-1)
        share_BKGRP = mass_BKGRP / mass_BKGRP.sum(-1, keepdims=True)
        real_R1 = (block * R + jnp.arange(R) < T)[:, None]  # rows of padding choose nothing
        share_BKGRP = jnp.where(real_R1, share_BKGRP, 0)
        scores_BKXP = share_BKGRP.reshape(B, K, G, X, M, P).sum((2, 4))[..., :Q]
        return select_tiles(scores_BKXP, top_k, sink_tiles, block * X + jnp.arange(X))

    return _join_blocks(lax.map(choose, jnp.arange(num_blocks)), 2)[:, :, :Q]


def _reuse_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, M: int) -> jax.Array:
    """Gathers the chosen tiles for a block of query tiles at a time and attends to them in one batch of products."""
    B, T, N, H = q_BTNH.shape
    K, Q, C = tiles_BKQC.shape[1:]
    G = N // K
    X = max(1, min(BLOCK // M, Q))
    num_blocks = tile_count(Q, X)
    q_BKGQMH = _group_queries(q_BTNH, K, num_blocks * X * M).reshape(B, K, G, num_blocks * X, M, H)
    k_BKPHM = _pad(k_BKHS, 3, Q * M).reshape(B, K, H, Q, M).transpose(0, 1, 3, 2, 4)
    v_BKPMH = _pad(v_BKSH, 2, Q * M).reshape(B, K, Q, M, H)
    tiles_BKQC = _pad(tiles_BKQC, 2, num_blocks * X)
    later_MM = ~jnp.tri(M, dtype=bool)
    take = jax.vmap(jax.vmap(lambda tiles, chosen: tiles[chosen]))

    def attend(block: jax.Array) -> jax.Array:
        tiles_BKXC = _slice(tiles_BKQC, 2, block, X)
        own_X1 = (block * X + jnp.arange(X))[:, None]
        unused_BKXC = tiles_BKXC == NO_TILE
        chosen_BKXC = jnp.where(unused_BKXC, 0, tiles_BKXC)
        scores = matmul("BKGXMH,BKXCHW->BKGXMCW", _slice(q_BKGQMH, 3, block, X), take(k_BKPHM, chosen_BKXC)) * H**-0.5
        is_own = (tiles_BKXC == own_X1)[:, :, None, :, None, :, None]
        hidden = unused_BKXC[:, :, None, :, None, :, None] | (is_own & later_MM[:, None, :])
        scores = jnp.where(hidden, -jnp.inf, scores)
        weights = jnp.exp(scores - scores.max((-2, -1), keepdims=True))
        total = weights.sum((-2, -1))
        out = matmul("BKGXMCW,BKXCWH->BKGXMH", weights.astype(v_BKSH.dtype), take(v_BKPMH, chosen_BKXC))
        return (out / total[..., None]).astype(q_BTNH.dtype)

    out_BKGQMH = _join_blocks(lax.map(attend, jnp.arange(num_blocks)), 3)
    return _ungroup(out_BKGQMH.reshape(B, K, G, -1, H), T)
