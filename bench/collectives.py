"""How often a compiled program's devices exchange arrays, and how large those are: counted in XLA's text of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<result>\((?:[^()]|\([^()]*\))*\)|\S+) (?P<kind>{KINDS})(?P<start>-start)?\("
)
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CHAIN = re.compile(r'chain_id="(\d+)"')  # the TPU's compiler repeats one exchange in each step of its overlap


class Collective(NamedTuple):
    """Collectives of one kind: how many, and the bytes of their results on one device."""

    count: int
    bytes: int

    def times(self, runs: int) -> Collective:
        """Those of so many runs."""
        return Collective(self.count * runs, self.bytes * runs)


def count_collectives(text: str) -> dict[str, Collective]:
    """By kind, those of one run of a program, `jax.stages.Compiled.as_text`; a loop's count as often as it turns.

    A loop whose turns the compiler does not know counts as one turn.
    """
    computations, entry = _computations(text)
    found: dict[str, Collective] = {}
    chains = set()
    for name, turns in _reached(computations, entry):
        for line in computations[name]:
            if not (match := INSTRUCTION.match(line)):
                continue
            kind, chain = match["kind"], CHAIN.search(line)
            if chain and (kind, chain[1]) in chains:
                continue
            chains |= {(kind, chain[1])} if chain else set()
            one = Collective(1, _result_bytes(match["result"], bool(match["start"]) and kind != "all-reduce"))
            found[kind] = added(found.get(kind), one.times(turns))
    return found


def added(a: Collective | None, b: Collective) -> Collective:
    """Both together."""
    return b if a is None else Collective(a.count + b.count, a.bytes + b.bytes)


def total(parts: Mapping[str, Collective]) -> str:
    """In words, such as "161 all-reduce (43.1 GB)"."""
    cells = [f"{part.count} {kind} ({part.bytes / 1e9:.2f} GB)" for kind, part in sorted(parts.items())]
    return ", ".join(cells) or "none"


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = match["name"]
            entry = name if match["entry"] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry


def _reached(computations: Mapping[str, list[str]], entry: str) -> Iterator[tuple[str, int]]:
    """Each computation that a run comes to, once, with how often it is run."""
    waiting, seen = [(entry, 1)] if entry else [], set()
    while waiting:
        name, turns = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        yield name, turns
        for line in computations[name]:
            trips = TRIPS.search(line)
            inner = turns * int(trips[1]) if trips else turns
            called = [name for group in BRANCHES.findall(line) for name in re.findall(r"[\w.\-]+", group)]
            waiting += [(name, inner) for name in (*CALLED.findall(line), *called)]


def _result_bytes(result: str, is_start: bool) -> int:
    """Of all arrays of a result; that of a start also names its operand, and is the largest."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _item_bytes(bits)
        for _, bits, dims in ARRAY.findall(result)
    ]
    return max(sizes, default=0) if is_start else sum(sizes)


def _item_bytes(bits: str) -> int:
    return max(int(bits or 8) // 8, 1)
