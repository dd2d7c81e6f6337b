"""The workloads: each program at one size, with its inputs and its count of operations.

Inputs are drawn at the scales that real models have, from a seed. `flops` counts the multiplications
and additions of contractions only, and of the visible half where a mask hides the rest; where it is not
given, the contractions of an eager run are counted. Bytes are counted by the runner from the tensors that
go in and come out. A builder takes sizes, so the two suites and the tests share one definition.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import programs
from benchmarks.arithmetic import count_arithmetic

Program = Callable[..., Any]


class Draw:
    """A seeded source of tensors on one device, at one working dtype."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self._device = device
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Draw from a normal distribution."""
        raw = torch.randn(shape, generator=self._generator, device=self._device)
        return (raw * scale + mean).to(self.dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        """Draw a [rows, columns] projection that keeps the scale of its input."""
        return self.normal(rows, columns, scale=columns**-0.5)

    def gain(self, width: int) -> Tensor:
        """Draw the weight of a normalization, which training leaves near 1."""
        return self.normal(width, scale=0.1, mean=1.0)

    def classes(self, rows: int, count: int) -> Tensor:
        """Draw class numbers below `count`."""
        return torch.randint(count, (rows,), generator=self._generator, device=self._device)

    def lengths(self, count: int, low: int, high: int) -> Tensor:
        """Draw lengths from `low` to `high`."""
        size = (count,)
        return torch.randint(low, high + 1, size, generator=self._generator, device=self._device)

    def rotary(self, length: int, width: int) -> tuple[Tensor, Tensor]:
        """Make the cosine and sine tables of a rotary embedding, each [length, width]."""
        frequency = 10000.0 ** (-torch.arange(0, width, 2, device=self._device) / width)
        angle = torch.outer(torch.arange(length, device=self._device).float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


@dataclass(frozen=True)
class Module:
    """A program that is a module, in evaluation; its parameters are drawn when it is first needed."""

    make: Callable[[], nn.Module]

    def on(self, device: str, dtype: torch.dtype) -> nn.Module:
        """Make the module; the same parameters every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval().to(device, dtype)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it where the first input lies."""
        return self.on(inputs[0].device.type, inputs[0].dtype)(*inputs)


@dataclass(frozen=True)
class Workload:
    """One program at one size; `library` is the same program through the library's own kernel.

    The search gets its budget `kernels` times over: a whole block has several to find.
    """

    name: str
    program: Program
    draw: Callable[[Draw], tuple[Tensor, ...]]
    flops: int | None = None
    library: Program | None = None
    quick: bool = False
    kernels: int = 1

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
        """Make the inputs; the same seed gives the same values."""
        return self.draw(Draw(device, dtype, seed))

    def ready(self, device: str, dtype: torch.dtype) -> "Workload":
        """Return the workload with its module made, where it is one."""
        if not isinstance(self.program, Module):
            return self
        return replace(self, program=self.program.on(device, dtype))

    def arithmetic(self, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
        """Return the operations of one run's contractions, and its exponentials and the like.

        Where `flops` leaves out what a mask hides, so many of them are left out, too.
        """
        counted, functions = count_arithmetic(self.program, inputs)
        if self.flops is None:
            return counted, functions
        hides = self.flops < counted
        return self.flops, functions * self.flops // counted if hides else functions


def attention(name: str, heads: int, queries: int, keys: int, width: int) -> Workload:
    """Plain attention."""
    return Workload(
        name,
        programs.attention,
        lambda d: (
            d.normal(heads, queries, width),
            d.normal(heads, keys, width),
            d.normal(heads, keys, width),
        ),
        4 * heads * queries * keys * width,
        programs.attention_library,
    )


def causal_attention(name: str, heads: int, length: int, width: int) -> Workload:
    """Self-attention to earlier positions."""
    return replace(
        attention(name, heads, length, length, width),
        program=programs.causal_attention,
        flops=4 * heads * width * (length * (length + 1) // 2),
        library=programs.causal_attention_library,
    )


def gqa_decode(name: str, batch: int, heads: int, kv_heads: int, keys: int, width: int) -> Workload:
    """One step of decoding with grouped query heads."""
    return Workload(
        name,
        programs.gqa_decode,
        lambda d: (
            d.normal(batch, heads, 1, width),
            d.normal(batch, kv_heads, keys, width),
            d.normal(batch, kv_heads, keys, width),
        ),
        4 * batch * heads * keys * width,
        programs.gqa_decode_library,
    )


def _with_gains(plain: Workload, program: Program, library: Program, width: int) -> Workload:
    """Give an attention workload two normalization gains."""
    return replace(
        plain,
        program=program,
        library=library,
        draw=lambda d: (*plain.draw(d), d.gain(width), d.gain(width)),
    )


def qk_norm_attention(name: str, heads: int, queries: int, keys: int, width: int) -> Workload:
    """Attention with normalized queries and keys."""
    plain = attention(name, heads, queries, keys, width)
    program, library = programs.qk_norm_attention, programs.qk_norm_attention_library
    return _with_gains(plain, program, library, width)


def kv_norm_attention(name: str, heads: int, queries: int, keys: int, width: int) -> Workload:
    """Attention with normalized keys and values."""
    plain = attention(name, heads, queries, keys, width)
    program, library = programs.kv_norm_attention, programs.kv_norm_attention_library
    return _with_gains(plain, program, library, width)


def soft_capped_attention(name: str, heads: int, queries: int, keys: int, width: int) -> Workload:
    """Attention with capped scores."""
    plain = attention(name, heads, queries, keys, width)
    return replace(plain, program=programs.soft_capped_attention, library=None)


def biased_attention(name: str, heads: int, queries: int, keys: int, width: int) -> Workload:
    """Attention with an additive bias."""
    plain = attention(name, heads, queries, keys, width)
    return replace(
        plain,
        program=programs.biased_attention,
        library=programs.biased_attention_library,
        draw=lambda d: (*plain.draw(d), d.normal(heads, queries, keys)),
    )


def rms_norm_linear(name: str, rows: int, width: int, out: int) -> Workload:
    """Normalize, then project."""
    return Workload(
        name,
        programs.rms_norm_linear,
        lambda d: (d.normal(rows, width), d.gain(width), d.weight(out, width)),
        2 * rows * width * out,
    )


def gated_mlp(name: str, rows: int, width: int, inner: int) -> Workload:
    """SwiGLU block."""
    return Workload(
        name,
        programs.gated_mlp,
        lambda d: (
            d.normal(rows, width),
            d.weight(inner, width),
            d.weight(inner, width),
            d.weight(width, inner),
        ),
        6 * rows * width * inner,
    )


def lora_linear(name: str, rows: int, width: int, out: int, rank: int) -> Workload:
    """Project with a low-rank update."""
    return Workload(
        name,
        programs.lora_linear,
        lambda d: (
            d.normal(rows, width),
            d.weight(out, width),
            d.weight(rank, width),
            d.weight(out, rank),
        ),
        2 * rows * (width * out + width * rank + rank * out),
    )


def n_transformer_update(name: str, rows: int, width: int) -> Workload:
    """Update a residual on the unit sphere."""
    return Workload(
        name,
        programs.n_transformer_update,
        lambda d: (
            d.normal(rows, width, scale=width**-0.5),
            d.normal(rows, width),
            d.normal(width, scale=0.01, mean=0.05),
        ),
        0,
    )


def layer_norm_gelu_mlp(name: str, rows: int, width: int, inner: int) -> Workload:
    """Apply a transformer MLP with its norm and residual."""
    return Workload(
        name,
        programs.layer_norm_gelu_mlp,
        lambda d: (
            d.normal(rows, width),
            d.gain(width),
            d.normal(width, scale=0.1),
            d.weight(inner, width),
            d.normal(inner, scale=0.1),
            d.weight(width, inner),
            d.normal(width, scale=0.1),
        ),
        4 * rows * width * inner,
    )


def residual_rms_norm(name: str, rows: int, width: int) -> Workload:
    """Residual addition, then normalization."""
    return Workload(
        name,
        programs.residual_rms_norm,
        lambda d: (d.normal(rows, width), d.normal(rows, width), d.gain(width)),
        0,
    )


def softmax_cross_entropy(name: str, rows: int, classes: int) -> Workload:
    """Compute the loss of a language model."""
    return Workload(
        name,
        programs.softmax_cross_entropy,
        lambda d: (d.normal(rows, classes, scale=2.0), d.classes(rows, classes)),
        0,
    )


def rope_scale(name: str, heads: int, length: int, width: int) -> Workload:
    """Rotary embedding and scale."""
    return Workload(
        name,
        programs.rope_scale,
        lambda d: (d.normal(heads, length, width), *d.rotary(length, width)),
        0,
    )


def decoder_block(
    name: str, length: int, size: int, heads: int, kv_heads: int, inner: int
) -> Workload:
    """Run a Llama-style decoder block on a prompt."""
    width = size // heads
    projections = 2 * length * size * (2 * size + 2 * kv_heads * width + 3 * inner)
    return Workload(
        name,
        programs.decoder_block,
        lambda d: (
            d.normal(length, size),
            d.gain(size),
            d.weight(size, size),
            d.weight(kv_heads * width, size),
            d.weight(kv_heads * width, size),
            d.weight(size, size),
            d.gain(size),
            d.weight(inner, size),
            d.weight(inner, size),
            d.weight(size, inner),
            *d.rotary(length, width),
        ),
        projections + 4 * size * (length * (length + 1) // 2),
        kernels=4,
    )


def _quick(workload: Workload) -> Workload:
    """Put a workload into the `--quick` subset."""
    return replace(workload, quick=True)


CPU: Final = (
    _quick(attention("attention-prefill", 2, 256, 4096, 64)),
    attention("mha", 4, 2048, 2048, 64),
    causal_attention("mha-causal", 4, 2048, 64),
    gqa_decode("gqa-decode", 8, 32, 8, 1024, 128),
    qk_norm_attention("qk-norm-attention", 8, 512, 2048, 64),
    kv_norm_attention("kv-norm-attention", 8, 512, 2048, 64),
    soft_capped_attention("soft-capped-attention", 8, 512, 2048, 64),
    biased_attention("biased-attention", 8, 512, 2048, 64),
    _quick(rms_norm_linear("rms-norm-linear", 16, 4096, 4096)),
    gated_mlp("gated-mlp-1", 1, 2048, 5632),
    gated_mlp("gated-mlp-8", 8, 2048, 5632),
    lora_linear("lora", 16, 4096, 4096, 16),
    _quick(n_transformer_update("n-trans-16", 16, 4096)),
    n_transformer_update("n-trans-1024", 1024, 4096),
    layer_norm_gelu_mlp("layer-norm-gelu-mlp", 128, 768, 3072),
    residual_rms_norm("residual-rms-norm", 1024, 4096),
    softmax_cross_entropy("softmax-cross-entropy", 256, 32000),
    rope_scale("rope-scale", 32, 2048, 128),
    decoder_block("decoder-block-16", 16, 1024, 16, 4, 2816),
    decoder_block("decoder-block-128", 128, 512, 8, 2, 1408),
)

CUDA: Final = (
    _quick(attention("attention-prefill", 32, 512, 8192, 128)),
    attention("mha", 32, 4096, 4096, 128),
    causal_attention("mha-causal", 32, 4096, 128),
    _quick(gqa_decode("gqa-decode", 32, 32, 8, 8192, 128)),
    qk_norm_attention("qk-norm-attention", 32, 2048, 4096, 128),
    kv_norm_attention("kv-norm-attention", 32, 2048, 4096, 128),
    _quick(soft_capped_attention("soft-capped-attention", 32, 2048, 4096, 128)),
    biased_attention("biased-attention", 32, 2048, 4096, 128),
    _quick(rms_norm_linear("rms-norm-linear", 16, 8192, 8192)),
    gated_mlp("gated-mlp-1", 1, 4096, 14336),
    gated_mlp("gated-mlp-8", 8, 4096, 14336),
    lora_linear("lora", 16, 8192, 8192, 16),
    _quick(n_transformer_update("n-trans-16", 16, 4096)),
    n_transformer_update("n-trans-16384", 16384, 4096),
    layer_norm_gelu_mlp("layer-norm-gelu-mlp", 4096, 1024, 4096),
    residual_rms_norm("residual-rms-norm", 16384, 4096),
    softmax_cross_entropy("softmax-cross-entropy", 4096, 32000),
    rope_scale("rope-scale", 32, 16384, 128),
    decoder_block("decoder-block", 512, 4096, 32, 8, 14336),
)
