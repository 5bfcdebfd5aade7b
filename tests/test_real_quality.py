"""The null control on the default model: run with `pytest -m real_model` after `python convert_weights.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.sharding import make_mesh
from kascade_core import ANCHOR, DENSE, REUSE, Selection
from llama_model import LlamaModel, load_weights
from measure.machine import configure_device
from measure.quality import compare, run_windows
from measure.settings import DEFAULT_TEXT
from report.results import NOTHING_DROPPED, Quality
from weights.folder import read_manifest
from weights.tokenizers import load_tokenizer

pytestmark = pytest.mark.real_model
TOKENS = 300  # no multiple of a tile


@pytest.mark.parametrize("kernel_dtype", ["float32", "bfloat16"])
def test_a_sparse_run_that_keeps_every_tile_is_the_dense_run(default_weights, kernel_dtype):
    """Whatever differs then is rounding, or an error of the program: every layer but two reuses another's tiles."""
    mesh, dtype = make_mesh(configure_device("cpu")), jnp.dtype(kernel_dtype)
    manifest = read_manifest(default_weights)
    params = load_weights(default_weights, manifest, dtype, mesh)
    tokenizer = load_tokenizer(default_weights, manifest.tokenizer)
    ids = tokenizer.encode(DEFAULT_TEXT.read_text(encoding="utf-8"))[:TOKENS]
    windows = [jnp.asarray([[*tokenizer.prefix, *ids]], jnp.int32)]
    selection = Selection(top_k=TOKENS)
    dense = LlamaModel(manifest.config, None, selection, dtype=dtype)
    layers = range(2, manifest.config.num_hidden_layers)
    sparse = dense.clone(schedule={0: (DENSE, None), 1: (ANCHOR, None)} | dict.fromkeys(layers, (REUSE, 1)))
    outputs = [run_windows(arm.compile(params, windows[0], mesh), params, windows) for arm in (dense, sparse)]
    quality = Quality(compare(dense, params, windows, *outputs, mesh), [1.0] * manifest.config.num_hidden_layers)
    assert quality.verdict == NOTHING_DROPPED
    if dtype == jnp.float32:
        assert np.abs(quality.tokens.kl).max() < 1e-5
        assert quality.same_top1 == 1
        assert quality.degradation_pct == pytest.approx(0, abs=1e-3)
    else:  # half a tile's sums in another order: rounding of 8 bits
        assert quality.kl.mean < 2e-3
        assert quality.same_top1 > 0.97
    jax.clear_caches()
