"""What a prefill or a step of decoding takes of each device, by arithmetic: bytes of memory, FLOP, bytes read.

Temporaries are XLA's affair, so that they are only estimated here; `bench.plan` has them from the compiler where there
is one. Letters as in kascade_core.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from attention.model_axis import ModelShards
from attention.sharding import AXES, CONTEXT, DATA, Layout, device_bytes
from kascade_core import ANCHOR, DENSE, REUSE, LayerPlan, Selection, freeze_schedule, tile_count
from llama_model import VOCAB_CHUNK
from measure.decoding import cache_size
from network.cache import KVCache
from network.layers import MLP_ROWS
from weights.config import LlamaConfig

DTYPE = jnp.bfloat16  # of weights, cache and products
ITEM = 2  # bytes of one of its numbers
FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned.

    Attributes:
      config: of the model.
      schedule: for each layer what it does, `kascade_core.freeze_schedule`.
      selection: how anchors choose.
      length: tokens of a prefill, or those in the cache with a step's new token.
      batch: sequences of a step; a prefill has one, and keeps its keys and values.
      is_step: one step of decoding, otherwise a prefill.
    """

    config: LlamaConfig
    schedule: tuple[LayerPlan, ...]
    selection: Selection
    length: int
    batch: int = 1
    is_step: bool = False

    @property
    def name(self) -> str:
        """Such as "prefill, sparse"."""
        arm = "dense" if all(plan.mode == DENSE for plan in self.schedule) else "sparse"
        return f"a step of {self.batch}, {arm}" if self.is_step else f"prefill, {arm}"

    @property
    def cache_size(self) -> int:
        """Tokens that a sequence's cache has room for."""
        return cache_size(self.selection, self.length)

    def count(self, mode: str) -> int:
        """Layers of a mode."""
        return sum(plan.mode == mode for plan in self.schedule)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one device's memory."""

    weights: int
    cache: int
    temporaries: int
    index: int  # the tiles that anchors chose

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.temporaries + self.index


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computes and reads in a prefill or a step: estimates, and no times.

    Attributes:
      flops: of matrix products, of attention those of visible keys and kept tiles alone.
      bytes: read and written at least: each weight once, the stream once before and after each half of a layer, the
        keys and values that are attended to.
    """

    flops: float
    bytes: float


def sparse_schedule(config: LlamaConfig) -> tuple[LayerPlan, ...]:
    """One dense layer, then an anchor in every fourth; the rest reuse its tiles."""
    layers = range(config.num_hidden_layers)
    schedule: dict[int, Any] = {i: (ANCHOR, None) if i % 4 == 1 else (REUSE, i - (i - 1) % 4) for i in layers}
    schedule[0] = DENSE, None
    return freeze_schedule(schedule, config.num_hidden_layers, config.num_key_value_heads)


def mesh_of_sizes(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of no devices, for arithmetic."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def weights_bytes(config: LlamaConfig, mesh: Mesh | AbstractMesh | None = None) -> int:
    """That a device holds, with copies of KV heads; without a mesh those of the whole model."""
    return device_bytes(ModelShards.of(config, mesh).shapes(mesh, DTYPE))


def estimate(job: Job, mesh: Mesh | AbstractMesh) -> Needs:
    """A device's memory, with estimated temporaries."""
    parts = _step_parts(job, mesh) if job.is_step else _prefill_parts(job, mesh)
    return Needs(weights_bytes(job.config, mesh), *parts)


def work(job: Job, mesh: Mesh | AbstractMesh) -> Work:
    """What a device computes and reads."""
    return _step_work(job, mesh) if job.is_step else _prefill_work(job, mesh)


def layout_of(job: Job, mesh: Mesh | AbstractMesh) -> Layout:
    """How a prefill's sequence is cut."""
    return Layout.of(job.length, job.selection.block, mesh.shape[CONTEXT])


def stream_bytes(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of a prefill's residual stream and RoPE's table, which stand beside every layer's own arrays."""
    rows = layout_of(job, mesh).padded // mesh.shape[CONTEXT]
    return FLOAT32 * rows * (job.config.hidden_size + job.config.head_dim)


def prefill_cache_bytes(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of the keys and values that the layers of a prefill leave behind."""
    local, rows = ModelShards.of(job.config, mesh).local, layout_of(job, mesh).padded // mesh.shape[CONTEXT]
    return 2 * ITEM * rows * local.num_key_value_heads * local.head_dim * job.config.num_hidden_layers


def prefill_index_bytes(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of the tiles that all anchors of a prefill chose, in the order of the layout."""
    rows, selection = layout_of(job, mesh).padded // mesh.shape[CONTEXT], job.selection
    slots = selection.slots(tile_count(job.length, selection.tile_size))
    heads = ModelShards.of(job.config, mesh).copies_here
    return 4 * job.count(ANCHOR) * heads * (rows // selection.query_tile) * slots


def _prefill_parts(job: Job, mesh: Mesh | AbstractMesh) -> tuple[int, int, int]:
    """Cache, temporaries and index; the factors of the temporaries are fitted to what the TPU's compiler takes."""
    config, layout, local = job.config, layout_of(job, mesh), ModelShards.of(job.config, mesh).local
    rows, H = layout.padded // mesh.shape[CONTEXT], config.head_dim
    stream = FLOAT32 * rows * config.hidden_size
    queries = (FLOAT32 + ITEM) * rows * local.num_attention_heads * H
    gathered = 4 * ITEM * layout.padded * local.num_key_value_heads * H
    mlp = FLOAT32 * min(rows, MLP_ROWS) * local.intermediate_size
    ordered = stream if layout.has_even_parts else FLOAT32 * layout.padded * config.hidden_size  # or whole everywhere
    layer, loss = 2 * stream + queries + gathered + mlp, 2 * stream + ordered + FLOAT32 * rows * VOCAB_CHUNK
    temporaries = stream_bytes(job, mesh) + max(layer, loss, stream + _table_bytes(local))
    return prefill_cache_bytes(job, mesh), temporaries, 2 * prefill_index_bytes(job, mesh)


def step_index_bytes(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of the tiles that all anchors of a step chose."""
    slots = job.selection.slots(tile_count(job.cache_size, job.selection.tile_size))
    return 4 * job.count(ANCHOR) * _sequences(job, mesh) * ModelShards.of(job.config, mesh).copies_here * slots


def step_cache_bytes(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of the caches of a step's sequences."""
    return device_bytes(KVCache.shapes(job.config, job.batch, job.cache_size, DTYPE, mesh))


def _step_parts(job: Job, mesh: Mesh | AbstractMesh) -> tuple[int, int, int]:
    sequences, local = _sequences(job, mesh), ModelShards.of(job.config, mesh).local
    cache = step_cache_bytes(job, mesh)
    scores = 3 * FLOAT32 * sequences * _scored_heads(job, mesh) * job.cache_size if job.count(ANCHOR) else 0
    logits = 2 * FLOAT32 * sequences * local.vocab_size
    rearranged = 0 if job.config.head_dim % 128 == 0 else 2 * cache // job.config.num_hidden_layers  # XLA's gathers
    temporaries = scores + logits + rearranged + _table_bytes(local)
    return cache, temporaries, step_index_bytes(job, mesh)


def _table_bytes(local: LlamaConfig) -> int:
    """Of the embedding, which the TPU's compiler copies to read it as integers."""
    return ITEM * local.vocab_size * local.hidden_size


def _sequences(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Of a step, on one device."""
    return job.batch // mesh.shape[DATA] if job.batch % mesh.shape[DATA] == 0 else job.batch


def _scored_heads(job: Job, mesh: Mesh | AbstractMesh) -> int:
    """Query heads whose scores an anchor computes on one device: whole groups."""
    shards = ModelShards.of(job.config, mesh)
    return shards.copies_here * shards.group


def _products(config: LlamaConfig) -> int:
    """Multiplications of a layer's matrices for one token, of a device's part `config`."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def _prefill_work(job: Job, mesh: Mesh | AbstractMesh) -> Work:
    shards, selection = ModelShards.of(job.config, mesh), job.selection
    local, H = shards.local, job.config.head_dim
    rows, seen = job.length / mesh.shape[CONTEXT], (job.length + 1) / 2
    kept, heads = mean_kept_keys(selection, job.length), local.num_attention_heads
    scored = len(selection.scored_rows()) / selection.query_tile * _scored_heads(job, mesh)
    attended = {DENSE: 2 * heads * seen, ANCHOR: scored * seen + 2 * heads * kept, REUSE: 2 * heads * kept}
    attention = sum(attended[plan.mode] for plan in job.schedule) * H
    layers = job.config.num_hidden_layers * _products(local) + attention
    flops = 2 * rows * (layers + job.config.hidden_size * local.vocab_size)
    stream = 4 * FLOAT32 * rows * job.config.hidden_size * job.config.num_hidden_layers
    keys_values = mesh.shape[CONTEXT] * prefill_cache_bytes(job, mesh)
    return Work(flops, weights_bytes(job.config, mesh) + stream + keys_values)


def _step_work(job: Job, mesh: Mesh | AbstractMesh) -> Work:
    shards, sequences, H = ModelShards.of(job.config, mesh), _sequences(job, mesh), job.config.head_dim
    local, length, selection = shards.local, job.cache_size, job.selection
    tiles = selection.slots(tile_count(length, selection.tile_size)) * selection.tile_size
    heads, scored, K = local.num_attention_heads, _scored_heads(job, mesh), local.num_key_value_heads
    products = {
        DENSE: 2 * heads * length,
        ANCHOR: scored * length + heads * tiles,
        REUSE: 2 * heads * tiles,
    }
    read = {DENSE: 2 * length, ANCHOR: length + tiles, REUSE: 2 * tiles}
    attention = sum(products[plan.mode] for plan in job.schedule) * H
    layers = job.config.num_hidden_layers * _products(local) + attention
    flops = 2 * sequences * (layers + job.config.hidden_size * local.vocab_size)
    keys_values = ITEM * sequences * K * H * sum(read[plan.mode] for plan in job.schedule)
    table = 0 if job.config.tie_word_embeddings else ITEM * job.config.hidden_size * local.vocab_size  # a row is read
    return Work(flops, weights_bytes(job.config, mesh) - table + keys_values)


def mean_kept_keys(selection: Selection, length: int) -> float:
    """Keys that a row of a prefill attends to through its anchor's tiles, mean over the rows."""
    end = (np.arange(tile_count(length, selection.query_tile)) + 1) * selection.query_tile
    seen = np.ceil(end / selection.tile_size)
    if selection.density is None:
        kept = np.minimum(seen, selection.top_k)
    else:
        kept = np.minimum(seen, np.maximum(np.ceil(selection.density * seen - 1e-4), selection.least_tiles))
    masked = seen * selection.tile_size - end + (selection.query_tile - 1) / 2  # of the own tiles, those after the row
    return float((kept * selection.tile_size - masked).mean())
