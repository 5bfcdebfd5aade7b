"""The paper's similarity and programme, the search, budgets, and schedule files."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import kascade_search as search
import numpy as np
import pytest
from kascade_layers import LayerRunner
from kascade_layout import make_mesh
from synthetic import HF_CONFIGS, token_ids

import kascade_core as core
from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, InputError, Selection
from llama_model import LlamaConfig, LlamaModel

NAME = "mha_llama3_tied"  # four layers, five KV heads
SELECTION = Selection(tile_size=4, top_k=3, sink_tiles=1)


@pytest.fixture(scope="module")
def setup():
    """A random model, its variables, ids [1, 37] (ten tiles, the last with one token), and a mesh of every device."""
    config = LlamaConfig.from_hf(HF_CONFIGS[NAME])
    model = LlamaModel(config, None, SELECTION.tile_size, SELECTION.top_k, SELECTION.sink_tiles)
    ids = jnp.asarray(token_ids(NAME)[:1])
    params = jax.tree.map(lambda x: x * 3, {"params": model.init(jax.random.key(0), ids)["params"]})
    return model, params, ids, make_mesh(jax.devices())


@pytest.fixture(scope="module")
def runner(setup):
    model, params, ids, mesh = setup
    return LayerRunner(model, params, ids.shape[1], mesh)


@pytest.fixture(scope="module")
def observation(runner, setup):
    return search.observe(runner, setup[2])


def random_observation(seed=0, layers=5, heads=2, tiles=8):
    scores = np.random.default_rng(seed).random((layers, heads, tiles, tiles)).astype(np.float32) ** 4
    scores *= np.tri(tiles, dtype=np.float32)
    return search.Observation(scores / scores.sum(-1, keepdims=True), np.ones(layers))


# --- Layer by layer ---


def test_the_runner_is_the_model(setup, runner):
    model, params, ids, mesh = setup
    forward, _ = core.compile_forward(model, params, ids, mesh)
    x_BTD = runner.run(runner.embed(ids), 0, lambda *_: None)
    nll, kl, agree = runner.compare(x_BTD, x_BTD, ids)
    np.testing.assert_allclose(nll, forward(params, ids)[0][0, :-1], rtol=1e-4, atol=1e-4)
    assert np.abs(kl).max() < 1e-5 and agree.all()
    assert runner.compare(x_BTD, x_BTD, ids, 5)[0] == pytest.approx(nll[::5], rel=1e-5)


def test_the_runner_attends_as_a_schedule_does(setup, runner):
    model, params, ids, mesh = setup
    schedule = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (4, 0, 0, 1, 3)), 3: (ANCHOR, None)}
    sparse = model.clone(schedule=schedule)
    forward, _ = core.compile_forward(sparse, params, ids, mesh)
    chosen = {}

    def choose(layer, x_BTD):
        if layer in (1, 3):
            chosen[layer] = core.select_tiles(runner.scores(layer, x_BTD), SELECTION)
        return {0: None, 1: chosen.get(1), 2: chosen[1][:, [4, 0, 0, 1, 3]] if 1 in chosen else None, 3: chosen.get(3)}[
            layer
        ]

    x_BTD = runner.run(runner.embed(ids), 0, choose)
    nll, _, _ = runner.compare(x_BTD, x_BTD, ids)
    np.testing.assert_allclose(nll, forward(params, ids)[0][0, :-1], rtol=1e-4, atol=1e-4)


def test_scores_are_those_that_tiles_are_chosen_by(setup, observation):
    model, params, ids, mesh = setup
    core.calibrate_kascade(model, params, ids, SELECTION.tile_size, SELECTION.top_k, mesh)
    for layer, tiles in core.KASCADE_CACHE.items():
        again = core.select_tiles(jnp.asarray(observation.scores[layer][None]), SELECTION)
        np.testing.assert_array_equal(again, tiles)
    assert observation.scores.sum(-1) == pytest.approx(1, abs=1e-5)
    assert (observation.importance > 0).all()


# --- Budgets ---


def test_the_best_tiles_come_first_and_are_cut():
    scores = jnp.array([[[[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.3, 0.6, 0.1, 0], [0.1, 0.5, 0.3, 0.1]]]])
    ranked = core.select_tiles(scores, Selection(1, 4, ranked=True))
    np.testing.assert_array_equal(ranked[0, 0, 3], [3, 1, 2, 0])
    np.testing.assert_array_equal(ranked[0, 0, 1], [1, 0, NO_TILE, NO_TILE])
    np.testing.assert_array_equal(core.cut_tiles(ranked, [2])[0, 0], [[0, NO_TILE], [0, 1], [1, 2], [1, 3]])
    both = core.cut_tiles(jnp.concatenate([ranked, ranked], 1), [1, 3])
    np.testing.assert_array_equal(both[0, :, 3], [[3, NO_TILE, NO_TILE], [1, 2, 3]])


def test_a_density_grows_with_the_position_and_local_tiles_are_kept():
    scores = jnp.asarray(np.random.default_rng(0).random((1, 1, 10, 10)))
    tiles = np.asarray(core.select_tiles(scores, Selection(1, density=0.5)))[0, 0]
    np.testing.assert_array_equal((tiles != NO_TILE).sum(-1), np.ceil(np.arange(1, 11) / 2))
    tiles = np.asarray(core.select_tiles(scores, Selection(1, 4, sink_tiles=1, local_tiles=2)))[0, 0]
    for query in range(3, 10):
        assert {0, query - 2, query - 1, query} <= set(tiles[query])


def test_budgets_attend_to_that_many_tiles(setup):
    """A reuse layer with larger budgets than its anchor's still gets its own number."""
    model, params, ids, mesh = setup
    budgets = {1: (1, 2, 1, 2, 1), 2: (5, 1, 2, 3, 4), 3: (2, 2, 2, 2, 2)}
    maps = {2: (1, 0, 2, 2, 4), 3: (0, 1, 2, 3, 4)}
    schedule = {0: (DENSE, None), 1: (ANCHOR, None, None, budgets[1])}
    schedule |= {i: (REUSE, 1, maps[i], budgets[i]) for i in (2, 3)}
    sparse = model.clone(schedule=schedule)
    forward, _ = core.compile_forward(sparse, params, ids, mesh)
    nll, sown = forward(params, ids)
    core.publish_tiles(sown)
    attended = core.attended_tiles(sparse.schedule, core.KASCADE_CACHE)
    for layer, counts in budgets.items():
        seen = np.arange(1, 11)
        for head, budget in enumerate(counts):
            used = (attended[layer][0, head] != NO_TILE).sum(-1)
            np.testing.assert_array_equal(used, np.minimum(seen, budget))
    plain = model.clone(schedule={i: entry[:3] for i, entry in schedule.items()})
    uniform = model.clone(schedule={i: e if i == 0 else (*e[:3], (3,) * 5) for i, e in schedule.items()})
    expected, _ = core.compile_forward(plain, params, ids, mesh)
    equal, _ = core.compile_forward(uniform, params, ids, mesh)
    np.testing.assert_allclose(equal(params, ids)[0], expected(params, ids)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(nll - expected(params, ids)[0])).max() > 1e-3


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ((ANCHOR, None, None, (1, 2)), "layer 1 asks for budgets"),
        ((ANCHOR, None, None, (1, 2, 0, 1, 1)), "layer 1 asks for budgets"),
        ((ANCHOR, None, None, (1,) * 5), "some ANCHOR and REUSE layers have budgets"),
    ],
)
def test_wrong_budgets(entry, sentence):
    schedule = {0: (DENSE, None), 1: entry, 2: (REUSE, 1), 3: (REUSE, 1)}
    with pytest.raises(ValueError, match=sentence):
        core.freeze_schedule(schedule, 4, 5)


def test_shared_budgets_are_the_best_of_all():
    """Against every way to share the same density, on curves that bend one way."""
    observation = random_observation(layers=3, heads=1, tiles=6)
    table = search.LossTable.of([observation], Selection(1, 3))
    beta, sources, maps = np.array([0, 1.0, 5.0]), (0, 1, 2), ((0,), (0,), (0,))
    hull = dataclasses.replace(table, lost=np.minimum.accumulate(table.lost))
    places = search.share_budgets(hull, beta, sources, maps, 0.7)

    def price(at):
        return sum(beta[i] * hull.lost[at[i - 1], i, 0, i, 0] for i in (1, 2))

    def density(at):
        return np.mean([table.densities[place] for place in at])

    everything = itertools.product(range(len(table.grid)), repeat=2)
    allowed = [at for at in everything if density(at) <= density(places[1:, 0]) + 1e-9]
    assert density(places[1:, 0]) <= 0.7
    assert price(places[1:, 0]) == pytest.approx(min(map(price, allowed)))
    assert places[2, 0] > places[1, 0]  # the layer that hurts more gets more


# --- Similarity and programme ---


def test_mass_similarity_by_hand():
    """Top-1 of two tiles plus the own one: the last query tile has masses .6 .3 .1 in layer 0, .2 .7 .1 in layer 1."""
    scores = np.zeros((2, 1, 3, 3), np.float32)
    scores[:, 0, :2] = [[1, 0, 0], [0.5, 0.5, 0]]
    scores[0, 0, 2], scores[1, 0, 2] = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]
    observation = search.Observation(scores, np.ones(2))
    similarity, maps = search.mass_similarity([observation], Selection(1, 2))
    assert similarity[1, 0] == pytest.approx((0.2 + 0.1) / (0.7 + 0.1))
    assert similarity[0, 1] == similarity[0, 0] == 0 and maps[1, 0] == (0,)


def test_equal_layers_are_wholly_similar_through_the_right_map():
    observation = random_observation()
    observation.scores[1] = observation.scores[2, ::-1]
    similarity, maps = search.mass_similarity([observation], Selection(1, 3))
    assert similarity[2, 1] == pytest.approx(1)
    assert maps[2, 1] == (1, 0)
    assert (similarity <= 1).all()


def test_the_programme_finds_the_best_anchors():
    """Against every set of anchors."""
    rng = np.random.default_rng(0)
    similarity, importance = np.tril(rng.random((9, 9)), -1), rng.random(9)

    def total(anchors):
        nearest = [max(a for a in anchors if a <= layer) for layer in range(1, 9)]
        worth = [1 if a == layer else similarity[layer, a] for layer, a in enumerate(nearest, 1)]
        return np.dot(worth, importance[1:])

    for count in (1, 3, 8):
        anchors = search.dp_anchors(similarity, count, importance)
        sets = [(1, *rest) for rest in itertools.combinations(range(2, 9), count - 1)]
        assert total(anchors) == pytest.approx(max(map(total, sets)))
        decisions = search.decide_nearest(similarity, anchors)
        assert [i for i, d in enumerate(decisions) if d.mode == ANCHOR] == anchors
    with pytest.raises(InputError, match="anchors must be from 1 to 8, .* got 9"):
        search.dp_anchors(similarity, 9)


# --- The search ---


def test_the_searchs_anchors_are_the_best_of_all():
    observations = [random_observation(seed, layers=7) for seed in (1, 2)]
    table = search.LossTable.of(observations, Selection(1, 3))
    beta = np.array([0, 3.0, 1, 4, 1, 5, 9])
    places = np.full((7, 2), 2)
    found = search._search_anchors(table, beta, 3, places)
    costs = {
        anchors: search._assign(table, beta, anchors, places)[2]
        for anchors in ((1, *rest) for rest in itertools.combinations(range(2, 7), 2))
    }
    assert costs[tuple(found)] == pytest.approx(min(costs.values()))


@pytest.mark.parametrize("budgets", [search.UNIFORM, search.PER_LAYER, search.PER_HEAD])
def test_a_plan_keeps_to_its_density_and_loses_less_with_more(budgets):
    table = search.LossTable.of([random_observation(layers=6)], Selection(1, 3))
    beta = np.arange(6.0)
    plans = [search.search_plan(table, beta, 2, density, budgets) for density in (0.5, 0.8, 1.0)]
    for plan, density in zip(plans, (0.5, 0.8, 1.0), strict=True):
        assert table.densities[plan.places[1:]].mean() <= density + 1e-9
        assert len(set(plan.sources[1:])) == 2
        core.freeze_schedule(search.plan_schedule(plan, table), 6, 2)
    assert plans[0].damage > plans[1].damage > plans[2].damage
    assert plans[2].damage == pytest.approx(0, abs=1e-9)
    if budgets == search.PER_LAYER:
        assert (plans[0].places == plans[0].places[:, :1]).all()


def test_damage_is_the_divergence_of_a_run_over_the_squared_loss_of_mass(setup, observation):
    """Computed anew for layer 2, from the model's logits: of ten tiles its query tiles keep the first and their own."""
    model, params, ids, mesh = setup
    beta = search.measure_damage(model, params, ids, mesh)
    assert beta[0] == 0 and (beta[1:] > 0).all()
    schedule = {layer: (ANCHOR if layer == 2 else DENSE, None) for layer in range(4)}
    alone = model.clone(schedule=schedule, top_k=2)
    dense, sparse = (jax.nn.log_softmax(m.apply(params, ids)[0, : -1 : search.DAMAGE_STEP]) for m in (model, alone))
    masses = observation.scores[2]
    own = np.einsum("KQQ->KQ", masses)
    lost = 1 - own - np.where(np.arange(10) > 0, masses[..., 0], 0)
    expected = (jnp.exp(dense) * (dense - sparse)).sum(-1).mean() / np.mean(lost**2)
    assert beta[2] == pytest.approx(float(expected), rel=1e-3)


def test_a_searched_schedule_runs_and_no_degradation_is_cheaper_than_a_little(setup, monkeypatch):
    monkeypatch.setattr(search, "STEPS", 3)
    model, params, ids, mesh = setup
    found = search.search_schedule(model, params, ids, mesh, 2)
    plans = core.freeze_schedule(found.schedule, 4, 5)
    assert sum(plan.mode == REUSE for plan in plans) == 1
    limited = search.search_schedule(model, params, ids, mesh, 2, max_degradation=5.0)
    assert limited.calibration_pct < 5
    counts = [sum(sum(e[3]) for e in f.schedule.values() if len(e) == 4) for f in (limited, found)]
    assert counts[0] != counts[1]


# --- Files ---


MANIFEST = {
    "model": "tiny",
    "chunks": {"a": {"sha256": "1", "bytes": 1}},
    "config": LlamaConfig.from_hf(HF_CONFIGS[NAME]),
}
SCHEDULE = {
    0: (DENSE, None),
    1: (ANCHOR, None, None, (2,) * 5),
    2: (REUSE, 1, (1, 0, 2, 2, 4), (1, 2, 3, 4, 5)),
    3: (REUSE, 1, None, (3,) * 5),
}


def saved(tmp_path, **changes):
    plans = core.freeze_schedule(SCHEDULE, 4, 5)
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(search.schedule_to_json(plans, SELECTION, MANIFEST) | changes))
    return path, plans


def test_a_schedule_comes_back(tmp_path):
    path, plans = saved(tmp_path)
    found = search.read_schedule(path, SELECTION, MANIFEST)
    assert core.freeze_schedule(found.schedule, 4, 5) == plans
    assert [d.mode for d in found.decisions] == [DENSE, ANCHOR, REUSE, REUSE]


def test_schedules_that_are_refused(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(InputError, match="made for tile_size 4, and this run has 8"):
        search.read_schedule(path, dataclasses.replace(SELECTION, tile_size=8), MANIFEST)
    other = MANIFEST | {"chunks": {"a": {"sha256": "2", "bytes": 1}}}
    with pytest.raises(InputError, match="made for tiny, whose weights are not those"):
        search.read_schedule(path, SELECTION, other)
    with pytest.raises(InputError, match="cannot be read"):
        search.read_schedule(tmp_path / "none.json", SELECTION, MANIFEST)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="is damaged"):
        search.read_schedule(path, SELECTION, MANIFEST)
    for changes, sentence in (
        ({"format_version": 2}, "has format version 2; this program reads 1"),
        ({"layers": [{"mode": "REUSE"}]}, "is damaged"),
        ({"layers": []}, "is damaged"),
        ({"selection": {"nonsense": 1}}, "is damaged"),
    ):
        path, _ = saved(tmp_path, **changes)
        with pytest.raises(InputError, match=sentence):
            search.read_schedule(path, SELECTION, MANIFEST)


def test_budget_grids_end_at_everything():
    for least, most in ((1, 1), (2, 37), (5, 5)):
        grid = search.budget_grid(least, most)
        assert grid[0] == least and grid[-1] == most and (np.diff(grid) > 0).all()
