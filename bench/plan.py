"""Will it fit? A model's prefill and a step of its decoding on machines that are not here: memory, work, exchanges.

For TPUs the programs are compiled ahead of time by the TPU's compiler (the package libtpu, on any Linux machine), and
for the devices here by theirs: no weights are needed, nothing is run and nothing is timed. For GPUs that are not here
there is arithmetic alone. Each row is a dense or a sparse model: one dense layer, an anchor in every fourth, the rest
reuse its tiles. A prefill is of one sequence, whose keys and values stay; a step is the last of --seq_len tokens.

  python -m bench.plan --shape llama3.1-70b --topology v5e-256 --seq_len 131072    # bench/requirements-tpu.txt
  python -m bench.plan --weights_dir llama_weights_chunked --topology here --seq_len 2048
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from attention.model_axis import WEIGHTS_SHARE, ModelShards, auto_model_axis, model_axis_sizes
from attention.sharding import AXES, CONTEXT, DATA, MODEL, device_bytes
from bench import needs, topologies
from bench.collectives import Collective, added, count_collectives, total
from bench.compile_tpu import SHAPES, step_kernel, use_compiler_alone
from bench.needs import DTYPE, Job, Needs, Work
from bench.topologies import HERE, Topology
from errors import QUOTED, InputError, Parser, exit_on_bad_input, quote
from kascade_core import Selection, freeze_schedule
from llama_model import LlamaModel
from measure.machine import pick_kernel
from measure.settings import mesh_axes
from network.cache import KVCache
from network.programs import Forward
from report.tables import markdown
from weights.config import LlamaConfig
from weights.folder import read_manifest

AUTO = "auto"
DENSITY = 0.1  # unless a budget is given
TILE_SIZE = 128  # what the TPU's kernels take at every length
WHY = {  # of an auto mesh, by whether it is a step's
    False: f"auto: the smallest model with which weights take at most {WEIGHTS_SHARE:.0%}, the rest context",
    True: "auto: a step has one of context; the smallest model with which weights and caches fit, the rest data",
}
COLUMNS = (
    "model", "topology", "tokens", "what", "mesh", "weights", "cache", "temporaries", "tiles", "of GB", "verdict",
    "TFLOP (datasheet, /s)", "GB read (datasheet, /s)", "exchanges, results in GB", "how",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a job."""

    needs: Needs
    collectives: dict[str, Collective]
    kernel: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A job on a topology.

    Attributes:
      job, topology: what and where.
      sizes: of the mesh's axes.
      why: they are so.
      needs: bytes of a device.
      work: estimates for a device.
      compiled: what the compiler says; None for arithmetic.
      least: the smallest topology of these chips that takes the job where this one does not; None if none does.
      note: why it is not compiled, or what the compiler said instead.
      is_refused: the compiler found no room, whatever the arithmetic says.
    """

    job: Job
    topology: Topology
    sizes: dict[str, int]
    why: str
    needs: Needs
    work: Work
    compiled: Compiled | None = None
    least: Row | None = None
    note: str = ""
    is_refused: bool = False

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.spare >= 0 and not self.is_refused

    @property
    def spare(self) -> int:
        """Bytes of a device that are left; negative where it does not fit."""
        return self.topology.chip.memory - self.needs.total

    @property
    def verdict(self) -> str:
        """In words."""
        if self.fits:
            return f"fits with {self.spare / 1e9:.1f} GB to spare"
        lacks = "does not fit, says the compiler" if self.is_refused else f"lacks {-self.spare / 1e9:.1f} GB"
        if self.topology.name == HERE:
            return lacks
        if self.least is None:
            return f"{lacks}; no topology of {self.topology.chip.name} that is listed here takes it"
        return f"{lacks}; the least that fits is {self.least.topology.name}"


class OutOfMemoryError(Exception):
    """The compiler found no room for a program; the message is the compiler's."""


# --- Meshes ---


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """The axes' sizes from "data=1,context=4,model=8"; those left out are 1, but for context, which takes the rest.

    Raises:
      InputError: another axis, no number, or not as many devices as there are.
    """
    sizes = mesh_axes(text)
    sizes = {axis: sizes.get(axis, 0 if axis == CONTEXT else 1) for axis in AXES}
    others = sizes[DATA] * sizes[MODEL]
    if num_devices % others:
        raise InputError(
            f"mesh {quote(text)}: data={sizes[DATA]} and model={sizes[MODEL]} do not divide the {num_devices} devices"
        )
    sizes[CONTEXT] = sizes[CONTEXT] or num_devices // others
    if math.prod(sizes.values()) != num_devices:
        raise InputError(
            f"mesh {quote(text)}: expected a product of {num_devices}, the devices that there are, got "
            f"{math.prod(sizes.values())}"
        )
    return sizes


def mesh_sizes(job: Job, topology: Topology, mesh: str) -> dict[str, int]:
    """The axes of a job's mesh: as named, or by `auto_model_axis`; a step has one of context, as a run's steps have."""
    if mesh != AUTO:
        sizes = parse_mesh(mesh, topology.num_devices)
        ModelShards(job.config, sizes[MODEL])  # raises where the heads do not divide
        return sizes | {DATA: math.gcd(job.batch, sizes[DATA]), CONTEXT: 1} if job.is_step else sizes
    if job.is_step:
        return _auto_step_sizes(job, topology)
    model = _auto_model(job, topology)
    return {DATA: 1, CONTEXT: topology.num_devices // model, MODEL: model}


def _auto_model(job: Job, topology: Topology) -> int:
    """`auto_model_axis`, or the largest that there is, where the weights do not fit."""
    weights = needs.weights_bytes(job.config)
    try:
        return auto_model_axis(job.config, weights, topology.chip.memory, topology.num_devices)
    except InputError:
        return max(n for n in model_axis_sizes(job.config) if topology.num_devices % n == 0)


def _auto_step_sizes(job: Job, topology: Topology) -> dict[str, int]:
    """As many sequences side by side as fit: the smallest model axis with which weights and caches do."""
    devices = topology.num_devices
    axes = [n for n in model_axis_sizes(job.config) if devices % n == 0]
    choices = [{DATA: math.gcd(job.batch, devices // n), CONTEXT: 1, MODEL: n} for n in axes]
    totals = [needs.estimate(job, needs.mesh_of_sizes(sizes)).total for sizes in choices]
    fits = (i for i, size in enumerate(totals) if size <= topology.chip.memory)
    return choices[next(fits, int(np.argmin(totals)))]


# --- Compiling ---


def kernel_of(job: Job, platform: str, mesh: Mesh) -> str:
    """The implementation of attention that a run's `--kernel auto` takes."""
    H, name = job.config.head_dim, jnp.dtype(DTYPE).name
    kernel, _ = pick_kernel(AUTO, platform, job.selection, job.length, H, name, None)
    if not job.is_step or kernel != "pallas_tpu":
        return "xla" if job.is_step else kernel
    local = ModelShards.of(job.config, mesh).local
    return step_kernel(local, job.cache_size, job.batch // mesh.shape[DATA], job.selection)


def compile_job(job: Job, topology: Topology, sizes: Mapping[str, int]) -> Compiled:
    """Compiles a job's programs for a topology's devices.

    Raises:
      OutOfMemoryError: the compiler found no room for one of them.
    """
    devices = np.array(topology.devices()[: math.prod(sizes.values())])
    mesh = Mesh(devices.reshape([sizes[axis] for axis in AXES]), AXES)
    kernel, start = kernel_of(job, topology.kind(), mesh), time.perf_counter()
    model = LlamaModel(job.config, job.schedule, job.selection, dtype=DTYPE, kernel=kernel)
    try:
        found = (_compile_step if job.is_step else _compile_prefill)(job, model, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise  # such as a kernel that vector memory does not hold
        raise OutOfMemoryError(str(error)) from error
    return Compiled(*found, kernel, time.perf_counter() - start)


def _compile_prefill(job: Job, model: LlamaModel, mesh: Mesh) -> tuple[Needs, dict[str, Collective]]:
    params = ModelShards.of(job.config, mesh).shapes(mesh, DTYPE)
    forward = model.compile(params, jax.ShapeDtypeStruct((1, job.length), jnp.int32), mesh, with_cache=True)
    collected = sum(program.memory_analysis().output_size_in_bytes for program in forward.collect.values())
    index = needs.prefill_index_bytes(job, mesh) + collected
    cache, temporaries = needs.prefill_cache_bytes(job, mesh), _temporaries(forward, job, mesh)
    return Needs(device_bytes(params), cache, temporaries, index), _collectives(forward)


def _temporaries(forward: Forward, job: Job, mesh: Mesh) -> int:
    """The stream that goes from layer to layer, and the most that a program needs beside its arguments."""
    stats = [program.memory_analysis() for program in forward.programs]
    most = max(s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in stats)
    return needs.stream_bytes(job, mesh) + most


def _collectives(forward: Forward) -> dict[str, Collective]:
    """Of a whole forward: a program's as often as it runs."""
    found: dict[str, Collective] = {}
    runs = [forward.begin, *forward.layers, forward.end, *forward.collect.values()]
    for program in forward.programs:
        for kind, part in count_collectives(program.as_text()).items():
            found[kind] = added(found.get(kind), part.times(runs.count(program)))
    return found


def _compile_step(job: Job, model: LlamaModel, mesh: Mesh) -> tuple[Needs, dict[str, Collective]]:
    params = ModelShards.of(job.config, mesh).shapes(mesh, DTYPE)
    cache = KVCache.shapes(job.config, job.batch, job.cache_size, DTYPE, mesh)
    program = model.compile_decode(params, cache, 1, mesh).program
    stats = program.memory_analysis()
    temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    index = needs.step_index_bytes(job, mesh)
    found = Needs(device_bytes(params), device_bytes(cache), max(temporaries - index, 0), index)
    return found, count_collectives(program.as_text())


# --- Rows ---


def plan(job: Job, topology: Topology, mesh: str) -> Row:
    """A job's row; where it does not fit, with the least topology that takes it, which is compiled as well."""
    row = check(job, topology, mesh)
    if row.fits:
        return row
    larger = (check(job, other, AUTO) for other in topology.larger() if by_arithmetic(job, other, AUTO).fits)
    return dataclasses.replace(row, least=next((other for other in larger if other.fits), None))


def by_arithmetic(job: Job, topology: Topology, mesh: str) -> Row:
    """A job's row without the compiler."""
    sizes = mesh_sizes(job, topology, mesh)
    abstract: AbstractMesh = needs.mesh_of_sizes(sizes)
    note = "arithmetic alone: no compiler for GPUs that are not here"
    why = WHY[job.is_step] if mesh == AUTO else "as asked" + (", for a step one of context" if job.is_step else "")
    return Row(job, topology, sizes, why, needs.estimate(job, abstract), needs.work(job, abstract), note=note)


def check(job: Job, topology: Topology, mesh: str) -> Row:
    """A job's row, compiled if there is a compiler and its weights and cache alone fit."""
    row = by_arithmetic(job, topology, mesh)
    if not topology.has_compiler:
        return row
    if row.needs.weights + row.needs.cache > topology.chip.memory:
        return dataclasses.replace(row, note="not compiled: weights and cache alone do not fit")
    try:
        compiled = compile_job(job, topology, row.sizes)
    except OutOfMemoryError as error:
        return _refused(row, str(error))
    return dataclasses.replace(row, needs=compiled.needs, compiled=compiled, note=f"compiled ({compiled.kernel})")


def _refused(row: Row, message: str) -> Row:
    """The row of a program for which the compiler found no room, with its first sentence; sizes stay arithmetic."""
    sentence = " ".join(message.split()).split(". ")[0].rstrip(".")
    return dataclasses.replace(row, is_refused=True, note=f"the compiler: {sentence[:QUOTED]}")


# --- Words ---


def describe(row: Row) -> list[str]:
    """The lines of a row, and of the topology that it names instead."""
    chip, parts = row.topology.chip, row.needs
    axes = ", ".join(f"{axis}={size}" for axis, size in row.sizes.items())
    idle = row.topology.num_devices - math.prod(row.sizes.values())
    sizes = {"weights": parts.weights, "cache": parts.cache, "temporaries": parts.temporaries, "tiles": parts.index}
    memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    lines = [
        f"{row.job.name} on {row.topology.name}: {row.verdict}",
        f"  mesh        {axes} ({row.why})" + (f"; {idle} devices stay idle" if idle else ""),
        f"  GB a device {memory}: {parts.total / 1e9:.2f} of {chip.memory / 1e9:.1f} ({row.note})",
        f"  estimates   {row.work.flops / 1e12:.3f} TFLOP a device, {_rate(chip.flops, 1e12, 'TFLOP')}; "
        f"at least {row.work.bytes / 1e9:.2f} GB read, {_rate(chip.bandwidth, 1e9, 'GB')}",
    ]
    if row.compiled:
        lines.append(f"  exchanges   {total(row.compiled.collectives)} (compiling took {row.compiled.seconds:.0f} s)")
    return lines + ([f"  {line}" for line in describe(row.least)] if row.least else [])


def _rate(rate: float | None, unit: float, name: str) -> str:
    return f"datasheet {rate / unit:.0f} {name}/s" if rate else "rate not known"


def cells(name: str, row: Row) -> list[str]:
    """The row of a Markdown table."""
    parts, chip = row.needs, row.topology.chip
    sizes = (f"{size / 1e9:.2f}" for size in (parts.weights, parts.cache, parts.temporaries, parts.index))
    work = [
        f"{number / unit:.3g}" + (f" ({rate / unit:.0f})" if rate else "")
        for number, rate, unit in ((row.work.flops, chip.flops, 1e12), (row.work.bytes, chip.bandwidth, 1e9))
    ]
    axes = " x ".join(str(row.sizes[axis]) for axis in AXES)
    exchanged = total(row.compiled.collectives).replace(" GB", "") if row.compiled else ""
    place = [name, row.topology.name, str(row.job.length), row.job.name, axes]
    return [*place, *sizes, f"{chip.memory / 1e9:.0f}", row.verdict, *work, exchanged, row.note]


# --- The command line ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", help=f"a model's shape: {', '.join(SHAPES)}")
    model.add_argument("--weights_dir", type=Path, help="a converted model, whose shape counts; no weights are loaded")
    parser.add_argument("--topology", required=True, help=f"devices, as v5e-8, v6e-64, v5p-32, h100-8; or {HERE}")
    parser.add_argument("--seq_len", type=int, required=True, help="tokens of a prefill, and of a step's cache")
    parser.add_argument("--mesh", default=AUTO, help=f"sizes of {', '.join(AXES)}, as data=1,context=4,model=8 (auto)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step of decoding (16)")
    parser.add_argument("--tile_size", type=int, default=TILE_SIZE, help=f"tokens in a key tile ({TILE_SIZE})")
    parser.add_argument("--top_k", type=int, help="key tiles kept per query tile and KV head")
    parser.add_argument("--density", type=float, help=f"instead: share of the causal key tiles kept ({DENSITY})")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    return parser.parse_args(argv)


def read_config(args: argparse.Namespace) -> tuple[str, LlamaConfig]:
    """The model's name and shape."""
    if args.weights_dir:
        manifest = read_manifest(args.weights_dir)
        return manifest.model, manifest.config
    if args.shape not in SHAPES:
        raise InputError(f"shape {quote(args.shape)}: expected one of {', '.join(SHAPES)}")
    return args.shape, SHAPES[args.shape]


def jobs(args: argparse.Namespace, config: LlamaConfig) -> Iterator[Job]:
    """Dense and sparse prefill, then dense and sparse steps."""
    for name in ("seq_len", "batch"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(args, name)}")
    density = DENSITY if args.top_k is None and args.density is None else args.density
    selection = Selection(args.tile_size, args.top_k, density)
    dense = freeze_schedule(None, config.num_hidden_layers, config.num_key_value_heads)
    for is_step in (False, True):
        for schedule in (dense, needs.sparse_schedule(config)):
            yield Job(config, schedule, selection, args.seq_len, args.batch if is_step else 1, is_step)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows as they come."""
    args = parse_args(argv)
    with exit_on_bad_input():
        if args.topology != HERE:
            use_compiler_alone()
        name, config = read_config(args)
        topology = topologies.find(args.topology)
        weights = needs.weights_bytes(config) / 1e9
        print(f"{name}: {weights:.2f} GB of weights in {jnp.dtype(DTYPE).name}, {args.seq_len} tokens", flush=True)
        rows = []
        for job in jobs(args, config):
            rows.append(plan(job, topology, args.mesh))
            print("\n".join(describe(rows[-1])), flush=True)
        if args.markdown:
            found = [row for row in rows for row in (row, row.least) if row]
            args.markdown.write_text(markdown(COLUMNS, [cells(name, row) for row in found]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
