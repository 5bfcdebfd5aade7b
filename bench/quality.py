"""What do selection, reuse, budgets and schedules cost in quality, at equal counted density, on Wikipedia articles?

Every setting is calibrated on articles that are not tested, and compared with dense on the first tokens of the tested
ones: the change of the log perplexity, KL divergence from dense, and how often the likeliest token is the same. The
oracle, in which every sparse layer chooses for itself, splits the degradation into that of selection and that of
reuse. Each finished window is a row of the CSV file, so that an interrupted run goes on where it was.

  pip install -r bench/requirements-quality.txt
  python -m bench.quality --seq_len 512,2048 --csv quality.csv --markdown quality.md
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import html
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from attention.sharding import make_mesh, pad_axis
from errors import InputError, Parser, ctrl_c_raises, exit_on_bad_input
from kascade_core import (
    ANCHOR,
    DENSE,
    NO_TILE,
    REUSE,
    Schedule,
    Selection,
    add_head_maps,
    decide_by_threshold,
    density_of,
    freeze_schedule,
    select_tiles,
    similarity_matrix,
)
from llama_model import LlamaModel, load_weights
from measure.layerwise import Calibration, LayerRunner
from measure.machine import configure_device
from measure.schedules import find_schedule
from measure.search import LostMassTable, search_candidate
from measure.settings import DP, MASS, PER_HEAD, PER_LAYER, UNIFORM, Settings, whole_number, whole_numbers
from report.statistics import standard_error
from report.tables import ResultsFile, markdown
from weights.config import LlamaConfig
from weights.folder import DEFAULT_WEIGHTS, read_manifest
from weights.packages import articles_dump
from weights.tokenizers import TextTokenizer, load_tokenizer

# --- The articles ---

ARTICLES = Path("wikipedia_articles")
LEAST_TOKENS = 8192  # of an article that is used at all
WINDOWS = 12


def write_articles(folder: Path) -> None:
    """Writes the dump's longer articles, markup stripped, as text files; they are complete or absent."""
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as temporary:
        pages = re.findall(r"<page>.*?</page>", articles_dump(Path(temporary)), re.DOTALL)
        texts = Path(temporary) / "texts"
        texts.mkdir()
        for page in tqdm(pages, desc="stripping markup", unit="page", disable=None, leave=False):
            title, text = (re.search(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL) for tag in ("title", "text"))
            if title and text and len(text[1]) > 4 * LEAST_TOKENS:
                name = re.sub(r"\W+", "_", title[1])
                (texts / f"{name}.txt").write_text(strip_markup(html.unescape(text[1])), encoding="utf-8")
        texts.rename(folder)


def strip_markup(wikitext: str) -> str:
    """Prose without references, tables, pictures and lists."""
    import mwparserfromhell  # only the first run needs it

    code = mwparserfromhell.parse(wikitext)
    for tag in code.filter_tags(matches=lambda tag: tag.tag in ("ref", "table", "gallery"), recursive=False):
        code.remove(tag)
    text = code.strip_code()
    lines = (line for line in text.splitlines() if not re.match(r"\s*(thumb|File:|Image:|Category:|\||\*|\d+px)", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_articles(tokenizer: TextTokenizer, num_windows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Windows int32 [1, LEAST_TOKENS] of the articles that are so long: those to test on, and those to calibrate on.

    Each begins with the tokenizer's prefix. In the order of their titles every second article is tested, so that both
    are of all kinds.

    Raises:
      InputError: fewer than 2 * num_windows articles are long enough.
    """
    articles = {}
    for path in sorted(ARTICLES.glob("*.txt")):
        ids = [*tokenizer.prefix, *tokenizer.encode(path.read_text(encoding="utf-8"))]
        if len(ids) >= LEAST_TOKENS:
            articles[path.stem] = np.array([ids[:LEAST_TOKENS]], np.int32)
        if len(articles) == 2 * num_windows:
            break
    if len(articles) < 2 * num_windows:
        raise InputError(
            f"{num_windows} windows need {2 * num_windows} articles of {LEAST_TOKENS} tokens, and {ARTICLES} has "
            f"{len(articles)}; lower --windows"
        )
    names = list(articles)
    return {n: articles[n] for n in names[::2]}, {n: articles[n] for n in names[1::2]}


# --- Settings ---

DENSITIES = {512: (0.61,), 2048: (0.18, 0.30), 8192: (0.15,)}  # of the sparse layers, counted
DEFAULT_DENSITY = 0.15
NUM_ANCHORS = 9  # leaves 20 of 30 layers to reuse
CALIBRATION_TOKENS = 6144  # articles of so many tokens together, but at least one and at most four
THRESHOLDS = tuple(round(0.65 - 0.05 * step, 2) for step in range(13))  # 0.65 to 0.05
MAX_REUSE_DIST = 4


class ArticleCalibration(Calibration):
    """A `Calibration` on articles, with what all settings of one length and tile size share."""

    @cached_property
    def runner(self) -> LayerRunner:
        """Runs the tested windows."""
        return LayerRunner(self.model, self.params, self.windows[0].shape[1], self.mesh)

    @cached_property
    def table(self) -> LostMassTable:
        """Of all calibration articles."""
        return LostMassTable.of(self.observations, self.model.selection)

    def top_k_within(self, density: float) -> int:
        """The largest Top-K whose counted density is at most this."""
        return int(self.table.grid[np.searchsorted(self.table.densities, density + 1e-9) - 1])

    def with_top_k(self, top_k: int) -> Calibration:
        """The same observations, for a model that keeps another number of tiles."""
        model = self.model.clone(selection=self.model.selection.with_top_k(top_k))
        other = Calibration(model, self.params, self.windows, self.mesh)
        other.observations = self.observations
        return other


Rule = Callable[[ArticleCalibration, float], Schedule]  # (calibration, density of the sparse layers) -> plans
Score = Callable[[LayerRunner, int, jax.Array], jax.Array]  # (runner, layer, x_BTD) -> scores_BKQP


def threshold_rule(calibration: ArticleCalibration, density: float, least_reuse: int = 0) -> Schedule:
    """Jaccard and threshold; the largest of THRESHOLDS with at least `least_reuse` REUSE layers."""
    top_k = calibration.top_k_within(density)
    selection = calibration.model.selection.with_top_k(top_k)
    scores_LKQP = calibration.observations[0].scores
    tiles = {i: np.asarray(select_tiles(jnp.asarray(s[None]), selection)) for i, s in enumerate(scores_LKQP)}
    similarity_LL = similarity_matrix(tiles)
    for threshold in THRESHOLDS:
        plans = decide_by_threshold(similarity_LL, threshold, MAX_REUSE_DIST)
        if sum(plan.mode == REUSE for plan in plans) >= least_reuse:
            break
    return with_budget(add_head_maps(plans, tiles), top_k, calibration.model.config)


def paper_rule(calibration: ArticleCalibration, density: float) -> Schedule:
    """The paper's mass similarity, importance and dynamic programme."""
    top_k, config = calibration.top_k_within(density), calibration.model.config
    settings = Settings(scheduler=DP, similarity=MASS, anchors=min(NUM_ANCHORS, config.num_hidden_layers - 1))
    plans, _ = find_schedule(settings, calibration.with_top_k(top_k))
    return with_budget(plans, top_k, config)


def with_budget(plans: Schedule, budget: int, config: LlamaConfig) -> Schedule:
    """The schedule with the same number of tiles for every head of its sparse layers."""
    budgets = (budget,) * config.num_key_value_heads
    plans = [plan if plan.mode == DENSE else dataclasses.replace(plan, budgets=budgets) for plan in plans]
    return freeze_schedule(plans, config.num_hidden_layers, config.num_key_value_heads)


def search_rule(budgets: str, num_anchors: int = NUM_ANCHORS, weighted: bool = True) -> Rule:
    """The search by measured damage; with `weighted` false, lost mass alone says where budgets go."""

    def rule(calibration: ArticleCalibration, density: float) -> Schedule:
        config = calibration.model.config
        alike = np.minimum(np.arange(config.num_hidden_layers), 1.0)  # 0 for the dense layer, 1 for every other
        beta_L = calibration.damage_factors if weighted else alike
        anchors = min(num_anchors, config.num_hidden_layers - 1)
        candidate = search_candidate(calibration.table, beta_L, anchors, density, budgets)
        plans = candidate.schedule(calibration.table.grid)
        return freeze_schedule(plans, config.num_hidden_layers, config.num_key_value_heads)

    return rule


def search_without_head_maps(calibration: ArticleCalibration, density: float) -> Schedule:
    """The uniform search's schedule, in which every head takes the tiles of the head of its own number."""
    plans = search_rule(UNIFORM)(calibration, density)
    plans = [dataclasses.replace(plan, head_map=None) for plan in plans]
    config = calibration.model.config
    return freeze_schedule(plans, config.num_hidden_layers, config.num_key_value_heads)


# --- What anchors score by ---


def shared_scores(runner: LayerRunner, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Scores_BKQP that are the same for all heads: the layer's own, summed."""
    scores_BKQP = runner.scores(layer, x_BTD)
    return jnp.broadcast_to(scores_BKQP.sum(1, keepdims=True), scores_BKQP.shape)


def recency_scores(runner: LayerRunner, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Scores_BKQP that prefer the nearest tiles (StreamingLLM, arXiv 2309.17453)."""
    K, Q, P = runner.config.num_key_value_heads, runner.num_query_tiles, runner.num_key_tiles
    return jnp.broadcast_to(jnp.arange(P, dtype=jnp.float32), (1, K, Q, P))


def quest_scores(runner: LayerRunner, layer: int, x_BTD: jax.Array) -> jax.Array:
    """Scores_BKQP: the largest product of a query tile with any key within a tile's least and largest values.

    Quest (arXiv 2406.10774) bounds q k by the page's element-wise extremes, for one query; here it is summed over the
    softmax of all rows and heads of a query tile, as our masses are.
    """
    q_BTNH, k_BKHS = runner.queries_and_keys(layer, x_BTD)
    (B, T, N, H), K = q_BTNH.shape, k_BKHS.shape[1]
    M, Y, P, Q = runner.selection.tile_size, runner.selection.query_tile, runner.num_key_tiles, runner.num_query_tiles
    k_BKHPM = pad_axis(k_BKHS, 3, P * M).reshape(B, K, H, P, M)
    real_PM = np.arange(P * M).reshape(1, 1, 1, P, M) < T
    k_BKHPM = jnp.where(real_PM, k_BKHPM, k_BKHPM[..., :1])
    q_BQYKGH = pad_axis(q_BTNH, 1, Q * Y).reshape(B, Q, Y, K, N // K, H)
    low_BKHP, high_BKHP = k_BKHPM.min(-1), k_BKHPM.max(-1)
    visible_QP = np.arange(P)[None] * M < (np.arange(Q)[:, None] + 1) * Y

    def pooled(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BYKGH, visible_P = args
        bound_BKGYP = jnp.einsum("BYKGH,BKHP->BKGYP", jnp.maximum(q_BYKGH, 0), high_BKHP)
        bound_BKGYP += jnp.einsum("BYKGH,BKHP->BKGYP", jnp.minimum(q_BYKGH, 0), low_BKHP)
        bound_BKGYP = jnp.where(visible_P.reshape(1, 1, 1, 1, P), bound_BKGYP * H**-0.5, -jnp.inf)
        return jax.nn.softmax(bound_BKGYP, axis=-1).sum((2, 3))

    return jnp.moveaxis(jax.lax.map(pooled, (jnp.moveaxis(q_BQYKGH, 1, 0), visible_QP)), 0, 2)


# --- The rows of the table ---


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a rule that makes the schedule, and the scores that its anchors choose by."""

    name: str
    rule: Rule
    tile_size: int = 16
    query_tile: int = 16
    score: Score = LayerRunner.scores
    oracle: str | None = None  # the setting that differs from it in reusing nothing
    longest: int = LEAST_TOKENS  # tokens that it is affordable for


ALL = 10**9  # anchors: as many as there are layers, which is the oracle
ORACLE, LAYER_ORACLE, SMALL_ORACLE = "oracle, uniform", "oracle, layer budgets", "oracle, tile 8, layer budgets"
SETTINGS = [
    Setting(ORACLE, search_rule(UNIFORM, ALL)),
    Setting("oracle, budgets by mass alone", search_rule(PER_HEAD, ALL, weighted=False)),
    Setting(LAYER_ORACLE, search_rule(PER_LAYER, ALL)),
    Setting(SMALL_ORACLE, search_rule(PER_LAYER, ALL), 8),
    Setting("oracle, uniform, a choice per row", search_rule(UNIFORM, ALL), query_tile=1, longest=512),
    Setting("threshold rule, 0.65", threshold_rule, oracle=ORACLE),
    Setting("threshold rule, 20 REUSE or more", partial(threshold_rule, least_reuse=20), oracle=ORACLE),
    Setting("paper's rule: mass, dynamic programme", paper_rule, oracle=ORACLE),
    Setting("search, uniform", search_rule(UNIFORM), oracle=ORACLE),
    Setting("search, layer budgets", search_rule(PER_LAYER), oracle=LAYER_ORACLE),
    Setting("search, head budgets", search_rule(PER_HEAD)),
    Setting("search, tile 8, layer budgets", search_rule(PER_LAYER), 8, oracle=SMALL_ORACLE),
    Setting("search, tile 8, head budgets", search_rule(PER_HEAD), 8, oracle=SMALL_ORACLE),
    Setting("search, tile 8, query tile 8, layer budgets", search_rule(PER_LAYER), 8, 8),
    Setting("baseline: no head map", search_without_head_maps, oracle=ORACLE),
    Setting("baseline: one index set for all heads", search_rule(UNIFORM), score=shared_scores, oracle=ORACLE),
    Setting("baseline: sliding window and sink", search_rule(UNIFORM), score=recency_scores),
    Setting("baseline: Quest's page bounds, every layer", search_rule(UNIFORM, ALL), score=quest_scores),
]


# --- Measuring ---

COLUMNS = ("tokens", "target", "setting", "window", "density", "reuse", "log_perplexity", "kl", "agree")
COMPARED = 2048  # tokens of a window that are compared with dense, about: they tell enough


class Bench:
    """A model and its articles; calibrations and dense runs are kept as long as the next settings use them."""

    def __init__(self, config: LlamaConfig, params: Any, mesh: Mesh, articles: Sequence[Mapping[str, np.ndarray]]):
        self.config, self.params, self.mesh = config, params, mesh
        self.tested, self.calibrating = articles
        self._calibrations: dict[tuple[int, int, int], ArticleCalibration] = {}
        self._dense_streams: dict[tuple[int, str], jax.Array] = {}

    def calibration(self, length: int, setting: Setting) -> ArticleCalibration:
        """That of the setting's tile sizes, kept until others are asked for."""
        key = (length, setting.tile_size, setting.query_tile)
        if key not in self._calibrations:
            self._calibrations.clear()
            count = min(max(CALIBRATION_TOKENS // length, 1), 4)
            windows = [jnp.asarray(ids[:, :length]) for ids in self.calibrating.values()][:count]
            selection = Selection(tile_size=setting.tile_size, query_tile=setting.query_tile)
            model = LlamaModel(self.config, None, selection)
            self._calibrations[key] = ArticleCalibration(model, self.params, windows, self.mesh)
        return self._calibrations[key]

    def measure(self, calibration: ArticleCalibration, plans: Schedule, score: Score, window: str) -> dict[str, Any]:
        """One window of one setting, against dense: the CSV file's columns from density on."""
        runner, densities = calibration.runner, []
        ids_BT = jnp.asarray(self.tested[window][:, : runner.length])
        x_BTD = runner.run(runner.embed(ids_BT), 0, tile_chooser(runner, plans, score, densities))
        dense_BTD = self._dense_stream(runner, ids_BT, window)
        compared = runner.compare(dense_BTD, x_BTD, ids_BT, max(1, runner.length // COMPARED))
        return {
            "density": float(np.mean(densities)),
            "reuse": sum(plan.mode == REUSE for plan in plans),
            "log_perplexity": float(np.mean(compared.sparse_nll - compared.dense_nll, dtype=np.float64)),
            "kl": float(compared.kl.mean()),
            "agree": float(compared.same_top1.mean()),
        }

    def _dense_stream(self, runner: LayerRunner, ids_BT: jax.Array, window: str) -> jax.Array:
        key = (runner.length, window)
        if key not in self._dense_streams:
            self._dense_streams[key] = runner.run(runner.embed(ids_BT), 0, lambda *_: None)
        return self._dense_streams[key]


def tile_chooser(
    runner: LayerRunner, plans: Schedule, score: Score, densities: list[float]
) -> Callable[[int, jax.Array], jax.Array | None]:
    """How each layer of a schedule gets its tiles; appends every sparse layer's counted density to `densities`."""
    chosen: dict[int, jax.Array] = {}
    capacity = max(plan.largest_budget or 0 for plan in plans)  # the same for all anchors: each width compiles anew

    def choose(layer: int, x_BTD: jax.Array) -> jax.Array | None:
        plan = plans[layer]
        if plan.mode == DENSE:
            return None
        if plan.mode == ANCHOR:
            chosen[layer] = select_tiles(score(runner, layer, x_BTD), runner.selection.with_top_k(capacity))
        tiles_BKQC = plan.attended(chosen[layer if plan.anchor is None else plan.anchor])
        densities.append(density_of(tiles_BKQC, runner.selection))
        padding = -tiles_BKQC.shape[-1] % 8  # few widths
        return jnp.pad(tiles_BKQC, [(0, 0)] * 3 + [(0, padding)], constant_values=NO_TILE)

    return choose


def measure_missing(bench: Bench, results: ResultsFile, args: argparse.Namespace) -> None:
    """Measures what the CSV file lacks."""
    for length, target, setting in tqdm([*jobs(args)], desc="settings", unit="setting", disable=None):
        key = {"tokens": length, "target": target, "setting": setting.name}
        missing = [window for window in bench.tested if not results.has(**key, window=window)]
        if not missing:
            continue
        calibration = bench.calibration(length, setting)
        plans = setting.rule(calibration, target)
        for window in tqdm(missing, desc=setting.name, unit="window", disable=None, leave=False):
            results.add(key | {"window": window} | bench.measure(calibration, plans, setting.score, window))


def jobs(args: argparse.Namespace) -> Iterator[tuple[int, float, Setting]]:
    """Everything to measure, tile sizes together, for each is calibrated and compiled once."""
    settings = [s for s in SETTINGS if not args.settings or s.name in args.settings]
    for length in args.seq_len:
        for setting in sorted(settings, key=lambda s: (-s.tile_size, -s.query_tile)):
            for target in [args.density] if args.density else DENSITIES.get(length, (DEFAULT_DENSITY,)):
                if length <= setting.longest:
                    yield length, target, setting


# --- The table ---


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a row for each length, density and setting, over its windows."""
    groups: dict[tuple[int, float, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((int(row["tokens"]), float(row["target"]), row["setting"]), []).append(row)
    oracles = {setting.name: setting.oracle for setting in SETTINGS}
    columns = ("tokens", "setting", "density", "REUSE", "change of log perplexity, %", "selection + reuse, %")
    columns += ("KL, nats", "same likeliest token", "n")
    cells = []
    for (tokens, target, setting), windows in groups.items():
        oracle = groups.get((tokens, target, oracles.get(setting) or ""))
        cells.append((tokens, setting, *format_windows(windows, oracle), len(windows)))
    return markdown(columns, cells)


def format_windows(windows: Sequence[Mapping[str, str]], oracle: Sequence[Mapping[str, str]] | None) -> Sequence[str]:
    """The table's cells from density on; `oracle` has the rows of the setting's oracle, if there are any."""
    means = {name: np.mean([float(row[name]) for row in windows]) for name in ("density", "kl", "agree")}
    reuse = sorted({int(row["reuse"]) for row in windows})
    changes = log_perplexity_changes(windows)
    error = standard_error(changes)
    change = f"{changes.mean():+.2f}" + ("" if error is None else f" ± {error:.2f}")
    parts = ""
    if oracle:
        selection = log_perplexity_changes(oracle).mean()
        parts = f"{selection:+.2f} {changes.mean() - selection:+.2f}"
    similar = (f"{means['kl']:.4f}", f"{means['agree']:.1%}")
    return (f"{means['density']:.1%}", "-".join(map(str, reuse)), change, parts, *similar)


def log_perplexity_changes(windows: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Percent, one for each window: 100 times its mean difference of nll."""
    return 100 * np.array([float(row["log_perplexity"]) for row in windows])


# --- The command ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=whole_numbers, default=(512, 2048), help="lengths (512,2048)")
    parser.add_argument("--windows", type=whole_number, default=WINDOWS, help=f"articles tested ({WINDOWS})")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, metavar="NAME", help=f"some of: {'; '.join(names)}")
    parser.add_argument("--density", type=float, help="of the sparse layers, counted, in (0, 1] (by length)")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help=f"({DEFAULT_WEIGHTS})")
    parser.add_argument("--csv", type=Path, default=Path("quality.csv"), help="rows already there are not run again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    if not 2 <= args.seq_len[0] <= args.seq_len[-1] <= LEAST_TOKENS:
        parser.error(f"seq_len must be from 2 to {LEAST_TOKENS}, the tokens of an article, got {args.seq_len}")
    if args.windows < 1:
        parser.error(f"windows must be at least 1, got {args.windows}")
    if args.density is not None and not 0 < args.density <= 1:
        parser.error(f"density must be above 0 and at most 1, got {args.density}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the CSV file lacks, and prints the table."""
    args = parse_args(argv)
    with exit_on_bad_input(), ctrl_c_raises():
        results = ResultsFile(args.csv, COLUMNS)
        mesh = make_mesh(configure_device("cpu"))
        manifest = read_manifest(args.weights_dir)
        params = load_weights(args.weights_dir, manifest, jnp.dtype(jnp.float32), mesh)
        if not ARTICLES.is_dir():
            write_articles(ARTICLES)
        articles = read_articles(load_tokenizer(args.weights_dir, manifest.tokenizer), args.windows)
        measure_missing(Bench(manifest.config, params, mesh, articles), results, args)
        table = format_table(results.rows)
        print(table)
        if args.markdown:
            args.markdown.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
