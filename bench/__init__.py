"""Comparisons with other programs and compilers; each runs as python -m bench.NAME."""
