"""The TPU programs compile for chips that are not here, fit them, and skip work. Needs jax[tpu], for its compiler.

The least row of each kind is marked `tpu_compile`, all others `full`.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from bench import compile_tpu as tpu

LEAST = [("v5e", "llama3.2-1b", 2048, kind) for kind in tpu.KINDS]
LEAST_STEPS = [("v5e", "llama3.1-8b", 8192, 1, kind) for kind in tpu.STEPS]
STEPS = [*itertools.product(tpu.TOPOLOGIES, tpu.SHAPES, tpu.DEPTHS, tpu.BATCHES, tpu.STEPS)]
ROWS = [*itertools.product(tpu.TOPOLOGIES, tpu.SHAPES, tpu.LENGTHS, tpu.KINDS)]


@pytest.fixture(scope="module", autouse=True)
def compiler():
    tpu.use_compiler_alone()


@pytest.mark.parametrize(
    ("topology", "shape", "length", "kind"),
    [pytest.param(*row, marks=pytest.mark.tpu_compile if row in LEAST else pytest.mark.full) for row in ROWS],
)
def test_programs_compile_and_fit(topology, shape, length, kind):
    row = tpu.compile_row(topology, shape, length, kind)
    assert row.hbm_bytes <= tpu.TOPOLOGIES[topology][1]
    if length >= (32768 if kind == "block" else 8192):  # below, T x F is larger than T x T
        assert row.largest < length * length


@pytest.mark.parametrize(
    ("topology", "shape", "depth", "batch", "kind"),
    [pytest.param(*row, marks=pytest.mark.tpu_compile if row in LEAST_STEPS else pytest.mark.full) for row in STEPS],
)
def test_steps_of_decoding_compile_and_hold_the_cache_once(topology, shape, depth, batch, kind):
    """Heads of 128 are paged, in place. Those of 64 XLA gathers, from a copy in another layout, for more sequences."""
    row = tpu.compile_step(topology, shape, depth, batch, kind)
    assert row.kind.endswith("pallas_tpu" if shape == "llama3.1-8b" and kind != "anchor" else "xla")
    assert row.hbm_bytes <= tpu.TOPOLOGIES[topology][1]
    cache = tpu.cache_bytes(tpu.SHAPES[shape], depth, batch)
    assert cache <= row.hbm_bytes < (1.15 if shape == "llama3.1-8b" else 2.1) * cache + 2**24


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("llama3.2-1b", marks=pytest.mark.tpu_compile),
        pytest.param("llama3.1-8b", marks=pytest.mark.full),
    ],
)
def test_reuse_shrinks_with_top_k(shape):
    """At 32k tokens Top-K 10 % are 25 of 256 tiles: 0.195 of the causal pairs, and 12 tiles half of that."""
    tenth, twentieth = (tpu.compile_row("v5e", shape, 32768, "reuse", share) for share in (0.1, 0.05))
    causal = tpu.causal_flops(tpu.SHAPES[shape], 32768) / 1e12
    assert tenth.tflops / causal == pytest.approx(2 * 25 / 256, rel=1e-3)
    assert twentieth.tflops / tenth.tflops == pytest.approx(12 / 25)
    assert twentieth.hbm_bytes < tenth.hbm_bytes


def test_the_counter_counts():
    """A product in a loop of three, and the same in a kernel's grid of four."""

    def looped(a, b):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ b, a)

    def kernel(a_ref, b_ref, out_ref):
        out_ref[...] = a_ref[...] @ b_ref[...]

    grid = pl.pallas_call(kernel, grid=(4,), out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32))
    square = jnp.ones((8, 8))
    assert tpu.count_flops(jax.make_jaxpr(looped)(square, square).jaxpr) == 3 * 2 * 8**3
    assert tpu.count_flops(jax.make_jaxpr(grid)(square, square).jaxpr) == 4 * 2 * 8**3
    assert tpu.largest_array("%a = bf16[3,5]{1,0} add(f32[2,2,4] %b)") == 16


@pytest.mark.full
@pytest.mark.parametrize("chips", [1, 4])
def test_a_whole_model_fits(chips):
    assert tpu.compile_model("v5e", "llama3.2-1b", 8192, chips).hbm_bytes <= tpu.TOPOLOGIES["v5e"][1]
