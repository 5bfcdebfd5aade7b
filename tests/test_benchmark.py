"""The command line: a whole run on a small synthetic model, what it prints and writes, and what bad input earns."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from kascade_report import SweepRow, count_tokens, format_break_even
from synthetic import HF_CONFIGS, hf_weights, repeating_text, write_hf_folder

import benchmark_kascade_final as benchmark
from convert_weights import convert
from kascade_core import KASCADE_CACHE, NO_TILE, InputError, Selection

NAME = "mha_llama3_tied"  # four layers, 33 words
SMALL = ["--tile_size", "4", "--top_k", "3", "--seq_len", "30", "--n_runs", "2", "--threshold", "0.3"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    convert(write_hf_folder(root / "hf", NAME), root / "weights")
    return root / "weights"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(repeating_text(70, 33))
    return path


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """One whole run: its output and its report."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(repeating_text(70, 33))
    flags = ["--weights_dir", str(weights), "--text", str(folder / "text.txt"), "--json", str(folder / "out.json")]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        assert benchmark.main([*SMALL, "--verbose", *flags]) == 0
    assert list(KASCADE_CACHE) == [1]  # what the sparse run's one anchor chose, not what calibration left
    return "\n".join(printed), json.loads((folder / "out.json").read_text())


def test_the_sections_come_in_the_guides_order(finished):
    output, _ = finished
    sections = [
        "⚙️  Configuration:", "🖥️  Configuring JAX to use CPU...", "✓ JAX using", "Loading weights", "(UNSEEN)",
        "📊 Calibrating on text.txt...", "⚡ Generating Optimized Schedule:", "📋 Final Schedule:",
        "🏃 Running DENSE Baseline...", "⚡ Running KASCADE Sparse...", "📊 RESULTS ON REAL TEXT:",
        "Dense Perplexity:", "Sparse Perplexity:", "Degradation:", "⏱️  SPEEDUP BENCHMARK", "📊 Timing Results",
        "Speedup:", "🔬 Attention alone",
    ]  # fmt: skip
    places = [output.find(section) for section in sections]
    assert -1 not in places
    assert places == sorted(places)


def test_verbose_prints_each_layers_tiles(finished):
    output, report = finished
    assert "[Anchor L1] Selected Top-3 Tiles (Head 0): [" in output
    for row in report["schedule"]:
        if row["mode"] == "REUSE":
            assert f"[Reuse  L{row['layer']}] Applied Map (Anchor L{row['anchor']}): H0 uses Anchor H" in output
    assert "Using 10 sparse tokens (vs 30 full)" in output  # 30 tokens: the last tile of 4 holds 2


def test_the_report_holds_the_run(finished):
    _, report = finished
    assert {row["mode"] for row in report["schedule"]} == {"DENSE", "ANCHOR", "REUSE"}
    assert [row["layer"] for row in report["schedule"]] == [0, 1, 2, 3]
    dense, sparse = report["dense"]["perplexity"], report["sparse"]["perplexity"]
    assert 1 < dense < 33
    assert sparse != dense
    assert report["degradation_pct"] == pytest.approx((sparse / dense - 1) * 100)
    timing = report["timing"]
    assert len(timing["dense_ms"]) == len(timing["sparse_ms"]) == 2
    ratio = statistics.median(timing["dense_ms"]) / statistics.median(timing["sparse_ms"])
    assert report["speedup"] == pytest.approx(ratio)
    assert report["config"]["seq_len"] == 30
    assert {"model", "versions", "device"} <= set(report)
    # 8 query tiles, at most 3 tiles each: 1 + 2 + 6 * 3 of 36 causal pairs, in each of the three sparse layers
    assert [row["density"] for row in report["schedule"]] == pytest.approx([1, 21 / 36, 21 / 36, 21 / 36])
    assert report["density"] == pytest.approx((1 + 3 * 21 / 36) / 4)


def test_the_output_says_what_the_report_says(finished):
    output, report = finished
    assert f"Dense Perplexity:  {report['dense']['perplexity']:.4f}" in output
    assert f"Degradation:       {report['degradation_pct']:+.4f}%" in output
    assert f"Speedup: {report['speedup']:.2f}x" in output


def test_quiet_prints_the_results_alone(weights, text, capsys):
    assert benchmark.main([*SMALL, "--quiet", "--weights_dir", str(weights), "--text", str(text)]) == 0
    output = capsys.readouterr().out
    assert "Dense Perplexity" in output
    assert "Timing Results" in output
    assert "Configuration" not in output
    assert "Schedule" not in output


@pytest.mark.parametrize(
    ("degradation", "verdict"),
    [(1.99, "✅✅✅ SUCCESS! <2%"), (-5.0, "✅✅✅"), (2.0, "❌ FAILED: degradation +2.00%")],
)
def test_the_verdict_fails_as_plainly_as_it_passes(degradation, verdict):
    text = benchmark.format_results(20, 20 * (1 + degradation / 100), degradation, 0.5)
    assert verdict in text
    assert ("SUCCESS" in text) != ("FAILED" in text)


def test_a_speedup_below_one_is_printed_as_it_is():
    samples = {"dense": [10.0, 30.0, 20.0], "sparse": [40.0, 20.0, 25.0]}
    text = benchmark.format_timing(samples, 0.8, "here")
    assert "Dense:       20.00 ms  [10.00, 30.00]" in text
    assert "⚠️  Speedup: 0.80x: sparse is no faster here" in text
    assert "✅ Sparse is 1.25x faster!" in benchmark.format_timing(samples, 1.25, "here")


def test_nothing_dropped_is_no_success():
    text = benchmark.format_results(20, 20, 0, 1.0)
    assert "⚠️  Nothing was dropped" in text
    assert "SUCCESS" not in text


def test_a_speedup_that_is_none_is_not_called_one():
    assert "no faster" in benchmark.format_timing({"dense": [10.0], "sparse": [9.99]}, 10 / 9.99, "here")


def test_attention_alone_is_timed_against_dense(finished):
    output, report = finished
    attention = report["timing"]["attention_ms"]
    assert list(attention) == ["dense", "selection", "anchor", "reuse"]
    assert all(len(times) == 2 and min(times) > 0 for times in attention.values())
    ratio = statistics.median(attention["reuse"]) / statistics.median(attention["dense"])
    assert f"{ratio:.2f} of dense" in output[output.index("🔬 Attention alone") :]


def sweep_row(length, dense, sparse):
    return SweepRow(length, [dense], [sparse], 0.5, 1_000_000)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([(8, 1, 2), (16, 2, 2), (32, 3, 2)], "between 16 and 32 tokens"),
        ([(8, 3, 2), (16, 2, 3), (32, 3, 2)], "between 16 and 32 tokens"),
        ([(8, 3, 2), (16, 3, 2)], "below 8 tokens"),
        ([(8, 3, 2), (16, 2, 3)], "beyond 16 tokens, sparse is not faster there"),
        ([], "unknown, no length was measured"),
    ],
)
def test_break_even_is_where_sparse_begins_to_stay_faster(rows, sentence):
    rows = [sweep_row(*row) for row in rows] + [SweepRow(64, skipped="needs 9 GB")]
    assert format_break_even(rows).endswith(sentence)


def test_a_sweep_times_each_length_and_skips_what_does_not_fit(capsys, monkeypatch, weights, text, tmp_path):
    """The middle length asks for more memory than there is; the longest has more tokens than the text."""
    free = iter([None, 10, None])
    monkeypatch.setattr(benchmark, "free_memory", lambda device: next(free))
    flags = ["--quiet", "--sweep", "100,20,40", "--json", str(tmp_path / "out.json")]
    assert benchmark.main([*SMALL, *flags, "--weights_dir", str(weights), "--text", str(text)]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["sweep"]
    assert [row["length"] for row in rows] == [20, 40, 100]
    assert [bool(row["skipped"]) for row in rows] == [False, True, False]
    assert [len(row["sparse_ms"]) for row in rows] == [2, 0, 2]
    assert rows[0]["density"] > rows[2]["density"] > 0.25
    output = capsys.readouterr().out
    assert "      40  skipped: it needs 0.0 GB beside the weights, and 0.0 are free" in output
    assert "Break-even: " in output


def test_every_timed_run_is_waited_for():
    class Pending:
        waited = 0

        def block_until_ready(self):
            Pending.waited += 1

    benchmark.time_interleaved({"dense": Pending, "sparse": Pending}, 3)
    assert Pending.waited == 2 * 4


def test_runs_are_interleaved_and_the_warm_up_not_counted():
    calls = []
    forwards = {name: lambda name=name: calls.append(name) for name in ("dense", "sparse")}
    samples = benchmark.time_interleaved(forwards, 3)
    assert calls == ["dense", "sparse"] * 4
    assert {name: len(times) for name, times in samples.items()} == {"dense": 3, "sparse": 3}


def test_tokens_of_a_partly_filled_last_tile():
    assert count_tokens(np.array([0, 3, 7, NO_TILE]), 4, 30) == 4 + 4 + 2


class Words:
    """A tokenizer of words that are numbers, with or without BOS."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def encode(self, text, add_special_tokens=True):
        ids = [int(word) for word in text.split()]
        return ([self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []) + ids


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(100))))
    return path


def test_calibration_and_test_windows_share_no_token(numbers):
    calib, test = benchmark.load_windows(Words(), numbers, None, 5, 100)
    assert calib.tolist() == [[0, 1, 2, 3, 4]]
    assert test.tolist() == [[5, 6, 7, 8, 9]]
    other = numbers.with_name("other.txt")
    other.write_text(" ".join(map(str, range(50, 60))))
    calib, test = benchmark.load_windows(Words(), numbers, other, 5, 100)
    assert calib.tolist() == [[50, 51, 52, 53, 54]]
    assert test.tolist() == [[0, 1, 2, 3, 4]]


def test_windows_are_never_the_same_text(numbers):
    calib, test = benchmark.load_windows(Words(), numbers, numbers, 5, 100)
    assert test.tolist() == [[5, 6, 7, 8, 9]]
    copy = numbers.with_name("copy.txt")
    copy.write_text(numbers.read_text())
    with pytest.raises(InputError, match="begin alike: the tested tokens would not be unseen"):
        benchmark.load_windows(Words(), numbers, copy, 5, 100)


def test_a_byte_order_mark_is_no_text(numbers):
    numbers.write_bytes(b"\xef\xbb\xbf" + numbers.read_bytes())
    assert benchmark.load_windows(Words(), numbers, None, 5, 100)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_each_window_begins_with_bos_where_the_tokenizer_does(numbers):
    calib, test = benchmark.load_windows(Words(bos=99), numbers, None, 5, 100)
    assert calib.tolist() == [[99, 0, 1, 2, 3]]
    assert test.tolist() == [[99, 4, 5, 6, 7]]


def test_auto_dtype_follows_the_device():
    assert benchmark.pick_dtype("float32", "tpu") == "float32"
    assert benchmark.pick_dtype("auto", "tpu") == "bfloat16"
    assert benchmark.pick_dtype("auto", "cpu") in ("float32", "bfloat16")
    assert benchmark.pick_dtype("float16", "gpu") == "float16"


def test_auto_kernel_is_the_devices_own_where_it_takes_the_sizes():
    small, large = Selection(tile_size=16), Selection(tile_size=128)
    pick = partial(benchmark.pick_kernel, length=8192, dtype="bfloat16")
    assert pick("auto", "tpu", large) == ("pallas_tpu", "the one for a TPU")
    assert pick("auto", "gpu", small) == ("pallas_gpu", "the one for a GPU")
    assert pick("auto", "cpu", large) == ("xla", "the one for a CPU")
    assert pick("xla", "tpu", large) == ("xla", "as asked")
    kernel, why = pick("auto", "tpu", small)
    assert kernel == "xla"
    assert "a tile_size of 128 or another multiple of 128, got 16; they would be faster" in why


@pytest.mark.parametrize("name", ["auto", "pallas_gpu"])
@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"selection": Selection(tile_size=48)}, "take a tile_size of 16, 32, 64 or 128, got 48"),
        ({"dtype": "float32"}, "take bfloat16 or float16, got float32"),
        ({"head_dim": 80}, "take heads of width 64 or 128, got 80"),
        ({"capability": "7.5"}, "need compute capability 8.0, got 7.5"),
    ],
)
def test_what_the_gpus_kernels_do_not_take_runs_on_xla(name, sizes, why):
    given = {"selection": Selection(), "length": 512, "dtype": "bfloat16"} | sizes
    kernel, reason = benchmark.pick_kernel(name, "gpu", **given)
    assert kernel == "xla"
    assert why in reason


def run_with_kernel(kernel, report, weights, text, *flags):
    flags = ["--kernel", kernel, *flags, "--n_runs", "1", "--weights_dir", str(weights), "--text", str(text)]
    assert benchmark.main([*flags, "--json", str(report)]) == 0
    return json.loads(report.read_text())


def check_kernels_agree(own, xla, tolerance):
    assert own["density"] == xla["density"] < 1
    for kind in ("dense", "sparse"):
        assert own[kind]["perplexity"] == pytest.approx(xla[kind]["perplexity"], rel=tolerance)


def test_the_tpus_kernels_run_interpreted_where_they_are_asked_for(capsys, weights, tmp_path):
    text, report = tmp_path / "long.txt", tmp_path / "out.json"
    text.write_text(repeating_text(620, 33))
    flags = ["--tile_size", "128", "--top_k", "2", "--seq_len", "300", "--query_tile", "64"]
    tpu, xla = (run_with_kernel(kernel, report, weights, text, *flags) for kernel in ("pallas_tpu", "xla"))
    assert "pallas_tpu (as asked, and interpreted: correct on a CPU, and slow)" in capsys.readouterr().out
    check_kernels_agree(tpu, xla, 1e-5)


def test_the_gpus_kernels_run_interpreted_where_they_are_asked_for(capsys, tmp_path, monkeypatch):
    wide = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    monkeypatch.setitem(HF_CONFIGS, "wide", HF_CONFIGS[NAME] | wide)
    calm = {
        name: x / (10 if "o_proj" in name or "down_proj" in name else 1)
        for name, x in hf_weights(HF_CONFIGS["wide"]).items()
    }
    monkeypatch.setattr("synthetic.hf_weights", lambda _: calm)  # wide heads would drown what a tied model expects
    weights, text, report = tmp_path / "weights", tmp_path / "long.txt", tmp_path / "out.json"
    convert(write_hf_folder(tmp_path / "hf", "wide"), weights)
    text.write_text(repeating_text(420, 33))
    flags = ["--dtype", "bfloat16", "--top_k", "4", "--seq_len", "200", "--threshold", "0.2"]
    gpu, xla = (run_with_kernel(kernel, report, weights, text, *flags) for kernel in ("pallas_gpu", "xla"))
    assert "pallas_gpu (as asked, and interpreted: correct on a CPU, and slow)" in capsys.readouterr().out
    assert gpu["config"]["kernel"] == "pallas_gpu"
    assert "REUSE" in [layer["mode"] for layer in gpu["schedule"]]
    check_kernels_agree(gpu, xla, 1e-2)


def test_heads_that_the_gpus_kernels_do_not_take_run_on_xla_and_the_run_says_so(capsys, weights, text, tmp_path):
    flags = ["--dtype", "bfloat16", "--tile_size", "16", "--top_k", "1", "--sink_tiles", "0", "--seq_len", "33"]
    report = run_with_kernel("pallas_gpu", tmp_path / "out.json", weights, text, *flags)
    assert (
        "warning: attention runs on xla (the GPU kernels take heads of width 64 or 128, got 8)"
        in capsys.readouterr().err
    )
    assert report["config"]["kernel"] == "xla"


# --- Other schedules ---


def run(capsys, weights, text, *flags):
    """A run's output."""
    short = [*SMALL[:6], "--n_runs", "1", "--weights_dir", str(weights), "--text", str(text)]
    assert benchmark.main([*short, *map(str, flags)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--scheduler", "dp"), ("--scheduler", "dp", "--similarity", "mass")])
def test_the_programmes_anchors_are_as_many_as_asked_for(capsys, weights, text, flags):
    output = run(capsys, weights, text, *flags, "--anchors", "2")
    assert "📋 Final Schedule: 1 REUSE, 3 ANCHOR/DENSE" in output
    assert "Similarity threshold" not in output
    assert "(chosen by dynamic programming)" in output


def test_the_guides_rule_on_the_papers_similarity(capsys, weights, text):
    output = run(capsys, weights, text, "--similarity", "mass", "--threshold", "0")
    assert "📋 Final Schedule: 2 REUSE, 2 ANCHOR/DENSE" in output


def test_a_searched_schedule_is_saved_and_loaded(capsys, weights, text, tmp_path):
    path = tmp_path / "schedule.json"
    searched = run(capsys, weights, text, "--scheduler", "search", "--anchors", "1", "--save_schedule", path)
    assert "📋 Final Schedule: 2 REUSE, 2 ANCHOR/DENSE" in searched
    loaded = run(capsys, weights, text, "--load_schedule", path)
    assert "Calibrating" not in loaded
    line = next(line for line in searched.splitlines() if "Sparse Perplexity" in line)
    assert line in loaded
    other = [*SMALL, "--tile_size", "8", "--weights_dir", str(weights), "--text", str(text)]
    refusal = refused(capsys, [*other, "--load_schedule", str(path)])
    assert "was made for tile_size 4, and this run has 8" in refusal


def test_a_limit_on_the_degradation(capsys, weights, text, tmp_path, monkeypatch):
    monkeypatch.setattr("kascade_search.STEPS", 3)
    path = tmp_path / "out.json"
    output = run(capsys, weights, text, "--max_degradation", "3", "--json", path)
    report = json.loads(path.read_text())
    assert report["calibration_degradation_pct"] < 3
    assert f"calibration text {report['calibration_degradation_pct']:+.2f}%, asked for under 3%" in output
    assert {len(row["budgets"]) for row in report["schedule"] if row["mode"] != "DENSE"} == {5}


def test_a_density_instead_of_a_top_k(capsys, weights, text):
    short = [*SMALL[:2], *SMALL[4:], "--weights_dir", str(weights), "--text", str(text)]
    assert benchmark.main([*short, "--density", "0.5", "--local_tiles", "1"]) == 0
    output = capsys.readouterr().out
    assert "density 0.5" in output and "Top-K" not in output


def test_more_anchors_than_layers(capsys, weights, text):
    flags = [*SMALL, "--weights_dir", str(weights), "--text", str(text), "--scheduler", "dp", "--anchors", "4"]
    assert "anchors must be from 1 to 3" in refused(capsys, flags)


# --- Bad input: one sentence on stderr, exit code 2, nothing written ---


def refused(capsys, flags):
    """The one line on stderr of a run that exits with 2."""
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(flags)
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--device", "tpu"], "JAX sees no TPU here"),
        (["--device", "gpu"], "JAX sees no GPU here"),
        (["--tile_size", "0"], "--tile_size: must be at least 1, got 0"),
        (["--top_k", "-3"], "--top_k: must be at least 1, got -3"),
        (["--seq_len", "0"], "--seq_len: must be at least 1, got 0"),
        (["--seq_len", "1"], "--seq_len: must be at least 2"),
        (["--n_runs", "0"], "--n_runs: must be at least 1, got 0"),
        (["--max_reuse_dist", "0"], "--max_reuse_dist: must be at least 1, got 0"),
        (["--threshold", "1.01"], r"--threshold: must be in [0, 1], got 1.01"),
        (["--threshold", "nan"], r"--threshold: must be in [0, 1], got nan"),
        (["--tile_size", "x"], "--tile_size: expected a whole number, got 'x'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--verbose", "--quiet"], "not allowed with"),
        (["--weights_dir", "no/such/folder"], "weights folder no/such/folder does not exist"),
        (["--json", "no/such/folder/out.json"], "cannot write no/such/folder/out.json"),
        (["--json", "x" * 300], "cannot write xxx"),
        (["--json", "."], "cannot write .: give a file"),
        (["--tile_size", "513"], "--tile_size: must be at most seq_len, 512, got 513"),
        (["--sink_tiles", "-1"], "--sink_tiles: must be at least 0, got -1"),
        (["--sink_tiles", "13"], "--sink_tiles: must be at most top_k, 12, got 13"),
        (["--query_tile", "24"], "query_tile must be a multiple or a divisor of tile_size, 16, got 24"),
        (["--query_tile", "256"], "top_k must be at least 16"),
        (["--query_tile", "1024", "--top_k", "64"], "--query_tile: must be at most seq_len, 512, got 1024"),
        (["--kernel", "pallas_tpu"], "the TPU kernels take a tile_size of 128 or another multiple of 128, got 16"),
        (["--anchor_scoring", "best"], "invalid choice: 'best'"),
        (["--dtype", "float16"], "--dtype float16: a CPU does not multiply it; use bfloat16 or float32"),
        (["--sweep", "512,x"], "--sweep: expected a whole number, got 'x'"),
        (["--sweep", ""], "--sweep: expected a whole number, got ''"),
        (["--sweep", "8,512"], "--sweep: lengths must be at least query_tile, 16, and 2, got 8"),
        (["--top_k", "4", "--density", "0.1"], "--density: it is an alternative to --top_k"),
        (["--density", "0"], "density must be above 0"),
        (["--local_tiles", "-1"], "--local_tiles: must be at least 0, got -1"),
        (["--anchors", "3"], "--anchors: of no use with --scheduler threshold"),
        (["--scheduler", "dp", "--budgets", "head"], "--budgets: of no use with --scheduler dp"),
        (["--scheduler", "search", "--similarity", "mass"], "--similarity: of no use with --scheduler search"),
        (["--scheduler", "dp", "--max_degradation", "1"], "--max_degradation: it needs --scheduler search, got dp"),
        (["--max_degradation", "0"], "--max_degradation: must be above 0, got 0"),
        (["--load_schedule", "x", "--anchors", "3"], "--anchors: of no use with --load_schedule"),
        (["--save_schedule", "no/such/folder/s.json"], "--save_schedule: cannot write no/such/folder/s.json"),
        (["--sweep", "99999999999"], "--sweep: positions are 32-bit numbers, got 99999999999"),
    ],
)
def test_bad_flags(capsys, flags, sentence):
    assert sentence in refused(capsys, flags)


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_a_device_that_is_not_there_in_a_fresh_process(device):
    """Unlike the tests above, where JAX is running already."""
    command = [sys.executable, benchmark.__file__, "--quiet", "--device", device]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert [line[:30] for line in result.stderr.splitlines()] == [f"error: JAX sees no {device.upper()} here (U"]


def test_an_empty_weights_folder(capsys, tmp_path):
    assert "is empty" in refused(capsys, ["--weights_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"w1 w2 w3", r"text.txt is too short: it has 3 tokens, and 60 are needed"),
        (b"", "it has 0 tokens, and 60 are needed"),
        (b"w1 \xff\xfe w2", "text.txt is not UTF-8 (byte 3)"),
        (None, "text.txt cannot be read: No such file or directory"),
    ],
)
def test_bad_texts(capsys, weights, text, content, sentence):
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    assert sentence in refused(capsys, [*SMALL, "--weights_dir", str(weights), "--text", str(text)])


def test_a_damaged_chunk(capsys, weights, text, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    (folder / "layer_1.pkl").unlink()
    line = refused(capsys, [*SMALL, "--weights_dir", str(folder), "--text", str(text)])
    assert "layer_1.pkl is missing" in line


def test_a_folder_without_its_tokenizer(capsys, weights, text, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    for path in folder.glob("token*"):
        path.unlink()
    line = refused(capsys, [*SMALL, "--weights_dir", str(folder), "--text", str(text)])
    assert "has no usable tokenizer" in line


def test_a_model_worse_than_guessing(capsys, weights, text, tmp_path):
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(0, 33, 70)))
    report = tmp_path / "out.json"
    flags = ["--weights_dir", str(weights), "--text", str(text), "--json", str(report)]
    assert "worse than guessing among the 33 tokens" in refused(capsys, [*SMALL, *flags])
    assert not report.exists()


def test_a_sequence_beyond_the_context_is_a_warning(capsys, weights, text, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["max_position_embeddings"] = 29
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert benchmark.main([*SMALL, "--n_runs", "1", "--weights_dir", str(folder), "--text", str(text)]) == 0
    assert "warning: seq_len 30 is beyond the model's context of 29" in capsys.readouterr().err


def test_without_weights_the_default_ones_are_made_first(capsys, monkeypatch, weights, text, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convert_weights.convert_default", lambda output: shutil.copytree(weights, output))
    assert benchmark.main([*SMALL, "--n_runs", "1", "--text", str(text)]) == 0
    assert "No weights in llama_weights_chunked: fetching and converting SmolLM2" in capsys.readouterr().out
    assert Path("llama_weights_chunked/manifest.json").is_file()


def test_an_empty_default_folder_is_filled(monkeypatch, weights, text, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("llama_weights_chunked").mkdir()
    made = []
    monkeypatch.setattr("convert_weights.convert_default", made.append)
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--text", str(text)])
    assert made == [Path("llama_weights_chunked")]


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        benchmark.write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_goes_through_a_link_and_into_no_device(tmp_path, capsys):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to(target)
    benchmark.write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    assert "cannot write" in refused(capsys, ["--json", str(pipe)])
