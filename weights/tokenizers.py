"""The tokenizers of Hugging Face and Meta folders, by their own files; GGUF's are in gguf_tokenizers.py.

A tokenizer.json is used as it is; tokenizer.model, ranked tokens and vocab.json with merges.txt are rebuilt as one.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Tokenizer, normalizers, processors

from errors import InputError, UnsupportedError, quote
from weights.fields import Fields, in_file, read_json
from weights.gguf_tokenizers import GPT2, LLAMA3, QWEN2, from_gguf
from weights.sentencepiece_model import sentencepiece_tokenizer
from weights.text_tokenizer import (
    BYTE_LETTERS,
    FILE,
    PROBE,
    TextTokenizer,
    add_tokens,
    byte_level_tokenizer,
    call_library,
    checked,
    derive_merges,
    load_tokenizer,
    parse_merges,
    parse_tokenizer,
    read_bytes,
    set_template,
    write_tokenizer,
)
from weights.transformers_ids import ids_by_transformers

__all__ = ["PROBE", "TextTokenizer", "from_gguf", "from_hugging_face", "from_meta", "load_tokenizer", "write_tokenizer"]

CONFIG = "tokenizer_config.json"
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
BYTE_LEVEL_CLASSES = {  # of vocab.json and merges.txt: how they cut a text
    **dict.fromkeys((None, "GPT2Tokenizer", "GPT2TokenizerFast"), GPT2),
    **dict.fromkeys(("Qwen2Tokenizer", "Qwen2TokenizerFast"), QWEN2),
}
LLAMA3_SPECIALS = (  # they follow the ranked tokens in this order; after them reserved ones to the vocabulary's end
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)


# --- Hugging Face ---


def from_hugging_face(folder: Path, vocab_size: int) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder, by tokenizer.json, tokenizer.model, or vocab.json and merges.txt.

    tokenizer_config.json is asked only for what those do not say: BOS where there is no post-processor, the class of
    a vocab.json. No code beside the weights is run.

    Raises:
      InputError: no tokenizer, a file that cannot be used, or ids that the model has not.
      UnsupportedError: a tokenizer that only its own code could read, or that cannot be rebuilt exactly.
    """
    settings = _Settings(folder)
    warnings: list[str] = []
    if (path := folder / FILE).is_file():
        tokenizer = parse_tokenizer(path, read_bytes(path))
    elif (path := folder / "tokenizer.model").is_file():
        tokenizer = _from_model_file(path, vocab_size)
        _add_more_tokens(tokenizer, folder)
        if settings.bos_flag is False:
            set_template(tokenizer, None)
    elif (path := folder / "vocab.json").is_file() and settings.name in BYTE_LEVEL_CLASSES:
        tokenizer = _from_vocab_and_merges(folder, BYTE_LEVEL_CLASSES[settings.name])
        _add_more_tokens(tokenizer, folder)
    elif settings.needs_code or path.is_file():
        known = ", ".join(name for name in BYTE_LEVEL_CLASSES if name)
        raise UnsupportedError(
            f"{folder}: tokenizer class {quote(settings.name)} without a tokenizer.json is not supported (its code is "
            f"not run); {known} are"
        )
    else:
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    settings.add_bos(tokenizer, path, warnings)
    result = checked(tokenizer, str(path), vocab_size, warnings)
    return _compared(result, folder, settings) if path.name == FILE else result


class _Settings:
    """What tokenizer_config.json and special_tokens_map.json say that a tokenizer's own file does not."""

    def __init__(self, folder: Path):
        self.path, more = folder / CONFIG, folder / "special_tokens_map.json"
        fields = Fields(read_json(self.path) if self.path.is_file() else {})
        with in_file(self.path):
            if "add_special_tokens" in fields.values:
                raise InputError("add_special_tokens is no setting of a tokenizer; add_bos_token is")
            self.name = fields.text("tokenizer_class", None)
            self.needs_code = fields.values.get("auto_map") is not None
            self.bos_flag = fields.boolean("add_bos_token", None)
            named = {name: _token(fields, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        self.bos = named["bos_token"]
        if self.bos is None and more.is_file():
            fields = Fields(read_json(more))
            with in_file(more):
                self.bos = _token(fields, "bos_token")

    def add_bos(self, tokenizer: Tokenizer, path: Path, warnings: list[str]) -> None:
        """Puts BOS before the text where the tokenizer's own file says nothing of what stands there."""
        silent = tokenizer.post_processor is None or isinstance(tokenizer.post_processor, processors.ByteLevel)
        if not silent:
            begins = TextTokenizer(tokenizer).prefix != ()
            if self.bos_flag is not None and self.bos_flag != begins:
                said = str(self.bos_flag).lower()
                does = "puts special tokens" if begins else "puts nothing"
                warnings.append(f"{self.path} says add_bos_token {said}; {path.name} {does} before a text, as is done")
            return
        wanted = self.name in LLAMA_CLASSES if self.bos_flag is None else self.bos_flag
        if not wanted or (self.bos is None and self.bos_flag is None):
            return
        if self.bos is None or tokenizer.token_to_id(self.bos) is None:
            raise InputError(f"{self.path}: add_bos_token needs a bos_token of {path.name}, got {quote(self.bos)}")
        add_tokens(tokenizer, [self.bos])
        set_template(tokenizer, self.bos)


def _token(fields: Fields, name: str) -> str | None:
    """A special token, written as text or as an object with its content."""
    if isinstance(fields.values.get(name), dict):
        return fields.within(name).text("content")
    return fields.text(name, None)


def _compared(tokenizer: TextTokenizer, folder: Path, settings: _Settings) -> TextTokenizer:
    """Adds a warning where transformers gives other ids, as it rebuilds the tokenizers of some classes."""
    if settings.name in (None, "PreTrainedTokenizerFast", "TokenizersBackend") or settings.needs_code:
        return tokenizer
    other = ids_by_transformers(folder)
    if other is None or other == tokenizer.probe.ids:
        return tokenizer
    warning = (
        f"transformers reads the tokenizer of {folder} as {settings.name} and gives other ids ({len(other)} for a "
        f"probe text, tokenizer.json {len(tokenizer.probe.ids)}): those of tokenizer.json are used"
    )
    return TextTokenizer(tokenizer.backend, (*tokenizer.warnings, warning))


def _add_more_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds what added_tokens.json lists behind the vocabulary."""
    path = folder / "added_tokens.json"
    if not path.is_file():
        return
    tokens = read_json(path)
    if not all(type(i) is int for i in tokens.values()):
        raise InputError(f"{path}: expected a token id for each token, got {quote(tokens)}")
    for token, i in sorted(tokens.items(), key=lambda item: item[1]):
        if (known := tokenizer.token_to_id(token)) is None and token and i == tokenizer.get_vocab_size():
            add_tokens(tokenizer, [], [token])
        elif known != i:
            raise InputError(
                f"{path}: token {quote(token)} has id {quote(i)}, expected {known or tokenizer.get_vocab_size()}"
            )


def _from_vocab_and_merges(folder: Path, split: str) -> Tokenizer:
    """A byte-level BPE in the two files of its slow class."""
    vocab, path = read_json(folder / "vocab.json"), folder / "merges.txt"
    if not all(type(i) is int and 0 <= i < 1 << 32 for i in vocab.values()):
        raise InputError(f"{folder / 'vocab.json'}: expected a token id for each token, got {quote(vocab)}")
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})") from error
    merges = parse_merges([line for line in lines if line and not line.startswith("#version")], vocab, str(path))
    tokenizer = call_library(str(folder / "vocab.json"), byte_level_tokenizer, vocab, merges, (split,))
    if split == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


# --- Meta, and what both have ---


def from_meta(folder: Path, vocab_size: int) -> TextTokenizer:
    """Rebuilds the tokenizer.model in a Meta folder or beside it: ranked tokens (LLaMA 3) or SentencePiece (1 and 2).

    Raises:
      InputError: no such file, one that cannot be used, or more tokens than the model has.
      UnsupportedError: a SentencePiece model that cannot be rebuilt exactly.
    """
    places = [folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.model in it or beside it")
    return checked(_from_model_file(path, vocab_size), str(path), vocab_size)


def _from_model_file(path: Path, vocab_size: int) -> Tokenizer:
    data = read_bytes(path)
    ranks = _read_ranks(data)
    return sentencepiece_tokenizer(path, data) if ranks is None else _ranked_tokenizer(path, ranks, vocab_size)


def _read_ranks(data: bytes) -> dict[str, int] | None:
    """Tokens, spelled in BYTE_LETTERS, and their ranks 0, 1, ...; None if the lines are not base64 and a rank."""
    try:
        lines = [line.split() for line in data.splitlines()]
        ranks = {_spell(base64.b64decode(token, validate=True)): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        return None
    return ranks if ranks and list(ranks.values()) == list(range(len(lines))) else None


def _spell(token: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in token)


def _ranked_tokenizer(path: Path, ranks: dict[str, int], vocab_size: int) -> Tokenizer:
    """LLaMA 3's: the pair that makes the token of the lowest rank is merged first; special tokens follow the ranked."""
    if (least := len(ranks) + len(LLAMA3_SPECIALS)) > vocab_size:
        raise InputError(f"{path} makes at least {least} tokens with the special ones, expected at most {vocab_size}")
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(3, vocab_size))
    special = [*LLAMA3_SPECIALS, *reserved][: vocab_size - len(ranks)]
    merges = derive_merges({token: -rank for token, rank in ranks.items()})
    tokenizer = call_library(str(path), byte_level_tokenizer, ranks, merges, (LLAMA3,), ignore_merges=True)
    add_tokens(tokenizer, special)
    set_template(tokenizer, special[0])
    return tokenizer
