"""Decoding: test windows continued over the text's own tokens, and how long a token takes by depth."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attention import decode
from attention.sharding import fetch, first_device, keep_on, move, place, steps_mesh
from errors import InputError, UnsupportedError
from kascade_core import DENSE, LayerPlan, density_of_step, tile_count
from llama_model import Comparison, LlamaModel
from measure import hosts
from measure.machine import free_memory, memory_bandwidth
from measure.quality import compile_comparison
from measure.settings import Settings
from measure.texts import Windows
from network.cache import KVCache, join_caches
from network.programs import Decoded, Decoder, Forward
from report.results import Decoding, DepthRow, Generated

CACHE_DTYPE = {"cpu": "float32"}  # XLA's CPU reads keys in bfloat16 no faster; elsewhere the run's own dtype
DEPTH_STEPS = 4  # tokens in one timed run of the table of depths
SPARE_MEMORY = 0.9  # of the free memory, that a cache may take


@dataclasses.dataclass(frozen=True)
class Arms:
    """The two models of a run, their compiled prefills, and what all their programs have in common."""

    dense: LlamaModel
    sparse: LlamaModel
    prefill: Mapping[str, Forward]  # "dense" and "sparse", compiled with their caches, for windows of one length
    params: Any
    mesh: Mesh

    @property
    def cache_dtype(self) -> Any:
        """Of keys and values in the cache."""
        return cache_dtype(self.dense, first_device(self.mesh))


def cache_dtype(model: LlamaModel, device: jax.Device) -> Any:
    """Of keys and values in a cache on this device."""
    return jnp.dtype(CACHE_DTYPE.get(device.platform, model.dtype))


def cache_size(model: LlamaModel, tokens: int) -> int:
    """Room for so many tokens, in whole tiles."""
    return tile_count(tokens, model.selection.tile_size) * model.selection.tile_size


def check_cache_fits(model: LlamaModel, batch: int, tokens: int, device: jax.Device) -> None:
    """Raises InputError, with its size and the free memory, for caches of both arms that would not fit."""
    size = cache_size(model, tokens)
    needed = 2 * KVCache.bytes_needed(model.config, batch, size, cache_dtype(model, device))  # one for each arm
    free = free_memory(device)
    if free is not None and needed > SPARE_MEMORY * free:
        raise InputError(
            f"decoding {batch} sequence(s) of {tokens} tokens needs caches of {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: give a smaller --batch or --seq_len, or --decode 0 and no --generate"
        )


# --- Over the text ---


def decode_windows(arms: Arms, windows: Windows, settings: Settings) -> Decoding:
    """Decodes the tokens that follow each test window, densely and sparsely, and times every pass.

    Args:
      arms: the two models.
      windows: with the tokens that follow each (`Windows.following`).
      settings: `batch` windows are decoded at once, `prefill` says what filled the sparse arm's cache; the passes over
        the windows are timed, and the last repeated until each arm has `n_runs` samples.
    """
    steps = windows.following[0].size - 1
    groups = _groups(windows, settings.batch)
    size = cache_size(arms.dense, windows.test[0].size + steps)
    mesh = steps_mesh(arms.mesh, settings.batch)
    params = keep_on(arms.params, mesh)
    decoders = _compile({"dense": arms.dense, "sparse": arms.sparse}, params, settings.batch, size, steps, arms)
    comparison = compile_comparison(arms.dense, mesh)
    compared: dict[str, list[Comparison]] = {"sparse": [], "dense": []}
    samples: dict[str, list[float]] = {"dense": [], "sparse": []}
    for i, (ids, following) in enumerate(groups):
        passes = _Passes(arms, decoders, params, ids, following, size)
        if i == 0:
            passes.warm_up()
        found = passes.compare(settings.prefill, samples, comparison)
        for prefill in compared:
            compared[prefill] += found[prefill]
    while len(samples["dense"]) < settings.n_runs:
        for arm in samples:
            passes.run(arm, "dense" if arm == "dense" else settings.prefill, samples[arm])
    samples = hosts.slowest(samples)
    depth = windows.test[0].size
    return Decoding(
        depth=depth,
        steps=steps,
        batch=settings.batch,
        prefill=settings.prefill,
        kernel=step_kernel(arms.sparse, settings.batch, size, arms.cache_dtype),
        compared=compared[settings.prefill],
        compared_other_prefill=compared["dense" if settings.prefill == "sparse" else "sparse"],
        layer_densities=passes.layer_densities,
        dense_ms=samples["dense"],
        sparse_ms=samples["sparse"],
        dense_bytes=bytes_per_step(arms.dense, arms, depth, settings.batch),
        sparse_bytes=bytes_per_step(arms.sparse, arms, depth, settings.batch, passes.layer_densities),
        bytes_per_second=memory_bandwidth(arms.mesh),
    )


def _groups(windows: Windows, batch: int) -> list[tuple[list[jax.Array], jax.Array]]:
    """`batch` windows at a time with the ids [B, N + 1] that follow them; a last, smaller group is left out."""
    pairs = [*zip(windows.test, windows.following)]  # the last windows may have too few tokens after them
    starts = range(0, len(pairs) - batch + 1, batch)
    return [
        ([ids for ids, _ in pairs[i : i + batch]], jnp.concatenate([after for _, after in pairs[i : i + batch]]))
        for i in starts
    ]


def _compile(
    models: Mapping[str, LlamaModel], params: Any, batch: int, size: int, steps: int, arms: Arms
) -> dict[str, Decoder]:
    """The models' steps, compiled side by side: the compiler leaves Python's lock."""
    dtype, mesh = arms.cache_dtype, steps_mesh(arms.mesh, batch)
    cache = KVCache.shapes(arms.dense.config, batch, size, dtype, mesh)

    def compile_steps(model: LlamaModel) -> Decoder:
        kernel, _ = step_kernel(model, batch, size, dtype)
        return model.clone(kernel=kernel).compile_decode(params, cache, steps, mesh)

    with ThreadPoolExecutor(len(models)) as pool:
        return dict(zip(models, pool.map(compile_steps, models.values()), strict=True))


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


class _Passes:
    """Decoding passes over the same tokens: caches filled once, each pass overwriting what the one before wrote."""

    def __init__(
        self,
        arms: Arms,
        decoders: Mapping[str, Decoder],
        params: Any,
        windows: Sequence[jax.Array],
        following: jax.Array,
        size: int,
    ) -> None:
        self.arms, self.decoders, self.params = arms, decoders, params
        self.caches = {name: self._fill(forward, windows, size) for name, forward in arms.prefill.items()}
        positions = jnp.full((len(windows),), windows[0].size, jnp.int32)
        self.mesh = steps_mesh(arms.mesh, len(windows))
        self.ids_BN, self.targets_BN = (move(ids_BN, self.mesh) for ids_BN in (following[:, :-1], following[:, 1:]))
        self.positions_B = move(positions, self.mesh)
        self.layer_densities: list[float] = []

    def _fill(self, forward: Forward, windows: Sequence[jax.Array], size: int) -> KVCache:
        caches = [
            forward.fill_cache(forward(self.arms.params, ids), size, self.arms.mesh, self.arms.cache_dtype)
            for ids in windows
        ]
        return caches[0] if len(caches) == 1 else join_caches(caches, self.arms.mesh)

    def run(self, arm: str, prefill: str, samples: list[float] | None = None) -> Decoded:
        """One pass of an arm on what `prefill` left in its cache; adds its milliseconds a step to `samples`."""
        start = time.perf_counter()
        output = self.decoders[arm](self.params, self.ids_BN, self.positions_B, self.caches[prefill])
        jax.block_until_ready(output)
        if samples is not None:
            samples.append((time.perf_counter() - start) * 1e3 / self.ids_BN.shape[1])
        self.caches[prefill] = output.cache
        return output

    def warm_up(self) -> None:
        """The first runs, which are not counted."""
        self.run("dense", "dense")
        self.run("sparse", "sparse")

    def compare(
        self, prefill: str, samples: Mapping[str, list[float]], comparison: Callable[..., Comparison]
    ) -> dict[str, list[Comparison]]:
        """What each sequence's tokens lose, [N] each, on the host, by what filled the sparse arm's cache.

        The passes of the dense arm and of the sparse one after `prefill` are timed into `samples`.
        """
        dense = self.run("dense", "dense", samples["dense"])
        sparse = self.run("sparse", prefill, samples["sparse"])
        self.layer_densities = step_densities(self.arms.sparse, sparse.tiles, int(self.positions_B[0]))
        other = "dense" if prefill == "sparse" else "sparse"
        streams = {prefill: sparse.stream, other: self.run("sparse", other).stream}
        return {
            name: _by_sequence(jax.device_get(comparison(self.params, dense.stream, stream, self.targets_BN)))
            for name, stream in streams.items()
        }


def _by_sequence(compared: Comparison) -> list[Comparison]:
    return [Comparison(*(np.asarray(values)[b] for values in compared)) for b in range(len(compared.kl))]


def step_densities(model: LlamaModel, tiles: Mapping[int, jax.Array], first_position: int) -> list[float]:
    """Of each layer: attended tiles over all tiles that a step could attend to, counted over steps and heads."""
    densities = []
    for layer, plan in enumerate(model.schedule):
        if plan.mode == DENSE:
            densities.append(1.0)
            continue
        chosen = fetch(tiles[layer if plan.anchor is None else plan.anchor])  # [B, N, K, 1, C]
        attended = np.asarray(plan.attended(jnp.asarray(chosen.reshape(-1, *chosen.shape[2:]))))
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
    size = cache_size(arms.dense, depth + DEPTH_STEPS)
    config, device = arms.dense.config, first_device(arms.mesh)
    free = free_memory(device)
    needed = KVCache.bytes_needed(config, batch, size, arms.cache_dtype)
    if free is not None and needed > SPARE_MEMORY * free:
        skipped = f"needs a cache of {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        return DepthRow(depth, batch, skipped=skipped)
    mesh = steps_mesh(arms.mesh, batch)
    params = keep_on(arms.params, mesh)
    models = {"dense": arms.dense, "keep_all": keeping_all(arms.sparse, size), "sparse": arms.sparse}
    decoders = _compile(models, params, batch, size, DEPTH_STEPS, arms)
    cache = random_cache(config, batch, size, arms.cache_dtype, mesh)
    inputs = (np.zeros((batch, DEPTH_STEPS), np.int32), np.full((batch,), depth, np.int32))
    ids_BN, positions_B = move(inputs, mesh)
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    tiles: Mapping[int, jax.Array] = {}
    for i in range(n_runs + 1):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            output = jax.block_until_ready(decoder(params, ids_BN, positions_B, cache))
            elapsed = (time.perf_counter() - start) * 1e3 / DEPTH_STEPS
            cache, tiles = output.cache, output.tiles
            if i:
                samples[name].append(elapsed)
    samples = hosts.slowest(samples)
    density = float(np.mean(step_densities(arms.sparse, tiles, depth)))
    beyond = depth > config.max_position_embeddings
    return DepthRow(depth, batch, samples["dense"], samples["keep_all"], samples["sparse"], density, beyond)


def keeping_all(model: LlamaModel, size: int) -> LlamaModel:
    """The same schedule with room for every tile."""
    plans = [dataclasses.replace(plan, budgets=None, largest_budget=None) for plan in model.schedule]
    most = max(tile_count(size, model.selection.tile_size), model.selection.num_kept_tiles)
    return model.clone(schedule=plans, selection=model.selection.with_top_k(most))


def random_cache(config: Any, batch: int, size: int, dtype: Any, mesh: Mesh) -> KVCache:
    """Normally distributed keys and values; the same in every layer's shape, but not the same arrays."""
    rng = np.random.default_rng(0)
    shapes = KVCache.shapes(config, batch, size, dtype, mesh)

    def random(x: jax.ShapeDtypeStruct) -> jax.Array:
        return place(rng.standard_normal(x.shape, np.float32).astype(x.dtype), mesh, x.sharding.spec)

    return jax.tree.map(random, shapes)


# --- Greedy continuations ---


def generate(arms: Arms, window: jax.Array, steps: int, prefill: str) -> Generated:
    """The greedy continuation of a window by both arms; `prefill` fills the sparse arm's cache."""
    size = cache_size(arms.dense, window.size + steps)
    mesh = steps_mesh(arms.mesh, 1)
    params = keep_on(arms.params, mesh)
    decoders = _compile({"dense": arms.dense, "sparse": arms.sparse}, params, 1, size, steps, arms)
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
