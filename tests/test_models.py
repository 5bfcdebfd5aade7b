"""Every architecture and every scaling of RoPE against transformers' logits, sparse against dense, decoding against both."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from synthetic import (
    HF_CONFIGS,
    MODELS,
    meta_shards,
    model_ids,
    rope_factors,
    source_weights,
    write_gguf,
    write_hf,
    write_meta,
)

from attention.sharding import make_mesh, place
from convert_weights import convert
from kascade_core import ANCHOR, DENSE, REUSE, Selection, density_of, perplexity_of, token_nll
from llama_model import LlamaModel, load_weights
from measure.layerwise import LayerRunner
from network.cache import KVCache
from weights.folder import read_manifest
from weights.gguf_tokenizers import LLAMA3
from weights.sources import open_checkpoint
from weights.text_tokenizer import PROBE
from weights.tokenizers import load_tokenizer

GOLDEN = np.load(Path(__file__).with_name("golden") / "models.npz")
SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1)}
ALL, SOME = Selection(tile_size=4, top_k=99), Selection(tile_size=2, top_k=3, query_tile=1, sink_tiles=1)
STEPS = 6


def quickly(*names):
    """All MODELS; those that are not named are `full`."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in MODELS]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """load(name): the config and the params of one of MODELS, converted once."""
    root, done = tmp_path_factory.mktemp("models"), {}

    def load(name):
        if name not in done:
            convert(write_hf(root / "hf" / name, MODELS[name]), root / name)
            manifest = read_manifest(root / name)
            done[name] = manifest.config, load_weights(root / name, manifest)
        return done[name]

    return load


@pytest.fixture(scope="module")
def dense(loaded):
    """dense(name, length): a compiled dense forward and what it gives."""
    done = {}

    def run(name, length=29):
        if (name, length) not in done:
            config, params = loaded(name)
            ids = jnp.asarray(model_ids(name)[:, :length])
            forward = LlamaModel(config, selection=ALL).compile(params, ids, with_cache=True)
            done[name, length] = forward, forward(params, ids)
        return done[name, length]

    return run


def assert_close(got, expected, tolerance):
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= tolerance * np.abs(np.asarray(expected)).max()


@pytest.mark.parametrize("golden", GOLDEN.files)
def test_logits_and_perplexity_equal_transformers(loaded, dense, golden):
    name, expected = golden.split("/")[0], GOLDEN[golden]
    config, params = loaded(name)
    _, output = dense(name, len(expected))
    logits = jax.jit(partial(LlamaModel(config).apply, method="_logits"))(params, output.stream)[0]
    assert_close(logits, expected, 1e-4)
    perplexity = perplexity_of(token_nll(expected[:-1], jnp.asarray(model_ids(name)[0, 1 : len(expected)])))
    assert perplexity_of(output.nll) == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize("name", quickly("mistral_window", "smollm3_nope"))
def test_all_tiles_chosen_equals_dense(loaded, dense, name):
    config, params = loaded(name)
    ids = jnp.asarray(model_ids(name))
    output = LlamaModel(config, SPARSE, ALL).compile(params, ids)(params, ids)
    assert_close(output.stream, dense(name)[1].stream, 1e-5)


def decode(config, params, name, cache, schedule=None, selection=ALL):
    ids = jnp.asarray(model_ids(name)[:, -STEPS:])
    decoder = LlamaModel(config, schedule, selection).compile_decode(params, cache, STEPS)
    return decoder(params, ids, jnp.array([29 - STEPS]), cache)


@pytest.mark.parametrize("name", quickly("llama_dynamic", "qwen3_mscale", "smollm3_nope"))
def test_decoding_equals_the_forward(loaded, dense, name):
    """The cache holds all tokens' keys: those behind a step's own have no weight, and are written over."""
    config, params = loaded(name)
    forward, output = dense(name)
    cache = forward.fill_cache(output, 32, make_mesh(jax.devices()[:1]), jnp.float32)
    assert_close(decode(config, params, name, cache).stream, output.stream[:, -STEPS:], 1e-5)


def test_a_sparse_step_within_a_window_chooses_and_computes_as_a_forward_of_query_tiles_of_one_row(loaded):
    config, params = loaded("mistral_window")
    ids = jnp.asarray(model_ids("mistral_window"))
    forward = LlamaModel(config, SPARSE, SOME).compile(params, ids, with_cache=True)
    output = forward(params, ids)
    cache = forward.fill_cache(output, 32, make_mesh(jax.devices()[:1]), jnp.float32)
    steps = decode(config, params, "mistral_window", cache, SPARSE, SOME)
    np.testing.assert_array_equal(
        np.asarray(steps.tiles[1])[:, :, :, 0].swapaxes(1, 2), np.asarray(output.tiles[1])[:, :, -STEPS:]
    )
    assert_close(steps.stream, output.stream[:, -STEPS:], 1e-5)
    selection = LlamaModel(config, SPARSE, SOME).selection
    chosen = np.asarray(output.tiles[1])
    assert chosen[:, :, 12:, 1:].min() > 0  # the sink is out of sight after nine tokens
    assert density_of(chosen, selection) > density_of(chosen)


def test_two_devices_choose_and_compute_the_same_within_a_window(loaded):
    config, params = loaded("mistral_window")
    mesh, ids = make_mesh(jax.devices()[:2]), jnp.asarray(model_ids("mistral_window"))
    model = LlamaModel(config, SPARSE, dataclasses.replace(SOME, query_tile=2))
    expected = model.compile(params, ids)(params, ids)
    params = jax.tree.map(lambda leaf: place(leaf, mesh), params)
    got = model.compile(params, ids, mesh)(params, ids)
    np.testing.assert_array_equal(got.tiles[1], expected.tiles[1])
    assert_close(got.stream, expected.stream, 1e-5)


def test_a_step_from_an_empty_cache_uses_the_short_factors(loaded, dense):
    config, params = loaded("phi3_longrope")
    ids = jnp.asarray(model_ids("phi3_longrope")[:, :11])
    cache = KVCache.empty(config, 1, 12, jnp.float32)
    steps = LlamaModel(config).compile_decode(params, cache, 11)(params, ids, jnp.array([0]), cache)
    assert_close(steps.stream, dense("phi3_longrope", 11)[1].stream, 1e-5)


def test_layer_by_layer_equals_the_forward_where_layers_have_no_rope(loaded, dense):
    config, params = loaded("smollm3_nope")
    assert config.no_rope_layers == (1,)
    ids = jnp.asarray(model_ids("smollm3_nope"))
    runner = LayerRunner(LlamaModel(config, selection=ALL), params, 29, make_mesh(jax.devices()[:1]))
    stream = runner.run(runner.embed(ids), 0, lambda *_: None)
    compared = runner.compare(stream, stream, ids)
    np.testing.assert_allclose(compared.dense_nll, np.asarray(dense("smollm3_nope")[1].nll)[0], rtol=1e-4)


def llama3_tokenizer(tokens, num_words):
    """Hugging Face's form of what Meta's ranks are: a BPE that takes whole tokens first, in LLaMA 3's cuts, after BOS."""
    vocabulary, special = {token: i for i, token in enumerate(tokens[:num_words])}, tokens[num_words:]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("h", "e")], ignore_merges=True))
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], num_words)]
    )
    return tokenizer


def test_one_model_as_hugging_face_folder_meta_folder_and_gguf_has_the_same_ids_and_perplexity(tmp_path, monkeypatch):
    model = HF_CONFIGS["gqa_llama3_untied"] | {"vocab_size": 512, "max_position_embeddings": 131072}
    model["rope_parameters"] = model["rope_parameters"] | {"factor": 8.0, "original_max_position_embeddings": 8192}
    shards = meta_shards(model, 2)  # what torch would load; test_weights_sources.py reads a real file where torch is
    monkeypatch.setattr("weights.sources._load_pth", lambda path: shards[int(path.suffixes[-2][1:])])
    meta = write_meta(tmp_path / "meta", model, 2, use_scaled_rope=True, rope_scaling_factor=8)
    backend = open_checkpoint(meta).tokenizer.backend
    tokens, words = [backend.id_to_token(i) for i in range(512)], 258
    hugging_face = write_hf(tmp_path / "hf", model)
    llama3_tokenizer(tokens, words).save(str(hugging_face / "tokenizer.json"))
    kinds = [1] * words + [3] * (512 - words)
    fields = {
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": kinds,
        "bos_token_id": words,
        "eos_token_id": words + 1,
    }
    weights = source_weights(model, 1) | {"rope_freqs.weight": rope_factors(model)}
    names = {f"tokenizer__ggml__{key}": value for key, value in fields.items()}
    gguf = write_gguf(tmp_path / "model.gguf", model, weights=weights, **names, tokenizer__ggml__add_bos_token=None)
    text = "he said: xyz is 12345, not <|eot_id|>; " + PROBE
    found = []
    for source in (hugging_face, meta, gguf):
        convert(source, tmp_path / "out" / source.name)
        manifest = read_manifest(tmp_path / "out" / source.name)
        tokenizer = load_tokenizer(tmp_path / "out" / source.name, manifest.tokenizer)
        ids = [*tokenizer.prefix, *tokenizer.encode(text)]
        params, window = load_weights(tmp_path / "out" / source.name, manifest), jnp.asarray([ids[:61]])
        found.append((ids, perplexity_of(LlamaModel(manifest.config).compile(params, window)(params, window).nll)))
    assert found[0][0][:2] == [words, 256] and len(found[0][0]) > 2000
    for ids, perplexity in found[1:]:
        assert ids == found[0][0]
        assert perplexity == pytest.approx(found[0][1], rel=1e-6)
