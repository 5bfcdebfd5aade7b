"""The compiled programs of a model: a forward that the host runs layer by layer, and steps of decoding.

Letters as in kascade_core.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attention.model_axis import ModelShards
from attention.sharding import (
    CACHE,
    CONTEXT,
    DATA,
    HEAD_ROWS,
    MODEL,
    ROWS,
    TILES,
    WHOLE,
    Layout,
    batch_spec,
    compile_ahead,
    fetch,
    first_device,
    jit,
    move,
    pad_axis,
    place,
    shard,
    steps_mesh,
    traced_once,
    whole,
)
from kascade_core import ANCHOR, NO_TILE, REUSE, LayerPlan, Schedule, tile_count
from network.cache import KeysValues, KVCache
from network.layers import Block, Rope, rope_table

COMPILED_AT_ONCE = 4  # programs of a forward: more would only take turns on the cores
ROPE = PartitionSpec(None, CONTEXT)  # cos and sin, the same for all sequences
STEP_TILES = PartitionSpec(DATA, None, MODEL)  # [B, N, K, 1, C] of N steps


class Output(NamedTuple):
    """What a forward returns.

    Attributes:
      nll: float32 nats [B, T - 1], of each token but the first.
      tiles: {layer: tiles_BKQC} that its anchors (or, while calibrating, all layers) chose.
      stream: float32 [B, T, D], the final, normed residual stream, from which every prediction follows.
      keys_values: each layer's (k_BTKH, v_BTKH) in the order of the layout, for `Forward.fill_cache`; None where no
        cache was asked for.
    """

    nll: jax.Array
    tiles: Mapping[int, jax.Array]
    stream: jax.Array
    keys_values: tuple[KeysValues, ...] | None

    def fetch_tiles(self) -> dict[int, np.ndarray]:
        """`tiles` on the host, one layer after another: no device holds those of all layers and the whole sequence."""
        return fetch(self.tiles)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A compiled forward: call it with (params, input_ids) for an `Output`.

    The host runs the layers one after another. Layers that do the same share one program, so that compiling takes no
    longer for a deeper model; one program for all layers is not faster (measured on a CPU: slower by 2 to 6 %).

    Attributes:
      schedule: the model's.
      shards: of the mesh's model axis.
      layout: how the sequence was cut.
      batch: sequences at once; fewer are computed beside copies of themselves.
      mesh: the devices.
      begin, end: the programs before and after the layers.
      layers: each layer's program.
      collect: for each layer that chooses tiles the program that puts them in the sequence's order.
      seconds: that tracing and compiling took.
    """

    schedule: Schedule
    shards: ModelShards
    layout: Layout
    batch: int
    mesh: Mesh | None
    begin: Any
    end: Any
    layers: tuple[Any, ...]
    collect: Mapping[int, Any]
    seconds: float = 0.0

    def __call__(self, params: Any, input_ids: jax.Array) -> Output:
        rows = input_ids.shape[0]
        if rows == self.batch:
            return self._compute(params, input_ids)
        full = self._compute(params, jnp.resize(input_ids, (self.batch, input_ids.shape[1])))
        return jax.tree.map(lambda x: x[:rows], full)

    def _compute(self, params: Any, input_ids: jax.Array) -> Output:
        inner = params["params"]
        outer = _outer(inner)
        x_BTD, rope, next_ids_BT = self._run(self.begin, outer, input_ids)
        chosen: dict[int, jax.Array] = {}
        keys_values = []
        for i, (program, plan) in enumerate(zip(self.layers, self.schedule, strict=True)):
            reused = () if plan.anchor is None else (chosen[plan.anchor], self.sources[i])
            x_BTD, tiles, layer_keys_values = self._run(program, inner[f"layer_{i}"], x_BTD, rope, *reused)
            keys_values.append(layer_keys_values)
            if tiles is not None:
                chosen[i] = tiles
        nll, stream = self._run(self.end, outer, x_BTD, next_ids_BT)
        tiles = {layer: self._run(self.collect[layer], tiles) for layer, tiles in chosen.items()}
        return Output(nll, tiles, stream, None if keys_values[0] is None else tuple(keys_values))

    def _run(self, program: Any, *args: Any) -> Any:
        """One program at a time on several CPU devices: two that gather, waiting at once, can wait for each other."""
        out = program(*args)
        if self.mesh is not None and self.mesh.size > 1 and first_device(self.mesh).platform == "cpu":
            jax.block_until_ready(out)
        return out

    @functools.cached_property
    def sources(self) -> dict[int, jax.Array]:
        """For each layer that reuses tiles, `ModelShards.sources`; placed here, for a plan's devices hold nothing."""
        reusing = ((i, plan) for i, plan in enumerate(self.schedule) if plan.mode == REUSE)
        return {i: place(self.shards.sources(plan), self.mesh, PartitionSpec(MODEL)) for i, plan in reusing}

    @property
    def programs(self) -> list[Any]:
        """The compiled programs, each once."""
        return [*dict.fromkeys((self.begin, *self.layers, self.end, *self.collect.values()))]

    @property
    def working_bytes(self) -> int:
        """Of a device, beside the parameters: the largest program's memory and what layers leave behind."""
        stats = {program: program.memory_analysis() for program in self.programs}
        largest = max(s.temp_size_in_bytes + s.output_size_in_bytes for s in stats.values())
        stream = min(stats[layer].output_size_in_bytes for layer in self.layers)
        return largest + sum(stats[layer].output_size_in_bytes - stream for layer in self.layers)

    def fill_cache(self, output: Output, size: int, mesh: Mesh, dtype: Any) -> KVCache:
        """A cache with room for `size` tokens that holds what a forward computed, on the devices of `steps_mesh`."""
        batch = output.nll.shape[0]
        target = steps_mesh(mesh, batch)
        every_token = batch_spec(PartitionSpec(DATA, None, MODEL), batch, target)
        arrange = _arranging(self.layout, size, jnp.dtype(dtype), every_token, batch_spec(CACHE, batch, target), target)
        return KVCache(
            tuple(
                tuple(arrange(move(x_BTKH, target, every_token)) for x_BTKH in keys_values)
                for keys_values in output.keys_values
            )
        )


@functools.cache
def _arranging(
    layout: Layout, size: int, dtype: Any, source: PartitionSpec, target: PartitionSpec, mesh: Mesh
) -> Callable[[jax.Array], jax.Array]:
    """From a layer's x_BTKH, as a forward leaves it, to a cache's x_ZSH; compiled once for all windows."""

    def arrange(x_BTKH: jax.Array) -> jax.Array:
        x_BKTH = layout.collect(x_BTKH, 1)[:, : layout.length].swapaxes(1, 2)
        x_ZTH = x_BKTH.reshape(-1, *x_BKTH.shape[2:]).astype(dtype)
        return pad_axis(x_ZTH, 1, size)

    return jit(shard(arrange, mesh, source, target), mesh)


class _Kind(NamedTuple):
    """What decides a layer's program: layers of one kind share it."""

    plan: LayerPlan  # without its anchor
    has_rope: bool
    crosses: bool  # whether tiles come from other shards of the model axis


class ForwardBuilder:
    """Compiles a forward's programs side by side: the compiler leaves Python's lock."""

    def __init__(
        self, model: nn.Module, params: Any, shape: tuple[int, int], mesh: Mesh | None, with_cache: bool
    ) -> None:
        self.shards = ModelShards.of(model.config, mesh)
        self.model, self.params, self.mesh, self.with_cache = model.clone(shards=self.shards), params, mesh, with_cache
        self.shape, num_shards = shape, mesh.shape[CONTEXT] if mesh else 1
        self.layout = Layout.of(shape[1], model.selection.block, num_shards)
        self.rows, self.head_rows, self.tiles = (self._spec(spec) for spec in (ROWS, HEAD_ROWS, TILES))
        self.stream = self._array((shape[0], self.layout.padded, model.config.hidden_size), jnp.float32, self.rows)
        self.row_ids = self._array((shape[0], self.layout.padded), jnp.int32, self.rows)

    def build(self) -> Forward:
        """The whole forward, its `seconds` left open."""
        schedule, inner = self.model.schedule, self.params["params"]
        outer = _outer(inner)
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            ids = jax.ShapeDtypeStruct(self.shape, jnp.int32)
            begin = pool.submit(compile_ahead, self._begin, (outer, ids), self.mesh)
            end = pool.submit(compile_ahead, self._end, (outer, self.stream, self.row_ids), self.mesh)
            rope = (self._array((1, self.layout.padded, 1, self.model.config.head_dim // 2), jnp.float32, ROPE),) * 2
            sources = self._array(self.shards.copies.shape, jnp.int32, PartitionSpec(MODEL))
            kinds, layers = [self._kind(i) for i in range(len(schedule))], {}
            tiles, collect = None, None  # what layers choose has one shape
            for i, kind in enumerate(kinds):
                if kind in layers:
                    continue
                reused = (tiles, sources) if kind.plan.mode == REUSE else ()
                function, args = self._layer(kind), (inner[f"layer_{i}"], self.stream, rope, *reused)
                chosen = jax.eval_shape(function, *args)[1]
                layers[kind] = pool.submit(compile_ahead, function, args, self.mesh, (1,))
                if chosen and not tiles:
                    tiles = self._array(chosen.shape, chosen.dtype, self.tiles)
                    collect = pool.submit(compile_ahead, self._collect, (tiles,), self.mesh)
            return Forward(
                schedule,
                self.shards,
                self.layout,
                self.shape[0],
                self.mesh,
                begin.result(),
                end.result(),
                tuple(layers[kind].result() for kind in kinds),
                {i: collect.result() for i, plan in enumerate(schedule) if self._chooses(plan)},
            )

    def _chooses(self, plan: LayerPlan) -> bool:
        return plan.mode == ANCHOR or self.model.calibrate

    @functools.cached_property
    def slots(self) -> int:
        """Of every layer's chosen tiles: as many as the one that chooses most has, so that layers share programs."""
        num_key_tiles = tile_count(self.layout.length, self.model.selection.tile_size)
        choices = (self.model.block(plan).choice() for plan in self.model.schedule if self._chooses(plan))
        return max(choice.slots(num_key_tiles) for choice in choices)

    def _kind(self, layer: int) -> _Kind:
        plan = self.model.schedule[layer]
        has_rope = layer not in self.model.config.no_rope_layers
        crosses = plan.mode == REUSE and self.shards.crosses(plan)
        return _Kind(_without_anchor(plan), has_rope, crosses)

    def _layer(self, kind: _Kind) -> Callable[..., Any]:
        block, shards = self.model.block(kind.plan), self.shards

        def run(block: Block, x_BTD: jax.Array, rope: Rope, *reused: jax.Array) -> tuple[Any, Any, Any]:
            tiles_BKQC = shards.cut(shards.take_tiles(*reused, kind.crosses), kind.plan.budgets) if reused else None
            layer_rope = rope if kind.has_rope else None
            x_BTD, chosen_BKQC, keys_values = block.attend(x_BTD, layer_rope, tiles_BKQC, self.layout)
            if chosen_BKQC is not None:
                unused = self.slots - chosen_BKQC.shape[-1]
                chosen_BKQC = jnp.pad(chosen_BKQC, [(0, 0)] * 3 + [(0, unused)], constant_values=NO_TILE)
            return block.feed(x_BTD), chosen_BKQC, keys_values if self.with_cache else None

        def local(params: Any, *args: Any) -> tuple[Any, Any, Any]:
            return block.apply({"params": params}, *args, method=run)

        reused = (self.tiles, PartitionSpec(MODEL)) if kind.plan.mode == REUSE else ()
        in_specs = (self.shards.specs()["params"]["layer_0"], self.rows, ROPE, *reused)
        return shard(local, self.mesh, in_specs, (self.rows, self.tiles, self.head_rows))

    def _begin(self, outer: Any, ids_BT: jax.Array) -> tuple[jax.Array, Rope, jax.Array]:
        """The stream before layer 0, RoPE's table and each token's next id, all in the order of the layout."""

        def local(outer: Any, ids_BT: jax.Array) -> tuple[jax.Array, Rope]:
            rope = rope_table(self.model.config, self.layout.local_positions()[None], self.layout.length)
            return self.model.apply({"params": outer}, ids_BT, method="embed"), rope

        next_ids_BT = self.layout.spread(jnp.roll(ids_BT, -1, axis=1), 1)
        sharded = shard(local, self.mesh, (self._outer_specs(outer), self.rows), (self.rows, ROPE))
        return *sharded(outer, self.layout.spread(ids_BT, 1)), self._constrained(next_ids_BT, self.rows)

    def _end(self, outer: Any, x_BTD: jax.Array, next_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss of each token but the first and the final, normed stream, in the order of the sequence."""

        def local(outer: Any, x_BTD: jax.Array, next_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_BTD = self.model.apply({"params": outer}, x_BTD, method="normed")
            nll = self.model.apply({"params": outer}, x_BTD, next_ids_BT, method="next_token_nll")
            return nll, self._own_part(x_BTD, 1)

        in_specs = (self._outer_specs(outer), self.rows, self.rows)
        nll, x_BTD = shard(local, self.mesh, in_specs, (self.rows, self.rows))(outer, x_BTD, next_ids_BT)
        length = self.layout.length
        nll = whole(self.layout.collect(nll, 1)[:, : length - 1], self.mesh)
        return nll, self._in_order(x_BTD, 1)[:, :length]

    def _collect(self, tiles_BKQC: jax.Array) -> jax.Array:
        """A layer's tiles in the order of the sequence, one row of them for each KV head."""
        num_query_tiles = tile_count(self.layout.length, self.model.selection.query_tile)
        ordered = shard(lambda x: self._own_part(x, 2), self.mesh, (self.tiles,), self.tiles)
        return self._in_order(self.shards.unique(ordered(tiles_BKQC)), 2)[:, :, :num_query_tiles]

    def _own_part(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside `jax.shard_map`, where the layout can: each shard's part of the sequence, so that none holds all."""
        return self.layout.own_part(x, axis) if self.layout.has_even_parts else x

    def _in_order(self, x: jax.Array, axis: int) -> jax.Array:
        """Outside it: in the order of the sequence, whether or not `_own_part` could."""
        return x if self.layout.has_even_parts else self.layout.collect(x, axis)

    def _outer_specs(self, outer: Any) -> Any:
        specs = self.shards.specs()["params"]
        return {name: specs[name] for name in outer}

    def _spec(self, spec: PartitionSpec) -> PartitionSpec:
        return batch_spec(spec, self.shape[0], self.mesh)

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, spec) if self.mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _constrained(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)) if self.mesh else x


def _without_anchor(plan: LayerPlan) -> LayerPlan:
    """What a layer does with tiles that it is given: the same for layers of different anchors."""
    return LayerPlan(plan.mode, budgets=plan.budgets, largest_budget=plan.largest_budget)


def _outer(inner: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that belong to no layer."""
    return {name: leaf for name, leaf in inner.items() if not name.startswith("layer_")}


class Decoded(NamedTuple):
    """What N steps return.

    Attributes:
      stream: float32 [B, N, D], the final, normed stream of each new token.
      best: int32 [B, N], the likeliest next token after each.
      tiles: {layer: tiles [B, N, K, 1, C]} that its anchors chose.
      cache: with the new tokens in it.
    """

    stream: jax.Array
    best: jax.Array
    tiles: Mapping[int, jax.Array]
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Compiled steps: call with (params, ids_BN, positions_B, cache), all on `steps_mesh`; the cache is given away."""

    program: Any
    seconds: float

    def __call__(self, params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        return self.program(params, ids_BN, positions_B, cache)


def compile_steps(model: nn.Module, params: Any, cache: KVCache, num_steps: int, mesh: Mesh | None) -> Decoder:
    """`LlamaModel.compile_decode`: all layers and steps in one program, though a deeper model then compiles for longer.

    Steps whose layers the host ran one after another took 3.4 ms more of 19 (30 layers, CPU), and every time of
    decoding would hold them.
    """
    shards = ModelShards.of(model.config, mesh)
    batch = cache.layers[0][0].shape[0] // shards.copies.size
    model = model.clone(shards=shards)

    def local(params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        return decode_steps(model, params, ids_BN, positions_B, cache)

    inner = None if mesh is None or mesh.size == 1 else mesh
    by_batch, tiles = batch_spec(PartitionSpec(DATA), batch, mesh), batch_spec(STEP_TILES, batch, mesh)
    out_specs = Decoded(by_batch, by_batch, tiles, batch_spec(CACHE, batch, mesh))
    in_specs = (shards.specs(), by_batch, by_batch, batch_spec(CACHE, batch, mesh))
    sharded = shard(local, inner, in_specs, out_specs)

    def run(*args: Any) -> Decoded:
        decoded = sharded(*args)
        return decoded._replace(tiles={i: shards.unique(tiles, 2) for i, tiles in decoded.tiles.items()})

    everywhere = NamedSharding(mesh, WHOLE) if mesh else None
    args = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=everywhere) for s in ((batch, num_steps), (batch,))]
    start = time.perf_counter()
    is_bfloat16 = cache.layers[0][0].dtype == jnp.bfloat16
    program = compile_ahead(run, (params, *args, cache), mesh, donate=(3,), writes_bfloat16=is_bfloat16)
    return Decoder(program, time.perf_counter() - start)


def decode_steps(model: nn.Module, params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
    """N steps, the first at `positions_B`. A negative id stands for the likeliest token of the step before."""
    return _Steps(model, params["params"]).run(ids_BN, positions_B, cache)


class _Steps:
    """Steps of decoding on one device's part of a model; layers that do the same are traced once."""

    def __init__(self, model: nn.Module, params: Mapping[str, Any]) -> None:
        self.model, self.params, self.outer = model, params, _outer(params)
        self.layer = functools.cache(self._layer)

    def run(self, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        """`decode_steps`."""

        def body(carry: Any, ids_B: jax.Array) -> tuple[Any, Any]:
            cache, positions_B, best_B = carry
            ids_B = jnp.where(ids_B < 0, best_B, ids_B)
            x_B1D, tiles, cache = self._step(ids_B, positions_B, cache)
            best_B = self._apply("likeliest", x_B1D)[:, 0]
            return (cache, positions_B + 1, best_B), (x_B1D[:, 0], best_B, tiles)

        carry = (cache, positions_B, jnp.zeros_like(positions_B))
        (cache, _, _), (stream, best, tiles) = jax.lax.scan(body, carry, ids_BN.T)
        by_sequence = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (stream, best, tiles))
        return Decoded(*by_sequence, cache)

    def _step(
        self, ids_B: jax.Array, positions_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, dict[int, jax.Array], KVCache]:
        """One new token a sequence: its final, normed stream x_B1D, the tiles_BK1C that anchors chose, the cache."""
        model, shards = self.model, self.model.shards or ModelShards(self.model.config)
        rope = rope_table(model.config, positions_B[:, None], positions_B + 1)
        x_B1D, chosen, layers = self._apply("embed", ids_B[:, None]), {}, []
        for i, plan in enumerate(model.schedule):
            tiles_BK1C = None if plan.anchor is None else shards.attended(plan, chosen[plan.anchor])
            layer_rope = None if i in model.config.no_rope_layers else rope
            layer = self.layer(_without_anchor(plan))
            args = (self.params[f"layer_{i}"], x_B1D, layer_rope, tiles_BK1C, cache.layers[i], positions_B)
            x_B1D, tiles_BK1C, cached = layer(*args)
            layers.append(cached)
            if tiles_BK1C is not None:
                chosen[i] = tiles_BK1C
        return self._apply("normed", x_B1D), chosen, KVCache(tuple(layers))

    def _layer(self, plan: LayerPlan) -> Callable[..., Any]:
        """A layer's step, given its parameters and the arguments of `Block.attend_step`."""
        block = self.model.block(plan)

        def run(block: Block, *args: Any) -> tuple[Any, Any, Any]:
            x_B1D, chosen_BK1C, cached = block.attend_step(*args)
            return block.feed(x_B1D), chosen_BK1C, cached

        return traced_once(lambda params, *args: block.apply({"params": params}, *args, method=run))

    def _apply(self, method: str, *args: Any) -> jax.Array:
        return self.model.apply({"params": self.outer}, *args, method=method)
