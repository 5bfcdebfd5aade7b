"""Machines by the names that clouds rent them by: what a device of each holds and does, and where XLA can compile.

Rates are the makers' datasheets': of products in bfloat16 without sparsity, and of the device's own memory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence

import jax
import psutil
from jax.experimental import topologies

from errors import InputError, quote

HERE = "here"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      name: in a topology's name; of the devices here, what JAX calls them.
      memory: bytes.
      flops: a second, of matrix products in bfloat16; None if not known.
      bandwidth: bytes of its memory a second; None if not known.
    """

    name: str
    memory: int
    flops: float | None = None
    bandwidth: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * 10**9, 197e12, 819e9),  # docs.cloud.google.com/tpu/docs/v5e, and so on
        Chip("v6e", 32 * 10**9, 918e12, 1638e9),
        Chip("v5p", 95 * 10**9, 459e12, 2765e9),
        Chip("v4", 32 * 10**9, 275e12, 1228e9),
        Chip("a100", 80 * 10**9, 312e12, 2039e9),  # SXM, of 80 GB
        Chip("h100", 80 * 10**9, 989e12, 3350e9),  # SXM
        Chip("h200", 141 * 10**9, 989e12, 4800e9),
    )
}
SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # by chips
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
TPUS = {"v5e": SQUARES, "v6e": SQUARES, "v5p": CUBES, "v4": CUBES}
CORES_COUNTED = ("v5p", "v4")  # the number in their names is of cores, two a chip; both are one device
GPU_COUNTS = tuple(2**i for i in range(9))
ONE_CHIP = (1, 1, 1)  # of a host; without being told, the compiler takes hosts of 2 x 2


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: as the cloud has it.
      chip: each device.
      num_devices: chips or GPUs.
      layout: what the TPU's compiler calls it; None elsewhere.
    """

    name: str
    chip: Chip
    num_devices: int
    layout: str | None = None

    def devices(self) -> Sequence[jax.Device] | None:
        """Devices to compile for; None where only arithmetic is possible.

        Raises:
          InputError: the TPU's compiler is not installed.
        """
        if self.name == HERE:
            return jax.devices()
        return None if self.layout is None else _tpu_devices(self.chip.name, self.layout)

    @property
    def has_compiler(self) -> bool:
        """Whether there are devices to compile for."""
        return self.name == HERE or self.layout is not None

    def kind(self) -> str:
        """The platform whose kernels run on it."""
        if self.name == HERE:
            return jax.devices()[0].platform
        return "tpu" if self.layout else "gpu"

    def larger(self) -> list[Topology]:
        """Topologies of the same chips with more of them, ascending; none for the devices here."""
        return [other for other in _all(self.chip.name) if other.num_devices > self.num_devices]


@functools.cache
def _tpu_devices(chip: str, layout: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU's compiler is not installed: pip install -r bench/requirements-tpu.txt")
    options = {"chips_per_host_bounds": ONE_CHIP} if layout == SQUARES[1] else {}
    options |= {"chip_config_name": "megacore"} if chip == "v4" else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{layout}", **options)
    return described.devices


def _all(chip: str) -> list[Topology]:
    if chip in TPUS:
        cores = 2 if chip in CORES_COUNTED else 1
        return [Topology(f"{chip}-{n * cores}", CHIPS[chip], n, layout) for n, layout in TPUS[chip].items()]
    return [Topology(f"{chip}-{n}", CHIPS[chip], n) for n in GPU_COUNTS] if chip in CHIPS else []


def find(name: str) -> Topology:
    """The topology of a name, such as v5e-8, v5p-64, h100-8, or `here`.

    Raises:
      InputError: there is none; the message lists those of the same chip, or all chips.
    """
    if name == HERE:
        return _here()
    chip = name.rpartition("-")[0]
    known = {topology.name: topology for topology in _all(chip)}
    if name in known:
        return known[name]
    legal = ", ".join(known) or f"{', '.join(f'{each}-N' for each in CHIPS)} or {HERE}"
    raise InputError(f"topology {quote(name)}: expected one of {legal}")


def _here() -> Topology:
    devices = jax.devices()
    if devices[0].platform == "cpu":
        memory = psutil.virtual_memory().total // len(devices)
    else:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return Topology(HERE, Chip(devices[0].device_kind, memory), len(devices))
