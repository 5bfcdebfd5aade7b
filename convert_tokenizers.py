"""Rebuilds, for `transformers.AutoTokenizer`, the tokenizers that checkpoints hold in forms of their own.

Those are GGUF's metadata and Meta's tokenizer.model; transformers reads the first with torch only. convert_weights.py
puts the result beside the weights.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kascade_core import InputError

LLAMA3_SPLIT = (  # how LLaMA 3's vocabulary cuts text into words; GPT-2's way is built into the tokenizers library
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = dict.fromkeys(("default", "gpt-2", "smollm"))
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe"), LLAMA3_SPLIT)
NAMED_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types
LLAMA3_SPECIALS = (  # they follow the ranked tokens in this order; after them reserved ones to the vocabulary's end
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)


def gguf_tokenizer(metadata: Mapping[str, Any], vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Rebuilds a GGUF file's tokenizer, with the ids of transformers' `AutoTokenizer(gguf_file=)`, and its settings.

    Raises:
      InputError: an incomplete vocabulary, or one with more tokens than the model.
      NotImplementedError: a kind of vocabulary, or a way of cutting text into words, that is not known here.
    """
    prefix = "tokenizer.ggml."
    field = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    model = field.get("model")
    for key in ("model", "tokens", "merges" if model == "gpt2" else "scores"):
        if key not in field:
            raise InputError(f"GGUF metadata {prefix}{key} is missing")
    tokens = field["tokens"]
    if len(tokens) > vocab_size:
        raise InputError(f"the GGUF tokenizer has {len(tokens)} tokens, expected at most the model's {vocab_size}")
    ids = {name: field[f"{key}_token_id"] for name, key in NAMED_IDS.items() if f"{key}_token_id" in field}
    if any(i >= len(tokens) for i in ids.values()):
        raise InputError(f"GGUF special tokens {ids}: expected ids below {len(tokens)}")
    settings = {name: tokens[i] for name, i in ids.items()}
    if model == "gpt2":
        tokenizer = _gguf_byte_level(field, set(settings.values()))
    elif model == "llama":
        tokenizer = sentencepiece_tokenizer(tokens, field["scores"], field.get("merges"))
    else:
        raise NotImplementedError(f"GGUF tokenizer {model} is not supported; gpt2 and llama are")
    _add_gguf_tokens(tokenizer, field, settings)
    bos = settings.get("bos_token") if field.get("add_bos_token", model == "llama") else None
    _set_template(tokenizer, bos, settings.get("eos_token") if field.get("add_eos_token") else None)
    return tokenizer, settings | {"chat_template": metadata.get("tokenizer.chat_template")}


def _gguf_byte_level(field: Mapping[str, Any], raw: set[str]) -> Tokenizer:
    """A gpt2 vocabulary; tokens outside the byte alphabet are respelled in it, but for the `raw` ones."""
    name = field.get("pre", "default")
    if name not in PRE_TOKENIZERS:
        raise NotImplementedError(f"GGUF pre-tokenizer {name} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    alphabet = set(BYTE_LETTERS)
    spelled = (t if t in raw or set(t) <= alphabet else _spell(t.encode()) for t in field["tokens"])
    vocab = {token: i for i, token in enumerate(spelled)}
    return byte_level_tokenizer(vocab, _parse_merges(field["merges"], vocab), PRE_TOKENIZERS[name])


def _add_gguf_tokens(tokenizer: Tokenizer, field: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    tokens, types = field["tokens"], field.get("token_type", [])
    alphabet = set(BYTE_LETTERS)
    control = [t for t, kind in zip(tokens, types, strict=False) if kind == CONTROL]
    if field["model"] == "gpt2":  # others are mislabelled: real tokens there are spelled in bytes
        control = [token for token in control if set(token) <= alphabet]
    plain = [
        t
        for t, kind in zip(tokens, types, strict=False)
        if kind == USER_DEFINED and tokenizer.token_to_id(t) is not None
    ]
    _add_special(tokenizer, [*control, *settings.values()])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def _set_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes the tokenizer begin each text with `bos` and end it with `eos`."""

    def around(sequence: str, number: int) -> list[str]:
        return [f"{part}:{number}" for part in (bos, sequence, eos) if part is not None]

    special = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} - {None}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=special
    )


def byte_level_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], split: str | None, ignore_merges: bool = False
) -> Tokenizer:
    """A BPE over bytes written as letters; text is first cut into words by the regex `split`, or as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], merges: Sequence[str] | None = None
) -> Tokenizer:
    """A SentencePiece BPE of LLaMA 1 and 2: spaces are written as U+2581, unknown letters fall back to bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = _parse_merges(merges, vocab) if merges else _derive_merges(vocab, dict(zip(tokens, scores, strict=True)))
    tokenizer = Tokenizer(models.BPE(vocab, pairs, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer


def _parse_merges(merges: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(f"GGUF tokenizer: expected merges of two tokens into a third, got {pair}")
    return pairs


def _derive_merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first, then the one with the longer left and right part."""
    merges = [
        (score, cut, len(token) - cut, token)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(token[:cut], token[cut:]) for _, cut, _, token in merges]


def _byte_letters() -> str:
    """GPT-2's letter for each byte: visible Latin-1 letters stand for themselves, the rest follow from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


BYTE_LETTERS = _byte_letters()


def _spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)


def meta_tokenizer(folder: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Rebuilds the tokenizer.model in a Meta folder or beside it: ranked bytes (LLaMA 3) or SentencePiece (1 and 2)."""
    places = [folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.model in it or beside it")
    try:
        lines = (line.split() for line in path.read_bytes().splitlines())
        ranks = {_spell(base64.b64decode(token, validate=True)): int(rank) for token, rank in lines}
    except ValueError:  # not lines of base64 and a rank
        return _sentencepiece_model(path)
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(3, vocab_size))
    special = [*LLAMA3_SPECIALS, *reserved][: vocab_size - len(ranks)]
    if (least := len(ranks) + len(LLAMA3_SPECIALS)) > vocab_size:
        raise InputError(f"{path} makes at least {least} tokens with the special ones, expected at most {vocab_size}")
    merges = _derive_merges(ranks, {token: -rank for token, rank in ranks.items()})
    tokenizer = byte_level_tokenizer(ranks, merges, LLAMA3_SPLIT, ignore_merges=True)
    _add_special(tokenizer, special)
    _set_template(tokenizer, special[0], None)
    return tokenizer, {"bos_token": special[0], "eos_token": special[1]}


def _sentencepiece_model(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    from sentencepiece import SentencePieceProcessor  # only LLaMA 1 and 2 of Meta need it

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise InputError(f"{path} is neither a SentencePiece model nor LLaMA 3's ranked tokens") from error
    ids = range(model.vocab_size())
    tokenizer = sentencepiece_tokenizer([model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids])
    tokenizer.pre_tokenizer = None  # a normalizer instead, for SentencePiece puts its space before a leading one too
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    named = {"unk_token": model.unk_id(), "bos_token": model.bos_id(), "eos_token": model.eos_id()}
    settings = {name: model.id_to_piece(i) for name, i in named.items() if i >= 0}
    _add_special(tokenizer, list(settings.values()))
    _set_template(tokenizer, settings.get("bos_token"), None)
    return tokenizer, settings


def write_tokenizer(tokenizer: Tokenizer, settings: Mapping[str, Any], output: Path) -> None:
    """Writes the two files that `transformers.AutoTokenizer` needs."""
    settings = {name: value for name, value in settings.items() if value is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (output / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
