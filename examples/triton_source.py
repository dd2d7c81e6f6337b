"""From a block graph to Triton source, and to a cubin for a GPU that need not be here."""

import sys
import tempfile
from pathlib import Path

from superopt.codegen.triton import TritonConfig, compile_ahead, lower
from superopt.ir import build as b

# normalize rows and multiply by a matrix, in one pass over k: 7 x 100 times 100 x 50
x, w = b.input_("x", (7, 100), b.DType.BF16), b.input_("w", (100, 50), b.DType.BF16)
block = b.BlockBuilder("norm_linear", grid={"m": 1, "n": 2}, loops={"k": 4})
rows = b.cast(block.load(x, ("m", 8), ("k", 32)), b.DType.F32)
columns = b.cast(block.load(w, ("k", 32), ("n", 32)), b.DType.F32)
product = b.accum_sum(b.matmul(rows, columns), "k")
squares = b.accum_sum(b.reduce_sum(b.mul(rows, rows), -1), "k")
normal = b.div(product, b.sqrt(b.add(b.div(squares, 100.0), 1e-6)))
block.store(b.cast(normal, b.DType.BF16), (7, 50), ("m", 8), ("n", 32))

source = lower(block.graph(), TritonConfig(warps=4, stages=3), "norm_linear")
print(source.text)
architectures = [int(argument) for argument in sys.argv[1:]] or [80, 90]
for arch in architectures:
    with tempfile.TemporaryDirectory() as folder:
        print(f"sm_{arch}: a cubin of {len(compile_ahead(source, arch, Path(folder)))} bytes")
