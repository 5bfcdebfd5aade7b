"""The method alone, on matrices small enough to check by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kascade_core as core
from errors import InputError
from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, LayerPlan, Selection

X = NO_TILE
jitted = functools.cache(lambda selection: jax.jit(functools.partial(core.select_tiles, selection=selection)))


def tiles(*rows):
    """tiles_BKQC with B = K = 1."""
    return np.array([[rows]], np.int32)


def select(scores, **sizes):
    """`select_tiles` for one head, without a sink unless asked for."""
    return jitted(Selection(**{"sink_tiles": 0} | sizes))(np.array([[scores]], np.float32))


def test_select_tiles_keeps_the_docstring_example():
    chosen = select([[0.0, 9, 9], [0.1, 0.2, 9], [0.4, 0.3, 0]], top_k=2)
    np.testing.assert_array_equal(chosen, tiles([0, X], [1, 0], [2, 0]))
    literal = core.__doc__[core.__doc__.index("[[0, NO_TILE]") :]
    rows = re.findall(r"\[([\d, NO_TILE]+)\]", literal)
    assert [[X if name == "NO_TILE" else int(name) for name in row.split(", ")] for row in rows] == chosen[
        0, 0
    ].tolist()


def test_select_tiles_prefers_mass_and_always_keeps_the_own_tile():
    chosen = select([[5.0, 1, 4, 3]] * 4, top_k=3)
    np.testing.assert_array_equal(chosen, tiles([0, X, X], [1, 0, X], [2, 0, 1], [3, 0, 2]))


def test_select_tiles_takes_any_leading_axes():
    scores = jnp.asarray(np.random.default_rng(0).random((2, 3, 4, 4)), jnp.float32)
    select = jitted(Selection(top_k=2))
    chosen = select(scores)
    assert chosen.shape == (2, 3, 4, 2)
    for batch in range(2):
        np.testing.assert_array_equal(select(scores[batch]), chosen[batch])
    np.testing.assert_array_equal(select(scores[1, 2]), chosen[1, 2])


def test_select_tiles_places_a_block_of_query_tiles_in_the_sequence():
    scores = jnp.array([[[[5.0, 1.0, 4.0, 3.0]] * 2]])
    chosen = core.select_tiles(scores, Selection(top_k=2, sink_tiles=0), query_tiles_Q=jnp.array([1, 3]))
    np.testing.assert_array_equal(chosen, tiles([1, 0], [3, 0]))


def test_select_tiles_keeps_the_sinks_before_the_best_but_after_the_own_tile():
    scores = [[0.0, 1, 4, 3]] * 4
    np.testing.assert_array_equal(select(scores, top_k=2, sink_tiles=1), tiles([0, X], [1, 0], [2, 0], [3, 0]))
    np.testing.assert_array_equal(select(scores, top_k=2), tiles([0, X], [1, 0], [2, 1], [3, 2]))


def test_select_tiles_keeps_the_tiles_before_the_own_one():
    scores = [[9.0, 8, 1, 0, 0]] * 5
    chosen = select(scores, top_k=4, sink_tiles=1, local_tiles=2)
    np.testing.assert_array_equal(np.sort(chosen[0, 0, 3:]), [[0, 1, 2, 3], [0, 2, 3, 4]])
    np.testing.assert_array_equal(np.sort(select(scores, top_k=3, local_tiles=1)[0, 0, 4]), [0, 3, 4])


def test_select_tiles_with_more_slots_than_tiles_keeps_all():
    np.testing.assert_array_equal(select(np.zeros((2, 2)), top_k=9), tiles([0, X], [1, 0]))


def test_a_density_grows_with_the_position():
    scores = np.random.default_rng(0).random((10, 10))
    counts = (np.asarray(select(scores, tile_size=1, density=0.5))[0, 0] != NO_TILE).sum(-1)
    np.testing.assert_array_equal(counts, np.ceil(np.arange(1, 11) / 2))


def test_a_query_tile_keeps_all_its_own_tiles_and_sees_none_after_them():
    scores = np.array([[5.0, 4, 3, 2, 1, 0], [1, 2, 9, 9, 9, 9]])  # two query tiles, each of three key tiles
    sizes = {"tile_size": 4, "query_tile": 12, "top_k": 4}
    np.testing.assert_array_equal(select(scores, **sizes), tiles([0, 1, 2, X], [3, 4, 5, 2]))
    np.testing.assert_array_equal(
        select(scores[:, :5], **sizes), tiles([0, 1, 2, X], [3, 4, 2, 1])
    )  # the last is short


@pytest.mark.parametrize(
    ("window", "rows"),
    [  # tiles of two tokens: with three keys the first row reaches into the tile before, with four into one more
        (3, [[0, X, X], [1, 0, X], [2, 1, X], [3, 2, X]]),
        (4, [[0, X, X], [1, 0, X], [2, 0, 1], [3, 2, 1]]),
    ],
)
def test_tiles_outside_of_the_window_are_not_seen_and_not_counted(window, rows):
    selection = Selection(tile_size=2, top_k=3, window=window)
    scores = jnp.zeros((1, 1, 4, 4)).at[..., 3, 2].set(1.0)
    tiles = core.select_tiles(scores, selection)
    np.testing.assert_array_equal(tiles[0, 0], rows)
    assert core.density_of(tiles, selection) == 1.0 > core.density_of(tiles)
    np.testing.assert_array_equal(core.seen_tiles(tiles, selection)[0, 0], (np.array(rows) != X).sum(-1))


def test_query_tiles_smaller_than_the_key_tile_share_its_place():
    scores = [[0.0, 0, 0], [0, 0, 0], [3, 0, 0], [3, 0, 0], [3, 4, 0], [4, 3, 0]]  # halves of key tiles
    chosen = select(scores, tile_size=8, query_tile=4, top_k=2)
    np.testing.assert_array_equal(chosen, tiles([0, X], [0, X], [1, 0], [1, 0], [2, 1], [2, 0]))
    assert core.density_of(chosen) == pytest.approx(10 / 12)


def test_the_best_tiles_come_first_and_are_cut():
    scores = [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.3, 0.6, 0.1, 0], [0.1, 0.5, 0.3, 0.1]]
    ranked = select(scores, tile_size=1, top_k=4)
    np.testing.assert_array_equal(ranked[0, 0, 3], [3, 1, 2, 0])
    np.testing.assert_array_equal(core.cut_tiles(ranked, [2])[0, 0], [[0, X], [1, 0], [2, 1], [3, 1]])
    both = core.cut_tiles(jnp.concatenate([ranked, ranked], 1), [1, 3])
    np.testing.assert_array_equal(both[0, :, 3], [[3, X, X], [3, 1, 2]])


def test_scored_rows_are_all_or_a_few_with_the_first_and_the_last():
    assert Selection(tile_size=5).scored_rows().tolist() == [0, 1, 2, 3, 4]
    assert Selection(tile_size=16, anchor_scoring="fast").scored_rows().tolist() == [0, 5, 10, 15]
    assert Selection(tile_size=3, anchor_scoring="fast").scored_rows().tolist() == [0, 1, 2]
    assert Selection(tile_size=1, anchor_scoring="fast").scored_rows().tolist() == [0]


def test_a_selection_has_one_budget_and_resolves_its_defaults():
    assert (Selection().top_k, Selection().sink_tiles, Selection(tile_size=4).query_tile) == (12, 1, 4)
    assert Selection(density=0.5).top_k is None
    assert Selection(density=0.5).with_top_k(7) == Selection(top_k=7)
    assert [Selection(density=0.3, sink_tiles=2).slots(size) for size in (2, 5, 20)] == [2, 3, 6]
    assert Selection(top_k=5, query_tile=32, local_tiles=2).num_kept_tiles == 2 + 1 + 2


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"tile_size": 0}, "tile_size must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 2: .*; got -1"),
        ({"sink_tiles": -1}, "sink_tiles must be at least 0, got -1"),
        ({"local_tiles": -1}, "local_tiles must be at least 0, got -1"),
        ({"query_tile": 24}, "query_tile must be a multiple or a divisor of tile_size, 16, got 24"),
        (
            {"query_tile": 64, "top_k": 4},
            "top_k must be at least 5: every query tile keeps 4 of its own, 1 sink_tiles and 0 local_tiles; got 4",
        ),
        ({"anchor_scoring": "guess"}, "anchor_scoring must be exact or fast, got 'guess'"),
        ({"top_k": 3, "density": 0.5}, "top_k and density exclude each other"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": float("nan")}, "density must be above 0 and at most 1, got nan"),
    ],
)
def test_a_selection_refuses_sizes_that_do_not_go_together(sizes, match):
    with pytest.raises(InputError, match=match):
        Selection(**sizes)


def test_density_counts_pairs():
    assert core.density_of(None) == 1
    assert core.density_of(tiles([0, X], [0, 1], [0, 2])) == pytest.approx(5 / 6)
    assert core.density_of(tiles([0, 1, X], [1, 2, 3])) == pytest.approx(5 / 6)  # query tiles of two key tiles


def test_jaccard_is_one_for_itself_and_counts_by_hand():
    a = tiles([0, X], [0, 1], [0, 2], [1, 3])
    b = tiles([0, X], [0, 1], [1, 2], [1, 3])
    assert core.jaccard_similarity(a, a) == 1
    # Query tiles 0 and 1 see at most C = 2 tiles and do not count; tile 2 shares one of three, tile 3 both.
    assert core.jaccard_similarity(a, b) == pytest.approx((1 / 3 + 1) / 2)


def test_jaccard_of_layers_that_drop_nothing_is_one():
    everything = tiles([0, X, X], [0, 1, X], [0, 1, 2])
    assert core.jaccard_similarity(everything, everything[..., ::-1]) == 1


def test_jaccard_does_not_depend_on_the_order_of_tiles():
    a, b = tiles([0, X], [1, 0], [2, 0], [3, 1]), tiles([0, X], [1, 0], [2, 1], [3, 1])
    assert core.jaccard_similarity(np.sort(a), b) == core.jaccard_similarity(a, b) == pytest.approx((1 / 3 + 1) / 2)


def test_jaccard_leaves_out_query_tiles_that_keep_all_they_see():
    """Query tiles of two key tiles: with three slots the first keeps both it sees, the second drops one of four."""
    a, b = tiles([0, 1, X], [0, 2, 3]), tiles([0, 1, X], [1, 2, 3])
    assert core.jaccard_similarity(a, b) == pytest.approx(2 / 4)


def test_head_map_is_many_to_one_and_similarity_goes_through_it():
    early = [[0, X], [0, 1]]
    a = np.array([[[*early, [0, 2]], [*early, [0, 2]]]], np.int32)
    b = np.array([[[*early, [1, 2]], [*early, [0, 2]]]], np.int32)
    np.testing.assert_allclose(core.jaccard_by_head(a, b), [[1 / 3, 1], [1 / 3, 1]])
    assert core.best_head_map(a, b) == (1, 1)
    assert core.jaccard_similarity(a, b) == 1
    assert core.jaccard_similarity(b, a) == pytest.approx((1 / 3 + 1) / 2)


def test_head_map_keeps_the_same_head_among_equals():
    same = np.tile(tiles([0, X], [0, 1], [0, 2]), (1, 3, 1, 1))
    assert core.best_head_map(same, same) == (0, 1, 2)


@pytest.mark.parametrize("shapes", [((1, 2, 3), (1, 2, 3)), ((1, 1, 3, 2), (1, 1, 3, 3))])
def test_jaccard_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match=r"expected two equal shapes \[B, K, Q, C\], got"):
        core.jaccard_by_head(*(np.zeros(shape, np.int32) for shape in shapes))


def test_schedule_takes_the_most_similar_anchor_within_reach_at_the_threshold():
    similarity = np.zeros((4, 4))
    similarity[3] = [1.0, 0.65, 0.64, 0]
    decisions = core.decide_by_threshold(similarity, 0.65, 4)
    assert [(d.mode, d.anchor) for d in decisions] == [(DENSE, None), (ANCHOR, None), (ANCHOR, None), (REUSE, 1)]
    assert core.decide_by_threshold(similarity, 0.65, 2)[3].reason == "low similarity: 64.00%"
    assert core.decide_by_threshold(similarity, 0.65, 1)[3].reason == "distance: 1"


@pytest.mark.parametrize(
    ("threshold", "distance", "match"),
    [
        (1.5, 4, r"threshold must be in \[0, 1\], got 1.5"),
        (float("nan"), 4, "threshold must be in"),
        (0.5, 0, "max_reuse_dist must be at least 1, got 0"),
    ],
)
def test_schedule_refuses_parameters_out_of_range(threshold, distance, match):
    with pytest.raises(InputError, match=match):
        core.decide_by_threshold(np.eye(3), threshold, distance)


def test_generate_schedule_reads_the_cache(monkeypatch):
    a, b = tiles([0, X], [0, 1], [0, 2]), tiles([0, X], [0, 1], [1, 2])
    monkeypatch.setattr(core, "KASCADE_CACHE", {0: a, 1: a, 2: a, 3: b})
    assert core.generate_kascade_schedule(0.65, 4) == {
        0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1), 3: (ANCHOR, None),
    }  # fmt: skip
    monkeypatch.setattr(core, "KASCADE_CACHE", {})
    with pytest.raises(InputError, match="KASCADE_CACHE is empty"):
        core.generate_kascade_schedule(0.65, 4)


def test_the_threshold_rule_never_reuses_layer_zero():
    similarity = np.ones((4, 4))
    plans = core.decide_by_threshold(similarity, 0.0, 4)
    assert [(plan.mode, plan.anchor) for plan in plans] == [(DENSE, None), (ANCHOR, None), (REUSE, 1), (REUSE, 1)]


def test_the_threshold_schedule_has_the_best_head_maps():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.random((3, 1, 2, 9, 9)), jnp.float32)
    chosen = dict(enumerate(np.asarray(jitted(Selection(top_k=3))(scores))))
    chosen[2] = chosen[1][:, ::-1]
    plans = core.threshold_schedule(chosen, 0.65, 4)
    assert plans[2] == LayerPlan(REUSE, 1, (1, 0))
    assert plans[2].reason == "similarity: 100.00%"


def test_freeze_schedule_accepts_both_forms_and_none():
    plans = core.freeze_schedule({0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1), 3: (REUSE, 1, (1, 1))}, 4, 2)
    assert plans == (LayerPlan(), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, (0, 1)), LayerPlan(REUSE, 1, (1, 1)))
    assert core.freeze_schedule(plans, 4, 2) == plans
    assert core.freeze_schedule(None, 2, 2) == (LayerPlan(), LayerPlan())


def test_an_anchor_chooses_as_many_tiles_as_the_largest_budget_of_its_users():
    plans = [LayerPlan(), LayerPlan(ANCHOR, budgets=(1, 2)), LayerPlan(REUSE, 1, None, (5, 1))]
    plans += [LayerPlan(ANCHOR, budgets=(3, 1)), LayerPlan(REUSE, 1, None, (1, 4))]
    frozen = core.freeze_schedule(plans, 5, 2)
    assert [plan.largest_budget for plan in frozen] == [None, 5, None, 3, None]


SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1)}


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({0: (DENSE, None)}, r"expected the layers 0 to 2, got \[0\]"),
        ([LayerPlan()] * 2, r"expected the layers 0 to 2, got \[0, 1\]"),
        (SPARSE | {1: ("SPARSE", None)}, "layer 1 asks for mode 'SPARSE'; expected DENSE, ANCHOR, REUSE"),
        (SPARSE | {2: (REUSE, 0)}, r"layer 2 asks to REUSE layer 0; the anchors before it are \[1\]"),
        (SPARSE | {1: (REUSE, 2), 2: (ANCHOR, None)}, r"layer 1 asks to REUSE layer 2; .* are \[\]"),
        (SPARSE | {2: (REUSE, 1, (0,))}, r"layer 2: head_map must be 2 whole numbers from 0 to 1, got \[0\]"),
        (SPARSE | {2: (REUSE, 1, (0, 2))}, r"layer 2: head_map must be 2 .*, got \[0, 2\]"),
        (SPARSE | {1: (ANCHOR, None, None, (1,))}, r"layer 1: budgets must be 2 whole numbers from 1 .*, got \[1\]"),
        (SPARSE | {1: (ANCHOR, None, None, (1, 0))}, r"layer 1: budgets must be 2 .*, got \[1, 0\]"),
        (SPARSE | {1: (ANCHOR, None, None, (1, 1))}, "some ANCHOR and REUSE layers have budgets and some have none"),
    ],
)
def test_freeze_schedule_names_the_layer_and_what_is_legal(schedule, match):
    with pytest.raises(InputError, match=match):
        core.freeze_schedule(schedule, 3, 2)


def test_attended_tiles_applies_head_maps_and_budgets():
    chosen = np.array([[[[5, 3]], [[7, 4]]]], np.int32)  # two heads, one query tile, best first
    plans = (LayerPlan(), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, (1, 1)), LayerPlan(REUSE, 1, (1, 0), (2, 1)))
    attended = core.attended_tiles(plans, {1: chosen})
    assert attended[0] is None
    np.testing.assert_array_equal(attended[1], chosen)
    assert attended[2][0, :, 0].tolist() == [[7, 4], [7, 4]]
    assert attended[3][0, :, 0].tolist() == [[7, 4], [5, X]]
    with_density = core.mean_density({0: None, 1: tiles([0, X], [1, 0], [2, 0])})
    assert with_density == pytest.approx((1 + 5 / 6) / 2)


def test_published_tiles_replace_those_of_the_last_forward(monkeypatch):
    monkeypatch.setattr(core, "KASCADE_CACHE", {7: None})
    core.publish_tiles({2: jnp.zeros((1, 1, 2, 1), jnp.int32), 0: jnp.ones((1, 1, 2, 1), jnp.int32)})
    assert list(core.KASCADE_CACHE) == [0, 2]
    assert {type(chosen) for chosen in core.KASCADE_CACHE.values()} == {np.ndarray}


def test_perplexity_of_uniform_logits_is_the_vocabulary_size():
    ids = jnp.array([[3, 1, 4, 1]])
    assert core.compute_perplexity(jnp.zeros((1, 4, 7)), ids) == pytest.approx(7)


def test_perplexity_shifts_by_one():
    ids = jnp.array([[0, 1, 0, 1]])
    sure_of_next = jnp.array([[[0.0, 50.0], [50.0, 0.0], [0.0, 50.0], [-99.0, -99.0]]])
    assert core.compute_perplexity(sure_of_next, ids) == pytest.approx(1)
    assert core.compute_perplexity(-sure_of_next, ids) > 1e20


def test_perplexity_refuses_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"expected logits \[B, T, V\]"):
        core.compute_perplexity(jnp.zeros((1, 3, 7)), jnp.zeros((1, 4), int))
    with pytest.raises(ValueError, match="T >= 2"):
        core.compute_perplexity(jnp.zeros((1, 1, 7)), jnp.zeros((1, 1), int))


def test_a_perplexity_that_overflows_is_infinite():
    assert core.perplexity_of(jnp.array([1e4])) == math.inf
    assert core.perplexity_of(jnp.array([1.0, 3.0])) == pytest.approx(math.e**2)


@pytest.mark.parametrize("perplexity", [50.1, math.inf, math.nan])
def test_a_dense_perplexity_worse_than_guessing_is_an_error(perplexity):
    assert core.check_perplexity(49.9, 50, 64) is None
    with pytest.raises(InputError, match="worse than guessing among the 50 tokens .* RoPE"):
        core.check_perplexity(perplexity, 50, 64)


def test_on_a_few_predictions_a_perplexity_worse_than_guessing_is_a_warning():
    assert core.check_perplexity(50.1, 50, 63).startswith("on only 63 predictions the dense perplexity 50.1 is worse")
    with pytest.raises(InputError, match="worse than guessing"):
        core.check_perplexity(math.inf, 50, 1)


# --- For any input ---

P = 7  # key tiles of 4 tokens
SELECTIONS = [
    Selection(4, 3),
    Selection(4, 5, sink_tiles=2, local_tiles=1),
    Selection(4, 4, sink_tiles=0, local_tiles=2, anchor_scoring="fast"),
    Selection(4, 4, query_tile=8),
    Selection(4, 3, query_tile=2, local_tiles=1),
    Selection(4, density=0.3),
    Selection(4, density=0.6, query_tile=8, sink_tiles=0, local_tiles=1),
    Selection(4, 99, query_tile=12),
]


@st.composite
def choices(draw, heads=1, unique=False):
    """Masses [K, Q, P], a selection, and the chosen tiles of every query tile as lists, best first."""
    selection = draw(st.sampled_from(SELECTIONS))
    masses = st.floats(0, 1, width=32, allow_subnormal=False)
    shape = heads, core.tile_count(4 * P, selection.query_tile), P
    scores = draw(hnp.arrays(np.float32, shape, elements=masses, unique=unique))
    return scores, selection


def chosen_rows(scores_QP, selection):
    """The chosen tiles of each query tile, best first, as lists."""
    rows = np.asarray(jitted(selection)(scores_QP))
    assert all((row[: (row != X).sum()] != X).all() for row in rows)  # unused slots come last
    return [[int(tile) for tile in row if tile != X] for row in rows]


@settings(deadline=None)
@given(choices())
def test_any_choice_is_causal_keeps_its_own_and_comes_best_first(case):
    (scores,), selection = case
    M, Y = selection.tile_size, selection.query_tile
    for query, row in enumerate(chosen_rows(scores, selection)):
        first, last = query * Y, (query + 1) * Y - 1
        own = [tile for tile in range(P) if tile * M <= last and (tile + 1) * M > first]
        near = range(max(own[0] - selection.local_tiles, 0), own[0])
        kept = set(range(min(selection.sink_tiles, own[0]))) | set(near)
        assert len(row) == len(set(row)) <= selection.slots(P)
        assert max(row) <= own[-1]
        assert sorted(row[: len(own)]) == own
        assert set(row[len(own) : len(own) + len(kept)]) == kept
        others = row[len(own) + len(kept) :]
        masses = [scores[query, tile] for tile in others]
        assert masses == sorted(masses, reverse=True)
        dropped = [scores[query, tile] for tile in range(own[-1] + 1) if tile not in row]
        assert not others or not dropped or masses[-1] >= max(dropped)
        if selection.density is None:
            assert len(row) == min(selection.slots(P), own[-1] + 1)


@settings(deadline=None)
@given(choices(unique=True), st.randoms(use_true_random=False))
def test_what_is_not_chosen_may_exchange_its_masses(case, random):
    (scores,), selection = case
    rows, shuffled = chosen_rows(scores, selection), scores.copy()
    for query, row in enumerate(rows):
        seen = max(row) + 1
        for rest in ([tile for tile in range(seen) if tile not in row], list(range(seen, P))):
            shuffled[query, rest] = scores[query, random.sample(rest, len(rest))]
    assert chosen_rows(shuffled, selection) == rows


@settings(deadline=None, max_examples=30)
@given(choices(heads=2), st.sampled_from([(1, 1), (2, 1), (1, 3), (3, 2)]))
def test_cut_tiles_keeps_the_first_of_each_head(case, budgets):
    scores, selection = case
    chosen = np.asarray(jitted(selection)(scores))[None]
    cut = np.asarray(core.cut_tiles(chosen, budgets))
    assert cut.shape[-1] == min(max(budgets), chosen.shape[-1])
    for head, budget in enumerate(budgets):
        np.testing.assert_array_equal(cut[0, head, :, :budget], chosen[0, head, :, :budget])
        assert (cut[0, head, :, budget:] == X).all()


@settings(deadline=None)
@given(choices(heads=3), choices(heads=3))
def test_a_jaccard_similarity_is_a_share_and_one_for_itself(case, other):
    a = np.asarray(jitted(case[1])(case[0]))[None]
    b = np.asarray(jitted(case[1])(np.resize(other[0], case[0].shape)))[None]
    by_head = core.jaccard_by_head(a, b)
    assert ((by_head >= 0) & (by_head <= 1)).all()
    np.testing.assert_allclose(by_head, core.jaccard_by_head(b, a).T)
    assert 0 <= core.jaccard_similarity(a, b) <= 1
    assert core.jaccard_similarity(a, a) == 1
    assert core.jaccard_by_head(a, a).diagonal() == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10)), max_size=6), st.booleans())
def test_a_frozen_schedule_is_frozen_already(choices, with_budgets):
    plans = [LayerPlan()]
    for mode, number in choices:
        anchors = [i for i, plan in enumerate(plans) if plan.mode == ANCHOR]
        budgets = (1 + number, 2) if with_budgets else None
        if mode == 2 and anchors:
            plans.append(LayerPlan(REUSE, anchors[number % len(anchors)], (number % 2, 1), budgets))
        else:
            plans.append(LayerPlan() if mode == 0 else LayerPlan(ANCHOR, budgets=budgets))
    frozen = core.freeze_schedule(plans, len(plans), 2)
    assert core.freeze_schedule(frozen, len(plans), 2) == frozen
