"""True token ids: a checkpoint's own tokenizer file, or llama.cpp's rules, give the ids; everything else is refused."""

import base64
import copy
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from make_golden_tokenizer import GOLDEN, LETTERS, TEXTS, ids_by_rule
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from errors import InputError, UnsupportedError
from weights import gguf_tokenizers, text_tokenizer, tokenizers, transformers_ids
from weights.text_tokenizer import PROBE, TextTokenizer, call_library
from weights.tokenizers import from_gguf, from_hugging_face, from_meta, load_tokenizer, write_tokenizer

BYTES = [LETTERS[i] for i in range(256)]
TEXT = "\n".join(text for texts in TEXTS.values() for text in texts)
BOS, EOS = "<|begin|>", "<|end|>"


def spell(text):
    return "".join(LETTERS[byte] for byte in text.encode())


def trained(*splits, size=700, special=(BOS, EOS)):
    """A byte-level BPE trained on TEXT, cut by `splits`."""
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits or (gguf_tokenizers.GPT2,)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=BYTES, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def parts(tokenizer):
    """Tokens by id, and merges as GGUF writes them."""
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def gguf(tokens=(*BYTES, "he", EOS, BOS, "<tool>"), merges=("h e",), **changes):
    """Metadata of a gpt2 vocabulary; None leaves a key out."""
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": list(tokens), "merges": list(merges)} | changes
    if "token_type" not in changes:
        fields["token_type"] = [3 if token in (BOS, EOS) else 4 if token == "<tool>" else 1 for token in tokens]
    for name, token in (("bos_token_id", BOS), ("eos_token_id", EOS)):
        if token in tokens and name not in changes:
            fields[name] = list(tokens).index(token)
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def without(key):
    return {name: value for name, value in gguf().items() if name != f"tokenizer.ggml.{key}"}


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "\u2581",
    "a",
    "b",
    "ab",
    "\u2581a",
    "\u2581ab",
]
SCORES = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0]
A, B, AB, SPACE_A, SPACE_AB = (PIECES.index(piece) for piece in ("a", "b", "ab", "\u2581a", "\u2581ab"))
SPACE = PIECES.index("\u2581")


def spm(**changes):
    """Metadata of a llama vocabulary."""
    fields = {"model": "llama", "tokens": PIECES, "scores": SCORES, "token_type": [2, 3, 3] + [6] * 256 + [1] * 6}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items() if value is not None}


def all_ids(tokenizer, text):
    """With what stands around the text."""
    return tokenizer.backend.encode(text).ids


# --- GGUF: llama.cpp's rules ---


def test_the_default_models_rule_splits_digits_before_gpt2s_words():
    tokens, merges = parts(trained(r"\p{N}", gguf_tokenizers.GPT2))
    tokenizer = from_gguf(gguf(tokens, merges, pre="smollm"), 700)
    assert tokenizer.warnings == () and tokenizer.prefix == ()
    for texts in TEXTS.values():
        for text in texts:
            assert tokenizer.encode(text) == ids_by_rule(text, tokens, merges), text
    as_gpt2 = from_gguf(gguf(tokens, merges, pre="gpt-2"), 700)
    assert as_gpt2.encode("In 1999\n\n2. b") != tokenizer.encode("In 1999\n\n2. b")


def random_strings(number=10_000, without=frozenset()):
    """Strings of signs that are hard on tokenizers, and of any code points, with none of the bytes `without`."""
    rng = random.Random(0)
    alphabets = [
        "ab ",
        "0123456789. ",
        " \n\t\r",
        "éßœ\u0301ि",
        "日本語。",
        "😀👍🏽\u200d",
        "'s!?-_",
        "".join(map(chr, range(300))),
    ]
    strings = []
    while len(strings) < number:
        some = rng.choices("".join(rng.sample(alphabets, 3)), k=rng.randrange(12))
        if len(strings) % 10 == 0:
            some = [chr(point) for point in (rng.randrange(0x110000) for _ in range(8)) if not 0xD800 <= point < 0xE000]
        if without.isdisjoint("".join(some).encode()):
            strings.append("".join(some))
    return strings


@pytest.mark.real_model
def test_the_default_models_ids_are_the_golden_ones(default_weights):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    manifest = json.loads((default_weights / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(default_weights, manifest["tokenizer"])
    assert tokenizer.vocab_size == golden["tokens"] and tokenizer.prefix == ()
    for _, text, ids in golden["texts"]:
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    vocabulary = tokenizer.backend.get_vocab()
    absent = {byte for byte, letter in LETTERS.items() if letter not in vocabulary}
    assert len(absent) == 21  # 13 are never in UTF-8; six control characters, and the planes from U+40000 to U+BFFFF
    for text in random_strings(without=absent):
        assert tokenizer.decode(tokenizer.encode(text)) == text


SAMPLE = "it's 'S 12345 aB É\n\n 7  x\t!?a\r\n日本語。हि$é9"
LLAMA3 = ["it", "'s", " '", "S", " ", "123", "45", " aB", " É", "\n\n", " ", "7", " ", " x", "\t", "!?", "a", "\r\n"]
QWEN2 = LLAMA3[:5] + ["1", "2", "3", "4", "5"] + LLAMA3[7:]
ENGLISH = ["it", "'s", " '", "S", " 12345", " aB", " É", "\n\n", " 7", " ", " x", "\t", "!?", "a", "\r", "\n"]
ONE_BY_ONE = ENGLISH[:4] + [" ", "1", "2", "3", "4", "5", " aB", " É", "\n\n ", "7"] + ENGLISH[9:]
DEEPSEEK = [
    "it",
    "'",
    "s",
    " '",
    "S",
    " ",
    "12345",
    " aB",
    " É",
    "\n",
    "\n",
    " ",
    "7",
    " ",
    " x",
    "\t!?",
    "a",
    "\r",
    "\n",
]
DEFAULT = ["it", "'", "s", " ", "'", "S", " ", "123", "45", " aB", " É", "\n\n", " ", "7", *ENGLISH[9:]]
WIDE = ["日本語", "。ह", "ि$", "é", "9"]
APART = ["日本語", "。", "ह", "ि$", "é", "9"]
CUTS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), LLAMA3 + WIDE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2 + WIDE),
    **dict.fromkeys(("gpt-2", "olmo"), ENGLISH + APART),
    **dict.fromkeys(("smollm", "starcoder", "refact"), ONE_BY_ONE + APART),
    "tekken": [*QWEN2[:10], " a", "B", *QWEN2[11:], "日本語", "。हि", "$é", "9"],
    "default": [*DEFAULT, "日本語", "。", "ह", "ि", "$", "é", "9"],
    "deepseek-llm": [*DEEPSEEK, "日本語", "。", "हि", "$", "é", "9"],
    "deepseek-coder": [*DEEPSEEK[:6], *"12345", *DEEPSEEK[7:], "日本語", "。", "ह", "ि", "$", "é", "9"],
}


def test_there_is_a_row_here_for_each_pre_tokenizer():
    assert CUTS.keys() == gguf_tokenizers.PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("name", CUTS)
def test_each_pre_tokenizer_cuts_as_its_name_says(name):
    rule = from_gguf(gguf(pre=name), 300).backend.pre_tokenizer
    pieces = [SAMPLE[start:end] for _, (start, end) in rule.pre_tokenize_str(SAMPLE)]
    assert pieces == CUTS[name] and "".join(pieces) == SAMPLE


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"])
def test_llama3s_names_begin_with_bos_unless_the_file_says_otherwise(name):
    silent = from_gguf(gguf(pre=name), 300)
    assert silent.prefix == (258,) and silent.prefix_text == BOS and silent.warnings == ()
    assert all_ids(silent, "he") == [258, 256] and silent.encode("he") == [256]
    assert from_gguf(gguf(pre=name, add_bos_token=False), 300).prefix == ()
    ends = from_gguf(gguf(pre=name, add_bos_token=False, add_eos_token=True), 300)
    assert all_ids(ends, "he") == [256, 257] and ends.prefix == ()
    assert from_gguf(gguf(pre="smaug-bpe"), 300).prefix == () == from_gguf(gguf(pre="qwen2"), 300).prefix


def test_llama3s_names_reach_tokens_that_no_merges_make():
    tokens = [*BYTES, "he", spell(" Việt")]
    assert from_gguf(gguf(tokens, pre="llama-bpe", add_bos_token=False), 300).encode("he Việt") == [256, 257]
    assert from_gguf(gguf(tokens, pre="tekken", add_bos_token=False), 300).encode(" Việt") == [257]
    assert len(from_gguf(gguf(tokens, pre="smaug-bpe"), 300).encode(" Việt")) == len(spell(" Việt"))


@pytest.mark.parametrize("name", [None, "default"])
def test_a_file_that_does_not_name_its_pre_tokenizer_is_warned_of(name):
    (warning,) = from_gguf(gguf(pre=name), 300).warnings
    assert "does not name its pre-tokenizer" in warning and "as LLaMA 3's is, gives other ids" in warning


def test_control_and_user_defined_tokens_are_found_in_a_text():
    tokenizer = from_gguf(gguf(), 300)
    space = BYTES.index("Ġ")
    assert tokenizer.encode("h ehe<|end|> <tool>h") == [ord("h"), space, ord("e"), 256, 257, space, 259, ord("h")]
    assert tokenizer.decode([256, 257, 259, ord("h")]) == "he<|end|><tool>h" and tokenizer.vocab_size == 260
    named = from_gguf(gguf([*BYTES, "he", "<｜begin▁of▁text｜>"], token_type=[1] * 257 + [3]), 300)
    assert named.encode("<｜begin▁of▁text｜>he") == [257, 256]
    assert from_gguf(gguf([*BYTES, "", "he", ""]), 300).encode("he") == [257]  # empty tokens are named apart


def test_a_sentencepiece_vocabulary_merges_the_best_scored_token_first():
    tokenizer = from_gguf(spm(), 300)
    assert all_ids(tokenizer, "ab") == [1, SPACE_AB]  # "ab" has the best score, then both with the space
    assert tokenizer.encode(" ab") == [SPACE, SPACE_AB] and tokenizer.decode([SPACE, SPACE_AB]) == " ab"
    assert tokenizer.encode("b</s>é") == [SPACE, B, 2, SPACE, 3 + 0xC3, 3 + 0xA9]
    fewer = {"tokens": PIECES[:-1], "token_type": None}
    for scores, ids in (([-1.0, -2.0], [SPACE, AB]), ([-2.0, -1.0], [SPACE_A, B])):
        assert from_gguf(spm(**fewer, scores=[*SCORES[:-3], *scores]), 300).encode("ab") == ids


def test_sentencepieces_defaults_are_llama_cpps():
    assert from_gguf(spm(), 300).prefix == (1,) and from_gguf(spm(), 300).prefix_text == "<s>"
    assert from_gguf(spm(bos_token_id=2), 300).prefix == (2,)
    assert from_gguf(spm(add_bos_token=False), 300).prefix == ()
    assert from_gguf(spm(), 300).encode("<unk>b")[0] == 0
    assert from_gguf(spm(add_space_prefix=False), 300).encode("ab") == [AB]
    assert from_gguf(spm(add_space_prefix=False), 300).decode([SPACE, AB]) == " ab"
    without_bytes = ["<unk>", "<s>", "</s>", *PIECES[259:]]
    short = spm(tokens=without_bytes, scores=[0.0] * 3 + SCORES[259:], token_type=None)
    assert from_gguf(short, 300).encode("aé") == [without_bytes.index("\u2581a"), 0]


@pytest.mark.parametrize(
    "match, metadata",
    [
        ("tokenizer.ggml.model is missing", gguf(model=None)),
        ("tokenizer.ggml.model must be text, got 7", gguf(model=7)),
        ("tokenizer.ggml.tokens is missing", without("tokens")),
        ("tokenizer.ggml.tokens must be a list of texts, got 'abc'", gguf() | {"tokenizer.ggml.tokens": "abc"}),
        ("tokenizer.ggml.tokens must be a list of texts, got", gguf() | {"tokenizer.ggml.tokens": [1, 2]}),
        ("tokenizer.ggml.tokens has 'he' twice, as 256 and 260", gguf([*BYTES, "he", EOS, BOS, "<tool>", "he"])),
        ("has 301 tokens, expected at most the model's 300", gguf([*BYTES, "he", *map(str, range(1000, 1044))])),
        ("tokenizer.ggml.merges is missing", without("merges")),
        ("tokenizer.ggml.merges must be a list of texts", gguf() | {"tokenizer.ggml.merges": [["h", "e"]]}),
        ("merges: expected two tokens that make a third, got 'h x'", gguf(merges=["h x"])),
        ("tokenizer.ggml.token_type must be a list of whole numbers", gguf(token_type="3")),
        ("tokenizer.ggml.token_type has 2 values, expected one for each of 260", gguf(token_type=[1, 1])),
        ("tokenizer.ggml.pre must be text, got True", gguf(pre=True)),
        ("tokenizer.ggml.bos_token_id must be a whole number of at least 0, got '0'", gguf(bos_token_id="0")),
        ("bos_token_id must be below the number of tokens, 260, got 300", gguf(bos_token_id=300, add_bos_token=True)),
        ("bos_token_id is missing, and each text is to have that token", gguf(bos_token_id=None, pre="llama3")),
        ("add_bos_token must be true or false, got 1", gguf(add_bos_token=1)),
        ("tokenizer.ggml.scores is missing", spm(scores=None)),
        ("tokenizer.ggml.scores has 1 values, expected one for each of 265", spm(scores=[1.0])),
        ("tokenizer.ggml.scores must be a list of numbers", spm(scores=[None] * 265)),
        ("tokenizer.ggml.scores must be a list of numbers, got .nan", spm(scores=[float("nan")] * 265)),
        ("add_space_prefix must be true or false, got 'no'", spm(add_space_prefix="no")),
        ("unknown_token_id must be a whole number of at least 0, got -7", spm(unknown_token_id=-7)),
    ],
)
def test_gguf_metadata_of_a_wrong_kind_is_refused_by_its_key(match, metadata):
    with pytest.raises(InputError, match=match):
        from_gguf(metadata, 300)


def test_gguf_tokenizers_that_are_not_known_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="pre-tokenizer 'klingon' is not supported; .*llama-bpe.* are"):
        from_gguf(gguf(pre="klingon"), 300)
    with pytest.raises(UnsupportedError, match="tokenizer.ggml.model 'bert' is not supported; gpt2 and llama are"):
        from_gguf(gguf(model="bert"), 300)


def test_an_unneeded_id_out_of_range_is_a_warning():
    (warning,) = from_gguf(gguf(eos_token_id=999), 300).warnings
    assert "eos_token_id must be below the number of tokens, 260, got 999; it is not used" in warning


# --- Hugging Face folders ---


def template(tokenizer, single, *special):
    tokenizer = copy.deepcopy(tokenizer)
    special = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=special)
    return tokenizer


def hf(folder, tokenizer=None, config=None, **files):
    """A folder of tokenizer files; `files` have __ for dots."""
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        files["tokenizer__json"] = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    if config is not None:
        files["tokenizer_config__json"] = config if isinstance(config, str) else json.dumps(config)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def plain():
    """A byte-level tokenizer without a template; BOS is 0, EOS 1."""
    return trained(size=500)


@pytest.fixture
def no_transformers(monkeypatch):
    monkeypatch.setattr(tokenizers, "ids_by_transformers", lambda folder: None)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}


@pytest.mark.parametrize("cls", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_ids_are_the_files_own_whatever_class_is_named(tmp_path, plain, no_transformers, cls):
    own = template(plain, f"{BOS} $A", BOS)
    tokenizer = from_hugging_face(hf(tmp_path, own, FAST | {"tokenizer_class": cls}), 500)
    assert tokenizer.encode(TEXT) == own.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.prefix == (0,) and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def unigram(split):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    return tokenizer


def test_a_unigram_file_stays_a_unigram_under_a_llama_class(tmp_path, no_transformers):
    own = unigram(True)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    own.train_from_iterator([TEXT], trainer)
    own = template(own, "<s> $A", "<s>")
    tokenizer = from_hugging_face(hf(tmp_path, own, {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"}), 300)
    assert tokenizer.encode(TEXT) == own.encode(TEXT, add_special_tokens=False).ids and tokenizer.prefix == (1,)


def test_other_ids_of_transformers_are_a_warning_and_the_file_wins(tmp_path, plain, monkeypatch):
    folder = hf(tmp_path, plain, {"tokenizer_class": "Qwen2Tokenizer"})
    monkeypatch.setattr(tokenizers, "ids_by_transformers", lambda folder: [1, 2, 3])
    result = from_hugging_face(folder, 500)
    (warning,) = result.warnings
    assert "transformers reads the tokenizer" in warning and "as Qwen2Tokenizer and gives other ids (3 for" in warning
    assert result.encode("he") == plain.encode("he").ids
    monkeypatch.setattr(tokenizers, "ids_by_transformers", lambda folder: plain.encode(PROBE).ids)
    assert from_hugging_face(folder, 500).warnings == ()


def test_transformers_is_asked_in_a_process_that_sees_tokenizer_files_alone(tmp_path, plain, monkeypatch):
    folder = hf(tmp_path, plain, FAST, config__json='{"use_cache": "yes"}')
    seen = {}

    def run(command, **options):
        seen["files"], seen["modules"] = sorted(path.name for path in Path(command[-1]).iterdir()), command[1:3]
        return subprocess.CompletedProcess(command, *seen.pop("answer"))

    monkeypatch.setattr(transformers_ids.subprocess, "run", run)
    for answer, expected in (((0, b"[1, 2]"), [1, 2]), ((1, b"[1, 2]"), None), ((0, b"no JSON"), None)):
        seen["answer"] = answer
        assert transformers_ids.ids_by_transformers(folder) == expected
    assert seen == {"files": ["tokenizer.json", "tokenizer_config.json"], "modules": ["-m", "weights.transformers_ids"]}


def test_transformers_itself_agrees_on_a_class_that_it_does_not_rebuild(tmp_path, plain):
    pytest.importorskip("transformers")
    own = template(plain, f"{BOS} $A", BOS)
    assert transformers_ids.ids_by_transformers(hf(tmp_path, own, FAST)) == own.encode(PROBE).ids


@pytest.mark.parametrize(
    "single, special, config, prefix",
    [
        (f"{BOS} $A", [BOS], None, (0,)),  # a template that no config names
        (f"{BOS} {EOS} $A", [BOS, EOS], FAST, (0, 1)),
        (f"$A {EOS}", [EOS], FAST | {"bos_token": EOS}, ()),
        (f"{EOS} $A {EOS}", [EOS], FAST | {"bos_token": EOS}, (1,)),
    ],
)
def test_what_stands_before_a_text_is_read_off_the_files_template(tmp_path, plain, single, special, config, prefix):
    tokenizer = from_hugging_face(hf(tmp_path, template(plain, single, *special), config), 500)
    assert tokenizer.prefix == prefix and tokenizer.warnings == ()
    assert tokenizer.encode(BOS + "a") == [0, plain.token_to_id("a")]  # a BOS in the text is the text's


@pytest.mark.parametrize(
    "config, prefix",
    [
        (None, ()),
        (FAST, ()),
        (FAST | {"add_bos_token": True}, (0,)),
        (FAST | {"add_bos_token": True, "bos_token": {"content": BOS, "lstrip": False}}, (0,)),
        (FAST | {"tokenizer_class": "LlamaTokenizerFast"}, (0,)),  # what the class does by default
        (FAST | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, ()),
        ({"add_bos_token": True}, (0,)),  # BOS by special_tokens_map.json
    ],
)
def test_bos_is_the_configs_where_the_file_has_no_template(tmp_path, plain, no_transformers, config, prefix):
    folder = hf(tmp_path, plain, config, special_tokens_map__json=json.dumps({"bos_token": BOS}))
    assert from_hugging_face(folder, 500).prefix == prefix


def test_a_config_that_contradicts_the_files_template_is_a_warning(tmp_path, plain):
    folder = hf(tmp_path, template(plain, f"{BOS} $A", BOS), FAST | {"add_bos_token": False})
    result = from_hugging_face(folder, 500)
    assert result.prefix == (0,) and "says add_bos_token false; tokenizer.json puts special" in result.warnings[0]


def test_cutting_and_padding_that_a_file_asks_for_are_not_done(tmp_path, plain):
    cut = copy.deepcopy(plain)
    cut.enable_truncation(5)
    cut.enable_padding(length=9)
    own = from_hugging_face(hf(tmp_path, cut), 500)
    assert own.encode(TEXT) == plain.encode(TEXT).ids and own.encode("a") == plain.encode("a").ids


def test_ids_that_the_model_has_not_are_refused_or_warned_of(tmp_path, plain):
    with pytest.raises(InputError, match="gives token id 49., expected ids below the model's vocabulary of 400"):
        from_hugging_face(hf(tmp_path, plain), 400)
    more = copy.deepcopy(plain)
    more.add_special_tokens(["<pad>", "<more>"])
    (warning,) = from_hugging_face(hf(tmp_path, more), 500).warnings
    assert "has 2 tokens that the model has not, such as '<pad>'" in warning


def test_code_beside_the_weights_is_never_run(tmp_path, plain):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass Own: pass\n"
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    with pytest.raises(
        UnsupportedError, match="class 'Own' without a tokenizer.json is not supported .its code is not"
    ):
        from_hugging_face(hf(tmp_path / "a", config=config, own__py=code, vocab__txt="a"), 500)
    assert (
        from_hugging_face(hf(tmp_path / "b", plain, config, own__py=code), 500).encode("he") == plain.encode("he").ids
    )
    assert not canary.exists()


def test_vocab_and_merges_are_cut_as_their_class_says(tmp_path):
    tokens, merges = parts(trained(gguf_tokenizers.GPT2))
    files = {"vocab__json": json.dumps({token: i for i, token in enumerate(tokens)})}
    files["merges__txt"] = "\n".join(["#version: 0.2", *merges, ""])
    for cls, name in (("GPT2Tokenizer", "gpt-2"), ("Qwen2Tokenizer", "qwen2")):
        own = from_hugging_face(hf(tmp_path, config={"tokenizer_class": cls}, **files), 700)
        text = PROBE.replace("e\u0301", "é")
        assert (own.encode("e\u0301") == own.encode("é")) is (cls == "Qwen2Tokenizer")
        assert own.encode(text) == from_gguf(gguf(tokens, merges, pre=name), 700).encode(text)
    more = hf(tmp_path, added_tokens__json=json.dumps({"<two>": len(tokens) + 1, "<one>": len(tokens)}))
    assert from_hugging_face(more, 800).encode("<two><one>") == [len(tokens) + 1, len(tokens)]
    with pytest.raises(InputError, match=r"added_tokens.json: token '<two>' has id 3, expected"):
        from_hugging_face(hf(tmp_path, added_tokens__json='{"<two>": 3}'), 800)
    with pytest.raises(UnsupportedError, match="class 'BartTokenizer' without a tokenizer.json is not supported"):
        from_hugging_face(hf(tmp_path, config={"tokenizer_class": "BartTokenizer"}), 800)


@pytest.mark.parametrize(
    "match, files",
    [
        ("has no tokenizer: expected tokenizer.json or tokenizer.model", {}),
        (
            "tokenizer.json cannot be used by the tokenizers library: .data did not match",
            {"tokenizer__json": '{"model": {"type": "BPE2"}}'},
        ),
        (
            "tokenizer.json cannot be used by the tokenizers library: .*recursion",
            {"tokenizer__json": '{"model": ' + "[" * 9999},
        ),
        ("tokenizer.json is not UTF-8 .byte 0", {"tokenizer__json": b"\xff"}),
        ("tokenizer_config.json: not JSON that can be read", {"tokenizer_config__json": '{"a": ' + "[" * 99999}),
        ("tokenizer_config.json: expected a JSON object, got", {"tokenizer_config__json": "[]"}),
        (
            "tokenizer_config.json: tokenizer_class must be text, got 7",
            {"tokenizer_config__json": '{"tokenizer_class": 7}'},
        ),
        ("add_bos_token must be true or false, got 'yes'", {"tokenizer_config__json": '{"add_bos_token": "yes"}'}),
        (
            "eos_token must be text, got True",
            {"tokenizer_config__json": '{"eos_token": true}'},
        ),
        ("bos_token.content must be text, got 1", {"tokenizer_config__json": '{"bos_token": {"content": 1}}'}),
        ("add_special_tokens is no setting", {"tokenizer_config__json": '{"add_special_tokens": true}'}),
        ("special_tokens_map.json: bos_token must be text, got", {"special_tokens_map__json": '{"bos_token": []}'}),
        ("merges.txt cannot be read: No such file", {"vocab__json": '{"a": 0}'}),
        ("merges.txt is not UTF-8 .byte 1", {"vocab__json": '{"a": 0}', "merges__txt": b"a\xff"}),
        ("merges.txt: expected two tokens", {"vocab__json": '{"a": 0}', "merges__txt": "a b"}),
        ("vocab.json: expected a token id for each token", {"vocab__json": '{"a": -1}', "merges__txt": ""}),
        (
            "vocab.json cannot be used by the tokenizers library: .a byte-level vocabulary needs a token for each byte",
            {"vocab__json": '{"a": 0}', "merges__txt": ""},
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, match, files):
    with pytest.raises(InputError, match=match):
        from_hugging_face(hf(tmp_path, **files), 500)


def test_bos_that_is_no_token_and_odd_added_tokens_are_refused(tmp_path, plain):
    with pytest.raises(InputError, match="add_bos_token needs a bos_token of tokenizer.json, got '<nope>'"):
        from_hugging_face(hf(tmp_path, plain, {"add_bos_token": True, "bos_token": "<nope>"}), 500)
    files = {"vocab__json": json.dumps({token: i for i, token in enumerate(BYTES)}), "merges__txt": ""}
    with pytest.raises(InputError, match="added_tokens.json: expected a token id for each token"):
        from_hugging_face(hf(tmp_path / "b", added_tokens__json='{"a": "b"}', **files), 500)


def test_a_post_processor_that_drops_the_text_is_refused(tmp_path, plain):
    whole = json.loads(template(plain, f"{BOS} $A", BOS).to_str())
    del whole["post_processor"]["single"][1]
    with pytest.raises(InputError, match="its post-processor changes the ids of the text itself"):
        from_hugging_face(hf(tmp_path, json.dumps(whole)), 500)


# --- SentencePiece ---


def sentencepiece_model(**options):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {"vocab_size": 420, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2} | options
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in TEXT.split("\n") if line.isascii()] * 3), model_writer=model, **options
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue()), model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # LLaMA's
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nfkc_cf", "byte_fallback": False},
        {"model_type": "bpe", "user_defined_symbols": ["<sep>", "<|x|>"], "normalization_rule_name": "identity"},
        {"model_type": "unigram", "user_defined_symbols": ["<sep>", "<|x|>"]},
    ],
)
def test_a_sentencepiece_model_gives_sentencepieces_ids(tmp_path, options):
    reference, data = sentencepiece_model(**options)
    meta, folder = from_meta(hf(tmp_path, tokenizer__model=data), 500), from_hugging_face(tmp_path, 500)
    for text in [*TEXT.split("\n"), "a<sep>b <|x|><sep> c", " a  b ", "", PROBE]:
        assert meta.encode(text) == folder.encode(text) == reference.encode(text), text
    assert meta.prefix == folder.prefix == (reference.bos_id(),) and meta.prefix_text == "<s>"
    assert meta.encode("x<s>")[-1] == 1
    no_bos = from_hugging_face(hf(tmp_path, config={"add_bos_token": False}), 500)
    assert no_bos.prefix == () and no_bos.warnings == ()


def test_sentencepiece_models_that_are_not_rebuilt_exactly_are_refused_by_name(tmp_path, monkeypatch):
    for options, match in (
        ({"model_type": "char"}, "SentencePiece model with type 4, which is not supported; BPE and unigram are"),
        ({"treat_whitespace_as_suffix": True, "model_type": "bpe"}, "with spaces as suffixes, which is not supported"),
        ({"user_defined_symbols": ["\u2581\u2581"], "model_type": "bpe"}, "BPE model could not be rebuilt exactly"),
    ):
        hf(tmp_path, tokenizer__model=sentencepiece_model(**options)[1])
        with pytest.raises(UnsupportedError, match=match):
            from_meta(tmp_path, 500)


# --- Meta, and one model in three forms ---


def ranked(*words):
    words = [*(bytes([i]) for i in range(256)), *words]
    return "".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))


def test_metas_ranked_tokens_are_llama3s(tmp_path):
    folder = hf(tmp_path / "meta")
    hf(tmp_path, tokenizer__model=ranked(b"he", b"xyz"))  # beside the models, as LLaMA 2 has it
    tokenizer = from_meta(folder, 512)
    text = "<|begin_of_text|>hehx xyz<|eot_id|><|reserved_special_token_245|>"
    assert tokenizer.encode(text) == [258, 256, *b"hx xyz", 258 + 9, 511] and tokenizer.prefix == (258,)
    assert tokenizer.encode("xyz") == [257] and tokenizer.prefix_text == "<|begin_of_text|>"


@pytest.mark.parametrize(
    "match, data",
    [
        ("has no tokenizer: expected tokenizer.model in it or beside it", None),
        (
            "makes at least 312 tokens with the special ones, expected at most 300",
            ranked(*(b"%03d" % i for i in range(45))),
        ),
        ("needs a token for each byte, 1.. are missing", "YQ== 0\n"),
        ("neither a SentencePiece model nor LLaMA 3's ranked tokens", "neither"),
        ("neither a SentencePiece model nor LLaMA 3's ranked tokens", "YQ== 5\n"),
        ("neither a SentencePiece model nor LLaMA 3's ranked tokens", ""),
    ],
)
def test_a_meta_tokenizer_that_cannot_be_used_is_refused(tmp_path, match, data):
    folder = hf(tmp_path / "meta", **({} if data is None else {"tokenizer__model": data}))
    with pytest.raises(InputError, match=match):
        from_meta(folder, 300)


def test_one_model_in_three_forms_gives_the_same_ids(tmp_path):
    """LLaMA 3: Meta's ranks, a Hugging Face tokenizer.json and a GGUF. LLaMA 2: a tokenizer.model and a GGUF."""
    tokens, merges = parts(trained(gguf_tokenizers.LLAMA3, size=700, special=()))
    words = [bytes(BYTES.index(letter) for letter in token) for token in tokens]
    lines = "".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    meta = from_meta(hf(tmp_path / "meta", tokenizer__model=lines), 956)
    special = [meta.backend.id_to_token(i) for i in range(700, 956)]
    metadata = gguf([*tokens, *special], merges, pre="llama-bpe", bos_token_id=700, token_type=[1] * 700 + [3] * 256)
    folder = hf(tmp_path / "hf", meta.backend, {"tokenizer_class": "PreTrainedTokenizerFast"})
    three = [meta, from_gguf(metadata, 956), from_hugging_face(folder, 956)]
    for text in [*TEXT.split("\n"), PROBE, "<|eot_id|>a"]:
        assert len({tuple(all_ids(tokenizer, text)) for tokenizer in three}) == 1, text
    reference, data = sentencepiece_model(
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    ids = range(reference.vocab_size())
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in ids
    ]
    pieces, scores = [reference.id_to_piece(i) for i in ids], [reference.get_score(i) for i in ids]
    two = [from_meta(hf(tmp_path / "meta", tokenizer__model=data), 500)]
    two.append(from_gguf(spm(tokens=pieces, scores=scores, token_type=kinds), 500))
    for text in [*TEXT.split("\n"), PROBE, " a</s> b"]:
        assert all_ids(two[0], text) == all_ids(two[1], text), text


# --- The stored file ---


@pytest.fixture(scope="module")
def llama3():
    tokens, merges = parts(trained(gguf_tokenizers.LLAMA3))
    return from_gguf(gguf(tokens, merges, pre="llama-bpe"), 700)


def test_what_is_written_is_read_back_with_the_same_ids(tmp_path, llama3):
    entry = write_tokenizer(llama3, tmp_path)
    assert entry["file"] == "tokenizer.json" and entry["bytes"] == (tmp_path / "tokenizer.json").stat().st_size
    read = load_tokenizer(tmp_path, json.loads(json.dumps(entry)))
    assert read.prefix == llama3.prefix == (0,) and read.encode(TEXT) == llama3.encode(TEXT)
    assert read.vocab_size == 700 and len(PROBE) > 1700


def test_an_altered_tokenizer_is_refused(tmp_path, llama3, monkeypatch):
    entry = write_tokenizer(llama3, tmp_path)
    for wrong in ({}, None, [], entry | {"bytes": "7"}, entry | {"bytes": True}, entry | {"sha256": None}):
        with pytest.raises(InputError, match="manifest's tokenizer must have file, bytes, sha256, probe_sha256, got"):
            load_tokenizer(tmp_path, wrong)
    with pytest.raises(InputError, match=r"must be tokenizer.json, got '\.\./x'; convert the checkpoint anew"):
        load_tokenizer(tmp_path, entry | {"file": "../x"})
    with pytest.raises(InputError, match="library gives other ids than at the conversion; convert the checkpoint anew"):
        load_tokenizer(tmp_path, entry | {"probe_sha256": "0" * 64})
    data = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data.replace(b"\\p{N}{1,3}", b"\\p{N}{1,4}"))
    with pytest.raises(InputError, match="is not the file that was converted .its size or SHA-256 differs"):
        load_tokenizer(tmp_path, entry)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json cannot be read: No such file"):
        load_tokenizer(tmp_path, entry)
    monkeypatch.setattr(text_tokenizer, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="expected at most 10 of a tokenizer"):
        from_hugging_face(hf(tmp_path, "{} and more than 10"), 500)


def test_loading_imports_neither_transformers_nor_jax():
    code = "import sys, weights.tokenizers; sys.exit(bool({'transformers', 'jax', 'torch', 'sentencepiece'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_only_the_librarys_own_errors_become_input_errors():
    class PanicException(BaseException):  # noqa: N818
        __module__ = "pyo3_runtime"

    def fail(error):
        raise error

    for error in (Exception("odd"), PanicException("odd")):
        with pytest.raises(InputError, match="x.json cannot be used by the tokenizers library: 'odd'"):
            call_library("x.json", fail, error)
    with pytest.raises(KeyboardInterrupt):
        call_library("x.json", fail, KeyboardInterrupt())


# --- Texts ---


def test_decoding_what_was_encoded_gives_10000_random_strings_back(llama3):
    strings = random_strings()
    encoded = llama3.backend.encode_batch(strings, add_special_tokens=False)
    assert [llama3.decode(encoding.ids) for encoding in encoded] == strings


@pytest.mark.parametrize("text", [TEXT * 20, TEXT[:50], "", " " * 9000, "-" * 9000 + TEXT, "ab" * 5000], ids=len)
def test_the_first_ids_are_those_of_the_whole_text(llama3, text):
    whole = llama3.encode(text)
    for needed in (1, 100, 1000):
        assert llama3.encode_first(text, needed) == llama3.encode_first(io.StringIO(text), needed) == whole[:needed]


def test_a_cut_text_ends_in_other_tokens_which_are_not_used(tmp_path, plain):
    chains = [
        "ijklmnopq",
        "abcdefgh",
    ]  # 9 letters, then 8 a token: FIRST_READ's cut is one letter short of a token's end
    steps = [(word[:end], word[end]) for word in chains for end in range(1, len(word))]
    tokens = [*BYTES, *("".join(pair) for pair in steps)]
    letters = from_gguf(gguf(tokens, [" ".join(pair) for pair in steps]), 300)
    text = chains[0] + chains[1] * 500
    groups = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated")  # from a number's end
    own = copy.deepcopy(plain)
    own.pre_tokenizer = pre_tokenizers.Sequence([groups, own.pre_tokenizer])
    own = from_hugging_face(hf(tmp_path, own), 500)
    numbers = " ".join(str(i) * 101 for i in range(1000, 1060))
    for needed in range(2, 200, 9):
        assert letters.encode_first(text, needed) == letters.encode(text)[:needed]
        assert own.encode_first(numbers, needed) == own.encode(numbers)[:needed]


@pytest.mark.parametrize("unit", [" ", "-", "a", "\n", "The cat sat. ", "日"])
def test_a_long_text_is_read_no_further_than_its_first_ids_need(llama3, unit):
    class Endless(io.TextIOBase):
        given = 0

        def read(self, size=-1):
            assert size > 0
            self.given += size
            return (unit * (size // len(unit) + 1))[:size]

    stream, start = Endless(), time.monotonic()
    assert len(llama3.encode_first(stream, 1000)) == 1000
    assert stream.given <= 200_000 and time.monotonic() - start < 5


def test_text_that_is_no_unicode_is_an_input_error(llama3):
    with pytest.raises(InputError, match="the text cannot be used by the tokenizers library"):
        llama3.encode("\ud800")


# --- Hostile files ---

ODD = [None, True, -1, 0, 10**30, 1.5, float("inf"), "", "x" * 50, [], {}, [[[]]], {"a": {"b": []}}, ["a"], [1, "a"]]


def mutated(value, rng):
    """A copy of nested JSON with one part replaced, removed or doubled."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        kind = rng.randrange(3)
        if kind == 0 and isinstance(place, dict):
            del place[key]
        elif kind == 1 and isinstance(place, list):
            place.append(place[key])
        else:
            place[key] = rng.choice(ODD)
        return value


def bent(data, rng):
    """Bytes with a few changed, cut or doubled."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            data[place : place + 1] = [rng.randrange(256)]
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        else:
            data[place:place] = data[place : place + 20]
    return bytes(data)


def accepts_or_refuses(read):
    try:
        result = read()
    except InputError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 900
        return 0
    assert isinstance(result, TextTokenizer) and isinstance(result.prefix_text, str)
    return 1


def test_300_mutations_of_tokenizer_files_end_in_a_tokenizer_or_one_sentence(tmp_path, no_transformers):
    rng = random.Random(7)
    small = template(trained(size=262), f"{BOS} $A", BOS)
    whole = json.loads(small.to_str())
    config = FAST | {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "auto_map": {"AutoTokenizer": [None]},
    }
    model = sentencepiece_model(model_type="bpe", vocab_size=360)[1]
    accepted = 0
    for i in range(300):
        folder = tmp_path / str(i)
        kind = i % 6
        if kind == 0:
            hf(folder, json.dumps(mutated(whole, rng)), config)
        elif kind == 1:
            hf(folder, bent(json.dumps(whole).encode(), rng).decode("latin-1"), config)
        elif kind == 2:
            hf(folder, small, mutated(config, rng), special_tokens_map__json=json.dumps(mutated(config, rng)))
        elif kind == 3:
            hf(folder, tokenizer__model=bent(model, rng))
        elif kind == 4:
            accepted += accepts_or_refuses(lambda: from_gguf(mutated(gguf(), rng), 300))  # noqa: B023
            accepted += accepts_or_refuses(lambda: from_gguf(mutated(spm(), rng), 300))
            continue
        else:
            vocab = mutated({token: i for i, token in enumerate([*BYTES, "he"])}, rng)
            files = {
                "merges__txt": bent(b"#version\nh e\n", rng),
                "added_tokens__json": json.dumps(mutated({"<a>": 257}, rng)),
            }
            hf(folder, vocab__json=json.dumps(vocab), **files)
        accepted += accepts_or_refuses(lambda: from_hugging_face(folder, 500))  # noqa: B023
    assert 20 < accepted < 300
