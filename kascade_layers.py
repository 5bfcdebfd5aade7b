"""A model run layer by layer from the host: any rule may name a layer's tiles, and nothing is compiled anew for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kascade_core import DENSE, REUSE, LayerPlan
from kascade_kernels import matmul
from kascade_layout import AXIS, Layout, tile_count
from llama_model import Block, LlamaModel, rms_norm, rope_table

ROWS = 32  # of logits at a time: [ROWS, V] stays near the caches


class LayerRunner:
    """Runs a model's layers one by one from the host: a schedule is data here, and nothing is compiled anew for it.

    Arrays are in the order of the sequence: x_BTD float32, scores_BKQP float32, tiles_BKQC int32, with B = 1.
    """

    def __init__(self, model: LlamaModel, params: Any, length: int, mesh: Mesh) -> None:
        self.config, self.selection, self.dtype = model.config, model.selection, model.dtype
        self.params = params["params"]
        self.length, self.mesh = length, mesh
        self.num_query_tiles = tile_count(length, self.selection.query_tile)
        self.num_key_tiles = tile_count(length, self.selection.tile_size)
        self.layout = Layout.of(length, self.selection.block, mesh.shape[AXIS])
        self._dense = self._compiled(partial(self._block, DENSE), 1, 1)
        self._sparse = self._compiled(partial(self._block, REUSE), 2, 1)
        self._attend = self._compiled(partial(self._block, DENSE, method="attend"), 1, 1)
        self._score = self._compiled(self._score_block, 1, 2)
        self._queries_and_keys = jax.jit(self._project)
        rows, whole = PartitionSpec(AXIS), PartitionSpec()
        self._compare = jax.jit(
            jax.shard_map(
                self._compare_rows,
                mesh=mesh,
                in_specs=(whole, whole, rows, rows, rows),
                out_specs=rows,
                check_vma=False,
            )
        )

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """The residual stream before layer 0."""
        return self.params["tok_embeddings"][ids_BT].astype(jnp.float32)

    def dense(self, layer: int, x_BTD: jax.Array) -> jax.Array:
        """The residual stream after a layer that attends to everything."""
        return self._dense(self.params[f"layer_{layer}"], x_BTD)

    def sparse(self, layer: int, x_BTD: jax.Array, tiles_BKQC: jax.Array) -> jax.Array:
        """The residual stream after a layer that attends to these tiles."""
        return self._sparse(self.params[f"layer_{layer}"], x_BTD, tiles_BKQC)

    def importance(self, layer: int, x_BTD: jax.Array) -> float:
        """1 - cosine of the residual stream before and after the layer's attention is added, mean over tokens."""
        after_BTD = self._attend(self.params[f"layer_{layer}"], x_BTD)
        norms_BT = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(after_BTD, axis=-1)
        return float(1 - jnp.mean((x_BTD * after_BTD).sum(-1) / norms_BT))

    def scores(self, layer: int, x_BTD: jax.Array) -> jax.Array:
        """The masses that a layer would choose tiles by."""
        return self._score(self.params[f"layer_{layer}"], x_BTD)

    def queries_and_keys(self, layer: int, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q_BTNH and k_BKHS of a layer."""
        return self._queries_and_keys(self.params[f"layer_{layer}"], x_BTD)

    def run(self, x_BTD: jax.Array, first: int, choose: Callable[[int, jax.Array], jax.Array | None]) -> jax.Array:
        """From layer `first` to the last; choose(layer, x) names each one's tiles, or None for dense."""
        for layer in range(first, self.config.num_hidden_layers):
            tiles = choose(layer, x_BTD)
            x_BTD = self.dense(layer, x_BTD) if tiles is None else self.sparse(layer, x_BTD, tiles)
        return x_BTD

    def compare(
        self, dense_BTD: jax.Array, x_BTD: jax.Array, ids_BT: jax.Array, step: int = 1
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every `step`-th token's loss and KL divergence from dense (nats), and whether the likeliest token agrees."""
        rows = np.arange(0, self.length - 1, step)
        at_once = ROWS * self.mesh.size
        padded = np.resize(rows, tile_count(rows.size, at_once) * at_once)
        weights = self.params["tok_embeddings"] if self.config.tie_word_embeddings else self.params["output"]
        results = self._compare(
            weights, self.params["norm"], dense_BTD[0, padded], x_BTD[0, padded], ids_BT[0, padded + 1]
        )
        return tuple(np.asarray(result)[: rows.size] for result in results)

    def _compare_rows(
        self, weights: jax.Array, norm_D: jax.Array, dense_RD: jax.Array, x_RD: jax.Array, next_R: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        product = "RD,VD->RV" if self.config.tie_word_embeddings else "RD,DV->RV"

        def log_probabilities(x_RD: jax.Array) -> jax.Array:
            x_RD = rms_norm(x_RD, norm_D, self.config.rms_norm_eps).astype(self.dtype)
            return jax.nn.log_softmax(matmul(product, x_RD, weights.astype(self.dtype)))

        def compare(rows: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            dense, sparse = map(log_probabilities, rows[:2])
            nll = -jnp.take_along_axis(sparse, rows[2][:, None], axis=1)[:, 0]
            return nll, (jnp.exp(dense) * (dense - sparse)).sum(-1), dense.argmax(-1) == sparse.argmax(-1)

        parts = [x.reshape(-1, ROWS, *x.shape[1:]) for x in (dense_RD, x_RD, next_R)]
        return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(compare, tuple(parts)))

    def _block(
        self, mode: str, params: Any, x_BTD: jax.Array, *tiles_BKQC: jax.Array, method: str | None = None
    ) -> jax.Array:
        block, rope = self._module(mode), rope_table(self.config, self.layout.local_positions())
        return block.apply({"params": params}, x_BTD, rope, *(tiles_BKQC or (None,)), self.layout, method=method)[0]

    def _score_block(self, params: Any, x_BTD: jax.Array) -> jax.Array:
        rope = rope_table(self.config, self.layout.local_positions())
        return self._module(DENSE).apply({"params": params}, x_BTD, rope, self.layout, method="score")

    def _project(self, params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = Layout(self.length, self.length, 1)
        rope = rope_table(self.config, whole.local_positions())
        return self._module(DENSE).apply({"params": params}, x_BTD, rope, whole, method="queries_and_keys")

    def _module(self, mode: str) -> Block:
        plan = LayerPlan() if mode == DENSE else LayerPlan(REUSE, 0, tuple(range(self.config.num_key_value_heads)))
        return Block(self.config, plan, self.selection, False, self.dtype, None)

    def _compiled(self, function: Callable[..., jax.Array], num_inputs: int, out_axis: int) -> Callable[..., jax.Array]:
        """Jitted over the mesh: an input [B, T, D], perhaps tiles [B, K, Q, C]; results are dealt along `out_axis`."""
        specs = (PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS))
        sharded = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), *specs[:num_inputs]),
            out_specs=specs[out_axis - 1],
            check_vma=False,
        )
        length = self.length if out_axis == 1 else self.num_query_tiles

        def call(params: Any, x_BTD: jax.Array, *tiles_BKQC: jax.Array) -> jax.Array:
            tiles = [self.layout.spread(tiles, 2, self.selection.query_tile) for tiles in tiles_BKQC]
            out = sharded(params, self.layout.spread(x_BTD, 1), *tiles)
            return jax.lax.slice_in_dim(self.layout.collect(out, out_axis), 0, length, axis=out_axis)

        jitted = jax.jit(call)
        # One program at a time: several that gather over a CPU's devices, waiting at once, can wait for each other.
        return lambda *args: jax.block_until_ready(jitted(*args))
