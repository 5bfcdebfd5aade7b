"""bench/compare_transformers.py, as far as it goes without torch: its processes, its peaks, our side, its table."""

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, MODELS, Connection, hf_shapes, hf_weights, repeating_text, write_hf

from attention.sharding import make_mesh
from bench import compare_transformers as comparison
from convert_weights import convert
from errors import InputError, UnsupportedError
from kascade_core import perplexity_of
from llama_model import LlamaModel, load_weights
from weights.folder import read_chunks, read_manifest
from weights.tensors import HUGGING_FACE, NAMES
from weights.tokenizers import load_tokenizer

NAME = "gqa_llama3_untied"  # three layers, two KV heads, 50 words
ARGS = argparse.Namespace(top_k=3, threshold=0.3, n_runs=2)


@pytest.fixture(scope="module")
def weights(folders):
    return folders / NAME


def test_the_file_that_every_process_imports_brings_neither_jax_nor_torch():
    code = "import sys, bench.compare_transformers; print({'jax', 'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_every_array_of_a_chunk_has_a_name_of_transformers_and_the_right_values(weights):
    found = {}
    for chunk_name, chunk in read_chunks(weights, read_manifest(weights)):
        layer = chunk_name.removeprefix("layer_").removesuffix(".pkl")
        for name, array in comparison.named_arrays(chunk):
            found[NAMES[name][HUGGING_FACE].format(i=layer)] = array if name == "tok_embeddings" else array.T
    assert found.keys() == hf_shapes(HF_CONFIGS[NAME]).keys()
    assert all((found[name] == array).all() for name, array in hf_weights(HF_CONFIGS[NAME]).items())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets a process's peak")
def test_a_peak_is_of_the_run_and_not_of_what_came_before():
    code = """
import numpy as np
from measure.memory import read_peak_memory, reset_peak_memory
np.ones(2 * 10**8, np.uint8)
before = read_peak_memory()
assert reset_peak_memory()
np.ones(10**8, np.uint8)
print((before - read_peak_memory()) / 1e6)
"""
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 90 < float(result.stdout) < 110


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's getrusage remembers the parent")
def test_a_peak_is_not_that_of_the_process_that_started_this_one():
    root, held = Path(__file__).parents[1], np.ones(3 * 10**8, np.uint8)
    code = "from measure.memory import read_peak_memory; print(read_peak_memory())"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(result.stdout) < held.nbytes / 3


@pytest.mark.parametrize(("known", "peak"), [(True, 7), (False, None)])
def test_a_process_prepares_windows_and_runs_what_it_is_asked_for(known, peak, monkeypatch):
    monkeypatch.setattr(comparison, "reset_peak_memory", lambda: known)
    monkeypatch.setattr(comparison, "read_peak_memory", lambda: 7)
    ran = []

    def prepare(calib, test):
        return {"a": comparison.Prepared(calib + test, "note", lambda: ran.append("a"))}

    connection = Connection((1, 2), "a", (3, 4), "a")
    comparison.serve(connection, prepare)
    assert connection.answers == [{"a": (3, "note")}, peak, {"a": (7, "note")}, peak]
    assert ran == ["a", "a"]


def answer_with_its_name(connection, name):
    comparison.serve(connection, lambda *_: {name: comparison.Prepared(2.0, "", lambda: None)})


def test_processes_take_turns_and_one_that_ends_is_named():
    workers = [comparison.Worker(answer_with_its_name, name) for name in ("ours", "transformers, float32")]
    rows = comparison.compare(workers, (1, 2), 2)
    assert [(row.name, row.perplexity, len(row.ms)) for row in rows] == [
        ("ours", 2.0, 2), ("transformers, float32", 2.0, 2)
    ]  # fmt: skip
    assert comparison.fastest_baseline(rows).name == "transformers, float32"
    workers[0].close()
    with pytest.raises(SystemExit, match="error: the process of answer_with_its_name ended; see above"):
        workers[0].ask("ours")
    workers[1].close()


def test_our_side_is_the_runs_dense_and_sparse_models(weights):
    manifest, mesh = read_manifest(weights), make_mesh(jax.devices()[:1])
    params = load_weights(weights, manifest, jnp.dtype(jnp.float32), mesh)
    calib, test = np.random.default_rng(3).integers(0, 50, (2, 1, 96), dtype=np.int32)
    float32 = jnp.dtype(jnp.float32)
    prepared = comparison.prepare_ours(ARGS, manifest.config, params, float32, mesh, calib[:, :64], test)
    names = ["ours, dense, float32", "ours, sparse, exact scoring", "ours, sparse, fast scoring"]
    assert list(prepared) == names
    dense = LlamaModel(manifest.config).compile(params, test)(params, test)
    assert prepared[names[0]].perplexity == pytest.approx(perplexity_of(dense.nll), rel=1e-5)
    for name in names[1:]:
        assert prepared[name].perplexity != pytest.approx(prepared[names[0]].perplexity, rel=1e-4)
        assert " REUSE, density " in prepared[name].note
        assert np.isfinite(prepared[name].run().nll).all()


def test_the_test_window_follows_the_calibration_window_and_both_have_the_prefix(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "CALIBRATION", 20)
    tokenizer = load_tokenizer(weights, read_manifest(weights).tokenizer)
    (tmp_path / "text.txt").write_text(repeating_text(58, 50, times=1))
    prefixed = SimpleNamespace(prefix=(49,), encode_first=tokenizer.encode_first)
    calib, test = comparison.read_windows(prefixed, tmp_path / "text.txt", 40)
    assert (calib.shape, test.shape, test.dtype) == ((1, 20), (1, 40), np.int32)
    ids = tokenizer.encode((tmp_path / "text.txt").read_text())
    assert [*calib[0], *test[0]] == [49, *ids[:19], 49, *ids[19:]]


@pytest.mark.parametrize(
    ("length", "flags", "message"),
    [
        (64, {"top_k": 0}, "top_k must be at least 2"),
        (64, {"threshold": 1.5}, "threshold must be in"),
        (64, {"n_runs": 0}, "n_runs must be at least 1"),
        (1, {}, "seq_len must be at least 2"),
    ],
)
def test_a_flag_out_of_range_is_refused(length, flags, message):
    with pytest.raises(InputError, match=message):
        comparison.settings_of(length, argparse.Namespace(**(vars(ARGS) | flags)))


@pytest.mark.parametrize(("length", "top_k"), [(512, 12), (8192, 51)])
def test_top_k_is_a_tenth_of_the_tiles_and_at_least_twelve(length, top_k):
    args = argparse.Namespace(top_k=None, threshold=0.65, n_runs=5)
    assert comparison.settings_of(length, args).selection.top_k == top_k


def test_a_row_has_ratios_round_by_round_and_no_peak_where_it_is_unknown():
    ours = comparison.Row("ours", 8.125, "note", (1000.0, 3000.0), 2_000_000)
    theirs = comparison.Row("transformers, float32", 8.0, "", (2000.0, 3000.0), None)
    assert comparison.format_row(64, ours, theirs) == (
        64, "ours", "8.1250", "2.00 [1.00, 3.00]", "0.75 [0.50, 1.00]", "2", "note"
    )  # fmt: skip
    assert comparison.format_row(64, theirs, theirs)[4:6] == ("1.00 [1.00, 1.00]", "")


def test_a_model_that_the_baseline_does_not_compute_is_refused(tmp_path):
    convert(write_hf(tmp_path / "hf", MODELS["mistral_window"]), tmp_path / "w")
    with pytest.raises(
        UnsupportedError, match="holds more than a plain LLaMA, which is all that the baseline computes"
    ):
        comparison.build_baseline(tmp_path / "w", "float32")
