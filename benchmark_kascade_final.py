"""What would Kascade's cross-layer sparse attention cost this model in perplexity, and gain it in time?

Calibrates on one text which layers may reuse which layers' key tiles, then runs another, unseen text densely and
sparsely through the same LLaMA and compares perplexity (signed), counted density and time (compiled apart, runs
interleaved, median with min and max). Without weights it first makes those of its default model.

  python benchmark_kascade_final.py                          # the default model and text, on the CPU
  python benchmark_kascade_final.py --device tpu --top_k 12 --threshold 0.65
  python benchmark_kascade_final.py --weights_dir DIR --text FILE --seq_len 2048 --json result.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import convert_weights
from kascade_core import (
    EXACT,
    FAST,
    FAST_ROWS,
    KASCADE_CACHE,
    InputError,
    Selection,
    add_head_maps,
    attended_tiles,
    calibrate_kascade,
    check_perplexity,
    compile_forward,
    decide_schedule,
    mean_density,
    perplexity_of,
    publish_tiles,
    similarity_matrix,
)
from kascade_kernels import IMPLEMENTATIONS, compile_attention, time_interleaved
from kascade_layers import LayerRunner
from kascade_layout import make_mesh, tile_count
from kascade_report import (
    RULE,
    SweepRow,
    describe_config,
    describe_run,
    format_attention,
    format_break_even,
    format_chosen,
    format_configuration,
    format_model,
    format_results,
    format_schedule,
    format_sparse_layers,
    format_sweep_header,
    format_sweep_row,
    format_timing,
    schedule_rows,
    versions,
    write_json,
)
from kascade_search import (
    PER_HEAD,
    PER_LAYER,
    UNIFORM,
    Found,
    check_anchors,
    decide_nearest,
    dp_anchors,
    mass_similarity,
    observe,
    read_schedule,
    schedule_to_json,
    search_schedule,
)
from kascade_setup import (
    DEFAULT_TEXT,
    DEFAULT_WEIGHTS,
    DTYPES,
    at_least_one,
    at_least_zero,
    configure_device,
    exit_on_bad_input,
    free_memory,
    lengths,
    load_tokenizer,
    load_windows,
    peak_memory,
    pick_dtype,
    pick_kernel,
    share,
)
from llama_model import LlamaModel, count_parameters, load_weights

# --- Flags ---


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def selection_of(args: argparse.Namespace) -> Selection:
    """The anchors' rule as the flags give it."""
    names = ("tile_size", "top_k", "sink_tiles", "local_tiles", "query_tile", "density")
    return Selection(**{name: getattr(args, name) for name in names}, scoring=args.anchor_scoring)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; bad values exit with code 2."""
    parser = convert_weights.OneSentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_method_flags(parser)
    _add_run_flags(parser)
    args = parser.parse_args(argv)
    _check_together(args, parser)
    return args


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    """What is compared."""
    parser.add_argument("--tile_size", type=at_least_one, default=16, help="tokens in a tile (default 16)")
    parser.add_argument("--top_k", type=at_least_one, help="tiles kept per query tile (default 12)")
    parser.add_argument(
        "--density", type=share, help="instead of top_k: the share of the causal tiles, growing with the position"
    )
    parser.add_argument(
        "--sink_tiles",
        type=at_least_zero,
        default=1,
        help="first tiles of the text that every query tile keeps, counted among the top_k (default 1)",
    )
    parser.add_argument(
        "--local_tiles", type=at_least_zero, default=0, help="tiles before its own that a query tile keeps (default 0)"
    )
    parser.add_argument(
        "--query_tile",
        type=at_least_one,
        help="tokens that share one choice of tiles, a multiple or divisor of tile_size (default: tile_size)",
    )
    parser.add_argument(
        "--anchor_scoring",
        default=EXACT,
        choices=[EXACT, FAST],
        help=f"anchors score all rows of a query tile, or {FAST_ROWS} of them (default {EXACT})",
    )
    parser.add_argument("--threshold", type=share, default=0.65, help="least similarity to reuse (default 0.65)")
    parser.add_argument(
        "--max_reuse_dist",
        type=at_least_one,
        default=4,
        help="reuse an anchor fewer layers back than this (default 4)",
    )
    _add_schedule_flags(parser)


def _add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    """How the schedule is made, where not by the guide's rule."""
    parser.add_argument(
        "--scheduler",
        choices=["threshold", "dp", "search"],
        help="the guide's rule, the paper's dynamic programme, or a search that measures the loss (default threshold)",
    )
    parser.add_argument(
        "--similarity", choices=["jaccard", "mass"], help="of layers, for threshold and dp (default jaccard)"
    )
    parser.add_argument("--anchors", type=at_least_one, help="anchors of dp and search (default 3 of 10 layers)")
    parser.add_argument(
        "--budgets",
        choices=[UNIFORM, PER_LAYER, PER_HEAD],
        help="of search: who has a number of tiles of its own, at the same density over all (default layer)",
    )
    parser.add_argument(
        "--max_degradation",
        type=_percent,
        metavar="PERCENT",
        help="search for the least density that costs less than this on the calibration text",
    )
    parser.add_argument("--save_schedule", type=Path, metavar="FILE", help="write the schedule to FILE")
    parser.add_argument("--load_schedule", type=Path, metavar="FILE", help="use the schedule of FILE: no calibration")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """On what, with what, and what is said of it."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "tpu", "gpu"])
    parser.add_argument(
        "--weights_dir",
        type=Path,
        help=f"folder made by convert_weights.py (default {DEFAULT_WEIGHTS}, made if missing)",
    )
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 text to test on (default: the sample)")
    parser.add_argument(
        "--calib_text", type=Path, help="UTF-8 text to calibrate on (default: the tokens of --text before the tested)"
    )
    parser.add_argument("--seq_len", type=at_least_one, default=512, help="tokens in each of the two (default 512)")
    parser.add_argument("--n_runs", type=at_least_one, default=5, help="timed runs of each kind (default 5)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of matrix inputs; auto is bfloat16 where the hardware multiplies it natively, otherwise float32",
    )
    parser.add_argument(
        "--kernel",
        default="auto",
        choices=["auto", *IMPLEMENTATIONS],
        help="implementation of attention; auto is the TPU's or GPU's own where it takes the sizes, otherwise xla",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument(
        "--sweep",
        type=lengths,
        default=[],
        metavar="N,N,...",
        help="also time these lengths, with the run's schedule and the tested tokens, repeated where they are too few",
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--verbose", action="store_true", help="also print each layer's tiles")
    noise.add_argument("--quiet", action="store_true", help="print the results alone")


def _check_together(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses values that do not go together; settles the defaults that depend on others."""
    _settle_budget(args, parser)
    _settle_scheduler(args, parser)
    if args.seq_len < 2:
        parser.error("argument --seq_len: must be at least 2, for perplexity predicts every token but the first, got 1")
    if args.tile_size > args.seq_len:
        parser.error(f"argument --tile_size: must be at most seq_len, {args.seq_len}, got {args.tile_size}")
    try:
        args.query_tile = selection_of(args).query_tile
    except InputError as error:
        parser.error(str(error))
    if args.query_tile > args.seq_len:
        parser.error(f"argument --query_tile: must be at most seq_len, {args.seq_len}, got {args.query_tile}")
    if args.sweep and args.sweep[0] < max(2, args.query_tile):
        least = f"query_tile, {args.query_tile}, and 2"
        parser.error(f"argument --sweep: lengths must be at least {least}, got {args.sweep[0]}")
    if args.density is None and args.sink_tiles > args.top_k:
        parser.error(f"argument --sink_tiles: must be at most top_k, {args.top_k}, got {args.sink_tiles}")
    for name in ("json", "save_schedule"):
        path = getattr(args, name)
        if path and not _can_be_written(path):
            parser.error(f"argument --{name}: cannot write {path}: give a file in a folder that exists")


def _settle_budget(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.top_k is not None and args.density is not None:
        parser.error("argument --density: it is an alternative to --top_k; give one of the two")
    args.top_k = 12 if args.top_k is None else args.top_k
    if args.density is not None:
        args.top_k = max(args.top_k, args.query_tile or 1)  # of no effect: the share of the tiles is what counts


def _settle_scheduler(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.load_schedule:
        given = ("scheduler", "similarity", "anchors", "budgets", "max_degradation", "save_schedule")
        for name in given:
            if getattr(args, name) is not None:
                parser.error(f"argument --{name}: of no use with --load_schedule, which brings a finished schedule")
    if args.max_degradation is not None and args.scheduler not in (None, "search"):
        parser.error(f"argument --max_degradation: it needs --scheduler search, got {args.scheduler}")
    args.scheduler = args.scheduler or ("threshold" if args.max_degradation is None else "search")
    for name, schedulers in {
        "anchors": ("dp", "search"),
        "budgets": ("search",),
        "similarity": ("threshold", "dp"),
    }.items():
        if getattr(args, name) is not None and args.scheduler not in schedulers:
            parser.error(f"argument --{name}: of no use with --scheduler {args.scheduler}")
    args.similarity, args.budgets = args.similarity or "jaccard", args.budgets or PER_LAYER


def _can_be_written(path: Path) -> bool:
    """Whether `write_json` can put a file there: a plain file or nothing yet, in a folder open to us."""
    try:
        plain = path.is_file() or not path.exists()
        return plain and path.resolve().parent.is_dir() and os.access(path.resolve().parent, os.W_OK)
    except OSError:  # a name too long, say
        return False


# --- Measuring ---


@dataclasses.dataclass(frozen=True)
class Run:
    """One compiled configuration on the test text: its perplexity, and what it takes to time it."""

    perplexity: float
    compile_s: float
    forward: Callable[[], Any]  # runs it once more, without waiting for the device


def run_model(model: LlamaModel, params: Any, ids: jax.Array, mesh: jax.sharding.Mesh) -> Run:
    """Compiles and runs `model` on ids; KASCADE_CACHE then holds the tiles that its anchors chose."""
    compiled, compile_s = compile_forward(model, params, ids, mesh)
    nll, sown = compiled(params, ids)
    publish_tiles(sown)
    return Run(perplexity_of(nll[:, :-1]), compile_s, lambda: compiled(params, ids))


def measure_length(
    models: Mapping[str, LlamaModel], params: Any, ids: jax.Array, length: int, mesh: jax.sharding.Mesh, n_runs: int
) -> SweepRow:
    """Times {"dense", "sparse"} on `length` tokens: those of ids [1, T], repeated where they are too few.

    Nothing is run where the compiled programs say that they need more memory than there is.
    """
    shape = jax.ShapeDtypeStruct((1, length), ids.dtype)
    compiled = {name: compile_forward(model, params, shape, mesh)[0] for name, model in models.items()}
    device = mesh.devices.flat[0]
    needed = max(_working_memory(program, mesh) for program in compiled.values())
    free = free_memory(device)
    if free is not None and needed > free:
        return SweepRow(
            length, skipped=f"needs {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} are free"
        )
    ids = jnp.resize(ids, (1, length))
    _, sown = compiled["sparse"](params, ids)
    publish_tiles(sown)
    density = mean_density(models["sparse"].schedule, KASCADE_CACHE)
    samples = time_interleaved({name: partial(program, params, ids) for name, program in compiled.items()}, n_runs)
    return SweepRow(length, samples["dense"], samples["sparse"], density, peak_memory(device))


def _working_memory(program: Any, mesh: jax.sharding.Mesh) -> int:
    """Bytes that a compiled program takes besides its arguments, on the one memory that a CPU's devices share."""
    stats = program.memory_analysis()
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes
    return needed * (mesh.size if mesh.devices.flat[0].platform == "cpu" else 1)


# --- The schedule ---


def find_schedule(
    args: argparse.Namespace, model: LlamaModel, params: Any, ids: jax.Array, mesh: jax.sharding.Mesh
) -> Found:
    """As the flags say, from the calibration text; KASCADE_CACHE holds what every layer would choose there."""
    num_anchors = args.anchors or max(1, round(0.3 * model.config.num_hidden_layers))
    check_anchors(num_anchors, model.config.num_hidden_layers)
    if args.scheduler == "search":
        return search_schedule(model, params, ids, mesh, num_anchors, args.budgets, args.max_degradation)
    importance = None
    if args.similarity == "mass":
        seen = observe(LayerRunner(model, params, ids.shape[1], mesh), ids)
        (similarity, maps), importance = mass_similarity([seen], model.selection), seen.importance
    else:
        similarity, maps = similarity_matrix(KASCADE_CACHE), None
    if args.scheduler == "dp":
        decisions = decide_nearest(similarity, dp_anchors(similarity, num_anchors, importance))
    else:
        decisions = decide_schedule(similarity, args.threshold, args.max_reuse_dist)
    schedule = {i: (d.mode, d.anchor) for i, d in enumerate(decisions)}
    if maps is None:
        return Found(decisions, add_head_maps(schedule, KASCADE_CACHE))
    return Found(decisions, {i: (*entry, maps.get((i, entry[1]))) for i, entry in schedule.items()})


# --- The run ---


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark from flags to report. Returns 0; bad input exits with code 2."""
    args = parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # not where it was closed, or is a notebook's
        sys.stdout.reconfigure(errors="replace")  # a terminal without these symbols gets question marks, not a crash
    say = (lambda *_: None) if args.quiet else partial(print, flush=True)  # steps take seconds: show each at once

    with exit_on_bad_input():
        dtype = pick_dtype(args.dtype, args.device)
        fits = partial(
            pick_kernel, args.kernel, args.device, selection_of(args), max([args.seq_len, *args.sweep]), dtype
        )
        kernel, why = fits()
        say(format_configuration(args, dtype, f"{kernel} ({why})"))

        say(f"🖥️  Configuring JAX to use {args.device.upper()}...")
        devices = configure_device(args.device)
        ids = [device.id for device in devices]
        say(f"✓ JAX using {len(devices)} {args.device.upper()} device(s): {ids}\n")
        mesh = make_mesh(devices)

        weights_dir = args.weights_dir or DEFAULT_WEIGHTS
        if args.weights_dir is None and not (weights_dir.exists() and any(weights_dir.iterdir())):
            say(f"📦 No weights in {weights_dir}: fetching and converting {convert_weights.DEFAULT_MODEL}...")
            convert_weights.convert_default(weights_dir)
        say(f"📦 Loading weights from {weights_dir}...")
        manifest, params = load_weights(weights_dir, DTYPES[dtype], mesh)
        config = manifest["config"]
        say(format_model(manifest, params))
        planned = kernel
        kernel, why = fits(config.head_dim, getattr(devices[0], "compute_capability", None))
        if kernel != planned or args.kernel not in ("auto", kernel):
            print(f"warning: attention runs on {kernel} ({why})", file=sys.stderr)
        if args.seq_len > config.max_position_embeddings:
            context = config.max_position_embeddings
            print(f"warning: seq_len {args.seq_len} is beyond the model's context of {context}", file=sys.stderr)

        tokenizer = load_tokenizer(weights_dir)
        windows = load_windows(tokenizer, args.text, args.calib_text, args.seq_len, config.vocab_size)
        calib_ids, test_ids = windows
        say(f"📖 Calibration: {calib_ids.size} tokens of {(args.calib_text or args.text).name}")
        say(f"   Test:        {test_ids.size} tokens of {args.text.name} (UNSEEN)\n")

        names = ("tile_size", "top_k", "sink_tiles", "local_tiles", "density", "query_tile", "anchor_scoring")
        sizes = {name: getattr(args, name) for name in names}
        model_dense = LlamaModel(config, dtype=DTYPES[dtype], kernel=kernel, **sizes)
        if args.load_schedule:
            found = read_schedule(args.load_schedule, model_dense.selection, manifest)
        else:
            say(f"📊 Calibrating on {(args.calib_text or args.text).name}...")
            calibrate_kascade(model_dense, params, calib_ids, args.tile_size, args.top_k, mesh)
            if args.verbose:
                say("\n".join(format_chosen(layer, tiles) for layer, tiles in KASCADE_CACHE.items()))
            found = find_schedule(args, model_dense, params, calib_ids, mesh)

        say("\n⚡ Generating Optimized Schedule:")
        guides = args.scheduler == "threshold" and not args.load_schedule
        rule = (args.threshold, args.max_reuse_dist) if guides else (None, None)
        say(format_schedule(found.decisions, *rule))

        say("🏃 Running DENSE Baseline...")
        dense = run_model(model_dense, params, test_ids, mesh)
        check_perplexity(dense.perplexity, config.vocab_size)
        say(f"  All {tile_count(args.seq_len, args.tile_size)} tiles in every layer\n")

        say("⚡ Running KASCADE Sparse...")
        model_sparse = model_dense.clone(schedule=found.schedule)
        if args.save_schedule:
            write_json(args.save_schedule, schedule_to_json(model_sparse.schedule, model_dense.selection, manifest))
            say(f"📝 Schedule written to {args.save_schedule}")
        sparse = run_model(model_sparse, params, test_ids, mesh)
        attended = attended_tiles(model_sparse.schedule, KASCADE_CACHE)
        if args.verbose:
            say(format_sparse_layers(model_sparse.schedule, attended, args.tile_size, args.seq_len))
        density = mean_density(model_sparse.schedule, KASCADE_CACHE)
        degradation_pct = (sparse.perplexity / dense.perplexity - 1) * 100
        print("\n" + format_results(dense.perplexity, sparse.perplexity, degradation_pct, density))
        if found.calibration_pct is not None:
            print(
                f"   Degradation on the calibration text {found.calibration_pct:+.2f}%, asked for under "
                f"{args.max_degradation:g}%; on the unseen text {degradation_pct:+.2f}%.\n"
            )

        print(f"⏱️  SPEEDUP BENCHMARK\n{RULE}\n")
        say(f"Benchmarking {args.n_runs} runs each...")
        say(f"  Compiled before the clock starts: dense {dense.compile_s:.1f} s, sparse {sparse.compile_s:.1f} s")
        say("  Warming up...\n  Timing Dense and Sparse in turn...\n")
        samples = time_interleaved({"dense": dense.forward, "sparse": sparse.forward}, args.n_runs)
        speedup = statistics.median(samples["dense"]) / statistics.median(samples["sparse"])
        meaning = f"{describe_run(args, devices, dtype, kernel)}; {args.seq_len} tokens, density {density:.2%}"
        print(format_timing(samples, speedup, meaning))

        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        kinds = compile_attention(heads, args.seq_len, selection_of(args), DTYPES[dtype], mesh, kernel)
        attention = time_interleaved(kinds, args.n_runs)
        print("\n" + format_attention(attention))

        rows = []
        if args.sweep:
            print("\n" + format_sweep_header(describe_run(args, devices, dtype, kernel)))
        for length in args.sweep:
            rows.append(
                measure_length(
                    {"dense": model_dense, "sparse": model_sparse}, params, test_ids, length, mesh, args.n_runs
                )
            )
            print(format_sweep_row(rows[-1]), flush=True)
        if args.sweep:
            print(format_break_even(rows))

        if args.json:
            report = {
                "model": {
                    "name": manifest["model"],
                    "source": manifest["source"],
                    "parameters": count_parameters(params),
                },
                "config": describe_config(args, weights_dir, dtype, kernel),
                "schedule": schedule_rows(found.decisions, model_sparse.schedule, attended),
                "dense": {"perplexity": dense.perplexity, "compile_s": dense.compile_s},
                "sparse": {"perplexity": sparse.perplexity, "compile_s": sparse.compile_s},
                "degradation_pct": degradation_pct,
                "calibration_degradation_pct": found.calibration_pct,
                "density": density,
                "timing": {
                    "dense_ms": samples["dense"],
                    "sparse_ms": samples["sparse"],
                    "attention_ms": attention,
                },
                "sweep": [dataclasses.asdict(row) for row in rows],
                "peak_memory_bytes": peak_memory(devices[0]),
                "speedup": speedup,
                "versions": versions(),
                "device": {"platform": args.device, "kind": devices[0].device_kind, "count": len(devices)},
            }
            write_json(args.json, report)
            say(f"\n📝 Report written to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
