"""The model against transformers' logits, its schedule, its tiles, and the weights folder's error paths."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kascade_layout import make_mesh
from synthetic import HF_CONFIGS, token_ids, write_hf_folder

import kascade_core as core
from convert_weights import convert
from kascade_core import ANCHOR, DENSE, KASCADE_CACHE, REUSE, InputError, compile_forward, compute_perplexity
from llama_model import (
    EMBEDDINGS_CHUNK,
    FORMAT_VERSION,
    MANIFEST,
    LlamaConfig,
    LlamaModel,
    RopeScaling,
    load_weights,
    sha256_of,
)

SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1, (1, 1))}
NAME = "gqa_llama3_untied"  # three layers, two KV heads


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    for name in HF_CONFIGS:
        convert(write_hf_folder(root / "hf" / name, name), root / name)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    manifest, params = load_weights(folders / NAME)
    return manifest["config"], params


def logits_of(model, params, ids):
    return np.asarray(jax.jit(model.apply)(params, jnp.asarray(ids)))


def tiles_of(model, params, ids):
    return jax.jit(partial(model.apply, mutable=["kascade"]))(params, ids)[1]["kascade"]


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_logits_equal_transformers(folders, name):
    expected = np.load(Path(__file__).with_name("golden") / "logits.npz")[name]
    manifest, params = load_weights(folders / name)
    got = logits_of(LlamaModel(manifest["config"]), params, token_ids(name))
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_tiles_chosen_equals_dense(loaded, dtype):
    config, params = loaded
    dense = LlamaModel(config, tile_size=4, top_k=99, dtype=dtype)
    sparse = dense.clone(schedule=SPARSE)
    got, expected = (logits_of(model, params, token_ids(NAME)) for model in (sparse, dense))
    tolerance = 1e-6 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("schedule", [None, SPARSE, {0: (ANCHOR, None), 1: (REUSE, 0), 2: (ANCHOR, None)}])
def test_the_future_changes_no_earlier_logit(loaded, schedule, dtype):
    """Dense from token to token, sparse from query tile to query tile; to the bit."""
    config, params = loaded
    model = LlamaModel(config, schedule=schedule, tile_size=4, top_k=3, dtype=dtype)
    ids = token_ids(NAME)
    forward = jax.jit(model.apply)
    before = np.asarray(forward(params, ids))
    for cut in (7, 30, 60):
        changed = ids.copy()
        changed[:, cut:] = (changed[:, cut:] + 1) % config.vocab_size
        same = before == np.asarray(forward(params, changed))
        assert same[:, : cut if schedule is None else cut // 4 * 4].all()
        assert not same[:, cut:].all()


def test_a_schedule_changes_the_logits(loaded):
    config, params = loaded
    models = [LlamaModel(config, schedule, tile_size=4, top_k=3) for schedule in (None, SPARSE)]
    dense, sparse = (logits_of(model, params, token_ids(NAME)) for model in models)
    assert np.abs(dense - sparse).max() > 1e-2


def test_a_head_map_changes_the_logits(loaded):
    config, params = loaded
    logits = [
        logits_of(LlamaModel(config, {**SPARSE, 2: (REUSE, 1, heads)}, 4, 2), params, token_ids(NAME))
        for heads in ((0, 1), (1, 0))
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_the_cache_holds_the_last_texts_tiles_and_no_tracer(loaded):
    config, params = loaded
    model = LlamaModel(config, schedule=SPARSE, tile_size=4, top_k=3)
    first = jnp.asarray(token_ids(NAME))
    second = (first * 7 + 3) % config.vocab_size
    forward, _ = compile_forward(model, params, first)
    found = []
    for ids in (first, second):
        core.publish_tiles(forward(params, ids)[1])
        assert set(KASCADE_CACHE) == {1}
        assert type(KASCADE_CACHE[1]) is np.ndarray
        found.append(KASCADE_CACHE[1])
        np.testing.assert_array_equal(KASCADE_CACHE[1], tiles_of(model, params, ids)["layer_1"]["attention"]["tiles"])
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [(None, {}), (SPARSE, {}), (SPARSE, {"query_tile": 8, "anchor_scoring": "fast", "sink_tiles": 1})],
)
def test_devices_agree(loaded, schedule, sizes, num_devices, monkeypatch):
    """Dealt over several devices: the same tiles, and the same losses to rounding."""
    monkeypatch.setattr("kascade_layout.BLOCK", 8)
    config, params = loaded
    model = LlamaModel(config, schedule=schedule, tile_size=4, top_k=3, calibrate=True, **sizes)
    ids = jnp.asarray(token_ids(NAME))
    mesh = make_mesh(jax.devices()[:num_devices])
    assert mesh.size == num_devices
    results = []
    for where in (None, mesh):
        forward, _ = compile_forward(model, params, ids, where)
        nll, sown = jax.device_get(forward(params, ids))
        core.publish_tiles(sown)
        results.append((nll[:, :-1], dict(KASCADE_CACHE)))
    (expected, tiles), (got, dealt_tiles) = results
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert tiles.keys() == dealt_tiles.keys()
    for layer in tiles:
        np.testing.assert_array_equal(dealt_tiles[layer], tiles[layer])


def test_calibration_chooses_in_every_layer_of_a_dense_forward(loaded):
    config, params = loaded
    ids = jnp.asarray(token_ids(NAME))
    model = LlamaModel(config, schedule=SPARSE, tile_size=16, top_k=12)
    core.calibrate_kascade(model, params, ids, tile_size=4, top_k=3)
    assert list(KASCADE_CACHE) == [0, 1, 2]
    assert {tiles.shape for tiles in KASCADE_CACHE.values()} == {(2, 2, 16, 3)}
    observer, dense = model.clone(schedule=None, calibrate=True), model.clone(schedule=None)
    observed, expected = (logits_of(model, params, ids) for model in (observer, dense))
    assert np.abs(observed - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("chunk", [8, 10, 1024])  # of 50 tokens: six and a rest, five, less than one
def test_next_token_nll_is_the_perplexity_of_the_logits(loaded, monkeypatch, chunk):
    monkeypatch.setattr("kascade_layout.BLOCK", 16)
    monkeypatch.setattr("llama_model.VOCAB_CHUNK", chunk)
    config, params = loaded
    model, ids = LlamaModel(config), jnp.asarray(token_ids(NAME))
    forward, _ = compile_forward(model, params, ids)
    nll, _ = forward(params, ids)
    assert nll.shape == (2, 61)
    expected = compute_perplexity(logits_of(model, params, ids), ids)
    assert core.perplexity_of(nll[:, :-1]) == pytest.approx(expected, rel=1e-6)


def test_the_model_is_hashable_and_equal_to_its_like(loaded):
    config, _ = loaded
    model = LlamaModel(config, schedule=SPARSE)
    assert hash(model) == hash(LlamaModel(config, schedule=dict(SPARSE)))
    assert model == model.clone()
    assert model != model.clone(schedule=None)


def test_an_anchor_keeps_the_sink(loaded):
    config, params = loaded
    model = LlamaModel(config, schedule=SPARSE, tile_size=4, top_k=3)
    first = {sinks: tiles_of(model.clone(sink_tiles=sinks), params, token_ids(NAME)) for sinks in (0, 1)}
    kept = {sinks: (tiles["layer_1"]["attention"]["tiles"][..., 0] == 0).all() for sinks, tiles in first.items()}
    assert kept == {0: False, 1: True}


def test_a_model_that_is_not_finite_is_not_calibrated_on(loaded):
    config, params = loaded
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(InputError, match="computes infinities or NaN on the calibration text"):
        core.calibrate_kascade(LlamaModel(config), broken, jnp.asarray(token_ids(NAME)), 4, 3)


@pytest.mark.parametrize("field", ["tile_size", "top_k"])
def test_sizes_below_one_are_refused(loaded, field):
    with pytest.raises(InputError, match=f"{field} must be at least 1, got 0"):
        LlamaModel(loaded[0], **{field: 0})


def test_init_makes_the_same_tree_as_the_weights_folder(loaded):
    config, params = loaded
    made = jax.eval_shape(LlamaModel(config).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


# --- Configuration ---

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
HF = HF_CONFIGS[NAME]


def test_config_reads_old_and_new_rope_names():
    plain = {key: value for key, value in HF.items() if key != "rope_parameters"}
    new = LlamaConfig.from_hf(plain | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}})
    old = LlamaConfig.from_hf(plain | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    assert new == old
    assert new.rope_theta == 5e5
    assert new.rope_scaling == RopeScaling(**LLAMA3)
    assert LlamaConfig.from_hf(plain | {"rope_theta": 5e5, "rope_scaling": None}).rope_scaling is None


def test_config_fills_in_what_old_files_leave_out():
    values = {key: HF[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = LlamaConfig.from_hf(values | {"hidden_size": 60})
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (6, 10, 10000.0)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "architecture MistralForCausalLM"),
        ({"model_type": "qwen2"}, "architecture qwen2"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn is not supported"),
    ],
)
def test_config_refuses_by_name_what_the_model_does_not_compute(change, match):
    with pytest.raises(NotImplementedError, match=match):
        LlamaConfig.from_hf(HF | change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"hidden_size": "24"}, "hidden_size must be a whole number of at least 1, got '24'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, got nan"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a number above 0, got -1.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "factor": 0}}, "factor must be a number above 0, got 0"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}}, "must be below high_freq"),
        ({"head_dim": 7}, "head_dim must be even for RoPE, got 7"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
    ],
)
def test_config_refuses_senseless_values(change, match):
    with pytest.raises(InputError, match=match):
        LlamaConfig.from_hf(HF | change)


def test_config_refuses_a_missing_field():
    with pytest.raises(InputError, match="'vocab_size' is missing"):
        LlamaConfig.from_hf({key: value for key, value in HF.items() if key != "vocab_size"})


# --- Weights folders that are not right ---


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / NAME, tmp_path / "weights")


def rewrite_chunk(folder, name, change):
    """Changes a chunk's contents, and the manifest so that it does not notice."""
    path = folder / name
    chunk = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(chunk) or chunk))
    sign(folder, name)


def sign(folder, name):
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / name
    manifest["chunks"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def test_weights_come_back_as_stored(folder):
    manifest, params = load_weights(folder)
    assert manifest["dtype"] == "float32"
    assert params["params"]["layer_0"]["attention"]["wq"].dtype == jnp.float32
    _, params = load_weights(folder, jnp.bfloat16)
    assert params["params"]["layer_0"]["attention"]["wq"].dtype == jnp.bfloat16
    assert params["params"]["layer_0"]["attention_norm"].dtype == jnp.float32


def test_cpu_devices_share_the_weights_memory(folder):
    _, params = load_weights(folder, mesh=make_mesh(jax.devices()[:2]))
    for leaf in jax.tree.leaves(params):
        assert len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}) == 1


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is empty"):
        load_weights(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(InputError, match="has no manifest.json"):
        load_weights(tmp_path)


def test_an_unknown_version(folder):
    edit_manifest(folder, format_version=FORMAT_VERSION + 1)
    with pytest.raises(InputError, match=f"format version {FORMAT_VERSION + 1}; this program reads version"):
        load_weights(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 1}', "[" * 100_000])
def test_a_damaged_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json is damaged"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "int7"}, "dtype 'int7'; expected one of"),
        ({"dtype": ["float32"]}, "dtype is list, not text"),
        ({"chunks": {}}, "lists other chunks than its config needs"),
        ({"config": {"vocab_size": 3}}, "model config: .*missing"),
        ({"config": {"colour": 3}}, r"unknown fields \['colour'\]"),
    ],
)
def test_a_manifest_that_makes_no_sense(folder, change, match):
    edit_manifest(folder, **change)
    with pytest.raises(InputError, match=match):
        load_weights(folder)


@pytest.mark.parametrize("chunks", [[], {"layer_0.pkl": 3}, {"layer_0.pkl": {"bytes": 3}}])
def test_a_manifest_whose_chunks_are_damaged(folder, chunks):
    edit_manifest(folder, chunks=chunks)
    with pytest.raises(InputError, match="manifest.json is damaged"):
        load_weights(folder)


def test_a_manifest_with_an_absurd_number_of_layers(folder):
    config = json.loads((folder / MANIFEST).read_text())["config"]
    edit_manifest(folder, config=config | {"num_hidden_layers": 10**12})
    with pytest.raises(InputError, match="lists other chunks than its config needs"):
        load_weights(folder)


def test_a_missing_chunk(folder):
    (folder / "layer_1.pkl").unlink()
    with pytest.raises(InputError, match="layer_1.pkl is missing"):
        load_weights(folder)


def test_a_truncated_chunk(folder):
    path = folder / "layer_1.pkl"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"layer_1.pkl has \d+ bytes, expected \d+"):
        load_weights(folder)


def test_an_altered_chunk(folder):
    path = folder / EMBEDDINGS_CHUNK
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="embeddings.pkl was altered"):
        load_weights(folder)


def test_a_chunk_that_is_no_pickle(folder):
    (folder / "layer_0.pkl").write_bytes(b"no pickle at all")
    sign(folder, "layer_0.pkl")
    with pytest.raises(InputError, match="layer_0.pkl was refused"):
        load_weights(folder)


def test_a_tensor_of_the_wrong_shape(folder):
    rewrite_chunk(folder, "layer_2.pkl", lambda chunk: chunk["attention"].update(wk=chunk["attention"]["wk"].T.copy()))
    with pytest.raises(InputError, match=r"attention/wk: expected float32 \(24, 20\), got float32 \(20, 24\)"):
        load_weights(folder)


def test_a_tensor_that_is_not_there(folder):
    rewrite_chunk(folder, "layer_2.pkl", lambda chunk: chunk | {"feed_forward": dict.fromkeys(("w1", "w3"), 0)})
    with pytest.raises(InputError, match=r"layer_2.pkl/feed_forward: expected the keys \['w1', 'w2', 'w3'\], got"):
        load_weights(folder)


def test_a_chunk_with_keys_that_cannot_be_sorted(folder):
    rewrite_chunk(folder, "layer_2.pkl", lambda chunk: chunk | {3: None})
    with pytest.raises(InputError, match="layer_2.pkl: expected the keys"):
        load_weights(folder)


def test_a_tensor_that_is_none(folder):
    rewrite_chunk(folder, "layer_2.pkl", lambda chunk: chunk | {"ffn_norm": [1.0]})
    with pytest.raises(InputError, match=r"layer_2.pkl/ffn_norm: expected float32 \(24,\), got list"):
        load_weights(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite(folder, value):
    rewrite_chunk(folder, "layer_0.pkl", lambda chunk: chunk["attention"]["wo"].__setitem__((1, 2), value))
    with pytest.raises(InputError, match="layer_0.pkl/attention/wo: has NaN or infinite values"):
        load_weights(folder)


class Mischief:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_the_code_not_run(folder, tmp_path):
    path = folder / "layer_0.pkl"
    path.write_bytes(pickle.dumps(Mischief(tmp_path / "it_ran")))
    sign(folder, "layer_0.pkl")
    with pytest.raises(InputError, match="layer_0.pkl was refused: it asks for pathlib.*only numpy arrays are allowed"):
        load_weights(folder)
    assert not (tmp_path / "it_ran").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "it_ran").exists()  # so the test can fail
