"""A report as one page that opens anywhere: text, tables and plots in a single file that asks for nothing else."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from report import plots, tables
from report.results import FAILED, NOTHING_DROPPED, SUCCESS, SUCCESS_PCT, finite

TEMPLATE = Path(__file__).with_name("page.html")
# Marks that turn the direction of what follows them, so that a name could pass for another text: shown as numbers.
TURNING = {code: f"\\u{code:04x}" for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def page(report: Mapping[str, Any]) -> str:
    """The page of a report as `Results.to_json` or a file of --json has it."""
    report = plain(json.loads(json.dumps(finite(report))))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["tied"] = tied
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        headline=headline(report),
        verdict=verdict(report),
        card=list(card(report)),
        command=command(report),
        settings=[(name, shown(value)) for name, value in report["config"].items()],
        statistics=[(name, shown(value)) for name, value in statistics(report)],
        sections=list(plots.sections(report)),
        limits=list(limits(report)),
        svg=Markup,
    )


def plain(value: Any) -> Any:
    """The report with the marks in its texts that turn the direction of writing made visible."""
    if isinstance(value, dict):
        return {key.translate(TURNING): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.translate(TURNING) if isinstance(value, str) else value


def tied(text: str) -> str:
    """A sentence whose numbers keep their "±" and "%" on their line."""
    for loose in (" ±", "± ", " %", "n = "):
        text = text.replace(loose, loose.replace(" ", "\u00a0"))
    return text


def headline(report: Mapping[str, Any]) -> str:
    """The answer in one sentence."""
    quality = report["quality"]
    if quality["verdict"] == NOTHING_DROPPED:
        return "Nothing was dropped: at these settings the sparse model attends to everything."
    if quality["degradation_pct"] is None:
        return "The sparse model's perplexity is beyond what a number can hold."
    cost = plots.of_error(quality["degradation_pct"], quality["error_pct"], 1)
    here = f"this {report['device']['platform'].upper()}"
    speed = " and ".join(filter(None, [_prefill_speed(report), _decoding_speed(report)]))
    kept = f"Keeping {plots.share(report['density'], 0)} of the attention"
    return f"{kept} costs this model {cost} % perplexity on this text; {speed} on {here}."


def _prefill_speed(report: Mapping[str, Any]) -> str:
    rows = [row for row in report["sweep"] if not row["skipped"]]
    longest = max(rows, key=lambda row: row["length"], default=None)
    if longest and longest["length"] > report["config"]["seq_len"]:
        return f"it reads {longest['length']:,} tokens {_as_fast(longest)}"
    return (
        f"it reads {report['config']['seq_len']:,} tokens {_as_fast(report['timing'] | {'speedup': report['speedup']})}"
    )


def _decoding_speed(report: Mapping[str, Any]) -> str:
    rows = [row for row in report["decode_depths"] if not row["skipped"]]
    if deepest := max(rows, key=lambda row: row["depth"], default=None):
        return f"decodes {_as_fast(deepest)} after {deepest['depth']:,}"
    if decode := report["decode"]:
        times = {f"{arm}_ms": decode[arm]["ms_per_token"] for arm in ("dense", "sparse")}
        return f"decodes {_as_fast(times | {'speedup': decode['speedup']})} after {decode['depth']:,}"
    return ""


def _as_fast(row: Mapping[str, Any]) -> str:
    """A speedup, and whether the arms' runs reach into one another."""
    dense, sparse = row["dense_ms"], row["sparse_ms"]
    noise = " (within the noise)" if max(min(dense), min(sparse)) <= min(max(dense), max(sparse)) else ""
    return f"{row['speedup']:.2f}x as fast{noise}"


def verdict(report: Mapping[str, Any]) -> str:
    """How sure that is."""
    quality = report["quality"]
    interval, limit = quality["interval_pct"], f"{SUCCESS_PCT:g} %"
    reach = f" The 95 % interval reaches from {interval[0]:+.2f} % to {interval[1]:+.2f} %." if interval else ""
    if quality["verdict"] == NOTHING_DROPPED:
        return "Lower --top_k or --density, or raise --seq_len."
    if quality["verdict"] == SUCCESS:
        return f"The cost is under {limit}, by more than two standard errors.{reach}"
    if quality["verdict"] == FAILED:
        return f"The cost is above {limit}, by more than two standard errors.{reach}"
    windows = "One window" if quality["windows"] == 1 else f"{quality['windows']} windows"
    return f"{windows} cannot tell whether the cost is under {limit}; more (--windows) could.{reach}"


def card(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was run, as (name, text)."""
    model, device, config = report["model"], report["device"], report["config"]
    size = f"{model['parameters'] / 1e6:,.1f} million parameters, {model['bytes'] / 1e6:,.0f} MB"
    yield "Model", f"{model['name']}: {model['num_layers']} layers, {size}"
    for role, text in report["texts"].items():
        hashed = f"SHA-256 of the ids {text['ids_sha256'][:12]}…"
        yield f"Text, {role}", f"{text['name']}: {plots.windows_of(text)} ({hashed})"
    kind = device["processor"] if device["platform"] == "cpu" else device["kind"]
    yield "Device", f"{device['count']} {device['platform'].upper()} device(s), {kind}"
    yield "Computed in", f"{config['dtype']}, attention by {report['kernel']}"
    yield "Schedule", f"{config['scheduler']}: {report['layer_types']} (SHA-256 {report['schedule_sha256'][:12]}…)"
    budget = f"Top-K {config['top_k']}" if config["density"] is None else f"density {plots.share(config['density'], 0)}"
    tiles = f"tiles of {config['tile_size']} tokens, query tiles of {config['query_tile']}"
    yield "Selection", f"{tiles}, {budget}, {config['sink_tiles']} sink and {config['local_tiles']} local tiles"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield "Commit", report["git_commit"] or "not from a repository"
    yield "Date", report["date"].replace("T", " ").replace("+00:00", " UTC")


def statistics(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every figure about quality by its name, LongPPL's as well."""
    for name, value in tables.statistics_of(report["quality"]).items():
        yield name, f"{value:.6g}" if isinstance(value, float) else value
    for name, value in (report["long_ppl"] or {}).items():
        yield f"long_ppl {name}", f"{value:.6g}" if isinstance(value, float) else value


def command(report: Mapping[str, Any]) -> list[str]:
    """What to type to do it again, word by word."""
    return ["python", "benchmark_kascade_final.py", *map(shlex.quote, report["command"])]


def shown(value: Any) -> str:
    """A setting's value."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    words = {None: "not given", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def limits(report: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers do not show."""
    quality = report["quality"]
    yield "Perplexity is no task score: a model can predict a text well and still miss the one fact that was dropped."
    yield (
        "Rows of one query tile share one choice of tiles, so that later rows help to choose for earlier ones. A forward's "
        "perplexity may be a little better than token by token; decoding has no such help."
    )
    if quality["windows"] == 1:
        yield "One window of one text was tested: how much the cost varies from text to text is unknown."
    else:
        yield f"{quality['windows']} windows of one text were tested: other texts may cost more or less."
    yield "Standard errors over tokens are too small, because neighbouring tokens depend on each other."
    yield "Times are of this machine, with this dtype and kernel, while whatever else ran on it ran."
    if not report["decode"] and not report["decode_depths"]:
        yield "Decoding was not measured: a forward reads a whole text at once."
    if any(row["beyond_context"] for row in report["decode_depths"]):
        yield "Some depths lie beyond the model's context: only their times mean something."
    if report["decode_depths"]:
        yield "Decoding times by depth use caches of random keys: they are times, and say nothing of quality."
    if not report["tasks"]:
        yield "No tasks were run."
