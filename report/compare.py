"""What differs between runs: settings, versions and devices, and every figure side by side.

Reads reports that the benchmark wrote with --json, and compares each with the first. A change of quality is beyond the
error where it is more than two standard errors of the difference, a change of time where the ranges of the two runs'
samples do not meet.

  python -m report.compare before.json after.json
  python -m report.compare before.json after.json --fail_above 5      # exit code 1 where something got 5 % worse
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import errors
from errors import InputError, Parser, exit_on_bad_input, quote
from report.results import read_report
from report.tables import markdown

REACH = 1.96  # standard errors to either side in a 95 % interval
NOT_SETTINGS = ("json", "html", "csv", "markdown", "quiet", "verbose", "debug", "save_schedule")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure of a run.

    Attributes:
      value: the figure, a median where there are samples.
      error: one standard error in its unit; None where it is not known.
      samples: of a time, milliseconds.
      guarded: --fail_above looks at it: worse is higher.
      points: its change is a difference of percentages, not a ratio.
    """

    value: float | None
    error: float | None = None
    samples: Sequence[float] = ()
    guarded: bool = False
    points: bool = False

    def change(self, before: Figure) -> float | None:
        """Percent, or percentage points; None where it cannot be said."""
        if self.value is None or before.value is None or not (self.points or before.value):
            return None
        return self.value - before.value if self.points else (self.value / before.value - 1) * 100

    def beyond_error(self, before: Figure) -> bool | None:
        """Whether the change is beyond what chance explains; None where no error is known."""
        if self.samples and before.samples:
            return min(self.samples) > max(before.samples) or max(self.samples) < min(before.samples)
        if None in (self.value, before.value, self.error, before.error):
            return None
        return abs(self.value - before.value) > 2 * math.hypot(self.error, before.error)


def figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of a report by its name, with its unit."""
    quality = report["quality"]
    found = {
        "degradation, %": Figure(quality["degradation_pct"], quality["error_pct"], guarded=True, points=True),
        "dense perplexity": Figure(quality["dense_perplexity"]),
        "sparse perplexity": Figure(quality["sparse_perplexity"]),
        "KL from dense, nats": Figure(quality["kl"]["mean"], quality["kl"]["se"]),
        "same top-1 token, share": Figure(quality["same_top1"], quality["same_top1_se"]),
        "density, share": Figure(report["density"]),
        "speedup, x": Figure(report["speedup"]),
    }
    if long_ppl := report["long_ppl"]:
        found["LongPPL degradation, %"] = Figure(long_ppl.get("degradation_pct"), points=True)
    found |= dict(_forward_times(report)) | dict(_decoding(report)) | dict(_densities(report)) | dict(_tasks(report))
    found["peak memory, MB"] = Figure(report["peak_memory_bytes"] and report["peak_memory_bytes"] / 1e6)
    return found


def _time(samples: Sequence[float]) -> Figure:
    return Figure(statistics.median(samples), samples=samples, guarded=True)


def _forward_times(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    timing, tokens = report["timing"], report["config"]["seq_len"]
    for arm in ("dense", "sparse"):
        yield f"forward of {tokens} tokens, {arm}, ms", _time(timing[f"{arm}_ms"])
        yield f"compilation, {arm}, s", Figure(report[arm]["compile_s"])
    for kind, samples in timing["attention_ms"].items():
        yield f"attention alone, {kind}, ms", _time(samples)
    for row in report["sweep"]:
        for arm in () if row["skipped"] else ("dense", "sparse"):
            yield f"sweep, {row['length']} tokens, {arm}, ms", _time(row[f"{arm}_ms"])


def _decoding(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    if decode := report["decode"]:
        loss = Figure(decode["degradation_pct"], decode["error_pct"], guarded=True, points=True)
        yield "decoding, degradation, %", loss
        for arm in ("dense", "sparse"):
            yield f"decoding after {decode['depth']}, {arm}, ms a token", _time(decode[arm]["ms_per_token"])
    for row in report["decode_depths"]:
        for arm in () if row["skipped"] else ("dense", "keep_all", "sparse"):
            name = f"decoding at depth {row['depth']}, {arm.replace('_', ' ')}, ms a token"
            yield name, _time(row[f"{arm}_ms"])


def _densities(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    for row in report["densities"]:
        loss = Figure(row["degradation_pct"], row["error_pct"], guarded=True, points=True)
        yield f"at density {row['asked']:g}, degradation, %", loss
        yield f"at density {row['asked']:g}, sparse, ms", _time(row["sparse_ms"])


def _tasks(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    for task in report["tasks"]:
        for arm in ("dense", "oracle", "sparse"):
            low, high = task[f"{arm}_ci"]
            name = f"task {task['task']} ({task['setup']}), {task['length']} tokens, {arm}, share"
            yield name, Figure(task[arm], (high - low) / 2 / REACH)


# --- Side by side ---


def differences(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows (what, its value in each report) of everything that a figure depends on and that is not the same in all."""
    rows = []
    described = [_described(report) for report in reports]
    for name in dict.fromkeys(name for one in described for name in one):
        values = [one.get(name) for one in described]
        if any(value != values[0] for value in values):
            rows.append([name, *("" if value is None else _short(value) for value in values)])
    return rows


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else quote(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _described(report: Mapping[str, Any]) -> dict[str, Any]:
    described = {f"--{name}": value for name, value in report["config"].items() if name not in NOT_SETTINGS}
    for part in ("versions", "device", "model"):
        described |= {f"{part} {name}": value for name, value in report[part].items()}
    for role, text in report["texts"].items():
        described |= {f"text {role} {name}": value for name, value in text.items()}
    return described | {
        name: report[name] for name in ("finished", "kernel", "git_commit", "layer_types", "schedule_sha256")
    }


def side_by_side(reports: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows (figure, its value in each report, and after each but the first its change and whether it is real)."""
    every, rows = [figures(report) for report in reports], []
    for name in dict.fromkeys(name for one in every for name in one):
        before = every[0].get(name, Figure(None))
        cells = [name, _number(before)]
        for one in every[1:]:
            after = one.get(name, Figure(None))
            change, beyond = after.change(before), after.beyond_error(before)
            unit = " points" if after.points else " %"
            cells += [
                _number(after),
                "" if change is None else f"{change:+.2f}{unit}",
                {None: "", True: "yes", False: "no"}[None if change is None else beyond],
            ]
        rows.append(cells)
    return rows


def _number(figure: Figure) -> str:
    if figure.value is None:
        return ""
    error = "" if figure.error is None else f" ± {figure.error:.2g}"
    return f"{figure.value:.5g}{error}"


def worse(before: Mapping[str, Any], after: Mapping[str, Any], percent: float) -> list[str]:
    """Sentences for the degradations and times that are higher by more than `percent` (degradations: points)."""
    old, found = figures(before), []
    for name, figure in figures(after).items():
        change = figure.change(old[name]) if figure.guarded and name in old else None
        if change is not None and change > percent:
            found.append(f"{name}: worse by {change:.2f}{' points' if figure.points else ' %'}, above {percent:g}")
    return found


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison. Returns 1 where --fail_above found something; bad input exits with code 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("reports", nargs="+", type=Path, metavar="FILE", help="reports; the first is compared with")
    parser.add_argument(
        "--fail_above",
        type=float,
        metavar="PERCENT",
        help="exit with code 1 where a degradation or a time of a later report is worse than the first one's by more "
        "than this, whether or not it is beyond the error (degradations: percentage points)",
    )
    given = parser.parse_args(argv)
    with exit_on_bad_input():
        if len(given.reports) < 2:
            raise InputError("expected at least two reports, got one")
        if given.fail_above is not None and not 0 <= given.fail_above < math.inf:
            raise InputError(f"fail_above must be at least 0, got {given.fail_above}")
        reports = [read_report(path) for path in given.reports]
        try:
            return compare(reports, [path.name for path in given.reports], given.fail_above)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a report is damaged ({type(error).__name__}: {quote(str(error))})") from error


def compare(reports: Sequence[Mapping[str, Any]], names: Sequence[str], fail_above: float | None) -> int:
    """Prints what differs, the figures, and what got worse. Returns the exit code."""
    differing = differences(reports)
    print("What differs:\n" if differing else "The runs have the same settings, versions, texts and device.\n")
    if differing:
        print(markdown(["", *names], differing))
    columns = ["figure", names[0]]
    for name in names[1:]:
        columns += [name, "change", "beyond the error"]
    print(markdown(columns, side_by_side(reports)))
    if fail_above is None:
        return 0
    found = [
        f"{name}: {line}" for name, one in zip(names[1:], reports[1:]) for line in worse(reports[0], one, fail_above)
    ]
    print("\n".join(found) if found else f"Nothing got worse by more than {fail_above:g} %.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
