"""What would Kascade's cross-layer sparse attention cost this model in perplexity, and gain it in time?

Calibrates on one text which layers may reuse which layers' key tiles, then runs another, unseen text densely and
sparsely through the same LLaMA and compares perplexity (signed), counted density and time (compiled apart, runs
interleaved, median with min and max). Without weights it first makes those of its default model.

  python benchmark_kascade_final.py                          # the default model and text, on the CPU
  python benchmark_kascade_final.py --device tpu --top_k 12 --threshold 0.65
  python benchmark_kascade_final.py --weights_dir DIR --text FILE --seq_len 2048 --json result.json
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take seconds

import contextlib
import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import convert_weights
from attention.sharding import compiler_options, make_mesh
from errors import ctrl_c_raises, exit_on_bad_input
from kascade_core import (
    attended_tiles,
    check_perplexity,
    density_of,
    perplexity_of,
    publish_tiles,
    tile_count,
)
from llama_model import LlamaConfig, LlamaModel, count_parameters, load_weights
from measure.answers import DENSE_ARM, ORACLE_ARM, SPARSE_ARM, Answerer, measure_task, oracle_of
from measure.decoding import Arms, check_cache_fits, decode_windows, generate, measure_depths
from measure.densities import map_tiles, measure_density
from measure.layerwise import Calibration
from measure.machine import (
    configure_device,
    peak_memory,
    pick_dtype,
    pick_kernel,
    processor_name,
    time_interleaved,
)
from measure.quality import compare, long_context_loss, run_windows
from measure.resume import earlier_rows, measure_rows, save_partly
from measure.schedules import find_schedule, load_schedule, save_schedule
from measure.settings import Settings
from measure.tasks import ANSWER_ROOM, Task, make_tasks
from measure.texts import Windows, hash_of, load_windows
from measure.timing import compile_attention, measure_length
from report import console, tables
from report.results import (
    Decoding,
    DepthRow,
    Generated,
    Layer,
    Machine,
    Model,
    Quality,
    Results,
    TaskRow,
    TextUsed,
    Timing,
    is_stdout,
    write_json,
    write_text,
)
from weights.fields import reading
from weights.folder import DEFAULT_WEIGHTS, Manifest, read_manifest
from weights.tokenizers import TextTokenizer, load_tokenizer

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark from flags to report. Returns 0; bad input exits with code 2."""
    settings = Settings.from_flags(argv, __doc__)
    beside = contextlib.redirect_stdout(sys.stderr) if is_stdout(settings.json) else contextlib.nullcontext()
    with exit_on_bad_input(settings.debug):
        with beside:  # the report alone goes to the standard output where it is asked for there
            results = run(settings, list(sys.argv[1:] if argv is None else argv))
        write_outputs(settings, results)
    return 0


def write_outputs(settings: Settings, results: Results) -> None:
    """The report in every form that was asked for."""
    report = results.to_json()
    if settings.json:
        write_json(settings.json, report)
    if settings.html:
        from report import html  # jinja2 and matplotlib, which a run without a page need not load

        write_text(settings.html, html.page(report))
    if settings.csv:
        tables.append_csv(settings.csv, tables.measurements(report))
    if settings.markdown:
        tables.append_markdown(settings.markdown, tables.measurements(report))
    if not (settings.quiet or is_stdout(settings.json)):
        for path in filter(None, (settings.json, settings.html, settings.csv, settings.markdown)):
            show(f"\n📝 Report written to {path}")


def run(settings: Settings, command: Sequence[str]) -> Results:
    """The benchmark, step by step."""
    say: Say = (lambda _: None) if settings.quiet else show
    say(console.configuration(settings))
    settings.check_files()

    say(f"🖥️  Configuring JAX to use {settings.device.upper()}...")
    devices = configure_device(settings.device)
    mesh = make_mesh(devices)
    options = compiler_options(devices[0])
    machine = Machine(settings.device, devices[0].device_kind, len(devices), processor_name(), options)
    say(f"✓ JAX using {len(devices)} {settings.device.upper()} device(s): {[device.id for device in devices]}\n")

    weights_dir, manifest = find_weights(settings, say)
    if settings.load_schedule:
        saved = load_schedule(settings.load_schedule, manifest)
        settings = dataclasses.replace(settings, selection=saved.selection)
        warn_of_other_length(saved.calibrated_on.tokens, settings.seq_len)
    settings = resolve(settings, manifest, devices, say)
    say(f"📦 Loading weights from {weights_dir}...")
    dtype = jnp.dtype(settings.dtype)
    params = load_weights(weights_dir, manifest, dtype, mesh)
    model = describe_model(manifest, params)
    say(console.model_line(model) + "\n")

    tokenizer = load_tokenizer(weights_dir, manifest.tokenizer)
    calibrated_on = saved.calibrated_on if settings.load_schedule else None
    windows = load_windows(tokenizer, settings, manifest.config.vocab_size, calibrated_on)
    describe_windows(windows, settings, say)
    settings = settings_as_run(settings, windows)
    tasks = make_tasks(tokenizer, settings)

    model_dense = LlamaModel(manifest.config, None, settings.selection, dtype=dtype, kernel=settings.kernel)
    check_decoding(model_dense, settings, devices[0])
    limit_check = None
    if settings.load_schedule:
        plans = saved.plans
    else:
        say(f"📊 Calibrating on {(settings.calib_text or settings.text).name}...")
        calibration = Calibration(model_dense, params, windows.calibration, mesh)
        if settings.verbose:
            say("\n".join(console.chosen_tiles(layer, tiles) for layer, tiles in calibration.tiles.items()))
        plans, limit_check = find_schedule(settings, calibration)
    model_sparse = model_dense.clone(schedule=plans)
    say("\n⚡ Generating Optimized Schedule:")
    say(console.schedule(model_sparse.schedule, settings))
    if settings.save_schedule:
        save_schedule(settings.save_schedule, model_sparse.schedule, settings.selection, manifest, windows.calibration)
        say(f"📝 Schedule written to {settings.save_schedule}")

    decodes = bool(settings.decode or settings.generate)
    test_ids = windows.test[0]  # timed; all windows are compared
    say("🏃 Running DENSE Baseline...")
    dense = model_dense.compile(params, test_ids, mesh, with_cache=decodes)
    dense_outputs = run_windows(dense, params, windows.test)
    dense_perplexity = perplexity_of(np.concatenate([output.nll for output in dense_outputs]))
    warn(check_perplexity(dense_perplexity, manifest.config.vocab_size, len(windows.test) * (test_ids.size - 1)))
    say(f"  All {tile_count(settings.seq_len, settings.selection.tile_size)} tiles in every layer\n")

    say("⚡ Running KASCADE Sparse...")
    sparse = model_sparse.compile(params, test_ids, mesh, with_cache=decodes)
    sparse_outputs = run_windows(sparse, params, windows.test)
    publish_tiles(sparse_outputs[0].tiles)
    attended = attended_tiles(model_sparse.schedule, sparse_outputs[0].tiles)
    if settings.verbose:
        tile_size = settings.selection.tile_size
        say(console.sparse_layers(model_sparse.schedule, attended, tile_size, settings.seq_len))
    compared = compare(model_dense, params, windows.test, dense_outputs, sparse_outputs, mesh)
    quality = Quality(compared, [density_of(tiles, model_sparse.selection) for tiles in attended.values()])
    show("\n" + console.quality(quality, settings))
    long_context = None
    if settings.long_ppl:
        prefix = windows.prefix_tokens
        long_context = long_context_loss(model_dense, params, windows.test, compared, prefix, mesh)
        show(console.long_context(long_context))
    if limit_check:
        show(console.limit_kept(limit_check, quality, settings.max_degradation))

    show(f"⏱️  SPEEDUP BENCHMARK\n{console.RULE}\n")
    say(f"Benchmarking {settings.n_runs} runs each...")
    say(f"  Compiled before the clock starts: dense {dense.seconds:.1f} s, sparse {sparse.seconds:.1f} s")
    say("  Warming up...\n  Timing Dense and Sparse in turn...\n")
    runs = {"dense": partial(dense, params, test_ids), "sparse": partial(sparse, params, test_ids)}
    samples = time_interleaved(runs, settings.n_runs)
    timing = Timing(samples["dense"], samples["sparse"], dense.seconds, sparse.seconds)
    meaning = console.describe_timing(settings, machine)
    show(console.timing(timing, f"{meaning}; {settings.seq_len} tokens,\n    density {quality.density:.2%}"))
    attention_ms = time_interleaved(compile_attention(model_dense, settings.seq_len, mesh), settings.n_runs)
    show("\n" + console.attention_alone(attention_ms))

    task_rows = []
    if tasks:
        show("\n" + console.tasks_header(settings))
        task_rows = run_tasks(model_dense, model_sparse, params, tasks, mesh)
        show(console.tasks_power(task_rows))

    results = Results(
        settings=dataclasses.replace(settings, weights_dir=weights_dir),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        model=model,
        machine=machine,
        prefix=windows.prefix,
        schedule=[
            Layer(plan, density_of(attended[i], model_sparse.selection)) for i, plan in enumerate(model_sparse.schedule)
        ],
        limit_check=limit_check,
        quality=quality,
        timing=timing,
        attention_ms=attention_ms,
        long_context=long_context,
        texts=texts_used(windows, settings),
        similarity=None if settings.load_schedule else calibration.similarity,
    )
    if settings.html:
        maps = map_tiles(model_dense, params, test_ids, model_sparse.schedule, attended, mesh)
        results = dataclasses.replace(results, tile_maps=maps)
    sweep_earlier, densities_earlier = earlier_rows(settings.json, results)

    def finished(rows: list[Any], was_there: bool, field: str, line: Callable[[Any], str]) -> None:
        show(line(rows[-1]) + was_there * f"  (from {settings.json})")
        save_partly(settings.json, dataclasses.replace(results, **{field: rows}))

    if settings.densities:
        show("\n" + console.densities_header(settings))
        measure_one = partial(
            measure_density,
            settings=settings,
            calibration=calibration,
            dense=dense,
            dense_outputs=dense_outputs,
            windows=windows.test,
        )
        finish = partial(finished, field="densities", line=console.density_row)
        rows = measure_rows(settings.densities, densities_earlier, measure_one, finish)
        results = dataclasses.replace(results, densities=rows)
    if settings.sweep:
        show("\n" + console.sweep_header(meaning))
        models = {"dense": model_dense, "sparse": model_sparse}
        measure_one = partial(measure_length, models, params, test_ids, mesh=mesh, n_runs=settings.n_runs)
        finish = partial(finished, field="sweep", line=console.sweep_row)
        rows = measure_rows(settings.sweep, sweep_earlier, measure_one, finish)
        results = dataclasses.replace(results, sweep=rows)
        show(console.sweep_break_even(rows))

    arms = Arms(model_dense, model_sparse, {"dense": dense, "sparse": sparse}, params, mesh)
    decoding, depths, generated = decode(arms, windows, settings, tokenizer)

    return dataclasses.replace(
        results,
        decoding=decoding,
        depths=depths,
        generated=generated,
        tasks=task_rows,
        peak_memory_bytes=peak_memory(devices[0]),
    )


def decode(
    arms: Arms, windows: Windows, settings: Settings, tokenizer: TextTokenizer
) -> tuple[Decoding | None, list[DepthRow], Generated | None]:
    """The part of the run that decodes token by token."""
    decoding, depths, generated = None, [], None
    if settings.decode:
        decoding = decode_windows(arms, windows, settings)
        show("\n" + console.decoding(decoding, settings.dtype))
    if settings.depths:
        show(console.depths_header(settings.batch))
        depths = measure_depths(arms, settings, lambda row: show(console.depth_row(row)))
        show(console.sweep_break_even(depths) + "\n")
    if settings.generate:
        generated = generate(arms, windows.test[0], settings.generate, settings.prefill)
        texts = (tokenizer.decode(ids) for ids in (generated.dense, generated.sparse))
        show(console.continuations(generated, *texts))
    return decoding, depths, generated


def run_tasks(dense: LlamaModel, sparse: LlamaModel, params: Any, tasks: Sequence[Task], mesh: Mesh) -> list[TaskRow]:
    """The part of the run that answers questions; each row is printed as it comes."""
    length = len(tasks[0].items[0].prompt)
    warn_beyond_context(length + ANSWER_ROOM, dense.config)
    models = {DENSE_ARM: dense, SPARSE_ARM: sparse, ORACLE_ARM: oracle_of(sparse)}
    answerer, rows = Answerer(models, params, length, mesh), []
    for task in tasks:
        for row in measure_task(answerer, task, length + ANSWER_ROOM):
            show(console.task_row(row))
            rows.append(row)
    return rows


# --- The steps' details ---


def settings_as_run(settings: Settings, windows: Windows) -> Settings:
    """The settings with the numbers of windows and decoded tokens that the text has room for."""
    return dataclasses.replace(
        settings,
        windows=len(windows.test),
        calib_windows=len(windows.calibration) or None,
        decode=windows.following[0].size - 1 if windows.following else 0,
    )


def texts_used(windows: Windows, settings: Settings) -> dict[str, TextUsed]:
    """Which windows calibrated and which were tested."""
    parts = {"calibration": (settings.calib_text or settings.text, windows.calibration)}
    parts |= {"test": (settings.text, windows.test)}
    return {
        role: TextUsed(path.name, len(ids), ids[0].size, hash_of(ids)) for role, (path, ids) in parts.items() if ids
    }


def find_weights(settings: Settings, say: Say) -> tuple[Path, Manifest]:
    """The weights folder, made if it is the default one and missing, and its manifest."""
    weights_dir = settings.weights_dir or DEFAULT_WEIGHTS
    with reading(weights_dir):
        missing = not weights_dir.exists() or (weights_dir.is_dir() and not any(weights_dir.iterdir()))
    if settings.weights_dir is None and missing:
        say(f"📦 No weights in {weights_dir}: fetching and converting the default model...")
        with ctrl_c_raises():
            convert_weights.convert_default(weights_dir, say=lambda text: print(text, file=sys.stderr))
    return weights_dir, read_manifest(weights_dir)


def resolve(settings: Settings, manifest: Manifest, devices: Sequence[jax.Device], say: Say) -> Settings:
    """The settings with everything decided that depends on the model and the machine."""
    config, device = manifest.config, settings.device
    settings = settings.for_model(config)
    dtype, why_dtype = pick_dtype(settings.dtype, device, config)
    longest = max([settings.seq_len, *settings.sweep])
    capability = getattr(devices[0], "compute_capability", None)
    kernel, why_kernel = pick_kernel(
        settings.kernel, device, settings.selection, longest, config.head_dim, dtype, capability
    )
    say(f"✓ Matrix inputs in {dtype} ({why_dtype})")
    say(f"✓ Attention by {kernel} ({why_kernel})\n")
    warn_beyond_context(longest, config)
    return dataclasses.replace(settings, dtype=dtype, kernel=kernel)


def describe_model(manifest: Manifest, params: Any) -> Model:
    """The model as the report names it."""
    return Model(
        name=manifest.model,
        source=manifest.source,
        fingerprint=manifest.fingerprint,
        parameters=count_parameters(params),
        num_layers=manifest.config.num_hidden_layers,
        bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    )


def describe_windows(windows: Windows, settings: Settings, say: Say) -> None:
    """Which tokens calibrate and which test."""
    if windows.calibration:
        say(f"📖 Calibration: {count_windows(windows.calibration)} of {(settings.calib_text or settings.text).name}")
    fewer = "" if len(windows.test) == settings.test_windows[1] else "; it holds no more"
    say(f"   Test:        {count_windows(windows.test)} of {settings.text.name} (UNSEEN){fewer}")
    if settings.decode is None and not windows.following:
        say("   No decoding: the text ends before the tokens that would follow a test window")
    say(f"   Each window begins with {windows.prefix}\n" if windows.prefix else "")


def count_windows(windows: Sequence[jax.Array]) -> str:
    """How many windows of how many tokens."""
    return f"{len(windows)} window{'s' * (len(windows) > 1)} of {windows[0].size} tokens"


def warn_of_other_length(made_for: int, seq_len: int) -> None:
    """A loaded schedule was calibrated on windows of some length."""
    if made_for != seq_len:
        warn(f"the schedule was made from {made_for} tokens, and this run has {seq_len}")


def check_decoding(model: LlamaModel, settings: Settings, device: jax.Device) -> None:
    """Before anything that takes long: refuses caches that would not fit, and warns of a depth beyond the context."""
    for steps, batch in ((settings.decode, settings.batch), (settings.generate, 1)):
        if steps:
            check_cache_fits(model, batch, settings.seq_len + steps, device)
    if settings.seq_len <= model.config.max_position_embeddings:  # otherwise it has been said
        warn_beyond_context(settings.seq_len + max(settings.decode, settings.generate), model.config)


def warn_beyond_context(tokens: int, config: LlamaConfig) -> None:
    """What a model computes beyond its context means little."""
    if tokens > config.max_position_embeddings:
        warn(f"{tokens} tokens are beyond the model's context of {config.max_position_embeddings}")


def show(text: str) -> None:
    """Prints lines that fit a terminal."""
    print(console.fit(text), flush=True)


def warn(message: str | None) -> None:
    """One line on stderr, where there is something to say."""
    if message:
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(errors.run(main))
