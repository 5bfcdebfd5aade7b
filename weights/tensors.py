"""The tensors of a checkpoint: their names in each kind of source, which are wanted, how they become our arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from errors import InputError, UnsupportedError, quote
from weights.config import EMBEDDINGS_CHUNK, LlamaConfig, chunk_shapes, layer_chunk
from weights.folder import DTYPES
from weights.tokenizers import TextTokenizer

# --- Names ---

HUGGING_FACE, GGUF, META = range(3)  # the columns of NAMES
NAMES = {  # ours -> the source's; {i} is the layer
    "tok_embeddings": ("model.embed_tokens.weight", "token_embd.weight", "tok_embeddings.weight"),
    "norm": ("model.norm.weight", "output_norm.weight", "norm.weight"),
    "output": ("lm_head.weight", "output.weight", "output.weight"),
    **{
        ours: (f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gg}", f"layers.{{i}}.{meta}")
        for ours, hf, gg, meta in (
            ("attention_norm", "input_layernorm.weight", "attn_norm.weight", "attention_norm.weight"),
            ("attention.wq", "self_attn.q_proj.weight", "attn_q.weight", "attention.wq.weight"),
            ("attention.wk", "self_attn.k_proj.weight", "attn_k.weight", "attention.wk.weight"),
            ("attention.wv", "self_attn.v_proj.weight", "attn_v.weight", "attention.wv.weight"),
            ("attention.wo", "self_attn.o_proj.weight", "attn_output.weight", "attention.wo.weight"),
            ("attention.bq", "self_attn.q_proj.bias", "attn_q.bias", "attention.wq.bias"),
            ("attention.bk", "self_attn.k_proj.bias", "attn_k.bias", "attention.wk.bias"),
            ("attention.bv", "self_attn.v_proj.bias", "attn_v.bias", "attention.wv.bias"),
            ("attention.bo", "self_attn.o_proj.bias", "attn_output.bias", "attention.wo.bias"),
            ("attention.q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight", "attention.q_norm.weight"),
            ("attention.k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight", "attention.k_norm.weight"),
            ("ffn_norm", "post_attention_layernorm.weight", "ffn_norm.weight", "ffn_norm.weight"),
            ("feed_forward.w1", "mlp.gate_proj.weight", "ffn_gate.weight", "feed_forward.w1.weight"),
            ("feed_forward.w2", "mlp.down_proj.weight", "ffn_down.weight", "feed_forward.w2.weight"),
            ("feed_forward.w3", "mlp.up_proj.weight", "ffn_up.weight", "feed_forward.w3.weight"),
        )
    },
}
FUSED = {  # instead, where a source (Phi-3) stores several of ours as the rows of one, in this order
    ours: (f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gg}")
    for names, hf, gg in (
        (("attention.wq", "attention.wk", "attention.wv"), "self_attn.qkv_proj.weight", "attn_qkv.weight"),
        (("feed_forward.w1", "feed_forward.w3"), "mlp.gate_up_proj.weight", "ffn_up.weight"),
    )
    for ours in names
}
DROPPED = (  # on purpose: RoPE frequencies, which the config says too (GGUF's are read into it)
    ("model.rotary_emb.inv_freq", "model.layers.{i}.self_attn.rotary_emb.inv_freq"),
    ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    ("rope.freqs", "layers.{i}.attention.inner_attention.rope.freqs"),
)
LAYER = re.compile(r"(?:model\.layers|layers|blk)\.(\d+)\..*\.(?:weight|bias)")  # a parameter of a layer
BUFFER = re.compile(r".*\.self_attn\.(?:masked_)?bias")  # a causal mask, as some old checkpoints store it


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened source. `read(key, shape)` gives one tensor, [out, in], and is told the shape it should have.

    Attributes:
      config: the model's shape.
      model: display name.
      source: identifies the input: its name and size.
      dtype: how the matrices are stored; float32 if quantised.
      kind: HUGGING_FACE, GGUF or META.
      keys: of all tensors.
      read: see above.
      tokenizer: the model's.
      interleaved: whether q and k have RoPE's pairs side by side, (2i, 2i + 1).
      warnings: what the user should know of the files.
    """

    config: LlamaConfig
    model: str
    source: str
    dtype: str
    kind: int
    keys: frozenset[str]
    read: Callable[[str, tuple[int, ...]], np.ndarray]
    tokenizer: TextTokenizer
    interleaved: bool
    warnings: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether it stores the arrays of FUSED as the rows of fewer."""
        return self.kind != META and FUSED["attention.wq"][self.kind].format(i=0) in self.keys

    def key_of(self, ours: str, layer: int | None) -> str:
        """The source's name of one of our arrays."""
        table = FUSED if self.fused and ours in FUSED else NAMES
        return table[ours][self.kind].format(i=layer)

    def wanted(self) -> set[str]:
        """The keys of the tensors that the network needs."""
        chunks = chunk_shapes(self.config)
        top, layer = ([name for name, _ in _leaves(chunks[key])] for key in (EMBEDDINGS_CHUNK, layer_chunk(0)))
        layers = range(self.config.num_hidden_layers)
        return {self.key_of(ours, None) for ours in top} | {self.key_of(ours, i) for ours in layer for i in layers}


def _leaves(shapes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            yield from _leaves(shape, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", shape


def check_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Compares the checkpoint's keys with what its config asks for.

    Returns:
      A warning, if there are tensors that the network does not use: heads for other tasks, buffers, more layers.

    Raises:
      InputError: a tensor is missing.
      UnsupportedError: a layer has a parameter that this network does not compute, such as a bias.
    """
    config, wanted = checkpoint.config, checkpoint.wanted()
    layers = range(config.num_hidden_layers)
    dropped = {template.format(i=i) for template in DROPPED[checkpoint.kind] for i in layers}
    if config.tie_word_embeddings:
        dropped.add(NAMES["output"][checkpoint.kind])
    unused = sorted(checkpoint.keys - wanted - dropped)
    for key in unused:
        layer = LAYER.fullmatch(key)
        if key == "lm_head.bias" or (layer and int(layer[1]) < len(layers) and not BUFFER.fullmatch(key)):
            raise UnsupportedError(
                f"tensor {quote(key)} in {checkpoint.source}: this network has none such, and is not computed "
                "without it"
            )
    if missing := sorted(wanted - checkpoint.keys):
        raise InputError(f"missing tensor {missing[0]} in {checkpoint.source} ({len(missing)} missing in all)")
    if not unused:
        return ()
    names = ", ".join(map(quote, unused[:3])) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
    return (f"tensors that a network of {len(layers)} layers does not use: {names}",)


# --- Arrays ---


def read_arrays(
    checkpoint: Checkpoint, shapes: Mapping[str, Any], layer: int | None, dtype: np.dtype, prefix: str = ""
) -> dict[str, Any]:
    """Reads one chunk's tensors into a nested dict like that of its shapes; `layer` is None for the embeddings' chunk.

    Raises:
      InputError: a tensor of another shape, one with NaN or infinity in it, or one too large for `dtype`.
    """
    return {
        name: read_arrays(checkpoint, shape, layer, dtype, f"{prefix}{name}.")
        if isinstance(shape, dict)
        else _read_array(checkpoint, f"{prefix}{name}", layer, shape, dtype)
        for name, shape in shapes.items()
    }


def _read_array(
    checkpoint: Checkpoint, ours: str, layer: int | None, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    key = checkpoint.key_of(ours, layer)
    transposed = len(shape) == 2 and ours != "tok_embeddings"  # sources store matrices [out, in]
    array = _stored(checkpoint, ours, key, shape[::-1] if transposed else shape)
    if not np.isfinite(array).all():
        raise InputError(f"tensor {key} has NaN or infinity in it")
    if checkpoint.interleaved and ours in ("attention.wq", "attention.wk", "attention.bq", "attention.bk"):
        array = half_split_rows(array, array.shape[0] // checkpoint.config.head_dim)
    with np.errstate(over="ignore"):
        result = np.array(array.T if transposed else array, dtype, order="C")  # a copy: sources may be read-only maps
    if not np.isfinite(result).all():
        raise InputError(f"tensor {key} goes up to {np.abs(array).max():.3g}, too large for {dtype}")
    return result


def _stored(checkpoint: Checkpoint, ours: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor, or its rows of one that it is fused into, as stored: of this shape."""
    layer = dict(_leaves(chunk_shapes(checkpoint.config)[layer_chunk(0)]))
    names = [name for name in FUSED if FUSED[name] == FUSED.get(ours)] if checkpoint.fused else []
    rows = {name: layer[name][-1] for name in names} or {ours: shape[0]}
    whole = (sum(rows.values()), *shape[1:])
    array = checkpoint.read(key, whole)
    if array.shape != whole:
        raise InputError(f"tensor {key} has shape {array.shape}, expected {whole}")
    start = sum(list(rows.values())[: list(rows).index(ours)])
    return array[start : start + shape[0]]


def half_split_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders each head's rows from GGUF's and Meta's RoPE pairs (2i, 2i + 1) to Hugging Face's (i, i + H/2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# --- What is said of a source ---


def model_name(folder: Path) -> str:
    """A folder's name; in the Hugging Face cache, models--ORG--NAME/snapshots/COMMIT, the model's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def source_of(path: Path, files: Sequence[Path]) -> str:
    """The input's name with the size of its files."""
    name = path.name if path.is_file() else model_name(path)
    return f"{name} ({sum(file.stat().st_size for file in files)} bytes)"


def common_dtype(names: Iterable[str]) -> str:
    """The one dtype that all matrices have; float32 if they differ or are quantised."""
    names = set(names)
    return names.pop() if len(names) == 1 and names <= set(DTYPES) else "float32"
