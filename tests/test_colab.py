"""docs/colab.ipynb: it is what its script makes, runs from top to bottom on a CPU, and chooses by what a machine has."""

import ast
import glob
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser
from synthetic import RUN_SIZES, repeating_text

from docs.make_colab import FILE, notebook_text
from measure.settings import make_parser

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
SOURCES = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
CODE = [cell["id"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PIP = [sys.executable, "-m", "pip", "--python", ".venv/bin/python", "install", "-q", "pip", "-r", "requirements.txt"]
REPORTS = ["--html", "report.html", "--json", "report.json"]


@pytest.fixture
def displayed(monkeypatch):
    """What cells display, as HTML."""
    shown = []
    fake = SimpleNamespace(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return shown


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of links to this one, with a filled .venv; the working folder is its docs, as in Jupyter."""
    folder = tmp_path / "checkout"
    (folder / "docs").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *(ROOT / name for name in ("report", "measure"))]:
        (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    monkeypatch.chdir(folder / "docs")
    return folder


@pytest.fixture
def commands(monkeypatch):
    """What cells run, instead of running it; a clone makes the folder."""
    asked = []

    class Recorder:
        stdout, returncode = ("",), 0

        def __init__(self, words, **_):
            asked.append(words)
            if words[0] == "git":
                Path("kascade").mkdir()
                Path("kascade/benchmark_kascade_final.py").touch()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(subprocess, "Popen", Recorder)
    return asked


@pytest.fixture
def machine(monkeypatch):
    """Gives the machine device files, and environment variables, of its own."""

    def make(files="", **variables):
        monkeypatch.setattr(glob, "glob", lambda pattern: [files] * Path(files).match(pattern))
        monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def execute(cells=CODE, **parameters):
    """Runs code cells in one namespace; `parameters` replace those of the first."""
    names = {}
    for name in cells:
        exec(compile(SOURCES[name], name, "exec"), names)
        if name == "parameters":
            assert parameters.keys() <= names.keys()
            names |= parameters
    return names


# --- The file ---


def test_the_notebook_is_what_its_script_makes():
    assert FILE.read_text(encoding="utf-8") == notebook_text(), "run python -m docs.make_colab"


def test_the_notebook_has_nbformats_fields_and_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert len(SOURCES) == len(NOTEBOOK["cells"]), "ids are unique"
    for cell in NOTEBOOK["cells"]:
        fields = {"cell_type", "id", "metadata", "source"}
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            fields |= {"outputs", "execution_count"}
        assert cell.keys() == fields


def test_the_notebooks_own_python_imports_nothing_that_could_hold_a_tpu():
    imported = set()
    for name in CODE:
        for node in ast.walk(ast.parse(SOURCES[name])):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - {"IPython"} <= sys.stdlib_module_names


def test_what_to_try_next_is_two_command_lines_of_the_benchmark():
    lines = re.findall(r"^!\{PYTHON\} benchmark_kascade_final.py (.*)$", SOURCES["next"], re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        make_parser().parse_args(shlex.split(line.replace("{DEVICE}", "tpu")))


# --- A run ---


def test_every_cell_runs_on_a_cpu_and_the_report_is_shown(checkout, displayed, machine, folders, monkeypatch, capsys):
    machine()
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the packages are there: nothing is fetched
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")  # a kernel names one that it alone has
    Path("text.txt").write_text(repeating_text(200), encoding="utf-8")
    files = ["--weights_dir", folders / "gqa_default_tied", "--text", "docs/text.txt"]
    execute(FLAGS=shlex.join(map(str, [*RUN_SIZES, *files, "--decode", "0"])))

    output = capsys.readouterr().out
    assert f"The checkout is {checkout}\nThe device is cpu\n" in output
    assert "Final Schedule" in output, "the benchmark's own lines are shown"
    report = json.loads((checkout / "report.json").read_text(encoding="utf-8"))
    table, frame = displayed
    quality = report["quality"]
    assert f"{quality['degradation_pct']:+.2f} % ± {quality['error_pct']:.2f}" in table
    assert f"{report['density']:.1%}" in table
    assert f"{report['speedup']:.2f}x" in table
    assert report["model"]["name"] in table
    page = re.search(r'<iframe srcdoc="([^"]*)"', frame)[1]
    stays = '<base href="about:srcdoc">'
    assert html.unescape(page).replace(stays, "", 1) == (checkout / "report.html").read_text(encoding="utf-8")


REPORT = {
    "model": {"name": "Tiny<&>"},
    "device": {"kind": "TPU v5 lite"},
    "verdict": "failed",
    "quality": {"degradation_pct": None, "error_pct": None},
    "density": 0.375,
    "speedup": 1.5,
}


@pytest.fixture
def shown(checkout, displayed):
    """The table and the frame of a report without finite perplexities, whose page is high."""
    (checkout / "report.json").write_text(json.dumps(REPORT), encoding="utf-8")
    page = """<head></head><a href="#end">"end" & more</a><div style="height: 3000px"></div><p id="end">"""
    (checkout / "report.html").write_text(page, encoding="utf-8")
    execute(["parameters", "checkout", "show"])
    return displayed


def test_names_are_escaped_and_what_is_not_finite_is_said(shown):
    table, _ = shown
    assert "Tiny&lt;&amp;&gt; on TPU v5 lite: failed" in table
    assert "not finite % ± not finite" in table


@pytest.mark.browser
def test_a_link_to_a_heading_scrolls_the_frame(shown, tmp_path):
    (tmp_path / "output.html").write_text("".join(shown), encoding="utf-8")
    browser = Browser()
    try:
        browser.open(tmp_path / "output.html", 1000)
        frame = "document.querySelector('iframe').contentWindow"
        assert browser.evaluate(f"{frame}.document.querySelector('a').click(), {frame}.scrollY") > 1000
        assert not browser.complaints()
    finally:
        browser.close()


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "variables", "device", "extra"),
    [
        ("/dev/nvidia0", {}, "gpu", ["jax[cuda12]"]),
        ("/dev/accel0", {}, "tpu", ["jax[tpu]"]),
        ("/dev/vfio/0", {}, "tpu", ["jax[tpu]"]),
        ("", {"TPU_ACCELERATOR_TYPE": "v5e-1"}, "tpu", ["jax[tpu]"]),
        ("/dev/nvidiactl", {}, "cpu", []),
        ("/dev/vfio/vfio", {}, "cpu", []),
    ],
)
def test_the_device_decides_what_is_installed_and_run(
    checkout, displayed, machine, commands, files, variables, device, extra
):
    machine(files, **variables)
    execute(CODE[:-1])
    install, benchmark = commands
    assert install == [*PIP, *extra]
    assert benchmark[:4] == [".venv/bin/python", "benchmark_kascade_final.py", "--device", device]
    assert benchmark[-4:] == REPORTS
    if device != "cpu":
        assert shlex.join(benchmark[:-4]) in README.splitlines(), "the README's command for it"


def test_without_a_checkout_the_repository_is_cloned_once(tmp_path, displayed, machine, commands, monkeypatch):
    machine()
    monkeypatch.chdir(tmp_path)
    execute(CODE[:-1], REPOSITORY="some/where.git")
    assert Path.cwd() == tmp_path / "kascade"
    assert commands[:3] == [
        ["git", "clone", "--depth", "1", "some/where.git", "kascade"],
        [sys.executable, "-m", "venv", "--without-pip", ".venv"],
        PIP,
    ]
    monkeypatch.chdir(tmp_path)
    commands.clear()
    execute(CODE[:2])
    assert commands == []


def test_without_a_checkout_and_an_address_the_notebook_says_what_to_fill_in(tmp_path, displayed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty: give it the address"):
        execute(CODE[:2])


def test_a_command_that_fails_stops_the_notebook(checkout, displayed, capsys):
    run = execute(CODE[:2])["run"]
    with pytest.raises(RuntimeError, match=f"exit code 3 of {re.escape(sys.executable)} -c"):
        run(sys.executable, "-c", "import sys; print('before it'); sys.exit(3)")
    assert "before it\n" in capsys.readouterr().out
    assert os.getcwd() == str(checkout)
