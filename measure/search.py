"""A search for the schedule with the least predicted damage: which layers anchor, who reuses whom, how many tiles each.

Running every layer alone sparsely shows (measured on SmolLM2-135M) that the divergence from dense grows as the square
of the attention mass that the layer's rows lose, and that layers add up. So

  damage of layer l through the tiles of layer a  =  beta_l  mean over rows and heads of (lost mass)^2,

with one measured factor beta_l a layer (`Calibration.damage_factors`); anchors, head maps and budgets are then chosen
to make the sum over all layers small. A budget is a number of key tiles.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kascade_core import ANCHOR, FIRST_LAYER, REUSE, LayerPlan, Schedule, Selection, select_tiles
from measure import hosts
from measure.layerwise import Calibration, Observation
from measure.settings import PER_HEAD, PER_LAYER, UNIFORM
from report.results import LimitCheck

# --- Lost mass ---


def ranks_of(scores_ZQP: np.ndarray, selection: Selection) -> np.ndarray:
    """int [Z, Q, P]: each key tile's rank in its query tile, 0 for the best; P where it is not seen. Z is any heads."""
    Z, Q, P = scores_ZQP.shape
    ranked = np.asarray(select_tiles(jnp.asarray(scores_ZQP), selection.with_top_k(max(P, selection.num_kept_tiles))))
    ranks = np.full((Z, Q, P + 1), P)  # the last takes what unused slots write
    np.put_along_axis(ranks, np.minimum(ranked, P), np.broadcast_to(np.arange(P), ranked.shape), axis=-1)
    return ranks[..., :P]


def seen_by_query_tile(num_query_tiles: int, num_key_tiles: int, selection: Selection) -> np.ndarray:
    """int [Q]: the key tiles that each query tile sees."""
    first_row_Q = np.arange(num_query_tiles) * selection.query_tile
    seen_QP = np.arange(num_key_tiles) * selection.tile_size < first_row_Q[:, None] + selection.query_tile
    return seen_QP.sum(-1) - selection.first_seen(first_row_Q)


def budget_grid(least: int, num_key_tiles: int) -> np.ndarray:
    """int: the budgets that are tried, each at most an eighth above the one before."""
    grid = [least]
    while grid[-1] < num_key_tiles:
        grid.append(min(max(grid[-1] + 1, grid[-1] * 9 // 8), num_key_tiles))
    return np.array(grid)


@dataclasses.dataclass(frozen=True)
class LostMassTable:
    """Mean squared lost mass of every head through every other head's tiles, at each budget.

    Attributes:
      grid: int [U], the budgets.
      densities: float [U], their counted causal densities.
      lost: float [U, L, K, L, K]; lost[u, sl, sh, ul, uh] is the mean squared attention mass that head uh of layer ul
        loses when it attends to the grid[u] best tiles of head sh of layer sl.
      seen: int [Q], the key tiles that each query tile sees.
    """

    grid: np.ndarray
    densities: np.ndarray
    lost: np.ndarray
    seen: np.ndarray

    def density_of_budget(self, budget: int) -> float:
        """Counted causal density of one budget for all."""
        return float(np.minimum(self.seen, budget).sum() / self.seen.sum())

    @classmethod
    def of(cls, observations: Sequence[Observation], selection: Selection) -> LostMassTable:
        """Means over the observed texts."""
        L, K, Q, P = observations[0].scores.shape
        seen_Q = seen_by_query_tile(Q, P, selection)
        grid_U = budget_grid(min(selection.own_tiles, P), P)
        lost = np.zeros((len(grid_U), L, K, L, K))
        for observation in observations:
            scores = observation.scores.reshape(L * K, Q, P)
            ranks, users = ranks_of(scores, selection).transpose(1, 0, 2), scores.transpose(1, 2, 0)
            for u, budget in enumerate(grid_U):
                kept = np.matmul((ranks < budget).astype(np.float32), users)
                lost[u] += np.mean(np.square(1 - np.minimum(kept, 1)), axis=0).reshape(L, K, L, K)
        density_U = np.array([np.minimum(seen_Q, budget).sum() / seen_Q.sum() for budget in grid_U])
        return cls(grid_U, density_U, lost / len(observations), seen_Q)


# --- Candidates ---


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole choice: each layer's source and head map, and each head's budget as an index into the grid."""

    sources: tuple[int, ...]  # of layers 0 to L - 1; an anchor is its own, and layer 0 counts for nothing
    maps: tuple[tuple[int, ...], ...]
    grid_index: np.ndarray  # int [L, K]
    damage: float  # predicted KL divergence, nats a token

    def schedule(self, grid_U: np.ndarray) -> Schedule:
        """The candidate as layer plans."""
        plans = [FIRST_LAYER]
        for layer, source in enumerate(self.sources[1:], start=1):
            budgets = tuple(int(budget) for budget in grid_U[self.grid_index[layer]])
            if source == layer:
                plans.append(LayerPlan(ANCHOR, budgets=budgets, reason="measured"))
            else:
                plans.append(LayerPlan(REUSE, source, self.maps[layer], budgets, reason="measured"))
        return tuple(plans)


def search_candidate(
    table: LostMassTable,
    beta_L: np.ndarray,
    num_anchors: int,
    density: float,
    budgets: str = PER_LAYER,
    rounds: int = 3,
) -> Candidate:
    """The anchors, sources, head maps and budgets with the least predicted damage at a counted density.

    Anchors: the one that is missed least is dropped, again and again, then anchors are swapped as long as that helps.
    Budgets: each next tile goes where it saves most damage for its density. The two take turns, since each depends on
    the other.

    Args:
      table: of the calibration texts.
      beta_L: `Calibration.damage_factors`.
      num_anchors: layers that score, from 1 to L - 1.
      density: mean over the sparse layers.
      budgets: UNIFORM, PER_LAYER or PER_HEAD.
      rounds: how often the two take turns.
    """
    _, L, K, _, _ = table.lost.shape
    at_LK = np.full((L, K), max(int(np.searchsorted(table.densities, density + 1e-9)) - 1, 0))
    for _ in range(1 if budgets == UNIFORM else rounds):
        sources, maps, _ = _assign(table, beta_L, _search_anchors(table, beta_L, num_anchors, at_LK), at_LK)
        if budgets != UNIFORM:
            at_LK = share_budgets(table, beta_L, sources, maps, density, budgets == PER_HEAD)
    sources, maps, damage = _assign(table, beta_L, sorted(set(sources[1:])), at_LK)
    return Candidate(sources, maps, at_LK, damage)


def _pair_damage(table: LostMassTable, beta_L: np.ndarray, at_LK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Damage [source, user] of a layer through another's tiles (infinite where the source is later), best head maps."""
    L, K = at_LK.shape
    damage, maps = np.full((L, L), np.inf), np.zeros((L, L, K), int)
    for user in range(1, L):
        lost_LKK = np.stack([table.lost[at_LK[user, k], :, :, user, k] for k in range(K)], -1)
        maps[:, user] = lost_LKK.argmin(1)
        maps[user, user] = np.arange(K)
        chosen = np.take_along_axis(lost_LKK, maps[:, user][:, None], axis=1)[:, 0]
        damage[1 : user + 1, user] = beta_L[user] * chosen.mean(-1)[1 : user + 1]
    return damage, maps


def _search_anchors(table: LostMassTable, beta_L: np.ndarray, num_anchors: int, at_LK: np.ndarray) -> list[int]:
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
    table: LostMassTable, beta_L: np.ndarray, anchors: Sequence[int], at_LK: np.ndarray
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], float]:
    """Each layer's best source among the anchors, its head map, and the damage of all."""
    damage, maps = _pair_damage(table, beta_L, at_LK)
    sources = [0]
    for layer in range(1, len(beta_L)):
        sources.append(layer if layer in anchors else min(anchors, key=lambda a: damage[a, layer]))
    chosen = tuple(tuple(int(head) for head in maps[source, layer]) for layer, source in enumerate(sources))
    return tuple(sources), chosen, float(sum(damage[sources[layer], layer] for layer in range(1, len(beta_L))))


def share_budgets(
    table: LostMassTable,
    beta_L: np.ndarray,
    sources: Sequence[int],
    maps: Sequence[Sequence[int]],
    density: float,
    per_head: bool = False,
) -> np.ndarray:
    """int [L, K]: indices into the grid, whose mean density over layers 1 to L - 1 is at most `density`.

    Greedy along the lower convex hull of each head's (or each layer's) curve of damage over density: repeatedly take
    the step with the largest damage saved per density.
    """
    _, L, K, _, _ = table.lost.shape
    curves_LKU = np.array(
        [[beta_L[b] * table.lost[:, sources[b], maps[b][k], b, k] for k in range(K)] for b in range(1, L)]
    )
    curves = curves_LKU.reshape(-1, len(table.grid)) if per_head else curves_LKU.sum(1)
    at = np.zeros(len(curves), int)
    left = (density - table.densities[0]) * len(curves)
    queue: list[tuple[float, int, int]] = []

    def push(i: int) -> None:
        curve, start = curves[i], at[i]
        if start + 1 < len(curve):
            slopes = (curve[start] - curve[start + 1 :]) / (table.densities[start + 1 :] - table.densities[start])
            best = int(slopes.argmax())
            heapq.heappush(queue, (-float(slopes[best]), i, start + 1 + best))

    for i in range(len(curves)):
        push(i)
    while queue:
        _, i, target = heapq.heappop(queue)
        cost = table.densities[target] - table.densities[at[i]]
        if cost <= left + 1e-9:
            left -= cost
            at[i] = target
            push(i)
    at_LK = np.zeros((L, K), int)
    at_LK[1:] = at.reshape(L - 1, -1)
    return at_LK


# --- The search ---

BISECTIONS = 6  # of the search for the lowest density: each halves what is left of the range, on a logarithmic scale


def search_schedule(
    calibration: Calibration, num_anchors: int, budgets: str = PER_LAYER, max_degradation: float | None = None
) -> tuple[Schedule, LimitCheck | None]:
    """The searched schedule at the selection's density, or the least dense one that keeps a limit.

    With `max_degradation` (percent) the first half of the calibration windows fits the schedules, and the others, which
    no schedule has seen, say what each costs: an upper bound of it must be under the limit, since the mean of a few
    windows is below the true one every other time.

    Returns:
      The schedule, and what it cost on the held-out windows where there was a limit.
    """
    selection, windows = calibration.model.selection, calibration.windows
    half = len(windows) // 2
    fitting = calibration if max_degradation is None else calibration.of_windows(windows[:half])
    table = LostMassTable.of(fitting.observations, selection)
    beta_L = fitting.damage_factors

    def candidate(density: float) -> Schedule:
        return search_candidate(table, beta_L, num_anchors, density, budgets).schedule(table.grid)

    if max_degradation is None:
        return candidate(selection.density or table.density_of_budget(selection.top_k)), None
    return _least_dense(calibration, candidate, float(table.densities[0]), windows[half:], max_degradation)


def _least_dense(
    calibration: Calibration,
    candidate: Callable[[float], Schedule],
    low: float,
    held_out: Sequence[jax.Array],
    limit: float,
) -> tuple[Schedule, LimitCheck]:
    """The schedule of the least density, by bisection from `low` to 1, whose upper bound is under the limit."""
    dense, high = _log_perplexities(calibration, None, held_out), 1.0
    best, check = candidate(high), LimitCheck((0.0,) * len(held_out))  # nothing is dropped
    for _ in tqdm(range(BISECTIONS), desc="densities", unit="run", disable=None, leave=False):
        middle = math.sqrt(low * high)
        tried = hosts.from_first(candidate(middle))
        cost = _log_perplexities(calibration, tried, held_out) - dense
        cost = hosts.from_first(LimitCheck(tuple(map(float, cost))))  # processes that went different ways would wait
        if cost.upper_pct < limit:
            high, best, check = middle, tried, cost
        else:
            low = middle
    return best, check


def _log_perplexities(calibration: Calibration, schedule: Any, windows: Sequence[jax.Array]) -> np.ndarray:
    """Nats, of each window."""
    forward = calibration.model.clone(schedule=schedule).compile(calibration.params, windows[0], calibration.mesh)
    return np.array([np.mean(np.asarray(forward(calibration.params, ids).nll), dtype=np.float64) for ids in windows])
