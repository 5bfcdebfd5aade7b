"""Comparisons with other programs and settings, run as `python -m bench.NAME` from the root."""
