"""A SentencePiece tokenizer.model rebuilt for the tokenizers library, and compared with SentencePiece's own ids."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from errors import InputError, UnsupportedError, quote
from weights.text_tokenizer import (
    PROBE,
    SPACE,
    add_tokens,
    call_library,
    derive_merges,
    sentencepiece_bpe,
    sentencepiece_decoder,
    set_template,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a piece; 5 is unused, 6 a byte
UNIGRAM, BPE = 1, 2  # types of a model
UNKNOWN_PENALTY = 10.0  # below the lowest score; so do both libraries


@dataclasses.dataclass(frozen=True)
class Model:
    """What a tokenizer.model says, with the defaults of its format where it is silent."""

    pieces: list[tuple[str, float, int]]  # text, score, type
    kind: int
    byte_fallback: bool
    bos_id: int
    space_prefix: bool
    trims_spaces: bool
    suffix_spaces: bool
    charsmap: bytes


def sentencepiece_tokenizer(path: Path, data: bytes) -> Tokenizer:
    """Rebuilds a SentencePiece model; BOS stands before a text where the model has one.

    Raises:
      InputError: no SentencePiece model.
      UnsupportedError: a kind of model that is not rebuilt here, or whose ids come out otherwise.
    """
    from sentencepiece import SentencePieceProcessor  # only these files need it

    try:
        model = read_model(data)
        reference = SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, struct.error) as error:
        raise InputError(f"{path} is neither a SentencePiece model nor LLaMA 3's ranked tokens") from error
    if model.kind not in (UNIGRAM, BPE) or model.suffix_spaces:
        what = "spaces as suffixes" if model.suffix_spaces else f"type {model.kind}"
        raise UnsupportedError(
            f"{path} is a SentencePiece model with {what}, which is not supported; BPE and unigram are"
        )
    texts = [text for text, *_ in model.pieces]
    if len(set(texts)) < len(texts) or reference.vocab_size() != len(texts):
        raise InputError(f"{path}: a SentencePiece model must not have a piece twice")
    tokenizer = call_library(str(path), rebuild, model)
    _compare(path, tokenizer, reference, model)
    bos = texts[model.bos_id] if 0 <= model.bos_id < len(texts) and model.pieces[model.bos_id][2] == CONTROL else None
    add_tokens(tokenizer, [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)])
    set_template(tokenizer, bos)
    return tokenizer


def rebuild(model: Model) -> Tokenizer:
    """The same model in the tokenizers library; control tokens are not yet found in a text, as in SentencePiece."""
    unknown = next((i for i, (*_, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    user_defined = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    if model.kind == UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(_unigram_scores(model), unknown, model.byte_fallback))
        tokenizer.decoder = sentencepiece_decoder(model.space_prefix)
    else:
        mergeable = {text: score for text, score, kind in model.pieces if kind == NORMAL}
        vocab = {text: i for i, (text, *_) in enumerate(model.pieces)}
        unknown_text = None if unknown is None else model.pieces[unknown][0]
        tokenizer = sentencepiece_bpe(vocab, derive_merges(mergeable), unknown_text, model.space_prefix)
        tokenizer.model.byte_fallback = model.byte_fallback
    tokenizer.normalizer = _normalizer(model)
    if user_defined and model.kind == BPE:  # they are cut out first, and found as the whole pieces that they are
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
        tokenizer.model.ignore_merges = True
    return tokenizer


def _unigram_scores(model: Model) -> list[tuple[str, float]]:
    """SentencePiece never takes control and byte pieces from a text, and a user-defined one whenever it is there."""
    normal = [score for _, score, kind in model.pieces if kind == NORMAL]
    best, never = max([0.0, *normal]), min([0.0, *normal]) - UNKNOWN_PENALTY

    def score_of(text: str, score: float, kind: int) -> float:
        if kind == USER_DEFINED:
            return len(text.encode()) * best - 0.1
        return score if kind == NORMAL else never

    return [(text, score_of(text, score, kind)) for text, score, kind in model.pieces]


def _normalizer(model: Model) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.trims_spaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if model.space_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _compare(path: Path, tokenizer: Tokenizer, reference: Any, model: Model) -> None:
    """Raises UnsupportedError where the rebuilt tokenizer gives a text other ids than SentencePiece.

    The texts are PROBE, its lines, and every piece, between user-defined ones if there are any.
    """
    special = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    around = special[0] if special else ""
    lines = PROBE.split("\n")
    texts = [*lines, *(f" {line} " for line in lines), *special, *map(" a{0}b {0}{0}c".format, special), PROBE]
    texts += [f"{around}{text.replace(SPACE, ' ')}{around}" for text, _, kind in model.pieces if kind == NORMAL]
    ours = call_library(str(path), tokenizer.encode_batch, texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, reference.encode(texts), ours):
        if ids != encoding.ids:
            kind = {UNIGRAM: "unigram", BPE: "BPE"}[model.kind]
            raise UnsupportedError(
                f"{path}: this {kind} model could not be rebuilt exactly (SentencePiece gives other ids for "
                f"{quote(text)}); put the model's tokenizer.json beside it"
            )


# --- The file, in the wire format of protocol buffers ---


def read_model(data: bytes) -> Model:
    """Reads the parts of a SentencePiece ModelProto that decide the ids. Raises ValueError or struct.error."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_as_bytes(value)))
            score = struct.unpack("<f", _as_bytes(piece.get(2, b"\0\0\0\0")))[0]
            pieces.append((_as_bytes(piece.get(1, b"")).decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return Model(
        pieces,
        kind=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        bos_id=trainer.get(41, 1),
        space_prefix=bool(normalizer.get(3, 1)),
        trims_spaces=bool(normalizer.get(4, 1)),
        suffix_spaces=bool(trainer.get(24, 0)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
    )


def _as_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a string is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of one message: integers, or the bytes of everything else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}.get(wire, len(data) + 1)
        if place + size > len(data):
            raise ValueError("a field that goes beyond the end")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            break
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
    raise ValueError("a number without an end")
