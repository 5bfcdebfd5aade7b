"""Odd environments, odd texts and the first hour of a new user: a run works, or ends with one sentence and code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from synthetic import HF_CONFIGS, gpt2_fields, hf_weights, repeating_text, write_hf
from tokenizers import Tokenizer, processors

import benchmark_kascade_final as benchmark
from convert_weights import convert
from errors import InputError, quote
from measure.settings import Settings, make_parser
from measure.texts import read_tokens
from report import console
from report.results import write_json
from weights.folder import MANIFEST, read_manifest
from weights.tokenizers import from_gguf

ROOT = Path(__file__).parents[1]
CALM = HF_CONFIGS["mha_llama3_tied"] | {"num_hidden_layers": 2}
SMALL = ("--tile_size", "4", "--top_k", "3", "--seq_len", "16", "--n_runs", "1", "--dtype", "float32", "--windows", "1")
NO_DECODING = ("--decode", "0")


def write_weights(folder, layers):
    """A model that expects the word it has just read, and a tokenizer that begins every text with w0, converted."""
    config = CALM | {"num_hidden_layers": layers}
    weights = hf_weights(config)
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] /= 10
    path = write_hf(folder / "hf", config, weights) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    tokenizer.save(str(path))
    convert(folder / "hf", folder / "weights")
    return folder / "weights"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(repeating_text(400, 33, times=9))
    return path


@pytest.fixture
def given(weights, text):
    return ["--weights_dir", str(weights), "--text", str(text)]


def child(*argv, **environment):
    """The command line in a process of its own; `environment` is added to this one's."""
    command = [sys.executable, ROOT / "benchmark_kascade_final.py", *map(str, argv)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=300)


def refused(capsys, *argv):
    """The sentence on stderr of a run that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        benchmark.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert re.fullmatch("error: .*\n", captured.err), captured.err
    return captured.err


# --- A user's settings of JAX, and terminals ---

JAX_SETTINGS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DISABLE_JIT": "1",
    "JAX_TRANSFER_GUARD": "disallow",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_PLATFORM_NAME": "gpu",
    "JAX_DEBUG_NANS": "1",
    "JAX_NO_TRACING": "1",
}


def check_whole_run(done):
    """The report alone is on stdout; every line of the text beside it fits a terminal."""
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    report = json.loads(done.stdout)
    assert report["verdict"] and report["decode"]["tokens"] == 4
    said = done.stderr.decode("ascii")
    assert "RESULTS ON REAL TEXT" in said
    assert max(map(console.width, said.splitlines())) <= console.COLUMNS


SHORT = ("--decode", "4", "--verbose", "--json", "-")
FULLEST = (*SHORT, "--depths", "8", "--generate", "2", "--sweep", "20")


def test_a_run_works_under_any_settings_of_jax_and_any_encoding(given):
    done = child(*SMALL, *SHORT, *given, **JAX_SETTINGS, PYTHONIOENCODING="ascii")
    check_whole_run(done)
    assert b"??  Configuration:" in done.stderr.replace(b"???", b"??")


@pytest.mark.full
@pytest.mark.parametrize("name", JAX_SETTINGS)
@pytest.mark.parametrize("scheduler", ["threshold", "search"])
def test_a_run_works_under_each_setting_of_jax(given, name, scheduler):
    flags = ("--scheduler", scheduler, *FULLEST)
    done = child(*SMALL, *flags, *given, **{name: JAX_SETTINGS[name]}, PYTHONIOENCODING="ascii")
    check_whole_run(done)


@pytest.mark.full
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_a_run_works_on_a_terminal_of_any_encoding(given, encoding):
    done = child(*SMALL, *NO_DECODING, *given, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b"" and b"RESULTS ON REAL TEXT" in done.stdout


def test_a_full_standard_output_is_one_sentence_and_head_ends_it_quietly(given):
    command = [sys.executable, ROOT / "benchmark_kascade_final.py", *SMALL, *NO_DECODING, *given]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    sentence = "error: cannot write to the standard output (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, sentence)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


# --- Ctrl-C ---


def interrupted_at(line, command, environment):
    """Ctrl-C when a line that begins so was printed: the exit code and stderr."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | environment, **pipes) as process:
        assert any(said.startswith(line) for said in process.stdout)
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(10), process.stderr.read()
        finally:
            process.kill()


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "jax.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    command = [sys.executable, ROOT / "benchmark_kascade_final.py"]
    assert interrupted_at("importing", command, {"PYTHONPATH": str(tmp_path)}) == (2, "error: interrupted\n")


@pytest.mark.parametrize(
    "line",
    [
        "📊 Calibrating on",
        pytest.param("⚙️  Configuration", marks=pytest.mark.full),
        pytest.param("🖥️  Configuring JAX", marks=pytest.mark.full),
        pytest.param("📦 Loading", marks=pytest.mark.full),
        pytest.param("⚡ Generating", marks=pytest.mark.full),
        pytest.param("🏃 Running DENSE", marks=pytest.mark.full),
        pytest.param("⚡ Running KASCADE", marks=pytest.mark.full),
        pytest.param("  Warming up", marks=pytest.mark.full),
        pytest.param("🔬 Attention alone", marks=pytest.mark.full),
    ],
)
def test_ctrl_c_at_any_moment_of_a_run(given, line):
    command = [sys.executable, ROOT / "benchmark_kascade_final.py", *SMALL, "--n_runs", "999", *NO_DECODING, *given]
    assert interrupted_at(line, command, {}) == (2, "error: interrupted\n")


IN_C = """
import errors, hashlib
errors.stop_on_ctrl_c()
print("in C", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a look at signals, as XLA compiles
"""
IN_A_CALLBACK = """
import errors, time, weakref
errors.stop_on_ctrl_c()
def callback(_):
    print("in a callback", flush=True)
    time.sleep(60)  # an exception from here is printed and passed over
class Object: pass
reference = weakref.ref(Object(), callback)
print("went on")
"""
RAISING = """
import errors, time
errors.stop_on_ctrl_c()
try:
    with errors.ctrl_c_raises():
        print("working", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("removing temporary folders", flush=True)
print("stopping", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("code", "line"), [(IN_C, "in C"), (IN_A_CALLBACK, "in a callback")])
def test_ctrl_c_where_python_would_not_see_it_or_swallow_it(code, line):
    environment = {"PYTHONPATH": str(ROOT)}
    assert interrupted_at(line, [sys.executable, "-c", code], environment) == (2, "error: interrupted\n")


def test_ctrl_c_is_an_exception_while_temporary_folders_stand():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command, environment = [sys.executable, "-c", RAISING], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        for line in ("working\n", "removing temporary folders\n"):
            assert process.stdout.readline() == line
            if line == "working\n":
                process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr.read()) == (2, "error: interrupted\n")


@pytest.mark.real_model
@pytest.mark.parametrize("seconds", [0.5, 1, 2, 3, 6, 10, 20, 35])
def test_ctrl_c_after_so_many_seconds(seconds, default_weights):
    command = [sys.executable, ROOT / "benchmark_kascade_final.py", "--n_runs", "99", "--quiet"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 2
        assert process.stderr.read().endswith("error: interrupted\n")


# --- Models ---


def test_a_model_of_one_layer_runs_or_says_which_scheduler_it_needs(capsys, tmp_path, text):
    given = ["--weights_dir", write_weights(tmp_path, 1), "--text", text, *SMALL, *NO_DECODING]
    assert benchmark.main([*map(str, given), "--quiet"]) == 0
    assert "Nothing was dropped" in capsys.readouterr().out
    for flags in (("--scheduler", "dp"), ("--scheduler", "search"), ("--anchor_layers", "1")):
        said = refused(capsys, *given, *flags)
        assert "needs a second layer, for layer 0 is dense; use threshold" in said


def test_lengths_beyond_the_context_are_warned_of_and_one_run_decides_nothing(capsys, given, tmp_path):
    """The context is 64. The whole run's lines fit a terminal."""
    flags = ["--sweep", "80", "--json", str(tmp_path / "report.json"), "--verbose"]
    assert benchmark.main([*SMALL, *NO_DECODING, *given, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: 80 tokens are beyond the model's context of 64\n"
    assert "from one run of each, which says little. Raise --n_runs." in captured.out
    assert "faster!" not in captured.out
    wide = [line for line in captured.out.splitlines() if console.width(line) > console.COLUMNS]
    assert [line for line in wide if str(tmp_path) not in line] == []
    report = json.loads((tmp_path / "report.json").read_text())
    assert "   Each window begins with w0\n" in captured.out and report["prefix"] == "w0"
    assert report["command"] == [*SMALL, *NO_DECODING, *given, *flags]
    assert re.match(r"\d{4}-\d\d-\d\dT", report["date"])
    assert report["verdict"] in ("success", "failed", "undecided", "nothing dropped")
    assert [row["speedup"] > 0 for row in report["sweep"]] == [True] and len(report["sweep_break_even"]) == 2
    assert report["model"]["fingerprint"] == read_manifest(Path(given[1])).fingerprint
    assert report["device"]["processor"]


# --- What is checked before anything is fetched ---


@pytest.mark.parametrize("name", ["text", "calib_text", "load_schedule"])
def test_a_file_that_is_missing_is_said_before_weights_are_fetched(capsys, monkeypatch, tmp_path, text, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convert_weights.convert_default", None)
    for path in (tmp_path / "none", tmp_path):
        said = refused(capsys, f"--{name}", path)
        assert re.search(f"error: {name} {path} cannot be read: (No such file|Is a directory)", said)


def test_a_file_where_the_default_weights_belong_is_named(capsys, monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    Path("llama_weights_chunked").write_text("thesis")
    assert "llama_weights_chunked is not a folder; make one with" in refused(capsys, "--text", text)
    assert Path("llama_weights_chunked").read_text() == "thesis"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: write_hf(folder / "m", CALM), "m is a checkpoint that is not converted yet; convert it first: python convert_weights.py --input .*m\n"),
        (lambda folder: write_hf(folder / "m", CALM) / "model.safetensors", "is a checkpoint's file, not a weights folder; convert it first: python convert_weights.py --input .*m\n"),
        (lambda folder: Path("org/model"), "weights folder org/model does not exist; make it with convert_weights.py"),
    ],
)  # fmt: skip
def test_what_is_no_weights_folder_is_answered_by_the_next_command(capsys, tmp_path, text, make, sentence):
    assert re.search(sentence, refused(capsys, "--weights_dir", make(tmp_path), "--text", text))


# --- Texts ---


@pytest.fixture(scope="module")
def tokenizer():
    return from_gguf(gpt2_fields(), 263)


@pytest.mark.parametrize("content", [b" " * 10**7, b"-" * 3 * 10**6, b"\n" * 10**7, b" " * 5 * 10**6 + b"words " * 9])
def test_a_large_text_of_one_character_is_read_only_as_far_as_needed(tmp_path, tokenizer, content):
    (tmp_path / "text.txt").write_bytes(content)
    read = []
    encode = type(tokenizer).encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", lambda self, text: read.append(len(text)) or encode(self, text))
        assert len(read_tokens(tokenizer, tmp_path / "text.txt", 512)) == 512
    assert sum(read) < 50_000


def test_a_text_of_a_gigabyte_takes_no_memory(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("some words of a text " * 100)
    os.truncate(path, 2**30)
    tracemalloc.start()
    try:
        assert len(read_tokens(tokenizer, path, 64)) == 64
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_text_that_repeats_itself_is_said_to(capsys, given, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 40)
    said = refused(capsys, *SMALL, *given[:2], "--text", tmp_path / "text.txt")
    assert "the same tokens: the text repeats itself; give another text" in said


# --- Flags and messages ---


def test_help_gives_every_range_and_speaks_of_nothing_that_nobody_has(capsys):
    for action in make_parser()._actions:
        if action.metavar in ("N", "X", "PERCENT", "N,N,...", "X,X,..."):
            assert re.search(r"at least (\d|query_tile)|\[0, 1\]|\(0, 1\]|above 0|every later layer", action.help), (
                action.dest
            )
        assert action.help
        assert "guide" not in action.help
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "guide" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["top_k", "density"])
def test_a_limit_on_the_degradation_does_not_pass_over_a_budget(capsys, name):
    assert f"{name} has no effect with max_degradation" in refused(capsys, f"--{name}", "1", "--max_degradation", "1")


def test_quoted_paths_of_the_home_folder_and_standard_output(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.from_flags(["--json", "~/r.json"]).json == tmp_path / "r.json"
    for name in ("-", "/dev/stdout"):
        assert Settings.from_flags(["--json", name]).json == Path(name)


def test_a_value_too_deep_or_too_long_to_be_written_is_quoted():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert quote(deep) == "list whose parts stand too deep in one another"
    assert quote([10**5000]) == "list with a number of over 4300 digits"
    assert len(quote("x" * 10**7)) < 300


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*report.json \(No space left on device\); give a file where"):
        write_json(path, {})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_processs_unfinished_report_is_removed_and_a_running_ones_is_not(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {f".r[1].json.{ended.pid}", f".r[1].json.{os.getppid()}", ".r[1].json.bak"}
    for name in names:
        (tmp_path / name).touch()
    write_json(tmp_path / "r[1].json", {})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"r[1].json", f".r[1].json.{os.getppid()}", ".r[1].json.bak"}


def test_lines_are_broken_at_spaces_and_wide_letters_count_twice():
    line = "  ⚠️  " + "word " * 40
    broken = console.fit(line).split("\n")
    assert len(broken) == 3 and broken[1].startswith("      word")
    assert " ".join(" ".join(broken).split()) == " ".join(line.split())
    assert console.width("⚠️") == console.width("東") == 2 and console.width("e\u0301") == 1
    assert console.fit("a\n\n" + "x" * 200) == "a\n\n" + "x" * 200


# --- Schedule files ---


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('"budgets": ["7", "7", "7", "7", "7"]', r"layers\[1\].budgets must be a list of whole numbers from 1 to 2147483647, got \['7'"),
        ('"budgets": [1.9, 2, 2, 2, 2]', r"layers\[1\].budgets must be a list of whole numbers .*, got \[1.9"),
        ('"budgets": [1e30, 2, 2, 2, 2]', r"layers\[1\].budgets must be a list of whole numbers .*, got \[1e\+30"),
        ('"budgets": [Infinity, 2, 2, 2, 2]', r"layers\[1\].budgets must be a list of whole numbers .*, got \[inf"),
        ('"head_map": [NaN]', r"layers\[1\].head_map must be a list of whole numbers"),
        ('"anchor": ' + "1" * 5000, "a number of more than 4,300 digits"),
        ('"anchor": ' + "1" * 400, r"layers\[1\].anchor must be a whole number of at most 2147483647, got 1+\.\.\. \(400 characters"),
        ('"anchor": ' + "[" * 100_000 + "]" * 100_000, "not JSON that can be read: its lists or objects stand too deep in one another"),
        ('"anchor": "' + "x" * 5 * 10**7 + '"', r"5\d+ bytes, expected a JSON file of at most 16777216"),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_hostile_schedule_is_one_sentence(capsys, given, tmp_path, weights, change, sentence):
    manifest, path = read_manifest(weights), tmp_path / "schedule.json"
    layers = '[{"mode": "DENSE"}, {"mode": "ANCHOR", ' + change + "}]"
    path.write_text(
        '{"format_version": 2, "model": {"name": "m", "fingerprint": "' + manifest.fingerprint + '"}, "selection": {},'
        '"calibration": {"tokens": 16, "windows": 1, "sha256": ""}, "layers": ' + layers + "}"
    )
    said = refused(capsys, *given, "--load_schedule", path)
    assert re.match(f"error: {path}: {sentence}", said) and len(said) < 700


@pytest.mark.full  # what is said stands in test_kascade_core
def test_fewer_than_64_predictions_warn_of_a_model_that_is_worse_than_guessing(capsys, weights, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).permutation(33)))
    flags = [*SMALL, *NO_DECODING, "--quiet", "--weights_dir", str(weights), "--text", str(tmp_path / "text.txt")]
    assert benchmark.main(flags) == 0
    assert "warning: on only 15 predictions the dense perplexity" in capsys.readouterr().err


def test_a_manifest_that_quotes_fifty_megabytes_is_cut(capsys, weights, text, tmp_path):
    folder = shutil.copytree(weights, tmp_path / "weights")
    values = json.loads((folder / MANIFEST).read_text())
    values["chunks"] = {"x" * 10**7: {}} | values["chunks"]
    (folder / MANIFEST).write_text(json.dumps(values))
    said = refused(capsys, "--weights_dir", folder, "--text", text)
    assert "manifest.json: lists the chunk 'xxx" in said and len(said) < 700
