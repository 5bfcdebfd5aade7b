"""What the run says about quality, against a plain numpy computation from full logits."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import HF_CONFIGS, token_ids

import measure.quality
import measure.search
from attention.sharding import make_mesh
from kascade_core import ANCHOR, DENSE, REUSE, Selection, attended_tiles, density_of, token_nll
from llama_model import Comparison, LlamaConfig, LlamaModel
from measure.layerwise import Calibration
from measure.quality import compare, long_context_loss, run_windows, short_context_nll
from report import console
from report.results import FAILED, NOTHING_DROPPED, SUCCESS, UNDECIDED, LimitCheck, LongContext, Quality

NAME = "gqa_llama3_untied"  # three layers, six query and two KV heads, 61 tokens
SPARSE = {0: (DENSE, None), 1: (ANCHOR, None), 2: (REUSE, 1)}
SELECTION = Selection(tile_size=4, top_k=3)


@pytest.fixture(scope="module")
def setup():
    config = LlamaConfig.from_hf(HF_CONFIGS[NAME])
    model = LlamaModel(config, None, SELECTION)
    windows = [jnp.asarray(ids[None]) for ids in token_ids(NAME)]
    params = jax.jit(model.init)(jax.random.key(0), windows[0])["params"]
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
        logits = stream @ np.asarray(params["params"]["output"], np.float64).T
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
        "se_windows", "error_pct", "interval_pct", "kl", "same_top1", "same_top1_se", "correlation", "rms_dp", "verdict",
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
    """A loss of 5.1 % at a density of 18 %: the search divides it by 2.7, and a little more density by the rest."""
    lines = console.verdict(windows_of(0.05, 0.05, density=0.18), CPU)
    assert "❌ FAILED: degradation +5.13% is not under 2%" in lines[0]
    density = 0.18 * (5.127 / 2.7) ** (1 / 3.4)
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


# --- Tokens that need a long context ---


@pytest.fixture
def short(monkeypatch):
    """Eight tokens for a short context, four losses from each forward, so that the synthetic windows are long."""
    monkeypatch.setattr(measure.quality, "SHORT_CONTEXT", 8)
    monkeypatch.setattr(measure.quality, "STRIDE", 4)


@pytest.mark.parametrize("prefix", [pytest.param(0, marks=pytest.mark.full), 1])
def test_short_context_losses_are_those_of_the_last_tokens_alone(setup, short, prefix):
    model, params, windows, _ = setup
    ids = windows[0]
    nll = short_context_nll(model.compile(params, jnp.zeros((1, prefix + 12), jnp.int32)), params, ids, prefix)
    assert np.isneginf(nll[: prefix + 4 + 8 - 1]).all() and np.isfinite(nll[prefix + 4 + 8 - 1 :]).all()
    forward = jax.jit(model.apply)

    def direct(start, token):
        """The loss of a token after those from `start` on; what fills the text behind them changes nothing."""
        text = np.concatenate([ids[0, :prefix], ids[0, start:token]])
        logits = forward(params, np.pad(text, (0, prefix + 11 - len(text)))[None])
        return token_nll(np.asarray(logits)[0, len(text) - 1], ids[0, token])

    for token in (prefix + 12, prefix + 15, 30, 60):  # the first of all, the last of a piece, one, the last of all
        own = [direct(start, token) for start in range(token - 11, token - 7)]
        assert np.abs(np.array(own) - nll[token - 1]).min() < 1e-4


def test_only_tokens_that_need_the_long_context_count(setup, short, monkeypatch):
    model, params, windows, mesh = setup
    T = windows[0].shape[1]
    short_nll = np.where(np.arange(T - 1) == 40, 3.5, np.where(np.arange(T - 1) == 41, 9.0, 1.5))
    monkeypatch.setattr(measure.quality, "short_context_nll", lambda *_: short_nll)
    dense_nll = np.where(np.arange(T - 1) == 41, 2.5, 1.0)  # the one gains 2.5 nats, the other more, but is hard anyway
    window = Comparison(dense_nll, dense_nll + 0.1, dense_nll, dense_nll > 0)
    found = long_context_loss(model, params, windows, [window, window], 0, mesh)
    assert found.tokens == 2
    assert found.to_json()["dense_perplexity"] == pytest.approx(np.e)
    assert found.to_json()["degradation_pct"] == pytest.approx(100 * np.expm1(0.1))
    assert "over the 2 tokens" in console.long_context(found)


def test_no_token_that_needs_a_long_context_is_said():
    found = LongContext(np.zeros(0), np.zeros(0))
    assert found.to_json() == {"tokens": 0}
    assert "no token" in console.long_context(found)


# --- A limit on the calibration text ---


def test_a_limit_is_kept_by_the_upper_bound_not_by_the_mean():
    check = LimitCheck((0.010, 0.012, 0.005, 0.009))
    se = np.std(check.delta_log_ppl, ddof=1) / 2
    assert check.mean_pct == pytest.approx(100 * np.expm1(0.009))
    assert check.upper_pct == pytest.approx(100 * np.expm1(0.009 + 2.3534 * se), rel=1e-4)
    assert f"held-out calibration windows +0.90%, at most {check.upper_pct:+.2f}%" in console.limit_kept(
        check, windows_of(0.01), 1.5
    )


def test_the_least_dense_schedule_under_a_limit_is_found_on_the_held_out_windows(setup, monkeypatch):
    """Schedules are stood for by their density; the loss is 0.01 / density nats, more or less by window."""
    calibration = Calibration(setup[0], setup[1], setup[2], setup[3])

    def log_perplexities(_, density, windows):
        return np.zeros(len(windows)) if density is None else 0.01 / density * np.linspace(0.8, 1.2, len(windows))

    monkeypatch.setattr(measure.search, "_log_perplexities", log_perplexities)
    density, check = measure.search._least_dense(calibration, float, 0.1, [None] * 5, 5.0)
    upper = np.log1p(0.05) / (1 + 2.1318 * np.std(np.linspace(0.8, 1.2, 5), ddof=1) / np.sqrt(5))
    assert check.upper_pct < 5
    assert 0.01 / upper <= density < 0.01 / upper * 10 ** (1 / 2**6)
