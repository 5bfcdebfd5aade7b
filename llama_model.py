"""The Flax LLaMA: layers, the loop that hands tiles from anchor to reuse layers, its loss, and its compilation."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

import attention
from attention import decode
from attention.sharding import (
    AXIS,
    ROWS,
    TILES,
    WHOLE,
    Layout,
    compile_ahead,
    gather_keys,
    jit,
    on_first_device,
    pad_axis,
    place,
    shard,
    whole,
)
from attention.xla import matmul
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection, freeze_schedule, tile_count
from weights.config import (
    EMBEDDINGS_CHUNK,
    LlamaConfig,
    RopeFactors,
    RopeScaling,
    chunk_shapes,
    layer_chunk,
    rope_frequencies,
)
from weights.folder import Manifest, read_chunks

__all__ = ["Forward", "LlamaConfig", "LlamaModel", "RopeScaling", "count_parameters", "load_weights"]

# --- Weights ---


def load_weights(
    weights_dir: Path, manifest: Manifest, dtype: Any | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Loads a converted model, every chunk checked against the manifest, one chunk at a time.

    Args:
      weights_dir: the folder that convert_weights.py wrote.
      manifest: that of the folder.
      dtype: what the matrices become on the way to the device (norms become float32); as stored when left out.
      mesh: whose devices each get all of them; the default device alone when left out.

    Returns:
      The variables for `LlamaModel.apply`, {"params": ...}.

    Raises:
      InputError: a chunk is missing, damaged, altered or not what the config says.
    """
    params: dict[str, Any] = {}
    chunks = tqdm(
        read_chunks(weights_dir, manifest), "loading", len(manifest.chunks), unit="chunk", disable=None, leave=False
    )
    for name, chunk in chunks:
        chunk = jax.tree.map(lambda leaf: place(_as_stored(leaf, dtype), mesh), chunk)
        params |= chunk if name == EMBEDDINGS_CHUNK else {name.removesuffix(".pkl"): chunk}
    return {"params": params}


def _as_stored(leaf: np.ndarray, dtype: Any | None) -> np.ndarray:
    """`leaf` in its final dtype, at a multiple of 64 bytes: JAX's CPU devices then share its memory, not copy it."""
    dtype = np.dtype(np.float32 if leaf.ndim == 1 else dtype or leaf.dtype)
    memory = np.empty(math.prod(leaf.shape) * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    stored = memory[start : start + leaf.size * dtype.itemsize].view(dtype).reshape(leaf.shape)
    stored[...] = leaf
    return stored


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- Layers ---

Rope = tuple[
    jax.Array, jax.Array
]  # cos and sin, float32 [B, T, 1, H / 2] each; B is 1 where all sequences share positions

VOCAB_CHUNK = 1024  # tokens of the vocabulary in one product of the loss: its logits are no larger than the MLP's rows
MLP_ROWS = 8192  # tokens that go through the MLP at once, at most: its F columns are the widest array of a layer

_matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def rope_table(config: LlamaConfig, positions_BT: jax.Array, length: jax.Array | int = 0) -> Rope:
    """Cos and sin of every position's angles (RoPE, arXiv 2104.09864), times the scaling's attention factor.

    `length` is that of the sequence so far, for all sequences or for each: it says which of LongRoPE's factors apply.
    """
    scaling, scale = config.rope_scaling, 1.0
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)[None, None]
    if isinstance(scaling, RopeFactors):
        scale = scaling.attention_factor
        long_frequencies = jnp.asarray(rope_frequencies(config, long=True), jnp.float32)[None, None]
        is_long = jnp.asarray(length).reshape(-1, 1, 1) > (scaling.original_max_position_embeddings or 0)
        frequencies = jnp.where(is_long, long_frequencies, frequencies)
    angles = (positions_BT.astype(jnp.float32)[..., None] * frequencies)[:, :, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x_BTNH: jax.Array, rope: Rope | None) -> jax.Array:
    """Rotates the pairs (i, i + H / 2), Hugging Face's order, in float32; None leaves them as they are."""
    if rope is None:
        return x_BTNH
    cos, sin = rope
    low, high = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """X / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv 1910.07467)."""
    x_BTD = x_BTD.astype(jnp.float32)
    weight = weight_D.reshape((1,) * (x_BTD.ndim - 1) + (-1,))
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, axis=-1, keepdims=True) + eps) * weight


def _linear(x_BTD: jax.Array, w_DF: jax.Array, dtype: Any) -> jax.Array:
    """The only dtype decision of a product: inputs in `dtype`, sum and result in float32."""
    x_BTD, w_DF = x_BTD.astype(dtype), w_DF.astype(dtype)
    return matmul("BTD,DF->BTF", _two_rows(x_BTD), w_DF)[:, : x_BTD.shape[1]]


def _two_rows(x_BTD: jax.Array) -> jax.Array:
    """A single bfloat16 row twice: XLA's CPU multiplies one by a matrix eight times slower than two."""
    return jnp.repeat(x_BTD, 2, axis=1) if x_BTD.shape[:2] == (1, 1) and x_BTD.dtype == jnp.bfloat16 else x_BTD


class Attention(nn.Module):
    """The projections of grouped-query attention; what is attended to in between is the block's affair."""

    config: LlamaConfig
    dtype: Any

    def setup(self) -> None:
        for name, shape in chunk_shapes(self.config)[layer_chunk(0)]["attention"].items():
            setattr(self, name, self.param(name, _matrix_init if len(shape) == 2 else nn.initializers.ones, shape))

    def project(self, x_BTD: jax.Array, rope: Rope | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q_BTNH, k_BTKH and v_BTKH of these tokens, q and k after RoPE, if the layer has it."""
        q_BTNH, k_BTKH, v_BTKH = (self._heads(x_BTD, name) for name in "qkv")
        if self.config.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm, self.config.rms_norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm, self.config.rms_norm_eps)
        q_BTNH, k_BTKH = (apply_rope(x, rope).astype(self.dtype) for x in (q_BTNH, k_BTKH))
        return q_BTNH, k_BTKH, v_BTKH.astype(self.dtype)

    def output(self, out_BTNH: jax.Array) -> jax.Array:
        """The heads' results, projected back to [B, T, D], float32."""
        return self._linear(out_BTNH.reshape(*out_BTNH.shape[:2], -1), "o", self.config.output_bias)

    def _heads(self, x_BTD: jax.Array, name: str) -> jax.Array:
        return self._linear(x_BTD, name, self.config.qkv_bias).reshape(*x_BTD.shape[:2], -1, self.config.head_dim)

    def _linear(self, x_BTD: jax.Array, name: str, bias: bool) -> jax.Array:
        out_BTF = _linear(x_BTD, getattr(self, f"w{name}"), self.dtype)
        return out_BTF + getattr(self, f"b{name}")[None, None] if bias else out_BTF


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shapes = chunk_shapes(self.config)[layer_chunk(0)]["feed_forward"]
        w = {name: self.param(name, _matrix_init, shape) for name, shape in shapes.items()}

        def apply(x_BTD: jax.Array) -> jax.Array:
            gate_BTF = nn.silu(_linear(x_BTD, w["w1"], self.dtype))
            return _linear(gate_BTF * _linear(x_BTD, w["w3"], self.dtype), w["w2"], self.dtype)

        B, T, D = x_BTD.shape
        chunks = next(n for n in range(tile_count(T, MLP_ROWS), T + 1) if T % n == 0)
        if chunks == 1:
            return apply(x_BTD)
        x_chunks = x_BTD.reshape(B, chunks, T // chunks, D).swapaxes(0, 1)
        return jax.lax.map(apply, x_chunks).swapaxes(0, 1).reshape(B, T, D)


class Block(nn.Module):
    """One layer: attention as its `plan` says, then the feed-forward, each after its norm and added to the stream.

    The residual stream x_BTD is float32.
    """

    config: LlamaConfig
    plan: LayerPlan
    selection: Selection
    calibrate: bool
    dtype: Any
    kernel: str | None

    def setup(self) -> None:
        D = self.config.hidden_size
        self.attention_norm = self.param("attention_norm", nn.initializers.ones, (D,))
        self.ffn_norm = self.param("ffn_norm", nn.initializers.ones, (D,))
        self.attention = Attention(self.config, self.dtype)
        self.feed_forward = FeedForward(self.config, self.dtype)

    def attend(
        self, x_BTD: jax.Array, rope: Rope, tiles_BKQC: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array | None, KeysValues]:
        """The first half. `tiles_BKQC` is what a REUSE layer attends to.

        Returns:
          The stream, the tiles that this layer chose, and its keys and values of this shard's tokens.
        """
        q_BTNH, k_BTKH, v_BTKH = self.attention.project(self._normed(x_BTD), rope)
        k_BKHS = gather_keys(k_BTKH.transpose(0, 2, 3, 1), 3, layout)
        v_BKSH = gather_keys(v_BTKH.transpose(0, 2, 1, 3), 2, layout)
        sizes = {"layout": layout, "kernel": self.kernel}
        chosen_BKQC = None
        if self.plan.mode == ANCHOR or self.calibrate:
            chosen_BKQC = attention.choose(q_BTNH, k_BKHS, selection=self._selection(), **sizes)
        if self.plan.mode == DENSE:
            out_BTNH = attention.dense(q_BTNH, k_BKHS, v_BKSH, window=self.selection.window, **sizes)
        else:
            tiles_BKQC = self.plan.attended(chosen_BKQC) if self.plan.mode == ANCHOR else tiles_BKQC
            sizes |= {"selection": self.selection, "budgets": self.plan.budgets}
            out_BTNH = attention.reuse(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, **sizes)
        return x_BTD + self.attention.output(out_BTNH), chosen_BKQC, (k_BTKH, v_BTKH)

    def attend_step(
        self, x_B1D: jax.Array, rope: Rope, tiles_BK1C: jax.Array | None, cached: KeysValues, positions_B: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, KeysValues]:
        """The first half for one new token a sequence, whose key and value are written into the cache.

        Returns:
          The stream, the tiles that this layer chose, and the cached k_ZSH and v_ZSH with the new ones.
        """
        q_B1NH, k_B1KH, v_B1KH = self.attention.project(self._normed(x_B1D), rope)
        k_ZSH = write_at(cached[0], k_B1KH[:, 0], positions_B)
        v_ZSH = write_at(cached[1], v_B1KH[:, 0], positions_B)
        q_BNH, chosen_BK1C = q_B1NH[:, 0], None
        if self.plan.mode == ANCHOR:
            chosen_BK1C, scores_ZGS = decode.choose_step(q_BNH, k_ZSH, positions_B, self._selection())
            out_BNH = decode.anchor_step(scores_ZGS, v_ZSH, self.plan.attended(chosen_BK1C), self.selection)
        elif self.plan.mode == REUSE:
            out_BNH = decode.reuse_step(q_BNH, k_ZSH, v_ZSH, positions_B, tiles_BK1C, self.selection, self.kernel)
        else:
            out_BNH = decode.dense_step(q_BNH, k_ZSH, v_ZSH, positions_B, self.selection.window, self.kernel)
        return x_B1D + self.attention.output(out_BNH[:, None]), chosen_BK1C, (k_ZSH, v_ZSH)

    def feed(self, x_BTD: jax.Array) -> jax.Array:
        """The second half."""
        return x_BTD + self.feed_forward(rms_norm(x_BTD, self.ffn_norm, self.config.rms_norm_eps))

    def score(self, x_BTD: jax.Array, rope: Rope, layout: Layout) -> jax.Array:
        """scores_BKQP, the masses that this layer would choose its tiles by."""
        q_BTNH, k_BKHS = self.queries_and_keys(x_BTD, rope, layout)
        return attention.score(q_BTNH, k_BKHS, selection=self.selection, layout=layout)

    def queries_and_keys(self, x_BTD: jax.Array, rope: Rope, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """This shard's q_BTNH and the whole sequence's k_BKHS."""
        q_BTNH, k_BTKH, _ = self.attention.project(self._normed(x_BTD), rope)
        return q_BTNH, gather_keys(k_BTKH.transpose(0, 2, 3, 1), 3, layout)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.attention_norm, self.config.rms_norm_eps)

    def _selection(self) -> Selection:
        if self.plan.largest_budget is None:
            return self.selection
        # A smaller one than the selection keeps anyway is cut afterwards.
        return self.selection.with_top_k(max(self.plan.largest_budget, self.selection.num_kept_tiles))


# --- The cache ---

KeysValues = tuple[jax.Array, jax.Array]  # of one layer


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of every layer, k_ZSH and v_ZSH; S is room for so many tokens.

    Batch and KV heads are one axis, as the products take them: another view of the array would be a copy in each step.
    A step is given the cache away (it is donated) and returns it with the new tokens' keys and values written in place.
    """

    layers: tuple[KeysValues, ...]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> KVCache:
        """Zeros: what is behind a sequence's last token has no weight, but must be finite."""
        shape = (batch * config.num_key_value_heads, size, config.head_dim)
        return cls(tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)))

    @staticmethod
    def bytes_needed(config: LlamaConfig, batch: int, size: int, dtype: Any) -> int:
        """Bytes of a cache of this size."""
        per_layer = 2 * batch * config.num_key_value_heads * size * config.head_dim
        return config.num_hidden_layers * per_layer * jnp.dtype(dtype).itemsize


def write_at(x_ZSH: jax.Array, new_BKH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Writes one row of each sequence at its position; a slice a sequence is written in place, a scatter is slower."""
    B, K, _ = new_BKH.shape
    new_BK1H = new_BKH.astype(x_ZSH.dtype)[:, :, None]
    for b in range(B):
        x_ZSH = jax.lax.dynamic_update_slice(x_ZSH, new_BK1H[b], (b * K, positions_B[b], 0))
    return x_ZSH


# --- The model ---


class Comparison(NamedTuple):
    """Two residual streams' predictions of the same tokens; float32 [B, T], natural logarithms; `same_top1` bool."""

    dense_nll: jax.Array
    sparse_nll: jax.Array
    kl: jax.Array  # sum over the vocabulary of p_dense (log p_dense - log p_sparse)
    same_top1: jax.Array  # whether the likeliest token is the same


class LlamaModel(nn.Module):
    """A LLaMA whose layers attend as `schedule` says.

    `apply(params, ids_BT)` returns float32 logits_BTV. `compile` gives the forward with its loss, over a mesh.

    Attributes:
      config: the model's shape.
      schedule: {layer: (mode, anchor or None)} or a `LayerPlan` for each layer; None is dense throughout. It is
        validated and held as a tuple, so that the module can be hashed (errors: `kascade_core.freeze_schedule`).
      selection: how anchors choose tiles.
      calibrate: dense layers choose tiles as well, and attend to everything all the same.
      dtype: of the inputs of every matrix product; sums, norms, softmax and loss are float32.
      kernel: the implementation of attention, one of `attention.KERNELS`; None is "xla".
    """

    config: LlamaConfig
    schedule: Any = None
    selection: Selection = Selection()
    calibrate: bool = False
    dtype: Any = jnp.float32
    kernel: str | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.selection = dataclasses.replace(self.selection, window=config.sliding_window)
        self.schedule = freeze_schedule(self.schedule, config.num_hidden_layers, config.num_key_value_heads)
        super().__post_init__()

    def setup(self) -> None:
        V, D = self.config.vocab_size, self.config.hidden_size
        self.tok_embeddings = self.param("tok_embeddings", nn.initializers.normal(1.0), (V, D))
        self.norm = self.param("norm", nn.initializers.ones, (D,))
        if not self.config.tie_word_embeddings:
            self.output = self.param("output", _matrix_init, (D, V))
        self.layer = [  # the list gives its modules the names layer_0, layer_1, ...
            Block(self.config, plan, self.selection, self.calibrate, self.dtype, self.kernel) for plan in self.schedule
        ]

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V], for int32 token ids [B, T], on one device."""
        layout = Layout.of(ids_BT.shape[1], self.selection.block)
        x_BTD, _, _ = self.run_layers(pad_axis(ids_BT, 1, layout.padded), layout)
        return self._logits(x_BTD[:, : layout.length])

    def run_layers(
        self, ids_BT: jax.Array, layout: Layout
    ) -> tuple[jax.Array, dict[int, jax.Array], tuple[KeysValues, ...]]:
        """The final, normed stream x_BTD of this shard's tokens, the tiles_BKQC that its layers chose, keys and values.

        Keys and values are each layer's (k_BTKH, v_BTKH) of this shard's tokens.
        """
        rope = rope_table(self.config, layout.local_positions()[None], layout.length)
        x_BTD = self._embed(ids_BT)
        tiles_by_layer: dict[int, jax.Array] = {}
        keys_values = []
        for i, (block, plan) in enumerate(zip(self.layer, self.schedule, strict=True)):
            tiles_BKQC = None if plan.anchor is None else plan.attended(tiles_by_layer[plan.anchor])
            layer_rope = None if i in self.config.no_rope_layers else rope
            x_BTD, chosen_BKQC, layer_keys_values = block.attend(x_BTD, layer_rope, tiles_BKQC, layout)
            x_BTD = block.feed(x_BTD)
            keys_values.append(layer_keys_values)
            if chosen_BKQC is not None:
                tiles_by_layer[i] = chosen_BKQC
        return rms_norm(x_BTD, self.norm, self.config.rms_norm_eps), tiles_by_layer, tuple(keys_values)

    def step(
        self, ids_B: jax.Array, positions_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, dict[int, jax.Array], KVCache]:
        """One new token a sequence: its final, normed stream x_B1D, the tiles_BK1C that anchors chose, the cache."""
        rope = rope_table(self.config, positions_B[:, None], positions_B + 1)
        x_B1D = self._embed(ids_B[:, None])
        tiles_by_layer: dict[int, jax.Array] = {}
        layers = []
        for i, (block, plan) in enumerate(zip(self.layer, self.schedule, strict=True)):
            tiles_BK1C = None if plan.anchor is None else plan.attended(tiles_by_layer[plan.anchor])
            layer_rope = None if i in self.config.no_rope_layers else rope
            x_B1D, chosen_BK1C, cached = block.attend_step(x_B1D, layer_rope, tiles_BK1C, cache.layers[i], positions_B)
            x_B1D = block.feed(x_B1D)
            layers.append(cached)
            if chosen_BK1C is not None:
                tiles_by_layer[i] = chosen_BK1C
        return rms_norm(x_B1D, self.norm, self.config.rms_norm_eps), tiles_by_layer, KVCache(tuple(layers))

    def _embed(self, ids_BT: jax.Array) -> jax.Array:
        """The residual stream before layer 0."""
        if self.tok_embeddings.dtype != jnp.bfloat16:
            return self.tok_embeddings[ids_BT].astype(jnp.float32)
        # XLA's CPU gathers no bfloat16, and would convert the whole table: gathered as integers. The barrier ties the
        # table to the ids, so that a loop of steps does not keep a copy of it in the other type.
        table_VD, ids_BT = jax.lax.optimization_barrier((self.tok_embeddings, ids_BT))
        rows_BTD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)[ids_BT]
        return jax.lax.bitcast_convert_type(rows_BTD, jnp.bfloat16).astype(jnp.float32)

    def decode(self, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        """N steps, the first at `positions_B`. A negative id stands for the likeliest token of the step before."""

        def body(module: LlamaModel, carry: Any, ids_B: jax.Array) -> tuple[Any, Any]:
            cache, positions_B, best_B = carry
            ids_B = jnp.where(ids_B < 0, best_B, ids_B)
            x_B1D, tiles, cache = module.step(ids_B, positions_B, cache)
            best_B = module.likeliest(x_B1D)[:, 0]
            return (cache, positions_B + 1, best_B), (x_B1D[:, 0], best_B, tiles)

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        carry = (cache, positions_B, jnp.zeros_like(positions_B))
        (cache, _, _), (stream, best, tiles) = scan(self, carry, ids_BN)
        return Decoded(stream, best, tiles, cache)

    def likeliest(self, x_BTD: jax.Array) -> jax.Array:
        """int32 [B, T]: the likeliest next token after each, given the final stream; for few tokens."""
        return self._logits(x_BTD).argmax(-1).astype(jnp.int32)

    def next_token_nll(self, x_BTD: jax.Array, next_ids_BT: jax.Array) -> jax.Array:
        """Negative log likelihood of the next ids, float32 nats [B, T], given the final stream; no [T, V] logits.

        The vocabulary is gone through in chunks, with an online log-sum-exp (arXiv 1805.02867).
        """

        def fold(start: jax.Array, size: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return _log_sum_exp(carry, self._logits(x_BTD, start, size))

        shape = next_ids_BT.shape
        top_BT, total_BT = self._fold_vocabulary(fold, (jnp.full(shape, -jnp.inf), jnp.zeros(shape)))
        return top_BT + jnp.log(total_BT) - self._target_logits(x_BTD, next_ids_BT)

    def compare_streams(self, dense_BTD: jax.Array, sparse_BTD: jax.Array, next_ids_BT: jax.Array) -> Comparison:
        """How the predictions of two final, normed streams differ, the vocabulary again in chunks.

        KL(dense || sparse) = sum_v p_dense (logit_dense - logit_sparse) - (lse_dense - lse_sparse).
        """

        def fold(start: jax.Array, size: int, carry: Any) -> Any:
            dense, sparse, shift_BT, best_dense, best_sparse = carry
            a_BTV, b_BTV = self._logits(dense_BTD, start, size), self._logits(sparse_BTD, start, size)
            new_dense, new_sparse = _log_sum_exp(dense, a_BTV), _log_sum_exp(sparse, b_BTV)
            shift_BT = shift_BT * jnp.exp(dense[0] - new_dense[0])
            shift_BT += (jnp.exp(a_BTV - new_dense[0][..., None]) * (a_BTV - b_BTV)).sum(-1)
            best_dense = jnp.where(a_BTV.max(-1) > dense[0], start + a_BTV.argmax(-1), best_dense)
            best_sparse = jnp.where(b_BTV.max(-1) > sparse[0], start + b_BTV.argmax(-1), best_sparse)
            return new_dense, new_sparse, shift_BT, best_dense, best_sparse

        shape = next_ids_BT.shape
        empty, none = (jnp.full(shape, -jnp.inf), jnp.zeros(shape)), jnp.zeros(shape, jnp.int32)
        dense, sparse, shift_BT, best_dense, best_sparse = self._fold_vocabulary(
            fold, (empty, empty, jnp.zeros(shape), none, none)
        )
        lse_dense, lse_sparse = (top_BT + jnp.log(total_BT) for top_BT, total_BT in (dense, sparse))
        return Comparison(
            dense_nll=lse_dense - self._target_logits(dense_BTD, next_ids_BT),
            sparse_nll=lse_sparse - self._target_logits(sparse_BTD, next_ids_BT),
            kl=shift_BT / dense[1] - (lse_dense - lse_sparse),
            same_top1=best_dense == best_sparse,
        )

    def _fold_vocabulary(self, fold: Callable[[Any, int, Any], Any], carry: Any) -> Any:
        """Folds fold(start, size, carry) over chunks of the vocabulary."""
        size = min(VOCAB_CHUNK, self.config.vocab_size)
        whole, rest = divmod(self.config.vocab_size, size)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: fold(i * size, size, carry), carry)
        return fold(jnp.int32(whole * size), rest, carry) if rest else carry

    def _logits(self, x_BTD: jax.Array, start: jax.Array | int = 0, size: int | None = None) -> jax.Array:
        """Those of `size` tokens of the vocabulary from `start` on, or of all."""
        size = self.config.vocab_size if size is None else size
        if self.config.tie_word_embeddings:
            w_VD = jax.lax.dynamic_slice_in_dim(self.tok_embeddings, start, size, axis=0)
            # The table comes first, as it is stored: as the second operand it would be transposed into a copy.
            logits_VBT = matmul("VD,BTD->VBT", w_VD.astype(self.dtype), _two_rows(x_BTD.astype(self.dtype)))
            return logits_VBT.transpose(1, 2, 0)[:, : x_BTD.shape[1]]
        return _linear(x_BTD, jax.lax.dynamic_slice_in_dim(self.output, start, size, axis=1), self.dtype)

    def _target_logits(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """One logit for each token: that of its id."""
        if self.config.tie_word_embeddings:
            return matmul("BTD,BTD->BT", x_BTD.astype(self.dtype), self.tok_embeddings[ids_BT].astype(self.dtype))
        return matmul("BTD,DBT->BT", x_BTD.astype(self.dtype), self.output[:, ids_BT].astype(self.dtype))

    @nn.nowrap
    def compile(self, params: Any, input_ids: jax.Array, mesh: Mesh | None = None, with_cache: bool = False) -> Forward:
        """Compiles the forward with its loss for these shapes.

        Args:
          params: variables, on every device of the mesh.
          input_ids: int32 [B, T], or a `jax.ShapeDtypeStruct`.
          mesh: devices over whose axis query tiles are dealt; without it everything is done on one device.
          with_cache: also returns what `Forward.fill_cache` makes a cache of.
        """
        length, num_shards = input_ids.shape[1], mesh.shape[AXIS] if mesh else 1
        layout = Layout.of(length, self.selection.block, num_shards)
        num_query_tiles = tile_count(length, self.selection.query_tile)

        def local(params: Any, ids_BT: jax.Array, next_ids_BT: jax.Array) -> tuple[Any, Any, Any]:
            x_BTD, tiles, keys_values = self.apply(params, ids_BT, layout, method="run_layers")
            nll_BT = self.apply(params, x_BTD, next_ids_BT, method="next_token_nll")
            return nll_BT, tiles, x_BTD, keys_values if with_cache else None

        sharded = shard(local, mesh, (WHOLE, ROWS, ROWS), (ROWS, TILES, ROWS, ROWS))

        def forward(params: Any, input_ids: jax.Array) -> Output:
            next_ids_BT = jnp.roll(input_ids, -1, axis=1)
            dealt = sharded(params, layout.spread(input_ids, 1), layout.spread(next_ids_BT, 1))
            nll, tiles, x_BTD, keys_values = dealt
            tiles = {layer: layout.collect(chosen, 2)[:, :, :num_query_tiles] for layer, chosen in tiles.items()}
            stream = layout.collect(x_BTD, 1)[:, :length]
            nll, tiles = whole((layout.collect(nll, 1)[:, : length - 1], tiles), mesh)
            return Output(nll, tiles, stream, keys_values)

        start = time.perf_counter()
        program = compile_ahead(forward, (params, input_ids), mesh)
        return Forward(program, time.perf_counter() - start, layout)

    @nn.nowrap
    def compile_decode(self, params: Any, cache: KVCache, num_steps: int, mesh: Mesh | None = None) -> Decoder:
        """Compiles `num_steps` steps on one device, with the cache donated.

        Args:
          params: variables on that device (see `attention.sharding.on_first_device`).
          cache: whose shapes count; `jax.ShapeDtypeStruct` will do.
          num_steps: N.
          mesh: says which platform's options apply.
        """

        def run(params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
            return self.apply(params, ids_BN, positions_B, cache, method="decode")

        batch = cache.layers[0][0].shape[0] // self.config.num_key_value_heads
        ids_BN = jax.ShapeDtypeStruct((batch, num_steps), jnp.int32)
        positions_B = jax.ShapeDtypeStruct((batch,), jnp.int32)
        start = time.perf_counter()
        program = compile_ahead(run, (params, ids_BN, positions_B, cache), mesh, donate=(3,))
        return Decoder(program, time.perf_counter() - start)


def _log_sum_exp(carry: tuple[jax.Array, jax.Array], logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest, sum of exp(. - largest)) of the logits so far, with another chunk's."""
    top_BT, total_BT = carry
    new_top_BT = jnp.maximum(top_BT, logits_BTV.max(-1))
    total_BT *= jnp.exp(top_BT - new_top_BT)
    return new_top_BT, total_BT + jnp.exp(logits_BTV - new_top_BT[..., None]).sum(-1)


class Output(NamedTuple):
    """What a forward returns.

    Attributes:
      nll: float32 nats [B, T - 1], of each token but the first.
      tiles: {layer: tiles_BKQC} that its anchors (or, while calibrating, all layers) chose.
      stream: float32 [B, T, D], the final, normed residual stream, from which every prediction follows.
      keys_values: each layer's (k_BTKH, v_BTKH) in the order of the layout, for `Forward.fill_cache`; None where no
        cache was asked for.
    """

    nll: jax.Array
    tiles: Mapping[int, jax.Array]
    stream: jax.Array
    keys_values: tuple[KeysValues, ...] | None


@dataclasses.dataclass(frozen=True)
class Forward:
    """A compiled forward: call it with (params, input_ids) for an `Output`, without waiting for the device.

    Attributes:
      program: the compiled program.
      seconds: that tracing and compiling took.
      layout: how the sequence was cut.
    """

    program: Any
    seconds: float
    layout: Layout

    def __call__(self, params: Any, input_ids: jax.Array) -> Output:
        return self.program(params, input_ids)

    def fill_cache(self, output: Output, size: int, mesh: Mesh, dtype: Any) -> KVCache:
        """A cache with room for `size` tokens, on the mesh's first device, that holds what a forward computed."""

        def arrange(x_BTKH: jax.Array) -> jax.Array:
            x_BKTH = self.layout.collect(x_BTKH, 1)[:, : self.layout.length].swapaxes(1, 2)
            x_ZTH = x_BKTH.reshape(-1, *x_BKTH.shape[2:]).astype(dtype)
            return pad_axis(x_ZTH, 1, size)

        arranged = jit(arrange, mesh)
        return KVCache(
            tuple(
                tuple(arranged(on_first_device(x_BTKH, mesh)) for x_BTKH in keys_values)
                for keys_values in output.keys_values
            )
        )


class Decoded(NamedTuple):
    """What N steps return.

    Attributes:
      stream: float32 [B, N, D], the final, normed stream of each new token.
      best: int32 [B, N], the likeliest next token after each.
      tiles: {layer: tiles [B, N, K, 1, C]} that its anchors chose.
      cache: with the new tokens in it.
    """

    stream: jax.Array
    best: jax.Array
    tiles: Mapping[int, jax.Array]
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Compiled steps: call with (params, ids_BN, positions_B, cache), all on one device; the cache is given away."""

    program: Any
    seconds: float

    def __call__(self, params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        return self.program(params, ids_BN, positions_B, cache)
