"""The plots of a report as inline SVG, each with a caption and its numbers: drawn from the report as --json has it.

matplotlib draws them 360 units wide, so that their text is legible on a telephone; a page may show them up to half as
large again. What is black or white in them follows the page's own colours, light or dark.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

os.environ["MPLBACKEND"] = "svg"  # what a notebook has put there may name a module that this Python lacks

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch
from matplotlib.path import Path as Curve
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from report.results import PROMPT, QUESTION, SUCCESS_PCT, from_ranges, pareto_front

# Okabe and Ito's colours, which colour-blind people can tell apart; arms differ in shape as well.
BLUE, ORANGE, GREEN, PURPLE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
INK, FAINT = "#010203", "#040506"  # stand for the page's own colours
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", "#0072b2": "var(--blue)"}  # lighter on dark pages
TILE_BLUE = "#0073b2"  # of images, whose colours are the same on every page
ARMS = {"dense": (BLUE, "o"), "sparse": (ORANGE, "s"), "keep all": (GREEN, "^")}
MODES = {"DENSE": "#7f7f7f", "ANCHOR": BLUE, "REUSE": YELLOW}
WIDTH = 5.0  # inches of 72 units
STYLE = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.borderaxespad": 0.2,
    "legend.handlelength": 1.4,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
      name: of its anchor in the page.
      title: what it is of.
      svg: text without text of others' that is not escaped.
      caption: what to see in it, units, n.
      columns, rows: its numbers, as text.
    """

    name: str
    title: str
    svg: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def draw(name: str, title: str, height: float, paint: Callable[[Figure], None]) -> str:
    """The SVG of a figure of so many inches, after `paint` has drawn on it."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure((WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return inline(file.getvalue(), name, title)


def inline(svg: str, name: str, title: str) -> str:
    """An SVG file's text as a part of a page: its ids are its own, and its black is the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in referenced else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", svg)
    for placeholder, colour in PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">',
        svg,
        count=1,
    )
    svg = re.sub(r"(-?\d+\.\d\d)\d+", r"\1", svg)  # hundredths of a unit are enough
    svg = re.sub(r"font: (?:[\w.]+ )?([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    svg = re.sub(r" ?font-family: [^;\"]+;?", "", svg)  # the page's
    return re.sub(r"\n\s*", "\n", svg)


# --- Numbers as text ---


def windows_of(text: Mapping[str, Any]) -> str:
    """How many windows of how many tokens."""
    return f"{text['windows']} window{'s' * (text['windows'] != 1)} of {text['tokens_per_window']:,} tokens"


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign; nothing for None."""
    return "" if value is None else f"{value:+.{digits}f}"


def of_error(value: float, error: float | None, digits: int = 2) -> str:
    """A signed value with its error."""
    return signed(value, digits) + ("" if error is None else f" ± {error:.{digits}f}")


def share(value: float, digits: int = 1) -> str:
    """A share as percent."""
    return f"{100 * value:.{digits}f} %"


def milliseconds(value: float) -> str:
    """Three digits or more."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def time_cells(samples: Sequence[float]) -> list[str]:
    """Median, least, most, n."""
    return [*map(milliseconds, (statistics.median(samples), min(samples), max(samples))), str(len(samples))]


# --- Quality ---


def change_by_window(report: Mapping[str, Any]) -> Plot:
    """The paired change of perplexity of each test window."""
    quality = report["quality"]
    windows, tokens = quality["by_window"], report["config"]["seq_len"]
    changes = [100 * np.expm1(window["delta_log_ppl"]) for window in windows]
    mean, interval, error = quality["degradation_pct"], quality["interval_pct"], quality["error_pct"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if interval:
            axes.axvspan(*interval, color=ORANGE, alpha=0.18, lw=0)
        axes.axvline(0, color=INK, lw=1)
        axes.axvline(SUCCESS_PCT, color=INK, lw=1, ls=":")
        axes.axvline(mean, color=ORANGE, lw=2)
        axes.plot(changes, range(1, len(changes) + 1), "o", color=BLUE, ms=7)
        axes.set(xlabel="change of perplexity, %  (right is worse)", ylabel="test window")
        axes.set_ylim(len(changes) + 0.6, 0.4)
        axes.set_yticks(range(1, len(changes) + 1, -(-len(changes) // 10)))
        handles = [
            Line2D([], [], color=BLUE, marker="o", ls="", label="one window"),
            Line2D([], [], color=ORANGE, lw=2, label="all windows"),
            *([Patch(color=ORANGE, alpha=0.18, lw=0, label="95 % interval")] if interval else []),
            Line2D([], [], color=INK, lw=1, ls=":", label=f"{SUCCESS_PCT:g} %"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)

    reach = f"; the band is the 95 % interval (Student's t, {len(windows)} windows)" if interval else ""
    caption = (
        f"Each point is one test window of {tokens:,} tokens: how much worse (right of 0) or better (left) the sparse "
        f"model predicts the same text than the dense one. The line is all windows together, "
        f"{of_error(mean, error)} % (± one standard error){reach}. n = {quality['tokens']:,} tokens in {len(windows)} "
        "windows. Points far apart mean that the cost depends on the text."
    )
    rows = [
        [str(i), f"{w['dense_perplexity']:.3f}", f"{w['sparse_perplexity']:.3f}", signed(change), f"{w['kl']:.4f}"]
        for i, (w, change) in enumerate(zip(windows, changes), 1)
    ]
    columns = ("window", "dense perplexity", "sparse perplexity", "change, %", "KL, nats")
    title = "Change of perplexity, window by window"
    return Plot(
        "windows", title, draw("windows", title, 1.9 + 0.22 * min(len(windows), 12), paint), caption, columns, rows
    )


def divergence_tail(report: Mapping[str, Any]) -> Plot:
    """How far the worst tokens' predictions move."""
    kl, quality = report["quality"]["kl"], report["quality"]
    points = [
        (50, kl["median"]),
        (90, kl["p90"]),
        (95, kl["p95"]),
        (99, kl["p99"]),
        (99.9, kl["p999"]),
        (100, kl["max"]),
    ]
    labels = ["half", "90 %", "95 %", "99 %", "99.9 %", "all"]
    values = [max(value, 1e-6) for _, value in points]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(range(6), values, "-o", color=ORANGE, ms=6)
        axes.axhline(max(kl["mean"], 1e-6), color=BLUE, ls="--", lw=1.5, label="mean of all tokens")
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xticks(range(6), labels)
        axes.set(xlabel="share of the tokens that lie below", ylabel="KL from dense, nats")
        axes.legend(loc="upper left")

    caption = (
        "How far the sparse model's prediction of the next token lies from the dense one's (Kullback-Leibler divergence, "
        "nats, logarithmic). The left end is the ordinary token, the right end the worst: a curve that climbs steeply "
        f"means few tokens carry the damage. The likeliest token is the same for {share(quality['same_top1'])} of "
        f"n = {quality['tokens']:,} tokens."
    )
    rows = [[label, f"{value:.5f}"] for label, (_, value) in zip(labels, points)] + [["mean", f"{kl['mean']:.5f}"]]
    title = "Divergence of the predictions, from the usual token to the worst"
    return Plot("divergence", title, draw("divergence", title, 2.7, paint), caption, ("tokens below", "KL, nats"), rows)


# --- Layers ---


def layers(report: Mapping[str, Any]) -> Plot:
    """What each layer does, whose tiles it reuses, and its density."""
    schedule = report["schedule"]
    count = len(schedule)
    counts = {mode: sum(layer["mode"] == mode for layer in schedule) for mode in MODES}

    def paint(figure: Figure) -> None:
        strip, bars = figure.subplots(2, 1, sharex=True, height_ratios=[0.75, 1.3])
        strip.set_axis_off()
        farthest = max([1, *(i - layer["anchor"] for i, layer in enumerate(schedule) if layer["anchor"] is not None)])
        for i, layer in enumerate(schedule):
            strip.bar(i, 0.4, 0.86, color=MODES[layer["mode"]])
            if (anchor := layer["anchor"]) is not None:
                top = 0.8 + 1.4 * (i - anchor) / farthest  # higher the farther it reaches
                curve = Curve([(i, 0.44), (i, top), (anchor, top), (anchor, 0.44)], [1, 4, 4, 4])
                strip.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=6, lw=0.9, color=INK))
        strip.set_ylim(0, 1.85)
        bars.bar(
            range(count), [layer["density"] for layer in schedule], 0.86, color=[MODES[x["mode"]] for x in schedule]
        )
        bars.axhline(report["density"], color=INK, lw=1, ls="--")
        bars.set(xlabel="layer", ylabel="density", ylim=(0, 1.05), xlim=(-0.8, count - 0.2))
        bars.yaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value, 0)))
        bars.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        bars.grid(axis="x", visible=False)
        handles = [Patch(color=colour, label=f"{counts[mode]} {mode.lower()}") for mode, colour in MODES.items()]
        handles.append(Line2D([], [], color=INK, lw=1, ls="--", label="mean"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4, columnspacing=1.2)

    caption = (
        "Top: the model's layers from first to last. A dense layer attends to everything. An anchor layer scores all key "
        "tiles and keeps the best. A reuse layer scores nothing: its arrow leads to the anchor whose tiles it takes. "
        f"Bottom: the share of the causal pairs of tiles that each layer attends to; {share(report['density'])} is the mean "
        f"of all {count}. Longer arrows, and more yellow, mean less work."
    )
    rows = [
        [str(i), x["mode"].lower(), "" if x["anchor"] is None else str(x["anchor"]), share(x["density"]), x["reason"]]
        for i, x in enumerate(schedule)
    ]
    title = "What each layer does"
    return Plot(
        "layers", title, draw("layers", title, 3.1, paint), caption, ("layer", "mode", "anchor", "density", "why"), rows
    )


def similarity(report: Mapping[str, Any]) -> Plot:
    """How alike the layers' choices of tiles are, and which pairs the schedule joined."""
    values = np.array(report["similarity"], float)
    count = len(values)
    pairs = [(i, layer["anchor"]) for i, layer in enumerate(report["schedule"]) if layer["anchor"] is not None]
    earlier = np.where(np.tri(count, k=-1, dtype=bool), np.maximum(values, values.T), np.nan)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = np.floor(10 * np.nanmin(earlier)) / 10, np.ceil(10 * np.nanmax(earlier)) / 10
        image = axes.imshow(earlier, cmap="cividis", vmin=low, vmax=max(high, low + 0.1), interpolation="none")
        axes.plot(
            [a for _, a in pairs], [i for i, _ in pairs], "o", mfc="none", mec=ORANGE, mew=1.6, ms=max(3, 150 / count)
        )
        axes.set(xlabel="earlier layer, whose tiles would be used", ylabel="layer that would use them")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, shrink=0.85)
        bar.outline.set_visible(False)
        bar.set_label("Jaccard similarity of their tiles")
        if pairs:
            handle = Line2D(
                [], [], marker="o", ls="", mfc="none", mec=ORANGE, mew=1.6, label="pair that the schedule joins"
            )
            axes.legend(handles=[handle], loc="upper right")

    text = report["texts"].get("calibration")
    caption = (
        "Each square compares two layers: of the key tiles that either would keep on the calibration text, the share that "
        "both would (Jaccard similarity, 0 to 1, mean over query tiles and heads, each head with its best partner"
        + (f"; {windows_of(text)}" if text else "")
        + "). Bright squares are pairs in which the later layer loses little by reusing. Circles mark the pairs that the "
        "schedule joins; circles on dark squares are where damage comes from."
    )
    rows = [[str(i), str(a), f"{earlier[i, a]:.3f}"] for i, a in pairs]
    title = "Which layers choose the same tiles"
    columns = ("layer", "reuses", "similarity")
    return Plot("similarity", title, draw("similarity", title, 3.9, paint), caption, columns, rows)


def tile_map(report: Mapping[str, Any], found: Mapping[str, Any]) -> Plot:
    """What one head of one layer attended to."""
    config = report["config"]
    size, query_size, count = config["tile_size"], config["query_tile"], found["key_tiles"]
    kinds = ["later: never seen", "dropped", "chosen by its mass", "first tiles (sink)", "the query's own"]
    colours = ["#00000000", "#8c8c8c40", TILE_BLUE, YELLOW, ORANGE]
    grid, kept = _kinds_of_tiles(config, found), found["mass_kept"]

    def paint(figure: Figure) -> None:
        axes, side = figure.subplots(1, 2, sharey=True, width_ratios=[3.2, 1])
        figure.get_layout_engine().set(wspace=0.06)  # the last tick of one and the first of the other keep apart
        axes.imshow(
            np.array([to_rgba(colour) for colour in colours])[grid],
            interpolation="none",
            aspect="auto",
            extent=(-0.5, count - 0.5, len(grid) - 0.5, -0.5),
        )
        axes.set(xlabel="key tile", ylabel="query tile (time runs down)")
        ticks = np.unique(np.linspace(0, len(grid) - 1, min(len(grid), 6)).round().astype(int))
        axes.set_yticks(ticks, [str(found["query_tiles"][tick]) for tick in ticks])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(visible=False)
        side.plot(kept, range(len(grid)), color=GREEN, lw=1.8)
        side.set(xlim=(0, 1.02), xlabel="mass kept")
        side.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        side.tick_params(axis="y", length=0)
        handles = [
            Patch(fc=colour, lw=0, label=kind)
            for kind, colour in zip(kinds[1:], colours[1:])
            if kind != kinds[3] or config["sink_tiles"]
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)

    layer = report["schedule"][found["layer"]]
    does = (
        "an anchor, which chose these tiles"
        if layer["anchor"] is None
        else f"which reuses the tiles of layer {layer['anchor']}"
    )
    sample = (
        ""
        if len(kept) == found["query_tiles"][-1] + 1
        else f" ({len(kept)} of {found['query_tiles'][-1] + 1} query tiles are shown)"
    )
    caption = (
        f"Layer {found['layer']}, {does}; KV head {found['head']}, first test window. Each row is a query tile of "
        f"{query_size} tokens{sample}, each column a key tile of {size} tokens. Coloured squares are attended to, grey ones are "
        "dropped. The curve is the share of the dense model's attention mass that the coloured squares hold: "
        f"{share(statistics.mean(kept), 0)} on average, {share(min(kept), 0)} at least. Columns that go through mean tiles that every "
        "later token looks back to."
    )
    rows = [
        [str(query), share(mass), ranges] for query, mass, ranges in zip(found["query_tiles"], kept, found["tiles"])
    ]
    name, title = f"tiles-{found['layer']}", f"What layer {found['layer']} looks at"
    return Plot(
        name, title, draw(name, title, 3.6, paint), caption, ("query tile", "mass kept", "key tiles attended to"), rows
    )


def _kinds_of_tiles(config: Mapping[str, Any], found: Mapping[str, Any]) -> np.ndarray:
    """int [shown query tiles, key tiles]: 0 later, 1 dropped, 2 chosen by its mass, 3 a sink, 4 the query's own."""
    size, query_size, count = config["tile_size"], config["query_tile"], found["key_tiles"]
    grid = np.zeros((len(found["query_tiles"]), count), int)
    for row, (query, ranges) in enumerate(zip(found["query_tiles"], found["tiles"])):
        own_first, own_last = query * query_size // size, min(((query + 1) * query_size - 1) // size, count - 1)
        grid[row, : own_last + 1] = 1
        tiles = np.array(from_ranges(ranges), int)
        grid[row, tiles] = 2
        grid[row, tiles[tiles < config["sink_tiles"]]] = 3
        grid[row, tiles[tiles >= own_first]] = 4
    return grid


# --- Time ---


def samples(axes: Axes, rows: Sequence[tuple[str, Sequence[float], str, str]]) -> None:
    """A row of points for each (name, milliseconds, colour, marker), its median as a bar."""
    for place, (_, times, colour, marker) in enumerate(rows):
        spread = np.linspace(-0.12, 0.12, len(times)) if len(times) > 1 else [0]
        axes.plot(times, place + np.asarray(spread), marker, color=colour, alpha=0.75, ms=6)
        axes.plot([statistics.median(times)] * 2, [place - 0.3, place + 0.3], color=INK, lw=2)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 * max(max(times) for _, times, _, _ in rows))
    axes.grid(axis="y", visible=False)


def prefill_time(report: Mapping[str, Any]) -> Plot:
    """Every timed forward of both arms."""
    timing, tokens = report["timing"], report["config"]["seq_len"]
    arms = {arm: timing[f"{arm}_ms"] for arm in ("dense", "sparse")}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        samples(axes, [(arm, times, *ARMS[arm]) for arm, times in arms.items()])
        axes.set(xlabel=f"milliseconds for a forward of {tokens:,} tokens (left is faster)")

    caption = (
        f"Each point is one timed forward with its loss over {tokens:,} tokens, dense and sparse in turn; the bars are the "
        f"medians (n = {len(arms['dense'])} each). Speedup: {report['speedup']:.2f}x. Where the clouds overlap, the "
        "difference is not beyond the noise."
    )
    rows = [[arm, *time_cells(times)] for arm, times in arms.items()]
    title = f"Time of a forward over {tokens:,} tokens"
    columns = ("arm", "median, ms", "least", "most", "n")
    return Plot("prefill", title, draw("prefill", title, 1.8, paint), caption, columns, rows)


def decode_time(report: Mapping[str, Any]) -> Plot:
    """Every timed decoding pass of both arms."""
    decode = report["decode"]
    arms = {arm: decode[arm]["ms_per_token"] for arm in ("dense", "sparse")}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        samples(axes, [(arm, times, *ARMS[arm]) for arm, times in arms.items()])
        axes.set(xlabel="milliseconds a token (left is faster)")

    caption = (
        f"Each point is one pass that decodes {decode['tokens']} tokens after {decode['depth']:,}, batch {decode['batch']}; "
        f"the bars are the medians (n = {len(arms['dense'])} each). Speedup: {decode['speedup']:.2f}x. On these tokens the "
        f"sparse model's perplexity changes by {of_error(decode['degradation_pct'], decode['error_pct'])} % (± one standard "
        "error over tokens)."
    )
    rows = [[arm, *time_cells(times), f"{decode[arm]['perplexity']:.3f}"] for arm, times in arms.items()]
    title = f"Time of a decoded token after {decode['depth']:,} tokens"
    columns = ("arm", "median, ms", "least", "most", "n", "perplexity")
    return Plot("decode", title, draw("decode", title, 1.8, paint), caption, columns, rows)


def by_length(
    name: str,
    title: str,
    measured: Sequence[Mapping[str, Any]],
    key: str,
    between: Any,
    what: str,
    unit: str,
    arms: Sequence[str],
) -> Plot:
    """Both arms' times over lengths or depths, and where sparse begins to be faster."""
    lengths = np.array([row[key] for row in measured])
    apart = max(np.ptp(np.log2(lengths)), 1) / 70  # octaves between the arms' points, which would hide each other

    def times(arm: str) -> list[Sequence[float]]:
        return [row[f"{arm.replace(' ', '_')}_ms"] for row in measured]

    medians = [statistics.median(samples_) for arm in arms for samples_ in times(arm)]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for place, arm in enumerate(arms):
            colour, marker = ARMS[arm]
            shifted = lengths * 2 ** (apart * (place - (len(arms) - 1) / 2))
            axes.plot(shifted, list(map(statistics.median, times(arm))), "-", color=colour, lw=1.8)
            axes.plot([], [], f"-{marker}", color=colour, label=arm, lw=1.8, ms=6)
            for x, samples_ in zip(shifted, times(arm)):
                axes.plot([x] * len(samples_), samples_, marker, color=colour, ms=5, alpha=0.6, mew=0)
        if between and None not in between:
            axes.axvspan(*between, color=INK, alpha=0.08, lw=0, label="break-even")
        _scale_by_length(axes, lengths, medians)
        axes.set(xlabel=f"{what} (logarithmic)", ylabel=f"milliseconds a {unit}")
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2)

    runs = len(measured[0]["dense_ms"])
    caption = (
        f"Each point is one run (n = {runs} of each arm at each {key}), the lines go through the medians; lower is faster. "
        f"{_break_even(between, key)}"
    )
    if "keep all" in arms:
        caption += (
            " Keep all is the sparse program that keeps every tile: what it takes longer than dense is the price of the "
            "bookkeeping. The caches hold random keys, so that only times are meant."
        )
    rows = [
        [
            f"{row[key]:,}",
            *(milliseconds(statistics.median(times(arm)[i])) for arm in arms),
            f"{row['speedup']:.2f}x",
            share(row["density"]),
        ]
        for i, row in enumerate(measured)
    ]
    columns = (what, *(f"{arm}, ms" for arm in arms), "speedup", "density")
    return Plot(name, title, draw(name, title, 2.8, paint), caption, columns, rows)


def _scale_by_length(axes: Axes, lengths: Sequence[int], medians: Sequence[float]) -> None:
    """Lengths on a logarithmic axis, and times too where one dwarfs the others."""
    axes.set_xscale("log", base=2)
    ticks = apart_enough(lengths)
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if max(medians) > 30 * min(medians):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def apart_enough(lengths: Sequence[int]) -> list[int]:
    """Those of the ascending lengths whose labels have room beside each other on a logarithmic axis."""
    room, ticks = np.log2(lengths[-1] / lengths[0]) / 5, [int(lengths[-1])]
    for length in reversed(lengths[:-1]):
        if np.log2(ticks[-1] / length) >= room:
            ticks.append(int(length))
    return ticks[::-1]


def _break_even(between: Any, key: str) -> str:
    slower, faster = between
    if faster is None:
        return f"By the medians sparse is not faster even at {slower:,} tokens."
    if slower is None:
        return f"By the medians sparse is faster at every {key}, from {faster:,} tokens on."
    return f"By the medians sparse begins to be faster between {slower:,} and {faster:,} tokens (the band)."


def attention_alone(report: Mapping[str, Any]) -> Plot:
    """One layer's attention by kind."""
    kinds, tokens = report["timing"]["attention_ms"], report["config"]["seq_len"]
    looks = {"dense": (BLUE, "o"), "selection": (PURPLE, "D"), "anchor": (GREEN, "^"), "reuse": (ORANGE, "s")}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        samples(axes, [(kind, times, *looks.get(kind, (BLUE, "o"))) for kind, times in kinds.items()])
        axes.set(xlabel="milliseconds (left is faster)")

    dense = statistics.median(kinds["dense"])
    caption = (
        f"One layer's attention without the model around it, {tokens:,} random tokens; bars are medians (n = "
        f"{len(kinds['dense'])}). Selection is how an anchor chooses its tiles; an anchor selects, then attends as a reuse "
        "layer does. Reuse must lie well left of dense for sparsity to pay, and an anchor costs selection on top."
    )
    rows = [[kind, *time_cells(times), f"{statistics.median(times) / dense:.2f}"] for kind, times in kinds.items()]
    title = "Attention alone, one layer"
    columns = ("kind", "median, ms", "least", "most", "n", "of dense")
    return Plot("attention", title, draw("attention", title, 2.3, paint), caption, columns, rows)


# --- Trade-off and tasks ---


def trade_off(report: Mapping[str, Any]) -> Plot:
    """Degradation against density and against speedup, of every schedule at a density and the run's own."""
    own = {name: report[name] for name in ("density", "degradation_pct", "speedup")} | {"name": "this run"}
    own |= {"error_pct": report["quality"]["error_pct"], "kl": report["quality"]["kl"]["mean"]}
    rows = [*(row | {"name": f"{100 * row['asked']:g} %"} for row in report["densities"]), own]
    rows = [row for row in rows if row["degradation_pct"] is not None]  # it was beyond numbers
    losses = [row["degradation_pct"] for row in rows]
    spread_out = max(map(abs, losses), default=0) > 10 * SUCCESS_PCT  # a linear axis would show the largest alone

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _against(left, rows, [100 * row["density"] for row in rows], 1, "density, %")
        _against(right, rows, [row["speedup"] for row in rows], -1, "speedup, x")
        right.axvline(1, color=INK, lw=1)
        left.set_ylabel("change of perplexity, %")
        if spread_out:
            left.set_yscale("symlog", linthresh=SUCCESS_PCT)
            left.set_yticks(*steps_of(losses))
            left.yaxis.set_minor_locator(NullLocator())
            left.set_ylim(2 * min(*losses, -SUCCESS_PCT / 4), 2 * max(losses))
        _label(left, rows, [100 * row["density"] for row in rows], (7, 4))  # clear of the front's line
        _label(right, rows, [row["speedup"] for row in rows], (7, -11))
        handles = [
            Line2D([], [], color=GREEN, marker="D", ms=7, lw=1.5, label="none beats it in both"),
            Line2D([], [], color=BLUE, marker="o", ls="", label="another does"),
            Line2D([], [], color=INK, lw=1, ls=":", label=f"{SUCCESS_PCT:g} %"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, columnspacing=1.2)

    scale = f"; logarithmic beyond ±{SUCCESS_PCT:g} %" if spread_out else ""
    caption = (
        "Each point is a schedule, with the density that was asked for its sparse layers beside it (where there is room), or "
        "this run's own "
        f"(n = {len(rows)}): what it costs in perplexity (lower is better; strokes are ± one standard error{scale}) against "
        "the share of attention that all layers keep (left panel; left is sparser), and against the speedup of a forward of "
        f"{report['config']['seq_len']:,} tokens (right panel; right of the line at 1 is faster than dense; medians of "
        f"{report['config']['n_runs']} runs). Green diamonds are the ones worth choosing from (the Pareto front): no other "
        "is better in both."
    )
    table = [
        [
            row["name"],
            share(row["density"]),
            of_error(row["degradation_pct"], row["error_pct"]),
            f"{row['kl']:.4f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in rows
    ]
    title = "Trade-off between density, quality and time"
    columns = ("asked", "density", "change of perplexity, %", "KL, nats", "speedup")
    return Plot("trade-off", title, draw("trade-off", title, 3.3, paint), caption, columns, table)


def _against(axes: Axes, rows: Sequence[Mapping[str, Any]], values: Sequence[float], better: int, label: str) -> None:
    """Degradations against something that is better where it is low (1) or high (-1), with the Pareto front."""
    losses = [row["degradation_pct"] for row in rows]
    front = pareto_front([better * value for value in values], losses)
    axes.axhline(SUCCESS_PCT, color=INK, lw=1, ls=":")
    axes.errorbar(values, losses, [row["error_pct"] or 0 for row in rows], fmt="none", ecolor=BLUE, elinewidth=1.2)
    axes.plot(values, losses, "o", color=BLUE, ms=6)
    axes.plot([values[i] for i in front], [losses[i] for i in front], "-D", color=GREEN, lw=1.5, ms=7)
    shown = [*values, 1] if better < 0 else values  # a speedup of 1 is dense's
    span = max(shown, default=1) - min(shown, default=0) or 1
    axes.set_xlim(min(shown, default=0) - 0.12 * span, max(shown, default=1) + 0.4 * span)
    axes.set_xlabel(label)
    axes.margins(y=0.14)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _label(axes: Axes, rows: Sequence[Mapping[str, Any]], values: Sequence[float], offset: tuple[int, int]) -> None:
    """Names beside the points, from the last on; one that would touch another's is left out."""
    in_axes, placed = axes.transScale + axes.transLimits, []
    for value, row in list(zip(values, rows))[::-1]:
        point = value, row["degradation_pct"]
        x, y = in_axes.transform(point)
        if all(abs(x - a) > 0.26 or abs(y - b) > 0.065 for a, b in placed):
            axes.annotate(row["name"], point, offset, textcoords="offset points", fontsize=9.5)
            placed.append((x, y))


def steps_of(values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis of either sign that holds the values: 0, and 1, 2 and 5 times powers of ten."""
    steps = [factor * 10.0**power for power in range(0, 9) for factor in (2, 5, 10)]
    above = [step for step in steps if step <= max(values)]
    below = [-step for step in steps if step <= -min(values)]
    ticks = sorted([0.0, *below[:: -len(below) // 5 or -1], *above[:: -len(above) // 5 or -1]])
    return ticks, [f"{tick:,g}" for tick in ticks]


def tasks(report: Mapping[str, Any]) -> Plot:
    """The arms' scores on each task in each set-up."""
    found = report["tasks"]
    arms = {"dense": (BLUE, "o"), "oracle": (GREEN, "^"), "sparse": (ORANGE, "s")}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for shift, (arm, (colour, marker)) in zip((-0.24, 0, 0.24), arms.items()):
            places = np.arange(len(found)) + shift
            for place, task in zip(places, found):
                axes.plot(task[f"{arm}_ci"], [place] * 2, color=colour, lw=1.6)
            axes.plot([task[arm] for task in found], places, marker, color=colour, ms=7, label=arm)
        for place, task in enumerate(found):
            axes.plot([task["chance"]] * 2, [place - 0.4, place + 0.4], color=INK, lw=1, ls=":")
        axes.plot([], [], color=INK, lw=1, ls=":", label="guessing")
        axes.set_yticks(
            range(len(found)), ["\n".join([*wrap(task["task"], 20), f"({task['setup']})"]) for task in found]
        )
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set(xlim=(-0.03, 1.03), xlabel="share of right answers (right is better)")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2)

    tells = sum(task["discriminative"] for task in found)
    caption = (
        "Share of right answers to questions whose answer stands far back in the prompt, with 95 % intervals (Wilson). In "
        f'"{PROMPT}" all of the prompt is read sparsely, in "{QUESTION}" only the question and the answer. The oracle is as '
        "sparse, but every layer chooses its own tiles: what it loses is the price of dropping, what sparse loses beyond it "
        "that of reusing another layer's choice. Where intervals overlap widely, the task cannot tell the arms apart, and "
        "where dense is no better than guessing (dotted) it says nothing about sparsity: "
        f"{tells} of these {len(found)} rows can tell. n = {_from_to(task['n'] for task in found)} questions, prompts of "
        f"{_from_to(task['length'] for task in found)} tokens."
    )
    rows = [
        [
            f"{task['task']} ({task['setup']})",
            str(task["n"]),
            *(_interval(task[arm], task[f"{arm}_ci"]) for arm in arms),
            "" if task["p_value"] is None else f"{task['p_value']:.3f}",
            "yes" if task["discriminative"] else "no",
        ]
        for task in found
    ]
    columns = ("task", "n", *arms, "p (McNemar)", "can tell")
    title = "Right answers to retrieval tasks"
    return Plot("tasks", title, draw("tasks", title, 1.2 + 0.62 * len(found), paint), caption, columns, rows)


def _from_to(values: Iterable[int]) -> str:
    least, most = min(values := list(values)), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters."""
    return textwrap.wrap(text, width) or [""]


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.0f} % [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


# --- All of them ---


def sections(report: Mapping[str, Any]) -> Iterator[tuple[str, list[Plot]]]:
    """Headings with their plots, in the page's order; what was not measured has none."""
    overflow = report["quality"]["degradation_pct"] is None  # the perplexity was beyond what a number can hold
    yield "Quality", [*([] if overflow else [change_by_window(report)]), divergence_tail(report)]
    yield "Layers", [layers(report)]
    if len(report["similarity"] or ()) > 1:
        yield "Similarity of layers", [similarity(report)]
    if report["tile_maps"]:
        yield "Tiles", [tile_map(report, found) for found in report["tile_maps"]]
    yield "Time", list(_times(report))
    yield "Attention alone", [attention_alone(report)]
    if report["densities"]:
        yield "Trade-off", [trade_off(report)]
    if report["tasks"]:
        yield "Tasks", [tasks(report)]


def _times(report: Mapping[str, Any]) -> Iterator[Plot]:
    yield prefill_time(report)
    sweep, depths = ([row for row in report[name] if not row["skipped"]] for name in ("sweep", "decode_depths"))
    if sweep:
        title = "Time of a forward by length"
        yield by_length(
            "sweep", title, sweep, "length", report["sweep_break_even"], "tokens", "forward", ("dense", "sparse")
        )
    if report["decode"]:
        yield decode_time(report)
    if depths:
        title, arms = "Time of a decoded token by depth", ("dense", "keep all", "sparse")
        yield by_length(
            "depths", title, depths, "depth", report["decode_break_even"], "tokens in the cache", "token", arms
        )
