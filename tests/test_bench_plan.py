"""bench.plan: bytes and FLOP by hand, meshes that are chosen, exchanges that are counted, and what it says.

The least row of each kind that the TPU's compiler makes is marked `tpu_compile`; it needs jax[tpu].
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.model_axis import ModelShards
from bench import compile_tpu, needs, topologies
from bench import plan as planning
from bench.collectives import Collective, count_collectives, total
from bench.needs import Job, Needs, Work
from errors import InputError
from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, Selection, freeze_schedule, select_tiles
from llama_model import LlamaModel
from network.cache import KVCache
from network.programs import decode_steps
from weights.config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=48,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
SIZES = {"data": 1, "context": 2, "model": 2}


def job(config=TINY, length=64, schedule=None, **options) -> Job:
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    selection = options.pop("selection", Selection(4, top_k=3))
    return Job(config, freeze_schedule(schedule, layers, heads), selection, length, **options)


def tiny_sparse(**options) -> Job:
    return job(schedule={0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1)}, **options)


# --- Arithmetic ---


def test_a_devices_weights_are_its_half_of_the_matrices_and_all_norms():
    attention = 20 * (24 + 12 + 12) + 24 * 20
    layer = 2 * (attention + 3 * 20 * 28)
    embeddings = 2 * 2 * 48 * 20
    norms = 4 * 20 * (2 * 3 + 1)
    assert needs.weights_bytes(TINY) == 3 * layer + embeddings + norms
    got = needs.weights_bytes(TINY, needs.mesh_of_sizes(SIZES))
    assert got == (3 * layer + embeddings) // 2 + norms


def test_a_prefills_cache_and_tiles_are_those_of_a_devices_tokens_and_heads():
    found = needs.estimate(tiny_sparse(), needs.mesh_of_sizes(SIZES))
    tokens, heads = 64 // 2, 2 // 2
    assert found.cache == 3 * 2 * 2 * tokens * heads * 6
    assert found.index == 2 * 4 * heads * (tokens // 4) * 3  # of one anchor, as chosen and in order
    assert found.total == found.weights + found.cache + found.temporaries + found.index


def test_a_steps_cache_is_split_over_sequences_and_heads():
    sizes = {"data": 2, "context": 1, "model": 2}
    found = needs.estimate(tiny_sparse(length=61, batch=4, is_step=True), needs.mesh_of_sizes(sizes))
    assert found.cache == 3 * 2 * 2 * (4 // 2) * (2 // 2) * 64 * 6  # 61 tokens in whole tiles
    assert found.index == 4 * 2 * 1 * 3


def test_shards_that_share_a_kv_head_hold_a_copy_each():
    one, four = (needs.mesh_of_sizes({"data": 1, "context": 1, "model": n}) for n in (1, 4))
    assert needs.prefill_cache_bytes(job(), four) == needs.prefill_cache_bytes(job(), one) // 2
    assert needs.step_cache_bytes(job(is_step=True), four) == needs.step_cache_bytes(job(is_step=True), one) // 2


def test_a_steps_flop_are_those_of_the_traced_program():
    """All products of a step are XLA's, so that they can be counted in its trace."""
    step = tiny_sparse(batch=5, is_step=True)
    model = LlamaModel(TINY, step.schedule, step.selection, dtype=jnp.bfloat16)
    params = ModelShards(TINY).shapes(None, jnp.bfloat16)
    cache = KVCache.shapes(TINY, 5, step.cache_size, jnp.bfloat16)
    ids, positions = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((5, 1), (5,)))
    traced = jax.make_jaxpr(partial(decode_steps, model))(params, ids, positions, cache)
    one = needs.mesh_of_sizes({"data": 1, "context": 1, "model": 1})
    assert needs.work(step, one).flops == compile_tpu.count_flops(traced.jaxpr)


def test_a_prefills_flop_are_those_of_the_textbook():
    """Two for each weight and token, and two products of visible keys a head; split over context and model."""
    matrices = 3 * (20 * (24 + 12 + 12) + 24 * 20 + 3 * 20 * 28) + 20 * 48
    causal = 3 * 2 * 2 * 24 * 64 * 65 / 2
    got = needs.work(job(), needs.mesh_of_sizes(SIZES)).flops
    assert got == (2 * 64 * matrices + causal) / 4


def test_a_step_reads_each_weight_once_and_the_keys_that_it_attends_to():
    step = tiny_sparse(batch=2, is_step=True)
    one = needs.mesh_of_sizes({"data": 1, "context": 1, "model": 1})
    keys = 2 * 2 * 2 * 6 * (2 * 64 + (64 + 12) + 2 * 12)  # dense, anchor, reuse
    assert needs.work(step, one).bytes == needs.weights_bytes(TINY) - 2 * 20 * 48 + keys


@pytest.mark.parametrize(
    "selection", [Selection(4, top_k=5), Selection(4, density=0.3), Selection(8, top_k=3, query_tile=4)]
)
def test_the_keys_that_a_row_keeps_are_those_of_the_selection(selection):
    tiles = 64 // selection.tile_size
    chosen = select_tiles(jnp.zeros((64 // selection.query_tile, tiles)), selection)
    row, kept = np.arange(64), np.repeat(np.asarray(chosen), selection.query_tile, axis=0)
    keys = kept[..., None] * selection.tile_size + np.arange(selection.tile_size)
    visible = (kept != NO_TILE)[..., None] & (keys <= row[:, None, None])
    assert needs.mean_kept_keys(selection, 64) == pytest.approx(visible.sum((1, 2)).mean())


# --- Meshes ---


def test_a_mesh_is_read_by_name_and_context_takes_what_is_left():
    assert planning.parse_mesh("data=2,context=2,model=4", 16) == {"data": 2, "context": 2, "model": 4}
    assert planning.parse_mesh("model=4", 8) == {"data": 1, "context": 2, "model": 4}


def test_a_step_has_one_of_context_and_only_as_many_of_data_as_divide_the_batch():
    topology = topologies.find("v5e-8")
    assert planning.mesh_sizes(job(batch=6, is_step=True), topology, "data=4,context=1,model=2")["data"] == 2
    assert planning.mesh_sizes(job(batch=6, is_step=True), topology, "context=4,model=2")["context"] == 1


def test_an_auto_step_splits_the_model_further_where_the_caches_need_it():
    """8B, 16 sequences of 131072 tokens on 32 chips of 16 GB: a whole sequence beside half of the weights is too much."""
    step = job(compile_tpu.SHAPES["llama3.1-8b"], 131072, selection=Selection(128), batch=16, is_step=True)
    topology = topologies.find("v5e-32")
    assert planning.mesh_sizes(step, topology, "auto") == {"data": 8, "context": 1, "model": 4}
    assert planning.mesh_sizes(dataclasses.replace(step, length=1024), topology, "auto")["model"] == 2


# --- Exchanges ---

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%started (p: bf16[2,8]) -> bf16[4,8] {
  %all-gather.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), frontend_attributes={chain_id="0"}
}

%finished (p: bf16[2,8]) -> bf16[4,8] {
  %all-gather.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p), frontend_attributes={chain_id="0"}
}

%never (p: bf16[2,8]) -> bf16[4,8] {
  %all-gather.3 = bf16[4,8]{1,0} all-gather(%p)
}

%body (carry: (s32[], f32[6])) -> (s32[], f32[6]) {
  %psum = f32[6]{0} all-reduce(%x), channel_id=1, to_apply=%add
}

%condition (carry: (s32[], f32[6])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[6], y: bf16[2,8]) -> f32[6] {
  %loop = (s32[], f32[6]) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %f1 = bf16[4,8] fusion(%y), kind=kCustom, calls=%started
  %f2 = bf16[4,8] fusion(%y), kind=kCustom, calls=%finished
  %both = (f32[3]{0:T(128)}, s32[7]{0}) all-reduce(%a, %b), to_apply=%add
  %s = (f32[2,3]{1,0}, f32[4,3]{1,0}) all-gather-start(%x), dimensions={0}
  %d = f32[4,3]{1,0} all-gather-done(%s)
  ROOT %out = f32[6]{0} all-to-all(%x), dimensions={0}
}
"""


def test_exchanges_are_counted_as_often_as_they_happen():
    """Five turns of a loop; a pair of results; one gather in two steps of the TPU's overlap; a start and its end."""
    assert count_collectives(PROGRAM) == {
        "all-reduce": Collective(5 + 1, 5 * 6 * 4 + (3 + 7) * 4),
        "all-gather": Collective(1 + 1, 4 * 8 * 2 + 4 * 3 * 4),
        "all-to-all": Collective(1, 6 * 4),
    }


def test_a_compiled_programs_exchanges_are_found():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + jax.lax.psum(x, "x"), x)

    program = jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=spec, out_specs=spec)).lower(jnp.ones(40)).compile()
    assert count_collectives(program.as_text()) == {"all-reduce": Collective(3, 3 * 5 * 4)}


def test_exchanges_are_said_in_words():
    assert total({"all-reduce": Collective(3, 2 * 10**9)}) == "3 all-reduce (2.00 GB)"
    assert total({}) == "none"


# --- What it says ---


def run(capsys, *flags: str) -> tuple[int, str, str]:
    try:
        code = planning.main(flags)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def row(parts: Needs, least: planning.Row | None = None) -> planning.Row:
    topology = topologies.find("v5e-8")
    return planning.Row(job(), topology, SIZES, "as asked", parts, Work(1e12, 2e9), least=least)


def test_the_verdict_is_what_is_left_or_lacks():
    assert row(Needs(9 * 10**9, 2 * 10**9, 10**9, 0)).verdict == "fits with 4.0 GB to spare"
    lacks = Needs(9 * 10**9, 10**10, 10**9, 5 * 10**8)
    assert row(lacks).verdict == "lacks 4.5 GB; no topology of v5e that is listed here takes it"
    larger = dataclasses.replace(row(lacks), topology=topologies.find("v5e-32"))
    assert row(lacks, larger).verdict == "lacks 4.5 GB; the least that fits is v5e-32"


def test_a_program_that_the_compiler_refuses_does_not_fit_and_its_words_are_kept(monkeypatch):
    """Its arithmetic says that it would; the least that fits is one that the compiler takes."""

    def refuse(job, topology, sizes):
        if topology.name == "v5e-8":
            raise planning.OutOfMemoryError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 17.00G of 15.75G. Largest:")
        return planning.Compiled(Needs(1, 1, 1, 1), {}, "xla", 1.0)

    monkeypatch.setattr(planning, "compile_job", refuse)
    found = planning.plan(job(), topologies.find("v5e-8"), "auto")
    assert found.note == "the compiler: RESOURCE_EXHAUSTED: Ran out of memory on HBM, 17.00G of 15.75G"
    assert found.verdict == "does not fit, says the compiler; the least that fits is v5e-16"


def test_where_the_tpus_compiler_is_not_installed_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    topologies._tpu_devices.cache_clear()
    with pytest.raises(InputError, match="^the TPU's compiler is not installed: pip install -r bench/requirements-tpu"):
        topologies.find("v5e-8").devices()


def test_gpus_are_planned_by_arithmetic_and_the_least_that_fits_is_named(capsys, tmp_path):
    """70B's 141 GB of weights may take 0.6 of four devices of 80 GB; its cache of 16 sequences takes more of them."""
    flags = ("--shape", "llama3.1-70b", "--topology", "h100-2", "--seq_len", "131072", "--markdown")
    code, out, _ = run(capsys, *flags, str(tmp_path / "table.md"))
    assert code == 0
    assert "arithmetic alone: no compiler for GPUs that are not here" in out
    assert "prefill, dense on h100-2: lacks" in out
    assert "the least that fits is h100-4" in out
    assert "estimates" in out
    assert "compiled" not in out
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 8
    assert {line.count("|") for line in table} == {len(planning.COLUMNS) + 1}


def test_the_devices_here_are_planned_for_and_compiled_for(capsys, folders):
    flags = (
        "--weights_dir",
        str(folders / "gqa_llama3_untied"),
        "--topology",
        "here",
        "--seq_len",
        "256",
        "--batch",
        "2",
    )
    code, out, _ = run(capsys, *flags, "--tile_size", "16", "--mesh", "data=2,context=2,model=2")
    assert code == 0
    assert out.count("fits with") == 4
    assert "prefill, sparse on here" in out
    assert "data=2, context=1, model=2 (as asked, for a step one of context); 4 devices stay idle" in out
    assert out.count("compiled (xla)") == 4
    assert "all-reduce" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--topology": "v5e-7"}, "topology 'v5e-7': expected one of v5e-1, v5e-4, v5e-8"),
        ({"--topology": "tpu"}, "topology 'tpu': expected one of v5e-N, v6e-N, v5p-N, v4-N, a100-N"),
        ({"--shape": "llama"}, "shape 'llama': expected one of llama3.2-1b, llama3.2-3b, llama3.1-8b, llama3.1-70b"),
        ({"--mesh": "model=3"}, "data=1 and model=3 do not divide the 8 devices"),
        ({"--mesh": "model=8,context=2"}, "expected a product of 8, the devices that there are, got 16"),
        ({"--mesh": "heads=8"}, "expected auto, or sizes of at least 1 of data, context, model"),
        ({"--mesh": "model=zwei"}, "expected auto, or sizes of at least 1 of data, context, model"),
        ({"--mesh": "model=64", "--topology": "h100-64"}, "model=64 must divide num_attention_heads, 32"),
        ({"--seq_len": "0"}, "seq_len must be at least 1, got 0"),
        ({"--batch": "0"}, "batch must be at least 1, got 0"),
        ({"--top_k": "3", "--density": "0.1"}, "top_k and density exclude each other"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, flags, message):
    given = {"--shape": "llama3.1-8b", "--topology": "h100-8", "--seq_len": "1024"} | flags
    code, _, err = run(capsys, *(word for flag in given.items() for word in flag))
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["v5e-1", "v6e-256", "v5p-8", "v4-512", "h200-4"])
def test_a_topology_has_as_many_devices_as_its_name_says(name):
    """The number of v5p and v4 is of cores, two a chip."""
    topology = topologies.find(name)
    cores = 2 if name.startswith(("v5p", "v4")) else 1
    assert topology.num_devices * cores == int(name.partition("-")[2])


# --- The TPU's compiler ---


@pytest.mark.tpu_compile
def test_the_compiler_says_when_there_is_no_room_in_hbm(monkeypatch):
    """Caches of 19 GB on one chip of 16, which arithmetic would have found."""
    compile_tpu.use_compiler_alone()
    config = dataclasses.replace(compile_tpu.SHAPES["llama3.2-1b"], num_hidden_layers=1)
    step = job(config, 2**20, selection=Selection(128, density=0.1), batch=9, is_step=True)
    with pytest.raises(planning.OutOfMemoryError, match="HBM|hbm"):
        planning.compile_job(step, topologies.find("v5e-1"), {"data": 1, "context": 1, "model": 1})


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v6e-256", "v5p-8", "v4-512"])
def test_the_compilers_topology_has_those_devices(name):
    compile_tpu.use_compiler_alone()
    topology = topologies.find(name)
    assert len(topology.devices()) == topology.num_devices


def compiled(shape: str, topology: str, length: int, is_sparse: bool, **options) -> planning.Row:
    compile_tpu.use_compiler_alone()
    config = compile_tpu.SHAPES[shape]
    schedule = needs.sparse_schedule(config) if is_sparse else None
    selection = Selection(128, density=0.1)
    return planning.check(
        job(config, length, schedule, selection=selection, **options), topologies.find(topology), "auto"
    )


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("shape", "topology", "length", "is_sparse", "options"),
    [
        ("llama3.2-1b", "v5e-1", 2048, True, {}),
        ("llama3.1-8b", "v5e-8", 8192, True, {}),
        ("llama3.1-8b", "v5e-8", 8192, True, {"batch": 16, "is_step": True}),
        ("llama3.1-70b", "v5e-256", 16384, False, {}),
    ],
)
def test_the_least_row_of_each_kind_compiles_and_fits(shape, topology, length, is_sparse, options):
    found = compiled(shape, topology, length, is_sparse, **options)
    assert found.compiled.kernel == "pallas_tpu"
    assert found.spare > 0
    guess = needs.estimate(found.job, needs.mesh_of_sizes(found.sizes))
    assert (found.needs.weights, found.needs.cache) == (guess.weights, guess.cache)
    assert found.needs.temporaries == pytest.approx(guess.temporaries, rel=0.5, abs=3e8)
