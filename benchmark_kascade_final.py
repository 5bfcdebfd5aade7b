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
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # only its tokenizers are used: no word on missing PyTorch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the weights folder

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

import convert_weights
from kascade_core import (
    ANCHOR,
    DENSE,
    KASCADE_CACHE,
    NO_TILE,
    REUSE,
    Decision,
    InputError,
    LayerPlan,
    add_head_maps,
    attended_tiles,
    calibrate_kascade,
    check_perplexity,
    compile_forward,
    decide_schedule,
    density_of,
    make_mesh,
    perplexity_of,
    publish_tiles,
    similarity_matrix,
    tile_count,
)
from llama_model import LlamaModel, count_parameters, load_weights

DEFAULT_WEIGHTS = Path("llama_weights_chunked")
DEFAULT_TEXT = Path(__file__).with_name("wikipedia_sample.txt")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MAX_DEGRADATION = 2.0  # percent; the guide's bar for success
RULE = "=" * 70


# --- Flags ---


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def _at_least_one(text: str) -> int:
    return _whole(text, least=1)


def _at_least_zero(text: str) -> int:
    return _whole(text, least=0)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {value}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; bad values exit with code 2."""
    parser = convert_weights.OneSentenceParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "tpu", "gpu"])
    parser.add_argument("--tile_size", type=_at_least_one, default=16, help="tokens in a tile (default 16)")
    parser.add_argument("--top_k", type=_at_least_one, default=12, help="tiles kept per query tile (default 12)")
    parser.add_argument(
        "--sink_tiles",
        type=_at_least_zero,
        default=1,
        help="first tiles of the text that every query tile keeps, counted among the top_k (default 1)",
    )
    parser.add_argument("--threshold", type=_share, default=0.65, help="least similarity to reuse (default 0.65)")
    parser.add_argument(
        "--max_reuse_dist",
        type=_at_least_one,
        default=4,
        help="reuse an anchor fewer layers back than this (default 4)",
    )
    parser.add_argument(
        "--weights_dir",
        type=Path,
        help=f"folder made by convert_weights.py (default {DEFAULT_WEIGHTS}, made if missing)",
    )
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 text to test on (default: the sample)")
    parser.add_argument(
        "--calib_text", type=Path, help="UTF-8 text to calibrate on (default: the tokens of --text before the tested)"
    )
    parser.add_argument("--seq_len", type=_at_least_one, default=512, help="tokens in each of the two (default 512)")
    parser.add_argument("--n_runs", type=_at_least_one, default=5, help="timed runs of each kind (default 5)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of matrix inputs; auto is bfloat16 where the hardware multiplies it natively, otherwise float32",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--verbose", action="store_true", help="also print each layer's tiles")
    noise.add_argument("--quiet", action="store_true", help="print the results alone")
    args = parser.parse_args(argv)
    if args.seq_len < 2:
        parser.error("argument --seq_len: must be at least 2, for perplexity predicts every token but the first, got 1")
    if args.tile_size > args.seq_len:
        parser.error(f"argument --tile_size: must be at most seq_len, {args.seq_len}, got {args.tile_size}")
    if args.sink_tiles > args.top_k:
        parser.error(f"argument --sink_tiles: must be at most top_k, {args.top_k}, got {args.sink_tiles}")
    if args.json and not _can_be_written(args.json):
        parser.error(f"argument --json: cannot write {args.json}: give a file in a folder that exists")
    return args


def _can_be_written(path: Path) -> bool:
    """Whether `write_json` can put a file there: a plain file or nothing yet, in a folder open to us."""
    try:
        plain = path.is_file() or not path.exists()
        return plain and path.resolve().parent.is_dir() and os.access(path.resolve().parent, os.W_OK)
    except OSError:  # a name too long, say
        return False


# --- Set-up ---


def configure_device(device: str) -> list[jax.Device]:
    """Makes JAX compute on `device` ("cpu", "tpu" or "gpu"). Raises InputError where JAX sees none.

    Every CPU core becomes a device: XLA's own threads inside one device leave much of a machine idle.
    """
    platforms = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}  # with no platform left, JAX fails an assertion
    jax.config.update("jax_platforms", platforms[device])
    with contextlib.suppress(RuntimeError):  # JAX is running already, and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    try:
        return jax.devices(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"JAX sees no {device.upper()} here ({reason}); try --device cpu") from error


def pick_dtype(name: str, device: str) -> str:
    """Resolves "auto": bfloat16 on accelerators and on CPUs with AMX, where it is several times faster than float32."""
    if name != "auto":
        return name
    cpuinfo = Path("/proc/cpuinfo")
    has_amx = cpuinfo.is_file() and "amx_bf16" in cpuinfo.read_text()
    return "bfloat16" if device != "cpu" or has_amx else "float32"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(f"text {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"text {path} cannot be read: {error.strerror}") from error


def _encode(tokenizer: Any, path: Path, needed: int) -> list[int]:
    """At least the first `needed` token ids of a text file, without special tokens."""
    text = _read_text(path)
    for part in (text[: 16 * needed], text):  # the start of a long text is enough, unless its tokens are very long
        ids = tokenizer.encode(part, add_special_tokens=False)
        if len(ids) >= needed + 16:  # a token or so before the cut may differ from the whole text's
            break
    if len(ids) < needed:
        raise InputError(f"text {path} is too short: it has {len(ids)} tokens, and {needed} are needed")
    return ids[:needed]


def load_windows(
    tokenizer: Any, text: Path, calib_text: Path | None, seq_len: int, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Calibration and test ids, int32 [1, seq_len] each, that share no token of the text.

    Where the tokenizer begins a text with its BOS token, each window does, as the model was trained; it counts.

    Raises:
      InputError: a text that cannot be read or is too short, two texts that begin alike, a tokenizer of another model.
    """
    first = tokenizer.encode("")  # what the tokenizer puts before every text: BOS or nothing
    first = first[:1] if first[:1] == [tokenizer.bos_token_id] else []
    length = seq_len - len(first)
    if calib_text is None or calib_text.resolve() == text.resolve():
        ids = _encode(tokenizer, text, 2 * length)
        windows = ids[:length], ids[length:]
    else:
        windows = _encode(tokenizer, calib_text, length), _encode(tokenizer, text, length)
    if windows[0] == windows[1]:
        raise InputError(f"texts {calib_text or text} and {text} begin alike: the tested tokens would not be unseen")
    if max(map(max, windows)) >= vocab_size:
        raise InputError(f"the tokenizer makes ids above the model's vocabulary of {vocab_size}: it is another model's")
    return tuple(jnp.asarray([first + window], jnp.int32) for window in windows)


def load_tokenizer(weights_dir: Path) -> Any:
    """The tokenizer that convert_weights.py put beside the weights. Raises InputError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(weights_dir)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"weights folder {weights_dir} has no usable tokenizer ({reason}); convert anew") from error


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


def time_interleaved(forwards: Mapping[str, Callable[[], Any]], n_runs: int) -> dict[str, list[float]]:
    """Milliseconds of `n_runs` runs of each, in turn, each waited for, after one warm-up that is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in forwards}
    for i in tqdm(range(n_runs + 1), desc="timing", unit="round", disable=None, leave=False):
        for name, forward in forwards.items():
            start = time.perf_counter()
            jax.block_until_ready(forward())
            if i:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


# --- Reporting: every function returns text, only main prints ---


def format_configuration(args: argparse.Namespace, dtype: str) -> str:
    """The guide's configuration section."""
    return (
        "⚙️  Configuration:\n"
        f"   Device:           {args.device.upper()}\n"
        f"   Dtype:            {dtype}\n"
        f"   Sequence Length:  {args.seq_len}\n"
        f"   Tile Size:        {args.tile_size}\n"
        f"   Top-K Tiles:      {args.top_k}\n"
        f"   Sink Tiles:       {args.sink_tiles}\n"
        f"   Threshold:        {args.threshold:.2%}\n"
        f"   Max Reuse Dist:   {args.max_reuse_dist}\n"
    )


def format_model(manifest: Mapping[str, Any], params: Any) -> str:
    """One line: the model's name, layers, parameters, and size as it lies on the device."""
    size_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    millions = count_parameters(params) / 1e6
    layers = manifest["config"].num_hidden_layers
    return f"✓ {manifest['model']}: {layers} layers, {millions:.1f}M parameters, {size_mb:.0f} MB\n"


def format_schedule(decisions: Sequence[Decision], threshold: float, max_reuse_dist: int) -> str:
    """The guide's schedule section: a line with the reason for each layer, the count, the strip of layer types."""
    lines = [f"   Similarity threshold: {threshold:.2%}", f"   Max reuse distance: {max_reuse_dist}"]
    for layer, decision in enumerate(decisions):
        target = f" L{decision.anchor}" if decision.mode == REUSE else ""
        lines.append(f"  Layer {layer}: {decision.mode}{target} ({decision.reason})")
    reused = sum(decision.mode == REUSE for decision in decisions)
    lines += ["", f"📋 Final Schedule: {reused} REUSE, {len(decisions) - reused} ANCHOR/DENSE", ""]
    return "\n".join(lines) + "\n" + format_strip(decisions)


def format_strip(decisions: Sequence[Decision], per_row: int = 15) -> str:
    """Layer numbers over layer types over the reused layer, `per_row` layers in a row."""
    cells = [
        (str(layer), {DENSE: "DENSE", ANCHOR: "ANC", REUSE: "REU"}[mode], f"L{anchor}" if mode == REUSE else "")
        for layer, (mode, anchor, _, _) in enumerate(decisions)
    ]
    lines = []
    for start in range(0, len(cells), per_row):
        for name, row in zip(("Layer:", "Type: ", "From: "), zip(*cells[start : start + per_row]), strict=True):
            lines.append(f"{name} " + "".join(f"{cell:>6}" for cell in row).rstrip())
    return "\n".join(lines) + "\n"


def format_chosen(layer: int, tiles_BKQC: np.ndarray) -> str:
    """The guide's line on an anchor: the tiles of head 0 for the last query tile, which sees all tiles."""
    tiles = tiles_BKQC[0, 0, -1]
    return f"  [Anchor L{layer}] Selected Top-{tiles.size} Tiles (Head 0): {np.sort(tiles[tiles != NO_TILE])}"


def format_sparse_layers(
    plans: Sequence[LayerPlan], attended: Mapping[int, np.ndarray | None], tile_size: int, seq_len: int
) -> str:
    """The guide's per-layer lines of a sparse run, for the last query tile."""
    lines = []
    for layer, plan in enumerate(plans):
        if plan.mode == DENSE:
            lines.append(f"  [Dense  L{layer}] Using all {tile_count(seq_len, tile_size)} tiles ({seq_len} tokens)")
        elif plan.mode == ANCHOR:
            lines.append(format_chosen(layer, attended[layer]))
        else:
            heads = ", ".join(f"H{head} uses Anchor H{source}" for head, source in enumerate(plan.head_map))
            lines.append(f"  [Reuse  L{layer}] Applied Map (Anchor L{plan.anchor}): {heads}")
        if plan.mode != DENSE:
            tokens = count_tokens(attended[layer][0, 0, -1], tile_size, seq_len)
            lines.append(f"  [{plan.mode.title():6} L{layer}] Using {tokens} sparse tokens (vs {seq_len} full)")
    return "\n".join(lines)


def count_tokens(tiles_C: np.ndarray, tile_size: int, seq_len: int) -> int:
    """Tokens in the given tiles; the sequence's last tile may be partly filled."""
    used = tiles_C[tiles_C != NO_TILE].astype(np.int64)
    return int(np.sum(np.minimum(tile_size, seq_len - used * tile_size)))


def format_results(dense_ppl: float, sparse_ppl: float, degradation_pct: float, density: float) -> str:
    """The guide's results section; the verdict fails as plainly as it passes."""
    lines = [
        RULE,
        "📊 RESULTS ON REAL TEXT:",
        RULE,
        "",
        f"   Dense Perplexity:  {dense_ppl:.4f}",
        f"   Sparse Perplexity: {sparse_ppl:.4f}",
        f"   Degradation:       {degradation_pct:+.4f}%",
        f"   Density:           {density:.2%} of the causal (query tile, key tile) pairs, counted over all layers",
        "   (Rows of one query tile share their choice of tiles, so later rows help choose for earlier ones.)",
        "",
    ]
    if density == 1:
        lines.append("⚠️  Nothing was dropped: Top-K covers all tiles. Lower --top_k, or raise --seq_len.")
    elif degradation_pct < MAX_DEGRADATION:
        lines.append(f"✅✅✅ SUCCESS! <{MAX_DEGRADATION:.0f}% degradation achieved!")
    else:
        lines.append(f"❌ FAILED: degradation {degradation_pct:+.2f}% is not under {MAX_DEGRADATION:.0f}%.")
    return "\n".join(lines) + "\n"


def format_timing(samples: Mapping[str, Sequence[float]], speedup: float, meaning: str) -> str:
    """The guide's timing results, with what the numbers mean."""
    n_runs = len(samples["dense"])
    lines = [f"📊 Timing Results (median [min, max] of {n_runs} runs):"]
    for name, times in samples.items():
        label = f"{name.title()}:"
        lines.append(f"   {label:8} {statistics.median(times):9.2f} ms  [{min(times):.2f}, {max(times):.2f}]")
    lines += [f"   Speedup: {speedup:.2f}x", f"   ({meaning})", ""]
    if speedup > 1:
        lines.append(f"✅ Sparse is {speedup:.2f}x faster!")
    else:
        lines.append(f"⚠️  Speedup: {speedup:.2f}x: sparse is no faster here. Try a longer --seq_len.")
    return "\n".join(lines)


def schedule_rows(
    decisions: Sequence[Decision], plans: Sequence[LayerPlan], attended: Mapping[int, np.ndarray | None]
) -> list[dict[str, Any]]:
    """The schedule as --json holds it: a row a layer, its density counted in the sparse run."""
    return [
        {
            "layer": layer,
            "mode": plan.mode,
            "anchor": plan.anchor,
            "similarity": decision.similarity,
            "reason": decision.reason,
            "head_map": plan.head_map,
            "density": density_of(attended[layer]),
        }
        for layer, (decision, plan) in enumerate(zip(decisions, plans, strict=True))
    ]


def describe_run(args: argparse.Namespace, devices: Sequence[jax.Device], dtype: str, density: float) -> str:
    """What a timing means: everything that it depends on."""
    return (
        f"whole forward and loss on {len(devices)} {args.device.upper()} device(s), {devices[0].device_kind}, {dtype}; "
        f"{args.seq_len} tokens, tile {args.tile_size}, Top-K {args.top_k}, density {density:.2%}, n = {args.n_runs}"
    )


def describe_config(args: argparse.Namespace, weights_dir: Path, dtype: str) -> dict[str, Any]:
    """The run's settings as --json holds them, "auto" and defaults resolved."""
    names = ("tile_size", "top_k", "sink_tiles", "threshold", "max_reuse_dist", "seq_len", "n_runs")
    settings = {name: getattr(args, name) for name in names}
    paths = {"weights_dir": weights_dir, "text": args.text, "calib_text": args.calib_text or args.text}
    return {"device": args.device, "dtype": dtype} | settings | {name: str(path) for name, path in paths.items()}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy", "transformers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the report whole or not at all."""
    path = path.resolve()  # what a symbolic link points to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- The run ---


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turns what a user can mend into one sentence on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(2)  # an orderly exit would wait for, or crash, what JAX is still computing
    except (InputError, NotImplementedError, OSError) as error:
        message = " ".join(str(error).split())
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark from flags to report. Returns 0; bad input exits with code 2."""
    args = parse_args(argv)
    if sys.stdout:  # None where it was closed
        sys.stdout.reconfigure(errors="replace")  # a terminal without these symbols gets question marks, not a crash
    say = (lambda *_: None) if args.quiet else partial(print, flush=True)  # steps take seconds: show each at once

    with exit_on_bad_input():
        dtype = pick_dtype(args.dtype, args.device)
        say(format_configuration(args, dtype))

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
        if args.seq_len > config.max_position_embeddings:
            context = config.max_position_embeddings
            print(f"warning: seq_len {args.seq_len} is beyond the model's context of {context}", file=sys.stderr)

        tokenizer = load_tokenizer(weights_dir)
        windows = load_windows(tokenizer, args.text, args.calib_text, args.seq_len, config.vocab_size)
        calib_ids, test_ids = windows
        say(f"📖 Calibration: {calib_ids.size} tokens of {(args.calib_text or args.text).name}")
        say(f"   Test:        {test_ids.size} tokens of {args.text.name} (UNSEEN)\n")

        say(f"📊 Calibrating on {(args.calib_text or args.text).name}...")
        sizes = {name: getattr(args, name) for name in ("tile_size", "top_k", "sink_tiles")}
        model_dense = LlamaModel(config, dtype=DTYPES[dtype], **sizes)
        calibrate_kascade(model_dense, params, calib_ids, args.tile_size, args.top_k, mesh)
        calibration = dict(KASCADE_CACHE)
        if args.verbose:
            say("\n".join(format_chosen(layer, tiles) for layer, tiles in calibration.items()))

        say("\n⚡ Generating Optimized Schedule:")
        decisions = decide_schedule(similarity_matrix(calibration), args.threshold, args.max_reuse_dist)
        schedule = add_head_maps({i: (d.mode, d.anchor) for i, d in enumerate(decisions)}, calibration)
        say(format_schedule(decisions, args.threshold, args.max_reuse_dist))

        say("🏃 Running DENSE Baseline...")
        dense = run_model(model_dense, params, test_ids, mesh)
        check_perplexity(dense.perplexity, config.vocab_size)
        say(f"  All {tile_count(args.seq_len, args.tile_size)} tiles in every layer\n")

        say("⚡ Running KASCADE Sparse...")
        model_sparse = model_dense.clone(schedule=schedule)
        sparse = run_model(model_sparse, params, test_ids, mesh)
        attended = attended_tiles(model_sparse.schedule, KASCADE_CACHE)
        if args.verbose:
            say(format_sparse_layers(model_sparse.schedule, attended, args.tile_size, args.seq_len))
        density = statistics.mean(density_of(tiles) for tiles in attended.values())
        degradation_pct = (sparse.perplexity / dense.perplexity - 1) * 100
        print("\n" + format_results(dense.perplexity, sparse.perplexity, degradation_pct, density))

        print(f"⏱️  SPEEDUP BENCHMARK\n{RULE}\n")
        say(f"Benchmarking {args.n_runs} runs each...")
        say(f"  Compiled before the clock starts: dense {dense.compile_s:.1f} s, sparse {sparse.compile_s:.1f} s")
        say("  Warming up...\n  Timing Dense and Sparse in turn...\n")
        samples = time_interleaved({"dense": dense.forward, "sparse": sparse.forward}, args.n_runs)
        speedup = statistics.median(samples["dense"]) / statistics.median(samples["sparse"])
        print(format_timing(samples, speedup, describe_run(args, devices, dtype, density)))

        if args.json:
            report = {
                "model": {
                    "name": manifest["model"],
                    "source": manifest["source"],
                    "parameters": count_parameters(params),
                },
                "config": describe_config(args, weights_dir, dtype),
                "schedule": schedule_rows(decisions, model_sparse.schedule, attended),
                "dense": {"perplexity": dense.perplexity, "compile_s": dense.compile_s},
                "sparse": {"perplexity": sparse.perplexity, "compile_s": sparse.compile_s},
                "degradation_pct": degradation_pct,
                "density": density,
                "timing": {"dense_ms": samples["dense"], "sparse_ms": samples["sparse"]},
                "speedup": speedup,
                "versions": versions(),
                "device": {"platform": args.device, "kind": devices[0].device_kind, "count": len(devices)},
            }
            write_json(args.json, report)
            say(f"\n📝 Report written to {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
