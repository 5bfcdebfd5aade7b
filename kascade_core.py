"""The Kascade method: tile scores, Top-K, Jaccard similarity, head maps, schedules, density, perplexity.

Pure functions in the order of the pipeline, and no model, flags or files: whatever is called `model` here is any Flax
module whose anchor layers sow the tiles they chose.

One letter, one meaning, in the suffixes of array names and in einsums:
  B batch, T query time, S key time, D model width, N query heads, K KV heads, G = N // K query heads a group,
  H head width, F MLP width, V vocabulary, L layers,
  Q query tiles, P key tiles, M tile size, C chosen tiles.

Tiles travel as `tiles_BKQC` (int32): for every KV head and query tile the indices of its chosen key tiles, ascending
(best first, on the way to layers that take fewer of them), its own (diagonal) tile always among them, unused slots last
and holding `NO_TILE`. With tile size 2 and Top-K 2, six tokens make three query tiles; a head that finds its second
tile dull chooses

  [[0, NO_TILE],   query tile 0 sees only itself
   [0, 1],         query tile 1 sees both of its causal tiles
   [0, 2]]         query tile 2 keeps tile 0 and itself, and drops tile 1
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kascade_layout import AXIS, Layout, tile_count

NO_TILE = int(np.iinfo(np.int32).max)  # an unused slot: beyond every index, so that an ascending sort puts it last
DENSE, ANCHOR, REUSE = "DENSE", "ANCHOR", "REUSE"
EXACT, FAST = "exact", "fast"  # how an anchor scores
FAST_ROWS = 4  # rows of a query tile that fast scoring looks at

KASCADE_CACHE: dict[int, np.ndarray] = {}  # layer -> tiles_BKQC that it chose in the last forward; host arrays only


class InputError(ValueError):
    """Bad input that its giver can mend; the message is one clear sentence that says what and how."""


# --- Tiles ---


@dataclasses.dataclass(frozen=True)
class Selection:
    """How an anchor chooses key tiles.

    Attributes:
      tile_size: tokens in a key tile.
      top_k: key tiles kept per query tile and KV head, its own among them.
      density: instead of top_k, the share of the causal key tiles that is kept, in (0, 1]: it grows with the position.
      sink_tiles: the sequence's first tiles, kept before others whatever their mass.
      query_tile: tokens in a query tile, which share one choice: a multiple or a divisor of tile_size, and tile_size
        when left out.
      scoring: EXACT pools the attention of every row of a query tile, FAST that of FAST_ROWS of them.
      local_tiles: key tiles before a query tile's own, kept before others whatever their mass.
      ranked: tiles come best first (its own, sinks and local ones, then by mass), so that a layer may take fewer.

    Raises:
      InputError: a size out of range, or a top_k that has no room for a query tile's own key tiles.
    """

    tile_size: int = 16
    top_k: int = 12
    sink_tiles: int = 0
    query_tile: int | None = None
    scoring: str = EXACT
    local_tiles: int = 0
    density: float | None = None
    ranked: bool = False

    def __post_init__(self) -> None:
        if self.query_tile is None:
            object.__setattr__(self, "query_tile", self.tile_size)
        for name in ("tile_size", "top_k", "query_tile"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block % self.query_tile or self.block % self.tile_size:
            raise InputError(
                f"query_tile must be a multiple or a divisor of tile_size, {self.tile_size}, got {self.query_tile}"
            )
        own = self.block // self.tile_size
        if self.top_k < own:
            raise InputError(
                f"top_k must be at least {own}, the key tiles of {self.tile_size} tokens in one query tile of "
                f"{self.query_tile}, got {self.top_k}"
            )
        if self.scoring not in (EXACT, FAST):
            raise InputError(f"scoring must be {EXACT} or {FAST}, got {self.scoring!r}")
        if min(self.sink_tiles, self.local_tiles) < 0:
            raise InputError(f"sink_tiles and local_tiles must be 0 or more, got {self.sink_tiles}, {self.local_tiles}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density must be above 0 and at most 1, got {self.density}")

    @property
    def block(self) -> int:
        """Tokens in the least block of whole key tiles and whole query tiles."""
        return max(self.query_tile, self.tile_size)

    @property
    def always(self) -> int:
        """Key tiles that every query tile keeps whatever their mass, as far as it sees them."""
        return self.block // self.tile_size + self.sink_tiles + self.local_tiles

    def slots(self, num_key_tiles: int) -> int:
        """C: key tiles that a query tile keeps at most."""
        if self.density is None:
            return min(self.top_k, num_key_tiles)
        return min(max(math.ceil(self.density * num_key_tiles), self.always), num_key_tiles)

    def scored_rows(self) -> np.ndarray:
        """int: the rows of a query tile whose attention is pooled; a sample is even and has the first and the last."""
        rows = self.query_tile if self.scoring == EXACT else min(FAST_ROWS, self.query_tile)
        return np.linspace(0, self.query_tile - 1, rows).astype(int)


def select_tiles(scores_BKQP: jax.Array, selection: Selection, query_tiles_Q: jax.Array | None = None) -> jax.Array:
    """Keeps the `top_k` best causal key tiles of each query tile, its own always among them.

    Args:
      scores_BKQP: float, attention mass of each key tile, pooled over a query tile's rows and a group's heads; any
        leading axes.
      selection: its budget; sinks are where attention sinks lie (arXiv 2309.17453).
      query_tiles_Q: int32, the place of each query tile in the sequence; 0, 1, 2... when left out.

    Returns:
      tiles_BKQC: int32 with C = selection.slots(P), as the module's docstring defines it.
    """
    Q, P = scores_BKQP.shape[-2:]
    first_row_Q1 = (jnp.arange(Q) if query_tiles_Q is None else query_tiles_Q)[:, None] * selection.query_tile
    start_P = jnp.arange(P) * selection.tile_size
    past_QP = start_P + selection.tile_size <= first_row_Q1
    seen_QP = start_P < first_row_Q1 + selection.query_tile
    near_QP = start_P + (selection.local_tiles + 1) * selection.tile_size > first_row_Q1
    most = jnp.finfo(scores_BKQP.dtype).max
    scores_BKQP = jnp.where((jnp.arange(P) < selection.sink_tiles) | near_QP, most, scores_BKQP)
    ranked = jnp.where(past_QP, scores_BKQP, jnp.where(seen_QP, jnp.inf, -jnp.inf))  # a query tile's own come first
    _, tiles = jax.lax.top_k(ranked, selection.slots(P))
    kept = tiles * selection.tile_size < first_row_Q1 + selection.query_tile
    if selection.density is not None:
        share_Q1 = jnp.ceil(selection.density * seen_QP.sum(-1, keepdims=True) - 1e-4).astype(jnp.int32)
        kept &= jnp.arange(tiles.shape[-1]) < jnp.maximum(share_Q1, selection.always)
    tiles = jnp.where(kept, tiles, NO_TILE).astype(jnp.int32)
    return tiles if selection.ranked else jnp.sort(tiles, axis=-1)


def cut_tiles(ranked_BKQC: jax.Array, budgets: Sequence[int]) -> jax.Array:
    """The first budgets[k] tiles of each KV head k, ascending; C is the largest budget."""
    places_C = jnp.arange(min(max(budgets), ranked_BKQC.shape[-1]))
    kept = places_C < jnp.array(budgets)[:, None, None]
    return jnp.sort(jnp.where(kept, ranked_BKQC[..., : places_C.size], NO_TILE), axis=-1)


def causal_tiles(layout: Layout, tile_size: int) -> jax.Array:
    """tiles_QC of a dense layer: every tile up to its own, for the query tiles of the shard that asks."""
    own_Q1 = layout.local_positions()[::tile_size, None] // tile_size
    tiles_C = jnp.arange(layout.padded // tile_size)
    return jnp.where(tiles_C <= own_Q1, tiles_C, NO_TILE)


def seen_tiles(tiles_BKQC: np.ndarray) -> np.ndarray:
    """int [B, K, Q]: how many key tiles each query tile could choose from; its own are the last, and always chosen."""
    tiles_BKQC = np.asarray(tiles_BKQC)
    return np.where(tiles_BKQC == NO_TILE, -1, tiles_BKQC).max(axis=-1) + 1


def density_of(tiles_BKQC: np.ndarray | None) -> float:
    """Counted causal density: attended (query tile, key tile) pairs / causal pairs, over all heads; None is dense."""
    if tiles_BKQC is None:
        return 1.0
    return np.count_nonzero(tiles_BKQC != NO_TILE) / int(seen_tiles(tiles_BKQC).sum())


# --- Similarity of layers ---


def jaccard_by_head(tiles_a_BKQC: np.ndarray, tiles_b_BKQC: np.ndarray) -> np.ndarray:
    """Jaccard similarity |a & b| / |a | b| of two layers' tiles, for every pair of their KV heads.

    Averaged over batch and over the query tiles that see more causal tiles than they keep: the others would count as
    alike whatever the layers do. With no such query tile nothing is dropped, and the answer is 1.

    Args:
      tiles_a_BKQC, tiles_b_BKQC: int32 [B, K, Q, C], of the same forward.

    Returns:
      float64 [K, K], rows a's heads and columns b's.

    Raises:
      ValueError: the shapes differ, or have not four axes.
    """
    tiles_a, tiles_b = np.asarray(tiles_a_BKQC), np.asarray(tiles_b_BKQC)
    if tiles_a.ndim != 4 or tiles_a.shape != tiles_b.shape:
        raise ValueError(f"expected two equal shapes [B, K, Q, C], got {tiles_a.shape} and {tiles_b.shape}")
    seen_Q = seen_tiles(tiles_a)[0, 0]
    dropping = (tiles_a[0, 0] != NO_TILE).sum(-1) < seen_Q
    if not dropping.any():
        return np.ones((tiles_a.shape[1],) * 2)
    chosen_a, chosen_b = (membership(tiles[:, :, dropping], seen_Q.max()) for tiles in (tiles_a, tiles_b))
    common_BQab = np.einsum("BaQP,BbQP->BQab", chosen_a, chosen_b)
    sizes_Q11 = chosen_a[0, 0].sum(-1)[:, None, None]  # all heads and both layers keep the same number
    either_BQab = 2 * sizes_Q11 - common_BQab
    return np.mean(common_BQab / either_BQab, axis=(0, 1), dtype=np.float64)


def membership(tiles_BKQC: np.ndarray, num_key_tiles: int) -> np.ndarray:
    """float32 [B, K, Q, P], 1 where the tile was chosen."""
    chosen = np.zeros((*tiles_BKQC.shape[:3], num_key_tiles + 1), np.float32)
    np.put_along_axis(chosen, np.minimum(tiles_BKQC, num_key_tiles), 1.0, axis=-1)  # unused slots lie beyond the last
    return chosen[..., :-1]


def jaccard_similarity(tiles_a_BKQC: np.ndarray, tiles_b_BKQC: np.ndarray) -> float:
    """How like layer b's tiles are to those layer a would choose: `jaccard_by_head` with b's best head for each of a's.

    This is the similarity of layer a reusing anchor b through the head map of `best_head_map`; in [0, 1].
    """
    return float(jaccard_by_head(tiles_a_BKQC, tiles_b_BKQC).max(axis=1).mean())


def best_head_map(tiles_a_BKQC: np.ndarray, tiles_b_BKQC: np.ndarray) -> tuple[int, ...]:
    """For each KV head of reuse layer a, the KV head of anchor b whose tiles are most like its own; many-to-one."""
    by_head = jaccard_by_head(tiles_a_BKQC, tiles_b_BKQC)
    own = np.eye(len(by_head)) * 1e-9  # equals go to the head of the same number
    return tuple(int(head) for head in np.argmax(by_head + own, axis=1))


def similarity_matrix(tiles_by_layer: Mapping[int, np.ndarray]) -> np.ndarray:
    """float64 [L, L]: entry [i, a] is the similarity of layer i reusing an earlier layer a; 0 elsewhere."""
    num_layers = len(tiles_by_layer)
    similarity_LL = np.zeros((num_layers, num_layers))
    for layer in range(num_layers):
        for anchor in range(layer):
            similarity_LL[layer, anchor] = jaccard_similarity(tiles_by_layer[layer], tiles_by_layer[anchor])
    return similarity_LL


# --- Schedules ---


class Decision(NamedTuple):
    """What the schedule rule decided for one layer, and why, as it is printed."""

    mode: str
    anchor: int | None
    similarity: float | None  # to the best anchor within reach, None where there was none to compare with
    reason: str


FIRST_LAYER = Decision(DENSE, None, None, "full attention - paper requirement")


def decide_schedule(similarity_LL: np.ndarray, threshold: float, max_reuse_dist: int) -> list[Decision]:
    """The guide's greedy rule, a `Decision` per layer.

    Layer 0 is DENSE and never a source; layer 1 is an ANCHOR. A later layer i takes, among the anchors a with
    i - a < max_reuse_dist, the most similar: REUSE if its similarity is at least the threshold, otherwise ANCHOR.

    Args:
      similarity_LL: float [L, L], entry [i, a] for layer i reusing layer a.
      threshold: in [0, 1].
      max_reuse_dist: layers, at least 1; 1 lets no layer reuse.

    Raises:
      InputError: threshold or max_reuse_dist out of range.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must be in [0, 1], got {threshold}")
    if max_reuse_dist < 1:
        raise InputError(f"max_reuse_dist must be at least 1, got {max_reuse_dist}")
    decisions = [FIRST_LAYER]
    anchors: list[int] = []
    for layer in range(1, len(similarity_LL)):
        decision = _decide_layer(layer, anchors, similarity_LL[layer], threshold, max_reuse_dist)
        if decision.mode == ANCHOR:
            anchors.append(layer)
        decisions.append(decision)
    return decisions


def _decide_layer(
    layer: int, anchors: Sequence[int], similarity_L: np.ndarray, threshold: float, max_reuse_dist: int
) -> Decision:
    if not anchors:
        return Decision(ANCHOR, None, None, "first sparse layer")
    near = [anchor for anchor in anchors if layer - anchor < max_reuse_dist]
    if not near:
        return Decision(ANCHOR, None, None, f"distance: {layer - anchors[-1]}")
    best = max(near, key=lambda anchor: similarity_L[anchor])
    similarity = float(similarity_L[best])
    if similarity >= threshold:
        return Decision(REUSE, best, similarity, f"similarity: {similarity:.2%}")
    return Decision(ANCHOR, None, similarity, f"low similarity: {similarity:.2%}")


def generate_kascade_schedule(threshold: float, max_reuse_dist: int) -> dict[int, tuple[str, int | None]]:
    """The guide's schedule for what the last calibration left in KASCADE_CACHE: {layer: (mode, anchor or None)}.

    Raises:
      InputError: no calibration has run, or a parameter is out of range.
    """
    if not KASCADE_CACHE:
        raise InputError("KASCADE_CACHE is empty: run calibrate_kascade before generate_kascade_schedule")
    decisions = decide_schedule(similarity_matrix(KASCADE_CACHE), threshold, max_reuse_dist)
    return {layer: (decision.mode, decision.anchor) for layer, decision in enumerate(decisions)}


def add_head_maps(
    schedule: Mapping[int, tuple[str, int | None]], tiles_by_layer: Mapping[int, np.ndarray]
) -> dict[int, tuple[str, int | None, tuple[int, ...] | None]]:
    """The schedule with the best head map, by Jaccard, beside every REUSE; None beside the others."""
    return {
        layer: (mode, anchor, best_head_map(tiles_by_layer[layer], tiles_by_layer[anchor]) if mode == REUSE else None)
        for layer, (mode, anchor) in schedule.items()
    }


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer does: attend densely, as an anchor, or to the tiles of `anchor` through `head_map`."""

    mode: str = DENSE
    anchor: int | None = None
    head_map: tuple[int, ...] | None = None  # for each KV head the anchor's KV head that it takes its tiles from
    budgets: tuple[int, ...] | None = None  # key tiles of each KV head; None is the selection's own number
    keep: int | None = None  # an anchor's: the largest budget of the layers that use its tiles, its own among them


def freeze_schedule(
    schedule: Mapping[int, Any] | Sequence[LayerPlan] | None, num_layers: int, num_kv_heads: int
) -> tuple[LayerPlan, ...]:
    """Validates {layer: (mode, anchor[, head_map[, budgets]])} and makes it hashable; None is dense throughout.

    A REUSE without a head map maps every head to the anchor's head of the same number. Budgets, a number of key tiles
    for each KV head, are given to every ANCHOR and REUSE layer or to none.

    Raises:
      ValueError: names the layer, what it asked for, and what it may ask for.
    """
    if schedule is None:
        return (LayerPlan(),) * num_layers
    if not isinstance(schedule, Mapping):
        schedule = {i: (plan.mode, plan.anchor, plan.head_map, plan.budgets) for i, plan in enumerate(schedule)}
    if set(schedule) != set(range(num_layers)):
        raise ValueError(f"schedule: expected the layers 0 to {num_layers - 1}, got {sorted(schedule)}")
    anchors = [layer for layer in range(num_layers) if schedule[layer][0] == ANCHOR]
    plans = [_freeze_layer(layer, schedule[layer], anchors, num_kv_heads) for layer in range(num_layers)]
    if len({plan.budgets is None for plan in plans if plan.mode != DENSE}) > 1:
        raise ValueError("schedule: some ANCHOR and REUSE layers have budgets and some have none; expected all or none")
    return tuple(_with_keep(layer, plans) for layer in range(num_layers))


def _freeze_layer(layer: int, entry: Sequence[Any], anchors: Sequence[int], num_kv_heads: int) -> LayerPlan:
    mode, anchor, head_map, budgets = (*entry, None, None)[:4]
    if mode not in (DENSE, ANCHOR, REUSE):
        raise ValueError(f"schedule: layer {layer} asks for mode {mode!r}; expected {DENSE}, {ANCHOR} or {REUSE}")
    if mode == DENSE:
        return LayerPlan(mode)
    if budgets is not None:
        budgets = tuple(int(budget) for budget in budgets)
        if len(budgets) != num_kv_heads or min(budgets) < 1:
            raise ValueError(
                f"schedule: layer {layer} asks for budgets {budgets}; expected {num_kv_heads} of at least 1"
            )
    if mode == ANCHOR:
        return LayerPlan(mode, budgets=budgets)
    earlier = [a for a in anchors if a < layer]
    if anchor not in earlier:
        raise ValueError(f"schedule: layer {layer} asks to REUSE layer {anchor}; the anchors before it are {earlier}")
    head_map = tuple(range(num_kv_heads)) if head_map is None else tuple(int(head) for head in head_map)
    if len(head_map) != num_kv_heads or not all(0 <= head < num_kv_heads for head in head_map):
        raise ValueError(
            f"schedule: layer {layer} asks for head map {head_map}; expected {num_kv_heads} heads "
            f"from 0 to {num_kv_heads - 1}"
        )
    return LayerPlan(mode, anchor, head_map, budgets)


def _with_keep(layer: int, plans: Sequence[LayerPlan]) -> LayerPlan:
    plan = plans[layer]
    if plan.mode != ANCHOR or plan.budgets is None:
        return plan
    users = [plan, *(other for other in plans if other.anchor == layer)]
    return dataclasses.replace(plan, keep=max(max(user.budgets) for user in users))


def attended_tiles(
    plans: Sequence[LayerPlan], tiles_by_layer: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray | None]:
    """For every layer the tiles_BKQC that it attended to, head maps and budgets applied; None where it was dense."""
    attended: dict[int, np.ndarray | None] = {}
    for layer, plan in enumerate(plans):
        tiles = None if plan.mode == DENSE else tiles_by_layer[layer if plan.anchor is None else plan.anchor]
        if plan.head_map is not None:
            tiles = tiles[:, list(plan.head_map)]
        attended[layer] = tiles if plan.budgets is None or tiles is None else np.asarray(cut_tiles(tiles, plan.budgets))
    return attended


def mean_density(plans: Sequence[LayerPlan], tiles_by_layer: Mapping[int, np.ndarray]) -> float:
    """Counted causal density of a whole forward: the mean of `density_of` over its layers."""
    return float(np.mean([density_of(tiles) for tiles in attended_tiles(plans, tiles_by_layer).values()]))


# --- Running a model ---

# What XLA's CPU compiler is told: its usual order of work allots every layer's buffers at once, at 8192 tokens 366 MB a
# device instead of 90. (Leave its YNNPACK products on: without them it needs 0.8 GB less there, and in jaxlib 0.10.2
# computes nonsense beyond 2048 tokens on two devices.)
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compile_ahead(function: Callable[..., Any], args: Sequence[Any], mesh: Mesh | None) -> Any:
    """Compiles `function` for arguments of these shapes: the one place that jits."""
    on_cpu = (mesh.devices.flat[0] if mesh else jax.devices()[0]).platform == "cpu"
    return jax.jit(function).lower(*args).compile(compiler_options=CPU_OPTIONS if on_cpu else None)


def compile_forward(
    model: Any, params: Any, input_ids: jax.Array, mesh: Mesh | None = None
) -> tuple[Callable[..., Any], float]:
    """Compiles the model's forward with its loss for these shapes.

    Args:
      model: a Flax module like LlamaModel, with `selection`, the field `layout` and the method
        `next_token_nll`.
      params: its variables, on every device of the mesh.
      input_ids: int32 [B, T], or a `jax.ShapeDtypeStruct`.
      mesh: one axis called AXIS; without it everything is done on one device.

    Returns:
      The compiled function (params, input_ids) -> (nll_BT, sown): float32 nats, for each token but the last (whose
      value means nothing) that of the one after it; and what the layers put into the collection "kascade". Beside it
      the seconds that tracing and compiling took.
    """
    length = input_ids.shape[1]
    layout = Layout.of(length, model.selection.block, mesh.shape[AXIS] if mesh else 1)
    model = model.clone(layout=layout)
    num_query_tiles = tile_count(length, model.selection.query_tile)

    def local(params: Any, ids: jax.Array, next_ids: jax.Array) -> tuple[Any, Any]:
        return model.apply(params, ids, next_ids, method="next_token_nll", mutable=["kascade"])

    if mesh:
        tokens, tiles = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)
        specs = {"in_specs": (PartitionSpec(), tokens, tokens), "out_specs": (tokens, tiles)}
        local = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)

    def forward(params: Any, input_ids: jax.Array) -> tuple[Any, Any]:
        next_ids = jnp.roll(input_ids, -1, axis=1)
        nll_BT, sown = local(params, layout.spread(input_ids, 1), layout.spread(next_ids, 1))
        sown = jax.tree.map(lambda tiles: layout.collect(tiles, 2)[:, :, :num_query_tiles], sown)
        return layout.collect(nll_BT, 1)[:, :length], sown

    start = time.perf_counter()
    compiled = compile_ahead(forward, (params, input_ids), mesh)
    return compiled, time.perf_counter() - start


def publish_tiles(sown: Mapping[str, Any]) -> None:
    """Refills KASCADE_CACHE with the tiles that a forward sowed, copied to the host."""
    chosen = {
        int(name.removeprefix("layer_")): np.asarray(layer["attention"]["tiles"])
        for name, layer in sown.get("kascade", {}).items()
    }
    KASCADE_CACHE.clear()
    KASCADE_CACHE.update(sorted(chosen.items()))


def calibrate_kascade(
    model: Any, params: Any, input_ids: jax.Array, tile_size: int, top_k: int, mesh: Mesh | None = None
) -> None:
    """Runs `model` densely while every layer also chooses its Top-K tiles, and leaves them in KASCADE_CACHE.

    Args:
      model: a Flax module with the fields `schedule`, `calibrate`, `tile_size` and `top_k`, such as LlamaModel; its
        other fields stay as they are.
      params: its variables, {"params": ...}.
      input_ids: int32 [B, T].
      tile_size: tokens.
      top_k: tiles.
      mesh: as for `compile_forward`.

    Raises:
      InputError: the model's losses are not finite.
    """
    observer = model.clone(schedule=None, calibrate=True, tile_size=tile_size, top_k=top_k)
    forward, _ = compile_forward(observer, params, input_ids, mesh)
    nll_BT, sown = forward(params, input_ids)
    if not np.isfinite(nll_BT[:, :-1]).all():
        raise InputError(
            "the model computes infinities or NaN on the calibration text: its weights or config are wrong"
        )
    publish_tiles(sown)


# --- Perplexity ---


def token_nll(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    """Negative log likelihood, in nats and float32, of each target under its row of logits; any leading axes."""
    logits_TV = logits_TV.astype(jnp.float32)
    target_logits = jnp.take_along_axis(logits_TV, targets_T[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_TV, axis=-1) - target_logits


def compute_perplexity(logits: jax.Array, ids: jax.Array) -> float:
    """Exp of the mean negative log likelihood of ids[:, 1:], each predicted by the logits one place before it.

    Args:
      logits: float [B, T, V].
      ids: int [B, T].

    Raises:
      ValueError: the shapes do not belong together, or leave nothing to predict.
    """
    if logits.shape[:-1] != ids.shape or ids.shape[-1] < 2:
        raise ValueError(f"expected logits [B, T, V] and ids [B, T] with T >= 2, got {logits.shape} and {ids.shape}")
    return perplexity_of(token_nll(logits[:, :-1], ids[:, 1:]))


def perplexity_of(nll: jax.Array) -> float:
    """Exp of the mean of negative log likelihoods (nats); infinite where that overflows."""
    mean = float(np.mean(np.asarray(nll), dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def check_perplexity(perplexity: float, vocab_size: int) -> None:
    """Raises InputError for a dense perplexity that no working model has: not finite, or worse than guessing."""
    if not perplexity <= vocab_size:
        raise InputError(
            f"the dense perplexity {perplexity:.4g} is worse than guessing among the {vocab_size} tokens of the "
            "vocabulary: likely causes are weights converted with the wrong RoPE order or for another config, a "
            "tokenizer of another model, or a text in a language that the model does not know"
        )
