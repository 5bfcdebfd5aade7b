"""How a sparse model's predictions differ from the dense one's: token by token, without [T, V] in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attention.sharding import ROWS, WHOLE, jit, pad_axis, shard
from kascade_core import tile_count
from llama_model import Comparison, Forward, LlamaModel, Output


def run_windows(forward: Forward, params: Any, windows: Sequence[jax.Array]) -> list[Output]:
    """The forward of each window, int32 [1, T], one after another; the outputs are on the host."""
    return [jax.device_get(forward(params, ids_BT)) for ids_BT in windows]


def compile_comparison(model: LlamaModel, mesh: Mesh | None) -> Callable[..., Comparison]:
    """f(params, dense_BTD, sparse_BTD, next_ids_BT) -> `LlamaModel.compare_streams`, its rows shared by the devices.

    It is compiled when it first sees a length.
    """
    num_shards = mesh.size if mesh else 1

    def local(params: Any, dense_BTD: jax.Array, sparse_BTD: jax.Array, next_BT: jax.Array) -> Comparison:
        return model.apply(params, dense_BTD, sparse_BTD, next_BT, method="compare_streams")

    sharded = shard(local, mesh, (WHOLE, ROWS, ROWS, ROWS), ROWS)

    def compare(params: Any, *arrays: jax.Array) -> Comparison:
        rows = arrays[0].shape[1]
        padded = [pad_axis(x, 1, tile_count(rows, num_shards) * num_shards) for x in arrays]
        return jax.tree.map(lambda x: x[:, :rows], sharded(params, *padded))

    return jit(compare, mesh)


def compare(
    model: LlamaModel,
    params: Any,
    windows: Sequence[jax.Array],
    dense: Sequence[Output],
    sparse: Sequence[Output],
    mesh: Mesh | None = None,
) -> list[Comparison]:
    """What each token of every window loses, and how its prediction differs.

    Args:
      model: whose output matrix and dtype the two have in common.
      params: its variables.
      windows: int32 ids [1, T].
      dense, sparse: what `run_windows` returned for them.
      mesh: the run's devices.

    Returns:
      For each window float64 [T - 1] (and bool), on the host.
    """
    program, compared = compile_comparison(model, mesh), []
    for ids_BT, a, b in zip(windows, dense, sparse, strict=True):
        result = jax.device_get(program(params, a.stream[:, :-1], b.stream[:, :-1], ids_BT[:, 1:]))
        compared.append(Comparison(*(_row(values) for values in result)))
    return compared


def _row(values_BT: np.ndarray) -> np.ndarray:
    return values_BT[0] if values_BT.dtype == bool else values_BT[0].astype(np.float64)
