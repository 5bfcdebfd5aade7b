"""What the shards of the mesh's model axis hold: query heads, copies of KV heads, MLP columns, parts of the vocabulary.

Every shard computes all tokens of its part (tensor parallelism, arXiv 1909.08053): the two products that come back to
the model's width are summed over the shards, one after attention and one after the MLP of every layer. Where there are
more shards than KV heads, or they do not divide evenly, a KV head is held by several shards, each with some of its
query heads; an anchor there gathers the query heads of whole groups, so that its tiles are those of one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention.sharding import MODEL, WHOLE, place
from errors import InputError
from kascade_core import LayerPlan, keep_first
from weights.config import EMBEDDINGS_CHUNK, LlamaConfig, param_axes, param_shapes

MESH_AXES = {  # of an array's logical axis, `weights.config.chunk_axes`
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "vocab": MODEL,
    "embed": None,
    "head_dim": None,
}


@dataclasses.dataclass(frozen=True)
class ModelShards:
    """How a model lies on the shards of the model axis; with one shard, that holds all of it.

    Attributes:
      config: of the whole model.
      num_shards: devices on the axis.

    Raises:
      InputError: the query heads or the MLP's columns do not divide by the shards.
    """

    config: LlamaConfig
    num_shards: int = 1

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(self.config, name) % self.num_shards:
                raise InputError(
                    f"mesh: model={self.num_shards} must divide {name}, {getattr(self.config, name)}; "
                    f"{', '.join(map(str, divisors(self.config)))} do"
                )

    @classmethod
    def of(cls, config: LlamaConfig, mesh: Mesh | None) -> ModelShards:
        """Those of a mesh."""
        return cls(config, mesh.shape[MODEL] if mesh else 1)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.config.num_attention_heads // self.config.num_key_value_heads

    @property
    def part(self) -> int:
        """Query heads of a copy: a KV head's, or as many of them as lie on a shard together."""
        return math.gcd(self.group, self.config.num_attention_heads // self.num_shards)

    @property
    def shares_groups(self) -> bool:
        """Whether a KV head is held by several shards."""
        return self.part < self.group

    @cached_property
    def copies(self) -> np.ndarray:
        """int32: the KV head of each copy, over all shards, each of which has as many."""
        return np.arange(self.config.num_attention_heads // self.part, dtype=np.int32) * self.part // self.group

    @cached_property
    def first_copies(self) -> np.ndarray:
        """int32 [K]: of each KV head the first copy."""
        return np.arange(self.config.num_key_value_heads, dtype=np.int32) * (self.group // self.part)

    @property
    def copies_here(self) -> int:
        """Copies of KV heads on a shard."""
        return self.copies.size // self.num_shards

    @property
    def vocab_shards(self) -> int:
        """Parts of the vocabulary: one, which every shard holds, where it does not divide."""
        return self.num_shards if self.config.vocab_size % self.num_shards == 0 else 1

    @cached_property
    def local(self) -> LlamaConfig:
        """The shape of what one shard holds."""
        return dataclasses.replace(
            self.config,
            num_attention_heads=self.config.num_attention_heads // self.num_shards,
            num_key_value_heads=self.copies_here,
            intermediate_size=self.config.intermediate_size // self.num_shards,
            vocab_size=self.config.vocab_size // self.vocab_shards,
        )

    @cached_property
    def held(self) -> LlamaConfig:
        """The shape of what all shards hold together: the model's, with a KV head for each copy."""
        return dataclasses.replace(self.config, num_key_value_heads=self.copies.size)

    # --- Inside `jax.shard_map` ---

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of the shards' parts, on every shard."""
        return jax.lax.psum(x, MODEL) if self.num_shards > 1 else x

    def vocab_sum(self, x: jax.Array) -> jax.Array:
        """The sum over the parts of the vocabulary."""
        return jax.lax.psum(x, MODEL) if self.vocab_shards > 1 else x

    def vocab_max(self, x: jax.Array) -> jax.Array:
        """The largest over the parts of the vocabulary."""
        return jax.lax.pmax(x, MODEL) if self.vocab_shards > 1 else x

    def first_token(self) -> jax.Array | int:
        """The id that the calling shard's part of the vocabulary begins with."""
        return jax.lax.axis_index(MODEL) * self.local.vocab_size if self.vocab_shards > 1 else 0

    def whole_groups(self, q: jax.Array, axis: int) -> jax.Array:
        """For each copy of the calling shard all query heads of its KV head; `axis` is that of the heads."""
        if not self.shares_groups:
            return q
        heads = self.copies.reshape(self.num_shards, -1, 1) * self.group + np.arange(self.group)
        gathered = jax.lax.all_gather(q, MODEL, axis=axis, tiled=True)
        return jnp.take(gathered, self.here(heads.reshape(self.num_shards, -1)), axis=axis)

    def own_parts(self, x_ZSG: jax.Array) -> jax.Array:
        """Of what was computed for whole groups the rows of the calling shard's own query heads."""
        if not self.shares_groups:
            return x_ZSG
        parts = self.group // self.part
        which_K = self.here((np.arange(self.copies.size) % parts).reshape(self.num_shards, -1))
        Z, S, _ = x_ZSG.shape
        x = x_ZSG.reshape(Z, S, parts, self.part)
        return jnp.take_along_axis(x, jnp.tile(which_K, Z // which_K.size)[:, None, None, None], axis=2)[:, :, 0]

    def here(self, table: np.ndarray) -> jax.Array:
        """The calling shard's row of a table with a row for each shard."""
        row = jax.lax.axis_index(MODEL) if self.num_shards > 1 else 0
        return jnp.asarray(table)[row]

    # --- Tiles: which go from an anchor's heads to a layer's ---

    def crosses(self, plan: LayerPlan) -> bool:
        """Whether a REUSE layer's head map asks for tiles that another shard has chosen."""
        return plan.head_map is not None and not self._source_rows(plan)[1]

    def sources(self, plan: LayerPlan) -> np.ndarray:
        """int32, of each copy over all shards: where its tiles stand among the shard's own or, if they cross, all."""
        return self._source_rows(plan)[0]

    def _source_rows(self, plan: LayerPlan) -> tuple[np.ndarray, bool]:
        shard_of_copy = np.arange(self.copies.size) // self.copies_here
        wanted = np.array(plan.head_map)[self.copies] if plan.head_map is not None else self.copies
        own = [np.flatnonzero((self.copies == head) & (shard_of_copy == s)) for head, s in zip(wanted, shard_of_copy)]
        if all(len(found) for found in own):
            return np.array([found[0] for found in own], np.int32) - shard_of_copy * self.copies_here, True
        return self.first_copies[wanted], False

    def take_tiles(self, chosen_BKQC: jax.Array, sources_K: jax.Array, crosses: bool) -> jax.Array:
        """The tiles of an anchor as a layer attends to them, by `sources` of the calling shard's copies."""
        if crosses and self.num_shards > 1:
            chosen_BKQC = jax.lax.all_gather(chosen_BKQC, MODEL, axis=1, tiled=True)
        return jnp.take(chosen_BKQC, sources_K, axis=1)

    def attended(self, plan: LayerPlan, chosen_BKQC: jax.Array) -> jax.Array:
        """`LayerPlan.attended` for the calling shard's copies."""
        if plan.head_map is not None:
            rows_K = self.here(self.sources(plan).reshape(self.num_shards, -1))
            chosen_BKQC = self.take_tiles(chosen_BKQC, rows_K, self.crosses(plan))
        return self.cut(chosen_BKQC, plan.budgets)

    def cut(self, tiles_BKQC: jax.Array, budgets: tuple[int, ...] | None) -> jax.Array:
        """`kascade_core.cut_tiles` for the calling shard's copies; one number a KV head."""
        if budgets is None:
            return tiles_BKQC
        budgets_K = self.here(np.array(budgets)[self.copies].reshape(self.num_shards, -1))
        return keep_first(tiles_BKQC[..., : max(budgets)], budgets_K)

    def unique(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """From all shards' copies, outside `jax.shard_map`: one for each KV head."""
        return jnp.take(x, self.first_copies, axis=axis) if self.shares_groups else x

    def with_tile_copies(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse of `unique`."""
        return jnp.take(x, self.copies, axis=axis) if self.shares_groups else x

    # --- Parameters ---

    def specs(self) -> dict[str, Any]:
        """How each parameter is split, the tree of {"params": ...}."""
        return as_params(_map_tuples(self._spec, param_axes(self.config)))

    def _spec(self, axes: tuple[str, ...]) -> PartitionSpec:
        if self.num_shards == 1 or ("vocab" in axes and self.vocab_shards == 1):
            return WHOLE
        return PartitionSpec(*(MESH_AXES[axis] for axis in axes))

    def with_copies(self, leaf: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
        """A parameter with its KV heads repeated for every copy."""
        if "kv_heads" not in axes or not self.shares_groups:
            return leaf
        heads = leaf.reshape(self.config.num_key_value_heads, self.config.head_dim, *leaf.shape[1:])
        return heads[self.copies].reshape(-1, *leaf.shape[1:])

    def place_chunk(self, name: str, chunk: Any, mesh: Mesh | None) -> Any:
        """One chunk's parameters on the devices of the mesh, each its own part; without one on the default device."""

        def placed(axes: tuple[str, ...], leaf: np.ndarray) -> jax.Array:
            return place(self.with_copies(leaf, axes), mesh, self._spec(axes))

        return _map_tuples(placed, param_axes(self.config)[name], chunk)

    def shapes(self, mesh: Mesh | None, dtype: Any) -> dict[str, Any]:
        """The parameters' shapes as they lie on the devices; matrices are of `dtype`, vectors float32."""

        def shape(size: tuple[int, ...], axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, self._spec(axes)) if mesh else None
            return jax.ShapeDtypeStruct(size, dtype if len(size) > 1 else jnp.float32, sharding=sharding)

        return as_params(_map_tuples(shape, param_shapes(self.held), param_axes(self.config)))


def _map_tuples(function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, *trees, is_leaf=lambda x: isinstance(x, tuple))


def as_params(chunks: dict[str, Any]) -> dict[str, Any]:
    """{"params": ...} of a tree by chunk."""
    layers = {name.removesuffix(".pkl"): chunk for name, chunk in chunks.items() if name != EMBEDDINGS_CHUNK}
    return {"params": chunks[EMBEDDINGS_CHUNK] | layers}


def divisors(config: LlamaConfig) -> list[int]:
    """The sizes of the model axis that a model can be split by."""
    heads, columns = config.num_attention_heads, config.intermediate_size
    return [n for n in range(1, heads + 1) if heads % n == 0 and columns % n == 0]


WEIGHTS_SHARE = 0.6  # of a device's memory, at most: the rest is for the cache, tiles and what a layer computes


def auto_model_axis(config: LlamaConfig, bytes_of_weights: int, memory_per_device: int, num_devices: int) -> int:
    """The smallest model axis with which the weights leave room on each device: a split costs two sums a layer.

    Args:
      config: of the model.
      bytes_of_weights: of the whole model, as they are held on the devices.
      memory_per_device: bytes.
      num_devices: that the axis has to divide.

    Returns:
      A power of two that divides the query heads and the MLP's columns.

    Raises:
      InputError: the weights fit into no mesh of these devices; it says the least number that would do.
    """
    sizes = model_axis_sizes(config)
    fits = [n for n in sizes if bytes_of_weights / n <= WEIGHTS_SHARE * memory_per_device]
    if found := [n for n in fits if num_devices % n == 0]:
        return found[0]
    weights, memory = f"{bytes_of_weights / 1e9:.1f} GB", f"{memory_per_device / 1e9:.1f} GB"
    least = (
        f"{fits[0]} devices would do"
        if fits
        else f"no number of them would do, since this model is split in {sizes[-1]} at most"
    )
    raise InputError(
        f"mesh: {weights} of weights do not fit {num_devices} device(s) of {memory}, of which they may take "
        f"{WEIGHTS_SHARE:.0%}; {least}"
    )


def model_axis_sizes(config: LlamaConfig) -> list[int]:
    """The powers of two among `divisors`."""
    return [n for n in divisors(config) if n & (n - 1) == 0]
