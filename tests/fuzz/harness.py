"""Fuzzes everything that reads what others wrote: a seed is mutated, and must be accepted or refused by one sentence.

    PYTHONPATH=.:tests python tests/fuzz/harness.py COUNT SEED KIND...

prints a JSON line for each kind: how many cases were accepted and refused, the slowest, the peak of memory, and what
escaped. It is a process of its own, so that a crash is seen as one, and it is run by test_fuzz.py.
"""

import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import synthetic

import weights.tokenizers
from convert_weights import convert
from errors import InputError
from measure.memory import read_peak_memory
from weights.config import chunk_shapes, layer_chunk
from weights.folder import _read_chunk, read_manifest, sha256_of
from weights.sources import open_checkpoint
from weights.tensors import check_names, read_arrays
from weights.tokenizers import from_hugging_face, from_meta, load_tokenizer

SLOWEST = 10  # seconds that a case may take
MEMORY = 2 << 30  # bytes that the process may have
LONGEST = 2500  # characters of a refusal
CONFIG = synthetic.HF_CONFIGS["gqa_default_tied"]
CANARY = "canary"
FIRST_WORDS = "the survey counted birds in the square and they were many more than we thought it would be "

# --- Mutations ---

DEEP = 3000
HOSTILE = (  # JSON texts that stand in place of a value
    *("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400),
    *("1" * 5000, "2147483647", "2147483648", "18446744073709551616", '""', '"7"', '"abc"', '"../x"', '"/etc/passwd"'),
    *('"\\ud800"', '"\\u0000"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", '{"a": 1}', "[1, 2, 3]", '["a"]', "[null]"),
    *('{"content": 3}', "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" + "0," * 50_000 + "0]", "1e-400"),
)  # fmt: skip


class Raw:
    """A JSON text that stands for a value."""

    def __init__(self, text):
        self.text = text


def dump(value):
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def mutate_json(rng, data):
    """One to three values, keys or items of a JSON file changed; now and then bytes instead."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    root = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        where, key = root, 0
        while rng.random() < 0.75 and isinstance(where[key], (dict, list)) and where[key]:
            where = where[key]
            key = rng.choice(list(where)) if isinstance(where, dict) else rng.randrange(len(where))
        change = rng.random()
        if change < 0.7 or where is root:
            where[key] = Raw(rng.choice(HOSTILE))
        elif change < 0.85:
            del where[key]
        elif isinstance(where, dict):
            where[rng.choice(("", "x", "auto_map", str(key) + "2", str(key).upper()))] = where.pop(key)
        else:
            where.insert(key, where[rng.randrange(len(where))])
    return dump(root[0]).encode("utf-8", "surrogatepass")


NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**15)


def mutate_bytes(rng, data, header=None):
    """One to four places changed; `header` is how many bytes of the beginning most of them are in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = min(header, len(data)) if header and rng.random() < 0.9 else len(data)
        at = rng.randrange(end) if end else 0
        kind = rng.randrange(8)
        if kind < 2 and data:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 4, 8, 100))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 100)))
        elif kind == 4:
            layout = rng.choice("IQ")
            data[at : at + struct.calcsize(layout)] = struct.pack(
                f"<{layout}", rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(layout))
            )
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            other = rng.randrange(end) if end else 0
            data[at : at + 16] = data[other : other + 16]
        else:
            data[at:at] = data[at : at + rng.choice((8, 64, 1000))]
    return bytes(data)


# --- Kinds: each is built once, and tries one case ---


class Folder:
    """Files of a seed, of which one is mutated in each case, and what reads them."""

    def __init__(self, seed, mutations, read, named=None):
        self.seed, self.mutations, self.read, self.named = seed, mutations, read, named
        self.originals = {name: (seed / name).read_bytes() for name in mutations}
        read()  # the seed itself is accepted

    def __call__(self, rng):
        name = rng.choice(list(self.mutations))
        path = self.seed / name
        path.write_bytes(self.mutations[name](rng, self.originals[name]))
        try:
            self.read()
        except InputError as error:
            check_sentence(error, self.named or (path.name, self.seed.name))
            return False
        finally:
            path.write_bytes(self.originals[name])
        return True


class UnclearError(Exception):
    """A refusal that is no sentence with the file in it."""


def check_sentence(error, names):
    text = str(error)
    if not text.strip() or len(text) > LONGEST or not any(name in text for name in names):
        raise UnclearError(f"{len(text)} characters: {text[:500]!r}") from error


def convert_all(path):
    checkpoint = open_checkpoint(path)
    check_names(checkpoint)
    layers = {layer_chunk(i): i for i in range(checkpoint.config.num_hidden_layers)}
    for name, shapes in chunk_shapes(checkpoint.config).items():
        try:
            read_arrays(checkpoint, shapes, layers.get(name), synthetic.np.dtype("float32"))
        except InputError as error:  # which names the tensor
            raise InputError(f"{path}: {error}") from error


def hf_folder(root):
    return synthetic.write_hf(root / "hf", CONFIG, shards=2)


def config(root):
    folder = hf_folder(root)
    return Folder(folder, {"config.json": mutate_json}, lambda: convert_all(folder))


def index(root):
    folder = hf_folder(root)
    return Folder(folder, {"model.safetensors.index.json": mutate_json}, lambda: convert_all(folder))


def mutate_safetensors(rng, data):
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, header=rng.choice((8 + size, None)))
    header = mutate_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def safetensors(root):
    folder = hf_folder(root)
    names = ("model-0.safetensors", "model-1.safetensors")
    return Folder(folder, dict.fromkeys(names, mutate_safetensors), lambda: convert_all(folder))


def gguf(root):
    path = synthetic.write_gguf(root / "model.gguf", synthetic.with_gguf_vocabulary(CONFIG))
    size = path.stat().st_size
    fields = {"model.gguf": functools.partial(mutate_bytes, header=min(size, 6000))}
    return Folder(root, fields, lambda: convert_all(path), ("model.gguf",))


def converted(root):
    convert(hf_folder(root), root / "converted")
    return root / "converted"


def manifest(root):
    folder = converted(root)

    def read():
        load_tokenizer(folder, read_manifest(folder).tokenizer)

    return Folder(folder, {"manifest.json": mutate_json}, read)


def chunks(root):
    folder = converted(root)
    whole = read_manifest(folder)
    shapes = chunk_shapes(whole.config)

    def read(name):
        path = folder / name
        _read_chunk(path, {"bytes": path.stat().st_size, "sha256": sha256_of(path)}, shapes[name], whole.dtype)

    kinds = [Folder(folder, {name: mutate_chunk}, functools.partial(read, name)) for name in shapes]
    return lambda rng: rng.choice(kinds)(rng)


def mutate_chunk(rng, data):
    return mutate_bytes(rng, data, header=rng.choice((100, None)))


def tokenizers(root):
    """tokenizer.json and its settings, vocab.json with merges.txt, SentencePiece, ranked tokens."""
    weights.tokenizers.ids_by_transformers = lambda folder: None  # a process of seconds
    fast = hf_folder(root)
    (fast / "special_tokens_map.json").write_text('{"bos_token": "w1", "eos_token": {"content": "w2"}}')
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": {"content": "w1"}}
    (fast / "tokenizer_config.json").write_text(json.dumps(settings))
    slow = root / "slow"
    slow.mkdir()
    letters = synthetic._byte_letters()
    (slow / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*letters, "he"])}))
    (slow / "merges.txt").write_text("#version: 0.2\nh e\n", encoding="utf-8")
    (slow / "added_tokens.json").write_text(json.dumps({"<a>": 257}))
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    meta, piece = synthetic.write_meta(root / "meta", CONFIG), root / "piece"
    piece.mkdir()
    (piece / "tokenizer.model").write_bytes(sentencepiece_model())
    read = functools.partial
    kinds = [
        Folder(fast, dict.fromkeys(("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"), mutate_json),
               read(from_hugging_face, fast, 64)),
        Folder(slow, {"vocab.json": mutate_json, "merges.txt": mutate_bytes, "added_tokens.json": mutate_json,
                      "tokenizer_config.json": mutate_json}, read(from_hugging_face, slow, 300)),
        Folder(meta, {"tokenizer.model": mutate_bytes}, read(from_meta, meta, 600)),
        Folder(piece, {"tokenizer.model": mutate_bytes}, read(from_hugging_face, piece, 600)),
    ]  # fmt: skip
    return lambda rng: rng.choice(kinds)(rng)


def sentencepiece_model():
    """A small unigram-free (BPE) model, written by its field numbers."""

    def field(number, data):
        return bytes([number << 3 | 2, *length(len(data))]) + data

    def length(size):
        return (size,) if size < 128 else (size & 127 | 128, size >> 7)

    def piece(text, score, kind):
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))

    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3)]
    pieces += [piece(f"<0x{byte:02X}>", 0, 6) for byte in range(256)]
    pieces += [piece(text, -i, 1) for i, text in enumerate(("\u2581t", "he", "\u2581", "t", "h", "e"))]
    trainer = field(2, bytes([0x18, 2, 0x98, 0x02, 1]))  # model_type BPE, byte_fallback
    return b"".join(pieces) + trainer


def schedules(root):
    from kascade_core import LayerPlan, Selection
    from measure import schedules as module

    folder = converted(root)
    whole, path = read_manifest(folder), root / "schedule.json"
    saved = {
        "format_version": module.SCHEDULE_VERSION,
        "model": {"name": whole.model, "fingerprint": whole.fingerprint},
        "selection": vars(Selection()),
        "calibration": {"tokens": 16, "windows": 1, "sha256": "0" * 64},
        "layers": [{name: getattr(plan, name) for name in module.LAYER_FIELDS} for plan in (LayerPlan(), LayerPlan("ANCHOR", budgets=(2, 3)))],
    }  # fmt: skip
    path.write_text(json.dumps(saved))
    module.load_schedule(path, whole)
    return Folder(root, {path.name: mutate_json}, lambda: module.load_schedule(path, whole))


def reports(root):
    """Files of results, to which bench appends."""
    from report.tables import ResultsFile

    path = root / "results.csv"
    file = ResultsFile(path, ("name", "value"))
    for i in range(5):
        file.add({"name": f"a,{i}", "value": i})
    return Folder(
        root, {path.name: mutate_bytes}, lambda: ResultsFile(path, ("name", "value")).has(name="a,1", value=1)
    )


def texts(root):
    from measure.texts import read_tokens

    tokenizer = open_checkpoint(synthetic.write_gguf(root / "t.gguf", synthetic.with_gguf_vocabulary(CONFIG))).tokenizer
    path = root / "text.txt"
    path.write_text("The naïve café — 東京 👩‍👩‍👧 " * 3 + FIRST_WORDS + " " * 300 + "-" * 300)
    return Folder(root, {path.name: mutate_bytes}, lambda: read_tokens(tokenizer, path, 50))


WORDS = (
    *("", "0", "1", "-1", "2", "3", "7", "16", "64", "1e9", "nan", "inf", "-inf", "x", "0.5", "1.5", "9" * 5000, "1" + "0" * 400),
    *("cpu", "dp", "search", "threshold", "mass", "head", "float32", "exact", "pallas_tpu", "~", "~nobody/x", "/dev/null"),
    *("a\nb", "\ud800", "\0", "x" * 5000, "1,2,3", "1,,2", "--", "-", "dense", "٣", "½", "64,128", "512"),
)  # fmt: skip


def flags(root):
    from measure.settings import Settings, make_parser

    names = [action.option_strings[-1] for action in make_parser()._actions if action.dest not in ("help", "debug")]

    def case(rng):
        argv = []
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            argv.append(rng.choice(names) if rng.random() < 0.97 else rng.choice(("--x", "--top", "x", "-")))
            argv += [rng.choice(WORDS)] if rng.random() < 0.9 else []
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                Settings.from_flags(argv)
        except SystemExit as end:
            said = stderr.getvalue()
            if end.code != 2 or not said.startswith("error: ") or said.count("\n") != 1 or len(said) > LONGEST:
                raise UnclearError(f"exit code {end.code}: {said[:500]!r}, {argv}") from end
            return False
        return True

    return case


KINDS = {
    kind.__name__: kind
    for kind in (manifest, chunks, config, index, safetensors, gguf, tokenizers, schedules, reports, texts, flags)
}


# --- The run ---


class Slow(BaseException):
    """Raised by the alarm."""


def ring(*_):
    raise Slow


def run(kind, count, seed):
    """Cases `seed` to `seed + count` of one kind."""
    counts = {"kind": kind, "accepted": 0, "refused": 0, "slowest": 0.0, "escaped": []}
    with tempfile.TemporaryDirectory() as folder:
        case = KINDS[kind](Path(folder))
        for number in range(seed, seed + count):
            rng = random.Random(f"{kind} {number}")
            start = time.monotonic()
            signal.alarm(SLOWEST)
            try:
                counts["accepted" if case(rng) else "refused"] += 1
            except (Exception, Slow) as error:  # noqa: BLE001 - what escapes is what is looked for
                counts["escaped"].append(f"{number}: {type(error).__name__}: {str(error)[:600]}")
            finally:
                signal.alarm(0)
            counts["slowest"] = max(counts["slowest"], round(time.monotonic() - start, 3))
        shutil.rmtree(folder, ignore_errors=True)
    counts["canary"] = Path(CANARY).exists()
    counts["peak"] = read_peak_memory()
    return counts


def main(count, seed, *kinds):
    """Prints a line for each kind."""
    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for kind in kinds or KINDS:
        print(json.dumps(run(kind, int(count), int(seed))), flush=True)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(*sys.argv[1:])
