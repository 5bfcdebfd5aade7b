"""Dense, anchor and reuse attention, made fast: one public function each, one implementation per backend.

Every function takes q_BTNH, k_BKHS (keys transposed: their product with the queries is several times faster that way
on a CPU) and v_BKSH, all of one dtype. Scores, softmax and sums are float32 whatever that dtype is; the output has the
dtype of q. Letters as in kascade_core; besides them R is the rows of a block of queries, W the width of a block of
keys, X the query tiles in a block, J the blocks of one device.

Without a `layout`, T = S = the sequence, of any length. With one, the call stands inside `jax.shard_map`: q and tiles
are this shard's dealt blocks, keys and values the whole padded sequence (see `gather_keys`).

`implementation` is "xla", which runs everywhere and is what None means, "pallas_tpu", for tiles of 128 tokens and more
(see kascade_pallas_tpu), or "pallas_gpu", for tiles of 16 to 128 tokens, heads of width 64 or 128, bfloat16 and float16
(see kascade_pallas_gpu). What one of them does not take it refuses with NotImplementedError.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import kascade_pallas_gpu
import kascade_pallas_tpu
from kascade_core import NO_TILE, Selection, compile_ahead, cut_tiles, select_tiles
from kascade_layout import AXIS, Layout, pad_axis, tile_count

PALLAS = {"pallas_tpu": kascade_pallas_tpu, "pallas_gpu": kascade_pallas_gpu}
IMPLEMENTATIONS = ("xla", *PALLAS)


def dense_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Full causal attention, softmax(q k / sqrt(H)) v. Returns out_BTNH."""
    T, block = q_BTNH.shape[1], PALLAS[implementation].LEAST_TILE if implementation in PALLAS else 1
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, block, layout, implementation)
    dense = PALLAS[implementation].dense if implementation in PALLAS else _dense_xla
    return dense(q_BTNH, k_BKHS, v_BKSH, layout)[:, :T]


def choose_tiles(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    *,
    selection: Selection,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The Top-K key tiles of each KV head and query tile, by attention mass. Returns tiles_BKQC.

    The mass of a key tile is its causal softmax probability (over the whole row, float32), summed over the query
    tile's rows and over the query heads of the group. A query tile's own tile and the first `sink_tiles` of the
    sequence are among the chosen whatever their mass.
    """
    Q = tile_count(q_BTNH.shape[1], selection.query_tile)
    layout, q_BTNH, k_BKHS, _ = _prepare(q_BTNH, k_BKHS, None, selection.block, layout, implementation)
    choose = PALLAS[implementation].choose if implementation in PALLAS else _choose_xla
    return choose(q_BTNH, k_BKHS, selection, layout)[:, :, :Q]


def score_tiles(
    q_BTNH: jax.Array, k_BKHS: jax.Array, *, selection: Selection, layout: Layout | None = None
) -> jax.Array:
    """The masses that `choose_tiles` chooses by, float32 scores_BKQP: Q x P numbers, so for short sequences only."""
    Q = tile_count(q_BTNH.shape[1], selection.query_tile)
    layout, q_BTNH, k_BKHS, _ = _prepare(q_BTNH, k_BKHS, None, selection.block, layout, None)
    return _score_xla(q_BTNH, k_BKHS, selection, layout, lambda scores_XP, _: scores_XP)[:, :, :Q]


def reuse_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    tiles_BKQC: jax.Array,
    *,
    selection: Selection,
    budgets: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention to the given tiles only: those are gathered, no other key is touched. Returns out_BTNH.

    With `budgets`, a number for each KV head, each attends to the first so many of its tiles, which are best first.
    """
    T, query_tile = q_BTNH.shape[1], selection.query_tile
    expected = (*k_BKHS.shape[:2], tile_count(T, query_tile))
    if tiles_BKQC.ndim != 4 or tiles_BKQC.shape[:3] != expected:
        raise ValueError(f"tiles: expected [B, K, Q, C] with B, K, Q = {expected}, got {tiles_BKQC.shape}")
    layout, q_BTNH, k_BKHS, v_BKSH = _prepare(q_BTNH, k_BKHS, v_BKSH, selection.block, layout, implementation)
    tiles_BKQC = pad_axis(tiles_BKQC, 2, q_BTNH.shape[1] // query_tile)
    reuse = PALLAS[implementation].reuse if implementation in PALLAS else _reuse_xla
    attend = partial(reuse, selection=selection, layout=layout)
    if budgets is None:
        return attend(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC)[:, :T]
    return _by_budget(attend, q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, budgets)[:, :T]


def _by_budget(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    ranked_BKQC: jax.Array,
    budgets: Sequence[int],
) -> jax.Array:
    """KV heads of one budget together, so that none pays for another's tiles."""
    B, T, N, H = q_BTNH.shape
    K = len(budgets)
    q_BTKGH, out_BTKGH = q_BTNH.reshape(B, T, K, N // K, H), [None] * K
    for budget in sorted(set(budgets)):
        heads = [head for head in range(K) if budgets[head] == budget]
        at = jnp.array(heads)
        tiles = cut_tiles(ranked_BKQC[:, at], [budget] * len(heads))
        out = attend(q_BTKGH[:, :, at].reshape(B, T, -1, H), k_BKHS[:, at], v_BKSH[:, at], tiles)
        out = out.reshape(B, T, len(heads), N // K, H)
        for place, head in enumerate(heads):
            out_BTKGH[head] = out[:, :, place]
    return jnp.stack(out_BTKGH, axis=2).reshape(B, T, N, H)


def anchor_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    *,
    selection: Selection,
    layout: Layout | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses tiles, then attends to them alone. Returns out_BTNH and tiles_BKQC."""
    where = {"selection": selection, "layout": layout, "implementation": implementation}
    tiles_BKQC = choose_tiles(q_BTNH, k_BKHS, **where)
    return reuse_attention(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, **where), tiles_BKQC


def gather_keys(x: jax.Array, axis: int, layout: Layout) -> jax.Array:
    """Keys or values of all shards, in the order of the sequence, along the time axis of this shard's own."""
    if layout.num_shards == 1:
        return x
    return layout.collect(lax.all_gather(x, AXIS, axis=axis, tiled=True), axis)


def compile_attention(
    heads: tuple[int, int, int], length: int, selection: Selection, dtype: Any, mesh: Mesh, kernel: str | None = None
) -> dict[str, Callable[[], Any]]:
    """Attention alone, ready to be timed: "dense", "selection" (an anchor's scoring and Top-K), "anchor", "reuse".

    Args:
      heads: (N, K, H) of a layer.
      length: tokens; queries, keys and values are random, and the reuse layer's tiles are the anchor's.
      selection: how the anchor chooses.
      dtype: of queries, keys and values.
      mesh: whose devices share the work, as in a forward.
      kernel: the implementation.
    """
    (N, K, H), rng = heads, np.random.default_rng(0)
    layout = Layout.of(length, selection.block, mesh.shape[AXIS])
    rows, tiles, whole = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS), PartitionSpec()
    where = {"layout": layout, "selection": selection, "implementation": kernel}

    def place(shape: tuple[int, ...], spec: PartitionSpec) -> jax.Array:
        return jax.device_put(rng.standard_normal(shape, np.float32).astype(dtype), NamedSharding(mesh, spec))

    def ready(function: Callable[..., Any], args: Sequence[jax.Array], specs: Any, out: Any) -> Callable[[], Any]:
        sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return partial(compile_ahead(sharded, args, mesh), *args)

    keys, values = (1, K, H, layout.padded), (1, K, layout.padded, H)
    qkv = place((1, layout.padded, N, H), rows), place(keys, whole), place(values, whole)
    specs = (rows, whole, whole)
    selecting = ready(partial(choose_tiles, **where), qkv[:2], specs[:2], tiles)
    return {
        "dense": ready(partial(dense_attention, layout=layout, implementation=kernel), qkv, specs, rows),
        "selection": selecting,
        "anchor": ready(partial(anchor_attention, **where), qkv, specs, (rows, tiles)),
        "reuse": ready(partial(reuse_attention, **where), (*qkv, selecting()), (*specs, tiles), rows),
    }


def time_interleaved(forwards: Mapping[str, Callable[[], Any]], n_runs: int) -> dict[str, list[float]]:
    """Milliseconds of `n_runs` runs of each, in turn, each waited for, after one warm-up that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in forwards}
    for i in tqdm(range(n_runs + 1), desc="timing", unit="round", disable=None, leave=False):
        for name, forward in forwards.items():
            start = time.perf_counter()
            jax.block_until_ready(forward())
            if i:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum with float32 accumulation and result; float32 inputs are not rounded on the way, on any backend."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _prepare(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array | None,
    block: int,
    layout: Layout | None,
    implementation: str | None,
) -> tuple[Layout, jax.Array, jax.Array, jax.Array | None]:
    """Checks the shapes; where no layout was given, makes one of multiples of `block` and pads to it."""
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
    layout = Layout.of(T, block)
    v_BKSH = None if v_BKSH is None else pad_axis(v_BKSH, 2, layout.padded)
    return layout, pad_axis(q_BTNH, 1, layout.padded), pad_axis(k_BKHS, 3, layout.padded), v_BKSH


# --- XLA ---

KEYS_AT_ONCE = 1024  # gathered keys in one step of reuse: enough to fill the products, few enough for a core's cache


def _map_heads(
    attend: Callable, blocks_J: jax.Array, q_BTNH: jax.Array, num_kv_heads: int, *more_BKJ: jax.Array, at_once: int = 1
) -> jax.Array:
    """attend(block, head, q_GRH, *more) for every block of queries and KV head of the batch; returns [B, K, J, ...].

    Heads one after the other keep a block's scores in a core's cache, and every product a plain matrix product. `head`
    counts through the batch: B K. `at_once` runs up to so many together.
    """
    B, T, N, H = q_BTNH.shape
    J, K = len(blocks_J), num_kv_heads
    q_BKJGRH = q_BTNH.reshape(B, J, T // J, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    step = jnp.arange(J * B * K)
    each = [jnp.moveaxis(x, 2, 0).reshape(J * B * K, *x.shape[3:]) for x in (q_BKJGRH, *more_BKJ)]
    together = next(n for n in range(min(at_once, len(step)), 0, -1) if len(step) % n == 0)
    out = lax.map(lambda args: attend(*args), (blocks_J[step // (B * K)], step % (B * K), *each), batch_size=together)
    return jnp.moveaxis(out.reshape(J, B, K, *out.shape[1:]), 0, 2)


def _ungroup(out_BKJGRH: jax.Array) -> jax.Array:
    """Heads and blocks back in their places: out_BTNH."""
    B, K, J, G, R, H = out_BKJGRH.shape
    return out_BKJGRH.transpose(0, 2, 4, 1, 3, 5).reshape(B, J * R, K * G, H)


def _fold_causal(step: Callable, block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Folds step(key_block, carry, masked) over the key blocks that query block `block` sees; masks the last alone."""
    carry = lax.fori_loop(0, block, lambda key_block, carry: step(key_block, carry, False), carry)
    return step(block, carry, True)


def _block_scores(q_GRH: jax.Array, k_XHS: jax.Array, head: jax.Array, key_block: jax.Array, width: int) -> jax.Array:
    """Scaled logits of one head's queries with one block of its keys, float32."""
    k_HW = lax.dynamic_slice(k_XHS, (head, 0, key_block * width), (1, k_XHS.shape[1], width))[0]
    return matmul("GRH,HW->GRW", q_GRH, k_HW) * q_GRH.shape[-1] ** -0.5


def _dense_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout) -> jax.Array:
    """Online softmax over square blocks on and below the diagonal (Milakov & Gimelshein, arXiv 1805.02867)."""
    B, K, H, S = k_BKHS.shape
    R = layout.block
    k_XHS, v_XSH = k_BKHS.reshape(B * K, H, S), v_BKSH.reshape(B * K, S, H)

    def attend(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        def step(key_block, carry, masked):
            top, total, out = carry
            scores = _block_scores(q_GRH, k_XHS, head, key_block, R)
            scores = jnp.where(jnp.tri(R, dtype=bool), scores, -jnp.inf) if masked else scores
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v_WH = lax.dynamic_slice(v_XSH, (head, key_block * R, 0), (1, R, H))[0]
            values = matmul("GRW,WH->GRH", weights.astype(v_WH.dtype), v_WH)
            return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + values

        empty = (jnp.full(q_GRH.shape[:-1], -jnp.inf), jnp.zeros(q_GRH.shape[:-1]), jnp.zeros(q_GRH.shape))
        _, total, out = _fold_causal(step, block, empty)
        return (out / total[..., None]).astype(q_GRH.dtype)

    return _ungroup(_map_heads(attend, layout.local_blocks(), q_BTNH, K))


def _choose_xla(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    def choose(scores_XP: jax.Array, query_tiles_X: jax.Array) -> jax.Array:
        return select_tiles(scores_XP, selection, query_tiles_X)

    return _score_xla(q_BTNH, k_BKHS, selection, layout, choose)


def _score_xla(
    q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout, finish: Callable
) -> jax.Array:
    """One pass over the keys: sums exp(score) tile by tile under each block's own maximum, rescaled at the end.

    Returns finish(scores_XP, query_tiles_X) of every block and KV head, along one axis of query tiles.
    """
    B, K, H, S = k_BKHS.shape
    R, M, Y = layout.block, selection.tile_size, selection.query_tile
    X, num_tiles = R // Y, tile_count(layout.length, M)
    k_XHS = k_BKHS.reshape(B * K, H, S)
    rows_R = (jnp.arange(X)[:, None] * Y + selection.scored_rows()).reshape(-1)  # all of a block's rows, or a sample

    def score(block: jax.Array, head: jax.Array, q_GRH: jax.Array) -> jax.Array:
        q_GRH = q_GRH if len(rows_R) == R else q_GRH[:, rows_R]

        def step(key_block, carry, masked):
            tops_GRW, mass_GRP = carry
            scores = _block_scores(q_GRH, k_XHS, head, key_block, R)
            scores = jnp.where(jnp.arange(R) <= rows_R[:, None], scores, -jnp.inf) if masked else scores
            top = scores.max(-1, keepdims=True)
            mass = jnp.exp(scores - top).reshape(*scores.shape[:-1], R // M, M).sum(-1)
            return (
                lax.dynamic_update_slice_in_dim(tops_GRW, top, key_block, 2),
                lax.dynamic_update_slice_in_dim(mass_GRP, mass, key_block * (R // M), 2),
            )

        rows = q_GRH.shape[:-1]
        empty = (jnp.full((*rows, S // R), -jnp.inf), jnp.zeros((*rows, S // M)))
        tops_GRW, mass_GRP = _fold_causal(step, block, empty)
        mass_GRP *= jnp.repeat(jnp.exp(tops_GRW - tops_GRW.max(-1, keepdims=True)), R // M, axis=-1)
        real_R = block * R + rows_R < layout.length  # rows of padding choose nothing
        share_GRP = mass_GRP * jnp.where(real_R, 1 / mass_GRP.sum(-1), 0)[..., None]
        scores_XP = share_GRP.reshape(rows[0], X, -1, S // M).sum((0, 2))[:, :num_tiles]
        return finish(scores_XP, block * X + jnp.arange(X))

    out_BKJX = _map_heads(score, layout.local_blocks(), q_BTNH, K)
    return out_BKJX.reshape(B, K, -1, out_BKJX.shape[-1])


def _reuse_xla(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """Gathers the chosen tiles of one query tile and KV head at a time and attends to them in two products."""
    B, K, H, S = k_BKHS.shape
    M, Y, C = selection.tile_size, selection.query_tile, tiles_BKQC.shape[-1]
    P, X = S // M, layout.block // Y
    k_tiles = k_BKHS.transpose(0, 1, 3, 2).reshape(B * K * P, M, H)  # rows, so that gathering a tile copies one piece
    v_tiles = v_BKSH.reshape(B * K * P, M, H)
    query_tiles_Q = (layout.local_blocks()[:, None] * X + jnp.arange(X)).reshape(-1)

    def attend(query_tile: jax.Array, head: jax.Array, q_GRH: jax.Array, tiles_C: jax.Array) -> jax.Array:
        used_C1 = (tiles_C != NO_TILE)[:, None]
        places = head * P + jnp.where(used_C1[:, 0], tiles_C, 0)
        k_SH, v_SH = (x.at[places].get(mode="promise_in_bounds").reshape(C * M, H) for x in (k_tiles, v_tiles))
        key_S = jnp.where(used_C1, tiles_C[:, None] * M + jnp.arange(M), NO_TILE).reshape(-1)
        row_R1 = query_tile * Y + jnp.arange(Y)[:, None]
        scores = matmul("GRH,SH->GRS", q_GRH, k_SH) * H**-0.5
        scores = jnp.where(key_S <= row_R1, scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        out = matmul("GRS,SH->GRH", weights.astype(v_SH.dtype), v_SH)
        return (out / weights.sum(-1, keepdims=True)).astype(q_GRH.dtype)

    at_once = max(KEYS_AT_ONCE // (C * M), 1)
    return _ungroup(_map_heads(attend, query_tiles_Q, q_BTNH, K, tiles_BKQC, at_once=at_once))
