"""Which layers may reuse which, and how many tiles each head needs: found by running a model layer by layer.

Beside the guide's rule (kascade_core) stand three things. The paper's (arXiv 2512.16391) similarity of two layers, by
attention mass, with its dynamic programme for the anchors. A search of our own that measures the loss itself: it runs
every layer alone sparsely, and finds (measured on SmolLM2-135M) that the divergence from dense grows as the square of
the attention mass that the layer's rows lose. So

  damage of layer b through the tiles of a  =  beta_b  mean over rows and heads of (mass lost)^2,

with one measured number beta_b a layer; anchors, head maps and budgets are then chosen to make the sum of all layers
small. And JSON files of finished schedules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kascade_core import (
    ANCHOR,
    DENSE,
    FIRST_LAYER,
    REUSE,
    Decision,
    InputError,
    LayerPlan,
    Selection,
    compile_forward,
    freeze_schedule,
    membership,
    perplexity_of,
    select_tiles,
)
from kascade_layers import LayerRunner
from llama_model import LlamaModel

# --- What calibration sees ---


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a dense forward over one text shows.

    Attributes:
      scores: float32 [L, K, Q, P], each layer's masses; those of a query tile sum to 1.
      importance: float [L], the paper's weight of a layer, `LayerRunner.importance`.
    """

    scores: np.ndarray
    importance: np.ndarray


def observe(runner: LayerRunner, ids_BT: jax.Array) -> Observation:
    """A dense forward over ids [1, T]."""
    x_BTD, scores, importance = runner.embed(ids_BT), [], []
    for layer in _progress(range(runner.config.num_hidden_layers), "observing"):
        masses_KQP = np.asarray(runner.scores(layer, x_BTD))[0]
        scores.append(masses_KQP / masses_KQP.sum(-1, keepdims=True))
        importance.append(runner.importance(layer, x_BTD))
        x_BTD = runner.dense(layer, x_BTD)
    return Observation(np.stack(scores), np.array(importance))


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm(items, desc=what, unit="layer", disable=None, leave=False)


def _places(scores_XQP: np.ndarray, selection: Selection) -> np.ndarray:
    """int [X, Q, P]: each key tile's place in its query tile's ranking; P where it is not seen."""
    X, Q, P = scores_XQP.shape
    everything = dataclasses.replace(selection, top_k=P, density=None, ranked=True)
    ranked = np.asarray(select_tiles(jnp.asarray(scores_XQP), everything))
    places = np.full((X, Q, P + 1), P)  # the last takes what unused slots write
    np.put_along_axis(places, np.minimum(ranked, P), np.broadcast_to(np.arange(P), ranked.shape), axis=-1)
    return places[..., :P]


def _seen(num_query_tiles: int, num_key_tiles: int, selection: Selection) -> np.ndarray:
    last_row_Q = (np.arange(num_query_tiles) + 1) * selection.query_tile - 1
    return np.arange(num_key_tiles) * selection.tile_size <= last_row_Q[:, None]


def recovered_mass(scores_LKQP: np.ndarray, selection: Selection, budget: int) -> np.ndarray:
    """float32 [Q, L K, L K]: of the mass of a head (the last axis), the share in the best `budget` tiles of another."""
    L, K, Q, P = scores_LKQP.shape
    scores_XQP = scores_LKQP.reshape(L * K, Q, P)
    chosen = (_places(scores_XQP, selection) < budget).astype(np.float32)
    return np.matmul(chosen.transpose(1, 0, 2), scores_XQP.transpose(1, 2, 0))


def mass_similarity(observations: Sequence[Observation], selection: Selection) -> tuple[np.ndarray, dict]:
    """The paper's similarity of layer i reusing an earlier layer a, float [L, L] in [0, 1], and its best head maps.

    For every pair of KV heads, the share of i's attention mass that a's Top-K recovers over that which i's own Top-K
    recovers; the best of a's heads for each of i's; the minimum over the text's query tiles that drop something, the
    mean over texts and heads (arXiv 2512.16391).

    Returns:
      similarity_LL, 0 where a is not earlier than i; {(i, a): the head of a for each KV head of i}.
    """
    L, K, Q, P = observations[0].scores.shape
    slots = selection.slots(P)
    dropping = _seen(Q, P, selection).sum(-1) > slots
    if not dropping.any():
        dropping[:] = True
    total = np.zeros((L, K, L, K))  # a's layer and head, i's layer and head
    means = np.zeros((L, K, L, K))
    for observation in observations:
        recovered = recovered_mass(observation.scores, selection, slots)[dropping]
        own = np.diagonal(recovered, axis1=1, axis2=2)
        ratio = np.minimum(recovered / own[:, None, :], 1).reshape(-1, L, K, L, K)
        total += ratio.min(0) / len(observations)
        means += ratio.mean(0) / len(observations)
    best = means.argmax(1)  # [a, i, head of i]
    values = np.take_along_axis(total, best[:, None], axis=1)[:, 0].mean(-1)
    maps = {(i, a): tuple(int(head) for head in best[a, i]) for i in range(L) for a in range(i)}
    return np.tril(values.T, -1), maps


# --- The paper's programme ---


def dp_anchors(similarity_LL: np.ndarray, num_anchors: int, importance_L: np.ndarray | None = None) -> list[int]:
    """The anchors among layers 1 to L - 1 that maximise every layer's similarity to the nearest anchor before it.

    dp[m][j] = max over i of dp[m - 1][i] + sum of S[l, i] for l in i..j-1, with S[i, i] = 1, weighted by importance
    (arXiv 2512.16391). Layer 0 is dense and takes no part; layer 1 is always an anchor.

    Raises:
      InputError: there are not so many layers.
    """
    L = len(similarity_LL)
    check_anchors(num_anchors, L)
    weights_L = np.ones(L) if importance_L is None else importance_L
    gains = (similarity_LL + np.eye(L)) * weights_L[:, None]
    best = np.full((num_anchors + 1, L + 1), -np.inf)
    source = np.zeros((num_anchors + 1, L + 1), int)
    best[0, 1] = 0
    for m in range(1, num_anchors + 1):
        for j in range(2, L + 1):
            totals = [best[m - 1, i] + gains[i:j, i].sum() for i in range(1, j)]
            source[m, j], best[m, j] = 1 + int(np.argmax(totals)), max(totals)
    anchors, j = [], L
    for m in range(num_anchors, 0, -1):
        j = int(source[m, j])
        anchors.append(j)
    return anchors[::-1]


def check_anchors(num_anchors: int, num_layers: int) -> None:
    """Raises InputError for more anchors than layers after the first, or none."""
    if not 1 <= num_anchors < num_layers:
        raise InputError(
            f"anchors must be from 1 to {num_layers - 1}, for layer 0 of the {num_layers} is dense, got {num_anchors}"
        )


def decide_nearest(similarity_LL: np.ndarray, anchors: Sequence[int]) -> list[Decision]:
    """Every layer that is no anchor reuses the nearest anchor before it, as the paper's programme counts."""
    decisions = [FIRST_LAYER]
    for layer in range(1, len(similarity_LL)):
        if layer in anchors:
            decisions.append(Decision(ANCHOR, None, None, "chosen by dynamic programming"))
            continue
        anchor = max(a for a in anchors if a < layer)
        similarity = float(similarity_LL[layer, anchor])
        decisions.append(Decision(REUSE, anchor, similarity, f"similarity: {similarity:.2%}"))
    return decisions


# --- The search ---

UNIFORM, PER_LAYER, PER_HEAD = "uniform", "layer", "head"  # who has a budget of its own

DAMAGE_TOKENS = 1024  # of the calibration text, at most, on which every layer is run alone
DAMAGE_STEP = 4  # every so many of their tokens are compared with dense


def measure_damage(model: LlamaModel, params: Any, ids_BT: jax.Array, mesh: Mesh) -> np.ndarray:
    """beta_L: each layer's KL divergence from dense (nats a token) when it alone is sparse, over its mean squared loss.

    The loss is of attention mass, in every query tile and head. Each layer attends to the best eighth of the tiles, of
    its own choice; layer 0, which is dense, gets 0.
    """
    ids_BT = ids_BT[:, :DAMAGE_TOKENS]
    runner = LayerRunner(model, params, ids_BT.shape[1], mesh)
    P, L = runner.num_key_tiles, runner.config.num_hidden_layers
    selection = dataclasses.replace(runner.selection, top_k=max(runner.selection.always, P // 8), density=None)
    stream = [runner.embed(ids_BT)]
    for layer in range(L):
        stream.append(runner.dense(layer, stream[-1]))
    beta_L = np.zeros(L)
    for layer in _progress(range(1, L), "running each layer alone"):
        masses = runner.scores(layer, stream[layer])
        tiles = select_tiles(masses, selection)
        x_BTD = runner.run(runner.sparse(layer, stream[layer], tiles), layer + 1, lambda *_: None)
        _, kl, _ = runner.compare(stream[-1], x_BTD, ids_BT, DAMAGE_STEP)
        masses = np.asarray(masses / masses.sum(-1, keepdims=True))
        kept = (masses * membership(np.asarray(tiles), P)).sum(-1)
        beta_L[layer] = max(float(kl.mean()), 0) / max(float(np.mean((1 - kept) ** 2)), 1e-9)
    return beta_L


def budget_grid(least: int, num_key_tiles: int) -> np.ndarray:
    """int: the budgets that are tried, each at most an eighth above the one before."""
    grid = [least]
    while grid[-1] < num_key_tiles:
        grid.append(min(max(grid[-1] + 1, grid[-1] * 9 // 8), num_key_tiles))
    return np.array(grid)


@dataclasses.dataclass(frozen=True)
class LossTable:
    """Mean squared lost mass of every head through every other head's tiles, at each budget.

    Attributes:
      grid: int [G], the budgets.
      densities: float [G], their counted causal densities.
      lost: float [G, L, K, L, K], the sources' layer and head, then the users'.
      seen: int [Q], the key tiles that each query tile sees.
    """

    grid: np.ndarray
    densities: np.ndarray
    lost: np.ndarray
    seen: np.ndarray

    def density_of_budget(self, budget: int) -> float:
        """Counted causal density of one budget for all."""
        return np.minimum(self.seen, budget).sum() / self.seen.sum()

    @classmethod
    def of(cls, observations: Sequence[Observation], selection: Selection) -> LossTable:
        """Means over the observed texts."""
        L, K, Q, P = observations[0].scores.shape
        seen_Q = _seen(Q, P, selection).sum(-1)
        grid = budget_grid(min(selection.block // selection.tile_size, P), P)
        lost = np.zeros((len(grid), L, K, L, K))
        for observation in observations:
            scores_XQP = observation.scores.reshape(L * K, Q, P)
            places, users = _places(scores_XQP, selection).transpose(1, 0, 2), scores_XQP.transpose(1, 2, 0)
            for at, budget in enumerate(grid):
                kept = np.matmul((places < budget).astype(np.float32), users)
                lost[at] += np.mean(np.square(1 - np.minimum(kept, 1)), axis=0).reshape(L, K, L, K)
        density = np.array([np.minimum(seen_Q, budget).sum() / seen_Q.sum() for budget in grid])
        return cls(grid, density, lost / len(observations), seen_Q)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole choice: anchors, each layer's source and head map, and the place in the grid of each head's budget."""

    sources: tuple[int, ...]  # of layers 0 to L - 1; an anchor is its own, and layer 0 counts for nothing
    maps: tuple[tuple[int, ...], ...]
    places: np.ndarray  # int [L, K]
    damage: float  # predicted KL divergence, nats a token


def search_plan(
    table: LossTable, beta_L: np.ndarray, num_anchors: int, density: float, budgets: str = PER_LAYER, rounds: int = 3
) -> Plan:
    """The anchors, sources, head maps and budgets with the least predicted damage at a counted density.

    Anchors: those whose loss hurts least are dropped one by one, then swapped as long as that helps. Budgets: each next
    tile goes where it saves most for its density. Both in turn, since each depends on the other.

    Args:
      table: of the calibration texts.
      beta_L: `measure_damage`.
      num_anchors: layers that score.
      density: mean over the sparse layers.
      budgets: UNIFORM, PER_LAYER or PER_HEAD.
      rounds: of anchors and budgets in turn.

    Raises:
      InputError: there are not so many layers.
    """
    _, L, K, _, _ = table.lost.shape
    check_anchors(num_anchors, L)
    at_LK = np.full((L, K), max(int(np.searchsorted(table.densities, density + 1e-9)) - 1, 0))
    for _ in range(1 if budgets == UNIFORM else rounds):
        sources, maps, _ = _assign(table, beta_L, _search_anchors(table, beta_L, num_anchors, at_LK), at_LK)
        if budgets != UNIFORM:
            at_LK = share_budgets(table, beta_L, sources, maps, density, budgets == PER_HEAD)
    sources, maps, damage = _assign(table, beta_L, sorted(set(sources[1:])), at_LK)
    return Plan(sources, maps, at_LK, damage)


def _pair_damage(table: LossTable, beta_L: np.ndarray, at_LK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Damage [a, b] of layer b through the tiles of a (infinite where a is later), and b's best head maps [a, b, K]."""
    L, K = at_LK.shape
    damage, maps = np.full((L, L), np.inf), np.zeros((L, L, K), int)
    for b in range(1, L):
        lost_aKK = np.stack([table.lost[at_LK[b, k], :, :, b, k] for k in range(K)], -1)  # [a, head of a, k]
        maps[:, b] = lost_aKK.argmin(1)
        maps[b, b] = np.arange(K)
        chosen = np.take_along_axis(lost_aKK, maps[:, b][:, None], axis=1)[:, 0]
        damage[1 : b + 1, b] = beta_L[b] * chosen.mean(-1)[1 : b + 1]
    return damage, maps


def _search_anchors(table: LossTable, beta_L: np.ndarray, num_anchors: int, at_LK: np.ndarray) -> list[int]:
    damage, _ = _pair_damage(table, beta_L, at_LK)

    def total(anchors: Iterable[int]) -> float:
        return damage[sorted(anchors)].min(0)[1:].sum()

    anchors = set(range(1, len(beta_L)))
    while len(anchors) > num_anchors:
        anchors.remove(min(anchors - {1}, key=lambda a: total(anchors - {a})))
    while True:
        swaps = [anchors - {a} | {b} for a in anchors - {1} for b in range(2, len(beta_L)) if b not in anchors]
        better = min(swaps, key=total, default=anchors)
        if total(better) >= total(anchors) - 1e-12:
            return sorted(anchors)
        anchors = better


def _assign(
    table: LossTable, beta_L: np.ndarray, anchors: Sequence[int], at_LK: np.ndarray
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], float]:
    """Each layer's best source among the anchors, its head map, and the damage of all."""
    damage, maps = _pair_damage(table, beta_L, at_LK)
    sources = [0]
    for layer in range(1, len(beta_L)):
        sources.append(layer if layer in anchors else min(anchors, key=lambda a: damage[a, layer]))
    chosen = tuple(tuple(int(head) for head in maps[source, layer]) for layer, source in enumerate(sources))
    return tuple(sources), chosen, float(sum(damage[sources[layer], layer] for layer in range(1, len(beta_L))))


def share_budgets(
    table: LossTable,
    beta_L: np.ndarray,
    sources: Sequence[int],
    maps: Sequence[Sequence[int]],
    density: float,
    per_head: bool = False,
) -> np.ndarray:
    """int [L, K]: places in the grid, whose mean density over layers 1 to L - 1 is at most `density`.

    From the least budget on, the step with the best saving for its density is taken, of however many places (that is,
    along the lower convex hull of each head's, or each layer's, curve).
    """
    _, L, K, _, _ = table.lost.shape
    curves_LKG = np.array(
        [[beta_L[b] * table.lost[:, sources[b], maps[b][k], b, k] for k in range(K)] for b in range(1, L)]
    )
    curves = curves_LKG.reshape(-1, len(table.grid)) if per_head else curves_LKG.sum(1)
    places = np.zeros(len(curves), int)
    left = (density - table.densities[0]) * len(curves)
    queue: list[tuple[float, int, int]] = []

    def push(at: int) -> None:
        place, curve = places[at], curves[at]
        if place + 1 < len(curve):
            slopes = (curve[place] - curve[place + 1 :]) / (table.densities[place + 1 :] - table.densities[place])
            best = int(slopes.argmax())
            heapq.heappush(queue, (-float(slopes[best]), at, place + 1 + best))

    for at in range(len(curves)):
        push(at)
    while queue:
        _, at, place = heapq.heappop(queue)
        cost = table.densities[place] - table.densities[places[at]]
        if cost <= left + 1e-9:
            left -= cost
            places[at] = place
            push(at)
    at_LK = np.zeros((L, K), int)
    at_LK[1:] = places.reshape(L - 1, -1)
    return at_LK


def plan_decisions(plan: Plan) -> list[Decision]:
    """A plan as it is printed."""
    decisions = [FIRST_LAYER]
    for layer, source in enumerate(plan.sources[1:], start=1):
        mode, anchor = (ANCHOR, None) if source == layer else (REUSE, source)
        decisions.append(Decision(mode, anchor, None, "measured"))
    return decisions


def plan_schedule(plan: Plan, table: LossTable) -> dict[int, tuple]:
    """A plan as LlamaModel takes it: {layer: (mode, anchor, head map, budgets)}."""
    schedule: dict[int, tuple] = {0: (DENSE, None)}
    for layer, source in enumerate(plan.sources[1:], start=1):
        budgets = tuple(int(budget) for budget in table.grid[plan.places[layer]])
        reuse = (REUSE, source, plan.maps[layer], budgets)
        schedule[layer] = (ANCHOR, None, None, budgets) if source == layer else reuse
    return schedule


@dataclasses.dataclass(frozen=True)
class Found:
    """A schedule: as it is printed, as LlamaModel takes it, and its price on the calibration text if measured."""

    decisions: list[Decision]
    schedule: dict[int, tuple]
    calibration_pct: float | None = None  # degradation of the perplexity


STEPS = 6  # of the search for the least density: each halves what is left of the range, on a logarithmic scale


def search_schedule(
    model: LlamaModel,
    params: Any,
    ids_BT: jax.Array,
    mesh: Mesh,
    num_anchors: int,
    budgets: str = PER_LAYER,
    max_degradation: float | None = None,
) -> Found:
    """The searched schedule at the selection's density, or the least dense one under `max_degradation` percent here."""
    selection = model.selection
    seen = observe(LayerRunner(model, params, ids_BT.shape[1], mesh), ids_BT)
    table, beta_L = LossTable.of([seen], selection), measure_damage(model, params, ids_BT, mesh)

    def plan(density: float) -> Plan:
        return search_plan(table, beta_L, num_anchors, density, budgets)

    if max_degradation is None:
        chosen = plan(selection.density or float(table.density_of_budget(selection.top_k)))
        return Found(plan_decisions(chosen), plan_schedule(chosen, table))

    def perplexity(schedule: Any) -> float:
        forward, _ = compile_forward(model.clone(schedule=schedule), params, ids_BT, mesh)
        return perplexity_of(forward(params, ids_BT)[0][:, :-1])

    dense, low, high = perplexity(None), float(table.densities[0]), 1.0
    best, cost = plan(high), 0.0  # nothing is dropped
    for _ in tqdm(range(STEPS), desc="densities", unit="run", disable=None, leave=False):
        middle = math.sqrt(low * high)
        tried = plan(middle)
        degradation = (perplexity(plan_schedule(tried, table)) / dense - 1) * 100
        if degradation < max_degradation:
            high, best, cost = middle, tried, degradation
        else:
            low = middle
    return Found(plan_decisions(best), plan_schedule(best, table), cost)


# --- Files ---

SCHEDULE_VERSION = 1


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a manifest says of the weights: their chunks' own hashes."""
    chunks = sorted((name, entry["sha256"]) for name, entry in manifest["chunks"].items())
    return hashlib.sha256(json.dumps(chunks).encode()).hexdigest()


def schedule_to_json(plans: Sequence[LayerPlan], selection: Selection, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What --save_schedule writes."""
    layers = [{"mode": p.mode, "anchor": p.anchor, "head_map": p.head_map, "budgets": p.budgets} for p in plans]
    model = {"name": manifest["model"], "fingerprint": fingerprint(manifest)}
    return {
        "format_version": SCHEDULE_VERSION,
        "model": model,
        "selection": dataclasses.asdict(selection),
        "layers": layers,
    }


def read_schedule(path: Path, selection: Selection, manifest: Mapping[str, Any]) -> Found:
    """What --save_schedule wrote.

    Raises:
      InputError: the file cannot be read, is damaged or of a newer format, or was made for another model or selection.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version = saved["format_version"]
        if version != SCHEDULE_VERSION:
            raise InputError(f"schedule {path} has format version {version!r}; this program reads {SCHEDULE_VERSION}")
        if saved["model"]["fingerprint"] != fingerprint(manifest):
            raise InputError(
                f"schedule {path} was made for {saved['model']['name']}, whose weights are not those of "
                f"{manifest['model']} here; make one for this model with --save_schedule"
            )
        layers = saved["layers"]
        schedule = {i: (e["mode"], e["anchor"], e["head_map"], e["budgets"]) for i, e in enumerate(layers)}
        made_for = Selection(**saved["selection"])
        config = manifest["config"]
        plans = freeze_schedule(schedule, config.num_hidden_layers, config.num_key_value_heads)
    except OSError as error:
        raise InputError(f"schedule {path} cannot be read: {error.strerror}") from error
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"schedule {path} is damaged ({type(error).__name__}: {error}); save it anew") from error
    for field in dataclasses.fields(Selection):
        want, got = getattr(made_for, field.name), getattr(selection, field.name)
        if want != got:
            raise InputError(f"schedule {path} was made for {field.name} {want}, and this run has {got}")
    return Found([Decision(plan.mode, plan.anchor, None, "loaded") for plan in plans], schedule)
