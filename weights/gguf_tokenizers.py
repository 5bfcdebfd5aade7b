"""GGUF's tokenizers by llama.cpp's rules: what the metadata `tokenizer.ggml.*` says, and what its absence means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from errors import InputError, UnsupportedError, quote
from weights.fields import Fields
from weights.text_tokenizer import (
    TextTokenizer,
    add_tokens,
    byte_level_tokenizer,
    call_library,
    checked,
    derive_merges,
    parse_merges,
    sentencepiece_bpe,
    set_template,
)

PREFIX = "tokenizer.ggml."
LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # of a llama vocabulary that does not name them
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # GGUF's token types that are found in a text as they are
DIGIT, DIGITS, THREE = r"\p{N}", r"\p{N}+", r"[0-9][0-9][0-9]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = _CONTRACTIONS + _AFTER % r"\p{N}{1,3}"
QWEN2 = _CONTRACTIONS + _AFTER % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (  # as trained; llama.cpp's std::regex cannot tell the case of letters past ASCII
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (  # letters with an upper and a lower case, as deepseek-llm counts them
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _EAST_ASIAN,
    DIGITS,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, DIGIT)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before merging, and what holds where the file does not say.

    splits: regular expressions, applied one after the other to the pieces of the one before.
    ignore_merges: a piece that is a token is that token.
    add_bos: whether a text begins with BOS if the file says nothing.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, THREE)),
    **dict.fromkeys(("gpt-2", "olmo"), PreTokenizer((GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact"), PreTokenizer((DIGIT, GPT2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), PreTokenizer((LLAMA3,), True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), PreTokenizer((QWEN2,))),
    "tekken": PreTokenizer((TEKKEN,), True, True),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
}


def from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> TextTokenizer:
    """Rebuilds a GGUF file's tokenizer.

    Args:
      metadata: the file's keys and values; of them those that begin with tokenizer.ggml.
      vocab_size: the model's.

    Raises:
      InputError: metadata that is missing or of a wrong kind, or more tokens than the model has.
      UnsupportedError: a kind of vocabulary, or a way of cutting text, that is not known here.
    """
    fields = Fields({key.removeprefix(PREFIX): value for key, value in metadata.items()}, PREFIX)
    model, warnings = fields.text("model"), []
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(f"{PREFIX}model {quote(model)} is not supported; gpt2 and llama are")
    tokens = _read_tokens(fields, vocab_size)
    tokenizer, name, add_bos = (_byte_level if model == "gpt2" else _sentencepiece)(fields, tokens, warnings)
    ends = {}
    for key, default in (("bos", add_bos), ("eos", False)):
        needed = fields.boolean(f"add_{key}_token", default)
        token = _named_token(fields, key, tokens, LLAMA_IDS if model == "llama" else {}, needed, warnings)
        ends[key] = token if needed else None
        if token is not None:
            add_tokens(tokenizer, [token])
    _add_listed_tokens(tokenizer, fields, tokens)
    set_template(tokenizer, ends["bos"], ends["eos"])
    return checked(tokenizer, f"the GGUF file's tokenizer ({name})", vocab_size, warnings)


def _named_token(
    fields: Fields, name: str, tokens: list[str], defaults: Mapping[str, int], needed: bool, warnings: list[str]
) -> str | None:
    """The token that bos, eos or unknown names. An id out of range is an error if needed, else a warning."""
    key = f"{name}_token_id"
    number = fields.integer(key, low=0, default=defaults.get(name))
    if number is not None and number < len(tokens):
        return tokens[number]
    if number is not None:
        problem = f"{PREFIX}{key} must be below the number of tokens, {len(tokens)}, got {quote(number)}"
        if needed:
            raise InputError(problem)
        warnings.append(f"{problem}; it is not used")
    elif needed:
        raise InputError(f"{PREFIX}{key} is missing, and each text is to have that token")
    return None


def _list(fields: Fields, name: str, kinds: tuple[type, ...], length: int) -> list[Any] | None:
    """A list of numbers of some kinds, at least `length`, or None. Raises InputError."""
    values = fields.values.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) in kinds and value == value for value in values):
        raise fields.refused(name, f"a list of {'numbers' if float in kinds else 'whole numbers'}")
    if len(values) < length:
        raise InputError(f"{PREFIX}{name} has {len(values)} values, expected one for each of {length} tokens")
    return values


def _read_tokens(fields: Fields, vocab_size: int) -> list[str]:
    tokens = fields.texts("tokens")
    if len(tokens) > vocab_size:
        raise InputError(f"the GGUF tokenizer has {len(tokens)} tokens, expected at most the model's {vocab_size}")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise InputError(f"{PREFIX}tokens has {quote(token)} twice, as {ids[token]} and {i}")
    return tokens


def _byte_level(fields: Fields, tokens: list[str], warnings: list[str]) -> tuple[Tokenizer, str, bool]:
    """The tokenizer of a gpt2 vocabulary, its pre-tokenizer's name, and whether BOS is added if nothing says so."""
    name = fields.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"GGUF pre-tokenizer {quote(name)} is not supported; {supported} are")
    if name == "default":
        warnings.append(
            f"the GGUF file does not name its pre-tokenizer ({PREFIX}pre): llama.cpp's default is used, and a "
            "vocabulary made for another, as LLaMA 3's is, gives other ids than in training, hence a worse perplexity"
        )
    rule = PRE_TOKENIZERS[name]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = parse_merges(fields.texts("merges"), vocab, f"{PREFIX}merges")
    build = call_library("the GGUF vocabulary", byte_level_tokenizer, vocab, merges, rule.splits, rule.ignore_merges)
    return build, name, rule.add_bos


def _sentencepiece(fields: Fields, tokens: list[str], warnings: list[str]) -> tuple[Tokenizer, str, bool]:
    """The same for a llama vocabulary: a SentencePiece BPE whose merges are those that make the best-scored token."""
    scores = _list(fields, "scores", (float, int), len(tokens))
    if scores is None:
        raise InputError(f"{PREFIX}scores is missing; expected a list of numbers")
    unknown = _named_token(fields, "unknown", tokens, LLAMA_IDS, True, warnings)
    space = fields.boolean("add_space_prefix", True)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = derive_merges(dict(zip(tokens, scores)))
    return call_library("the GGUF vocabulary", sentencepiece_bpe, vocab, merges, unknown, space), "llama", True


def _add_listed_tokens(tokenizer: Tokenizer, fields: Fields, tokens: list[str]) -> None:
    """Control, unknown and user-defined tokens are found in a text as they are."""
    types = _list(fields, "token_type", (int,), len(tokens)) or []
    special = [token for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL)]
    add_tokens(tokenizer, special, [token for token, kind in zip(tokens, types) if kind == USER_DEFINED])
