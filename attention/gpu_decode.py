"""A decoding step's attention on an NVIDIA GPU: Pallas kernels through Triton, whose programs share a sequence's keys.

One new token has so few rows that a step is bound by reading keys and values. So each KV head's keys are split into
parts, of which each program reads one, until there are as many programs as the chip runs at once; a second kernel joins
the parts. Reuse reads the keys and values of the chosen tiles alone, straight from the cache. An anchor reads
all keys once, keeps each key tile's sum of exp(score) alone, and then attends to the tiles that it chose as reuse does.

Functions as in `attention.decode`; letters as there. A program holds R rows, the G query heads of a KV head and rows
of padding, and reads W keys in a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from attention.gpu import LEAST, LEAST_ROWS, on_gpu_or_interpreted
from attention.xla import LOG2_E
from kascade_core import NO_TILE, Selection, select_step_tiles, tile_count, visible

KEYS = 64  # read in one step
SCORE_KEYS = 128  # of a program that scores: a whole tile of any size
PROGRAMS = 132  # that share the keys out: one for each multiprocessor of an H100
WARPS = 4


@dataclasses.dataclass(frozen=True)
class _Step:
    """Sizes of a step; C is None where all keys are read in order."""

    K: int
    G: int
    S: int
    C: int | None
    M: int
    R: int
    window: int | None
    parts: int
    steps: int  # of one part

    @classmethod
    def of(cls, q_BNH: jax.Array, k_ZSH: jax.Array, slots: int | None, tile_size: int, window: int | None) -> _Step:
        (B, N, _), (Z, S, _) = q_BNH.shape, k_ZSH.shape
        blocks = tile_count(S if slots is None else slots * tile_size, KEYS)
        parts = min(max(PROGRAMS // Z, 1), blocks)
        rows = max(pl.next_power_of_2(B * N // Z), LEAST_ROWS)
        return cls(Z // B, B * N // Z, S, slots, tile_size, rows, window, parts, tile_count(blocks, parts))


def dense_step(
    q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, positions_B: jax.Array, window: int | None = None
) -> jax.Array:
    """As `attention.decode.dense_step`."""
    return _attend(q_BNH, k_ZSH, v_ZSH, positions_B, None, 1, window)


def reuse_step(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_BK1C: jax.Array,
    selection: Selection,
) -> jax.Array:
    """As `attention.decode.reuse_step`."""
    tiles_ZC = tiles_BK1C.reshape(k_ZSH.shape[0], -1)
    return _attend(q_BNH, k_ZSH, v_ZSH, positions_B, tiles_ZC, selection.tile_size, selection.window)


def _attend(
    q_BNH: jax.Array,
    k_ZSH: jax.Array,
    v_ZSH: jax.Array,
    positions_B: jax.Array,
    tiles_ZC: jax.Array | None,
    tile_size: int,
    window: int | None,
) -> jax.Array:
    Z, _, H = k_ZSH.shape
    sizes = _Step.of(q_BNH, k_ZSH, None if tiles_ZC is None else tiles_ZC.shape[1], tile_size, window)
    tiles = jnp.zeros(1, jnp.int32) if tiles_ZC is None else tiles_ZC.reshape(-1)
    rows = Z * sizes.parts * sizes.G
    shapes = [(rows, H), (rows,), (rows,)]

    def attend(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_attend_kernel, sizes=sizes),
            grid=(sizes.parts, Z),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=4),
            interpret=interpret,
            name="kascade_attend_step",
        )

    arrays = [x.reshape(-1, H) for x in (q_BNH.astype(k_ZSH.dtype), k_ZSH, v_ZSH)]
    parts = on_gpu_or_interpreted(attend)(positions_B, tiles, *arrays)

    def join(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_join_kernel, sizes=sizes),
            grid=(sizes.G, Z),
            out_shape=jax.ShapeDtypeStruct((Z * sizes.G, H), k_ZSH.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
            name="kascade_join_step",
        )

    return on_gpu_or_interpreted(join)(*parts).reshape(q_BNH.shape).astype(jnp.float32)


def _attend_kernel(positions_ref, tiles_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, *, sizes: _Step):
    """One part of a KV head's keys: online softmax in base 2; writes the sum, not yet divided, maximum and total."""
    part, z = pl.program_id(0), pl.program_id(1)
    G, M, R, W = sizes.G, sizes.M, sizes.R, KEYS
    row = jnp.minimum(jnp.arange(R), G - 1)  # rows of padding compute and write the last one again
    q_RH = q_ref[z * G + row, :]
    position = positions_ref[lax.div(z, sizes.K)]
    scale = LOG2_E * q_RH.shape[-1] ** -0.5

    def step(c, carry):
        top, total, out = carry
        slot = c * W + jnp.arange(W)
        if sizes.C is None:
            key, chosen = slot, slot < sizes.S
        else:
            in_tile = lax.div(slot, M) if M < W else lax.div(c, M // W)  # neighbouring keys of one tile share a load
            tile = tiles_ref[z * sizes.C + jnp.minimum(in_tile, sizes.C - 1)]
            chosen = (tile != NO_TILE) & (slot < sizes.C * M)
            key = tile * M + lax.rem(slot, M)
        seen = chosen & visible(position, key, sizes.window)
        at = z * sizes.S + jnp.where(seen, key, position)  # no other key may be read
        scores = plgpu.dot(q_RH, k_ref[at, :], trans_b=True)
        scores = jnp.where(seen[None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1) * scale)
        weights = jnp.exp2(scores * scale - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        values = plgpu.dot(weights.astype(v_ref.dtype), v_ref[at, :])
        return new_top, total * shrink + weights.sum(-1), out * shrink[:, None] + values

    first, end = part * sizes.steps, (part + 1) * sizes.steps
    if sizes.C is None:
        end = jnp.minimum(end, pl.cdiv(position + 1, W))
    carry = (jnp.full(R, LEAST), jnp.zeros(R), jnp.zeros(q_RH.shape))
    top, total, out = lax.fori_loop(first, jnp.maximum(first, end), step, carry)
    to = (z * sizes.parts + part) * G + row
    out_ref[to, :] = out
    top_ref[to] = top
    total_ref[to] = total


def _join_kernel(out_ref, top_ref, total_ref, joined_ref, *, sizes: _Step):
    """One query head: the parts' sums, each under its own maximum, as one; divided by the total of all."""
    g, z = pl.program_id(0), pl.program_id(1)
    part = jnp.arange(pl.next_power_of_2(sizes.parts))
    at = (z * sizes.parts + jnp.minimum(part, sizes.parts - 1)) * sizes.G + g
    top = jnp.where(part < sizes.parts, top_ref[at], LEAST)
    share = jnp.where(part < sizes.parts, jnp.exp2(top - top.max()), 0)
    total, out = (total_ref[at] * share).sum(), (out_ref[at, :] * share[:, None]).sum(0)
    joined_ref[z * sizes.G + g, :] = (out / total).astype(joined_ref.dtype)


def choose_step(q_BNH: jax.Array, k_ZSH: jax.Array, positions_B: jax.Array, selection: Selection) -> jax.Array:
    """tiles_BK1C, as `attention.decode.choose_step`."""
    (Z, S, H), M = k_ZSH.shape, selection.tile_size
    sizes, blocks = _Step.of(q_BNH, k_ZSH, None, M, selection.window), tile_count(S, SCORE_KEYS)
    shapes = [(Z * blocks * (SCORE_KEYS // M), sizes.R), (Z * blocks, sizes.R)]

    def score(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_score_kernel, sizes=sizes),
            grid=(blocks, Z),
            out_specs=[
                pl.BlockSpec((SCORE_KEYS // M, sizes.R), lambda j, z: (z * blocks + j, 0)),
                pl.BlockSpec((None, sizes.R), lambda j, z: (z * blocks + j, 0)),
            ],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
            interpret=interpret,
            name="kascade_score_step",
        )

    arrays = [x.reshape(-1, H) for x in (q_BNH.astype(k_ZSH.dtype), k_ZSH)]
    mass, top = on_gpu_or_interpreted(score)(positions_B, *arrays)
    top = top.reshape(Z, blocks, 1, sizes.R)[..., : sizes.G]
    mass = mass.reshape(Z, blocks, -1, sizes.R)[..., : sizes.G] * jnp.exp2(top - top.max((1, 2), keepdims=True))
    mass_ZP = (mass / mass.sum((1, 2), keepdims=True)).sum(-1).reshape(Z, -1)[:, : S // M]
    return select_step_tiles(mass_ZP, selection, positions_B)


def _score_kernel(positions_ref, q_ref, k_ref, mass_ref, top_ref, *, sizes: _Step):
    """One block of W keys: each key tile's sum of exp2(score) under the block's maximum, and that maximum."""
    j, z = pl.program_id(0), pl.program_id(1)
    G, M, R, W = sizes.G, sizes.M, sizes.R, SCORE_KEYS
    row = jnp.minimum(jnp.arange(R), G - 1)
    q_RH = q_ref[z * G + row, :]
    position = positions_ref[lax.div(z, sizes.K)]
    key = j * W + jnp.arange(W)
    seen = visible(position, key, sizes.window)
    keys = k_ref[z * sizes.S + jnp.where(seen, key, position), :]
    scores = plgpu.dot(q_RH, keys, trans_b=True) * (LOG2_E * q_RH.shape[-1] ** -0.5)
    scores = jnp.where(seen[None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(-1), LEAST)
    weights = jnp.exp2(scores - top[:, None])
    mass = weights.reshape(R, W // M, M).sum(-1) if M < W else weights.sum(-1, keepdims=True)
    mass_ref[...] = mass.T
    top_ref[...] = top
