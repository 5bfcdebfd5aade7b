"""Retrieval tasks: what the prompts hold, how they are answered, and what a row of them says."""

import collections
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, _byte_letters, write_hf_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import benchmark_kascade_final as benchmark
from attention.sharding import keep_on, make_mesh, move, steps_mesh
from convert_weights import convert
from errors import InputError, UnsupportedError
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection
from llama_model import LlamaModel, load_weights
from measure.answers import DENSE_ARM, ORACLE_ARM, SPARSE_ARM, Answerer, answer_of, oracle_of, padded
from measure.settings import FWE, NIAH_MULTIKEY, NIAH_SINGLE, TASKS, VT, Settings
from measure.tasks import ANSWER_ROOM, CANDIDATES, Item, Task, make_tasks
from network.programs import decode_steps
from report import console
from report.results import PROMPT, QUESTION, Answers, TaskRow
from weights.folder import read_manifest
from weights.tokenizers import TextTokenizer


def bytes_tokenizer(begin=()):
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(_byte_letters())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend)


TOKENIZER = bytes_tokenizer()


def make(name, task_len=1500, task_n=3, **settings):
    return make_tasks(TOKENIZER, Settings(tasks=(name,), task_len=task_len, task_n=task_n, **settings))[0]


def texts(item):
    """(context, question, right answer, other candidates)"""
    right, *others = map(TOKENIZER.decode, item.candidates)
    context, question = item.prompt[: -item.question], item.prompt[-item.question :]
    return TOKENIZER.decode(context), TOKENIZER.decode(question), right, others


# --- Prompts ---


@pytest.mark.parametrize("name, task_len", [(name, n) for name, n in zip(TASKS, (700, 1501, 1000, 2222))])
def test_every_prompt_has_the_same_length_and_an_answer_like_the_others(name, task_len):
    task = make(name, task_len)
    for item in task.items:
        assert len(item.prompt) == task_len - ANSWER_ROOM
        assert len(set(item.candidates)) == CANDIDATES
        assert max(map(len, item.candidates)) <= ANSWER_ROOM
    assert len({item.prompt for item in task.items}) == 3


@pytest.mark.parametrize("name", TASKS)
def test_a_question_is_the_same_however_many_are_asked(name):
    assert make(name, task_n=3).items[:2] == make(name, task_n=2).items


def test_the_needle_is_in_the_context_once_and_the_other_numbers_are_not():
    for item in make(NIAH_SINGLE).items:
        context, question, right, others = texts(item)
        key = re.search(r"secret number of the (.+)\?", question)[1]
        assert context.count(f"The secret number of the {key} is{right}.") == context.count("secret") == 1
        assert re.fullmatch(r" \d{7}", right)
        assert not any(other in context for other in others)
        assert question.endswith(f"The secret number of the {key} is")


def test_with_many_keys_all_candidates_are_in_the_context():
    for item in make(NIAH_MULTIKEY).items:
        context, question, right, others = texts(item)
        pairs = dict(re.findall(r"The secret number of the (\w+ \w+) is( \d{7})\.", context))
        assert pairs[re.search(r"secret number of the (.+)\?", question)[1]] == right
        assert {right, *others} <= set(pairs.values())
        assert item.chance == 1 / len(pairs)
        rest = re.sub(r"The secret number of the \w+ \w+ is \d{7}\.", "", context)
        assert len(rest.replace(" ", "")) < 60  # nothing but the end of a sentence


def test_the_variables_that_hold_the_value_are_the_chain():
    for item in make(VT).items:
        context, question, right, others = texts(item)
        value = re.search(r"the value (\d{5})\?", question)[1]
        held, names = {}, []
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})\.", context):
            held[name] = held.get(source, source)
            names.append(name)
        assert right == " " + ", ".join(names)
        assert set(held.values()) == {value}
        assert all(
            sorted(other.split(", ")) != [] and set(re.findall("[A-Z]{5}", other)) == set(names) for other in others
        )


def test_the_answer_is_the_three_commonest_words_in_their_order():
    for item in make(FWE, 3000).items:
        context, _, right, others = texts(item)
        counts = collections.Counter(re.findall(r"\b(?:[b-z][aeiou]){3}\b", context)).most_common()
        assert right == " " + ", ".join(word for word, _ in counts[:3])
        assert counts[2][1] > counts[3][1]
        assert counts[0][1] == pytest.approx(4 * counts[1][1], abs=2)
        assert len(counts) == 60
        assert all(word in dict(counts[:6]) for other in others for word in other.strip().split(", "))


def test_filler_is_the_runs_text_if_asked(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One fox ran. Two owls sat! Three eels swam?\n" * 40)
    context, *_ = texts(make(NIAH_SINGLE, 900, text=path, task_filler="text").items[0])
    assert "One fox ran. Two owls sat! Three eels swam? One fox" in context
    assert make(FWE, 900, text=path, task_filler="text").filler is None


# --- Bad input ---


def test_a_length_below_what_a_task_needs_is_refused_with_the_least():
    for name in TASKS:
        with pytest.raises(
            InputError, match=rf"task_len must be at least \d+ for {name} with this tokenizer, got 60"
        ) as caught:
            make(name, 60)
        least = int(re.search(r"at least (\d+)", str(caught.value))[1])
        if name != FWE:  # its words, and so what it needs, are more for a longer prompt
            make(name, least)
            with pytest.raises(InputError, match=f"at least {least}"):
                make(name, least - 1)


def test_a_text_too_short_for_the_filler_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Short. " * 20)
    with pytest.raises(
        InputError, match=r"too short to be the filler of tasks: it holds 140 tokens, and task_len is 700"
    ):
        make(VT, 700, text=path, task_filler="text")


def test_an_answer_that_takes_too_many_tokens_is_refused(monkeypatch):
    monkeypatch.setattr("measure.tasks.ANSWER_ROOM", 20)
    with pytest.raises(UnsupportedError, match=r"vt: an answer is 3\d tokens long with this tokenizer, above 20"):
        make(VT)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "niah_single,nothing"], "tasks: expected any of niah_single, niah_multikey, vt, fwe, got 'nothing'"),
        (["--task_len", "99"], "task_len has no effect without tasks"),
        (["--tasks", "vt", "--task_n", "0"], "task_n must be at least 1"),
        (["--tasks", "vt", "--task_filler", "prose"], "invalid choice"),
    ],
)  # fmt: skip
def test_bad_flags_end_with_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        Settings.from_flags(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_tasks_have_their_defaults_once_tasks_are_asked_for():
    settings = Settings.from_flags(["--tasks", "vt,fwe,vt"])
    assert (settings.tasks, settings.task_len, settings.task_n, settings.task_filler) == (
        ("vt", "fwe"),
        2048,
        50,
        "noise",
    )
    assert Settings().task_len is None


# --- Answers ---

NAME, LENGTH, QUESTION_TOKENS = "gqa_llama3_untied", 45, 5
SELECTION = Selection(tile_size=4, query_tile=1, top_k=2)
PLANS = (LayerPlan(DENSE), LayerPlan(ANCHOR), LayerPlan(REUSE, 1, head_map=(1, 0)))


@functools.cache
def jitted(model):
    return jax.jit(model.apply, static_argnames="method")


def log_p(model, params, row):
    """float64 [tokens, V]; tokens after the row's change nothing where each row chooses for itself."""
    ids = jnp.asarray([[*row, *[0] * (LENGTH + 3 - len(row))]])
    logits = np.asarray(jitted(model)(params, ids), np.float64)[0, : len(row)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """(models, params, mesh, two questions on random tokens whose right answer is dense's greedy continuation)."""
    root = tmp_path_factory.mktemp("tasks")
    convert(write_hf_folder(root / "hf", NAME), root / "weights")
    manifest, mesh = read_manifest(root / "weights"), make_mesh(jax.devices()[:2])
    params = load_weights(root / "weights", manifest, jnp.dtype(jnp.float32), mesh)
    dense = LlamaModel(manifest.config, None, SELECTION)
    sparse = dense.clone(schedule=PLANS)
    models = {DENSE_ARM: dense, SPARSE_ARM: sparse, ORACLE_ARM: oracle_of(sparse)}
    rng, items = np.random.default_rng(0), []
    for size in (3, 2):
        row = [*map(int, rng.integers(0, 50, LENGTH))]
        for _ in range(size):
            row.append(int(log_p(dense, params, row)[-1].argmax()))
        others = [tuple(map(int, rng.integers(0, 50, size))) for _ in range(CANDIDATES - 1)]
        items.append(Item(tuple(row[:LENGTH]), QUESTION_TOKENS, (tuple(row[LENGTH:]), *others), 0.01))
    return models, params, mesh, Task("made", "noise", tuple(items))


@pytest.fixture(scope="module")
def answers(answering):
    models, params, mesh, task = answering
    answerer = Answerer(models, params, LENGTH, mesh)
    answerer.compile_steps(task)
    return answerer, [answerer.answers(task, item) for item in task.items]


def naive(model, params, item):
    """The answer by whole forwards, in which every row chooses for itself, of the prompt with each candidate."""
    rows = [log_p(model, params, [*item.prompt, *candidate])[LENGTH - 1 : -1] for candidate in item.candidates]
    losses = [-sum(row[token] for row, token in zip(*pair)) for pair in zip(rows, item.candidates)]
    right = rows[0].argmax(-1).tolist() == list(item.candidates[0])
    return right, 1 + sum(loss <= losses[0] for loss in losses[1:])


def test_answers_are_those_of_whole_forwards(answering, answers):
    models, params, _, task = answering
    for item, found in zip(task.items, answers[1]):
        for arm, model in models.items():
            assert found[arm, PROMPT] == naive(model, params, item), arm
        assert found[DENSE_ARM, PROMPT][0]
        assert found[DENSE_ARM, QUESTION] == found[DENSE_ARM, PROMPT]


def test_a_sparse_question_after_a_dense_context_is_the_plain_decoding_of_both(answering, answers):
    """The context's keys and values by the dense model, all steps after it by the sparse one."""
    models, params, mesh, task = answering
    item, sparse = task.items[0], models[SPARSE_ARM]
    first = LENGTH - 8  # QUESTION_TOKENS, rounded up
    context = jnp.asarray([item.prompt[:first]])
    forward = models[DENSE_ARM].compile(params, context, mesh, with_cache=True)
    step_params, losses = keep_on(params, steps_mesh(mesh, 1)), []
    for candidate in item.candidates:
        cache = forward.fill_cache(forward(params, context), LENGTH + 7, mesh, jnp.float32)
        ids = move(jnp.asarray([[*item.prompt[first:], *candidate]]), steps_mesh(mesh, 1))
        decoded = jax.jit(functools.partial(decode_steps, sparse))(step_params, ids, jnp.array([first]), cache)
        nll = jitted(sparse)(step_params, decoded.stream[:, 7:-1], ids[:, 8:], method="next_token_nll")
        losses.append(float(nll.sum()))
        if not losses[1:]:
            right = decoded.best[0, 7:-1].tolist() == list(candidate)
    assert answers[1][0][SPARSE_ARM, QUESTION] == (right, 1 + sum(loss <= losses[0] for loss in losses[1:]))


def test_the_oracle_reuses_nothing_and_keeps_its_budgets():
    budgets = [dataclasses.replace(plan, budgets=None if plan.mode == DENSE else (2, 3)) for plan in PLANS]
    config = benchmark.LlamaConfig.from_hf(HF_CONFIGS[NAME])
    oracle = oracle_of(LlamaModel(config, budgets))
    assert [plan.mode for plan in oracle.schedule] == [DENSE, ANCHOR, ANCHOR]
    assert [plan.budgets for plan in oracle.schedule] == [None, (2, 3), (2, 3)]
    assert [plan.largest_budget for plan in oracle.schedule] == [None, 3, 3]


def test_density_is_counted_in_both_set_ups(answers):
    """Tiles of 4 tokens, 2 chosen of each row's, in two of three layers; at 45 tokens 12 tiles are seen."""
    densities = answers[0].densities
    rows = np.arange(LENGTH) // 4 + 1
    chosen = np.minimum(rows, 2)
    assert densities[SPARSE_ARM, PROMPT] == pytest.approx((1 + 2 * chosen.sum() / rows.sum()) / 3)
    asked = slice(LENGTH - 8, None)
    assert densities[SPARSE_ARM, QUESTION] == pytest.approx(
        (1 + 2 * np.mean(chosen[asked] / rows[asked])) / 3, rel=0.05
    )


def test_an_answer_is_right_if_each_of_its_own_tokens_is_the_likeliest():
    ids, is_token = padded([(3, 4), (5, 6, 7), (8,)], 3)
    nll = np.array([[1.0, 1.0, 99.0], [1.0, 0.5, 0.4], [2.0, 99.0, 99.0]])
    assert answer_of(nll, np.array([3, 4, 9]), ids, is_token) == (True, 3)  # 2 against 1.9, and 2 again
    assert answer_of(nll, np.array([3, 5, 0]), ids, is_token) == (False, 3)


def test_a_run_prints_and_returns_two_rows_for_each_task(answering, answers, capsys, monkeypatch):
    (models, params, mesh, task), given = answering, []
    monkeypatch.setattr(benchmark, "Answerer", lambda *args: given.append(args) or answers[0])  # compiled already
    rows = benchmark.run_tasks(models[DENSE_ARM], models[SPARSE_ARM], params, [task], mesh)
    assert [(row.setup, row.n, row.length, row.dense.share) for row in rows] == [
        (PROMPT, 2, LENGTH + ANSWER_ROOM, 1.0), (QUESTION, 2, LENGTH + ANSWER_ROOM, 1.0)
    ]  # fmt: skip
    assert given == [(models, params, LENGTH, mesh)]
    assert capsys.readouterr().out == "".join(console.fit(console.task_row(row)) + "\n" for row in rows)


# --- Rows ---


def row(dense, sparse, oracle=None, chance=0.01, n=10):
    """With so many right answers, the first ones; right answers are ranked first, others third."""

    def arm(right):
        return Answers(tuple(i < right for i in range(n)), tuple(1 if i < right else 3 for i in range(n)))

    oracle = dense if oracle is None else oracle
    return TaskRow("vt", 512, "noise", PROMPT, chance, 8, 0.4, arm(dense), arm(sparse), arm(oracle))


def test_a_row_compares_paired_answers():
    found = row(9, 3).to_json()
    assert (found["n"], found["dense"], found["sparse"], found["oracle"]) == (10, 0.9, 0.3, 0.9)
    assert found["p_value"] == pytest.approx(2 / 2**6)  # six lost, none gained
    assert found["dense_ci"] == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert (found["sparse_ranked_first"], found["sparse_mean_rank"]) == (0.3, pytest.approx(2.4))
    assert found["discriminative"]
    assert 0.15 < row(50, 50, n=50).smallest_effect < 0.16
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("dense, chance, n", [(5, 0.01, 10), (8, 0.5, 10), (0, 0.0, 50)])
def test_a_row_in_which_dense_is_not_clearly_above_chance_is_not_compared(dense, chance, n):
    found = row(dense, 0, chance=chance, n=n)
    assert not found.discriminative
    assert found.p_value is None
    assert "not discriminative" in console.task_row(found)


def test_an_arm_that_beats_a_better_informed_one_is_suspicious():
    assert row(2, 9, 2).suspicions == ("sparse beats dense", "sparse beats oracle")
    assert row(2, 9, 9).suspicions == ("sparse beats dense", "oracle beats dense")
    assert row(9, 3, 9).suspicions == row(5, 9, 5).suspicions == ()
    assert "sparse beats dense significantly" in console.task_row(row(2, 9, 2))


def test_the_console_says_shares_intervals_and_power():
    text = console.task_row(row(10, 4))
    assert "100% [72, 100]" in text
    assert "40% [17, 69]" in text
    assert f"{2 / 2**6:.3f}" in text
    assert "1st 40% of 8" in text
    assert "cannot show any loss" in console.tasks_power([row(5, 5, n=5)])
    assert "a loss of 15% of the answers" in console.tasks_power([row(50, 50, n=50)])
    header = console.tasks_header(Settings(tasks=("vt",), task_len=512, task_n=7))
    assert "512 tokens, n = 7, filler noise" in header


def test_the_table_fits_a_terminal_with_its_columns_below_their_names():
    """A row broken at 80 columns cannot be read; niah_multikey has the longest name."""
    header, found = console.tasks_header(Settings(tasks=TASKS)), row(50, 50, n=50)
    worst = dataclasses.replace(
        found, task=NIAH_MULTIKEY, setup=QUESTION, chance=1.1e-07, density=1.0, dense=found.oracle
    )
    unclear = dataclasses.replace(worst, dense=row(0, 0, n=50).dense)
    for text in (header, console.task_row(worst), console.task_row(unclear), console.tasks_power([worst])):
        assert console.fit(text) == text
    names, cells = header.splitlines()[-1], console.task_row(worst).splitlines()[0]
    assert names.index("kept") + len("kept") == cells.index("100.0%") + len("100.0%") == console.COLUMNS
    assert "oracle beats dense" in console.task_row(unclear) and "not discriminative" in console.task_row(unclear)
