"""bench/attention.py: it counts what it says, refuses to time a wrong program, and its table is whole."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import attention

import kascade_kernels as kernels
from kascade_core import NO_TILE, Selection

SMALL = ["--device", "cpu", "--shape", "small", "--seq_len", "96,128", "--tile_size", "16", "--n_runs", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(attention.SHAPES, "small", (2, 1, 64))
    monkeypatch.setitem(attention.CEILING_SIZES, "cpu", (64, 2**10))


def test_the_table_has_every_program_at_every_length(capsys, tmp_path):
    file = tmp_path / "table.md"
    assert attention.main([*SMALL, "--dtype", "float32", "--markdown", str(file)]) == 0
    out, errors = capsys.readouterr()
    assert out == file.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    names = ["dense", "anchor, exact scoring", "anchor, fast scoring", "reuse"]
    assert [row[:2] for row in rows[1:]] == [[length, name] for length in ("96", "128") for name in names]
    assert all(row[3] == "1.000 [1.000, 1.000]" for row in rows if row[1] == "dense")
    assert [row[6].endswith("x") for row in rows[1:5]] == [False, True, True, False]
    assert "float32, xla (the one for a CPU)" in out
    assert "96 tokens, relative errors against float32: dense" in errors


def test_the_gpus_kernels_pass_its_check_interpreted(capsys):
    flags = ["--kernel", "pallas_gpu", "--dtype", "bfloat16", "--seq_len", "96", "--n_runs", "1"]
    assert attention.main(SMALL + flags) == 0
    assert "pallas_gpu (as asked, and interpreted" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["dense_attention", "reuse_attention"])
def test_a_wrong_program_is_not_timed(broken, monkeypatch):
    right = getattr(kernels, broken)
    monkeypatch.setattr(kernels, broken, lambda *args, **where: right(*args, **where) * 1.01)
    with pytest.raises(SystemExit, match=r"at 96 tokens is 1.0e-02 away from float32: nothing timed"):
        attention.main([*SMALL, "--dtype", "float32"])


def test_an_anchor_that_misses_the_best_tiles_is_not_timed(monkeypatch):
    def choose_the_first(q, k, v, *, selection, **_):
        C = selection.slots(q.shape[1] // 16)
        own = jnp.arange(q.shape[1] // 16)
        tiles = jnp.where(jnp.arange(C) < own[:, None], jnp.arange(C), NO_TILE).at[:, -1].set(own)
        tiles = jnp.broadcast_to(jnp.sort(tiles), (1, k.shape[1], *tiles.shape))
        return kernels.reuse_attention(q, k, v, tiles, selection=selection), tiles

    monkeypatch.setattr(kernels, "anchor_attention", choose_the_first)
    with pytest.raises(SystemExit, match=r"anchor, exact scoring at 96 tokens misses .* of the best tiles"):
        attention.main([*SMALL, "--dtype", "float32", "--density", "0.5"])


@pytest.mark.parametrize(("tile_size", "query_tile"), [(4, 4), (4, 8), (8, 4)])
def test_pairs_are_those_of_a_mask(tile_size, query_tile):
    selection = Selection(tile_size=tile_size, query_tile=query_tile, density=0.4, top_k=99)
    case = attention.Case((2, 1, 8), 32, selection, jnp.float32, "xla")
    q, k, _ = case.inputs(0)
    tiles = np.asarray(kernels.choose_tiles(q, k, selection=selection))
    seen = np.zeros((32, 32), bool)
    for place in range(32 // query_tile):
        for tile in tiles[0, 0, place][tiles[0, 0, place] != NO_TILE]:
            seen[place * query_tile : (place + 1) * query_tile, tile * tile_size : (tile + 1) * tile_size] = True
    assert attention.count_pairs(case, tiles) == (32 * 33 / 2, (seen & np.tri(32, dtype=bool)).sum())


def test_the_papers_ratios_give_its_speedup():
    """An anchor of 1.93 and a reuse layer of 0.17 of dense, in 1 + 4 + 27 layers (arXiv 2512.16391)."""
    (speedup,) = attention.weighted_speedups({"dense": [2.0], "anchor": [3.86], "reuse": [0.34]}, "anchor")
    assert speedup == pytest.approx(32 / (1 + 4 * 1.93 + 27 * 0.17))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq_len", "100"], "argument --seq_len: expected whole tiles, got 100 tokens"),
        (["--density", "0"], "density must be above 0 and at most 1, got 0.0"),
        (["--query_tile", "24", "--seq_len", "96"], "query_tile must be a multiple or a divisor of tile_size, 16"),
    ],
)
def test_bad_input_gets_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        attention.main(SMALL + flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as error:
        attention.main([])
    assert error.value.code == 2
    assert "JAX sees no GPU here" in capsys.readouterr().err
