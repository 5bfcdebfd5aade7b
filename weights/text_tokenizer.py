"""A run's tokenizer: stored as tokenizer.json beside the weights, checked when loaded, cheap on texts of any size.

The parts that rebuild a tokenizer out of other programs' files (tokenizers.py, gguf_tokenizers.py) share what stands
in the second half.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from errors import InputError, quote

FILE = "tokenizer.json"
SPACE = "\u2581"  # how SentencePiece writes a space
MAX_BYTES = 1 << 28  # a tokenizer file of more is none: the largest known has 40 MB
FIRST_READ = 8  # characters a wanted token that are read first: English has about 4 a token
MARGIN = 32  # tokens before a cut that may differ from the whole text's
FIX = "convert the checkpoint anew"
T = TypeVar("T")

# What every tokenizer is compared on: scripts, digits, code, spaces, line ends, combining marks, emoji. Never edit it
# without a new format version of the weights folder, whose manifests hold the hashes of its ids.
PROBE = """The survey of 1987 counted 12,345 birds (3.14 per square mile), didn't it? WE'VE seen; I'LL go, they'd, HE'S.
  Two leading spaces,   three inner ones, a\ttab\t\ttwo tabs, trailing ones   \n\n\nafter three line ends;\r\nWindows.
Names: Łódź, Zürich, São Paulo, Ærøskøbing, Đà Nẵng, Việt Nam, người, İstanbul, naïve café, cafe\u0301, ﬁne ﬂow, ½ ² Ⅳ.
Московский трамвай № 28 идёт до Чистых прудов; Ελληνικά: καλημέρα κόσμε, Ωμέγα; ქართული ენა; Հայերեն լեզու.
今日は2024年5月17日です。東京タワーの高さは333メートル。中文：我们在北京大学学习数学，
成绩是98.6分！한국어 문장도 있습니다. 台灣的人口約為23,420,442人、香港是7,413,070人。
العربية: بلغ عدد السكان ١٢٣٤٥٦ نسمة في عام ٢٠٢٠؛ עברית: שלום עולם; हिन्दी में १०० रुपये; বাংলা ভাষা; ภาษาไทย ไม่มี.
def area(radius: float) -> float:\n    \"\"\"Returns pi r**2.\"\"\"\n\tif radius < 0:\n\t\traise ValueError(radius)
    return 3.14159 * radius ** 2  # about\n\n\nfor (int i = 0; i <= n && x[i] != '\\0'; ++i) { sum += a[i] << 2; }
class Point<T> { constructor(private x: T) {} get X() { return this.x ?? null; } }  /* SELECT * FROM "t" WHERE id=7; */
| year | km    | share |\n|------|-------|-------|\n| 1999 | 1,024 | 12.5% |\n| 2000 | 00007 | -3.0% |
1. First\n2. Second\n10. Tenth\n- [ ] open\n- [x] done\nhttps://example.org/a_b/c-d?id=42&q=%C3%A9#top user@example.org
{"key": [1, 22, 333, 4444, 55555], "nested": {"null": null, "t": true}} $E = mc^2$, \\frac{a}{b} <p class="x">&amp;</p>
camelCase, snake_case, SCREAMING_CASE, kebab-case, XMLHttpRequest, v1.2.3-rc4, 0xDEADBEEF, 1e-5, 192.168.0.1, #ff8800.
😀😃 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇫🇷🇯🇵 ❤️ ☕ → ≤ ≠ ∑ √ € £ ¥ ₹ © ™ … — – “quoted” ‘single’ «guillemets» 「鍵」 ¿qué?
no\u00a0break, em\u2003space, zero\u200bwidth, soft\u00adhyphen, line\u2028separator, wide\u3000space,
ἐν ἀρχῇ ἦν ὁ λόγος; தமிழ், తెలుగు, ខ្មែរ, አማርኛ, ᏣᎳᎩ, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛, Å Å ﾊﾝｶｸ ＡＢＣ１２３
~`^| += <> '' "" ``code`` \u202eright\u202c. 1st, 2nd, 3rd, 100th; 5'10", 37°C, 2^10=1024, §4(b)(ii), 50/50,
24/7, A4, B-52, C3PO, H2O, CO₂, x² + y³.
........ -------- ======== !!!??? aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                           000000000000000001
"""


def call_library(what: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Calls the tokenizers library, whose errors have no class of their own.

    Raises:
      InputError: `what` (a file) and the library's reason.
    """
    try:
        return call(*arguments, **options)
    except BaseException as error:  # it raises Exception itself, and a Rust panic is a BaseException
        if not (isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"):
            raise  # Ctrl-C
        raise InputError(f"{what} cannot be used by the tokenizers library: {quote(str(error).strip())}") from error


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    `warnings` is what the conversion says to its user about the ids, one sentence each.
    """

    backend: Tokenizer
    warnings: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The text's ids alone: nothing is put before or behind it. Raises InputError for what is no Unicode text."""
        return call_library("the text", self.backend.encode, text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are spelled out."""
        return call_library("these ids", self.backend.decode, list(ids), skip_special_tokens=False)

    @functools.cached_property
    def probe(self) -> Encoding:
        """PROBE, encoded with what the tokenizer puts around a text. Raises InputError where that changes its ids."""
        full = call_library("the file", self.backend.encode, PROBE)
        before, text = _leading(full.special_tokens_mask), self.encode(PROBE)
        if not text or full.ids[before : before + len(text)] != text:
            raise InputError("the tokenizer is not usable: its post-processor changes the ids of the text itself")
        return full

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that stand before every text: encode(x) up to where x's own ids begin."""
        return tuple(self.probe.ids[: _leading(self.probe.special_tokens_mask)])

    @property
    def prefix_text(self) -> str:
        """The prefix as tokens, such as "<s>"; "" if there is none."""
        return "".join(self.backend.id_to_token(i) or "" for i in self.prefix)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones too."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def probe_sha256(self) -> str:
        """Hex SHA-256 of PROBE's ids with what stands around them, written as decimal numbers with commas."""
        return hashlib.sha256(",".join(map(str, self.probe.ids)).encode("ascii")).hexdigest()

    def encode_first(self, text: str | TextIO, needed: int) -> list[int]:
        """The first `needed` ids of a text, or all of them where it has fewer.

        Reads and encodes about as many characters as these ids stand for, whatever the text's length: a prefix that
        doubles until it is long enough. It ends before a space if one is near, and MARGIN ids at its end are not used.

        Args:
          text: a text, or a text file opened for reading.
          needed: ids that are wanted, at least 1.
        """
        stream = io.StringIO(text, newline="") if isinstance(text, str) else text
        read, size = "", FIRST_READ * (needed + MARGIN)
        while True:
            part = stream.read(size - len(read))
            read += part
            whole = len(read) < size
            ids = self.encode(read if whole else _cut(read))
            if whole or len(ids) >= needed + MARGIN:
                return ids[:needed]
            size *= 2


def _leading(mask: Sequence[int]) -> int:
    """How many ones a mask begins with."""
    return next((i for i, special in enumerate(mask) if not special), len(mask))


def _cut(text: str) -> str:
    """`text` up to its last word, where a space stands among the last 1000 characters.

    No token reaches over it; within a word or number a cut can change tokens far before it.
    """
    place = max((match.start() for match in re.finditer(r"\S ", text[-1000:])), default=None)
    return text if place is None else text[: max(len(text) - 1000, 0) + place + 1]


# --- The stored file ---


def write_tokenizer(tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """Writes tokenizer.json and reads it back.

    Returns:
      the manifest's entry: file, bytes, sha256, and probe_sha256, the hash of PROBE's ids.
    """
    data = call_library("the tokenizer", tokenizer.backend.to_str).encode("utf-8")
    (folder / FILE).write_bytes(data)
    entry = {"file": FILE, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    entry["probe_sha256"] = tokenizer.probe_sha256()
    load_tokenizer(folder, entry)
    return entry


def load_tokenizer(folder: Path, entry: Mapping[str, Any]) -> TextTokenizer:
    """The tokenizer of a weights folder, by its manifest's entry.

    Raises:
      InputError: a file that is missing or altered, or a library that gives other ids than at the conversion.
    """
    wanted = {"file": str, "bytes": int, "sha256": str, "probe_sha256": str}
    if not isinstance(entry, Mapping) or any(type(entry.get(key)) is not kind for key, kind in wanted.items()):
        raise InputError(f"{folder}: the manifest's tokenizer must have {', '.join(wanted)}, got {quote(entry)}; {FIX}")
    if entry["file"] != FILE:
        raise InputError(f"{folder}: the manifest's tokenizer must be {FILE}, got {quote(entry['file'])}; {FIX}")
    path = folder / FILE
    data = read_bytes(path)
    if (len(data), hashlib.sha256(data).hexdigest()) != (entry["bytes"], entry["sha256"]):
        raise InputError(f"{path} is not the file that was converted (its size or SHA-256 differs); {FIX}")
    tokenizer = TextTokenizer(parse_tokenizer(path, data))
    if tokenizer.probe_sha256() != entry["probe_sha256"]:
        raise InputError(f"{path}: the installed tokenizers library gives other ids than at the conversion; {FIX}")
    return tokenizer


def read_bytes(path: Path) -> bytes:
    """A tokenizer file's contents. Raises InputError where it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES} of a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def parse_tokenizer(path: Path, data: bytes) -> Tokenizer:
    """A tokenizer.json, without the cutting and padding that some of them ask for. Raises InputError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from error
    tokenizer = call_library(str(path), Tokenizer.from_str, text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# --- What the readers of other programs' tokenizers share ---


def checked(tokenizer: Tokenizer, where: str, vocab_size: int, warnings: Sequence[str] = ()) -> TextTokenizer:
    """Makes a TextTokenizer for a model of `vocab_size` tokens.

    Raises:
      InputError: ids of the probe text, or of what stands before a text, that the model has not. Other tokens that it
        has not are a warning.
    """
    result = TextTokenizer(tokenizer, tuple(warnings))
    try:
        largest = max(result.probe.ids)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if largest >= vocab_size:
        raise InputError(f"{where} gives token id {largest}, expected ids below the model's vocabulary of {vocab_size}")
    beyond = {token: i for token, i in tokenizer.get_vocab(with_added_tokens=True).items() if i >= vocab_size}
    if not beyond:
        return result
    first = min(beyond, key=beyond.__getitem__)
    warning = (
        f"{where} has {len(beyond)} tokens that the model has not, such as {quote(first)}: a text must not hold them"
    )
    return dataclasses.replace(result, warnings=(*result.warnings, warning))


def byte_level_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], splits: Sequence[str], ignore_merges: bool = False
) -> Tokenizer:
    """A BPE over bytes written as letters (`BYTE_LETTERS`).

    Args:
      vocab: token to id.
      merges: best first.
      splits: regular expressions; each cuts the pieces of the one before it into what it matches and what it does not.
      ignore_merges: a piece that is a token is that token, even if no merges lead to it.

    Raises:
      InputError: a vocabulary without the bytes of PROBE, for the library would drop them without a word.
    """
    if missing := {BYTE_LETTERS[byte] for byte in PROBE.encode()} - vocab.keys():
        raise InputError(f"a byte-level vocabulary needs a token for each byte, {len(missing)} are missing")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_tokens(tokenizer: Tokenizer, special: Sequence[str], plain: Sequence[str] = ()) -> None:
    """Makes tokens be found in a text as they are, before it is cut; `special` ones are control tokens."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def set_template(tokenizer: Tokenizer, bos: str | None, eos: str | None = None) -> None:
    """Makes the tokenizer begin each text with `bos` and end it with `eos`."""

    def around(sequence: str, number: int) -> list[str]:
        return [f"{part}:{number}" for part in (bos, sequence, eos) if part is not None]

    special = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} - {None}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=special
    )


def derive_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first, then the one with the longer left part."""
    merges = [
        (score, cut, token)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, token in merges]


def parse_merges(merges: Sequence[str], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Merges written as two tokens with a space between. Raises InputError for others, or for tokens that are not."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise InputError(f"{where}: expected two tokens that make a third, got {quote(merge)}")
        pairs.append((left, right))
    return pairs


def sentencepiece_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, space_prefix: bool
) -> Tokenizer:
    """A BPE of SentencePiece: spaces are written as U+2581, letters that are no token as bytes or as `unknown`.

    With `space_prefix` a space is put before the text, and before what follows a special token.
    """
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend(SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = sentencepiece_decoder(space_prefix)
    return tokenizer


def sentencepiece_decoder(space_prefix: bool) -> decoders.Decoder:
    """Undoes what SentencePiece does to spaces and bytes."""
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, *([decoders.Strip(content=" ", left=1)] if space_prefix else [])])


def _byte_letters() -> str:
    """GPT-2's letter for each byte: visible Latin-1 letters stand for themselves, the rest follow from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


BYTE_LETTERS = _byte_letters()
