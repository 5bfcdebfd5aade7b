"""A run as text: sentences that say what the results say. Whole runs are in test_benchmark.py."""

from pathlib import Path

import numpy as np
import pytest

from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, LayerPlan, Selection, decide_by_threshold
from llama_model import Comparison
from measure.settings import Settings
from report import console
from report.results import Machine, Model, Quality, SweepRow, Timing

X = NO_TILE
MACHINE = Machine("cpu", "cpu", 2, "Some CPU (AVX2)")

THRESHOLD_SCHEDULE = """\
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

STRIP = """\
Layer:      0     1     2     3
Type:   DENSE   ANC   ANC   REU
From:                        L2
Layer:      4     5     6     7
Type:     REU   REU   ANC   REU
From:      L2    L2          L6
"""


def threshold_plans():
    """Of a matrix in which layer 0 is the most similar of all, and must not be used all the same."""
    similarity = np.full((16, 16), 0.5)
    similarity[:, 0] = 1.0
    for layer, anchor, value in [
        (2, 1, 0.5535), (3, 2, 0.9663), (4, 2, 0.9382), (5, 2, 0.9622), (7, 6, 0.9766), (8, 6, 0.95), (9, 6, 0.94),
        (11, 10, 0.93), (12, 10, 0.92), (13, 10, 0.91), (15, 14, 0.9),
    ]:  # fmt: skip
        similarity[layer, anchor] = value
    return decide_by_threshold(similarity, 0.65, 4)


def test_the_threshold_rules_schedule_line_for_line():
    assert console.schedule(threshold_plans(), Settings()).startswith(THRESHOLD_SCHEDULE)


def test_the_strip_shows_layers_types_and_anchors():
    assert console.strip(threshold_plans()[:8], per_row=4) == STRIP


def test_another_schedulers_schedule_does_not_name_the_threshold():
    assert "threshold" not in console.schedule(threshold_plans(), Settings(scheduler="dp")).lower()


def quality(dense, sparse, density=0.5):
    """Of one window of eight tokens, each of the given perplexities."""
    nll = (np.full(8, np.log(perplexity)) for perplexity in (dense, sparse))
    return Quality([Comparison(*nll, np.zeros(8), np.ones(8, bool))], [density])


@pytest.mark.parametrize(
    ("sparse", "density", "sentence"),
    [
        (20.398, 0.5, "✅✅✅ SUCCESS! <2% degradation achieved!"),
        (19.0, 0.5, "✅✅✅ SUCCESS! <2%"),
        (20.4005, 0.5, "❌ FAILED: degradation +2.00% is not under 2%."),
        (20.0, 1.0, "⚠️  Nothing was dropped: Top-K covers all tiles."),
    ],
)
def test_the_verdict_fails_as_plainly_as_it_passes(sparse, density, sentence):
    text = console.quality(quality(20.0, sparse, density), Settings())
    assert sentence in text
    assert sum(word in text for word in ("SUCCESS", "FAILED", "UNDECIDED", "Nothing was dropped")) == 1
    assert f"Degradation:       {(sparse - 20) * 5:+.4f}%" in text


def test_a_density_that_was_asked_for_stands_beside_the_counted_one():
    found = quality(20.0, 20.1)
    text = console.quality(found, Settings(Selection(density=0.3, min_tiles=10_000)))
    assert "asked for 30%, at least 10000 tiles, in sparse layers" in text
    assert console.fit(text) == text
    assert "asked for" not in console.quality(found, Settings())


@pytest.mark.parametrize(
    ("dense", "sparse", "sentence"),
    [
        ([10.0, 30, 20], [40.0, 20, 25], "⚠️  Speedup: 0.80x: sparse is no faster here"),
        ([25.0, 26], [20.0, 21], "✅ Sparse is 1.24x faster!"),
        ([10.0, 10], [9.99, 9.99], "⚠️  Speedup: 1.00x: sparse is no faster here"),
        ([20.0], [10.0], "⚠️  Speedup: 2.00x from one run of each, which says little"),
    ],
)
def test_a_speedup_is_printed_as_it_is(dense, sparse, sentence):
    text = console.timing(Timing(dense, sparse, 1, 1), "here")
    assert sentence in text
    assert ("✅" in text) == sentence.startswith("✅")
    assert f"[{min(dense):.2f}, {max(dense):.2f}]" in text


def test_attention_alone_is_held_against_dense():
    text = console.attention_alone({"dense": [4.0, 8, 6], "reuse": [3.0, 1, 9]})
    assert "6.00 [4.00, 8.00] ms\n" in text
    assert "3.00 [1.00, 9.00] ms  0.50 of dense" in text
    assert "of 3 runs" in text


def test_what_a_timing_means_names_everything_it_depends_on():
    """Two settings that time different things are not described alike."""
    plain = console.describe_timing(Settings(), MACHINE)
    for words in (
        "2 CPU device(s), Some CPU (AVX2)",
        "tile 16",
        "Top-K 12",
        "1 sink and 0 local tiles",
        "exact",
        "n = 5",
    ):
        assert words in plain
    others = [
        dict(selection=Selection(**sizes))
        for sizes in (
            {"tile_size": 8}, {"top_k": 5}, {"density": 0.1}, {"sink_tiles": 2}, {"local_tiles": 2}, {"query_tile": 32},
            {"anchor_scoring": "fast"},
        )
    ] + [{"n_runs": 3}, {"dtype": "bfloat16"}, {"kernel": "xla"}, {"scheduler": "search"}]  # fmt: skip
    described = [console.describe_timing(Settings(**values), MACHINE) for values in others]
    assert len({plain, *described}) == len(others) + 1


def test_the_configuration_names_everything_that_was_asked():
    text = console.configuration(Settings(Selection(8, density=0.25, local_tiles=2, query_tile=16), seq_len=99))
    for row in ("Tile Size:        8", "Density:          0.25", "Local Tiles:      2", "Query Tile:       16"):
        assert row in text
    assert "Sequence Length:  99" in text
    assert "Top-K" not in text
    assert "Tile Size" not in console.configuration(Settings(load_schedule=Path("s.json")))


def test_the_model_is_named_with_its_size():
    model = Model("SmolLM2", "file", "abc", 134_515_008, 30, 538_060_032)
    assert console.model_line(model) == "✓ SmolLM2: 30 layers, 134.5M parameters, 538 MB"


def test_tokens_of_a_partly_filled_last_tile():
    assert console.count_tokens(np.array([0, 3, 7, X]), 4, 30) == 4 + 4 + 2


def test_each_layers_tiles_of_the_last_query_tile():
    plans = (LayerPlan(DENSE), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, (1, 0)))
    chosen = np.array([[[[0, X], [2, 0]], [[0, X], [2, 1]]]], np.int32)
    attended = {0: None, 1: chosen, 2: chosen[:, ::-1]}
    lines = console.sparse_layers(plans, attended, 4, 11).splitlines()
    assert lines == [
        "  [Dense  L0] Using all 3 tiles (11 tokens)",
        "  [Anchor L1] Selected Top-2 Tiles (Head 0): [0 2]",
        "  [Anchor L1] Using 7 sparse tokens (vs 11 full)",
        "  [Reuse  L2] Applied Map (Anchor L1): H0 uses Anchor H1, H1 uses Anchor H0",
        "  [Reuse  L2] Using 7 sparse tokens (vs 11 full)",
    ]


def row(length, dense, sparse):
    return SweepRow(length, [dense], [sparse], 0.5, 1_000_000)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([(8, 1, 2), (16, 2, 2), (32, 3, 2)], "Break-even: between 16 and 32 tokens"),
        (
            [(8, 3, 2), (16, 2, 3), (32, 3, 2)],
            "between 16 and 32 tokens (sparse was faster at 8 tokens too, but not in between)",
        ),
        ([(8, 3, 2), (16, 3, 2)], "Break-even: below 8 tokens"),
        ([(16, 2, 3)], "Break-even: beyond 16 tokens, sparse is not faster there"),
        ([], "Break-even: unknown, no length was measured"),
    ],
)
def test_break_even_in_words(rows, sentence):
    text = console.sweep_break_even([row(*sizes) for sizes in rows] + [SweepRow(64, skipped="needs 9 GB")])
    assert text.endswith(sentence)


def test_a_sweeps_rows_stand_under_their_columns():
    header = console.sweep_header("here").splitlines()[-1]
    line = console.sweep_row(SweepRow(512, [4.0], [2.0], 0.25, 3_000_000))
    assert len(line) == len(header)
    assert [line.split()[i] for i in (0, -3, -2, -1)] == ["512", "2.00x", "25.00%", "3"]
    assert console.sweep_row(SweepRow(99, skipped="needs 9 GB")) == "      99 skipped: it needs 9 GB"
    assert console.sweep_row(SweepRow(8, [4.0], [2.0], 0.25, None)).endswith("25.00%        ")
