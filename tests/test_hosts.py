"""Several processes: how they meet, what they tell each other, that they compute the same, and that they end together.

The quick tests have threads and a store of the test's own for the others, and one run of two real processes.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from synthetic import repeating_text

import benchmark_kascade_final as benchmark
from attention.sharding import fetch, make_mesh, on_host_or_shared, place, whole
from errors import InputError
from kascade_core import KASCADE_CACHE
from measure import hosts
from measure.machine import configure_device

CHILD = Path(__file__).with_name("host_process.py")
NAME, OTHER = "gqa_llama3_untied", "gqa_default_tied"
ANY = ["--weights_dir", "weights", "--text", "text.txt", "--tile_size", "4", "--seq_len", "30", "--dtype", "float32"]
ANY += ["--n_runs", "1", "--json", "out.json"]
LOW = [*ANY, "--top_k", "3", "--windows", "1", "--threshold", "0.3"]  # at which a layer reuses
SAVING = ["--save_schedule", "schedule.json"]
RUN = [*LOW, *SAVING, "--decode", "0"]
STEPS = ["--decode", "3", "--generate", "4", "--depths", "40"]
SEARCH = [*ANY, *SAVING, "--top_k", "3", "--windows", "2", "--decode", "0", "--scheduler", "search", "--anchors", "1"]
SEARCH += ["--budgets", "head", "--sweep", "20,50", "--densities", "0.5", "--html", "out.html"]
LIMIT = [*ANY, *SAVING, "--windows", "1", "--decode", "0", "--max_degradation", "30", "--calib_windows", "3"]


# --- The first meeting ---


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def meet(port, *processes):
    """What `_meet` does for each (num_processes, process_id), all at once: None, the sentence, or the exit code."""
    results = [None] * len(processes)

    def go(i, num_processes, process_id):
        try:
            hosts._meet(f"127.0.0.1:{port}", num_processes, process_id)
        except InputError as error:
            results[i] = str(error)
        except SystemExit as end:
            results[i] = end.code

    threads = [threading.Thread(target=go, args=(i, *process)) for i, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(hosts, "JOIN_SECONDS", 1)
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 1)


def test_processes_meet_in_any_order():
    assert meet(free_port(), (3, 2), (3, 0), (3, 1)) == [None, None, None]
    assert meet(free_port(), (1, 0)) == [None]


def test_after_a_meeting_the_port_is_free_at_once():
    port = free_port()
    for _ in range(3):
        assert meet(port, (2, 0), (2, 1)) == [None, None]


@pytest.mark.parametrize(
    ("processes", "sentence"),
    [
        ([(2, 0), (3, 2)], "process 2 was started with num_processes 3, and process 0 with 2: give all the same"),
        ([(3, 0), (2, 1)], "process 1 was started with num_processes 2, and process 0 with 3: give all the same"),
        ([(4, 0), (4, 1), (4, 1)], "two processes were started with process_id 1: give each of the 4 its own"),
        ([(4, 0), (4, 2)], "waited 1 s at 127.0.0.1:PORT for process 1, 3 of 4"),
    ],
)
def test_processes_that_are_no_job_end_with_one_sentence_of_process_0(soon, processes, sentence):
    port = free_port()
    first, *others = meet(port, *processes)
    assert first == sentence.replace("PORT", str(port))
    assert others == [2] * len(others)


def test_a_coordinator_that_is_not_there_is_named(soon):
    (said,) = meet(port := free_port(), (2, 1))
    assert said.startswith(f"process 1 cannot reach coordinator 127.0.0.1:{port} in 1 s (Connection refused): start")


def test_a_coordinator_that_is_another_program_is_named(soon):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0\r\n"), daemon=True).start()
        (said,) = meet(server.getsockname()[1], (2, 1))
    assert "cannot reach coordinator" in said


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        (said,) = meet(port := server.getsockname()[1], (2, 0))
    assert said == f"coordinator 127.0.0.1:{port}: port {port} cannot be opened here (Address already in use)"


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b"[]\n", b'{"process_id": "x", "num_processes": 2}\n', b""])
def test_strangers_that_call_the_port_are_sent_away(said):
    port, answers = free_port(), []

    def call():
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as line:
                    line.sendall(said)
                    line.shutdown(socket.SHUT_WR)
                    answers.append(line.recv(10))
                    return
            except OSError:
                time.sleep(0.01)

    stranger = threading.Thread(target=call)
    first = threading.Thread(target=lambda: answers.append(meet(port, (2, 0))))
    first.start()
    stranger.start()
    stranger.join()
    assert answers == [b""]
    assert meet(port, (2, 1)) == [None]
    first.join()
    assert answers[1] == [None]


# --- Whether there are others ---

STEP = dict.fromkeys(hosts.SLURM_NAMES, "1")
MPI = {"OMPI_MCA_orte_hnp_uri": "x"}


@pytest.mark.parametrize(
    ("environment", "device", "several"),
    [
        ({}, "cpu", False),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, "gpu", True),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, "gpu", False),
        (STEP | {"SLURM_NTASKS": "4"}, "gpu", False),  # in a batch script, outside of srun
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, "gpu", False),  # a shell on a node
        (MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", True),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "cpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu", True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, "tpu", False),
        ({"TPU_PROCESS_ADDRESSES": "a", "TPU_WORKER_HOSTNAMES": "a,b"}, "tpu", False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu", True),
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu", False),
    ],
)
def test_the_environment_says_whether_there_are_several_processes(monkeypatch, environment, device, several):
    monkeypatch.setattr(hosts, "_tpu_workers", lambda: "a,b")
    assert hosts.in_cluster(device, environment) == several


@pytest.mark.parametrize(("workers", "several"), [("a,b", True), ("a", False), ("", False)])
def test_a_tpu_vm_is_asked_for_its_workers(monkeypatch, workers, several):
    monkeypatch.setattr(hosts, "_tpu_workers", lambda: workers)
    assert hosts.in_cluster("tpu", {}) == several


def test_where_no_metadata_answer_there_are_no_other_workers(monkeypatch):
    monkeypatch.setattr(hosts, "TPU_METADATA", f"http://127.0.0.1:{free_port()}/")
    assert hosts._tpu_workers() == ""


def test_where_jax_does_not_find_what_the_environment_promises_the_flags_are_named(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts, "in_cluster", lambda *_: True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        InputError, match=r"cannot join .* \('coordinator_address should be defined.'\): .* give --coord"
    ):
        hosts.join(None, None, None, "gpu")


def test_devices_of_processes_that_have_not_joined_are_refused(monkeypatch):
    hosts.check_devices()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"devices are those of 2 process\(es\), and 1 have joined: start the program"):
        hosts.check_devices()


# --- What they tell each other ---


class Store(dict):
    """A key-value store that all processes of a test share; a barrier is one of threads."""

    def __init__(self, num_processes):
        self.barrier, self.changed = threading.Barrier(num_processes), threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self[key] = value
            self.changed.notify_all()

    key_value_set_bytes = key_value_set

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self, min(milliseconds / 1000, 5)):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self[key]

    blocking_key_value_get_bytes = blocking_key_value_get

    def wait_at_barrier(self, name, milliseconds):
        self.barrier.wait(min(milliseconds / 1000, 5))

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in reversed(self.items()) if key.startswith(prefix)]


class Jobs(threading.local):
    """A `hosts._job` for each thread."""

    job = None

    def __getattr__(self, name):
        return getattr(self.job, name)

    def __setattr__(self, name, value):
        if name == "job":
            super().__setattr__(name, value)
        else:
            setattr(self.job, name, value)


@pytest.fixture
def together(monkeypatch):
    """f(program, N): what program(process_id) returns in each of N processes, or the error that it raises."""

    def run(program, num_processes=3):
        jobs, store, results = Jobs(), Store(num_processes), [None] * num_processes
        monkeypatch.setattr(hosts, "_job", jobs)

        def go(i):
            jobs.job = hosts._Job(i, num_processes, store)
            try:
                results[i] = program(i)
            except InputError as error:
                results[i] = error

        threads = [threading.Thread(target=go, args=(i,)) for i in range(num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


def test_a_process_alone_hears_itself():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert (hosts.from_first("x"), hosts.least(None), hosts.most(3)) == ("x", None, 3)
    assert hosts.slowest({"a": [1.0, 2.0]}) == {"a": [1.0, 2.0]}
    assert (hosts.is_first(), hosts.num_processes()) == (True, 1)
    hosts.agree({"a": 1}, "never said")


def test_every_process_hears_all_in_their_order(together):
    assert together(lambda i: [hosts.gather(i), hosts.gather([i] * i)]) == [[[0, 1, 2], [[], [1], [2, 2]]]] * 3


def test_process_0s_value_is_everyones(together):
    assert together(lambda i: hosts.from_first((i, np.float32(i)) if i == 0 else None)) == [(0, 0.0)] * 3


def test_a_time_is_that_of_the_slowest_process(together):
    samples = [{"dense": [1.0, 5.0], "sparse": [2.0]}, {"dense": [3.0, 4.0], "sparse": [0.5]}]
    assert together(lambda i: hosts.slowest(samples[i]), 2) == [{"dense": [3.0, 5.0], "sparse": [2.0]}] * 2


def test_memory_is_that_of_the_process_with_the_least_or_the_most(together):
    values = [7, None, 5]
    assert together(lambda i: (hosts.least(values[i]), hosts.most(values[i]))) == [(5, 7)] * 3


def test_processes_that_disagree_all_say_on_what(together):
    def program(i):
        hosts.agree({"seq_len": 30, "text": ["a", "bc"[i // 2]]}, "give all the same")

    found = together(program)
    assert [str(error) for error in found] == [
        "process 2 has text ['a', 'c'], and process 0 has ['a', 'b']: give all the same"
    ] * 3


def test_process_0_goes_first_and_the_others_after_it_has_ended(together):
    order = []

    def program(i):
        hosts.in_turn(lambda: (time.sleep(0.05 * (i == 0)), order.append(i)))

    together(program)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_process_0_alone_prints(together, capsys):
    def program(i):
        with hosts.first_alone_prints():
            print("from", i)

    for i in range(2):  # the standard streams are shared by threads
        together(lambda _, i=i: (setattr(hosts._job, "process_id", i), program(i)), 1)
    assert capsys.readouterr().out == "from 0\n"


# --- How they end ---


@pytest.fixture
def exits(monkeypatch):
    """The exit codes of the processes that ended; a thread that ends so goes no further."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.2)
    return codes


def ended(process_id, store):
    """Waits as process `process_id`; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        hosts._watch(hosts._Job(process_id, 2, store))
    return end.value.code


def test_a_process_that_ends_says_so_once_and_all_end_with_its_code(exits, capfd):
    store = Store(2)
    store.key_value_set("ended", json.dumps({"process": 1, "text": "no such\nfile", "code": 2}))
    assert (ended(1, store), ended(0, store)) == (2, 2)
    assert capfd.readouterr().err == "error: process 1: no such file\n"


def test_process_0s_own_sentence_is_as_if_it_were_alone(exits, capfd):
    store = Store(2)
    store.key_value_set("ended", json.dumps({"process": 0, "text": "no such file", "code": 2}))
    assert ended(0, store) == 2
    assert capfd.readouterr().err == "error: no such file\n"


def test_process_0_stays_until_the_others_have_heard(exits, monkeypatch):
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 5)
    store = Store(2)
    store.key_value_set("ended", json.dumps({"process": 0, "text": "no such file", "code": 2}))
    first = threading.Thread(target=hosts._watch, args=(hosts._Job(0, 2, store),))
    first.start()
    time.sleep(0.5)
    assert exits == []
    store.key_value_set("heard/1", "")
    first.join()
    assert exits == [2]


def test_where_process_0_is_gone_the_others_say_so(exits, capfd):
    store = Store(2)
    store.blocking_key_value_get = lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("UNAVAILABLE"))
    assert ended(1, store) == 1
    assert capfd.readouterr().err == "error: process 1: process 0 ended without a reason that could be heard\n"


@pytest.mark.parametrize(
    ("error", "said", "traceback"),
    [
        (InputError("a\nb"), {"process": 1, "text": "a\nb", "code": 2}, False),
        (hosts._DisagreementError("a"), {"process": 0, "text": "a", "code": 2}, False),
        (KeyboardInterrupt(), {"process": 1, "text": "interrupted", "code": 2}, False),
        (ZeroDivisionError("a\nb"), {"process": 1, "text": "ZeroDivisionError: a", "code": 1}, True),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo failed\nb"),
            {
                "process": 1,
                "text": "another process has ended or cannot be reached: UNKNOWN: Gloo failed",
                "code": 1,
            },
            False,
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a"),
            {"process": 1, "text": "JaxRuntimeError: RESOURCE_EXHAUSTED: a", "code": 1},
            False,
        ),
    ],
)
def test_whatever_ends_a_process_is_told_to_all(exits, monkeypatch, capfd, error, said, traceback):
    store = Store(2)
    monkeypatch.setattr(hosts, "_job", hosts._Job(1, 2, store))
    with pytest.raises(SystemExit), hosts.ending_together():
        raise error
    assert json.loads(store["ended"]) == said
    assert exits == [said["code"]]
    assert ("Traceback" in capfd.readouterr().err) == traceback


def test_alone_an_error_is_as_it_was(capsys):
    with pytest.raises(ZeroDivisionError), hosts.ending_together():
        raise ZeroDivisionError
    with pytest.raises(SystemExit, match="2"), hosts.ending_together():
        raise InputError("a sentence")
    assert capsys.readouterr().err == "error: a sentence\n"


def test_a_join_that_takes_too_long_ends_with_a_sentence(exits, capfd):
    with hosts._ending_after(0.05, "nobody came"):
        time.sleep(0.3)
    assert exits == [2]
    assert "error: nobody came within 0 s\n" in capfd.readouterr().err


# --- Arrays ---


def test_in_one_process_arrays_are_fetched_as_they_are():
    mesh = make_mesh(jax.devices("cpu")[:2])
    x = place(np.arange(6.0).reshape(2, 3), mesh)
    assert whole(x, mesh) is x
    tree = fetch({"a": x, "b": np.ones(2)})
    assert isinstance(tree["a"], np.ndarray)
    np.testing.assert_array_equal(tree["a"], x)
    assert isinstance(on_host_or_shared(x), np.ndarray)


# --- Real processes ---


class Ended(NamedTuple):
    """One process."""

    code: int
    output: str
    errors: str
    seconds: float  # after the start of all

    @property
    def sentences(self):
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def root(folders, tmp_path_factory):
    """Folders host0 to host3 with the same weights and text each, and `other` with other weights."""
    root = tmp_path_factory.mktemp("hosts")
    for name in ("host0", "host1", "host2", "host3", "other", "alone"):
        (root / name).mkdir()
        (root / name / "weights").symlink_to(folders / (OTHER if name == "other" else NAME))
        (root / name / "text.txt").write_text(repeating_text(200, 41))
    return root


def start(root, places, flags=RUN, more=None, own_flags=None, timeout=120):
    """Runs a process in each of the folders `places`.

    `more` goes to one by its number, as `host_process` takes it; so do `own_flags`.
    """
    address, begun, running = f"127.0.0.1:{free_port()}", time.monotonic(), []
    for i, place_ in enumerate(places):
        own = (own_flags or {}).get(i, [])
        job = ["--coordinator", address, "--num_processes", str(len(places)), "--process_id", str(i)]
        asked = {"flags": [*flags, *job, *own], "tiles": f"tiles{i}.json"} | (more or {}).get(i, {})
        running.append(
            subprocess.Popen(
                [sys.executable, CHILD, json.dumps(asked)],
                cwd=root / place_,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        )
    try:
        return _wait_for(running, begun, timeout)
    finally:
        for process in running:
            process.kill()


def _wait_for(running, begun, timeout):
    ended = [None] * len(running)

    def wait(i):
        output, errors = running[i].communicate(timeout=timeout)
        ended[i] = Ended(running[i].returncode, output, errors, time.monotonic() - begun)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(running))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in ended, "a process did not end"
    return ended


@functools.cache
def alone(root, flags=tuple(RUN)):
    """(report, tiles, schedule, output) of one process with one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "alone")
        patch.setattr(benchmark, "configure_device", lambda device: configure_device(device)[:1])
        assert benchmark.main(list(flags)) == 0
        tiles = {str(layer): np.asarray(tiles).tolist() for layer, tiles in KASCADE_CACHE.items()}
        return json.loads(Path("out.json").read_text()), tiles, Path("schedule.json").read_text()


NOT_EQUAL = ("_ms", "ms_per_token", "seconds", "compile_s", "bytes", "bandwidth", "speedup", "break_even")  # measured
NOT_EQUAL += ("config.coordinator", "config.num_processes", "config.process_id", "command", "date", "device.count")
NOT_EQUAL += ("device.mesh", "config.mesh")


def differences(a, b, where=""):
    """Paths at which two reports differ by more than 1e-5 of the value."""
    if any(part in where for part in NOT_EQUAL):
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), f"{where}.{k}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where}.{i}")]
    numbers = isinstance(a, float) and isinstance(b, float)
    return [] if a == b or (numbers and abs(a - b) <= 1e-5 * max(1, abs(a))) else [where]


def check_same(root, places, ended, flags=RUN):
    """Every process has done the same as one alone, and process 0 alone has said and written it."""
    assert [process.code for process in ended] == [0] * len(places), ended[0].errors
    split = flags.index("--mesh") if "--mesh" in flags else len(flags)
    report, tiles, schedule = alone(root, (*flags[:split], *flags[split + 2 :]))
    assert tiles
    assert any(row["mode"] == "REUSE" for row in report["schedule"])
    assert differences(report, json.loads((root / places[0] / "out.json").read_text())) == []
    assert (root / places[0] / "schedule.json").read_text() == schedule
    for i, name in enumerate(places):
        assert json.loads((root / name / f"tiles{i}.json").read_text()) == tiles
        if i:
            assert (ended[i].output, ended[i].errors) == ("", "")
            assert not [path.name for path in (root / name).iterdir() if "out" in path.name or "schedule" in path.name]
    assert re.search(f"✓ JAX using [0-9]+ CPU device.s. of {len(places)} processes", ended[0].output)
    assert "Gloo" not in ended[0].output


def test_two_processes_do_what_one_does(root):
    """And their arrays go where `attention.sharding` says: host_process.py checks that on the way."""
    places = ("host0", "host1")
    check_same(root, places, start(root, places, more={i: {"arrays": True, "cores": 2} for i in range(2)}))


def test_processes_with_other_weights_end_with_one_sentence(root):
    first, second = start(root, ("host2", "other"))
    assert (first.code, second.code) == (2, 2)
    assert len(first.sentences) == 1
    assert first.sentences[0].startswith("error: process 1 has weights '")
    assert first.sentences[0].endswith(": give every process the same files")
    assert (second.output, second.errors) == ("", "")


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, [*LOW, *SAVING, *STEPS, "--mesh", "context=2"]),
        (2, [*LOW, *SAVING, *STEPS, "--mesh", "model=2"]),
        (2, [*LOW, *SAVING, *STEPS, "--mesh", "data=2", "--batch", "3", "--windows", "3", "--seq_len", "20"]),
        (4, [*LOW, *SAVING, *STEPS, "--mesh", "data=2,model=2", "--batch", "2", "--windows", "2"]),
        (2, SEARCH),
        (2, LIMIT),
    ],
    ids=["context", "model", "data", "four", "search", "limit"],
)
def test_more_processes_and_flags_do_what_one_does(root, count, flags):
    places = [f"host{i}" for i in range(count)]
    for name in places:
        for path in (root / name).glob("*.json"):
            path.unlink()
    check_same(root, places, start(root, places, flags), flags)


REASONS = ("error: ", "stopped sending heartbeats", "Failed to send RPC to coordination service")  # the last are JAX's


@pytest.mark.full
@pytest.mark.parametrize(
    ("victim", "moment"),
    [(1, "join"), (1, "load_weights"), (0, "compile"), (2, "compare"), (1, "decode"), (0, "write")],
)
def test_a_process_that_is_killed_ends_the_others(root, victim, moment):
    """Here JAX's heartbeats are quicker than in a run, 10 s for 30. No file is left half written."""
    places = ("host0", "host1", "host2")
    before = root / places[0] / "out.json"
    before.write_text("as it was")
    more = {i: {"seconds": (15, 10, 2)} | ({"dies_in": moment} if i == victim else {}) for i in range(3)}
    ended = start(root, places, [*LOW, *STEPS], more)
    assert ended[victim].code == -9
    survivors = [process for i, process in enumerate(ended) if i != victim]
    assert all(process.code not in (0, None) for process in survivors)
    assert all(process.seconds - ended[victim].seconds < 60 for process in survivors)
    assert any(reason in process.errors for reason in REASONS for process in survivors)
    assert not any("Traceback" in process.errors for process in survivors)
    assert before.read_text() == "as it was"


@pytest.mark.full
def test_a_mistake_in_one_process_ends_all_with_its_sentence(root):
    first, second = start(root, ("host0", "host1"), RUN, more={1: {"fails_in": "find_schedule"}})
    assert (first.code, second.code) == (1, 1)
    assert first.sentences == ["error: process 1: ZeroDivisionError: a mistake in the program"]
    assert "Traceback" in second.errors


@pytest.mark.full
def test_flags_that_differ_end_all_with_one_sentence(root):
    ended = start(root, ("host0", "host1", "host2"), RUN, own_flags={2: ["--top_k", "4"]})
    assert [process.code for process in ended] == [2, 2, 2]
    assert ended[0].sentences == [
        "error: process 2 has top_k 4, and process 0 has 3: give every process the same flags but --process_id"
    ]
    assert (ended[1].errors, ended[2].errors) == ("", "")


@pytest.mark.full
def test_a_file_that_one_process_lacks_ends_all_with_one_sentence(root):
    (root / "host3" / "text.txt").rename(root / "host3" / "away.txt")
    try:
        first, second = start(root, ("host0", "host3"), RUN)
    finally:
        (root / "host3" / "away.txt").rename(root / "host3" / "text.txt")
    assert (first.code, second.code) == (2, 2)
    assert first.sentences == ["error: process 1: text text.txt cannot be read: No such file or directory"]
    assert second.errors == ""


@pytest.mark.full
def test_processes_of_no_job_end_with_code_2_everywhere(root):
    wrong = {1: ["--num_processes", "3", "--process_id", "2"]}
    first, second = start(root, ("host0", "host1"), RUN, own_flags=wrong)
    assert (first.code, second.code) == (2, 2)
    assert first.sentences == [
        "error: process 2 was started with num_processes 3, and process 0 with 2: give all the same"
    ]
    lonely = {0: ["--num_processes", "2", "--process_id", "1"]}
    (only,) = start(root, ("host0",), RUN, {0: {"seconds": (3, 10, 2)}}, lonely)
    assert only.code == 2
    assert "cannot reach coordinator" in only.sentences[0]
    (only,) = start(root, ("host0",), RUN, own_flags={0: ["--process_id", "1"]})
    assert (only.code, only.errors) == (2, "error: process_id must be from 0 to 0, one below num_processes, got 1\n")
