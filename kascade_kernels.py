"""Dense, anchor and reuse attention, made fast: one public function each, one implementation per backend.

Every function takes q_BTNH, k_BKHS (keys transposed: their product with the queries is several times faster that way
on a CPU) and v_BKSH, all of one dtype. Scores, softmax and sums are float32 whatever that dtype is; the output has the
dtype of q. Letters as in kascade_core; besides them R is the rows of a block of queries, W the width of a block of
keys, X the query tiles in a block, J the blocks of one device.

Without a `layout`, T = S = the sequence, of any length. With one, the call stands inside `jax.shard_map`: q and tiles
are this shard's dealt blocks, keys and values the whole padded sequence (see `gather_keys`).

`implementation=None` takes the best one for the backend; a name forces it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kascade_core import AXIS, NO_TILE, Layout, pad_axis, select_tiles, tile_count

IMPLEMENTATIONS = ("xla",)


def dense_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Full causal attention, softmax(q k / sqrt(H)) v. Returns out_BTNH."""
    T = q_BTNH.shape[1]
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, 1, layout, implementation)
    return _dense_xla(q_BTNH, k_BKHS, v_BKSH, layout)[:, :T]


def choose_tiles(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    *,
    tile_size: int,
    top_k: int,
    sink_tiles: int = 0,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The Top-K key tiles of each KV head and query tile, by attention mass. Returns tiles_BKQC.

    The mass of a key tile is its causal softmax probability (over the whole row, float32), summed over the query
    tile's rows and over the query heads of the group. A query tile's own tile and the first `sink_tiles` of the
    sequence are among the chosen whatever their mass.
    """
    Q = tile_count(q_BTNH.shape[1], tile_size)
    layout, q_BTNH, k_BKHS, _ = _prepare(q_BTNH, k_BKHS, None, tile_size, layout, implementation)
    return _choose_xla(q_BTNH, k_BKHS, tile_size, top_k, sink_tiles, layout)[:, :, :Q]


def reuse_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    *,
    tile_size: int,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention to the given tiles only: those are gathered, no other key is touched. Returns out_BTNH."""
    T = q_BTNH.shape[1]
    expected = (*k_BKHS.shape[:2], tile_count(T, tile_size))
    if tiles_BKQC.ndim != 4 or tiles_BKQC.shape[:3] != expected:
        raise ValueError(f"tiles: expected [B, K, Q, C] with B, K, Q = {expected}, got {tiles_BKQC.shape}")
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, tile_size, layout, implementation)
    tiles_BKQC = pad_axis(tiles_BKQC, 2, q_BTNH.shape[1] // tile_size)
    return _reuse_xla(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, tile_size, layout)[:, :T]


def anchor_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    tile_size: int,
    top_k: int,
    sink_tiles: int = 0,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses tiles, then attends to them alone. Returns out_BTNH and tiles_BKQC."""
    where = {"tile_size": tile_size, "layout": layout, "implementation": implementation}
    tiles_BKQC = choose_tiles(q_BTNH, k_BKHS, top_k=top_k, sink_tiles=sink_tiles, **where)
    return reuse_attention(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, **where), tiles_BKQC


def gather_keys(x: jax.Array, axis: int, layout: Layout) -> jax.Array:
    """Keys or values of all shards, in the order of the sequence, along the time axis of this shard's own."""
    if layout.num_shards == 1:
        return x
    return layout.collect(lax.all_gather(x, AXIS, axis=axis, tiled=True), axis)


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and result; float32 inputs are not rounded on the way, on any backend."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _prepare(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array | None,
    tile_size: int,
    layout: Layout | None,
    implementation: str | None,
) -> tuple[Layout, jax.Array, jax.Array, jax.Array | None]:
    """Checks the shapes; where no layout was given, makes one and pads to it."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise NotImplementedError(f"attention implementation {implementation!r}: known are {IMPLEMENTATIONS}")
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], layout.padded if layout else T
    if k_BKHS.shape != (B, K, H, S) or N % K:
        raise ValueError(f"keys: expected [{B}, K, {H}, {S}] with K dividing {N} query heads, got {k_BKHS.shape}")
    if v_BKSH is not None and v_BKSH.shape != (B, K, S, H):
        raise ValueError(f"values: expected {(B, K, S, H)}, got {v_BKSH.shape}")
    if layout:
        return layout, q_BTNH, k_BKHS, v_BKSH
    layout = Layout.of(T, tile_size)
    v_BKSH = None if v_BKSH is None else pad_axis(v_BKSH, 2, layout.padded)
    return layout, pad_axis(q_BTNH, 1, layout.padded), pad_axis(k_BKHS, 3, layout.padded), v_BKSH


# --- XLA ---


def _group_queries(q_BTNH: jax.Array, num_kv_heads: int, num_blocks: int) -> jax.Array:
    """q_JBKGRH: J blocks of R rows, for `lax.map` to go through."""
    B, T, N, H = q_BTNH.shape
    q_BJRKGH = q_BTNH.reshape(B, num_blocks, T // num_blocks, num_kv_heads, N // num_kv_heads, H)
    return q_BJRKGH.transpose(1, 0, 3, 4, 2, 5)


def _ungroup(out_JBKGRH: jax.Array) -> jax.Array:
    """The inverse of `_group_queries`."""
    J, B, K, G, R, H = out_JBKGRH.shape
    return out_JBKGRH.transpose(1, 0, 4, 2, 3, 5).reshape(B, J * R, K * G, H)


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


def _dense_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout) -> jax.Array:
    """Online softmax over square blocks on and below the diagonal (Milakov & Gimelshein, arXiv 1805.02867)."""
    R, blocks_J = layout.block, layout.local_blocks()

    def attend(block_and_queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        block, q_BKGRH = block_and_queries

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

    q_JBKGRH = _group_queries(q_BTNH, k_BKHS.shape[1], len(blocks_J))
    return _ungroup(lax.map(attend, (blocks_J, q_JBKGRH)))


def _choose_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, M: int, top_k: int, sink_tiles: int, layout: Layout) -> jax.Array:
    """One pass over the keys: sums exp(score) tile by tile under each block's own maximum, rescaled at the end."""
    R, blocks_J, num_tiles = layout.block, layout.local_blocks(), tile_count(layout.length, M)
    X, P = R // M, layout.padded // M

    def choose(block_and_queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        block, q_BKGRH = block_and_queries
        rows = q_BKGRH.shape[:-1]

        def step(key_block, carry, mask):
            tops_BKGRW, mass_BKGRP = carry
            scores = _scores(q_BKGRH, _slice(k_BKHS, 3, key_block, R), mask)
            top = scores.max(-1, keepdims=True)
            mass = jnp.exp(scores - top).reshape(*rows, X, M).sum(-1)
            return (
                lax.dynamic_update_slice_in_dim(tops_BKGRW, top, key_block, 4),
                lax.dynamic_update_slice_in_dim(mass_BKGRP, mass, key_block * X, 4),
            )

        empty = (jnp.full((*rows, layout.num_blocks), -jnp.inf), jnp.zeros((*rows, P)))
        tops_BKGRW, mass_BKGRP = _fold_causal(step, block, empty, R)
        scale_BKGRW = jnp.exp(tops_BKGRW - tops_BKGRW.max(-1, keepdims=True))
        mass_BKGRP *= jnp.repeat(scale_BKGRW, X, axis=-1)
        share_BKGRP = mass_BKGRP / mass_BKGRP.sum(-1, keepdims=True)
        real_R1 = (block * R + jnp.arange(R) < layout.length)[:, None]  # rows of padding choose nothing
        share_BKGRP = jnp.where(real_R1, share_BKGRP, 0)
        scores_BKXP = share_BKGRP.reshape(*rows[:-1], X, M, P).sum((2, 4))[..., :num_tiles]
        return select_tiles(scores_BKXP, top_k, sink_tiles, block * X + jnp.arange(X))

    tiles_JBKXC = lax.map(choose, (blocks_J, _group_queries(q_BTNH, k_BKHS.shape[1], len(blocks_J))))
    J, B, K, _, C = tiles_JBKXC.shape
    return tiles_JBKXC.transpose(1, 2, 0, 3, 4).reshape(B, K, J * X, C)


def _reuse_xla(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, M: int, layout: Layout
) -> jax.Array:
    """Gathers the chosen tiles for a block of query tiles at a time and attends to them in one batch of products."""
    B, K, H, S = k_BKHS.shape
    C, X, blocks_J = tiles_BKQC.shape[-1], layout.block // M, layout.local_blocks()
    J = len(blocks_J)
    q_JBKGXMH = _group_queries(q_BTNH, K, J).reshape(J, B, K, -1, X, M, H)
    tiles_JBKXC = tiles_BKQC.reshape(B, K, J, X, C).transpose(2, 0, 1, 3, 4)
    k_BKPHM = k_BKHS.reshape(B, K, H, S // M, M).transpose(0, 1, 3, 2, 4)
    v_BKPMH = v_BKSH.reshape(B, K, S // M, M, H)
    later_MM = ~jnp.tri(M, dtype=bool)
    take = jax.vmap(jax.vmap(lambda tiles, chosen: tiles[chosen]))

    def attend(block_queries_tiles: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        block, q_BKGXMH, tiles_BKXC = block_queries_tiles
        own_X1 = (block * X + jnp.arange(X))[:, None]
        unused_BKXC = tiles_BKXC == NO_TILE
        chosen_BKXC = jnp.where(unused_BKXC, 0, tiles_BKXC)
        scores = matmul("BKGXMH,BKXCHW->BKGXMCW", q_BKGXMH, take(k_BKPHM, chosen_BKXC)) * H**-0.5
        is_own = (tiles_BKXC == own_X1)[:, :, None, :, None, :, None]
        hidden = unused_BKXC[:, :, None, :, None, :, None] | (is_own & later_MM[:, None, :])
        scores = jnp.where(hidden, -jnp.inf, scores)
        weights = jnp.exp(scores - scores.max((-2, -1), keepdims=True))
        total = weights.sum((-2, -1))
        out = matmul("BKGXMCW,BKXCWH->BKGXMH", weights.astype(v_BKSH.dtype), take(v_BKPMH, chosen_BKXC))
        return (out / total[..., None]).astype(q_BTNH.dtype)

    out_JBKGXMH = lax.map(attend, (blocks_J, q_JBKGXMH, tiles_JBKXC))
    return _ungroup(out_JBKGXMH.reshape(*out_JBKGXMH.shape[:4], X * M, H))
