"""The search for a schedule, its budgets, and the table of lost mass that it works on."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kascade_core import REUSE, Selection, freeze_schedule
from measure import search
from measure.layerwise import Observation
from measure.search import LostMassTable, budget_grid, search_candidate, search_schedule, share_budgets
from measure.settings import PER_HEAD, PER_LAYER, UNIFORM

SELECTION = Selection(1, 3, sink_tiles=0)


def random_observation(seed=0, layers=5, heads=2, tiles=8):
    scores = np.random.default_rng(seed).random((layers, heads, tiles, tiles)).astype(np.float32) ** 4
    scores *= np.tri(tiles, dtype=np.float32)
    return Observation(scores / scores.sum(-1, keepdims=True), np.ones(layers))


def test_budget_grids_end_at_everything():
    for least, most in ((1, 1), (2, 37), (5, 5)):
        grid = budget_grid(least, most)
        assert grid[0] == least
        assert grid[-1] == most
        assert (np.diff(grid) > 0).all()


def test_lost_mass_by_hand():
    """Two layers of one head, three tiles; the last query tile's masses are .6 .3 .1 in layer 0, .2 .7 .1 in layer 1."""
    scores = np.zeros((2, 1, 3, 3), np.float32)
    scores[:, 0, :2] = [[1, 0, 0], [0.5, 0.5, 0]]
    scores[0, 0, 2], scores[1, 0, 2] = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]
    table = LostMassTable.of([Observation(scores, np.ones(2))], SELECTION)
    assert table.grid.tolist() == [1, 2, 3]
    assert table.densities.tolist() == pytest.approx([3 / 6, 5 / 6, 1])
    assert [table.density_of_budget(budget) for budget in (1, 2, 9)] == pytest.approx([3 / 6, 5 / 6, 1])
    assert table.lost[0, 0, 0, 1, 0] == pytest.approx((0 + 0.5**2 + 0.9**2) / 3)  # its own tile alone
    assert table.lost[1, 0, 0, 1, 0] == pytest.approx(0.7**2 / 3)  # its own and layer 0's best, tile 0
    assert table.lost[1, 1, 0, 1, 0] == pytest.approx(0.2**2 / 3)
    assert table.lost[2] == pytest.approx(0, abs=1e-9)


def test_shared_budgets_are_the_best_of_all():
    """Against every way to share the same density, on curves that bend one way."""
    table = LostMassTable.of([random_observation(layers=3, heads=1, tiles=6)], SELECTION)
    beta, sources, maps = np.array([0, 1.0, 5.0]), (0, 1, 2), ((0,), (0,), (0,))
    table = dataclasses.replace(table, lost=np.minimum.accumulate(table.lost))
    at = share_budgets(table, beta, sources, maps, 0.7)[1:, 0]

    def damage(at):
        return sum(beta[i] * table.lost[at[i - 1], i, 0, i, 0] for i in (1, 2))

    def density(at):
        return table.densities[list(at)].mean()

    allowed = [at_ for at_ in itertools.product(range(len(table.grid)), repeat=2) if density(at_) <= density(at) + 1e-9]
    assert density(at) <= 0.7
    assert damage(at) == pytest.approx(min(map(damage, allowed)))
    assert at[1] > at[0]  # the layer that hurts more gets more


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0.2, 1), st.booleans())
def test_shared_budgets_are_never_above_the_density(seed, density, per_head):
    table = LostMassTable.of([random_observation(seed, layers=4, tiles=6)], SELECTION)
    beta = np.random.default_rng(seed).random(4)
    maps = ((0, 1), (0, 1), (1, 0), (0, 0))
    at = share_budgets(table, beta, (0, 1, 1, 1), maps, max(density, table.densities[0]), per_head)
    assert table.densities[at[1:]].mean() <= max(density, table.densities[0]) + 1e-9
    assert per_head or (at == at[:, :1]).all()


@pytest.mark.parametrize("num_anchors", [1, 2, 3])
@pytest.mark.parametrize("seed", range(7))
def test_the_anchors_are_the_best_of_all_or_close(seed, num_anchors):
    """Against every set of anchors of six layers. A swap of one anchor for another never helps."""
    table = LostMassTable.of([random_observation(seed, layers=6, tiles=6)], SELECTION)
    beta = np.random.default_rng(seed).random(6) * [0, 3, 1, 4, 1, 5]
    found = search_candidate(table, beta, num_anchors, 0.6, UNIFORM)
    anchors = set(found.sources[1:])
    budget = found.grid_index[1, 0]

    def damage(anchors):  # through the best head of the best anchor for each
        return sum(
            beta[user]
            * min(
                np.mean(
                    [table.lost[budget, a, head if a == user else slice(None), user, head].min() for head in range(2)]
                )
                for a in (anchors if user not in anchors else [user])
                if a <= user
            )
            for user in range(1, 6)
        )

    every = {(1, *rest): damage((1, *rest)) for rest in itertools.combinations(range(2, 6), num_anchors - 1)}
    assert len(anchors) == num_anchors
    assert found.damage == pytest.approx(every[tuple(sorted(anchors))], rel=1e-6)
    swaps = [every[other] for other in every if len(set(other) - anchors) == 1]
    assert found.damage <= min(swaps, default=np.inf) + 1e-9
    assert found.damage <= 1.2 * min(every.values())


@pytest.mark.parametrize("budgets", [UNIFORM, PER_LAYER, PER_HEAD])
def test_a_candidate_keeps_to_its_density_and_loses_less_with_more(budgets):
    table = LostMassTable.of([random_observation(layers=6)], SELECTION)
    beta = np.arange(6.0)
    densities = (0.5, 0.8, 1.0)
    candidates = [search_candidate(table, beta, 2, density, budgets) for density in densities]
    for candidate, density in zip(candidates, densities, strict=True):
        assert table.densities[candidate.grid_index[1:]].mean() <= density + 1e-9
        assert len(set(candidate.sources[1:])) == 2
        freeze_schedule(candidate.schedule(table.grid), 6, 2)
    assert candidates[0].damage > candidates[1].damage > candidates[2].damage
    assert candidates[2].damage == pytest.approx(0, abs=1e-9)
    per_layer = [(candidate.grid_index == candidate.grid_index[:, :1]).all() for candidate in candidates]
    assert all(per_layer) or budgets == PER_HEAD
    if budgets == UNIFORM:
        assert len(np.unique(candidates[0].grid_index[1:])) == 1


class Known:
    """A calibration whose parts are given."""

    def __init__(self, selection, observations):
        self.model = dataclasses.make_dataclass("Model", ["selection"])(selection)
        self.observations, self.damage_factors = observations, np.arange(5.0)
        self.windows = range(6)

    def of_windows(self, windows):
        self.fitted = windows
        return self


def budgets_of(plans):
    return [plan.budgets for plan in plans[1:]]


def counted_density(plans, table):
    return np.mean([[table.density_of_budget(budget) for budget in row] for row in budgets_of(plans)])


@pytest.mark.parametrize(("selection", "asked"), [(SELECTION, 21 / 36), (Selection(1, density=0.8, sink_tiles=0), 0.8)])
def test_a_searched_schedule_has_the_selections_density(selection, asked):
    calibration = Known(selection, [random_observation()])
    plans, measured = search_schedule(calibration, 2)
    assert measured is None
    assert sum(plan.mode == REUSE for plan in freeze_schedule(plans, 5, 2)) == 2
    table = LostMassTable.of(calibration.observations, selection)
    assert asked - 0.1 < counted_density(plans, table) <= asked + 1e-9


def test_a_limit_on_the_degradation_gives_the_least_density_under_it(monkeypatch):
    """On a model whose degradation is 10 percent for all that is dropped: 2 percent are a density of 0.8."""
    calibration = Known(SELECTION, [random_observation()])
    table = LostMassTable.of(calibration.observations, SELECTION)

    def log_perplexities(_, plans, windows):
        assert list(windows) == [3, 4, 5]  # those that the schedules were not made from
        cost = 0 if plans is None else 0.1 * (1 - counted_density(plans, table))
        return np.full(3, 3 + np.log1p(cost))

    monkeypatch.setattr(search, "_log_perplexities", log_perplexities)
    plans, check = search_schedule(calibration, 2, max_degradation=2.0)
    assert list(calibration.fitted) == [0, 1, 2]
    assert check.mean_pct == pytest.approx(10 * (1 - counted_density(plans, table)))
    assert 1.5 < check.mean_pct < 2
    everything, check = search_schedule(calibration, 2, max_degradation=1e-9)
    assert (counted_density(everything, table), check.mean_pct) == (1, 0)
