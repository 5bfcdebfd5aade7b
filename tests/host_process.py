"""One process of tests/test_hosts.py: the benchmark on one core, which may end at a moment that the test names.

python host_process.py '{"flags": [...], "dies_in": "load_weights", "tiles": FILE}'
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import benchmark_kascade_final as benchmark
import errors
import measure.machine
import network.programs
import report.results
from attention import sharding
from kascade_core import KASCADE_CACHE
from measure import hosts

MOMENTS = {  # a function that the process ends in
    "join": (hosts, "join"),
    "load_weights": (benchmark, "load_weights"),
    "compile": (network.programs, "compile_ahead"),
    "compare": (benchmark, "compare"),
    "decode": (benchmark, "decode"),
    "write": (report.results, "os"),  # as soon as the temporary file is there
    "find_schedule": (benchmark, "find_schedule"),
}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_, **__):
    raise ZeroDivisionError("a mistake in the program")


def check_arrays(mesh):
    """The mesh, whose devices are those of several processes, after some arrays have been on it."""
    numbers = np.arange(4.0 * mesh.size).reshape(mesh.size, 4)
    dealt = sharding.place(numbers, mesh, sharding.FIRST)
    assert len(dealt.addressable_shards) < mesh.size
    np.testing.assert_array_equal(sharding.fetch({"a": dealt})["a"], numbers)
    np.testing.assert_array_equal(sharding.fetch(numbers), numbers)
    read = sharding.jit(lambda x: (x + 1, sharding.whole(x + 1, mesh)), mesh)(dealt)
    assert [x.is_fully_replicated for x in read] == [False, True]
    np.testing.assert_array_equal(read[1], numbers + 1)
    assert sharding.on_host_or_shared(dealt) is dealt
    few = sharding.steps_mesh(mesh, 1)
    assert {device.process_index for device in few.devices.flat} == set(range(jax.process_count()))
    assert few.size == jax.process_count()
    moved = sharding.move({"a": dealt, "b": read[1], "c": jnp.ones(3)}, few)
    assert {x.sharding for x in moved.values()} == {NamedSharding(few, sharding.WHOLE)}
    for x, expected in zip(moved.values(), (numbers, numbers + 1, np.ones(3)), strict=True):
        np.testing.assert_array_equal(x, expected)
    kept = sharding.keep_on(read[1], few)
    assert (
        kept.addressable_shards[0].data.unsafe_buffer_pointer()
        == read[1].addressable_shards[0].data.unsafe_buffer_pointer()
    )
    return mesh


def main(asked):
    measure.machine.usable_cores = lambda: asked.get("cores", 1)
    hosts.JOIN_SECONDS, hosts.HEARTBEAT_SECONDS, hosts.GRACE_SECONDS = asked.get("seconds", (60, 10, 2))
    for key, ends in (("dies_in", die), ("fails_in", fail)):
        if key in asked:
            place, name = MOMENTS[asked[key]]
            setattr(place, name, SimpleNamespace(**vars(os) | {"replace": ends}) if name == "os" else ends)
    if "arrays" in asked:
        measure.machine.make_mesh = lambda *args, **sizes: check_arrays(sharding.make_mesh(*args, **sizes))
    code = errors.run(lambda: benchmark.main(asked["flags"]))
    if "tiles" in asked:
        tiles = {layer: values.tolist() for layer, values in KASCADE_CACHE.items()}
        Path(asked["tiles"]).write_text(json.dumps(tiles), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
