"""Fixtures that several test files share."""

import os
from pathlib import Path

import jax
import pytest

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "llama_weights_chunked"


def pytest_configure(config):
    """Gives JAX eight devices to deal to; the synthetic models, slow to compile and fast to run, go unoptimised."""
    if config.option.markexpr == "not real_model and not tpu_compile":
        jax.config.update("jax_num_cpu_devices", 8)
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
        jax.devices()  # now, so that no later setting counts


@pytest.fixture(scope="session")
def default_weights():
    """The converted default model. Its absence is a failure, not a skip: these tests were asked for by name."""
    if not DEFAULT_WEIGHTS.is_dir():
        pytest.fail(f"{DEFAULT_WEIGHTS.name} is missing; run python convert_weights.py first")
    return DEFAULT_WEIGHTS
