"""Reads the GGUF container (ggml's docs/gguf.md): metadata and tensors, every length held against the file's size."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import InputError, UnsupportedError, quote
from weights.fields import LARGEST, Fields, in_file

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # kind -> struct
TEXT, ARRAY = 8, 9  # the other kinds
MOST_ITEMS = 2**24  # of an array: a vocabulary has less than a million tokens
MOST_DIMENSIONS = 4
LONGEST_ALIGNMENT = 2**20


class GgufTensor(NamedTuple):
    """A tensor as it is stored: its GGML type, its shape [out, in], and its bytes, uint8 [out, bytes of a row]."""

    kind: Any
    shape: tuple[int, ...]
    data: np.ndarray

    def read(self) -> np.ndarray:
        """Its values, float32."""
        import gguf

        return gguf.dequantize(self.data, self.kind)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Opens a GGUF file: its metadata, and its (memory-mapped) tensors by name.

    Raises:
      InputError: not a GGUF file, or one that is truncated, damaged, or of another version than 2 and 3.
      UnsupportedError: a big-endian file, or a tensor of a type that is not dequantised.
    """
    with in_file(path):
        with path.open("rb") as file:
            start = file.read(8)
        if start[:4] != b"GGUF":
            raise InputError("not a GGUF file (it does not begin with GGUF)")
        if start[4:6] == b"\0\0" and start[6:]:
            raise UnsupportedError("a big-endian file; only little-endian GGUF files are read")
        reader = _Reader(np.asarray(np.memmap(path, mode="r")))
        try:
            return reader.read()
        except (struct.error, ValueError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"truncated or damaged near byte {reader.at} ({error})") from error


class _Reader:
    """Goes through a GGUF file from its beginning."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 4

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self.number("I")
        if version not in VERSIONS:
            raise InputError(f"GGUF version {version}; versions {VERSIONS} are read")
        num_tensors, num_fields = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            self.put(metadata, self.text(), self.value(self.number("I")))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            self.put(infos, self.text(), (self.shape(), self.number("I"), self.number("Q")))
        alignment = Fields(metadata).integer("general.alignment", high=LONGEST_ALIGNMENT, default=32)
        start = -(-self.at // alignment) * alignment
        return metadata, {name: self.tensor(name, start, *info) for name, info in infos.items()}

    def put(self, values: dict[str, Any], name: str, value: Any) -> None:
        if name in values:
            raise InputError(f"duplicate {quote(name)}")
        values[name] = value

    def take(self, size: int) -> np.ndarray:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes announced, {len(self.data) - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")).tobytes(), "utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        raise ValueError(f"metadata of unknown kind {kind}")

    def array(self, kind: int, size: int) -> list[Any]:
        if size > MOST_ITEMS:
            raise ValueError(f"a list of {size} items, expected at most {MOST_ITEMS}")
        if kind in SCALARS:
            return self.take(size * struct.calcsize(SCALARS[kind])).view(f"<{SCALARS[kind]}").tolist()
        if kind != TEXT:
            raise ValueError(f"a list of items of kind {kind}")
        return [self.text() for _ in range(size)]

    def shape(self) -> tuple[int, ...]:
        """A tensor's, [out, in]; the file has it the other way round."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if not all(1 <= size <= LARGEST for size in shape):
            raise ValueError(f"a tensor of shape {shape}")
        return shape

    def tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        import gguf  # takes 0.1 s, which --help need not wait for

        try:
            ggml = gguf.GGMLQuantizationType(kind)
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[ggml][1], np.uint8), ggml)
        except ValueError as error:
            raise InputError(
                f"tensor {quote(name)}: type {kind} is not known, the file may be damaged or too new"
            ) from error
        except NotImplementedError as error:
            raise UnsupportedError(f"tensor {quote(name)}: type {ggml.name} is not dequantised here") from error
        shape_in_bytes = gguf.quant_shape_to_byte_shape(shape, ggml)
        self.at = start + offset
        return GgufTensor(ggml, shape, self.take(math.prod(shape_in_bytes)).reshape(shape_in_bytes))
