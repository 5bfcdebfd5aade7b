"""The TPU programs compile for chips that are not here, fit them, and skip work. Needs jax[tpu], for its compiler.

The least row of each kind is marked `tpu_compile`, all others `full`.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from attention import tpu_small
from attention.sharding import TPU_OPTIONS, compiler_options
from bench import compile_tpu as tpu
from kascade_core import EXACT, FAST, Selection

LEAST = [("v5e", "llama3.2-1b", 2048, kind) for kind in tpu.KINDS]
GUIDE_ROWS = [*itertools.product(tpu.TOPOLOGIES, tpu.GUIDE_LENGTHS, ("anchor", "reuse"))]
LEAST_GUIDE = [*itertools.product(tpu.TOPOLOGIES, (8192, 32768), ("anchor",)), ("v6e", 131072, "reuse")]
GUIDE_MODELS = [*itertools.product(tpu.TOPOLOGIES, tpu.GUIDE_MODELS)]
LEAST_MODELS = [("v5e", 512), ("v6e", 2048)]
LEAST_STEPS = [("v5e", "llama3.1-8b", 8192, 1, kind) for kind in tpu.STEPS]
STEPS = [*itertools.product(tpu.TOPOLOGIES, tpu.TABLE, tpu.DEPTHS, tpu.BATCHES, tpu.STEPS)]
ROWS = [*itertools.product(tpu.TOPOLOGIES, tpu.TABLE, tpu.LENGTHS, tpu.KINDS)]


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
    ("topology", "length", "kind"),
    [
        pytest.param(*row, marks=pytest.mark.tpu_compile if row in LEAST_GUIDE else pytest.mark.full)
        for row in GUIDE_ROWS
    ],
)
def test_the_default_flags_small_tiles_compile_and_stay_in_vector_memory(topology, length, kind):
    """A head's keys and values are the kernel's own at the longest length; XLA itself puts those of the others there."""
    row = tpu.compile_row(topology, "llama3.2-1b", length, kind, tpu.GUIDE)
    assert row.hbm_bytes <= tpu.TOPOLOGIES[topology][1]
    assert set(row.vmem_bytes) == {"kascade_small_reuse"} | ({"kascade_small_score"} if kind == "anchor" else set())
    head = length * 128 * 2
    assert 0 < max(row.vmem_bytes.values()) < head + tpu_small.MORE_VMEM
    assert (row.vmem_bytes["kascade_small_reuse"] > head) == (length == 131072)
    if length >= 32768:
        assert row.largest < length * length


@pytest.mark.parametrize(
    ("topology", "length"),
    [
        pytest.param(*row, marks=pytest.mark.tpu_compile if row in LEAST_MODELS else pytest.mark.full)
        for row in GUIDE_MODELS
    ],
)
def test_a_whole_model_with_the_default_flags_compiles_and_fits(topology, length):
    row = tpu.compile_model(topology, "llama3.2-1b", length, selection=tpu.GUIDE)
    assert row.hbm_bytes <= tpu.TOPOLOGIES[topology][1]
    assert {"kascade_small_reuse", "kascade_small_score"} <= set(row.vmem_bytes)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "shape", "tile_size", "query_tile", "scoring"),
    [
        ("v5e", "llama3.2-1b", 8, 64, FAST),
        ("v6e", "llama3.1-8b", 16, 128, EXACT),
        ("v5e", "llama3.1-8b", 64, 8, FAST),
        ("v6e", "llama3.2-1b", 32, 16, EXACT),
    ],
)
def test_every_small_tile_compiles(topology, shape, tile_size, query_tile, scoring):
    """With tiles of 16 the v6e's compiler ended on heads of 128 whose keys and values were read as one."""
    selection = Selection(tile_size=tile_size, query_tile=query_tile, top_k=24, anchor_scoring=scoring)
    assert tpu.compile_row(topology, shape, 1000, "anchor", selection).vmem_bytes


@pytest.mark.tpu_compile
def test_tiles_of_a_head_beyond_vector_memory_compile():
    row = tpu.compile_row("v6e", "llama3.1-8b", 131072, "reuse", tpu.GUIDE)
    assert 0 < row.vmem_bytes["kascade_small_reuse"] < tpu_small.MORE_VMEM


@pytest.mark.tpu_compile
def test_the_compiler_has_the_options_that_it_is_told():
    chip = tpu.mesh_of("v5e").devices.flat[0]
    assert compiler_options(chip) == TPU_OPTIONS


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
    tenth, twentieth = (
        tpu.compile_row("v5e", shape, 32768, "reuse", tpu.select(32768, share)) for share in (0.1, 0.05)
    )
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
