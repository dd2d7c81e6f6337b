"""Count the arithmetic of one run of a program: contractions, and transcendental functions.

In: a program and its inputs. Out: the multiplications and additions of an eager run's contractions, and how
many exponentials, logarithms, hyperbolic tangents and the like it takes on a CPU, one for each element.
Divisions, roots and comparisons count nothing.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

_Formula = Callable[..., int]


def _per_element(count: int) -> _Formula:
    """Return what counts so many for each element of an operand, or of the result if that is larger."""

    def formula(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return count * max(prod(s) for s in (x, out_shape) if isinstance(s, torch.Size))

    return formula


def _scores(
    q: Any, k: Any, _v: Any, _dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    queries, keys = int(q[-2]), int(k[-2])
    seen = sum(min(i, keys) for i in range(1, queries + 1)) if is_causal else queries * keys
    return int(prod(q[:-2])) * seen


_ONCE: Final = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc"),
    *("sin", "cos", "tan", "atan", "sinh", "cosh", "tanh"),
    *("sigmoid", "silu", "gelu", "elu"),
    *("_softmax", "_log_softmax", "_safe_softmax", "logsumexp"),
)
# an exponential and a logarithm
_TWICE: Final = (
    *("softplus", "log_sigmoid_forward", "logaddexp", "mish"),
    "binary_cross_entropy_with_logits",
)
_FUNCTIONS: Final = {
    getattr(torch.ops.aten, form): _per_element(count)
    for names, count in ((_ONCE, 1), (_TWICE, 2))
    for name in names
    for form in (name, f"{name}_")
    if hasattr(torch.ops.aten, form)
} | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _scores}


def count_arithmetic(program: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Return the operations of a run's contractions, and how many functions of one number it evaluates."""
    with FlopCounterMode(display=False, custom_mapping=_FUNCTIONS) as counter:
        program(*inputs)
    counts = counter.get_flop_counts().get("Global", {})
    functions = sum(counts.get(operator, 0) for operator in _FUNCTIONS)
    return counter.get_total_flops() - functions, functions
