"""Is our dense forward as fast as transformers' on the same weights and tokens, and how much faster is our sparse one?

Two processes hold the two programs, so that each one's peak memory is its own, and take turns: in every round each
configuration runs once, the other process idle. Both compute the loss of every token; transformers' goes over chunks of
rows as well, since whole logits would cost it time and memory. Its dtypes are both timed at the shortest length, and
the faster one at the others.

  pip install -r bench/requirements-transformers.txt
  python bench/compare_transformers.py --seq_len 512,2048,8192 --markdown table.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# torch and our model are imported by the process that runs them alone.
from kascade_setup import (
    DEFAULT_TEXT,
    DEFAULT_WEIGHTS,
    DTYPES,
    at_least_one,
    configure_device,
    encode_text,
    exit_on_bad_input,
    lengths,
    load_tokenizer,
    pick_dtype,
    process_peak_memory,
    share,
)

from convert_weights import OneSentenceParser

CALIBRATION = 2048  # tokens at most: enough for a schedule, and they leave more of the text to be tested
ROWS = 512  # of transformers' logits at a time


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", type=lengths, default=[512, 2048, 8192], help="lengths (default 512,2048,8192)")
    parser.add_argument("--n_runs", type=at_least_one, default=5, help="timed rounds (default 5)")
    parser.add_argument("--top_k", type=at_least_one, help="tiles (default: 10 %% of the length's, at least 12)")
    parser.add_argument("--threshold", type=share, default=0.65, help="least similarity to reuse (default 0.65)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of our products")
    parser.add_argument("--weights_dir", type=Path, default=DEFAULT_WEIGHTS, help="default: the benchmark's")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="default: the benchmark's")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    return parser.parse_args(argv)


def budget(length: int, args: argparse.Namespace) -> int:
    """Key tiles of 16 tokens that an anchor keeps."""
    return args.top_k or max(12, length // 160)


def read_windows(args: argparse.Namespace) -> dict[int, tuple[Any, Any]]:
    """For each length calibration and test ids, int32 [1, T], one after the other in the text."""
    tokenizer = load_tokenizer(args.weights_dir)
    windows = {}
    for length in args.seq_len:
        first = min(length, CALIBRATION)
        ids = np.array([encode_text(tokenizer, args.text, first + length)])
        windows[length] = ids[:, :first].astype(np.int32), ids[:, first:].astype(np.int32)
    return windows


def serve(connection: Any, prepare: Callable[[Any, Any], dict[str, tuple[float, str, Callable[[], Any]]]]) -> None:
    """Answers the parent: windows prepare their length, a name runs that configuration and returns its seconds."""
    runs: dict[str, Callable[[], Any]] = {}
    while (request := connection.recv()) is not None:
        if isinstance(request, tuple):
            runs.clear()
            prepared = prepare(*request)
            runs.update({name: run for name, (_, _, run) in prepared.items()})
            connection.send({name: (perplexity, note) for name, (perplexity, note, _) in prepared.items()})
        else:
            start = time.perf_counter()
            runs[request]()
            seconds = time.perf_counter() - start
            connection.send((seconds, process_peak_memory()))


def serve_ours(connection: Any, args: argparse.Namespace) -> None:
    """Our dense forward, and two sparse ones by their anchors' scoring."""
    import jax
    from kascade_layout import make_mesh

    import kascade_core as core
    from llama_model import LlamaModel, load_weights

    mesh = make_mesh(configure_device("cpu"))
    dtype = pick_dtype(args.dtype, "cpu")
    manifest, params = load_weights(args.weights_dir, DTYPES[dtype], mesh)

    def prepare(calib_ids: Any, test_ids: Any) -> dict[str, tuple[float, str, Callable[[], Any]]]:
        dense = LlamaModel(manifest["config"], top_k=budget(test_ids.size, args), sink_tiles=1, dtype=DTYPES[dtype])
        core.calibrate_kascade(dense, params, calib_ids, 16, budget(calib_ids.size, args), mesh)
        tiles = dict(core.KASCADE_CACHE)
        decisions = core.decide_schedule(core.similarity_matrix(tiles), args.threshold, 4)
        schedule = core.add_head_maps({i: (d.mode, d.anchor) for i, d in enumerate(decisions)}, tiles)
        reused = sum(d.mode == core.REUSE for d in decisions)
        models = {f"ours, dense, {dtype}": dense}
        for scoring in (core.EXACT, core.FAST):
            models[f"ours, sparse, {scoring} scoring"] = dense.clone(schedule=schedule, anchor_scoring=scoring)
        prepared = {}
        for name, model in models.items():
            compiled, seconds = core.compile_forward(model, params, test_ids, mesh)
            nll, sown = compiled(params, test_ids)
            note = f"compiled in {seconds:.1f} s"
            if model is not dense:
                core.publish_tiles(sown)
                note += f", {reused} REUSE, density {core.mean_density(model.schedule, core.KASCADE_CACHE):.1%}"
            run = lambda compiled=compiled: jax.block_until_ready(compiled(params, test_ids))  # noqa: E731
            prepared[name] = (core.perplexity_of(nll[:, :-1]), note, run)
        return prepared

    serve(connection, prepare)


def serve_transformers(connection: Any, args: argparse.Namespace, dtypes: Sequence[str]) -> None:
    """transformers' LLaMA with torch's scaled_dot_product_attention, from our chunks."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    models = {name: build_peer(args).to(getattr(torch, name)).eval() for name in dtypes}

    def prepare(_: Any, test_ids: Any) -> dict[str, tuple[float, str, Callable[[], Any]]]:
        ids = torch.from_numpy(test_ids.astype(np.int64))

        def mean_nll(model: Any) -> float:
            hidden = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
            total = 0.0
            for rows, targets in zip(hidden.split(ROWS), ids[0, 1:].split(ROWS), strict=True):
                total += torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets, reduction="sum").item()
            return total / (ids.shape[1] - 1)

        return {
            f"transformers, {name}": (float(np.exp(mean_nll(model))), "", lambda model=model: mean_nll(model))
            for name, model in models.items()
        }

    serve(connection, prepare)


def build_peer(args: argparse.Namespace) -> Any:
    """A transformers model with the weights of our chunks, by the names of `convert_weights`' table."""
    import dataclasses

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_model import load_weights

    configure_device("cpu")
    manifest, variables = load_weights(args.weights_dir, np.float32)
    config, params = dataclasses.asdict(manifest["config"]), variables["params"]
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    if scaling := config.pop("rope_scaling"):
        rope |= {"rope_type": "llama3"} | scaling
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope, attn_implementation="sdpa"))
    state = {
        "model.embed_tokens.weight": params["tok_embeddings"],
        "model.norm.weight": params["norm"],
        "lm_head.weight": params["tok_embeddings"] if config["tie_word_embeddings"] else params["output"].T,
    }
    attention, mlp = zip("qkvo", ("wq", "wk", "wv", "wo")), zip(("gate", "down", "up"), ("w1", "w2", "w3"))
    names = {f"self_attn.{peer}_proj": ("attention", ours) for peer, ours in attention}
    names |= {f"mlp.{peer}_proj": ("feed_forward", ours) for peer, ours in mlp}
    for i in range(config["num_hidden_layers"]):
        layer, prefix = params[f"layer_{i}"], f"model.layers.{i}."
        state |= {f"{prefix}{peer}.weight": layer[part][ours].T for peer, (part, ours) in names.items()}
        state[prefix + "input_layernorm.weight"] = layer["attention_norm"]
        state[prefix + "post_attention_layernorm.weight"] = layer["ffn_norm"]
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model


class Worker:
    """A process that serves one program's configurations."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: tuple[Any, Any] | str) -> Any:
        """Sends a request and waits for its answer."""
        self.connection.send(request)
        try:
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"error: the process that runs {self.process.name} ended; see above") from None

    def close(self) -> None:
        """Ends the process."""
        self.connection.send(None)
        self.process.join()


def compare(workers: Sequence[Worker], windows: tuple[Any, Any], n_runs: int) -> dict[str, dict[str, Any]]:
    """Rows of one length: {configuration: {"perplexity", "note", "seconds", "peak"}}."""
    rows: dict[str, dict[str, Any]] = {}
    owners: dict[str, Worker] = {}
    for worker in workers:
        for name, (perplexity, note) in worker.ask(windows).items():
            owners[name] = worker
            rows[name] = {"perplexity": perplexity, "note": note, "seconds": []}
    for _ in range(n_runs):  # each ran once, to get its perplexity: it is warm
        for name, worker in owners.items():
            seconds, rows[name]["peak"] = worker.ask(name)
            rows[name]["seconds"].append(seconds)
    return rows


def format_rows(length: int, rows: dict[str, dict[str, Any]]) -> str:
    """The length's lines of a Markdown table; ratios are to transformers' faster dtype, round by round."""
    peers = [row for name, row in rows.items() if name.startswith("transformers")]
    fastest = min(peers, key=lambda row: statistics.median(row["seconds"]))
    lines = []
    for name, row in rows.items():
        seconds = row["seconds"]
        ratios = [ours / theirs for ours, theirs in zip(seconds, fastest["seconds"], strict=True)]
        cells = (
            f"{length} | {name} | {row['perplexity']:.4f} | {statistics.median(seconds):.2f} "
            f"[{min(seconds):.2f}, {max(seconds):.2f}] | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] | {row['peak'] / 1e6:.0f} | {row['note']}"
        )
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def describe(args: argparse.Namespace) -> str:
    """What the table's numbers are of."""
    import importlib.metadata

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    return (
        f"{os.cpu_count()} CPU cores; {versions}; n = {args.n_runs} interleaved rounds; tile 16, threshold "
        f"{args.threshold:.0%}; median [min, max]; each process's peak memory up to that row."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, row by row."""
    args = parse_args(argv)
    with exit_on_bad_input():
        windows = read_windows(args)
    header = "| tokens | | perplexity | seconds | of transformers' faster | peak MB | |\n|---|---|---|---|---|---|---|"
    parts = [describe(args) + "\n", header]
    print("\n".join(parts), flush=True)
    ours, dtypes = Worker(serve_ours, args), ["float32", "bfloat16"]
    for length in args.seq_len:
        peer = Worker(serve_transformers, args, dtypes)
        rows = compare([ours, peer], windows[length], args.n_runs)
        peer.close()
        medians = {name: statistics.median(rows[f"transformers, {name}"]["seconds"]) for name in dtypes}
        dtypes = [min(medians, key=medians.get)]  # the slower one is left out of longer lengths
        parts.append(format_rows(length, rows))
        print(parts[-1], flush=True)
    ours.close()
    if args.markdown:
        args.markdown.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
