"""Lower block graphs to C++17 with OpenMP and vector types, compile them and load them.

In: a tile program and a CPU target. Out: a shared object with a C entry point. The generated source
includes the headers in `runtime/`, which are shipped with the package.
"""
