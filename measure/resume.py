"""Rows that an interrupted run had finished: read from --json's file, where the flags and all else agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from errors import InputError
from measure import hosts
from measure.settings import OUTPUTS
from report.results import DensityRow, DepthRow, Results, SweepRow, finite, is_stdout, read_report, write_json

AGREEING = ("program", "model", "device", "versions", "git_commit", "kernel", "texts", "schedule_sha256")
FREE_FLAGS = ("densities", "sweep", "depths", *OUTPUTS, "coordinator", "process_id", "verbose", "quiet", "debug")
Row = TypeVar("Row", SweepRow, DensityRow, DepthRow)


class Earlier(NamedTuple):
    """Finished rows, by the length, density or depth that was asked for."""

    sweep: dict[int, SweepRow]
    densities: dict[float, DensityRow]
    depths: dict[int, DepthRow]


def earlier_rows(path: Path | None, results: Results) -> Earlier:
    """The rows of a run that agrees with this one.

    None where there is no such file, or anything that a row depends on differs: then all is measured. Skipped rows are
    tried again. Depths, which every run measures, are those of an interrupted run alone.
    """
    nothing = Earlier({}, {}, {})
    if path is None or is_stdout(path) or not path.is_file():
        return nothing
    try:
        report = read_report(path)
        if not _agree(report, json.loads(json.dumps(finite(results.to_json())))):
            return nothing
        sweep = [SweepRow(**_fields(SweepRow, row)) for row in report["sweep"]]
        densities = [DensityRow(**_fields(DensityRow, row)) for row in report["densities"]]
        depths = [DepthRow(**_fields(DepthRow, row)) for row in report["decode_depths"] if not report["finished"]]
    except (InputError, KeyError, TypeError, AttributeError):  # another program's file, or a damaged one
        return nothing
    return Earlier(
        {row.length: row for row in sweep if not row.skipped},
        {row.asked: row for row in densities},
        {row.depth: row for row in depths if not row.skipped},
    )


def _agree(report: dict[str, Any], now: dict[str, Any]) -> bool:
    configs = ({k: v for k, v in one["config"].items() if k not in FREE_FLAGS} for one in (report, now))
    return all(report[name] == now[name] for name in AGREEING) and next(configs) == next(configs)


def _fields(kind: type, row: dict[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in dataclasses.fields(kind)}


def measure_rows(
    asked: Sequence[Any],
    earlier: dict[Any, Row],
    measure: Callable[[Any], Row],
    finished: Callable[[list[Row], bool], None],
) -> list[Row]:
    """A row for everything that was asked for, measured where no earlier one is there.

    `finished(rows, was_there)` is called after each.
    """
    rows: list[Row] = []
    for value in asked:
        rows.append(earlier[value] if value in earlier else measure(value))
        finished(rows, value in earlier)
    return rows


def save_partly(path: Path | None, results: Results) -> None:
    """Writes what there is so far, for `earlier_rows`."""
    if path is not None and not is_stdout(path) and hosts.is_first():
        write_json(path, dataclasses.replace(results, finished=False).to_json())
