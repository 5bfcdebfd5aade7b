"""Whatever a file or a command line holds, it is accepted or refused by one sentence (harness.py has the mutations)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

TESTS = Path(__file__).resolve().parents[1]
JAX_FREE = ("manifest", "chunks", "config", "index", "safetensors", "gguf", "tokenizers", "reports")
WITH_JAX = ("schedules", "texts", "flags")


def fuzz(folder, count, *kinds):
    """{kind: what the harness says of it}, from a process of its own."""
    command = [sys.executable, harness.__file__, str(count), "0", *kinds]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"crashed after {[line['kind'] for line in lines]}: {done.stderr[-2000:]}"
    return {line["kind"]: line for line in lines}


def check(said, count):
    assert said["escaped"] == []
    assert said["accepted"] + said["refused"] == count
    assert min(said["accepted"], said["refused"]) > 0  # the mutations are neither harmless nor all fatal
    assert said["slowest"] < harness.SLOWEST
    assert said["peak"] < harness.MEMORY
    assert not said["canary"]


def test_every_kind_is_fuzzed():
    assert {*JAX_FREE, *WITH_JAX} == harness.KINDS.keys()


@pytest.mark.parametrize("kinds", [JAX_FREE, WITH_JAX])
def test_300_mutations_of_each_kind_are_accepted_or_refused_by_one_sentence(tmp_path, kinds):
    said = fuzz(tmp_path, 300, *kinds)
    assert tuple(said) == kinds
    for line in said.values():
        check(line, 300)


@pytest.mark.full
@pytest.mark.parametrize("kind", [*JAX_FREE, *WITH_JAX])
def test_10000_mutations_of_each_kind_are_accepted_or_refused_by_one_sentence(tmp_path, kind):
    check(fuzz(tmp_path, 10_000, kind)[kind], 10_000)


@pytest.mark.parametrize(
    ("case", "escaped"),
    [
        (lambda rng: [][0], "IndexError"),
        (lambda rng: harness.check_sentence(harness.InputError("bad"), ("config.json",)), "UnclearError"),
        (lambda rng: harness.check_sentence(harness.InputError("config.json" * 999), ("config.json",)), "UnclearError"),
        (lambda rng: harness.ring(), "Slow"),
    ],
)
def test_the_harness_sees_what_escapes(monkeypatch, tmp_path, case, escaped):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(harness.KINDS, "bad", lambda root: case)
    Path(harness.CANARY).touch()
    said = harness.run("bad", 2, 0)
    assert [line.split(": ")[:2] for line in said["escaped"]] == [["0", escaped], ["1", escaped]]
    assert said["canary"]
