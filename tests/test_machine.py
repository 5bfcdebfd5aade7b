"""The machine of a run: its devices, what is fast on them, and their memory."""

import ctypes
import dataclasses
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from synthetic import HF_CONFIGS

from errors import InputError, UnsupportedError
from kascade_core import Selection
from measure import machine
from weights.config import LlamaConfig

CONFIG = LlamaConfig.from_hf(HF_CONFIGS["gqa_llama3_untied"])
CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 {}\n"


@pytest.fixture
def jax_settings():
    """Puts JAX's settings back."""
    names = ("jax_platforms", "jax_platform_name", "jax_enable_x64", "jax_disable_jit", "jax_transfer_guard")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def files(monkeypatch):
    """Texts that files are read as, by path."""
    texts = {}
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: texts.get(str(path)) or read_text(path, *a, **k))
    return texts


def test_the_cpus_devices_are_its_cores(jax_settings):
    assert machine.configure_device("cpu") == jax.devices("cpu")
    assert jax.device_count() == 8  # as conftest has it


@pytest.mark.parametrize(("device", "package"), [("tpu", r"jax\[tpu\]"), ("gpu", r"jax\[cuda12\]")])
def test_a_device_that_is_not_there(jax_settings, device, package):
    sentence = f"JAX sees no {device.upper()} here: install {package} on a machine that has one, or use --device cpu"
    with pytest.raises(InputError, match=sentence):
        machine.configure_device(device)


def test_settings_that_would_break_a_run_are_undone(jax_settings):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_jit", True)
    jax.config.update("jax_transfer_guard", "disallow")
    machine.configure_device("cpu")
    assert jnp.zeros(2).dtype == jnp.float32
    assert not jax.config.jax_disable_jit
    assert float(jnp.asarray(np.ones(2)).sum()) == 2  # a transfer from and to the host


def test_strict_promotion_is_left_as_the_user_has_it(jax_settings):
    machine.configure_device("cpu")
    assert jax.config.jax_numpy_rank_promotion == "raise"
    assert jax.config.values["jax_numpy_dtype_promotion"] == "strict"


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("?", 4)])
def test_usable_cores_respect_the_control_groups_quota(monkeypatch, files, quota, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 5, 6}, raising=False)
    files["/sys/fs/cgroup/cpu.max"] = quota
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx512f avx512_bf16 amx_bf16", "Some CPU (AMX_BF16, AVX512_BF16)"),
        ("avx512f", "Some CPU (AVX512F, AVX2)"),
        ("", "Some CPU (AVX2)"),
    ],
)
def test_the_processors_name_has_its_matrix_instructions(files, flags, name):
    files["/proc/cpuinfo"] = CPUINFO.format(flags)
    assert machine.processor_name() == name


def test_auto_dtype_is_bfloat16_on_accelerators_and_measured_on_a_cpu(monkeypatch):
    assert machine.pick_dtype("auto", "tpu", CONFIG) == ("bfloat16", "the one for a TPU")
    assert machine.pick_dtype("float32", "tpu", CONFIG) == ("float32", "as asked")
    assert machine.pick_dtype("float16", "gpu", CONFIG) == ("float16", "as asked")
    for ratio, dtype in ((0.65, "bfloat16"), (0.95, "float32"), (2.0, "float32")):
        monkeypatch.setattr(machine, "bfloat16_time", lambda config, ratio=ratio: ratio)
        picked, why = machine.pick_dtype("auto", "cpu", CONFIG)
        assert picked == dtype
        assert f"bfloat16 takes {ratio:.2f} of float32's time" in why


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_float16_is_refused_where_it_is_not_multiplied(device):
    with pytest.raises(UnsupportedError, match=f"float16: a {device.upper()} does not multiply it; use bfloat16"):
        machine.pick_dtype("float16", device, CONFIG)


def test_the_ratio_of_dtypes_is_bfloat16s_time_over_float32s(monkeypatch):
    monkeypatch.setattr(machine, "DTYPE_ROWS", 8)
    monkeypatch.setattr(machine, "time_interleaved", lambda runs, n: {"float32": [4.0, 4, 9], "bfloat16": [1.0, 2, 3]})
    assert machine.bfloat16_time(CONFIG) == 0.5


def test_auto_kernel_is_the_devices_own_where_it_takes_the_sizes():
    small, large = Selection(tile_size=16), Selection(tile_size=128)
    pick = partial(machine.pick_kernel, length=8192, head_dim=64, dtype="bfloat16", capability=None)
    for selection in (small, large):
        assert pick("auto", "tpu", selection) == ("pallas_tpu", "the one for a TPU")
    assert pick("auto", "gpu", small) == ("pallas_gpu", "the one for a GPU")
    assert pick("auto", "cpu", large) == ("xla", "the one for a CPU")
    assert pick("xla", "tpu", large) == ("xla", "as asked")
    for selection, length, got in (
        (Selection(tile_size=48), 8192, "got 48"),
        (small, 2**20, "got 1048576 tokens"),
    ):
        kernel, why = pick("auto", "tpu", selection, length=length)
        assert kernel == "xla"
        assert "pallas_tpu does not support these sizes: " in why and "128" in why and got in why


def test_a_kernel_of_another_device_is_interpreted_and_the_run_says_so():
    selection = Selection(tile_size=128)
    kernel, why = machine.pick_kernel("pallas_tpu", "cpu", selection, 300, 8, "float32", None)
    assert (kernel, why) == ("pallas_tpu", "as asked; interpreted on a CPU: correct and slow")
    assert machine.pick_kernel("pallas_tpu", "tpu", selection, 300, 8, "float32", None)[1] == "as asked"


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"selection": Selection(tile_size=48)}, "got 48"),
        ({"dtype": "float32"}, "got float32"),
        ({"head_dim": 80}, "got 80"),
        ({"capability": "7.5"}, "got 7.5"),
    ],
)
def test_what_the_gpus_kernels_do_not_take_runs_on_xla_or_is_refused(sizes, why):
    given = dict(selection=Selection(), length=512, head_dim=64, dtype="bfloat16", capability="9.0") | sizes
    kernel, reason = machine.pick_kernel("auto", "gpu", **given)
    assert kernel == "xla"
    assert why in reason
    with pytest.raises(UnsupportedError, match=f"kernel pallas_gpu: .*{why}.*; --kernel auto falls back to xla"):
        machine.pick_kernel("pallas_gpu", "gpu", **given)


# --- Memory and time ---


def test_the_peak_is_no_less_than_what_the_process_holds():
    held = np.ones(25_000_000)  # 200 MB
    assert machine.peak_memory(jax.devices()[0]) >= psutil.Process().memory_info().rss * 0.9 > held.nbytes


ALLOCATE = """
import ctypes, sys, psutil
from measure.memory import keep_freed_memory
library, size = ctypes.CDLL(None), ctypes.c_size_t(100_000_000)
library.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "keep":
    keep_freed_memory()
before = psutil.Process().memory_info().rss
memory = ctypes.c_void_p(library.malloc(size))
library.memset(memory, 1, size)
library.free(memory)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
def test_freed_memory_is_kept_for_what_is_allocated_next():
    run = partial(subprocess.check_output, cwd=Path(machine.__file__).parents[1], text=True)
    held = {mode: int(run([sys.executable, "-c", ALLOCATE, mode])) for mode in ("keep", "default")}
    assert held["default"] < 20_000_000 < 80_000_000 < held["keep"]


def test_the_free_memory_is_a_part_of_the_machines():
    free = machine.free_memory(jax.devices()[0])
    assert 0 < free < psutil.virtual_memory().total
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.5)


@dataclasses.dataclass
class Accelerator:
    stats: dict | None
    platform: str = "gpu"

    def memory_stats(self):
        return self.stats


def test_an_accelerator_tells_its_own_memory():
    device = Accelerator({"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 70})
    assert (machine.free_memory(device), machine.peak_memory(device)) == (70, 70)
    for silent in (Accelerator(None), Accelerator({"bytes_limit": 100})):
        assert (machine.free_memory(silent), machine.peak_memory(silent)) == (None, None)


def test_every_timed_run_is_waited_for():
    class Pending:
        waited = 0

        def block_until_ready(self):
            Pending.waited += 1

    machine.time_interleaved({"dense": Pending, "sparse": Pending}, 3)
    assert Pending.waited == 2 * 4


def test_runs_are_interleaved_and_the_warm_up_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    runs = {name: lambda name=name: calls.append(name) for name in ("dense", "sparse")}
    samples = machine.time_interleaved(runs, 3)
    assert calls == ["dense", "sparse"] * 4
    assert samples == {"dense": [1000.0] * 3, "sparse": [1000.0] * 3}  # a tick each, in milliseconds


def test_a_mesh_that_leaves_a_process_without_a_device_is_refused():
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(4)])
    mesh = SimpleNamespace(devices=devices[:2], size=2)
    with pytest.raises(InputError, match="mesh: 2 of 4 devices leave process 1 without one; give larger axes"):
        machine._check_all_take_part(mesh, devices)
    machine._check_all_take_part(SimpleNamespace(devices=devices[1:3], size=2), devices)
