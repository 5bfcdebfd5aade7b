"""A report of a model that does not exist, for tests of what is made from reports."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from kascade_core import ANCHOR, REUSE, LayerPlan, Selection
from llama_model import Comparison
from measure.settings import Settings
from report.results import (
    Answers,
    Decoding,
    DensityRow,
    DepthRow,
    Generated,
    Layer,
    LimitCheck,
    LongContext,
    Machine,
    Model,
    Quality,
    Results,
    SweepRow,
    TaskRow,
    TextUsed,
    TileMap,
    Timing,
    as_ranges,
    schedule_sha256,
)


def plans(layers=12):
    """Every fourth layer an anchor."""
    found = [LayerPlan()]
    for i in range(1, layers):
        if i % 4 == 1:
            found.append(LayerPlan(ANCHOR, reason="similarity to L1: 40.00%"))
        else:
            found.append(LayerPlan(REUSE, i - (i - 1) % 4, (1, 0), similarity=0.7, reason="similarity: 70.00%"))
    return found


def compared(windows=4, tokens=64, cost=0.015):
    rng, found = np.random.default_rng(0), []
    for window in range(windows):
        dense = rng.exponential(3, tokens)
        change = rng.normal(cost * (1 + window % 3), 0.1, tokens)
        found.append(Comparison(dense, dense + change, change**2, np.abs(change) < 0.2))
    return found


def tile_map(layer, tiles=32):
    chosen = [sorted({0, q, *(q * k // 5 for k in range(5))}) for q in range(tiles)]
    kept = [1 - 0.3 * (1 - len(tiles) / (q + 1)) for q, tiles in enumerate(chosen)]
    return TileMap(layer, 0, tiles, list(range(tiles)), [as_ranges(tiles) for tiles in chosen], kept)


def results(**changes):
    """Every part that a run can have."""
    made, densities = plans(), [1.0] + [0.3] * 11
    rng = np.random.default_rng(1)
    similarity_LL = np.tril(rng.uniform(0.2, 0.9, (12, 12)), -1)
    similarity_LL += similarity_LL.T + np.eye(12)
    values = dict(
        settings=Settings(Selection(16, top_k=6), dtype="float32", kernel="xla", text=Path("wiki.txt")),
        date="2025-01-01T00:00:00+00:00",
        command=["--top_k", "6"],
        model=Model("Tiny-12M", "a folder", "abc", 12_000_000, 12, 48_000_000),
        machine=Machine("cpu", "cpu", 2, "Some CPU (AVX2)", {"xla_option": "on"}, {"context": 2}),
        prefix="<s>",
        schedule=[Layer(plan, density) for plan, density in zip(made, densities, strict=True)],
        limit_check=LimitCheck((0.01, 0.02)),
        quality=Quality(compared(), densities),
        timing=Timing([410.0, 430, 421, 405, 440], [380.0, 395, 391, 388, 402], 1.5, 2.5),
        attention_ms={"dense": [30.0, 31, 33], "selection": [11.0, 12, 11], "anchor": [21.0, 20, 22], "reuse": [9.0, 9.5, 8]},
        sweep=[
            SweepRow(512, [400.0, 420], [410.0, 430], 0.5, 100),
            SweepRow(2048, [2000.0, 2100], [1500.0, 1600], 0.3, 200),
            SweepRow(8192, skipped="needs 9 GB"),
        ],
        peak_memory_bytes=1234,
        decoding=Decoding(
            512, 64, 1, "sparse", ("xla", ""), compared(2), compared(2, cost=0.02), [0.4] * 12, [30.0, 31, 32], [25.0, 24, 27], 10**8, 8 * 10**7, 1e10
        ),
        depths=[
            DepthRow(512, 1, [30.0, 31], [33.0, 34], [29.0, 32], 0.4),
            DepthRow(2048, 1, [60.0, 61], [64.0, 65], [40.0, 41], 0.2),
            DepthRow(8192, 1, [200.0, 210], [205.0, 206], [80.0, 82], 0.1, True),
            DepthRow(32768, 1, skipped="needs 9 GB"),
        ],
        texts={"calibration": TextUsed("wiki.txt", 1, 512, "0" * 64), "test": TextUsed("wiki.txt", 4, 65, "1" * 64)},
        similarity=similarity_LL,
        tile_maps=[tile_map(1), tile_map(4)],
        tasks=tasks(),
        long_context=LongContext(np.array([2.0, 3.0, 2.5]), np.array([2.1, 3.0, 2.6])),
        generated=Generated((3, 5, 7), (3, 5, 8)),
        densities=[
            DensityRow(d, 0.08 + 0.92 * d, 20 + math.exp(-8 * d), 9 * math.exp(-8 * d), 0.3, 0.02, 0.01, 0.95, [400.0, 401], [s, s + 9], "FFSS" * 3, "2" * 64)
            for d, s in ((0.1, 300.0), (0.2, 320.0), (0.3, 310.0), (0.5, 380.0))
        ],
    )  # fmt: skip
    return Results(**values | changes)


def answers(right, n=40):
    return Answers(tuple(i < right for i in range(n)), tuple(1 + (i >= right) for i in range(n)))


def task(name, setup, dense, oracle, sparse):
    return TaskRow(name, 1900, "noise", setup, 0.1, 10, 0.2, answers(dense), answers(sparse), answers(oracle))


def tasks():
    """On the second, dense guesses."""
    return [
        task("niah_single", "prompt", 38, 36, 30),
        task("niah_single", "question", 38, 37, 36),
        task("vt", "prompt", 5, 3, 4),
        task("vt", "question", 5, 4, 4),
    ]


def report(**changes):
    """Of `results`."""
    return results(**changes).to_json()


def plain_run():
    """Without all that is optional."""
    none = dict(
        sweep=(), depths=(), decoding=None, densities=(), tile_maps=(), similarity=None, limit_check=None, tasks=()
    )
    return results(**none, quality=Quality(compared(1), [1.0] + [0.3] * 11))


def hash_of_plans():
    return schedule_sha256(plans())


def replaced(one, **changes):
    return dataclasses.replace(one, **changes)
