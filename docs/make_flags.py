"""Writes docs/flags.md from the parser of the benchmark; tests/test_docs.py checks that the two agree.

python -m docs.make_flags
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure.settings import make_parser
from report.tables import markdown

FILE = Path(__file__).parent / "flags.md"
INTRODUCTION = """# Flags of benchmark_kascade_final.py

Made by `python -m docs.make_flags` from the parser, which `--help` shows as well. Defaults are in parentheses. A flag
that would have no effect beside the others is refused. Bad input ends with one sentence on stderr and exit code 2.

"""


def flags_text() -> str:
    """The text of docs/flags.md."""
    actions = [action for action in make_parser()._actions if action.dest != "help"]
    return INTRODUCTION + markdown(("flag", "meaning"), [(f"`{usage(a)}`", a.help.replace("%%", "%")) for a in actions])


def usage(action: argparse.Action) -> str:
    """A flag with what it takes, such as "--top_k N"."""
    takes = "{" + ",".join(action.choices) + "}" if action.choices else action.metavar or ""
    return f"{action.option_strings[0]} {takes}".strip()


if __name__ == "__main__":
    FILE.write_text(flags_text(), encoding="utf-8")
