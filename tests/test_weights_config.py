"""A config is read or refused in one sentence that names the field, what was expected and what was got."""

import dataclasses
import json
import math

import numpy as np
import pytest
from synthetic import HF_CONFIGS, LLAMA3_ROPE, MODELS

from errors import InputError, UnsupportedError
from weights.config import (
    MOST_LAYERS,
    LlamaConfig,
    RopeScaling,
    chunk_shapes,
    layer_chunk,
    param_shapes,
    rope_frequencies,
)
from weights.fields import LARGEST_JSON, Fields, in_file, read_json

HF = HF_CONFIGS["gqa_llama3_untied"]
PLAIN = {key: value for key, value in HF.items() if key != "rope_parameters"}


def test_old_and_new_names_of_the_rope_give_one_config():
    new = LlamaConfig.from_hf(HF)
    old_scaling = {key: value for key, value in LLAMA3_ROPE.items() if key not in ("rope_theta", "rope_type")}
    old = LlamaConfig.from_hf(PLAIN | {"rope_theta": 5e5, "rope_scaling": old_scaling | {"type": "llama3"}})
    assert new == old and new.rope_theta == 5e5 and new.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 16)
    assert LlamaConfig.from_hf(PLAIN | {"rope_scaling": None}).rope_scaling is None


def test_what_old_files_leave_out_or_set_to_null_is_filled_in():
    names = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {name: HF[name] for name in names} | {"hidden_size": 60}
    config = LlamaConfig.from_hf(values)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (6, 10, 10000.0)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (2048, 1e-6, False)
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "architectures")
    assert LlamaConfig.from_hf(values | dict.fromkeys(optional)) == config


def test_a_number_that_is_written_as_text_is_read_where_it_may_be_a_fraction():
    assert LlamaConfig.from_hf(HF | {"rms_norm_eps": "1e-05"}).rms_norm_eps == 1e-5


def test_what_a_family_leaves_out_is_transformers_default():
    mistral = LlamaConfig.from_hf({key: HF[key] for key in ("vocab_size", "intermediate_size")} | {
        "hidden_size": 32, "model_type": "mistral", "num_hidden_layers": 2, "num_attention_heads": 8,
    })  # fmt: skip
    assert (mistral.sliding_window, mistral.num_key_value_heads, mistral.max_position_embeddings) == (4096, 8, 131072)
    assert LlamaConfig.from_hf(HF | {"model_type": "mistral", "sliding_window": None}).sliding_window is None
    windows = {"use_sliding_window": True, "sliding_window": 7}
    for kinds, window in ((["sliding_attention"] * 3, 7), (["full_attention"] * 3, None)):
        assert (
            LlamaConfig.from_hf(HF | windows | {"model_type": "qwen3", "layer_types": kinds}).sliding_window == window
        )
    assert LlamaConfig.from_hf(HF | {"model_type": "smollm3", "num_hidden_layers": 9}).no_rope_layers == (3, 7)
    assert LlamaConfig.from_hf(HF | {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}).no_rope_layers == (1,)


def test_an_original_length_that_is_left_out_is_the_context():
    for kind in ("llama3", "yarn"):
        rope = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
        short = LlamaConfig.from_hf(HF | {"rope_parameters": rope | {"rope_type": kind}})
        whole = rope | {"rope_type": kind, "original_max_position_embeddings": HF["max_position_embeddings"]}
        assert short == LlamaConfig.from_hf(HF | {"rope_parameters": whole})


def test_a_manifest_of_before_biases_and_windows_is_read():
    config = LlamaConfig.from_hf(HF)
    names = ("qkv_bias", "output_bias", "qk_norm", "sliding_window", "no_rope_layers")
    old = {key: value for key, value in dataclasses.asdict(config).items() if key not in names}
    assert LlamaConfig.from_dict(old) == config


def test_a_config_survives_its_dict():
    for config in map(LlamaConfig.from_hf, [*HF_CONFIGS.values(), *MODELS.values()]):
        assert LlamaConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
            "architecture 'Gemma2ForCausalLM'.*; llama, mi",
        ),
        ({"model_type": "mixtral"}, "architecture 'mixtral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "sliding_window=4096 in some layers only .full_attention, s",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported; default, linear"),
    ],
)
def test_what_the_model_does_not_compute_is_refused_by_name(change, match):
    with pytest.raises(UnsupportedError, match=match):
        LlamaConfig.from_hf(HF | change)


WHOLE = "must be a whole number of at least 1, got "
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 5}
SENSELESS = {  # a change -> the sentence
    f"^num_hidden_layers {WHOLE}0$": {"num_hidden_layers": 0},
    f"^num_attention_heads {WHOLE}False$": {"num_attention_heads": False},
    f"^num_key_value_heads {WHOLE}True$": {"num_key_value_heads": True},
    f"^hidden_size {WHOLE}'24'$": {"hidden_size": "24"},
    f"^intermediate_size {WHOLE}None$": {"intermediate_size": None},
    rf"^num_key_value_heads {WHOLE}\[2\]$": {"num_key_value_heads": [2]},
    f"^head_dim {WHOLE}10.5$": {"head_dim": 10.5},
    r"^vocab_size must be a whole number of at most 2147483647, got 10000.*\.\.\. \(401 characters\)$": {
        "vocab_size": 10**400
    },
    f"^num_hidden_layers must be a whole number of at most {MOST_LAYERS}, got 1000000$": {"num_hidden_layers": 10**6},
    "^max_position_embeddings must be .* got a number of about [0-9]{4} digits$": {"max_position_embeddings": 10**5000},
    "^rms_norm_eps must be a number above 0, got nan$": {"rms_norm_eps": math.nan},
    "^rms_norm_eps must be a number above 0, got 'abc'$": {"rms_norm_eps": "abc"},
    "^rms_norm_eps must be a number above 0, got inf$": {"rms_norm_eps": math.inf},
    "^rms_norm_eps must be a number above 0, got 10000.* characters": {"rms_norm_eps": 10**400},
    "^rope_theta must be a number above 0, got True$": {"rope_theta": True, "rope_parameters": None},
    "^rope_parameters.rope_theta must be a number above 0, got -1$": {"rope_parameters": {"rope_theta": -1}},
    "^tie_word_embeddings must be true or false, got 'no'$": {"tie_word_embeddings": "no"},
    "^rope_scaling must be an object, got 'yarn'$": {"rope_scaling": "yarn"},
    "^rope_parameters.rope_type must be text, got 7$": {"rope_parameters": {"rope_type": 7}},
    "^rope_parameters.factor must be a number above 0, got 0$": {"rope_parameters": LLAMA3_ROPE | {"factor": 0}},
    "^low_freq_factor .4.0. must be below high_freq_factor": {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4}},
    "^rope_parameters.low_freq_factor is missing; expected a number above 0$": {
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0}
    },
    "^rope_parameters.factor is missing; expected a number above 0$": {"rope_parameters": {"rope_type": "linear"}},
    "^rope_parameters.long_factor must be a list of 5 numbers above 0, got .1.$": {
        "rope_parameters": LONG | {"long_factor": [1]}
    },
    "^rope_parameters.long_factor must be a number above 0, got .x.$": {
        "rope_parameters": LONG | {"long_factor": [1, 1, 1, 1, "x"]}
    },
    "^no_rope_layers must be a list of whole numbers from 0 to 1, got .2.$": {
        "model_type": "smollm3",
        "no_rope_layers": [2],
    },
    "^no_rope_layers must be a list of 3 numbers, one for each layer, got .1.$": {
        "model_type": "smollm3",
        "no_rope_layers": [1],
    },
    "^layer_types must be a list of texts, got 7$": {"model_type": "mistral", "layer_types": 7},
    "^architectures must be a list of texts, got {'a': 1}$": {"architectures": {"a": 1}},
    "^architectures must be a list of texts, got .7.$": {"architectures": [7]},
    "^model_type must be text, got .'llama'.$": {"model_type": ["llama"]},
    "^hidden_act must be text of at most 1000 characters, got 'xxx": {"hidden_act": "x" * 10**6},
    "^head_dim must be even for RoPE, got 7$": {"head_dim": 7},
    r"^num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)$": {"num_key_value_heads": 4},
    r"^hidden_size \(25\) must be a multiple of num_attention_heads \(6\), or have head_dim$": {
        "hidden_size": 25,
        "head_dim": None,
    },
}


@pytest.mark.parametrize("match", SENSELESS)
def test_a_senseless_value_is_named_with_what_was_expected(match):
    with pytest.raises(InputError, match=match) as caught:
        LlamaConfig.from_hf(HF | SENSELESS[match])
    assert not isinstance(caught.value, UnsupportedError) and len(str(caught.value)) < 400


def test_a_missing_field_is_named_as_the_file_calls_it():
    without = {key: value for key, value in HF.items() if key != "vocab_size"}
    with pytest.raises(InputError, match="^vocab_size is missing; expected a whole number of at least 1$"):
        LlamaConfig.from_hf(without)
    with pytest.raises(InputError, match="^llama.vocab is missing"):
        LlamaConfig.from_hf(without, {"vocab_size": "llama.vocab"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"colour": 3}, r"unknown fields \['colour'\]; known are vocab_size, "),
        ({"rope_scaling": {"colour": 3}}, r"RopeScaling has unknown fields \['colour'\]"),
        ({"rope_scaling": 7}, "rope_scaling must be an object, got 7"),
        ({"hidden_size": 10**12}, "hidden_size must be a whole number of at most 2147483647"),
        ({"rope_scaling": {"factor": 2.0}}, "RopeScaling: low_freq_factor is missing"),
        ({"rope_scaling": {"factors": [1.0]}}, "expected 5 RoPE factors, got 1"),
        ({"rope_scaling": {"factors": [1.0, 0.0]}}, "rope_scaling.factors must be a number above 0, got 0.0"),
        ({"no_rope_layers": [3]}, "no_rope_layers must be a list of whole numbers from 0 to 2, got .3."),
    ],
)
def test_a_dict_that_is_no_config_is_refused(change, match):
    with pytest.raises(InputError, match=match):
        LlamaConfig.from_dict(dataclasses.asdict(LlamaConfig.from_hf(HF)) | change)
    with pytest.raises(InputError, match="LlamaConfig: hidden_size is missing"):
        LlamaConfig.from_dict({"vocab_size": 3})


def test_chunks_hold_every_array_once_by_its_shape():
    config = LlamaConfig.from_hf(HF)
    shapes = chunk_shapes(config)
    assert list(shapes) == ["embeddings.pkl", "layer_0.pkl", "layer_1.pkl", "layer_2.pkl"]
    assert shapes["embeddings.pkl"] == {"tok_embeddings": (50, 24), "norm": (24,), "output": (24, 50)}
    assert shapes[layer_chunk(1)]["attention"] == {"wq": (24, 60), "wk": (24, 20), "wv": (24, 20), "wo": (60, 24)}
    in_memory = param_shapes(config)
    assert in_memory[layer_chunk(1)]["attention"] == {"wq": (60, 24), "wk": (20, 24), "wv": (20, 24), "wo": (24, 60)}
    assert in_memory["embeddings.pkl"] == shapes["embeddings.pkl"] | {
        "output": shapes["embeddings.pkl"]["output"][::-1]
    }
    assert "output" not in chunk_shapes(dataclasses.replace(config, tie_word_embeddings=True))["embeddings.pkl"]


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    config = LlamaConfig.from_hf(HF | {"head_dim": 20})
    plain, scaled = rope_frequencies(dataclasses.replace(config, rope_scaling=None)), rope_frequencies(config)
    turns = 16 * plain / (2 * np.pi)  # over the original 16 positions
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 4)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    assert (turns < 1).any() and plain[0] == 1.0


# --- JSON files ---


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "config.json: not JSON"),
        (b"", "config.json: not JSON"),
        (b"[1]", r"config.json: expected a JSON object, got \[1\]"),
        (b'{"a": "\xff"}', "config.json: not UTF-8 text .byte 7 is 0xff"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "config.json: a number of more than 4,300 digits"),
        (b'{"a":' + b"[" * 200_000, "config.json: not JSON that can be read: its lists or objects stand too deep"),
        (b" " * (LARGEST_JSON + 1), "config.json: [0-9]+ bytes, expected a JSON file of at most"),
    ],
    ids=["cut", "empty", "list", "latin", "digits", "deep", "large"],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_json(tmp_path / "config.json")


def test_the_file_is_named_whatever_the_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.json cannot be read \(No such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(UnsupportedError, match="^config.json: hidden_act='x' is not supported"), in_file("config.json"):
        LlamaConfig.from_hf(HF | {"hidden_act": "x"})
    with pytest.raises(InputError, match="^config.json: a.b must be an object, got 3$"), in_file("config.json"):
        Fields({"a": {"b": 3}}).within("a").within("b")
