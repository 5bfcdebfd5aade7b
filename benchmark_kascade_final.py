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
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import convert_weights
from attention.sharding import DATA, compiler_options, first_device
from errors import ctrl_c_raises
from kascade_core import (
    Schedule,
    attended_tiles,
    check_perplexity,
    density_of,
    perplexity_of,
    publish_tiles,
    tile_count,
)
from llama_model import LlamaConfig, LlamaModel, count_parameters, load_weights
from measure import hosts
from measure.answers import DENSE_ARM, ORACLE_ARM, SPARSE_ARM, Answerer, measure_task, oracle_of
from measure.decoding import Arms, check_cache_fits, decode_windows, generate, keeps_prefills, measure_depth
from measure.densities import map_tiles, measure_density
from measure.layerwise import Calibration
from measure.machine import (
    configure_device,
    peak_memory,
    pick_dtype,
    pick_kernel,
    pick_mesh,
    processor_name,
    time_interleaved,
)
from measure.memory import give_back_memory
from measure.quality import compare, long_context_loss, run_windows
from measure.resume import Earlier, earlier_rows, measure_rows, save_partly
from measure.schedules import SavedSchedule, find_schedule, load_schedule, save_schedule
from measure.settings import Settings, mesh_axes
from measure.tasks import ANSWER_ROOM, Task, make_tasks
from measure.texts import Windows, hash_of, load_windows
from measure.timing import compile_attention, measure_length
from network.programs import Forward, Output
from report import console, tables
from report.results import (
    Layer,
    LimitCheck,
    Machine,
    Model,
    Quality,
    Results,
    TaskRow,
    TextUsed,
    Timing,
    is_stdout,
    schedule_sha256,
    settings_to_json,
    versions,
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
    with hosts.ending_together(settings.debug):
        hosts.join(settings.coordinator, settings.num_processes, settings.process_id, settings.device)
        beside = contextlib.redirect_stdout(sys.stderr) if is_stdout(settings.json) else contextlib.nullcontext()
        with (
            beside,
            hosts.first_alone_prints(),
        ):  # on the standard output is the report alone where it is asked for there
            results = run(settings, list(sys.argv[1:] if argv is None else argv))
        if hosts.is_first():
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
    check_flags_agree(settings)
    settings.check_files()
    setup = prepare(settings, say)
    plans, calibration, limit_check = make_schedule(setup, say)
    both = run_both(setup, plans, say)
    settings, windows = setup.settings, setup.windows

    quality = both.quality
    show("\n" + console.quality(quality, settings))
    long_context = None
    if settings.long_ppl:
        long_context = long_context_loss(
            setup.model, setup.params, windows.test, quality.compared, windows.prefix_tokens, setup.mesh
        )
        show(console.long_context(long_context))
    if limit_check:
        show(console.limit_kept(limit_check, quality, settings.max_degradation))

    meaning = console.describe_timing(settings, setup.machine)
    timing, attention_ms = time_both(setup, both, meaning, say)
    task_rows = []
    if setup.tasks:
        show("\n" + console.tasks_header(settings))
        task_rows = run_tasks(setup.model, both.sparse_model, setup.params, setup.tasks, setup.mesh)
        show(console.tasks_power(task_rows))

    results = Results(
        settings=dataclasses.replace(settings, weights_dir=setup.weights_dir),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        model=setup.described,
        machine=setup.machine,
        prefix=windows.prefix,
        schedule=[Layer(plan, density) for plan, density in zip(both.sparse_model.schedule, quality.layer_densities)],
        limit_check=limit_check,
        quality=quality,
        timing=timing,
        attention_ms=attention_ms,
        long_context=long_context,
        texts=texts_used(windows, settings),
        similarity=calibration.similarity if calibration else None,
        tasks=task_rows,
    )
    if settings.html:
        maps = map_tiles(
            setup.model, setup.params, windows.test[0], both.sparse_model.schedule, both.attended, setup.mesh
        )
        results = dataclasses.replace(results, tile_maps=maps)
    earlier = hosts.from_first(earlier_rows(settings.json, results))
    if settings.densities:
        results = measure_densities(setup, both, calibration, results, earlier)
    if settings.sweep:
        results = measure_sweep(setup, both, results, earlier, meaning)
    results = decode(setup, both, results, earlier)
    return dataclasses.replace(results, peak_memory_bytes=peak_memory(first_device(setup.mesh)))


# --- Its parts ---


class Setup(NamedTuple):
    """What a run is made with.

    Attributes:
      settings: with every default resolved.
      described: the model as the report names it.
      saved: the schedule of --load_schedule.
      model: the dense one.
      tasks: empty without --tasks.
    """

    settings: Settings
    machine: Machine
    mesh: Mesh
    weights_dir: Path
    manifest: Manifest
    described: Model
    saved: SavedSchedule | None
    model: LlamaModel
    params: Any
    tokenizer: TextTokenizer
    windows: Windows
    tasks: Sequence[Task]


class Both(NamedTuple):
    """The dense and the sparse model's forwards of the test windows, and what came of them.

    Attributes:
      attended: the tiles of the first window, int32 [B, K, Q, C] by sparse layer.
    """

    sparse_model: LlamaModel
    dense: Forward
    sparse: Forward
    dense_outputs: Sequence[Output]
    sparse_outputs: Sequence[Output]
    attended: Mapping[int, jax.Array]
    quality: Quality


def prepare(settings: Settings, say: Say) -> Setup:
    """Device, weights and texts."""
    say(f"🖥️  Configuring JAX to use {settings.device.upper()}...")
    devices = configure_device(settings.device)
    hosts.check_devices()
    where = f" of {hosts.num_processes()} processes" * (hosts.num_processes() > 1)
    say(f"✓ JAX using {len(devices)} {settings.device.upper()} device(s){where}: {[device.id for device in devices]}\n")

    weights_dir, manifest = find_weights(settings, say)
    saved = None
    if settings.load_schedule:
        saved = load_schedule(settings.load_schedule, manifest)
        settings = dataclasses.replace(settings, selection=saved.selection)
        warn_of_other_length(saved.calibrated_on.tokens, settings.seq_len)
    settings = resolve(settings, manifest, devices, say)
    mesh, why_mesh = pick_mesh(mesh_axes(settings.mesh), devices, manifest.config, settings.dtype)
    machine = describe_machine(settings.device, mesh)
    say(f"✓ Mesh {console.mesh(machine.mesh)} ({why_mesh})\n")
    say(f"📦 Loading weights from {weights_dir}...")
    dtype = jnp.dtype(settings.dtype)
    params = load_weights(weights_dir, manifest, dtype, mesh)
    described = describe_model(manifest, params)
    say(console.model_line(described) + "\n")

    tokenizer = load_tokenizer(weights_dir, manifest.tokenizer)
    windows = load_windows(tokenizer, settings, manifest.config.vocab_size, saved and saved.calibrated_on)
    describe_windows(windows, settings, say)
    settings = settings_as_run(settings, windows)
    tasks = make_tasks(tokenizer, settings)
    model = LlamaModel(manifest.config, None, settings.selection, dtype=dtype, kernel=settings.kernel)
    check_inputs_agree(manifest, saved, windows, tasks)
    check_decoding(model, settings, first_device(mesh))
    return Setup(
        settings, machine, mesh, weights_dir, manifest, described, saved, model, params, tokenizer, windows, tasks
    )


def make_schedule(setup: Setup, say: Say) -> tuple[Schedule, Calibration | None, LimitCheck | None]:
    """The schedule that was loaded, or one from the calibration text."""
    settings, calibration, limit_check = setup.settings, None, None
    if setup.saved:
        plans = setup.saved.plans
    else:
        say(f"📊 Calibrating on {(settings.calib_text or settings.text).name}...")
        calibration = Calibration(setup.model, setup.params, setup.windows.calibration, setup.mesh)
        if settings.verbose:
            say("\n".join(console.chosen_tiles(layer, tiles) for layer, tiles in calibration.tiles.items()))
        plans, limit_check = hosts.from_first(find_schedule(settings, calibration))
    say("\n⚡ Generating Optimized Schedule:")
    say(console.schedule(plans, settings))
    if settings.save_schedule and hosts.is_first():
        save_schedule(settings.save_schedule, plans, settings.selection, setup.manifest, setup.windows.calibration)
        say(f"📝 Schedule written to {settings.save_schedule}")
    return plans, calibration, limit_check


def run_both(setup: Setup, plans: Schedule, say: Say) -> Both:
    """The test windows through the dense and the sparse model."""
    settings, params, mesh, test = setup.settings, setup.params, setup.mesh, setup.windows.test
    decodes = bool(settings.decode or settings.generate)
    say("🏃 Running DENSE Baseline...")
    shape = jax.ShapeDtypeStruct((mesh.shape[DATA], settings.seq_len), jnp.int32)
    dense = setup.model.compile(params, shape, mesh, with_cache=decodes)
    give_back_memory()
    keeps = decodes and keeps_prefills(setup.model, test)
    dense_outputs = run_windows(dense, params, test, keeps)
    dense_perplexity = perplexity_of(np.concatenate([output.nll for output in dense_outputs]))
    warn(check_perplexity(dense_perplexity, setup.manifest.config.vocab_size, len(test) * (test[0].size - 1)))
    say(f"  All {tile_count(settings.seq_len, settings.selection.tile_size)} tiles in every layer\n")

    say("⚡ Running KASCADE Sparse...")
    sparse_model = setup.model.clone(schedule=plans)
    sparse = sparse_model.compile(params, shape, mesh, with_cache=decodes)
    give_back_memory()
    sparse_outputs = run_windows(sparse, params, test, keeps)
    publish_tiles(sparse_outputs[0].tiles)
    attended = attended_tiles(plans, sparse_outputs[0].tiles)
    if settings.verbose:
        say(console.sparse_layers(plans, attended, settings.selection.tile_size, settings.seq_len))
    compared = compare(setup.model, params, test, dense_outputs, sparse_outputs, mesh)
    quality = Quality(compared, [density_of(tiles, sparse_model.selection) for tiles in attended.values()])
    return Both(sparse_model, dense, sparse, dense_outputs, sparse_outputs, attended, quality)


def time_both(setup: Setup, both: Both, meaning: str, say: Say) -> tuple[Timing, Mapping[str, Sequence[float]]]:
    """The first test window's forwards in turn, and one layer's attention alone by kind, milliseconds."""
    settings, params, test_ids = setup.settings, setup.params, setup.windows.test[0]
    show(f"⏱️  SPEEDUP BENCHMARK\n{console.RULE}\n")
    say(f"Benchmarking {settings.n_runs} runs each...")
    say(f"  Compiled before the clock starts: dense {both.dense.seconds:.1f} s, sparse {both.sparse.seconds:.1f} s")
    say("  Warming up...\n  Timing Dense and Sparse in turn...\n")
    runs = {"dense": partial(both.dense, params, test_ids), "sparse": partial(both.sparse, params, test_ids)}
    samples = time_interleaved(runs, settings.n_runs)
    compiling = hosts.slowest({"dense": [both.dense.seconds], "sparse": [both.sparse.seconds]})
    timing = Timing(samples["dense"], samples["sparse"], compiling["dense"][0], compiling["sparse"][0])
    show(console.timing(timing, f"{meaning}; {settings.seq_len} tokens,\n    density {both.quality.density:.2%}"))
    attention_ms = time_interleaved(compile_attention(setup.model, settings.seq_len, setup.mesh), settings.n_runs)
    show("\n" + console.attention_alone(attention_ms))
    return timing, attention_ms


def measure_densities(
    setup: Setup, both: Both, calibration: Calibration, results: Results, earlier: Earlier
) -> Results:
    """The results with a row for each of --densities."""
    settings = setup.settings
    show("\n" + console.densities_header(settings))
    measure_one = partial(
        measure_density,
        settings=settings,
        calibration=calibration,
        dense=both.dense,
        dense_outputs=both.dense_outputs,
        windows=setup.windows.test,
    )
    finish = partial(finish_row, results, field="densities", line=console.density_row)
    return dataclasses.replace(
        results, densities=measure_rows(settings.densities, earlier.densities, measure_one, finish)
    )


def measure_sweep(setup: Setup, both: Both, results: Results, earlier: Earlier, meaning: str) -> Results:
    """The results with a row for each length of --sweep."""
    settings, models = setup.settings, {"dense": setup.model, "sparse": both.sparse_model}
    show("\n" + console.sweep_header(meaning))
    measure_one = partial(
        measure_length, models, setup.params, setup.windows.test[0], mesh=setup.mesh, n_runs=settings.n_runs
    )
    finish = partial(finish_row, results, field="sweep", line=console.sweep_row)
    rows = measure_rows(settings.sweep, earlier.sweep, measure_one, finish)
    show(console.sweep_break_even(rows))
    return dataclasses.replace(results, sweep=rows)


def decode(setup: Setup, both: Both, results: Results, earlier: Earlier) -> Results:
    """The results with what is decoded token by token."""
    settings, windows = setup.settings, setup.windows
    forwards = {"dense": both.dense, "sparse": both.sparse}
    outputs = {"dense": both.dense_outputs, "sparse": both.sparse_outputs}
    arms = Arms(setup.model, both.sparse_model, forwards, setup.params, setup.mesh, outputs)
    if settings.decode:
        results = dataclasses.replace(results, decoding=decode_windows(arms, windows, settings))
        show("\n" + console.decoding(results.decoding, settings.dtype))
    if settings.depths:
        show(console.depths_header(settings.batch))
        measure_one = partial(measure_depth, arms, batch=settings.batch, n_runs=settings.n_runs)
        finish = partial(finish_row, results, field="depths", line=console.depth_row)
        results = dataclasses.replace(
            results, depths=measure_rows(settings.depths, earlier.depths, measure_one, finish)
        )
        show(console.sweep_break_even(results.depths) + "\n")
    if settings.generate:
        generated = generate(arms, windows.test[0], settings.generate, settings.prefill)
        texts = (setup.tokenizer.decode(ids) for ids in (generated.dense, generated.sparse))
        show(console.continuations(generated, *texts))
        results = dataclasses.replace(results, generated=generated)
    return results


def finish_row(results: Results, rows: list[Any], was_there: bool, field: str, line: Callable[[Any], str]) -> None:
    """Prints the last of `rows` and saves the report with those that are measured by now."""
    path = results.settings.json
    show(line(rows[-1]) + was_there * f"  (from {path})")
    save_partly(path, dataclasses.replace(results, **{field: rows}))


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


def check_flags_agree(settings: Settings) -> None:
    """That all processes run the same program on the same flags, but for which process each is."""
    if hosts.num_processes() == 1:
        return
    program = {"program": hosts.program_hash()} | versions()
    hosts.agree(program, "install the same program with the same packages for every process")
    flags = settings_to_json(settings)
    given = {name: value for name, value in flags.items() if name not in ("coordinator", "process_id")}
    hosts.agree(given, "give every process the same flags but --process_id")


def check_inputs_agree(
    manifest: Manifest, saved: SavedSchedule | None, windows: Windows, tasks: Sequence[Task]
) -> None:
    """That all processes have read the same weights, tokenizer, schedule and texts."""
    if hosts.num_processes() == 1:
        return
    files = {"weights": manifest.fingerprint, "config": repr(manifest.config), "tokenizer": manifest.tokenizer}
    files |= {"schedule": saved and schedule_sha256(saved.plans), "selection": saved and repr(saved.selection)}
    hosts.agree(files, "give every process the same files")
    ids = [*windows.calibration, *windows.test, *windows.following]
    texts = {"text": hash_of(ids), "tasks": hashlib.sha256(repr(tasks).encode()).hexdigest()}
    hosts.agree(texts, "give every process the same texts")


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

    def make() -> None:
        with reading(weights_dir):
            missing = not weights_dir.exists() or (weights_dir.is_dir() and not any(weights_dir.iterdir()))
        if missing:
            say(f"📦 No weights in {weights_dir}: fetching and converting the default model...")
            with ctrl_c_raises():
                convert_weights.convert_default(weights_dir, say=lambda text: print(text, file=sys.stderr))

    if settings.weights_dir is None:
        hosts.in_turn(make)
    return weights_dir, read_manifest(weights_dir)


def resolve(settings: Settings, manifest: Manifest, devices: Sequence[jax.Device], say: Say) -> Settings:
    """The settings with everything decided that depends on the model and the machine."""
    config, device = manifest.config, settings.device
    settings = settings.for_model(config)
    dtype, why_dtype = hosts.from_first(pick_dtype(settings.dtype, device, config))
    longest = max([settings.seq_len, *settings.sweep])
    capability = getattr(devices[0], "compute_capability", None)
    kernel, why_kernel = pick_kernel(
        settings.kernel, device, settings.selection, longest, config.head_dim, dtype, capability
    )
    say(f"✓ Matrix inputs in {dtype} ({why_dtype})")
    say(f"✓ Attention by {kernel} ({why_kernel})")
    warn_beyond_context(longest, config)
    return dataclasses.replace(settings, dtype=dtype, kernel=kernel)


def describe_machine(platform: str, mesh: Mesh) -> Machine:
    """The devices as the report names them."""
    device = first_device(mesh)
    return Machine(
        platform, device.device_kind, mesh.size, processor_name(), compiler_options(device), dict(mesh.shape)
    )


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
