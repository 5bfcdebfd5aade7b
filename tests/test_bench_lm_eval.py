"""bench/lm_eval_kascade.py: the harness's requests answered as plain forwards would, and the harness's own backend."""

import argparse
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import repeating_text, write_hf_folder

from attention.sharding import make_mesh
from bench import lm_eval_kascade as harness
from convert_weights import convert
from errors import InputError
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection
from llama_model import LlamaModel, load_weights
from measure.schedules import SavedSchedule, save_schedule
from measure.texts import CalibratedOn
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

NAME, VOCABULARY = "gqa_llama3_untied", 50  # three layers, two KV heads; words w0 to w49
PLANS = (LayerPlan(DENSE), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, head_map=(1, 0)))
BEGIN, MAX_LENGTH = 7, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    convert(write_hf_folder(root / "hf", NAME), root / "weights")
    return root


def make(folder, query_tile, schedule=PLANS):
    manifest, mesh = read_manifest(folder / "weights"), make_mesh(jax.devices()[:2])
    params = load_weights(folder / "weights", manifest, jnp.dtype(jnp.float32), mesh)
    model = LlamaModel(manifest.config, schedule, Selection(tile_size=4, query_tile=query_tile, top_k=3))
    tokenizer = load_tokenizer(folder / "weights", manifest.tokenizer)
    return harness.Kascade(model, params, tokenizer, mesh, MAX_LENGTH, BEGIN)


@pytest.fixture(scope="module")
def ours(folder):
    """Query tiles of one row, so that whole forwards choose as steps do."""
    return make(folder, 1)


def log_p(ours, ids):
    """float64 [tokens, V] of one whole forward."""
    padded = jnp.asarray([[*ids, *[0] * (MAX_LENGTH + 16 - len(ids))]])
    if not hasattr(ours, "forward"):
        ours.forward = jax.jit(ours.model.apply)
    logits = np.asarray(ours.forward(ours.params, padded), np.float64)[0, : len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


PAIRS = [
    (repeating_text(41, VOCABULARY), " w3 w3 w9"),
    (repeating_text(2, VOCABULARY), " w1"),
    ("", "w4 w4"),
    (repeating_text(90, VOCABULARY), " w5 w6"),  # cut from the left
    (repeating_text(12, VOCABULARY) + "  ", "w8"),
]  # fmt: skip


def test_log_likelihoods_are_those_of_whole_forwards(ours):
    found = ours.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        ids = (ids_of(context) or [BEGIN]) + ids_of(continuation)
        ids, count = ids[-(MAX_LENGTH + 1) :], len(ids_of(continuation))
        rows = log_p(ours, ids)[-count - 1 : -1]
        assert value == pytest.approx(sum(row[token] for row, token in zip(rows, ids[-count:])), abs=2e-4)
        assert greedy == (rows.argmax(-1).tolist() == ids[-count:])


def test_the_greedy_continuation_is_recognised(ours):
    context = PAIRS[0][0]
    best = log_p(ours, ids_of(context))[-1].argmax()
    assert ours.loglikelihood(requests((context, f" w{best}"), (context, "")))[0][1]
    assert ours.loglikelihood(requests((context, "")))[0] == (0.0, True)


@pytest.mark.parametrize("count", [1, 23, 60, 61, 130])
def test_a_text_is_scored_once_in_windows_with_all_the_context_that_fits(ours, count):
    ids = [BEGIN, *ids_of(repeating_text(count, VOCABULARY))]
    expected = 0.0
    for start in range(1, len(ids), MAX_LENGTH):
        stop = min(start + MAX_LENGTH, len(ids))
        window = ids[max(stop - MAX_LENGTH - 1, 0) : stop]
        rows = log_p(ours, window)[start - stop - 1 : -1]
        expected += sum(row[token] for row, token in zip(rows, ids[start:stop], strict=True))
    found = ours.loglikelihood_rolling(requests((repeating_text(count, VOCABULARY),)), disable_tqdm=True)
    assert found == [pytest.approx(expected, abs=2e-4 * count)]


@pytest.mark.parametrize("words", [3, 16, 30])
def test_generation_is_the_greedy_continuation_up_to_a_stop(ours, words):
    context, row = repeating_text(words, VOCABULARY), ids_of(repeating_text(words, VOCABULARY))
    for _ in range(21):
        row.append(int(log_p(ours, row)[-1].argmax()))
    found = [f"w{token}" for token in row[words:]]
    (text,) = ours.generate_until(requests((context, {"max_gen_toks": 21})), disable_tqdm=True)
    assert text == " ".join(found)
    stop = found[-1]
    (text,) = ours.generate_until(requests((context, {"until": [stop, "never"], "max_gen_toks": 25})))
    assert text == " ".join(found)[: " ".join(found).index(stop)]
    ours.end = row[words + 1]
    (text,) = ours.generate_until(requests((context, {"max_gen_toks": 21})))
    ours.end = None
    assert text == " ".join(itertools.takewhile(lambda word: word != f"w{row[words + 1]}", found))


def test_padding_changes_nothing_where_rows_share_their_choice(folder, monkeypatch):
    """Query tiles of 8: the whole ones are prefilled, what is behind them is in later tiles alone."""
    ours, pair = make(folder, 8), (repeating_text(43, VOCABULARY), " w3 w3")
    (short,) = ours.loglikelihood(requests(pair))
    monkeypatch.setattr(harness, "SHORTEST", 256)
    ours._prefills.clear()
    (long,) = ours.loglikelihood(requests(pair))
    assert short[0] == pytest.approx(long[0], abs=1e-5)
    assert make(folder, 8, None).loglikelihood(requests(pair))[0][0] != pytest.approx(long[0], abs=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_sample": True}, "generation is greedy here"),
        ({"temperature": 0.7}, "generation is greedy here"),
        ({"max_gen_toks": MAX_LENGTH}, "max_gen_toks 60 leaves no room for a context in 60 tokens"),
    ],
)
def test_what_cannot_be_generated_is_refused(ours, settings, message):
    with pytest.raises(InputError, match=message):
        ours.generate_until(requests(("w1", settings)))


def test_a_continuation_longer_than_a_text_may_be_is_refused(ours):
    with pytest.raises(InputError, match="a continuation of 61 tokens is longer than the 60 of a text"):
        ours.loglikelihood(requests(("w1", " w2" * 61)))


def test_a_density_becomes_the_number_of_tiles_of_the_calibrated_length():
    saved = SavedSchedule(PLANS, Selection(tile_size=4, density=0.25), CalibratedOn(64, 1, ""))
    assert harness.fixed_budget(saved).selection.top_k == 4
    other = SavedSchedule(PLANS, Selection(tile_size=4, top_k=3), CalibratedOn(64, 1, ""))
    assert harness.fixed_budget(other) == other


def test_a_token_is_named_by_its_text(ours):
    assert harness.token_id(ours.text_tokenizer, "begin", "w9") == 9
    with pytest.raises(InputError, match="end must name a token of the vocabulary, such as <s> .* got 'x'"):
        harness.token_id(ours.text_tokenizer, "end", "x")


def test_both_arms_are_columns_with_their_errors():
    found = {
        "dense": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.125, "ppl,none": 9.0}},
        "sparse": {"t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": "N/A", "ppl,none": 10.0}},
    }
    assert harness.columns(found).splitlines()[2:] == [
        "| t | acc | 0.5000 ± 0.1250 | 0.2500 |",
        "| t | ppl | 9.0000 | 10.0000 |",
    ]


def test_without_the_harness_the_command_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(SystemExit) as caught:
        harness.main(["--tasks", "t", "--schedule", "s.json"])
    assert caught.value.code == 2
    assert "pip install -r bench/requirements-lm-eval.txt" in capsys.readouterr().err


# --- With the harness itself ---

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\ntarget_delimiter: " "\nmetric_list:\n  - metric: acc'
WHOLE = "metric_list:\n  - metric: word_perplexity"
FREE = 'generation_kwargs:\n  until: ["w7"]\n  max_gen_toks: 9\nmetric_list:\n  - metric: exact_match'


@pytest.fixture(scope="module")
def local_tasks(folder):
    """Three tasks of our own: a YAML file each, and one JSON file with their documents."""
    rng, documents = np.random.default_rng(3), []
    for i in range(12):
        choices = [" ".join(f"w{token}" for token in rng.integers(1, VOCABULARY, 2)) for _ in range(3)]
        question = repeating_text(10 + 3 * i, VOCABULARY)
        documents.append({"question": question, "choices": choices, "answer": i % 3})
    data = folder / "documents.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, kind, more in (
        ("local_choice", "multiple_choice", CHOICES),
        ("local_whole", "loglikelihood_rolling", WHOLE),
        ("local_free", "generate_until", FREE),
    ):
        text = TASK.format(name=name, kind=kind, data=data, more=more)
        if name == "local_whole":
            text = text.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""').replace("{{answer}}", "{{question}}")
        (tasks / f"{name}.yaml").write_text(text)
    return tasks


def test_the_harness_gets_from_us_what_its_own_backend_gives(folder, local_tasks, tmp_path, capsys):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(
        pretrained=str(folder / "hf"), device="cpu", dtype="float32", prefix_token_id=BEGIN, max_length=MAX_LENGTH
    )
    names = ("local_choice", "local_whole", "local_free")
    manager = TaskManager(include_path=str(local_tasks))
    expected = lm_eval.simple_evaluate(model=theirs, tasks=list(names), task_manager=manager)

    manifest, path = read_manifest(folder / "weights"), tmp_path / "schedule.json"
    calibration = [jnp.zeros((1, 40), jnp.int32)]
    save_schedule(path, PLANS, Selection(tile_size=4, top_k=2), manifest, calibration)
    flags = ["--schedule", str(path), "--weights_dir", str(folder / "weights"), "--include_path", str(local_tasks)]
    flags += ["--begin", f"w{BEGIN}", "--max_length", str(MAX_LENGTH), "--dtype", "float32"]
    assert harness.main([*flags, "--tasks", ",".join(names), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    for name in names:
        for key, value in expected["results"][name].items():
            if isinstance(value, float):
                assert found["dense"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert found["sparse"]["local_whole"] != found["dense"]["local_whole"]
    assert "| local_choice | acc | " in capsys.readouterr().out

    samples = [SimpleNamespace(args=tuple(args["arguments"][0])) for args in expected["samples"]["local_free"]]
    ours = harness.make_arms(harness.parse_args([*flags, "--tasks", "t"]))["dense"]
    assert ours.generate_until(samples) == [sample["resps"][0][0] for sample in expected["samples"]["local_free"]]


def test_a_task_that_the_harness_does_not_know_is_refused(folder, local_tasks):
    pytest.importorskip("lm_eval")
    args = argparse.Namespace(include_path=local_tasks, tasks=("no_such_task",))
    with pytest.raises(InputError, match="the harness knows no 'no_such_task'"):
        harness.evaluate(None, args)
