"""Do the TPU programs compile, fit and skip work? Compiled and counted, without a TPU: nothing is timed.

The TPU's compiler (the package libtpu) runs on any Linux machine. Each row is one program for one chip of a topology:
a layer's dense, anchor or reuse attention, or a whole block, of a LLaMA's shape, in bfloat16, tiles of 128, Top-K 10 %
of the tiles. FLOPs are those of the matrix products in the traced program, grid steps multiplied out.

  python bench/compile_tpu.py --markdown table.md        # needs: pip install "jax[tpu]"
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler alone is used: no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kascade_layout import AXIS, Layout, tile_count
from tqdm import tqdm

import kascade_kernels as kernels
from kascade_core import ANCHOR, REUSE, LayerPlan, Selection, compile_forward
from llama_model import Block, LlamaConfig, LlamaModel, rope_table

TOPOLOGIES = {"v5e": ("v5e:2x2", 16e9), "v6e": ("v6e:2x2", 32e9)}  # name, bytes of HBM a chip
LLAMA3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES = {
    "llama3.2-1b": LlamaConfig(
        **LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
    ),
    "llama3.1-8b": LlamaConfig(**LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128),
}
LENGTHS = (2048, 8192, 32768, 131072)
ATTENTION = ("dense", "anchor", "reuse")
KINDS = (*ATTENTION, "block")
TILE = 128


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled program."""

    topology: str
    shape: str
    length: int
    kind: str
    hbm_bytes: int  # arguments, results and temporaries
    tflops: float  # of matrix products
    largest: int  # elements of the largest array in the compiled program


def select(length: int, share: float = 0.1) -> Selection:
    """Top-K a share of the tiles."""
    return Selection(tile_size=TILE, top_k=max(1, int(tile_count(length, TILE) * share)))


def mesh_of(topology: str, chips: int = 1) -> Mesh:
    """Chips of a topology that is not there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[topology][0]).devices
    return Mesh(np.array(devices[:chips]), (AXIS,))


def program(kind: str, config: LlamaConfig, length: int, selection: Selection) -> tuple[Callable[..., Any], list[Any]]:
    """A function, and the shapes of its arguments."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    where = {"implementation": "pallas_tpu"}
    bf16 = jnp.bfloat16
    q, k, v = ((1, length, N, H), bf16), ((1, K, H, length), bf16), ((1, K, length, H), bf16)
    tiles = (1, K, tile_count(length, selection.query_tile), min(selection.top_k, tile_count(length, TILE))), jnp.int32
    if kind == "dense":
        return lambda q, k, v: kernels.dense_attention(q, k, v, **where), [q, k, v]
    if kind == "anchor":
        return lambda q, k, v: kernels.anchor_attention(q, k, v, selection=selection, **where), [q, k, v]
    if kind == "reuse":
        return lambda q, k, v, t: kernels.reuse_attention(q, k, v, t, selection=selection, **where), [q, k, v, tiles]
    plan = LayerPlan(REUSE, 1, tuple(range(K)))
    block = Block(config, plan, selection, False, bf16, "pallas_tpu")
    layout = Layout.of(length, selection.block)
    x = (1, length, config.hidden_size), jnp.float32

    def run(params: Any, x: jax.Array, tiles: jax.Array) -> jax.Array:
        return block.apply(params, x, rope_table(config, jnp.arange(length)), tiles, layout)[0]

    shapes = jax.eval_shape(
        lambda x, t: block.init(jax.random.key(0), x, rope_table(config, jnp.arange(length)), t, layout),
        *(jax.ShapeDtypeStruct(*a) for a in (x, tiles)),
    )
    params = jax.tree.map(lambda leaf: (leaf.shape, bf16 if leaf.ndim > 1 else jnp.float32), shapes)
    return run, [params, x, tiles]


def compile_row(topology: str, shape: str, length: int, kind: str, share: float = 0.1) -> Row:
    """Compiles one program for one chip."""
    function, args = program(kind, SHAPES[shape], length, select(length, share))
    where = NamedSharding(mesh_of(topology), PartitionSpec())
    is_shape = lambda leaf: isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[0], tuple)  # noqa: E731
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(*a, sharding=where), args, is_leaf=is_shape)
    compiled = jax.jit(function).lower(*args).compile()
    flops = count_flops(jax.make_jaxpr(function)(*args).jaxpr)
    return Row(topology, shape, length, kind, hbm_bytes(compiled), flops / 1e12, largest_array(compiled.as_text()))


def compile_model(topology: str, shape: str, length: int, chips: int = 1) -> Row:
    """Compiles a whole model's forward with its loss: one dense layer, an anchor in every fourth, the rest reuse."""
    config, mesh = SHAPES[shape], mesh_of(topology, chips)
    schedule = {i: (ANCHOR, None) if i % 4 == 1 else (REUSE, i - (i - 1) % 4) for i in range(config.num_hidden_layers)}
    selection = select(length)
    model = LlamaModel(
        config, {**schedule, 0: ("DENSE", None)}, TILE, selection.top_k, dtype=jnp.bfloat16, kernel="pallas_tpu"
    )
    where = NamedSharding(mesh, PartitionSpec())
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where)
    init = lambda: LlamaModel(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))  # noqa: E731
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.ndim > 1 else jnp.float32, sharding=where),
        {"params": jax.eval_shape(init)["params"]},
    )
    compiled, _ = compile_forward(model, params, ids, mesh)
    return Row(topology, shape, length, "model", hbm_bytes(compiled), 0.0, largest_array(compiled.as_text()))


def hbm_bytes(compiled: Any) -> int:
    """What a program takes of a chip's memory while it runs."""
    stats = compiled.memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes


def largest_array(text: str) -> int:
    """Elements of the largest array that a compiled program's text names."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))


def count_flops(jaxpr: Any) -> int:
    """Of the matrix products, loops and kernel grids multiplied out; of a condition's branches the most."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _), (a, _) = eqn.params["dimension_numbers"], eqn.invars
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(a.aval.shape[i] for i in contracted)
        elif eqn.primitive.name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * count_flops(eqn.params["jaxpr"])
        elif eqn.primitive.name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for inner in jaxprs_in_params(eqn.params):
                total += times * count_flops(inner)
    return total


def causal_flops(config: LlamaConfig, length: int) -> int:
    """Those of dense causal attention: two products over half of the square."""
    return 2 * config.num_attention_heads * config.head_dim * length * (length + 1)


def format_rows(rows: Sequence[Row]) -> str:
    """A line of the Markdown table: one program, compiled for every topology."""
    row = rows[0]
    share = ""
    if row.kind in ATTENTION:
        share = f" ({row.tflops * 1e12 / causal_flops(SHAPES[row.shape], row.length):.2f})"
    sizes = " | ".join(f"{row.hbm_bytes / 1e9:.2f}" for row in rows)
    return f"| {row.shape} | {row.length} | {row.kind} | {sizes} | {row.tflops:.3f}{share} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    sizes = " | ".join(f"HBM, GB, {name}" for name in TOPOLOGIES)
    lines = [f"| shape | tokens | program | {sizes} | TFLOP (of dense causal attention) |", "|---" * 6 + "|"]
    print("\n".join(lines))
    for shape, length, kind in tqdm([*itertools.product(SHAPES, LENGTHS, KINDS)], disable=None):
        lines.append(format_rows([compile_row(name, shape, length, kind) for name in TOPOLOGIES]))
        print(lines[-1], flush=True)
    for chips in (1, 4):
        model = compile_model("v5e", "llama3.2-1b", 8192, chips)
        lines.append(f"\nThe whole llama3.2-1b, 8192 tokens, on {chips} v5e: {model.hbm_bytes / 1e9:.2f} GB a chip.")
        print(lines[-1])
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
