"""Do the TPU programs compile, fit and skip work? Compiled and counted, without a TPU: nothing is timed.

The TPU's compiler (the package libtpu) runs on any Linux machine. Each row is one program for one chip of a topology:
a layer's dense, anchor or reuse attention, or a whole block, of a LLaMA's shape, in bfloat16, with tiles of 128 and
Top-K 10 % of the tiles; then one layer's step of decoding, with the cache that it reads. FLOPs are those of the matrix
products in the traced program, times the steps of loops and grids that they are in. A second table has the default
flags, tiles of 16 and Top-K 12: attention of one layer, the vector memory of each kernel, and the whole model.

  python -m bench.compile_tpu --markdown table.md        # needs: pip install -r bench/requirements-tpu.txt
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

import attention
from attention import decode
from attention.model_axis import ModelShards
from attention.sharding import WHOLE, Layout, compile_ahead, device_bytes, make_mesh
from bench.needs import sparse_schedule
from errors import UnsupportedError
from kascade_core import REUSE, LayerPlan, Selection, tile_count
from llama_model import LlamaModel
from network.layers import Block, rope_table
from network.programs import Forward
from weights.config import LlamaConfig

TOPOLOGIES = {"v5e": ("v5e:2x2", 16e9), "v6e": ("v6e:2x2", 32e9)}  # name, bytes of HBM a chip
LLAMA3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES = {
    "llama3.2-1b": LlamaConfig(
        **LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
    ),
    "llama3.2-3b": LlamaConfig(
        **LLAMA3 | {"num_attention_heads": 24},
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama3.1-8b": LlamaConfig(**LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128),
    "llama3.1-70b": LlamaConfig(
        **LLAMA3 | {"num_attention_heads": 64},
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        head_dim=128,
    ),
}
TABLE = ("llama3.2-1b", "llama3.1-8b")  # shapes of the table
LENGTHS = (2048, 8192, 32768, 131072)
ATTENTION = ("dense", "anchor", "reuse")
KINDS = (*ATTENTION, "block")
TILE = 128
STEPS = ("dense", "anchor", "reuse")  # of decoding
DEPTHS, BATCHES = (8192, 32768, 131072), (1, 16)
GUIDE = Selection()  # the default flags' tiles of 16 and Top-K 12
GUIDE_LENGTHS = (512, 2048, 8192, 32768, 131072)
GUIDE_MODELS = (512, 2048)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One compiled program."""

    topology: str
    shape: str
    length: int
    kind: str
    hbm_bytes: int  # arguments, results and temporaries
    tflops: float  # of matrix products
    largest: int  # elements of the largest array in the compiled program
    temporaries: int  # bytes of HBM
    vmem_bytes: dict[str, int]  # of a core's vector memory, by the kernel's name


def use_compiler_alone() -> None:
    """JAX looks for no TPU. To be called before JAX's first computation."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several processes may compile at a time
    jax.config.update("jax_platforms", "cpu")


def select(length: int, share: float = 0.1) -> Selection:
    """Top-K a share of the tiles."""
    return Selection(tile_size=TILE, top_k=max(1, int(tile_count(length, TILE) * share)), sink_tiles=0)


def mesh_of(topology: str, chips: int = 1) -> Mesh:
    """Chips of a topology that this machine does not have."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[topology][0]).devices
    return make_mesh(devices[:chips])


def program(kind: str, config: LlamaConfig, length: int, selection: Selection) -> tuple[Callable[..., Any], list[Any]]:
    """A function, and the shapes of its arguments."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    qkv = [shape((1, length, N, H)), shape((1, K, H, length)), shape((1, K, length, H))]
    slots = selection.slots(tile_count(length, selection.tile_size))
    tiles_BKQC = shape((1, K, tile_count(length, selection.query_tile), slots), dtype=jnp.int32)
    if kind == "dense":
        return partial(attention.dense, kernel="pallas_tpu"), qkv
    if kind == "anchor":
        return partial(attention.anchor, selection=selection, kernel="pallas_tpu"), qkv
    if kind == "reuse":
        return partial(attention.reuse, selection=selection, kernel="pallas_tpu"), [*qkv, tiles_BKQC]
    x_BTD = shape((1, length, config.hidden_size), dtype=jnp.float32)
    plan = LayerPlan(REUSE, 1, tuple(range(K)))
    block = Block(config, plan, selection, calibrate=False, dtype=jnp.bfloat16, kernel="pallas_tpu")
    layout = Layout.of(length, selection.block)

    def layer(block: Block, x_BTD: jax.Array, tiles_BKQC: jax.Array) -> jax.Array:
        stream, *_ = block.attend(x_BTD, rope_table(config, jnp.arange(length)[None]), tiles_BKQC, layout)
        return block.feed(stream)

    params = jax.eval_shape(partial(block.init, jax.random.key(0), method=layer), x_BTD, tiles_BKQC)
    return partial(block.apply, method=layer), [parameter_shapes(params), x_BTD, tiles_BKQC]


def parameter_shapes(params: Any) -> Any:
    """The parameters' shapes; matrices are bfloat16."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.ndim > 1 else jnp.float32), params
    )


def on_every_chip(shapes: Any, mesh: Mesh) -> Any:
    """The same shapes, of arrays that every chip of the mesh holds whole."""
    sharding = NamedSharding(mesh, WHOLE)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def compile_row(
    topology: str, shape: str, length: int, kind: str, selection: Selection | None = None
) -> CompiledProgram:
    """Compiles one program for one chip; without a selection, with tiles of 128 and Top-K 10 % of them."""
    mesh = mesh_of(topology)
    function, args = program(kind, SHAPES[shape], length, selection or select(length))
    args = on_every_chip(args, mesh)
    compiled = compile_ahead(function, args, mesh)
    flops = count_flops(jax.make_jaxpr(function)(*args).jaxpr)
    return describe(compiled, topology, shape, length, kind, flops / 1e12)


def describe(compiled: Any, topology: str, shape: str, length: int, kind: str, tflops: float = 0.0) -> CompiledProgram:
    """What the compiler says of a program."""
    text, temporaries = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    return CompiledProgram(
        topology, shape, length, kind, hbm_bytes(compiled), tflops, largest_array(text), temporaries, vmem_bytes(text)
    )


def step_program(
    kind: str, config: LlamaConfig, depth: int, batch: int, selection: Selection, kernel: str
) -> tuple[Callable[..., Any], list[Any]]:
    """A step of decoding, and the shapes of its arguments: the new tokens' queries, the cache, and where it ends."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_BNH = jax.ShapeDtypeStruct((batch, N, H), jnp.bfloat16)
    keys = [jax.ShapeDtypeStruct((batch * K, depth, H), jnp.bfloat16)] * 2
    positions_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tiles_BK1C = jax.ShapeDtypeStruct((batch, K, 1, selection.slots(tile_count(depth, TILE))), jnp.int32)

    def anchor(q_BNH: jax.Array, k_ZSH: jax.Array, v_ZSH: jax.Array, positions_B: jax.Array) -> tuple[Any, Any]:
        tiles_BK1C, products_ZSG = decode.choose_step(q_BNH, k_ZSH, positions_B, selection)
        return decode.anchor_step(products_ZSG, v_ZSH, positions_B, tiles_BK1C, selection), tiles_BK1C

    args = [q_BNH, *keys, positions_B]
    if kind == "dense":
        return partial(decode.dense_step, kernel=kernel), args
    if kind == "anchor":
        return anchor, args
    return partial(decode.reuse_step, selection=selection, kernel=kernel), [*args, tiles_BK1C]


def step_kernel(config: LlamaConfig, depth: int, batch: int, selection: Selection) -> str:
    """What a run would take: JAX's paged attention where it takes the sizes, otherwise XLA's gather."""
    try:
        decode.check(
            "pallas_tpu", selection, (batch * config.num_key_value_heads, depth, config.head_dim), jnp.bfloat16
        )
    except UnsupportedError:
        return "xla"
    return "pallas_tpu"


def compile_step(topology: str, shape: str, depth: int, batch: int, kind: str) -> CompiledProgram:
    """Compiles one layer's step of decoding for one chip."""
    mesh, config, selection = mesh_of(topology), SHAPES[shape], select(depth)
    kernel = step_kernel(config, depth, batch, selection)
    function, args = step_program(kind, config, depth, batch, selection, kernel)
    compiled = compile_ahead(function, on_every_chip(args, mesh), mesh)
    name = f"{kind} step, batch {batch}, {'xla' if kind == 'anchor' else kernel}"
    return describe(compiled, topology, shape, depth, name)


def cache_bytes(config: LlamaConfig, depth: int, batch: int) -> int:
    """Of one layer's keys and values, bfloat16."""
    return 2 * 2 * batch * config.num_key_value_heads * config.head_dim * depth


def compile_model(
    topology: str, shape: str, length: int, chips: int = 1, selection: Selection | None = None
) -> CompiledProgram:
    """Compiles a whole model's forward with its loss: one dense layer, an anchor in every fourth, the rest reuse."""
    config, mesh = SHAPES[shape], mesh_of(topology, chips)
    selection = selection or select(length)
    model = LlamaModel(config, sparse_schedule(config), selection, dtype=jnp.bfloat16, kernel="pallas_tpu")
    ids = on_every_chip(jax.ShapeDtypeStruct((1, length), jnp.int32), mesh)
    params = ModelShards.of(config, mesh).shapes(mesh, jnp.bfloat16)
    return describe_forward(model.compile(params, ids, mesh), params, topology, shape, length)


def describe_forward(forward: Forward, params: Any, topology: str, shape: str, length: int) -> CompiledProgram:
    """What the compiler says of all of a model's programs together."""
    texts = [program.as_text() for program in forward.programs]
    vmem = {name: size for text in texts for name, size in vmem_bytes(text).items()}
    temporaries = max(program.memory_analysis().temp_size_in_bytes for program in forward.programs)
    needed = device_bytes(params) + forward.working_bytes
    return CompiledProgram(
        topology, shape, length, "model", needed, 0.0, max(map(largest_array, texts)), temporaries, vmem
    )


def hbm_bytes(compiled: Any) -> int:
    """Bytes of a chip's memory that a program needs while it runs."""
    stats = compiled.memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def largest_array(text: str) -> int:
    """Elements of the largest array that a compiled program's text names."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))


KERNEL = re.compile(
    r"%(?P<name>kascade_[a-z_]+)[.\d]* = .*"
    r'"scoped_memory_configs":\[{"memory_space":"1","offset":"(?P<start>\d+)".*'
    r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(?P<end>\d+)"'
)


def vmem_bytes(text: str) -> dict[str, int]:
    """By the name of each kernel of ours in a compiled program's text: the vector memory that it takes itself.

    Arrays that XLA puts into vector memory for it, as it does while they are small, are not counted.
    """
    return {found["name"]: int(found["end"]) - int(found["start"]) for found in KERNEL.finditer(text)}


def count_flops(jaxpr: Any) -> int:
    """Of the matrix products, times the steps of loops and kernel grids; of a condition the branch with the most."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), (a, _) = eqn.params["dimension_numbers"], eqn.invars
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(a.aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * count_flops(eqn.params["jaxpr"])
        elif eqn.primitive.name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in _branches(eqn.params))
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for inner in jaxprs_in_params(eqn.params):
                total += times * count_flops(inner)
    return total


def _branches(params: Mapping[str, Any]) -> Sequence[Any]:
    """Of a condition; where the platform decides, the branch that a TPU takes."""
    branches, platforms = params["branches"], params.get("branches_platforms")
    if platforms is None:
        return branches
    own = [i for i, names in enumerate(platforms) if names and "tpu" in names]
    return [branches[own[0] if own else platforms.index(None)]]


def causal_flops(config: LlamaConfig, length: int) -> int:
    """Of dense causal attention: two products over half of the square."""
    return 2 * config.num_attention_heads * config.head_dim * length * (length + 1)


def format_row(rows: Sequence[CompiledProgram]) -> str:
    """A line of the Markdown table: one program, compiled for every topology."""
    row = rows[0]
    share = ""
    if row.kind in ATTENTION:
        share = f" ({row.tflops * 1e12 / causal_flops(SHAPES[row.shape], row.length):.2f})"
    sizes = " | ".join(f"{row.hbm_bytes / 1e9:.2f}" for row in rows)
    flops = f"{row.tflops:.3f}{share}" if row.tflops else ""
    return f"| {row.shape} | {row.length} | {row.kind} | {sizes} | {flops} |"


def format_guide_row(rows: Sequence[CompiledProgram]) -> str:
    """A line of the table of the default flags: one program, compiled for every topology."""
    cells = []
    for row in rows:
        vmem = ", ".join(f"{size / 2**20:.2f}" for size in row.vmem_bytes.values())
        cells += [f"{row.hbm_bytes / 1e9:.3f} ({row.temporaries / 1e9:.3f})", vmem]
    return f"| {rows[0].length} | {rows[0].kind} | {' | '.join(cells)} |"


def guide_table() -> Iterator[str]:
    """The lines of the table of the default flags."""
    name = "llama3.2-1b"
    sizes = " | ".join(f"HBM (temporaries), GB, {chip} | VMEM, MiB" for chip in TOPOLOGIES)
    yield f"\n| tokens | program | {sizes} |"
    yield "|---" * (2 + 2 * len(TOPOLOGIES)) + "|"
    for length, kind in tqdm([*itertools.product(GUIDE_LENGTHS, ATTENTION)], disable=None):
        yield format_guide_row([compile_row(chip, name, length, kind, GUIDE) for chip in TOPOLOGIES])
    for length in GUIDE_MODELS:
        yield format_guide_row([compile_model(chip, name, length, selection=GUIDE) for chip in TOPOLOGIES])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    use_compiler_alone()
    sizes = " | ".join(f"HBM, GB, {name}" for name in TOPOLOGIES)
    lines = [f"| shape | tokens | program | {sizes} | TFLOP (of dense causal attention) |", "|---" * 6 + "|"]
    print("\n".join(lines))
    for shape, length, kind in tqdm([*itertools.product(TABLE, LENGTHS, KINDS)], disable=None):
        lines.append(format_row([compile_row(name, shape, length, kind) for name in TOPOLOGIES]))
        print(lines[-1], flush=True)
    for shape, depth, batch, kind in tqdm([*itertools.product(TABLE, DEPTHS, BATCHES, STEPS)], disable=None):
        lines.append(format_row([compile_step(name, shape, depth, batch, kind) for name in TOPOLOGIES]))
        print(lines[-1], flush=True)
    for chips in (1, 4):
        model = compile_model("v5e", "llama3.2-1b", 8192, chips)
        lines.append(f"\nThe whole llama3.2-1b, 8192 tokens, on {chips} v5e: {model.hbm_bytes / 1e9:.2f} GB a chip.")
        print(lines[-1])
    for line in guide_table():
        lines.append(line)
        print(line, flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
