"""The layers of a LLaMA: rotary embeddings, norms, grouped-query attention, the feed-forward, and the block of them.

Letters as in kascade_core.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import attention
from attention import decode
from attention.model_axis import ModelShards
from attention.sharding import Layout, gather_keys
from attention.xla import matmul
from kascade_core import ANCHOR, DENSE, LayerPlan, Selection, tile_count
from network.cache import KeysValues, write_at
from weights.config import LlamaConfig, RopeFactors, layer_chunk, param_shapes, rope_frequencies

Rope = tuple[
    jax.Array, jax.Array
]  # cos and sin, float32 [B, T, 1, H / 2] each; B is 1 where all sequences share positions

# Tokens that go through the MLP at once, at most: its F columns are the widest array of a layer. A CPU has an allocator
# that gives large arrays back and pays for their pages anew in each layer.
MLP_ROWS, CPU_MLP_ROWS = 8192, 1024

matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


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


def linear(x_BTD: jax.Array, w_FD: jax.Array, dtype: Any) -> jax.Array:
    """The only dtype decision of a product: inputs in `dtype`, sum and result in float32."""
    rows_RD = x_BTD.astype(dtype).reshape(-1, x_BTD.shape[-1])  # with three axes XLA's CPU compiler would transpose w
    w_FD = w_FD.astype(dtype)
    if len(rows_RD) == 1:  # the matrix first, to be read as it lies: as the second operand it would be packed before
        return matmul("FD,DR->FR", w_FD, two_columns(rows_RD.T))[:, 0].reshape(*x_BTD.shape[:-1], -1)
    return matmul("RD,FD->RF", rows_RD, w_FD).reshape(*x_BTD.shape[:-1], -1)


def two_columns(x_DR: jax.Array) -> jax.Array:
    """A single bfloat16 row twice: XLA's CPU multiplies one by a matrix several times slower than two."""
    return jnp.repeat(x_DR, 2, axis=1) if x_DR.dtype == jnp.bfloat16 else x_DR


class Attention(nn.Module):
    """The projections of grouped-query attention; what is attended to in between is the block's affair."""

    config: LlamaConfig
    dtype: Any
    shards: ModelShards

    def setup(self) -> None:
        for name, shape in param_shapes(self.shards.local)[layer_chunk(0)]["attention"].items():
            setattr(self, name, self.param(name, matrix_init if len(shape) == 2 else nn.initializers.ones, shape))

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
        out_BTD = self.shards.sum(linear(out_BTNH.reshape(*out_BTNH.shape[:2], -1), self.wo, self.dtype))
        return out_BTD + self.bo[None, None] if self.config.output_bias else out_BTD

    def _heads(self, x_BTD: jax.Array, name: str) -> jax.Array:
        out_BTF = linear(x_BTD, getattr(self, f"w{name}"), self.dtype)
        if self.config.qkv_bias:
            out_BTF += getattr(self, f"b{name}")[None, None]
        return out_BTF.reshape(*x_BTD.shape[:2], -1, self.config.head_dim)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    dtype: Any
    shards: ModelShards

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shapes = param_shapes(self.shards.local)[layer_chunk(0)]["feed_forward"]
        w = {name: self.param(name, matrix_init, shape) for name, shape in shapes.items()}

        def apply(x_BTD: jax.Array) -> jax.Array:
            gate_BTF = nn.silu(linear(x_BTD, w["w1"], self.dtype))
            return linear(gate_BTF * linear(x_BTD, w["w3"], self.dtype), w["w2"], self.dtype)

        def apply_in_chunks(x_BTD: jax.Array, rows: int) -> jax.Array:
            B, T, D = x_BTD.shape
            chunks = next(n for n in range(tile_count(T, rows), T + 1) if T % n == 0)
            if chunks == 1:
                return apply(x_BTD)
            x_chunks = x_BTD.reshape(B, chunks, T // chunks, D).swapaxes(0, 1)
            return jax.lax.map(apply, x_chunks).swapaxes(0, 1).reshape(B, T, D)

        if x_BTD.shape[1] <= CPU_MLP_ROWS:
            return self.shards.sum(apply(x_BTD))
        by_platform = {"cpu": CPU_MLP_ROWS, "default": MLP_ROWS}
        branches = {name: functools.partial(apply_in_chunks, rows=rows) for name, rows in by_platform.items()}
        return self.shards.sum(jax.lax.platform_dependent(x_BTD, **branches))


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
    shards: ModelShards | None = None

    def setup(self) -> None:
        D, shards = self.config.hidden_size, self._shards()
        self.attention_norm = self.param("attention_norm", nn.initializers.ones, (D,))
        self.ffn_norm = self.param("ffn_norm", nn.initializers.ones, (D,))
        self.attention = Attention(self.config, self.dtype, shards)
        self.feed_forward = FeedForward(self.dtype, shards)

    def attend(
        self, x_BTD: jax.Array, rope: Rope, tiles_BKQC: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array | None, KeysValues]:
        """The first half. `tiles_BKQC` is what a REUSE layer attends to: head map and budgets have been applied.

        Returns:
          The stream, the tiles that this layer chose, and its keys and values of this shard's tokens.
        """
        q_BTNH, k_BTKH, v_BTKH = self.attention.project(self._normed(x_BTD), rope)
        k_BKHS = gather_keys(k_BTKH.transpose(0, 2, 3, 1), 3, layout)
        v_BKSH = gather_keys(v_BTKH.transpose(0, 2, 1, 3), 2, layout)
        sizes, shards = {"layout": layout, "kernel": self.kernel}, self._shards()
        chosen_BKQC = None
        if self.plan.mode == ANCHOR or self.calibrate:
            groups_BTNH = shards.whole_groups(q_BTNH, 2)
            chosen_BKQC = attention.choose(groups_BTNH, k_BKHS, selection=self.choice(), **sizes)
        if self.plan.mode == DENSE:
            out_BTNH = attention.dense(q_BTNH, k_BKHS, v_BKSH, window=self.selection.window, **sizes)
        else:
            tiles_BKQC = shards.cut(chosen_BKQC, self.plan.budgets) if self.plan.mode == ANCHOR else tiles_BKQC
            budgets = self.plan.budgets if shards.num_shards == 1 else None  # elsewhere they differ by shard
            sizes |= {"selection": self.selection, "budgets": budgets}
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
        k_ZSH, v_ZSH = write_at(cached, (k_B1KH[:, 0], v_B1KH[:, 0]), positions_B)
        q_BNH, shards = q_B1NH[:, 0], self._shards()
        chosen_BK1C = products_ZSG = None
        if self.plan.mode == ANCHOR:
            groups_BNH, options = shards.whole_groups(q_BNH, 1), (self.choice(), self.kernel)
            chosen_BK1C, products_ZSG = decode.choose_step(groups_BNH, k_ZSH, positions_B, *options)
            tiles_BK1C = shards.cut(chosen_BK1C, self.plan.budgets)
        if self.plan.mode == DENSE:
            out_BNH = decode.dense_step(q_BNH, k_ZSH, v_ZSH, positions_B, self.selection.window, self.kernel)
        elif products_ZSG is None:
            out_BNH = decode.reuse_step(q_BNH, k_ZSH, v_ZSH, positions_B, tiles_BK1C, self.selection, self.kernel)
        else:
            out_BNH = decode.anchor_step(shards.own_parts(products_ZSG), v_ZSH, positions_B, tiles_BK1C, self.selection)
        return x_B1D + self.attention.output(out_BNH[:, None]), chosen_BK1C, (k_ZSH, v_ZSH)

    def feed(self, x_BTD: jax.Array) -> jax.Array:
        """The second half."""
        return x_BTD + self.feed_forward(rms_norm(x_BTD, self.ffn_norm, self.config.rms_norm_eps))

    def score(self, x_BTD: jax.Array, rope: Rope, layout: Layout) -> jax.Array:
        """scores_BKQP, the masses that this layer would choose its tiles by."""
        q_BTNH, k_BKHS = self.queries_and_keys(x_BTD, rope, layout)
        groups_BTNH = self._shards().whole_groups(q_BTNH, 2)
        return attention.score(groups_BTNH, k_BKHS, selection=self.selection, layout=layout)

    def queries_and_keys(self, x_BTD: jax.Array, rope: Rope, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """This shard's q_BTNH and the whole sequence's k_BKHS."""
        q_BTNH, k_BTKH, _ = self.attention.project(self._normed(x_BTD), rope)
        return q_BTNH, gather_keys(k_BTKH.transpose(0, 2, 3, 1), 3, layout)

    def _shards(self) -> ModelShards:
        return self.shards or ModelShards(self.config)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.attention_norm, self.config.rms_norm_eps)

    def choice(self) -> Selection:
        """How this layer chooses tiles: as many as it and the layers that reuse them attend to."""
        if self.plan.largest_budget is None:
            return self.selection
        # A smaller one than the selection keeps anyway is cut afterwards.
        return self.selection.with_top_k(max(self.plan.largest_budget, self.selection.num_kept_tiles))
