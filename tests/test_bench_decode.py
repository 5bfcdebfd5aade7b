"""bench/compare_decode.py: our side's tokens are greedy ones, the table's figures, and what it is asked to continue."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import Connection, repeating_text

from attention.sharding import make_mesh
from bench import compare_decode as comparison
from errors import InputError
from llama_model import LlamaModel, load_weights
from weights.folder import read_manifest

NAME = "gqa_llama3_untied"
ARGS = argparse.Namespace(top_k=3, threshold=0.3, n_runs=2)


def test_our_arms_take_turns_with_one_cache_and_dense_is_greedy(folders, monkeypatch):
    monkeypatch.setattr(comparison, "STEPS", 5)
    manifest, mesh = read_manifest(folders / NAME), make_mesh(jax.devices()[:2])
    params = load_weights(folders / NAME, manifest, jnp.dtype(jnp.float32), mesh)
    calib, windows = np.random.default_rng(3).integers(0, 50, (2, 2, 43), dtype=np.int32)
    job = comparison.Job(calib[:1], windows)
    prepared = comparison.prepare_ours(ARGS, manifest.config, params, jnp.dtype(jnp.float32), mesh, job)
    assert list(prepared) == ["ours, dense, float32", "ours, sparse, float32"]
    dense, sparse = (item.run() for item in prepared.values())
    np.testing.assert_array_equal(dense, prepared["ours, dense, float32"].run())
    forward = jax.jit(LlamaModel(manifest.config).apply)
    expected = np.pad(windows, [(0, 0), (0, 6)])
    for place in range(43, 49):
        expected[:, place] = np.asarray(forward(params, jnp.asarray(expected)))[:, place - 1].argmax(-1)
    np.testing.assert_array_equal(dense, expected[:, 44:])
    assert sparse.shape == dense.shape
    assert "of the tiles" in prepared["ours, sparse, float32"].note


def row(name, tokens, ms, peak=None):
    return comparison.Row(name, "note", np.array(tokens), ms, peak)


def test_a_row_has_rates_ratios_round_by_round_and_the_tokens_that_are_the_same():
    rows = [
        row("ours", [[1, 2, 3], [1, 9, 3]], (10.0, 30.0, 20.0), 2_000_000),
        row("transformers, bfloat16", [[1, 2, 3], [1, 2, 3]], (80.0, 80.0, 80.0)),
        row("transformers, float32", [[1, 2, 3], [1, 2, 3]], (40.0, 40.0, 40.0)),
        row("llama.cpp", [[7, 2, 3]], (20.0, 20.0, 20.0)),
    ]
    cells = comparison.format_rows(64, 2, rows)
    assert cells[0] == (
        64, 2, "ours", "20.00 [10.00, 30.00]", "100.0", "0.50 [0.25, 0.75]", "1 of 16", "2", "note"
    )  # fmt: skip
    assert [(cell[1], cell[4], cell[6]) for cell in cells[1:]] == [
        (2, "25.0", "3 of 16"), (2, "50.0", "3 of 16"), (1, "50.0", "0 of 16")
    ]  # fmt: skip


def test_windows_differ_follow_the_calibration_and_a_short_text_comes_again(tmp_path):
    (tmp_path / "text.txt").write_text(repeating_text(70, 50, times=1))
    tokenizer = SimpleNamespace(
        prefix=(49,), encode_first=lambda file, most: [int(w[1:]) for w in file.read().split()][:most]
    )
    job = comparison.read_job(tokenizer, tmp_path / "text.txt", 40, 2)
    assert (job.calibration.shape, job.windows.shape) == ((1, 40), (2, 24))
    ids = [int(word[1:]) for word in repeating_text(70, 50, times=1).split()]
    assert job.windows[:, 0].tolist() == [49, 49]
    assert [*job.calibration[0, 1:], *job.windows[0, 1:], *job.windows[1, 1:]] == (ids + ids)[: 39 + 2 * 23]
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match="is empty"):
        comparison.read_job(tokenizer, tmp_path / "text.txt", 40, 2)


def test_a_process_prepares_jobs_and_runs_what_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(comparison, "reset_peak_memory", lambda: True)
    monkeypatch.setattr(comparison, "read_peak_memory", lambda: 7)
    connection, ran = Connection(comparison.Job(1, 2), "a"), []
    comparison.serve(connection, lambda job: {"a": comparison.Prefilled("note", lambda: ran.append(1) or 5)})
    assert (connection.answers, len(ran)) == ([{"a": ("note", 5)}, 7], 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "20"], "depths must be at least 32"),
        (["--batches", "0,1"], "batches and n_runs must be at least 1"),
        (["--gguf", "x.gguf"], "--gguf needs llama.cpp: pip install llama-cpp-python"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        comparison.parse_args(flags)
    assert message in capsys.readouterr().err


def test_a_gguf_file_in_float32_has_the_same_fields_and_tensors(tmp_path):
    import gguf
    from synthetic import HF_CONFIGS, with_gguf_vocabulary, write_gguf

    source = write_gguf(
        tmp_path / "q.gguf",
        with_gguf_vocabulary(HF_CONFIGS[NAME] | {"hidden_size": 32, "intermediate_size": 64}),
        "F16",
    )
    comparison.write_float32(Path(source), tmp_path / "f.gguf")
    one, two = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "f.gguf")
    assert {
        name: field.contents()
        for name, field in two.fields.items()
        if "." in name and name != "general.file_type" and not name.startswith("GGUF")
    } == {
        name: field.contents()
        for name, field in one.fields.items()
        if "." in name and not name.startswith("GGUF") and name != "general.file_type"
    }
    for a, b in zip(one.tensors, two.tensors, strict=True):
        assert (a.name, a.shape.tolist(), b.tensor_type.name) == (b.name, b.shape.tolist(), "F32")
        np.testing.assert_array_equal(gguf.dequantize(a.data, a.tensor_type), b.data)
