"""The Flax LLaMA: loading, layers, and the loop that hands tiles from anchor to reuse layer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from kascade_core import ANCHOR, DENSE, EXACT, LayerPlan, Selection, freeze_schedule
from kascade_kernels import choose_tiles, dense_attention, gather_keys, matmul, reuse_attention, score_tiles
from kascade_layout import Layout, pad_axis, tile_count
from weights.config import EMBEDDINGS_CHUNK, LlamaConfig, chunk_shapes, layer_chunk, rope_frequencies
from weights.folder import Manifest, numpy_dtype, read_chunks, read_manifest

# --- Weights ---


def load_weights(
    weights_dir: Path, dtype: Any | None = None, mesh: Mesh | None = None
) -> tuple[Manifest, dict[str, Any]]:
    """Loads a converted model, every chunk checked against the manifest.

    Args:
      weights_dir: the folder that convert_weights.py wrote.
      dtype: what the matrices become on the way to the device (norms become float32); as stored when left out.
      mesh: whose devices each get all of them; the default device alone when left out.

    Returns:
      The manifest, and the variables for `LlamaModel.apply`, {"params": ...}.

    Raises:
      InputError: the folder, its manifest or a chunk is missing, damaged, altered or not what the config says.
    """
    manifest = read_manifest(weights_dir)
    params: dict[str, Any] = {}
    chunks, total = read_chunks(weights_dir, manifest), len(manifest.chunks)
    for name, chunk in tqdm(chunks, desc="loading", total=total, unit="chunk", disable=None, leave=False):
        chunk = jax.tree.map(lambda leaf: _place(leaf, dtype or numpy_dtype(manifest.dtype), mesh), chunk)
        params |= chunk if name == EMBEDDINGS_CHUNK else {name.removesuffix(".pkl"): chunk}
    return manifest, {"params": params}


def _place(leaf: np.ndarray, dtype: Any, mesh: Mesh | None) -> jax.Array:
    placed = _aligned_empty(leaf.shape, np.dtype(np.float32 if leaf.ndim == 1 else dtype))
    placed[...] = leaf
    return jax.device_put(placed, NamedSharding(mesh, PartitionSpec()) if mesh else None)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: JAX's CPU devices then share its memory instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- The model ---


def rope_table(config: LlamaConfig, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cos and sin of every position's angles, float32 [T, 1, H / 2] each."""
    angles = positions_T.astype(jnp.float32)[:, None, None] * jnp.asarray(rope_frequencies(config), jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H / 2), Hugging Face's order, in float32."""
    cos, sin = rope
    low, high = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """X / sqrt(mean(x^2) + eps) * weight, in float32 (arXiv 1910.07467)."""
    x_BTD = x_BTD.astype(jnp.float32)
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, axis=-1, keepdims=True) + eps) * weight_D


def _linear(x_BTD: jax.Array, w_DF: jax.Array, dtype: Any) -> jax.Array:
    """The only dtype decision of a product: inputs in `dtype`, sum and result in float32."""
    return matmul("BTD,DF->BTF", x_BTD.astype(dtype), w_DF.astype(dtype))


VOCAB_CHUNK = 1024  # tokens of the vocabulary in one product of the loss: its logits are no larger than the MLP's rows

MLP_ROWS = 8192  # tokens that go through the MLP at once, at most: its F columns are the widest array of a layer

_matrix_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Attention(nn.Module):
    """Grouped-query attention that attends as its `plan` says.

    `__call__(x_BTD, rope, tiles_BKQC, layout)` returns out_BTD (float32) and the tiles it chose, None unless it is an
    anchor or calibrates; `tiles_BKQC` are those of the anchor that a REUSE layer names, in the anchor's head order.
    """

    config: LlamaConfig
    plan: LayerPlan
    selection: Selection
    calibrate: bool
    dtype: Any
    kernel: str | None

    def setup(self) -> None:
        for name, shape in chunk_shapes(self.config)[layer_chunk(0)]["attention"].items():
            setattr(self, name, self.param(name, _matrix_init, shape))

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], tiles_BKQC: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array | None]:
        q_BTNH, k_BKHS = self.queries_and_keys(x_BTD, rope, layout)
        v_BTKH = self._heads(x_BTD, self.wv).astype(self.dtype)
        v_BKSH = gather_keys(v_BTKH.transpose(0, 2, 1, 3), 2, layout)
        out_BTNH, chosen_BKQC = self._attend(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, layout)
        if chosen_BKQC is not None:
            self.sow("kascade", "tiles", chosen_BKQC, reduce_fn=lambda _, new: new)
        return _linear(out_BTNH.reshape(*x_BTD.shape[:2], -1), self.wo, self.dtype), chosen_BKQC

    def _heads(self, x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
        return _linear(x_BTD, w_DF, self.dtype).reshape(*x_BTD.shape[:2], -1, self.config.head_dim)

    def queries_and_keys(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], layout: Layout
    ) -> tuple[jax.Array, jax.Array]:
        """This shard's q_BTNH and the whole sequence's k_BKHS, after RoPE."""
        q_BTNH = apply_rope(self._heads(x_BTD, self.wq), rope).astype(self.dtype)
        k_BTKH = apply_rope(self._heads(x_BTD, self.wk), rope).astype(self.dtype)
        return q_BTNH, gather_keys(k_BTKH.transpose(0, 2, 3, 1), 3, layout)

    def _attend(
        self,
        q_BTNH: jax.Array,
        k_BKHS: jax.Array,
        v_BKSH: jax.Array,
        tiles_BKQC: jax.Array | None,
        layout: Layout,
    ) -> tuple[jax.Array, jax.Array | None]:
        plan, where = self.plan, {"layout": layout, "implementation": self.kernel}
        chosen_BKQC = None
        if plan.mode == ANCHOR or self.calibrate:
            budget = {} if plan.keep is None else {"top_k": plan.keep, "density": None, "ranked": True}
            selection = dataclasses.replace(self.selection, **budget)
            chosen_BKQC = choose_tiles(q_BTNH, k_BKHS, selection=selection, **where)
        if plan.mode == DENSE:
            return dense_attention(q_BTNH, k_BKHS, v_BKSH, **where), chosen_BKQC
        tiles_BKQC = chosen_BKQC if plan.mode == ANCHOR else tiles_BKQC[:, jnp.array(plan.head_map)]
        budgets = {"selection": self.selection, "budgets": plan.budgets}
        return reuse_attention(q_BTNH, k_BKHS, v_BKSH, tiles_BKQC, **budgets, **where), chosen_BKQC


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
        x_JBRD = x_BTD.reshape(B, chunks, T // chunks, D).swapaxes(0, 1)
        return jax.lax.map(apply, x_JBRD).swapaxes(0, 1).reshape(B, T, D)


class Block(nn.Module):
    """One layer: attention and feed-forward, each after its norm and added to the residual stream (float32)."""

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
        self.attention = Attention(self.config, self.plan, self.selection, self.calibrate, self.dtype, self.kernel)
        self.feed_forward = FeedForward(self.config, self.dtype)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], tiles_BKQC: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array | None]:
        x_BTD, chosen_BKQC = self.attend(x_BTD, rope, tiles_BKQC, layout)
        return x_BTD + self.feed_forward(rms_norm(x_BTD, self.ffn_norm, self.config.rms_norm_eps)), chosen_BKQC

    def attend(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], tiles_BKQC: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, jax.Array | None]:
        """The layer's first half."""
        normed_BTD = rms_norm(x_BTD, self.attention_norm, self.config.rms_norm_eps)
        out_BTD, chosen_BKQC = self.attention(normed_BTD, rope, tiles_BKQC, layout)
        return x_BTD + out_BTD, chosen_BKQC

    def score(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], layout: Layout) -> jax.Array:
        """Scores_BKQP, the masses that this layer would choose its tiles by."""
        queries_and_keys = self.queries_and_keys(x_BTD, rope, layout)
        return score_tiles(*queries_and_keys, selection=self.selection, layout=layout)

    def queries_and_keys(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], layout: Layout
    ) -> tuple[jax.Array, jax.Array]:
        """Those of this layer's attention (see `Attention`)."""
        normed_BTD = rms_norm(x_BTD, self.attention_norm, self.config.rms_norm_eps)
        return self.attention.queries_and_keys(normed_BTD, rope, layout)


class LlamaModel(nn.Module):
    """A LLaMA whose layers attend as `schedule` says: {layer: (mode, anchor[, head_map[, budgets]])}, None: densely.

    `apply(params, ids_BT)` returns float32 logits_BTV; with `mutable=["kascade"]` also the tiles that the anchors
    chose, which `kascade_core.publish_tiles` puts into KASCADE_CACHE. The schedule is validated and frozen, so that
    the module can be hashed (see `kascade_core.freeze_schedule` for its errors).

    `next_token_nll` works on one shard's part of a sequence; `kascade_core.compile_forward` cuts a sequence into such
    parts and puts the results together.

    Attributes:
      config: the model's shape.
      schedule: as above; held as a tuple of `LayerPlan`.
      tile_size: tokens in a tile, at least 1.
      top_k: tiles that an anchor keeps per query tile and KV head, at least 1.
      sink_tiles: the sequence's first tiles, kept by every anchor whatever their mass; they count among the top_k.
      query_tile: tokens that share one choice of tiles, a multiple or divisor of tile_size; tile_size when left out.
      local_tiles: key tiles before a query tile's own, kept likewise.
      density: instead of top_k, the share of the causal key tiles that an anchor keeps.
      anchor_scoring: "exact", or "fast" from a few rows of each query tile (see `kascade_core.Selection`).
      calibrate: dense layers choose and sow tiles as well, and attend to everything all the same.
      dtype: of the inputs of every matrix product; sums, norms, softmax and loss are float32.
      kernel: the implementation of attention, one of `kascade_kernels.IMPLEMENTATIONS`; None is the first.
      layout: how the sequence is cut; None, for `__call__` alone, leaves it whole.
    """

    config: LlamaConfig
    schedule: Any = None
    tile_size: int = 16
    top_k: int = 12
    sink_tiles: int = 0
    query_tile: int | None = None
    local_tiles: int = 0
    density: float | None = None
    anchor_scoring: str = EXACT
    calibrate: bool = False
    dtype: Any = jnp.float32
    kernel: str | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        config = self.config
        sizes = {name: getattr(self, name) for name in ("tile_size", "top_k", "sink_tiles", "local_tiles", "density")}
        self.selection = Selection(**sizes, query_tile=self.query_tile, scoring=self.anchor_scoring)
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
        x_BTD = self._residual_stream(pad_axis(ids_BT, 1, layout.padded), layout)
        return self._logits(x_BTD[:, : layout.length])

    def next_token_nll(self, ids_BT: jax.Array, next_ids_BT: jax.Array) -> jax.Array:
        """Negative log likelihood of this shard's next ids, float32 nats [B, T]; never holds [T, V] logits.

        The vocabulary is gone through in chunks, with an online log-sum-exp (arXiv 1805.02867).
        """
        x_BTD = self._residual_stream(ids_BT, self.layout)

        def fold(start: jax.Array, size: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            top_BT, total_BT = carry
            logits_BTV = self._logits(x_BTD, start, size)
            new_top_BT = jnp.maximum(top_BT, logits_BTV.max(-1))
            total_BT *= jnp.exp(top_BT - new_top_BT)
            return new_top_BT, total_BT + jnp.exp(logits_BTV - new_top_BT[..., None]).sum(-1)

        size = min(VOCAB_CHUNK, self.config.vocab_size)
        whole, rest = divmod(self.config.vocab_size, size)
        carry = (jnp.full(ids_BT.shape, -jnp.inf), jnp.zeros(ids_BT.shape))
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: fold(i * size, size, carry), carry)
        top_BT, total_BT = fold(whole * size, rest, carry) if rest else carry
        return top_BT + jnp.log(total_BT) - self._target_logits(x_BTD, next_ids_BT)

    def _residual_stream(self, ids_BT: jax.Array, layout: Layout) -> jax.Array:
        rope = rope_table(self.config, layout.local_positions())
        x_BTD = self.tok_embeddings[ids_BT].astype(jnp.float32)
        tiles_by_layer: dict[int, jax.Array] = {}
        for i, (block, plan) in enumerate(zip(self.layer, self.schedule, strict=True)):
            x_BTD, chosen_BKQC = block(x_BTD, rope, tiles_by_layer.get(plan.anchor), layout)
            if chosen_BKQC is not None:
                tiles_by_layer[i] = chosen_BKQC
        return rms_norm(x_BTD, self.norm, self.config.rms_norm_eps)

    def _logits(self, x_BTD: jax.Array, start: jax.Array | int = 0, size: int | None = None) -> jax.Array:
        """Those of `size` tokens of the vocabulary from `start` on, or of all."""
        size = self.config.vocab_size if size is None else size
        if self.config.tie_word_embeddings:
            w_VD = jax.lax.dynamic_slice_in_dim(self.tok_embeddings, start, size, axis=0)
            return matmul("BTD,VD->BTV", x_BTD.astype(self.dtype), w_VD.astype(self.dtype))
        return _linear(x_BTD, jax.lax.dynamic_slice_in_dim(self.output, start, size, axis=1), self.dtype)

    def _target_logits(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """One logit for each token: that of its id."""
        if self.config.tie_word_embeddings:
            return matmul("BTD,BTD->BT", x_BTD.astype(self.dtype), self.tok_embeddings[ids_BT].astype(self.dtype))
        return matmul("BTD,DBT->BT", x_BTD.astype(self.dtype), self.output[:, ids_BT].astype(self.dtype))
