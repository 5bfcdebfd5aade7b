"""Several processes that run one benchmark, each with the devices of its host: who writes, and how all end together.

JAX's own distributed runtime connects them. Each process runs the whole program on the same arguments; process 0 alone
prints and writes files. What is said between the programs goes through the key-value store that JAX's coordinator
keeps, so that it works before there is a device, and while the others wait in a computation. Without other processes
every function here does nothing, or gives back what it was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax

from errors import InputError, exit_on_bad_input, quote

JOIN_SECONDS = 120  # in which all processes must have started
HEARTBEAT_SECONDS = 30  # after which JAX takes a silent process for dead, and ends the others
GRACE_SECONDS = 5  # in which another process's reason arrives here, or all have heard of this one's
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds: heartbeats and `_watch` end what waits for a process that is gone
T = TypeVar("T")


@dataclasses.dataclass
class _Job:
    """This process's place among the others.

    Attributes:
      store: JAX's client of the coordinator's key-value store.
      rounds: values exchanged so far; the same in every process, and so the name of the next.
      over: everything is done, and a closed connection is no failure.
    """

    process_id: int
    num_processes: int
    store: Any
    rounds: int = 0
    over: bool = False


_job: _Job | None = None


# --- Joining ---


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, device: str) -> None:
    """Connects this process with the others, if there are any; before JAX's first computation.

    Args:
      coordinator: HOST:PORT of process 0, a free port there; None where the environment says who the others are.
      num_processes, process_id: of this process; None like `coordinator`.
      device: "cpu", "tpu" or "gpu".

    Raises:
      InputError: they do not all come, or do not agree on how many they are.
    """
    global _job
    if coordinator is None and not in_cluster(device, os.environ):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and the run would go on
    if device == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _keep_from_stdout()
    given: dict[str, Any] = {}
    if coordinator is not None:
        _meet(coordinator, num_processes, process_id)
        given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        given["cluster_detection_method"] = "deactivate"  # what is given counts, not what a scheduler says
    with _ending_after(JOIN_SECONDS, "the processes of this job have not found each other"):
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * JOIN_SECONDS,  # JAX would end the process without a sentence
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"JAX cannot join the processes of this job ({quote(str(error))}): start the program by srun, mpirun "
                "or on all hosts of a TPU slice, or give --coordinator, --num_processes and --process_id"
            ) from error
    # JAX has no public name for its store; other libraries for JAX reach it so too.
    from jax._src.distributed import global_state

    _job = _Job(global_state.process_id, global_state.num_processes, global_state.client)
    threading.Thread(target=_watch, args=(_job,), daemon=True).start()


SLURM_NAMES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads
TPU_NAMES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
TPU_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def in_cluster(device: str, environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that JAX finds by itself: under srun, mpirun, or on a TPU pod slice.

    JAX is not asked: it answers with an exception where there is one process, and asks a TPU's metadata at length.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # srun's: a batch script and its shells have none of their own
    if all(name in environment for name in SLURM_NAMES) and tasks.isdecimal() and int(tasks) > 1:
        return True
    ranks = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if "OMPI_MCA_orte_hnp_uri" in environment and ranks.isdecimal() and int(ranks) > 1:
        return True
    return device == "tpu" and _is_tpu_slice(environment)


def _is_tpu_slice(environment: Mapping[str, str]) -> bool:
    """Whether a TPU's chips are on several hosts."""
    if environment.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1") or "TPU_PROCESS_ADDRESSES_PATH" in environment:
        return True
    named = next((environment[name] for name in TPU_NAMES if name in environment), None)
    if named is None and "TPU_SKIP_MDS_QUERY" not in environment:
        named = _tpu_workers()
    return "," in (named or "")


def _tpu_workers() -> str:
    """A TPU VM's list of workers, joined by commas; "" where nobody answers."""
    request = urllib.request.Request(TPU_METADATA, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read(2**16).decode("utf-8", "replace")
    except (OSError, urllib.error.URLError):
        return ""


def _keep_from_stdout() -> None:
    """Gloo writes lines to file 1 that nobody needs, and a report may go there: Python's stdout moves to a copy."""
    sys.stdout.flush()
    encoding = sys.stdout.encoding
    try:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace")
    except OSError:  # closed by the shell
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextlib.contextmanager
def _ending_after(seconds: float, what: str) -> Iterator[None]:
    """Ends the process with a sentence where the body, which cannot be interrupted, takes longer."""

    def end() -> None:
        _say(f"{what} within {seconds:.0f} s")
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- The first meeting, before JAX's: it ends a process that does not fit with a stack trace, this with a sentence ---

LONGEST_LINE = 2**14  # bytes


def split_address(address: str) -> tuple[str, int]:
    """HOST and PORT of HOST:PORT, an IPv6 address in brackets.

    Raises:
      InputError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise InputError(
            f"coordinator must be HOST:PORT of process 0 with a port from 1 to 65535, got {quote(address)}"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _meet(coordinator: str, num_processes: int, process_id: int) -> None:
    """All processes come to the coordinator's port, and process 0 sees whether they are one job."""
    host, port = split_address(coordinator)
    deadline = time.monotonic() + JOIN_SECONDS
    if process_id == 0:
        _receive(coordinator, port, num_processes, deadline)
        return
    answer = _introduce(host, port, {"process_id": process_id, "num_processes": num_processes}, deadline)
    if answer != "welcome":
        raise SystemExit(2)  # process 0 says why


def _receive(coordinator: str, port: int, num_processes: int, deadline: float) -> None:
    """Process 0's part: waits for the others, and tells them whether all is well."""
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise InputError(
            f"coordinator {coordinator}: port {port} cannot be opened here ({os.strerror(error.errno)})"
        ) from error
    known: set[int] = {0}
    problem, lines = None, []
    with server:
        while len(known) < num_processes and not problem:
            line, said = _accept(server, deadline)
            if line is None:
                missing = ", ".join(str(i) for i in range(num_processes) if i not in known)
                problem = f"waited {JOIN_SECONDS} s at {coordinator} for process {missing} of {num_processes}"
                break
            lines.append(line)
            problem = _problem_with(said, num_processes, known)
            known.add(said["process_id"])
        for line in lines:
            _answer(line, "refused" if problem else "welcome")
    if problem:
        raise InputError(problem)


def _accept(server: socket.socket, deadline: float) -> tuple[socket.socket | None, dict[str, int]]:
    """The next process and what it says of itself; None after the deadline. Other callers are sent away."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        with contextlib.suppress(TimeoutError):
            line, _ = server.accept()
            with contextlib.suppress(OSError, ValueError, TypeError):
                line.settimeout(GRACE_SECONDS)
                said = json.loads(_read_line(line))
                return line, {name: int(said[name]) for name in ("process_id", "num_processes")}
            line.close()
    return None, {}


def _problem_with(said: Mapping[str, int], num_processes: int, known: Set[int]) -> str | None:
    """Why a process does not fit into the job of process 0."""
    process_id = said["process_id"]
    if said["num_processes"] != num_processes:
        return (
            f"process {process_id} was started with num_processes {said['num_processes']}, and process 0 with "
            f"{num_processes}: give all the same"
        )
    if process_id in known:
        return f"two processes were started with process_id {process_id}: give each of the {num_processes} its own"
    return None


def _answer(line: socket.socket, word: str) -> None:
    with line, contextlib.suppress(OSError):  # it is gone
        line.sendall(f"{word}\n".encode())


def _introduce(host: str, port: int, said: Mapping[str, int], deadline: float) -> str:
    """Another process's part: calls process 0 until it answers, and returns its word."""
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), min(left, GRACE_SECONDS)) as line:
                line.sendall(json.dumps(said).encode() + b"\n")
                line.settimeout(left + GRACE_SECONDS)  # process 0 waits for the others, and says so if they do not come
                word = _read_line(line).strip()
            if word in ("welcome", "refused"):
                return word
            reason = "what answers there is not process 0"
        except OSError as error:  # not started yet, perhaps
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise InputError(
        f"process {said['process_id']} cannot reach coordinator {host}:{port} in {JOIN_SECONDS} s ({reason}): start "
        "process 0 on that host, and open the port to the others"
    )


def _read_line(line: socket.socket) -> str:
    with line.makefile("r", encoding="utf-8", errors="replace") as text:
        return text.readline(LONGEST_LINE)


# --- Who does what ---


def is_first() -> bool:
    """Whether this process prints and writes files."""
    return _job is None or _job.process_id == 0


def num_processes() -> int:
    """How many there are."""
    return _job.num_processes if _job else 1


def check_devices() -> None:
    """Raises InputError where JAX's devices are not those of the processes that have joined."""
    if jax.process_count() != num_processes():
        raise InputError(
            f"JAX's devices are those of {jax.process_count()} process(es), and {num_processes()} have joined: start "
            "the program on every host at once, or give --coordinator, --num_processes and --process_id"
        )


@contextlib.contextmanager
def first_alone_prints() -> Iterator[None]:
    """What the others print goes nowhere; how they fail is said by `ending_together`."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def in_turn(make: Callable[[], None]) -> None:
    """Process 0 first, then the others: for what they find done where the folder is shared, and do where it is not."""
    if is_first():
        make()
    gather(None)
    if not is_first():
        make()


# --- What they tell each other ---


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; JSON. Every process comes here, or all wait."""
    if _job is None:
        return [value]
    _job.rounds += 1
    name = f"gather/{_job.rounds}"
    _job.store.key_value_set(f"{name}/{_job.process_id}", json.dumps(value))
    _job.store.wait_at_barrier(name, FOREVER)
    values = {key.rpartition("/")[2]: json.loads(text) for key, text in _job.store.key_value_dir_get(f"{name}/")}
    return [values[str(i)] for i in range(_job.num_processes)]


def from_first(value: T) -> T:
    """Process 0's value, in every process; what the others give is not looked at."""
    if _job is None:
        return value
    _job.rounds += 1
    name = f"first/{_job.rounds}"
    if is_first():
        _job.store.key_value_set_bytes(name, pickle.dumps(value))
        return value
    return pickle.loads(_job.store.blocking_key_value_get_bytes(name, FOREVER))  # from this program's own process


class _DisagreementError(InputError):
    """An error that every process raises alike."""


def agree(values: Mapping[str, Any], advice: str) -> None:
    """Checks that all processes have the same values, which JSON can hold.

    Raises:
      InputError: in every process, the first name whose values differ, with `advice`.
    """
    for i, theirs in enumerate(gather(dict(values))):
        if i == 0:
            expected = theirs
        for name, value in expected.items():
            if theirs[name] != value:
                raise _DisagreementError(
                    f"process {i} has {name} {quote(theirs[name])}, and process 0 has {quote(value)}: {advice}"
                )


def slowest(samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Of each sample the longest time that a process took."""
    told = gather({name: list(values) for name, values in samples.items()})
    return {name: [max(values) for values in zip(*(times[name] for times in told), strict=True)] for name in samples}


def least(value: int | None) -> int | None:
    """The least of all processes' values that are known."""
    return min((known for known in gather(value) if known is not None), default=None)


def most(value: int | None) -> int | None:
    """The largest of all processes' values that are known."""
    return max((known for known in gather(value) if known is not None), default=None)


ROOT = Path(__file__).parents[1]


def program_hash() -> str:
    """Hex SHA-256 of this program's files."""
    digest = hashlib.sha256()
    packages = ("attention", "measure", "network", "report", "weights")
    for path in sorted([*ROOT.glob("*.py"), *(path for name in packages for path in (ROOT / name).glob("*.py"))]):
        digest.update(f"{path.relative_to(ROOT).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# --- How they end ---


@contextlib.contextmanager
def ending_together(debug: bool = False) -> Iterator[None]:
    """Whatever ends this process before its time ends all, with one sentence on process 0 and the same exit code.

    That code is 2 for an InputError, as for a process alone, and 1 for anything else.
    """
    with exit_on_bad_input(debug):
        with _Sharing(debug):
            yield
        if _job:
            gather(None)  # nobody closes its connection while another still writes a report
            _job.over = True
            jax.distributed.shutdown()


class _Sharing:
    """Tells the other processes of any exception; a process alone has it as it was."""

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is None or _job is None:
            return
        if self.debug or not isinstance(error, (InputError, KeyboardInterrupt, jax.errors.JaxRuntimeError)):
            traceback.print_exception(error, file=sys.__stderr__)
        if isinstance(error, InputError):
            _end(str(error), 2, _job.process_id * (not isinstance(error, _DisagreementError)))
        if isinstance(error, KeyboardInterrupt):
            _end("interrupted", 2, _job.process_id)
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE_SECONDS)  # if it is another process's end that broke this one's work, `_watch` hears why
        line = next(iter(str(error).splitlines()), "")
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "gloo" in line.lower()
        what = "another process has ended or cannot be reached" if lost else kind.__name__
        _end(f"{what}: {line}", 1, _job.process_id)


def _end(text: str, code: int, process: int) -> NoReturn:
    """Tells all processes why `process` ends; `_watch` then ends this one as well."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was quicker, or the coordinator is gone
        _job.store.key_value_set("ended", json.dumps({"process": process, "text": text, "code": code}))
    time.sleep(2 * GRACE_SECONDS)
    _say(f"process {process}: {text}")  # nobody heard of it
    os._exit(code)  # an orderly exit would wait for the others


def _watch(job: _Job) -> None:
    """Waits for a process to say that it ends, and ends this one too, whatever it computes."""
    try:
        ended = json.loads(job.store.blocking_key_value_get("ended", FOREVER))
    except jax.errors.JaxRuntimeError:
        if not job.over:
            _say(f"process {job.process_id}: process 0 ended without a reason that could be heard")
            os._exit(1)
        return
    if job.process_id:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            job.store.key_value_set(f"heard/{job.process_id}", "")
    else:
        _say((f"process {ended['process']}: " if ended["process"] else "") + ended["text"])
        _wait_until_heard(job)
    os._exit(ended["code"])


def _wait_until_heard(job: _Job) -> None:
    """The coordinator is in process 0: it lives until the others know, or are dead themselves."""
    deadline = time.monotonic() + GRACE_SECONDS
    for i in range(1, job.num_processes):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            left = max(deadline - time.monotonic(), 0.001)
            job.store.blocking_key_value_get(f"heard/{i}", int(left * 1000) + 1)
    time.sleep(0.2)  # in which they exit


def _say(text: str) -> None:
    """One sentence on file 2, whatever sys.stderr is."""
    with contextlib.suppress(OSError, ValueError):  # closed
        sys.stdout.flush()
        os.write(2, f"error: {' '.join(text.split())}\n".encode())
