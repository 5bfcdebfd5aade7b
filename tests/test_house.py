"""The rules of the house that a syntax tree or a list of files can show."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kascade_core

ROOT = Path(__file__).parents[1]
FOLDERS = ("attention", "network", "weights", "measure", "report", "bench")
PROGRAM = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
NAMES = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in PROGRAM}
ORDER = [  # each imports what stands before it, and nothing else of ours
    {"errors"},
    {"kascade_core", "weights"},
    {"attention", "convert_weights"},
    {"network"},
    {"llama_model"},
    {"report"},
    {"measure"},
    {"benchmark_kascade_final", "bench"},
]
NARROWER = {  # that may import less than what stands before them
    "convert_weights": {"errors", "weights"},
    "attention": {"errors", "kascade_core", "weights"},
}
USERS = {
    "benchmark_kascade_final.py", "kascade_core.py", "llama_model.py", "convert_weights.py", "wikipedia_sample.txt",
    "requirements.txt", "tests", "README.md",
}  # fmt: skip
OURS = {"errors.py", "pyproject.toml", "requirements-dev.txt", "LICENSE", ".gitignore", ".ci", "docs", *FOLDERS}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def own_imports(path):
    """The names in the root of the modules of ours that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        yield from (module.split(".")[0] for module in modules if module.split(".")[0] in NAMES)


def allowed_imports(name):
    if name in NARROWER:
        return NARROWER[name]
    place = next(i for i, names in enumerate(ORDER) if name in names)
    return set().union(*ORDER[:place])


def test_the_order_names_every_module():
    assert set().union(*ORDER) == NAMES


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert set(own_imports(path)) - {name} <= allowed_imports(name)


def test_the_root_shows_the_users_names_and_little_else():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git here")
    names = {line.split("/")[0] for line in listed.splitlines()}
    assert names >= USERS
    assert names <= USERS | OURS


def test_array_names_end_in_the_letters_of_the_method():
    """A suffix of capitals is a shape: kascade_core's docstring has one meaning for each letter, and 1 is 1."""
    table = re.search(r"One letter, one meaning.*?:\n(.*?)\.\n\n", kascade_core.__doc__, re.DOTALL)[1]
    letters = {entry.split()[0] for entry in re.split(r",| and (?=[A-Z] )", table)} | {"1"}
    assert {"B", "G", "Z", "Q", "P", "C", "J", "U"} <= letters
    strange = set()
    for path in PROGRAM:
        for node in ast.walk(tree(path)):
            for name in (getattr(node, field, None) for field in ("id", "arg", "attr")):
                suffix = re.fullmatch(r"_?[a-z][a-z0-9_]*_([A-Z1]+)", name or "")
                if suffix and set(suffix[1]) - letters:
                    strange.add(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')} {name}")
    assert not strange


@pytest.mark.parametrize("module", ["convert_weights", "errors"])
def test_converting_imports_no_jax_and_no_transformers(module):
    heavy = "{'jax', 'jaxlib', 'flax', 'transformers', 'torch'}"
    code = f"import sys, {module}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_one_place_jits():
    places = set()
    for path in PROGRAM:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit", "pmap"):
                if isinstance(node.value, ast.Name) and node.value.id == "jax":
                    places.add(str(path.relative_to(ROOT)))
            elif isinstance(node, ast.ImportFrom) and node.module == "jax":
                assert not {alias.name for alias in node.names} & {"jit", "pmap", "shard_map"}, path
    assert places - {"bench/compile_tpu.py"} == {"attention/sharding.py"}  # it lowers for chips that are not here


def test_only_the_command_lines_print():
    mains = {
        "benchmark_kascade_final.py",
        "convert_weights.py",
        "errors.py",
        "weights/transformers_ids.py",
        "report/compare.py",
    }
    for path in PROGRAM:
        name = str(path.relative_to(ROOT))
        prints = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not prints or name in mains or name.startswith("bench/"), name
