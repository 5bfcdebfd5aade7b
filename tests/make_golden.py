"""Makes the references in tests/golden/ with transformers and torch, so that the tests themselves need neither.

pip install torch transformers gguf accelerate
python tests/make_golden.py logits                 # logits of the small random LLaMAs of synthetic.py
python tests/make_golden.py perplexity MODEL.gguf  # the default model's float32 perplexity on the sample text
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from synthetic import HF_CONFIGS, hf_weights, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    parser.add_argument("what", choices=["logits", "perplexity"])
    parser.add_argument("gguf", nargs="?", type=Path)
    args = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    make_logits() if args.what == "logits" else make_perplexity(args.gguf)
