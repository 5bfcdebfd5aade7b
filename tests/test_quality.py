"""What the run says about quality, against a plain numpy computation from full logits."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, token_ids

from attention.sharding import make_mesh
from kascade_core import ANCHOR, DENSE, REUSE, Selection, attended_tiles, density_of
from llama_model import Comparison, LlamaConfig, LlamaModel
from measure.quality import compare, run_windows
from report import console
from report.results import FAILED, NOTHING_DROPPED, SUCCESS, UNDECIDED, Quality

NAME = "gqa_llama3_untied"  # three layers, six query and two KV heads, 61 tokens
SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1)}
SELECTION = Selection(tile_size=4, top_k=3)


@pytest.fixture(scope="module")
def setup():
    config = LlamaConfig.from_hf(HF_CONFIGS[NAME])
    model = LlamaModel(config, None, SELECTION)
    windows = [jnp.asarray(ids[None]) for ids in token_ids(NAME)]
    params = model.init(jax.random.key(0), windows[0])["params"]
    layers = {name: jax.tree.map(lambda x: x * 3, params[name]) for name in params if name.startswith("layer")}
    return model, {"params": params | layers}, windows, make_mesh(jax.devices())


def measured(setup, sparse_model, outputs=None):
    model, params, windows, mesh = setup
    outputs = outputs or run_both(setup, sparse_model)
    tiles = attended_tiles(sparse_model.schedule, outputs[1][0].tiles)
    compared = compare(model, params, windows, *outputs, mesh)
    return Quality(compared, [density_of(chosen) for chosen in tiles.values()])


def run_both(setup, sparse_model):
    model, params, windows, mesh = setup
    return [run_windows(arm.compile(params, windows[0], mesh), params, windows) for arm in (model, sparse_model)]


@pytest.fixture(scope="module")
def outputs(setup):
    return run_both(setup, setup[0].clone(schedule=SPARSE))


@pytest.fixture(scope="module")
def quality(setup, outputs):
    return measured(setup, setup[0].clone(schedule=SPARSE), outputs)


@pytest.fixture(scope="module")
def plain(setup, outputs):
    """Natural log probabilities float64 [windows, T - 1, V] of both arms from full logits, and the right tokens."""
    _, params, windows, _ = setup
    arms = []
    for arm in outputs:
        stream = np.concatenate([output.stream for output in arm])[:, :-1].astype(np.float64)
        logits = stream @ np.asarray(params["params"]["output"], np.float64)
        top = logits.max(-1, keepdims=True)
        arms.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return *arms, np.concatenate(windows)[:, 1:]


def test_perplexities_and_their_change_are_those_of_full_logits(quality, plain):
    dense, sparse, right = plain
    nll = [-np.take_along_axis(arm, right[..., None], -1)[..., 0] for arm in (dense, sparse)]
    change = nll[1] - nll[0]
    assert quality.dense_perplexity == pytest.approx(np.exp(nll[0].mean()), rel=1e-6)
    assert quality.sparse_perplexity == pytest.approx(np.exp(nll[1].mean()), rel=1e-6)
    assert quality.delta_log_ppl == pytest.approx(change.mean(), abs=1e-6)
    assert quality.degradation_pct == pytest.approx(100 * np.expm1(change.mean()), abs=1e-4)
    assert quality.se_tokens == pytest.approx(change.std(ddof=1) / np.sqrt(change.size), abs=1e-6)
    assert quality.se_windows == pytest.approx(abs(change[0].mean() - change[1].mean()) / 2, abs=1e-6)
    low, high = quality.interval_pct  # two windows: Student's t with one degree of freedom
    reach = 12.7062 * quality.se_windows
    assert (low, high) == pytest.approx(tuple(100 * np.expm1([change.mean() - reach, change.mean() + reach])), rel=1e-3)


def test_divergence_agreement_and_probabilities_are_those_of_full_logits(quality, plain):
    """Definitions of llama-perplexity: percentiles interpolate, agreement has the error of a share, RMS of p(right)."""
    dense, sparse, right = plain
    kl = (np.exp(dense) * (dense - sparse)).sum(-1).ravel()
    got = dataclasses.asdict(quality.kl)
    expected = {"mean": kl.mean(), "se": np.sqrt((np.mean(kl**2) - kl.mean() ** 2) / (kl.size - 1)), "max": kl.max()}
    expected |= {"median": np.median(kl)} | {f"p{q}".replace(".", ""): np.percentile(kl, q) for q in (90, 95, 99, 99.9)}
    assert got == pytest.approx(expected, abs=1e-6)
    same = (dense.argmax(-1) == sparse.argmax(-1)).mean()
    assert quality.same_top1 == same
    assert quality.same_top1_se == pytest.approx(np.sqrt(same * (1 - same) / (kl.size - 1)))
    likely = [np.take_along_axis(arm, right[..., None], -1).ravel() for arm in (dense, sparse)]
    assert quality.correlation == pytest.approx(np.corrcoef(*likely)[0, 1], abs=1e-6)
    assert quality.rms_dp == pytest.approx(np.sqrt(np.mean((np.exp(likely[1]) - np.exp(likely[0])) ** 2)), abs=1e-6)


def test_the_report_has_every_statistic_and_the_windows_apart(quality):
    report = quality.to_json()
    assert set(report) == {
        "windows", "tokens", "dense_perplexity", "sparse_perplexity", "degradation_pct", "delta_log_ppl", "se_tokens",
        "se_windows", "interval_pct", "kl", "same_top1", "same_top1_se", "correlation", "rms_dp", "verdict",
        "by_window",
    }  # fmt: skip
    assert (report["windows"], report["tokens"]) == (2, 120)
    assert np.mean([window["delta_log_ppl"] for window in report["by_window"]]) == pytest.approx(quality.delta_log_ppl)


def test_a_sparse_model_that_keeps_every_tile_is_the_dense_model(setup):
    """The null control: whatever then differs is an error of the program."""
    everything = setup[0].clone(schedule=SPARSE, selection=Selection(tile_size=4, top_k=16))
    quality = measured(setup, everything)
    assert quality.verdict == NOTHING_DROPPED
    assert np.abs(quality.tokens.kl).max() < 1e-5
    assert quality.same_top1 == 1
    assert quality.degradation_pct == pytest.approx(0, abs=1e-3)


def test_dropping_tiles_differs_from_the_dense_model(quality):
    """So that the null control could fail."""
    assert quality.kl.mean > 1e-3
    assert quality.same_top1 < 1


# --- The verdict ---


def windows_of(*deltas, noise=0.0, density=0.5):
    """A Quality whose windows lose these many nats a token, each token `noise` more or less in turn."""
    compared = []
    for delta in deltas:
        dense = np.full(100, 3.0)
        sparse = dense + delta + noise * np.tile([1, -1], 50)
        compared.append(Comparison(dense, sparse, np.full(100, 0.01), np.ones(100, bool)))
    return Quality(compared, [1.0, density])


CPU = types.SimpleNamespace(
    scheduler="threshold", device="cpu", selection=Selection(), load_schedule=None, tile_size=16
)


@pytest.mark.parametrize(
    "deltas, noise, verdict",
    [
        ([0.010, 0.012, 0.008], 0.0, SUCCESS),
        ([0.010, 0.030, -0.010], 0.0, UNDECIDED),  # the windows differ
        ([0.010], 0.2, UNDECIDED),  # the tokens differ, and one window has no other error
        ([0.010, 0.010], 0.2, UNDECIDED),  # two windows agree by chance, their tokens do not
        ([0.030, 0.040, 0.020], 0.0, UNDECIDED),
        ([0.050, 0.052, 0.048], 0.0, FAILED),
        ([-0.050, -0.052, -0.048], 0.0, SUCCESS),
        ([np.nan, np.nan], 0.0, FAILED),
        ([np.inf, np.inf], 0.0, FAILED),
    ],
)  # fmt: skip
def test_a_verdict_needs_two_standard_errors(deltas, noise, verdict):
    with np.errstate(invalid="ignore"):
        assert windows_of(*deltas, noise=noise).verdict == verdict


def test_an_undecided_run_says_how_many_windows_could_tell():
    quality = windows_of(0.010, 0.030, -0.010)
    lines = console.verdict(quality, CPU)
    # a standard error of 0.02 / sqrt(3), a distance of log(1.02) - 0.01: 2 x 0.02 / sqrt(n) < 0.0098 from 17 windows on
    assert quality.windows_needed == 17
    assert "3 windows cannot tell whether it is under 2%; about 17 probably could" in lines[0]


def test_a_success_is_said_in_the_guides_words_and_gives_no_advice():
    assert console.verdict(windows_of(0.01, 0.01), CPU) == ["✅✅✅ SUCCESS! <2% degradation achieved!"]


def test_a_failure_says_what_to_try_and_its_density():
    """A loss of 5.1 % at a density of 18 %: the search divides it by 2.6, and a little more density by the rest."""
    lines = console.verdict(windows_of(0.05, 0.05, density=0.18), CPU)
    assert "❌ FAILED: degradation +5.13% is not under 2%" in lines[0]
    density = 0.18 * (5.127 / 2.6) ** (1 / 3.4)
    assert f"--scheduler search --tile_size 8 --query_tile 8 --density {density:.2f}" in lines[1]
    searched = types.SimpleNamespace(**vars(CPU) | {"scheduler": "search", "device": "tpu"})
    more = 0.18 * 5.127 ** (1 / 3.4)
    assert (
        f"--scheduler search --density {more:.2f}" in console.verdict(windows_of(0.05, 0.05, density=0.18), searched)[1]
    )


def test_one_window_has_no_interval_and_says_so_nowhere():
    quality = windows_of(0.01)
    assert quality.se_windows is None and quality.interval_pct is None
    text = console.quality(quality, CPU)
    assert "over 100 tokens" in text and "windows" not in text.split("KL from Dense")[0]
