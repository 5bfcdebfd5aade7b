"""Every kind of checkpoint gives the same arrays; what cannot be converted is refused in one sentence that names it."""

import dataclasses
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import (
    HF_CONFIGS,
    MODELS,
    expected_arrays,
    fused_like_phi3,
    hf_weights,
    interleaved,
    meta_shards,
    rope_factors,
    source_weights,
    with_gguf_vocabulary,
    write_gguf,
    write_hf,
    write_meta,
)

from errors import InputError, UnsupportedError
from weights import sources
from weights.config import LlamaConfig, RopeFactors, RopeScaling, chunk_shapes, layer_chunk, rope_frequencies
from weights.folder import DTYPES
from weights.gguf_file import read_gguf
from weights.sources import open_checkpoint, with_rope_factors
from weights.tensors import check_names, half_split_rows, read_arrays

RELEASED_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
RELEASED_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SQUARE = {"vocab_size": 24, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
CONFIGS = {  # square matrices have no wrong shape to give a forgotten transposition away
    "untied_llama3": HF_CONFIGS["gqa_llama3_untied"] | {"rope_parameters": RELEASED_ROPE},
    "tied": HF_CONFIGS["gqa_default_tied"],
    "square": HF_CONFIGS["gqa_llama3_untied"] | SQUARE | {"rope_parameters": {"rope_theta": 10000.0}},
}
FLOAT32 = DTYPES["float32"]
UNTIED, TIED = CONFIGS["untied_llama3"], CONFIGS["tied"]


def arrays_of(checkpoint, dtype=FLOAT32):
    """All that a conversion would write, flat like `expected_arrays`; as convert_weights.py goes about it."""

    def flat(tree, prefix):
        for name, leaf in tree.items():
            yield from flat(leaf, f"{prefix}/{name}") if isinstance(leaf, dict) else [(f"{prefix}/{name}", leaf)]

    check_names(checkpoint)
    layers = {layer_chunk(i): i for i in range(checkpoint.config.num_hidden_layers)}
    arrays = {}
    for name, shapes in chunk_shapes(checkpoint.config).items():
        arrays |= flat(read_arrays(checkpoint, shapes, layers.get(name), dtype), name)
    return arrays


def assert_arrays(checkpoint, expected, dtype=FLOAT32):
    got = arrays_of(checkpoint, dtype)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == dtype and got[name].flags.c_contiguous, name
        np.testing.assert_array_equal(got[name], array.astype(dtype), err_msg=name)


def refused(path, error, match):
    """Opening and reading must fail with this very error, in a sentence that can be read."""
    with pytest.raises(error, match=match) as caught:
        arrays_of(open_checkpoint(path))
    assert isinstance(caught.value, UnsupportedError) == (error is UnsupportedError)
    assert len(str(caught.value)) < 700


def meta_tensors(monkeypatch, parts):
    """Has the consolidated.NN.pth of `write_meta` hold these arrays; reading the real ones takes torch."""
    monkeypatch.setattr(sources, "_load_pth", lambda path: parts[int(path.suffixes[-2][1:])])


# --- The same arrays from every source ---


@pytest.mark.parametrize(("name", "shards"), [("untied_llama3", 3), ("tied", 1), ("square", 1)])
def test_hugging_face_folders(tmp_path, name, shards):
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", CONFIGS[name], shards=shards))
    assert_arrays(checkpoint, expected_arrays(CONFIGS[name]))
    size = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert (checkpoint.model, checkpoint.source, checkpoint.dtype) == ("hf", f"hf ({size} bytes)", "float32")
    assert checkpoint.config == LlamaConfig.from_hf(CONFIGS[name])
    assert checkpoint.tokenizer.encode("w1 w3") == [1, 3]


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf_files(tmp_path, name):
    config = with_gguf_vocabulary(CONFIGS[name])
    weights = source_weights(config, 1)
    if "factor" in config["rope_parameters"]:
        weights["rope_freqs.weight"] = rope_factors(config)
    path = write_gguf(tmp_path / "tiny.gguf", config, weights=weights)
    checkpoint = open_checkpoint(path)
    assert_arrays(checkpoint, expected_arrays(config))
    assert checkpoint.config == dataclasses.replace(LlamaConfig.from_hf(config), rms_norm_eps=float(np.float32(1e-5)))
    assert (checkpoint.model, checkpoint.source) == ("tiny", f"tiny.gguf ({path.stat().st_size} bytes)")
    assert checkpoint.tokenizer.encode("he") == [256]


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_folders_of_every_architecture(tmp_path, name):
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", MODELS[name]))
    assert_arrays(checkpoint, expected_arrays(MODELS[name]))
    assert checkpoint.warnings == check_names(checkpoint) == ()


FACTORS = {"rope_factors_short.weight": [1.0, 1.25], "rope_factors_long.weight": [2.0, 9.0]}
GGUF_MODELS = {  # name -> architecture, metadata, tensors; None where the file is to say nothing
    "llama_bias_linear": ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 2.5}, {}),
    "llama_dynamic": ("llama", {}, {}),
    "mistral_window": ("llama", {"attention__sliding_window": 9, "attention__head_count_kv": [2, 2, 2]}, {}),
    "qwen2_yarn": ("qwen2", {
        "rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 16,
        "rope__scaling__yarn_beta_fast": 4.0, "rope__scaling__yarn_beta_slow": 0.5,
    }, {}),
    "qwen3_mscale": ("qwen3", {"rope__scaling__factor": 4.0}, {}),  # without a type: linear
    "phi3_longrope": ("phi3", {"rope__scaling__original_context_length": 16, "rope__scaling__attn_factor": 1.5**0.5}, FACTORS),
    "smollm3_nope": ("smollm3", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_gguf_files_of_every_architecture(tmp_path, name):
    architecture, metadata, factors = GGUF_MODELS[name]
    config = with_gguf_vocabulary(MODELS[name]) | {"no_rope_layer_interval": 4}
    config |= {"num_hidden_layers": 4} if architecture == "smollm3" else {}
    weights = source_weights(config, 1, pairs=architecture in ("llama", "smollm3"))
    weights = fused_like_phi3(weights, config["num_hidden_layers"]) if architecture == "phi3" else weights
    weights |= {key: np.array(values, np.float32) for key, values in factors.items()}
    if architecture == "smollm3":
        weights["rope_freqs.weight"] = rope_factors({"head_dim": 4} | config)
    metadata = {f"{architecture}__{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "tiny.gguf", config, weights=weights, architecture=architecture, **metadata)
    checkpoint = open_checkpoint(path)
    assert_arrays(checkpoint, expected_arrays(config))
    if architecture == "qwen3":
        config |= {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}}
    expected = LlamaConfig.from_hf(config)
    plain = {"rope_scaling": None, "rms_norm_eps": 1e-5}
    assert dataclasses.replace(checkpoint.config, **plain) == dataclasses.replace(expected, **plain)
    for long in (False, True):
        np.testing.assert_allclose(
            rope_frequencies(checkpoint.config, long), rope_frequencies(expected, long), rtol=1e-6
        )
    got, wanted = (getattr(c.rope_scaling, "attention_factor", 1.0) for c in (checkpoint.config, expected))
    assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "shards", "by_rows"), [("untied_llama3", 2, True), ("tied", 2, False), ("square", 1, True)]
)
def test_meta_folders(tmp_path, monkeypatch, name, shards, by_rows):
    config = CONFIGS[name] | {"vocab_size": 512}
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": 8} if "factor" in config["rope_parameters"] else {}
    meta_tensors(monkeypatch, meta_shards(config, shards, by_rows))
    checkpoint = open_checkpoint(write_meta(tmp_path / "meta", config, shards, **scaled))
    assert_arrays(checkpoint, expected_arrays(config))
    length = 131072 if scaled else 8192
    assert checkpoint.config == LlamaConfig.from_hf(config | {"max_position_embeddings": length})


def test_meta_without_rope_theta_is_llama_2(tmp_path, monkeypatch):
    config = TIED | {"vocab_size": 512}
    source = write_meta(tmp_path / "meta", config)
    params = json.loads((source / "params.json").read_text())
    del params["rope_theta"]
    (source / "params.json").write_text(json.dumps(params))
    meta_tensors(monkeypatch, meta_shards(config))
    config = open_checkpoint(source).config
    assert (config.rope_theta, config.max_position_embeddings) == (10000.0, 4096)


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0)])
def test_metas_scaling_factor_follows_from_the_width(dim, factor):
    params = {"dim": dim, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0}
    shapes = {"tok_embeddings.weight": (9, dim), "layers.0.feed_forward.w1.weight": (5, dim)}
    shard = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    config = sources._meta_config(params | {"use_scaled_rope": True}, [shard])
    assert config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)


def test_a_model_in_the_hugging_face_cache_has_the_models_name(tmp_path):
    folder = tmp_path / "models--org--MyLlama" / "snapshots" / ("0123abcd" * 5)
    checkpoint = open_checkpoint(write_hf(folder, TIED))
    assert checkpoint.model == "MyLlama" and checkpoint.source.startswith("MyLlama (")


# --- Dtypes ---


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_stored_and_asked_dtypes(tmp_path, stored, asked):
    weights = {key: tensor.astype(DTYPES[stored]) for key, tensor in hf_weights(TIED).items()}
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", TIED, weights))
    assert checkpoint.dtype == stored
    expected = {key: tensor.astype(DTYPES[stored]) for key, tensor in expected_arrays(TIED).items()}
    assert_arrays(checkpoint, expected, DTYPES[asked])


def test_matrices_of_several_dtypes_become_float32(tmp_path):
    weights = hf_weights(TIED)
    key = "model.layers.0.mlp.up_proj.weight"
    weights[key] = weights[key].astype(np.float16)
    assert open_checkpoint(write_hf(tmp_path / "hf", TIED, weights)).dtype == "float32"


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")])
def test_gguf_types_are_dequantised(tmp_path, kind, dtype):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 24}  # whole blocks
    config = with_gguf_vocabulary(TIED) | sizes
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", config, kind))
    assert checkpoint.dtype == dtype
    ggml = gguf.GGMLQuantizationType[kind]

    def stored(name, array):
        if array.ndim == 1:
            return array
        rows = array if name.endswith("tok_embeddings") else array.T
        rows = gguf.dequantize(gguf.quantize(rows, ggml), ggml)
        return rows if name.endswith("tok_embeddings") else rows.T

    assert_arrays(checkpoint, {name: stored(name, array) for name, array in expected_arrays(config).items()})


# --- RoPE ---


def test_half_split_rows_inverts_the_interleaved_order():
    rows = np.arange(3 * 8 * 5).reshape(24, 5)
    np.testing.assert_array_equal(half_split_rows(interleaved(rows, 3), 3), rows)
    assert half_split_rows(np.arange(12)[:, None], 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_rope_factors_of_one_are_no_scaling():
    config = LlamaConfig.from_hf(TIED)
    assert with_rope_factors(config, np.ones(3, np.float32)) == config


def test_rope_factors_that_are_not_llama_3s_are_kept_as_they_are():
    config = dataclasses.replace(LlamaConfig.from_hf(UNTIED), rope_scaling=None)
    scaled = with_rope_factors(config, np.array([1, 2, 3, 4, 8], np.float32))
    assert scaled.rope_scaling == RopeFactors((1.0, 2.0, 3.0, 4.0, 8.0))
    with pytest.raises(UnsupportedError, match="rope_freqs.weight beside another scaling"):
        with_rope_factors(scaled, np.full(5, 2, np.float32))


@pytest.mark.parametrize("factors", [np.full(7, 8.0), np.zeros(5), np.full(5, np.nan), np.ones(4)])
def test_rope_factors_that_make_no_sense_are_refused(factors):
    with pytest.raises(InputError, match="rope_freqs.weight: expected 5 numbers above 0, got array"):
        with_rope_factors(LlamaConfig.from_hf(UNTIED), factors.astype(np.float32))


# --- What is no checkpoint ---


def test_an_input_that_is_none_is_refused_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf model", "ggufs", "done", "empty"):
        Path(name).mkdir()
    for name in ("hf model/model.safetensors", "hf model/config.json", "ggufs/x.gguf", "done/manifest.json"):
        Path(name).touch()
    for name, match in {
        "nothing": "input nothing does not exist; give a Hugging Face or Meta folder, or a GGUF file",
        "meta-llama/Llama-3.2-1B": (
            "fetch it first: hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B, and then: "
            "python convert_weights.py --input Llama-3.2-1B"
        ),
        "hf model/model.safetensors": "is one file of a checkpoint; give its folder: --input 'hf model'",
        "hf model/config.json": "is one file of a checkpoint; give its folder: --input 'hf model'",
        "ggufs": "is a folder with a GGUF file in it; give the file: --input ggufs/x.gguf",
        "done": "is converted already; run it: python benchmark_kascade_final.py --weights_dir done",
        "x" * 300: "x cannot be read .File name too long.",
        "empty": "input folder empty is not a checkpoint: expected config.json with model.safetensors",
    }.items():
        refused(Path(name), InputError, match)


# --- Hugging Face folders that are refused ---

CHANGED_WEIGHTS = {
    "missing tensor model.norm.weight": {"model.norm.weight": None},
    "missing tensor lm_head.weight": {"lm_head.weight": None},
    r"tensor model.norm.weight has shape \(23,\), expected \(24,\)": {"model.norm.weight": np.ones(23, np.float32)},
    r"tensor model.norm.weight has shape \(\), expected \(24,\)": {"model.norm.weight": np.ones((), np.float32)},
    r"q_proj.weight has shape \(24, 60\), expected \(60, 24\)": {
        "model.layers.1.self_attn.q_proj.weight": np.ones((24, 60), np.float32)
    },
    "model.norm.weight has NaN": {"model.norm.weight": np.full(24, np.nan, np.float32)},
    "model.norm.weight has NaN or infinity": {"model.norm.weight": np.full(24, np.inf, ml_dtypes.bfloat16)},
}


@pytest.mark.parametrize("match", CHANGED_WEIGHTS)
def test_wrong_tensors_are_named(tmp_path, match):
    weights = hf_weights(UNTIED) | CHANGED_WEIGHTS[match]
    weights = {key: tensor for key, tensor in weights.items() if tensor is not None}
    refused(write_hf(tmp_path / "hf", UNTIED, weights), InputError, match)


def test_a_value_too_large_for_float16_is_named(tmp_path):
    weights = hf_weights(UNTIED) | {"model.norm.weight": np.full(24, -7e4, np.float32)}
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED, weights))
    with pytest.raises(InputError, match=r"norm.weight goes up to 7e\+04, too large for float16"):
        arrays_of(checkpoint, DTYPES["float16"])


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (
            "q_proj.bias' in .*: this network has none",
            {"model.layers.0.self_attn.q_proj.bias": np.ones(60, np.float32)},
        ),
        (
            "k_norm.weight' in .*: this network has none",
            {"model.layers.2.self_attn.k_norm.weight": np.ones(10, np.float32)},
        ),
        ("lm_head.bias' in .*: this network has none", {"lm_head.bias": np.ones(50, np.float32)}),
        ("'model.norm.weight' is stored as I8; supported are F64, F32", {"model.norm.weight": np.ones(24, np.int8)}),
    ],
)
def test_biases_and_other_storage_are_unsupported(tmp_path, match, change):
    refused(write_hf(tmp_path / "hf", UNTIED, hf_weights(UNTIED) | change), UnsupportedError, match)


def test_a_tied_output_that_is_stored_must_be_the_embeddings(tmp_path):
    weights = hf_weights(TIED)
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    assert_arrays(open_checkpoint(write_hf(tmp_path / "same", TIED, same)), expected_arrays(TIED))
    other = same | {"lm_head.weight": same["lm_head.weight"] + 1}
    match = "config.json ties lm_head.weight to model.embed_tokens.weight, and they differ"
    refused(write_hf(tmp_path / "other", TIED, other), InputError, match)


def test_rotary_buffers_are_dropped(tmp_path):
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    weights = hf_weights(UNTIED) | {key: np.ones(5, np.float32) for key in buffers}
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED, weights))
    assert_arrays(checkpoint, expected_arrays(UNTIED))
    assert check_names(checkpoint) == ()


def test_tensors_that_are_not_used_are_named_in_one_warning(tmp_path):
    unused = {
        "v_head.summary.weight": np.ones((1, 24), np.float32),
        "v_head.summary.bias": np.ones(1, np.float32),
        "model.embed_positions.position_ids": np.arange(9)[None],
        "model.layers.1.self_attn.bias": np.tri(9, dtype=bool)[None, None],
        "model.layers.3.mlp.up_proj.weight": np.ones((14, 24), np.float32),
        "x" * 10**5: np.ones(1, np.int8),
    }
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED, hf_weights(UNTIED) | unused))
    assert_arrays(checkpoint, expected_arrays(UNTIED))
    (warning,) = check_names(checkpoint)
    assert warning.startswith("tensors that a network of 3 layers does not use: 'model.embed_positions.position_ids', ")
    assert "'model.layers.1.self_attn.bias', 'model.layers.3.mlp.up_proj.weight' and 3 more" in warning


def test_fewer_layers_than_stored_are_read_with_a_warning(tmp_path):
    weights = hf_weights(UNTIED)
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED | {"num_hidden_layers": 2}, weights))
    assert_arrays(checkpoint, {key: array for key, array in expected_arrays(UNTIED).items() if "layer_2" not in key})
    assert "a network of 2 layers does not use: 'model.layers.2.input_layernorm.weight'" in check_names(checkpoint)[0]
    gguf_config = with_gguf_vocabulary(UNTIED)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", gguf_config, llama__block_count=2))
    assert "a network of 2 layers does not use: 'blk.2.attn_k.weight', " in check_names(checkpoint)[0]


def renamed(weights, change):
    return {change(key): tensor for key, tensor in weights.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"language_model.{key}",
        lambda key: key.replace("model.", "model.language_model."),
        lambda key: key.removeprefix("model."),
    ],
)
def test_the_names_of_other_wrappers_are_read(tmp_path, change):
    source = write_hf(tmp_path / "hf", TIED, renamed(hf_weights(TIED), change))
    assert_arrays(open_checkpoint(source), expected_arrays(TIED))
    for architecture in ("LLaMAForCausalLM", "LlamaModel"):
        write_hf(tmp_path / architecture, TIED, architectures=[architecture])
        assert_arrays(open_checkpoint(tmp_path / architecture), expected_arrays(TIED))


def test_two_names_of_one_tensor_are_refused(tmp_path):
    weights = hf_weights(TIED)
    weights["_orig_mod.model.norm.weight"] = weights["model.norm.weight"]
    refused(write_hf(tmp_path / "hf", TIED, weights), InputError, "duplicate tensor 'model.norm.weight'")


@pytest.mark.parametrize("tied", [None, True])
def test_embeddings_are_tied_where_nothing_says_so_and_no_head_is_stored(tmp_path, tied):
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", TIED, tie_word_embeddings=tied))
    assert checkpoint.config.tie_word_embeddings
    refused(write_hf(tmp_path / "no", TIED, tie_word_embeddings=False), InputError, "missing tensor lm_head.weight")
    assert not open_checkpoint(write_hf(tmp_path / "head", UNTIED, tie_word_embeddings=None)).config.tie_word_embeddings


def test_biases_that_the_config_has_and_the_file_has_not_are_a_warning(tmp_path):
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED, attention_bias=True))
    assert_arrays(checkpoint, expected_arrays(UNTIED))
    assert "self_attn.q_proj.bias, model.layers.0.self_attn.o_proj.bias is not stored" in checkpoint.warnings[0]


# --- 8-bit floats ---


def with_float8(weights, key, scale, suffix):
    """The weights with one of them in 8 bits and its scale beside it, and what it stands for."""
    values = (weights[key] / 2).astype(ml_dtypes.float8_e4m3fn)
    spread = np.kron(scale, np.ones((7, 6))) if scale.ndim == 2 and scale.shape[1] > 1 else scale
    exact = values.astype(np.float32) * spread.astype(np.float32)
    return weights | {key: values, f"{key}{suffix}": scale.astype(np.float32)}, exact


@pytest.mark.parametrize(
    ("scale", "suffix"),
    [
        (np.array(2.0), "_scale"),
        (np.arange(1.0, 15)[:, None], "_scale"),
        (np.arange(1.0, 9).reshape(2, 4), "_scale_inv"),
    ],
    ids=["one", "rows", "blocks"],
)
def test_8_bit_floats_are_dequantised_by_their_scales(tmp_path, scale, suffix):
    key = "model.layers.1.mlp.up_proj.weight"  # [14, 24]
    weights, exact = with_float8(hf_weights(UNTIED), key, scale, suffix)
    quantization = {"quant_method": "fp8", "weight_block_size": [7, 6]}
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", UNTIED, weights, quantization_config=quantization))
    assert_arrays(checkpoint, expected_arrays(UNTIED) | {"layer_1.pkl/feed_forward/w3": exact.T})
    assert checkpoint.dtype == "float32" and check_names(checkpoint) == ()


def test_8_bit_floats_without_a_fitting_scale_are_refused_by_name(tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    weights, _ = with_float8(hf_weights(UNTIED), key, np.ones((2, 4)), "_scale")
    match = f"the scale of tensor '{key}' has shape .2, 4., expected .1, 1., a row or one"
    refused(write_hf(tmp_path / "blocks", UNTIED, weights), InputError, match)
    del weights[f"{key}_scale"]
    match = f"tensor '{key}' is stored as F8_E4M3, and its scale is missing"
    refused(write_hf(tmp_path / "none", UNTIED, weights), UnsupportedError, match)


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (UnsupportedError, r"config.json: architecture 'LlamaForCausalLM' .*'gemma'.*; llama, mistral", {"model_type": "gemma"}),
        (UnsupportedError, r"quantised \(quantization_config", {"quantization_config": {"bits": 4}}),
        (InputError, "config.json: num_attention_heads must be a whole number of at least 1, got 0", {"num_attention_heads": 0}),
        (InputError, "config.json: num_hidden_layers must be a whole number of at most 1024", {"num_hidden_layers": 4 * 10**9}),
        (InputError, "missing tensor model.layers.10.* in hf", {"num_hidden_layers": 1024}),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, error, match, changes):
    refused(write_hf(tmp_path / "hf", UNTIED, **changes), error, match)


def test_damaged_safetensors_are_refused(tmp_path):
    source = write_hf(tmp_path / "hf", UNTIED)
    file = source / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(source, InputError, "model.safetensors: truncated or damaged")
    file.unlink()
    refused(source, InputError, "has neither model.safetensors nor model.safetensors.index.json")


INDEX = {  # the sentence -> weight_map
    "weight_map is missing; expected an object": None,
    "weight_map must be an object, got .'a'.": ["a"],
    "weight_map must be an object, got 7": 7,
    "weight_map must be an object, got 'a'": "a",
    "weight_map is empty": {},
    "weight_map.a must be text, got None": {"a": None},
    "weight_map.a must be text, got 7": {"a": 7},
    r"weight_map.a must be text, got \['x'\]": {"a": ["x"]},
    "weight_map: expected names of .safetensors files in the same folder, got ''": {"a": ""},
    "weight_map: expected names of .safetensors files in the same folder, got '..'": {"a": ".."},
    "weight_map: expected names of .safetensors files in the same folder, got '../hf/model.safetensors'": {
        "a": "../hf/model.safetensors"
    },
    "weight_map: expected names of .safetensors files in the same folder, got '/etc/passwd'": {"a": "/etc/passwd"},
    r"weight_map: expected names of .safetensors files in the same folder, got 'C:\\\\x'": {"a": "C:\\x"},
    "'model-9.safetensors' is missing, and weight_map names it": {"a": "model-9.safetensors"},
    "weight_map.a must be text of at most 1000 characters, got 'xxx": {"a": "x" * 10**6},
}


@pytest.mark.parametrize("match", INDEX)
def test_an_index_that_cannot_be_followed_is_refused(tmp_path, match):
    source = write_hf(tmp_path / "hf", UNTIED)
    (source / "model.safetensors").unlink()
    values = {} if INDEX[match] is None else {"weight_map": INDEX[match]}
    (source / "model.safetensors.index.json").write_text(json.dumps(values))
    refused(source, InputError, f"index.json: {match}")


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    source = write_hf(tmp_path / "hf", UNTIED, shards=3)
    (source / "model.safetensors.index.json").unlink()
    for i in range(3):
        (source / f"model-{i}.safetensors").rename(source / f"model-{i + 1:05d}-of-00003.safetensors")
    assert_arrays(open_checkpoint(source), expected_arrays(UNTIED))
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, InputError, "expected model-00001-of-00003.safetensors to model-00003-of-00003.safetensors, found")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    source = write_hf(tmp_path / "hf", UNTIED, shards=2)
    first = load_file(source / "model-0.safetensors")
    save_file(first | load_file(source / "model-1.safetensors"), source / "model-1.safetensors")
    refused(source, InputError, "model-1.safetensors: duplicate tensor '.*': an earlier file holds it too")


# --- GGUF files that are refused ---


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (UnsupportedError, "architecture 'gemma2' is not supported; llama, qwen2", {"architecture": "gemma2"}),
        (InputError, "llama.rope.scaling.factor is missing", {"llama__rope__scaling__type": "linear"}),
        (UnsupportedError, "attn_factor=1.5 is not supported", {"llama__rope__scaling__attn_factor": 1.5}),
        (UnsupportedError, "dimension_count=4 is not supported; only 10 is", {"llama__rope__dimension_count": 4}),
        (UnsupportedError, "value_length=6 is not supported; only 10", {"llama__attention__value_length": 6}),
        (UnsupportedError, "expert_count=8 is not supported; only 0", {"llama__expert_count": 8}),
        (InputError, "split.count=2, and 'tiny-00001-of-00002.gguf' is not beside it; .* llama-gguf-split --merge", {"split__count": 2}),
        (UnsupportedError, "llama.attention.head_count_kv differs from", {"llama__attention__head_count_kv": [2, 2, 1]}),
        (InputError, "llama.block_count is missing; expected a whole number", {"llama__block_count": None}),
        (InputError, "llama.block_count must be a whole number of at most 1024, got 4000000000", {"llama__block_count": 4 * 10**9}),
        (InputError, "llama.attention.head_count must be a whole number of at least 1, got 0", {"llama__attention__head_count": 0}),
        (InputError, "llama.attention.head_count must be a whole number .* got 'six'", {"llama__attention__head_count": "six"}),
        (InputError, "llama.attention.layer_norm_rms_epsilon must be a number above 0, got nan", {"llama__attention__layer_norm_rms_epsilon": float("nan")}),
        (InputError, "general.alignment must be a whole number of at most", {"general__alignment": 2**31}),
        (InputError, "missing tensor blk.2.ffn_up.weight", {"weights": {"blk.2.ffn_up.weight": None}}),
        (InputError, "missing tensor token_embd.weight", {"weights": {"token_embd.weight": None}}),
        (UnsupportedError, "blk.0.ffn_up.bias' in .*: this network has none", {"weights": {"blk.0.ffn_up.bias": np.ones(14, np.float32)}}),
        (InputError, "missing tensor blk.0.attn_k.bias", {"weights": {"blk.0.attn_q.bias": np.ones(60, np.float32)}}),
    ],
)  # fmt: skip
def test_gguf_files_that_are_refused(tmp_path, error, match, changes):
    config = with_gguf_vocabulary(UNTIED)
    if "weights" in changes:
        weights = source_weights(config, 1) | changes["weights"]
        changes = changes | {"weights": {key: tensor for key, tensor in weights.items() if tensor is not None}}
    refused(write_gguf(tmp_path / "tiny.gguf", config, **changes), error, match)


def test_a_split_gguf_is_read_with_its_parts(tmp_path):
    config = with_gguf_vocabulary(UNTIED)
    weights = list(source_weights(config, 1).items())
    paths = [tmp_path / f"m-0000{i + 1}-of-00002.gguf" for i in range(2)]
    for path, part in zip(paths, (weights[::2], weights[1::2])):
        write_gguf(path, config, weights=dict(part), split__count=2)
    for path in paths:
        assert_arrays(open_checkpoint(path), expected_arrays(config))
    size = sum(path.stat().st_size for path in paths)
    assert open_checkpoint(paths[0]).source.endswith(f"({size} bytes)")
    write_gguf(paths[1], config, weights=dict(weights), split__count=2)
    refused(paths[0], InputError, "m-00002-of-00002.gguf: duplicate tensor '.*': an earlier part holds it too")
    paths[1].unlink()
    refused(paths[0], InputError, "split.count=2, and 'm-00002-of-00002.gguf' is not beside it")


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", with_gguf_vocabulary(TIED)).read_bytes()


def test_a_gguf_file_is_read_as_the_gguf_package_reads_it(tmp_path, whole_gguf):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole_gguf)
    metadata, tensors = read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == fields
    for tensor in reader.tensors:
        assert tensors[tensor.name].shape == tuple(tensor.shape.tolist()[::-1])
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name].read(), expected)


def test_a_gguf_file_that_is_cut_anywhere_is_refused(tmp_path, whole_gguf):
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 200), *range(200, len(whole_gguf), 997), len(whole_gguf) - 1]:
        cut.write_bytes(whole_gguf[:size])
        with pytest.raises(InputError, match="truncated or damaged|not a GGUF file"):
            read_gguf(cut)


ENDLESS = struct.pack("<Q", 10**15)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"GGUF\x03", b"GGUF\x01", "GGUF version 1; versions .2, 3. are read"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "duplicate 'blk.0.ffn_up.weight'"),
        (b"general.architecture\x08", b"general.architecture\x63", "truncated or damaged near byte .*unknown kind 99"),
        (b"<|end|>", b"<|\xff\xff\xff|>", "truncated or damaged"),
        (struct.pack("<IQ", 8, 260), struct.pack("<I", 8) + ENDLESS, "a list of 1000000000000000 items"),
        (struct.pack("<IQ", 8, 260), struct.pack("<IQ", 8, 2**24), "truncated or damaged"),
        (struct.pack("<IQ", 8, 260), struct.pack("<IQ", 9, 260), "a list of items of kind 9"),
        (b"output_norm.weight\1\0\0\0", b"output_norm.weight\xff\0\0\0", "a tensor of 255 dimensions"),
        (b"output_norm.weight\1\0\0\0" + struct.pack("<Q", 20), b"output_norm.weight\1\0\0\0" + ENDLESS, "a tensor of shape"),
        (b"output_norm.weight\1\0\0\0" + struct.pack("<Q", 20), b"output_norm.weight\1\0\0\0" + struct.pack("<Q", 2**31 - 1), "truncated or damaged"),
    ],
)  # fmt: skip
def test_a_damaged_gguf_file_is_refused_at_once(tmp_path, whole_gguf, old, new, match):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole_gguf.replace(old, new))
    assert old in whole_gguf
    refused(path, InputError, match)


@pytest.mark.parametrize("at", [8, 16])  # the numbers of tensors and of fields
def test_a_gguf_file_that_announces_more_than_it_has_is_refused_at_once(tmp_path, whole_gguf, at):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole_gguf[:at] + ENDLESS + whole_gguf[at + 8 :])
    refused(
        path, InputError, "truncated or damaged near byte [0-9]+ .([0-9]+ bytes announced, [0-9]+ left|a tensor of 0)"
    )


def test_a_big_endian_gguf_file_is_unsupported(tmp_path, whole_gguf):
    (tmp_path / "big.gguf").write_bytes(b"GGUF\0\0\0\3" + whole_gguf[8:])
    refused(tmp_path / "big.gguf", UnsupportedError, "a big-endian file; only little-endian GGUF files are read")


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (99, InputError, "tensor 'output_norm.weight': type 99 is not known, the file may be damaged or too new"),
        (int(gguf.GGMLQuantizationType.F64), UnsupportedError, "'output_norm.weight': type F64 is not dequantised"),
        (int(gguf.GGMLQuantizationType.Q4_0), InputError, "truncated or damaged .*not a multiple of Q4_0 block size"),
    ],
)
def test_an_unknown_gguf_type_is_named_when_the_file_is_opened(tmp_path, whole_gguf, code, error, match):
    name = b"output_norm.weight"
    at = whole_gguf.index(name) + len(name) + 4 + 8  # after the number of dimensions and the one dimension
    (tmp_path / "tiny.gguf").write_bytes(whole_gguf[:at] + code.to_bytes(4, "little") + whole_gguf[at + 4 :])
    refused(tmp_path / "tiny.gguf", error, match)


# --- Meta folders that are refused ---

META = UNTIED | {"vocab_size": 512}
PARAMS = {  # the sentence -> a change of params.json
    "a mixture of experts .moe. is not supported": {"moe": {"num_experts": 8}},
    "params.json: dim must be a whole number of at least 1, got '24'": {"dim": "24"},
    "params.json: n_heads must be a whole number of at least 1, got 0": {"n_heads": 0},
    "params.json: n_layers must be a whole number of at most 1024, got 1000000": {"n_layers": 10**6},
    "params.json: n_kv_heads must be a whole number of at least 1, got .2.": {"n_kv_heads": [2]},
    "params.json: norm_eps must be a number above 0, got 'x'": {"norm_eps": "x"},
    "params.json: use_scaled_rope must be true or false, got 'yes'": {"use_scaled_rope": "yes"},
    "params.json: rope_scaling_factor must be a number above 0, got -1": {"use_scaled_rope": True, "rope_scaling_factor": -1},
}  # fmt: skip


@pytest.mark.parametrize("match", PARAMS)
def test_a_params_json_that_makes_no_sense_is_refused(tmp_path, monkeypatch, match):
    meta_tensors(monkeypatch, meta_shards(META))
    error = UnsupportedError if "moe" in match else InputError
    refused(write_meta(tmp_path / "meta", META, **PARAMS[match]), error, match)


def test_meta_shards_that_do_not_fit_together_are_named(tmp_path, monkeypatch):
    parts, key = meta_shards(META, 2, split_rows=False), "layers.1.attention.wo.weight"
    source = write_meta(tmp_path / "meta", META, 2)
    changes = {
        f"missing tensor '{key}': only one of consolidated.00.pth and consolidated.01.pth": {key: None},
        rf"tensor '{key}' in consolidated.01.pth has shape \(24, 29\), expected \(24, 30\)": {key: np.ones((24, 29))},
    }
    for match, change in changes.items():
        second = {name: tensor for name, tensor in (parts[1] | change).items() if tensor is not None}
        meta_tensors(monkeypatch, [parts[0], second])
        refused(source, InputError, match)
    (source / "consolidated.01.pth").rename(source / "consolidated.02.pth")
    refused(source, InputError, r"expected consolidated.00.pth to consolidated.01.pth, found .*02.pth")
    (source / "consolidated.02.pth").unlink()
    meta_tensors(monkeypatch, parts[:1])  # half of a model
    refused(source, InputError, r"tok_embeddings.weight has shape \(512, 12\), expected \(512, 24\)")
    for change in ({"tok_embeddings.weight": np.ones(())}, {"tok_embeddings.weight": None}):
        first = {name: tensor for name, tensor in (parts[0] | change).items() if tensor is not None}
        meta_tensors(monkeypatch, [first])
        refused(source, InputError, r"tensor tok_embeddings.weight|missing tensor tok_embeddings.weight")


class Tensor(np.ndarray):
    """As much of a torch.Tensor as is asked for."""

    layout, device = "strided", SimpleNamespace(type="cpu")
    numel, element_size = (lambda self: self.size), (lambda self: self.itemsize)


@pytest.fixture
def pth(tmp_path, monkeypatch):
    """Has torch.load give, or raise, what the test puts into `.loaded`."""
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK\3\4" + bytes(60))
    pth = SimpleNamespace(path=tmp_path / "consolidated.00.pth", loaded={}, version="2.6.0+cpu")

    def load(path, **options):
        assert options == {"map_location": "cpu", "mmap": True, "weights_only": True}
        if isinstance(pth.loaded, Exception):
            raise pth.loaded
        return pth.loaded

    dtypes = {name: np.dtype(name) for name in ("float16", "float32")} | {"bfloat16": "bfloat16"}
    torch = SimpleNamespace(load=load, Tensor=Tensor, strided="strided", __version__="2.6.0+cpu", **dtypes)
    monkeypatch.setitem(sys.modules, "torch", torch)
    pth.torch = torch
    return pth


LOADED = {  # the sentence -> what torch.load gives
    "expected a dict of tensors, got list": [],
    "expected a dict of tensors, got dict for 'model'": {"model": {"w": 1}},
    "expected the names of tensors as keys, got 5 among 1": {5: np.ones(2).view(Tensor)},
    r"truncated or damaged \(file in archive is not in a subdirectory\)": RuntimeError("file in archive is not in a subdirectory\nx"),
    r"truncated or damaged \(AssertionError\)": AssertionError(),
    r"truncated or damaged \('utf-8' codec can't decode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    r"tensor 'w' has shape \(1000, 1000\), which is more than the file holds": {"w": np.broadcast_to(np.float32(1), (1000, 1000)).view(Tensor)},
}  # fmt: skip


@pytest.mark.parametrize("match", LOADED)
def test_a_pth_file_that_holds_no_tensors_is_refused(pth, match):
    pth.loaded = LOADED[match]
    with pytest.raises(InputError, match=f"consolidated.00.pth: {match}"):
        sources._load_pth(pth.path)


def test_a_pth_tensor_of_another_dtype_or_layout_is_unsupported(pth):
    pth.loaded = {"w": np.ones(2, np.int8).view(Tensor)}
    with pytest.raises(
        UnsupportedError, match="tensor 'w' is stored as int8; supported are float32, float16, bfloat16"
    ):
        sources._load_pth(pth.path)
    pth.loaded = {"w": np.ones(2, np.float32).view(Tensor)}
    pth.loaded["w"].layout = "sparse_coo"
    with pytest.raises(UnsupportedError, match="tensor 'w' is stored as sparse_coo on .*; only plain ones are read"):
        sources._load_pth(pth.path)


def test_a_pth_file_that_torch_cannot_load_safely_is_refused(pth, monkeypatch):
    pth.torch.__version__ = "2.5.1"
    with pytest.raises(InputError, match="torch 2.5.1 does not load it safely: pip install 'torch>=2.6'"):
        sources._load_pth(pth.path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="a PyTorch file, and torch is not installed: pip install torch"):
        sources._load_pth(pth.path)
    pth.path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(
        InputError, match="a file in torch's format of before 2020; load it with torch.load and save it"
    ):
        sources._load_pth(pth.path)
    pth.path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match="consolidated.00.pth: truncated or damaged .no zip file"):
        sources._load_pth(pth.path)


def test_a_meta_folder_is_read_through_torch(tmp_path):
    torch = pytest.importorskip("torch")
    config = TIED | {"vocab_size": 512}
    source = write_meta(tmp_path / "meta", config)
    file = source / "consolidated.00.pth"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = {key: torch.from_numpy(tensor).to(dtype) for key, tensor in source_weights(config, 2).items()}
        torch.save(tensors, file)
        stored = DTYPES[str(dtype).removeprefix("torch.")]
        checkpoint = open_checkpoint(source)
        assert_arrays(checkpoint, {key: array.astype(stored) for key, array in expected_arrays(config).items()}, stored)
    torch.save(dict.fromkeys(tensors, torch.zeros(1).expand(10**9, 10**9)), file)
    refused(source, InputError, "which is more than the file holds")
    torch.save({"model": tensors, "step": 5}, file)
    refused(source, InputError, "expected a dict of tensors, got dict for 'model'")
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    refused(source, InputError, "in torch's format of before 2020")
    torch.save(tensors, file)
    whole = file.read_bytes()
    for size in (10, 100, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:size])
        refused(source, InputError, "consolidated.00.pth: truncated or damaged")


# --- Any damage ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tiny.gguf"])
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path, name):
    source = write_hf(tmp_path / "hf", TIED)
    write_gguf(source / "tiny.gguf", with_gguf_vocabulary(TIED))
    path, rng = source / name, np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(300):
        changed = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 3000), rng.integers(1, 4)):
            changed[at] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            arrays_of(open_checkpoint(path if name == "tiny.gguf" else source))
        except InputError as error:
            assert len(str(error)) < 700
