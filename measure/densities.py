"""What --densities and --html look at beyond the run's own schedule: other densities, and the tiles of a few layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from attention.sharding import fetch
from kascade_core import ANCHOR, NO_TILE, REUSE, LayerPlan, attended_tiles, density_of, membership
from llama_model import LlamaModel
from measure import hosts
from measure.layerwise import Calibration, LayerRunner
from measure.machine import time_interleaved
from measure.quality import compare, run_windows
from measure.schedules import find_schedule
from measure.settings import Settings
from network.programs import Forward, Output
from report.results import DensityRow, Quality, TileMap, as_ranges, layer_types, schedule_sha256

MAPPED_ROWS = 64  # query tiles of a map, at most


def measure_density(
    asked: float,
    settings: Settings,
    calibration: Calibration,
    dense: Forward,
    dense_outputs: Sequence[Output],
    windows: Sequence[jax.Array],
) -> DensityRow:
    """A schedule at one density of the sparse layers, made and measured as the run's own is.

    Args:
      asked: in (0, 1].
      settings: of the run.
      calibration: of the run; what it shows at any budget is taken from it.
      dense, dense_outputs: the compiled dense forward, and what it gave for each of `windows`.
      windows: the tested ones, int32 [1, T].
    """
    selection = dataclasses.replace(settings.selection, top_k=None, density=asked)
    calibration = calibration.at(selection)
    params, mesh = calibration.params, calibration.mesh
    plans, _ = hosts.from_first(find_schedule(dataclasses.replace(settings, selection=selection), calibration))
    model = calibration.model.clone(schedule=plans)
    sparse = model.compile(params, windows[0], mesh)
    outputs = run_windows(sparse, params, windows)
    attended = attended_tiles(model.schedule, outputs[0].tiles)
    compared = compare(calibration.model, params, windows, dense_outputs, outputs, mesh)
    quality = Quality(compared, [density_of(tiles) for tiles in attended.values()])
    forwards = {"dense": dense, "sparse": sparse}
    times = time_interleaved({name: partial(f, params, windows[0]) for name, f in forwards.items()}, settings.n_runs)
    return DensityRow(
        asked=asked,
        density=quality.density,
        sparse_perplexity=quality.sparse_perplexity,
        degradation_pct=quality.degradation_pct,
        error_pct=quality.error_pct,
        delta_log_ppl=quality.delta_log_ppl,
        kl=quality.kl.mean,
        same_top1=quality.same_top1,
        dense_ms=times["dense"],
        sparse_ms=times["sparse"],
        layer_types=layer_types(model.schedule),
        schedule_sha256=schedule_sha256(model.schedule),
    )


def mapped_layers(plans: Sequence[LayerPlan]) -> list[int]:
    """The layers whose tiles are shown: the first anchor, the reuse layer farthest from its anchor, the last anchor."""
    anchors = [layer for layer, plan in enumerate(plans) if plan.mode == ANCHOR]
    reusing = [layer for layer, plan in enumerate(plans) if plan.mode == REUSE]
    farthest = max(reusing, key=lambda layer: layer - plans[layer].anchor, default=None)
    return sorted({*anchors[:1], *anchors[-1:], *([] if farthest is None else [farthest])})


def map_tiles(
    model: LlamaModel,
    params: Any,
    ids_BT: jax.Array,
    plans: Sequence[LayerPlan],
    attended: Mapping[int, np.ndarray | None],
    mesh: Mesh,
) -> list[TileMap]:
    """What head 0 of a few layers attends to in a window, and the dense attention mass that it keeps.

    Args:
      model: dense.
      params: its variables.
      ids_BT: int32 [1, T], the window.
      plans: the sparse model's.
      attended: each layer's tiles_BKQC of that window.
      mesh: the run's devices.
    """
    shown, maps = mapped_layers(plans), []
    if not shown:
        return []
    runner = LayerRunner(model, params, ids_BT.shape[1], mesh)
    x_BTD = runner.embed(ids_BT)
    for layer in range(shown[-1] + 1):
        if layer in shown:
            masses_QP = fetch(runner.scores(layer, x_BTD))[0, 0]
            maps.append(_map_of(layer, attended[layer][:1, :1], masses_QP))
        if layer < shown[-1]:
            x_BTD = runner.dense(layer, x_BTD)
    return maps


def _map_of(layer: int, tiles_BKQC: np.ndarray, masses_QP: np.ndarray) -> TileMap:
    Q, P = masses_QP.shape
    kept_Q = (masses_QP * membership(tiles_BKQC, P)[0, 0]).sum(-1) / masses_QP.sum(-1)
    rows = np.unique(np.linspace(Q - 1, 0, min(Q, MAPPED_ROWS)).round().astype(int))
    chosen = [np.sort(tiles_C[tiles_C != NO_TILE]) for tiles_C in tiles_BKQC[0, 0, rows]]
    return TileMap(
        layer=layer,
        head=0,
        key_tiles=P,
        query_tiles=rows.tolist(),
        tiles=[as_ranges(tiles) for tiles in chosen],
        mass_kept=[round(float(share), 4) for share in kept_Q[rows]],
    )
