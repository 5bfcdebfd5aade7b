"""What makes a schedule: the threshold rule, the paper's dynamic programme, or a search; and files of schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from errors import InputError, quote
from kascade_core import (
    ANCHOR,
    DENSE,
    FIRST_LAYER,
    REUSE,
    LayerPlan,
    Schedule,
    Selection,
    add_head_maps,
    decide_by_threshold,
    freeze_schedule,
    similarity_matrix,
)
from measure.layerwise import Calibration, Observation
from measure.search import ranks_of, search_schedule, seen_by_query_tile
from measure.settings import DP, MASS, SEARCH, Settings
from measure.texts import CalibratedOn
from report.results import LimitCheck, write_json
from weights.config import MOST_LAYERS, LlamaConfig
from weights.fields import Fields, in_file, read_json
from weights.folder import Manifest


def find_schedule(settings: Settings, calibration: Calibration) -> tuple[Schedule, LimitCheck | None]:
    """The schedule that the settings ask for, and what it cost on held-out calibration windows if measured."""
    if settings.scheduler == SEARCH:
        return search_schedule(calibration, settings.anchors, settings.budgets, settings.max_degradation)
    importance_L = None
    if settings.similarity == MASS:
        similarity_LL, head_maps = mass_similarity(calibration.observations, calibration.model.selection)
        importance_L = np.mean([seen.importance for seen in calibration.observations], axis=0)
    else:
        similarity_LL = similarity_matrix(calibration.tiles)
    if settings.scheduler == DP:
        anchors = settings.anchor_layers or dp_anchors(similarity_LL, settings.anchors, importance_L)
        plans = decide_nearest(
            similarity_LL, anchors, "named" if settings.anchor_layers else "chosen by dynamic programming"
        )
    else:
        plans = decide_by_threshold(similarity_LL, settings.threshold, settings.max_reuse_dist)
    if settings.head_maps:
        return with_head_maps(plans, load_head_maps(settings.head_maps, calibration.model.config)), None
    if settings.similarity != MASS:
        return add_head_maps(plans, calibration.tiles), None
    return tuple(
        dataclasses.replace(plan, head_map=head_maps.get((i, plan.anchor))) for i, plan in enumerate(plans)
    ), None


# --- The paper's similarity and dynamic programme (arXiv 2512.16391) ---


def recovered_mass(scores_LKQP: np.ndarray, selection: Selection, budget: int) -> np.ndarray:
    """float32 [Q, L K, L K]: of the mass of a head (the last axis), the share in the best `budget` tiles of another."""
    L, K, Q, P = scores_LKQP.shape
    scores = scores_LKQP.reshape(L * K, Q, P)
    chosen = (ranks_of(scores, selection) < budget).astype(np.float32)
    return np.matmul(chosen.transpose(1, 0, 2), scores.transpose(1, 2, 0))


def mass_similarity(
    observations: Sequence[Observation], selection: Selection
) -> tuple[np.ndarray, dict[tuple[int, int], tuple[int, ...]]]:
    """The paper's similarity of layer i reusing an earlier layer a, float [L, L] in [0, 1], and its best head maps.

    For every pair of KV heads, the share of i's attention mass that a's Top-K recovers over that which i's own Top-K
    recovers; the best of a's heads for each of i's; the minimum over the text's query tiles that drop something, the
    mean over texts and heads.

    Returns:
      similarity_LL, 0 where a is not earlier than i; {(i, a): the head of a for each KV head of i}.
    """
    L, K, Q, P = observations[0].scores.shape
    slots = selection.slots(P)
    dropping = seen_by_query_tile(Q, P, selection) > slots
    if not dropping.any():
        dropping[:] = True
    total = np.zeros((L, K, L, K))  # a's layer and head, i's layer and head
    means = np.zeros((L, K, L, K))
    for observation in observations:
        recovered = recovered_mass(observation.scores, selection, slots)[dropping]
        best_own = np.diagonal(recovered, axis1=1, axis2=2)
        ratio = np.minimum(recovered / best_own[:, None, :], 1).reshape(-1, L, K, L, K)
        total += ratio.min(0) / len(observations)
        means += ratio.mean(0) / len(observations)
    best = means.argmax(1)  # [a, i, head of i]
    values = np.take_along_axis(total, best[:, None], axis=1)[:, 0].mean(-1)
    maps = {(i, a): tuple(int(head) for head in best[a, i]) for i in range(L) for a in range(i)}
    return np.tril(values.T, -1), maps


def dp_anchors(similarity_LL: np.ndarray, num_anchors: int, importance_L: np.ndarray | None = None) -> list[int]:
    """The anchors among layers 1 to L - 1 that maximise every layer's similarity to the nearest anchor before it.

    dp[m][j] = max over i of dp[m - 1][i] + sum of S[l, i] for l in i..j-1, with S[i, i] = 1, weighted by importance.
    Layer 0 is dense and takes no part; layer 1 is always an anchor. `num_anchors` is from 1 to L - 1.
    """
    L = len(similarity_LL)
    weights_L = np.ones(L) if importance_L is None else importance_L
    gains = (similarity_LL + np.eye(L)) * weights_L[:, None]
    best = np.full((num_anchors + 1, L + 1), -np.inf)
    source = np.zeros((num_anchors + 1, L + 1), int)
    best[0, 1] = 0
    for m in range(1, num_anchors + 1):
        for j in range(2, L + 1):
            totals = [best[m - 1, i] + gains[i:j, i].sum() for i in range(1, j)]
            source[m, j], best[m, j] = 1 + int(np.argmax(totals)), max(totals)
    anchors, j = [], L
    for m in range(num_anchors, 0, -1):
        j = int(source[m, j])
        anchors.append(j)
    return anchors[::-1]


def decide_nearest(similarity_LL: np.ndarray, anchors: Sequence[int], reason: str = "") -> Schedule:
    """Every layer that is no anchor reuses the nearest anchor before it, as the paper's programme counts.

    Layers before the first anchor are DENSE; `reason` is that of the anchors.
    """
    plans = [FIRST_LAYER]
    for layer in range(1, len(similarity_LL)):
        if layer in anchors:
            plans.append(LayerPlan(ANCHOR, reason=reason))
            continue
        if layer < min(anchors):
            plans.append(LayerPlan(DENSE, reason="before the first anchor"))
            continue
        anchor = max(a for a in anchors if a < layer)
        similarity = float(similarity_LL[layer, anchor])
        plans.append(LayerPlan(REUSE, anchor, similarity=similarity, reason=f"similarity: {similarity:.2%}"))
    return tuple(plans)


def with_head_maps(plans: Sequence[LayerPlan], maps_LK: np.ndarray) -> Schedule:
    """The schedule with each REUSE layer's own row as its head map."""
    return tuple(
        dataclasses.replace(plan, head_map=tuple(map(int, row))) if plan.mode == REUSE else plan
        for plan, row in zip(plans, maps_LK, strict=True)
    )


# --- Files ---


def load_head_maps(path: Path, config: LlamaConfig) -> np.ndarray:
    """int [L, K]: for each layer and KV head the anchor's KV head, as the paper's reference code saves them.

    Raises:
      InputError: the file cannot be read, or is not such an array for this model.
    """
    try:
        with path.open("rb") as file:
            maps_LK = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"head_maps {path} cannot be read: {error.strerror}") from error
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise InputError(f"head_maps {path} is not a .npy array: {quote(str(error))}") from error
    expected, K = (config.num_hidden_layers, config.num_key_value_heads), config.num_key_value_heads
    if maps_LK.shape != expected or maps_LK.dtype.kind not in "iu" or not ((maps_LK >= 0) & (maps_LK < K)).all():
        raise InputError(
            f"head_maps {path}: expected whole numbers from 0 to {K - 1}, an array {expected} of layers and KV heads, "
            f"got {maps_LK.dtype} {maps_LK.shape}"
        )
    return maps_LK


SCHEDULE_VERSION = 2
LARGEST_FILE = 2**24  # bytes; 1,024 layers of 128 heads with head maps and budgets take 2 MB
LAYER_FIELDS = ("mode", "anchor", "head_map", "budgets")


def save_schedule(
    path: Path, plans: Sequence[LayerPlan], selection: Selection, manifest: Manifest, calibration: Sequence[jax.Array]
) -> None:
    """Writes a schedule with what it was made for and from: the model, the tile sizes, the calibration windows."""
    saved = {
        "format_version": SCHEDULE_VERSION,
        "model": {"name": manifest.model, "fingerprint": manifest.fingerprint},
        "selection": dataclasses.asdict(selection),
        "calibration": dataclasses.asdict(CalibratedOn.of(calibration)),
        "layers": [{name: getattr(plan, name) for name in LAYER_FIELDS} for plan in plans],
    }
    write_json(path, saved)


@dataclasses.dataclass(frozen=True)
class SavedSchedule:
    """A schedule from a file, and what it was made from."""

    plans: Schedule
    selection: Selection
    calibrated_on: CalibratedOn


def load_schedule(path: Path, manifest: Manifest) -> SavedSchedule:
    """What `save_schedule` wrote.

    Raises:
      InputError: the file cannot be read, is damaged or of another version, or was made for another model.
    """
    saved = Fields(read_json(path, LARGEST_FILE))
    with in_file(path):
        version = saved.integer("format_version", low=0)
        if version != SCHEDULE_VERSION:
            raise InputError(f"format version {version}; this program reads version {SCHEDULE_VERSION}")
        model, calibration = saved.within("model"), saved.within("calibration")
        if model.text("fingerprint") != manifest.fingerprint:
            raise InputError(
                f"it was made for {quote(model.text('name'))}, whose weights are not those of {manifest.model} here; "
                "make one for this model with --save_schedule"
            )
        layers = saved.objects("layers", most=MOST_LAYERS)
        plans = freeze_schedule(
            [_read_plan(layer) for layer in layers],
            manifest.config.num_hidden_layers,
            manifest.config.num_key_value_heads,
        )
        calibrated_on = CalibratedOn(
            calibration.integer("tokens", low=2), calibration.integer("windows"), calibration.text("sha256")
        )
        return SavedSchedule(plans, _read_selection(saved.within("selection")), calibrated_on)


def _read_plan(layer: Fields) -> LayerPlan:
    """One layer of a file; whether it fits the others and the model is `freeze_schedule`'s to say."""
    mode = layer.text("mode")
    anchor = layer.integer("anchor", low=0, default=None)
    head_map, budgets = (layer.integers(name, low=low, default=None) for name, low in (("head_map", 0), ("budgets", 1)))
    return LayerPlan(mode, anchor, head_map and tuple(head_map), budgets and tuple(budgets), reason="loaded")


def _read_selection(sizes: Fields) -> Selection:
    if unknown := sorted(sizes.values.keys() - {field.name for field in dataclasses.fields(Selection)}):
        raise InputError(f"{sizes.called(quote(unknown[0]))} is no size of a selection")
    least = {"tile_size": 1, "top_k": 1, "query_tile": 1, "sink_tiles": 0, "local_tiles": 0, "min_tiles": 0}
    values = {name: sizes.integer(name, low=low, default=None) for name, low in least.items()}
    values |= {"density": sizes.number("density", default=None), "anchor_scoring": sizes.text("anchor_scoring", None)}
    return Selection(**{name: value for name, value in values.items() if value is not None})
