"""Dense, anchor and reuse attention: one public function each, dispatched to the kernel that is asked for.

`kernel` is a name of KERNELS, and None means "xla":
  "xla"         runs everywhere and takes every size
  "pallas_tpu"  key tiles of 8, 16, 32 or 64 tokens while a head's keys fit into vector memory, or of a multiple of 128
  "pallas_gpu"  key tiles of 16 to 128 tokens, heads of width 64 or 128, bfloat16 and float16
`check` says whether a kernel takes some sizes. Away from their device the two last are interpreted: correct, and slow.

Every function takes q_BTNH, k_BKHS (keys transposed: on a CPU their product with the queries is several times faster
that way) and v_BKSH, all of one dtype. Scores, softmax and sums are float32 for every dtype; the output has the
dtype of q. Letters, and the order in which tiles travel, as in kascade_core.

Without a `layout`, T = S = the sequence, of any length. With one, the call stands inside `jax.shard_map` or pads its
own inputs: q and tiles are the calling shard's blocks, keys and values the whole padded sequence (see
`attention.sharding`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention import gpu, tpu, xla
from attention.sharding import Layout, pad_axis
from errors import UnsupportedError, quote
from kascade_core import Selection, cut_tiles, tile_count

KERNELS = {"xla": xla, "pallas_tpu": tpu, "pallas_gpu": gpu}


def check(
    kernel: str | None,
    selection: Selection,
    length: int,
    head_dim: int | None,
    dtype: Any,
    capability: str | None = None,
    slots: int | None = None,
) -> None:
    """Checks that a kernel takes these sizes.

    Args:
      kernel: a name of KERNELS.
      selection: how anchors choose.
      length: tokens.
      head_dim: width of a head; None if it is not known yet.
      dtype: of queries, keys and values.
      capability: the GPU's compute capability, like "9.0"; None if it is not known.
      slots: the largest of the budgets that a schedule gives to KV heads; None is the selection's own number of tiles.

    Raises:
      UnsupportedError: it does not; the message names sizes that it takes.
    """
    _module(kernel).check(selection, length, head_dim, dtype, capability, slots)


def dense(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    window: int | None = None,
    layout: Layout | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """Causal attention, softmax(q k / sqrt(H)) v, to all keys or to those in a sliding window. Returns out_BTNH."""
    T, module = q_BTNH.shape[1], _module(kernel)
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, module.LEAST_TILE, layout)
    return module.dense(q_BTNH, k_BKHS, v_BKSH, layout, window)[:, :T]


def choose(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    *,
    selection: Selection,
    layout: Layout | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """The Top-K key tiles of each KV head and query tile, by attention mass. Returns tiles_BKQC, best first.

    The mass of a key tile is its causal softmax probability (over the whole row, float32), summed over the query
    tile's rows (all, or a sample: `selection.scored_rows`) and over the KV head's query heads.
    """
    Q = tile_count(q_BTNH.shape[1], selection.query_tile)
    layout, q_BTNH, k_BKHS, _ = _prepare(q_BTNH, k_BKHS, None, selection.block, layout)
    return _module(kernel).choose(q_BTNH, k_BKHS, selection, layout)[:, :, :Q]


def score(q_BTNH: jax.Array, k_BKHS: jax.Array, *, selection: Selection, layout: Layout | None = None) -> jax.Array:
    """The masses that `choose` chooses by, float32 scores_BKQP: Q x P numbers, so for short sequences only."""
    Q = tile_count(q_BTNH.shape[1], selection.query_tile)
    layout, q_BTNH, k_BKHS, _ = _prepare(q_BTNH, k_BKHS, None, selection.block, layout)
    return xla.score(q_BTNH, k_BKHS, selection, layout)[:, :, :Q]


def reuse(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    *,
    selection: Selection,
    budgets: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """Causal attention to the given tiles only: those are gathered, and no other key is read. Returns out_BTNH.

    Of `selection` it needs tile_size, query_tile and window. With `budgets`, KV head k uses only its first budgets[k]
    tiles.
    """
    T, module = q_BTNH.shape[1], _module(kernel)
    expected = (*k_BKHS.shape[:2], tile_count(T, selection.query_tile))
    if tiles_BKQC.ndim != 4 or tiles_BKQC.shape[:3] != expected:
        raise ValueError(f"tiles: expected [B, K, Q, C] with B, K, Q = {expected}, got {tiles_BKQC.shape}")
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, selection.block, layout)
    tiles_BKQC = pad_axis(tiles_BKQC, 2, q_BTNH.shape[1] // selection.query_tile)

    def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array) -> jax.Array:
        ascending_BKQC = jnp.sort(tiles_BKQC, axis=-1)  # as the kernels need it: own tiles last, then unused slots
        return module.reuse(q_BTNH, k_BKHS, v_BKSH, ascending_BKQC, selection, layout)

    if budgets is None:
        return attend(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC)[:, :T]
    return _by_budget(attend, q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, budgets)[:, :T]


def anchor(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    selection: Selection,
    layout: Layout | None = None,
    kernel: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses tiles, then attends to them alone. Returns out_BTNH and tiles_BKQC, best first."""
    options = {"selection": selection, "layout": layout, "kernel": kernel}
    tiles_BKQC = choose(q_BTNH, k_BKHS, **options)
    return reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, **options), tiles_BKQC


def _module(kernel: str | None) -> Any:
    if kernel not in (None, *KERNELS):
        raise UnsupportedError(f"attention kernel {quote(kernel)}: expected one of {', '.join(KERNELS)}")
    return KERNELS[kernel or "xla"]


def _prepare(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array | None, least_block: int, layout: Layout | None
) -> tuple[Layout, jax.Array, jax.Array, jax.Array | None]:
    """Checks the shapes; without a layout, makes one of multiples of `least_block` and pads to it."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKHS.shape[1], layout.padded if layout else T
    if k_BKHS.shape != (B, K, H, S) or N % K:
        raise ValueError(f"keys: expected [{B}, K, {H}, {S}] with K dividing {N} query heads, got {k_BKHS.shape}")
    if v_BKSH is not None and v_BKSH.shape != (B, K, S, H):
        raise ValueError(f"values: expected {(B, K, S, H)}, got {v_BKSH.shape}")
    if layout:
        return layout, q_BTNH, k_BKHS, v_BKSH
    layout = Layout.of(T, least_block)
    v_BKSH = None if v_BKSH is None else pad_axis(v_BKSH, 2, layout.padded)
    return layout, pad_axis(q_BTNH, 1, layout.padded), pad_axis(k_BKHS, 3, layout.padded), v_BKSH


def _by_budget(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    budgets: tuple[int, ...],
) -> jax.Array:
    """One call for the KV heads of each budget, so that none computes with another's larger number of slots."""
    B, T, N, H = q_BTNH.shape
    K = len(budgets)
    q_BTKGH, out_BTKGH = q_BTNH.reshape(B, T, K, N // K, H), [None] * K
    for budget in sorted(set(budgets)):
        heads = [head for head in range(K) if budgets[head] == budget]
        index = jnp.array(heads)
        tiles = cut_tiles(tiles_BKQC[:, index], [budget] * len(heads))
        out = attend(q_BTKGH[:, :, index].reshape(B, T, -1, H), k_BKHS[:, index], v_BKSH[:, index], tiles)
        out = out.reshape(B, T, len(heads), N // K, H)
        for i, head in enumerate(heads):
            out_BTKGH[head] = out[:, :, i]
    return jnp.stack(out_BTKGH, axis=2).reshape(B, T, N, H)
