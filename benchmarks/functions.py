"""Count the transcendental functions that one run of a program evaluates.

In: a program and its inputs. Out: how many exponentials, logarithms, hyperbolic tangents and the like an
eager run on a CPU takes, one for each element. Divisions, roots and comparisons count nothing.
"""

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# an exponential and a logarithm
_TWICE: Final = (
    *("softplus", "log_sigmoid_forward", "logaddexp", "mish"),
    "binary_cross_entropy_with_logits",
)
_FUNCTIONS: Final = dict.fromkeys(
    (
        *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc"),
        *("sin", "cos", "tan", "atan", "sinh", "cosh", "tanh"),
        *("sigmoid", "silu", "gelu", "elu"),
        *("_softmax", "_log_softmax", "_safe_softmax", "logsumexp"),
    ),
    1,
) | dict.fromkeys(_TWICE, 2)
"""How many an operator takes for each element of its operand, or of its result if that is larger."""
_ATTENTION: Final = "_scaled_dot_product_flash_attention_for_cpu"
_IS_CAUSAL: Final = 4


def count_functions(program: Callable[..., Any], inputs: tuple[Tensor, ...]) -> int:
    """Return how many functions of one number a run of the program evaluates."""
    counter = _Counter()
    with counter:
        program(*inputs)
    return counter.count


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == _ATTENTION:
            query, keys = args[0], args[1].shape[-2]
            causal = kwargs.get("is_causal") or args[_IS_CAUSAL : _IS_CAUSAL + 1] == (True,)
            heads, queries = query.shape[:-2].numel(), query.shape[-2]
            each = sum(min(i, keys) for i in range(1, queries + 1)) if causal else queries * keys
            self.count += heads * each
        elif each := _FUNCTIONS.get(name) or _FUNCTIONS.get(name.removesuffix("_")):
            sizes = [t.numel() for t in (args[0], result) if isinstance(t, Tensor)]
            self.count += each * max(sizes)
        return result
