"""README.md and docs/: what they name exists, and what is generated is up to date."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs.figures.make_figures import FILE as FIGURE
from docs.figures.make_figures import MODE_COLOURS, figure
from docs.figures.make_figures import main as make_figures
from docs.make_flags import FILE as FLAGS
from docs.make_flags import flags_text
from measure.settings import make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SVG = "{http://www.w3.org/2000/svg}"


def commands(page):
    """The command lines of a page's shell blocks, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in "".join(blocks).splitlines():
        yield from (shlex.split(command, comments=True) for command in line.split("&&"))


COMMANDS = [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_page_names_only_commands_and_flags_that_exist(words):
    program, *args = words
    assert program in ("python3", ".venv/bin/pip", ".venv/bin/python"), "a program that the quickstart does not make"
    if program.endswith("pip"):
        assert all((ROOT / file).is_file() for flag, file in zip(args, args[1:]) if flag == "-r")
        return
    script = f"{args[1].replace('.', '/')}.py" if args[0] == "-m" else args[0]
    flags = [word for word in args if word.startswith("--")]
    if script in ("venv.py", "pytest.py"):
        return
    if script == "benchmark_kascade_final.py":
        make_parser().parse_args(args[1:])
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert [flag for flag in flags if f'"{flag}"' not in source] == []


def test_the_commands_that_ci_reads_from_the_readme_are_there():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("python3 -m venv")]
    assert [line for line in lines if line.startswith(".venv/bin/pip install -r requirements-dev.txt")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


def test_the_readme_stays_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 180
    assert len(text.split()) <= 1900


def test_the_readmes_flags_are_flags_of_the_benchmark():
    named = re.findall(r"^\| `(--\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) >= 9
    assert set(named) <= {flag for action in make_parser()._actions for flag in action.option_strings}


def test_the_page_of_flags_is_that_of_the_parser():
    assert FLAGS.read_text(encoding="utf-8") == flags_text(), "run python -m docs.make_flags"


REPORT = {
    "model": {"name": "Tiny<&>.Q4_1"},
    "config": {"seq_len": 96},
    "density": 0.375,
    "schedule": [
        {"mode": "DENSE", "anchor": None},
        {"mode": "ANCHOR", "anchor": None},
        {"mode": "REUSE", "anchor": 1},
        {"mode": "REUSE", "anchor": 1},
    ],
}


def test_the_figure_shows_each_layer_and_whose_tiles_it_reuses():
    drawing = ElementTree.fromstring(figure(REPORT))
    layers = [box.get("fill") for box in drawing.iter(f"{SVG}rect") if box.get("height") == "40.0"]
    assert layers == [MODE_COLOURS[layer["mode"]] for layer in REPORT["schedule"]]
    arrows = [path.get("d") for path in drawing.iter(f"{SVG}path") if " C" in path.get("d")]
    assert len(arrows) == 2
    assert len({arrow.split(" C")[0] for arrow in arrows}) == 1, "both begin at layer 1"
    words = [text.text for text in drawing.iter(f"{SVG}text")]
    assert "Across the layers of Tiny<&>" in words
    assert "96 tokens: 37.5% of the causal tile pairs are attended to" in words


def test_the_stored_figure_is_one_that_the_script_draws():
    names = {element.tag for element in ElementTree.parse(FIGURE).iter()}
    assert names == {element.tag for element in ElementTree.fromstring(figure(REPORT)).iter()}


def test_the_figures_script_asks_for_its_report(capsys):
    assert make_figures([]) == 2
    assert "error: expected one argument, a report" in capsys.readouterr().err
