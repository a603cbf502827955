"""Chosen by `python benchmarks/reproduce/csoba.py --tune`: (upper step, lower step)."""

STEPS = {}
