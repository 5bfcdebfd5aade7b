"""One process of tests/test_hosts.py: the benchmark on one core, which may end at a moment that the test names.

python host_process.py '{"flags": [...], "dies_in": "load_weights", "tiles": FILE}'
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmark_kascade_final as benchmark
import errors
import llama_model
import measure.machine
import report.results
from kascade_core import KASCADE_CACHE
from measure import hosts

MOMENTS = {  # a function that the process ends in
    "join": (hosts, "join"),
    "load_weights": (benchmark, "load_weights"),
    "compile": (llama_model, "compile_ahead"),
    "compare": (benchmark, "compare"),
    "decode": (benchmark, "decode"),
    "replace": (report.results.os, "replace"),  # of a report that is written whole
    "find_schedule": (benchmark, "find_schedule"),
}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_, **__):
    raise ZeroDivisionError("a mistake in the program")


def main(asked):
    measure.machine.usable_cores = lambda: 1
    hosts.JOIN_SECONDS, hosts.HEARTBEAT_SECONDS, hosts.GRACE_SECONDS = asked.get("seconds", (20, 10, 2))
    for key, ends in (("dies_in", die), ("fails_in", fail)):
        if key in asked:
            setattr(*MOMENTS[asked[key]], ends)
    code = errors.run(lambda: benchmark.main(asked["flags"]))
    if "tiles" in asked:
        tiles = {layer: values.tolist() for layer, values in KASCADE_CACHE.items()}
        Path(asked["tiles"]).write_text(json.dumps(tiles), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
