"""One new token a sequence: dense, anchor and reuse attention of a single row per query head over a cache of keys.

A step takes q_BNH of the new tokens, the caches k_ZSH and v_ZSH, which hold them already, and positions_B, the place of
each new token: keys at 0 to positions_B are attended to, whatever lies behind them. A query tile is one row here, so no
row helps to choose for another; otherwise tiles are chosen as in prefill. Scores, softmax and sums are float32, and so
is the output. Letters as in kascade_core.

`kernel` is a name of `attention.KERNELS`. With "pallas_tpu" dense and reuse steps are JAX's paged attention on a TPU,
and anchors' are XLA's; with "pallas_gpu" all are kernels of this project on a GPU. `check` says which sizes they take.
In every other case, and on other devices, steps are XLA's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attention import gpu, gpu_decode, tpu
from attention.xla import UNSEEN, matmul
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_step_tiles, visible

PAGED, ON_GPU = "pallas_tpu", "pallas_gpu"
STEPS = {PAGED: ("tpu", tpu), ON_GPU: ("cuda", gpu_decode)}  # the platform and the module of each kernel's steps


def check(kernel: str | None, selection: Selection, cache_shape: tuple[int, int, int], dtype: Any) -> None:
    """Checks that a kernel takes the steps on k_ZSH and v_ZSH of this shape and dtype.

    Raises:
      UnsupportedError: it does not; the message names sizes that it takes.
    """
    if kernel == PAGED and selection.window is not None:
        raise UnsupportedError("the TPU's paged attention has no sliding window")
    if kernel == PAGED:
        tpu.check_step(selection, cache_shape, dtype)
    if kernel == ON_GPU:
        gpu.check(selection, cache_shape[1], cache_shape[2], dtype)


def dense_step(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    window: int | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """Attention to every key up to the new token's own, within the window. Returns out_BNH, float32."""
    args = (q_BNH, k_ZSH, v_ZSH, positions_B)
    xla = partial(_dense_step, window=window)
    if kernel not in STEPS:
        return xla(*args)
    platform, module = STEPS[kernel]
    own = module.dense_step if window is None else partial(module.dense_step, window=window)
    return jax.lax.platform_dependent(*args, **{platform: own, "default": xla})


def _dense_step(
    q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, positions_B: jax.Array, window: int | None
) -> jax.Array:
    return _attend(_causal_scores(q_BNH, k_ZSH, positions_B, window), v_ZSH).reshape(q_BNH.shape)


def choose_step(
    q_BNH: jax.Array, k_ZSH: jax.Array, positions_B: jax.Array, selection: Selection, kernel: str | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """An anchor's choice: the tiles with the most attention mass of the new token's row, pooled over a KV head's rows.

    Returns:
      tiles_BK1C, as `kascade_core.select_tiles` with one query tile, and the scaled, causal scores_ZGS, from which
      `anchor_step` attends without reading a key twice. On a GPU, where a tenth of the keys is read again sooner than
      all scores are written, there are none: the anchor attends as a REUSE layer does.
    """
    if kernel == ON_GPU:
        args = (q_BNH, k_ZSH, positions_B)
        own = partial(gpu_decode.choose_step, selection=selection)
        return jax.lax.platform_dependent(
            *args, cuda=own, default=lambda *args: _choose_step(*args, selection)[0]
        ), None
    return _choose_step(q_BNH, k_ZSH, positions_B, selection)


def _choose_step(
    q_BNH: jax.Array, k_ZSH: jax.Array, positions_B: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    S, M = k_ZSH.shape[1], selection.tile_size
    scores_ZGS = _causal_scores(q_BNH, k_ZSH, positions_B, selection.window)
    weights_ZGS = jnp.exp(scores_ZGS - scores_ZGS.max(-1, keepdims=True))
    mass_ZGP = weights_ZGS.reshape(*weights_ZGS.shape[:2], S // M, M).sum(-1)
    mass_ZP = (mass_ZGP / mass_ZGP.sum(-1, keepdims=True)).sum(1)
    return select_step_tiles(mass_ZP, selection, positions_B), scores_ZGS


def anchor_step(scores_ZGS: jax.Array, v_ZSH: jax.Array, tiles_BK1C: jax.Array, selection: Selection) -> jax.Array:
    """Attention to an anchor's own tiles, from the scores that chose them. Returns out_BNH, float32."""
    (Z, G, S), M = scores_ZGS.shape, selection.tile_size
    places_ZC, used_ZC = _places(tiles_BK1C)
    chosen_ZGCM = jnp.take_along_axis(scores_ZGS.reshape(Z, G, S // M, M), places_ZC[:, None, :, None], axis=2)
    chosen_ZGCM = jnp.where(used_ZC[:, None, :, None], chosen_ZGCM, UNSEEN)
    out_ZGH = _attend(chosen_ZGCM.reshape(Z, G, -1), _gather(v_ZSH, places_ZC, M))
    return out_ZGH.reshape(tiles_BK1C.shape[0], -1, v_ZSH.shape[-1])


def reuse_step(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
    kernel: str | None = None,
) -> jax.Array:
    """Attention to the given tiles alone: no other key or value is read. Returns out_BNH, float32."""
    args = (q_BNH, k_ZSH, v_ZSH, positions_B, tiles_BK1C)
    if kernel not in STEPS:
        return _reuse_step(*args, selection)
    platform, module = STEPS[kernel]
    own, xla = (partial(step, selection=selection) for step in (module.reuse_step, _reuse_step))
    return jax.lax.platform_dependent(*args, **{platform: own, "default": xla})


def _reuse_step(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
) -> jax.Array:
    B, Z, M = q_BNH.shape[0], k_ZSH.shape[0], selection.tile_size
    places_ZC, used_ZC = _places(tiles_BK1C)
    scores_ZGW = _scores(q_BNH, _gather(k_ZSH, places_ZC, M))
    key_ZCM = places_ZC[..., None] * M + jnp.arange(M)[None, None]
    seen_ZCM = visible(jnp.repeat(positions_B, Z // B)[:, None, None], key_ZCM, selection.window)
    seen_ZCM &= used_ZC[..., None]
    scores_ZGW = jnp.where(seen_ZCM.reshape(Z, 1, -1), scores_ZGW, UNSEEN)
    return _attend(scores_ZGW, _gather(v_ZSH, places_ZC, M)).reshape(q_BNH.shape)


def _scores(q_BNH: jax.Array, k_ZSH: jax.Array) -> jax.Array:
    """Scaled scores_ZGS, float32."""
    q_ZGH = q_BNH.reshape(k_ZSH.shape[0], -1, k_ZSH.shape[-1])
    scores_ZSG = matmul("ZSH,ZGH->ZSG", k_ZSH, q_ZGH.astype(k_ZSH.dtype)) * k_ZSH.shape[-1] ** -0.5
    return scores_ZSG.swapaxes(1, 2)


def _causal_scores(q_BNH: jax.Array, k_ZSH: jax.Array, positions_B: jax.Array, window: int | None) -> jax.Array:
    position_Z11 = jnp.repeat(positions_B, k_ZSH.shape[0] // q_BNH.shape[0])[:, None, None]
    keys_11S = jnp.arange(k_ZSH.shape[1])[None, None]
    return jnp.where(visible(position_Z11, keys_11S, window), _scores(q_BNH, k_ZSH), UNSEEN)


def _attend(scores_ZGS: jax.Array, v_ZSH: jax.Array) -> jax.Array:
    """out_ZGH; every row sees its own key, so none is empty."""
    weights_ZGS = jnp.exp(scores_ZGS - scores_ZGS.max(-1, keepdims=True))
    out_ZGH = matmul("ZGS,ZSH->ZGH", weights_ZGS.astype(v_ZSH.dtype), v_ZSH)
    return out_ZGH / weights_ZGS.sum(-1, keepdims=True)


def _places(tiles_BK1C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of tiles that may be read, and which count: an unused slot names the first tile, which is the own one."""
    tiles_ZC = tiles_BK1C.reshape(-1, tiles_BK1C.shape[-1])
    used_ZC = tiles_ZC != NO_TILE
    return jnp.where(used_ZC, tiles_ZC, tiles_ZC[:, :1]), used_ZC


def _gather(x_ZSH: jax.Array, places_ZC: jax.Array, tile_size: int) -> jax.Array:
    """The named tiles' rows, [Z, C M, H]."""
    (Z, S, H), M = x_ZSH.shape, tile_size
    # The barriers have the indices computed once, not for every number that is copied, and the copy shared between
    # cores by tiles, not by heads, which may be fewer than the cores.
    index = jax.lax.optimization_barrier((jnp.arange(Z)[:, None] * (S // M) + places_ZC).reshape(-1))

    def take(shape: tuple[int, ...], x_ZSH: jax.Array, index: jax.Array) -> jax.Array:
        return x_ZSH.reshape(-1, *shape).at[index].get(mode="promise_in_bounds").reshape(-1, M, H)

    # A tile is copied as one piece; on a TPU, whose memory is tiled by rows and columns, such a view would be a copy.
    whole, rows = partial(take, (M * H,)), partial(take, (M, H))
    tiles = jax.lax.optimization_barrier(jax.lax.platform_dependent(x_ZSH, index, tpu=rows, default=whole))
    return tiles.reshape(Z, -1, H)
