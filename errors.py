"""What goes wrong through the user's input, and how a command line says so: one sentence and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
        if isinstance(value, int):
            text = f"a number of about {value.bit_length() * 3 // 10} digits"
        else:
            text = f"{type(value).__name__} with a number of over 4300 digits"
    except RecursionError:
        text = f"{type(value).__name__} whose parts stand too deep in one another"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}... ({len(text)} characters)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        message = " ".join(message.split())
        if len(message) > 2 * QUOTED:
            message = f"{message[:QUOTED]} ... {message[-QUOTED:]}"
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


# --- Ctrl-C ---


_stopping = threading.Lock()


def _stop(*_: object) -> NoReturn:
    """Ends the process at once: no exception that a callback could swallow, no exit that waits for a computation."""
    if _stopping.acquire(blocking=False):
        with contextlib.suppress(OSError):  # stderr is closed
            os.write(2, b"error: interrupted\n")
    else:  # the main thread's handler and the thread that waits for the byte both come here: one says it
        time.sleep(1)
    os._exit(2)


def stop_on_ctrl_c() -> None:
    """From now on Ctrl-C ends the process with one sentence and exit code 2; called before the long imports.

    A signal's Python handler waits until the main thread is back from C, which takes minutes while XLA compiles. So
    a thread waits for the byte that the interpreter writes at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as by nohup or a shell's &, or another program's
    signal.signal(signal.SIGINT, _stop)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_stop_when_told, args=(reading,), daemon=True).start()


def _stop_when_told(pipe: int) -> None:
    while os.read(pipe, 1) != bytes([signal.SIGINT]):
        pass
    _stop()


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Within, Ctrl-C is a KeyboardInterrupt, as Python has it: for work that leaves temporary folders otherwise."""
    if signal.getsignal(signal.SIGINT) is not _stop or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = signal.set_wakeup_fd(-1)  # or the thread would hear of it late, when this is over, and end the process
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _stop)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)


# --- Standard streams ---


def run(main: Callable[[], int]) -> int:
    """`main`, on streams of any encoding, that may be full, or closed by the program that reads them; its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
        getattr(sys, name).reconfigure(errors="replace")  # a terminal without these symbols gets question marks
    try:
        try:
            code = main()
        except SystemExit as end:  # --help, or an error that was said
            code = end.code
        sys.stdout.flush()
        return code
    except OSError as error:
        if not _stdout_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more in the end
        if isinstance(error, BrokenPipeError):
            return 0  # as | head does
        print(f"error: cannot write to the standard output ({error.strerror})", file=sys.stderr)
        return 2


def _stdout_is_broken() -> bool:
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return True
    return False
