"""Retrieval tasks made offline, from a seed, in our own words, after the recipes of RULER (arXiv 2404.06654).

Every prompt of a run has the same number of tokens: the largest haystack that fits is found by bisection on its size,
its sentences tokenised once, and what is left before it is filled with the end of a sentence.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import textwrap
from collections.abc import Callable, Sequence

from errors import InputError
from measure.settings import FILLER_TEXT, FWE, NIAH_MULTIKEY, NIAH_SINGLE, VT, Settings
from measure.texts import read_tokens
from weights.tokenizers import TextTokenizer

ANSWER_ROOM = 32  # tokens kept free after a prompt, so that prompts of all tasks have one length
CANDIDATES = 8  # answers whose likelihoods are compared, the right one among them
Ids = tuple[int, ...]

NOISE = (
    "Rain falls on the roof.",
    "The dog sleeps by the door.",
    "A boat crosses the bay.",
    "Bread cools on the table.",
    "The road leads to the hills.",
    "Leaves turn in the wind.",
)
ADJECTIVES = (
    "quiet", "old", "green", "tall", "small", "bright", "red", "broken", "hidden", "narrow", "golden", "empty",
    "wide", "blue", "heavy", "round", "dusty", "warm", "cold", "silver", "pale", "steep", "wooden", "iron",
    "clean", "dark", "lonely", "busy", "famous", "plain", "curved", "sunny", "rusty", "grey", "smooth", "deep",
    "white", "open", "distant", "modern",
)  # fmt: skip
NOUNS = (
    "lighthouse", "bridge", "garden", "tower", "harbour", "mill", "castle", "station", "library", "bakery",
    "museum", "orchard", "island", "tunnel", "market", "school", "barn", "canal", "chapel", "factory", "fountain",
    "gate", "hotel", "inn", "kitchen", "lake", "meadow", "office", "palace", "quarry", "river", "stable",
    "theatre", "valley", "village", "wall", "well", "window", "workshop", "yard",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      prompt: token ids, the tokenizer's prefix first, up to where the answer begins.
      question: how many of them, at the end, are the question.
      candidates: token ids of the possible answers, the right one first.
      chance: that one who knows only of which kind the answer is finds it.
    """

    prompt: Ids
    question: int
    candidates: tuple[Ids, ...]
    chance: float


@dataclasses.dataclass(frozen=True)
class Task:
    """The items of one task; `filler` is None where the haystack consists of the task's own sentences."""

    name: str
    filler: str | None
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class _Draft:
    """An item whose haystack's size is open: `haystack(size)` is its sentences' ids, longer for a larger size."""

    question: str
    answers: Sequence[str]
    haystack: Callable[[int], list[Ids]]
    chance: Callable[[int], float]
    smallest: int = 1


def make_tasks(tokenizer: TextTokenizer, settings: Settings) -> list[Task]:
    """The tasks that the settings name, each with `task_n` items; the same for the same settings.

    Raises:
      InputError: `task_len` is below what a task needs, or the text is too short for the filler.
    """
    return [_make_task(name, tokenizer, settings) for name in settings.tasks]


def _make_task(name: str, tokenizer: TextTokenizer, settings: Settings) -> Task:
    with_filler = name in (NIAH_SINGLE, VT)
    of_text = with_filler and settings.task_filler == FILLER_TEXT
    filler = _text_sentences(tokenizer, settings) if of_text else [_sentence(tokenizer, s) for s in NOISE]
    length, seed = settings.task_len - ANSWER_ROOM, f"{name} {settings.task_len}"
    draft = {NIAH_SINGLE: _niah_single, NIAH_MULTIKEY: _niah_multikey, VT: _variables, FWE: _frequent_words}[name]
    drafts = []
    for i in range(settings.task_n):
        rng = random.Random(f"{seed} {i}")  # not of the whole run: item i is the same for every task_n
        start = rng.randrange(len(filler))
        drafts.append(draft(rng, tokenizer, filler[start:] + filler[:start], settings.task_len))
    _check_length(name, tokenizer, drafts, settings.task_len)
    items = tuple(_fill(draft, tokenizer, filler, length) for draft in drafts)
    return Task(name, settings.task_filler if with_filler else None, items)


# --- Lengths ---


def _check_length(name: str, tokenizer: TextTokenizer, drafts: Sequence[_Draft], task_len: int) -> None:
    least = ANSWER_ROOM + max(_tokens(draft, tokenizer, draft.smallest) for draft in drafts)
    if least > task_len:
        raise InputError(f"task_len must be at least {least} for {name} with this tokenizer, got {task_len}")


def _tokens(draft: _Draft, tokenizer: TextTokenizer, size: int) -> int:
    question, _ = _split(tokenizer, draft.question, draft.answers)
    return len(tokenizer.prefix) + sum(map(len, draft.haystack(size))) + len(question)


def _fill(draft: _Draft, tokenizer: TextTokenizer, filler: Sequence[Ids], length: int) -> Item:
    """The item with the largest haystack that fits, its prompt `length` tokens long."""
    question, candidates = _split(tokenizer, draft.question, draft.answers)
    room = length - len(tokenizer.prefix) - len(question)
    size = _largest(lambda size: sum(map(len, draft.haystack(size))) <= room, draft.smallest, room)
    haystack = [*itertools.chain.from_iterable(draft.haystack(size))]
    rest = room - len(haystack)
    sentences = [*itertools.chain.from_iterable(filler)]
    start = (sentences * math.ceil(rest / len(sentences)))[-rest:] if rest else []
    prompt = (*tokenizer.prefix, *start, *haystack, *question)
    return Item(prompt, len(question), candidates, draft.chance(size))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low`, which fits, to `high`, by doubling and then bisection."""
    beyond = low + 1
    while beyond <= high and fits(beyond):
        low, beyond = beyond, 2 * beyond
    beyond = min(beyond, high + 1)
    while beyond - low > 1:
        middle = (low + beyond) // 2
        low, beyond = (middle, beyond) if fits(middle) else (low, middle)
    return low


def _split(tokenizer: TextTokenizer, question: str, answers: Sequence[str]) -> tuple[Ids, tuple[Ids, ...]]:
    """Ids of the question and of each answer, as they are where one follows the other."""
    alone, together = tokenizer.encode(question), [tokenizer.encode(question + answer) for answer in answers]
    shared = min(_shared(alone, ids) for ids in together)
    return tuple(alone[:shared]), tuple(tuple(ids[shared:]) for ids in together)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _sentence(tokenizer: TextTokenizer, text: str) -> Ids:
    """The ids of a sentence, as they are after another one."""
    _, (ids,) = _split(tokenizer, ".", [f" {text}"])
    return ids


def _text_sentences(tokenizer: TextTokenizer, settings: Settings) -> list[Ids]:
    """The run's text, as far as a haystack reaches, in sentences of at most a few lines."""
    ids = read_tokens(tokenizer, settings.text, 2 * settings.task_len)
    if len(ids) < settings.task_len:
        raise InputError(
            f"text {settings.text} is too short to be the filler of tasks: it holds {len(ids)} tokens, and task_len is "
            f"{settings.task_len}; ask for a smaller --task_len, --task_filler noise, or give another text"
        )
    parts = re.split(r"(?<=[.!?])\s+|\n+", tokenizer.decode(ids))
    lines = itertools.chain.from_iterable(textwrap.wrap(part, 300) for part in parts)
    lines = [*lines][: -1 if len(ids) == 2 * settings.task_len else None]  # the last may be cut off
    return [_sentence(tokenizer, line) for line in lines]


def _among(filler: Sequence[Ids], size: int, needles: Sequence[Ids], depths: Sequence[float]) -> list[Ids]:
    """`size` sentences of filler with needles at these depths, ascending, 0 before all of it and 1 after it."""
    sentences = [filler[i % len(filler)] for i in range(size)]
    for needle, depth in reversed([*zip(needles, depths, strict=True)]):
        sentences.insert(int(depth * (size + 1)), needle)
    return sentences


# --- The tasks ---


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Distinct numbers of seven digits."""
    return [str(number) for number in rng.sample(range(10**6, 10**7), count)]


def _needle(key: str, number: str) -> str:
    return f"The secret number of the {key} is {number}."


def _question(key: str) -> str:
    return f"\n\nQuestion: What is the secret number of the {key}?\nAnswer: The secret number of the {key} is"


def _niah_single(rng: random.Random, tokenizer: TextTokenizer, filler: Sequence[Ids], task_len: int) -> _Draft:
    """One number in filler. The other candidates are numbers that are not in the context."""
    key, numbers = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", _numbers(rng, CANDIDATES)
    needle, depth = _sentence(tokenizer, _needle(key, numbers[0])), rng.random()
    return _Draft(
        _question(key),
        [f" {number}" for number in numbers],
        lambda size: _among(filler, size, [needle], [depth]),
        lambda _: 1 / (9 * 10**6),
    )


def _niah_multikey(rng: random.Random, tokenizer: TextTokenizer, filler: Sequence[Ids], task_len: int) -> _Draft:
    """Nothing but numbers, each with a key: the candidates are in the context. There are keys for 27,000 tokens."""
    keys = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    keys = rng.sample(keys, min(len(keys), max(task_len, CANDIDATES)))
    numbers, seed = _numbers(rng, len(keys)), rng.random()
    needles: dict[int, Ids] = {}

    def haystack(size: int) -> list[Ids]:
        """Needle 0 is asked for; those up to CANDIDATES have the other candidates."""
        order = [*range(min(size, len(keys)))]
        for i in order[len(needles) :]:
            needles[i] = _sentence(tokenizer, _needle(keys[i], numbers[i]))
        random.Random(seed).shuffle(order)
        return [needles[i] for i in order]

    answers = [f" {number}" for number in numbers[:CANDIDATES]]
    return _Draft(_question(keys[0]), answers, haystack, lambda size: 1 / min(size, len(keys)), CANDIDATES)


HOPS = 4  # of a chain of assignments


def _variables(rng: random.Random, tokenizer: TextTokenizer, filler: Sequence[Ids], task_len: int) -> _Draft:
    """A chain of assignments in filler; the other candidates are its variables in another order."""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] * (name not in names)
    value = str(rng.randrange(10**4, 10**5))
    values = [value, *(f"VAR {name}" for name in names)]
    chain = [_sentence(tokenizer, f"VAR {name} = {held}.") for name, held in zip(names, values)]
    depths = sorted(rng.random() for _ in chain)
    orders = [*itertools.permutations(names)]
    answers = [" " + ", ".join(order) for order in (orders[0], *rng.sample(orders[1:], CANDIDATES - 1))]
    return _Draft(
        f"\n\nQuestion: Which variables hold the value {value}?\nAnswer: The variables that hold {value} are",
        answers,
        lambda size: _among(filler, size, chain, depths),
        lambda _: 1 / len(orders),
    )


COMMON = 6  # of the commonest words, which the candidates name three of
LEAST_WORDS = 14  # of the commonest word, from which on the third is commoner than the fourth


def _frequent_words(rng: random.Random, tokenizer: TextTokenizer, filler: Sequence[Ids], task_len: int) -> _Draft:
    """Coded words alone, the r-th commonest 1 / r^2 as frequent as the commonest, a word for every 50 tokens."""
    words: list[str] = []
    while len(words) < max(COMMON, task_len // 50):
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        words += [word] * (word not in words)
    ids, seed = [_sentence(tokenizer, word) for word in words], rng.random()

    def haystack(size: int) -> list[Ids]:
        """`size` times the commonest word, and the others in proportion."""
        copies = [word for rank, word in enumerate(ids, 1) for _ in range(max(1, round(size / rank**2)))]
        random.Random(seed).shuffle(copies)
        return copies

    orders = [*itertools.permutations(words[:COMMON], 3)]
    answers = [" " + ", ".join(order) for order in (orders[0], *rng.sample(orders[1:], CANDIDATES - 1))]
    question = "\n\nQuestion: Which three words are the most frequent above?\nAnswer: The most frequent words are"
    return _Draft(question, answers, haystack, lambda _: 1 / math.perm(len(words), 3), LEAST_WORDS)
