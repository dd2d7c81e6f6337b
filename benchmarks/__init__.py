"""Measure superopt against what a user would have run otherwise.

In: programs written in plain PyTorch (`benchmarks.programs`) at fixed sizes (`benchmarks.workloads`).
Out: a table, and JSON with the machine in `benchmarks/results/`. Every variant is checked against
float64 before it is timed; all variants of a workload are timed interleaved in one process.
"""
