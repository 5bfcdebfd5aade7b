"""Decoding: test windows continued over the text's own tokens, and how long a token takes by depth."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attention import decode
from attention.sharding import can_write_bfloat16, fetch, first_device, keep_on, move, place, steps_mesh
from errors import InputError, UnsupportedError
from kascade_core import DENSE, LayerPlan, Selection, density_of_step, tile_count
from llama_model import Comparison, LlamaModel
from measure import hosts
from measure.machine import free_memory, memory_bandwidth
from measure.memory import give_back_memory
from measure.quality import compile_comparison
from measure.settings import Settings
from measure.texts import Windows
from network.cache import KVCache, join_caches
from network.programs import Decoded, Decoder, Forward, Output
from report.results import Decoding, DepthRow, Generated

TIMED_STEPS = 8  # tokens in one timed pass over a window's, at most
DEPTH_STEPS = 4  # the same in the table of depths
SPARE_MEMORY = 0.9  # of the free memory, that a cache may take
AT_ONCE_BYTES = 2**29  # that keys and values of several windows may take where no time is meant
WINDOWS_AT_ONCE = 8  # at most: each sequence adds a little to what is compiled


@dataclasses.dataclass(frozen=True)
class Arms:
    """The two models of a run, their compiled prefills, and what all their programs have in common."""

    dense: LlamaModel
    sparse: LlamaModel
    prefill: Mapping[str, Forward]  # "dense" and "sparse", compiled with their caches, for windows of one length
    params: Any
    mesh: Mesh
    outputs: Mapping[str, list[Output]] = dataclasses.field(default_factory=dict)  # of the prefills, by test window

    def prefilled(self, name: str, windows: Windows, i: int) -> Output:
        """What a prefill leaves of a test window: from `outputs`, or computed where its keys were not kept."""
        kept = self.outputs[name][i] if self.outputs else None
        return kept if kept and kept.keys_values else self.prefill[name](self.params, windows.test[i])

    def forget(self, name: str) -> None:
        """Gives up the keys that a prefill's outputs have kept."""
        if self.outputs:
            self.outputs[name][:] = [output._replace(keys_values=None) for output in self.outputs[name]]
            give_back_memory()

    @property
    def cache_dtype(self) -> Any:
        """Of keys and values in the cache."""
        return cache_dtype(self.dense, first_device(self.mesh))


def cache_dtype(model: LlamaModel, device: jax.Device) -> Any:
    """Of keys and values in a cache on this device: the model's, or float32 where bfloat16 is not written in place."""
    is_slow = model.dtype == jnp.bfloat16 and not can_write_bfloat16(device)
    return jnp.dtype(jnp.float32 if is_slow else model.dtype)


def cache_size(selection: Selection, tokens: int) -> int:
    """Room for so many tokens, in whole tiles and in whole blocks of a CPU's products."""
    unit = math.lcm(selection.tile_size, decode.CPU_KEYS)
    return tile_count(tokens, unit) * unit


def check_cache_fits(model: LlamaModel, batch: int, tokens: int, device: jax.Device) -> None:
    """Raises InputError, with its size and the free memory, for caches of both arms that would not fit."""
    size = cache_size(model.selection, tokens)
    needed = 2 * KVCache.bytes_needed(model.config, batch, size, cache_dtype(model, device))  # one for each arm
    free = free_memory(device)
    if free is not None and needed > SPARE_MEMORY * free:
        raise InputError(
            f"decoding {batch} sequence(s) of {tokens} tokens needs caches of {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: give a smaller --batch or --seq_len, or --decode 0 and no --generate"
        )


def keeps_prefills(model: LlamaModel, windows: Sequence[jax.Array]) -> bool:
    """Whether both arms' keys and values of all windows are small enough to be kept, so that none is computed twice."""
    needed = 2 * KVCache.bytes_needed(model.config, len(windows), windows[0].size, jnp.dtype(model.dtype))
    return needed <= AT_ONCE_BYTES


# --- Over the text ---


def decode_windows(arms: Arms, windows: Windows, settings: Settings) -> Decoding:
    """Decodes the tokens that follow each test window, densely and sparsely, and times a few of the steps.

    Args:
      arms: the two models.
      windows: with the tokens that follow each (`Windows.following`).
      settings: `batch` windows are decoded at once where time is meant, `prefill` says what filled the sparse arm's
        cache; each arm is timed `n_runs` times. A last group of fewer than `batch` windows is left out.
    """
    give_back_memory()
    steps, depth, batch = windows.following[0].size - 1, windows.test[0].size, settings.batch
    count = min(len(windows.test), len(windows.following)) // batch * batch
    size = cache_size(arms.dense.selection, depth + steps)
    shapes = {"all": (windows_at_once(arms, count, size), steps), "timed": (batch, min(TIMED_STEPS, steps))}
    models = {"dense": arms.dense, "sparse": arms.sparse}
    with ThreadPoolExecutor(len(shapes)) as pool:
        compiled = pool.map(lambda shape: _compile(models, *shape, size, arms), shapes.values())
        programs = dict(zip(shapes, compiled, strict=True))
    is_only_use = programs["all"].batch == batch == count  # of each prefill: the caches serve for the timed steps too
    found, caches = _compare_windows(arms, programs["all"], windows, count, size, settings.prefill, is_only_use)
    last = range(count - batch, count)
    if not is_only_use:
        del caches
        caches = {name: _fill(arms, name, windows, last, size) for name in {"dense": None, settings.prefill: None}}
        for name in arms.outputs:
            arms.forget(name)
    ids_BN = jnp.concatenate([windows.following[i] for i in last])[:, : shapes["timed"][1]]
    used = {"dense": "dense", "sparse": settings.prefill}
    samples, _ = _time_passes(programs["timed"], ids_BN, depth, caches, used, settings.n_runs)
    del caches
    give_back_memory()
    return Decoding(
        depth=depth,
        steps=steps,
        batch=batch,
        prefill=settings.prefill,
        kernel=step_kernel(arms.sparse, batch, size, arms.cache_dtype),
        compared=found.compared[settings.prefill],
        compared_other_prefill=found.compared["dense" if settings.prefill == "sparse" else "sparse"],
        layer_densities=found.layer_densities,
        dense_ms=samples["dense"],
        sparse_ms=samples["sparse"],
        dense_bytes=bytes_per_step(arms.dense, arms, depth, batch),
        sparse_bytes=bytes_per_step(arms.sparse, arms, depth, batch, found.layer_densities),
        bytes_per_second=memory_bandwidth(arms.mesh),
    )


def windows_at_once(arms: Arms, count: int, size: int) -> int:
    """How many of `count` windows are decoded together where no time is meant: they share each read of the weights.

    It depends on sizes alone, not on the free memory: sums of other batches are rounded otherwise, so that a tile or
    two may be chosen otherwise.
    """
    each = 2 * KVCache.bytes_needed(arms.dense.config, 1, size, arms.cache_dtype)  # one for each arm
    most = min(count, WINDOWS_AT_ONCE, max(AT_ONCE_BYTES // each, 1))
    return tile_count(count, tile_count(count, most))


class _Steps(NamedTuple):
    """Compiled steps of some models, with the parameters and the devices that they run on."""

    decoders: Mapping[str, Decoder]
    params: Any
    mesh: Mesh
    batch: int


def _compile(models: Mapping[str, LlamaModel], batch: int, steps: int, size: int, arms: Arms) -> _Steps:
    """The models' steps, compiled side by side: the compiler leaves Python's lock."""
    dtype, mesh = arms.cache_dtype, steps_mesh(arms.mesh, batch)
    params = keep_on(arms.params, mesh)
    cache = KVCache.shapes(arms.dense.config, batch, size, dtype, mesh)

    def compile_steps(model: LlamaModel) -> Decoder:
        kernel, _ = step_kernel(model, batch, size, dtype)
        return model.clone(kernel=kernel).compile_decode(params, cache, steps, mesh)

    with ThreadPoolExecutor(len(models)) as pool:
        decoders = dict(zip(models, pool.map(compile_steps, models.values()), strict=True))
    give_back_memory()
    return _Steps(decoders, params, mesh, batch)


def _fill(arms: Arms, prefill: str, windows: Windows, which: Sequence[int], size: int) -> KVCache:
    """The cache of some test windows together, as one of the prefills leaves it."""
    outputs = (arms.prefilled(prefill, windows, i) for i in which)
    caches = [arms.prefill[prefill].fill_cache(output, size, arms.mesh, arms.cache_dtype) for output in outputs]
    return caches[0] if len(caches) == 1 else join_caches(caches, arms.mesh)


class _Found(NamedTuple):
    """What decoding the windows shows, but for time: each window's comparison by what filled the sparse arm's cache."""

    compared: Mapping[str, list[Comparison]]
    layer_densities: list[float]


def _compare_windows(
    arms: Arms, programs: _Steps, windows: Windows, count: int, size: int, prefill: str, is_only_use: bool
) -> tuple[_Found, dict[str, KVCache]]:
    """The first `count` windows, as many at once as the programs take; a last group is filled up with the first.

    With `is_only_use` the prefills are forgotten once the caches are filled. The last group's caches are returned too.
    """
    comparison = compile_comparison(arms.dense, programs.mesh)
    compared: dict[str, list[Comparison]] = {"sparse": [], "dense": []}
    for start in range(0, count, programs.batch):
        which = [i % count for i in range(start, start + programs.batch)]
        following = jnp.concatenate([windows.following[i] for i in which])
        caches = {}
        for name in compared:
            caches[name] = _fill(arms, name, windows, which, size)
            if is_only_use:
                arms.forget(name)
        dense, sparse = _decode_group(programs, following[:, :-1], windows.test[0].size, caches)
        targets_BN = move(following[:, 1:], programs.mesh)
        for name, output in sparse.items():
            result = jax.device_get(comparison(programs.params, dense.stream, output.stream, targets_BN))
            compared[name] += [Comparison(*(np.asarray(values)[b] for values in result)) for b in range(len(which))]
    densities = step_densities(arms.sparse, sparse[prefill].tiles, windows.test[0].size)
    return _Found({name: found[:count] for name, found in compared.items()}, densities), caches


def _decode_group(
    programs: _Steps, ids_BN: jax.Array, depth: int, caches: dict[str, KVCache]
) -> tuple[Decoded, dict[str, Decoded]]:
    """The dense arm after the dense prefill, and the sparse arm after each; what the caches hold is given away."""
    ids_BN, positions_B = move((ids_BN, np.full((programs.batch,), depth, np.int32)), programs.mesh)

    def decode(arm: str, prefill: str) -> Decoded:
        output = programs.decoders[arm](programs.params, ids_BN, positions_B, caches[prefill])
        caches[prefill] = output.cache  # the next pass overwrites what this one wrote
        return jax.block_until_ready(output)

    return decode("dense", "dense"), {prefill: decode("sparse", prefill) for prefill in caches}


def _time_passes(
    programs: _Steps, ids_BN: Any, depth: int, caches: dict[str, KVCache], used: Mapping[str, str], n_runs: int
) -> tuple[dict[str, list[float]], Decoded]:
    """Milliseconds a step of `n_runs` passes of each program, in turn, after one that is not counted.

    Args:
      programs: what is timed.
      ids_BN: the tokens of a pass.
      depth: where they begin.
      caches: given away and filled anew; each pass overwrites what the one before wrote.
      used: the name of each program's cache.
      n_runs: samples of each.

    Returns:
      The samples, of several processes the slowest one's, and what the last pass returned but for its cache.
    """
    positions_B = np.full((programs.batch,), depth, np.int32)
    ids_BN, positions_B = move((ids_BN, positions_B), programs.mesh)
    samples: dict[str, list[float]] = {name: [] for name in programs.decoders}
    for i in range(n_runs + 1):
        for name, decoder in programs.decoders.items():
            start = time.perf_counter()
            output = jax.block_until_ready(decoder(programs.params, ids_BN, positions_B, caches[used[name]]))
            elapsed = (time.perf_counter() - start) * 1e3 / ids_BN.shape[1]
            caches[used[name]] = output.cache
            if i:
                samples[name].append(elapsed)
    return hosts.slowest(samples), output


def step_kernel(model: LlamaModel, batch: int, size: int, dtype: Any) -> tuple[str, str]:
    """The implementation of a model's steps, and why: its own kernel where that takes the sizes, otherwise xla.

    Args:
      model: its kernel, its selection and its schedule's budgets count.
      batch, size, dtype: of the cache.
    """
    budgets = [budget for plan in model.schedule for budget in plan.budgets or ()]
    selection, kernel = model.selection, model.kernel or "xla"
    if budgets:
        selection = selection.with_top_k(max(*budgets, selection.num_kept_tiles))
    shape = (batch * model.config.num_key_value_heads, size, model.config.head_dim)
    try:
        decode.check(kernel, selection, shape, dtype)
    except UnsupportedError as error:
        return "xla", f"{kernel} does not take these steps: {error}"
    why = "JAX's paged attention" if kernel == decode.PAGED else ""
    return (kernel if kernel in decode.STEPS else "xla"), why


def step_densities(model: LlamaModel, tiles: Mapping[int, jax.Array], first_position: int) -> list[float]:
    """Of each layer: attended tiles over all tiles that a step could attend to, counted over steps and heads."""
    densities = []
    for layer, plan in enumerate(model.schedule):
        if plan.mode == DENSE:
            densities.append(1.0)
            continue
        chosen = fetch(tiles[layer if plan.anchor is None else plan.anchor])  # [B, N, K, 1, C]
        attended = plan.attended(chosen.reshape(-1, *chosen.shape[2:]))
        positions_N = first_position + np.arange(chosen.shape[1])
        seen = positions_N // model.selection.tile_size + 1 - model.selection.first_seen(positions_N)
        densities.append(density_of_step(attended.reshape(chosen.shape[:3] + (-1,)), seen))
    return densities


def bytes_per_step(
    model: LlamaModel, arms: Arms, depth: int, batch: int, layer_densities: Sequence[float] | None = None
) -> int:
    """What a step reads: the weights once, and of the cache what each kind of layer needs.

    That is all keys and values (dense), all keys and the chosen values (anchor), the chosen keys and values (reuse).
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(arms.params))
    if not model.config.tie_word_embeddings:
        weights -= arms.params["params"]["tok_embeddings"].nbytes  # one row of it is read
    keys = KVCache.bytes_needed(model.config, batch, depth, arms.cache_dtype) / (2 * model.config.num_hidden_layers)
    densities = layer_densities or [1.0] * model.config.num_hidden_layers
    layers = (_share_read(plan, density) * keys for plan, density in zip(model.schedule, densities, strict=True))
    return int(weights + sum(layers))


def _share_read(plan: LayerPlan, density: float) -> float:
    """Of one layer's keys: 2 where keys and values are read whole."""
    return {"DENSE": 2.0, "ANCHOR": 1 + density, "REUSE": 2 * density}[plan.mode]


# --- By depth ---


def measure_depth(arms: Arms, depth: int, batch: int, n_runs: int) -> DepthRow:
    """Dense, sparse keeping all tiles, and sparse, interleaved, on caches of random keys and values.

    Keeping all tiles is what the bookkeeping of sparse layers costs. Only time is meant: the tokens mean nothing.
    """
    size = cache_size(arms.dense.selection, depth + DEPTH_STEPS)
    config, device = arms.dense.config, first_device(arms.mesh)
    free = free_memory(device)
    needed = KVCache.bytes_needed(config, batch, size, arms.cache_dtype)
    if free is not None and needed > SPARE_MEMORY * free:
        skipped = f"needs a cache of {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return DepthRow(depth, batch, skipped=skipped)
    models = {"dense": arms.dense, "keep_all": keeping_all(arms.sparse, size), "sparse": arms.sparse}
    programs = _compile(models, batch, DEPTH_STEPS, size, arms)
    caches = {"random": random_cache(config, batch, size, arms.cache_dtype, programs.mesh)}
    ids_BN = np.zeros((batch, DEPTH_STEPS), np.int32)
    samples, last = _time_passes(programs, ids_BN, depth, caches, dict.fromkeys(models, "random"), n_runs)
    density = float(np.mean(step_densities(arms.sparse, last.tiles, depth)))
    beyond = depth > config.max_position_embeddings
    return DepthRow(depth, batch, samples["dense"], samples["keep_all"], samples["sparse"], density, beyond)


def keeping_all(model: LlamaModel, size: int) -> LlamaModel:
    """The same schedule with room for every tile."""
    plans = [dataclasses.replace(plan, budgets=None, largest_budget=None) for plan in model.schedule]
    most = max(tile_count(size, model.selection.tile_size), model.selection.num_kept_tiles)
    return model.clone(schedule=plans, selection=model.selection.with_top_k(most))


def random_cache(config: Any, batch: int, size: int, dtype: Any, mesh: Mesh) -> KVCache:
    """Normally distributed keys and values, those of every layer the same numbers in memory of their own."""
    shapes = KVCache.shapes(config, batch, size, dtype, mesh)
    rng, array = np.random.default_rng(0), shapes.layers[0][0]
    drawn = [rng.standard_normal(array.shape, np.float32).astype(array.dtype) for _ in range(2)]

    def placed(numbers: np.ndarray) -> jax.Array:
        return place(numbers.copy(), mesh, array.sharding.spec)  # a CPU's device would share what it is given

    return KVCache(tuple(tuple(map(placed, drawn)) for _ in shapes.layers))


# --- Greedy continuations ---


def generate(arms: Arms, window: jax.Array, steps: int, prefill: str) -> Generated:
    """The greedy continuation of a window by both arms; `prefill` fills the sparse arm's cache."""
    size = cache_size(arms.dense.selection, window.size + steps)
    decoders, params, mesh, _ = _compile({"dense": arms.dense, "sparse": arms.sparse}, 1, steps, size, arms)
    tokens = {}
    for name, forward in (("dense", arms.prefill["dense"]), ("sparse", arms.prefill[prefill])):
        output = forward(arms.params, window)
        last = move(output.stream[:, -1:], mesh)
        first = fetch(arms.dense.apply(params, last, method="likeliest"))
        ids_BN = jnp.concatenate([first, jnp.full((1, steps - 1), -1, jnp.int32)], axis=1)
        cache = forward.fill_cache(output, size, arms.mesh, arms.cache_dtype)
        positions_B = jnp.full((1,), window.size, jnp.int32)
        ids_BN, positions_B = move((ids_BN, positions_B), mesh)
        decoded = decoders[name](params, ids_BN, positions_B, cache)
        tokens[name] = [int(first[0, 0]), *map(int, fetch(decoded.best)[0, :-1])]
    return Generated(tuple(tokens["dense"]), tuple(tokens["sparse"]))
