"""The paper's similarity and programme, what the settings choose among, and schedule files."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS
from test_search import Known, random_observation

import measure.schedules
from errors import InputError
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection, freeze_schedule, select_tiles, threshold_schedule
from measure.layerwise import Observation
from measure.schedules import (
    decide_nearest,
    dp_anchors,
    find_schedule,
    load_schedule,
    mass_similarity,
    save_schedule,
)
from measure.settings import DP, MASS, PER_HEAD, SEARCH, Settings
from measure.texts import CalibratedOn, hash_of
from weights.config import LlamaConfig
from weights.folder import Manifest

SELECTION = Selection(tile_size=4, top_k=3)


def test_mass_similarity_by_hand():
    """Top-1 of two tiles plus the own one: the last query tile has masses .6 .3 .1 in layer 0, .2 .7 .1 in layer 1."""
    scores = np.zeros((2, 1, 3, 3), np.float32)
    scores[:, 0, :2] = [[1, 0, 0], [0.5, 0.5, 0]]
    scores[0, 0, 2], scores[1, 0, 2] = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]
    similarity, maps = mass_similarity([Observation(scores, np.ones(2))], Selection(1, 2, sink_tiles=0))
    assert similarity[1, 0] == pytest.approx((0.2 + 0.1) / (0.7 + 0.1))
    assert similarity[0, 1] == similarity[0, 0] == 0
    assert maps[1, 0] == (0,)


def test_equal_layers_are_wholly_similar_through_the_right_map():
    observation = random_observation()
    observation.scores[1] = observation.scores[2, ::-1]
    similarity, maps = mass_similarity([observation], Selection(1, 3))
    assert similarity[2, 1] == pytest.approx(1)
    assert maps[2, 1] == (1, 0)
    assert (similarity <= 1).all()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_programme_finds_the_best_anchors(count):
    """Against every set of anchors."""
    rng = np.random.default_rng(0)
    similarity, importance = np.tril(rng.random((9, 9)), -1), rng.random(9)

    def total(anchors):
        nearest = [max(a for a in anchors if a <= layer) for layer in range(1, 9)]
        worth = [1 if a == layer else similarity[layer, a] for layer, a in enumerate(nearest, 1)]
        return np.dot(worth, importance[1:])

    anchors = dp_anchors(similarity, count, importance)
    sets = [(1, *rest) for rest in itertools.combinations(range(2, 9), count - 1)]
    assert total(anchors) == pytest.approx(max(map(total, sets)))
    plans = decide_nearest(similarity, anchors)
    assert [i for i, plan in enumerate(plans) if plan.mode == ANCHOR] == anchors
    assert all(plan.anchor == max(a for a in anchors if a < i) for i, plan in enumerate(plans) if plan.mode == REUSE)


# --- What the settings ask for ---


@pytest.fixture
def calibration():
    """Five layers of two heads, and the tiles that their masses choose."""
    known = Known(Selection(1, 3), [random_observation(seed) for seed in (3, 4)])
    scores = known.observations[0].scores
    known.tiles = {
        i: np.asarray(select_tiles(jnp.asarray(layer[None]), known.model.selection)) for i, layer in enumerate(scores)
    }
    known.observations[0].importance[3] = 50
    return known


def modes(plans):
    return [(plan.mode, plan.anchor) for plan in plans]


def test_the_threshold_rule_takes_the_threshold_and_the_distance(calibration):
    found = {}
    for threshold, distance in ((0.0, 4), (0.0, 2), (0.9, 4)):
        plans, measured = find_schedule(Settings(threshold=threshold, max_reuse_dist=distance), calibration)
        assert plans == threshold_schedule(calibration.tiles, threshold, distance)
        assert measured is None
        found[threshold, distance] = tuple(modes(plans))
    assert len(set(found.values())) == 3


def test_the_similarity_by_mass_goes_into_the_threshold_rule_with_its_own_maps(calibration):
    plans, _ = find_schedule(Settings(similarity=MASS, threshold=0.0), calibration)
    similarity, maps = mass_similarity(calibration.observations, calibration.model.selection)
    assert modes(plans)[:4] == [(DENSE, None), (ANCHOR, None), (REUSE, 1), (REUSE, 1)]
    assert [plan.head_map for plan in plans[2:4]] == [maps[2, 1], maps[3, 1]]
    assert plans[2].similarity == pytest.approx(similarity[2, 1])


def test_the_programme_takes_the_number_of_anchors_and_the_similarity(calibration):
    by_jaccard, _ = find_schedule(Settings(scheduler=DP, anchors=2), calibration)
    by_mass, _ = find_schedule(Settings(scheduler=DP, anchors=2, similarity=MASS), calibration)
    for plans in (by_jaccard, by_mass):
        assert sum(plan.mode == ANCHOR for plan in plans) == 2
        assert freeze_schedule(plans, 5, 2)
    assert by_mass[3].mode == ANCHOR  # the layer that weighs most recovers everything as an anchor
    assert sum(plan.mode == ANCHOR for plan in find_schedule(Settings(scheduler=DP, anchors=3), calibration)[0]) == 3


def test_the_search_takes_anchors_budgets_and_the_limit(calibration, monkeypatch):
    monkeypatch.setattr(measure.schedules, "search_schedule", lambda *args: args)
    settings = Settings(scheduler=SEARCH, anchors=2, budgets=PER_HEAD, max_degradation=1.5)
    assert find_schedule(settings, calibration) == (calibration, 2, PER_HEAD, 1.5)


def test_the_search_does_not_look_at_the_calibrations_tiles(calibration):
    del calibration.tiles
    plans, _ = find_schedule(Settings(scheduler=SEARCH, anchors=2), calibration)
    assert {plan.reason for plan in plans[1:]} == {"measured"}


# --- Files ---

CONFIG = LlamaConfig.from_hf(HF_CONFIGS["mha_llama3_tied"])  # four layers, five KV heads
PLANS = freeze_schedule(
    [
        LayerPlan(),
        LayerPlan(ANCHOR, budgets=(2,) * 5),
        LayerPlan(REUSE, 1, (1, 0, 2, 2, 4), (1, 2, 3, 4, 5)),
        LayerPlan(REUSE, 1, None, (3,) * 5),
    ],
    4,
    5,
)
IDS = np.arange(30)[None]


def manifest(sha256="1"):
    return Manifest("tiny", "a folder", "float32", CONFIG, {"a": {"sha256": sha256, "bytes": 1}}, {})


@pytest.fixture
def path(tmp_path):
    save_schedule(tmp_path / "schedule.json", PLANS, SELECTION, manifest(), [IDS])
    return tmp_path / "schedule.json"


def test_a_schedule_comes_back_with_its_sizes_and_its_calibration(path):
    saved = load_schedule(path, manifest())
    assert saved.plans == PLANS
    assert saved.selection == SELECTION
    assert saved.calibrated_on == CalibratedOn(30, 1, hash_of([IDS]))


def test_a_density_comes_back(tmp_path):
    selection = Selection(8, density=0.3, local_tiles=1, query_tile=16, anchor_scoring="fast")
    save_schedule(tmp_path / "s.json", PLANS, selection, manifest(), [IDS])
    assert load_schedule(tmp_path / "s.json", manifest()).selection == selection


def test_a_schedule_of_another_model_is_refused(path):
    with pytest.raises(InputError, match="made for 'tiny', whose weights are not those of tiny here"):
        load_schedule(path, manifest("2"))


def test_a_file_that_is_no_schedule_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none.json cannot be read \(No such file"):
        load_schedule(Path(tmp_path / "none.json"), manifest())
    path = tmp_path / "schedule.json"
    for text in ('{"a', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(InputError, match="schedule.json: not JSON"):
            load_schedule(path, manifest())


def replaced(saved, place, value):
    *parents, last = place
    part = saved
    for name in parents:
        part = part[name]
    part[last] = value


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (["format_version"], 1, "format version 1; this program reads version 2"),
        (["layers"], [{"mode": "REUSE"}], "schedule: expected the layers 0 to 3, got [0]"),
        (["layers"], [], "schedule: expected the layers 0 to 3, got []"),
        (["layers"], [{}], "layers[0].mode"),
        (["layers", 2, "anchor"], 2, "layer 2 asks to REUSE layer 2; the anchors before it are [1]"),
        (["layers", 2, "head_map"], [9] * 5, "layer 2: head_map must be 5 whole numbers from 0 to 4"),
        (["layers", 1, "budgets"], None, "some ANCHOR and REUSE layers have budgets and some have none"),
        (["layers", 1, "budgets"], [2.5] * 5, "layers[1].budgets must be a list of whole numbers"),
        (["selection"], {"nonsense": 1}, "selection.'nonsense' is no size of a selection"),
        (["selection", "tile_size"], "4", "selection.tile_size must be a whole number of at least 1, got '4'"),
        (["selection", "tile_size"], True, "selection.tile_size must be a whole number of at least 1, got True"),
        (["selection", "top_k"], 1, "top_k must be at least 2"),
        (["model"], None, "model must be an object, got None"),
        (["calibration", "tokens"], 0, "calibration.tokens must be a whole number of at least 2, got 0"),
        (["calibration", "windows"], 0, "calibration.windows must be a whole number of at least 1, got 0"),
        (["calibration", "sha256"], 5, "calibration.sha256 must be text, got 5"),
    ],
)
def test_a_damaged_schedule_is_refused(path, place, value, sentence):
    saved = json.loads(path.read_text())
    replaced(saved, place, value)
    path.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=f"schedule.json: .*{re.escape(sentence)}"):
        load_schedule(path, manifest())


def test_a_file_holds_all_that_a_plan_needs():
    """What is not written follows from the rest, or only explains it."""
    fields = {field.name for field in dataclasses.fields(LayerPlan)}
    assert fields - set(measure.schedules.LAYER_FIELDS) == {"largest_budget", "similarity", "reason"}
