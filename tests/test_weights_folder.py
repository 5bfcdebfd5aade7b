"""A weights folder is read whole or refused in one sentence, and appears complete or not at all."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import HF_CONFIGS

from errors import InputError
from weights import folder as wf
from weights.config import LlamaConfig, chunk_shapes
from weights.folder import DTYPES, MANIFEST, Manifest, claiming, read_chunks, read_manifest, replacing, write_chunk

CONFIG = LlamaConfig.from_hf(HF_CONFIGS["gqa_llama3_untied"])
TOKENIZER = {"file": "tokenizer.json", "bytes": 7, "sha256": "0" * 64, "probe_sha256": "f" * 64}


def random_arrays(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if isinstance(shapes, tuple):
        return rng.standard_normal(shapes).astype(dtype)
    return {name: random_arrays(shape, dtype, seed + i) for i, (name, shape) in enumerate(shapes.items())}


def write_folder(path, dtype="float32", change=lambda name, arrays: arrays):
    """A folder of random weights; `change` gets each chunk's arrays before they are written."""
    path.mkdir()
    entries = {}
    for name, shapes in chunk_shapes(CONFIG).items():
        entries[name] = write_chunk(path / name, change(name, random_arrays(shapes, DTYPES[dtype])))
    Manifest("tiny", "tiny.gguf (9 bytes)", dtype, CONFIG, entries, TOKENIZER).write(path)
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("weights") / "weights")


@pytest.fixture
def weights(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "weights")


def edit_manifest(folder, **changes):
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(values | changes))


def read_all(folder):
    return dict(read_chunks(folder, read_manifest(folder)))


# --- Chunks ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_come_back_as_they_were_written(tmp_path, dtype):
    folder = write_folder(tmp_path / "weights", dtype)
    for name, shapes in chunk_shapes(CONFIG).items():
        expected, got = random_arrays(shapes, DTYPES[dtype]), read_all(folder)[name]
        assert got.keys() == expected.keys()
        wq, key = ("attention", "wq") if "attention" in expected else (None, "norm")
        got_array, array = (tree[wq][key] if wq else tree[key] for tree in (got, expected))
        assert got_array.dtype == DTYPES[dtype] and not got_array.flags.writeable
        np.testing.assert_array_equal(got_array, array)


def test_a_chunk_is_the_same_for_an_array_of_any_order(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    first, second = (write_chunk(tmp_path / "x", {"a": array}) for array in (rows, rows.copy(order="F")))
    assert first == second and first["bytes"] == (tmp_path / "x").stat().st_size
    assert first["sha256"] == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_the_fingerprint_follows_from_the_chunks_alone(shared, tmp_path):
    manifest = read_manifest(shared)
    assert dataclasses.replace(manifest, model="other", source="other").fingerprint == manifest.fingerprint
    other = read_manifest(write_folder(tmp_path / "other", "bfloat16"))
    assert other.fingerprint != manifest.fingerprint and len(manifest.fingerprint) == 64
    assert manifest.num_bytes == sum((shared / name).stat().st_size for name in manifest.chunks)


def test_a_missing_truncated_or_altered_chunk_is_named(weights):
    path = weights / "layer_1.pkl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=rf"layer_1.pkl: {len(whole) - 100} bytes, expected {len(whole)}; convert"):
        read_all(weights)
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(InputError, match=r"layer_1.pkl: altered \(its SHA-256 differs\)"):
        read_all(weights)
    with pytest.raises(InputError, match=r"layer_1.pkl: altered"):
        wf.check_chunks(weights, read_manifest(weights))
    path.unlink()
    with pytest.raises(InputError, match="layer_1.pkl: missing; convert the model anew"):
        read_all(weights)


def drop(arrays, part, key):
    del arrays[part][key]
    return arrays


WRONG = {  # the sentence -> what is done to layer 2's arrays
    r"layer_2.pkl: attention/wk: expected float32 \(24, 20\) of 1920 bytes, got 'float32' \(20, 24\)": lambda a: (
        a | {"attention": a["attention"] | {"wk": a["attention"]["wk"].T}}
    ),
    r"layer_2.pkl: feed_forward/expected the keys \['w1', 'w2', 'w3'\], got \['w1', 'w3', 'w4'\]": lambda a: drop(
        a | {"feed_forward": a["feed_forward"] | {"w4": a["feed_forward"]["w2"]}}, "feed_forward", "w2"
    ),
    r"layer_2.pkl: ffn_norm: expected float32 \(24,\) of 96 bytes, got 'int32' \(24,\)": lambda a: (
        a | {"ffn_norm": np.arange(24, dtype=np.int32)}
    ),
    "layer_2.pkl: ffn_norm has NaN or infinite values": lambda a: a | {"ffn_norm": np.full(24, np.inf, np.float32)},
}


@pytest.mark.parametrize("match", WRONG)
def test_a_chunk_with_other_arrays_than_the_config_says_is_refused(tmp_path, match):
    change = WRONG[match]
    folder = write_folder(tmp_path / "w", change=lambda name, a: change(a) if name == "layer_2.pkl" else a)
    with pytest.raises(InputError, match=match):
        read_all(folder)


# --- Manifest ---


def test_what_is_no_weights_folder_is_refused_with_what_to_type(tmp_path):
    sentences = {"nowhere": "does not exist; make it with convert_weights.py --output .*nowhere", "empty": "is empty"}
    (tmp_path / "empty").mkdir()
    for name, file in {"hf model": "config.json", "meta": "params.json", "other": "thesis.txt"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    sentences["hf model"] = "not converted yet; convert it first: python convert_weights.py --input '.*hf model'"
    sentences["meta"] = "not converted yet; convert it first: python convert_weights.py --input .*meta"
    sentences["other"] = "has no manifest.json; make it with"
    for name in ("x.gguf", "x.txt"):
        (tmp_path / name).touch()
    sentences["x.gguf"] = (
        "is a checkpoint's file, not a weights folder; convert it first: python convert_weights.py --input"
    )
    sentences["x.txt"] = "is not a folder; make one with convert_weights.py"
    sentences["x" * 300] = "cannot be read .File name too long."
    for name, match in sentences.items():
        with pytest.raises(InputError, match=match):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize("version", [1, 3])
def test_a_folder_of_another_version_is_to_be_converted_anew(weights, version):
    edit_manifest(weights, format_version=version)
    match = f"format version {version}, and this program reads version 2; convert the model anew"
    with pytest.raises(InputError, match=match):
        read_manifest(weights)


DAMAGED = {  # the sentence -> what is changed
    "format_version must be a whole number of at least 0, got '2'": {"format_version": "2"},
    "format_version must be a whole number of at most": {"format_version": 10**400},
    "model must be text, got 7; convert the model anew": {"model": 7},
    "source must be text of at most 1000 characters": {"source": "x" * 10**5},
    "dtype must be one of float32, float16, bfloat16, got 'int7'": {"dtype": "int7"},
    r"dtype must be text, got \['float32'\]": {"dtype": ["float32"]},
    "config must be an object, got None": {"config": None},
    "LlamaConfig: hidden_size is missing": {"config": {"vocab_size": 3}},
    "num_hidden_layers must be a whole number of at most 1024": {
        "config": dataclasses.asdict(CONFIG) | {"num_hidden_layers": 10**12}
    },
    "chunks.embeddings.pkl is missing; expected an object": {"chunks": {}},
    "chunks must be an object, got ..": {"chunks": []},
    "lists the chunk 'xxxx.* characters": {"chunks": {"x" * 10**7: {}}},
    "lists the chunk '../../etc/passwd', which its config does not need": {"chunks": {"../../etc/passwd": {}}},
    "tokenizer must be an object, got None": {"tokenizer": None},
    "tokenizer.file must be the name of a file in the folder, got '../x'": {"tokenizer": TOKENIZER | {"file": "../x"}},
    "tokenizer.bytes must be a whole number of at least 1, got 0": {"tokenizer": TOKENIZER | {"bytes": 0}},
    "tokenizer.sha256 must be 64 hexadecimal digits, got 'abc'": {"tokenizer": TOKENIZER | {"sha256": "abc"}},
    "tokenizer.probe_sha256 is missing": {"tokenizer": {"file": "t", "bytes": 1, "sha256": "0" * 64}},
}


@pytest.mark.parametrize("match", DAMAGED)
def test_a_manifest_that_makes_no_sense_is_refused_by_field(weights, match):
    edit_manifest(weights, **DAMAGED[match])
    with pytest.raises(InputError, match=f"manifest.json: {match}") as caught:
        read_manifest(weights)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("entry", [3, {}, {"bytes": "1", "sha256": "0" * 64}, {"bytes": 8000, "sha256": 0}])
def test_a_damaged_entry_of_a_chunk_is_refused(weights, entry):
    chunks = json.loads((weights / MANIFEST).read_text())["chunks"]
    edit_manifest(weights, chunks=chunks | {"layer_0.pkl": entry})
    with pytest.raises(InputError, match="manifest.json: chunks.layer_0.pkl(.bytes|.sha256)? (must be|is missing)"):
        read_manifest(weights)


@pytest.mark.parametrize("size", [1, 17_000, 10**15])
def test_a_size_that_the_config_does_not_make_is_never_read(weights, size):
    chunks = json.loads((weights / MANIFEST).read_text())["chunks"]
    edit_manifest(weights, chunks=chunks | {"layer_0.pkl": chunks["layer_0.pkl"] | {"bytes": size}})
    with pytest.raises(InputError, match=rf"layer_0.pkl.bytes must be \d+ to \d+ by the config, got {size}"):
        read_manifest(weights)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": ' + "9" * 5000 + "}", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(weights, content):
    (weights / MANIFEST).write_text(content)
    with pytest.raises(
        InputError, match="manifest.json: (not JSON|expected a JSON|format_version is|a number of more)"
    ):
        read_manifest(weights)


# --- A folder that appears complete or not at all ---


def fill(folder):
    (folder / MANIFEST).write_text("new")


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for _ in range(2):
        with replacing(tmp_path / "out") as new:
            fill(new)
            assert new.parent == tmp_path and new.name.startswith(".out.new-")
        assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("x"), ZeroDivisionError])
def test_an_error_leaves_the_old_folder(tmp_path, error):
    with replacing(tmp_path / "out") as new:
        (new / "old").touch()
    with pytest.raises(error if isinstance(error, type) else type(error)), replacing(tmp_path / "out") as new:
        fill(new)
        raise error
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/old"]


def test_a_full_disk_and_a_forbidden_place_end_in_a_sentence(tmp_path):
    match = "disk full, .*out is as it was; free some space, or give another --output"
    with pytest.raises(InputError, match=match), replacing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    match = r"cannot make .*out \(Permission denied: /x\); give an --output that you may write to"
    with pytest.raises(InputError, match=match), replacing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")
    with pytest.raises(InputError, match=r"out needs \d+ MB, and \d+ MB are free there; free some space"):
        wf.check_space(tmp_path / "out", 10**18)


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    for name in (".out.new-12", ".out.old-12", ".out.new-x", ".out2.new-12", ".out.newer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with claiming(tmp_path / "out"):
        kept = {path.name for path in tmp_path.iterdir()} - {".out.lock"}
    assert kept == {"out", ".out.new-x", ".out2.new-12", ".out.newer"}  # the old folder, which was moved, is back
    assert (tmp_path / "out" / ".out.old-12").exists() and not (tmp_path / ".out.lock").exists()


def test_a_second_process_waits_until_the_first_has_ended(tmp_path):
    code = (
        "import pathlib, sys, time; from weights.folder import claiming\n"
        "with claiming(pathlib.Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, tmp_path / "out"]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[1]}
    with subprocess.Popen(command, **options) as first:
        assert first.stdout.readline() == "claimed\n"
        waited = []

        def let_the_first_end():
            waited.append(time.monotonic())
            first.communicate("\n")

        with claiming(tmp_path / "out", let_the_first_end):
            assert len(waited) == 1 and first.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_is_found_before_anything_is_made(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    sentences = {
        "foreign": r"foreign is not a folder that this program made \(no manifest.json\); give another --output",
        "file": "file is not a folder that this program made",
        "loop": "output folder .*loop cannot be used .*; give another --output",
        "file/x": "cannot make .*x .Not a directory",
        f"{'x' * 250}": "cannot make .* .File name too long",
    }
    for name, match in sentences.items():
        with pytest.raises(InputError, match=match):
            wf.check_output(tmp_path / name)
    with pytest.raises(InputError, match="cannot make /proc/x"):
        wf.check_output(Path("/proc/x"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(InputError, match="out is a mount point, which cannot be replaced; give a folder in it"):
        wf.check_output(tmp_path / "out")


def test_a_home_folder_and_a_link_are_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wf.check_output(Path("~/out")) == tmp_path / "out"
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert wf.check_output(tmp_path / "link") == tmp_path / "disk"
    assert os.listdir(tmp_path / "disk") == []
