"""Writes docs/colab.ipynb, the notebook for a Colab runtime; tests/test_colab.py checks that the two agree.

python -m docs.make_colab

The notebook's own Python never imports JAX: a TPU belongs to one process, and that must be the benchmark's. Nor does it
use the packages that the runtime ships, whose jax, plug-ins and libtpu are of other versions: like the README it fills
`.venv`, but without ensurepip, which Colab's Python may lack: the runtime's pip puts another there.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).parent / "colab.ipynb"

INTRODUCTION = """\
# The Kascade benchmark on a TPU, a GPU or a CPU

This notebook asks what cross-layer sparse attention (Kascade, arXiv 2512.16391) costs a LLaMA in perplexity and gains
it in time. It clones the repository, installs it, runs the benchmark on what this machine has, and shows the report. In
Colab first choose a TPU or a GPU under *Runtime > Change runtime type*, then *Runtime > Run all*."""

PARAMETERS = """\
REPOSITORY = ""  # @param {type:"string"}
FLAGS = ""  # @param {type:"string"}
# REPOSITORY: the address that `git clone` takes; not needed where this notebook lies in a checkout.
# FLAGS: the benchmark's flags, such as "--seq_len 2048 --windows 2"; empty for the README's on each device."""

CHECKOUT = '''\
import glob
import html
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from IPython.display import HTML, display


def run(*words):
    """Runs a command, shows what it prints as it comes, and stops here if it fails."""
    words = [str(word) for word in words]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        try:
            for line in process.stdout:
                print(line, end="")
        except KeyboardInterrupt:
            process.terminate()  # a process left behind would keep the TPU
            raise
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode} of {shlex.join(words)}")


def find_checkout():
    """The folder with the benchmark, or None."""
    return next((folder for folder in (".", "..", "kascade") if Path(folder, PROGRAM).exists()), None)


PROGRAM = "benchmark_kascade_final.py"
if not find_checkout():
    if not REPOSITORY:
        raise ValueError("REPOSITORY is empty: give it the address of the repository, in the cell above")
    run("git", "clone", "--depth", "1", REPOSITORY, "kascade")
os.chdir(find_checkout())
print("The checkout is", os.getcwd())'''

INSTALL = '''\
def find_device():
    """What this machine has, by its device files: asking JAX would take the TPU from the benchmark."""
    if glob.glob("/dev/nvidia[0-9]*"):
        return "gpu"
    if "TPU_ACCELERATOR_TYPE" in os.environ or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return "cpu"


DEVICE = find_device()  # or "tpu", "gpu" or "cpu"
PYTHON = Path(".venv/bin/python")
EXTRA = {"tpu": ["jax[tpu]"], "gpu": ["jax[cuda12]"], "cpu": []}[DEVICE]
print("The device is", DEVICE)
if not PYTHON.exists():
    run(sys.executable, "-m", "venv", "--without-pip", ".venv")
INSTALL = [sys.executable, "-m", "pip", "--python", PYTHON, "install", "-q"]
run(*INSTALL, "pip", "-r", "requirements.txt", *EXTRA)  # pip too: it fetches the default model'''

BENCHMARK = """\
README_FLAGS = {"tpu": "--tile_size 128 --top_k 8 --seq_len 4096", "gpu": "--seq_len 4096", "cpu": ""}
flags = shlex.split(FLAGS or README_FLAGS[DEVICE])
run(PYTHON, PROGRAM, "--device", DEVICE, *flags, "--html", "report.html", "--json", "report.json")"""

SHOW = '''\
def shown(value, form):
    """A number of the report, which is null where it is not finite."""
    return "not finite" if value is None else format(value, form)


report = json.loads(Path("report.json").read_text(encoding="utf-8"))
change, error = (report["quality"][name] for name in ("degradation_pct", "error_pct"))
rows = {
    "change of perplexity": f"{shown(change, '+.2f')} % ± {shown(error, '.2f')}",
    "attended share of the causal tile pairs": shown(report["density"], ".1%"),
    "speedup of the whole forward": shown(report["speedup"], ".2f") + "x",
}
table = "".join(f"<tr><td>{name}</td><td><b>{number}</b></td></tr>" for name, number in rows.items())
title = html.escape(f"{report['model']['name']} on {report['device']['kind']}: {report['verdict']}")
display(HTML(f"<table><caption>{title}</caption>{table}</table>"))

page = Path("report.html").read_text(encoding="utf-8")
page = page.replace("<head>", '<head><base href="about:srcdoc">', 1)  # links to a heading stay within the frame
size = "width: 100%; height: 900px; border: 0"
display(HTML(f'<div><iframe srcdoc="{html.escape(page)}" style="{size}"></iframe></div>'))'''

NEXT = """\
## What to try next

How much can be dropped, and at what length does it pay? In a new cell:

```
!{PYTHON} benchmark_kascade_final.py --device {DEVICE} --seq_len 2048 --densities 0.1,0.2,0.4 --sweep 1024,4096
```

Does the sparse model still find a fact in its context?

```
!{PYTHON} benchmark_kascade_final.py --device {DEVICE} --seq_len 2048 --tasks niah_single,vt
```"""

CELLS = {
    "introduction": ("markdown", INTRODUCTION),
    "parameters": ("code", PARAMETERS),
    "checkout": ("code", CHECKOUT),
    "install": ("code", INSTALL),
    "benchmark": ("code", BENCHMARK),
    "show": ("code", SHOW),
    "next": ("markdown", NEXT),
}


def notebook_text() -> str:
    """The text of docs/colab.ipynb: JSON of nbformat 4.5, without outputs."""
    notebook = {
        "cells": [cell(name, kind, source) for name, (kind, source) in CELLS.items()],
        "metadata": {
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def cell(name: str, kind: str, source: str) -> dict[str, object]:
    """One cell; a code cell has never run."""
    never_run = {"execution_count": None, "outputs": []} if kind == "code" else {}
    lines = source.splitlines(keepends=True)
    return {"cell_type": kind, "id": name, "metadata": {}, **never_run, "source": lines}


if __name__ == "__main__":
    FILE.write_text(notebook_text(), encoding="utf-8")
