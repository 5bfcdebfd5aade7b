"""Whole runs of the command on a small model: what they print and write, that every flag counts, and bad input."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, hf_weights, repeating_text, write_hf_folder

import attention
import benchmark_kascade_final as benchmark
import measure.timing
from attention import KERNELS
from attention.sharding import make_mesh
from convert_weights import convert
from kascade_core import KASCADE_CACHE, LayerPlan, Selection, density_of, perplexity_of
from llama_model import LlamaModel, load_weights
from measure.layerwise import LayerRunner
from measure.machine import configure_device
from measure.settings import Settings
from measure.texts import load_windows
from report.results import settings_to_json
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

GOLDEN = Path(__file__).with_name("golden")
NAME = "mha_llama3_tied"  # four layers, five KV heads, 33 words
SMALL = [
    "--tile_size",
    "4",
    "--top_k",
    "3",
    "--seq_len",
    "30",
    "--dtype",
    "float32",
    "--n_runs",
    "2",
    "--windows",
    "1",
    "--decode",
    "0",
]
LOW = [*SMALL, "--threshold", "0.3"]  # at which two layers reuse
EVERY_SIZE = dict(tile_size=4, top_k=5, sink_tiles=0, local_tiles=1, query_tile=8, anchor_scoring="fast")
SHARE = dict(tile_size=4, density=0.4)


class Run(NamedTuple):
    """One whole run; `tiles` is what it left in KASCADE_CACHE."""

    flags: tuple[str, ...]
    output: str
    errors: str
    report: dict
    tiles: dict


def known_times(runs, n_runs):
    """Runs everything once, and says that sparse takes half of dense's time."""
    for run in runs.values():
        jax.block_until_ready(run())
    return {name: [2000.0 if name == "dense" else 1000.0] * n_runs for name in runs}


@pytest.fixture(scope="module")
def folder(folders, tmp_path_factory):
    """A folder of a converted model in weights/, and text.txt, that the model expects well."""
    root = tmp_path_factory.mktemp("benchmark")
    shutil.copytree(folders / NAME, root / "weights")
    (root / "text.txt").write_text(repeating_text(130, 33))
    return root


@pytest.fixture(scope="module")
def run(folder):
    """Runs the command, once for the same flags: on two devices, and with times that are known."""

    @functools.cache
    def run(*flags):
        output, errors = io.StringIO(), io.StringIO()
        where = ["--weights_dir", "weights", "--text", "text.txt", "--json", "out.json"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.chdir(folder)  # so that no path is printed that differs from run to run
            patch.setattr(benchmark, "configure_device", lambda device: configure_device(device)[:2])
            patch.setattr(benchmark, "processor_name", lambda: "Some CPU")
            patch.setattr(benchmark, "time_interleaved", known_times)
            patch.setattr(measure.timing, "time_interleaved", known_times)
            with contextlib.redirect_stderr(errors):
                assert benchmark.main([*flags, *where]) == 0
        report = json.loads((folder / "out.json").read_text())
        return Run((*flags, *where), output.getvalue(), errors.getvalue(), report, dict(KASCADE_CACHE))

    return run


@pytest.fixture(scope="module")
def verbose(run):
    return run(*LOW, "--verbose")


@pytest.fixture(scope="module")
def searched(run):
    return run(*SMALL, "--scheduler", "search", "--anchors", "1", "--save_schedule", "schedule.json")


def flags_of(sizes):
    return [text for name, value in sizes.items() for text in (f"--{name}", str(value))]


# --- What a run says ---


def masked(output):
    """Without what differs from run to run."""
    return re.sub(r" *\d[\d.,]*", " #", output)


@pytest.mark.parametrize(
    "name", [pytest.param("default", marks=pytest.mark.full), "quiet", "verbose", "search", "sweep"]
)
def test_the_console_shows_what_it_showed(run, verbose, searched, name):
    """Digits masked. To write these files anew: KASCADE_WRITE_GOLDEN=1 pytest tests/test_benchmark.py."""
    runs = {
        "default": lambda: run(*LOW),
        "quiet": lambda: run(*LOW, "--quiet"),
        "verbose": lambda: verbose,
        "search": lambda: searched,
        "sweep": lambda: run(*LOW, "--sweep", "20,100"),
    }
    output, path = masked(runs[name]().output), GOLDEN / f"console_{name}.txt"
    if os.environ.get("KASCADE_WRITE_GOLDEN"):
        path.write_text(output, encoding="utf-8")
    assert output == path.read_text(encoding="utf-8")


def test_the_sections_come_in_the_guides_order(verbose):
    sections = [
        "⚙️  Configuration:", "🖥️  Configuring JAX to use CPU...", "✓ JAX using", "Loading weights", "(UNSEEN)",
        "📊 Calibrating on text.txt...", "⚡ Generating Optimized Schedule:", "📋 Final Schedule:",
        "🏃 Running DENSE Baseline...", "⚡ Running KASCADE Sparse...", "📊 RESULTS ON REAL TEXT:",
        "Dense Perplexity:", "Sparse Perplexity:", "Degradation:", "⏱️  SPEEDUP BENCHMARK", "📊 Timing Results",
        "Speedup:", "🔬 Attention alone",
    ]  # fmt: skip
    places = [verbose.output.find(section) for section in sections]
    assert -1 not in places
    assert places == sorted(places)


def test_verbose_prints_each_layers_tiles(verbose):
    assert "[Anchor L1] Selected Top-3 Tiles (Head 0): [" in verbose.output
    for row in verbose.report["schedule"]:
        if row["mode"] == "REUSE":
            line = (
                f"[Reuse  L{row['layer']}] Applied Map (Anchor L{row['anchor']}): H0 uses Anchor H{row['head_map'][0]}"
            )
            assert line in verbose.output
    assert "Using 10 sparse tokens (vs 30 full)" in verbose.output  # 30 tokens: the last tile of 4 holds 2


def test_the_output_says_what_the_report_says(verbose):
    report = verbose.report
    for line in (
        f"Dense Perplexity:  {report['dense']['perplexity']:.4f}",
        f"Sparse Perplexity: {report['sparse']['perplexity']:.4f}",
        f"Degradation:       {report['degradation_pct']:+.4f}%",
        f"Density:           {report['density']:.2%}",
        "Speedup: 2.00x",
        "1000.00 [1000.00, 1000.00] ms  0.50 of dense",
    ):
        assert re.sub(r"1000\.00", "1000", line) in re.sub(r"1000\.00", "1000", verbose.output)


def test_the_report_holds_the_run(verbose, folder):
    report = verbose.report
    assert [(row["layer"], row["mode"], row["anchor"]) for row in report["schedule"]] == [
        (0, "DENSE", None), (1, "ANCHOR", None), (2, "REUSE", 1), (3, "REUSE", 1),
    ]  # fmt: skip
    dense, sparse = report["dense"]["perplexity"], report["sparse"]["perplexity"]
    assert 1 < dense < 33
    assert report["degradation_pct"] == pytest.approx((sparse / dense - 1) * 100)
    assert report["timing"]["dense_ms"] == [2000.0] * 2
    assert report["speedup"] == 2
    assert list(report["timing"]["attention_ms"]) == ["dense", "selection", "anchor", "reuse"]
    assert report["model"]["num_layers"] == 4
    assert report["model"]["fingerprint"] == read_manifest(folder / "weights").fingerprint
    assert report["peak_memory_bytes"] > 1e7
    assert report["command"] == list(verbose.flags)
    # 8 query tiles, at most 3 tiles each: 1 + 2 + 6 * 3 of 36 causal pairs, in each of the three sparse layers
    assert [row["density"] for row in report["schedule"]] == pytest.approx([1, 21 / 36, 21 / 36, 21 / 36])
    assert report["density"] == pytest.approx((1 + 3 * 21 / 36) / 4)


def test_the_cache_holds_what_the_sparse_runs_anchors_chose(verbose, searched):
    assert list(verbose.tiles) == [1]  # not what calibration left, which is of all layers
    assert list(searched.tiles) == [1]


# --- Every flag counts ---


@pytest.fixture(scope="module")
def model(folder):
    manifest = read_manifest(folder / "weights")
    return LlamaModel(manifest.config), load_weights(folder / "weights", manifest)


def window_of(run, folder):
    """The tested tokens of a run, from its report's config."""
    tokenizer = load_tokenizer(folder / "weights", read_manifest(folder / "weights").tokenizer)
    settings = dataclasses.replace(settings_of(run), text=folder / "text.txt")
    return load_windows(tokenizer, settings, 33).test[0]


def settings_of(run):
    return Settings.from_flags(run.flags)


SIZES = {"every": EVERY_SIZE, "share": SHARE}
EVERY_OR_SHARE = ["every", pytest.param("share", marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def by_sizes(run):
    """by_sizes(name): a run with other sizes, every flag of `Selection` but `density` among those of "every"."""
    return lambda name: run(*flags_of(SIZES[name]), "--seq_len", "57", *SMALL[6:], "--threshold", "0.3")


@pytest.fixture(scope="module")
def choose(folder, model, by_sizes):
    """choose(selection): what layer 1 of a run of `by_sizes` must choose, from its queries and keys alone."""
    llama, params = model
    ids = window_of(by_sizes("every"), folder)
    runner = LayerRunner(llama, params, 57, make_mesh(jax.devices()[:1]))
    q_BTNH, k_BKHS = runner.queries_and_keys(1, runner.dense(0, runner.embed(ids)))

    @functools.cache
    def choose(selection):
        return np.asarray(jax.jit(functools.partial(attention.choose, selection=selection))(q_BTNH, k_BKHS))

    return choose


@pytest.mark.parametrize("name", EVERY_OR_SHARE)
def test_a_run_chooses_and_counts_as_its_selection_does(by_sizes, choose, name):
    ran, chosen = by_sizes(name), choose(Selection(**SIZES[name]))
    np.testing.assert_array_equal(ran.tiles[1], chosen)
    assert ran.report["schedule"][1]["density"] == pytest.approx(density_of(chosen))


@pytest.mark.parametrize("field", EVERY_SIZE)
def test_each_field_of_the_selection_changes_what_is_chosen(choose, field):
    """So that the test above sees each flag that does not arrive."""
    without = {name: value for name, value in EVERY_SIZE.items() if name != field}
    chosen, other = (choose(Selection(**sizes)) for sizes in (EVERY_SIZE, without))
    assert chosen.shape != other.shape or (np.sort(chosen) != np.sort(other)).any()


def test_the_default_sink_is_kept_by_a_run_without_the_flag(verbose, choose):
    assert (verbose.tiles[1] == 0).any(-1).all()
    assert not (choose(Selection(4, 3, sink_tiles=0)) == 0).any(-1).all()


def test_a_run_is_the_model_with_the_reports_schedule(verbose, folder, model):
    """Both perplexities anew, from a model that is built from what the report says."""
    llama, params = model
    ids = window_of(verbose, folder)
    fields = ("mode", "anchor", "head_map", "budgets")
    plans = [
        LayerPlan(*(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in fields))
        for row in verbose.report["schedule"]
    ]
    for kind, schedule in (("dense", None), ("sparse", plans)):
        direct = llama.clone(schedule=schedule, selection=Selection(4, 3))
        perplexity = perplexity_of(direct.compile(params, ids)(params, ids).nll)
        assert verbose.report[kind]["perplexity"] == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("name", ["verbose", "search", *EVERY_OR_SHARE, "sweep"])
def test_the_reports_config_is_the_settings(run, verbose, searched, by_sizes, folder, name):
    runs = {"verbose": lambda: verbose, "search": lambda: searched, "sweep": lambda: run(*LOW, "--sweep", "20,100")}
    ran = runs[name]() if name in runs else by_sizes(name)
    config = read_manifest(folder / "weights").config
    expected = dataclasses.replace(settings_of(ran).for_model(config), kernel="xla", calib_windows=1)
    assert ran.report["config"] == json.loads(json.dumps(settings_to_json(expected)))


def test_the_runs_kernel_and_dtype_are_used_throughout(run, kernel_calls, monkeypatch):
    """Also layer by layer, where the search observes, and for attention alone; xla's own stand for none of them."""
    monkeypatch.delitem(KERNELS, "xla")
    flags = [
        *SMALL[:6],
        "--windows",
        "1",
        "--decode",
        "0",
        "--n_runs",
        "1",
        "--kernel",
        "pallas_tpu",
        "--dtype",
        "bfloat16",
    ]
    ran = run(*flags, "--scheduler", "search", "--anchors", "1")
    assert {name for name, _ in kernel_calls} == {"dense", "choose", "reuse"}
    assert {dtype for _, dtype in kernel_calls} == {jnp.dtype("bfloat16")}
    assert ran.report["config"]["kernel"] == "pallas_tpu"
    assert ran.report["config"]["dtype"] == "bfloat16"
    assert "✓ Attention by pallas_tpu (as asked; interpreted on a CPU: correct and slow)" in ran.output


@pytest.fixture(scope="module")
def auto_on_another_text(run, folder):
    """Calibrated on a text of its own, with the dtype that is the faster one."""
    other = folder / "other.txt"
    other.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 33, 40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("measure.machine.bfloat16_time", lambda config: 1.5)
        return run(*LOW[:6], *SMALL[8:], "--threshold", "0.3", "--calib_text", "other.txt")


def test_auto_measures_the_dtype_and_says_so(auto_on_another_text):
    ran = auto_on_another_text
    assert ran.report["config"]["dtype"] == "float32"
    assert "✓ Matrix inputs in float32 (measured here: bfloat16 takes 1.50 of float32's time" in ran.output


def test_another_text_calibrates(auto_on_another_text, verbose):
    """The test text then begins at its first token."""
    ran = auto_on_another_text
    assert ran.report["config"]["dtype"] == verbose.report["config"]["dtype"]
    assert "📊 Calibrating on other.txt..." in ran.output
    assert ran.report["dense"]["perplexity"] != verbose.report["dense"]["perplexity"]


def test_a_sweep_times_each_length_with_the_runs_schedule(run):
    ran = run(*LOW, "--sweep", "20,100")
    rows = ran.report["sweep"]
    assert [row["length"] for row in rows] == [20, 100]
    assert [row["dense_ms"] for row in rows] == [[2000.0] * 2] * 2
    assert rows[0]["density"] > rows[1]["density"] > 0.25
    assert "warning: 100 tokens are beyond the model's context of 64" in ran.errors


@pytest.mark.parametrize("similarity", [pytest.param([], marks=pytest.mark.full), ["--similarity", "mass"]])
def test_the_programmes_anchors_are_as_many_as_asked_for(run, similarity):
    output = run(*SMALL, "--scheduler", "dp", *similarity, "--anchors", "2").output
    assert "📋 Final Schedule: 1 REUSE, 3 ANCHOR/DENSE" in output
    assert "Similarity threshold" not in output
    assert "(chosen by dynamic programming)" in output


def test_a_searched_schedule_is_saved_and_loaded(run, searched):
    assert "📋 Final Schedule: 2 REUSE, 2 ANCHOR/DENSE" in searched.output
    assert "Similarity threshold" not in searched.output
    loaded = run("--load_schedule", "schedule.json", *SMALL[4:])
    assert "Calibrating" not in loaded.output
    assert loaded.report["sparse"]["perplexity"] == searched.report["sparse"]["perplexity"]
    assert loaded.report["config"]["scheduler"] == "loaded"
    assert (loaded.report["config"]["tile_size"], loaded.report["config"]["top_k"]) == (4, 3)


OTHER_LENGTH = "warning: the schedule was made from 30 tokens, and this run has "


def test_a_schedule_that_was_made_from_another_length_is_warned_of(searched, folder, files, capsys):
    """Here by a run that ends at its text."""
    capsys.readouterr()
    flags = ["--load_schedule", folder / "schedule.json", "--seq_len", "300", *SMALL[6:], *files]
    with pytest.raises(SystemExit):
        benchmark.main([str(flag) for flag in flags])
    warnings = capsys.readouterr().err.splitlines()
    assert f"{OTHER_LENGTH}300" in warnings
    assert "text.txt is too short" in warnings[-1]


@pytest.mark.full
def test_a_loaded_schedule_runs_at_another_length(run, searched):
    other = run("--load_schedule", "schedule.json", "--seq_len", "40", *SMALL[6:])
    assert f"{OTHER_LENGTH}40" in other.errors


# --- The kernels of accelerators, interpreted ---


def check_kernels_agree(own, xla, tolerance):
    assert own["density"] == xla["density"] < 1
    for kind in ("dense", "sparse"):
        assert own[kind]["perplexity"] == pytest.approx(xla[kind]["perplexity"], rel=tolerance)


def reports(flags, kernels, weights, text, path):
    for kernel in kernels:
        where = ["--n_runs", "1", "--weights_dir", str(weights), "--text", str(text), "--json", str(path)]
        assert benchmark.main([*flags, "--kernel", kernel, *where]) == 0
        yield json.loads(path.read_text())


@pytest.mark.full
def test_the_tpus_kernels_run_interpreted_where_they_are_asked_for(folder, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(repeating_text(620, 33))
    flags = ["--tile_size", "128", "--top_k", "2", "--seq_len", "300", "--query_tile", "64", "--dtype", "float32"]
    tpu, xla = reports(flags, ("pallas_tpu", "xla"), folder / "weights", text, tmp_path / "out.json")
    check_kernels_agree(tpu, xla, 1e-5)


@pytest.mark.full
def test_the_gpus_kernels_run_interpreted_where_they_are_asked_for(tmp_path, monkeypatch):
    wide = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    monkeypatch.setitem(HF_CONFIGS, "wide", HF_CONFIGS[NAME] | wide)
    calm = {
        name: x / (10 if "o_proj" in name or "down_proj" in name else 1)
        for name, x in hf_weights(HF_CONFIGS["wide"]).items()
    }
    monkeypatch.setattr("synthetic.hf_weights", lambda _: calm)  # wide heads would drown what a tied model expects
    text = tmp_path / "long.txt"
    convert(write_hf_folder(tmp_path / "hf", "wide"), tmp_path / "weights")
    text.write_text(repeating_text(420, 33))
    flags = ["--dtype", "bfloat16", "--top_k", "4", "--seq_len", "200", "--threshold", "0.2"]
    gpu, xla = reports(flags, ("pallas_gpu", "xla"), tmp_path / "weights", text, tmp_path / "out.json")
    assert "REUSE" in [layer["mode"] for layer in gpu["schedule"]]
    check_kernels_agree(gpu, xla, 1e-2)


# --- Bad input: one sentence on stderr, exit code 2, nothing written ---


def refused(capsys, flags):
    """The one line on stderr of a run that exits with 2."""
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main([str(flag) for flag in flags])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def files(folder):
    return ["--weights_dir", folder / "weights", "--text", folder / "text.txt"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "tpu"], "JAX sees no TPU here: install jax[tpu]"),
        (["--dtype", "float16"], "dtype float16: a CPU does not multiply it; use bfloat16 or float32"),
        (["--kernel", "pallas_gpu"], "kernel pallas_gpu: "),
        (["--scheduler", "dp", "--anchors", "4"], "anchors must be from 1 to 3"),
        (["--text", "no/such/text"], "text no/such/text cannot be read: No such file or directory"),
        (["--windows", "5"], "text.txt is too short: it holds 4 window(s) of 30 tokens, and 6 are needed"),
        (["--weights_dir", "no/such/folder"], "no/such/folder"),
        (["--load_schedule", "no/such/schedule"], "no/such/schedule cannot be read"),
        (["--top_k", "1"], "top_k must be at least 2"),
    ],
)
def test_what_a_run_cannot_do_is_one_sentence(capsys, files, flags, sentence):
    sizes = [] if {"--load_schedule", "--top_k"} & set(flags) else SMALL
    assert sentence in refused(capsys, [*sizes, *files, *flags])


@pytest.mark.parametrize("device", ["tpu", pytest.param("gpu", marks=pytest.mark.full)])
def test_a_device_that_is_not_there_in_a_fresh_process(device):
    """Unlike the test above, where JAX is running already."""
    command = [sys.executable, benchmark.__file__, "--quiet", "--device", device]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"error: JAX sees no {device.upper()} here: install ")


def test_debug_shows_the_traceback(files):
    from errors import InputError

    with pytest.raises(InputError, match="too short"):
        benchmark.main([str(flag) for flag in [*SMALL, *files, "--windows", 5, "--debug"]])


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [("layer_1.pkl", "layer_1.pkl: missing; convert the model anew"), ("tokenizer.json", "tokenizer.json")],
)
def test_a_folder_without_one_of_its_files(capsys, folder, tmp_path, removed, sentence):
    damaged = shutil.copytree(folder / "weights", tmp_path / "weights")
    (damaged / removed).unlink()
    assert sentence in refused(capsys, [*SMALL, "--weights_dir", damaged, "--text", folder / "text.txt"])


def test_a_model_worse_than_guessing_writes_no_report(capsys, monkeypatch, folder, tmp_path):
    monkeypatch.setattr(benchmark, "configure_device", lambda device: configure_device(device)[:2])
    text, report = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 33, 140)))
    flags = [*SMALL, "--windows", 3, "--weights_dir", folder / "weights", "--text", text, "--json", report]
    with pytest.raises(SystemExit):
        benchmark.main([str(flag) for flag in flags])
    assert "worse than guessing among the 33 tokens" in capsys.readouterr().err
    assert not report.exists()


def test_without_weights_the_default_ones_are_made_first(capsys, monkeypatch, folder, tmp_path):
    """And then the run begins; here it ends at its text."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("w1 w2 w3")
    copy = functools.partial(shutil.copytree, folder / "weights")
    monkeypatch.setattr("convert_weights.convert_default", lambda output, **_: copy(output))
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--text", "short.txt"])
    captured = capsys.readouterr()
    said = " ".join(captured.out.split())  # lines are folded
    assert "No weights in llama_weights_chunked: fetching and converting the default model" in said
    assert "short.txt is too short" in captured.err
    assert Path("llama_weights_chunked/manifest.json").is_file()


def test_an_empty_default_folder_is_filled_and_another_is_not(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr("convert_weights.convert_default", lambda output, **_: made.append(output))
    Path("llama_weights_chunked").mkdir()
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL])
    assert made == [Path("llama_weights_chunked")]
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--weights_dir", "llama_weights_chunked"])
    assert len(made) == 1
    assert "llama_weights_chunked is empty" in capsys.readouterr().err
