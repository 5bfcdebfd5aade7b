"""How often do sparse models find in their context what the dense one finds, by schedule and length?

Dense answers each question once for all schedules; both set-ups of measure/answers.py are asked. Each finished question
is written to the CSV file at once, so that an interrupted run goes on where it was. A schedule should be calibrated on
windows of the tasks' length, since its budgets are numbers of tiles.

  python benchmark_kascade_final.py --seq_len 2048 --save_schedule guide.json
  python -m bench.tasks --schedules guide.json --tasks niah_single --task_len 2048 --task_n 50 --csv tasks.csv
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from attention.sharding import make_mesh
from errors import Parser, exit_on_bad_input
from llama_model import LlamaModel, load_weights
from measure.answers import DENSE_ARM, Answerer
from measure.machine import configure_device, pick_dtype
from measure.schedules import load_schedule
from measure.settings import DTYPES, FILLER_NOISE, FILLER_TEXT, TASKS, Settings, names, whole_number
from measure.tasks import Task, make_tasks
from report.results import PROMPT, QUESTION, Answers
from report.tables import ResultsFile, markdown
from weights.folder import DEFAULT_WEIGHTS, read_manifest
from weights.tokenizers import load_tokenizer

COLUMNS = ("task", "tokens", "filler", "item", "arm", "setup", "right", "rank", "density")
TABLE = ("task", "tokens", "filler", "sparse", "schedule", "density", "n", "right [95 %]", "p", "ranked first")


def main(argv: Sequence[str] | None = None) -> int:
    """Asks what is not in the CSV file yet, and prints the table of all that is in it."""
    args = parse_args(argv)
    with exit_on_bad_input():
        results = ResultsFile(args.csv, COLUMNS)
        ask_all(args, results)
        print(table(results), end="")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=names, required=True, metavar="FILE,...", help="made by --save_schedule")
    parser.add_argument("--tasks", type=names, default=TASKS, metavar="NAME,...", help=f"any of {', '.join(TASKS)}")
    parser.add_argument("--task_len", type=whole_number, default=2048, help="tokens of prompt and answer")
    parser.add_argument("--task_n", type=whole_number, default=50, help="questions of each task")
    parser.add_argument("--task_filler", choices=(FILLER_NOISE, FILLER_TEXT), default=FILLER_NOISE)
    parser.add_argument("--device", choices=("cpu", "tpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of matrix inputs")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS)
    parser.add_argument("--csv", type=Path, required=True, help="where finished questions are kept")
    return parser.parse_args(argv)


def ask_all(args: argparse.Namespace, results: ResultsFile) -> None:
    """Answers every question that is missing in the file."""
    settings = Settings(
        tasks=args.tasks, task_len=args.task_len, task_n=args.task_n, task_filler=args.task_filler, device=args.device
    )
    mesh = make_mesh(configure_device(args.device))
    manifest = read_manifest(args.weights_dir)
    schedules = {Path(name).stem: load_schedule(Path(name), manifest) for name in args.schedules}
    tasks = make_tasks(load_tokenizer(args.weights_dir, manifest.tokenizer), settings)
    missing = {task.name: missing_items(results, task, args.task_len, schedules) for task in tasks}
    if not any(missing.values()):
        return
    dtype = jnp.dtype(pick_dtype(args.dtype, args.device, manifest.config)[0])
    params = load_weights(args.weights_dir, manifest, dtype, mesh)
    models = {DENSE_ARM: LlamaModel(manifest.config, dtype=dtype)}
    models |= {
        name: models[DENSE_ARM].clone(schedule=saved.plans, selection=saved.selection)
        for name, saved in schedules.items()
    }
    answerer = Answerer(models, params, len(tasks[0].items[0].prompt), mesh)
    for task in tasks:
        answerer.compile_steps(task)
        for i in tqdm(missing[task.name], task.name, unit="prompt", disable=None, leave=False):
            for (arm, setup), (right, rank) in answerer.answers(task, task.items[i]).items():
                values = (task.name, args.task_len, task.filler, i, arm, setup, right, rank)
                results.add(dict(zip(COLUMNS, (*values, answerer.densities.get((arm, setup), 1.0)))))


def missing_items(results: ResultsFile, task: Task, length: int, arms: Sequence[str]) -> list[int]:
    """The questions that some arm has not answered."""
    key = {"task": task.name, "tokens": length, "filler": task.filler}
    done = [
        all(
            results.has(**key, item=i, arm=arm, setup=setup)
            for arm in (DENSE_ARM, *arms)
            for setup in (PROMPT, QUESTION)
        )
        for i in range(len(task.items))
    ]
    return [i for i, finished in enumerate(done) if not finished]


def table(results: ResultsFile) -> str:
    """A row for each task, length, set-up and arm; p is McNemar's against dense, on the same questions."""
    found: dict[tuple[str, ...], dict[str, tuple[bool, int]]] = {}
    densities = {}
    for row in results.rows:
        key = tuple(row[name] for name in ("task", "tokens", "filler", "setup", "arm"))
        found.setdefault(key, {})[row["item"]] = row["right"] == "True", int(row["rank"])
        densities[key] = float(row["density"])
    cells = []
    for key, answers in found.items():
        dense = found[*key[:-1], DENSE_ARM]
        ours, theirs = (Answers(*zip(*(rows[item] for item in answers))) for rows in (answers, dense))
        low, high = ours.interval
        p = "" if key[-1] == DENSE_ARM else f"{ours.p_against(theirs):.3f}"
        right = f"{ours.share:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
        cells.append((*key, f"{densities[key]:.1%}", len(answers), right, p, f"{ours.ranked_first:.0%}"))
    return markdown(TABLE, cells)


if __name__ == "__main__":
    sys.exit(errors.run(main))
