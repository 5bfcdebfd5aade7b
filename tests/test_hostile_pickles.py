"""Chunks made to do harm are refused: each is read in a child process, where a crash, a hang or code that runs shows."""

import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from errors import InputError
from weights.plain_pickle import unpickle

CANARY = "canary"  # a file that every pickle which runs code makes, in the child's working folder
SHAPES = {"a": {"w": (2, 3)}, "n": (3,)}
GOOD = {"a": {"w": ("float32", (2, 3), bytes(24))}, "n": ("float32", (3,), bytes(12))}

CHILD = """
import json, pathlib, resource, sys, time
from errors import InputError
from weights import folder
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
shapes = {"a": {"w": (2, 3)}, "n": (3,)}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pkl")):
    print(path.stem, end=" ", flush=True)  # a crash shows which one it was
    start, entry = time.monotonic(), {"bytes": path.stat().st_size, "sha256": folder.sha256_of(path)}
    try:
        folder._read_chunk(path, entry, shapes, "float32")
        print("ACCEPTED", end=" ")
    except InputError as error:
        print(json.dumps(str(error)), end=" ")
    print(round(time.monotonic() - start, 3), flush=True)
"""


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def dtype(code):
    return name("numpy", "dtype") + text(code) + b"\x89\x88\x87R"


def framed(body):
    return b"\x80\x05" + body + b"."


def nested_tuples(depth):
    """As a dictionary's key: its hash takes 2 ** depth steps."""
    return framed(b"})" + b"2\x86" * depth + b"K\x00s")


def nested_tuples_of_memo(depth):
    """The same without DUP, by instructions that a chunk may use."""
    return framed(b"})\x94" + b"".join(b"h%c\x86\x94" % min(i, 255) for i in range(depth)) + b"K\x00s")


def touch():
    return name("os", "system") + b"(" + text(f"touch {CANARY}") + b"tR"


class Reduce:
    def __reduce__(self):
        return Path.touch, (Path(CANARY),)


class Iterators:
    """Items of a list and of a dict that come by code."""

    def __reduce__(self):
        return dict, (), None, None, iter([("a", Reduce())])


STACK_GLOBAL = text("os") + text("system") + b"\x93" + text(f"touch {CANARY}") + b"\x85R"
OBJECT_ARRAY = name("numpy", "ndarray") + b"(K\x01\x85" + dtype("O8") + b"\x96" + struct.pack("<Q", 8) + b"AAAAAAA\0tR"
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)

HOSTILE = {  # each with the instruction or the fault that its sentence names
    # numpy's own classes, which corrupt memory
    "object_array_set_item": (framed(OBJECT_ARRAY + b"K\0Ns"), "GLOBAL at byte 2"),
    "object_array_alone": (framed(OBJECT_ARRAY), "GLOBAL"),
    "ndarray_build": (framed(name("numpy", "ndarray") + b"(K\x01\x85tR(K\x01K\x01\x85" + dtype("O8") + b"\x89]tb"), "GLOBAL"),
    "dtype_build": (framed(dtype("f4") + b"(K\x03N(tN(tNK\xffJ\xff\xff\xff\xffK\xfftb"), "GLOBAL"),
    "dtype_set_state": (framed(name("numpy", "dtype.__setstate__") + dtype("f4") + b"NN\x87R"), "GLOBAL"),
    "bfloat16_build": (framed(name("ml_dtypes", "bfloat16") + b"}b"), "GLOBAL"),
    "reconstruct": (framed(name("numpy._core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\0\x85C\1b\x87R"), "GLOBAL"),
    **{f"numpy_array_protocol_{i}": (pickle.dumps({"n": ARRAY}, i), ".* at byte") for i in range(6)},
    "numpy_scalar": (pickle.dumps({"n": np.float32(1)}), "STACK_GLOBAL"),
    "numpy_dtype": (pickle.dumps(np.dtype("f4")), "STACK_GLOBAL"),
    # code
    **{f"reduce_protocol_{i}": (pickle.dumps(Reduce(), i), "GLOBAL|REDUCE|.* at byte") for i in range(6)},
    "iterators": (pickle.dumps(Iterators(), 5), "STACK_GLOBAL"),
    "global": (framed(touch()), "GLOBAL"),
    "stack_global": (framed(STACK_GLOBAL), "STACK_GLOBAL"),
    "stack_global_in_memo": (framed(text("os") + b"\x94" + text("system") + b"\x94h\0h\1\x93"), "STACK_GLOBAL"),
    "instance": (b"(ios\nsystem\n.", "INST"),
    "object": (framed(b"(" + name("os", "system") + text("true") + b"o"), "GLOBAL"),
    "new_object": (framed(name("builtins", "object") + b")\x81"), "GLOBAL"),
    "new_object_by_keywords": (framed(b"})}\x92"), "NEWOBJ_EX"),
    "build_on_a_dict": (framed(b"}}" + text("__class__") + b"K\0sb"), "BUILD"),
    "reduce_on_a_dict": (framed(b"})R"), "REDUCE"),
    "extension_registry_1": (framed(b"\x82\x01"), "EXT1"),
    "extension_registry_2": (framed(b"\x83\x01\x01"), "EXT2"),
    "extension_registry_4": (framed(b"\x84\x01\0\0\0"), "EXT4"),
    "persistent_id": (b"P0\n.", "PERSID"),
    "binary_persistent_id": (framed(b"K\0Q"), "BINPERSID"),
    "out_of_band_buffer": (framed(b"\x97"), "NEXT_BUFFER"),
    "read_only_buffer": (framed(b"\x97\x98"), "NEXT_BUFFER"),
    # time and memory
    "hash_of_nested_tuples": (nested_tuples(60), "DUP"),
    "hash_of_nested_tuples_in_the_memo": (nested_tuples_of_memo(60), "damaged: expected tuples"),
    "deep_tuples": (framed(b")" + b"\x85" * 100_000), "more than 1000 instructions|expected tuples"),
    "deep_lists": (framed(b"]" * 100_000 + b"a" * 99_999), "EMPTY_LIST"),
    "deep_dicts": (framed(b"}" + (text("k") + b"}") * 300 + b"s" * 300), "expected the keys"),
    "dict_in_itself": (framed(b"}\x94" + text("a") + b"h\0s"), "expected the keys"),
    "dict_of_dicts_twice": (framed(b"}\x94" + b"".join(b"}\x94" + text("a") + b"h%c" % i + b"s" + text("n") + b"h%c" % i + b"s" for i in range(90))), "damaged|ends with"),
    "memo_bomb": (framed(b"}r" + struct.pack("<I", 2**31 - 1)), "LONG_BINPUT"),
    "memo_of_text": (b"}p99999999999999\n.", "PUT"),
    "many_marks": (framed(b"(" * 10**6), "more than 1000 instructions"),
    "many_instructions": (framed(b"}" + (text("a") + b"K\0s") * 10**5), "more than 1000 instructions"),
    "huge_frame": (b"\x80\x05\x95" + struct.pack("<Q", 10**15) + b"}.", "1000000000000000 bytes announced"),
    "largest_frame": (b"\x80\x05\x95" + b"\xff" * 8 + b"}.", "bytes announced"),
    "huge_bytes": (framed(b"\x8e" + struct.pack("<Q", 10**15)), "1000000000000000 bytes announced"),
    "large_bytes": (framed(b"B" + struct.pack("<I", 2**32 - 1)), "4294967295 bytes announced"),
    "huge_text": (framed(b"\x8d" + struct.pack("<Q", 10**15)), "BINUNICODE8"),
    "huge_byte_array": (framed(b"\x96" + struct.pack("<Q", 10**15)), "BYTEARRAY8"),
    "huge_int": (framed(b"\x8b" + struct.pack("<I", 2**31 - 1)), "LONG4"),
    "huge_int_as_text": (b"I" + b"9" * 10**6 + b"\n.", "INT"),
    "float": (framed(b"G" + bytes(8)), "BINFLOAT"),
    "set": (pickle.dumps({1, 2}), "EMPTY_SET"),
    "python_2_text": (pickle.dumps({b"a": "b"}, 0), "refused"),
    # damaged
    "empty": (b"", "ends too early"),
    "no_pickle": (b"no pickle at all", "refused"),
    "cut": (pickle.dumps(GOOD, 5)[:-9], "damaged"),
    "without_stop": (framed(b"}")[:-1], "ends too early"),
    "two_pickles": (pickle.dumps(GOOD, 5) * 2, "bytes after the end"),
    "nothing": (framed(b""), "ends with 0 objects"),
    "stack_runs_out": (framed(b"\x87"), "damaged"),
    "mark_is_missing": (framed(b"}u"), "damaged"),
    "mark_as_a_value": (framed(b"}" + text("a") + b"(s"), "damaged"),
    "mark_as_the_result": (framed(b"("), "expected the keys"),
    "memo_runs_out": (framed(b"h\7"), "damaged"),
    "bytes_as_a_key": (framed(b"}C\1aK\0s"), "text as its keys"),
    "text_that_is_no_utf8": (framed(b"X\1\0\0\0\xff"), "damaged"),
    # plain data that is no chunk
    "text": (pickle.dumps("a", 5), "expected the keys"),
    "other_keys": (pickle.dumps(GOOD | {"b": GOOD["n"]}, 5), "expected the keys"),
    "a_number": (pickle.dumps(GOOD | {"n": 3}, 5), r"n: expected \(dtype name, shape, bytes\)"),
    "a_dict_for_an_array": (pickle.dumps(GOOD | {"n": {}}, 5), "n: expected .dtype name"),
    "an_array_for_a_dict": (pickle.dumps(GOOD | {"a": GOOD["n"]}, 5), "a/expected the keys"),
    "object_dtype": (pickle.dumps(GOOD | {"n": ("O", (3,), bytes(12))}, 5), "n: expected float32 .* got 'O'"),
    "object_dtype_by_code": (pickle.dumps(GOOD | {"n": ("|O8", (3,), bytes(24))}, 5), "n: expected float32"),
    "other_dtype": (pickle.dumps(GOOD | {"n": ("float16", (3,), bytes(6))}, 5), "n: expected float32"),
    "other_shape": (pickle.dumps(GOOD | {"n": ("float32", (4,), bytes(16))}, 5), "n: expected float32"),
    "negative_shape": (pickle.dumps(GOOD | {"n": ("float32", (-3,), bytes(12))}, 5), "n: expected float32"),
    "more_bytes": (pickle.dumps(GOOD | {"n": ("float32", (3,), bytes(16))}, 5), "of 12 bytes, got .* of 16 bytes"),
    "text_for_bytes": (pickle.dumps(GOOD | {"n": ("float32", (3,), "x" * 12)}, 5), "n: expected .dtype name"),
    "nan": (pickle.dumps(GOOD | {"n": ("float32", (3,), b"\xff" * 12)}, 5), "n has NaN or infinite values"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the child says of each: {name: (its sentence, seconds)}; and whether anything was executed."""
    folder = tmp_path_factory.mktemp("hostile")
    for key, (data, _) in HOSTILE.items():
        (folder / f"{key}.pkl").write_bytes(data)
    (folder / "zzz_good.pkl").write_bytes(pickle.dumps(GOOD, 5))
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folder], cwd=folder, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, f"crashed at {done.stdout.splitlines()[-1]}: {done.stderr}"
    lines = (re.fullmatch(r'(\w+) (ACCEPTED|".*") ([\d.]+)', line) for line in done.stdout.splitlines())
    return {line[1]: (line[2], float(line[3])) for line in lines}, (folder / CANARY).exists()


def test_no_hostile_pickle_crashes_runs_code_or_takes_long(outcomes):
    said, executed = outcomes
    assert not executed and said.keys() == {*HOSTILE, "zzz_good"} and len(HOSTILE) >= 30
    assert said["zzz_good"][0] == "ACCEPTED"  # so the child reads what it should
    assert max(seconds for _, seconds in said.values()) < 5


@pytest.mark.parametrize("key", HOSTILE)
def test_each_hostile_pickle_is_refused_by_one_sentence(outcomes, key):
    sentence = json.loads(outcomes[0][key][0])
    assert re.search(HOSTILE[key][1], sentence), sentence
    assert f"{key}.pkl: " in sentence and "convert the model anew" in sentence and len(sentence) < 600


def test_the_canary_would_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["reduce_protocol_5"][0])
    assert (tmp_path / CANARY).exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_plain_dump_of_such_a_dict_is_read(protocol):
    tree = unpickle(pickle.dumps(GOOD | {"large": ("float32", (70000, 300), bytes(70000))}, protocol))
    assert tree["large"][:2] == ("float32", (70000, 300)) and bytes(tree["a"]["w"][2]) == bytes(24)


def test_any_changed_byte_is_read_or_refused():
    data, outcomes = pickle.dumps(GOOD, 5), set()
    for at in range(len(data)):
        for value in range(256):
            changed = bytearray(data)
            changed[at] = value
            try:
                unpickle(bytes(changed))
                outcomes.add("read")
            except InputError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}
