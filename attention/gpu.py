"""Dense, anchor and reuse attention on an NVIDIA GPU: Pallas kernels through Triton, for key tiles of 16 to 128 tokens.

Reuse walks the chosen keys of one query tile, as many together as fill the matrix units, whatever the tile's size.
Scoring walks the causal keys once. A key tile's mass is known only when its row's last key is: until then each row's
sums of exp(score), one for each key tile, under their block's own maximum, lie in a scratch of fixed size, and one
fused reduction then rescales and pools them. So query tiles go in chunks, and no scores for all of them are ever kept.
Dense is cuDNN's causal attention, and a reuse of all tiles where there is no GPU or the work is dealt over
several, whose blocks do not lie in order. Elsewhere than on a GPU the kernels are interpreted: correct, and slow.

Letters as in kascade_kernels; R is the rows of a program, W the keys of a step, X heads and batch, A the parts in which
a query tile with more rows than R is cut, E the query tiles of a group, which share a program where they have fewer, I
groups.
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

from kascade_core import NO_TILE, Selection, causal_tiles, select_tiles
from kascade_layout import Layout, pad_axis, tile_count

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
TILE_SIZES = (16, 32, 64, 128)
LEAST_TILE = TILE_SIZES[0]  # the sequence is padded to a multiple of it
LEAST_CAPABILITY = 8.0  # cuDNN's fused attention needs it, and so do matrix instructions for bfloat16
ROWS = 128  # of one program at most: two warpgroups' worth of matrix instructions
LEAST_ROWS = 16  # of a matrix instruction
SHARED_ROWS = 64  # scoring puts query tiles with fewer rows together, up to so many: they read the same keys
REUSE_KEYS = 64  # in one step: keys and values of several steps fit into shared memory
SCORE_KEYS = 128  # in one step: a whole tile of any size
SCRATCH_BYTES = 2**29  # of scoring, for all programs of a chunk: at 128k tokens some hundreds, as an H100 runs
LEAST = -1e30  # of a row's largest score: finite, since all of its block's may be masked
LOG2_E = math.log2(math.e)


def check_sizes(tile_size: int, head_dim: int | None, dtype: Any, capability: str | None = None) -> None:
    """Raises NotImplementedError, naming what would do, for what these kernels do not take; None is not known.

    `capability` is the GPU's compute capability, like "9.0".
    """
    name = jnp.dtype(dtype).name
    if tile_size not in TILE_SIZES:
        raise NotImplementedError(f"the GPU kernels take a tile_size of 16, 32, 64 or 128, got {tile_size}")
    if head_dim not in (None, *HEAD_DIMS):
        raise NotImplementedError(f"the GPU kernels take heads of width 64 or 128, got {head_dim}")
    if name not in DTYPES:
        raise NotImplementedError(f"the GPU kernels take bfloat16 or float16, got {name}")
    if capability is not None and float(capability) < LEAST_CAPABILITY:
        raise NotImplementedError(f"the GPU kernels need compute capability {LEAST_CAPABILITY}, got {capability}")


# --- Dense ---


def dense(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, layout: Layout) -> jax.Array:
    """As `kascade_kernels.dense_attention`, on padded inputs."""
    check_sizes(LEAST_TILE, q_BTNH.shape[-1], q_BTNH.dtype)
    if layout.num_shards == 1 and jax.default_backend() == "gpu":  # cuDNN's is not even traced where there is none
        k_BSKH, v_BSKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")
    M = math.gcd(layout.block, TILE_SIZES[-1])
    tiles_QC = causal_tiles(layout, M)
    tiles_BKQC = jnp.broadcast_to(tiles_QC, (*k_BKHS.shape[:2], *tiles_QC.shape))
    return reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, Selection(tile_size=M, top_k=tiles_QC.shape[-1]), layout)


# --- Reuse ---


@dataclasses.dataclass(frozen=True)
class _Reuse:
    """Sizes of a reuse, whose programs do R rows each of one query tile and KV head."""

    T: int
    S: int
    N: int
    K: int
    Q: int
    C: int
    M: int
    Y: int
    R: int

    @property
    def rows(self) -> int:
        """Real rows of a query tile: those of all its group's heads."""
        return self.Y * (self.N // self.K)


def reuse(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, tiles_BKQC: jax.Array, selection: Selection, layout: Layout
) -> jax.Array:
    """As `kascade_kernels.reuse_attention`, on padded inputs."""
    check_sizes(selection.tile_size, q_BTNH.shape[-1], q_BTNH.dtype)
    (B, T, N, H), (K, S) = q_BTNH.shape, v_BKSH.shape[1:3]
    M, Y = selection.tile_size, selection.query_tile
    used_BKQ = (tiles_BKQC != NO_TILE).sum(-1)
    in_step = max(REUSE_KEYS // M, 1)
    slots = tile_count(tiles_BKQC.shape[-1], in_step) * in_step
    tiles_BKQC = jnp.where(jnp.arange(slots) < used_BKQ[..., None], pad_axis(tiles_BKQC, 3, slots), NO_TILE)
    rows = _pad_rows(Y * N // K)
    sizes = _Reuse(T, S, N, K, T // Y, slots, M, Y, min(rows, ROWS))
    k_XSH, v_XSH = (x.reshape(B * K * S, H) for x in (k_BKHS.swapaxes(2, 3), v_BKSH))  # a key is one piece

    def attend(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_reuse_kernel, sizes=sizes),
            grid=(rows // sizes.R, sizes.Q, B * K),
            out_shape=jax.ShapeDtypeStruct((B * T * N, H), q_BTNH.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=_warps(sizes.R), num_stages=3),
            interpret=interpret,
            name="kascade_reuse",
        )

    run = _on_gpu_or_interpreted(attend)
    first_Q = layout.local_positions()[::Y]
    out = run(first_Q, used_BKQ.reshape(-1), tiles_BKQC.reshape(-1), q_BTNH.reshape(B * T * N, H), k_XSH, v_XSH)
    return out.reshape(B, T, N, H)


def _reuse_kernel(first_ref, used_ref, tiles_ref, q_ref, k_ref, v_ref, out_ref, *, sizes: _Reuse):
    """R rows of one query tile and KV head: a step of online softmax for every W of its chosen keys."""
    part, i, x = (pl.program_id(axis) for axis in range(3))
    M, R, W, G = sizes.M, sizes.R, REUSE_KEYS, sizes.N // sizes.K
    row = part * R + jnp.arange(R)
    row = jnp.where(row < sizes.rows, row, 0)  # rows of padding repeat the first, and write it once more
    token, head = i * sizes.Y + lax.div(row, G), lax.rem(x, sizes.K) * G + lax.rem(row, G)
    at = (lax.div(x, sizes.K) * sizes.T + token) * sizes.N + head
    position_R1 = (first_ref[i] + lax.div(row, G))[:, None]
    q_RH = q_ref[at, :]
    scale = LOG2_E * q_RH.shape[-1] ** -0.5
    query_tile = x * sizes.Q + i

    def step(c, carry, masked):
        top, total, out = carry
        place = c * W + jnp.arange(W)
        tile = tiles_ref[query_tile * sizes.C + lax.div(place, M)]
        chosen = tile != NO_TILE
        key = jnp.where(chosen, tile, 0) * M + lax.rem(place, M)
        scores = plgpu.dot(q_RH, k_ref[x * sizes.S + key, :], trans_b=True)
        if masked:
            scores = jnp.where(chosen & (key <= position_R1), scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1) * scale)
        weights = jnp.exp2(scores * scale - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        values = plgpu.dot(weights.astype(v_ref.dtype), v_ref[x * sizes.S + key, :])
        return new_top, total * shrink + weights.sum(-1), out * shrink[:, None] + values

    used = used_ref[query_tile]
    own = max(sizes.Y // M, 1)  # the last of the tiles; the others are in the past of all rows
    clear = jnp.maximum((used - own) * M // W, 0)
    carry = (jnp.full(R, LEAST), jnp.zeros(R), jnp.zeros(q_RH.shape))
    carry = lax.fori_loop(0, clear, partial(step, masked=False), carry)
    _, total, out = lax.fori_loop(clear, pl.cdiv(used * M, W), partial(step, masked=True), carry)
    out_ref[at, :] = (out / total[:, None]).astype(out_ref.dtype)


# --- Choosing ---


@dataclasses.dataclass(frozen=True)
class _Score:
    """Sizes of a scoring, whose programs do R rows each: of a group of E query tiles, or one of A parts of one."""

    T: int
    S: int
    N: int
    K: int
    X: int
    groups: int
    R: int
    A: int
    E: int
    M: int

    @property
    def steps(self) -> int:
        """Blocks of keys of the whole sequence."""
        return self.S // SCORE_KEYS

    @property
    def chunk(self) -> int:
        """Groups of query tiles whose scratch fits."""
        each = 4 * self.A * self.R * self.steps * (SCORE_KEYS // self.M + 1)
        return max(1, min(SCRATCH_BYTES // each, self.X * self.groups))


def choose(q_BTNH: jax.Array, k_BKHS: jax.Array, selection: Selection, layout: Layout) -> jax.Array:
    """As `kascade_kernels.choose_tiles`, on padded inputs."""
    check_sizes(selection.tile_size, q_BTNH.shape[-1], q_BTNH.dtype)
    (B, T, N, H), K = q_BTNH.shape, k_BKHS.shape[1]
    S, Q = tile_count(k_BKHS.shape[3], SCORE_KEYS) * SCORE_KEYS, T // selection.query_tile
    token_QR, position_QR = _scored_rows(selection, layout, N // K)
    rows = _pad_rows(token_QR.shape[1])
    E = max(SHARED_ROWS // rows, 1)
    R, groups = min(E * rows, ROWS), tile_count(Q, E)
    sizes = _Score(T, S, N, K, B * K, groups, R, E * rows // R, E, selection.tile_size)
    spread = [(0, groups * E - Q), (0, rows - token_QR.shape[1])]
    token_QR, position_QR = jnp.pad(token_QR, spread), jnp.pad(position_QR, spread, constant_values=-1)
    position_IAR = position_QR.reshape(groups, sizes.A, R)
    last_IA = position_IAR.max(-1)
    first_IA = jnp.where(position_IAR < 0, layout.length, position_IAR).min(-1)
    query_tile_Q = pad_axis(layout.local_positions()[:: selection.query_tile] // selection.query_tile, 0, groups * E)
    k_XSH = pad_axis(k_BKHS.swapaxes(2, 3), 2, S).reshape(B * K * S, H)
    rows_in = [x.reshape(-1) for x in (first_IA, last_IA, token_QR, position_QR)]
    run = _score_chunk(sizes, *rows_in, q_BTNH.reshape(B * T * N, H), k_XSH)

    def choose_chunk(base: jax.Array) -> jax.Array:
        group_I = (base + jnp.arange(sizes.chunk)) % groups
        steps_IA = pl.cdiv(last_IA[group_I] + 1, SCORE_KEYS)
        scores_IEP = _pool(*run(base), steps_IA, sizes.E)[..., : tile_count(layout.length, sizes.M)]
        places_IE = query_tile_Q.reshape(groups, E)[group_I]
        return select_tiles(scores_IEP.reshape(-1, scores_IEP.shape[-1]), selection, places_IE.reshape(-1))

    tiles = lax.map(choose_chunk, jnp.arange(0, sizes.X * groups, sizes.chunk))
    tiles_XQC = tiles.reshape(-1, tiles.shape[-1])[: sizes.X * groups * E].reshape(B, K, groups * E, -1)
    return tiles_XQC[:, :, :Q]


def _scored_rows(selection: Selection, layout: Layout, group_size: int) -> tuple[jax.Array, jax.Array]:
    """int32 [Q, rows]: this shard's token and its place in the sequence of each scored row; -1 is a row of padding.

    The rows of a token's heads lie side by side.
    """
    Y = selection.query_tile
    offset_R = jnp.repeat(jnp.asarray(selection.scored_rows(), jnp.int32), group_size)
    first_Q = layout.local_positions()[::Y]
    token_QR = jnp.arange(len(first_Q), dtype=jnp.int32)[:, None] * Y + offset_R
    position_QR = first_Q[:, None] + offset_R
    return token_QR, jnp.where(position_QR < layout.length, position_QR, -1)


def _score_chunk(sizes: _Score, *inputs: jax.Array) -> Callable[[jax.Array], Any]:
    """run(base): the chunk of groups that begins with `base`: mass_IAPR, tops_IAJR, total_IA1R (see the kernel)."""
    shapes = [(rows, sizes.R) for rows in (sizes.steps * (SCORE_KEYS // sizes.M), sizes.steps, 1)]

    def score(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            partial(_score_kernel, sizes=sizes),
            grid=(sizes.A, sizes.chunk),
            out_specs=[pl.BlockSpec((None, None, *shape), lambda a, i: (i, a, 0, 0)) for shape in shapes],
            out_shape=[jax.ShapeDtypeStruct((sizes.chunk, sizes.A, *shape), jnp.float32) for shape in shapes],
            compiler_params=plgpu.CompilerParams(num_warps=_warps(sizes.R), num_stages=2),
            interpret=interpret,
            name="kascade_score",
        )

    return lambda base: _on_gpu_or_interpreted(score)(base[None], *inputs)


def _score_kernel(
    base_ref, first_ref, last_ref, token_ref, position_ref, q_ref, k_ref, mass_ref, tops_ref, total_ref, *, sizes
):
    """R rows and all keys that they see: for each key tile the sum of exp(score) under its block's own maximum.

    Scores are in base 2. A row's total is the logarithm of the sum over all its keys, and beyond every score for
    rows of padding, so that their shares are 0. Blocks that no row sees are not written.
    """
    part, M, R, W, G = pl.program_id(0), sizes.M, sizes.R, SCORE_KEYS, sizes.N // sizes.K
    item = jnp.minimum(base_ref[0] + pl.program_id(1), sizes.X * sizes.groups - 1)  # the last chunk may be half empty
    x, group = lax.div(item, sizes.groups), lax.rem(item, sizes.groups)
    row = part * R + jnp.arange(R)
    at = group * (sizes.A * R) + row
    token, position = token_ref[at], position_ref[at]
    head = lax.rem(x, sizes.K) * G + lax.rem(row, G)  # G rows side by side are of all the group's heads, in some order
    q_RH = q_ref[(lax.div(x, sizes.K) * sizes.T + token) * sizes.N + head, :]
    scale = LOG2_E * q_RH.shape[-1] ** -0.5

    def step(j, carry, masked):
        top, total = carry
        key = j * W + jnp.arange(W)
        scores = plgpu.dot(q_RH, k_ref[x * sizes.S + key, :], trans_b=True)
        if masked:
            scores = jnp.where(key <= position[:, None], scores, -jnp.inf)
        block_top = jnp.maximum(scores.max(-1) * scale, LEAST)
        weights = jnp.exp2(scores * scale - block_top[:, None])
        mass = weights.reshape(R, W // M, M).sum(-1) if M < W else weights.sum(-1, keepdims=True)
        mass_ref[pl.ds(j * (W // M), W // M), :] = mass.T
        tops_ref[j, :] = block_top
        new_top = jnp.maximum(top, block_top)
        return new_top, total * jnp.exp2(top - new_top) + mass.sum(-1) * jnp.exp2(block_top - new_top)

    clear, end = (first_ref[group * sizes.A + part] + 1) // W, pl.cdiv(last_ref[group * sizes.A + part] + 1, W)
    carry = (jnp.full(R, LEAST), jnp.zeros(R))
    carry = lax.fori_loop(0, jnp.minimum(clear, end), partial(step, masked=False), carry)
    top, total = lax.fori_loop(jnp.minimum(clear, end), end, partial(step, masked=True), carry)
    total_ref[0, :] = jnp.where(position >= 0, top + jnp.log2(total), -LEAST)


def _pool(mass_IAPR: jax.Array, tops_IAJR: jax.Array, total_IA1R: jax.Array, steps_IA: jax.Array, E: int) -> jax.Array:
    """scores_IEP: the rows' shares of each key tile, summed over a query tile's rows."""
    num, A, P, R = mass_IAPR.shape
    J = tops_IAJR.shape[2]
    share = jnp.exp2(tops_IAJR - total_IA1R)[:, :, :, None]
    seen = (jnp.arange(J) < steps_IA[..., None])[..., None, None]
    mass = jnp.where(seen, mass_IAPR.reshape(num, A, J, P // J, R) * share, 0)
    return mass.reshape(num, A, P, E, R // E).sum((1, 4)).swapaxes(1, 2)


def _pad_rows(rows: int) -> int:
    """Rows of whole programs: a power of two, or where one program is not enough a multiple of ROWS."""
    return pl.next_power_of_2(max(rows, LEAST_ROWS)) if rows <= ROWS else tile_count(rows, ROWS) * ROWS


def _warps(rows: int) -> int:
    return 8 if rows >= ROWS else 4


def _on_gpu_or_interpreted(make: Callable[[bool], Callable[..., Any]]) -> Callable[..., Any]:
    """make(interpret), as the platform that the program is lowered for needs it."""
    return lambda *args: lax.platform_dependent(*args, cuda=make(False), default=make(True))
