"""Dense, anchor and reuse attention on an NVIDIA GPU: Pallas kernels through Triton, for key tiles of 16 to 128 tokens.

Reuse reads the chosen keys of one query tile, for any tile size as many in a step as fill the matrix units.
Scoring reads the causal keys once. A row's total is known only after its last key, so each row's sums of exp(score),
one for each key tile, under their block's own maximum, are kept in a scratch of fixed size; one fused reduction then
rescales and pools them. To bound that scratch, query tiles are scored in chunks, and no [Q, P] scores are ever kept.
Dense is cuDNN's causal attention. Where there is no GPU, or the work is split over several, whose blocks are not
contiguous, it is a reuse of all tiles. Away from a GPU the kernels are interpreted: correct, and slow.

All functions take padded inputs and a layout; see `attention`, whose functions they implement. A program does R rows
and reads W keys in a step. Scoring gives a query tile with more rows than R several `parts`, a program each, and puts
query tiles with few rows together into a group that shares a program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from attention.sharding import Layout, causal_tiles, pad_axis
from attention.xla import LOG2_E
from errors import UnsupportedError
from kascade_core import NO_TILE, Selection, select_tiles, tile_count, visible

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
TILE_SIZES = (16, 32, 64, 128)
LEAST_TILE = TILE_SIZES[0]  # the sequence is padded to a multiple of it
LEAST_CAPABILITY = 8.0  # needed by cuDNN's fused attention and by matrix instructions for bfloat16
ROWS = 128  # of one program at most: two warpgroups' worth of matrix instructions
LEAST_ROWS = 16  # of a matrix instruction
SHARED_ROWS = 64  # scoring puts query tiles together up to this many rows: they read the same keys
REUSE_KEYS = 128  # in one step: keys and values of two steps fit into shared memory
SCORE_KEYS = 128  # in one step: a whole tile of any size
SCRATCH_BYTES = 2**29  # of scoring, for one chunk: at 128k tokens some hundreds of programs, as many as an H100 runs
LEAST = -1e30  # the least value of a row's largest score: finite, since a whole block of its scores may be masked


def check(
    selection: Selection,
    length: int,
    head_dim: int | None,
    dtype: Any,
    capability: str | None = None,
    slots: int | None = None,
) -> None:
    """As `attention.check`: tile size, heads' width, dtype and compute capability."""
    name = jnp.dtype(dtype).name
    if selection.tile_size not in TILE_SIZES:
        raise UnsupportedError(f"the GPU kernels take a tile_size of 16, 32, 64 or 128, got {selection.tile_size}")
    if head_dim not in (None, *HEAD_DIMS):
        raise UnsupportedError(f"the GPU kernels take heads of width 64 or 128, got {head_dim}")
    if name not in DTYPES:
        raise UnsupportedError(f"the GPU kernels take bfloat16 or float16, got {name}")
    if capability is not None and float(capability) < LEAST_CAPABILITY:
        raise UnsupportedError(f"the GPU kernels need compute capability {LEAST_CAPABILITY}, got {capability}")


# --- Dense ---


def dense(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout, window: int | None = None
) -> jax.Array:
    """As `attention.dense`."""
    check(Selection(tile_size=LEAST_TILE), layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    if layout.num_shards == 1 and jax.default_backend() == "gpu":  # without a GPU, JAX cannot even trace cuDNN's
        k_BSKH, v_BSKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
        with jax.numpy_dtype_promotion("standard"):  # JAX's own function relies on it, whatever the user has set
            local = None if window is None else (window - 1, 0)
            return jax.nn.dot_product_attention(
                q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=local, implementation="cudnn"
            )
    M = math.gcd(layout.block, TILE_SIZES[-1])
    tiles_QC = causal_tiles(layout, M, M)
    tiles_BKQC = jnp.broadcast_to(tiles_QC, (*k_BKHS.shape[:2], *tiles_QC.shape))
    return reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, Selection(tile_size=M, window=window), layout)


# --- Reuse ---


@dataclasses.dataclass(frozen=True)
class _Reuse:
    """Sizes of a reuse; a program does R rows of one query tile and KV head."""

    T: int
    S: int
    N: int
    K: int
    Q: int
    C: int
    M: int
    Y: int
    R: int
    window: int | None

    @property
    def rows(self) -> int:
        """Rows of a query tile without padding: those of all query heads of its KV head."""
        return self.Y * (self.N // self.K)


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """As `attention.reuse`; tiles_BKQC are ascending."""
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    (B, T, N, H), (K, S) = q_BTNH.shape, v_BKSH.shape[1:3]
    M, Y = selection.tile_size, selection.query_tile
    used_BKQ1 = (tiles_BKQC != NO_TILE).sum(-1, keepdims=True)
    in_step = max(REUSE_KEYS // M, 1)
    slots = tile_count(tiles_BKQC.shape[-1], in_step) * in_step
    used_BKQC = jnp.arange(slots)[None, None, None] < used_BKQ1
    tiles_BKQC = jnp.where(used_BKQC, pad_axis(tiles_BKQC, 3, slots), NO_TILE)
    rows = _pad_rows(Y * N // K)
    sizes = _Reuse(T, S, N, K, T // Y, slots, M, Y, min(rows, ROWS), selection.window)
    keys, values = (x.reshape(B * K * S, H) for x in (k_BKHS.swapaxes(2, 3), v_BKSH))  # a key is one piece

    def attend(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_reuse_kernel, sizes=sizes),
            grid=(rows // sizes.R, sizes.Q, B * K),
            out_shape=jax.ShapeDtypeStruct((B * T * N, H), q_BTNH.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=_warps(sizes.R), num_stages=2),
            interpret=interpret,
            name="kascade_reuse",
        )

    run = on_gpu_or_interpreted(attend)
    first_Q = layout.local_positions()[::Y]
    out = run(first_Q, used_BKQ1.reshape(-1), tiles_BKQC.reshape(-1), q_BTNH.reshape(B * T * N, H), keys, values)
    return out.reshape(B, T, N, H)


def _reuse_kernel(first_ref, used_ref, tiles_ref, q_ref, k_ref, v_ref, out_ref, *, sizes: _Reuse):
    """R rows of one query tile and KV head: a step of online softmax for every W of its chosen keys."""
    part, i, z = (pl.program_id(axis) for axis in range(3))
    M, R, W, G = sizes.M, sizes.R, REUSE_KEYS, sizes.N // sizes.K
    row = part * R + jnp.arange(R)
    row = jnp.where(row < sizes.rows, row, 0)  # rows of padding compute and write the first row again
    token, head = i * sizes.Y + lax.div(row, G), lax.rem(z, sizes.K) * G + lax.rem(row, G)
    at = (lax.div(z, sizes.K) * sizes.T + token) * sizes.N + head
    position_R1 = (first_ref[i] + lax.div(row, G))[:, None]
    q_RH = q_ref[at, :]
    scale = LOG2_E * q_RH.shape[-1] ** -0.5
    query_tile = z * sizes.Q + i

    def block(c):
        """Places of W keys, in memory and in the sequence, and which are chosen; a long tile is read as one piece."""
        if M < W:
            slot = c * W + jnp.arange(W)  # of a key among the chosen ones
            tile = tiles_ref[query_tile * sizes.C + lax.div(slot, M)]
            chosen = tile != NO_TILE
            key = jnp.where(chosen, tile, 0) * M + lax.rem(slot, M)
            return z * sizes.S + key, key, chosen
        tile = tiles_ref[query_tile * sizes.C + lax.div(c, M // W)]  # used slots alone are read
        start = tile * M + lax.rem(c, M // W) * W
        return pl.ds(z * sizes.S + start, W), start + jnp.arange(W), True

    def step(c, carry, masked):
        top, total, out = carry
        place, key, chosen = block(c)
        scores = plgpu.dot(q_RH, k_ref[place, :], trans_b=True)
        if masked:
            seen = visible(position_R1, key[None], sizes.window)
            scores = jnp.where(seen if M >= W else seen & chosen[None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1) * scale)
        weights = jnp.exp2(scores * scale - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        values = plgpu.dot(weights.astype(v_ref.dtype), v_ref[place, :])
        return new_top, total * shrink + weights.sum(-1), out * shrink[:, None] + values

    used = used_ref[query_tile]
    own_tiles = max(sizes.Y // M, 1)  # the last of the tiles; the others are in the past of all rows
    clear = jnp.maximum((used - own_tiles) * M // W, 0) if sizes.window is None else 0
    carry = (jnp.full(R, LEAST), jnp.zeros(R), jnp.zeros(q_RH.shape))
    carry = lax.fori_loop(0, clear, partial(step, masked=False), carry)
    _, total, out = lax.fori_loop(clear, pl.cdiv(used * M, W), partial(step, masked=True), carry)
    out_ref[at, :] = (out / total[:, None]).astype(out_ref.dtype)


# --- Choosing ---


@dataclasses.dataclass(frozen=True)
class _Score:
    """Sizes of a scoring; a program does R rows: of the query tiles of one group, or of one of a query tile's parts."""

    T: int
    S: int
    N: int
    K: int
    Z: int
    M: int
    R: int
    groups: int
    tiles_per_group: int
    parts: int
    window: int | None

    @property
    def steps(self) -> int:
        """Blocks of keys of the whole sequence."""
        return self.S // SCORE_KEYS

    @property
    def chunk(self) -> int:
        """Groups of query tiles whose scratch fits."""
        each = 4 * self.parts * self.R * self.steps * (SCORE_KEYS // self.M + 1)
        return max(1, min(SCRATCH_BYTES // each, self.Z * self.groups))

    @classmethod
    def of(cls, q_BTNH: jax.Array, k_BKHS: jax.Array, scored_rows: int, selection: Selection) -> _Score:
        """`scored_rows` is the number of a query tile's rows, those of all query heads of its KV head."""
        (B, T, N, _), K = q_BTNH.shape, k_BKHS.shape[1]
        S = tile_count(k_BKHS.shape[3], SCORE_KEYS) * SCORE_KEYS
        rows = _pad_rows(scored_rows)
        tiles_per_group = max(SHARED_ROWS // rows, 1)
        R, groups = min(tiles_per_group * rows, ROWS), tile_count(T // selection.query_tile, tiles_per_group)
        parts = tiles_per_group * rows // R
        return cls(T, S, N, K, B * K, selection.tile_size, R, groups, tiles_per_group, parts, selection.window)


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """As `attention.choose`."""
    check(selection, layout.length, q_BTNH.shape[-1], q_BTNH.dtype)
    (B, T, N, H), K, Y = q_BTNH.shape, k_BKHS.shape[1], selection.query_tile
    token_QR, position_QR = _scored_rows(selection, layout, N // K)
    sizes = _Score.of(q_BTNH, k_BKHS, token_QR.shape[1], selection)
    groups, per_group = sizes.groups, sizes.tiles_per_group
    padding = [(0, groups * per_group - T // Y), (0, sizes.parts * sizes.R // per_group - token_QR.shape[1])]
    token_QR, position_QR = jnp.pad(token_QR, padding), jnp.pad(position_QR, padding, constant_values=-1)
    positions = position_QR.reshape(groups, sizes.parts, sizes.R)
    last = positions.max(-1)  # of each group and part
    first = jnp.where(positions < 0, layout.length, positions).min(-1)
    query_tile_Q = pad_axis(layout.local_positions()[::Y] // Y, 0, groups * per_group)
    keys = pad_axis(k_BKHS.swapaxes(2, 3), 2, sizes.S).reshape(B * K * sizes.S, H)
    rows = [x.reshape(-1) for x in (first, last, token_QR, position_QR)]
    run = _score_chunk(sizes, *rows, q_BTNH.reshape(B * T * N, H), keys)

    def choose_chunk(base: jax.Array) -> jax.Array:
        index = (base + jnp.arange(sizes.chunk)) % groups
        steps = pl.cdiv(last[index] + 1, SCORE_KEYS)
        scores = _pool(*run(base), steps, per_group)[..., : tile_count(layout.length, sizes.M)]
        query_tiles = query_tile_Q.reshape(groups, per_group)[index]
        return select_tiles(scores.reshape(-1, scores.shape[-1]), selection, query_tiles.reshape(-1))

    tiles = lax.map(choose_chunk, jnp.arange(0, sizes.Z * groups, sizes.chunk))
    tiles_ZQC = tiles.reshape(-1, tiles.shape[-1])[: sizes.Z * groups * per_group].reshape(B, K, groups * per_group, -1)
    return tiles_ZQC[:, :, : T // Y]


def _scored_rows(selection: Selection, layout: Layout, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Two int32 [Q, rows]: each scored row's token on this shard, and its position in the sequence (-1: padding).

    The rows of one token, one for each query head of the KV head, are consecutive.
    """
    Y = selection.query_tile
    offset_1R = jnp.repeat(jnp.asarray(selection.scored_rows(), jnp.int32), group_size)[None]
    first_Q = layout.local_positions()[::Y]
    token_QR = jnp.arange(len(first_Q), dtype=jnp.int32)[:, None] * Y + offset_1R
    position_QR = first_Q[:, None] + offset_1R
    return token_QR, jnp.where(position_QR < layout.length, position_QR, -1)


def _score_chunk(sizes: _Score, *inputs: jax.Array) -> Callable[[jax.Array], Any]:
    """run(base) scores the chunk that begins with group `base`: `_score_kernel`'s results, each [chunk, parts, ...]."""
    shapes = [(rows, sizes.R) for rows in (sizes.steps * (SCORE_KEYS // sizes.M), sizes.steps, 1)]

    def score(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_score_kernel, sizes=sizes),
            grid=(sizes.parts, sizes.chunk),
            out_specs=[pl.BlockSpec((None, None, *shape), lambda a, i: (i, a, 0, 0)) for shape in shapes],
            out_shape=[jax.ShapeDtypeStruct((sizes.chunk, sizes.parts, *shape), jnp.float32) for shape in shapes],
            compiler_params=plgpu.CompilerParams(num_warps=_warps(sizes.R), num_stages=2),
            interpret=interpret,
            name="kascade_score",
        )

    return lambda base: on_gpu_or_interpreted(score)(base[None], *inputs)


def _score_kernel(
    base_ref, first_ref, last_ref, token_ref, position_ref, q_ref, k_ref, mass_ref, tops_ref, total_ref, *, sizes
):
    """R rows and all keys that they see: for each key tile the sum of exp(score) under its block's own maximum.

    Writes mass [P, R], tops (each block's maximum) [steps, R] and total [1, R], in base 2: a row's total is the
    logarithm of the sum over all its keys. For rows of padding it is larger than any score, so that their shares are 0.
    Blocks that no row sees are not written.
    """
    part, M, R, W, G = pl.program_id(0), sizes.M, sizes.R, SCORE_KEYS, sizes.N // sizes.K
    item = jnp.minimum(base_ref[0] + pl.program_id(1), sizes.Z * sizes.groups - 1)  # the last chunk may not be full
    z, group = lax.div(item, sizes.groups), lax.rem(item, sizes.groups)
    row = part * R + jnp.arange(R)
    at = group * (sizes.parts * R) + row
    token, position = token_ref[at], position_ref[at]
    head = lax.rem(z, sizes.K) * G + lax.rem(row, G)  # G consecutive rows are the KV head's query heads, in some order
    q_RH = q_ref[(lax.div(z, sizes.K) * sizes.T + token) * sizes.N + head, :]
    scale = LOG2_E * q_RH.shape[-1] ** -0.5

    def step(j, carry, masked):
        top, total = carry
        key = j * W + jnp.arange(W)
        scores = plgpu.dot(q_RH, k_ref[z * sizes.S + key, :], trans_b=True)
        if masked:
            scores = jnp.where(visible(position[:, None], key[None], sizes.window), scores, -jnp.inf)
        block_top = jnp.maximum(scores.max(-1) * scale, LEAST)
        weights = jnp.exp2(scores * scale - block_top[:, None])
        mass = weights.reshape(R, W // M, M).sum(-1) if M < W else weights.sum(-1, keepdims=True)
        mass_ref[pl.ds(j * (W // M), W // M), :] = mass.T
        tops_ref[j, :] = block_top
        new_top = jnp.maximum(top, block_top)
        return new_top, total * jnp.exp2(top - new_top) + mass.sum(-1) * jnp.exp2(block_top - new_top)

    clear, end = (first_ref[group * sizes.parts + part] + 1) // W, pl.cdiv(last_ref[group * sizes.parts + part] + 1, W)
    clear = clear if sizes.window is None else 0
    carry = (jnp.full(R, LEAST), jnp.zeros(R))
    carry = lax.fori_loop(0, jnp.minimum(clear, end), partial(step, masked=False), carry)
    top, total = lax.fori_loop(jnp.minimum(clear, end), end, partial(step, masked=True), carry)
    total_ref[0, :] = jnp.where(position >= 0, top + jnp.log2(total), -LEAST)


def _pool(mass: jax.Array, tops: jax.Array, total: jax.Array, steps: jax.Array, tiles_per_group: int) -> jax.Array:
    """The rows' shares of each key tile, summed over a query tile's rows: [groups, tiles_per_group, P].

    mass is [groups, parts, P, R], tops [groups, parts, blocks of keys, R], total [groups, parts, 1, R], and steps
    [groups, parts] says how many blocks of keys were written.
    """
    groups, parts, P, R = mass.shape
    blocks = tops.shape[2]
    share = jnp.exp2(tops - total)[:, :, :, None]
    seen = (jnp.arange(blocks)[None, None] < steps[..., None])[..., None, None]
    mass = jnp.where(seen, mass.reshape(groups, parts, blocks, P // blocks, R) * share, 0)
    mass = mass.reshape(groups, parts, P, tiles_per_group, R // tiles_per_group)
    return mass.sum((1, 4)).swapaxes(1, 2)


def _pad_rows(rows: int) -> int:
    """Rows of whole programs: a power of two, or, if they are more than one program's, a multiple of ROWS."""
    return pl.next_power_of_2(max(rows, LEAST_ROWS)) if rows <= ROWS else tile_count(rows, ROWS) * ROWS


def _warps(rows: int) -> int:
    return 8 if rows >= ROWS else 4


def on_gpu_or_interpreted(make: Callable[[bool], Callable[..., Any]]) -> Callable[..., Any]:
    """make(interpret): compiled where the program is lowered for CUDA, interpreted elsewhere."""
    return lambda *args: lax.platform_dependent(*args, cuda=make(False), default=make(True))
