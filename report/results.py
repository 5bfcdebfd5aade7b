"""What came out of a run: frozen values. Every derived figure is a property here and nowhere else."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from errors import InputError, quote
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, perplexity_of
from llama_model import Comparison
from report.statistics import (
    correlation,
    detectable_loss,
    least_significant,
    mcnemar_p,
    standard_error,
    standard_error_of_share,
    student_quantile,
    wilson_interval,
)

FORMAT_VERSION = 3  # of the JSON report; docs/schema.md describes it
PROGRAM = "kascade benchmark"  # how a report says whose it is
ROOT = Path(__file__).resolve().parents[1]
SUCCESS_PCT = 2.0  # a degradation under it is a success
SUCCESS, FAILED, UNDECIDED, NOTHING_DROPPED = "success", "failed", "undecided", "nothing dropped"

# What to try after a loss, measured at 2048 tokens on 12 articles (docs/quality.md): at a density of 18 % the threshold
# rule loses 4.66 %, the search with tiles and query tiles of 8 tokens 1.74 %; the search with tiles of 8 loses 2.07 %
# at 18 % and 0.37 % at 30 %, so about the density to the power -3.4.
SEARCH_GAIN = 2.7
DENSITY_POWER = 3.4


def degradation_pct(dense_perplexity: float, sparse_perplexity: float) -> float:
    """Signed change of perplexity, percent: positive where sparse is worse."""
    return (sparse_perplexity / dense_perplexity - 1) * 100


def change_pct(delta_log_ppl: float) -> float:
    """The same from the change of the log perplexity; infinite where that overflows."""
    return math.expm1(delta_log_ppl) * 100 if delta_log_ppl < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL divergence from dense over all tokens, nats; percentiles interpolate, as llama-perplexity's do."""

    mean: float
    se: float | None  # over tokens
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, kl: np.ndarray) -> Divergence:
        """From the divergence of each token."""
        quantiles = np.quantile(kl, (0.5, 0.9, 0.95, 0.99, 0.999, 1))
        return cls(float(kl.mean()), standard_error(kl), *map(float, quantiles))


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """Dense against sparse on the test windows.

    Every difference is paired: token by token, so that what makes a token hard for both arms cancels.

    Attributes:
      compared: for each window what each of its tokens lost, arrays [T - 1] on the host, T the same for all.
      layer_densities: counted, of each layer; 1 where it is dense.
    """

    compared: Sequence[Comparison]
    layer_densities: Sequence[float]

    @property
    def windows(self) -> int:
        """How many windows were tested."""
        return len(self.compared)

    @cached_property
    def tokens(self) -> Comparison:
        """The tokens of all windows in a row."""
        return Comparison(*map(np.concatenate, zip(*self.compared, strict=True)))

    @property
    def predictions(self) -> int:
        """How many tokens were predicted, in all windows."""
        return self.tokens.kl.size

    @property
    def density(self) -> float:
        """The mean over all layers."""
        return float(np.mean(self.layer_densities))

    @property
    def sparse_density(self) -> float:
        """The mean over the layers that drop something; 1 where none does."""
        dropping = [density for density in self.layer_densities if density < 1]
        return float(np.mean(dropping)) if dropping else 1.0

    @property
    def dense_perplexity(self) -> float:
        """Over all windows."""
        return perplexity_of(self.tokens.dense_nll)

    @property
    def sparse_perplexity(self) -> float:
        """Over all windows."""
        return perplexity_of(self.tokens.sparse_nll)

    @property
    def degradation_pct(self) -> float:
        """Percent, signed."""
        return degradation_pct(self.dense_perplexity, self.sparse_perplexity)

    @cached_property
    def delta_log_ppl(self) -> float:
        """Change of the log perplexity: the mean of the tokens' differences, nats."""
        return float(np.mean(self.tokens.sparse_nll - self.tokens.dense_nll))

    @cached_property
    def se_tokens(self) -> float | None:
        """Standard error of `delta_log_ppl` over tokens, as if they were independent; None for one token."""
        return standard_error(self.tokens.sparse_nll - self.tokens.dense_nll)

    @cached_property
    def se_windows(self) -> float | None:
        """Standard error of `delta_log_ppl` over the windows' means; None for one window."""
        return standard_error(np.array([np.mean(window.sparse_nll - window.dense_nll) for window in self.compared]))

    @property
    def interval_pct(self) -> tuple[float, float] | None:
        """The 95 % interval of the degradation by Student's t over windows; None for one window."""
        if self.se_windows is None:
            return None
        reach = student_quantile(0.975, self.windows - 1) * self.se_windows
        return change_pct(self.delta_log_ppl - reach), change_pct(self.delta_log_ppl + reach)

    @property
    def error_pct(self) -> float | None:
        """One standard error of the degradation, percentage points, the larger of both; None for a single token."""
        return None if math.isinf(self.margin) else 100 * self.margin / 2

    @property
    def margin(self) -> float:
        """Two standard errors of `delta_log_ppl`, the larger of both: few windows can agree by chance."""
        errors = [error for error in (self.se_tokens, self.se_windows) if error is not None]
        return 2 * max(errors, default=math.inf)

    @cached_property
    def kl(self) -> Divergence:
        """KL(dense || sparse)."""
        return Divergence.of(self.tokens.kl)

    @property
    def same_top1(self) -> float:
        """Share of the tokens whose likeliest prediction is the same."""
        return float(self.tokens.same_top1.mean())

    @property
    def same_top1_se(self) -> float | None:
        """Standard error of `same_top1` over tokens."""
        return standard_error_of_share(self.same_top1, self.predictions)

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the tokens' two log likelihoods."""
        return correlation(self.tokens.dense_nll, self.tokens.sparse_nll)

    @property
    def rms_dp(self) -> float:
        """Root mean square change of the right token's probability, in [0, 1]."""
        change = np.exp(-self.tokens.sparse_nll) - np.exp(-self.tokens.dense_nll)
        return float(np.sqrt(np.mean(change**2)))

    @property
    def verdict(self) -> str:
        """SUCCESS or FAILED where the degradation is two standard errors away from SUCCESS_PCT, otherwise UNDECIDED.

        NOTHING_DROPPED where both arms computed the same.
        """
        if self.density == 1:
            return NOTHING_DROPPED
        if change_pct(self.delta_log_ppl + self.margin) < SUCCESS_PCT:
            return SUCCESS
        return UNDECIDED if change_pct(self.delta_log_ppl - self.margin) <= SUCCESS_PCT else FAILED

    @property
    def windows_needed(self) -> int | None:
        """How many windows could probably decide: the standard error falls as 1 / sqrt(windows). None if unknown."""
        gap = abs(math.log1p(SUCCESS_PCT / 100) - self.delta_log_ppl)
        if not 0 < gap < math.inf or math.isinf(self.margin):
            return None
        return max(math.ceil(self.windows * (self.margin / gap) ** 2), self.windows + 1)

    def advised_density(self, searched: bool) -> float:
        """Of the sparse layers, at which a search would probably lose half of SUCCESS_PCT; never less than now.

        `searched` says that the schedule came from a search already.
        """
        loss = self.degradation_pct / (1 if searched else SEARCH_GAIN) / (SUCCESS_PCT / 2)
        return min(self.sparse_density * max(loss, 1.0) ** (1 / DENSITY_POWER), 1.0)

    def to_json(self) -> dict[str, Any]:
        """The report's "quality"."""
        names = ("windows", "dense_perplexity", "sparse_perplexity", "degradation_pct", "delta_log_ppl")
        names += (
            "error_pct",
            "se_tokens",
            "se_windows",
            "interval_pct",
            "same_top1",
            "same_top1_se",
            "correlation",
            "rms_dp",
        )
        values = {name: getattr(self, name) for name in names}
        values |= {"tokens": self.predictions, "kl": dataclasses.asdict(self.kl), "verdict": self.verdict}
        return values | {"by_window": [_window_to_json(window) for window in self.compared]}


def _window_to_json(window: Comparison) -> dict[str, float]:
    return {
        "dense_perplexity": perplexity_of(window.dense_nll),
        "sparse_perplexity": perplexity_of(window.sparse_nll),
        "delta_log_ppl": float(np.mean(window.sparse_nll - window.dense_nll)),
        "kl": float(window.kl.mean()),
        "same_top1": float(window.same_top1.mean()),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class LongContext:
    """Losses, nats, of the tokens that need a long context (`measure.quality.long_context_loss`)."""

    dense_nll: np.ndarray
    sparse_nll: np.ndarray

    @property
    def tokens(self) -> int:
        """How many there are; without any there is no figure."""
        return self.dense_nll.size

    def to_json(self) -> dict[str, Any]:
        """The report's "long_ppl"."""
        if not self.tokens:
            return {"tokens": 0}
        dense, sparse = perplexity_of(self.dense_nll), perplexity_of(self.sparse_nll)
        return {
            "tokens": self.tokens,
            "dense_perplexity": dense,
            "sparse_perplexity": sparse,
            "degradation_pct": degradation_pct(dense, sparse),
            "se_tokens": standard_error(self.sparse_nll - self.dense_nll),
        }


@dataclasses.dataclass(frozen=True)
class LimitCheck:
    """What a schedule made for --max_degradation cost on calibration windows that it was not made from.

    Attributes:
      delta_log_ppl: change of the log perplexity on each, nats; at least two.
    """

    delta_log_ppl: tuple[float, ...]

    @property
    def mean_pct(self) -> float:
        """Degradation over all of them."""
        return change_pct(float(np.mean(self.delta_log_ppl)))

    @property
    def upper_pct(self) -> float:
        """The degradation that the true one is under with 95 % confidence, by Student's t over windows."""
        reach = student_quantile(0.95, len(self.delta_log_ppl) - 1) * standard_error(np.array(self.delta_log_ppl))
        return change_pct(float(np.mean(self.delta_log_ppl)) + reach)


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


@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """Decoding the tokens that follow the test windows, densely and sparsely.

    Attributes:
      depth: tokens of a window, which filled the cache.
      steps: tokens decoded after it.
      batch: windows decoded at once.
      prefill: what filled the sparse arm's cache, "sparse" or "dense".
      kernel: the steps' implementation, and why ("" where there is nothing to say).
      compared: for each window what each of its tokens lost, arrays [N].
      compared_other_prefill: the same with the other kind of prefill.
      layer_densities: counted in the steps.
      dense_ms, sparse_ms: milliseconds a step, a sample for each pass.
      dense_bytes, sparse_bytes: that a step reads, weights and cache.
      bytes_per_second: the memory's measured bandwidth.
    """

    depth: int
    steps: int
    batch: int
    prefill: str
    kernel: tuple[str, str]
    compared: Sequence[Comparison]
    compared_other_prefill: Sequence[Comparison]
    layer_densities: Sequence[float]
    dense_ms: Sequence[float]
    sparse_ms: Sequence[float]
    dense_bytes: int
    sparse_bytes: int
    bytes_per_second: float

    @cached_property
    def quality(self) -> Quality:
        """Its statistics, as of the test windows."""
        return Quality(self.compared, self.layer_densities)

    @property
    def speedup(self) -> float:
        """Of the medians; below 1 where sparse is slower."""
        return statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)

    def tokens_per_second(self, arm: str) -> float:
        """Of all sequences together, by the median."""
        return self.batch * 1e3 / statistics.median(self.dense_ms if arm == "dense" else self.sparse_ms)

    def bandwidth_share(self, arm: str) -> float:
        """Of the memory's measured bandwidth, that the median step reads its bytes at."""
        ms, count = (self.dense_ms, self.dense_bytes) if arm == "dense" else (self.sparse_ms, self.sparse_bytes)
        return count / (statistics.median(ms) / 1e3) / self.bytes_per_second

    def to_json(self) -> dict[str, Any]:
        """The report's "decode"."""
        quality, other = self.quality, Quality(self.compared_other_prefill, self.layer_densities)
        return {
            "depth": self.depth,
            "tokens": self.steps,
            "batch": self.batch,
            "prefill": self.prefill,
            "kernel": self.kernel[0],
            "windows": quality.windows,
            "dense": {
                "perplexity": quality.dense_perplexity,
                "ms_per_token": list(self.dense_ms),
                "bytes_per_step": self.dense_bytes,
                "bandwidth_share": self.bandwidth_share("dense"),
            },
            "sparse": {
                "perplexity": quality.sparse_perplexity,
                "ms_per_token": list(self.sparse_ms),
                "bytes_per_step": self.sparse_bytes,
                "bandwidth_share": self.bandwidth_share("sparse"),
            },
            "degradation_pct": quality.degradation_pct,
            "error_pct": quality.error_pct,
            "delta_log_ppl": quality.delta_log_ppl,
            "delta_log_ppl_se": quality.se_tokens,
            "kl": quality.kl.mean,
            "same_top1": quality.same_top1,
            "density": quality.density,
            "speedup": self.speedup,
            "bytes_per_second": self.bytes_per_second,
            "other_prefill": {
                "delta_log_ppl": other.delta_log_ppl,
                "delta_log_ppl_se": other.se_tokens,
                "kl": other.kl.mean,
                "same_top1": other.same_top1,
            },
        }


@dataclasses.dataclass(frozen=True)
class DepthRow:
    """Milliseconds a step at one depth of the cache, or why it was skipped; `beyond_context`: only time is meant."""

    depth: int
    batch: int
    dense_ms: Sequence[float] = ()
    keep_all_ms: Sequence[float] = ()
    sparse_ms: Sequence[float] = ()
    density: float | None = None
    beyond_context: bool = False
    skipped: str | None = None

    @property
    def length(self) -> int:
        """The depth, as `break_even` asks for it."""
        return self.depth

    @property
    def speedup(self) -> float | None:
        """Of the medians; None where it was skipped."""
        return None if self.skipped else statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Greedy continuations, token ids."""

    dense: tuple[int, ...]
    sparse: tuple[int, ...]

    @property
    def part_at(self) -> int | None:
        """The first token at which they differ, counted from 1; None where they do not."""
        return next((i for i, (a, b) in enumerate(zip(self.dense, self.sparse, strict=True), 1) if a != b), None)


@dataclasses.dataclass(frozen=True)
class DensityRow:
    """What --densities measured at one of them: a schedule of its own, its quality and its time.

    Attributes:
      asked: the density of the sparse layers that was asked for.
      density: counted, the mean over all layers.
      delta_log_ppl: nats; `error_pct` is one standard error of the degradation, percentage points.
      kl: mean divergence from dense, a token.
      same_top1: share of the tokens.
      schedule_sha256: `schedule_sha256` of its layers.
    """

    asked: float
    density: float
    sparse_perplexity: float
    degradation_pct: float
    error_pct: float | None
    delta_log_ppl: float
    kl: float
    same_top1: float
    dense_ms: Sequence[float]
    sparse_ms: Sequence[float]
    layer_types: str
    schedule_sha256: str

    @property
    def speedup(self) -> float:
        """Of the medians."""
        return statistics.median(self.dense_ms) / statistics.median(self.sparse_ms)


def pareto_front(costs: Sequence[float], degradations: Sequence[float]) -> list[int]:
    """The indices, by ascending cost, of the points that no other is as cheap as and less degraded (or the reverse)."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], degradations[i])):
        if not front or degradations[i] < degradations[front[-1]]:
            front.append(i)
    return front


@dataclasses.dataclass(frozen=True)
class TextUsed:
    """Which windows of a text were run; `ids_sha256` is of their token ids, little-endian 32-bit integers in a row."""

    name: str
    windows: int
    tokens_per_window: int
    ids_sha256: str


@dataclasses.dataclass(frozen=True)
class TileMap:
    """What one KV head of one layer attended to in the first test window.

    Attributes:
      key_tiles: how many the window has.
      query_tiles: the ones that are listed, ascending; every one, or an even sample that ends with the last.
      tiles: the chosen key tiles of each, ascending, as ranges such as "0 3-5 12".
      mass_kept: of each, the share of the dense model's attention mass that lies in them.
    """

    layer: int
    head: int
    key_tiles: int
    query_tiles: Sequence[int]
    tiles: Sequence[str]
    mass_kept: Sequence[float]


def as_ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers as "0 3-5 12"."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: str) -> list[int]:
    """The numbers of `as_ranges`."""
    bounds = (list(map(int, part.split("-"))) for part in text.split())
    return [number for bound in bounds for number in range(bound[0], bound[-1] + 1)]


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


def break_even(rows: Sequence[SweepRow | DepthRow]) -> tuple[int | None, int | None] | None:
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


# --- Retrieval tasks ---

PROMPT, QUESTION = "prompt", "question"  # set-ups: the whole prompt is sparse, or only the question and the answer
SIGNIFICANT = 0.05  # level of the tests of tasks


@dataclasses.dataclass(frozen=True)
class Answers:
    """One arm's answers to a task's questions: whether each is right, and the right one's rank among the candidates.

    Ranks are by log likelihood, from 1.
    """

    right: tuple[bool, ...]
    ranks: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson_interval(sum(self.right), len(self.right))

    @property
    def ranked_first(self) -> float:
        """Share of the questions whose right answer is the likeliest candidate."""
        return sum(rank == 1 for rank in self.ranks) / len(self.ranks)

    @property
    def mean_rank(self) -> float:
        """Of the right answers."""
        return sum(self.ranks) / len(self.ranks)

    def p_against(self, other: Answers) -> float:
        """McNemar's exact p of the difference from another arm's answers to the same questions."""
        lost = sum(b and not a for a, b in zip(self.right, other.right, strict=True))
        return mcnemar_p(lost, sum(a and not b for a, b in zip(self.right, other.right, strict=True)))

    def beats(self, other: Answers) -> bool:
        """Whether it is right significantly more often."""
        return self.share > other.share and self.p_against(other) < SIGNIFICANT


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """A retrieval task in one set-up.

    Attributes:
      task: its name.
      length: tokens of prompt and answer.
      filler: of the haystack; None where it is the task's own.
      setup: PROMPT or QUESTION.
      chance: of a right guess from the context.
      candidates: how many answers were ranked.
      density: of the sparse arm, mean over the layers, counted in the first prompt.
      dense, sparse, oracle: the arms' answers; in the oracle every sparse layer chooses for itself.
    """

    task: str
    length: int
    filler: str | None
    setup: str
    chance: float
    candidates: int
    density: float
    dense: Answers
    sparse: Answers
    oracle: Answers

    @property
    def n(self) -> int:
        """How many questions there were."""
        return len(self.dense.right)

    @property
    def discriminative(self) -> bool:
        """Whether dense is clearly above chance, and right often enough that losing it all would be significant."""
        return self.dense.interval[0] > self.chance and sum(self.dense.right) >= least_significant(SIGNIFICANT)

    @property
    def p_value(self) -> float | None:
        """McNemar's exact p of sparse against dense; None where the row is not discriminative."""
        return self.sparse.p_against(self.dense) if self.discriminative else None

    @property
    def smallest_effect(self) -> float | None:
        """The smallest share of lost answers that n questions could have shown at 80 % power; None where none."""
        return detectable_loss(self.n, level=SIGNIFICANT)

    @property
    def suspicions(self) -> tuple[str, ...]:
        """What should not be so: dense >= oracle >= sparse within the error. A better sparse arm hints at a bug."""
        pairs = (("sparse", "dense"), ("oracle", "dense"), ("sparse", "oracle"))
        return tuple(f"{a} beats {b}" for a, b in pairs if getattr(self, a).beats(getattr(self, b)))

    def to_json(self) -> dict[str, Any]:
        """An element of the report's "tasks"."""
        names = ("task", "length", "n", "filler", "setup", "chance", "candidates", "density", "p_value")
        values = {name: getattr(self, name) for name in (*names, "discriminative", "smallest_effect", "suspicions")}
        for arm in ("dense", "sparse", "oracle"):
            answers = getattr(self, arm)
            values |= {arm: answers.share, f"{arm}_ci": answers.interval}
            values |= {f"{arm}_ranked_first": answers.ranked_first, f"{arm}_mean_rank": answers.mean_rank}
        return values


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
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        kind = self.processor if self.platform == "cpu" else self.kind
        return f"{self.count} {self.platform.upper()} device(s), {kind}"


def git_commit() -> str | None:
    """The commit that this program was at, with "+" where files were changed; None outside its own repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").split("\n")
        return commit + "+" * bool(git("status", "--porcelain", "-uno")) if Path(top).samefile(ROOT) else None
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def schedule_sha256(plans: Sequence[LayerPlan]) -> str:
    """Hex SHA-256 of what every layer does: JSON [[mode, anchor, head_map, budgets], ...] without spaces."""
    layers = [[plan.mode, plan.anchor, plan.head_map, plan.budgets] for plan in plans]
    return hashlib.sha256(json.dumps(layers, separators=(",", ":")).encode()).hexdigest()


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
      limit_check: of the schedule, where a limit was asked for.
      long_context: with --long_ppl.
      attention_ms: samples of one layer's attention by kind: dense, selection, anchor, reuse.
      decoding, depths, generated: with --decode, --depths and --generate.
      texts: the windows that "calibration" and "test" are; no calibration with a loaded schedule.
      similarity: [L, L], Jaccard similarity of the tiles that two layers chose in calibration (`similarity_matrix`).
      tile_maps: of a few layers, with --html.
      densities: with --densities.
      finished: False in a report that a run writes on its way, to be resumed from.
      tasks: with --tasks, two rows each.
    """

    settings: Any
    date: str
    command: Sequence[str]
    model: Model
    machine: Machine
    prefix: str
    schedule: Sequence[Layer]
    limit_check: LimitCheck | None
    quality: Quality
    timing: Timing
    attention_ms: Mapping[str, Sequence[float]]
    sweep: Sequence[SweepRow] = ()
    peak_memory_bytes: int | None = None
    long_context: LongContext | None = None
    decoding: Decoding | None = None
    depths: Sequence[DepthRow] = ()
    generated: Generated | None = None
    texts: Mapping[str, TextUsed] = dataclasses.field(default_factory=dict)
    similarity: np.ndarray | None = None
    tile_maps: Sequence[TileMap] = ()
    densities: Sequence[DensityRow] = ()
    finished: bool = True
    tasks: Sequence[TaskRow] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as --json writes it."""
        quality, timing = self.quality, self.timing
        return {
            "program": PROGRAM,
            "format_version": FORMAT_VERSION,
            "finished": self.finished,
            "date": self.date,
            "git_commit": git_commit(),
            "command": list(self.command),
            "model": dataclasses.asdict(self.model),
            "device": dataclasses.asdict(self.machine),
            "versions": versions(),
            "config": settings_to_json(self.settings),
            "kernel": self.settings.kernel,
            "texts": {name: dataclasses.asdict(text) for name, text in self.texts.items()},
            "prefix": self.prefix,
            "layer_types": layer_types([layer.plan for layer in self.schedule]),
            "schedule": [_layer_to_json(i, layer) for i, layer in enumerate(self.schedule)],
            "schedule_sha256": schedule_sha256([layer.plan for layer in self.schedule]),
            "similarity": None if self.similarity is None else np.round(self.similarity, 4).tolist(),
            "tile_maps": [dataclasses.asdict(tile_map) for tile_map in self.tile_maps],
            "dense": {"perplexity": quality.dense_perplexity, "compile_s": timing.dense_compile_s},
            "sparse": {"perplexity": quality.sparse_perplexity, "compile_s": timing.sparse_compile_s},
            "degradation_pct": quality.degradation_pct,
            "calibration_degradation_pct": self.limit_check and self.limit_check.mean_pct,
            "calibration_upper_pct": self.limit_check and self.limit_check.upper_pct,
            "density": quality.density,
            "verdict": quality.verdict,
            "quality": quality.to_json(),
            "long_ppl": self.long_context and self.long_context.to_json(),
            "timing": {
                "dense_ms": list(timing.dense_ms),
                "sparse_ms": list(timing.sparse_ms),
                "attention_ms": {kind: list(times) for kind, times in self.attention_ms.items()},
            },
            "speedup": timing.speedup,
            "sweep": [dataclasses.asdict(row) | {"speedup": row.speedup} for row in self.sweep],
            "sweep_break_even": break_even(self.sweep),
            "densities": [dataclasses.asdict(row) | {"speedup": row.speedup} for row in self.densities],
            "decode": self.decoding and self.decoding.to_json(),
            "decode_depths": [dataclasses.asdict(row) | {"speedup": row.speedup} for row in self.depths],
            "decode_break_even": break_even(self.depths),
            "generate": self.generated and dataclasses.asdict(self.generated) | {"part_at": self.generated.part_at},
            "tasks": [row.to_json() for row in self.tasks],
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


def layer_types(plans: Sequence[LayerPlan]) -> str:
    """A letter a layer, as serving engines take a schedule: F (full) chooses for itself, S (shared) reuses."""
    return "".join("S" if plan.mode == REUSE else "F" for plan in plans)


def is_stdout(path: Path | None) -> bool:
    """Whether a report goes to the standard output."""
    return str(path) in ("-", "/dev/stdout")


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all; "-" and /dev/stdout are standard output.

    Raises:
      InputError: the file cannot be written; what was there is as it was.
    """
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    if is_stdout(path):
        sys.stdout.write(text)
        return
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      InputError: the file cannot be written; what was there is as it was.
    """
    path = path.resolve()  # what a symbolic link points to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _remove_leftovers(path)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give a file where there is room for it") from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files beside `path` of processes that were killed while they wrote it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid = left.name.rsplit(".", 1)[1]
        if pid.isdecimal() and not _runs(int(pid)):
            left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; no number of a process
        pass
    return True


def read_report(path: Path) -> dict[str, Any]:
    """A report that `write_json` wrote.

    Raises:
      InputError: the file cannot be read, or is not a report of this version of this program.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"report {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"report {path} is not JSON ({type(error).__name__})") from error
    is_ours = isinstance(report, dict) and "format_version" in report and "degradation_pct" in report
    if is_ours and report["format_version"] != FORMAT_VERSION:  # earlier versions named no program
        raise InputError(
            f"report {path} has format version {quote(report['format_version'])}, and this program reads version "
            f"{FORMAT_VERSION}: measure it anew"
        )
    if not is_ours or report.get("program") != PROGRAM:
        raise InputError(f"{path} is no report of this program: give a file that the benchmark wrote with --json")
    return report


def finite(value: Any) -> Any:
    """JSON has no infinity: it becomes null, as a perplexity that overflows does."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
