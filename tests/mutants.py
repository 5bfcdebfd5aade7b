"""Does the quick suite see a fault? Twenty small faults, one at a time in a copy of the tree; each must turn it red.

python tests/mutants.py             # all: about ten minutes on two cores
python tests/mutants.py sinks anchor # those whose name has one of these words

For each fault only the file of tests that is to see it is run. A fault whose old text is not found stops everything:
the table below must follow the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("*.py", "*.toml", "*.txt", "attention", "weights", "measure", "report", "bench", "tests")
RUN = "benchmark_kascade_final.py"


class Mutant(NamedTuple):
    """A fault: `old` becomes `new` in `file`, where it stands once, and `test` is to see it."""

    name: str
    file: str
    old: str
    new: str
    test: str


def no_flag(name: str) -> Mutant:
    """The command line drops a field of the selection."""
    old = "sizes = {name: given.pop(name) for name in selection_flags() if name in given}"
    return Mutant(
        f"the flag --{name} does not arrive",
        "measure/settings.py",
        old,
        f'{old}\n        sizes.pop("{name}", None)',
        "test_settings.py",
    )


MUTANTS = [
    # Between the flags and the model
    *(no_flag(name) for name in ("sink_tiles", "local_tiles", "anchor_scoring", "query_tile")),
    Mutant(
        "the model gets another selection than the settings",
        RUN,
        "None, settings.selection, dtype=dtype",
        "None, dataclasses.replace(settings.selection, sink_tiles=1), dtype=dtype",
        "test_benchmark.py",
    ),
    Mutant(
        "the model gets no kernel", RUN, ", dtype=dtype, kernel=settings.kernel)", ", dtype=dtype)", "test_benchmark.py"
    ),
    Mutant(
        "half of the layers anchor",
        "measure/settings.py",
        "ANCHOR_SHARE = 0.3",
        "ANCHOR_SHARE = 0.5",
        "test_settings.py",
    ),
    Mutant(
        "the report's config lacks a setting",
        "report/results.py",
        'values = values.pop("selection") | values',
        'values = values.pop("selection") | values\n    del values["threshold"]',
        "test_results.py",
    ),
    Mutant(
        "a timing does not say its sinks",
        "report/console.py",
        'f"{selection.sink_tiles} sink and {selection.local_tiles} local tiles"',
        'f"{selection.local_tiles} local tiles"',
        "test_console.py",
    ),
    Mutant(
        "layers are run one by one on xla",
        "measure/layerwise.py",
        "False, self.model.dtype, self.model.kernel)",
        "False, self.model.dtype, None)",
        "test_layerwise.py",
    ),
    Mutant(
        "layers are run one by one in float32",
        "measure/layerwise.py",
        "False, self.model.dtype, self.model.kernel)",
        "False, jnp.float32, self.model.kernel)",
        "test_layerwise.py",
    ),
    # The machine
    Mutant(
        "CPU programs are compiled without their options",
        "attention/sharding.py",
        "compiler_options=options or None",
        "compiler_options=None",
        "test_llama_model.py",
    ),
    Mutant("the peak is nothing", "measure/machine.py", "return read_peak_memory()", "return 0", "test_machine.py"),
    Mutant(
        "a CPU does not tell its free memory",
        "measure/machine.py",
        "return psutil.virtual_memory().available",
        "return None",
        "test_machine.py",
    ),
    # The method
    Mutant(
        "a query tile's own key tile is not always kept",
        "kascade_core.py",
        "jnp.where(seen_QP, jnp.inf, -jnp.inf)",
        "jnp.where(seen_QP, 0.0, -jnp.inf)",
        "test_kascade_core.py",
    ),
    Mutant(
        "layer 0 may be reused",
        "kascade_core.py",
        "anchors = [a for a, plan in enumerate(plans) if plan.mode == ANCHOR]\n        plans.append",
        "anchors = [a for a, plan in enumerate(plans) if plan.mode != REUSE]\n        plans.append",
        "test_kascade_core.py",
    ),
    Mutant(
        "a reuse layer's head map is not applied",
        "kascade_core.py",
        "mine = chosen_BKQC if self.head_map is None else chosen_BKQC[:, np.array(self.head_map)]",
        "mine = chosen_BKQC",
        "test_llama_model.py",
    ),
    # The kernels
    Mutant(
        "dense attention sees the future within a block",
        "attention/xla.py",
        "scores = _mask(scores, block, jnp.arange(R), key_block, window) if masked else scores",
        "scores = scores",
        "test_llama_model.py",
    ),
    Mutant(
        "fast scoring looks at the first rows alone",
        "kascade_core.py",
        "np.linspace(0, self.query_tile - 1, rows).astype(int)",
        "np.arange(rows)",
        "test_kascade_core.py",
    ),
    # The conversion
    Mutant(
        "query rows keep the order of the other programs",
        "weights/tensors.py",
        "reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)",
        "reshape(rows.shape)",
        "test_weights_sources.py",
    ),
]


def copy_tree(target: Path) -> None:
    """What the tests need of the tree."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)


def check_texts() -> None:
    """Stops where a mutant's old text does not stand in its file exactly once."""
    for mutant in MUTANTS:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if count != 1:
            sys.exit(f"{mutant.name}: expected once in {mutant.file}, found {count} times: {mutant.old}")


def run_tests(tree: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def check_green(tree: Path, files: set[str]) -> None:
    """Stops where a test fails without a fault: it would fail with one as well."""
    result = run_tests(tree, *(f"tests/{file}" for file in sorted(files)))
    if result.returncode:
        sys.exit(f"red without a fault:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")


def failing_test(tree: Path, mutant: Mutant) -> str | None:
    """The first test that sees the fault; None if all pass."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        result = run_tests(tree, "-n", "0", f"tests/{mutant.test}")
    finally:
        path.write_text(before, encoding="utf-8")
    if result.returncode == 0:
        return None
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode != 1 or not failed:
        ended = f"{mutant.name}: pytest ended with {result.returncode}"
        sys.exit(f"{ended}:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    return failed[0].split(" - ")[0].removeprefix("FAILED ")


def main(words: list[str]) -> int:
    """0 if every fault was seen."""
    check_texts()
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        copy_tree(tree)
        cache = Path(folder) / "cache"  # of what a fault leaves as it was
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        check_green(tree, {mutant.test for mutant in chosen})
        for mutant in chosen:
            test = failing_test(tree, mutant)
            caught += test is not None
            print(f"{'caught' if test else 'MISSED'}  {mutant.name}: {test or mutant.test}", flush=True)
    print(f"caught {caught}/{len(chosen)}")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
