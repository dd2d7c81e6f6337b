"""Lower block graphs to readable Triton source.

In: a tile program and a GPU target. Out: Triton source that runs on a GPU, runs in Triton's
interpreter, and compiles ahead of time for a named architecture.
"""
