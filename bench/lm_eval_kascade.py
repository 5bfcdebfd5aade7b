"""What do tasks of lm-evaluation-harness score densely, and what with a sparse schedule?

The harness asks `Kascade`, its model class. A context is prefilled with the model's own attention, and what is scored
or generated after it is decoded token by token; a text that is scored whole (rolling) is prefilled whole. Prompts are
padded at their end to few lengths, so that few programs are compiled; tokens of a query tile that is not full are
decoded, so that nothing depends on the padding.

  pip install -r bench/requirements-lm-eval.txt
  python benchmark_kascade_final.py --seq_len 2048 --save_schedule schedule.json
  python -m bench.lm_eval_kascade --tasks lambada_openai,piqa --schedule schedule.json --limit 100
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from attention.sharding import CACHE, jit, keep_on, make_mesh, move, steps_mesh
from errors import InputError, Parser, exit_on_bad_input, quote
from kascade_core import tile_count
from llama_model import LlamaModel, load_weights
from measure.decoding import cache_dtype, cache_size
from measure.machine import configure_device, pick_dtype
from measure.schedules import SavedSchedule, load_schedule
from measure.settings import DTYPES, names, whole_number
from network.cache import KVCache
from network.programs import Decoder, Forward
from report.results import write_json
from report.tables import markdown
from weights.folder import DEFAULT_WEIGHTS, read_manifest
from weights.tokenizers import TextTokenizer, load_tokenizer

try:
    from lm_eval.api.model import LM
except ImportError:  # the class works on anything that has the harness's requests
    LM = object

STEPS = 16  # tokens decoded by one program; a longer row takes several calls
SHORTEST = 128  # tokens of the smallest prefill program, the next ones are twice as long
MOST_GENERATED = 256  # tokens, where a task does not say


class Kascade(LM):
    """A model for lm-evaluation-harness.

    Attributes:
      model: with its schedule; a density in its selection would depend on the padded length (see `fixed_budget`).
      params: its variables, on every device of the mesh.
      tokenizer: of the model.
      mesh: the devices of the prefill; decoding is done on the first.
      max_length: tokens of a text at most; of longer ones the end is taken.
      begin: the token before a text that has no context.
      end: the token that ends a generation, None for none.
    """

    def __init__(
        self,
        model: LlamaModel,
        params: Any,
        tokenizer: TextTokenizer,
        mesh: Mesh,
        max_length: int,
        begin: int,
        end: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.params, self.text_tokenizer, self.mesh = model, params, tokenizer, mesh
        self.max_length, self.begin, self.end = max_length, begin, end
        self.steps_mesh = steps_mesh(mesh, 1)
        self.step_params = keep_on(params, self.steps_mesh)
        self.cache_dtype = cache_dtype(model, mesh.devices.flat[0])
        self._prefills: dict[int, Forward] = {}
        self._decoders: dict[int, Decoder] = {}
        self._score = jit(lambda params, *rows: model.apply(params, *rows, method="next_token_nll"), mesh)

    # --- What the harness asks ---

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log likelihood of the continuation, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = (request.args for request in requests)
        return [self._continuation(*pair) for pair in _progress(pairs, len(requests), disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each text after `begin`; a long one in windows of `max_length` tokens."""
        texts = (request.args[0] for request in requests)
        return [
            -float(sum(self._nll(window)[-count:].sum() for window, count in self._windows(text)))
            for text in _progress(texts, len(requests), disable_tqdm)
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each (context, settings) up to the first of the settings' stops, `until`."""
        pairs = (request.args for request in requests)
        return [self._generate(*pair) for pair in _progress(pairs, len(requests), disable_tqdm)]

    # --- Texts and tokens ---

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Their tokens; spaces at the end of the context go to the continuation, where a token begins with them."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            ids = self.text_tokenizer.encode(continuation)
            return ([self.begin], ids) if ids[:1] != [self.begin] else (ids[:1], ids[1:])
        start = [*self.text_tokenizer.prefix, *self.text_tokenizer.encode(stripped)]
        whole = [*self.text_tokenizer.prefix, *self.text_tokenizer.encode(stripped + continuation)]
        return start, whole[len(start) :]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        start, ids = self._pair(context, continuation)
        if not ids:
            return 0.0, True
        if len(ids) > self.max_length:
            raise InputError(f"a continuation of {len(ids)} tokens is longer than the {self.max_length} of a text")
        row = (start + ids)[-(self.max_length + 1) :]
        nll, best = self._decode_scored(row, len(row) - len(ids))
        return float(-nll.sum()), bool(np.all(best == ids))

    def _windows(self, text: str) -> Iterator[tuple[list[int], int]]:
        """(a window's tokens, how many at its end are scored): every token once, with all the context that fits."""
        ids = [self.begin, *self.text_tokenizer.encode(text)]
        for start in range(1, len(ids), self.max_length):
            stop = min(start + self.max_length, len(ids))
            yield ids[max(stop - self.max_length - 1, 0) : stop], stop - start

    # --- Programs ---

    def _prefill(self, ids: Sequence[int], count: int, room: int) -> tuple[np.ndarray, jax.Array, KVCache]:
        """Runs the first `count` tokens, whole query tiles, and makes a cache with room for `room` tokens.

        What follows them in `ids` is in the program's input as well, in later query tiles, and changes nothing.

        Returns:
          The losses [count] of the tokens after each of them, and the cache.
        """
        length = SHORTEST
        while length < count + 1:
            length *= 2
        row = [*ids[:length], *[0] * (length - len(ids))]
        if length not in self._prefills:
            shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
            self._prefills[length] = self.model.compile(self.params, shape, self.mesh, with_cache=True)
        output = self._prefills[length](self.params, jnp.asarray([row], jnp.int32))
        size = self._cache_size(max(room, length))
        cache = self._prefills[length].fill_cache(output, size, self.mesh, self.cache_dtype)
        return np.asarray(output.nll, np.float64)[0, :count], cache

    def _cache_size(self, tokens: int) -> int:
        """Of few sizes."""
        size = SHORTEST
        while size < tokens:
            size *= 2
        return cache_size(self.model.selection, size)

    def _start(self, ids: Sequence[int], count: int, room: int) -> tuple[int, np.ndarray, KVCache]:
        """Prefills as many of the first `count` tokens as make whole query tiles: (how many, their losses, cache)."""
        query_tile = self.model.selection.query_tile
        whole = count // query_tile * query_tile
        room = tile_count(room, STEPS) * STEPS + STEPS  # the last call's padding is written as well
        if not whole:
            size = self._cache_size(room)
            return (
                0,
                np.zeros(0),
                move(KVCache.empty(self.model.config, 1, size, self.cache_dtype), self.steps_mesh, CACHE),
            )
        return whole, *self._prefill(ids, whole, room)

    def _steps(self, ids: Sequence[int], first: int, cache: KVCache) -> tuple[jax.Array, np.ndarray, KVCache]:
        """At most STEPS steps over ids, -1 for the likeliest: (stream [1, STEPS, D], likeliest ids [STEPS], cache)."""
        size = cache.layers[0][0].shape[1]
        if size not in self._decoders:
            self._decoders[size] = self.model.compile_decode(self.step_params, cache, STEPS, self.steps_mesh)
        row = jnp.asarray([[*ids, *[0] * (STEPS - len(ids))]], jnp.int32)
        inputs = move((row, jnp.full((1,), first, jnp.int32)), self.steps_mesh)
        decoded = self._decoders[size](self.step_params, *inputs, cache)
        return decoded.stream, np.asarray(decoded.best)[0], decoded.cache

    def _decode_scored(self, ids: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
        """Losses of ids[first:] and the likeliest tokens in their places, all of them decoded."""
        start, _, cache = self._start(ids, first - 1, len(ids))
        nll, best = self._scored_steps(ids, start, cache)
        return nll[first - 1 - start :], best[first - 1 - start :]

    def _scored_steps(self, ids: Sequence[int], start: int, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
        """Losses and likeliest tokens of ids[start + 1:], from steps over ids[start:-1]."""
        losses, likeliest = [], []
        for i in range(start, len(ids) - 1, STEPS):
            count = min(STEPS, len(ids) - 1 - i)
            stream, best, cache = self._steps(ids[i : i + count], i, cache)
            targets = [*ids[i + 1 : i + 1 + count], *[0] * (STEPS - count)]
            targets = move(jnp.asarray([targets], jnp.int32), self.steps_mesh)
            losses.append(np.asarray(self._score(self.step_params, stream, targets), np.float64)[0, :count])
            likeliest.append(best[:count])
        return np.concatenate(losses), np.concatenate(likeliest)

    def _nll(self, ids: Sequence[int]) -> np.ndarray:
        """Losses of ids[1:]; the whole query tiles are prefilled."""
        start, nll, cache = self._start(ids, len(ids) - 2, len(ids))
        return np.concatenate([nll, self._scored_steps(ids, start, cache)[0]])

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise InputError(
                f"generation is greedy here: do_sample and temperature are not, got {quote(dict(settings))}"
            )
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        most = settings.get("max_gen_toks", MOST_GENERATED)
        if most >= self.max_length:
            raise InputError(f"max_gen_toks {most} leaves no room for a context in {self.max_length} tokens")
        start = [*self.text_tokenizer.prefix, *self.text_tokenizer.encode(context)] if context else [self.begin]
        start = start[-(self.max_length - most) :]
        found: list[int] = []
        for token in itertools.islice(self._greedy(start, most), most):
            if token == self.end:
                break
            found.append(token)
            text = self.text_tokenizer.decode(found)
            if any(stop in text for stop in stops):
                return text[: min(text.index(stop) for stop in stops if stop in text)]
        return self.text_tokenizer.decode(found)

    def _greedy(self, ids: Sequence[int], most: int) -> Iterator[int]:
        """The likeliest continuation; a program runs when its first token is asked for."""
        position, _, cache = self._start(ids, len(ids) - 1, len(ids) + most)
        last = 0
        while position < len(ids) + most - 1:
            row = [ids[i] if i < len(ids) else -1 for i in range(position, position + STEPS)]
            if row[0] == -1:
                row[0] = last  # a program does not know what the one before found
            _, best, cache = self._steps(row, position, cache)
            yield from map(int, best[max(len(ids) - 1 - position, 0) :])
            last, position = int(best[-1]), position + STEPS


def _progress(items: Any, total: int, disable: bool) -> Any:
    return tqdm(items, "requests", total, disable=disable or None, leave=False)


def fixed_budget(saved: SavedSchedule) -> SavedSchedule:
    """A density made the number of tiles that it is at the calibrated length: it would depend on the padded one."""
    selection = saved.selection
    if selection.density is None:
        return saved
    num_tiles = tile_count(saved.calibrated_on.tokens, selection.tile_size)
    return dataclasses.replace(saved, selection=selection.with_top_k(selection.slots(num_tiles)))


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates both arms and prints their columns."""
    args = parse_args(argv)
    with exit_on_bad_input():
        if LM is object:
            raise InputError("lm-evaluation-harness is not installed: pip install -r bench/requirements-lm-eval.txt")
        found = {arm: evaluate(model, args) for arm, model in make_arms(args).items()}
        print(columns(found), end="")
        if args.json:
            write_json(args.json, found)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=names, required=True, metavar="NAME,...", help="of the harness")
    parser.add_argument("--schedule", type=Path, required=True, metavar="FILE", help="made by --save_schedule")
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="tasks of your own, as YAML files")
    parser.add_argument("--limit", type=whole_number, help="documents of each task at most")
    parser.add_argument("--num_fewshot", type=whole_number, help="examples before each question (the task's own)")
    parser.add_argument("--max_length", type=whole_number, help="tokens of a text at most (the model's context)")
    parser.add_argument("--begin", metavar="TOKEN", help="before a text without a context (the tokenizer's prefix)")
    parser.add_argument("--end", metavar="TOKEN", help="ends a generation, as a task's own stops do")
    parser.add_argument("--device", choices=("cpu", "tpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix inputs")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the harness's results of both arms")
    return parser.parse_args(argv)


def make_arms(args: argparse.Namespace) -> dict[str, Kascade]:
    """The dense and the sparse model for the harness."""
    manifest = read_manifest(args.weights_dir)
    saved = fixed_budget(load_schedule(args.schedule, manifest))
    tokenizer = load_tokenizer(args.weights_dir, manifest.tokenizer)
    begin = tokenizer.prefix[-1] if tokenizer.prefix and not args.begin else token_id(tokenizer, "begin", args.begin)
    end = None if args.end is None else token_id(tokenizer, "end", args.end)
    mesh = make_mesh(configure_device(args.device))
    dtype = jnp.dtype(pick_dtype(args.dtype, args.device, manifest.config)[0])
    params = load_weights(args.weights_dir, manifest, dtype, mesh)
    max_length = args.max_length or manifest.config.max_position_embeddings
    dense = LlamaModel(manifest.config, None, saved.selection, dtype=dtype)
    models = {"dense": dense, "sparse": dense.clone(schedule=saved.plans)}
    return {arm: Kascade(model, params, tokenizer, mesh, max_length, begin, end) for arm, model in models.items()}


def token_id(tokenizer: TextTokenizer, flag: str, token: str | None) -> int:
    """The id of a token that a flag names."""
    found = None if token is None else tokenizer.backend.token_to_id(token)
    if found is None:
        raise InputError(
            f"{flag} must name a token of the vocabulary, such as <s> or <|endoftext|>, got {quote(token)}: this "
            "tokenizer puts none before a text"
        )
    return found


def evaluate(model: Kascade, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The harness's results of one arm: {task: {"metric,filter": value}}."""
    import lm_eval
    from lm_eval.tasks import TaskManager  # no attribute of the package where it loads its parts when asked

    manager = TaskManager(include_path=args.include_path and str(args.include_path))
    unknown = [task for task in args.tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(f"tasks: the harness knows no {quote(unknown[0])}; --include_path adds tasks of your own")
    settings = {"num_fewshot": args.num_fewshot, "limit": args.limit, "task_manager": manager}
    return lm_eval.simple_evaluate(model=model, tasks=list(args.tasks), log_samples=False, **settings)["results"]


def columns(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row for each task and metric, a column with the standard error for each arm."""
    rows = []
    for task, values in found["dense"].items():
        metrics = [key for key, value in values.items() if isinstance(value, float) and "_stderr" not in key]
        rows += [
            (task, key.removesuffix(",none"), *(cell(arm[task], key) for arm in found.values())) for key in metrics
        ]
    return markdown(("task", "metric", *found), rows)


def cell(values: Mapping[str, Any], key: str) -> str:
    """A metric with its standard error, where the harness has one."""
    metric, _, kind = key.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    return f"{values[key]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


if __name__ == "__main__":
    sys.exit(errors.run(main))
