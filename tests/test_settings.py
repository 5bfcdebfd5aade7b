"""The command line: every flag is a field, bad values are one sentence, and defaults are resolved once."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from synthetic import HF_CONFIGS

from errors import InputError
from kascade_core import Selection
from measure.settings import DP, SEARCH, Settings, can_be_written, make_parser, selection_flags
from weights.config import LlamaConfig

CONFIG = LlamaConfig.from_hf(HF_CONFIGS["mha_llama3_tied"])  # four layers

FLAGS = {  # every flag with a value that is not its default, and with what it needs beside it
    "tile_size": ("8", 8), "top_k": ("5", 5), "density": ("0.25", 0.25), "sink_tiles": ("2", 2),
    "local_tiles": ("3", 3), "query_tile": ("32", 32), "min_tiles": ("2", 2, "--density", "0.5"), "anchor_scoring": ("fast", "fast"),
    "device": ("gpu", "gpu"), "threshold": ("0.5", 0.5), "max_reuse_dist": ("2", 2), "scheduler": ("search", SEARCH),
    "similarity": ("mass", "mass"), "anchors": ("2", 2, "--scheduler", "dp"),
    "budgets": ("head", "head", "--scheduler", "search"), "max_degradation": ("1.5", 1.5),
    "save_schedule": ("s.json", Path("s.json")), "load_schedule": ("l.json", Path("l.json")),
    "weights_dir": ("w", Path("w")), "text": ("t.txt", Path("t.txt")), "calib_text": ("c.txt", Path("c.txt")),
    "seq_len": ("99", 99), "n_runs": ("2", 2), "windows": ("3", 3), "calib_windows": ("2", 2),
    "tasks": ("vt,fwe", ("vt", "fwe")), "task_len": ("999", 999, "--tasks", "vt"),
    "task_n": ("7", 7, "--tasks", "vt"), "task_filler": ("text", "text", "--tasks", "vt"),
    "decode": ("8", 8), "batch": ("2", 2), "prefill": ("dense", "dense"), "depths": ("64,32", (32, 64)),
    "mesh": ("model=2", "model=2"), "generate": ("9", 9), "long_ppl": (None, True, "--seq_len", "1024"), "anchor_layers": ("3,1", (1, 3)),
    "head_maps": ("m.npy", Path("m.npy"), "--anchor_layers", "1"), "dtype": ("bfloat16", "bfloat16"), "kernel": ("xla", "xla"),
    "densities": ("0.5,0.1,0.5", (0.1, 0.5)), "html": ("h.html", Path("h.html")), "csv": ("c.csv", Path("c.csv")),
    "markdown": ("m.md", Path("m.md")), "json": ("j.json", Path("j.json")), "sweep": ("64,32,64", (32, 64)), "verbose": (None, True),
    "coordinator": ("a:1", "a:1", "--num_processes", "3", "--process_id", "1"),
    "num_processes": ("3", 3, "--coordinator", "a:1", "--process_id", "1"),
    "process_id": ("2", 2, "--coordinator", "a:1", "--num_processes", "3"),
    "quiet": (None, True), "debug": (None, True),
}  # fmt: skip


def value_of(settings, name):
    return getattr(settings.selection if name in selection_flags() else settings, name)


def test_every_field_is_a_flag_and_every_flag_a_field():
    fields = {*selection_flags(), *(field.name for field in dataclasses.fields(Settings))} - {"selection"}
    assert set(FLAGS) == fields
    assert {action.dest for action in make_parser()._actions} == fields | {"help"}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flags_value_arrives_in_its_field(name):
    text, expected, *beside = FLAGS[name]
    settings = Settings.from_flags([f"--{name}", *([] if text is None else [text]), *beside])
    assert value_of(settings, name) == expected
    assert value_of(settings, name) != value_of(Settings(), name)


def test_without_flags_the_settings_are_the_defaults():
    settings = Settings.from_flags([])
    assert settings == Settings()
    assert settings.selection == Selection(tile_size=16, top_k=12, sink_tiles=1)
    assert (settings.device, settings.threshold, settings.max_reuse_dist) == ("cpu", 0.65, 4)
    assert (settings.scheduler, settings.similarity, settings.budgets, settings.anchors) == (
        "threshold", "jaccard", None, None,
    )  # fmt: skip
    assert settings.text.is_file()


@pytest.mark.parametrize(
    ("flags", "scheduler", "similarity", "budgets"),
    [
        (["--scheduler", "dp"], DP, "jaccard", None),
        (["--scheduler", "search"], SEARCH, None, "layer"),
        (["--max_degradation", "1"], SEARCH, None, "layer"),
        (["--load_schedule", "x"], "loaded", None, None),
    ],
)
def test_what_the_schedules_maker_does_not_read_stays_none(flags, scheduler, similarity, budgets):
    settings = Settings.from_flags(flags)
    assert (settings.scheduler, settings.similarity, settings.budgets) == (scheduler, similarity, budgets)


def test_settings_can_be_built_again_from_themselves():
    settings = Settings.from_flags(["--scheduler", "dp", "--anchors", "2"])
    assert dataclasses.replace(settings) == settings


@pytest.mark.parametrize(("layers", "anchors"), [(2, 1), (4, 1), (10, 3), (30, 9)])
def test_three_of_ten_layers_are_anchors(layers, anchors):
    config = dataclasses.replace(CONFIG, num_hidden_layers=layers)
    assert Settings(scheduler=SEARCH).for_model(config).anchors == anchors
    assert Settings(scheduler=SEARCH, anchors=1).for_model(config).anchors == 1


def test_the_threshold_rule_needs_no_anchors_of_any_model():
    one_layer = dataclasses.replace(CONFIG, num_hidden_layers=1)
    assert Settings(depths=()).for_model(one_layer) == Settings(depths=())
    with pytest.raises(InputError, match="scheduler dp needs a second layer, for layer 0 is dense; use threshold"):
        Settings(scheduler=DP).for_model(one_layer)
    with pytest.raises(InputError, match="anchors must be from 1 to 3, for layer 0 of the 4 is dense, got 4"):
        Settings(scheduler=SEARCH, anchors=4).for_model(CONFIG)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--device abacus", "invalid choice: 'abacus'"),
        ("--tile_size 0", "tile_size must be at least 1, got 0"),
        ("--coordinator a:1", "coordinator, num_processes, process_id go together: .*, got only coordinator"),
        ("--process_id 0 --num_processes 2", "give all three or none, got only num_processes, process_id"),
        ("--coordinator a --num_processes 2 --process_id 0", "must be HOST:PORT of process 0 .* got 'a'"),
        ("--coordinator a:65536 --num_processes 2 --process_id 0", "a port from 1 to 65535, got 'a:65536'"),
        ("--coordinator a:1 --num_processes 0 --process_id 0", "num_processes must be at least 1 .* got 0"),
        ("--coordinator a:1 --num_processes 2 --process_id 2", "process_id must be from 0 to 1, .* got 2"),
        ("--coordinator a:1 --num_processes 2 --process_id -1", "process_id must be from 0 to 1, .* got -1"),
        ("--tile_size x", "--tile_size: expected a whole number, got 'x'"),
        ("--tile_size 513", "tile_size must be at most seq_len, 512, got 513"),
        ("--tile_siz 8", "unrecognized arguments: --tile_siz 8"),
        ("--top_k -3", "top_k must be at least 2: every query tile keeps 1 of its own, 1 sink_tiles"),
        ("--sink_tiles -1", "sink_tiles must be at least 0, got -1"),
        ("--sink_tiles 13", "top_k must be at least 14: .* got 12"),
        ("--local_tiles -1", "local_tiles must be at least 0, got -1"),
        ("--query_tile 24", "query_tile must be a multiple or a divisor of tile_size, 16, got 24"),
        ("--query_tile 256", "top_k must be at least 17"),
        ("--query_tile 1024 --top_k 65", "query_tile must be at most seq_len, 512, got 1024"),
        ("--anchor_scoring best", "anchor_scoring must be exact or fast, got 'best'"),
        ("--top_k 4 --density 0.1", "top_k and density exclude each other: give one of them"),
        ("--density 0", "density must be above 0 and at most 1, got 0.0"),
        ("--seq_len 1", "seq_len must be at least 2 and below 2.31, got 1"),
        ("--seq_len 99999999999", "seq_len must be at least 2 and below 2.31, got 99999999999"),
        ("--n_runs 0", "n_runs must be at least 1 and below 2.31, got 0"),
        ("--max_reuse_dist 0", "max_reuse_dist must be at least 1 .*, got 0"),
        ("--threshold 1.01", r"threshold must be in \[0, 1\], got 1.01"),
        ("--threshold nan", r"threshold must be in \[0, 1\], got nan"),
        ("--threshold much", "--threshold: expected a number, got 'much'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--kernel cuda", "invalid choice: 'cuda'"),
        ("--verbose --quiet", "verbose and quiet exclude each other"),
        ("--json no/such/folder/out.json", "json: cannot write no/such/folder/out.json: give a file in a folder"),
        ("--json .", "json: cannot write .: give a file"),
        ("--save_schedule no/such/folder/s.json", "save_schedule: cannot write no/such/folder/s.json"),
        ("--sweep 512,x", "--sweep: expected a whole number, got 'x'"),
        ("--sweep 8,512", r"sweep: lengths must be at least 16 \(query_tile, and 2\) .*, got \(8, 512\)"),
        ("--sweep 99999999999", "sweep: lengths must be .* below 2.31"),
        ("--scheduler luck", "invalid choice: 'luck'"),
        ("--anchors 0", "anchors must be at least 1 .*, got 0"),
        ("--anchors 3", "anchors has no effect with scheduler threshold; it needs scheduler dp or search"),
        ("--scheduler dp --budgets head", "budgets has no effect with scheduler dp; it needs scheduler search"),
        ("--scheduler search --similarity mass", "similarity has no effect with scheduler search; it needs"),
        ("--scheduler dp --max_degradation 1", "max_degradation has no effect with scheduler dp"),
        ("--max_degradation 0", "max_degradation must be above 0, got 0.0"),
        ("--max_degradation inf", "max_degradation must be above 0, got inf"),
        ("--load_schedule x --anchors 3", "anchors has no effect with load_schedule; it needs scheduler dp or search"),
        ("--load_schedule x --scheduler dp", "scheduler has no effect with load_schedule"),
        ("--load_schedule x --save_schedule y", "save_schedule has no effect with load_schedule"),
        ("--load_schedule x --top_k 3", "top_k has no effect with load_schedule: the tile sizes come from its file"),
    ],
)  # fmt: skip
def test_a_bad_command_line_is_one_sentence_and_exit_code_2(capsys, flags, sentence):
    with pytest.raises(SystemExit) as exit_info:
        Settings.from_flags(flags.split())
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{sentence}", line)


def test_an_empty_sweep_is_refused(capsys):
    with pytest.raises(SystemExit):
        Settings.from_flags(["--sweep", ""])
    assert "--sweep: expected a whole number, got ''" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_info:
        Settings.from_flags(["--help"], "What it is.")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "What it is." in text
    assert all(f"--{name} " in text or f"--{name}\n" in text for name in FLAGS)
    assert "tokens in a key tile, at least 1 (16)" in text


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings(text=Path("~/a.txt"), json=Path("~/b.json")).text == tmp_path / "a.txt"


def test_a_report_goes_into_a_plain_file_and_into_no_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "there").touch()
    assert can_be_written(tmp_path / "new")
    assert can_be_written(tmp_path / "there")
    assert can_be_written(Path("-"))
    assert not can_be_written(tmp_path / "pipe")
    assert not can_be_written(tmp_path)
    assert not can_be_written(tmp_path / "no" / "such")
    assert not can_be_written(tmp_path / ("x" * 300))
