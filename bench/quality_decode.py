"""What does sparse decoding cost in quality, by schedule? Tokens that follow 2048 of an article, decoded one by one.

As in bench.quality schedules are calibrated on articles that are not tested, at an equal counted density. Every tested
article's first tokens fill the caches, and its next ones are decoded densely and sparsely, the sparse arm once after a
sparse prefill and once after a dense one. A query tile is one row here, so no row helps to choose for an earlier one.
Each finished article is a row of the CSV file, so that an interrupted run goes on where it was.

  pip install -r bench/requirements-quality.txt
  python -m bench.quality_decode --csv decode.csv --markdown decode.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from attention.sharding import keep_on, make_mesh, steps_mesh
from bench import quality
from bench.quality import SETTINGS, WINDOWS, Bench, Setting, format_windows, read_articles, write_articles
from errors import Parser, exit_on_bad_input
from kascade_core import DENSE, REUSE, Schedule
from llama_model import Comparison, LlamaModel, load_weights
from measure.decoding import cache_dtype, cache_size, step_densities
from measure.layerwise import LayerRunner
from measure.machine import configure_device
from measure.quality import compile_comparison
from measure.settings import whole_number
from network.cache import KVCache
from network.programs import Decoder, Forward
from report.tables import ResultsFile, markdown
from weights.folder import DEFAULT_WEIGHTS, read_manifest
from weights.tokenizers import load_tokenizer

COMPARED = ("threshold rule, 0.65", "threshold rule, 20 REUSE or more", "search, layer budgets", "search, head budgets")
DENSITY = 0.18  # of the sparse layers, in prefill; one of bench.quality's for 2048 tokens
COLUMNS = (
    "tokens",
    "steps",
    "target",
    "setting",
    "prefill",
    "window",
    "density",
    "reuse",
    "log_perplexity",
    "kl",
    "agree",
)


class Arm:
    """A model's prefill and its steps, compiled for windows of `depth` tokens and `steps` tokens after them."""

    def __init__(self, bench: Bench, model: LlamaModel, depth: int, steps: int) -> None:
        self.bench, self.model, self.depth, self.steps = bench, model, depth, steps
        self.size = cache_size(model.selection, depth + steps)
        self.dtype = cache_dtype(model, bench.mesh.devices.flat[0])
        mesh = steps_mesh(bench.mesh, 1)
        self.params = keep_on(bench.params, mesh)
        cache = KVCache.shapes(model.config, 1, self.size, self.dtype, mesh)
        ids = jax.ShapeDtypeStruct((1, depth), jnp.int32)
        self.forward: Forward = model.compile(bench.params, ids, bench.mesh, with_cache=True)
        self.decoder: Decoder = model.compile_decode(self.params, cache, steps, mesh)

    def prefill(self, window: str, size: int) -> KVCache:
        """The cache of an article's first `depth` tokens, with room for `size`."""
        output = self.forward(self.bench.params, jnp.asarray(self.bench.tested[window][:, : self.depth]))
        return self.forward.fill_cache(output, size, self.bench.mesh, self.dtype)

    def decode(self, window: str, cache: KVCache) -> tuple[jax.Array, Mapping[int, jax.Array]]:
        """The final stream of the next `steps` tokens, and the tiles that anchors chose; the cache is given away."""
        ids_BN = self.bench.tested[window][:, self.depth : self.depth + self.steps]
        output = self.decoder(self.params, ids_BN, np.full(1, self.depth, np.int32), cache)
        return output.stream, output.tiles


class DecodingBench:
    """The dense arm with its streams, which all settings share."""

    def __init__(self, bench: Bench, depth: int, steps: int) -> None:
        self.bench = bench
        self.dense = Arm(bench, LlamaModel(bench.config), depth, steps)
        self._streams: dict[str, jax.Array] = {}
        self._compare = compile_comparison(self.dense.model, None)

    def sparse_arm(self, setting: Setting, plans: Schedule) -> Arm:
        """A schedule's arm, with the setting's tile sizes."""
        selection = self.bench.calibration(self.dense.depth, setting).model.selection
        return Arm(self.bench, LlamaModel(self.bench.config, plans, selection), self.dense.depth, self.dense.steps)

    def measure(self, sparse: Arm, prefill: str, window: str) -> dict[str, Any]:
        """One article of one setting, against dense: the CSV file's columns from density on."""
        cache = (self.dense if prefill == "dense" else sparse).prefill(window, sparse.size)
        stream, tiles = sparse.decode(window, cache)
        compared = self._compared(window, stream)
        densities = step_densities(sparse.model, tiles, sparse.depth)
        plans = sparse.model.schedule
        return {
            "density": float(np.mean([d for d, plan in zip(densities, plans, strict=True) if plan.mode != DENSE])),
            "reuse": sum(plan.mode == REUSE for plan in plans),
            "log_perplexity": float(np.mean(compared.sparse_nll - compared.dense_nll, dtype=np.float64)),
            "kl": float(compared.kl.mean()),
            "agree": float(compared.same_top1.mean()),
        }

    def _compared(self, window: str, stream: jax.Array) -> Comparison:
        if window not in self._streams:
            self._streams[window], _ = self.dense.decode(window, self.dense.prefill(window, self.dense.size))
        depth, steps = self.dense.depth, self.dense.steps
        next_ids = jnp.asarray(self.bench.tested[window][:, depth + 1 : depth + steps + 1])
        return jax.device_get(self._compare(self.dense.params, self._streams[window], stream, next_ids))


def measure_missing(bench: Bench, results: ResultsFile, args: argparse.Namespace) -> None:
    """Measures what the CSV file lacks."""
    decoding = None
    for setting, key in tqdm([*jobs(args)], desc="settings", unit="setting", disable=None):
        prefills = ("sparse", "dense")
        missing = [
            (window, prefill)
            for window in bench.tested
            for prefill in prefills
            if not results.has(**key, prefill=prefill, window=window)
        ]
        if not missing:
            continue
        decoding = decoding or DecodingBench(bench, args.depth, args.steps)
        sparse = decoding.sparse_arm(setting, setting.rule(bench.calibration(args.depth, setting), args.density))
        for window, prefill in tqdm(missing, desc=setting.name, unit="window", disable=None, leave=False):
            row = decoding.measure(sparse, prefill, window)
            results.add(key | {"prefill": prefill, "window": window} | row)


def jobs(args: argparse.Namespace) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """The settings, and the first columns of their rows."""
    for setting in SETTINGS:
        if setting.name in args.settings:
            key = {"tokens": args.depth, "steps": args.steps, "target": args.density, "setting": setting.name}
            yield setting, key


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a row for each depth, density, setting and prefill, over its articles."""
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        names = ("tokens", "steps", "target", "setting", "prefill")
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    columns = ("after", "decoded", "setting", "prefill", "density", "REUSE", "change of log perplexity, %")
    cells = []
    for (tokens, steps, _, setting, prefill), articles in groups.items():
        density, reuse, change, _, kl, agree = format_windows(articles, None)
        cells.append((tokens, steps, setting, prefill, density, reuse, change, kl, agree, len(articles)))
    return markdown((*columns, "KL, nats", "same likeliest token", "n"), cells)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=whole_number, default=2048, help="tokens that fill the caches (2048)")
    parser.add_argument("--steps", type=whole_number, default=256, help="tokens decoded after them (256)")
    parser.add_argument("--windows", type=whole_number, default=WINDOWS, help=f"articles tested ({WINDOWS})")
    names = [setting.name for setting in SETTINGS if setting.score is LayerRunner.scores]  # as steps score
    parser.add_argument(
        "--settings", nargs="+", choices=names, default=COMPARED, metavar="NAME", help=f"({'; '.join(COMPARED)})"
    )
    parser.add_argument("--density", type=float, default=DENSITY, help=f"of the sparse layers, in (0, 1] ({DENSITY})")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help=f"({DEFAULT_WEIGHTS})")
    parser.add_argument("--csv", type=Path, default=Path("quality_decode.csv"), help="rows already there are kept")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    if args.depth < 2 or args.steps < 1 or args.depth + args.steps >= quality.LEAST_TOKENS:
        parser.error(
            f"depth must be at least 2, steps at least 1, and both together below {quality.LEAST_TOKENS}, the tokens "
            f"of an article, got {args.depth} and {args.steps}"
        )
    if args.windows < 1:
        parser.error(f"windows must be at least 1, got {args.windows}")
    if not 0 < args.density <= 1:
        parser.error(f"density must be above 0 and at most 1, got {args.density}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the CSV file lacks, and prints the table."""
    args = parse_args(argv)
    with exit_on_bad_input():
        results = ResultsFile(args.csv, COLUMNS)
        mesh = make_mesh(configure_device("cpu"))
        manifest = read_manifest(args.weights_dir)
        params = load_weights(args.weights_dir, manifest, jnp.dtype(jnp.float32), mesh)
        if not quality.ARTICLES.is_dir():
            write_articles(quality.ARTICLES)
        articles = read_articles(load_tokenizer(args.weights_dir, manifest.tokenizer), args.windows)
        measure_missing(Bench(manifest.config, params, mesh, articles), results, args)
        table = format_table(results.rows)
        print(table)
        if args.markdown:
            args.markdown.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
