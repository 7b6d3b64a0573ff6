"""Proof of value: one file per claim; results are JSON under `benchmarks/results`."""
