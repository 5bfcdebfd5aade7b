"""How fast are anchor and reuse steps of decoding beside the best dense step, for one layer of a real shape?

Random caches, one device; one new token a sequence, Top-K a share of its tiles. Dense is what a run decodes with; on a
GPU cuDNN's attention is timed beside it, and FlashAttention-3 where `flash-attn3-jax` is installed (Hopper, width 128),
each on caches in the layout that it likes best. Before a depth is timed, every program's first sequence is compared
with float64. A program is a chain of steps, each step's output being the next one's queries, over caches whose chosen
tiles together exceed the device's last cache, and on an accelerator a turn is a queue of calls: so neither the start of
a program nor a cache is what is measured. The weighted speedup is that of a model of 1 dense, 4 anchor and 27 reuse
layers over one of 32 dense layers, by the fastest dense step.

  python -m bench.attention_steps --shape llama3.1-8b --depth 8192,32768,131072 --batch 16 --markdown table.md
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention import decode
from attention.sharding import compile_ahead
from bench.attention import (
    ANCHORS,
    CACHE_BYTES,
    FLASH,
    LOST_MASS,
    SHAPES,
    describe_ceilings,
    flash_attention,
    print_table,
    queue_calls,
    spread_of,
    weighted_speedups,
)
from errors import Parser, exit_on_bad_input
from kascade_core import EXACT, NO_TILE, Selection
from measure.machine import configure_device, pick_kernel, time_interleaved
from measure.settings import DTYPES, whole_number, whole_numbers

CHAIN = 8  # steps of one call at least
ANCHOR = ANCHORS[EXACT]
Step = Callable[..., jax.Array]  # (q_BNH, keys, values, tiles_BK1C) to out_BNH


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One depth of one shape: the new token of each sequence is the last of `depth`."""

    heads: tuple[int, int, int]
    depth: int
    batch: int
    selection: Selection
    dtype: Any
    kernel: str

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all sequences."""
        _, K, H = self.heads
        return 2 * self.batch * K * self.depth * H * jnp.dtype(self.dtype).itemsize

    @property
    def positions(self) -> jax.Array:
        """The new tokens' places, int32 [B]."""
        return jnp.full(self.batch, self.depth - 1, jnp.int32)

    def queries(self) -> jax.Array:
        """Random q_BNH."""
        return jax.random.normal(jax.random.key(0), (self.batch, self.heads[0], self.heads[2]), self.dtype)

    def cache(self, seed: int) -> tuple[jax.Array, jax.Array]:
        """Random k_ZSH and v_ZSH."""
        shape = (self.batch * self.heads[1], self.depth, self.heads[2])
        return tuple(jax.random.normal(key, shape, self.dtype) for key in jax.random.split(jax.random.key(seed + 1)))

    def by_token(self, x_ZSH: jax.Array) -> jax.Array:
        """The cache as [B, S, K, H], as cuDNN and FlashAttention-3 read it."""
        return x_ZSH.reshape(self.batch, self.heads[1], self.depth, -1).swapaxes(1, 2)

    def steps(self) -> dict[str, Step]:
        """What a run decodes with."""
        sizes = {"selection": self.selection, "kernel": self.kernel}

        def dense(q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, _: jax.Array) -> jax.Array:
            return decode.dense_step(q_BNH, k_ZSH, v_ZSH, self.positions, kernel=self.kernel)

        def anchor(q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, _: jax.Array) -> jax.Array:
            tiles_BK1C, products_ZSG = decode.choose_step(q_BNH, k_ZSH, self.positions, **sizes)
            if products_ZSG is None:
                return decode.reuse_step(q_BNH, k_ZSH, v_ZSH, self.positions, tiles_BK1C, **sizes)
            return decode.anchor_step(products_ZSG, v_ZSH, self.positions, tiles_BK1C, self.selection)

        def reuse(q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, tiles_BK1C: jax.Array) -> jax.Array:
            return decode.reuse_step(q_BNH, k_ZSH, v_ZSH, self.positions, tiles_BK1C, **sizes)

        return {"dense": dense, ANCHOR: anchor, "reuse": reuse}

    def baselines(self) -> dict[str, Step]:
        """Other programs' dense steps, on caches [B, S, K, H]."""
        if jax.default_backend() != "gpu":
            return {}

        def cudnn(q_BNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, _: jax.Array) -> jax.Array:
            with jax.numpy_dtype_promotion("standard"):  # JAX's own function relies on it, whatever the user has set
                return jax.nn.dot_product_attention(q_BNH[:, None], k_BSKH, v_BSKH, implementation="cudnn")[:, 0]

        steps = {"dense, cuDNN": cudnn}
        if module := flash_attention(self.heads[2]):
            parts = min(max(128 // (self.batch * self.heads[1]), 1), 32)  # as many as fill the device

            def flash(q_BNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, _: jax.Array) -> jax.Array:
                lengths_B = jnp.full(self.batch, self.depth, jnp.int32)
                options = {"cache_seqlens": lengths_B, "num_splits": parts}
                return module.flash_mha_with_kvcache(q_BNH[:, None], k_BSKH, v_BSKH, **options)[:, 0]

            steps[FLASH] = flash
        return steps


# --- Correctness ---


def check_steps(case: StepCase, results: dict[str, jax.Array], cache: Sequence[jax.Array], tiles: jax.Array) -> str:
    """Compares the first sequence's outputs and choice with float64; returns the errors in words.

    Raises:
      SystemExit: a step computes something else, so its times would mean nothing.
    """
    (N, K, H), M = case.heads, case.selection.tile_size
    q_KGH = np.asarray(case.queries()[0], np.float64).reshape(K, N // K, H)
    k_KSH, v_KSH = (np.asarray(x[:K], np.float64) for x in cache)
    weights_KGS = np.exp(np.einsum("KGH,KSH->KGS", q_KGH, k_KSH) / math.sqrt(H))
    chosen_KC = np.asarray(tiles[0, :, 0])
    kept_KS = np.array([np.isin(np.arange(case.depth) // M, mine[mine != NO_TILE]) for mine in chosen_KC])
    words = []
    for name, out in results.items():
        kept_KGS = weights_KGS * (True if name.startswith("dense") else kept_KS[:, None])
        expected = np.einsum("KGS,KSH->KGH", kept_KGS, v_KSH) / kept_KGS.sum(-1, keepdims=True)
        got = np.asarray(out[0], np.float64).reshape(expected.shape)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        if not error <= max(float(jnp.finfo(case.dtype).eps), 1e-5):
            raise SystemExit(f"error: {name} at {case.depth} tokens is {error:.1e} away from float64: nothing timed")
        words.append(f"{name} {error:.1e}")
    mass_KP = (weights_KGS / weights_KGS.sum(-1, keepdims=True)).sum(1).reshape(K, -1, M).sum(-1)
    lost = max(_lost_mass(mass_P, mine[mine != NO_TILE]) for mass_P, mine in zip(mass_KP, chosen_KC))
    if not lost <= LOST_MASS:
        raise SystemExit(f"error: {ANCHOR} at {case.depth} tokens misses {lost:.1e} of the best tiles: nothing timed")
    return f"{case.depth} tokens, relative errors against float64: {', '.join(words)}"


def _lost_mass(mass_P: np.ndarray, chosen: np.ndarray) -> float:
    """The share of the best tiles' mass that the chosen ones lack; the last tile, the own one, is always kept."""
    others = chosen[chosen != len(mass_P) - 1]
    if len(others) != len(chosen) - 1:
        return 1.0
    return 1 - mass_P[others].sum() / np.sort(mass_P[:-1])[::-1][: len(others)].sum() if len(others) else 0.0


# --- Measuring ---


def chained(step: Step, length: int) -> Callable[..., jax.Array]:
    """`length` steps, each with the output of the one before as its queries, over the caches in turn."""

    def run(q_BNH: jax.Array, caches: Sequence[Sequence[jax.Array]], tiles: jax.Array) -> jax.Array:
        for i in range(length):
            q_BNH = step(q_BNH, *caches[i % len(caches)], tiles).astype(q_BNH.dtype)
        return q_BNH

    return run


def time_steps(case: StepCase, n_runs: int) -> tuple[dict[str, list[float]], np.ndarray, str]:
    """Milliseconds of a step of each program, the tiles of reuse, and the programs' errors in words."""
    num_caches = math.ceil(CACHE_BYTES / (case.cache_bytes * case.selection.density))
    length, q_BNH = max(CHAIN, num_caches), case.queries()
    caches = [case.cache(seed) for seed in range(num_caches)]
    choose = partial(decode.choose_step, selection=case.selection, kernel=case.kernel)
    args = (q_BNH, caches[0][0], case.positions)
    tiles, _ = compile_ahead(choose, args)(*args)
    by_token = [tuple(map(case.by_token, cache)) for cache in caches] if case.baselines() else []
    programs = {name: (step, caches) for name, step in case.steps().items()}
    programs |= {name: (step, by_token) for name, step in case.baselines().items()}
    results, turns, steps = {}, {}, {}
    for name, (step, arrays) in programs.items():
        args = (q_BNH, *arrays[0], tiles)
        results[name] = compile_ahead(step, args)(*args)
        args = (q_BNH, arrays, tiles)
        program = compile_ahead(chained(step, length), args)
        turns[name], steps[name] = queue_calls(program, [args])
        steps[name] *= length
    words = check_steps(case, results, caches[0], tiles)
    times = time_interleaved(turns, n_runs)
    return {name: [ms / steps[name] for ms in turn] for name, turn in times.items()}, np.asarray(tiles), words


# --- The table ---


def format_case(case: StepCase, times: dict[str, list[float]], tiles_BK1C: np.ndarray) -> str:
    """The table's rows of one depth, one for each program."""
    density = float((tiles_BK1C != NO_TILE).mean() * tiles_BK1C.shape[-1]) * case.selection.tile_size / case.depth
    shares = {ANCHOR: 0.5 + density, "reuse": density}  # of the cache that a step reads
    best = min((name for name in times if name.startswith("dense")), key=lambda name: statistics.median(times[name]))
    lines = []
    for name, samples in times.items():
        share = shares.get(name, 1.0)
        ratios = [ours / dense for ours, dense in zip(samples, times[best])]
        cells = [f"{case.depth}", f"{case.batch}", name, f"{density:.1%}" if name in shares else "100%"]
        cells += [spread_of([1e3 * ms for ms in samples], "{:.1f}".format), spread_of(ratios, "{:.3f}".format)]
        cells += [f"{share * case.cache_bytes / statistics.median(samples) / 1e6:,.0f}"]
        speedups = weighted_speedups(times | {"dense": times[best]}, name) if name == ANCHOR else []
        cells += [spread_of(speedups, "{:.2f}x".format) if speedups else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "tpu", "gpu"], default="gpu", help="default: gpu")
    parser.add_argument("--shape", choices=[*SHAPES], default="llama3.1-8b", help="default: llama3.1-8b")
    parser.add_argument("--depth", type=whole_numbers, default=(8192, 32768, 131072), help="default: 8192,32768,131072")
    parser.add_argument("--batch", type=whole_number, default=16, help="sequences (default 16)")
    parser.add_argument("--density", type=float, default=0.1, help="share of the tiles (default 0.1)")
    parser.add_argument("--tile_size", type=whole_number, default=128, help="tokens in a key tile (default 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--kernel", choices=["auto", *attention.KERNELS], default="auto", help="default: the device's own"
    )
    parser.add_argument("--n_runs", type=whole_number, default=10, help="timed rounds (default 10)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    for name in ("n_runs", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1, got {getattr(args, name)}")
    for depth in args.depth:
        if depth < 1 or depth % max(args.tile_size, 1):
            parser.error(f"argument --depth: expected whole tiles, got {depth} tokens")
    return args


def measure_rows(cases: Iterable[StepCase], n_runs: int) -> Iterator[tuple[str, str]]:
    """Checks and times one depth after the other: its rows, and its errors in words."""
    for case in cases:
        times, tiles, exactness = time_steps(case, n_runs)
        yield format_case(case, times, tiles), exactness


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and times one depth after the other."""
    args = parse_args(argv)
    with exit_on_bad_input():
        device, heads = configure_device(args.device)[0], SHAPES[args.shape]
        selection = Selection(args.tile_size, density=args.density, sink_tiles=0)
        sizes = args.depth[-1], heads[2], args.dtype, getattr(device, "compute_capability", None)
        kernel, why = pick_kernel(args.kernel, args.device, selection, *sizes)
        for depth in args.depth:
            decode.check(kernel, selection, (args.batch * heads[1], depth, heads[2]), args.dtype)
        (N, K, H), ceilings = heads, describe_ceilings(args.dtype)
        description = (
            f"{args.shape}: {N} query and {K} KV heads of width {H}; {device.device_kind}, {args.dtype}, {kernel} "
            f"({why}); tile {args.tile_size}, Top-K {args.density:.0%} of the tiles; n = {args.n_runs} interleaved "
            f"rounds, median [min, max] of a step. GB/s of the keys and values that a step needs. {ceilings}"
        )
        columns = "depth", "batch", "", "density", "us", "of the fastest dense", "GB/s", "weighted speedup"
        cases = (StepCase(heads, depth, args.batch, selection, args.dtype, kernel) for depth in args.depth)
        print_table(description, columns, measure_rows(cases, args.n_runs), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
