"""Fixtures that several test files share."""

from pathlib import Path

import pytest

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "llama_weights_chunked"


@pytest.fixture(scope="session")
def default_weights():
    """The converted default model. Its absence is a failure, not a skip: these tests were asked for by name."""
    if not DEFAULT_WEIGHTS.is_dir():
        pytest.fail(f"{DEFAULT_WEIGHTS.name} is missing; run python convert_weights.py first")
    return DEFAULT_WEIGHTS
