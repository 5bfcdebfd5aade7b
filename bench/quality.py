"""What do selection, reuse, budgets and schedules cost in quality, at equal counted density, on Wikipedia articles?

Every setting is calibrated on articles that are not tested, and compared with dense on the first tokens of the tested
ones: the change of the log perplexity, KL divergence from dense, and how often the likeliest token is the same. The
oracle, whose every sparse layer chooses for itself, parts the loss into that of selection and that of reuse. Each
finished window is a row of the CSV file, so that an interrupted run goes on where it was.

  pip install -r bench/requirements-quality.txt
  python bench/quality.py --seq_len 512,2048 --csv quality.csv --markdown quality.md
"""

from __future__ import annotations

import argparse
import bz2
import csv
import dataclasses
import hashlib
import html
import math
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mwparserfromhell
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kascade_search as search
from kascade_layers import LayerRunner
from kascade_layout import make_mesh, pad_axis
from kascade_setup import (
    DEFAULT_WEIGHTS,
    at_least_one,
    configure_device,
    exit_on_bad_input,
    lengths,
    load_tokenizer,
    share,
)

import kascade_core as core
from convert_weights import OneSentenceParser, download_wheel
from llama_model import LlamaModel, load_weights

# --- The articles ---

PACKAGE = "gensim==4.4.0"  # its tests hold a shortened dump of the English Wikipedia (CC BY-SA)
MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MEMBER_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
ARTICLES = Path("wikipedia_articles")
LEAST_TOKENS = 8192  # of an article that is used at all
WINDOWS = 12


def fetch_articles(folder: Path) -> None:
    """Writes the dump's longer articles, markup stripped, as text files; they are complete or absent."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as temporary:
        wheel = download_wheel(PACKAGE, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            packed = archive.read(MEMBER)
        if (got := hashlib.sha256(packed).hexdigest()) != MEMBER_SHA256:
            raise core.InputError(f"{PACKAGE}: {MEMBER} has SHA-256 {got}, expected {MEMBER_SHA256}")
        texts = Path(temporary) / "texts"
        texts.mkdir()
        pages = re.findall(r"<page>.*?</page>", bz2.decompress(packed).decode("utf-8"), re.DOTALL)
        for page in tqdm(pages, desc="stripping markup", unit="page", disable=None, leave=False):
            title, text = (re.search(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL) for tag in ("title", "text"))
            if title and text and len(text[1]) > 4 * LEAST_TOKENS:
                name = re.sub(r"\W+", "_", title[1])
                (texts / f"{name}.txt").write_text(strip_markup(html.unescape(text[1])), encoding="utf-8")
        texts.rename(folder)


def strip_markup(wikitext: str) -> str:
    """Prose without references, tables, pictures and lists."""
    code = mwparserfromhell.parse(wikitext)
    for tag in code.filter_tags(matches=lambda tag: tag.tag in ("ref", "table", "gallery"), recursive=False):
        code.remove(tag)
    text = code.strip_code()
    lines = (line for line in text.splitlines() if not re.match(r"\s*(thumb|File:|Image:|Category:|\||\*|\d+px)", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_articles(tokenizer: Any, num_windows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """LEAST_TOKENS ids each of the articles that have so many: those to test on, and the others to calibrate on.

    In the order of their titles every second one is tested, so that both are of all kinds.
    """
    articles = {}
    for path in sorted(ARTICLES.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
        if len(ids) >= LEAST_TOKENS:
            articles[path.stem] = np.array([ids[:LEAST_TOKENS]], np.int32)
        if len(articles) == 2 * num_windows:
            break
    if len(articles) < 2 * num_windows:
        raise core.InputError(
            f"{num_windows} windows need {2 * num_windows} long articles, and {len(articles)} are there"
        )
    names = list(articles)
    return {n: articles[n] for n in names[::2]}, {n: articles[n] for n in names[1::2]}


# --- Settings ---

DENSITIES = {512: (0.61,), 2048: (0.18, 0.30), 8192: (0.15,)}  # of the sparse layers, counted
DEFAULT_DENSITY = 0.15
NUM_ANCHORS = 9  # leaves 20 of 30 layers to reuse
CALIBRATION_TOKENS = 6144  # articles of so many tokens together, but at least one and at most four

Choose = Callable[[int, jax.Array], "jax.Array | None"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a rule that gives every sparse layer its tiles."""

    name: str
    rule: Callable[[Calibration, float], tuple[Sequence[core.LayerPlan], Mapping[str, Any]]]
    tile_size: int = 16
    query_tile: int = 16
    oracle: str | None = None  # the setting that differs from it in reusing nothing
    longest: int = LEAST_TOKENS  # tokens that it is affordable for


class Calibration:
    """What the calibration articles show at one length and tile size; each part is made when first asked for."""

    def __init__(self, model: LlamaModel, params: Any, ids: Sequence[jax.Array], mesh: Any) -> None:
        self.model, self.params, self.ids, self.mesh = model, params, ids, mesh
        self.runner = LayerRunner(model, params, ids[0].shape[1], mesh)

    @cached_property
    def observations(self) -> list[search.Observation]:
        return [search.observe(self.runner, ids) for ids in self.ids]

    @cached_property
    def beta(self) -> np.ndarray:
        return search.measure_damage(self.model, self.params, self.ids[0], self.mesh)

    @cached_property
    def table(self) -> search.LossTable:
        return search.LossTable.of(self.observations, self.model.selection)

    def budget(self, density: float) -> int:
        """The largest Top-K within a density."""
        return int(self.table.grid[np.searchsorted(self.table.densities, density + 1e-9) - 1])


def freeze(calibration: Calibration, schedule: Mapping[int, Any]) -> tuple[core.LayerPlan, ...]:
    """A schedule of the calibrated model."""
    config = calibration.model.config
    return core.freeze_schedule(schedule, config.num_hidden_layers, config.num_key_value_heads)


def with_budget(schedule: Mapping[int, Any], budget: int, num_kv_heads: int) -> dict[int, Any]:
    """The same number of tiles for every head of a schedule without budgets."""
    return {
        layer: entry if entry[0] == core.DENSE else (*entry, None, None)[:3] + ((budget,) * num_kv_heads,)
        for layer, entry in schedule.items()
    }


def guide(calibration: Calibration, density: float, least_reuse: int = 0) -> Any:
    """Jaccard and threshold; the largest threshold of 0.65, 0.60... with so many REUSE layers."""
    model, budget = calibration.model, calibration.budget(density)
    rule = dataclasses.replace(model.selection, top_k=budget)
    scores = calibration.observations[0].scores
    tiles = {i: np.asarray(core.select_tiles(jnp.asarray(s[None]), rule)) for i, s in enumerate(scores)}
    similarity = core.similarity_matrix(tiles)
    for threshold in np.arange(0.65, 0, -0.05):
        decisions = core.decide_schedule(similarity, float(threshold), 4)
        if sum(d.mode == core.REUSE for d in decisions) >= least_reuse:
            break
    schedule = core.add_head_maps({i: (d.mode, d.anchor) for i, d in enumerate(decisions)}, tiles)
    return freeze(calibration, with_budget(schedule, budget, model.config.num_key_value_heads)), {}


def paper(calibration: Calibration, density: float) -> Any:
    """Mass similarity, importance and dynamic programme."""
    budget = calibration.budget(density)
    rule = dataclasses.replace(calibration.model.selection, top_k=budget)
    similarity, maps = search.mass_similarity(calibration.observations, rule)
    importance = np.mean([o.importance for o in calibration.observations], axis=0)
    decisions = search.decide_nearest(similarity, search.dp_anchors(similarity, NUM_ANCHORS, importance))
    schedule = {i: (d.mode, d.anchor, maps.get((i, d.anchor))) for i, d in enumerate(decisions)}
    return freeze(calibration, with_budget(schedule, budget, calibration.model.config.num_key_value_heads)), {}


def searched(budgets: str, num_anchors: int = NUM_ANCHORS, weighed: bool = True, **peer: Any) -> Any:
    """Measured damage; with `weighed` false, the attention mass alone says where budgets go."""

    def rule(calibration: Calibration, density: float) -> Any:
        beta = calibration.beta if weighed else np.minimum(np.arange(len(calibration.beta)), 1.0)
        anchors = min(num_anchors, calibration.model.config.num_hidden_layers - 1)
        plan = search.search_plan(calibration.table, beta, anchors, density, budgets)
        return freeze(calibration, search.plan_schedule(plan, calibration.table)), peer

    return rule


ALL = 10**9  # anchors: as many as there are layers, which is the oracle
SETTINGS = [
    Setting("oracle, uniform", searched(search.UNIFORM, ALL)),
    Setting("oracle, budgets by mass alone", searched(search.PER_HEAD, ALL, weighed=False)),
    Setting("oracle, layer budgets", searched(search.PER_LAYER, ALL)),
    Setting("oracle, tile 8, layer budgets", searched(search.PER_LAYER, ALL), 8),
    Setting("oracle, uniform, a choice per row", searched(search.UNIFORM, ALL), query_tile=1, longest=512),
    Setting("guide: Jaccard, threshold 0.65", guide, oracle="oracle, uniform"),
    Setting("guide, 20 REUSE or more", lambda c, d: guide(c, d, 20), oracle="oracle, uniform"),
    Setting("paper: mass, dynamic programme", paper, oracle="oracle, uniform"),
    Setting("search, uniform", searched(search.UNIFORM), oracle="oracle, uniform"),
    Setting("search, layer budgets", searched(search.PER_LAYER), oracle="oracle, layer budgets"),
    Setting("search, head budgets", searched(search.PER_HEAD)),
    Setting("search, tile 8, layer budgets", searched(search.PER_LAYER), 8, oracle="oracle, tile 8, layer budgets"),
    Setting("search, tile 8, head budgets", searched(search.PER_HEAD), 8, oracle="oracle, tile 8, layer budgets"),
    Setting("search, tile 8, query tile 8, layer budgets", searched(search.PER_LAYER), 8, 8),
    Setting("peer: no head map", searched(search.UNIFORM, identity=True), oracle="oracle, uniform"),
    Setting("peer: one index set for all heads", searched(search.UNIFORM, shared=True), oracle="oracle, uniform"),
    Setting("peer: sliding window and sink", searched(search.UNIFORM, window=True)),
    Setting("peer: Quest's page bounds, every layer", searched(search.UNIFORM, ALL, quest=True)),
]


def chooser(
    runner: LayerRunner,
    plans: Sequence[core.LayerPlan],
    seen: list[float],
    *,
    identity: bool = False,
    shared: bool = False,
    window: bool = False,
    quest: bool = False,
) -> Choose:
    """How each layer of a schedule gets its tiles; notes every sparse layer's counted density in `seen`."""
    ranked: dict[int, jax.Array] = {}
    capacity = max(plan.keep or 0 for plan in plans)

    def choose(layer: int, x_BTD: jax.Array) -> jax.Array | None:
        plan = plans[layer]
        if plan.mode == core.DENSE:
            return None
        if plan.mode == core.ANCHOR:
            score = bounds if quest else recency if window else LayerRunner.scores
            scores = score(runner, layer, x_BTD)
            scores = jnp.broadcast_to(scores.sum(1, keepdims=True), scores.shape) if shared else scores
            rule = dataclasses.replace(runner.selection, top_k=capacity, density=None, ranked=True)
            ranked[layer] = core.select_tiles(scores, rule)
        tiles = ranked[layer if plan.anchor is None else plan.anchor]
        if plan.head_map and not identity:
            tiles = tiles[:, list(plan.head_map)]
        tiles = core.cut_tiles(tiles, plan.budgets)
        seen.append(core.density_of(np.asarray(tiles)))
        width = math.ceil(tiles.shape[-1] / 8) * 8  # few widths: each is compiled once
        return jnp.pad(tiles, [(0, 0)] * 3 + [(0, width - tiles.shape[-1])], constant_values=core.NO_TILE)

    return choose


def recency(runner: LayerRunner, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Scores_BKQP that prefer the nearest tiles (StreamingLLM, arXiv 2309.17453)."""
    K, Q, P = runner.config.num_key_value_heads, runner.num_query_tiles, runner.num_key_tiles
    return jnp.broadcast_to(jnp.arange(P, dtype=jnp.float32), (1, K, Q, P))


def bounds(runner: LayerRunner, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Scores_BKQP: the largest product of a query tile with any key within a tile's least and largest values.

    Quest (arXiv 2406.10774) bounds q k by the page's element-wise extremes, for one query; here it is summed over the
    softmax of all rows and heads of a query tile, as our masses are.
    """
    q_BTNH, k_BKHS = runner.queries_and_keys(layer, x_BTD)
    (B, T, N, H), K = q_BTNH.shape, k_BKHS.shape[1]
    M, Y, P, Q = runner.selection.tile_size, runner.selection.query_tile, runner.num_key_tiles, runner.num_query_tiles
    k_BKHPM = pad_axis(k_BKHS, 3, P * M).reshape(B, K, H, P, M)
    k_BKHPM = jnp.where(jnp.arange(P * M).reshape(P, M) < T, k_BKHPM, k_BKHPM[..., :1])
    q_BQYKGH = pad_axis(q_BTNH, 1, Q * Y).reshape(B, Q, Y, K, N // K, H)
    low, high = k_BKHPM.min(-1), k_BKHPM.max(-1)

    def score(q_BYKGH: jax.Array) -> jax.Array:
        most = jnp.einsum("BYKGH,BKHP->BKGYP", jnp.maximum(q_BYKGH, 0), high)
        most += jnp.einsum("BYKGH,BKHP->BKGYP", jnp.minimum(q_BYKGH, 0), low)
        return most * H**-0.5

    visible = jnp.arange(P) * M <= (jnp.arange(Q)[:, None] + 1) * Y - 1

    def pooled(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BYKGH, visible_P = args
        return jax.nn.softmax(jnp.where(visible_P, score(q_BYKGH), -jnp.inf), axis=-1).sum((2, 3))

    return jnp.moveaxis(jax.lax.map(pooled, (jnp.moveaxis(q_BQYKGH, 1, 0), visible)), 0, 2)


# --- Measuring ---

FIELDS = ("tokens", "target", "setting", "window", "density", "reuse", "log_perplexity", "kl", "agree")


def measure(
    runner: LayerRunner, plans: Sequence[core.LayerPlan], peer: Mapping[str, Any], ids: jax.Array, dense: Any, base: Any
) -> dict[str, float]:
    """One window of one setting: changes against dense."""
    seen: list[float] = []
    x_BTD = runner.run(runner.embed(ids), 0, chooser(runner, plans, seen, **peer))
    nll, kl, agree = runner.compare(dense, x_BTD, ids, step_of(ids))
    return {
        "density": float(np.mean(seen)),
        "reuse": sum(plan.mode == core.REUSE for plan in plans),
        "log_perplexity": float(np.mean(nll - base, dtype=np.float64)),
        "kl": float(kl.mean()),
        "agree": float(agree.mean()),
    }


def run_densely(runner: LayerRunner, ids: jax.Array) -> tuple[jax.Array, np.ndarray]:
    """The last residual stream, and the compared tokens' losses."""
    x_BTD = runner.run(runner.embed(ids), 0, lambda *_: None)
    return x_BTD, runner.compare(x_BTD, x_BTD, ids, step_of(ids))[0]


def step_of(ids: jax.Array) -> int:
    """Every how many tokens are compared: 2048 of them tell enough."""
    return max(1, ids.shape[1] // 2048)


class Table:
    """The CSV file: a row a window, each written as soon as it is measured."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
            if self.rows and tuple(self.rows[0]) != FIELDS:
                raise core.InputError(f"{path} has other columns than this program writes; give another file")

    def has(self, **key: Any) -> bool:
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(value) for name, value in row.items()})


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a row for each length, density and setting, over its windows."""
    groups: dict[tuple[int, float, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((int(row["tokens"]), float(row["target"]), row["setting"]), []).append(row)
    oracles = {setting.name: setting.oracle for setting in SETTINGS}
    names = ("tokens", "setting", "density", "REUSE", "change of log perplexity, %", "selection + reuse, %")
    names += ("KL, nats", "same likeliest token", "n")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for (tokens, target, setting), windows in groups.items():
        change, error = _mean_and_error(windows)
        parts = ""
        if oracle := groups.get((tokens, target, oracles.get(setting) or "")):
            selection, _ = _mean_and_error(oracle)
            parts = f"{selection:+.2f} {change - selection:+.2f}"
        means = {name: np.mean([float(row[name]) for row in windows]) for name in ("density", "kl", "agree")}
        reuse = sorted({int(row["reuse"]) for row in windows})
        cells = (tokens, setting, f"{means['density']:.1%}", "-".join(map(str, reuse)), f"{change:+.2f} ± {error:.2f}")
        cells += (parts, f"{means['kl']:.4f}", f"{means['agree']:.1%}", len(windows))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_error(windows: Sequence[Mapping[str, str]]) -> tuple[float, float]:
    """Percent: mean and standard error of the windows' change of log perplexity."""
    changes = 100 * np.array([float(row["log_perplexity"]) for row in windows])
    return float(changes.mean()), float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else math.nan


def jobs(args: argparse.Namespace) -> Iterator[tuple[int, float, Setting]]:
    """Everything to measure, tile sizes together, for each is calibrated and compiled once."""
    settings = [s for s in SETTINGS if not args.settings or s.name in args.settings]
    for length in args.seq_len:
        for setting in sorted(settings, key=lambda s: (-s.tile_size, -s.query_tile)):
            for target in [args.density] if args.density else DENSITIES.get(length, (DEFAULT_DENSITY,)):
                if length <= setting.longest:
                    yield length, target, setting


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=lengths, default=[512, 2048], help="lengths (default 512,2048)")
    parser.add_argument("--windows", type=at_least_one, default=WINDOWS, help=f"articles tested (default {WINDOWS})")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}")
    parser.add_argument("--density", type=share, help="of the sparse layers, counted (default: by length)")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help="default: the benchmark's")
    parser.add_argument("--csv", type=Path, default=Path("quality.csv"), help="rows already there are not run again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    if args.seq_len[-1] > LEAST_TOKENS:
        parser.error(f"argument --seq_len: the articles have {LEAST_TOKENS} tokens, got {args.seq_len[-1]}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the CSV file lacks, and prints the table."""
    args = parse_args(argv)
    with exit_on_bad_input():
        table = Table(args.csv)
        mesh = make_mesh(configure_device("cpu"))
        manifest, params = load_weights(args.weights_dir, jnp.float32, mesh)
        if not ARTICLES.is_dir():
            fetch_articles(ARTICLES)
        tested, calibrating = read_articles(load_tokenizer(args.weights_dir), args.windows)
        calibrations: dict[tuple[int, int, int], Calibration] = {}
        streams: dict[tuple[int, str], tuple[jax.Array, np.ndarray]] = {}
        for length, target, setting in tqdm([*jobs(args)], desc="settings", unit="setting", disable=None):
            keys = [{"tokens": length, "target": target, "setting": setting.name, "window": name} for name in tested]
            if all(table.has(**key) for key in keys):
                continue
            where = (length, setting.tile_size, setting.query_tile)
            if where not in calibrations:
                calibrations.clear()
                count = min(max(CALIBRATION_TOKENS // length, 1), 4)
                ids = [jnp.asarray(article[:, :length]) for article in calibrating.values()][:count]
                sizes = {"tile_size": setting.tile_size, "query_tile": setting.query_tile, "sink_tiles": 1}
                model = LlamaModel(manifest["config"], top_k=core.Selection(**sizes, top_k=8).always, **sizes)
                calibrations[where] = Calibration(model, params, ids, mesh)
            calibration = calibrations[where]
            plans, peer = setting.rule(calibration, target)
            for key in tqdm(keys, desc=setting.name, unit="window", disable=None, leave=False):
                if table.has(**key):
                    continue
                ids = jnp.asarray(tested[key["window"]][:, :length])
                runner = calibration.runner
                if (length, key["window"]) not in streams:
                    streams[length, key["window"]] = run_densely(runner, ids)
                row = measure(runner, plans, peer, ids, *streams[length, key["window"]])
                table.add(key | row)
        print(format_table(table.rows))
        if args.markdown:
            args.markdown.write_text(format_table(table.rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
