"""The Flax LLaMA: its weights, the loop that hands tiles from anchor to reuse layers, its loss and its predictions."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from attention.model_axis import ModelShards, as_params
from attention.sharding import Layout, pad_axis
from attention.xla import as_bits, from_bits, matmul
from kascade_core import LayerPlan, Selection, freeze_schedule
from network.cache import KVCache
from network.layers import Block, linear, matrix_init, rms_norm, rope_table
from network.programs import Decoder, Forward, ForwardBuilder, compile_steps
from weights.config import LlamaConfig, RopeScaling, chunk_axes, is_turned
from weights.folder import Manifest, read_chunks

__all__ = [
    "Block",
    "Forward",
    "KVCache",
    "LlamaConfig",
    "LlamaModel",
    "RopeScaling",
    "count_parameters",
    "load_weights",
]

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
    shards = ModelShards.of(manifest.config, mesh)
    chunks = tqdm(
        read_chunks(weights_dir, manifest), "loading", len(manifest.chunks), unit="chunk", disable=None, leave=False
    )
    placed, axes = {}, chunk_axes(manifest.config)
    for name, chunk in chunks:
        placed[name] = shards.place_chunk(name, _as_parameters(chunk, axes[name], dtype), mesh)
    return as_params(placed)


def _as_parameters(chunk: Any, axes: Any, dtype: Any | None) -> Any:
    """A chunk's arrays, whose axes are given, with those of `weights.config.param_axes`."""
    return jax.tree.map(lambda leaf, of: _as_stored(leaf.T if is_turned(of) else leaf, dtype), chunk, axes)


COPIED_COLUMNS = 256  # at a time: a transposed matrix is copied five times faster than all at once


def _as_stored(leaf: np.ndarray, dtype: Any | None) -> np.ndarray:
    """`leaf` in its final dtype, at a multiple of 64 bytes: JAX's CPU devices then share its memory, not copy it."""
    dtype = np.dtype(np.float32 if leaf.ndim == 1 else dtype or leaf.dtype)
    memory = np.empty(math.prod(leaf.shape) * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    stored = memory[start : start + leaf.size * dtype.itemsize].view(dtype).reshape(leaf.shape)
    for i in range(0, leaf.shape[-1], COPIED_COLUMNS):
        stored[..., i : i + COPIED_COLUMNS] = leaf[..., i : i + COPIED_COLUMNS]
    return stored


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- The model ---

VOCAB_CHUNK = 1024  # tokens of the vocabulary in one product of the loss: its logits are no larger than the MLP's rows


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
            self.output = self.param("output", matrix_init, (V, D))
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

    def normed(self, x_BTD: jax.Array) -> jax.Array:
        """The final stream, from which every prediction follows."""
        return rms_norm(x_BTD, self.norm, self.config.rms_norm_eps)

    def embed(self, ids_BT: jax.Array) -> jax.Array:
        """The residual stream before layer 0."""
        shards = self._shards()
        if shards.vocab_shards == 1:
            return self._embeddings(ids_BT)
        ids_BT, is_here = self._own_ids(ids_BT)
        return shards.vocab_sum(jnp.where(is_here[..., None], self._embeddings(ids_BT), 0.0))

    def _own_ids(self, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids as this shard's part of the vocabulary counts them, and whether they are in it; others become some id."""
        ids_BT, size = ids_BT - self._shards().first_token(), self._shards().local.vocab_size
        is_here = (ids_BT >= 0) & (ids_BT < size)
        return jnp.where(is_here, ids_BT, 0), is_here

    def _embeddings(self, ids_BT: jax.Array) -> jax.Array:
        return read_rows(_rows_of, self.tok_embeddings, ids_BT).astype(jnp.float32)

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
            a_BTV, b_BTV = (self._logits(x, start, size) for x in (dense_BTD, sparse_BTD))
            new_dense, new_sparse = _log_sum_exp(dense, a_BTV), _log_sum_exp(sparse, b_BTV)
            shift_BT = shift_BT * jnp.exp(dense[0] - new_dense[0])
            shift_BT += (jnp.exp(a_BTV - new_dense[0][..., None]) * (a_BTV - b_BTV)).sum(-1)
            best_dense = jnp.where(a_BTV.max(-1) > dense[0], start + _place_of_max(a_BTV), best_dense)
            best_sparse = jnp.where(b_BTV.max(-1) > sparse[0], start + _place_of_max(b_BTV), best_sparse)
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
        rows_from = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
        return linear(x_BTD, read_rows(rows_from, self._head(), start), self.dtype)

    def _head(self) -> jax.Array:
        """The matrix of the logits, w_VD."""
        return self.tok_embeddings if self.config.tie_word_embeddings else self.output

    def _target_logits(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        """One logit for each token: that of its id."""
        if self._shards().vocab_shards == 1:
            return self._logits_of(x_BTD, ids_BT)
        ids_BT, is_here = self._own_ids(ids_BT)
        return self._shards().vocab_sum(jnp.where(is_here, self._logits_of(x_BTD, ids_BT), 0.0))

    def _logits_of(self, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        w_BTD = read_rows(_rows_of, self._head(), ids_BT)
        return matmul("BTD,BTD->BT", x_BTD.astype(self.dtype), w_BTD.astype(self.dtype))

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
        builder = ForwardBuilder(self, params, input_ids.shape, mesh, with_cache)
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
        return compile_steps(self, params, cache, num_steps, mesh)


def _place_of_max(x_BTV: jax.Array) -> jax.Array:
    """int32 [B, T], `argmax` along V: XLA's CPU reduces to a value and its place together several times slower."""
    places = jax.lax.broadcasted_iota(jnp.int32, x_BTV.shape, x_BTV.ndim - 1)
    is_max = x_BTV == x_BTV.max(-1, keepdims=True)
    return jnp.where(is_max, places, x_BTV.shape[-1]).min(-1)


def read_rows(read: Callable[..., jax.Array], table_VD: jax.Array, place: jax.Array | int) -> jax.Array:
    """read(table_VD, place), some rows of a table: from bfloat16 as integers.

    XLA's CPU neither gathers nor slices bfloat16, and would convert the whole table.
    """
    if table_VD.dtype != jnp.bfloat16:
        return read(table_VD, place)
    # The barrier ties the table to the place, so that a loop does not keep a copy of it in the other type.
    table_VD, place = jax.lax.optimization_barrier((table_VD, place))
    return from_bits(read(as_bits(table_VD), place), table_VD.dtype)


def _rows_of(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    return table_VD[ids_BT]


def _log_sum_exp(carry: tuple[jax.Array, jax.Array], logits_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest, sum of exp(. - largest)) of the logits so far, with another chunk's."""
    top_BT, total_BT = carry
    new_top_BT = jnp.maximum(top_BT, logits_BTV.max(-1))
    total_BT *= jnp.exp(top_BT - new_top_BT)
    return new_top_BT, total_BT + jnp.exp(logits_BTV - new_top_BT[..., None]).sum(-1)
