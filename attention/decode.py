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

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attention import gpu, gpu_decode, tpu
from attention.xla import UNSEEN, exp2, exponent, matmul
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_step_tiles, visible

PAGED, ON_GPU = "pallas_tpu", "pallas_gpu"
STEPS = {PAGED: ("tpu", tpu), ON_GPU: ("cuda", gpu_decode)}  # the platform and the module of each kernel's steps
CPU_KEYS = 64  # in one product of weights and values: XLA's CPU shares products among its cores, no single one


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
    seen_ZS = _seen(k_ZSH, positions_B, window)
    return _attend(_products(q_BNH, k_ZSH), seen_ZS, v_ZSH).reshape(q_BNH.shape)


def choose_step(
    q_BNH: jax.Array, k_ZSH: jax.Array, positions_B: jax.Array, selection: Selection, kernel: str | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """An anchor's choice: the tiles with the most attention mass of the new token's row, pooled over a KV head's rows.

    Returns:
      tiles_BK1C, as `kascade_core.select_tiles` with one query tile, and products_ZSG of the rows with all keys, from
      which `anchor_step` attends without reading a key twice. On a GPU, where a tenth of the keys is read again sooner
      than all products are written, there are none: the anchor attends as a REUSE layer does.
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
    (Z, S, H), M = k_ZSH.shape, selection.tile_size
    products_ZSG, seen_ZS = _products(q_BNH, k_ZSH), _seen(k_ZSH, positions_B, selection.window)

    def pool(products_ZSG: jax.Array, seen_ZS: jax.Array, width: int) -> jax.Array:
        weights_ZJGW = _weights(_by_block(products_ZSG, seen_ZS, width), H)
        share_ZJW = (weights_ZJGW / weights_ZJGW.sum((1, 3), keepdims=True)).sum(2)
        return share_ZJW.reshape(Z, S // M, M).sum(-1)

    mass_ZP = _in_blocks(pool, S, products_ZSG, seen_ZS)
    return select_step_tiles(mass_ZP, selection, positions_B), products_ZSG


def anchor_step(
    products_ZSG: jax.Array, v_ZSH: jax.Array, positions_B: jax.Array, tiles_BK1C: jax.Array, selection: Selection
) -> jax.Array:
    """Attention to an anchor's own tiles, by the products that chose them. Returns out_BNH, float32."""
    out_ZGH = _attend_to_tiles(
        lambda products_ZWG: products_ZWG, products_ZSG, v_ZSH, positions_B, tiles_BK1C, selection
    )
    return out_ZGH.reshape(len(positions_B), -1, v_ZSH.shape[-1])


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
    products = partial(_products, q_BNH)
    out_ZGH = _attend_to_tiles(products, k_ZSH, v_ZSH, positions_B, tiles_BK1C, selection)
    return out_ZGH.reshape(q_BNH.shape)


def _attend_to_tiles(
    products: Callable[[jax.Array], jax.Array],
    scored: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
) -> jax.Array:
    """out_ZGH of the chosen tiles. Of their rows of `scored` [Z, S, ...] `products` makes products_ZWG."""
    tiles_ZC, M = tiles_BK1C.reshape(len(v_ZSH), -1), selection.tile_size

    def gather(tiles_ZC: jax.Array) -> list[jax.Array]:
        places_ZC, seen_ZW = _places(tiles_ZC, positions_B, selection)
        return [seen_ZW, *(_gather(x, places_ZC, M) for x in (scored, v_ZSH))]

    def attend(seen_ZW: jax.Array, *gathered: jax.Array) -> jax.Array:
        of_tiles, v_ZWH = (x.reshape(*seen_ZW.shape, -1) for x in gathered)
        return _attend(products(of_tiles), seen_ZW, v_ZWH)

    def attend_on_cpu(tiles_ZC: jax.Array) -> jax.Array:
        more = -tiles_ZC.shape[1] % max(CPU_KEYS // M, 1)  # to whole blocks of keys
        gathered = gather(jnp.pad(tiles_ZC, ((0, 0), (0, more)), constant_values=NO_TILE))
        out = jax.eval_shape(attend, *gathered)
        # A branch of its own: without one XLA reshapes tiles while it gathers them, and copies number by number, not in
        # vectors, which is a fifth of the time of a REUSE layer's attention. The other branch is never taken.
        return jax.lax.cond(positions_B[0] < 0, lambda *_: jnp.zeros(out.shape, out.dtype), attend, *gathered)

    return jax.lax.platform_dependent(tiles_ZC, cpu=attend_on_cpu, default=lambda tiles_ZC: attend(*gather(tiles_ZC)))


def _products(q_BNH: jax.Array, k_ZSH: jax.Array) -> jax.Array:
    """Products of each KV head's rows with its keys, not yet scaled, float32 [Z, S, G]: keys are read as they lie."""
    q_ZGH = q_BNH.reshape(k_ZSH.shape[0], -1, k_ZSH.shape[-1])
    return matmul("ZSH,ZGH->ZSG", k_ZSH, q_ZGH.astype(k_ZSH.dtype))


def _seen(k_ZSH: jax.Array, positions_B: jax.Array, window: int | None) -> jax.Array:
    """Which keys count, bool [Z, S]."""
    Z, S, _ = k_ZSH.shape
    return visible(jnp.repeat(positions_B, Z // len(positions_B))[:, None], jnp.arange(S)[None], window)


def _by_block(products_ZSG: jax.Array, seen_ZS: jax.Array, width: int) -> jax.Array:
    """Products with blocks of so many keys [Z, J, G, W]; where a key does not count, UNSEEN."""
    Z, S, G = products_ZSG.shape
    products_ZJGW = products_ZSG.reshape(Z, S // width, width, G).swapaxes(2, 3)
    return jnp.where(seen_ZS.reshape(Z, -1, 1, width), products_ZJGW, UNSEEN)


def _attend(products_ZSG: jax.Array, seen_ZS: jax.Array, v_ZSH: jax.Array) -> jax.Array:
    """out_ZGH; every row sees its own key, so none is empty."""
    Z, S, H = v_ZSH.shape

    def attend(products_ZSG: jax.Array, seen_ZS: jax.Array, v_ZSH: jax.Array, width: int) -> jax.Array:
        weights_ZJGW = _weights(_by_block(products_ZSG, seen_ZS, width), H, v_ZSH.dtype)
        out_ZGH = matmul("ZJGW,ZJWH->ZJGH", weights_ZJGW, v_ZSH.reshape(Z, S // width, width, H)).sum(1)
        return out_ZGH / weights_ZJGW.sum((1, 3), dtype=jnp.float32)[..., None]

    return _in_blocks(attend, S, products_ZSG, seen_ZS, v_ZSH)


def _in_blocks(apply: Callable[..., jax.Array], size: int, *args: jax.Array) -> jax.Array:
    """apply(*args, width), with the keys in blocks of CPU_KEYS on a CPU, in one block elsewhere."""
    own, whole = partial(apply, width=math.gcd(size, CPU_KEYS)), partial(apply, width=size)
    return jax.lax.platform_dependent(*args, cpu=own, default=whole)


def _weights(products_ZJGW: jax.Array, head_dim: int, dtype: Any = jnp.float32) -> jax.Array:
    """Of each row, softmax's weights before they are normalised."""
    return exp2(exponent(products_ZJGW, products_ZJGW.max((1, 3), keepdims=True), head_dim), dtype)


def _places(tiles_ZC: jax.Array, positions_B: jax.Array, selection: Selection) -> tuple[jax.Array, jax.Array]:
    """Indices of tiles that may be read, places_ZC, and which of their keys count, [Z, C M].

    An unused slot names the first tile, which is the own one.
    """
    (Z, _), M = tiles_ZC.shape, selection.tile_size
    used_ZC = tiles_ZC != NO_TILE
    places_ZC = jnp.where(used_ZC, tiles_ZC, tiles_ZC[:, :1])
    key_ZCM = places_ZC[..., None] * M + jnp.arange(M)[None, None]
    position_Z11 = jnp.repeat(positions_B, Z // len(positions_B))[:, None, None]
    seen_ZCM = visible(position_Z11, key_ZCM, selection.window) & used_ZC[..., None]
    return places_ZC, seen_ZCM.reshape(Z, -1)


def _gather(rows: jax.Array, places_ZC: jax.Array, tile_size: int) -> jax.Array:
    """The named tiles of `rows` [Z, S, ...], one after another: [Z C, all numbers of a tile]."""
    (Z, S, width), M = rows.shape, tile_size
    index = (jnp.arange(Z)[:, None] * (S // M) + places_ZC).reshape(-1)

    def take(shape: tuple[int, ...], rows: jax.Array, index: jax.Array) -> jax.Array:
        tiles = rows.reshape(-1, *shape).at[index].get(mode="promise_in_bounds")
        return tiles.reshape(-1, M * width)

    # A tile is copied as one piece; on a TPU, whose memory is tiled by rows and columns, such a view would be a copy.
    whole, by_row = partial(take, (M * width,)), partial(take, (M, width))
    return jax.lax.platform_dependent(rows, index, tpu=by_row, default=whole)
