"""docs/schema.md: every value of a report is in it, and everything in it is in a report."""

import json
import re
from pathlib import Path

import pytest
import reports
from synthetic import RUN_SIZES, repeating_text

import benchmark_kascade_final as benchmark
from measure.settings import make_parser
from report.results import FORMAT_VERSION, read_report, write_json

SCHEMA = (Path(__file__).parents[1] / "docs" / "schema.md").read_text(encoding="utf-8")
OPEN = (
    "config",
    "versions",
    "texts",
    "timing.attention_ms",
    "device.compiler_options",
    "device.mesh",
)  # objects whose names are the run's


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TYPES = {
    "text": lambda value: isinstance(value, str),
    "whole": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": is_number,
    "share": lambda value: is_number(value) and 0 <= value <= 1,
    "flag": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "any": lambda value: True,
}


def documented():
    """{path: names of its types}."""
    found = {}
    for paths, types in re.findall(r"^\| (`.*?`) \| ([\w ]+) \| ", SCHEMA, re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", paths):
            assert path not in found, path
            found[path] = types.split(" or ")
    return found


def leaves(value, path=""):
    """Every (path, value) of a report, as the schema writes paths; empty and null lists have none."""
    if isinstance(value, dict) and path != "config.NAME":
        for name, item in value.items():
            name = "NAME" if path in OPEN else name
            yield from leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and path != "config.NAME":
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, value


def wrong(report):
    """The leaves that the schema has not, or has with another type; a null may stand for a whole list or object."""
    schema = documented()
    for path, value in leaves(report):
        if value is None and path not in schema:
            if not any(name.startswith((f"{path}.", f"{path}[]")) for name in schema):
                yield path, value
        elif not any(TYPES[kind](value) for kind in schema.get(path, ())):
            yield path, value


@pytest.fixture(scope="module")
def real(folders, tmp_path_factory):
    """The report of a whole run on a small model, with everything that a run can measure but tasks."""
    root = tmp_path_factory.mktemp("schema")
    (root / "text.txt").write_text(repeating_text(200, 33))
    flags = [
        *RUN_SIZES,
        "--threshold",
        "0.3",
        "--windows",
        "2",
        "--decode",
        "5",
        "--depths",
        "20",
        "--generate",
        "3",
        "--quiet",
    ]
    flags += [
        "--sweep",
        "20",
        "--densities",
        "0.4",
        "--html",
        str(root / "page.html"),
        "--json",
        str(root / "out.json"),
    ]
    flags += ["--weights_dir", str(folders / "mha_llama3_tied"), "--text", str(root / "text.txt")]
    assert benchmark.main(flags) == 0
    return read_report(root / "out.json")


def test_a_report_of_a_run_is_as_the_schema_says(real):
    assert list(wrong(real)) == []


def test_a_report_of_every_part_is_as_the_schema_says_and_leaves_nothing_out(tmp_path):
    write_json(tmp_path / "out.json", reports.report())
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(wrong(report)) == []
    assert documented().keys() - {path for path, _ in leaves(report)} == {
        "schedule[].budgets[]",
        "tasks[].suspicions[]",
    }


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"speedup": None}, "speedup"),
        ({"density": 1.5}, "density"),
        ({"finished": 1}, "finished"),
        ({"new": 1}, "new"),
        ({"model": {"names": "a"}}, "model.names"),
        ({"command": [1]}, "command[]"),
        ({"new": None}, "new"),
    ],
)
def test_a_value_that_the_schema_has_not_is_seen(change, path):
    assert [name for name, _ in wrong(json.loads(json.dumps(reports.report() | change)))] == [path]


def test_the_schema_names_the_version_and_every_setting_is_a_flag(real):
    assert f"format version {FORMAT_VERSION}." in SCHEMA and f"| whole | {FORMAT_VERSION} |" in SCHEMA
    flags = {action.dest for action in make_parser()._actions} - {"help"}
    assert real["config"].keys() - flags == {"window"}
