"""The machine of a run: its devices, what they are fast at, and their memory."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

import attention
from attention.model_axis import ModelShards, auto_model_axis
from attention.sharding import FIRST, compile_ahead, device_bytes, first_device, make_mesh, shard
from attention.xla import matmul
from errors import InputError, UnsupportedError
from kascade_core import Selection
from measure import hosts
from measure.memory import keep_freed_memory, read_peak_memory
from weights.config import LlamaConfig

PLATFORMS = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}  # cpu as a fallback: JAX asserts if none initialises
INSTALL = {"tpu": "jax[tpu]", "gpu": "jax[cuda12]"}
UNDONE = {  # settings of JAX that a user may have in the environment
    "jax_enable_x64": False,  # dtypes here are explicit, and Python numbers must not widen them
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_transfer_guard": "allow",
}
OWN_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def configure_device(device: str) -> list[jax.Device]:
    """Makes JAX compute on `device` ("cpu", "tpu" or "gpu") and undoes settings of the user's that would break a run.

    Every CPU core becomes a device: XLA's own threads inside one device leave much of a machine idle. There, the
    process keeps memory that it frees (`measure.memory.keep_freed_memory`).

    Raises:
      InputError: JAX sees no such device.
    """
    if device == "cpu":
        keep_freed_memory()
    jax.config.update("jax_platforms", PLATFORMS[device])
    jax.config.update("jax_platform_name", device)
    for name, value in UNDONE.items():
        jax.config.update(name, value)
    with contextlib.suppress(RuntimeError):  # JAX is running already, and keeps the devices it has
        jax.config.update("jax_num_cpu_devices", usable_cores())
    try:
        return jax.devices(device)
    except RuntimeError as error:
        package = INSTALL.get(device)
        advice = f"install {package} on a machine that has one, or use --device cpu" if package else "check JAX's setup"
        raise InputError(f"JAX sees no {device.upper()} here: {advice}") from error


QUOTA_FILES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of control groups 2 and 1


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, and its control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in QUOTA_FILES:
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in files).split()
            if int(quota) > 0:  # "max" and -1: no quota
                cores = min(cores, max(math.ceil(int(quota) / int(period)), 1))
    return cores


def processor_name() -> str:
    """The CPU's name and the matrix instructions that decide its speed, such as "AMD EPYC (AVX512_BF16)"."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
        best = [flag.upper() for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
        return f"{name} ({', '.join(best[:2])})" if best else name
    return sys.platform


# --- What is fast here ---

DTYPE_ROWS = 512  # tokens of the products that are timed
DTYPE_ROUNDS = 5
CLEARLY_FASTER = 0.9  # of float32's time: below it bfloat16's rounding is worth taking


def pick_dtype(name: str, device: str, config: LlamaConfig) -> tuple[str, str]:
    """The dtype of matrix inputs, and why. "auto" is bfloat16 on accelerators, and on a CPU what is measured faster.

    Raises:
      UnsupportedError: float16 where the hardware does not multiply it.
    """
    if name == "float16" and device != "gpu":
        raise UnsupportedError(f"dtype float16: a {device.upper()} does not multiply it; use bfloat16 or float32")
    if name != "auto":
        return name, "as asked"
    if device != "cpu":
        return "bfloat16", f"the one for a {device.upper()}"
    ratio = bfloat16_time(config)
    faster = "bfloat16" if ratio < CLEARLY_FASTER else "float32"
    return faster, f"measured here: bfloat16 takes {ratio:.2f} of float32's time for a layer's products"


def bfloat16_time(config: LlamaConfig) -> float:
    """Time of the MLP's products in bfloat16 over that in float32, medians of interleaved runs on one device."""
    D, F = config.hidden_size, config.intermediate_size

    def products(x_RD: jax.Array, w_DF: jax.Array, w_FD: jax.Array) -> jax.Array:
        hidden_RF = matmul("RD,DF->RF", x_RD, w_DF).astype(x_RD.dtype)
        return matmul("RF,FD->RD", hidden_RF, w_FD)

    runs = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        args = [jnp.ones(shape, dtype) for shape in ((DTYPE_ROWS, D), (D, F), (F, D))]
        runs[jnp.dtype(dtype).name] = partial(compile_ahead(products, args, None), *args)
    samples = time_interleaved(runs, DTYPE_ROUNDS)
    return statistics.median(samples["bfloat16"]) / statistics.median(samples["float32"])


def pick_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], config: LlamaConfig, dtype: str
) -> tuple[Mesh, str]:
    """The mesh, and why: the axes that are asked for or, without any, `model` as large as the weights need to fit.

    Raises:
      InputError: more devices than there are, axes that do not divide, weights that do not fit, a process without a
        device.
    """
    if sizes:
        mesh = make_mesh(devices, **sizes)
        ModelShards.of(config, mesh)  # checks that they divide
        _check_all_take_part(mesh, devices)
        return mesh, "as asked"
    all_devices = make_mesh(devices)
    memory = hosts.least(device_memory(first_device(all_devices)))
    if memory is None:
        return all_devices, "query tiles are split"
    needed = device_bytes(ModelShards(config).shapes(None, jnp.dtype(dtype)))
    model = auto_model_axis(config, needed, memory, len(devices))
    share = f"{needed / model / 1e9:.1f} GB of weights a device, which has {memory / 1e9:.1f} GB"
    return make_mesh(devices, model=model), share


def _check_all_take_part(mesh: Mesh, devices: Sequence[jax.Device]) -> None:
    used, known = ({device.process_index for device in some} for some in (mesh.devices.flat, devices))
    if used != known:
        raise InputError(
            f"mesh: {mesh.size} of {len(devices)} devices leave process {min(known - used)} without one; give larger "
            "axes, or start fewer processes"
        )


def device_memory(device: jax.Device) -> int | None:
    """Bytes that a device has for itself; None where unknown, and for CPU devices, which share one memory."""
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def pick_kernel(
    name: str, device: str, selection: Selection, length: int, head_dim: int, dtype: str, capability: str | None
) -> tuple[str, str]:
    """The implementation of attention, and why: "auto" is the device's own where it supports the sizes, otherwise xla.

    Args:
      name: one of `attention.KERNELS` or "auto".
      device: "cpu", "tpu" or "gpu".
      selection, length, head_dim, dtype: what attention is asked for; the longest length of the run.
      capability: the GPU's compute capability, such as "9.0".

    Raises:
      UnsupportedError: a kernel was asked for by name and does not support the sizes; it names some that would do.
    """
    own = OWN_KERNELS.get(device, "xla")
    kernel = own if name == "auto" else name
    try:
        attention.check(kernel, selection, length, head_dim, dtype, capability)
    except UnsupportedError as error:
        if name != "auto":
            raise UnsupportedError(f"kernel {name}: {error}; --kernel auto falls back to xla") from error
        return "xla", f"{kernel} does not support these sizes: {error}"
    if name == "auto":
        return kernel, f"the one for a {device.upper()}"
    interpreted = kernel not in ("xla", own)
    return kernel, f"as asked; interpreted on a {device.upper()}: correct and slow" if interpreted else "as asked"


# --- Memory and time ---


def peak_memory(device: jax.Device) -> int | None:
    """The most bytes in use since the start: of the process on a CPU, otherwise of the device; None where unknown.

    Of several processes that of the one with the most.
    """
    if device.platform != "cpu":
        return hosts.most((device.memory_stats() or {}).get("peak_bytes_in_use"))
    return hosts.most(read_peak_memory())


def free_memory(device: jax.Device) -> int | None:
    """Bytes that a computation may still take, of several processes in the one with the least; None where unknown."""
    if device.platform == "cpu":
        return hosts.least(psutil.virtual_memory().available)
    stats = device.memory_stats() or {}
    known = {"bytes_limit", "bytes_in_use"} <= set(stats)
    return hosts.least(stats["bytes_limit"] - stats["bytes_in_use"] if known else None)


def time_interleaved(runs: dict[str, Callable[[], Any]], n_runs: int) -> dict[str, list[float]]:
    """Milliseconds of `n_runs` runs of each, in turn, each waited for, after one warm-up that is not counted.

    Of several processes, which all come here, the slowest one's.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(n_runs + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return hosts.slowest(samples)


BANDWIDTH_BYTES = 2**28  # read at a time: several times any cache
BANDWIDTH_SUMS = 1024  # of a device: enough to keep all of a GPU busy
QUEUED_READS = 10  # on an accelerator, where starting a read takes longer than one of its memory


def memory_bandwidth(mesh: Mesh) -> float:
    """Bytes a second that all devices of the mesh read together: the best of several sums over a large array."""
    shape = BANDWIDTH_SUMS, BANDWIDTH_BYTES // 4 // mesh.size // BANDWIDTH_SUMS
    reads = 1 if first_device(mesh).platform == "cpu" else QUEUED_READS
    numbers = compile_ahead(shard(lambda: jnp.ones(shape), mesh, (), FIRST), (), mesh)()
    total = compile_ahead(shard(lambda x: x.sum(1), mesh, FIRST, FIRST), (numbers,), mesh)
    milliseconds = time_interleaved({"sums": lambda: [total(numbers) for _ in range(reads)]}, 5)["sums"]
    return reads * numbers.nbytes / (min(milliseconds) / 1e3)
