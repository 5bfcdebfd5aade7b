"""The Kascade method: tiles, density, similarity of layers, schedules, perplexity.

Pure functions in the order of the method; nothing here knows flags, files, devices or a model's layers. Anchor and
reuse layers are Kascade's (arXiv 2512.16391); the similarity by Jaccard and the threshold rule are this project's.

One letter, one meaning, in the suffixes of array names and in einsums:
  B batch, T query time, S key time, D model width, N query heads, K KV heads, G = N // K query heads of a KV head,
  Z = B K, H head width, F MLP width, V vocabulary, L layers, Q query tiles, Y tokens of a query tile, P key tiles,
  M tokens of a key tile, C chosen tiles, R rows and W keys of a kernel's block, J blocks, U budget grid.

Tiles travel as `tiles_BKQC` (int32): for every KV head and query tile the indices of its chosen key tiles, best first.
The query tile's own (diagonal) key tile is always the first, and unused slots come last and hold `NO_TILE`. With tile
size 2 and Top-K 2, six tokens make three query tiles; a head that finds its second tile dull chooses

  [[0, NO_TILE],   query tile 0 sees only itself
   [1, 0],         query tile 1 sees both of its causal tiles
   [2, 0]]         query tile 2 keeps itself and tile 0, and drops tile 1
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from errors import InputError, quote

NO_TILE = int(np.iinfo(np.int32).max)  # an unused slot: beyond every index, so that an ascending sort puts it last
DENSE, ANCHOR, REUSE = MODES = ("DENSE", "ANCHOR", "REUSE")
EXACT, FAST = "exact", "fast"  # how an anchor scores
FAST_ROWS = 4  # rows of a query tile that fast scoring looks at
DEFAULT_TOP_K = 12

KASCADE_CACHE: dict[int, np.ndarray] = {}  # layer -> tiles_BKQC that it chose; see `publish_tiles`


# --- Tiles ---


def tile_count(length: int, tile_size: int) -> int:
    """Number of tiles that cover `length` tokens; the last may be partly filled."""
    return -(-length // tile_size)


def visible(row: Any, key: Any, window: int | None) -> Any:
    """Whether a row attends to a key at all: one at most at its own place, within a sliding window if there is one.

    A window counts the row's own key, as in Mistral (arXiv 2310.06825).
    """
    return key <= row if window is None else (key <= row) & (key > row - window)


def _flag(default: Any, help: str) -> Any:
    """A field that is also a flag of the command line, with its help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Selection:
    """How an anchor chooses key tiles; each field's meaning is its help.

    `top_k` and `density` are two ways to say the budget: at most one is given, and without either it is Top-K 12.
    `query_tile` is a multiple or a divisor of `tile_size`.

    Raises:
      InputError: a size out of range, both budgets, or a top_k without room for a query tile's own key tiles and sinks.
    """

    tile_size: int = _flag(16, "tokens in a key tile")
    top_k: int | None = _flag(None, f"key tiles kept per query tile and KV head, its own among them ({DEFAULT_TOP_K})")
    density: float | None = _flag(
        None, "instead of --top_k: share of the causal key tiles kept in every sparse layer, in (0, 1]"
    )
    min_tiles: int = _flag(0, "with --density, key tiles kept per query tile and KV head at least")
    sink_tiles: int = _flag(1, "first tiles of the text that every query tile keeps, counted in top_k")
    local_tiles: int = _flag(0, "tiles before its own that a query tile keeps, counted in top_k")
    query_tile: int | None = _flag(
        None, "tokens that share one choice of tiles, a multiple or divisor of tile_size (tile_size)"
    )
    anchor_scoring: str = _flag(EXACT, f"anchors score all rows of a query tile (exact), or {FAST_ROWS} of them (fast)")
    window: int | None = None  # the model's sliding window, tokens, which `LlamaModel` fills in; no flag

    def __post_init__(self) -> None:
        self._resolve_defaults()
        at_least = {"tile_size": 1, "query_tile": 1, "sink_tiles": 0, "local_tiles": 0, "min_tiles": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.block % self.query_tile or self.block % self.tile_size:
            raise InputError(
                f"query_tile must be a multiple or a divisor of tile_size, {self.tile_size}, got {self.query_tile}"
            )
        if self.anchor_scoring not in (EXACT, FAST):
            raise InputError(f"anchor_scoring must be {EXACT} or {FAST}, got {quote(self.anchor_scoring)}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density must be above 0 and at most 1, got {self.density}")
        if self.top_k is not None:
            self._check_room()

    def _resolve_defaults(self) -> None:
        if self.top_k is not None and self.density is not None:
            raise InputError("top_k and density exclude each other: give one of them")
        if self.top_k is None and self.density is None:
            object.__setattr__(self, "top_k", DEFAULT_TOP_K)
        if self.min_tiles > 0 and self.density is None:
            raise InputError(f"min_tiles has no effect without density, got {self.min_tiles}")
        if self.query_tile is None:
            object.__setattr__(self, "query_tile", self.tile_size)

    def _check_room(self) -> None:
        if self.top_k < self.num_kept_tiles:
            raise InputError(
                f"top_k must be at least {self.num_kept_tiles}: every query tile keeps {self.own_tiles} of its own, "
                f"{self.sink_tiles} sink_tiles and {self.local_tiles} local_tiles; got {self.top_k}"
            )

    @property
    def block(self) -> int:
        """Tokens in the least block of whole key tiles and whole query tiles."""
        return max(self.query_tile, self.tile_size)

    @property
    def own_tiles(self) -> int:
        """Key tiles in one query tile, at least 1."""
        return self.block // self.tile_size

    @property
    def num_kept_tiles(self) -> int:
        """Key tiles that every query tile keeps whatever their mass, as far as it sees them."""
        return self.own_tiles + self.sink_tiles + self.local_tiles

    def first_seen(self, first_row: Any) -> Any:
        """The first key tile that a query tile sees which begins at this row; its first row looks back furthest."""
        return 0 * first_row if self.window is None else (first_row - self.window + 1).clip(0) // self.tile_size

    def slots(self, num_key_tiles: int) -> int:
        """C: key tiles that a query tile keeps at most."""
        if self.density is None:
            return min(self.top_k, num_key_tiles)
        return min(max(math.ceil(self.density * num_key_tiles), self.least_tiles), num_key_tiles)

    @property
    def least_tiles(self) -> int:
        """Key tiles that a query tile keeps whatever its position gives it by density, as far as it sees them."""
        return max(self.num_kept_tiles, self.min_tiles)

    def scored_rows(self) -> np.ndarray:
        """int: the rows of a query tile whose attention is pooled; a sample is even and has the first and the last."""
        rows = self.query_tile if self.anchor_scoring == EXACT else min(FAST_ROWS, self.query_tile)
        return np.linspace(0, self.query_tile - 1, rows).astype(int)

    def with_top_k(self, top_k: int) -> Selection:
        """The same selection with another budget."""
        return dataclasses.replace(self, top_k=top_k, density=None, min_tiles=0)


def select_tiles(scores_BKQP: jax.Array, selection: Selection, query_tiles_Q: jax.Array | None = None) -> jax.Array:
    """Keeps the best causal key tiles of each query tile, within the selection's window and budget.

    Args:
      scores_BKQP: float, attention mass of each key tile, pooled over a query tile's rows and a KV head's query heads;
        any leading axes.
      selection: the budget; sinks are where attention sinks lie (arXiv 2309.17453).
      query_tiles_Q: int32, the place of each query tile in the sequence; 0, 1, 2... when left out.

    Returns:
      tiles_BKQC: int32 with C = selection.slots(P), best first: a query tile's own, then sinks and local tiles, then
      by mass.
    """
    *leading, Q, P = scores_BKQP.shape
    first_row_Q1 = (jnp.arange(Q) if query_tiles_Q is None else query_tiles_Q)[:, None] * selection.query_tile
    tile_1P = jnp.arange(P)[None]
    start_1P = tile_1P * selection.tile_size
    first_Q1 = selection.first_seen(first_row_Q1)
    past_QP = (start_1P + selection.tile_size <= first_row_Q1) & (tile_1P >= first_Q1)
    seen_QP = (start_1P < first_row_Q1 + selection.query_tile) & (tile_1P >= first_Q1)
    near_QP = start_1P + (selection.local_tiles + 1) * selection.tile_size > first_row_Q1
    most = jnp.finfo(scores_BKQP.dtype).max
    scores_ZQP = scores_BKQP.reshape(-1, Q, P)
    scores_ZQP = jnp.where(((tile_1P < selection.sink_tiles) | near_QP)[None], most, scores_ZQP)
    own_QP = jnp.where(seen_QP, jnp.inf, -jnp.inf)  # own tiles come first, later ones last
    _, tiles_ZQC = jax.lax.top_k(jnp.where(past_QP[None], scores_ZQP, own_QP[None]), selection.slots(P))
    kept_ZQC = tiles_ZQC * selection.tile_size < (first_row_Q1 + selection.query_tile)[None]
    kept_ZQC &= tiles_ZQC >= first_Q1[None]
    if selection.density is not None:
        seen_Q1 = seen_QP.sum(-1, keepdims=True, dtype=jnp.float32)
        share_Q1 = jnp.ceil(selection.density * seen_Q1 - 1e-4).astype(jnp.int32)
        slots_1C = jnp.arange(tiles_ZQC.shape[-1])[None]
        kept_ZQC &= (slots_1C < jnp.maximum(share_Q1, selection.least_tiles))[None]
    return jnp.where(kept_ZQC, tiles_ZQC, NO_TILE).astype(jnp.int32).reshape(*leading, Q, -1)


def select_step_tiles(mass_ZP: jax.Array, selection: Selection, positions_B: jax.Array) -> jax.Array:
    """The tiles of one new token a sequence, whose query tile is its own row, all of whose attention is seen.

    Args:
      mass_ZP: float, attention mass of each key tile, pooled over a KV head's query heads.
      selection: of prefill.
      positions_B: int32, the place of each new token.

    Returns:
      tiles_BK1C, as `select_tiles`.
    """
    rule = dataclasses.replace(selection, query_tile=1, anchor_scoring=EXACT)
    (Z, P), B = mass_ZP.shape, positions_B.shape[0]
    return jax.vmap(lambda mass_K1P, position: select_tiles(mass_K1P, rule, position[None]))(
        mass_ZP.reshape(B, Z // B, 1, P), positions_B
    )


def cut_tiles(tiles_BKQC: jax.Array, budgets: Sequence[int]) -> jax.Array:
    """The first budgets[k] tiles of each KV head k, best first still; C is the largest budget."""
    return keep_first(tiles_BKQC[..., : max(budgets)], np.array(budgets))


def keep_first(tiles_BKQC: np.ndarray | jax.Array, budgets_K: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The tiles in as many slots; the first budgets_K[k] of each KV head k stay, the others become NO_TILE."""
    numbers = np if isinstance(tiles_BKQC, np.ndarray) else jnp  # on the host nothing is compiled for each shape
    slots_111C = np.arange(tiles_BKQC.shape[-1])[None, None, None]
    return numbers.where(slots_111C < numbers.asarray(budgets_K)[None, :, None, None], tiles_BKQC, NO_TILE)


def seen_tiles(tiles_BKQC: np.ndarray, selection: Selection | None = None) -> np.ndarray:
    """int [B, K, Q]: how many key tiles each query tile could choose from; its own are the last, and always chosen.

    Without the selection that made them, as if it had no window.
    """
    tiles_BKQC = np.asarray(tiles_BKQC)
    seen_BKQ = np.where(tiles_BKQC == NO_TILE, -1, tiles_BKQC).max(axis=-1) + 1
    return seen_BKQ - (selection.first_seen(np.arange(seen_BKQ.shape[-1]) * selection.query_tile) if selection else 0)


def density_of(tiles_BKQC: np.ndarray | None, selection: Selection | None = None) -> float:
    """Counted density: attended (query tile, key tile) pairs / seen pairs, over all heads; None is dense."""
    if tiles_BKQC is None:
        return 1.0
    return np.count_nonzero(np.asarray(tiles_BKQC) != NO_TILE) / int(seen_tiles(tiles_BKQC, selection).sum())


def density_of_step(tiles_BNKC: np.ndarray, seen_N: np.ndarray) -> float:
    """The same of decoding: attended tiles over those that each of N steps could attend to, over batch and heads."""
    tiles_BNKC = np.asarray(tiles_BNKC)
    B, _, K, _ = tiles_BNKC.shape
    return np.count_nonzero(tiles_BNKC != NO_TILE) / (B * K * int(seen_N.sum()))


def mean_density(attended: Mapping[int, np.ndarray | None], selection: Selection | None = None) -> float:
    """Counted density of a whole forward: the mean over its layers, given what each attended to."""
    return float(np.mean([density_of(tiles, selection) for tiles in attended.values()]))


def membership(tiles_BKQC: np.ndarray, num_key_tiles: int) -> np.ndarray:
    """float32 [B, K, Q, P], 1 where the tile was chosen."""
    chosen = np.zeros((*tiles_BKQC.shape[:3], num_key_tiles + 1), np.float32)
    np.put_along_axis(chosen, np.minimum(tiles_BKQC, num_key_tiles), 1.0, axis=-1)  # unused slots lie beyond the last
    return chosen[..., :-1]


# --- Similarity of layers ---


def jaccard_by_head(tiles_a_BKQC: np.ndarray, tiles_b_BKQC: np.ndarray) -> np.ndarray:
    """Jaccard similarity |a & b| / |a | b| of two layers' tiles, for every pair of their KV heads.

    Averaged over batch and query tiles. Query tiles that keep everything they see are left out: they are identical in
    every layer. If every query tile keeps everything, the answer is 1.

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
    common_BQKK = np.einsum("BKQP,BkQP->BQKk", chosen_a, chosen_b)
    sizes_Q11 = chosen_a[0, 0].sum(-1)[:, None, None]  # all heads and both layers keep the same number
    either_BQKK = 2 * sizes_Q11 - common_BQKK
    return np.mean(common_BQKK / either_BQKK, axis=(0, 1), dtype=np.float64)


def jaccard_similarity(tiles_a: np.ndarray, tiles_b: np.ndarray) -> float:
    """How alike layer a's tiles and layer b's are, in [0, 1]: `jaccard_by_head` with b's best head for each of a's.

    This is the similarity of layer a reusing anchor b through the head map of `best_head_map`; both are tiles_BKQC.
    """
    return float(jaccard_by_head(tiles_a, tiles_b).max(axis=1).mean())


def best_head_map(tiles_a_BKQC: np.ndarray, tiles_b_BKQC: np.ndarray) -> tuple[int, ...]:
    """For each KV head of reuse layer a, the KV head of anchor b whose tiles are most like its own; many-to-one."""
    by_head = jaccard_by_head(tiles_a_BKQC, tiles_b_BKQC)
    tie_break = np.eye(len(by_head)) * 1e-9  # equal heads: the one of the same number
    return tuple(int(head) for head in np.argmax(by_head + tie_break, axis=1))


def similarity_matrix(tiles_by_layer: Mapping[int, np.ndarray]) -> np.ndarray:
    """float64 [L, L]: entry [i, a] is the similarity of layer i reusing an earlier layer a; 0 elsewhere."""
    num_layers = len(tiles_by_layer)
    similarity_LL = np.zeros((num_layers, num_layers))
    for layer in range(num_layers):
        for anchor in range(layer):
            similarity_LL[layer, anchor] = jaccard_similarity(tiles_by_layer[layer], tiles_by_layer[anchor])
    return similarity_LL


# --- Schedules ---


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one layer does.

    Attributes:
      mode: DENSE, ANCHOR or REUSE.
      anchor: for REUSE, the layer whose tiles it attends to.
      head_map: for REUSE, the anchor's KV head that each of its KV heads takes its tiles from.
      budgets: key tiles of each KV head; None is the selection's own number.
      largest_budget: for an ANCHOR with budgets, how many tiles it must choose: the largest budget among itself and
        the layers that reuse its tiles.
      similarity: to the anchor, or to the best one within reach; None where there was nothing to compare with.
      reason: why, as it is printed.
    """

    mode: str = DENSE
    anchor: int | None = None
    head_map: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    largest_budget: int | None = None
    similarity: float | None = dataclasses.field(default=None, compare=False)
    reason: str = dataclasses.field(default="", compare=False)

    def attended(self, chosen_BKQC: jax.Array) -> jax.Array:
        """The tiles that this layer attends to, of those that its anchor (an ANCHOR: itself) chose."""
        mine = chosen_BKQC if self.head_map is None else chosen_BKQC[:, np.array(self.head_map)]
        return mine if self.budgets is None else cut_tiles(mine, self.budgets)


FIRST_LAYER = LayerPlan(DENSE, reason="full attention - paper requirement")
Schedule = tuple[LayerPlan, ...]


def threshold_schedule(tiles_by_layer: Mapping[int, np.ndarray], threshold: float, max_reuse_dist: int) -> Schedule:
    """The threshold rule on the tiles that every layer would choose, with the best head map for each REUSE."""
    plans = decide_by_threshold(similarity_matrix(tiles_by_layer), threshold, max_reuse_dist)
    return add_head_maps(plans, tiles_by_layer)


def decide_by_threshold(similarity_LL: np.ndarray, threshold: float, max_reuse_dist: int) -> Schedule:
    """The threshold rule: greedy, from the first layer to the last.

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
    plans = [FIRST_LAYER]
    for layer in range(1, len(similarity_LL)):
        anchors = [a for a, plan in enumerate(plans) if plan.mode == ANCHOR]
        plans.append(_decide_layer(layer, anchors, similarity_LL[layer], threshold, max_reuse_dist))
    return tuple(plans)


def _decide_layer(
    layer: int, anchors: Sequence[int], similarity_L: np.ndarray, threshold: float, max_reuse_dist: int
) -> LayerPlan:
    if not anchors:
        return LayerPlan(ANCHOR, reason="first sparse layer")
    near = [anchor for anchor in anchors if layer - anchor < max_reuse_dist]
    if not near:
        return LayerPlan(ANCHOR, reason=f"distance: {layer - anchors[-1]}")
    best = max(near, key=lambda anchor: similarity_L[anchor])
    similarity = float(similarity_L[best])
    if similarity >= threshold:
        return LayerPlan(REUSE, best, similarity=similarity, reason=f"similarity: {similarity:.2%}")
    return LayerPlan(ANCHOR, similarity=similarity, reason=f"low similarity: {similarity:.2%}")


def add_head_maps(plans: Sequence[LayerPlan], tiles_by_layer: Mapping[int, np.ndarray]) -> Schedule:
    """The schedule with the best head map, by Jaccard, in every REUSE."""
    return tuple(
        dataclasses.replace(plan, head_map=best_head_map(tiles_by_layer[layer], tiles_by_layer[plan.anchor]))
        if plan.mode == REUSE
        else plan
        for layer, plan in enumerate(plans)
    )


def generate_kascade_schedule(threshold: float, max_reuse_dist: int) -> dict[int, tuple[str, int | None]]:
    """The threshold rule on what the last calibration left in KASCADE_CACHE: {layer: (mode, anchor or None)}.

    Raises:
      InputError: no calibration has run, or a parameter is out of range.
    """
    if not KASCADE_CACHE:
        raise InputError("KASCADE_CACHE is empty: run calibrate_kascade before generate_kascade_schedule")
    plans = threshold_schedule(KASCADE_CACHE, threshold, max_reuse_dist)
    return {layer: (plan.mode, plan.anchor) for layer, plan in enumerate(plans)}


def freeze_schedule(
    schedule: Mapping[int, tuple[str, int | None]] | Sequence[LayerPlan] | None, num_layers: int, num_kv_heads: int
) -> Schedule:
    """Validates a schedule for a model and completes it; None is dense throughout.

    Args:
      schedule: {layer: (mode, anchor or None)} or a `LayerPlan` for each layer. A REUSE without a head map maps every
        head to the anchor's head of the same number. Budgets are given to every ANCHOR and REUSE layer or to none.
      num_layers, num_kv_heads: of the model.

    Raises:
      InputError: names the layer, what it asked for, and what it may ask for.
    """
    if schedule is None:
        return (LayerPlan(),) * num_layers
    if isinstance(schedule, Mapping):
        _check_layers(sorted(schedule), num_layers)
        schedule = [LayerPlan(*schedule[layer]) for layer in range(num_layers)]
    _check_layers(range(len(schedule)), num_layers)
    anchors = [layer for layer, plan in enumerate(schedule) if plan.mode == ANCHOR]
    plans = [_freeze_layer(layer, plan, anchors, num_kv_heads) for layer, plan in enumerate(schedule)]
    if len({plan.budgets is None for plan in plans if plan.mode != DENSE}) > 1:
        raise InputError("schedule: some ANCHOR and REUSE layers have budgets and some have none; expected all or none")
    return tuple(_with_largest_budget(layer, plans) for layer in range(num_layers))


def _check_layers(layers: Sequence[int], num_layers: int) -> None:
    if list(layers) != list(range(num_layers)):
        raise InputError(f"schedule: expected the layers 0 to {num_layers - 1}, got {quote(list(layers))}")


def _freeze_layer(layer: int, plan: LayerPlan, anchors: Sequence[int], num_kv_heads: int) -> LayerPlan:
    if plan.mode not in MODES:
        raise InputError(
            f"schedule: layer {layer} asks for mode {quote(plan.mode)}; expected {DENSE}, {ANCHOR}, {REUSE}"
        )
    if plan.mode == DENSE:
        return LayerPlan(DENSE, reason=plan.reason)
    if plan.budgets is not None:
        _check_numbers(f"layer {layer}: budgets", plan.budgets, num_kv_heads, 1, NO_TILE - 1)
    if plan.mode == ANCHOR:
        return dataclasses.replace(plan, anchor=None, head_map=None)
    earlier = [a for a in anchors if a < layer]
    if plan.anchor not in earlier:
        raise InputError(
            f"schedule: layer {layer} asks to REUSE layer {quote(plan.anchor)}; the anchors before it are {earlier}"
        )
    head_map = tuple(range(num_kv_heads)) if plan.head_map is None else tuple(plan.head_map)
    _check_numbers(f"layer {layer}: head_map", head_map, num_kv_heads, 0, num_kv_heads - 1)
    return dataclasses.replace(plan, head_map=head_map)


def _check_numbers(what: str, values: Sequence[int], count: int, least: int, most: int) -> None:
    if len(values) != count or not all(type(value) is int and least <= value <= most for value in values):
        raise InputError(
            f"schedule: {what} must be {count} whole numbers from {least} to {most}, got {quote(list(values))}"
        )


def _with_largest_budget(layer: int, plans: Sequence[LayerPlan]) -> LayerPlan:
    plan = plans[layer]
    if plan.mode != ANCHOR or plan.budgets is None:
        return plan
    users = [plan, *(other for other in plans if other.anchor == layer)]
    return dataclasses.replace(plan, largest_budget=max(max(user.budgets) for user in users))


def attended_tiles(
    plans: Sequence[LayerPlan], tiles_by_layer: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray | None]:
    """For every layer the tiles_BKQC that it attended to, on the host; None where it was dense."""
    return {
        layer: None
        if plan.mode == DENSE
        else np.asarray(plan.attended(tiles_by_layer[layer if plan.anchor is None else plan.anchor]))
        for layer, plan in enumerate(plans)
    }


# --- Calibration ---


def publish_tiles(tiles_by_layer: Mapping[int, jax.Array]) -> None:
    """Refills KASCADE_CACHE with the tiles that a forward returned, copied to the host.

    Done after calibration and after the sparse run; `generate_kascade_schedule` alone reads the cache.
    """
    KASCADE_CACHE.clear()
    KASCADE_CACHE.update({layer: np.asarray(tiles_BKQC) for layer, tiles_BKQC in sorted(tiles_by_layer.items())})


def calibrate_kascade(
    model: Any, params: Any, input_ids: jax.Array, tile_size: int, top_k: int | None, mesh: Any = None
) -> None:
    """Runs `model` densely while every layer also chooses its Top-K tiles, and leaves them in KASCADE_CACHE.

    One text after another, so that several take no more memory than one.

    Args:
      model: a `llama_model.LlamaModel`; its fields stay as they are but for these two sizes.
      params: its variables, {"params": ...}.
      input_ids: int32 [B, T].
      tile_size: tokens.
      top_k: tiles; None keeps the density that the model's selection asks for.
      mesh: as for `LlamaModel.compile`.

    Raises:
      InputError: the model's losses are not finite.
    """
    selection = model.selection
    sizes = {"tile_size": tile_size} | ({} if top_k is None else {"top_k": top_k, "density": None})
    if selection.query_tile == selection.tile_size:
        sizes["query_tile"] = None  # it follows the tile size
    selection = dataclasses.replace(selection, **sizes)
    observer = model.clone(schedule=None, calibrate=True, selection=selection)
    forward, tiles_by_layer = observer.compile(params, input_ids[:1], mesh), {}
    for ids_T in input_ids:
        output = forward(params, ids_T[None])
        if not np.isfinite(output.nll).all():
            raise InputError(
                "the model computes infinities or NaN on the calibration text: its weights or config are wrong"
            )
        for layer, tiles_BKQC in output.fetch_tiles().items():
            tiles_by_layer.setdefault(layer, []).append(tiles_BKQC)
    publish_tiles({layer: np.concatenate(parts) for layer, parts in tiles_by_layer.items()})


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


LEAST_PREDICTIONS = 64  # fewer say too little to call a model broken


def check_perplexity(perplexity: float, vocab_size: int, num_predictions: int) -> str | None:
    """A warning, or None, for a dense perplexity that is no better than guessing on a few predictions.

    Raises:
      InputError: no working model has it: it is not finite, or worse than guessing on at least LEAST_PREDICTIONS.
    """
    if perplexity <= vocab_size:
        return None
    message = (
        f"the dense perplexity {perplexity:.4g} is worse than guessing among the {vocab_size} tokens of the "
        "vocabulary: likely causes are weights converted with the wrong RoPE order or for another config, a "
        "tokenizer of another model, or a text in a language that the model does not know"
    )
    if num_predictions >= LEAST_PREDICTIONS or not math.isfinite(perplexity):
        raise InputError(message)
    return f"on only {num_predictions} predictions {message}"
