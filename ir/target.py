"""Targets: what a device can do, as the cost model and the command line see it.

The machine at hand is detected and measured (`superopt.calibrate`); GPUs that need not be present
are data here, for kernels compiled ahead of time. Both have the same fields and one JSON form.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Final, Literal, final

from superopt.ir.errors import SuperoptError

_FORMAT: Final = "superopt target 1"

KEPT_BYTES: Final = 1 << 16
"""What a value that blocks of a CPU leave to each other may take for all places of the loops, in float32: it shares a
second cache with tiles."""


@final
@dataclass(frozen=True, slots=True)
class Target:
    """Rates and sizes of one device; the defaults are a plain x86-64 with two cores.

    A core runs one block at a time: on a GPU it is a multiprocessor, and a vector lane one of a
    warp's threads. `peak_flops` is that of a large float32 matmul over all cores, `half_flops` that
    of 16-bit operands; `vector_ops` are elementwise operations per second and core. Bandwidths are
    in bytes per second: of memory for all cores together, of the caches per core. `inner_cache_bytes`
    is a core's own cache (a multiprocessor's shared memory), `outer_cache_bytes` the shared one.
    """

    name: str = "x86-64"
    kind: Literal["cpu", "cuda"] = "cpu"
    cores: int = 2
    vector_lanes: int = 16
    peak_flops: float = 2.0e11
    half_flops: float = 2.0e11
    vector_ops: float = 1.2e10
    memory_bandwidth: float = 1.6e10
    cache_bandwidth: float = 4.0e10
    inner_cache_bytes: int = 1 << 20
    outer_cache_bytes: int = 32 << 20
    launch_s: float = 4.0e-6
    block_s: float = 1.0e-7
    library_efficiency: float = 0.85
    library_call_s: float = 6.0e-6

    def to_json(self) -> str:
        """Return the target as text that `from_json` reads."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Target":
        """Read a target.

        Raises:
            SuperoptError: the text is not a target of this version.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise SuperoptError(f"a target is JSON: {error}") from None
        if not isinstance(body, dict) or body.pop("format", None) != _FORMAT:
            raise SuperoptError(f"a target is a JSON object of format {_FORMAT!r}")
        for f in fields(Target):
            value = body.get(f.name)
            wanted = str if isinstance(f.default, str) else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise SuperoptError(f"a target's {f.name} is like {f.default!r}, got {value!r}")
        unknown = body.keys() - {f.name for f in fields(Target)}
        if unknown:
            raise SuperoptError(f"a target has no {', '.join(sorted(unknown))}")
        return Target(**body)


def _gpu(
    name: str,
    *,
    cores: int,
    peak_tflops: float,
    half_tflops: float,
    memory_gb_s: float,
    shared_kib: int,
    l2_mib: int,
) -> Target:
    return Target(
        name=name,
        kind="cuda",
        cores=cores,
        vector_lanes=32,
        peak_flops=peak_tflops * 1e12,
        half_flops=half_tflops * 1e12,
        # a multiply-add is two operations
        vector_ops=peak_tflops * 1e12 / cores / 2,
        memory_bandwidth=memory_gb_s * 1e9,
        # the second-level cache reads about twice as fast as memory
        cache_bandwidth=2 * memory_gb_s * 1e9 / cores,
        inner_cache_bytes=shared_kib << 10,
        outer_cache_bytes=l2_mib << 20,
        block_s=5.0e-7,
    )


# NVIDIA's data sheets of the SXM modules, dense rates: A100 80GB, H100, B200; shared memory per
# block from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
GPUS: Final[dict[str, Target]] = {
    "sm_80": _gpu(
        "sm_80 (A100)",
        cores=108,
        peak_tflops=19.5,
        half_tflops=312,
        memory_gb_s=2039,
        shared_kib=163,
        l2_mib=40,
    ),
    "sm_90": _gpu(
        "sm_90 (H100)",
        cores=132,
        peak_tflops=67,
        half_tflops=989,
        memory_gb_s=3350,
        shared_kib=227,
        l2_mib=50,
    ),
    "sm_100": _gpu(
        "sm_100 (B200)",
        cores=148,
        peak_tflops=75,
        half_tflops=2250,
        memory_gb_s=8000,
        shared_kib=227,
        l2_mib=126,
    ),
}
