"""How fast are anchor and reuse attention beside the device's best dense attention, for one layer of a real shape?

Random inputs, one device, Top-K a share of the causal tiles that grows with the position, as the paper's. Dense is
cuDNN's on a GPU. Before a length is timed, what each program computes is compared with float32 on the first, the last
and some other query tiles. Then the programs take turns; each turn of an accelerator is a queue of calls, on inputs
that take turns too and together are larger than its cache, and the time of a call is the queue's over its calls. All
take inputs as the model's layers have them, and bring keys and values into the order that they need. The weighted
speedup is that of a model of 1 dense, 4 anchor and 27 reuse layers over one of 32 dense ones.

  python bench/attention.py --shape llama3.1-8b --seq_len 8192,32768,131072 --markdown table.md
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kascade_layout import tile_count
from kascade_report import versions
from kascade_setup import (
    DTYPES,
    at_least_one,
    configure_device,
    exit_on_bad_input,
    lengths,
    pick_dtype,
    pick_kernel,
    share,
)

import kascade_kernels as kernels
from convert_weights import OneSentenceParser
from kascade_core import EXACT, FAST, NO_TILE, Selection, compile_ahead
from kascade_kernels import IMPLEMENTATIONS, time_interleaved

SHAPES = {"llama3.2-1b": (32, 8, 64), "llama3.1-8b": (32, 8, 128)}  # query heads, KV heads, head width
WEIGHTS = {"dense": 1, "anchor": 4, "reuse": 27}  # layers; a dense layer 0 is never reused
CACHE_BYTES = 128e6  # more than any accelerator's last cache holds
CEILING_SIZES = {"cpu": (1024, 2**24), "accelerator": (8192, 2**28)}  # a product's matrices, a copy's numbers
QUEUE_SECONDS = 0.05  # a queue so long that starting it costs nothing
CHECKED_TILES = 4
LOST_MASS = 1e-3  # of the best tiles' attention mass, which near ties may cost
ANCHORS = {EXACT: "anchor, exact scoring", FAST: "anchor, fast scoring"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One length of one shape, how its tiles are chosen, and the implementations."""

    heads: tuple[int, int, int]
    length: int
    selection: Selection
    dtype: Any
    kernel: str
    dense_kernel: str

    @property
    def bytes(self) -> int:
        """Queries, keys, values and output, once each."""
        N, K, H = self.heads
        return 2 * (N + K) * H * self.length * jnp.dtype(self.dtype).itemsize

    def inputs(self, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random q_BTNH, k_BKHS and v_BKSH."""
        (N, K, H), T = self.heads, self.length
        shapes = [(1, T, N, H), (1, K, H, T), (1, K, T, H)]
        keys = jax.random.split(jax.random.key(seed), 3)
        return tuple(jax.random.normal(key, shape, self.dtype) for key, shape in zip(keys, shapes))

    def compile(self, qkv: Sequence[jax.Array], tiles: jax.Array | None = None) -> dict[str, Callable[..., Any]]:
        """The programs of (q, k, v): dense and the anchors; or with tiles that of (q, k, v, tiles): reuse."""
        where = {"selection": self.selection, "implementation": self.kernel}
        if tiles is not None:
            return {"reuse": compile_ahead(partial(kernels.reuse_attention, **where), (*qkv, tiles), None)}
        programs = {"dense": partial(kernels.dense_attention, implementation=self.dense_kernel)}
        for scoring, name in ANCHORS.items():
            selection = dataclasses.replace(self.selection, scoring=scoring)
            programs[name] = partial(kernels.anchor_attention, **where | {"selection": selection})
        return {name: compile_ahead(program, qkv, None) for name, program in programs.items()}


# --- Correctness ---


def reference(
    case: Case, qkv: Sequence[jax.Array], query_tile: int, tiles_KC: np.ndarray | None, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 attention of one query tile's `rows`: out [K, rows, G, H], and the mass of each key tile [K, P].

    Over the whole past, or over the given tiles of each KV head.
    """
    (N, K, H), T, M = case.heads, case.length, case.selection.tile_size
    q_BTNH, k_BKHS, v_BKSH = qkv
    rows = query_tile * case.selection.query_tile + rows
    q_KRGH = q_BTNH[0, rows].reshape(len(rows), K, N // K, H).swapaxes(0, 1)
    seen_KP = np.ones((K, tile_count(T, M)), bool)
    if tiles_KC is not None:
        seen_KP[:] = [np.isin(np.arange(seen_KP.shape[1]), tiles) for tiles in tiles_KC]
    outs, masses = _reference(q_KRGH, k_BKHS[0], v_BKSH[0], jnp.asarray(seen_KP), jnp.asarray(rows), M)
    return np.asarray(outs), np.asarray(masses)


@partial(jax.jit, static_argnums=5)
def _reference(q_KRGH: Any, k_KHS: Any, v_KSH: Any, seen_KP: Any, rows_R: Any, tile_size: int) -> Any:
    """One KV head after the other, so that a head's [R, G, T] is all that there is at a time."""
    T, precise = k_KHS.shape[2], {"precision": lax.Precision.HIGHEST}

    def attend(head: tuple[Any, ...]) -> tuple[Any, Any]:
        q_RGH, k_HS, v_SH, seen_P = head
        scores = jnp.einsum("RGH,HS->RGS", *(x.astype(jnp.float32) for x in (q_RGH, k_HS)), **precise)
        visible_RS = (jnp.arange(T) <= rows_R[:, None]) & jnp.repeat(seen_P, tile_size)[:T]
        weights = jax.nn.softmax(jnp.where(visible_RS[:, None], scores * q_RGH.shape[-1] ** -0.5, -jnp.inf))
        mass_S = jnp.pad(weights.sum((0, 1)), (0, len(seen_P) * tile_size - T))
        out = jnp.einsum("RGS,SH->RGH", weights, v_SH.astype(jnp.float32), **precise)
        return out, mass_S.reshape(len(seen_P), tile_size).sum(-1)

    return lax.map(attend, (q_KRGH, k_KHS, v_KSH, seen_KP))


def check(case: Case, qkv: Sequence[jax.Array], programs: dict[str, Callable[..., Any]], tiles: jax.Array) -> str:
    """Compares every program with float32; returns the errors in words.

    Raises:
      SystemExit: a program computes something else; its numbers would mean nothing.
    """
    results = {name: program(*qkv) for name, program in programs.items() if name != "reuse"}
    outputs = {"dense": (results["dense"], None), "reuse": (programs["reuse"](*qkv, tiles), tiles)}
    outputs |= {name: results[name] for name in ANCHORS.values()}
    every, Q = np.arange(case.selection.query_tile), case.length // case.selection.query_tile
    places = sorted({*np.linspace(0, Q - 1, CHECKED_TILES).astype(int).tolist()})
    tolerance = max(float(jnp.finfo(case.dtype).eps), 1e-5)
    words = []
    for name, (out, chosen) in outputs.items():
        error = np.max([_error(case, qkv, place, out, chosen, every) for place in places])  # NaN stays NaN
        if not error <= tolerance:
            raise SystemExit(f"error: {name} at {case.length} tokens is {error:.1e} away from float32: nothing timed")
        words.append(f"{name} {error:.1e}")
    for scoring, name in ANCHORS.items():
        lost = np.max([_lost_mass(case, qkv, place, results[name][1], scoring) for place in places])
        if not lost <= LOST_MASS:
            raise SystemExit(
                f"error: {name} at {case.length} tokens misses {lost:.1e} of the best tiles: nothing timed"
            )
    return f"{case.length} tokens, relative errors against float32: {', '.join(words)}"


def _error(
    case: Case, qkv: Sequence[jax.Array], place: int, out: jax.Array, tiles: jax.Array | None, rows: np.ndarray
) -> float:
    """Relative error of one query tile's output, in the Euclidean norm."""
    expected, _ = reference(case, qkv, place, None if tiles is None else np.asarray(tiles[0, :, place]), rows)
    got = np.asarray(out[0, place * len(rows) :][: len(rows)], np.float32)
    got = got.reshape(len(rows), len(expected), -1, got.shape[-1]).swapaxes(0, 1)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _lost_mass(case: Case, qkv: Sequence[jax.Array], place: int, tiles: jax.Array, scoring: str) -> float:
    """Of the mass that the best tiles hold in the scored rows, what the chosen ones lack; 1 for a wrong count.

    How many there are to choose is counted here anew; a query tile's own are not weighed, but must be there.
    """
    selection = dataclasses.replace(case.selection, scoring=scoring)
    _, mass_KP = reference(case, qkv, place, None, selection.scored_rows())
    M, first, end = selection.tile_size, place * selection.query_tile, (place + 1) * selection.query_tile
    past, seen = first // M, tile_count(end, M)
    count = min(max(math.ceil(selection.density * seen - 1e-4), selection.always), seen)
    lost = []
    for mass_P, chosen in zip(mass_KP[:, :past], np.asarray(tiles[0, :, place])):
        chosen = {*chosen[chosen != NO_TILE].tolist()}
        others = sorted(chosen - {*range(past, seen)})
        if len(chosen) != count or len(others) != count - (seen - past):
            return 1.0
        best = np.sort(mass_P)[::-1][: len(others)].sum()
        lost.append(1 - mass_P[others].sum() / best if others else 0.0)
    return np.max(lost)


# --- Measuring ---


def count_pairs(case: Case, tiles_BKQC: np.ndarray) -> tuple[float, float]:
    """Causal (query, key) pairs, and those in the chosen tiles, of one query head: averages over the heads."""
    T, Y, M = case.length, case.selection.query_tile, case.selection.tile_size
    first_Q = np.arange(tiles_BKQC.shape[2]) * Y
    own_start_Q, block = first_Q // M * M, max(Y // M, 1)
    own_Q = Y * (first_Q - own_start_Q) + Y * (Y + 1) / 2
    used_Q = (tiles_BKQC != NO_TILE).sum(-1).mean((0, 1))
    return T * (T + 1) / 2, float(((used_Q - block) * M * Y + own_Q).sum())


def count_flops(case: Case, causal_pairs: float, chosen_pairs: float) -> dict[str, float]:
    """Operations of the matrix products that each program needs: masked pairs are not counted."""
    (N, _, H), selection = case.heads, case.selection
    causal, chosen = (4 * N * H * pairs for pairs in (causal_pairs, chosen_pairs))
    fast = len(dataclasses.replace(selection, scoring=FAST).scored_rows()) / selection.query_tile
    anchors = {ANCHORS[EXACT]: causal / 2 + chosen, ANCHORS[FAST]: causal / 2 * fast + chosen}
    return {"dense": causal, **anchors, "reuse": chosen}


def queue(call: Callable[..., Any], inputs: Sequence[Sequence[jax.Array]], calls: int) -> Any:
    """Calls one after the other, not waiting for any; returns the last one's result."""
    result = None
    for i in range(calls):
        result = call(*inputs[i % len(inputs)])
    return result


def measure(case: Case, n_runs: int) -> tuple[dict[str, list[float]], np.ndarray, str]:
    """Milliseconds of a call of each program, the reuse layer's tiles, and how exact they are."""
    qkv = case.inputs(0)
    programs = case.compile(qkv)
    tiles = programs[ANCHORS[EXACT]](*qkv)[1]
    programs |= case.compile(qkv, tiles)
    exactness = check(case, qkv, programs, tiles)
    on_cpu = jax.default_backend() == "cpu"  # whose calls would run side by side, and are too long to need a queue
    num_sets = 1 if on_cpu else max(2, math.ceil(CACHE_BYTES / case.bytes))
    sets = [qkv, *(case.inputs(seed) for seed in range(1, num_sets))]
    turns, calls = {}, {}
    for name, program in programs.items():
        inputs = [(*qkv, tiles) for qkv in sets] if name == "reuse" else sets
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs[0]))
        calls[name] = 1 if on_cpu else max(1, math.ceil(QUEUE_SECONDS / (time.perf_counter() - start)))
        turns[name] = partial(queue, program, inputs, calls[name])
    samples = time_interleaved(turns, n_runs)
    times = {name: [ms / calls[name] for ms in turn] for name, turn in samples.items()}
    return times, np.asarray(tiles), exactness


def weighted_speedups(times: dict[str, list[float]], anchor: str) -> list[float]:
    """Of 32 layers by WEIGHTS over as many dense ones, round by round."""
    layers = sum(WEIGHTS.values())
    return [
        layers * dense / (WEIGHTS["dense"] * dense + WEIGHTS["anchor"] * chosen + WEIGHTS["reuse"] * reused)
        for dense, chosen, reused in zip(times["dense"], times[anchor], times["reuse"])
    ]


def measure_ceilings(dtype: Any) -> tuple[float, float]:
    """TFLOP/s of a large matrix product, and GB/s of a copy, counting what is read and written; medians of 5."""
    size, length = CEILING_SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    x = jax.random.normal(jax.random.key(2), (length,), jnp.float32)
    turns = {"product": partial(jax.jit(jnp.matmul), a, b), "copy": partial(jax.jit(jnp.negative), x)}
    samples = time_interleaved({name: partial(queue, turn, [()], 10) for name, turn in turns.items()}, 5)
    product, copy = (statistics.median(samples[name]) / 10 / 1e3 for name in turns)
    return 2 * size**3 / product / 1e12, 2 * x.nbytes / copy / 1e9


# --- The table ---


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(values: Sequence[float], form: Callable[[float], str] = _number) -> str:
    return f"{form(statistics.median(values))} [{form(min(values))}, {form(max(values))}]"


def format_rows(case: Case, times: dict[str, list[float]], tiles_BKQC: np.ndarray) -> str:
    """A row a program."""
    causal, chosen = count_pairs(case, tiles_BKQC)
    flops = count_flops(case, causal, chosen)
    lines = []
    for name, samples in times.items():
        seconds = statistics.median(samples) / 1e3
        ratios = [ours / dense for ours, dense in zip(samples, times["dense"])]
        cells = [f"{case.length}", name, "100%" if name == "dense" else f"{chosen / causal:.1%}"]
        cells += [_spread(samples, "{:.4g}".format), _spread(ratios, "{:.3f}".format)]
        cells += [_number(flops[name] / seconds / 1e12), _number(case.bytes / seconds / 1e9)]
        cells += [_spread(weighted_speedups(times, name), "{:.2f}x".format) if name in ANCHORS.values() else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(args: argparse.Namespace, device: jax.Device, kernel: str, dense: str, ceilings: Sequence[float]) -> str:
    """What the table's numbers are of; the dtype of `args` is no longer "auto"."""
    (N, K, H), (products, copies) = SHAPES[args.shape], ceilings
    packages = ", ".join(f"{name} {versions()[name]}" for name in ("jax", "jaxlib"))
    return (
        f"{args.shape}: {N} query and {K} KV heads of width {H}; {device.device_kind}, {args.dtype}, {kernel}; dense "
        f"is {dense}; {packages}; tile {args.tile_size}, query tile {args.query_tile or args.tile_size}, Top-K "
        f"{args.density:.0%} of the causal tiles; n = {args.n_runs} interleaved rounds, median [min, max]. Density is "
        f"of the causal pairs, counted; TFLOP/s of the products that are needed; GB/s of queries, keys, values and "
        f"output, each counted once. A large matrix product reaches {_number(products)} TFLOP/s here, a copy "
        f"{_number(copies)} GB/s."
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "tpu", "gpu"], default="gpu", help="default: gpu")
    parser.add_argument("--shape", choices=[*SHAPES], default="llama3.1-8b", help="default: llama3.1-8b")
    parser.add_argument("--seq_len", type=lengths, default=[8192, 32768, 131072], help="default: 8192,32768,131072")
    parser.add_argument("--density", type=share, default=0.1, help="share of the causal tiles (default 0.1)")
    parser.add_argument("--tile_size", type=at_least_one, default=128, help="tokens in a key tile (default 128)")
    parser.add_argument("--query_tile", type=at_least_one, help="tokens that share a choice (default: tile_size)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as the benchmark's")
    parser.add_argument(
        "--kernel", choices=["auto", *IMPLEMENTATIONS], default="auto", help="default: the device's own"
    )
    parser.add_argument("--n_runs", type=at_least_one, default=10, help="timed rounds (default 10)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    for length in args.seq_len:
        if length % max(args.tile_size, args.query_tile or 1):
            parser.error(f"argument --seq_len: expected whole tiles, got {length} tokens")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and times one length after the other."""
    args = parse_args(argv)
    with exit_on_bad_input():
        device = configure_device(args.device)[0]
        args.dtype, heads = pick_dtype(args.dtype, args.device), SHAPES[args.shape]
        dtype = DTYPES[args.dtype]
        selection = Selection(tile_size=args.tile_size, query_tile=args.query_tile, density=args.density, top_k=10**6)
        this = {"dtype": args.dtype, "head_dim": heads[2], "capability": getattr(device, "compute_capability", None)}
        kernel, why = pick_kernel(args.kernel, args.device, selection, args.seq_len[-1], **this)
        dense, _ = pick_kernel("auto", args.device, Selection(tile_size=128), args.seq_len[-1], **this)
        dense_name = "cuDNN's" if dense == "pallas_gpu" else f"{dense}'s"
        parts = [describe(args, device, f"{kernel} ({why})", dense_name, measure_ceilings(dtype)) + "\n"]
        names = "tokens", "", "density", "ms", "of dense", "TFLOP/s", "GB/s", "weighted speedup"
        parts.append("| " + " | ".join(names) + " |" + "\n|" + "---|" * len(names))
        print("\n".join(parts), flush=True)
        for length in args.seq_len:
            case = Case(heads, length, selection, dtype, kernel, dense)
            times, tiles, exactness = measure(case, args.n_runs)
            parts.append(format_rows(case, times, tiles))
            print(parts[-1], flush=True)
            print(exactness, file=sys.stderr, flush=True)
        if args.markdown:
            args.markdown.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
