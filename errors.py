"""What goes wrong through the user's input, and how a command line says so: one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

QUOTED = 200  # characters of a foreign value that a message quotes at most


class InputError(ValueError):
    """An error in the user's input. The message is one sentence: what is wrong and how to fix it."""


class UnsupportedError(InputError, NotImplementedError):
    """Input that is valid, and that this program does not compute; the message names it and what is supported."""


def quote(value: Any) -> str:
    """repr(value) of a value from a file or flag, cut so that a message stays readable whatever the value is."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python converts
        text = f"a number of about {value.bit_length() * 3 // 10} digits"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}... ({len(text)} characters)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"error: {message}\n")


@contextlib.contextmanager
def exit_on_bad_input(debug: bool = False) -> Iterator[None]:
    """Turns an InputError or Ctrl-C into one sentence on stderr and exit code 2; with `debug` an error's traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(2)  # an orderly exit would wait for, or crash, what JAX is still computing
    except InputError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
