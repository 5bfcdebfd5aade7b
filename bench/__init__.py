"""Comparisons with other programs and other hardware; each runs as python -m bench.NAME."""
