"""The TPU programs compile for chips that are not here, fit them, and skip work. Needs jax[tpu], for its compiler."""

import itertools
import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu_compile

TOPOLOGIES, SHAPES = ("v5e", "v6e"), ("llama3.2-1b", "llama3.1-8b")
LENGTHS, KINDS = (2048, 8192, 32768, 131072), ("dense", "anchor", "reuse", "block")


@pytest.fixture(scope="module")
def tpu():
    """bench/compile_tpu.py, imported here alone: it settles JAX's platforms."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the tests run in several processes
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    import compile_tpu

    return compile_tpu


ROWS = [*itertools.product(TOPOLOGIES, SHAPES, LENGTHS, KINDS)]


@pytest.mark.parametrize(("topology", "shape", "length", "kind"), ROWS)
def test_programs_compile_and_fit(tpu, topology, shape, length, kind):
    row = tpu.compile_row(topology, shape, length, kind)
    assert row.hbm_bytes <= tpu.TOPOLOGIES[topology][1]
    if length >= (32768 if kind == "block" else 8192):  # below, T x F is larger than T x T
        assert row.largest < length * length


def test_the_rows_are_those_of_the_table(tpu):
    assert (tuple(tpu.TOPOLOGIES), tuple(tpu.SHAPES), tpu.LENGTHS, tpu.KINDS) == (TOPOLOGIES, SHAPES, LENGTHS, KINDS)


@pytest.mark.parametrize("shape", SHAPES)
def test_reuse_shrinks_with_top_k(tpu, shape):
    """At 32k tokens Top-K 10 % are 25 of 256 tiles: 0.195 of the causal pairs, and 12 tiles half of that."""
    tenth, twentieth = (tpu.compile_row("v5e", shape, 32768, "reuse", share) for share in (0.1, 0.05))
    causal = tpu.causal_flops(tpu.SHAPES[shape], 32768) / 1e12
    assert tenth.tflops / causal == pytest.approx(2 * 25 / 256, rel=1e-3)
    assert twentieth.tflops / tenth.tflops == pytest.approx(12 / 25)
    assert twentieth.hbm_bytes < tenth.hbm_bytes


def test_the_counter_counts(tpu):
    """A product in a loop of three, and the same in a kernel's grid of four."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def looped(a, b):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ b, a)

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = a_ref[...] @ b_ref[...]

    grid = pl.pallas_call(kernel, grid=(4,), out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32))
    square = jnp.ones((8, 8))
    assert tpu.count_flops(jax.make_jaxpr(looped)(square, square).jaxpr) == 3 * 2 * 8**3
    assert tpu.count_flops(jax.make_jaxpr(grid)(square, square).jaxpr) == 4 * 2 * 8**3
    assert tpu.largest_array("%a = bf16[3,5]{1,0} add(f32[2,2,4] %b)") == 16


@pytest.mark.parametrize("chips", [1, 4])
def test_a_whole_model_fits(tpu, chips):
    assert tpu.compile_model("v5e", "llama3.2-1b", 8192, chips).hbm_bytes <= tpu.TOPOLOGIES["v5e"][1]
