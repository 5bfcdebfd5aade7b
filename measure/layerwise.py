"""A model run layer by layer from the host, and what its calibration texts show; each part is made when asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from attention.model_axis import ModelShards
from attention.sharding import CONTEXT, ROWS, TILES, Layout, batch_spec, fetch, jit, shard
from kascade_core import (
    DENSE,
    KASCADE_CACHE,
    REUSE,
    LayerPlan,
    Selection,
    calibrate_kascade,
    membership,
    select_tiles,
    similarity_matrix,
    tile_count,
)
from llama_model import Comparison, LlamaModel
from network.layers import Block, Rope, rms_norm, rope_table

COMPARED_ROWS = 32  # of a device, compared at a time


class LayerRunner:
    """Runs a model's layers one by one from the host: a schedule is data here, and nothing is compiled anew for it.

    The model's kernel and dtype are used. Arrays are in the order of the sequence: x_BTD float32, scores_BKQP float32,
    tiles_BKQC int32, with B = 1.
    """

    def __init__(self, model: LlamaModel, params: Any, length: int, mesh: Mesh) -> None:
        self.model, self.config, self.selection = model, model.config, model.selection
        self.variables, self.params = params, params["params"]
        self.length, self.mesh = length, mesh
        self.num_query_tiles = tile_count(length, self.selection.query_tile)
        self.num_key_tiles = tile_count(length, self.selection.tile_size)
        self.layout = Layout.of(length, self.selection.block, mesh.shape[CONTEXT])
        self.shards = ModelShards.of(model.config, mesh)
        self._programs: dict[tuple[str, bool], Callable[..., Any]] = {}

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """The residual stream before layer 0."""
        return self.params["tok_embeddings"][ids_BT].astype(jnp.float32)

    def dense(self, layer: int, x_BTD: jax.Array) -> jax.Array:
        """The residual stream after a layer that attends to everything."""
        return self._run("dense", self._whole_layer(DENSE), layer, x_BTD)

    def sparse(self, layer: int, x_BTD: jax.Array, tiles_BKQC: jax.Array) -> jax.Array:
        """The residual stream after a layer that attends to these tiles."""
        return self._run("sparse", self._whole_layer(REUSE), layer, x_BTD, tiles_BKQC)

    def importance(self, layer: int, x_BTD: jax.Array) -> float:
        """1 - cosine of the residual stream before and after the layer's attention is added, mean over tokens."""

        def attend(block: Block, x_BTD: jax.Array, rope: Any) -> jax.Array:
            return block.attend(x_BTD, rope, None, self.layout)[0]

        after_BTD = self._run("attend", partial(self._apply, DENSE, attend), layer, x_BTD)
        norms_BT = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(after_BTD, axis=-1)
        return float(1 - jnp.mean((x_BTD * after_BTD).sum(-1) / norms_BT))

    def scores(self, layer: int, x_BTD: jax.Array) -> jax.Array:
        """The masses that a layer would choose tiles by."""

        def score(block: Block, x_BTD: jax.Array, rope: Any) -> jax.Array:
            return block.score(x_BTD, rope, self.layout)

        return self._run("score", partial(self._apply, DENSE, score), layer, x_BTD, out_axis=2)

    def queries_and_keys(self, layer: int, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q_BTNH and k_BKHS of a layer, on one device (and a mesh whose model axis is one)."""
        whole = Layout(self.length, self.length, 1)

        def project(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
            rope = self._rope(layer, whole)
            return self._block(DENSE).apply({"params": params}, x_BTD, rope, whole, method="queries_and_keys")

        return self._program("queries_and_keys", project, layer)(self.params[f"layer_{layer}"], x_BTD)

    def run(self, x_BTD: jax.Array, first: int, choose: Callable[[int, jax.Array], jax.Array | None]) -> jax.Array:
        """From layer `first` to the last; choose(layer, x) names each one's tiles, or None for dense."""
        for layer in range(first, self.config.num_hidden_layers):
            tiles = choose(layer, x_BTD)
            x_BTD = self.dense(layer, x_BTD) if tiles is None else self.sparse(layer, x_BTD, tiles)
        return x_BTD

    def compare(self, dense_BTD: jax.Array, x_BTD: jax.Array, ids_BT: jax.Array, step: int = 1) -> Comparison:
        """How every `step`-th token's prediction differs from dense; numpy [T' - 1] each, from streams after a run."""
        every = np.arange(0, self.length - 1, step)
        at_once = COMPARED_ROWS * self.mesh.shape[CONTEXT]
        padded = np.resize(every, tile_count(every.size, at_once) * at_once)

        def compare(params: Any, dense_BTD: jax.Array, x_BTD: jax.Array, next_BT: jax.Array) -> Comparison:
            norm_D, eps = params["params"]["norm"], self.config.rms_norm_eps
            streams = (rms_norm(x, norm_D, eps) for x in (dense_BTD, x_BTD))
            return self.model.clone(shards=self.shards).apply(params, *streams, next_BT, method="compare_streams")

        args = (self.variables, dense_BTD[:, padded], x_BTD[:, padded], ids_BT[:, padded + 1])
        rows = batch_spec(ROWS, 1, self.mesh)
        sharded = shard(compare, self.mesh, (self.shards.specs(), rows, rows, rows), rows)
        result = self._program("compare", sharded)(*args)
        return Comparison(*(value[0, : every.size] for value in fetch(result)))

    def _whole_layer(self, mode: str) -> Callable[..., jax.Array]:
        def layer(block: Block, x_BTD: jax.Array, rope: Any, tiles_BKQC: jax.Array | None = None) -> jax.Array:
            return block.feed(block.attend(x_BTD, rope, tiles_BKQC, self.layout)[0])

        return partial(self._apply, mode, layer)

    def _apply(
        self, mode: str, method: Callable[..., Any], layer: int, params: Any, x_BTD: jax.Array, *tiles: jax.Array
    ) -> Any:
        rope = self._rope(layer, self.layout)
        return self._block(mode).apply({"params": params}, x_BTD, rope, *tiles, method=method)

    def _rope(self, layer: int, layout: Layout) -> Rope | None:
        return (
            None
            if layer in self.config.no_rope_layers
            else rope_table(self.config, layout.local_positions()[None], self.length)
        )

    def _block(self, mode: str) -> Block:
        plan = LayerPlan() if mode == DENSE else LayerPlan(REUSE, 0, tuple(range(self.config.num_key_value_heads)))
        return Block(self.config, plan, self.selection, False, self.model.dtype, self.model.kernel, self.shards)

    def _run(
        self,
        name: str,
        function: Callable[..., jax.Array],
        layer: int,
        x_BTD: jax.Array,
        *tiles: Any,
        out_axis: int = 1,
    ) -> jax.Array:
        """One layer's `function(layer, params, x, *tiles)` over the mesh; its result is dealt along `out_axis`."""
        rows, tile_spec = (batch_spec(spec, 1, self.mesh) for spec in (ROWS, TILES))
        specs = (self.shards.specs()["params"]["layer_0"], rows, tile_spec)[: 2 + len(tiles)]
        sharded = shard(partial(function, layer), self.mesh, specs, (rows, tile_spec)[out_axis - 1])
        length = self.length if out_axis == 1 else self.num_query_tiles

        def call(params: Any, x_BTD: jax.Array, *tiles_BKQC: jax.Array) -> jax.Array:
            copies = [self.shards.with_tile_copies(tiles) for tiles in tiles_BKQC]
            dealt = [self.layout.spread(tiles, 2, self.selection.query_tile) for tiles in copies]
            out = sharded(params, self.layout.spread(x_BTD, 1), *dealt)
            out = out if out_axis == 1 else self.shards.unique(out)
            return jax.lax.slice_in_dim(self.layout.collect(out, out_axis), 0, length, axis=out_axis)

        return self._program(name, call, layer)(self.params[f"layer_{layer}"], x_BTD, *tiles)

    def _program(self, name: str, function: Callable[..., Any], layer: int | None = None) -> Callable[..., Any]:
        """The function, jitted when it is first asked for by this name, once for layers with RoPE and once without."""
        program = self._programs.setdefault((name, layer in self.config.no_rope_layers), jit(function, self.mesh))
        # One program at a time: several that gather over a CPU's devices, waiting at once, can wait for each other.
        return lambda *args: jax.block_until_ready(program(*args))


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a dense forward over one text shows.

    Attributes:
      scores: float32 [L, K, Q, P], each layer's masses; those of a query tile sum to 1.
      importance: float [L], the paper's weight of a layer, `LayerRunner.importance`.
    """

    scores: np.ndarray
    importance: np.ndarray


DAMAGE_TOKENS = 1024  # of the calibration text, at most, on which every layer is run alone
DAMAGE_STEP = 4  # every so many of their tokens are compared with dense


class Calibration:
    """What the calibration windows show of a model; each part is made when first asked for.

    Args:
      model: dense, with the run's selection, dtype and kernel.
      params: its variables.
      windows: int32 ids [1, T] each, of one length.
      mesh: the run's devices.
    """

    def __init__(self, model: LlamaModel, params: Any, windows: Sequence[jax.Array], mesh: Mesh) -> None:
        self.model, self.params, self.windows, self.mesh = model, params, tuple(windows), mesh

    def of_windows(self, windows: Sequence[jax.Array]) -> Calibration:
        """What other windows show of the same model."""
        return Calibration(self.model, self.params, windows, self.mesh)

    def at(self, selection: Selection) -> Calibration:
        """What the same windows show at another budget; tile sizes and scoring are the same, so masses are too."""
        other = Calibration(self.model.clone(selection=selection), self.params, self.windows, self.mesh)
        for name in ("observations", "damage_factors"):  # neither depends on the budget
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    @cached_property
    def similarity(self) -> np.ndarray:
        """Jaccard similarity of the tiles that the layers would choose, `kascade_core.similarity_matrix`."""
        if "tiles" in self.__dict__ or "observations" not in self.__dict__:
            return similarity_matrix(self.tiles)
        scores_LBKQP = np.stack([seen.scores for seen in self.observations], axis=1)
        selection = self.model.selection
        return similarity_matrix({i: np.asarray(select_tiles(x, selection)) for i, x in enumerate(scores_LBKQP)})

    @cached_property
    def tiles(self) -> dict[int, np.ndarray]:
        """The tiles_BKQC that every layer would choose; they are published in KASCADE_CACHE as well."""
        selection = self.model.selection
        ids = jnp.concatenate(self.windows)
        calibrate_kascade(self.model, self.params, ids, selection.tile_size, selection.top_k, self.mesh)
        return dict(KASCADE_CACHE)

    @cached_property
    def observations(self) -> list[Observation]:
        """A dense forward over each window, layer by layer."""
        runner = LayerRunner(self.model, self.params, self.windows[0].shape[1], self.mesh)
        return [self._observe(runner, ids) for ids in self.windows]

    def _observe(self, runner: LayerRunner, ids_BT: jax.Array) -> Observation:
        x_BTD, scores, importance = runner.embed(ids_BT), [], []
        for layer in _progress(range(runner.config.num_hidden_layers), "observing"):
            masses_KQP = fetch(runner.scores(layer, x_BTD))[0]
            scores.append(masses_KQP / masses_KQP.sum(-1, keepdims=True))
            importance.append(runner.importance(layer, x_BTD))
            x_BTD = runner.dense(layer, x_BTD)
        return Observation(np.stack(scores), np.array(importance))

    @cached_property
    def damage_factors(self) -> np.ndarray:
        """beta_L = KL(dense, only layer l sparse) / mean(lost_mass[l] ** 2), nats a token; 0 for layer 0.

        lost_mass is the attention mass outside the chosen tiles, in every query tile and head. Each layer attends to
        the best eighth of the tiles, of its own choice.
        """
        ids_BT = self.windows[0][:, :DAMAGE_TOKENS]
        runner = LayerRunner(self.model, self.params, ids_BT.shape[1], self.mesh)
        P, L = runner.num_key_tiles, runner.config.num_hidden_layers
        selection: Selection = runner.selection.with_top_k(max(runner.selection.num_kept_tiles, P // 8))
        stream = [runner.embed(ids_BT)]
        for layer in range(L):
            stream.append(runner.dense(layer, stream[-1]))
        beta_L = np.zeros(L)
        for layer in _progress(range(1, L), "running each layer alone"):
            masses = runner.scores(layer, stream[layer])
            tiles = select_tiles(masses, selection)
            x_BTD = runner.run(runner.sparse(layer, stream[layer], tiles), layer + 1, lambda *_: None)
            kl = runner.compare(stream[-1], x_BTD, ids_BT, DAMAGE_STEP).kl
            masses = fetch(masses / masses.sum(-1, keepdims=True))
            kept = (masses * membership(fetch(tiles), P)).sum(-1)
            beta_L[layer] = max(float(kl.mean()), 0) / max(float(np.mean((1 - kept) ** 2)), 1e-9)
        return beta_L


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm(items, desc=what, unit="layer", disable=None, leave=False)
