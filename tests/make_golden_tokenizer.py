"""Makes tests/golden/smollm2_tokenizer.json: the default model's ids of TEXTS by llama.cpp's rule, in plain Python.

The rule (pre-tokenizer smollm): every digit is a word of its own, what lies between is cut as GPT-2 cuts it, each word's
bytes are merged, best rank first. It shares nothing with weights/: neither regular expressions nor the tokenizers library.

pip install gguf
python tests/make_golden_tokenizer.py MODEL.gguf
"""

import argparse
import itertools
import json
import unicodedata
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden") / "smollm2_tokenizer.json"
TEXTS = {
    "prose": [
        "The river rises in the hills above the old town and reaches the sea after 346 kilometres.",
        "It's said that they'd never asked: who'll go, who won't, and what's the use? I'M NOT SURE, HE'S LATE.",
        "  Two spaces lead, and   three follow; the line ends with four.    ",
        "A dash - an em dash — “curly quotes” and an ellipsis… naïve café, Zürich, Đà Nẵng, coöperate.",
        "One.\n\nTwo paragraphs, with a tab\there and\r\na Windows line end.\n \n  \nEnd",
    ],
    "dates": [
        "On 14 March 1879 he was born; on 1955-04-18 he died.",
        "From 1939 to 1945, the 1960s, the 21st century, 09:30 on 31/12/99.",
        "In 1066, 1215,1492 and1776.",
        "2024-02-29T23:59:60Z, Q3 FY2025, 5 BC, AD 79",
        "Born 3. 5. 1921 in Brno (aged 78½), reigned 1837–1901.",
    ],
    "tables": [
        "| year | km    | share |\n|------|-------|-------|\n| 1999 | 1,024 | 12.5% |\n| 2000 | 00007 | -3.0% |\n",
        "name\tborn\tdied\nAda\t1815\t1852\nAlan\t1912\t1954\n",
        "a,b,c\n1,2,3\n10,20,30\n100,200,300\n",
        "    1      22     333    4444\n   55     666    7777   88888\n",
        "Total:      1 234 567.89 EUR\nVAT (19%):    197 530.86 EUR\n",
    ],
    "lists": [
        "1. First\n2. Second\n3. Third\n\n10. Tenth\n\n11. Eleventh",
        "- one\n- two\n  - two and a half\n* three\n",
        "(a) 1 (b) 22 (c) 333\n\n1) x\n\n2) y",
        "[1] Smith 2001, pp. 12–34.\n[2] Jones 2010, p. 5.\n[22] Lee, vol. 3",
        "Step 1: wait 10 s.\nStep 2: wait 20 s.\n\nStep 12: done.",
    ],
    "code": [
        "def f(x):\n    return x**2 + 10  # comment\n\n\nclass A:\n\tpass\n",
        "for (int i = 0; i <= 255; ++i) { a[i] <<= 2; } /* 0xFF */",
        '{"key": [1, 22, 333], "nested": {"null": null, "t": true}}',
        "camelCase snake_case kebab-case XMLHttpRequest v1.2.3-rc4 192.168.0.1 #ff8800",
        '<div class="x">&amp;</div> $E=mc^2$ \\frac{1}{2} http://example.org/a_b?id=42&q=%20',
    ],
    "CJK": [
        "日本語のテキスト、2024年5月17日です。",
        "我们在北京大学学习数学，成绩是98.6分！",
        "한국어 문장도 있습니다. 서울은 1,000만 명.",
        "全角１２３４５ と 半角12345、ｶﾀｶﾅ",
        "第一章　　はじめに\n\n第２章　「終わり」",
    ],
    "Arabic": [
        "بلغ عدد السكان ١٢٣٤٥٦ نسمة في عام ٢٠٢٠.",
        "اللغة العربية، ٣٫١٤ و 3.14؛ نعم؟",
        "مَرْحَبًا بِالعَالَمِ",
        "עברית: שלום עולם 1948",
        "हिन्दी में १०० रुपये, ไทย ๑๒๓",
    ],
    "emoji": [
        "😀😃 👍🏽 ❤️ ☕",
        "👩\u200d👩\u200d👧\u200d👦 family, 🇫🇷🇯🇵 flags",
        "5️⃣ 10️⃣ ①②③ ½ ² Ⅳ",
        "ok👍ok 👍 ok\n👍\n\n",
        "zero\u200bwidth no\u00a0break em\u2003space \ufeffbom \x00\x01\x7f",
    ],
}


def smollm_words(text: str) -> list[str]:
    """Digits one by one, then GPT-2's words of what lies between."""
    words = []
    for is_digit, run in itertools.groupby(text, lambda char: unicodedata.category(char)[0] == "N"):
        chars = list(run)
        words += chars if is_digit else gpt2_words("".join(chars))
    return words


def _kind(char: str) -> str:
    if char.isspace() and char not in "\x1c\x1d\x1e\x1f":
        return "space"
    return unicodedata.category(char)[0] if unicodedata.category(char)[0] in "LN" else "other"


def gpt2_words(text: str) -> list[str]:
    """Contractions, runs of letters, of numbers and of other signs, each with a space before it; else white space.

    White space before a word leaves its last character to the word, if that is a space, or alone.
    """
    words, place = [], 0
    while place < len(text):
        end = next(
            (place + len(c) for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(c, place)), None
        )
        if end is None:
            end = place + (text[place] == " " and place + 1 < len(text) and _kind(text[place + 1]) != "space")
            kind = _kind(text[end])
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
            if kind == "space" and end < len(text) and end - place > 1:
                end -= 1
        words.append(text[place:end])
        place = end
    return words


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    visible = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or b >= 0xAE]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """A word's tokens: of all neighbours the pair of the best rank becomes one, the leftmost first, until none is left."""
    parts = [LETTERS[byte] for byte in word.encode()]
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


LETTERS = byte_letters()


def ids_by_rule(text: str, tokens: list[str], merges: list[str], words=smollm_words) -> list[int]:
    """The ids of a text without special tokens."""
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    return [ids[part] for word in words(text) for part in merged(word, ranks)]


def main() -> None:
    from gguf import GGUFReader

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    fields = GGUFReader(parser.parse_args().gguf).fields
    tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    rows = [[kind, text, ids_by_rule(text, tokens, merges)] for kind, texts in TEXTS.items() for text in texts]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    GOLDEN.write_text(f'{{"tokens": {len(tokens)}, "texts": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
