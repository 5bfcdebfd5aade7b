"""What the TPU's kernels share: the chip's sizes, products in float32, and interpretation elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kascade_core import tile_count

LANES = 128  # of a vector register
MASKED = -1e30  # a masked score: finite, since all of a row's first block of keys may be masked
SMEM_BYTES = 2**20  # of a core's scalar memory, which holds one KV head's tiles, or all page lists of a step
USABLE_SMEM = SMEM_BYTES * 7 // 8  # the compiler keeps some for itself


def whole_lanes(numbers: int) -> int:
    """The least multiple of LANES that holds so many."""
    return tile_count(numbers, LANES) * LANES


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix product over one axis of each; the result is float32, and float32 inputs are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def by_query_tile(q_BTNH: jax.Array, num_kv_heads: int, query_tile: int, rows: Any = None) -> jax.Array:
    """q_ZQRH: for each KV head and query tile the rows (or the given ones) of all its query heads."""
    B, T, N, H = q_BTNH.shape
    q_BQYKGH = q_BTNH.reshape(B, T // query_tile, query_tile, num_kv_heads, N // num_kv_heads, H)
    if rows is not None and len(rows) < query_tile:
        q_BQYKGH = q_BQYKGH[:, :, rows]
    q_BKQGYH = q_BQYKGH.transpose(0, 3, 1, 4, 2, 5)
    return q_BKQGYH.reshape(B * num_kv_heads, T // query_tile, -1, H)


def on_tpu_or_interpreted(make: Callable[[bool], Callable[..., Any]]) -> Callable[..., Any]:
    """make(interpret): compiled where the program is lowered for a TPU, interpreted elsewhere."""
    return lambda *args: lax.platform_dependent(*args, tpu=make(False), default=make(True))
