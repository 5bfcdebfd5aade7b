"""Makes tests/golden/smollm2_tokenizer.json: what transformers reads out of the default model's GGUF file.

pip install torch transformers gguf
python tests/make_golden_tokenizer.py MODEL.gguf
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

GOLDEN = Path(__file__).with_name("golden") / "smollm2_tokenizer.json"
TEXTS = [
    "",
    " ",
    "   leading, trailing and double  spaces ",
    "Hello world, it's 1234 o'clock; don't you'd they'll I'M HE'S we've",
    "a 12  345\n\n6 7.89 1,000,000 0x1F ½ ² ٣٤٥ Ⅳ",
    "lines\n\n\nand\r\nmore\r\tlines\t\n  ",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "naïve café Ünïcödé a\u0301 ﬁ ß \u00a0nbsp\u2003em\u200bzero\ufeffbom",
    "日本語テキスト 中文 한국어 ไทย עברית العربية हिन्दी",
    "😀👍🏽👨‍👩‍👧‍👦 🇩🇪 \x00\x01\x7f",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>x<|im_start|",
    "<repo_name>a <filename>b<nope> Ġ Ċ ▁",
    "http://example.com/a?b=c&d=%20 $\\alpha^2$ ...!!!???---___",
    "ALLCAPS camelCase snake_case kebab-case " + "a" * 70,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    golden = {
        "tokens": len(tokenizer),
        "special": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "texts": [[text, tokenizer.encode(text)] for text in TEXTS],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
