"""Both arms' answers to retrieval tasks, and the oracle's, in which every sparse layer chooses for itself.

An answer is right where greedy decoding would give it: each of its tokens is the likeliest after those before. The
answer is decoded step by step: in a prefill, where rows of one query tile share their choice of tiles, an answer that
stands there already would help to find itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from attention.sharding import fetch, first_device, jit, keep_on, move, steps_mesh
from kascade_core import ANCHOR, REUSE, attended_tiles, mean_density, tile_count
from llama_model import LlamaModel
from measure.decoding import cache_dtype, cache_size, check_cache_fits, step_densities
from measure.tasks import ANSWER_ROOM, CANDIDATES, Ids, Item, Task
from network.cache import KVCache, join_caches
from network.programs import Decoded, Decoder
from report.results import PROMPT, QUESTION, Answers, TaskRow

DENSE_ARM, SPARSE_ARM, ORACLE_ARM = "dense", "sparse", "oracle"
QUESTION_STEP = 8  # tokens of a question, rounded up to these, are decoded: the same for nearly any number of items
Answer = tuple[bool, int]  # whether it is right, and the right one's rank among the candidates, from 1


def oracle_of(model: LlamaModel) -> LlamaModel:
    """The model with every REUSE layer made an ANCHOR with the same budgets: it differs in reusing nothing."""
    plans = [dataclasses.replace(plan, largest_budget=None) for plan in model.schedule]
    own = {"mode": ANCHOR, "anchor": None, "head_map": None}
    return model.clone(schedule=[dataclasses.replace(p, **own) if p.mode == REUSE else p for p in plans])


class Answerer:
    """Several models' programs for prompts of one length, one of each kind and model.

    Attributes:
      densities: {(arm, setup): mean over the layers, of the first prompt}.
    """

    def __init__(self, models: Mapping[str, LlamaModel], params: Any, length: int, mesh: Mesh) -> None:
        self.models, self.params, self.length, self.mesh = models, params, length, mesh
        self.dtype = cache_dtype(models[DENSE_ARM], first_device(mesh))
        unit = math.lcm(*(cache_size(model.selection, 1) for model in models.values()))
        self.size = tile_count(length + ANSWER_ROOM, unit) * unit
        check_cache_fits(models[DENSE_ARM], CANDIDATES, self.size, first_device(mesh))
        self.steps_mesh = steps_mesh(mesh, 1)
        self.step_params = keep_on(params, self.steps_mesh)
        ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
        with ThreadPoolExecutor(len(models)) as pool:  # the compiler leaves Python's lock
            jobs = {arm: pool.submit(model.compile, params, ids_BT, mesh, True) for arm, model in models.items()}
            self.prefill = {arm: job.result() for arm, job in jobs.items()}
        self.decoders: dict[tuple[str, int, int], Decoder] = {}
        self.densities: dict[tuple[str, str], float] = {}
        self._scores = jit(self._score, mesh)

    def compile_steps(self, task: Task) -> None:
        """Compiles what decodes this task's questions and answers, all arms side by side."""
        config, wanted = self.models[DENSE_ARM].config, []
        for arm in self.models:
            wanted += [(arm, CANDIDATES, answer_steps(task))] + [(arm, 1, question_steps(task))] * (arm != DENSE_ARM)
        wanted = [key for key in wanted if key not in self.decoders]
        with ThreadPoolExecutor(len(self.models)) as pool:
            jobs = {}
            for arm, batch, steps in wanted:
                cache = KVCache.shapes(config, batch, self.size, self.dtype, self.steps_mesh)
                compile_decode = self.models[arm].compile_decode
                jobs[arm, batch, steps] = pool.submit(compile_decode, self.step_params, cache, steps, self.steps_mesh)
            self.decoders |= {key: job.result() for key, job in jobs.items()}

    def answers(self, task: Task, item: Item) -> dict[tuple[str, str], Answer]:
        """What each arm answers in each set-up, by (arm, setup)."""
        ids_BT, steps = jnp.asarray([item.prompt], jnp.int32), answer_steps(task)
        stream, cache = self._fill(DENSE_ARM, ids_BT)
        found = {}
        found[DENSE_ARM, PROMPT] = found[DENSE_ARM, QUESTION] = self._ask(DENSE_ARM, stream, cache, item, steps)
        first = self.length - question_steps(task)
        for arm in self.models:
            if arm == DENSE_ARM:
                continue
            found[arm, PROMPT] = self._ask(arm, *self._fill(arm, ids_BT), item, steps)
            decoded = self._decode(arm, ids_BT[:, first:], first, cache)
            cache = decoded.cache  # what was written behind the context is overwritten by the next arm's question
            if (arm, QUESTION) not in self.densities:
                self.densities[arm, QUESTION] = float(np.mean(step_densities(self.models[arm], decoded.tiles, first)))
            found[arm, QUESTION] = self._ask(arm, decoded.stream, cache, item, steps)
        return found

    def _fill(self, arm: str, ids_BT: jax.Array) -> tuple[jax.Array, KVCache]:
        """The prompt's final stream, and its cache."""
        forward = self.prefill[arm]
        output = forward(self.params, ids_BT)
        if (arm, PROMPT) not in self.densities:
            attended = attended_tiles(self.models[arm].schedule, output.fetch_tiles())
            self.densities[arm, PROMPT] = mean_density(attended)
        return output.stream, forward.fill_cache(output, self.size, self.mesh, self.dtype)

    def _decode(self, arm: str, ids_BN: jax.Array, first: int, cache: KVCache) -> Decoded:
        positions_B = jnp.full((len(ids_BN),), first, jnp.int32)
        ids_BN, positions_B = move((ids_BN, positions_B), self.steps_mesh)
        return self.decoders[arm, *ids_BN.shape](self.step_params, ids_BN, positions_B, cache)

    def _ask(self, arm: str, stream: jax.Array, cache: KVCache, item: Item, steps: int) -> Answer:
        """Decodes all candidates side by side after the cached prompt, whose last row is that of `stream`."""
        ids, is_token = padded(item.candidates, steps + 1)
        wide = join_caches([cache] * CANDIDATES, self.steps_mesh)
        decoded = self._decode(arm, jnp.asarray(ids[:, :-1]), self.length, wide)
        last = jnp.repeat(move(stream[:, -1:], self.steps_mesh), CANDIDATES, axis=0)
        x_BTD = jnp.concatenate([last, decoded.stream], axis=1)
        nll, best = fetch(self._scores(self.step_params, x_BTD, ids))
        return answer_of(nll, best[0], ids, is_token)

    def _score(self, params: Any, x_BTD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Losses of all candidates' tokens, and the likeliest tokens at the right one's."""
        model = self.models[DENSE_ARM]
        nll_BT = model.apply(params, x_BTD, ids_BT, method="next_token_nll")
        return nll_BT, model.apply(params, x_BTD[:1], method="likeliest")


def answer_steps(task: Task) -> int:
    """Steps after a prompt: an answer's last token is not read."""
    return max(max(len(ids) for item in task.items for ids in item.candidates) - 1, 1)


def question_steps(task: Task) -> int:
    """Tokens at the end of a prompt that are decoded where the context alone is prefilled."""
    longest = max(item.question for item in task.items)
    return tile_count(longest, QUESTION_STEP) * QUESTION_STEP


def padded(candidates: Sequence[Ids], length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [candidates, length], and bool: where there is a token."""
    ids = np.zeros((len(candidates), length), np.int32)
    for row, tokens in zip(ids, candidates, strict=True):
        row[: len(tokens)] = tokens
    return ids, np.arange(length)[None] < np.array([[len(tokens)] for tokens in candidates])


def answer_of(nll: np.ndarray, best: np.ndarray, ids: np.ndarray, is_token: np.ndarray) -> Answer:
    """From the losses of the candidates' tokens and the likeliest tokens at the right one's, which is the first row.

    A candidate that is as likely as the right one counts as likelier.
    """
    right = bool(np.all((best == ids[0]) | ~is_token[0]))
    loss = np.where(is_token, nll.astype(np.float64), 0).sum(1)
    return right, 1 + int(np.sum(loss[1:] <= loss[0]))


def measure_task(answerer: Answerer, task: Task, length: int) -> list[TaskRow]:
    """A row for each set-up; `length` is what --task_len asked for."""
    answerer.compile_steps(task)
    items = tqdm(task.items, task.name, unit="prompt", disable=None, leave=False)
    found = [answerer.answers(task, item) for item in items]
    chance = float(np.mean([item.chance for item in task.items]))
    rows = []
    for setup in (PROMPT, QUESTION):
        arms = {arm: Answers(*zip(*(answers[arm, setup] for answers in found))) for arm in answerer.models}
        density = answerer.densities[SPARSE_ARM, setup]
        rows.append(TaskRow(task.name, length, task.filler, setup, chance, CANDIDATES, density, **arms))
    return rows
