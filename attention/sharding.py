"""Where the work is split: a sequence cut into blocks of whole tiles, dealt out over the one axis of a mesh.

Letters as in kascade_core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

AXIS = "tiles"  # the mesh's one axis: query tiles; keys and values are gathered to every device
BLOCK = 256  # tokens in a block of queries or of keys, at most: its scores stay in a core's cache


def tile_count(length: int, tile_size: int) -> int:
    """Number of tiles that cover `length` tokens; the last may be partly filled."""
    return -(-length // tile_size)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A sequence padded to equal blocks of whole tiles, dealt out to the shards of the mesh's axis.

    The deal goes forth and back (shards 0 1 2 2 1 0 0 1 ...), so that each gets as many causal pairs as the others.

    Attributes:
      length: real tokens; those after them are padding.
      block: tokens in a block, a multiple of the tile size.
      num_blocks: blocks of all shards together, the same number in each.
      num_shards: devices on the axis.
    """

    length: int
    block: int
    num_blocks: int
    num_shards: int = 1

    @classmethod
    def of(cls, length: int, tile_size: int = 1, num_shards: int = 1) -> Layout:
        """The layout with the fewest blocks of at most BLOCK tokens (or one tile, if that is larger)."""
        per_shard = tile_count(length, num_shards * max(BLOCK // tile_size, 1) * tile_size)
        if num_shards > 1 and length > 2 * num_shards * tile_size:
            per_shard += per_shard % 2  # an even number, so that forth and back balance
        num_blocks = per_shard * num_shards
        block = tile_count(tile_count(length, num_blocks), tile_size) * tile_size
        return cls(length, block, num_blocks, num_shards)

    @property
    def padded(self) -> int:
        """Tokens with padding, over all shards."""
        return self.block * self.num_blocks

    def deal(self) -> np.ndarray:
        """int [num_shards, blocks a shard]: which blocks each shard has, in its order."""
        rounds = np.arange(self.num_blocks).reshape(-1, self.num_shards)
        rounds[1::2] = rounds[1::2, ::-1]
        return rounds.T

    def local_blocks(self) -> jax.Array:
        """int32 [blocks a shard]: the blocks of the shard that asks, inside `jax.shard_map`."""
        shard = jax.lax.axis_index(AXIS) if self.num_shards > 1 else 0
        return jnp.asarray(self.deal(), jnp.int32)[shard]

    def local_positions(self) -> jax.Array:
        """int32: the place in the sequence of each token of the shard that asks."""
        return (self.local_blocks()[:, None] * self.block + jnp.arange(self.block)).reshape(-1)

    def spread(self, x: jax.Array, axis: int, unit: int = 1) -> jax.Array:
        """Pads an axis of real tokens, or of tiles of `unit` tokens, and puts its blocks in the order of the deal."""
        x = pad_axis(x, axis, self.padded // unit)
        return self._take_blocks(x, axis, self.deal().reshape(-1))

    def collect(self, x: jax.Array, axis: int) -> jax.Array:
        """Puts an axis of dealt blocks (of tokens or of tiles) back in the order of the sequence, padding included."""
        return self._take_blocks(x, axis, np.argsort(self.deal().reshape(-1)))

    def _take_blocks(self, x: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
        if self.num_shards == 1:
            return x
        shape = x.shape
        blocks = x.reshape(*shape[:axis], self.num_blocks, -1, *shape[axis + 1 :])
        return jnp.take(blocks, order, axis=axis).reshape(shape)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """All devices on one axis, over which query tiles are dealt."""
    return Mesh(np.array(devices), (AXIS,))


def pad_axis(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros after the end of one axis, up to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)
