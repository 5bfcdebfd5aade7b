"""Means with their errors: plain numpy functions. Pairs are differences before they get here."""

from __future__ import annotations

import math

import numpy as np


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of independent values: sample standard deviation / sqrt(n); None for fewer than two."""
    values = np.asarray(values, np.float64)
    return None if values.size < 2 else float(values.std(ddof=1) / math.sqrt(values.size))


def standard_error_of_share(share: float, count: int) -> float | None:
    """Of a share of `count` independent yes or no answers, as llama-perplexity has it; None for fewer than two."""
    return None if count < 2 else math.sqrt(share * (1 - share) / (count - 1))


REACH_95 = 1.96  # standard errors to either side in a 95 % interval of a normal distribution


def student_quantile(probability: float, freedom: int) -> float:
    """Where Student's t distribution reaches a probability in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while student_probability(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_probability(middle, freedom) < probability else (low, middle)
    return high


def student_probability(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    within = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return 0.5 + within / 2


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's, of two rows of values; None where one of them does not vary."""
    a, b = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64) for values in (a, b))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else None


# --- Yes and no answers ---


def wilson_interval(successes: int, count: int, z: float = REACH_95) -> tuple[float, float]:
    """The interval of a share of `count` independent yes or no answers, 95 % by default (Wilson, JASA 22, 1927).

    Unlike share ± 1.96 standard errors it stays within [0, 1] and has a width where all answers are the same.
    """
    share, scale = successes / count, 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p of so many answers lost and gained if both were as likely: McNemar's exact test.

    The probability of a split at least as uneven of lost + gained fair coins; answers that did not change say nothing.
    """
    pairs = lost + gained
    tail = sum(math.comb(pairs, k) for k in range(min(lost, gained) + 1)) / 2**pairs
    return min(2 * tail, 1.0)


def least_significant(level: float = 0.05) -> int:
    """How many answers must be lost, and none gained, for `mcnemar_p` to be below `level`."""
    return next(lost for lost in range(1, 1000) if mcnemar_p(lost, 0) < level)


def detectable_loss(count: int, power: float = 0.8, level: float = 0.05) -> float | None:
    """The smallest share of lost answers that `count` questions show, at this level, with a probability of `power`.

    It supposes that none is gained: with gains it takes more. None where `count` questions cannot show anything.
    """
    least = least_significant(level)
    if count < least:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        few = sum(math.comb(count, k) * middle**k * (1 - middle) ** (count - k) for k in range(least))
        low, high = (middle, high) if 1 - few < power else (low, middle)
    return high
