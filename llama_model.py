"""The Flax LLaMA: layers, the loop that hands tiles from anchor to reuse layers, its loss, and its compilation."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import attention
from attention import decode
from attention.model_axis import ModelShards
from attention.sharding import (
    CACHE,
    CONTEXT,
    DATA,
    HEAD_ROWS,
    MODEL,
    ROWS,
    TILES,
    WHOLE,
    Layout,
    batch_spec,
    compile_ahead,
    gather_keys,
    jit,
    move,
    pad_axis,
    place,
    shard,
    steps_mesh,
)
from attention.xla import matmul
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Schedule, Selection, freeze_schedule, tile_count
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
      mesh: whose devices each get their own part of them; the default device alone when left out.

    Returns:
      The variables for `LlamaModel.apply`, {"params": ...}.

    Raises:
      InputError: a chunk is missing, damaged, altered or not what the config says.
    """
    shards, params = ModelShards.of(manifest.config, mesh), {}
    chunks = tqdm(
        read_chunks(weights_dir, manifest), "loading", len(manifest.chunks), unit="chunk", disable=None, leave=False
    )
    for name, chunk in chunks:
        chunk = shards.place_chunk(name, jax.tree.map(lambda leaf: _as_stored(leaf, dtype), chunk), mesh)
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

COMPILED_AT_ONCE = 4  # programs of a forward: more would only take turns on the cores
ROPE = PartitionSpec(None, CONTEXT)  # cos and sin, the same for all sequences
STEP_TILES = PartitionSpec(DATA, None, MODEL)  # [B, N, K, 1, C] of N steps

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
    shards: ModelShards

    def setup(self) -> None:
        for name, shape in chunk_shapes(self.shards.local)[layer_chunk(0)]["attention"].items():
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
        out_BTD = self.shards.sum(_linear(out_BTNH.reshape(*out_BTNH.shape[:2], -1), self.wo, self.dtype))
        return out_BTD + self.bo[None, None] if self.config.output_bias else out_BTD

    def _heads(self, x_BTD: jax.Array, name: str) -> jax.Array:
        out_BTF = _linear(x_BTD, getattr(self, f"w{name}"), self.dtype)
        if self.config.qkv_bias:
            out_BTF += getattr(self, f"b{name}")[None, None]
        return out_BTF.reshape(*x_BTD.shape[:2], -1, self.config.head_dim)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    dtype: Any
    shards: ModelShards

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        shapes = chunk_shapes(self.shards.local)[layer_chunk(0)]["feed_forward"]
        w = {name: self.param(name, _matrix_init, shape) for name, shape in shapes.items()}

        def apply(x_BTD: jax.Array) -> jax.Array:
            gate_BTF = nn.silu(_linear(x_BTD, w["w1"], self.dtype))
            return _linear(gate_BTF * _linear(x_BTD, w["w3"], self.dtype), w["w2"], self.dtype)

        B, T, D = x_BTD.shape
        chunks = next(n for n in range(tile_count(T, MLP_ROWS), T + 1) if T % n == 0)
        if chunks == 1:
            return self.shards.sum(apply(x_BTD))
        x_chunks = x_BTD.reshape(B, chunks, T // chunks, D).swapaxes(0, 1)
        return self.shards.sum(jax.lax.map(apply, x_chunks).swapaxes(0, 1).reshape(B, T, D))


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
            chosen_BKQC = attention.choose(groups_BTNH, k_BKHS, selection=self._selection(), **sizes)
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
        k_ZSH = write_at(cached[0], k_B1KH[:, 0], positions_B)
        v_ZSH = write_at(cached[1], v_B1KH[:, 0], positions_B)
        q_BNH, chosen_BK1C = q_B1NH[:, 0], None
        if self.plan.mode == ANCHOR:
            shards = self._shards()
            groups_BNH = shards.whole_groups(q_BNH, 1)
            chosen_BK1C, scores_ZGS = decode.choose_step(groups_BNH, k_ZSH, positions_B, self._selection())
            tiles_BK1C = shards.cut(chosen_BK1C, self.plan.budgets)
            out_BNH = decode.anchor_step(shards.own_parts(scores_ZGS), v_ZSH, tiles_BK1C, self.selection)
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
    def shapes(cls, config: LlamaConfig, batch: int, size: int, dtype: Any, mesh: Mesh | None = None) -> KVCache:
        """The shapes of a cache on the devices of a mesh of `steps_mesh`."""
        sharding = NamedSharding(mesh, batch_spec(CACHE, batch, mesh)) if mesh else None
        held = ModelShards.of(config, mesh).held
        shape = (batch * held.num_key_value_heads, size, config.head_dim)
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return cls(((array, array),) * config.num_hidden_layers)

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


def join_caches(caches: Sequence[KVCache], mesh: Mesh) -> KVCache:
    """The caches of single sequences, on `steps_mesh` of one, as one cache on `steps_mesh` of so many."""
    target, model = steps_mesh(mesh, len(caches)), mesh.shape[MODEL]
    data = target.shape[DATA]

    def join(*parts: jax.Array) -> jax.Array:
        if data == model == 1:
            return jnp.concatenate(parts)
        x_MBKSH = jnp.stack([x.reshape(model, -1, *x.shape[1:]) for x in parts], axis=1)
        x_MDBKSH = x_MBKSH.reshape(model, data, -1, *x_MBKSH.shape[2:])
        return move(x_MDBKSH.swapaxes(0, 1).reshape(-1, *x_MBKSH.shape[3:]), target, CACHE)

    return jax.tree.map(join, *caches)


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
      shards: inside `jax.shard_map`, what the calling shard of the model axis holds; None is all.
    """

    config: LlamaConfig
    schedule: Any = None
    selection: Selection = Selection()
    calibrate: bool = False
    dtype: Any = jnp.float32
    kernel: str | None = None
    shards: ModelShards | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.selection = dataclasses.replace(self.selection, window=config.sliding_window)
        self.schedule = freeze_schedule(self.schedule, config.num_hidden_layers, config.num_key_value_heads)
        super().__post_init__()

    def setup(self) -> None:
        V, D = self._shards().local.vocab_size, self.config.hidden_size
        self.tok_embeddings = self.param("tok_embeddings", nn.initializers.normal(1.0), (V, D))
        self.norm = self.param("norm", nn.initializers.ones, (D,))
        if not self.config.tie_word_embeddings:
            self.output = self.param("output", _matrix_init, (D, V))
        self.layer = [  # the list gives its modules the names layer_0, layer_1, ...
            self.block(plan) for plan in self.schedule
        ]

    def _shards(self) -> ModelShards:
        return self.shards or ModelShards(self.config)

    @nn.nowrap
    def block(self, plan: LayerPlan) -> Block:
        """A layer that does what `plan` says."""
        return Block(self.config, plan, self.selection, self.calibrate, self.dtype, self.kernel, self.shards)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V], for int32 token ids [B, T], on one device."""
        layout = Layout.of(ids_BT.shape[1], self.selection.block)
        x_BTD = self.run_layers(pad_axis(ids_BT, 1, layout.padded), layout)
        return self._logits(x_BTD[:, : layout.length])

    def run_layers(self, ids_BT: jax.Array, layout: Layout) -> jax.Array:
        """The final, normed stream x_BTD of all layers in one program, on one device."""
        rope = rope_table(self.config, layout.local_positions()[None], layout.length)
        x_BTD = self.embed(ids_BT)
        tiles_by_layer: dict[int, jax.Array] = {}
        for i, (block, plan) in enumerate(zip(self.layer, self.schedule, strict=True)):
            tiles_BKQC = None if plan.anchor is None else plan.attended(tiles_by_layer[plan.anchor])
            layer_rope = None if i in self.config.no_rope_layers else rope
            x_BTD, tiles_by_layer[i], _ = block.attend(x_BTD, layer_rope, tiles_BKQC, layout)
            x_BTD = block.feed(x_BTD)
        return self.normed(x_BTD)

    def step(
        self, ids_B: jax.Array, positions_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, dict[int, jax.Array], KVCache]:
        """One new token a sequence: its final, normed stream x_B1D, the tiles_BK1C that anchors chose, the cache."""
        rope = rope_table(self.config, positions_B[:, None], positions_B + 1)
        x_B1D, shards = self.embed(ids_B[:, None]), self._shards()
        tiles_by_layer: dict[int, jax.Array] = {}
        layers = []
        for i, (block, plan) in enumerate(zip(self.layer, self.schedule, strict=True)):
            tiles_BK1C = None if plan.anchor is None else shards.attended(plan, tiles_by_layer[plan.anchor])
            layer_rope = None if i in self.config.no_rope_layers else rope
            x_B1D, chosen_BK1C, cached = block.attend_step(x_B1D, layer_rope, tiles_BK1C, cache.layers[i], positions_B)
            x_B1D = block.feed(x_B1D)
            layers.append(cached)
            if chosen_BK1C is not None:
                tiles_by_layer[i] = chosen_BK1C
        return self.normed(x_B1D), tiles_by_layer, KVCache(tuple(layers))

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The final stream, from which every prediction follows."""
        return rms_norm(x_BTD, self.norm, self.config.rms_norm_eps)

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """The residual stream before layer 0."""
        shards = self._shards()
        if shards.vocab_shards == 1:
            return self._rows(ids_BT)
        ids_BT, is_here = self._own_ids(ids_BT)
        return shards.vocab_sum(jnp.where(is_here[..., None], self._rows(ids_BT), 0.0))

    def _own_ids(self, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids as this shard's part of the vocabulary counts them, and whether they are in it; others become some id."""
        ids_BT, size = ids_BT - self._shards().first_token(), self._shards().local.vocab_size
        is_here = (ids_BT >= 0) & (ids_BT < size)
        return jnp.where(is_here, ids_BT, 0), is_here

    def _rows(self, ids_BT: jax.Array) -> jax.Array:
        """Rows of the embedding, float32."""
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
        logits_BTV = self._logits(x_BTD)
        return self._first_of_best(logits_BTV.max(-1), logits_BTV.argmax(-1).astype(jnp.int32))

    def _first_of_best(self, top_BT: jax.Array, best_BT: jax.Array) -> jax.Array:
        """The token with the largest logit of all parts of the vocabulary, from each part's logit and token."""
        shards = self._shards()
        if shards.vocab_shards == 1:
            return best_BT
        is_best = top_BT == shards.vocab_max(top_BT)
        last = jnp.int32(self.config.vocab_size)
        return -shards.vocab_max(-jnp.where(is_best, best_BT + shards.first_token(), last))

    def _all_parts(self, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(largest, sum of exp(. - largest)) of the whole vocabulary's logits, from those of each part."""
        shards, (top_BT, total_BT) = self._shards(), part
        if shards.vocab_shards == 1:
            return part
        whole_BT = shards.vocab_max(top_BT)
        return whole_BT, shards.vocab_sum(total_BT * jnp.exp(top_BT - whole_BT))

    def next_token_nll(self, x_BTD: jax.Array, next_ids_BT: jax.Array) -> jax.Array:
        """Negative log likelihood of the next ids, float32 nats [B, T], given the final stream; no [T, V] logits.

        The vocabulary is gone through in chunks, with an online log-sum-exp (arXiv 1805.02867).
        """

        def fold(start: jax.Array, size: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return _log_sum_exp(carry, self._logits(x_BTD, start, size))

        shape = next_ids_BT.shape
        part = self._fold_vocabulary(fold, (jnp.full(shape, -jnp.inf), jnp.zeros(shape)))
        top_BT, total_BT = self._all_parts(part)
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
        best_dense = self._first_of_best(dense[0], best_dense)
        best_sparse = self._first_of_best(sparse[0], best_sparse)
        part_BT, (dense, sparse) = dense[0], (self._all_parts(part) for part in (dense, sparse))
        shift_BT = self._shards().vocab_sum(shift_BT * jnp.exp(part_BT - dense[0]))
        lse_dense, lse_sparse = (top_BT + jnp.log(total_BT) for top_BT, total_BT in (dense, sparse))
        return Comparison(
            dense_nll=lse_dense - self._target_logits(dense_BTD, next_ids_BT),
            sparse_nll=lse_sparse - self._target_logits(sparse_BTD, next_ids_BT),
            kl=shift_BT / dense[1] - (lse_dense - lse_sparse),
            same_top1=best_dense == best_sparse,
        )

    def _fold_vocabulary(self, fold: Callable[[Any, int, Any], Any], carry: Any) -> Any:
        """Folds fold(start, size, carry) over chunks of this shard's part of the vocabulary."""
        vocab_size = self._shards().local.vocab_size
        size = min(VOCAB_CHUNK, vocab_size)
        whole, rest = divmod(vocab_size, size)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: fold(i * size, size, carry), carry)
        return fold(jnp.int32(whole * size), rest, carry) if rest else carry

    def _logits(self, x_BTD: jax.Array, start: jax.Array | int = 0, size: int | None = None) -> jax.Array:
        """Those of `size` tokens of this shard's part of the vocabulary from `start` on, or of all of it."""
        size = self._shards().local.vocab_size if size is None else size
        if self.config.tie_word_embeddings:
            w_VD = jax.lax.dynamic_slice_in_dim(self.tok_embeddings, start, size, axis=0)
            # The table comes first, as it is stored: as the second operand it would be transposed into a copy.
            logits_VBT = matmul("VD,BTD->VBT", w_VD.astype(self.dtype), _two_rows(x_BTD.astype(self.dtype)))
            return logits_VBT.transpose(1, 2, 0)[:, : x_BTD.shape[1]]
        return _linear(x_BTD, jax.lax.dynamic_slice_in_dim(self.output, start, size, axis=1), self.dtype)

    def _target_logits(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """One logit for each token: that of its id."""
        if self._shards().vocab_shards == 1:
            return self._logits_of(x_BTD, ids_BT)
        ids_BT, is_here = self._own_ids(ids_BT)
        return self._shards().vocab_sum(jnp.where(is_here, self._logits_of(x_BTD, ids_BT), 0.0))

    def _logits_of(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if self.config.tie_word_embeddings:
            return matmul("BTD,BTD->BT", x_BTD.astype(self.dtype), self.tok_embeddings[ids_BT].astype(self.dtype))
        return matmul("BTD,DBT->BT", x_BTD.astype(self.dtype), self.output[:, ids_BT].astype(self.dtype))

    @nn.nowrap
    def compile(self, params: Any, input_ids: jax.Array, mesh: Mesh | None = None, with_cache: bool = False) -> Forward:
        """Compiles the forward with its loss for these shapes.

        Args:
          params: variables as `load_weights` places them, or their shapes (`ModelShards.shapes`).
          input_ids: int32 [B, T], or a `jax.ShapeDtypeStruct`.
          mesh: the devices; without it everything is done on one device.
          with_cache: also returns what `Forward.fill_cache` makes a cache of.
        """
        start = time.perf_counter()
        builder = _ForwardBuilder(self, params, input_ids.shape, mesh, with_cache)
        return dataclasses.replace(builder.build(), seconds=time.perf_counter() - start)

    @nn.nowrap
    def compile_decode(self, params: Any, cache: KVCache, num_steps: int, mesh: Mesh | None = None) -> Decoder:
        """Compiles `num_steps` steps, with the cache donated.

        Args:
          params: variables on the devices of the mesh (`attention.sharding.keep_on`).
          cache: whose shapes count; `jax.ShapeDtypeStruct` will do.
          num_steps: N.
          mesh: of `attention.sharding.steps_mesh`.
        """
        shards = ModelShards.of(self.config, mesh)
        batch = cache.layers[0][0].shape[0] // shards.copies.size
        model = self.clone(shards=shards)

        def local(params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
            return model.apply(params, ids_BN, positions_B, cache, method="decode")

        inner = None if mesh is None or mesh.size == 1 else mesh
        by_batch, tiles = batch_spec(PartitionSpec(DATA), batch, mesh), batch_spec(STEP_TILES, batch, mesh)
        out_specs = Decoded(by_batch, by_batch, tiles, batch_spec(CACHE, batch, mesh))
        in_specs = (shards.specs(), by_batch, by_batch, batch_spec(CACHE, batch, mesh))
        sharded = shard(local, inner, in_specs, out_specs)

        def run(*args: Any) -> Decoded:
            decoded = sharded(*args)
            return decoded._replace(tiles={i: shards.unique(tiles, 2) for i, tiles in decoded.tiles.items()})

        whole = NamedSharding(mesh, WHOLE) if mesh else None
        args = [jax.ShapeDtypeStruct(s, jnp.int32, sharding=whole) for s in ((batch, num_steps), (batch,))]
        start = time.perf_counter()
        program = compile_ahead(run, (params, *args, cache), mesh, donate=(3,))
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
    """A compiled forward: call it with (params, input_ids) for an `Output`.

    The host runs the layers one after another. Layers that do the same share one program, so that compiling takes no
    longer for a deeper model; one program for all layers is not faster (measured on a CPU: slower by 2 to 6 %).

    Attributes:
      schedule: the model's.
      shards: of the mesh's model axis.
      layout: how the sequence was cut.
      batch: sequences at once; fewer are computed beside copies of themselves.
      mesh: the devices.
      begin, end: the programs before and after the layers.
      layers: each layer's program.
      collect: for each layer that chooses tiles the program that puts them in the sequence's order.
      seconds: that tracing and compiling took.
    """

    schedule: Schedule
    shards: ModelShards
    layout: Layout
    batch: int
    mesh: Mesh | None
    begin: Any
    end: Any
    layers: tuple[Any, ...]
    collect: Mapping[int, Any]
    seconds: float = 0.0

    def __call__(self, params: Any, input_ids: jax.Array) -> Output:
        rows = input_ids.shape[0]
        if rows == self.batch:
            return self._compute(params, input_ids)
        whole = self._compute(params, jnp.resize(input_ids, (self.batch, input_ids.shape[1])))
        return jax.tree.map(lambda x: x[:rows], whole)

    def _compute(self, params: Any, input_ids: jax.Array) -> Output:
        inner = params["params"]
        outer = _outer(inner)
        x_BTD, rope, next_ids_BT = self._run(self.begin, outer, input_ids)
        chosen: dict[int, jax.Array] = {}
        keys_values = []
        for i, (program, plan) in enumerate(zip(self.layers, self.schedule, strict=True)):
            reused = () if plan.anchor is None else (chosen[plan.anchor], self.sources[i])
            x_BTD, tiles, layer_keys_values = self._run(program, inner[f"layer_{i}"], x_BTD, rope, *reused)
            keys_values.append(layer_keys_values)
            if tiles is not None:
                chosen[i] = tiles
        nll, stream = self._run(self.end, outer, x_BTD, next_ids_BT)
        tiles = {layer: self._run(self.collect[layer], tiles) for layer, tiles in chosen.items()}
        return Output(nll, tiles, stream, None if keys_values[0] is None else tuple(keys_values))

    def _run(self, program: Any, *args: Any) -> Any:
        """One program at a time on several CPU devices: two that gather, waiting at once, can wait for each other."""
        out = program(*args)
        if self.mesh is not None and self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(out)
        return out

    @functools.cached_property
    def sources(self) -> dict[int, jax.Array]:
        """For each layer that reuses tiles, `ModelShards.sources`; placed here, for a plan's devices hold nothing."""
        reusing = ((i, plan) for i, plan in enumerate(self.schedule) if plan.mode == REUSE)
        return {i: place(self.shards.sources(plan), self.mesh, PartitionSpec(MODEL)) for i, plan in reusing}

    @property
    def programs(self) -> list[Any]:
        """The compiled programs, each once."""
        return [*dict.fromkeys((self.begin, *self.layers, self.end, *self.collect.values()))]

    @property
    def working_bytes(self) -> int:
        """Of a device, beside the parameters: the largest program's memory and what layers leave behind."""
        stats = {program: program.memory_analysis() for program in self.programs}
        largest = max(s.temp_size_in_bytes + s.output_size_in_bytes for s in stats.values())
        stream = min(stats[layer].output_size_in_bytes for layer in self.layers)
        return largest + sum(stats[layer].output_size_in_bytes - stream for layer in self.layers)

    def fill_cache(self, output: Output, size: int, mesh: Mesh, dtype: Any) -> KVCache:
        """A cache with room for `size` tokens that holds what a forward computed, on the devices of `steps_mesh`."""
        target = steps_mesh(mesh, output.nll.shape[0])

        def arrange(x_BTKH: jax.Array) -> jax.Array:
            x_BKTH = self.layout.collect(x_BTKH, 1)[:, : self.layout.length].swapaxes(1, 2)
            x_ZTH = x_BKTH.reshape(-1, *x_BKTH.shape[2:]).astype(dtype)
            return pad_axis(x_ZTH, 1, size)

        whole = batch_spec(PartitionSpec(DATA, None, MODEL), output.nll.shape[0], target)
        arranged = jit(shard(arrange, target, whole, batch_spec(CACHE, output.nll.shape[0], target)), target)
        return KVCache(
            tuple(
                tuple(arranged(move(x_BTKH, target, whole)) for x_BTKH in keys_values)
                for keys_values in output.keys_values
            )
        )


class _Kind(NamedTuple):
    """What decides a layer's program: layers of one kind share it."""

    mode: str
    budgets: tuple[int, ...] | None
    largest_budget: int | None
    has_rope: bool
    crosses: bool  # whether tiles come from other shards of the model axis
    slots: int | None  # of the tiles that it reuses


class _ForwardBuilder:
    """Compiles a forward's programs side by side: the compiler leaves Python's lock."""

    def __init__(
        self, model: LlamaModel, params: Any, shape: tuple[int, int], mesh: Mesh | None, with_cache: bool
    ) -> None:
        self.shards = ModelShards.of(model.config, mesh)
        self.model, self.params, self.mesh, self.with_cache = model.clone(shards=self.shards), params, mesh, with_cache
        self.shape, num_shards = shape, mesh.shape[CONTEXT] if mesh else 1
        self.layout = Layout.of(shape[1], model.selection.block, num_shards)
        self.rows, self.head_rows, self.tiles = (self._spec(spec) for spec in (ROWS, HEAD_ROWS, TILES))
        self.stream = self._array((shape[0], self.layout.padded, model.config.hidden_size), jnp.float32, self.rows)
        self.row_ids = self._array((shape[0], self.layout.padded), jnp.int32, self.rows)

    def build(self) -> Forward:
        """The whole forward, its `seconds` left open."""
        schedule, inner = self.model.schedule, self.params["params"]
        outer = _outer(inner)
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            ids = jax.ShapeDtypeStruct(self.shape, jnp.int32)
            begin = pool.submit(compile_ahead, self._begin, (outer, ids), self.mesh)
            end = pool.submit(compile_ahead, self._end, (outer, self.stream, self.row_ids), self.mesh)
            rope = (self._array((1, self.layout.padded, 1, self.model.config.head_dim // 2), jnp.float32, ROPE),) * 2
            sources = self._array(self.shards.copies.shape, jnp.int32, PartitionSpec(MODEL))
            layers, collect, kinds = {}, {}, []
            chosen: dict[int, Any] = {}  # of each layer that chooses, the tiles' shape
            for i, plan in enumerate(schedule):
                kinds.append(self._kind(i, chosen))
                reused = () if plan.anchor is None else (chosen[plan.anchor], sources)
                args = (inner[f"layer_{i}"], self.stream, rope, *reused)
                if kinds[i] not in layers:
                    function = self._layer(kinds[i])
                    tiles = jax.eval_shape(function, *args)[1]
                    program = pool.submit(compile_ahead, function, args, self.mesh, (1,))
                    layers[kinds[i]] = program, tiles and self._array(tiles.shape, tiles.dtype, self.tiles)
                if tiles := layers[kinds[i]][1]:
                    chosen[i] = tiles
                    if tiles.shape not in collect:
                        collect[tiles.shape] = pool.submit(compile_ahead, self._collect, (tiles,), self.mesh)
            return Forward(
                schedule,
                self.shards,
                self.layout,
                self.shape[0],
                self.mesh,
                begin.result(),
                end.result(),
                tuple(layers[kind][0].result() for kind in kinds),
                {i: collect[tiles.shape].result() for i, tiles in chosen.items()},
            )

    def _kind(self, layer: int, chosen: Mapping[int, Any]) -> _Kind:
        plan = self.model.schedule[layer]
        slots = None if plan.anchor is None else chosen[plan.anchor].shape[-1]
        has_rope = layer not in self.model.config.no_rope_layers
        crosses = plan.mode == REUSE and self.shards.crosses(plan)
        return _Kind(plan.mode, plan.budgets, plan.largest_budget, has_rope, crosses, slots)

    def _layer(self, kind: _Kind) -> Callable[..., Any]:
        plan = LayerPlan(kind.mode, budgets=kind.budgets, largest_budget=kind.largest_budget)
        block, shards = self.model.block(plan), self.shards

        def run(block: Block, x_BTD: jax.Array, rope: Rope, *reused: jax.Array) -> tuple[Any, Any, Any]:
            tiles_BKQC = shards.cut(shards.take_tiles(*reused, kind.crosses), kind.budgets) if reused else None
            layer_rope = rope if kind.has_rope else None
            x_BTD, chosen_BKQC, keys_values = block.attend(x_BTD, layer_rope, tiles_BKQC, self.layout)
            return block.feed(x_BTD), chosen_BKQC, keys_values if self.with_cache else None

        def local(params: Any, *args: Any) -> tuple[Any, Any, Any]:
            return block.apply({"params": params}, *args, method=run)

        reused = (self.tiles, PartitionSpec(MODEL)) if kind.mode == REUSE else ()
        in_specs = (self.shards.specs()["params"]["layer_0"], self.rows, ROPE, *reused)
        return shard(local, self.mesh, in_specs, (self.rows, self.tiles, self.head_rows))

    def _begin(self, outer: Any, ids_BT: jax.Array) -> tuple[jax.Array, Rope, jax.Array]:
        """The stream before layer 0, RoPE's table and each token's next id, all in the order of the layout."""

        def local(outer: Any, ids_BT: jax.Array) -> tuple[jax.Array, Rope]:
            rope = rope_table(self.model.config, self.layout.local_positions()[None], self.layout.length)
            return self.model.apply({"params": outer}, ids_BT, method="embed"), rope

        next_ids_BT = self.layout.spread(jnp.roll(ids_BT, -1, axis=1), 1)
        sharded = shard(local, self.mesh, (self._outer_specs(outer), self.rows), (self.rows, ROPE))
        return *sharded(outer, self.layout.spread(ids_BT, 1)), self._constrained(next_ids_BT, self.rows)

    def _end(self, outer: Any, x_BTD: jax.Array, next_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss of each token but the first and the final, normed stream, in the order of the sequence."""

        def local(outer: Any, x_BTD: jax.Array, next_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_BTD = self.model.apply({"params": outer}, x_BTD, method="normed")
            nll = self.model.apply({"params": outer}, x_BTD, next_ids_BT, method="next_token_nll")
            return nll, self._own_part(x_BTD, 1)

        in_specs = (self._outer_specs(outer), self.rows, self.rows)
        nll, x_BTD = shard(local, self.mesh, in_specs, (self.rows, self.rows))(outer, x_BTD, next_ids_BT)
        length = self.layout.length
        return self.layout.collect(nll, 1)[:, : length - 1], self._in_order(x_BTD, 1)[:, :length]

    def _collect(self, tiles_BKQC: jax.Array) -> jax.Array:
        """A layer's tiles in the order of the sequence, one row of them for each KV head."""
        num_query_tiles = tile_count(self.layout.length, self.model.selection.query_tile)
        ordered = shard(lambda x: self._own_part(x, 2), self.mesh, (self.tiles,), self.tiles)
        return self._in_order(self.shards.unique(ordered(tiles_BKQC)), 2)[:, :, :num_query_tiles]

    def _own_part(self, x: jax.Array, axis: int) -> jax.Array:
        """Inside `jax.shard_map`, where the layout can: each shard's part of the sequence, so that none holds all."""
        return self.layout.own_part(x, axis) if self.layout.has_even_parts else x

    def _in_order(self, x: jax.Array, axis: int) -> jax.Array:
        """Outside it: in the order of the sequence, whether or not `_own_part` could."""
        return x if self.layout.has_even_parts else self.layout.collect(x, axis)

    def _outer_specs(self, outer: Any) -> Any:
        specs = self.shards.specs()["params"]
        return {name: specs[name] for name in outer}

    def _spec(self, spec: PartitionSpec) -> PartitionSpec:
        return batch_spec(spec, self.shape[0], self.mesh)

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(self.mesh, spec) if self.mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _constrained(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)) if self.mesh else x


def _outer(inner: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that belong to no layer."""
    return {name: leaf for name, leaf in inner.items() if not name.startswith("layer_")}


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
    """Compiled steps: call with (params, ids_BN, positions_B, cache), all on `steps_mesh`; the cache is given away."""

    program: Any
    seconds: float

    def __call__(self, params: Any, ids_BN: jax.Array, positions_B: jax.Array, cache: KVCache) -> Decoded:
        return self.program(params, ids_BN, positions_B, cache)
