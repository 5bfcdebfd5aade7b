"""bench/attention.py counts what it says, refuses to time a wrong program, and prints a whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from bench import attention as bench
from kascade_core import NO_TILE, Selection

SMALL = ["--device", "cpu", "--shape", "small", "--seq_len", "96,128", "--tile_size", "16", "--n_runs", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", (2, 1, 64))
    monkeypatch.setitem(bench.CEILING_SIZES, "cpu", (64, 2**10))


def test_the_table_has_every_program_at_every_length(capsys, tmp_path):
    file = tmp_path / "table.md"
    assert bench.main([*SMALL, "--dtype", "float32", "--markdown", str(file)]) == 0
    out, errors = capsys.readouterr()
    assert out == file.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    names = ["dense", "anchor, exact scoring", "anchor, fast scoring", "reuse"]
    assert [row[:2] for row in rows[1:]] == [[length, name] for length in ("96", "128") for name in names]
    assert all(row[4] == "1.000 [1.000, 1.000]" for row in rows if row[1] == "dense")
    assert ["x [" in row[7] for row in rows[1:5]] == [False, True, True, False]
    assert rows[1][2] == "100%"
    assert rows[4][2] == f"{(96 * 17 / 2) / (96 * 97 / 2):.1%}"  # a tenth of six tiles: their own alone
    assert "float32, xla (the one for a CPU); dense is xla's; tile 16" in out
    assert "96 tokens, relative errors against float32: dense" in errors


def test_the_kernel_that_it_names_is_the_one_that_it_checks(monkeypatch, capsys):
    """Interpreted; dense is always the device's own."""
    used = []

    def record(name, function):
        def call(*args, kernel, **options):
            used.append((name, kernel))
            return function(*args, kernel=kernel, **options)

        return call

    for name in ("dense", "choose", "reuse"):
        monkeypatch.setattr(attention, name, record(name, getattr(attention, name)))
    flags = ["--kernel", "pallas_gpu", "--dtype", "bfloat16", "--seq_len", "96", "--n_runs", "1"]
    assert bench.main(SMALL + flags) == 0
    assert {*used} == {("dense", "xla"), ("choose", "pallas_gpu"), ("reuse", "pallas_gpu")}
    assert "pallas_gpu (as asked; interpreted" in capsys.readouterr().out


@pytest.mark.parametrize(("broken", "factor", "error"), [("dense", np.nan, "nan"), ("reuse", 1.01, "1.0e-02")])
def test_a_wrong_program_is_not_timed(broken, factor, error, monkeypatch):
    """Wrong at its end."""
    right = getattr(attention, broken)
    monkeypatch.setattr(attention, broken, lambda *args, **options: right(*args, **options).at[:, 80:].multiply(factor))
    with pytest.raises(SystemExit, match=f"at 96 tokens is {error} away from float32: nothing timed"):
        bench.main([*SMALL, "--dtype", "float32"])


def first_tiles(own, count):
    """For each query tile the first tiles of the text and its own."""
    others = jnp.where(jnp.arange(count - 1)[None] < own[:, None], jnp.arange(count - 1)[None], NO_TILE)
    return jnp.sort(jnp.concatenate([others, own[:, None]], 1))


@pytest.mark.parametrize("choose", [lambda own: first_tiles(own, 3), lambda own: own[:, None]], ids=["others", "own"])
def test_an_anchor_that_misses_the_best_tiles_is_not_timed(choose, monkeypatch):
    """Others than the best, or fewer."""

    def anchor(q, k, v, *, selection, **_):
        tiles = choose(jnp.arange(q.shape[1] // 16))
        tiles = jnp.broadcast_to(tiles, (1, k.shape[1], *tiles.shape))
        return attention.reuse(q, k, v, tiles, selection=selection), tiles

    monkeypatch.setattr(attention, "anchor", anchor)
    with pytest.raises(SystemExit, match=r"anchor, exact scoring at 96 tokens misses .* of the best tiles"):
        bench.main([*SMALL, "--dtype", "float32", "--density", "0.5"])


@pytest.mark.parametrize(("tile_size", "query_tile"), [(4, 4), (4, 8), (8, 4)])
def test_pairs_are_those_of_a_mask(tile_size, query_tile):
    selection = Selection(tile_size=tile_size, query_tile=query_tile, density=0.4)
    case = bench.AttentionCase((2, 1, 8), 32, selection, jnp.float32, "xla", "xla")
    q, k, _ = case.inputs(0)
    tiles = np.asarray(attention.choose(q, k, selection=selection))
    seen = np.zeros((32, 32), bool)
    for place in range(32 // query_tile):
        for tile in tiles[0, 0, place][tiles[0, 0, place] != NO_TILE]:
            seen[place * query_tile : (place + 1) * query_tile, tile * tile_size : (tile + 1) * tile_size] = True
    assert bench.count_pairs(case, tiles) == (32 * 33 / 2, (seen & np.tri(32, dtype=bool)).sum())


def test_the_weighted_speedup_counts_every_layer():
    """One dense layer of 2 ms, four anchors of 1 and 27 reuse layers of 2/27: 8 ms, where 32 dense ones take 64."""
    (speedup,) = bench.weighted_speedups({"dense": [2.0], "anchor": [1.0], "reuse": [2 / 27]}, "anchor")
    assert speedup == pytest.approx(8)


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
        bench.main(SMALL + flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as error:
        bench.main([])
    assert error.value.code == 2
    assert "JAX sees no GPU here" in capsys.readouterr().err
