"""Do we decode a token as fast as transformers and llama.cpp on the same weights, text and depth, and sparsely faster?

Every program has a process of its own, which prefills its cache and then, whenever it is its turn, decodes the same
greedy tokens up to the depth; the others wait meanwhile. Our sparse arm decodes with the cache of the dense prefill, as
all do, so that the tokens can be compared. transformers uses its DynamicCache, in both of its dtypes. llama.cpp, if
llama-cpp-python is installed and --gguf names the file that the weights were converted from, decodes one sequence with
that file, as it is quantised and in float32.

  pip install -r bench/requirements-transformers.txt     # and llama-cpp-python, which is optional
  python -m bench.compare_decode --markdown table.md
  python -m bench.compare_decode --gguf SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Every process imports this file. JAX and torch, whose memory counts, are imported where they are used: in functions.
from bench.compare_transformers import (
    BASELINE_DTYPES,
    CALIBRATION,
    Worker,
    build_baseline,
    settings_of,
)
from errors import InputError, Parser, ctrl_c_raises, exit_on_bad_input
from measure.memory import give_back_memory, read_peak_memory, reset_peak_memory
from report.tables import markdown, markdown_row, spread
from weights.config import LlamaConfig
from weights.folder import DEFAULT_WEIGHTS, read_manifest
from weights.tokenizers import TextTokenizer, load_tokenizer

STEPS = 16  # tokens of one timed run
REFERENCE = "transformers, float32"  # whose tokens the others are compared with


class Prefilled(NamedTuple):
    """A program's configuration with its cache filled.

    Attributes:
      note: what else there is to say of it.
      run: decodes STEPS tokens from the end of the prefill, however often it is called; int [B, STEPS].
    """

    note: str
    run: Callable[[], np.ndarray]


class Job(NamedTuple):
    """What every program is asked to continue: int32 [1, T] to calibrate on and [B, depth - STEPS] to fill caches."""

    calibration: np.ndarray
    windows: np.ndarray


# --- The processes ---


def serve(connection: Any, prepare: Callable[[Job], Mapping[str, Prefilled]]) -> None:
    """Answers the parent until it sends None.

    A job is prepared and answered with {name: (note, tokens)}, the tokens of a first run, which is not timed; a name is
    run and answered with the most bytes that the process had in memory meanwhile, or None where that is unknown.
    """
    prepared: Mapping[str, Prefilled] = {}
    while (request := connection.recv()) is not None:
        if isinstance(request, str):
            known = reset_peak_memory()
            prepared[request].run()
            connection.send(read_peak_memory() if known else None)
        else:
            prepared = {}  # first, so that two jobs' caches are never in memory together
            prepared = prepare(request)
            give_back_memory()  # what compiling and the prefills took, of either framework, is not decoding's
            connection.send({name: (item.note, item.run()) for name, item in prepared.items()})


# --- Ours ---


def serve_ours(connection: Any, args: argparse.Namespace) -> None:
    """Our dense and our sparse steps."""
    import jax.numpy as jnp

    from attention.sharding import make_mesh
    from llama_model import load_weights
    from measure.machine import configure_device, pick_dtype

    mesh = make_mesh(configure_device("cpu"))
    manifest = read_manifest(args.weights_dir)
    dtype = jnp.dtype(pick_dtype(args.dtype, "cpu", manifest.config)[0])
    params = load_weights(args.weights_dir, manifest, dtype, mesh)
    serve(connection, partial(prepare_ours, args, manifest.config, params, dtype, mesh))


def prepare_ours(
    args: argparse.Namespace, config: LlamaConfig, params: Any, dtype: Any, mesh: Any, job: Job
) -> dict[str, Prefilled]:
    """Calibrates, prefills densely and compiles the steps of both; they take turns with one cache."""
    from attention.sharding import keep_on, steps_mesh
    from kascade_core import REUSE
    from llama_model import LlamaModel
    from measure.layerwise import Calibration
    from measure.schedules import find_schedule

    depth = job.windows.shape[1] + STEPS
    settings = settings_of(depth, args)
    dense = LlamaModel(config, None, settings.selection, dtype=dtype)
    calibrating = dense.clone(selection=settings_of(job.calibration.size, args).selection)
    plans, _ = find_schedule(settings, Calibration(calibrating, params, [job.calibration], mesh))
    cache, first = prefill_ours(dense, params, job.windows, mesh)
    first_device = steps_mesh(mesh, len(job.windows))
    holder, local = [cache], keep_on(params, first_device)
    density = min(1.0, settings.selection.top_k / -(-depth // settings.selection.tile_size))
    notes = {"dense": "", "sparse": f"{sum(plan.mode == REUSE for plan in plans)} REUSE, {density:.1%} of the tiles"}
    prepared = {}
    for name, model in (("dense", dense), ("sparse", dense.clone(schedule=plans))):
        decoder = model.compile_decode(local, cache, STEPS, first_device)
        prepared[f"ours, {name}, {dtype}"] = Prefilled(
            notes[name], partial(decode_ours, decoder, local, first, depth, holder)
        )
    return prepared


def prefill_ours(model: Any, params: Any, windows: np.ndarray, mesh: Any) -> tuple[Any, np.ndarray]:
    """The cache of all windows, filled one by one, and the likeliest token after each, int32 [B, 1]."""
    from attention.sharding import keep_on, move, steps_mesh
    from measure.decoding import cache_dtype, cache_size
    from network.cache import join_caches

    device = mesh.devices.flat[0]
    forward = model.compile(params, windows[:1], mesh, with_cache=True)
    caches, first = [], []
    for ids in windows:
        output = forward(params, ids[None])
        size = cache_size(model.selection, ids.size + STEPS)
        caches.append(forward.fill_cache(output, size, mesh, cache_dtype(model, device)))
        last = move(output.stream[:, -1:], steps_mesh(mesh, 1))
        first.append(model.apply(keep_on(params, steps_mesh(mesh, 1)), last, method="likeliest"))
    return join_caches(caches, mesh), np.concatenate(first)


def decode_ours(decoder: Any, params: Any, first: np.ndarray, depth: int, holder: list[Any]) -> np.ndarray:
    """STEPS greedy tokens; `holder` has the one cache, which a run is given and gives back."""
    import jax

    ids_BN = np.concatenate([first, np.full((len(first), STEPS - 1), -1, np.int32)], axis=1)
    positions_B = np.full(len(first), depth - STEPS, np.int32)
    output = jax.block_until_ready(decoder(params, ids_BN, positions_B, holder.pop()))
    holder.append(output.cache)
    return np.asarray(output.best)


# --- transformers' ---


def serve_transformers(connection: Any, args: argparse.Namespace, dtype: str, threads: int) -> None:
    """transformers' LLaMA with torch's scaled_dot_product_attention and a DynamicCache, from our chunks."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = build_baseline(args.weights_dir, dtype)

    def prepare(job: Job) -> dict[str, Prefilled]:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        first = likeliest(model, torch.from_numpy(job.windows.astype(np.int64)), cache)
        return {f"transformers, {dtype}": Prefilled("", partial(decode_transformers, model, cache, first))}

    serve(connection, prepare)


def decode_transformers(model: Any, cache: Any, first: Any) -> np.ndarray:
    """STEPS greedy tokens after `first`; the cache is as long as before afterwards."""
    ids, found = first, []
    for _ in range(STEPS):
        ids = likeliest(model, ids, cache)
        found.append(ids)
    cache.crop(-STEPS)
    return np.concatenate(found, axis=1)


def likeliest(model: Any, ids: Any, cache: Any) -> Any:
    """The likeliest token after the last of ids [B, T], [B, 1]; the cache grows by T."""
    name = "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"  # the old one
    hidden = model.model(ids, **{name: cache}).last_hidden_state
    return model.lm_head(hidden[:, -1:]).argmax(-1)


# --- llama.cpp's ---


def serve_llama_cpp(connection: Any, gguf: Path, name: str, threads: int) -> None:
    """llama.cpp through llama-cpp-python, one sequence."""
    from llama_cpp import Llama

    def prepare(job: Job) -> dict[str, Prefilled]:
        ids = job.windows[0].tolist()
        sizes = {"n_ctx": len(ids) + STEPS, "n_threads": threads, "n_threads_batch": threads}
        model = Llama(str(gguf), verbose=False, **sizes)
        model.eval(ids)
        first = int(np.argmax(last_logits(model)))
        return {name: Prefilled(f"file of {gguf.stat().st_size / 1e6:.0f} MB", partial(decode_llama_cpp, model, first))}

    serve(connection, prepare)


def decode_llama_cpp(model: Any, token: int) -> np.ndarray:
    """STEPS greedy tokens after `token`; the cache is as long as before afterwards."""
    prefilled, found = model.n_tokens, []
    for _ in range(STEPS):
        model.eval([token])
        token = int(np.argmax(last_logits(model)))
        found.append(token)
    model.n_tokens = prefilled  # the next eval drops what is behind it
    return np.array([found])


def last_logits(model: Any) -> np.ndarray:
    """float32 [V]: those after the token that was evaluated last."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))


def write_float32(source: Path, target: Path) -> None:
    """The same GGUF file with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- The comparison ---


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration at one depth and batch: ms of each run's step, its tokens [B, STEPS], peak memory if known."""

    name: str
    note: str
    tokens: np.ndarray
    ms: Sequence[float]
    peak_bytes: int | None


def compare(workers: Sequence[Worker], job: Job, n_runs: int) -> list[Row]:
    """Times every configuration of the workers, in turn."""
    from measure.machine import time_interleaved

    found: dict[str, tuple[str, np.ndarray]] = {}
    peaks: dict[str, list[int | None]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for worker in workers:
        for name, answer in worker.ask(job).items():
            found[name], peaks[name] = answer, []
            runs[name] = lambda worker=worker, name=name: peaks[name].append(worker.ask(name))
    samples = time_interleaved(runs, n_runs)
    return [
        Row(name, *found[name], [ms / STEPS for ms in samples[name]], None if None in peaks[name] else max(peaks[name]))
        for name in found
    ]


def same_tokens(row: Row, reference: Row) -> int:
    """First tokens that are the same, in the sequence where they part first."""
    rows = zip(row.tokens, reference.tokens, strict=False)  # llama.cpp has the first sequence alone
    return min(int(np.argmin([*(a == b), False])) for a, b in rows)


COLUMNS = ("depth", "batch", "", "ms a step", "tokens/s", "of transformers' faster", "same first tokens", "peak MB", "")


def format_rows(depth: int, batch: int, rows: Sequence[Row]) -> list[Sequence[Any]]:
    """The cells of COLUMNS; the ratio is to transformers' faster dtype, round by round."""
    theirs = [row for row in rows if row.name.startswith("transformers")]
    baseline = min(theirs, key=lambda row: statistics.median(row.ms))
    reference = next(row for row in theirs if row.name == REFERENCE)
    cells = []
    for row in rows:
        sequences = len(row.tokens)
        ratios = [ours / other for ours, other in zip(row.ms, baseline.ms, strict=True)]
        rate = f"{sequences * 1e3 / statistics.median(row.ms):.1f}"
        same = f"{same_tokens(row, reference)} of {STEPS}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        cells.append((depth, sequences, row.name, spread(row.ms), rate, spread(ratios), same, peak, row.note))
    return cells


def describe(args: argparse.Namespace) -> str:
    """What the table's numbers are of."""
    from measure.machine import processor_name, usable_cores

    names = ("jax", "torch", "transformers", *(["llama-cpp-python"] if args.gguf else []))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return (
        f"{usable_cores()} CPU cores, {processor_name()}; {versions}; n = {args.n_runs} interleaved rounds of {STEPS} "
        f"greedy tokens up to the depth; tile 16, threshold {args.threshold:.0%}; median [min, max]; caches filled by "
        "dense prefills; peak memory of the process while it runs that row, with its weights and its cache.\n"
    )


# --- The command ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a value out of range exits with code 2."""
    from measure.settings import DEFAULT_TEXT, whole_number, whole_numbers

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=whole_numbers, default=(512, 2048, 8192), help="(512,2048,8192)")
    parser.add_argument("--batches", type=whole_numbers, default=(1, 4), help="sequences decoded at once (1,4)")
    parser.add_argument("--n_runs", type=whole_number, default=5, help="timed rounds (5)")
    parser.add_argument("--top_k", type=whole_number, help="tiles (10 %% of the depth's, at least 12)")
    parser.add_argument("--threshold", type=float, default=0.65, help="least similarity to reuse (0.65)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of our products")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help=f"({DEFAULT_WEIGHTS})")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 text, repeated if short (the sample)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="compare with llama.cpp on this file as well")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    args = parser.parse_args(argv)
    if args.depths[0] < 2 * STEPS:
        parser.error(f"depths must be at least {2 * STEPS}, got {args.depths}")
    if args.batches[0] < 1 or args.n_runs < 1:
        parser.error(f"batches and n_runs must be at least 1, got {args.batches} and {args.n_runs}")
    if args.gguf and importlib.util.find_spec("llama_cpp") is None:
        parser.error("--gguf needs llama.cpp: pip install llama-cpp-python (it compiles for some minutes)")
    return args


def read_job(tokenizer: TextTokenizer, text: Path, depth: int, batch: int) -> Job:
    """A calibration window and different windows after it; the text's tokens come again where there are too few.

    Raises:
      InputError: the text has no tokens, or cannot be read.
    """
    from measure.texts import read_tokens

    prefix, length = list(tokenizer.prefix), depth - STEPS
    first, cut = min(depth, CALIBRATION) - len(prefix), length - len(prefix)
    ids = read_tokens(tokenizer, text, first + batch * cut)
    if not ids:
        raise InputError(f"text {text} is empty")
    ids = np.resize(ids, first + batch * cut)
    windows = [prefix + part.tolist() for part in np.split(ids[first:], batch)]
    return Job(np.array([prefix + ids[:first].tolist()], np.int32), np.array(windows, np.int32))


def start_workers(args: argparse.Namespace, folder: Path) -> list[Worker]:
    """A process for each program; float32 of llama.cpp's file is written into `folder`."""
    from measure.machine import usable_cores

    cores = usable_cores()
    workers = [Worker(serve_ours, args)]
    workers += [Worker(serve_transformers, args, dtype, cores) for dtype in BASELINE_DTYPES]
    if args.gguf:
        write_float32(args.gguf, folder / "float32.gguf")
        workers.append(Worker(serve_llama_cpp, args.gguf, "llama.cpp, as quantised", cores))
        workers.append(Worker(serve_llama_cpp, folder / "float32.gguf", "llama.cpp, float32", cores))
    return workers


def measure(args: argparse.Namespace, workers: Sequence[Worker]) -> Iterator[list[Sequence[Any]]]:
    """The table's rows for each depth and batch; llama.cpp takes part in batches of one."""
    tokenizer = load_tokenizer(args.weights_dir, read_manifest(args.weights_dir).tokenizer)
    for depth, batch in itertools.product(args.depths, args.batches):
        taking_part = workers if batch == 1 else workers[: 1 + len(BASELINE_DTYPES)]
        rows = compare(taking_part, read_job(tokenizer, args.text, depth, batch), args.n_runs)
        yield format_rows(depth, batch, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, depth by depth."""
    args = parse_args(argv)
    parts = [describe(args) + "\n" + markdown(COLUMNS, [])]
    print(parts[0], end="", flush=True)
    with exit_on_bad_input(), ctrl_c_raises(), tempfile.TemporaryDirectory() as folder:
        settings_of(args.depths[0], args)  # checks the flags
        workers = start_workers(args, Path(folder))
        for rows in measure(args, workers):
            parts.append("".join(markdown_row(cells) + "\n" for cells in rows))
            print(parts[-1], end="", flush=True)
        for worker in workers:
            worker.close()
    if args.markdown:
        args.markdown.write_text("".join(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
