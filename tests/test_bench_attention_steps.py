"""The table of decoding steps: what is checked before it is timed, and what its columns are of."""

import jax.numpy as jnp
import pytest

from attention import decode
from bench import attention as shapes
from bench import attention_steps as bench

SMALL = [
    "--device",
    "cpu",
    "--shape",
    "small",
    "--depth",
    "96,128",
    "--batch",
    "2",
    "--tile_size",
    "16",
    "--n_runs",
    "2",
]
SMALL += ["--dtype", "float32"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "small", (4, 2, 64))
    monkeypatch.setitem(shapes.CEILING_SIZES, "cpu", (64, 2**10))
    monkeypatch.setattr(bench, "CACHE_BYTES", 4e4)  # two or three caches


def test_the_table_has_every_step_at_every_depth(capsys, tmp_path):
    file = tmp_path / "table.md"
    assert bench.main([*SMALL, "--density", "0.5", "--markdown", str(file)]) == 0
    out, errors = capsys.readouterr()
    assert out == file.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    names = ["dense", "anchor, exact scoring", "reuse"]
    assert [row[:3] for row in rows[1:]] == [[depth, "2", name] for depth in ("96", "128") for name in names]
    assert [row[3] for row in rows[1:4]] == ["100%", "50.0%", "50.0%"]  # three tiles of six
    assert all(row[5] == "1.000 [1.000, 1.000]" for row in rows if row[2] == "dense")
    assert ["x [" in row[7] for row in rows[1:4]] == [False, True, False]
    assert "float32, xla (the one for a CPU); tile 16" in out
    assert "96 tokens, relative errors against float64: dense" in errors


@pytest.mark.parametrize(
    ("broken", "error"), [("dense_step", "dense"), ("reuse_step", "reuse"), ("anchor_step", "anchor")]
)
def test_a_step_that_computes_something_else_is_not_timed(broken, error, monkeypatch):
    right = getattr(decode, broken)
    monkeypatch.setattr(decode, broken, lambda *args, **options: right(*args, **options) * 1.001)
    with pytest.raises(SystemExit, match=f"{error}.* at 96 tokens is .* away from float64: nothing timed"):
        bench.main(SMALL)


def test_an_anchor_that_misses_the_best_tiles_is_not_timed(monkeypatch):
    right = decode.choose_step

    def choose(q, k, positions, **options):
        tiles, scores = right(q, k, positions, **options)
        others = jnp.broadcast_to(
            jnp.arange(tiles.shape[-1] - 1)[None, None, None], (*tiles.shape[:3], tiles.shape[-1] - 1)
        )
        return jnp.concatenate([tiles[..., :1], others], -1), scores

    monkeypatch.setattr(decode, "choose_step", choose)
    with pytest.raises(SystemExit, match=r"anchor, exact scoring at 96 tokens misses .* of the best tiles"):
        bench.main([*SMALL, "--density", "0.5"])


def test_a_chain_hands_each_output_to_the_next_step_and_takes_the_caches_in_turn():
    step = lambda q, k, v, tiles: 2 * q + k + v  # noqa: E731
    caches = [(jnp.float32(1), jnp.float32(0)), (jnp.float32(0), jnp.float32(10))]
    assert bench.chained(step, 3)(jnp.float32(1), caches, None) == 2 * (2 * (2 * 1 + 1) + 10) + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "100"], "argument --depth: expected whole tiles, got 100 tokens"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--density", "0"], "density must be above 0 and at most 1, got 0.0"),
        (["--kernel", "pallas_gpu"], "the GPU kernels take bfloat16 or float16, got float32"),
    ],
)
def test_bad_input_gets_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(SMALL + flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
