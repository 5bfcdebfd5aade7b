"""The method alone, on matrices small enough to check by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from kascade_layout import BLOCK, Layout

import kascade_core as core
from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, InputError, LayerPlan

X = NO_TILE


def tiles(*rows):
    """tiles_BKQC with B = K = 1."""
    return np.array([[rows]], np.int32)


def test_select_tiles_keeps_the_docstring_example():
    scores = jnp.array([[[[0.0, 9.0, 9.0], [0.1, 0.2, 9.0], [0.4, 0.3, 0.0]]]])
    np.testing.assert_array_equal(core.select_tiles(scores, core.Selection(top_k=2)), tiles([0, X], [0, 1], [0, 2]))


def test_select_tiles_prefers_mass_and_always_keeps_the_own_tile():
    scores = jnp.array([[[[5.0, 1.0, 4.0, 3.0]] * 4]])
    chosen = core.select_tiles(scores, core.Selection(top_k=3))
    np.testing.assert_array_equal(chosen, tiles([0, X, X], [0, 1, X], [0, 1, 2], [0, 2, 3]))


def test_select_tiles_places_a_block_of_query_tiles_in_the_sequence():
    scores = jnp.array([[[[5.0, 1.0, 4.0, 3.0]] * 2]])
    chosen = core.select_tiles(scores, core.Selection(top_k=2), query_tiles_Q=jnp.array([1, 3]))
    np.testing.assert_array_equal(chosen, tiles([0, 1], [0, 3]))


def test_select_tiles_keeps_the_sinks_before_the_best_but_after_the_own_tile():
    scores = jnp.array([[[[0.0, 1.0, 4.0, 3.0]] * 4]])
    chosen = core.select_tiles(scores, core.Selection(top_k=2, sink_tiles=1))
    np.testing.assert_array_equal(chosen, tiles([0, X], [0, 1], [0, 2], [0, 3]))
    chosen = core.select_tiles(scores, core.Selection(top_k=1, sink_tiles=1))
    np.testing.assert_array_equal(chosen, tiles([0], [1], [2], [3]))


def test_select_tiles_with_more_slots_than_tiles_keeps_all():
    chosen = core.select_tiles(jnp.zeros((1, 1, 2, 2)), core.Selection(top_k=9))
    np.testing.assert_array_equal(chosen, tiles([0, X], [0, 1]))


def test_a_query_tile_keeps_all_its_own_tiles_and_sees_none_after_them():
    scores = jnp.array([[[[5.0, 4, 3, 2, 1, 0], [1, 2, 9, 9, 9, 9]]]])  # two query tiles, each of three key tiles
    selection = core.Selection(tile_size=4, query_tile=12, top_k=4)
    np.testing.assert_array_equal(core.select_tiles(scores, selection), tiles([0, 1, 2, X], [2, 3, 4, 5]))
    last_is_short = core.select_tiles(scores[..., :5], selection)
    np.testing.assert_array_equal(last_is_short, tiles([0, 1, 2, X], [1, 2, 3, 4]))


def test_query_tiles_smaller_than_the_key_tile_share_its_place():
    scores = jnp.array([[[[0.0, 0, 0], [0, 0, 0], [3, 0, 0], [3, 0, 0], [3, 4, 0], [4, 3, 0]]]])  # halves of key tiles
    chosen = core.select_tiles(scores, core.Selection(tile_size=8, query_tile=4, top_k=2))
    np.testing.assert_array_equal(chosen, tiles([0, X], [0, X], [0, 1], [0, 1], [1, 2], [0, 2]))
    assert core.density_of(np.asarray(chosen)) == pytest.approx(10 / 12)


def test_scored_rows_are_all_or_a_few_with_the_first_and_the_last():
    assert core.Selection(tile_size=5).scored_rows().tolist() == [0, 1, 2, 3, 4]
    assert core.Selection(tile_size=16, scoring="fast").scored_rows().tolist() == [0, 5, 10, 15]
    assert core.Selection(tile_size=3, scoring="fast").scored_rows().tolist() == [0, 1, 2]
    assert core.Selection(tile_size=1, scoring="fast").scored_rows().tolist() == [0]


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"tile_size": 0}, "tile_size must be at least 1, got 0"),
        ({"top_k": -1}, "top_k must be at least 1, got -1"),
        ({"query_tile": 24}, "query_tile must be a multiple or a divisor of tile_size, 16, got 24"),
        (
            {"query_tile": 64, "top_k": 3},
            "top_k must be at least 4, the key tiles of 16 tokens in one query tile of 64",
        ),
        ({"scoring": "guess"}, "scoring must be exact or fast, got 'guess'"),
    ],
)
def test_a_selection_refuses_sizes_that_do_not_go_together(sizes, match):
    with pytest.raises(core.InputError, match=match):
        core.Selection(**sizes)


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


def test_jaccard_leaves_out_rows_that_choose_nothing():
    assert core.jaccard_similarity(tiles([0, X, X], [0, 1, X]), tiles([0, X, X], [0, 1, X])) == 1


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


GUIDE_SCHEDULE = """\
   Similarity threshold: 65.00%
   Max reuse distance: 4
  Layer 0: DENSE (full attention - paper requirement)
  Layer 1: ANCHOR (first sparse layer)
  Layer 2: ANCHOR (low similarity: 55.35%)
  Layer 3: REUSE L2 (similarity: 96.63%)
  Layer 4: REUSE L2 (similarity: 93.82%)
  Layer 5: REUSE L2 (similarity: 96.22%)
  Layer 6: ANCHOR (distance: 4)
  Layer 7: REUSE L6 (similarity: 97.66%)
  Layer 8: REUSE L6 (similarity: 95.00%)
  Layer 9: REUSE L6 (similarity: 94.00%)
  Layer 10: ANCHOR (distance: 4)
  Layer 11: REUSE L10 (similarity: 93.00%)
  Layer 12: REUSE L10 (similarity: 92.00%)
  Layer 13: REUSE L10 (similarity: 91.00%)
  Layer 14: ANCHOR (distance: 4)
  Layer 15: REUSE L14 (similarity: 90.00%)

📋 Final Schedule: 10 REUSE, 6 ANCHOR/DENSE
"""


def guide_similarity():
    """A matrix in which layer 0 is the most similar of all, and must not be used all the same."""
    similarity = np.full((16, 16), 0.5)
    similarity[:, 0] = 1.0
    for layer, anchor, value in [
        (2, 1, 0.5535), (3, 2, 0.9663), (4, 2, 0.9382), (5, 2, 0.9622), (7, 6, 0.9766), (8, 6, 0.95), (9, 6, 0.94),
        (11, 10, 0.93), (12, 10, 0.92), (13, 10, 0.91), (15, 14, 0.9),
    ]:  # fmt: skip
        similarity[layer, anchor] = value
    return similarity


def test_the_guides_schedule_line_for_line():
    from benchmark_kascade_final import format_schedule

    text = format_schedule(core.decide_schedule(guide_similarity(), 0.65, 4), 0.65, 4)
    assert text.startswith(GUIDE_SCHEDULE)


def test_schedule_takes_the_most_similar_anchor_within_reach_at_the_threshold():
    similarity = np.zeros((4, 4))
    similarity[3] = [1.0, 0.65, 0.64, 0]
    decisions = core.decide_schedule(similarity, 0.65, 4)
    assert [(d.mode, d.anchor) for d in decisions] == [(DENSE, None), (ANCHOR, None), (ANCHOR, None), (REUSE, 1)]
    assert core.decide_schedule(similarity, 0.65, 2)[3].reason == "low similarity: 64.00%"
    assert core.decide_schedule(similarity, 0.65, 1)[3].reason == "distance: 1"


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
        core.decide_schedule(np.eye(3), threshold, distance)


def test_generate_schedule_reads_the_cache(monkeypatch):
    a, b = tiles([0, X], [0, 1], [0, 2]), tiles([0, X], [0, 1], [1, 2])
    monkeypatch.setattr(core, "KASCADE_CACHE", {0: a, 1: a, 2: a, 3: b})
    assert core.generate_kascade_schedule(0.65, 4) == {
        0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1), 3: (ANCHOR, None),
    }  # fmt: skip
    monkeypatch.setattr(core, "KASCADE_CACHE", {})
    with pytest.raises(InputError, match="KASCADE_CACHE is empty"):
        core.generate_kascade_schedule(0.65, 4)


def test_freeze_schedule_accepts_both_forms_and_none():
    plans = core.freeze_schedule({0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1), 3: (REUSE, 1, [1, 1])}, 4, 2)
    assert plans == (LayerPlan(), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, (0, 1)), LayerPlan(REUSE, 1, (1, 1)))
    assert core.freeze_schedule(plans, 4, 2) == plans
    assert core.freeze_schedule(None, 2, 2) == (LayerPlan(), LayerPlan())


@pytest.mark.parametrize(
    ("schedule", "match"),
    [
        ({0: (DENSE, None)}, r"expected the layers 0 to 2, got \[0\]"),
        ({0: (DENSE, None), 1: ("SPARSE", None), 2: (DENSE, None)}, "layer 1 asks for mode 'SPARSE'; expected DENSE"),
        ({0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 0)}, r"layer 2 asks to REUSE layer 0; .* are \[1\]"),
        ({0: (DENSE, None), 1: (REUSE, 2), 2: (ANCHOR, None)}, r"layer 1 asks to REUSE layer 2; .* are \[\]"),
        ({0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (0,))}, r"layer 2 asks for head map \(0,\); expected 2"),
        ({0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (0, 2))}, r"head map \(0, 2\); .* from 0 to 1"),
    ],
)
def test_freeze_schedule_names_the_layer_and_what_is_legal(schedule, match):
    with pytest.raises(ValueError, match=match):
        core.freeze_schedule(schedule, 3, 2)


def test_attended_tiles_applies_head_maps():
    chosen = np.arange(2, dtype=np.int32)[None, :, None, None]
    plans = (LayerPlan(), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, (1, 1)))
    attended = core.attended_tiles(plans, {1: chosen})
    assert attended[0] is None
    assert attended[1].ravel().tolist() == [0, 1]
    assert attended[2].ravel().tolist() == [1, 1]


def test_a_layout_deals_forth_and_back_and_collects_again():
    layout = Layout(length=29, block=4, num_blocks=8, num_shards=2)
    assert layout.deal().tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    x = jnp.arange(29)[None]
    dealt = layout.spread(x, 1)
    assert dealt[0, :8].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    np.testing.assert_array_equal(layout.collect(dealt, 1)[:, :29], x)


@pytest.mark.parametrize("length", [1, 13, 512, 2047])
@pytest.mark.parametrize("tile_size", [1, 3, 16, 300])
@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_layouts_cover_the_sequence_in_blocks_of_whole_tiles(length, tile_size, num_shards):
    layout = Layout.of(length, tile_size, num_shards)
    assert layout.padded >= length
    assert layout.block % tile_size == 0
    assert layout.block <= max(BLOCK, tile_size)
    assert sorted(layout.deal().ravel()) == list(range(layout.num_blocks))
    pairs = (layout.deal() + 1).sum(axis=1)  # key blocks that each shard's query blocks see
    if length > 2 * num_shards * tile_size:
        assert pairs.max() == pairs.min()


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


@pytest.mark.parametrize("perplexity", [50.1, math.inf, math.nan])
def test_a_dense_perplexity_worse_than_guessing_is_an_error(perplexity):
    core.check_perplexity(49.9, 50)
    with pytest.raises(InputError, match="worse than guessing among the 50 tokens .* RoPE"):
        core.check_perplexity(perplexity, 50)
