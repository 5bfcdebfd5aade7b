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
from attention.model_axis import ModelShards
from attention.sharding import (
    CONTEXT,
    HEAD_ROWS,
    HEADS,
    TILES,
    Layout,
    batch_spec,
    compile_ahead,
    first_device,
    place,
    shard,
)
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
    held = ModelShards.of(model.config, mesh).held
    N, K, H = held.num_attention_heads, held.num_key_value_heads, held.head_dim
    rng, layout = np.random.default_rng(0), Layout.of(length, model.selection.block, mesh.shape[CONTEXT])
    rows, heads, tiles = (batch_spec(spec, 1, mesh) for spec in (HEAD_ROWS, HEADS, TILES))
    sizes = {"layout": layout, "kernel": model.kernel}
    choosing = sizes | {"selection": model.selection}

    def random(shape: tuple[int, ...], spec: Any) -> jax.Array:
        return place(rng.standard_normal(shape, np.float32).astype(model.dtype), mesh, spec)

    def ready(function: Callable[..., Any], args: Sequence[jax.Array], specs: Any, out: Any) -> Callable[[], Any]:
        return partial(compile_ahead(shard(function, mesh, specs, out), args, mesh), *args)

    q_BTNH, k_BKHS = random((1, layout.padded, N, H), rows), random((1, K, H, layout.padded), heads)
    qkv, specs = (q_BTNH, k_BKHS, random((1, K, layout.padded, H), heads)), (rows, heads, heads)
    selecting = ready(partial(attention.choose, **choosing), qkv[:2], specs[:2], tiles)
    return {
        "dense": ready(partial(attention.dense, **sizes), qkv, specs, rows),
        "selection": selecting,
        "anchor": ready(partial(attention.anchor, **choosing), qkv, specs, (rows, tiles)),
        "reuse": ready(partial(attention.reuse, **choosing), (*qkv, selecting()), (*specs, tiles), rows),
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
    needed = hosts.most(max(forward.working_bytes for forward in forwards.values()))
    needed *= len(mesh.local_devices) if device.platform == "cpu" else 1  # a CPU's devices share one memory
    free = free_memory(device)
    if free is not None and needed > free:
        return SweepRow(
            length, skipped=f"needs {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} are free"
        )
    ids = jnp.resize(ids, (1, length))
    attended = attended_tiles(models["sparse"].schedule, forwards["sparse"](params, ids).fetch_tiles())
    density = mean_density(attended, models["sparse"].selection)
    samples = time_interleaved({name: partial(forward, params, ids) for name, forward in forwards.items()}, n_runs)
    return SweepRow(length, samples["dense"], samples["sparse"], density, peak_memory(device))
