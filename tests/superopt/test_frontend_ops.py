"""Every operator family, lifted and run, equals eager PyTorch; nothing is opaque by accident."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from superopt.frontend import lift
from superopt.ir.ops import leaf
from superopt.ir.ops import library as library_ops
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.text import parse_graph, print_graph
from superopt.verify.reference import run_reference

Results = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One program, its arguments, and whether its operators stay opaque on purpose."""

    name: str
    program: Callable[..., Results]
    inputs: Callable[[torch.dtype], tuple[torch.Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    opaque: bool = False


FLOATS = (torch.float32, torch.bfloat16)
ALL_FLOATS = (*FLOATS, torch.float16)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=_seeded()).to(dtype)


def other(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11)).to(dtype)


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=_seeded()).to(dtype)


_UNARY = [
    "neg",
    "abs",
    "sign",
    "sgn",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "exp",
    "exp2",
    "expm1",
    "sin",
    "cos",
    "tan",
    "atan",
    "sinh",
    "cosh",
    "asinh",
    "tanh",
    "sigmoid",
    "erf",
    "isnan",
    "isinf",
    "isfinite",
    "square",
    "positive",
    "deg2rad",
    "sinc",
    "relu",
    "nan_to_num",
]
_POSITIVE = ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma"]
_UNIT = ["asin", "acos", "atanh", "erfinv", "logit"]


def unary(x: torch.Tensor) -> Results:
    p = x.abs() + 0.5
    u = torch.tanh(x) * 0.9
    results = {n: getattr(torch, n)(x) for n in _UNARY}
    results |= {n: getattr(torch, n)(p) for n in _POSITIVE}
    results |= {n: getattr(torch, n)(u.abs() * 0.9 + 0.05) for n in _UNIT}
    return results | {
        "acosh": torch.acosh(p + 1.0),
        "logical_not": torch.logical_not(x),
        "round_2": torch.round(x, decimals=2),
        "round_tens": torch.round(x * 50, decimals=-1),
        "round_ties": torch.round(torch.arange(-99, 99).to(x.dtype) / 16, decimals=1),
        "round_large": torch.round(x * 9e3, decimals=2),
    }


def integer_unary(i: torch.Tensor) -> Results:
    names = [
        "neg",
        "abs",
        "sign",
        "floor",
        "ceil",
        "round",
        "trunc",
        "exp",
        "sqrt",
        "sin",
        "sigmoid",
        "bitwise_not",
        "square",
    ]
    return {n: getattr(torch, n)(i) for n in names}


_BINARY = [
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "floor_divide",
    "remainder",
    "fmod",
    "atan2",
    "copysign",
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logaddexp",
    "logaddexp2",
    "xlogy",
    "heaviside",
    "isclose",
]


def binary(x: torch.Tensor, y: torch.Tensor) -> Results:
    results = {n: getattr(torch, n)(x, y) for n in _BINARY if n != "xlogy"}
    return results | {
        "pow": torch.pow(x.abs(), y),
        "xlogy": torch.xlogy(x, y.abs()),
        "add_alpha": torch.add(x, y, alpha=0.5),
        "sub_alpha": torch.sub(x, y, alpha=2),
        "scalar_add": x + 2,
        "scalar_rsub": 1 - x,
        "scalar_div": x / 3,
        "scalar_over": 1 / y,
        "scalar_floor": x // 0.3,
        "pow2": x**2,
        "pow3": x**3,
        "pow_half": x.abs() ** 0.5,
        "pow_minus": x.abs() ** -0.5,
        "pow_minus_2": x**-2,
        "pow_1_7": x.abs() ** 1.7,
        "base": 2**x,
        "trunc_div": torch.div(x, y, rounding_mode="trunc"),
        "compare_scalar": x < 0.1,
    }


def integer_binary(i: torch.Tensor, j: torch.Tensor) -> Results:
    names = [
        "add",
        "sub",
        "mul",
        "div",
        "maximum",
        "minimum",
        "eq",
        "lt",
        "ge",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
    ]
    results = {n: getattr(torch, n)(i, j) for n in names}
    return results | {
        "shl": i << 2,
        "shr": i >> 1,
        "floor_divide": i // -3,
        "remainder": (i - 4) % 3,
        "fmod": torch.fmod(i - 4, 3),
        "trunc": torch.div(i - 4, 3, rounding_mode="trunc"),
        "float_scalar": i * 0.5,
        "float_compare": i > 1.5,
        "square": i**2,
        "and_scalar": i & 3,
    }


def shifts(i: torch.Tensor, j: torch.Tensor) -> Results:
    return {
        "left": i << j,
        "left_all": i << 100,
        "left_negative": i << -1,
        "right": i >> j,
        "right_all": i >> 100,
        "right_negative": i >> -1,
        "of_a_number": torch.bitwise_left_shift(3, j),
        "number_by": torch.bitwise_right_shift(-100 if i.is_signed() else 100, j),
    }


def integer_division(i: torch.Tensor, j: torch.Tensor) -> Results:
    return {
        "floor_divide": i // j,
        "remainder": i % j,
        "of_a_number": 7 % j,
        "fmod": torch.fmod(i, j),
        "trunc": torch.div(i, j, rounding_mode="trunc"),
    }


def boolean(a: torch.Tensor, b: torch.Tensor) -> Results:
    return {
        "add": a + b,
        "mul": a * b,
        "and": a & b,
        "or": a | b,
        "xor": a ^ b,
        "not": ~a,
        "sum": a.sum(),
        "any": a.any(1),
        "all": a.all(),
        "plus": a + 1,
        "times": a * 0.5,
        "eq": a == b,
        "where": torch.where(a, 1.0, 0.0),
    }


def selection(x: torch.Tensor, y: torch.Tensor) -> Results:
    c = x > y
    return {
        "where": torch.where(c, x, y),
        "where_scalar": torch.where(c, x, 0.25),
        "clamp": torch.clamp(x, -0.5, 0.5),
        "clamp_tensor": torch.clamp(x, y, y + 1),
        "clamp_min": torch.clamp(x, min=0.1),
        "clip": torch.clip(x, max=0.1),
        "masked_fill": x.masked_fill(c, float("-inf")),
        "masked_fill_tensor": x.masked_fill(c, torch.tensor(2.0)),
        "lerp": torch.lerp(x, y, 0.3),
        "lerp_tensor": torch.lerp(x, y, x),
        "addcmul": torch.addcmul(x, x, y, value=2.0),
        "addcdiv": torch.addcdiv(x, x, y.abs() + 1, value=0.5),
        "threshold": torch.threshold(x, 0.1, 5.0),
    }


def activations(x: torch.Tensor, w: torch.Tensor) -> Results:
    names = [
        "relu",
        "relu6",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "glu",
        "gelu",
        "logsigmoid",
        "hardshrink",
        "tanhshrink",
        "softsign",
        "softplus",
        "softshrink",
        "tanh",
        "sigmoid",
        "silu",
        "mish",
    ]
    results = {n: getattr(F, n)(x) for n in names}
    return results | {
        "prelu": F.prelu(x, w),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "elu_alpha": F.elu(x, 0.5),
        "rrelu": F.rrelu(x, training=False),
        "threshold": F.threshold(x, 0.1, 2.0),
        "softmin": F.softmin(x, -1),
        "softmax": F.softmax(x, 0),
        "log_softmax": F.log_softmax(x, -1),
        "softmax_f32": F.softmax(x, -1, dtype=torch.float32),
        "normalize": F.normalize(x),
        "dropout": F.dropout(x, training=False),
    }


def contractions(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Results:
    return {
        "matmul": x @ y.T,
        "mm": torch.mm(x, y.T),
        "bmm": torch.bmm(z, z.transpose(1, 2)),
        "matmul_broadcast": z @ y.T,
        "vector": x @ y[0],
        "vector_left": x[0] @ y.T,
        "dot": torch.dot(x[0], y[0]),
        "mv": torch.mv(x, y[0]),
        "outer": torch.outer(x[0], y[0]),
        "addmm": torch.addmm(x[:, :1], x, y.T, beta=0.5, alpha=2.0),
        "baddbmm": torch.baddbmm(z[:, :, :1], z, z.transpose(1, 2)),
        "linear": F.linear(z, y, y[:, 0]),
        "linear_plain": F.linear(x, y),
        "linear_vector": F.linear(x[0], y),
        "einsum": torch.einsum("ij,kj->ik", x, y),
        "einsum_batch": torch.einsum("bij,bkj->bik", z, z),
        "einsum_sum": torch.einsum("bij,kj->k", z, y),
        "tensordot": torch.tensordot(x, y.T, 1),
        "kron": torch.kron(x, y),
    }


def reductions(x: torch.Tensor) -> Results:
    return {
        "sum": x.sum(),
        "sum_dim": x.sum(1),
        "sum_two": x.sum((0, 2), keepdim=True),
        "mean": x.mean(),
        "mean_dim": x.mean(-1, keepdim=True),
        "var": x.var(),
        "var_dim": x.var(1),
        "std": x.std(1, unbiased=False),
        "var_mean": torch.var_mean(x, (1, 2)),
        "norm": torch.norm(x),
        "norm_1": torch.norm(x, p=1, dim=1),
        "norm_inf": torch.linalg.vector_norm(x, float("inf"), dim=-1),
        "norm_3": torch.linalg.vector_norm(x, 3, dim=1),
        "norm_0": torch.linalg.vector_norm(x, 0, dim=1),
        "amax": x.amax(1),
        "amin": x.amin((0, 1)),
        "max": x.max(),
        "max_dim": x.max(1),
        "min_dim": x.min(-1, keepdim=True),
        "aminmax": torch.aminmax(x, dim=1),
        "argmax": x.argmax(1),
        "argmax_all": x.argmax(),
        "argmin": x.argmin(-1, keepdim=True),
        "prod": x.prod(),
        "prod_dim": x.prod(1),
        "logsumexp": torch.logsumexp(x, 1),
        "logsumexp_two": torch.logsumexp(x, (0, 2), keepdim=True),
        "any": (x > 0).any(1),
        "all": (x > 0).all(),
        "cumsum": x.cumsum(1),
        "cumprod": x.cumprod(-1),
        "count_nonzero": torch.count_nonzero(x),
        "nansum": torch.nansum(x),
    }


def norms(x: torch.Tensor, image: torch.Tensor, w: torch.Tensor) -> Results:
    c = image.shape[1]
    mean, var, weight = w[:c], w[:c].abs() + 0.5, w[:c] + 1
    wide = x.float()
    return {
        "layer_norm": F.layer_norm(x, x.shape[-1:], w, w, 1e-5),
        "layer_norm_plain": F.layer_norm(x, x.shape[-2:]),
        "layer_norm_bias": F.layer_norm(x, x.shape[-1:], None, w),
        "rms_norm": F.rms_norm(x, x.shape[-1:], w, 1e-6),
        "rms_norm_plain": F.rms_norm(x, x.shape[-1:]),
        "group_norm": F.group_norm(image, 2, weight, mean),
        "instance_norm": F.instance_norm(image, weight=weight, bias=mean),
        "batch_norm": F.batch_norm(image, mean, var, weight, mean),
        "batch_norm_plain": F.batch_norm(image, mean, var),
        "cosine": F.cosine_similarity(x, x + 1, dim=-1),
        **{f"cdist_{p}": torch.cdist(wide, wide.flip(1), p=p) for p in (0, 1, 2, 3, torch.inf)},
    }


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> Results:
    sdpa = F.scaled_dot_product_attention
    allowed = m > -1.0
    wide_k, wide_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return {
        "plain": sdpa(q, wide_k, wide_v),
        "causal": sdpa(q, wide_k, wide_v, is_causal=True),
        "scale": sdpa(q, wide_k, wide_v, scale=0.3),
        "gqa": sdpa(q, k, v, enable_gqa=True),
        "gqa_causal": sdpa(q, k, v, is_causal=True, enable_gqa=True),
        "bias": sdpa(q, wide_k, wide_v, attn_mask=m),
        "mask": sdpa(q, wide_k, wide_v, attn_mask=allowed),
        "gqa_mask": sdpa(q, k, v, attn_mask=allowed[0, :1], enable_gqa=True),
        "empty_row": sdpa(q, wide_k, wide_v, attn_mask=allowed & (m[..., :1] > 100)),
        "rank_3": sdpa(q[0], wide_k[0], wide_v[0]),
        "rank_2": sdpa(q[0, 0], wide_k[0, 0], wide_v[0, 0]),
        "ranks": sdpa(q[0], wide_k, wide_v),
        "one_head": sdpa(q, k[:, :1], v[:, :1]),
    }


def indexing(x: torch.Tensor, i: torch.Tensor, ii: torch.Tensor) -> Results:
    return {
        "embedding": F.embedding(ii % x.shape[0], x),
        "gather": torch.gather(x, 1, ii),
        "gather_small": torch.gather(x, 0, ii[:2, :3] % x.shape[0]),
        "index_select": x.index_select(0, i),
        "index": x[i],
        "index_negative": x[i - 2],
        "index_column": x[:, i],
        "index_pair": x[i, i],
        "index_2d": x[ii[:2] % x.shape[0]],
        "select": x[1],
        "slice": x[..., 1:6:2],
        "none": x[:, None],
        "take_along": torch.take_along_dim(x, ii, 1),
        "one_hot": F.one_hot(i, 5),
        "scatter": x.scatter(1, ii[:, :1], 2),
        "scatter_twice": x.scatter(1, ii[:, :1].repeat(1, 2), x[:, 2:4]),
        "scatter_add": x.scatter_add(1, ii[:, :1].repeat(1, 2), x[:, 2:4]),
        "scatter_integers": torch.zeros_like(ii).scatter(1, ii[:, :1] % ii.shape[1], 1),
        "negative_slice": x[-3:-1],
    }


def shapes(x: torch.Tensor, y: torch.Tensor, image: torch.Tensor) -> Results:
    return {
        "cat": torch.cat([x, y]),
        "cat_last": torch.cat([x, y], -1),
        "stack": torch.stack([x, y], 1),
        "hstack": torch.hstack([x, y]),
        "split": x.split(3, 1),
        "split_sizes": x.split([1, 3], 0),
        "chunk": x.chunk(3, 1),
        "unbind": x.unbind(0),
        "pad": F.pad(x, (1, 2)),
        "pad_value": F.pad(x, (1, 0, 0, 2), value=3.0),
        "pad_negative": F.pad(x, (-1, 2)),
        "pad_reflect": F.pad(image, (1, 1, 1, 1), mode="reflect"),
        "pad_replicate": F.pad(image, (1, 1, 1, 1), mode="replicate"),
        "pad_circular": F.pad(image, (1, 1, 1, 1), mode="circular"),
        "permute": image.permute(0, 2, 3, 1),
        "reshape": x.reshape(2, -1),
        "expand": x.expand(3, *x.shape),
        "repeat": x.repeat(2, 1, 3),
        "repeat_interleave": x.repeat_interleave(2, 1),
        "tile": torch.tile(x, (2,)),
        "flip": x.flip(0, 1),
        "roll": x.roll(1, 0),
        "roll_flat": x.roll(-3),
        "roll_two": x.roll((1, 2), (0, 1)),
        "cross": torch.cross(image[:, :3], image[:, 1:], dim=1),
        "cross_broadcast": torch.linalg.cross(image[0, 0, :, :3], image[0, 1, :1, 1:4]),
        "tril": torch.tril(x),
        "triu": torch.triu(x, 1),
        "arange": torch.arange(5) + x[0, 0],
        "arange_step": torch.arange(1, 9, 2),
        "arange_truncated": torch.arange(0.9, -7.9, -1.7, dtype=torch.int64),
        "arange_float": torch.arange(0.0, 1.0, 0.1),
        "linspace": torch.linspace(0, 1, 5),
        "eye": torch.eye(3),
        "eye_wide": torch.eye(3, 300, dtype=torch.bool),
        "full": torch.full((2, 3), 4.0) + x[0, 0],
        "ones_like": torch.ones_like(x),
        "zeros": x.new_zeros(3),
        "squeeze": x[:1].squeeze(0),
        "unsqueeze": x.unsqueeze(-1),
        "t": x.T,
        "movedim": image.movedim(1, -1),
        "flatten": image.flatten(1),
        "narrow": x.narrow(0, 1, 2),
        "meshgrid": torch.meshgrid(x[0], y[:, 0], indexing="ij"),
        "pixel_shuffle": F.pixel_shuffle(image, 2),
        "diag_embed": torch.diag_embed(x),
        "diagonal": torch.diagonal(x @ y.T),
        "diagonal_above": image.diagonal(1, -2, 1),
        "diagonal_below": torch.diagonal(x, -2),
        "unfold": x.unfold(1, 3, 2),
        "unfold_first": image.unfold(-2, 2, 1),
        "unfold_apart": image.unfold(1, 2, 2),
        "unfold_long": x.repeat(1, 4).unfold(-1, 11, 2),
        "im2col": F.unfold(image, 3, padding=1),
        "im2col_options": F.unfold(
            image[0], (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)
        ),
        "im2col_apart": F.unfold(image, 2, stride=2),
        "half": x.to(torch.float16),
        "int": (x * 5).to(torch.int32),
        "bool": x.to(torch.bool),
        "rot90": x.rot90(),
        "contiguous": x.T.contiguous(),
    }


def library(image: torch.Tensor, w: torch.Tensor) -> Results:
    line, volume = image[:, :, 0], image[:, None]
    return {
        "conv2d": F.conv2d(image, w, w[:, 0, 0, 0]),
        "conv2d_options": F.conv2d(image, w[:, :2], stride=2, padding=1, dilation=2, groups=2),
        "conv2d_same": F.conv2d(image, w, padding="same"),
        "conv2d_of_one": F.conv2d(image, w[:, :, :1, :1], w[:, 0, 0, 0]),
        "conv2d_of_one_place": F.conv2d(image[:, :, :1, :1], w[:, :, :1, :1]),
        "conv2d_of_one_padded": F.conv2d(image, w[:, :, :1, :1], padding=1),
        "conv2d_of_one_strided": F.conv2d(image, w[:, :, :1, :1], stride=2),
        "conv1d": F.conv1d(line, w[:, :, 0], padding=1),
        "conv3d": F.conv3d(volume, w[:, None, :, :, :2]),
        "transposed": F.conv_transpose2d(image, w.transpose(0, 1), stride=2, output_padding=1),
        "transposed_1d": F.conv_transpose1d(line, w.transpose(0, 1)[..., 0]),
        "unbatched": F.conv2d(image[0], w),
        "max_pool2d": F.max_pool2d(image, 2),
        "max_pool2d_options": F.max_pool2d(image, 3, 2, 1, ceil_mode=True),
        "max_pool1d": F.max_pool1d(line, 2),
        "max_pool3d": F.max_pool3d(volume, 2),
        "avg_pool2d": F.avg_pool2d(image, 3, 2, 1, count_include_pad=False),
        "max_pool2d_dilated": F.max_pool2d(image, 2, 1, 1, dilation=2),
        "max_pool2d_large": F.max_pool2d(image, 5, 1, 2),
        "avg_pool2d_padded": F.avg_pool2d(image, 3, 2, 1),
        "avg_pool2d_divisor": F.avg_pool2d(image, 2, 1, 1, divisor_override=5),
        "avg_pool2d_ceil": F.avg_pool2d(image, 2, 2, 1, ceil_mode=True),
        "avg_pool2d_half": F.avg_pool2d(image.bfloat16(), 2, 3),
        "depthwise": F.conv2d(image, w[:1, :, :2].transpose(0, 1), padding=1, groups=4),
        "avg_pool1d": F.avg_pool1d(line, 2),
        "avg_pool3d": F.avg_pool3d(volume, 2),
        "adaptive_1": F.adaptive_avg_pool2d(image, 1),
        "adaptive_4": F.adaptive_avg_pool2d(image, 4),
        "adaptive_1d": F.adaptive_avg_pool1d(line, 2),
        "local_response": F.local_response_norm(image, 2),
        "lp_pool": F.lp_pool2d(image.abs(), 2, 2),
    }


def losses(x: torch.Tensor, y: torch.Tensor, target: torch.Tensor) -> Results:
    p, s = y.sigmoid(), y.sign()
    weight = torch.linspace(0.5, 1.5, x.shape[1])
    return {
        "cross_entropy": F.cross_entropy(x, target),
        "cross_entropy_none": F.cross_entropy(x, target, reduction="none"),
        "cross_entropy_smooth": F.cross_entropy(x, target, weight, label_smoothing=0.1),
        "cross_entropy_soft": F.cross_entropy(x, y.softmax(1)),
        "cross_entropy_ignore": F.cross_entropy(x, target, ignore_index=2),
        "nll": F.nll_loss(x, target),
        "mse": F.mse_loss(x, y),
        "l1": F.l1_loss(x, y),
        "smooth_l1": F.smooth_l1_loss(x, y),
        "huber": F.huber_loss(x, y),
        "bce": F.binary_cross_entropy(x.sigmoid(), p),
        "bce_logits": F.binary_cross_entropy_with_logits(x, p),
        "kl_div": F.kl_div(x, p, reduction="batchmean"),
        "soft_margin": F.soft_margin_loss(x, s),
        "hinge_embedding": F.hinge_embedding_loss(x, s),
        "margin_ranking": F.margin_ranking_loss(x, y, s),
        "cosine_embedding": F.cosine_embedding_loss(x, y, s[:, 0]),
        "triplet": F.triplet_margin_loss(x, y, y.flip(0)),
        "poisson": F.poisson_nll_loss(x, y.abs()),
        "multilabel_soft": F.multilabel_soft_margin_loss(x, (y > 0).float()),
    }


def opaque(x: torch.Tensor, i: torch.Tensor) -> Results:
    return {
        "topk": x.topk(2),
        "sort": x.sort(),
        "argsort": x.argsort(stable=True),
        "cummax": x.cummax(1),
        "scatter": x.scatter(1, i, 0.5),
        "median": x.median(),
        "heads": F.scaled_dot_product_attention(x[None, :1], x[None, :, None], x[None, :, None]),
        "labels": F.multilabel_margin_loss(x[:2], torch.cat([i, 0 * i - 1], 1).view(2, 8)),
        "erfc": torch.special.erfc(x),
        "digamma": torch.digamma(x.abs() + 1),
        "index_put": x.index_put((i[:, 0] % x.shape[0],), x[0]),
        "index_add": torch.zeros_like(x).index_add_(0, i[:, 0] % x.shape[0], x, alpha=2),
        "index_copy": x.index_copy(0, i[:1, 0] % x.shape[0], x[:1] * 2),
        "upsample": F.interpolate(x[None, None], scale_factor=2, mode="nearest"),
        "fft": torch.fft.rfft(x).abs(),
    }


def powers(x: torch.Tensor) -> Results:
    return {str(p): x**p for p in (1.5, -1.5, 2.5, -2.5, 3.5, -3.5, 4, -3, -4, 1.7)}


_EXTREMES = [-torch.inf, torch.inf, torch.nan, -0.0, 0.0, -2.5, 1e-30, 1e30, 3.7]

FAMILIES = (
    Family("unary", unary, lambda d: (normal(4, 9, dtype=d),), ALL_FLOATS),
    Family(
        "integer_unary",
        integer_unary,
        lambda d: (integers(1, 9, 4, 5, dtype=d),),
        (torch.int64, torch.uint8),
    ),
    Family("powers", powers, lambda d: (torch.tensor(_EXTREMES, dtype=d),), FLOATS),
    Family("binary", binary, lambda d: (normal(4, 9, dtype=d), other(9, dtype=d)), FLOATS),
    Family(
        "integer_binary",
        integer_binary,
        lambda d: (integers(1, 9, 4, 5, dtype=d), integers(2, 7, 4, 1, dtype=d)),
        (torch.int32, torch.int8),
    ),
    Family(
        "shifts",
        shifts,
        lambda d: (integers(0, 127, 6, dtype=d), torch.tensor([0, 3, 7, 8, 33, 64], dtype=d)),
        (torch.int64, torch.int8, torch.uint8),
    ),
    Family(
        "integer_division",  # it raises for a divisor of 0, which kernels cannot
        integer_division,
        lambda d: (integers(1, 9, 4, 5, dtype=d), integers(2, 7, 4, 1, dtype=d)),
        (torch.int64,),
        opaque=True,
    ),
    Family("boolean", boolean, lambda d: (normal(4, 5) > 0, other(4, 5) > 0), (torch.bool,)),
    Family("selection", selection, lambda d: (normal(4, 6, dtype=d), other(4, 6, dtype=d)), FLOATS),
    Family(
        "activations", activations, lambda d: (normal(4, 8, dtype=d), other(8, dtype=d)), FLOATS
    ),
    Family(
        "contractions",
        contractions,
        lambda d: (normal(4, 8, dtype=d), other(5, 8, dtype=d), normal(3, 4, 8, dtype=d)),
        FLOATS,
    ),
    Family("reductions", reductions, lambda d: (normal(3, 5, 6, dtype=d),), FLOATS),
    Family(
        "norms",
        norms,
        lambda d: (normal(2, 3, 8, dtype=d), normal(2, 4, 6, 6, dtype=d), other(8, dtype=d)),
        ALL_FLOATS,
    ),
    Family(
        "attention",
        attention,
        lambda d: (
            normal(2, 4, 5, 8, dtype=d),
            other(2, 2, 7, 8, dtype=d),
            normal(2, 2, 7, 8, dtype=d),
            other(2, 4, 5, 7, dtype=d),
        ),
        ALL_FLOATS,
    ),
    Family(
        "indexing",
        indexing,
        lambda d: (normal(4, 8, dtype=d), integers(0, 4, 5), integers(0, 8, 4, 6)),
        (torch.float32, torch.int64),
    ),
    Family(
        "shapes",
        shapes,
        lambda d: (normal(4, 8), other(4, 8), normal(2, 4, 6, 6)),
    ),
    Family("library", library, lambda d: (normal(2, 4, 8, 8), other(6, 4, 3, 3))),
    Family("losses", losses, lambda d: (normal(4, 6), other(4, 6), integers(0, 6, 4))),
    Family(
        "opaque",
        opaque,
        lambda d: (normal(4, 8), integers(0, 8, 4, 2)),
        opaque=True,
    ),
)

_TOLERANCE = {
    torch.float32: {},
    # a compound operator is rounded once by PyTorch and once per step in the graph
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-2},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
}
_CASES = [
    pytest.param(family, dtype, id=f"{family.name}-{str(dtype).removeprefix('torch.')}")
    for family in FAMILIES
    for dtype in family.dtypes
]


@pytest.mark.parametrize(("family", "dtype"), _CASES)
def test_family_equals_eager(family: Family, dtype: torch.dtype, runner: Any) -> None:
    args = family.inputs(dtype)
    expected = family.program(*args)
    lifted = lift(family.program, args)
    got = runner(lifted, *args)
    assert set(got) == set(expected)
    for name, want in expected.items():
        for x, y in zip(pytree.tree_leaves(got[name]), pytree.tree_leaves(want), strict=True):
            tolerance = _TOLERANCE.get(x.dtype, {})
            torch.testing.assert_close(
                x, y, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
    text = print_graph(lifted.graph)
    assert parse_graph(text) == lifted.graph
    opaque_nodes = [n.attrs.target for n in lifted.graph.nodes() if n.op is library_ops.OPAQUE]
    assert bool(opaque_nodes) == family.opaque, opaque_nodes


@pytest.mark.parametrize(
    ("program", "number"),
    [(lambda x: x - 1003, 1004), (lambda x: 1003 - x, 1004), (lambda x: x * 1.005, 1.005)],
)
def test_numbers_are_rounded_where_pytorch_rounds_them(program: Any, number: float) -> None:
    """Kernels take constants as they are."""
    x = torch.tensor([992.0, 1000.0, 3.0]).bfloat16()
    constants = [n for n in lift(program, (x,)).graph.nodes() if n.op is leaf.CONSTANT]
    assert [n.attrs.value for n in constants] == [number]
    assert torch.equal((x.float() - 1004).bfloat16(), x - 1003)


@pytest.mark.parametrize(
    ("program", "cut"),
    [
        (lambda x: x.sum(1), True),
        (lambda x: (x * 2).unflatten(2, (3, 2)).amax((1, 3)), True),
        (lambda x: x.prod(1), True),
        (lambda x: x.mean((1, 2)), False),  # of 24 elements
        (lambda x: x.amin(-1), False),  # they lie beside each other
        (
            lambda x: x.softmax(-1).sum(1),
            False,
        ),  # what is asked for is not read, but computed of others
        (lambda x: (x > 0).sum(1), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_elements_that_lie_apart_are_combined_one_by_one(
    program: Any, cut: bool, dtype: torch.dtype
) -> None:
    x = normal(2, 4, 6, dtype=dtype)
    lifted = lift(program, (x,))
    plain = expand(lifted.graph).nodes()
    assert cut == (not any(n.op.kind is OpKind.REDUCTION for n in plain))
    torch.testing.assert_close(run_reference(lifted.graph, [x])[0], program(x))
