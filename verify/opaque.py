"""PyTorch operators that stay as they are: how a call becomes the text of a node, and runs again.

In: an operator overload and its arguments. Out: `OpaqueAttrs`, whose `arguments` is JSON: tensors
are `{"t": operand index}`, with `"strides"` where the operator looks at the layout; one of which it looks at
nothing else is `{"empty": shape, "strides", "dtype", "device"}` and no operand. Element types, devices and
the like are `{"torch": name}`, numbers that JSON lacks are `{"float": text}` and `{"complex": text}`. No pickle: a foreign graph can
only name registered operators.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from superopt.ir.errors import GraphError
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.types import Type

_NAMED = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout)
}


def encode_call(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Type,
    operand: Callable[[Any], dict[str, Any] | None],
) -> OpaqueAttrs:
    """Describe one call; `operand(value)` gives the JSON form of tensors and None for all else.

    Raises:
        GraphError: an argument has no JSON form (a symbolic size, a generator).
    """
    arguments = {
        "args": [_encode(a, operand) for a in args],
        "kwargs": {k: _encode(v, operand) for k, v in kwargs.items()},
    }
    return OpaqueAttrs(target, json.dumps(arguments, separators=(",", ":")), result)


def _encode(value: Any, operand: Callable[[Any], dict[str, Any] | None]) -> Any:
    described = operand(value)
    if described is not None:
        return described
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is complex:
        return {"complex": repr(value)}
    if isinstance(value, list | tuple):
        return [_encode(v, operand) for v in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    raise GraphError(f"an argument of type {type(value).__name__} has no JSON form: {value!r}")


def _decode(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"t": index, "strides": strides}:
            return laid_out(tensors[index], tuple(strides))
        case {"t": index}:
            return tensors[index]
        case {"empty": shape, "strides": strides, "dtype": dtype, "device": device}:
            return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=device)
        case {"float": text}:
            return float(text)
        case {"complex": text}:
            return complex(text)
        case {"device": text}:
            return torch.device(text)
        case {"torch": text}:
            return _NAMED[text]
    raise GraphError(f"unknown argument {value} of an opaque operator")


def operator(target: str) -> torch._ops.OpOverload:
    """Return the operator overload called `target` (`aten.topk.default`).

    Raises:
        GraphError: it is not registered in this process.
    """
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    except AttributeError:
        raise GraphError(
            f"operator {target} is not registered; import the module that defines it first"
        ) from None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(f"{target} is not a PyTorch operator")
    return found


def flatten_result(result: Any) -> list[Any]:
    """Return the tensors of an operator's result, lists within tuples flattened, in order."""
    return list(pytree.tree_leaves(result))


def restride(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return a copy of `tensor` with these strides (0: the elements along that dim are the same)."""
    shape = tuple(tensor.shape)
    spread = [d for d, (n, s) in enumerate(zip(shape, strides, strict=True)) if s == 0 and n > 1]
    for dim in spread:
        tensor = tensor.narrow(dim, 0, 1)
    made = torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
    return made.expand(shape) if spread else made


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how many elements of memory a tensor reaches over."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def duplicate(tensor: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Return a copy of a tensor that lies as it does, elements that share their memory included."""
    strides = tuple(tensor.stride())
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device)
    memory = tensor.detach().as_strided((span(tensor.shape, strides),), (1,))
    return memory.to(device or tensor.device, copy=True).as_strided(tensor.shape, strides)


def spread(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return random `values` with these strides: some of them, where elements may share memory."""
    reached = 1
    for stride, count in sorted(zip(strides, values.shape, strict=True)):
        if count > 1 and stride < reached:
            size = span(values.shape, strides)
            memory = values.reshape(-1).repeat(-(-size // values.numel()))[:size]
            return memory.as_strided(values.shape, strides)
        reached += (count - 1) * stride
    return restride(values, strides)


def laid_out(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return `tensor` with these strides: itself where it lies so."""
    return tensor if tensor.stride() == strides else restride(tensor, strides)


@lru_cache(maxsize=1024)
def call_of(attrs: OpaqueAttrs) -> tuple[torch._ops.OpOverload, list[Any], dict[str, Any]]:
    """Return the operator of a call, and its arguments in their JSON form.

    Raises:
        GraphError: the operator is not registered in this process, or the arguments are damaged.
    """
    try:
        arguments = json.loads(attrs.arguments)
        return operator(attrs.target), list(arguments["args"]), dict(arguments["kwargs"])
    except (ValueError, TypeError, KeyError):
        raise GraphError(
            f"the arguments of {attrs.target} are damaged: {attrs.arguments}"
        ) from None


def run_opaque(
    attrs: OpaqueAttrs, tensors: Sequence[torch.Tensor]
) -> "torch.Tensor | tuple[torch.Tensor, ...]":
    """Run the operator on `tensors`; several results come as a flat tuple."""
    overload, given, named = call_of(attrs)
    args = _decode(given, tensors)
    kwargs = {k: _decode(v, tensors) for k, v in named.items()}
    result = overload(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return result
    return tuple(flatten_result(result))
