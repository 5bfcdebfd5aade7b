"""What a run says: every function returns text or rows, and prints nothing."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, Decision, LayerPlan, density_of
from kascade_layout import tile_count
from llama_model import count_parameters

MAX_DEGRADATION = 2.0  # percent; the guide's bar for success
RULE = "=" * 70


def format_configuration(args: argparse.Namespace, dtype: str, kernel: str) -> str:
    """The guide's configuration section."""
    return (
        "⚙️  Configuration:\n"
        f"   Device:           {args.device.upper()}\n"
        f"   Dtype:            {dtype}\n"
        f"   Kernel:           {kernel}\n"
        f"   Sequence Length:  {args.seq_len}\n"
        f"   Tile Size:        {args.tile_size}\n"
        f"   {'Density:     ' if args.density else 'Top-K Tiles: '}     {args.density or args.top_k}\n"
        f"   Sink Tiles:       {args.sink_tiles}\n"
        f"   Local Tiles:      {args.local_tiles}\n"
        f"   Query Tile:       {args.query_tile}\n"
        f"   Anchor Scoring:   {args.anchor_scoring}\n"
        f"   Threshold:        {args.threshold:.2%}\n"
        f"   Max Reuse Dist:   {args.max_reuse_dist}\n"
        f"   Scheduler:        {describe_scheduler(args)}\n"
    )


def describe_scheduler(args: argparse.Namespace) -> str:
    """Which rule makes the schedule."""
    if args.load_schedule:
        return f"loaded from {args.load_schedule.name}"
    if args.scheduler == "search":
        limit = "" if args.max_degradation is None else f", degradation under {args.max_degradation:g}%"
        return f"search, budgets by {args.budgets}{limit}"
    return f"{args.scheduler}, {args.similarity}"


def describe_budget(args: argparse.Namespace) -> str:
    """How many tiles are kept."""
    if args.load_schedule:
        return f"schedule {args.load_schedule.name}"
    if args.scheduler == "search":
        return f"searched budgets by {args.budgets}"
    return f"Top-K {args.top_k}" if args.density is None else f"density {args.density:g}"


def format_model(manifest: Mapping[str, Any], params: Any) -> str:
    """One line: the model's name, layers, parameters, and size as it lies on the device."""
    size_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    millions = count_parameters(params) / 1e6
    layers = manifest["config"].num_hidden_layers
    return f"✓ {manifest['model']}: {layers} layers, {millions:.1f}M parameters, {size_mb:.0f} MB\n"


def format_schedule(decisions: Sequence[Decision], threshold: float | None, max_reuse_dist: int | None) -> str:
    """The guide's schedule section: a line with the reason for each layer, the count, the strip of layer types.

    The threshold and the distance are those of the guide's rule, None for another.
    """
    lines = [] if threshold is None else [f"   Similarity threshold: {threshold:.2%}"]
    lines += [] if max_reuse_dist is None else [f"   Max reuse distance: {max_reuse_dist}"]
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
    if round(speedup, 2) > 1:
        lines.append(f"✅ Sparse is {speedup:.2f}x faster!")
    else:
        lines.append(f"⚠️  Speedup: {speedup:.2f}x: sparse is no faster here. Try a longer --seq_len.")
    return "\n".join(lines)


def format_attention(samples: Mapping[str, Sequence[float]]) -> str:
    """One layer's attention without the model around it, each kind against dense."""
    dense = statistics.median(samples["dense"])
    lines = [f"🔬 Attention alone, one layer, random inputs (median [min, max] of {len(samples['dense'])} runs):"]
    for name, times in samples.items():
        share = "" if name == "dense" else f"  {statistics.median(times) / dense:.2f} of dense"
        lines.append(f"   {name.title() + ':':10} {_spread(times)} ms{share}")
    lines.append(
        "   (Selection is what an anchor does to choose; an anchor selects, then attends as a reuse layer does.)"
    )
    return "\n".join(lines)


def _spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times):9.2f} [{min(times):.2f}, {max(times):.2f}]"


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """What --sweep measured at one length, or why it skipped it."""

    length: int
    dense_ms: Sequence[float] = ()
    sparse_ms: Sequence[float] = ()
    density: float | None = None
    peak_memory_bytes: int | None = None  # of all that was done up to here
    skipped: str | None = None

    @property
    def speedup(self) -> float:
        """Of the medians."""
        return statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)


SWEEP_COLUMNS = "{:>8}  {:>28}  {:>28}  {:>7}  {:>7}  {:>17}  {:>7}"


def format_sweep_header(meaning: str) -> str:
    """What the sweep's numbers mean, and its columns."""
    names = ("tokens", "dense ms", "sparse ms", "speedup", "density", "tokens/s", "peak MB")
    return (
        f"📈 SWEEP\n   ({meaning};\n   median [min, max]; tokens/s dense and sparse; peak memory up to that row)\n\n"
        + SWEEP_COLUMNS.format(*names)
    )


def format_sweep_row(row: SweepRow) -> str:
    """One length's line."""
    if row.skipped:
        return f"{row.length:8}  skipped: it {row.skipped}"
    rates = [row.length / statistics.median(times) * 1e3 for times in (row.dense_ms, row.sparse_ms)]
    peak = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}"
    return SWEEP_COLUMNS.format(
        *(row.length, _spread(row.dense_ms), _spread(row.sparse_ms), f"{row.speedup:.2f}x", f"{row.density:.2%}"),
        *("{:.0f} {:.0f}".format(*rates), peak),
    )


def format_break_even(rows: Sequence[SweepRow]) -> str:
    """Between which of the lengths sparse begins to be faster, and stays so."""
    measured = [row for row in rows if not row.skipped]
    slower = [row.length for row in measured if row.speedup <= 1]
    faster = [row.length for row in measured if row.speedup > 1 and row.length > max(slower, default=0)]
    if not measured:
        return "   Break-even: unknown, no length was measured"
    if not faster:
        where = f"beyond {max(slower)} tokens, sparse is not faster there"
    else:
        where = f"between {max(slower)} and {min(faster)} tokens" if slower else f"below {min(faster)} tokens"
    return f"   Break-even: {where}"


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
            "budgets": plan.budgets,
            "density": density_of(attended[layer]),
        }
        for layer, (decision, plan) in enumerate(zip(decisions, plans, strict=True))
    ]


def describe_run(args: argparse.Namespace, devices: Sequence[jax.Device], dtype: str, kernel: str) -> str:
    """What a timing means: everything that it depends on but the length."""
    sharing = "" if args.query_tile == args.tile_size else f" (query tile {args.query_tile})"
    where = f"{len(devices)} {args.device.upper()} device(s), {devices[0].device_kind}"
    return (
        f"whole forward and loss on {where}, {dtype}, {kernel}; "
        f"tile {args.tile_size}{sharing}, {describe_budget(args)}, {args.anchor_scoring} scoring, n = {args.n_runs}"
    )


def describe_config(args: argparse.Namespace, weights_dir: Path, dtype: str, kernel: str) -> dict[str, Any]:
    """The run's settings as --json holds them, "auto" and defaults resolved."""
    names = ("tile_size", "top_k", "sink_tiles", "query_tile", "anchor_scoring", "threshold", "max_reuse_dist")
    names += ("local_tiles", "density", "similarity", "scheduler", "anchors", "budgets", "max_degradation")
    names += ("seq_len", "n_runs")
    settings = {name: getattr(args, name) for name in names}
    paths = {"load_schedule": args.load_schedule} if args.load_schedule else {}
    paths |= {"weights_dir": weights_dir, "text": args.text, "calib_text": args.calib_text or args.text}
    return (
        {"device": args.device, "dtype": dtype, "kernel": kernel}
        | settings
        | {name: str(path) for name, path in paths.items()}
    )


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
