"""Small random LLaMA checkpoints, the same for the script that makes golden logits and for the tests that use them."""

import json
from pathlib import Path

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
LENGTHS = {"gqa_llama3_untied": 61, "gqa_default_tied": 13, "mha_llama3_tied": 37}


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of a Hugging Face checkpoint's tensors, [out, in], by name."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    NH, KH = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
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
    return shapes


def hf_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors for `hf_shapes`, large enough that attention is far from flat."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in hf_shapes(config).items()
    }


def token_ids(name: str) -> np.ndarray:
    """int32 [2, T] for one of HF_CONFIGS."""
    return np.random.default_rng(1).integers(0, HF_CONFIGS[name]["vocab_size"], (2, LENGTHS[name]), dtype=np.int32)


def write_hf_folder(folder: Path, name: str, **changes: object) -> Path:
    """A Hugging Face checkpoint of HF_CONFIGS[name]; its words are "w0", "w1", ...; `changes` go to its config."""
    config = HF_CONFIGS[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]} | changes))
    save_file(hf_weights(config), folder / "model.safetensors")
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
