"""Models on disk: checkpoints of other programs, the chunked weights folder, and tokenizers. No JAX."""
