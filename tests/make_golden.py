"""Makes the references in tests/golden/ with transformers and torch, so that the tests themselves need neither.

pip install torch transformers gguf accelerate
python tests/make_golden.py logits                 # logits of the small random LLaMAs of synthetic.py
python tests/make_golden.py models                 # the same of the small models of every architecture
python tests/make_golden.py perplexity MODEL.gguf  # the default model's float32 perplexity on the sample text
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from synthetic import HF_CONFIGS, MODELS, hf_weights, model_ids, stored_weights, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).with_name("golden")
SAMPLE = Path(__file__).parents[1] / "wikipedia_sample.txt"
WINDOWS = {
    "512": [0, 512, 3001],
    "2048": [1024],
    "4096": [2048],
}  # first token of each window of the sample text, by length


def make_logits() -> None:
    expected = {}
    for name, values in HF_CONFIGS.items():
        model = LlamaForCausalLM(LlamaConfig(**values)).eval()
        weights = {key: torch.from_numpy(tensor) for key, tensor in hf_weights(values).items()}
        result = model.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
        model.tie_weights()
        with torch.no_grad():
            expected[name] = model(torch.from_numpy(token_ids(name)).long()).logits.numpy()
        print(name, expected[name].shape, float(np.abs(expected[name]).max()))
    np.savez_compressed(GOLDEN / "logits.npz", **expected)


def make_models() -> None:
    """Logits [29, V] of every architecture and RoPE, and of a LongRoPE's first tokens, which are fewer than its original."""
    expected = {}
    for name, values in MODELS.items():
        config = AutoConfig.for_model(**json.loads(json.dumps(values)))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        weights = {key: torch.from_numpy(tensor) for key, tensor in stored_weights(values).items()}
        result = model.load_state_dict(weights, strict=False)
        assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
        model.tie_weights()
        for part, length in (("", 29), ("/start", 11)) if "longrope" in name else (("", 29),):
            with torch.no_grad():
                expected[name + part] = model(torch.from_numpy(model_ids(name)[:, :length]).long()).logits[0].numpy()
            print(name + part, expected[name + part].shape, float(np.abs(expected[name + part]).max()))
    np.savez_compressed(GOLDEN / "models.npz", **expected)


def make_perplexity(gguf: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(SAMPLE.read_text(encoding="utf-8"))["input_ids"])
    rows = []
    for length, starts in WINDOWS.items():
        for start in starts:
            window = ids[None, start : start + int(length)]
            with torch.no_grad():
                perplexity = float(torch.exp(model(window, labels=window).loss))
            rows.append({"start": start, "length": int(length), "perplexity": perplexity})
            print(rows[-1])
    path = GOLDEN / "smollm2_perplexity.json"
    path.write_text(json.dumps({"dtype": "float32", "windows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["logits", "models", "perplexity"])
    parser.add_argument("gguf", nargs="?", type=Path)
    args = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    make_perplexity(args.gguf) if args.what == "perplexity" else {"logits": make_logits, "models": make_models}[
        args.what
    ]()
