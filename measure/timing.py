"""How long a run takes: attention alone, one layer of each kind, and a sweep over lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import attention
from attention.sharding import AXIS, ROWS, TILES, WHOLE, Layout, compile_ahead, first_device, place, shard
from kascade_core import attended_tiles, mean_density
from llama_model import LlamaModel
from measure import hosts
from measure.machine import free_memory, peak_memory, time_interleaved
from report.results import SweepRow


def compile_attention(model: LlamaModel, length: int, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Attention alone, ready to be timed: "dense", "selection" (an anchor's scoring and Top-K), "anchor", "reuse".

    Args:
      model: whose heads, selection, dtype and kernel are taken.
      length: tokens; queries, keys and values are random, and the reuse layer's tiles are the anchor's.
      mesh: whose devices share the work, as in a forward.
    """
    N, K, H = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    rng, layout = np.random.default_rng(0), Layout.of(length, model.selection.block, mesh.shape[AXIS])
    sizes = {"layout": layout, "kernel": model.kernel}
    choosing = sizes | {"selection": model.selection}

    def random(shape: tuple[int, ...], spec: Any) -> jax.Array:
        return place(rng.standard_normal(shape, np.float32).astype(model.dtype), mesh, spec)

    def ready(function: Callable[..., Any], args: Sequence[jax.Array], specs: Any, out: Any) -> Callable[[], Any]:
        return partial(compile_ahead(shard(function, mesh, specs, out), args, mesh), *args)

    q_BTNH, k_BKHS = random((1, layout.padded, N, H), ROWS), random((1, K, H, layout.padded), WHOLE)
    qkv, specs = (q_BTNH, k_BKHS, random((1, K, layout.padded, H), WHOLE)), (ROWS, WHOLE, WHOLE)
    selecting = ready(partial(attention.choose, **choosing), qkv[:2], specs[:2], TILES)
    return {
        "dense": ready(partial(attention.dense, **sizes), qkv, specs, ROWS),
        "selection": selecting,
        "anchor": ready(partial(attention.anchor, **choosing), qkv, specs, (ROWS, TILES)),
        "reuse": ready(partial(attention.reuse, **choosing), (*qkv, selecting()), (*specs, TILES), ROWS),
    }


def measure_length(
    models: Mapping[str, LlamaModel], params: Any, ids: jax.Array, length: int, mesh: Mesh, n_runs: int
) -> SweepRow:
    """Times {"dense", "sparse"} on `length` tokens: those of ids [1, T], repeated where they are too few.

    Nothing is run where the compiled programs say that they need more memory than there is.
    """
    shape = jax.ShapeDtypeStruct((1, length), ids.dtype)
    forwards = {name: model.compile(params, shape, mesh) for name, model in models.items()}
    device = first_device(mesh)
    needed = hosts.most(max(_working_memory(forward.program, mesh) for forward in forwards.values()))
    free = free_memory(device)
    if free is not None and needed > free:
        return SweepRow(
            length, skipped=f"needs {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} are free"
        )
    ids = jnp.resize(ids, (1, length))
    attended = attended_tiles(models["sparse"].schedule, forwards["sparse"](params, ids).tiles)
    density = mean_density(attended, models["sparse"].selection)
    samples = time_interleaved({name: partial(forward, params, ids) for name, forward in forwards.items()}, n_runs)
    return SweepRow(length, samples["dense"], samples["sparse"], density, peak_memory(device))


def _working_memory(program: Any, mesh: Mesh) -> int:
    """Bytes that a compiled program takes besides its arguments, on the one memory that a CPU's devices share."""
    stats = program.memory_analysis()
    needed = stats.temp_size_in_bytes + stats.output_size_in_bytes
    return needed * (len(mesh.local_devices) if first_device(mesh).platform == "cpu" else 1)
