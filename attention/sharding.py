"""Where work is split: a sequence in blocks, blocks on the devices of a mesh, and the one place that jits.

The mesh has three axes: DATA splits the batch, CONTEXT query tiles (keys and values, small under grouped queries, are
gathered to every device of it), MODEL heads, MLP columns and the vocabulary (`attention.model_axis`). Letters as in
kascade_core.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from errors import InputError
from kascade_core import NO_TILE, tile_count

DATA, CONTEXT, MODEL = AXES = "data", "context", "model"  # of the mesh
BLOCK = 256  # tokens in a block of queries or of keys, at most: its scores stay in a core's cache

# How an array is split over the mesh, by what it holds.
WHOLE = PartitionSpec()  # every device has all of it
FIRST = PartitionSpec(AXES)  # split along the first axis, over all devices
ROWS = PartitionSpec(DATA, CONTEXT)  # [B, T, ...]: tokens and the residual stream
HEAD_ROWS = PartitionSpec(DATA, CONTEXT, MODEL)  # [B, T, N, H]: queries, keys and values of the shards' own tokens
HEADS = PartitionSpec(DATA, MODEL)  # [B, K, ...]: the whole sequence's keys and values
TILES = PartitionSpec(DATA, MODEL, CONTEXT)  # [B, K, Q, ...]: tiles of each KV head and query tile
CACHE = PartitionSpec((DATA, MODEL))  # [Z, S, H]: a cache's keys and values

# What XLA's CPU compiler is told. By default it orders the work so that all layers' buffers exist at once: at 8192
# tokens 366 MB a device instead of 90. (Leave its YNNPACK products on: without them it needs 0.8 GB less there, but
# jaxlib 0.10.2 then computes wrong numbers beyond 2048 tokens on two devices.) And by default it uses half of the width
# of AVX-512: exponentials took 3 to 9 % longer.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED", "xla_cpu_prefer_vector_width": "512"}
# And for a program that writes slices of a bfloat16 array, such as a cache: by default each slice would convert all of
# the array to float32 and back (3.8 ms for 12 MB).
BFLOAT16_OPTIONS = {"xla_disable_hlo_passes": "float-normalization-bf16"}
# And its TPU compiler. From jax 0.11 on it hands gathers to the chip's sparse cores, and a sparse step of decoding took
# half as long again (jax issue 40553). Prefill in long chunks gains by it where XLA gathers the keys; kernels do not.
TPU_OPTIONS = {"xla_tpu_offload_gather_to_sparsecore": "false"}


# --- Blocks ---


@dataclasses.dataclass(frozen=True)
class Layout:
    """A sequence padded to equal blocks of whole tiles, assigned to the shards of the mesh's context axis.

    Blocks are assigned in a zigzag (shards 0 1 2 2 1 0 0 1 ...), so that every shard gets the same causal work.

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
    def of(cls, length: int, tile_size: int = 1, num_shards: int = 1, block: int = BLOCK) -> Layout:
        """The layout with the fewest blocks of at most `block` tokens (or of one tile, if that is larger)."""
        per_shard = tile_count(length, num_shards * max(block // tile_size, 1) * tile_size)
        if num_shards > 1 and length > 2 * num_shards * tile_size:
            per_shard += per_shard % 2  # the zigzag balances an even number
        num_blocks = per_shard * num_shards
        size = tile_count(tile_count(length, num_blocks), tile_size) * tile_size
        return cls(length, size, num_blocks, num_shards)

    @property
    def padded(self) -> int:
        """Tokens with padding, over all shards."""
        return self.block * self.num_blocks

    def blocks_by_shard(self) -> np.ndarray:
        """int [num_shards, J]: the blocks of each shard, in the order in which it holds them."""
        rounds = np.arange(self.num_blocks).reshape(-1, self.num_shards)
        rounds[1::2] = rounds[1::2, ::-1]
        return rounds.T

    def local_blocks(self) -> jax.Array:
        """int32 [J]: the blocks of the calling shard, inside `jax.shard_map`."""
        shard = jax.lax.axis_index(CONTEXT) if self.num_shards > 1 else 0
        return jnp.asarray(self.blocks_by_shard(), jnp.int32)[shard]

    def local_positions(self) -> jax.Array:
        """int32 [T]: the position in the sequence of each token of the calling shard."""
        return (self.local_blocks()[:, None] * self.block + jnp.arange(self.block)[None]).reshape(-1)

    def spread(self, x: jax.Array, axis: int, unit: int = 1) -> jax.Array:
        """From the sequence's order to the shards': pads an axis of tokens, or of tiles of `unit` tokens, and permutes.

        `collect` is the inverse, but for the padding.
        """
        x = pad_axis(x, axis, self.padded // unit)
        return self._take_blocks(x, axis, self.blocks_by_shard().reshape(-1))

    def collect(self, x: jax.Array, axis: int) -> jax.Array:
        """From the shards' order to the sequence's, along an axis of tokens or of tiles, padding included."""
        return self._take_blocks(x, axis, np.argsort(self.blocks_by_shard().reshape(-1)))

    @property
    def has_even_parts(self) -> bool:
        """Whether every shard holds as many blocks of each shard's part of the sequence, so that `own_part` can."""
        return self.num_blocks % self.num_shards**2 == 0

    def own_part(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside `jax.shard_map`: from the calling shard's blocks to its part of the sequence, as long and contiguous.

        No shard gets more than its part, where `collect` outside makes every shard hold the whole.
        """
        n, shape = self.num_shards, x.shape
        if n == 1:
            return x
        per_part = self.num_blocks // n**2  # blocks that each shard has of a part
        x = x.reshape(*shape[:axis], n * per_part, -1, *shape[axis + 1 :])
        x = jax.lax.all_to_all(x, CONTEXT, axis, axis, tiled=True)  # now by the shard that had them
        held = self.blocks_by_shard().reshape(n, n, per_part).swapaxes(0, 1).reshape(n, -1)  # of each part
        order = jnp.asarray(np.argsort(held, axis=1))[jax.lax.axis_index(CONTEXT)]
        return jnp.take(x, order, axis=axis).reshape(shape)

    def _take_blocks(self, x: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
        if self.num_shards == 1:
            return x
        shape = x.shape
        blocks = x.reshape(*shape[:axis], self.num_blocks, -1, *shape[axis + 1 :])
        return jnp.take(blocks, order, axis=axis).reshape(shape)


def pad_axis(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Zeros after the end of one axis, up to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def causal_tiles(layout: Layout, tile_size: int, query_tile: int) -> jax.Array:
    """tiles_QC of a dense layer, ascending: every tile up to its last row's, for the calling shard's query tiles."""
    own_Q1 = layout.local_positions()[query_tile - 1 :: query_tile, None] // tile_size
    tiles_1C = jnp.arange(tile_count(layout.padded, tile_size))[None]
    return jnp.where(tiles_1C <= own_Q1, tiles_1C, NO_TILE)


def gather_keys(x: jax.Array, axis: int, layout: Layout) -> jax.Array:
    """Keys or values of the whole sequence, in its order, from the calling shard's own; `axis` is that of time."""
    if layout.num_shards == 1:
        return x
    return layout.collect(jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True), axis)


# --- Devices ---


def make_mesh(devices: Sequence[jax.Device], data: int = 1, model: int = 1, context: int | None = None) -> Mesh:
    """The first devices on three axes; without `context` all of them, those that the other two leave on CONTEXT.

    Raises:
      InputError: there are fewer devices, or they do not divide.
    """
    count = len(devices)
    if context is None and count % (data * model):
        raise InputError(f"mesh: data={data} and model={model} do not divide the {count} devices: give context too")
    context = context or count // (data * model)
    if data * context * model > count:
        raise InputError(
            f"mesh: data={data}, context={context}, model={model} needs {data * context * model} devices, and there "
            f"are {count}"
        )
    return Mesh(np.array(devices[: data * context * model]).reshape(data, context, model), AXES)


def batch_spec(spec: PartitionSpec, batch: int, mesh: Mesh | None) -> PartitionSpec:
    """`spec`, whose first axis is the batch, with a batch that DATA does not divide whole on every device."""
    if mesh is None or batch % mesh.shape[DATA] == 0:
        return spec
    first = tuple(axis for axis in (spec[0] if isinstance(spec[0], tuple) else (spec[0],)) if axis != DATA)
    return PartitionSpec(first or None, *spec[1:])


def first_device(mesh: Mesh) -> jax.Device:
    """The mesh's first device among those of this process."""
    return next(device for device in mesh.devices.flat if device.process_index == jax.process_index())


def place(array: Any, mesh: Mesh | None, spec: PartitionSpec = WHOLE) -> jax.Array:
    """The array on the devices of the mesh, split as `spec` says; without a mesh on the default device.

    Each device is given its own part and no other; each process gives those of its own devices.
    """
    if mesh is None:
        return jax.device_put(array)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def shard(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function on each device's part of its arguments; without a mesh the function itself."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def jit(
    function: Callable[..., Any],
    mesh: Mesh | None = None,
    donate: tuple[int, ...] = (),
    writes_bfloat16: bool = False,
) -> Callable[..., Any]:
    """The one place that jits.

    `mesh` says which platform's options apply; without it the default device does. The arguments at the places
    `donate` are given away: their memory is written in place. `writes_bfloat16` says that they are of this dtype.
    """
    device = first_device(mesh) if mesh else jax.local_devices()[0]
    options = compiler_options(device)
    if writes_bfloat16 and device.platform == "cpu":
        options = options | BFLOAT16_OPTIONS
    return jax.jit(function, donate_argnums=donate, compiler_options=options or None)


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a program that is compiled as a whole: calls with arguments of the same shapes share one trace."""
    return jax.jit(function)


@functools.cache
def compiler_options(device: jax.Device) -> dict[str, str]:
    """What the compiler of a device's programs is told; on a TPU only those options that its compiler has."""
    if device.platform != "tpu":
        return CPU_OPTIONS if device.platform == "cpu" else {}
    return {name: value for name, value in TPU_OPTIONS.items() if _is_known(name, value, device)}


def _is_known(option: str, value: str, device: jax.Device) -> bool:
    """Whether a device's compiler has an option; it refuses to compile with one that it has not."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative, compiler_options={option: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@functools.cache
def can_write_bfloat16(device: jax.Device) -> bool:
    """Whether a device's programs can write slices of a bfloat16 array in place.

    A CPU's can where its compiler has a library that multiplies them: it refuses other products with
    `BFLOAT16_OPTIONS`.
    """
    if device.platform != "cpu":
        return True
    numbers = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    try:
        jax.jit(product, compiler_options=BFLOAT16_OPTIONS).lower(numbers, numbers).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compile_ahead(
    function: Callable[..., Any],
    args: Sequence[Any],
    mesh: Mesh | None = None,
    donate: tuple[int, ...] = (),
    writes_bfloat16: bool = False,
) -> jax.stages.Compiled:
    """Compiles `function` for arguments of these shapes, which may be `jax.ShapeDtypeStruct`; see `jit`."""
    try:
        return jit(function, mesh, donate, writes_bfloat16).lower(*args).compile()
    except jax.errors.JaxRuntimeError:
        if not writes_bfloat16:
            raise
    return jit(function, mesh, donate).lower(*args).compile()  # slower, but it takes every product


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """Inside a program: results that the host reads. Where several processes share the mesh, every device has them."""
    if mesh is None or not mesh.is_multi_process:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, WHOLE))


def fetch(tree: Any) -> Any:
    """The arrays on the host, as numpy. Those that several processes share are gathered first: all must come here."""
    return jax.tree.map(lambda x: np.asarray(_gathered(x)), tree)  # one after another, see `LayerRunner._program`


def on_host_or_shared(x: jax.Array) -> Any:
    """The array on the host, but where it spans processes as it is: for what only goes into another program."""
    return np.asarray(x) if x.is_fully_addressable else x


def _gathered(x: Any) -> Any:
    """An array whole on every device, if other processes hold parts of it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, WHOLE))


def steps_mesh(mesh: Mesh, batch: int) -> Mesh:
    """The devices that decode `batch` sequences: one of CONTEXT, which steps do not use, and of DATA those that divide.

    Where several processes share the mesh, all take part: DATA is kept, and of CONTEXT as many as that needs.
    """
    if not mesh.is_multi_process:
        return Mesh(mesh.devices[: math.gcd(batch, mesh.shape[DATA]), :1], AXES)
    columns: list[int] = []
    present: set[int] = set()
    for i in range(mesh.shape[CONTEXT]):
        processes = {device.process_index for device in mesh.devices[:, i].flat}
        if not processes <= present:
            columns.append(i)
            present |= processes
    return Mesh(mesh.devices[:, columns], AXES)


def move(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """The arrays on the devices of `mesh`, split as `spec` says.

    Where several processes share them, arrays come from this process's host, or from a mesh of which `mesh` is the
    `steps_mesh`: they are split anew where they are, and then kept on fewer devices.
    """
    sharding = NamedSharding(mesh, spec)

    def moved(x: Any) -> jax.Array:
        if not mesh.is_multi_process:
            return jax.device_put(_same_numbers(x), sharding)
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return place(x, mesh, spec)  # device_put would have the processes compare it
        return keep_on(jax.device_put(x, NamedSharding(x.sharding.mesh, spec)), mesh)

    return jax.tree.map(moved, tree)


def _same_numbers(x: Any) -> Any:
    """Another array of the same memory: one of several devices is moved by the host, and keeps the copy made there."""
    if not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1:
        return x
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [part.data for part in x.addressable_shards])


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of their shapes."""
    leaves = jax.tree.leaves(tree)
    held = (x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in leaves)
    return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(held, leaves, strict=True))


def keep_on(tree: Any, mesh: Mesh) -> Any:
    """The arrays on the devices of `mesh`, some of those that they are on, split as they are; nothing is copied."""

    def keep(x: jax.Array) -> jax.Array:
        if not isinstance(x.sharding, NamedSharding):
            return move(x, mesh)
        sharding = NamedSharding(mesh, x.sharding.spec)
        if x.sharding == sharding:
            return x
        parts = {shard.device: shard.data for shard in x.addressable_shards}
        here = [parts[device] for device in mesh.devices.flat if device in parts]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, here)

    return jax.tree.map(keep, tree)
