"""Reads pickles that hold plain data, and refuses all others: a pickle is a program, and this one may do no harm."""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Iterator
from typing import Any

from errors import InputError

MOST_INSTRUCTIONS = 1000  # of a chunk's pickle; one of LlamaModel's layers has about 150
NUMBERS = {  # instructions of a pickle whose argument is a number -> how it is written
    **{pickle.PROTO: "<B", pickle.FRAME: "<Q", pickle.BINGET: "<B"},
    **{pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H"},
}
COUNTED = {  # those whose argument is a number of bytes, and these bytes
    **{pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I"},
    **{pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"},
}
TUPLES = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}  # of so many items
PLAIN = {pickle.MARK, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.TUPLE, pickle.MEMOIZE, pickle.STOP}
MARK = object()  # on the stack: where the items of a dict or tuple begin


def unpickle(data: bytes) -> Any:
    """The object of a pickle that holds dicts, with text as keys, of tuples of text, whole numbers and bytes.

    This is not `pickle.load`, which a file can make run any code, and corrupt memory even where it may name numpy's
    classes alone. It knows the instructions that `pickle.dump` (protocol 4 and 5) uses for such objects, and refuses a
    file at any other. It allocates nothing by the file's word, and bytes are memoryviews of `data`: nothing is copied.

    Raises:
      InputError: another instruction, a claim of more bytes than there are, or a file that is damaged.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    try:
        for opcode, argument in _instructions(memoryview(data)):
            _execute(opcode, argument, stack, memo)
    except (IndexError, TypeError, ValueError) as error:  # an empty stack, or something else on it than is used
        if isinstance(error, InputError):
            raise
        raise InputError(f"damaged: {error}") from error
    if len(stack) != 1:
        raise InputError(f"damaged: its pickle ends with {len(stack)} objects, expected 1")
    return stack[0]


def _instructions(data: memoryview) -> Iterator[tuple[bytes, Any]]:
    """Each instruction with its argument, up to STOP, which must be the last byte."""
    at = 0
    for _ in range(MOST_INSTRUCTIONS):
        opcode, start, argument = bytes(data[at : at + 1]), at, None
        at += 1
        if layout := NUMBERS.get(opcode) or COUNTED.get(opcode):
            end = at + struct.calcsize(layout)
            if end > len(data):
                break
            (argument,), at = struct.unpack(layout, data[at:end]), end
            if opcode in COUNTED or opcode == pickle.FRAME:
                if argument > len(data) - at:
                    raise InputError(
                        f"damaged: {argument} bytes announced at byte {start}, and {len(data) - at} are left"
                    )
                if opcode in COUNTED:
                    argument, at = data[at : at + argument], at + argument
        elif opcode not in TUPLES and opcode not in PLAIN:
            if not opcode:
                break
            name = getattr(pickletools.code2op.get(opcode.decode("latin-1")), "name", opcode.hex())
            raise InputError(f"refused: its pickle has {name} at byte {start}, and only plain data is read")
        yield opcode, argument
        if opcode == pickle.STOP:
            if at != len(data):
                raise InputError(f"damaged: {len(data) - at} bytes after the end of its pickle")
            return
    else:
        raise InputError(f"refused: its pickle has more than {MOST_INSTRUCTIONS} instructions")
    raise InputError("damaged: its pickle ends too early")


def _execute(opcode: bytes, argument: Any, stack: list[Any], memo: list[Any]) -> None:
    if opcode in (pickle.SHORT_BINUNICODE, pickle.BINUNICODE):
        stack.append(str(argument, "utf-8"))
    elif opcode in COUNTED or opcode in (pickle.BININT, pickle.BININT1, pickle.BININT2):
        stack.append(argument)
    elif opcode == pickle.BINGET:
        stack.append(memo[argument])
    elif opcode == pickle.MEMOIZE:
        memo.append(stack[-1])
    elif opcode == pickle.MARK:
        stack.append(MARK)
    elif opcode == pickle.EMPTY_DICT:
        stack.append({})
    elif opcode in TUPLES:
        stack.append(_flat(_pop(stack, len(stack) - TUPLES[opcode])))
    elif opcode == pickle.TUPLE:
        stack.append(_flat(_pop_to_mark(stack)))
    elif opcode == pickle.SETITEM:
        _set_items(stack, _pop(stack, len(stack) - 2))
    elif opcode == pickle.SETITEMS:
        _set_items(stack, _pop_to_mark(stack))


def _pop(stack: list[Any], start: int) -> tuple[Any, ...]:
    """Takes what lies on the stack from `start` on."""
    items = tuple(stack[start:])
    if start < 0 or any(item is MARK for item in items):
        raise ValueError("it takes more than it has put there")
    del stack[start:]
    return items


def _pop_to_mark(stack: list[Any]) -> tuple[Any, ...]:
    mark = len(stack) - 1 - next(i for i, item in enumerate(reversed([MARK, *stack])) if item is MARK)
    items = _pop(stack, mark + 1)
    if stack.pop() is not MARK:
        raise ValueError("a mark is missing")
    return items


def _flat(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses what stands deeper than a shape in its array's tuple: tuples in tuples can grow without end."""
    inner = [part for item in items if type(item) is tuple for part in item]
    if any(type(part) in (dict, tuple) for part in inner) or any(type(item) is dict for item in items):
        raise ValueError("expected tuples of (dtype name, shape, bytes)")
    return items


def _set_items(stack: list[Any], items: tuple[Any, ...]) -> None:
    """Puts keys and values that lie in turn into the dict on the stack; other keys than text could hang their hash."""
    if type(stack[-1]) is not dict or len(items) % 2 or any(type(key) is not str for key in items[::2]):
        raise ValueError("expected a dict, and text as its keys")
    stack[-1].update(zip(items[::2], items[1::2]))
