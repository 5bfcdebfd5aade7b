"""Standard errors, Student's t and correlation, against numpy and printed tables."""

import numpy as np
import pytest

from report.statistics import (
    correlation,
    standard_error,
    standard_error_of_share,
    student_probability,
    student_quantile,
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
