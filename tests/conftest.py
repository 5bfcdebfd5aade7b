"""What every test file shares: the JAX that tests run on, and small converted models."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # not in pytest-xdist's workers, which share this one
    _cache = tempfile.TemporaryDirectory(prefix="kascade_tests_")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a program that several tests need is compiled once
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # no program says which lines it comes from: less to make and to hash
    "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA warns at length of how it names the CPU of a cached program
}

import jax
import pytest
from synthetic import HF_CONFIGS, write_hf_folder

from attention import KERNELS, xla
from convert_weights import convert

# XLA's CPU compiler takes most of the suite's time. This is the quickest that it can be: no optimisation, the older and
# plainer code for fused operations (a third of the time), one module of LLVM instead of several. XLA ends the process at
# a flag that it does not know, so the two that may go are given to the JAX that is known to have them.
QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    QUICK_TO_COMPILE += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
DEFAULT_WEIGHTS = Path(__file__).parents[1] / "llama_weights_chunked"


def pytest_configure(config):
    """Shapes and dtypes that meet by accident are errors."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish(session):
    """Eight CPU devices to split work over; small models, slow to compile and fast to run, go unoptimised."""
    markers = {mark.name for item in session.items for mark in item.iter_markers()}
    if not markers & {"real_model", "tpu_compile"}:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK_TO_COMPILE])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()  # now, so that no later setting counts


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The small models of `synthetic`, converted: a folder by each one's name."""
    root = tmp_path_factory.mktemp("converted")
    for name in HF_CONFIGS:
        convert(write_hf_folder(root / "hf" / name, name), root / name)
    return root


@pytest.fixture(scope="session")
def default_weights():
    """The converted default model. Its absence is a failure, not a skip: these tests were asked for by name."""
    if not DEFAULT_WEIGHTS.is_dir():
        pytest.fail(f"{DEFAULT_WEIGHTS.name} is missing; run python convert_weights.py first")
    return DEFAULT_WEIGHTS


@pytest.fixture
def kernel_calls(monkeypatch):
    """What the kernel "pallas_tpu" is called for: (name, dtype of the queries). Here it computes as xla does."""
    calls = []

    def counted(name):
        def function(q_BTNH, *args):
            calls.append((name, q_BTNH.dtype))
            return getattr(xla, name)(q_BTNH, *args)

        return function

    kernel = {name: counted(name) for name in ("dense", "choose", "reuse")}
    monkeypatch.setitem(KERNELS, "pallas_tpu", SimpleNamespace(**vars(xla) | kernel))
    return calls
