"""Tables as Markdown and CSV: a report's measurements a row each, and bench's results."""

from __future__ import annotations

import contextlib
import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import InputError, quote


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, a line for each row, that ends with a newline.

    Raises:
      ValueError: a row with more or fewer cells than there are columns.
    """
    lines = [markdown_row(columns), "|" + "---|" * len(columns)]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"expected {len(columns)} cells, got {len(row)}: {quote(list(row))}")
        lines.append(markdown_row(row))
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[Any]) -> str:
    """One line of a Markdown table; a bar inside a cell is escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def spread(values: Sequence[float], decimals: int = 2) -> str:
    """Median [min, max]."""
    return f"{statistics.median(values):.{decimals}f} [{min(values):.{decimals}f}, {max(values):.{decimals}f}]"


# --- A report's measurements ---

STATISTICS = (
    "windows", "predicted_tokens", "verdict", "delta_log_ppl", "se_tokens", "se_windows", "interval_low_pct",
    "interval_high_pct", "kl_mean", "kl_se", "kl_median", "kl_p90", "kl_p95", "kl_p99", "kl_p999", "kl_max",
    "same_top1", "same_top1_se", "correlation", "rms_dp",
)  # fmt: skip
COLUMNS = (
    "test", "tokens", "batch", "arm", "median_ms", "min_ms", "max_ms", "n", "tokens_per_s", "perplexity",
    "degradation_pct", "error_pct", "density", "score", "score_low", "score_high", *STATISTICS, "model", "device",
    "dtype", "kernel", "versions", "git_commit", "date",
)  # fmt: skip
LONGEST_HEAD = 10_000  # characters of a table's first line


def measurements(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row a measurement of a report, by COLUMNS; a cell without a value is empty.

    `tokens` is the length of a forward, the depth of a decoding step, or the length of a task's prompt; times are of
    one forward or one decoding step; `error_pct` is one standard error; `score` is a task's share of right answers;
    STATISTICS are as in the report, and stand in the sparse arm's row.
    """
    config, device = report["config"], report["device"]
    kind = device["processor" if device["platform"] == "cpu" else "kind"]
    everywhere = {
        "model": report["model"]["name"],
        "device": f"{device['count']} {device['platform']} {kind}",
        "dtype": config["dtype"],
        "kernel": report["kernel"],
        "versions": " ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "git_commit": report["git_commit"],
        "date": report["date"],
    }
    rows = [*_forwards(report), *_decoding(report), *_attention(report), *_tasks(report)]
    return [{name: _cell((row | everywhere).get(name)) for name in COLUMNS} for row in rows]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _times(samples: Sequence[float], tokens: int, batch: int = 1) -> dict[str, Any]:
    """Of `samples` in milliseconds, in each of which `batch` times `tokens` tokens went through."""
    middle = statistics.median(samples)
    times = {"median_ms": middle, "min_ms": min(samples), "max_ms": max(samples), "n": len(samples), "batch": batch}
    return times | {"tokens_per_s": batch * tokens / middle * 1000}


def statistics_of(quality: Mapping[str, Any]) -> dict[str, Any]:
    """STATISTICS of a report's "quality" by name: what stands in an object of its own there is told by a prefix."""
    flat = quality | {f"kl_{name}": value for name, value in quality["kl"].items()}
    flat |= {"predicted_tokens": quality["tokens"]}
    flat |= zip(("interval_low_pct", "interval_high_pct"), quality["interval_pct"] or (None, None))
    return {name: flat[name] for name in STATISTICS}


def _forwards(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    quality, tokens, timing = report["quality"], report["config"]["seq_len"], report["timing"]
    loss = {"degradation_pct": quality["degradation_pct"], "error_pct": quality["error_pct"]} | statistics_of(quality)
    for arm, of_arm in (("dense", {"density": 1.0}), ("sparse", loss | {"density": report["density"]})):
        of_arm |= {"test": "prefill", "tokens": tokens, "arm": arm, "perplexity": report[arm]["perplexity"]}
        yield of_arm | _times(timing[f"{arm}_ms"], tokens)
    if (long_ppl := report["long_ppl"]) and long_ppl["tokens"]:
        found = {"test": "long_ppl", "tokens": tokens, "predicted_tokens": long_ppl["tokens"]}
        yield found | {"arm": "dense", "density": 1.0, "perplexity": long_ppl["dense_perplexity"]}
        found |= {name: long_ppl[name] for name in ("degradation_pct", "se_tokens")}
        yield found | {"arm": "sparse", "density": report["density"], "perplexity": long_ppl["sparse_perplexity"]}
    for row in report["densities"]:
        loss = {name: row[name] for name in ("degradation_pct", "error_pct", "density", "delta_log_ppl", "same_top1")}
        loss["kl_mean"] = row["kl"]
        for arm, of_arm in (("dense", {"density": 1.0}), ("sparse", loss)):
            perplexity = report["dense"]["perplexity"] if arm == "dense" else row["sparse_perplexity"]
            of_arm |= {"test": f"density {row['asked']:g}", "tokens": tokens, "arm": arm, "perplexity": perplexity}
            yield of_arm | _times(row[f"{arm}_ms"], tokens)
    for row in report["sweep"]:
        for arm, density in (("dense", 1.0), ("sparse", row["density"])):
            if not row["skipped"]:
                of_arm = {"test": "sweep", "tokens": row["length"], "arm": arm, "density": density}
                yield of_arm | _times(row[f"{arm}_ms"], row["length"])


def _decoding(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if decode := report["decode"]:
        for arm, density in (("dense", 1.0), ("sparse", decode["density"])):
            of_arm = {"test": "decode", "tokens": decode["depth"], "arm": arm, "density": density}
            of_arm["perplexity"] = decode[arm]["perplexity"]
            if arm == "sparse":
                names = ("degradation_pct", "error_pct", "windows", "delta_log_ppl", "same_top1")
                of_arm |= {name: decode[name] for name in names}
                of_arm |= {"se_tokens": decode["delta_log_ppl_se"], "kl_mean": decode["kl"]}
            yield of_arm | _times(decode[arm]["ms_per_token"], 1, decode["batch"])
    for row in report["decode_depths"]:
        for arm, density in (("dense", 1.0), ("keep_all", 1.0), ("sparse", row["density"])):
            if not row["skipped"]:
                of_arm = {
                    "test": "decode depth",
                    "tokens": row["depth"],
                    "arm": arm.replace("_", " "),
                    "density": density,
                }
                yield of_arm | _times(row[f"{arm}_ms"], 1, row["batch"])


def _attention(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, samples in report["timing"]["attention_ms"].items():
        tokens = report["config"]["seq_len"]
        yield {"test": "attention alone", "tokens": tokens, "arm": kind} | _times(samples, tokens)


def _tasks(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for task in report["tasks"]:
        for arm, density in (("dense", 1.0), ("oracle", None), ("sparse", task["density"])):
            low, high = task[f"{arm}_ci"]
            score = {"score": task[arm], "score_low": low, "score_high": high, "n": task["n"], "density": density}
            yield {"test": f"task {task['task']} ({task['setup']})", "tokens": task["length"], "arm": arm} | score


def check_csv(path: Path) -> None:
    """Raises InputError for a CSV file that has other columns than COLUMNS, or cannot be read."""
    ResultsFile(path, COLUMNS)


def append_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Adds rows to a CSV file, which is made if it is not there.

    Raises:
      InputError: its columns are others than COLUMNS; it cannot be written.
    """
    file = ResultsFile(path, COLUMNS)
    with writing(path):
        for row in rows:
            file.add({name: _harmless(value) for name, value in row.items()})


def _harmless(cell: str) -> str:
    """A spreadsheet runs a cell that begins like a formula; a negative number is none."""
    is_number = cell[1:2].isdigit() or cell[1:2] == "."
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") and not is_number else cell


def check_markdown(path: Path) -> None:
    """Raises InputError for a file with anything but the table of COLUMNS in its first line, or that cannot be read."""
    if not path.is_file():  # a device has no first line, or no end of it
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline(LONGEST_HEAD).strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Markdown ({error}); give another file") from error
    if first and first != markdown_row(COLUMNS):
        raise InputError(f"{path}: expected a table with the columns {', '.join(COLUMNS)}, got {quote(first)}")


def append_markdown(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """The same for a Markdown table: its columns stand in the file's first line."""
    check_markdown(path)
    table = markdown(COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(table if _is_new(path) else "".join(table.splitlines(keepends=True)[2:]))


def _is_new(path: Path) -> bool:
    """Whether a table's head has still to be written: nothing is there, or a device, which is never read."""
    return not path.is_file() or not path.stat().st_size


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give a file where there is room for it") from error


# --- A file that grows row by row ---


class ResultsFile:
    """A CSV file of results, each row written as soon as it is measured, so that an interrupted run can go on.

    Attributes:
      rows: everything that is in the file, {column: text} each.

    Raises:
      InputError: the file exists and has other columns, or cannot be read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns, self.rows = path, tuple(columns), []
        if not path.is_file():  # a device has no rows, or no end of them
            return
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.rows, found = list(reader), tuple(reader.fieldnames or ())
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as CSV ({error}); give another file") from error
        if found != self.columns and path.stat().st_size:  # a blank first line names no column
            raise InputError(f"{path}: expected the columns {', '.join(self.columns)}, got {quote(list(found))}")

    def has(self, **key: Any) -> bool:
        """Whether a row with these values, compared as text, is there."""
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the file, after the header if it is the first."""
        first = _is_new(self.path)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if first:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(row[name]) for name in self.columns})
