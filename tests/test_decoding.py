"""Decoding: steps against whole forwards, the cache in place, greedy ids, what a run reports, and bad input."""

import dataclasses
import functools
import json
import math
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, RUN_SIZES, repeating_text

import benchmark_kascade_final as benchmark
from attention.sharding import make_mesh
from errors import InputError
from kascade_core import ANCHOR, DENSE, NO_TILE, REUSE, LayerPlan, Selection
from llama_model import LlamaConfig, LlamaModel, load_weights
from measure import decoding
from measure.decoding import Arms
from measure.machine import configure_device
from measure.quality import run_windows
from measure.settings import Settings
from measure.texts import Windows, load_windows
from network.cache import KVCache
from network.programs import Forward
from report import console
from report.results import DepthRow, Generated
from weights.folder import read_manifest

NAME = "gqa_llama3_untied"  # three layers, six heads, two KV heads of width 10, 50 words
CONFIG = LlamaConfig.from_hf(HF_CONFIGS[NAME])
M, T, DEPTH = 4, 30, 20
SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (1, 0))}
BUDGETS = [LayerPlan(), LayerPlan(ANCHOR, budgets=(3, 2)), LayerPlan(REUSE, 1, (1, 1), budgets=(1, 4))]
ROWS = Selection(M, 3, query_tile=1)  # a forward that chooses as steps do
TILES = Selection(M, 3)


@pytest.fixture(scope="module")
def params(folders):
    return load_weights(folders / NAME, read_manifest(folders / NAME))


@pytest.fixture(scope="module")
def ids():
    """Three windows of different contents."""
    return jnp.asarray(np.random.default_rng(3).integers(0, 50, (3, T), dtype=np.int32))


def cache_of(model, batch, tokens):
    return KVCache.empty(model.config, batch, decoding.cache_size(model.selection, tokens), jnp.float32)


def decode(model, params, ids, positions=None, cache=None):
    """Steps over the tokens ids, from an empty cache and position 0 unless others are given."""
    batch, steps = ids.shape
    cache = cache_of(model, batch, steps) if cache is None else cache
    positions = jnp.zeros(batch, jnp.int32) if positions is None else positions
    return model.compile_decode(params, cache, steps)(params, ids, positions, cache)


@functools.cache
def forward_of(model):
    return jax.jit(model.apply)


def greedy(model, params, ids, depth):
    """The ids from `depth` on replaced by a loop of whole forwards."""
    expected = np.array(ids)
    for place in range(depth, ids.shape[1]):
        expected[:, place] = np.asarray(forward_of(model)(params, jnp.asarray(expected)))[:, place - 1].argmax(-1)
    return expected


def logits(model, params, stream):
    return np.asarray(model.apply(params, stream, method="_logits"))


def relative(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


# --- Steps and whole forwards ---


def test_dense_decoding_predicts_as_the_forward_at_every_position_of_three_windows(params, ids):
    model = LlamaModel(CONFIG, None, TILES)
    decoded = decode(model, params, ids)
    expected = np.asarray(forward_of(model)(params, ids))
    for b in range(3):
        assert relative(logits(model, params, decoded.stream)[b], expected[b]) <= 1e-5
    np.testing.assert_array_equal(decoded.best, expected.argmax(-1))
    one = model.compile_decode(params, cache_of(model, 1, T), T)
    for b in range(3):
        alone = one(params, ids[b : b + 1], jnp.zeros(1, jnp.int32), cache_of(model, 1, T))
        assert relative(np.asarray(alone.stream[0]), np.asarray(decoded.stream[b])) <= 2e-6


@pytest.mark.parametrize(
    ("schedule", "selection"),
    [
        pytest.param(SPARSE, ROWS, marks=pytest.mark.full),
        (BUDGETS, ROWS),
        ({0: (ANCHOR, None), 1: (REUSE, 0), 2: (ANCHOR, None)}, Selection(M, density=0.4, query_tile=1, local_tiles=1)),
        pytest.param(SPARSE, Selection(M, 5, query_tile=1, sink_tiles=2, local_tiles=1), marks=pytest.mark.full),
        pytest.param(BUDGETS, Selection(M, 2, query_tile=1, sink_tiles=0), marks=pytest.mark.full),
    ],
)
def test_sparse_decoding_chooses_and_predicts_as_a_forward_with_a_choice_per_row(params, ids, schedule, selection):
    """From the first token on, so at every place in a tile; the selection that is handed to it is prefill's."""
    rows = LlamaModel(CONFIG, schedule, selection)
    model = rows.clone(selection=dataclasses.replace(selection, query_tile=M, anchor_scoring="fast"))
    decoded = decode(model, params, ids)
    forward = rows.compile(params, ids)(params, ids)
    assert set(decoded.tiles) == set(forward.tiles)
    for layer, tiles in forward.tiles.items():
        steps = np.asarray(decoded.tiles[layer])[..., 0, :].swapaxes(1, 2)
        np.testing.assert_array_equal(steps[..., : tiles.shape[-1]], tiles)
        assert (steps[..., tiles.shape[-1] :] == NO_TILE).all()  # a density's share of the whole cache is more
    got, expected = (logits(model, params, stream) for stream in (decoded.stream, forward.stream))
    assert relative(got, expected) <= 1e-5
    assert relative(got, np.asarray(forward_of(LlamaModel(CONFIG))(params, ids))) > 1e-3


def test_all_tiles_kept_is_dense(params, ids):
    sparse, dense = (decode(LlamaModel(CONFIG, plans, Selection(M, 99)), params, ids) for plans in (SPARSE, None))
    assert sparse.tiles[1].shape[-1] == decoding.cache_size(Selection(M), T) // M
    assert relative(np.asarray(sparse.stream), np.asarray(dense.stream)) <= 1e-5


@pytest.mark.parametrize("schedule", [pytest.param(None, marks=pytest.mark.full), SPARSE])
def test_ragged_sequences_go_on_after_a_prefill_on_several_devices(params, ids, schedule):
    """Depths at a tile's edge. What the prefill left behind each depth is of other tokens, and is written over."""
    depths, steps = np.array([M * 4 - 1, M * 4, M * 4 + 1]), 6
    model, mesh = LlamaModel(CONFIG, schedule, ROWS), make_mesh(jax.devices()[:2])
    others = jnp.where(np.arange(T)[None] < depths[:, None], ids, (ids + 7) % 50)
    forward = model.compile(params, others, mesh, with_cache=True)
    cache = forward.fill_cache(forward(params, others), 32, mesh, jnp.float32)
    assert {x.shape for x in jax.tree.leaves(cache)} == {(3 * 2, 32, 10)}
    next_ids = jnp.stack([row[depth : depth + steps] for row, depth in zip(ids, depths)])
    decoded = decode(model, params, next_ids, jnp.asarray(depths, jnp.int32), cache)
    expected = model.compile(params, ids)(params, ids).stream
    for b, depth in enumerate(depths):
        assert relative(np.asarray(decoded.stream[b]), np.asarray(expected[b, depth : depth + steps])) <= 1e-5


@pytest.mark.full  # in the quick tier the continuations of both arms are
@pytest.mark.parametrize("schedule", [None, SPARSE])
def test_greedy_ids_are_those_of_a_loop_of_whole_forwards(params, ids, schedule):
    model = LlamaModel(CONFIG, schedule, ROWS)
    expected = greedy(model, params, ids, DEPTH)
    given = jnp.where(np.arange(T - 1)[None] < DEPTH, ids[:, :-1], -1)  # -1: the likeliest after the step before
    decoded = decode(model, params, given)
    np.testing.assert_array_equal(decoded.best[:, DEPTH - 1 :], expected[:, DEPTH:])
    assert len(set(expected[:, DEPTH:].ravel().tolist())) > 3


@pytest.mark.parametrize("schedule", [None, SPARSE])
def test_a_step_writes_the_cache_in_place(params, schedule):
    """No array as large as a layer's keys is copied, whatever its shape, and none is kept beside the cache."""
    model = LlamaModel(CONFIG, schedule, TILES)
    cache = cache_of(model, 2, 2048)
    compiled = model.compile_decode(params, cache, 3).program
    memory, size = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(cache))
    assert size == KVCache.bytes_needed(CONFIG, 2, 2048, jnp.float32)
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 2
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", compiled.as_text())
    keys = math.prod(cache.layers[0][0].shape)
    assert all(math.prod(map(int, dims.split(","))) < keys for dims in copies)


@pytest.mark.parametrize(
    ("dtype", "can_write", "expected"),
    [("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float32", False, "float32")],
)
def test_a_cache_is_bfloat16_where_it_is_written_in_place(dtype, can_write, expected, monkeypatch):
    monkeypatch.setattr(decoding, "can_write_bfloat16", lambda device: can_write)
    model = LlamaModel(CONFIG, dtype=jnp.dtype(dtype))
    assert decoding.cache_dtype(model, jax.devices()[0]) == jnp.dtype(expected)


@pytest.mark.parametrize("schedule", [None, SPARSE])
def test_no_step_converts_a_bfloat16_cache(params, schedule):
    """XLA's CPU compiler would for each slice that it writes: to float32 and back, all of it."""
    model = LlamaModel(CONFIG, schedule, TILES, dtype=jnp.bfloat16)
    device = make_mesh(jax.devices()[:1]).devices.flat[0]
    cache = KVCache.empty(CONFIG, 3, 2048, decoding.cache_dtype(model, device))
    text = model.compile_decode(params, cache, 3).program.as_text()
    converted = re.findall(r"= \w+\[([\d,]+)\]\S* convert\(", text)
    assert all(math.prod(map(int, dims.split(","))) < math.prod(cache.layers[0][0].shape) for dims in converted)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_makes_no_copy_of_a_matrix(params, batch, dtype):
    """XLA's CPU compiler transposes the matrix of a product that is not written as it likes it."""
    params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
    model = LlamaModel(CONFIG, None, TILES, dtype=dtype)
    program = model.compile_decode(params, cache_of(model, batch, 64), 3).program.as_text()
    made = set(re.findall(r"= \w+\[(\d+,\d+)\]\S* (?:copy|transpose|fusion)\(", program))
    shapes = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
    assert not made & {f"{a},{b}" for rows, columns in shapes for a, b in ((rows, columns), (columns, rows))}


def test_bfloat16_decoding_is_near_the_forward(params, ids):
    model = LlamaModel(CONFIG, None, TILES, dtype=jnp.bfloat16)
    decoded, expected = decode(model, params, ids[:1, :9]), np.asarray(forward_of(model)(params, ids[:1, :9]))
    assert relative(logits(model, params, decoded.stream), expected) <= 4 * float(jnp.finfo(jnp.bfloat16).eps)


# --- What is measured ---


@pytest.fixture(scope="module")
def arms(params, ids):
    """Both choose per row, so that a whole forward says what each must predict."""
    mesh = make_mesh(jax.devices()[:2])
    models = {"dense": LlamaModel(CONFIG, None, ROWS), "sparse": LlamaModel(CONFIG, SPARSE, ROWS)}
    prefill = {name: model.compile(params, ids[:1, :DEPTH], mesh, with_cache=True) for name, model in models.items()}
    return Arms(*models.values(), prefill, params, mesh)


@pytest.fixture(scope="module")
def windows(ids):
    return Windows(
        (), tuple(ids[b : b + 1, :DEPTH] for b in range(3)), "", 0, tuple(ids[b : b + 1, DEPTH:] for b in range(3))
    )


@pytest.fixture(scope="module")
def found(arms, windows):
    """{(batch, prefill): what was measured}."""
    made = {}
    for batch, prefill in ((1, "sparse"), (2, "dense")):
        settings = Settings(ROWS, seq_len=DEPTH, n_runs=4, batch=batch, prefill=prefill)
        made[batch, prefill] = decoding.decode_windows(arms, windows, settings)
    return made


def test_both_arms_lose_what_whole_forwards_lose(arms, params, ids, found):
    compared = found[1, "sparse"].compared
    assert [len(window.kl) for window in compared] == [T - DEPTH - 1] * 3
    dense, sparse = (model.compile(params, ids[:1]) for model in (arms.dense, arms.sparse))
    for b, window in enumerate(compared):
        for forward, nll in ((dense, window.dense_nll), (sparse, window.sparse_nll)):
            expected = forward(params, ids[b : b + 1]).nll[0, DEPTH:]
            np.testing.assert_allclose(nll, expected, rtol=2e-5, atol=2e-5)


def test_the_prefill_says_what_fills_the_sparse_arms_cache_and_the_other_is_reported_too(found):
    one, two = found[1, "sparse"], found[2, "dense"]
    assert (one.prefill, two.prefill, len(two.compared)) == ("sparse", "dense", 2), "a smaller last group is left out"
    for b in range(2):
        np.testing.assert_allclose(two.compared_other_prefill[b].sparse_nll, one.compared[b].sparse_nll, atol=2e-5)
        np.testing.assert_allclose(two.compared[b].sparse_nll, one.compared_other_prefill[b].sparse_nll, atol=2e-5)
        np.testing.assert_allclose(two.compared[b].dense_nll, one.compared[b].dense_nll, atol=2e-5)
        assert np.abs(two.compared[b].sparse_nll - one.compared[b].sparse_nll).max() > 1e-3


def test_every_arm_has_a_sample_of_each_group_and_n_runs_in_all(found):
    samples = {key: (len(result.dense_ms), len(result.sparse_ms)) for key, result in found.items()}
    assert samples == {(1, "sparse"): (4, 4), (2, "dense"): (4, 4)}  # three groups and one more pass; one group, four


def same_losses(got, expected):
    return all(np.array_equal(*pair) for a, b in zip(got, expected, strict=True) for pair in zip(a, b, strict=True))


def test_kept_prefills_are_decoded_with_and_not_computed_again(arms, windows, found):
    outputs = {
        name: run_windows(forward, arms.params, windows.test, keep_keys=True) for name, forward in arms.prefill.items()
    }
    broken = {name: dataclasses.replace(forward, begin=None) for name, forward in arms.prefill.items()}
    settings = Settings(ROWS, seq_len=DEPTH, n_runs=1, batch=1)
    kept = decoding.decode_windows(dataclasses.replace(arms, prefill=broken, outputs=outputs), windows, settings)
    assert same_losses(kept.compared, found[1, "sparse"].compared)
    assert same_losses(kept.compared_other_prefill, found[1, "sparse"].compared_other_prefill)
    assert all(output.keys_values is None for of_arm in outputs.values() for output in of_arm), (
        "they are given up at last"
    )


def test_a_single_group_fills_each_cache_once_and_times_it(arms, windows, monkeypatch):
    filled, fill_cache = [], Forward.fill_cache
    monkeypatch.setattr(Forward, "fill_cache", lambda *args: filled.append(1) or fill_cache(*args))
    one = dataclasses.replace(windows, test=windows.test[:1], following=windows.following[:1])
    result = decoding.decode_windows(arms, one, Settings(ROWS, seq_len=DEPTH, n_runs=1, batch=1))
    assert (len(filled), len(result.compared)) == (2, 1)


def test_how_many_windows_are_decoded_together_changes_no_number(arms, windows, found, monkeypatch):
    """Two at once of three: the second group is filled up with the first window, which is counted once."""
    monkeypatch.setattr(decoding, "WINDOWS_AT_ONCE", 2)
    settings = Settings(ROWS, seq_len=DEPTH, n_runs=1, batch=1)
    again = decoding.decode_windows(arms, windows, settings)
    for got, expected in zip(again.compared, found[1, "sparse"].compared, strict=True):
        np.testing.assert_allclose(got.sparse_nll, expected.sparse_nll, atol=2e-6)


@pytest.mark.parametrize(("allowed", "expected"), [(2**30, 6), (4 * 11520, 4), (1, 1)])
def test_as_many_windows_are_decoded_together_as_are_small_enough_in_groups_of_one_size(
    arms, allowed, expected, monkeypatch
):
    """Eleven windows; a cache of one takes three layers of 12 tokens, 2 KV heads of width 10, keys and values, twice."""
    monkeypatch.setattr(decoding, "AT_ONCE_BYTES", allowed)
    assert 2 * KVCache.bytes_needed(CONFIG, 1, 12, jnp.float32) == 11520
    assert decoding.windows_at_once(arms, 11, 12) == expected


def test_prefills_are_kept_where_they_are_small_enough(arms, windows, monkeypatch):
    needed = 2 * KVCache.bytes_needed(CONFIG, len(windows.test), DEPTH, jnp.float32)
    monkeypatch.setattr(decoding, "AT_ONCE_BYTES", needed)
    assert decoding.keeps_prefills(arms.dense, windows.test)
    monkeypatch.setattr(decoding, "AT_ONCE_BYTES", needed - 1)
    assert not decoding.keeps_prefills(arms.dense, windows.test)


def test_bytes_and_densities_are_counted(arms, found):
    """A step reads all weights but the embeddings, K and V dense, K and the chosen V as anchor, the chosen as reuse."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(arms.params)) - 50 * 24 * 4
    seen = [position // M + 1 for position in range(DEPTH, T - 1)]
    density = 3 / statistics.mean(seen)
    for batch, result in ((1, found[1, "sparse"]), (2, found[2, "dense"])):
        keys = batch * 2 * DEPTH * 10 * 4
        assert result.layer_densities == pytest.approx([1, density, density])
        assert result.dense_bytes == weights + 3 * 2 * keys
        assert result.sparse_bytes == pytest.approx(weights + (2 + 1 + density + 2 * density) * keys, abs=1)


def test_a_decoding_is_the_issues_json_and_a_section_that_says_what_it_is(found):
    result = found[2, "dense"]
    values = json.loads(json.dumps(result.to_json()))
    names = {"depth", "tokens", "batch", "prefill", "dense", "sparse", "delta_log_ppl", "delta_log_ppl_se", "kl"}
    assert names | {"same_top1", "speedup"} <= set(values)
    assert {"perplexity", "ms_per_token", "bytes_per_step"} <= set(values["dense"]) & set(values["sparse"])
    assert (values["depth"], values["tokens"], values["batch"], values["prefill"]) == (DEPTH, T - DEPTH - 1, 2, "dense")
    differences = np.concatenate([window.sparse_nll - window.dense_nll for window in result.compared])
    assert values["delta_log_ppl"] == pytest.approx(differences.mean())
    assert values["delta_log_ppl_se"] == pytest.approx(differences.std(ddof=1) / math.sqrt(differences.size))
    speedup = statistics.median(values["dense"]["ms_per_token"]) / statistics.median(values["sparse"]["ms_per_token"])
    assert values["speedup"] == pytest.approx(speedup)
    assert result.bandwidth_share("dense") == pytest.approx(
        result.dense_bytes / (statistics.median(result.dense_ms) / 1e3) / result.bytes_per_second
    )
    text = console.decoding(result, "float32")
    assert "9 tokens after 20, batch 2, float32" in text
    assert "no row helps to choose" in text
    assert f"{result.tokens_per_second('sparse'):.1f} tokens/s" in text
    assert result.tokens_per_second("dense") == pytest.approx(2e3 / statistics.median(result.dense_ms))


def test_depths_are_timed_dense_keeping_all_and_sparse(arms):
    row = decoding.measure_depth(arms, 60, 2, 2)
    assert (row.depth, row.batch, row.beyond_context, row.skipped) == (60, 2, False, None)
    assert [len(times) for times in (row.dense_ms, row.keep_all_ms, row.sparse_ms)] == [2, 2, 2]
    seen = [position // M + 1 for position in range(60, 60 + decoding.DEPTH_STEPS)]
    assert row.density == pytest.approx((1 + 2 * 3 / statistics.mean(seen)) / 3)
    keep_all = decoding.keeping_all(arms.sparse.clone(schedule=BUDGETS), 72)
    assert keep_all.selection.slots(18) == 18
    assert [(plan.mode, plan.head_map, plan.budgets) for plan in keep_all.schedule] == [
        (DENSE, None, None), (ANCHOR, None, None), (REUSE, (1, 1), None)
    ]  # fmt: skip


@pytest.mark.full  # in the quick tier a run has such a depth
def test_a_depth_beyond_the_context_says_so(arms, monkeypatch):
    monkeypatch.setattr(decoding, "DEPTH_STEPS", 1)
    beyond = decoding.measure_depth(arms, 65, 1, 1)
    assert "beyond the model's context: only time is meant" in console.depth_row(beyond)


def test_a_depth_beyond_memory_is_skipped(arms, monkeypatch):
    monkeypatch.setattr(decoding, "DEPTH_STEPS", 1)
    monkeypatch.setattr(decoding, "free_memory", lambda _: 10**9)
    row = decoding.measure_depth(arms, 10**7, 1, 1)
    assert console.depth_row(row) == "10000000 skipped: it needs a cache of 4.8 GB, and 1.0 GB are free"


def test_the_break_even_depth_is_printed():
    rows = [DepthRow(depth, 1, [2.0], [3.0], [sparse], 0.1) for depth, sparse in ((8, 4.0), (16, 1.0))]
    assert console.sweep_break_even(rows) == "   Break-even: between 8 and 16 tokens"


def test_continuations_are_each_arms_greedy_ids(arms, params, ids):
    found = decoding.generate(arms, ids[:1, :DEPTH], T - DEPTH, "sparse")
    for model, got in ((arms.dense, found.dense), (arms.sparse, found.sparse)):
        assert list(got) == greedy(model, params, ids, DEPTH)[0, DEPTH:].tolist()
    part = next((i for i, pair in enumerate(zip(found.dense, found.sparse), 1) if pair[0] != pair[1]), None)
    assert found.part_at == part


@pytest.mark.parametrize(("sparse", "part_at", "said"), [((4, 5), None, "the same"), ((4, 9), 2, "part at token 2")])
def test_where_continuations_part_is_said(sparse, part_at, said):
    found = Generated((4, 5), sparse)
    assert found.part_at == part_at
    assert said in console.continuations(found, "one", "two")


# --- In a run ---


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    """A whole run with every flag of decoding: its output, errors and report."""
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "text.txt").write_text(repeating_text(110))
    where = ["--weights_dir", str(folders / "gqa_default_tied"), "--text", str(folder / "text.txt")]
    flags = ["--decode", "7", "--batch", "2", "--prefill", "dense", "--depths", "70", "--generate", "5"]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "configure_device", lambda device: configure_device(device)[:2])
        patch.setattr(benchmark, "show", told.append)
        patch.setattr(benchmark, "warn", lambda text: told.append(f"warning: {text}"))
        assert benchmark.main([*RUN_SIZES, *flags, *where, "--json", str(folder / "out.json")]) == 0
    return "\n".join(told), json.loads((folder / "out.json").read_text())


def test_every_flag_of_decoding_counts_in_a_run(report):
    output, values = report
    decoded = values["decode"]
    assert (decoded["depth"], decoded["tokens"], decoded["batch"], decoded["prefill"]) == (30, 7, 2, "dense")
    assert decoded["windows"] == 2
    assert decoded["dense"]["perplexity"] != decoded["sparse"]["perplexity"]
    assert [(row["depth"], row["batch"]) for row in values["decode_depths"]] == [(70, 2)]
    assert {"dense_ms", "keep_all_ms", "sparse_ms", "density"} <= set(values["decode_depths"][0])
    generated = values["generate"]
    assert (len(generated["dense"]), len(generated["sparse"])) == (5, 5)
    assert generated["dense"][0] == generated["sparse"][0], "the dense prefill predicts the first for both"
    for text in ("DECODING 7 tokens after 30, batch 2", "dense prefill", "DECODING BY DEPTH", "GREEDY CONTINUATION"):
        assert text in output
    assert "beyond the model's context: only time is meant" in " ".join(output.split())
    assert "warning: 37 tokens are beyond" not in output


def test_without_room_for_a_continuation_the_default_decodes_nothing_and_says_so(capsys):
    windows = Windows((), (jnp.zeros((1, 8), jnp.int32),), "")
    benchmark.describe_windows(windows, Settings(seq_len=30), print)
    assert "No decoding: the text ends before" in capsys.readouterr().out
    assert benchmark.settings_as_run(Settings(seq_len=30), windows).decode == 0


def test_depths_are_up_to_the_models_context_and_none_without_decoding():
    config = dataclasses.replace(CONFIG, max_position_embeddings=4000)
    assert Settings().for_model(config).depths == (512, 2048)
    assert Settings(decode=0).for_model(config).depths == ()
    assert Settings(decode=0, depths=(5000,)).for_model(config).depths == (5000,)


# --- Bad input ---


class Numbers:
    """A tokenizer whose ids are the numbers of a text."""

    prefix, prefix_text = (), ""

    def encode_first(self, file, needed):
        return [int(word) for word in file.read().split()][:needed]


@pytest.mark.parametrize(
    ("tokens", "asked", "message"),
    [
        (40, dict(decode=9), "too short to decode 1 window.*: 10 tokens must follow each, so 2 more tokens are needed"),
        (70, dict(decode=9, batch=3), "too short to decode 3 window.*so 4 more tokens are needed"),
        (70, dict(batch=9), "too short to decode 9 window"),
    ],
)
def test_a_text_too_short_for_the_continuation_says_how_many_tokens_are_needed(tmp_path, tokens, asked, message):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(tokens))))
    with pytest.raises(InputError, match=message):
        load_windows(Numbers(), Settings(text=path, seq_len=16, **asked), 300)


@pytest.mark.parametrize("tokens, following", [(16 * 3 - 1, 0), (16 * 2 + 65, 1), (16 * 3 + 65, 2), (32, 0)])
def test_windows_have_the_texts_next_tokens_as_far_as_it_goes(tmp_path, tokens, following):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(tokens))))
    windows = load_windows(Numbers(), Settings(text=path, seq_len=16), 300)
    assert [ids[0, 0] for ids in windows.following] == [ids[0, -1] + 1 for ids in windows.test[:following]]
    assert {ids.shape for ids in windows.following} <= {(1, 65)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(decode=-1), r"decode must be 0 \(for none\) or more, and below 2\^31, got -1"),
        (dict(generate=-2), r"generate must be 0 \(for none\) or more"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(depths=(0, 8)), r"depths must be at least 1 and below 2\^31, got \(0, 8\)"),
        (dict(batch=3, windows=2), "batch must be at most windows, 2, which it decodes, got 3"),
    ],
)
def test_a_number_out_of_range_is_refused(asked, message):
    with pytest.raises(InputError, match=message):
        Settings(**asked)


def test_a_cache_beyond_memory_is_refused_before_it_is_made_with_its_size_and_the_free_memory(arms, monkeypatch):
    device = arms.mesh.devices.flat[0]
    # 3 layers, K and V, 2 arms, 5 sequences of 2 heads of 10 float32 numbers for 20 + 9 tokens in whole blocks of 64
    needed = 3 * 2 * 2 * 5 * 2 * 10 * 4 * 64
    settings = Settings(ROWS, seq_len=DEPTH, decode=9, batch=5)
    monkeypatch.setattr(decoding, "free_memory", lambda _: math.ceil(needed / 0.9))
    benchmark.check_decoding(arms.dense, settings, device)
    monkeypatch.setattr(decoding, "free_memory", lambda _: needed)
    monkeypatch.setattr(KVCache, "empty", None)
    for asked in (settings, Settings(ROWS, seq_len=DEPTH, decode=0, generate=300)):
        with pytest.raises(InputError, match=r"needs caches of 0.0 GB, and 0.0 GB are free: give a smaller --batch"):
            benchmark.check_decoding(arms.dense, asked, device)


@pytest.mark.parametrize(
    ("steps", "warned"), [(dict(decode=44), False), (dict(decode=45), True), (dict(generate=45), True)]
)
def test_a_depth_beyond_the_context_is_a_warning(arms, capsys, steps, warned):
    settings = Settings(ROWS, seq_len=DEPTH, **{"decode": 0} | steps)
    benchmark.check_decoding(arms.dense, settings, arms.mesh.devices.flat[0])
    expected = "warning: 65 tokens are beyond the model's context of 64\n" if warned else ""
    assert capsys.readouterr().err == expected
