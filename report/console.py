"""A run as text: every function formats results and returns them, and computes or prints nothing."""

from __future__ import annotations

import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, LayerPlan, tile_count
from report.results import (
    FAILED,
    NOTHING_DROPPED,
    SUCCESS,
    SUCCESS_PCT,
    Decoding,
    DensityRow,
    DepthRow,
    Generated,
    LimitCheck,
    LongContext,
    Machine,
    Model,
    Quality,
    SweepRow,
    TaskRow,
    Timing,
    break_even,
    count_modes,
    layer_types,
)

RULE = "=" * 70
COLUMNS = 80  # of a terminal


def fit(text: str) -> str:
    """The text with lines of more than COLUMNS broken at spaces; a single word, such as a path, stays whole."""
    return "\n".join(part for line in text.split("\n") for part in _broken(line))


def _broken(line: str) -> list[str]:
    if width(line) <= COLUMNS:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    first, *words = line.strip().split(" ")
    parts = [indent + first]
    for word in words:
        if width(f"{parts[-1]} {word}") <= COLUMNS:
            parts[-1] += f" {word}"
        else:
            parts.append(f"{indent}    {word}")
    return parts


def width(line: str) -> int:
    """Columns of a terminal: wide letters and symbols take two, combining marks none."""
    return sum(
        1
        if letter == "\ufe0f"  # asks for the wide form of the symbol before it
        else 0
        if unicodedata.category(letter) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in line
    )


def configuration(settings: Any) -> str:
    """What was asked for; `settings` is a `measure.settings.Settings`."""
    selection = settings.selection
    rows = [
        ("Device", settings.device.upper()),
        ("Dtype", settings.dtype),
        ("Kernel", settings.kernel),
        ("Sequence Length", settings.seq_len),
        ("Scheduler", describe_scheduler(settings)),
    ]
    if settings.load_schedule is None:
        budget = ("Top-K Tiles", selection.top_k) if selection.density is None else ("Density", selection.density)
        rows += [
            ("Tile Size", selection.tile_size),
            budget,
            *([("Least Tiles", selection.min_tiles)] if selection.min_tiles else []),
            ("Sink Tiles", selection.sink_tiles),
            ("Local Tiles", selection.local_tiles),
            ("Query Tile", selection.query_tile),
            ("Anchor Scoring", selection.anchor_scoring),
        ]
    if settings.scheduler == "threshold":
        rows += [("Threshold", f"{settings.threshold:.2%}"), ("Max Reuse Dist", settings.max_reuse_dist)]
    return "⚙️  Configuration:\n" + "".join(f"   {name + ':':17} {value}\n" for name, value in rows)


def describe_scheduler(settings: Any) -> str:
    """What makes the schedule."""
    if settings.load_schedule:
        return f"loaded from {settings.load_schedule.name}"
    if settings.scheduler == "search":
        limit = "" if settings.max_degradation is None else f", degradation under {settings.max_degradation:g}%"
        return f"search, budgets by {settings.budgets}{limit}"
    anchors = f", anchors {', '.join(map(str, settings.anchor_layers))}" if settings.anchor_layers else ""
    return f"{settings.scheduler}, {settings.similarity}{anchors}"


def describe_budget(settings: Any) -> str:
    """How many tiles are kept."""
    if settings.load_schedule:
        return f"schedule {settings.load_schedule.name}"
    if settings.scheduler == "search":
        return f"searched budgets by {settings.budgets}"
    selection = settings.selection
    if selection.density is None:
        return f"Top-K {selection.top_k}"
    least = f" (at least {selection.min_tiles} tiles)" if selection.min_tiles else ""
    return f"density {selection.density:g}{least}"


def mesh(axes: Mapping[str, int]) -> str:
    """A mesh's axes, as --mesh takes them."""
    return ",".join(f"{name}={size}" for name, size in axes.items())


def describe_timing(settings: Any, machine: Machine) -> str:
    """What a timing means: everything that it depends on but the length."""
    selection = settings.selection
    sizes = [f"tile {selection.tile_size}"]
    if selection.query_tile != selection.tile_size:
        sizes.append(f"query tile {selection.query_tile}")
    sizes += [describe_budget(settings), f"{selection.sink_tiles} sink and {selection.local_tiles} local tiles"]
    sizes.append(f"{selection.anchor_scoring} scoring")
    return (
        f"whole forward and loss on {machine},\n"
        f"    {settings.dtype}, {settings.kernel}, {', '.join(sizes[:-1])},\n"
        f"    {sizes[-1]}, n = {settings.n_runs}"
    )


def model_line(model: Model) -> str:
    """The model's name, layers, parameters, and size on the device."""
    size = f"{model.parameters / 1e6:.1f}M parameters, {model.bytes / 1e6:.0f} MB"
    return f"✓ {model.name}: {model.num_layers} layers, {size}"


def schedule(plans: Sequence[LayerPlan], settings: Any) -> str:
    """A line with the reason for each layer, the count, and the strip of layer types."""
    lines = []
    if settings.scheduler == "threshold":
        lines.append(f"   Similarity threshold: {settings.threshold:.2%}")
        lines.append(f"   Max reuse distance: {settings.max_reuse_dist}")
    for layer, plan in enumerate(plans):
        target = f" L{plan.anchor}" if plan.mode == REUSE else ""
        lines.append(f"  Layer {layer}: {plan.mode}{target} ({plan.reason})")
    reused = count_modes(plans)[REUSE]
    lines += ["", f"📋 Final Schedule: {reused} REUSE, {len(plans) - reused} ANCHOR/DENSE", ""]
    return "\n".join(lines) + "\n" + strip(plans) + f"\n   Full or shared: {layer_types(plans)}\n"


def strip(plans: Sequence[LayerPlan], per_row: int = 12) -> str:
    """Layer numbers over layer types over the reused layer, `per_row` layers in a row."""
    names = {DENSE: "DENSE", ANCHOR: "ANC", REUSE: "REU"}
    cells = [
        (str(layer), names[plan.mode], f"L{plan.anchor}" if plan.mode == REUSE else "")
        for layer, plan in enumerate(plans)
    ]
    lines = []
    for start in range(0, len(cells), per_row):
        for name, row in zip(("Layer:", "Type: ", "From: "), zip(*cells[start : start + per_row]), strict=True):
            lines.append((f"{name} " + "".join(f"{cell:>6}" for cell in row)).rstrip())
    return "\n".join(lines) + "\n"


def chosen_tiles(layer: int, tiles_BKQC: np.ndarray) -> str:
    """An anchor's tiles for head 0 and the last query tile, the only one that sees every key tile."""
    tiles = tiles_BKQC[0, 0, -1]
    numbers = " ".join(map(str, np.sort(tiles[tiles != NO_TILE])))
    return f"  [Anchor L{layer}] Selected Top-{tiles.size} Tiles (Head 0): [{numbers}]"


def sparse_layers(
    plans: Sequence[LayerPlan], attended: Mapping[int, np.ndarray | None], tile_size: int, seq_len: int
) -> str:
    """Each layer's lines of a sparse run, for the last query tile."""
    lines = []
    for layer, plan in enumerate(plans):
        if plan.mode == DENSE:
            lines.append(f"  [Dense  L{layer}] Using all {tile_count(seq_len, tile_size)} tiles ({seq_len} tokens)")
            continue
        if plan.mode == ANCHOR:
            lines.append(chosen_tiles(layer, attended[layer]))
        else:
            heads = ", ".join(f"H{head} uses Anchor H{source}" for head, source in enumerate(plan.head_map))
            lines.append(f"  [Reuse  L{layer}] Applied Map (Anchor L{plan.anchor}): {heads}")
        tokens = count_tokens(attended[layer][0, 0, -1], tile_size, seq_len)
        lines.append(f"  [{plan.mode.title():6} L{layer}] Using {tokens} sparse tokens (vs {seq_len} full)")
    return "\n".join(lines)


def count_tokens(tiles_C: np.ndarray, tile_size: int, seq_len: int) -> int:
    """Tokens in the given tiles; the sequence's last tile may be partly filled."""
    used = tiles_C[tiles_C != NO_TILE].astype(np.int64)
    return int(np.sum(np.minimum(tile_size, seq_len - used * tile_size)))


def quality(quality: Quality, settings: Any) -> str:
    """The results section; the verdict fails as plainly as it passes."""
    lines = [
        RULE,
        "📊 RESULTS ON REAL TEXT:",
        RULE,
        "",
        f"   Dense Perplexity:  {quality.dense_perplexity:.4f}",
        f"   Sparse Perplexity: {quality.sparse_perplexity:.4f}",
        *degradation(quality),
        *divergence(quality),
        f"   Density:           {quality.density:.2%} of the causal (query tile, key tile) pairs,",
        "                      counted over all layers",
    ]
    selection = settings.selection
    if selection.density is not None and not settings.load_schedule:
        least = f", at least {selection.min_tiles} tiles," if selection.min_tiles else ""
        lines.append(
            f"                      (asked for {selection.density:.0%}{least} in sparse layers:\n"
            "                      dense layers count too, and own, sink and local tiles\n"
            "                      are always kept)"
        )
    lines += [
        "   (Rows of one query tile share their choice of tiles: later rows help to",
        "   choose for earlier ones.)",
        "",
        *verdict(quality, settings),
    ]
    return "\n".join(lines) + "\n"


def degradation(quality: Quality) -> list[str]:
    """The change of perplexity with both of its standard errors, and the interval where there are several windows."""
    text = f"   Degradation:       {quality.degradation_pct:+.4f}%"
    errors = [(quality.se_windows, f"{quality.windows} windows"), (quality.se_tokens, f"{quality.predictions} tokens")]
    errors = [f"± {100 * error:.2f} over {what}" for error, what in errors if error is not None]
    lines = [f"{text} {', '.join(errors)}".rstrip()]
    if errors:
        lines.append("                      (standard errors; that over tokens is too small, for")
        lines.append("                      they are not independent)")
    if quality.interval_pct:
        low, high = quality.interval_pct
        lines.append(
            f"                      95% interval {low:+.2f}% to {high:+.2f}% (Student's t, {quality.windows} windows)"
        )
    return lines


def divergence(quality: Quality) -> list[str]:
    """KL divergence from dense, the likeliest token, and the right token's probability."""
    kl, top1_error = quality.kl, quality.same_top1_se
    correlation = "" if quality.correlation is None else f"correlation {quality.correlation:.4f}, "
    return [
        f"   KL from Dense:     {kl.mean:.5f}{'' if kl.se is None else f' ± {kl.se:.5f}'} nats a token; median "
        f"{kl.median:.5f},",
        f"                      90% {kl.p90:.4f}, 99% {kl.p99:.4f}, 99.9% {kl.p999:.4f}, largest {kl.max:.4f}",
        f"   Same Top-1 Token:  {quality.same_top1:.2%}{'' if top1_error is None else f' ± {100 * top1_error:.2f}'}",
        f"   Right Token:       {correlation}RMS change of its probability {quality.rms_dp:.2%}",
    ]


def verdict(quality: Quality, settings: Any) -> list[str]:
    """Whether the loss is under SUCCESS_PCT as far as its error lets one say, and what to try if it is not."""
    limit, loss = f"{SUCCESS_PCT:.0f}%", f"{quality.degradation_pct:+.2f}%"
    if quality.verdict == NOTHING_DROPPED:
        return ["⚠️  Nothing was dropped: Top-K covers all tiles. Lower --top_k, or raise --seq_len."]
    if quality.verdict == SUCCESS:
        return [f"✅✅✅ SUCCESS! <{limit} degradation achieved!"]
    if quality.verdict == FAILED:
        return [f"❌ FAILED: degradation {loss} is not under {limit}.", advice(quality, settings)]
    needed = quality.windows_needed
    more = "" if needed is None else f"; about {needed} probably could (--windows)"
    windows = "1 window" if quality.windows == 1 else f"{quality.windows} windows"
    return [
        f"⚠️  UNDECIDED: degradation {loss}, and {windows} cannot tell whether it is under {limit}{more}.",
        advice(quality, settings),
    ]


def advice(quality: Quality, settings: Any) -> str:
    """What to try next, and its cost in density. Tiles of 8 tokens are for a CPU: kernels want larger ones."""
    density = quality.advised_density(searched=settings.scheduler == "search")
    tiles = " --tile_size 8 --query_tile 8" if settings.device == "cpu" else ""
    return (
        f"   Try --scheduler search{tiles} --density {density:.2f}\n"
        f"   ({density:.0%} of the tiles in sparse layers, {quality.sparse_density:.0%} now), "
        f"which probably loses about {SUCCESS_PCT / 2:.0f}%."
        if density < 1
        else "   Try a larger --top_k or --density: nearly every tile is needed here."
    )


def long_context(found: LongContext) -> str:
    """Perplexity over the tokens that need the long context."""
    values = found.to_json()
    if not found.tokens:
        return "   LongPPL: no token of the test windows needs more context than the short one.\n"
    error = "" if values["se_tokens"] is None else f" ± {100 * values['se_tokens']:.2f}"
    return (
        f"   LongPPL: {values['dense_perplexity']:.4f} dense, {values['sparse_perplexity']:.4f} sparse, "
        f"{values['degradation_pct']:+.2f}%{error},\n"
        f"   over the {found.tokens} tokens that need a long context\n"
    )


def limit_kept(check: LimitCheck, quality: Quality, limit: float) -> str:
    """What became of --max_degradation."""
    return (
        f"   Degradation on {len(check.delta_log_ppl)} held-out calibration windows {check.mean_pct:+.2f}%, at most "
        f"{check.upper_pct:+.2f}% (95% confidence),\n"
        f"   asked for under {limit:g}%; on the unseen text {quality.degradation_pct:+.2f}%.\n"
    )


def timing(timing: Timing, meaning: str) -> str:
    """Both arms' times, the speedup as it is, and what the numbers mean."""
    n_runs = len(timing.dense_ms)
    lines = [f"📊 Timing Results (median [min, max] of {count_runs(timing.dense_ms)}):"]
    for name, times in (("Dense", timing.dense_ms), ("Sparse", timing.sparse_ms)):
        lines.append(f"   {name + ':':8} {statistics.median(times):9.2f} ms  [{min(times):.2f}, {max(times):.2f}]")
    speedup = timing.speedup
    lines += [f"   Speedup: {speedup:.2f}x", f"   ({meaning})", ""]
    if n_runs == 1:
        lines.append(f"⚠️  Speedup: {speedup:.2f}x from one run of each, which says little. Raise --n_runs.")
    elif round(speedup, 2) > 1:
        lines.append(f"✅ Sparse is {speedup:.2f}x faster!")
    else:
        lines.append(f"⚠️  Speedup: {speedup:.2f}x: sparse is no faster here. Try a longer --seq_len.")
    return "\n".join(lines)


def attention_alone(samples: Mapping[str, Sequence[float]]) -> str:
    """One layer's attention without the model around it, each kind against dense."""
    dense = statistics.median(samples["dense"])
    lines = [f"🔬 Attention alone, one layer, random inputs (median [min, max] of {count_runs(samples['dense'])}):"]
    for name, times in samples.items():
        share = "" if name == "dense" else f"  {statistics.median(times) / dense:.2f} of dense"
        lines.append(f"   {name.title() + ':':10} {spread(times):>24} ms{share}")
    lines += [
        "   (Selection is how an anchor chooses its tiles; an anchor selects, then",
        "   attends as a reuse layer does.)",
    ]
    return "\n".join(lines)


def count_runs(times: Sequence[float]) -> str:
    """How many runs were timed."""
    return f"{len(times)} run{'s' * (len(times) > 1)}"


def spread(times: Sequence[float]) -> str:
    """Median [min, max], with as many decimals as matter."""
    decimals = 2 if statistics.median(times) < 1000 else 0
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(statistics.median(times), min(times), max(times), d=decimals)


DENSITY_COLUMNS = "{:>7} {:>8} {:>18} {:>9} {:>7} {:>8} {:>7}"


def densities_header(settings: Any) -> str:
    """What the rows of --densities are, and their columns."""
    names = ("asked", "counted", "degradation", "KL nats", "top-1", "reuse", "speedup")
    return (
        f"⚖️  TRADE-OFF, a schedule for each density ({describe_scheduler(settings)}; ± one standard error,\n"
        f"   times of {settings.n_runs} runs each at {settings.seq_len} tokens)\n\n" + DENSITY_COLUMNS.format(*names)
    )


def density_row(row: DensityRow) -> str:
    """One density's line."""
    error = "" if row.error_pct is None else f" ± {row.error_pct:.2f}"
    return DENSITY_COLUMNS.format(
        f"{row.asked:.1%}",
        f"{row.density:.1%}",
        f"{row.degradation_pct:+.2f}%{error}",
        f"{row.kl:.4f}",
        f"{row.same_top1:.1%}",
        f"{row.layer_types.count('S')} of {len(row.layer_types)}",
        f"{row.speedup:.2f}x",
    )


SWEEP_COLUMNS = "{:>8} {:>23} {:>23} {:>7} {:>7} {:>7}"


def sweep_header(meaning: str) -> str:
    """What the sweep's numbers mean, and its columns."""
    names = ("tokens", "dense ms", "sparse ms", "speedup", "density", "peak MB")
    return f"📈 SWEEP\n   ({meaning};\n    median [min, max]; peak memory up to that row)\n\n" + SWEEP_COLUMNS.format(
        *names
    )


def sweep_row(row: SweepRow) -> str:
    """One length's line."""
    if row.skipped:
        return f"{row.length:8} skipped: it {row.skipped}"
    peak = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}"
    return SWEEP_COLUMNS.format(
        row.length, spread(row.dense_ms), spread(row.sparse_ms), f"{row.speedup:.2f}x", f"{row.density:.2%}", peak
    )


def sweep_break_even(rows: Sequence[SweepRow | DepthRow]) -> str:
    """Between which of the lengths or depths sparse begins to be faster and stays so."""
    between = break_even(rows)
    if between is None:
        return "   Break-even: unknown, no length was measured"
    slower, faster = between
    if faster is None:
        text = f"   Break-even: beyond {slower} tokens, sparse is not faster there"
    elif slower is None:
        text = f"   Break-even: below {faster} tokens"
    else:
        text = f"   Break-even: between {slower} and {faster} tokens"
    early = [row.length for row in rows if not row.skipped and row.speedup > 1 and row.length < (slower or 0)]
    return text + (
        f" (sparse was faster at {', '.join(map(str, early))} tokens too, but not in between)" if early else ""
    )


# --- Decoding ---


def decoding(found: Decoding, dtype: str) -> str:
    """Quality and time of decoding, and what bounds the time."""
    quality = found.quality
    error = "" if quality.se_tokens is None else f" ± {100 * quality.se_tokens:.2f} over {quality.predictions} tokens"
    top1 = "" if quality.same_top1_se is None else f" ± {100 * quality.same_top1_se:.1f}"
    each = "" if found.batch == 1 else " of every sequence"
    lines = [
        f"🔁 DECODING {found.steps} tokens after {found.depth}, batch {found.batch}, {dtype}",
        f"   ({quality.windows} window(s), {found.prefill} prefill, steps by {' - '.join(filter(None, found.kernel))})",
        RULE,
        "",
        f"   Dense Perplexity:  {quality.dense_perplexity:.4f}",
        f"   Sparse Perplexity: {quality.sparse_perplexity:.4f}",
        f"   Degradation:       {quality.degradation_pct:+.4f}%{error}",
        f"   KL from Dense:     {quality.kl.mean:.5f} nats a token; same top-1 token {quality.same_top1:.2%}{top1}",
        f"   Density:           {quality.density:.2%}",
        "   (A query tile is one row here: no row helps to choose for an earlier one.)",
        "",
        f"   Milliseconds a token{each} (median [min, max] of {len(found.dense_ms)} passes):",
    ]
    for arm, times, size in (
        ("dense", found.dense_ms, found.dense_bytes),
        ("sparse", found.sparse_ms, found.sparse_bytes),
    ):
        lines.append(
            f"   {arm.title() + ':':8} {spread(times):>22}  {found.tokens_per_second(arm):6.1f} tokens/s, reads "
            f"{size / 1e6:.0f} MB,\n            {found.bandwidth_share(arm):.0%} of the memory's bandwidth"
        )
    lines.append(f"   Speedup: {found.speedup:.2f}x   (memory measured at {found.bytes_per_second / 1e9:.0f} GB/s)")
    return "\n".join(lines) + "\n"


DEPTH_COLUMNS = "{:>7} {:>19} {:>21} {:>19} {:>7}"


def depths_header(batch: int) -> str:
    """The columns of the table of depths."""
    return (
        "📈 DECODING BY DEPTH\n"
        f"   (ms a token, median [min, max], batch {batch}, caches of random keys;\n"
        "    keep all: sparse layers made to keep every tile, the cost of bookkeeping)\n\n"
        + DEPTH_COLUMNS.format("depth", "dense", "keep all", "sparse", "density")
    )


def depth_row(row: DepthRow) -> str:
    """One depth's line."""
    if row.skipped:
        return f"{row.depth:7} skipped: it {row.skipped}"
    times = (short_spread(times) for times in (row.dense_ms, row.keep_all_ms, row.sparse_ms))
    beyond = "\n        (beyond the model's context: only time is meant)" if row.beyond_context else ""
    return DEPTH_COLUMNS.format(row.depth, *times, f"{row.density:.1%}") + beyond


def short_spread(times: Sequence[float]) -> str:
    """Median [min, max] with one decimal."""
    return f"{statistics.median(times):.1f} [{min(times):.1f}, {max(times):.1f}]"


def continuations(found: Generated, dense_text: str, sparse_text: str) -> str:
    """Both arms' greedy continuations, and where they part."""
    where = "They are the same." if found.part_at is None else f"They part at token {found.part_at}."
    texts = f"   Dense:  {dense_text!r}\n   Sparse: {sparse_text!r}\n"
    return f"✍️  GREEDY CONTINUATION ({len(found.dense)} tokens)\n{texts}   {where}\n"


# --- Tasks ---

TASK_COLUMNS = "{:>13} {:>8} {:>14} {:>14} {:>14} {:>5} {:>6}"  # 80 columns


def tasks_header(settings: Any) -> str:
    """What the tasks' figures mean, and their columns."""
    names = ("task", "set-up", "dense", "sparse", "oracle", "p", "kept")
    return (
        f"🎯 TASKS: {settings.task_len} tokens, n = {settings.task_n}, filler {settings.task_filler}; right answers, "
        f"% [95% interval]\n{RULE}\n\n"
        "   (set-up: what is sparse, the whole prompt and the answer, or the question and\n"
        "   the answer alone after a dense context; oracle: every sparse layer chooses\n"
        "   for itself; p: McNemar's exact test, sparse against dense; kept: density;\n"
        "   1st: right answers ranked first among the candidates)\n\n" + TASK_COLUMNS.format(*names)
    )


def task_row(row: TaskRow) -> str:
    """One set-up's lines."""
    arms = (row.dense, row.sparse, row.oracle)
    shares = (f"{a.share:.0%} [{100 * a.interval[0]:.0f}, {100 * a.interval[1]:.0f}]" for a in arms)
    p = "" if row.p_value is None else f"{row.p_value:.3f}"
    ranks = (f"1st {a.ranked_first:.0%} of {row.candidates}" for a in arms)
    lines = [
        TASK_COLUMNS.format(row.task, row.setup, *shares, p, f"{row.density:.1%}"),
        TASK_COLUMNS.format("", "", *ranks, "", "").rstrip(),
    ]
    if not row.discriminative:
        lines.append(f"  not discriminative: dense is not clearly above chance ({row.chance:.1g}), or n is small")
    lines += [f"  ⚠️  {suspicion} significantly (p < 0.05): by chance, or a bug" for suspicion in row.suspicions]
    return "\n".join(lines)


def tasks_power(rows: Sequence[TaskRow]) -> str:
    """The smallest effect that so many questions could have shown."""
    effect = rows[0].smallest_effect
    if effect is None:
        return f"   n = {rows[0].n} cannot show any loss: raise --task_n\n"
    return f"   With a probability of 80%, n = {rows[0].n} shows a loss of {effect:.0%} of the answers or more\n"
