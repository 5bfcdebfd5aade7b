"""Tables as Markdown and CSV, for bench and docs; every cell is text by the time it gets here, or becomes it."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
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
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def spread(values: Sequence[float], decimals: int = 2) -> str:
    """Median [min, max]."""
    return f"{statistics.median(values):.{decimals}f} [{min(values):.{decimals}f}, {max(values):.{decimals}f}]"


class ResultsFile:
    """A CSV file of results, each row written as soon as it is measured, so that an interrupted run can go on.

    Attributes:
      rows: everything that is in the file, {column: text} each.

    Raises:
      InputError: the file exists and has other columns, or cannot be read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns, self.rows = path, tuple(columns), []
        if not path.exists():
            return
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.rows, found = list(reader), tuple(reader.fieldnames or ())
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{path} cannot be read as CSV ({error}); give another file") from error
        if found and found != self.columns:
            raise InputError(f"{path}: expected the columns {', '.join(self.columns)}, got {quote(list(found))}")

    def has(self, **key: Any) -> bool:
        """Whether a row with these values, compared as text, is there."""
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row to the file, after the header if it is the first."""
        first = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if first:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(row[name]) for name in self.columns})
