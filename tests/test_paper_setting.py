"""The paper's setting: named anchors, single keys shared by a query tile, a least number of them, given head maps."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, repeating_text, token_ids, write_hf_folder

import benchmark_kascade_final as benchmark
import convert_weights
from errors import InputError
from kascade_core import (
    ANCHOR,
    DENSE,
    KASCADE_CACHE,
    NO_TILE,
    REUSE,
    LayerPlan,
    Selection,
    calibrate_kascade,
    select_tiles,
)
from llama_model import LlamaConfig, LlamaModel, load_weights
from measure import search
from measure.schedules import decide_nearest, load_head_maps, with_head_maps
from measure.settings import Settings
from report.results import layer_types
from weights.folder import read_manifest

NAME = "mha_llama3_tied"  # four layers, five KV heads
CONFIG = LlamaConfig.from_hf(HF_CONFIGS[NAME])


# --- A least number of tiles ---


def test_a_density_with_a_least_number_of_keys_is_the_papers_budget():
    """k = min(max(share of the keys seen, 5), keys seen); query tiles of 3 single keys."""
    scores = jnp.asarray(np.random.default_rng(0).random((1, 2, 10, 30)), jnp.float32)
    selection = Selection(tile_size=1, query_tile=3, density=0.3, min_tiles=5, sink_tiles=0)
    tiles = np.asarray(select_tiles(scores, selection))
    seen = np.arange(3, 31, 3)
    expected = np.minimum(np.maximum(np.ceil(0.3 * seen), 5), seen)
    np.testing.assert_array_equal((tiles != NO_TILE).sum(-1)[0, 1], expected)
    assert tiles.shape[-1] == selection.slots(30) == 9


def test_a_least_number_of_tiles_needs_a_density():
    with pytest.raises(InputError, match="min_tiles has no effect without density, got 3"):
        Selection(min_tiles=3)
    with pytest.raises(InputError, match="min_tiles must be at least 0, got -1"):
        Selection(density=0.5, min_tiles=-1)
    with pytest.raises(InputError, match="min_tiles has no effect with scheduler search"):
        Settings(selection=Selection(density=0.5, min_tiles=3), scheduler="search")


# --- Named anchors and given head maps ---


def test_named_anchors_are_reused_by_the_layers_after_them():
    similarity = np.tri(6, k=-1) * 0.5
    plans = decide_nearest(similarity, (2, 4), "named")
    assert [(plan.mode, plan.anchor) for plan in plans] == [
        (DENSE, None), (DENSE, None), (ANCHOR, None), (REUSE, 2), (ANCHOR, None), (REUSE, 4),
    ]  # fmt: skip
    assert layer_types(plans) == "FFFSFS"


def test_anchor_layers_make_the_dynamic_programme_needless():
    settings = Settings(anchor_layers=(1, 3)).for_model(CONFIG)
    assert (settings.scheduler, settings.similarity, settings.anchors) == ("dp", "jaccard", None)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(anchor_layers=(1, 2), anchors=2), "anchors and anchor_layers exclude each other"),
        (dict(anchor_layers=(1, 2), scheduler="search"), "anchor_layers has no effect with scheduler search"),
        (dict(anchor_layers=(1, 2), max_degradation=1.0), "anchor_layers has no effect with scheduler search"),
        (dict(head_maps=convert_weights.Path("x.npy")), "head_maps has no effect with scheduler threshold"),
        (
            dict(head_maps=convert_weights.Path("x.npy"), scheduler="dp"),
            "head_maps has no effect without anchor_layers",
        ),
    ],
)
def test_flags_that_do_not_go_with_named_anchors_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Settings(**values)


@pytest.mark.parametrize("layers", [(0, 2), (2, 4)])
def test_anchor_layers_are_the_models(layers):
    with pytest.raises(InputError, match="anchor_layers must be from 1 to 3, for layer 0 of the 4 is dense"):
        Settings(anchor_layers=layers).for_model(CONFIG)


def test_head_maps_are_rows_of_the_reuse_layers(tmp_path):
    maps = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [4, 3, 2, 1, 0], [1, 1, 2, 2, 3]], np.int32)
    np.save(tmp_path / "maps.npy", maps)
    plans = (LayerPlan(), LayerPlan(ANCHOR), LayerPlan(REUSE, 1), LayerPlan(REUSE, 1))
    got = with_head_maps(plans, load_head_maps(tmp_path / "maps.npy", CONFIG))
    assert [plan.head_map for plan in got] == [None, None, (4, 3, 2, 1, 0), (1, 1, 2, 2, 3)]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 3), np.int32), r"expected whole numbers from 0 to 4, an array \(4, 5\).*got int32 \(4, 3\)"),
        (np.zeros((4, 5), np.float32), r"got float32 \(4, 5\)"),
        (np.full((4, 5), 5), "from 0 to 4"),
        (np.full((4, 5), -1), "from 0 to 4"),
        (np.array([[None]]), "is not a .npy array: .*allow_pickle"),
    ],
)
def test_head_maps_that_are_refused(tmp_path, array, message):
    np.save(tmp_path / "maps.npy", array)
    with pytest.raises(InputError, match=message):
        load_head_maps(tmp_path / "maps.npy", CONFIG)


def test_head_maps_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="maps.npy cannot be read: No such file"):
        load_head_maps(tmp_path / "maps.npy", CONFIG)
    (tmp_path / "maps.npy").write_bytes(b"PK\3\4 an archive")
    with pytest.raises(InputError, match="maps.npy is not a .npy array"):
        load_head_maps(tmp_path / "maps.npy", CONFIG)


# --- Several calibration windows ---


def test_several_texts_calibrate_one_after_another(folders):
    name = "gqa_default_tied"  # two layers, 13 tokens
    model = LlamaModel(LlamaConfig.from_hf(HF_CONFIGS[name]), None, Selection(tile_size=2, top_k=3))
    ids = jnp.asarray(token_ids(name))
    params = load_weights(folders / name, read_manifest(folders / name))
    alone = []
    for row in ids:
        calibrate_kascade(model, params, row[None], 2, 3)
        alone.append(dict(KASCADE_CACHE))
    calibrate_kascade(model, params, ids, 2, 3)
    for layer, tiles in KASCADE_CACHE.items():
        np.testing.assert_array_equal(tiles, np.concatenate([cache[layer] for cache in alone]))
    assert not np.array_equal(alone[0][1], alone[1][1])


# --- Whole runs ---


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    convert_weights.convert(write_hf_folder(folder / "hf", NAME), folder / "weights")
    (folder / "text.txt").write_text(repeating_text(400, 33))
    np.save(folder / "maps.npy", np.tile(np.array([2, 0, 1, 4, 4], np.int32), (4, 1)))
    return folder


def run(files, *flags):
    path = files / "out.json"
    common = [
        "--weights_dir",
        files / "weights",
        "--text",
        files / "text.txt",
        "--json",
        path,
        "--n_runs",
        "1",
        "--decode",
        "0",
    ]
    assert benchmark.main([*map(str, common), "--seq_len", "30", "--dtype", "float32", *flags]) == 0
    return json.loads(path.read_text())


def test_the_papers_selection_runs_with_given_head_maps(files, capsys):
    flags = ["--tile_size", "1", "--query_tile", "4", "--density", "0.1", "--min_tiles", "8", "--anchor_layers", "1"]
    report = run(
        files,
        *flags,
        "--head_maps",
        str(files / "maps.npy"),
        "--similarity",
        "mass",
        "--calib_windows",
        "2",
        "--windows",
        "2",
    )
    assert [row["mode"] for row in report["schedule"]] == [DENSE, ANCHOR, REUSE, REUSE]
    assert report["schedule"][2]["head_map"] == [2, 0, 1, 4, 4]
    assert report["layer_types"] == "FFSS"
    # query tiles of 4 keys see 4, 8, 12... 28, 30 keys and keep 8, where they see so many
    assert report["schedule"][1]["density"] == pytest.approx((4 + 7 * 8) / (4 * 28 + 30))
    assert (report["config"]["calib_windows"], report["config"]["windows"]) == (2, 2)
    assert report["quality"]["windows"] == len(report["quality"]["by_window"]) == 2
    assert report["quality"]["tokens"] == 2 * 29
    output = capsys.readouterr().out
    assert "Full or shared: FFSS" in output
    assert "Calibration: 2 windows of 30 tokens" in output
    assert f"± {100 * report['quality']['se_windows']:.2f} over 2 windows" in output


def test_a_limit_is_checked_on_held_out_windows(files, capsys, monkeypatch):
    monkeypatch.setattr(search, "BISECTIONS", 1)  # each compiles a forward
    report = run(files, "--max_degradation", "20", "--windows", "2", "--tile_size", "4", "--anchors", "2")
    assert report["calibration_degradation_pct"] < report["calibration_upper_pct"] < 20
    assert report["config"]["calib_windows"] == 8
    assert "on 4 held-out calibration windows" in " ".join(capsys.readouterr().out.split()).lower()
