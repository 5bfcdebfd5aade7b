"""Standard errors, Student's t, correlation, and the errors of yes and no answers, against plain computations."""

import itertools

import numpy as np
import pytest

from report.statistics import (
    correlation,
    detectable_loss,
    least_significant,
    mcnemar_p,
    standard_error,
    standard_error_of_share,
    student_probability,
    student_quantile,
    wilson_interval,
)

# Printed tables of Student's t: probability, degrees of freedom, quantile.
TABLE = [
    (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 11, 2.201), (0.975, 120, 1.980),
    (0.95, 1, 6.314), (0.95, 2, 2.920), (0.95, 3, 2.353), (0.95, 10, 1.812), (0.995, 5, 4.032),
]  # fmt: skip


@pytest.mark.parametrize("probability, freedom, quantile", TABLE)
def test_students_t_is_that_of_the_printed_tables(probability, freedom, quantile):
    assert student_quantile(probability, freedom) == pytest.approx(quantile, abs=5e-4)
    assert student_probability(quantile, freedom) == pytest.approx(probability, abs=5e-5)


def test_a_standard_error_is_that_of_independent_values():
    """The spread of many samples' means is what one sample's standard error says."""
    rng = np.random.default_rng(0)
    samples = rng.exponential(3.0, (4000, 25))
    errors = [standard_error(sample) for sample in samples]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(samples.mean(1).std(), rel=0.05)


def test_one_value_has_no_standard_error():
    assert standard_error(np.ones(1)) is None
    assert standard_error_of_share(1.0, 1) is None


def test_a_share_has_the_error_of_its_yes_and_no_answers():
    answers = np.arange(40) < 31
    assert standard_error_of_share(answers.mean(), 40) == pytest.approx(standard_error(answers))


def test_correlation_is_pearsons():
    a, b = np.random.default_rng(1).standard_normal((2, 50))
    assert correlation(a, a + b) == pytest.approx(np.corrcoef(a, a + b)[0, 1])
    assert correlation(a, np.ones(50)) is None


# --- Yes and no answers ---


@pytest.mark.parametrize(
    "successes, count, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval_is_that_of_printed_examples(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_ends_are_where_the_share_is_z_standard_errors_away():
    for end in wilson_interval(13, 50):
        assert abs(13 / 50 - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / 50))


def test_mcnemars_p_counts_all_splits_of_fair_coins_that_are_as_uneven():
    coins = np.array(list(itertools.product((0, 1), repeat=9))).sum(1)
    for lost in range(10):
        uneven = np.abs(2 * coins - 9) >= abs(2 * lost - 9)
        assert mcnemar_p(lost, 9 - lost) == pytest.approx(uneven.mean())
    assert mcnemar_p(0, 0) == 1


def test_six_losses_are_the_fewest_that_are_significant():
    assert mcnemar_p(5, 0) > 0.05 > mcnemar_p(6, 0)
    assert least_significant() == 6


def test_the_detectable_loss_is_found_in_four_of_five_repetitions():
    lost = np.random.default_rng(0).binomial(50, detectable_loss(50), 20000)
    assert np.mean([mcnemar_p(k, 0) < 0.05 for k in lost]) == pytest.approx(0.8, abs=0.01)
    assert detectable_loss(5) is None
    assert 0.9 < detectable_loss(6) < 1
