"""Draws the figures of README.md and docs/ from a finished run's report, as the page of --html draws them.

kascade.svg shows how an anchor keeps tiles (a sketch of eight), and which layers reuse whose in that run. trade-off.svg
is drawn where the run had --densities, depths.svg where it timed decoding by depth. Each has a background of its own,
so that it can be read on light and dark pages.

  python benchmark_kascade_final.py --densities 0.1,0.2,0.3,0.5 --json report.json
  python -m docs.figures.make_figures report.json
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from errors import exit_on_bad_input
from report import plots
from report.results import read_report

FOLDER = Path(__file__).parent
FILE = FOLDER / "kascade.svg"
CHARTS = ("trade-off", "depths")  # plots of the page that get a file of their own
WIDTH, HEIGHT = 960, 408
CARD, EDGE, INK, QUIET = "#ffffff", "#d1d9e0", "#1f2328", "#59636e"
COLOURS = {"sink": plots.YELLOW, "own": plots.ORANGE, "kept": plots.BLUE, "dropped": "#e2e2e2"}
MODE_COLOURS = plots.MODES
MODE_INK = {"DENSE": "#ffffff", "ANCHOR": "#ffffff", "REUSE": INK}
ARROW = INK
FONT = "Helvetica, Arial, sans-serif"
# The tiles that each query tile of the sketch keeps: the first, its own, and two more.
KEPT = ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 1, 4, 5), (0, 2, 5, 6), (0, 2, 6, 7))
TILE = 27  # pixels


def text(x: float, y: float, words: str, colour: str = INK, **style: Any) -> str:
    """A line of text that begins at x, y; `style` has attributes of SVG, "_" for "-"."""
    style = {"font_size": 13} | style
    attributes = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {attributes}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{colour}"/>'


def arrow(path: str) -> str:
    """A line with a head at its end."""
    return f'<path d="{path}" fill="none" stroke="{ARROW}" stroke-width="1.3" marker-end="url(#head)"/>'


def heading(x: float, y: float, words: str) -> str:
    """A line of large text."""
    return text(x, y, words, font_size=16, font_weight=600)


def legend(x: float, y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    """A column of coloured squares with their meaning."""
    parts = []
    for row, (colour, words) in enumerate(entries):
        parts += [box(x, y + 22 * row - 11, 14, 14, colour), text(x + 24, y + 22 * row, words)]
    return parts


def triangle(left: float, top: float) -> list[str]:
    """Query tiles as rows, the key tiles that each one sees as columns."""
    grid, middle = left + 42, top + len(KEPT) * TILE / 2
    turned = {"text_anchor": "middle", "transform": f"rotate(90 {left + 14} {middle})"}
    parts = [
        heading(left, top - 44, "In an anchor layer"),
        text(grid, top - 12, "key tiles →", QUIET),
        text(left + 14, middle, "query tiles →", QUIET, **turned),
        text(grid + 4.4 * TILE, top + 1.6 * TILE, "the future:", QUIET),
        text(grid + 4.4 * TILE, top + 1.6 * TILE + 17, "no query sees it", QUIET),
    ]
    for query, kept in enumerate(KEPT):
        for key in range(query + 1):
            kind = "own" if key == query else "dropped" if key not in kept else "kept" if key else "sink"
            parts.append(box(grid + key * TILE, top + query * TILE, TILE - 3, TILE - 3, COLOURS[kind]))
    entries = [
        (COLOURS["own"], "the query tile's own, always kept"),
        (COLOURS["sink"], "the first tile (sink), always kept"),
        (COLOURS["kept"], "the most attended ones, kept"),
        (COLOURS["dropped"], "dropped (here Top-K is 4)"),
    ]
    return parts + legend(grid, top + len(KEPT) * TILE + 22, entries)


def strip(layers: Sequence[dict[str, Any]], left: float, top: float, width: float) -> list[str]:
    """The layers in a row, with an arrow from every anchor to each layer that reuses its tiles."""
    step, parts = width / len(layers), []
    for i, layer in enumerate(layers):
        x, mode, anchor = left + i * step, layer["mode"], layer["anchor"]
        parts.append(box(x, top, step - 2, 40, MODE_COLOURS[mode]))
        parts.append(text(x + step / 2 - 1, top + 25, str(i), MODE_INK[mode], font_size=11, text_anchor="middle"))
        if anchor is not None:
            start, end, height = (
                left + (anchor + 0.5) * step - 1,
                x + step / 2 - 1,
                top - min(20 + 12 * (i - anchor), 90),
            )
            parts.append(arrow(f"M{start:.1f},{top - 3} C{start:.1f},{height} {end:.1f},{height} {end:.1f},{top - 6}"))
    return parts


def schedule(report: dict[str, Any], left: float, top: float, width: float) -> list[str]:
    """The strip with its title and legend."""
    layers = report["schedule"]
    counts = {mode: sum(layer["mode"] == mode for layer in layers) for mode in MODE_COLOURS}
    facts = f"{report['config']['seq_len']} tokens: {report['density']:.1%} of the causal tile pairs are attended to"
    entries = [
        (MODE_COLOURS["DENSE"], f"{counts['DENSE']} DENSE: attends to every tile"),
        (MODE_COLOURS["ANCHOR"], f"{counts['ANCHOR']} ANCHOR: scores every tile and attends to those that it keeps"),
        (
            MODE_COLOURS["REUSE"],
            f"{counts['REUSE']} REUSE: scores nothing, and attends to the tiles that its anchor kept",
        ),
    ]
    return [
        heading(left, top - 44, f"Across the layers of {report['model']['name'].split('.')[0]}"),
        text(left, top - 22, facts, QUIET),
        *strip(layers, left, top + 82, width),
        *legend(left, top + 160, entries),
        arrow(f"M{left - 2},{top + 222} h17"),
        text(left + 24, top + 226, "an anchor hands its choice of tiles to the layers that reuse it"),
    ]


def figure(report: dict[str, Any]) -> str:
    """The SVG of a report."""
    size, head = 'markerWidth="6" markerHeight="6" refX="5" refY="3"', f'<path d="M0,0 L6,3 L0,6 z" fill="{ARROW}"/>'
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}"'
    card = f'width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{CARD}" stroke="{EDGE}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
        f'<defs><marker id="head" {size} orient="auto">{head}</marker></defs>',
        f'<rect x="0.5" y="0.5" {card}/>',
        *triangle(24, 80),
        *schedule(report, 350, 80, WIDTH - 374),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def chart(plot: plots.Plot) -> str:
    """A plot of the page as a file of its own, with its title, on a card."""
    svg = plot.svg
    for colour, ours in {"currentColor": INK, "var(--faint)": EDGE, "var(--blue)": plots.BLUE}.items():
        svg = svg.replace(colour, ours)
    width, height = (float(size) for size in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    card = (
        f'x="-13.5" y="-35.5" width="{width + 27:.1f}" height="{height + 49:.1f}" rx="6" fill="{CARD}" stroke="{EDGE}"'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="{FONT}" '
        f'viewBox="-14 -36 {width + 28:.1f} {height + 50:.1f}" width="{1.5 * width:.0f}">\n'
        f"<rect {card}/>\n{text(0, -14, plot.title, font_size=13, font_weight=600)}"
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip() + "\n"


def draw(report: dict[str, Any]) -> dict[str, str]:
    """The SVG of every figure that the report has the numbers for, by its file's name."""
    found = {plot.name: plot for _, of_section in plots.sections(report) for plot in of_section}
    return {FILE.name: figure(report)} | {f"{name}.svg": chart(found[name]) for name in CHARTS if name in found}


def main(argv: Sequence[str]) -> int:
    """Writes the figures of the report that is named."""
    if len(argv) != 1:
        print("error: expected one argument, a report that the benchmark wrote with --json", file=sys.stderr)
        return 2
    with exit_on_bad_input():
        for name, svg in draw(read_report(Path(argv[0]))).items():
            (FOLDER / name).write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
