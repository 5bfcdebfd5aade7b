"""One new token a sequence: dense, anchor and reuse attention of a single row per query head over a cache of keys.

A step takes q_BNH of the new tokens, the caches k_BKSH and v_BKSH, which hold them already, and positions_B, the place
of each new token: keys at 0 to positions_B are attended to, whatever lies behind them. A query tile is one row here, so
no row helps to choose for another; otherwise tiles are chosen as in prefill. Scores, softmax and sums are float32, the
output too. Letters as in kascade_core.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attention.xla import matmul
from kascade_core import EXACT, NO_TILE, Selection, select_tiles


def step_selection(selection: Selection) -> Selection:
    """The selection of a step: a query tile of one row, all of whose attention is seen."""
    return dataclasses.replace(selection, query_tile=1, anchor_scoring=EXACT)


def dense_step(q_BNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Attention to every key up to the new token's own. Returns out_BNH, float32."""
    weights_BKGS, total_BKG1 = _weigh(_causal_scores(q_BNH, k_BKSH, positions_B))
    out_BKGH = matmul("BKGS,BKSH->BKGH", weights_BKGS.astype(v_BKSH.dtype), v_BKSH) / total_BKG1
    return out_BKGH.reshape(q_BNH.shape)


def choose_step(
    q_BNH: jax.Array, k_BKSH: jax.Array, positions_B: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    """An anchor's choice: the tiles with the most attention mass of the new token's row, pooled over a KV head's rows.

    Returns:
      tiles_BK1C, as `kascade_core.select_tiles` with one query tile, and the scaled, causal scores_BKGS, from which
      `anchor_step` attends without reading a key twice.
    """
    B, K, S, _ = k_BKSH.shape
    M = selection.tile_size
    scores_BKGS = _causal_scores(q_BNH, k_BKSH, positions_B)
    weights_BKGS, total_BKG1 = _weigh(scores_BKGS)
    mass_BKGP = weights_BKGS.reshape(*weights_BKGS.shape[:3], S // M, M).sum(-1) / total_BKG1
    rule = step_selection(selection)
    tiles_BK1C = jax.vmap(lambda mass_K1P, position: select_tiles(mass_K1P, rule, position[None]))(
        mass_BKGP.sum(2)[:, :, None], positions_B
    )
    return tiles_BK1C, scores_BKGS


def anchor_step(scores_BKGS: jax.Array, v_BKSH: jax.Array, tiles_BK1C: jax.Array, selection: Selection) -> jax.Array:
    """Attention to an anchor's own tiles, from the scores that chose them. Returns out_BNH, float32."""
    B, K, G, S = scores_BKGS.shape
    M = selection.tile_size
    places_BKC, used_BKC = _places(tiles_BK1C)
    scores_BKGPM = scores_BKGS.reshape(B, K, G, S // M, M)
    chosen = jnp.take_along_axis(scores_BKGPM, places_BKC[:, :, None, :, None], axis=3)
    chosen = jnp.where(used_BKC[:, :, None, :, None], chosen, -jnp.inf).reshape(B, K, G, -1)
    return _attend(chosen, _gather(v_BKSH, places_BKC, M))


def reuse_step(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
) -> jax.Array:
    """Attention to the given tiles alone: no other key or value is read. Returns out_BNH, float32."""
    B, K, M = *k_BKSH.shape[:2], selection.tile_size
    places_BKC, used_BKC = _places(tiles_BK1C)
    q_BKGH = q_BNH.reshape(B, K, -1, q_BNH.shape[-1])
    scores = _scores(q_BKGH, _gather(k_BKSH, places_BKC, M))
    key_BKCM = places_BKC[..., None] * M + jnp.arange(M)
    seen = used_BKC[..., None] & (key_BKCM <= positions_B[:, None, None, None])
    scores = jnp.where(seen.reshape(B, K, 1, -1), scores, -jnp.inf)
    return _attend(scores, _gather(v_BKSH, places_BKC, M))


def _scores(q_BKGH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return matmul("BKGH,BKSH->BKGS", q_BKGH.astype(k_BKSH.dtype), k_BKSH) * q_BKGH.shape[-1] ** -0.5


def _causal_scores(q_BNH: jax.Array, k_BKSH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Scaled scores_BKGS, float32; those of keys after the new token are -inf."""
    B, K, S, H = k_BKSH.shape
    scores_BKGS = _scores(q_BNH.reshape(B, K, -1, H), k_BKSH)
    return jnp.where(jnp.arange(S) <= positions_B[:, None, None, None], scores_BKGS, -jnp.inf)


def _weigh(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(score - largest) of each row, and their sum; every row sees its own key, so none is empty."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _places(tiles_BK1C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of tiles that may be read, and which count: an unused slot names the first tile, which is the own one."""
    tiles_BKC = tiles_BK1C[:, :, 0]
    used_BKC = tiles_BKC != NO_TILE
    return jnp.where(used_BKC, tiles_BKC, tiles_BKC[..., :1]), used_BKC


def _gather(x_BKSH: jax.Array, places_BKC: jax.Array, tile_size: int) -> jax.Array:
    """The named tiles' rows, [B, K, C M, H]."""
    B, K, S, H = x_BKSH.shape
    tiles = x_BKSH.reshape(B * K * (S // tile_size), tile_size * H)  # a tile is one piece
    first_BK1 = jnp.arange(B * K).reshape(B, K, 1) * (S // tile_size)
    rows = tiles.at[first_BK1 + places_BKC].get(mode="promise_in_bounds")
    return rows.reshape(B, K, -1, H)


def _attend(scores: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    weights_BKGS, total_BKG1 = _weigh(scores)
    out_BKGH = matmul("BKGS,BKSH->BKGH", weights_BKGS.astype(v_BKSH.dtype), v_BKSH) / total_BKG1
    return out_BKGH.reshape(out_BKGH.shape[0], -1, out_BKGH.shape[-1])
