"""What came out of a run: frozen values. Every derived figure is a property here and nowhere else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan

FORMAT_VERSION = 2  # of the JSON report
SUCCESS_PCT = 2.0  # a degradation under it is a success
SUCCESS, FAILED, NOTHING_DROPPED = "success", "failed", "nothing dropped"


def degradation_pct(dense_perplexity: float, sparse_perplexity: float) -> float:
    """Signed change of perplexity, percent: positive where sparse is worse."""
    return (sparse_perplexity / dense_perplexity - 1) * 100


@dataclasses.dataclass(frozen=True)
class Quality:
    """Dense against sparse on the test text; `density` is counted, the mean over all layers."""

    dense_perplexity: float
    sparse_perplexity: float
    predictions: int
    density: float

    @property
    def degradation_pct(self) -> float:
        """Percent, signed."""
        return degradation_pct(self.dense_perplexity, self.sparse_perplexity)

    @property
    def verdict(self) -> str:
        """SUCCESS, FAILED, or NOTHING_DROPPED where both arms computed the same."""
        if self.density == 1:
            return NOTHING_DROPPED
        return SUCCESS if self.degradation_pct < SUCCESS_PCT else FAILED


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's plan, and the causal density counted in the sparse run."""

    plan: LayerPlan
    density: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Interleaved runs in milliseconds, and the seconds that each arm's compilation took."""

    dense_ms: Sequence[float]
    sparse_ms: Sequence[float]
    dense_compile_s: float
    sparse_compile_s: float

    @property
    def speedup(self) -> float:
        """Of the medians; below 1 where sparse is slower."""
        return statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)


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
    def speedup(self) -> float | None:
        """Of the medians; None where it was skipped."""
        return None if self.skipped else statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)


def break_even(rows: Sequence[SweepRow]) -> tuple[int | None, int | None] | None:
    """(longest slower length, next longer and faster one) between which sparse begins to be faster and stays so.

    None where nothing was measured; the first is None where sparse is faster at every length, the second where it is
    not faster at the longest.
    """
    measured = [row for row in rows if not row.skipped]
    if not measured:
        return None
    slower = max((row.length for row in measured if row.speedup <= 1), default=None)
    faster = [row.length for row in measured if row.speedup > 1 and row.length > (slower or 0)]
    return slower, min(faster, default=None)


@dataclasses.dataclass(frozen=True)
class Model:
    """Which weights were run."""

    name: str
    source: str
    fingerprint: str
    parameters: int
    num_layers: int
    bytes: int  # on the device


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where it was run."""

    platform: str
    kind: str
    count: int
    processor: str

    def __str__(self) -> str:
        kind = self.processor if self.platform == "cpu" else self.kind
        return f"{self.count} {self.platform.upper()} device(s), {kind}"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


@dataclasses.dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
      settings: a `measure.settings.Settings`, everything in it resolved.
      date: UTC, ISO 8601.
      command: the command line.
      prefix: what stands before the text of every window, such as "<s>".
      calibration_pct: degradation on the calibration text, where a limit was asked for.
      attention_ms: samples of one layer's attention by kind: dense, selection, anchor, reuse.
    """

    settings: Any
    date: str
    command: Sequence[str]
    model: Model
    machine: Machine
    prefix: str
    schedule: Sequence[Layer]
    calibration_pct: float | None
    quality: Quality
    timing: Timing
    attention_ms: Mapping[str, Sequence[float]]
    sweep: Sequence[SweepRow] = ()
    peak_memory_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as --json writes it."""
        quality, timing = self.quality, self.timing
        return {
            "format_version": FORMAT_VERSION,
            "date": self.date,
            "command": list(self.command),
            "model": dataclasses.asdict(self.model),
            "device": dataclasses.asdict(self.machine),
            "versions": versions(),
            "config": settings_to_json(self.settings),
            "prefix": self.prefix,
            "schedule": [_layer_to_json(i, layer) for i, layer in enumerate(self.schedule)],
            "dense": {"perplexity": quality.dense_perplexity, "compile_s": timing.dense_compile_s},
            "sparse": {"perplexity": quality.sparse_perplexity, "compile_s": timing.sparse_compile_s},
            "degradation_pct": quality.degradation_pct,
            "calibration_degradation_pct": self.calibration_pct,
            "density": quality.density,
            "verdict": quality.verdict,
            "timing": {
                "dense_ms": list(timing.dense_ms),
                "sparse_ms": list(timing.sparse_ms),
                "attention_ms": {kind: list(times) for kind, times in self.attention_ms.items()},
            },
            "speedup": timing.speedup,
            "sweep": [dataclasses.asdict(row) | {"speedup": row.speedup} for row in self.sweep],
            "sweep_break_even": break_even(self.sweep),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _layer_to_json(index: int, layer: Layer) -> dict[str, Any]:
    plan = dataclasses.asdict(layer.plan)
    del plan["largest_budget"]  # follows from the budgets
    return {"layer": index} | plan | {"density": layer.density}


def settings_to_json(settings: Any) -> dict[str, Any]:
    """Every setting by its flag's name, the selection's among them; paths as text."""
    values = dataclasses.asdict(settings)
    values = values.pop("selection") | values
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def count_modes(plans: Sequence[LayerPlan]) -> dict[str, int]:
    """How many layers are DENSE, ANCHOR and REUSE."""
    return {mode: sum(plan.mode == mode for plan in plans) for mode in (DENSE, ANCHOR, REUSE)}


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all; "-" and /dev/stdout are standard output."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    if str(path) in ("-", "/dev/stdout"):
        sys.stdout.write(text)
        return
    path = path.resolve()  # what a symbolic link points to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes null, as a perplexity that overflows does."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
