"""The keys and values that decoding keeps. Letters as in kascade_core."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from attention.model_axis import ModelShards
from attention.sharding import CACHE, DATA, MODEL, batch_spec, device_bytes, move, steps_mesh
from weights.config import LlamaConfig

KeysValues = tuple[jax.Array, jax.Array]  # of one layer


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer, k_ZSH and v_ZSH; S is room for so many tokens.

    Batch and KV heads are one axis, as the products take them: another view of the array would be a copy in each step.
    A step is given the cache away (it is donated) and returns it with the new tokens' keys and values written in place.
    """

    layers: tuple[KeysValues, ...]

    @classmethod
    def shapes(cls, config: LlamaConfig, batch: int, size: int, dtype: Any, mesh: Mesh | None = None) -> KVCache:
        """The shapes of a cache on the devices of a mesh of `steps_mesh`."""
        sharding = NamedSharding(mesh, batch_spec(CACHE, batch, mesh)) if mesh else None
        held = ModelShards.of(config, mesh).held
        shape = (batch * held.num_key_value_heads, size, config.head_dim)
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return cls(((array, array),) * config.num_hidden_layers)

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> KVCache:
        """Zeros: what is behind a sequence's last token has no weight, but must be finite."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cls.shapes(config, batch, size, dtype))

    @staticmethod
    def bytes_needed(config: LlamaConfig, batch: int, size: int, dtype: Any) -> int:
        """Bytes of a cache of this size."""
        return device_bytes(KVCache.shapes(config, batch, size, dtype))


def join_caches(caches: Sequence[KVCache], mesh: Mesh) -> KVCache:
    """The caches of single sequences, on `steps_mesh` of one, as one cache on `steps_mesh` of so many."""
    target, model = steps_mesh(mesh, len(caches)), mesh.shape[MODEL]
    spec = batch_spec(CACHE, len(caches), target)
    data = target.shape[DATA] if spec == CACHE else 1

    def join(*parts: jax.Array) -> jax.Array:
        if data == model == 1:
            return jnp.concatenate(parts)
        x_MBKSH = jnp.stack([x.reshape(model, -1, *x.shape[1:]) for x in parts], axis=1)
        x_MDBKSH = x_MBKSH.reshape(model, data, -1, *x_MBKSH.shape[2:])
        return move(x_MDBKSH.swapaxes(0, 1).reshape(-1, *x_MBKSH.shape[3:]), target, spec)

    return jax.tree.map(join, *caches)


def write_at(cached: KeysValues, new: KeysValues, positions_B: jax.Array) -> KeysValues:
    """Writes one row of each sequence, of k_BKH and v_BKH, at its position into k_ZSH and v_ZSH.

    A slice a sequence is written in place; a scatter is slower.
    """
    B, K, _ = new[0].shape
    new = jax.tree.map(lambda x_BKH, x_ZSH: x_BKH.astype(x_ZSH.dtype)[:, :, None], new, cached)

    def write(b: Any, cached: KeysValues) -> KeysValues:
        place = (b * K, positions_B[b], 0)
        return jax.tree.map(lambda x_ZSH, new: jax.lax.dynamic_update_slice(x_ZSH, new[b], place), cached, new)

    def write_in_loop(cached: KeysValues) -> KeysValues:
        # Of a length that XLA does not know: it would take the loop apart, fuse writing with what views the cache in
        # another shape, write twice, and copy the cache before.
        return jax.lax.fori_loop(0, jnp.where(positions_B[0] < 0, 0, B), write, cached)

    def write_all(cached: KeysValues) -> KeysValues:
        return functools.reduce(lambda cached, b: write(b, cached), range(B), cached)

    return jax.lax.platform_dependent(cached, cpu=write_in_loop, default=write_all)
