"""Small random LLaMA checkpoints of every kind, for the tests and for the script that makes golden logits.

And what several test files run with: sizes, a connection.
"""

import base64
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Every axis has a size of its own, so that no mix-up of two goes unseen. Values are those of a Hugging Face config.json.
HF_CONFIGS = {
    "gqa_llama3_untied": dict(
        vocab_size=50, hidden_size=24, intermediate_size=14, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False,
    ),
    "gqa_default_tied": dict(
        vocab_size=41, hidden_size=20, intermediate_size=34, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    ),
    "mha_llama3_tied": dict(
        vocab_size=33, hidden_size=30, intermediate_size=22, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, head_dim=8, rope_parameters=LLAMA3_ROPE | {"factor": 8.0}, tie_word_embeddings=True,
    ),
}  # fmt: skip
for values in HF_CONFIGS.values():
    values |= dict(model_type="llama", max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu")
# One small model of every architecture, each with another RoPE; their words are those of a text of 29 tokens.
SIZES = dict(vocab_size=33, intermediate_size=14, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
SIZES |= dict(
    max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu", hidden_size=24, tie_word_embeddings=False
)
RUN_SIZES = [
    "--tile_size",
    "4",
    "--top_k",
    "3",
    "--seq_len",
    "30",
    "--dtype",
    "float32",
    "--n_runs",
    "2",
]  # of a whole run
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.25], "long_factor": [2.0, 9.0]}
MODELS = {
    "llama_bias_linear": SIZES | dict(
        model_type="llama", head_dim=10, attention_bias=True, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    ),
    "llama_dynamic": SIZES | dict(
        model_type="llama", head_dim=10, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral_window": SIZES | dict(
        model_type="mistral", head_dim=10, sliding_window=9, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen2_yarn": SIZES | dict(model_type="qwen2", rope_parameters=YARN | {"beta_fast": 4.0, "beta_slow": 0.5}, tie_word_embeddings=True),
    "qwen3_mscale": SIZES | dict(
        model_type="qwen3", head_dim=10, rope_parameters=YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 3.0, "truncate": False},
    ),
    "phi3_longrope": SIZES | dict(
        model_type="phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
    "smollm3_nope": SIZES | dict(
        model_type="smollm3", no_rope_layer_interval=2, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
}
SINGLE = "model.safetensors"
LENGTHS = {"gqa_llama3_untied": 61, "gqa_default_tied": 13, "mha_llama3_tied": 37}


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of a Hugging Face checkpoint's tensors, [out, in], by name."""
    D, F, V, family = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["model_type"]
    H = config.get("head_dim") or D // config["num_attention_heads"]
    NH, KH = (config[heads] * H for heads in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (NH, D), "self_attn.k_proj": (KH, D), "self_attn.v_proj": (KH, D),
            "self_attn.o_proj": (D, NH), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
        }.items():  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = shape
        biases = {"q_proj": NH, "k_proj": KH, "v_proj": KH} if family == "qwen2" or config.get("attention_bias") else {}
        biases |= {"o_proj": D} if config.get("attention_bias") else {}
        shapes |= {f"{prefix}self_attn.{name}.bias": (size,) for name, size in biases.items()}
        if family == "qwen3":
            shapes |= {f"{prefix}self_attn.{name}.weight": (H,) for name in ("q_norm", "k_norm")}
    return shapes


def hf_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors for `hf_shapes`, large enough that attention is far from flat."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.2 + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in hf_shapes(config).items()
    }


def stored_weights(config: dict) -> dict[str, np.ndarray]:
    """The same as the architecture's files hold them: Phi-3 fuses q, k and v, and gate and up."""
    weights = hf_weights(config)
    if config["model_type"] != "phi3":
        return weights
    for layer in range(config["num_hidden_layers"]):
        for fused, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            rows = [weights.pop(f"model.layers.{layer}.{part}.weight") for part in parts]
            weights[f"model.layers.{layer}.{fused}.weight"] = np.concatenate(rows)
    return weights


def model_ids(name: str) -> np.ndarray:
    """int32 [1, 29] for one of MODELS."""
    return np.random.default_rng(3).integers(0, MODELS[name]["vocab_size"], (1, 29), dtype=np.int32)


def token_ids(name: str) -> np.ndarray:
    """int32 [2, T] for one of HF_CONFIGS."""
    return np.random.default_rng(1).integers(0, HF_CONFIGS[name]["vocab_size"], (2, LENGTHS[name]), dtype=np.int32)


def write_hf_folder(folder: Path, name: str, **changes: object) -> Path:
    """A Hugging Face checkpoint of HF_CONFIGS[name]; its words are "w0", "w1", ...; `changes` go to its config."""
    return write_hf(folder, HF_CONFIGS[name], **changes)


def write_hf(folder: Path, config: dict, weights: dict | None = None, shards: int = 1, **changes: object) -> Path:
    """A Hugging Face checkpoint; its words are "w0", "w1", ...; `changes` go to config.json alone."""
    folder.mkdir(parents=True)
    architecture = f"{CLASSES[config['model_type']]}ForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]} | changes))
    weights = stored_weights(config) if weights is None else weights
    names = {key: f"model-{i % shards}.safetensors" if shards > 1 else SINGLE for i, key in enumerate(weights)}
    for file in set(names.values()):
        save_file({key: weights[key] for key in weights if names[key] == file}, folder / file)
    if shards > 1:
        (folder / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": names}))
    vocabulary = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def repeating_text(num_words: int, vocab_size: int = 41, times: int = 4) -> str:
    """Words that come several times in a row: a model with tied embeddings expects the word it has just read."""
    words = np.random.default_rng(2).integers(0, vocab_size, -(-num_words // times)).repeat(times)
    return " ".join(f"w{word}" for word in words[:num_words])


# --- Checkpoints of other programs: the same tensors under other names, in another order ---

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
EXTRA = {  # what some architectures have beside, by its whole name
    "attention/bq": ("self_attn.q_proj.bias", "attn_q.bias", "attention.wq.bias"),
    "attention/bk": ("self_attn.k_proj.bias", "attn_k.bias", "attention.wk.bias"),
    "attention/bv": ("self_attn.v_proj.bias", "attn_v.bias", "attention.wv.bias"),
    "attention/bo": ("self_attn.o_proj.bias", "attn_output.bias", "attention.wo.bias"),
    "attention/q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight", "attention.q_norm.weight"),
    "attention/k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight", "attention.k_norm.weight"),
}
TOP = {
    "tok_embeddings": ("model.embed_tokens", "token_embd", "tok_embeddings"),
    "norm": ("model.norm", "output_norm", "norm"),
    "output": ("lm_head", "output", "output"),
}
GGUF_FIELDS = {  # behind the architecture's name
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
META_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q and k rows as Meta and llama.cpp order them: a head's row 2i is its i, row 2i + 1 its i + H/2."""
    H = rows.shape[0] // heads
    order = [head * H + i + half * H // 2 for head in range(heads) for i in range(H // 2) for half in (0, 1)]
    return rows[order]


def source_weights(config: dict, kind: int, pairs: bool = True) -> dict[str, np.ndarray]:
    """The tensors of `hf_weights` under another source's names (1 GGUF, 2 Meta), in its row order.

    `pairs` says whether RoPE's pairs stand side by side in q and k.
    """
    weights, renamed = hf_weights(config), {}
    for names in TOP.values():
        if f"{names[0]}.weight" in weights:
            renamed[f"{names[kind]}.weight"] = weights[f"{names[0]}.weight"]
    for layer in range(config["num_hidden_layers"]):
        for ours, names in OURS.items():
            tensor = weights[f"model.layers.{layer}.{names[0]}.weight"]
            if pairs and ours in ("attention/wq", "attention/wk"):
                heads = config["num_attention_heads" if ours.endswith("q") else "num_key_value_heads"]
                tensor = interleaved(tensor, heads)
            renamed[f"{('blk', 'layers')[kind - 1]}.{layer}.{names[kind]}.weight"] = tensor
        for ours, names in EXTRA.items():
            tensor = weights.get(f"model.layers.{layer}.{names[0]}")
            if tensor is not None:
                heads = config["num_attention_heads" if ours.endswith("q") else "num_key_value_heads"]
                swapped = pairs and ours in ("attention/bq", "attention/bk")
                name = f"{('blk', 'layers')[kind - 1]}.{layer}.{names[kind]}"
                renamed[name] = interleaved(tensor, heads) if swapped else tensor
    return renamed


def fused_like_phi3(weights: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """GGUF tensors with q, k and v in one, and gate and up in one that has the name of up."""
    weights = dict(weights)
    for i in range(layers):
        rows = [weights.pop(f"blk.{i}.attn_{letter}.weight") for letter in "qkv"]
        weights[f"blk.{i}.attn_qkv.weight"] = np.concatenate(rows)
        rows = [weights.pop(f"blk.{i}.ffn_{name}.weight") for name in ("gate", "up")]
        weights[f"blk.{i}.ffn_up.weight"] = np.concatenate(rows)
    return weights


def expected_arrays(config: dict) -> dict[str, np.ndarray]:
    """What a conversion must hold, flat: {chunk/our/name: array}."""
    weights, expected = hf_weights(config), {}
    for ours, names in TOP.items():
        if f"{names[0]}.weight" in weights:
            tensor = weights[f"{names[0]}.weight"]
            expected[f"embeddings.pkl/{ours}"] = tensor.T if ours == "output" else tensor
    for layer in range(config["num_hidden_layers"]):
        for ours, names in OURS.items():
            expected[f"layer_{layer}.pkl/{ours}"] = weights[f"model.layers.{layer}.{names[0]}.weight"].T
        for ours, names in EXTRA.items():
            if f"model.layers.{layer}.{names[0]}" in weights:
                expected[f"layer_{layer}.pkl/{ours}"] = weights[f"model.layers.{layer}.{names[0]}"]
    return expected


def _byte_letters() -> str:
    """GPT-2's letter for each byte."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


def gpt2_fields(**changes: object) -> dict[str, object]:
    """A GGUF vocabulary of bytes with one merge, two special tokens and a user-defined one; None leaves a field out."""
    tokens = [*_byte_letters(), "he", "<|end|>", "<|start|>", "<tool>"]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [1] * 257 + [3, 3, 4]}
    fields |= {"merges": ["h e"], "eos_token_id": 257, "bos_token_id": 258, "add_bos_token": True}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items() if value is not None}


def with_gguf_vocabulary(config: dict) -> dict:
    """The config with room for the tokens of `gpt2_fields`."""
    return config | {"vocab_size": 263}


def write_gguf(
    path: Path, config: dict, kind: str = "F32", weights: dict | None = None, architecture: str = "llama", **metadata
) -> Path:
    """A GGUF file: matrices of GGML type `kind`, norms float32. `metadata` has __ for dots; None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    config = {"head_dim": config["hidden_size"] // config["num_attention_heads"]} | config
    fields = {f"{architecture}.{key}": config[name] for key, name in GGUF_FIELDS.items()} | gpt2_fields()
    fields[f"{architecture}.rope.freq_base"] = config["rope_parameters"]["rope_theta"]
    for key, value in (fields | {key.replace("__", "."): value for key, value in metadata.items()}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    ggml = gguf.GGMLQuantizationType[kind]
    for name, tensor in (source_weights(config, 1) if weights is None else weights).items():
        dtype = ggml if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_factors(config: dict) -> np.ndarray:
    """llama.cpp's rope_freqs.weight, as its converter computes it from a Hugging Face config."""
    rope, H = config["rope_parameters"], config["head_dim"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    old, factors = rope["original_max_position_embeddings"], []
    for i in range(0, H, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / H)
        smooth = (old / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if wavelength < old / high else rope["factor"] if wavelength > old / low else middle)
    return np.array(factors, np.float32)


def meta_shards(config: dict, shards: int = 1, split_rows: bool = True) -> list[dict[str, np.ndarray]]:
    """Meta's tensors in model-parallel parts; norms are whole in every part, and so is a table of RoPE frequencies."""
    columns = ("wo", "w2") if split_rows else ("wo", "w2", "tok_embeddings")
    parts = [{"rope.freqs": np.ones(config["head_dim"] // 2, np.float32)} for _ in range(shards)]
    for name, tensor in source_weights(config, 2).items():
        axis = 1 if name.split(".")[-2] in columns else 0
        for i in range(shards):
            parts[i][name] = np.split(tensor, shards, axis)[i] if tensor.ndim == 2 else tensor
    return parts


def write_meta(folder: Path, config: dict, shards: int = 1, **params: object) -> Path:
    """A Meta folder but for its tensors, which are PyTorch's: its consolidated.NN.pth are empty."""
    folder.mkdir()
    values = {key: config[name] for key, name in META_PARAMS.items()} | {"vocab_size": -1}
    values["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "params.json").write_text(json.dumps(values | params))
    for i in range(shards):
        (folder / f"consolidated.{i:02d}.pth").touch()
    words = [bytes([i]) for i in range(256)] + [b"he", b"xyz"]  # no merges lead to the last
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


class Connection:
    """One end of a pipe: gives the requests and keeps the answers."""

    def __init__(self, *requests):
        self.requests, self.answers = [*requests, None], []

    def recv(self):
        return self.requests.pop(0)

    def send(self, answer):
        self.answers.append(answer)
