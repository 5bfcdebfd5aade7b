"""How fast are anchor and reuse attention beside the device's best dense attention, for one layer of a real shape?

Random inputs, one device; Top-K is a share of the causal tiles and grows with the position, as in the paper. Dense is
cuDNN's on a GPU; FlashAttention-3 is timed beside it where `flash-attn3-jax` is installed (Hopper, width 128). Before a
length is timed, the output of each program is compared with float32 on the first, the last and some other query tiles.
Then the programs are timed in turns. On an accelerator a turn is a queue of calls, whose inputs alternate between
copies that together exceed its cache; the time of a call is the queue's over its calls. All programs take inputs as the
model's layers have them, and reorder keys and values themselves. The weighted speedup is that of a model of 1 dense, 4
anchor and 27 reuse layers over one of 32 dense layers.

  python -m bench.attention --shape llama3.1-8b --seq_len 8192,32768,131072 --markdown table.md
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import attention
from attention.sharding import compile_ahead
from errors import Parser, exit_on_bad_input
from kascade_core import EXACT, FAST, NO_TILE, Selection, tile_count
from measure.machine import configure_device, pick_kernel, time_interleaved
from measure.settings import DTYPES, whole_number, whole_numbers
from report.results import versions

SHAPES = {"llama3.2-1b": (32, 8, 64), "llama3.1-8b": (32, 8, 128)}  # query heads, KV heads, head width
LAYERS = {"dense": 1, "anchor": 4, "reuse": 27}  # of the model that the weighted speedup is of
CACHE_BYTES = 128e6  # more than any accelerator's last cache holds
CEILING_SIZES = {"cpu": (1024, 2**24), "accelerator": (8192, 2**28)}  # a product's matrices, a copy's numbers
QUEUE_SECONDS = 0.05  # a queue so long that starting it costs nothing
CHECKED_TILES = 4
LOST_MASS = 1e-3  # of the best tiles' attention mass: near ties may cost so much
FLASH = "dense, FlashAttention-3"
ANCHORS = {EXACT: "anchor, exact scoring", FAST: "anchor, fast scoring"}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One length of one shape, how its tiles are chosen, and the kernels."""

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

    def scored_by(self, scoring: str) -> Selection:
        """The selection with this anchor scoring."""
        return dataclasses.replace(self.selection, anchor_scoring=scoring)

    def compile(self, qkv: Sequence[jax.Array], tiles: jax.Array | None = None) -> dict[str, Callable[..., Any]]:
        """The programs of (q, k, v): dense and the anchors; or with tiles that of (q, k, v, tiles): reuse."""
        if tiles is not None:
            reuse = partial(attention.reuse, selection=self.selection, kernel=self.kernel)
            return {"reuse": compile_ahead(reuse, (*qkv, tiles))}
        programs = {"dense": partial(attention.dense, kernel=self.dense_kernel)}
        if module := flash_attention(self.heads[2]):
            programs[FLASH] = lambda q, k, v: module.flash_mha(
                q, k.transpose(0, 3, 1, 2), v.swapaxes(1, 2), is_causal=True
            )
        for scoring, name in ANCHORS.items():
            programs[name] = partial(attention.anchor, selection=self.scored_by(scoring), kernel=self.kernel)
        return {name: compile_ahead(program, qkv) for name, program in programs.items()}


def flash_attention(head_dim: int) -> Any:
    """The module of FlashAttention-3 if it is installed, there is a GPU, and it takes heads of this width; or None."""
    if jax.default_backend() != "gpu" or head_dim != 128 or not importlib.util.find_spec("flash_attn3_jax"):
        return None
    return importlib.import_module("flash_attn3_jax")


# --- Correctness ---

Reference = Callable[..., tuple[np.ndarray, np.ndarray]]


def compile_reference(case: AttentionCase, qkv: Sequence[jax.Array]) -> Reference:
    """reference(query_tile, tiles_KC): float32 attention of one query tile to the given tiles of each KV head.

    Without tiles it is attention to the whole past. Returns out_KYGH, and mass_KYP: each row's attention mass in each
    key tile, summed over the KV head's query heads.
    """
    P, Y = tile_count(case.length, case.selection.tile_size), case.selection.query_tile
    attend = partial(_attend_exactly, tile_size=case.selection.tile_size, query_tile=Y)
    seen_KP = np.ones((case.heads[1], P), bool)
    compiled = compile_ahead(attend, (*qkv, np.int32(0), seen_KP))

    def reference(query_tile: int, tiles_KC: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        chosen_KP = seen_KP if tiles_KC is None else np.array([np.isin(np.arange(P), tiles) for tiles in tiles_KC])
        out_KYGH, mass_KYP = compiled(*qkv, np.int32(query_tile * Y), chosen_KP)
        return np.asarray(out_KYGH), np.asarray(mass_KYP)

    return reference


def _attend_exactly(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    first_row: jax.Array,
    seen_KP: jax.Array,
    tile_size: int,
    query_tile: int,
) -> tuple[jax.Array, jax.Array]:
    """One KV head after the other, so that only one head's [Y, G, S] scores exist at a time."""
    (_, K, H, S), N = k_BKHS.shape, q_BTNH.shape[2]
    rows_Y = first_row + jnp.arange(query_tile)
    q_KYGH = q_BTNH[0, rows_Y].reshape(query_tile, K, N // K, H).swapaxes(0, 1)

    def attend(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_YGH, k_HS, v_SH, seen_P = head
        q_YGH, k_HS, v_SH = (x.astype(jnp.float32) for x in (q_YGH, k_HS, v_SH))
        scores = jnp.einsum("YGH,HS->YGS", q_YGH, k_HS, precision=lax.Precision.HIGHEST) * H**-0.5
        visible_YS = (jnp.arange(S)[None] <= rows_Y[:, None]) & jnp.repeat(seen_P, tile_size)[None, :S]
        weights = jax.nn.softmax(jnp.where(visible_YS[:, None], scores, -jnp.inf))
        mass_YS = jnp.pad(weights.sum(1), ((0, 0), (0, len(seen_P) * tile_size - S)))
        out_YGH = jnp.einsum("YGS,SH->YGH", weights, v_SH, precision=lax.Precision.HIGHEST)
        return out_YGH, mass_YS.reshape(query_tile, len(seen_P), tile_size).sum(-1)

    return lax.map(attend, (q_KYGH, k_BKHS[0], v_BKSH[0], seen_KP))


def check_programs(
    case: AttentionCase, qkv: Sequence[jax.Array], programs: dict[str, Callable[..., Any]], tiles: jax.Array
) -> str:
    """Compares every program with float32; returns the errors in words.

    Raises:
      SystemExit: a program computes something else, so its times would mean nothing.
    """
    reference = compile_reference(case, qkv)
    results = {name: program(*qkv) for name, program in programs.items() if name != "reuse"}
    outputs = {name: (results[name], None) for name in results if name not in ANCHORS.values()}
    outputs |= {"reuse": (programs["reuse"](*qkv, tiles), tiles)}
    outputs |= {name: results[name] for name in ANCHORS.values()}
    Q = case.length // case.selection.query_tile
    query_tiles = sorted({*np.linspace(0, Q - 1, CHECKED_TILES).astype(int).tolist()})
    tolerance = max(float(jnp.finfo(case.dtype).eps), 1e-5)
    words = []
    for name, (out, chosen) in outputs.items():
        error = np.max([_error(reference, query_tile, out, chosen) for query_tile in query_tiles])  # NaN stays NaN
        if not error <= tolerance:
            raise SystemExit(f"error: {name} at {case.length} tokens is {error:.1e} away from float32: nothing timed")
        words.append(f"{name} {error:.1e}")
    for scoring, name in ANCHORS.items():
        selection, chosen = case.scored_by(scoring), results[name][1]
        lost = np.max([_lost_mass(reference, selection, query_tile, chosen) for query_tile in query_tiles])
        if not lost <= LOST_MASS:
            raise SystemExit(
                f"error: {name} at {case.length} tokens misses {lost:.1e} of the best tiles: nothing timed"
            )
    return f"{case.length} tokens, relative errors against float32: {', '.join(words)}"


def _error(reference: Reference, query_tile: int, out: jax.Array, tiles: jax.Array | None) -> float:
    """Relative error of one query tile's output, in the Euclidean norm."""
    expected, _ = reference(query_tile, None if tiles is None else np.asarray(tiles[0, :, query_tile]))
    K, Y, G, H = expected.shape
    got = np.asarray(out[0, query_tile * Y : (query_tile + 1) * Y], np.float32).reshape(Y, K, G, H).swapaxes(0, 1)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _lost_mass(reference: Reference, selection: Selection, query_tile: int, tiles: jax.Array) -> float:
    """The share of the best tiles' mass, in the scored rows, that the chosen tiles lack; 1 for a wrong number of tiles.

    How many there are to choose is counted here anew. A query tile's own tiles are not weighed, but must be there.
    """
    mass_KP = reference(query_tile)[1][:, selection.scored_rows()].sum(1)
    M, first, end = selection.tile_size, query_tile * selection.query_tile, (query_tile + 1) * selection.query_tile
    past, seen = first // M, tile_count(end, M)
    count = min(max(math.ceil(selection.density * seen - 1e-4), selection.num_kept_tiles), seen)
    lost = []
    for mass_P, chosen in zip(mass_KP[:, :past], np.asarray(tiles[0, :, query_tile])):
        chosen = {*chosen[chosen != NO_TILE].tolist()}
        others = sorted(chosen - {*range(past, seen)})
        if len(chosen) != count or len(others) != count - (seen - past):
            return 1.0
        best = np.sort(mass_P)[::-1][: len(others)].sum()
        lost.append(1 - mass_P[others].sum() / best if others else 0.0)
    return np.max(lost)


# --- Measuring ---


def count_pairs(case: AttentionCase, tiles_BKQC: np.ndarray) -> tuple[float, float]:
    """Causal (query, key) pairs, and those in the chosen tiles, of one query head: averages over the heads."""
    T, Y, M = case.length, case.selection.query_tile, case.selection.tile_size
    first_Q = np.arange(tiles_BKQC.shape[2]) * Y
    own_pairs_Q = Y * (first_Q - first_Q // M * M) + Y * (Y + 1) / 2
    used_Q = (tiles_BKQC != NO_TILE).sum(-1).mean((0, 1))
    return T * (T + 1) / 2, float(((used_Q - case.selection.own_tiles) * M * Y + own_pairs_Q).sum())


def count_flops(case: AttentionCase, causal_pairs: float, chosen_pairs: float) -> dict[str, float]:
    """Operations of the matrix products that each program needs; masked pairs are not counted."""
    N, _, H = case.heads
    causal, chosen = (4 * N * H * pairs for pairs in (causal_pairs, chosen_pairs))
    fast = len(case.scored_by(FAST).scored_rows()) / case.selection.query_tile
    anchors = {ANCHORS[EXACT]: causal / 2 + chosen, ANCHORS[FAST]: causal / 2 * fast + chosen}
    return {"dense": causal, FLASH: causal, **anchors, "reuse": chosen}


def queue(call: Callable[..., Any], inputs: Sequence[Sequence[jax.Array]], calls: int) -> Any:
    """Starts `calls` calls without waiting for any; returns the last one's result."""
    result = None
    for i in range(calls):
        result = call(*inputs[i % len(inputs)])
    return result


def queue_calls(program: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> tuple[Callable[[], Any], int]:
    """A turn of a timed program, and how many calls it is; on a CPU one, whose calls would run side by side."""
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs[0]))
    seconds = time.perf_counter() - start
    calls = 1 if jax.default_backend() == "cpu" else max(1, math.ceil(QUEUE_SECONDS / seconds))
    return partial(queue, program, inputs, calls), calls


def time_programs(case: AttentionCase, n_runs: int) -> tuple[dict[str, list[float]], np.ndarray, str]:
    """Milliseconds of a call of each program, the tiles of reuse, and the programs' errors in words."""
    qkv = case.inputs(0)
    programs = case.compile(qkv)
    tiles = programs[ANCHORS[EXACT]](*qkv)[1]
    programs |= case.compile(qkv, tiles)
    exactness = check_programs(case, qkv, programs, tiles)
    num_sets = 1 if jax.default_backend() == "cpu" else max(2, math.ceil(CACHE_BYTES / case.bytes))
    sets = [qkv, *(case.inputs(seed) for seed in range(1, num_sets))]
    turns, calls = {}, {}
    for name, program in programs.items():
        inputs = [(*qkv, tiles) for qkv in sets] if name == "reuse" else sets
        turns[name], calls[name] = queue_calls(program, inputs)
    samples = time_interleaved(turns, n_runs)
    times = {name: [ms / calls[name] for ms in turn] for name, turn in samples.items()}
    return times, np.asarray(tiles), exactness


def weighted_speedups(times: dict[str, list[float]], anchor: str) -> list[float]:
    """Of 32 layers by LAYERS over as many dense ones, round by round."""
    layers = sum(LAYERS.values())
    return [
        layers * dense / (LAYERS["dense"] * dense + LAYERS["anchor"] * chosen + LAYERS["reuse"] * reused)
        for dense, chosen, reused in zip(times["dense"], times[anchor], times["reuse"])
    ]


def measure_ceilings(dtype: Any) -> tuple[float, float]:
    """TFLOP/s of a large matrix product, and GB/s of a copy, counting reads and writes; medians of 5."""
    size, length = CEILING_SIZES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    x = jax.random.normal(jax.random.key(2), (length,), jnp.float32)
    calls = {"product": (jnp.matmul, (a, b)), "copy": (jnp.negative, (x,))}
    turns = {name: partial(queue, compile_ahead(*call), [call[1]], 10) for name, call in calls.items()}
    samples = time_interleaved(turns, 5)
    product, copy = (statistics.median(samples[name]) / 10 / 1e3 for name in turns)
    return 2 * size**3 / product / 1e12, 2 * x.nbytes / copy / 1e9


# --- The table ---


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread_of(values: Sequence[float], form: Callable[[float], str] = _number) -> str:
    """Median [min, max]."""
    return f"{form(statistics.median(values))} [{form(min(values))}, {form(max(values))}]"


def format_case(case: AttentionCase, times: dict[str, list[float]], tiles_BKQC: np.ndarray) -> str:
    """The table's rows of one length, one for each program."""
    causal, chosen = count_pairs(case, tiles_BKQC)
    flops = count_flops(case, causal, chosen)
    lines = []
    for name, samples in times.items():
        seconds = statistics.median(samples) / 1e3
        ratios = [ours / dense for ours, dense in zip(samples, times["dense"])]
        cells = [f"{case.length}", name, "100%" if name in ("dense", FLASH) else f"{chosen / causal:.1%}"]
        cells += [spread_of(samples, "{:.4g}".format), spread_of(ratios, "{:.3f}".format)]
        cells += [_number(flops[name] / seconds / 1e12), _number(case.bytes / seconds / 1e9)]
        cells += [spread_of(weighted_speedups(times, name), "{:.2f}x".format) if name in ANCHORS.values() else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe_table(args: argparse.Namespace, device: jax.Device, kernel: str, dense: str) -> str:
    """What the table's numbers are of."""
    N, K, H = SHAPES[args.shape]
    return (
        f"{args.shape}: {N} query and {K} KV heads of width {H}; {device.device_kind}, {args.dtype}, {kernel}; dense "
        f"is {dense}; tile {args.tile_size}, query tile {args.query_tile or args.tile_size}, Top-K "
        f"{args.density:.0%} of the causal tiles; n = {args.n_runs} interleaved rounds, median [min, max]. Density is "
        f"of the causal pairs, counted; TFLOP/s of the products that are needed; GB/s of queries, keys, values and "
        f"output, each counted once. {describe_ceilings(args.dtype)}"
    )


def describe_ceilings(dtype: Any) -> str:
    """What the device and its JAX reach."""
    products, copies = measure_ceilings(dtype)
    packages = ", ".join(f"{name} {versions()[name]}" for name in ("jax", "jaxlib"))
    return (
        f"With {packages} a large matrix product reaches {_number(products)} TFLOP/s here, a copy "
        f"{_number(copies)} GB/s."
    )


def print_table(
    description: str, columns: Sequence[str], rows: Iterable[tuple[str, str]], file: Path | None = None
) -> None:
    """Prints rows as they are measured, each one's errors in words on stderr; writes the table to the file at last."""
    parts = [f"{description}\n", "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)]
    print("\n".join(parts), flush=True)
    for row, exactness in rows:
        parts.append(row)
        print(row, flush=True)
        print(exactness, file=sys.stderr, flush=True)
    if file:
        file.write_text("\n".join(parts) + "\n", encoding="utf-8")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "tpu", "gpu"], default="gpu", help="default: gpu")
    parser.add_argument("--shape", choices=[*SHAPES], default="llama3.1-8b", help="default: llama3.1-8b")
    parser.add_argument(
        "--seq_len", type=whole_numbers, default=(8192, 32768, 131072), help="default: 8192,32768,131072"
    )
    parser.add_argument("--density", type=float, default=0.1, help="share of the causal tiles (default 0.1)")
    parser.add_argument("--tile_size", type=whole_number, default=128, help="tokens in a key tile (default 128)")
    parser.add_argument("--query_tile", type=whole_number, help="tokens that share a choice (default: tile_size)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--kernel", choices=["auto", *attention.KERNELS], default="auto", help="default: the device's own"
    )
    parser.add_argument("--n_runs", type=whole_number, default=10, help="timed rounds (default 10)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    if args.n_runs < 1:
        parser.error(f"n_runs must be at least 1, got {args.n_runs}")
    for length in args.seq_len:
        if length < 1 or length % max(args.tile_size, args.query_tile or 1, 1):
            parser.error(f"argument --seq_len: expected whole tiles, got {length} tokens")
    return args


def measure_rows(cases: Iterable[AttentionCase], n_runs: int) -> Iterator[tuple[str, str]]:
    """Checks and times one length after the other: its rows, and its errors in words."""
    for case in cases:
        times, tiles, exactness = time_programs(case, n_runs)
        yield format_case(case, times, tiles), exactness


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and times one length after the other."""
    args = parse_args(argv)
    with exit_on_bad_input():
        device, heads = configure_device(args.device)[0], SHAPES[args.shape]
        selection = Selection(args.tile_size, density=args.density, query_tile=args.query_tile, sink_tiles=0)
        sizes = args.seq_len[-1], heads[2], args.dtype, getattr(device, "compute_capability", None)
        kernel, why = pick_kernel(args.kernel, args.device, selection, *sizes)
        dense, _ = pick_kernel("auto", args.device, Selection(tile_size=128), *sizes)
        dense_name = "cuDNN's" if dense == "pallas_gpu" else f"{dense}'s"
        description = describe_table(args, device, f"{kernel} ({why})", dense_name)
        columns = "tokens", "", "density", "ms", "of dense", "TFLOP/s", "GB/s", "weighted speedup"
        cases = (AttentionCase(heads, length, selection, args.dtype, kernel, dense) for length in args.seq_len)
        print_table(description, columns, measure_rows(cases, args.n_runs), args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
