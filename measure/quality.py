"""How a sparse model's predictions differ from the dense one's: token by token, without [T, V] in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from attention.model_axis import ModelShards
from attention.sharding import CONTEXT, DATA, fetch, jit, on_host_or_shared, pad_axis, shard, whole
from kascade_core import tile_count
from llama_model import Comparison, LlamaModel
from measure.settings import SHORT_CONTEXT
from network.programs import Forward, Output
from report.results import LongContext


def run_windows(forward: Forward, params: Any, windows: Sequence[jax.Array], keep_keys: bool = False) -> list[Output]:
    """The forward of each window, int32 [1, T], as many at once as it takes.

    The outputs are on the host, but for streams that several processes share, and for keys and values, which are left
    out unless `keep_keys`.
    """
    outputs: list[Output] = []
    for i in range(0, len(windows), forward.batch):
        ids_BT = jnp.concatenate(windows[i : i + forward.batch])
        output = forward(params, ids_BT)
        together = Output(fetch(output.nll), output.fetch_tiles(), on_host_or_shared(output.stream), None)
        if keep_keys:
            together = together._replace(keys_values=output.keys_values)
        outputs += [jax.tree.map(lambda x, b=b: x[b : b + 1], together) for b in range(len(ids_BT))]
    return outputs


def compile_comparison(model: LlamaModel, mesh: Mesh | None) -> Callable[..., Comparison]:
    """f(params, dense_BTD, sparse_BTD, next_ids_BT) -> `LlamaModel.compare_streams`, its rows shared by the devices.

    It is compiled when it first sees a length.
    """
    num_shards = mesh.shape[DATA] * mesh.shape[CONTEXT] if mesh else 1
    shards = ModelShards.of(model.config, mesh)

    def local(params: Any, dense_BTD: jax.Array, sparse_BTD: jax.Array, next_BT: jax.Array) -> Comparison:
        return model.clone(shards=shards).apply(params, dense_BTD, sparse_BTD, next_BT, method="compare_streams")

    rows = PartitionSpec(None, (DATA, CONTEXT))
    sharded = shard(local, mesh, (shards.specs(), rows, rows, rows), rows)

    def compare(params: Any, *arrays: jax.Array) -> Comparison:
        rows = arrays[0].shape[1]
        padded = [pad_axis(x, 1, tile_count(rows, num_shards) * num_shards) for x in arrays]
        return whole(jax.tree.map(lambda x: x[:, :rows], sharded(params, *padded)), mesh)

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


# --- Tokens that need a long context (LongPPL, arXiv 2410.23771) ---

STRIDE = 128  # tokens whose loss with a short context comes from one forward, so that its length varies by as many
LEAST_GAIN = 2.0  # nats that the long context must save
LARGEST_LOSS = 2.0  # nats that may be left with it


def short_contexts(ids_BT: jax.Array, prefix: int) -> dict[int, jax.Array]:
    """{place of its first token: a piece of the window}, SHORT_CONTEXT + STRIDE tokens after the window's prefix."""
    ids_T, reach = np.asarray(ids_BT)[0], SHORT_CONTEXT + STRIDE
    starts = [*range(prefix + STRIDE, ids_T.size - reach, STRIDE), ids_T.size - reach]
    return {start: jnp.asarray([[*ids_T[:prefix], *ids_T[start : start + reach]]], jnp.int32) for start in starts}


def short_context_nll(forward: Forward, params: Any, ids_BT: jax.Array, prefix: int) -> np.ndarray:
    """Losses float64 [T - 1] of a window's tokens with the SHORT_CONTEXT to SHORT_CONTEXT + STRIDE - 1 tokens before.

    -inf where there are no more tokens before anyway. `prefix` tokens begin every context.
    """
    nll = np.full(ids_BT.size - 1, -np.inf)
    for start, piece in short_contexts(ids_BT, prefix).items():
        last = start + SHORT_CONTEXT + STRIDE - 1
        nll[last - STRIDE : last] = np.asarray(forward(params, piece).nll)[0, -STRIDE:]
    return nll


def long_context_loss(
    model: LlamaModel,
    params: Any,
    windows: Sequence[jax.Array],
    compared: Sequence[Comparison],
    prefix: int,
    mesh: Mesh | None = None,
) -> LongContext:
    """Both arms' losses on the tokens that need the long context; the dense model decides which those are.

    Args:
      model: dense.
      params: its variables.
      windows: int32 ids [1, T], T at least 2 SHORT_CONTEXT.
      compared: what `compare` returned for them.
      prefix: tokens that begin every window.
      mesh: the run's devices.
    """
    forward = model.compile(params, jax.ShapeDtypeStruct((1, prefix + SHORT_CONTEXT + STRIDE), jnp.int32), mesh)
    dense, sparse = [], []
    for ids_BT, window in zip(windows, compared, strict=True):
        gain = short_context_nll(forward, params, ids_BT, prefix) - window.dense_nll
        needs = (gain > LEAST_GAIN) & (window.dense_nll < LARGEST_LOSS)
        dense.append(window.dense_nll[needs])
        sparse.append(window.sparse_nll[needs])
    return LongContext(np.concatenate(dense), np.concatenate(sparse))


def _row(values_BT: np.ndarray) -> np.ndarray:
    return values_BT[0] if values_BT.dtype == bool else values_BT[0].astype(np.float64)
