"""Is our dense forward as fast as transformers' on the same weights and tokens, and how much faster is our sparse one?

Our models run in one process and transformers' in one for each dtype, so that the memory of each is its own. They take
turns: in every round each configuration runs once, while the other processes wait. Both sides compute the loss of every
token; transformers' logits are made for some rows at a time as well, since whole ones would cost it time and memory.
Its dtypes are both timed at the shortest length, and the faster one at the others.

  pip install -r bench/requirements-transformers.txt
  python -m bench.compare_transformers --seq_len 512,2048,8192 --markdown table.md
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import argparse
import dataclasses
import importlib.metadata
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

# Every process imports this file. JAX and torch, whose memory counts, are imported where they are used: in functions.
from errors import Parser, UnsupportedError, exit_on_bad_input
from measure.memory import read_peak_memory, reset_peak_memory
from report.tables import markdown, markdown_row, spread
from weights.config import LlamaConfig, RopeFactors
from weights.folder import DEFAULT_WEIGHTS, read_chunks, read_manifest
from weights.tensors import HUGGING_FACE, NAMES
from weights.tokenizers import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from measure.settings import Settings

CALIBRATION = 2048  # tokens at most: enough for a schedule, and they leave more of the text to be tested
ROWS = 512  # of transformers' logits at a time
BASELINE_DTYPES = ("float32", "bfloat16")
Windows = tuple[np.ndarray, np.ndarray]  # ids to calibrate on and to test on, int32 [1, T] each


class Prepared(NamedTuple):
    """A configuration, ready to be timed."""

    perplexity: float
    note: str
    run: Callable[[], Any]


# --- The processes ---


class Worker:
    """A process that serves one program's configurations; see `serve`."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, name=target.__name__, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: Windows | str) -> Any:
        """Sends a request and waits for its answer."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"error: the process of {self.process.name} ended; see above") from None

    def close(self) -> None:
        """Ends the process."""
        self.connection.send(None)
        self.process.join()


def serve(connection: Any, prepare: Callable[[np.ndarray, np.ndarray], Mapping[str, Prepared]]) -> None:
    """Answers the parent until it sends None.

    Windows are prepared and answered with {name: (perplexity, note)}; a name is run and answered with the most bytes
    that the process had in memory meanwhile, its weights among them, or None where the system does not tell.
    """
    prepared: Mapping[str, Prepared] = {}
    while (request := connection.recv()) is not None:
        if isinstance(request, str):
            known = reset_peak_memory()
            prepared[request].run()
            connection.send(read_peak_memory() if known else None)
        else:
            prepared = {}  # first, so that two lengths' programs are never in memory together
            prepared = prepare(*request)
            connection.send({name: (item.perplexity, item.note) for name, item in prepared.items()})


# --- Ours ---


def serve_ours(connection: Any, args: argparse.Namespace) -> None:
    """Our dense forward, and a sparse one for each way in which anchors score."""
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
    args: argparse.Namespace, config: LlamaConfig, params: Any, dtype: Any, mesh: Any, *windows: np.ndarray
) -> dict[str, Prepared]:
    """Calibrates on the first window and compiles for the second."""
    from jax import block_until_ready

    from kascade_core import EXACT, FAST, REUSE, attended_tiles, mean_density, perplexity_of
    from llama_model import LlamaModel
    from measure.layerwise import Calibration
    from measure.schedules import find_schedule

    calib, test = windows
    settings = settings_of(test.size, args)
    dense = LlamaModel(config, None, settings.selection, dtype=dtype)
    calibrating = dense.clone(selection=settings_of(calib.size, args).selection)
    plans, _ = find_schedule(settings, Calibration(calibrating, params, [calib], mesh))
    models = {f"ours, dense, {dtype}": dense}
    for scoring in (EXACT, FAST):
        selection = dataclasses.replace(settings.selection, anchor_scoring=scoring)
        models[f"ours, sparse, {scoring} scoring"] = dense.clone(schedule=plans, selection=selection)
    prepared = {}
    for name, model in models.items():
        forward = model.compile(params, test, mesh)
        output = forward(params, test)
        note = f"compiled in {forward.seconds:.1f} s"
        if model is not dense:
            reused = sum(plan.mode == REUSE for plan in plans)
            density = mean_density(attended_tiles(model.schedule, output.tiles), model.selection)
            note += f", {reused} REUSE, density {density:.1%}"
        run = partial(lambda forward: block_until_ready(forward(params, test)), forward)
        prepared[name] = Prepared(perplexity_of(output.nll), note, run)
    return prepared


# --- transformers' ---


def serve_transformers(connection: Any, args: argparse.Namespace, dtype: str, threads: int) -> None:
    """transformers' LLaMA with torch's scaled_dot_product_attention, from our chunks."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = build_baseline(args.weights_dir, dtype)

    def prepare(_: np.ndarray, test: np.ndarray) -> dict[str, Prepared]:
        ids = torch.from_numpy(test.astype(np.int64))
        run = partial(mean_nll, model, ids)
        return {f"transformers, {dtype}": Prepared(float(np.exp(run())), "", run)}

    serve(connection, prepare)


def mean_nll(model: Any, ids: Any) -> float:
    """Of the tokens ids [1, T], in nats; the logits of ROWS rows at a time."""
    import torch

    hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for rows, targets in zip(hidden.split(ROWS), ids[0, 1:].split(ROWS), strict=True):
        total += torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets, reduction="sum").item()
    return total / (ids.shape[1] - 1)


def build_baseline(weights_dir: Path, dtype: str) -> Any:
    """A transformers model in `dtype` with the weights of our chunks, of which one at a time is in memory."""
    manifest = read_manifest(weights_dir)
    plain = {"qkv_bias": False, "output_bias": False, "qk_norm": False, "sliding_window": None, "no_rope_layers": ()}
    if dataclasses.replace(manifest.config, **plain) != manifest.config or isinstance(
        manifest.config.rope_scaling, RopeFactors
    ):
        raise UnsupportedError(f"{weights_dir} holds more than a plain LLaMA, which is all that the baseline computes")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as BaselineConfig

    values = {name: value for name, value in dataclasses.asdict(manifest.config).items() if name not in plain}
    rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    if scaling := values.pop("rope_scaling"):
        rope |= {"rope_type": "llama3"} | scaling
    config = BaselineConfig(**values, rope_parameters=rope)
    # from_config leaves the rotary frequencies in float32, as loading a checkpoint does; model.to(dtype) would not.
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    missing = dict(model.named_parameters())
    for chunk_name, chunk in read_chunks(weights_dir, manifest):
        for name, array in named_arrays(chunk):
            layer = chunk_name.removeprefix("layer_").removesuffix(".pkl")
            parameter = missing.pop(NAMES[name][HUGGING_FACE].format(i=layer))
            stored = array if name == "tok_embeddings" else array.T  # our matrices are [in, out]
            parameter.data.copy_(torch.from_numpy(np.array(stored, np.float32)))
    if missing:
        raise ValueError(f"the chunks have no weights for {sorted(missing)}")
    return model


def named_arrays(chunk: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a chunk by the names of `weights.tensors.NAMES`, such as "attention.wq"."""
    for name, value in chunk.items():
        if isinstance(value, Mapping):
            yield from named_arrays(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# --- The comparison ---


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration at one length; `peak_bytes` is None where the system does not tell."""

    name: str
    perplexity: float
    note: str
    ms: Sequence[float]
    peak_bytes: int | None


def compare(workers: Sequence[Worker], windows: Windows, n_runs: int) -> list[Row]:
    """Times every configuration of the workers, in turn."""
    from measure.machine import time_interleaved

    found: dict[str, tuple[float, str]] = {}
    peaks: dict[str, list[int | None]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for worker in workers:
        for name, answer in worker.ask(windows).items():
            found[name], peaks[name] = answer, []
            runs[name] = lambda worker=worker, name=name: peaks[name].append(worker.ask(name))
    samples = time_interleaved(runs, n_runs)
    return [Row(name, *found[name], samples[name], None if None in peaks[name] else max(peaks[name])) for name in found]


def fastest_baseline(rows: Sequence[Row]) -> Row:
    """transformers' faster dtype."""
    return min((row for row in rows if row.name.startswith("transformers")), key=lambda row: statistics.median(row.ms))


COLUMNS = ("tokens", "", "perplexity", "seconds", "of transformers' faster", "peak MB", "")


def format_row(length: int, row: Row, baseline: Row) -> Sequence[Any]:
    """The cells of COLUMNS; the ratio is to the baseline, round by round."""
    ratios = [ours / theirs for ours, theirs in zip(row.ms, baseline.ms, strict=True)]
    seconds = [ms / 1e3 for ms in row.ms]
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
    return length, row.name, f"{row.perplexity:.4f}", spread(seconds), spread(ratios), peak, row.note


def describe(args: argparse.Namespace) -> str:
    """What the table's numbers are of."""
    from measure.machine import processor_name, usable_cores

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    return (
        f"{usable_cores()} CPU cores, {processor_name()}; {versions}; n = {args.n_runs} interleaved rounds; tile 16, "
        f"threshold {args.threshold:.0%}; median [min, max]; peak memory of the process while it runs that row, with "
        "its weights and without their loading.\n"
    )


# --- The command ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `settings_of` checks its values."""
    from measure.settings import DEFAULT_TEXT, whole_number, whole_numbers

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=whole_numbers, default=(512, 2048, 8192), help="lengths (512,2048,8192)")
    parser.add_argument("--n_runs", type=whole_number, default=5, help="timed rounds (5)")
    parser.add_argument("--top_k", type=whole_number, help="tiles (10 %% of the length's, at least 12)")
    parser.add_argument("--threshold", type=float, default=0.65, help="least similarity to reuse (0.65)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of our products")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help=f"({DEFAULT_WEIGHTS})")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 text (the sample)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    return parser.parse_args(argv)


def settings_of(length: int, args: argparse.Namespace) -> Settings:
    """Those of a run on so many tokens; Top-K is at least a tenth of their tiles of 16.

    Raises:
      InputError: a flag out of range.
    """
    from kascade_core import Selection
    from measure.settings import Settings

    top_k = max(12, length // 160) if args.top_k is None else args.top_k
    return Settings(Selection(top_k=top_k), threshold=args.threshold, seq_len=length, n_runs=args.n_runs)


def read_windows(tokenizer: TextTokenizer, text: Path, length: int) -> Windows:
    """A calibration window of at most CALIBRATION tokens, and a test window from the tokens after it."""
    from measure.texts import read_tokens

    prefix, first = list(tokenizer.prefix), min(length, CALIBRATION)
    cut = first - len(prefix)
    ids = read_tokens(tokenizer, text, cut + length - len(prefix))
    return tuple(np.array([prefix + part], np.int32) for part in (ids[:cut], ids[cut:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, length by length."""
    args = parse_args(argv)
    with exit_on_bad_input():
        manifest = read_manifest(args.weights_dir)
        tokenizer = load_tokenizer(args.weights_dir, manifest.tokenizer)
        settings = [settings_of(length, args) for length in args.seq_len]
        windows = [read_windows(tokenizer, args.text, run.seq_len) for run in settings]
    parts = [describe(args) + "\n" + markdown(COLUMNS, [])]
    print(parts[0], end="", flush=True)
    for length, rows in compare_lengths(args, windows):
        baseline = fastest_baseline(rows)
        parts.append("".join(markdown_row(format_row(length, row, baseline)) + "\n" for row in rows))
        print(parts[-1], end="", flush=True)
    if args.markdown:
        args.markdown.write_text("".join(parts), encoding="utf-8")
    return 0


def compare_lengths(args: argparse.Namespace, windows: Sequence[Windows]) -> Iterator[tuple[int, list[Row]]]:
    """Each length with its rows; transformers' slower dtype is timed at the first alone."""
    from measure.machine import usable_cores

    ours = Worker(serve_ours, args)
    baselines = {dtype: Worker(serve_transformers, args, dtype, usable_cores()) for dtype in BASELINE_DTYPES}
    for length, pair in zip(args.seq_len, windows, strict=True):
        rows = compare([ours, *baselines.values()], pair, args.n_runs)
        yield length, rows
        fastest = fastest_baseline(rows).name
        for dtype in [dtype for dtype in baselines if fastest != f"transformers, {dtype}"]:
            baselines.pop(dtype).close()
    for worker in (ours, *baselines.values()):
        worker.close()


if __name__ == "__main__":
    sys.exit(errors.run(main))
