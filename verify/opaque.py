"""PyTorch operators that stay as they are: how a call becomes the text of a node, and runs again.

In: an operator overload and its arguments. Out: `OpaqueAttrs`, whose `arguments` is JSON: tensors
are `{"t": operand index}`, element types, devices and the like are `{"torch": name}`, numbers that
JSON lacks are `{"float": text}`. No pickle: a foreign graph can only name registered operators.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from superopt.ir.errors import GraphError
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.types import Type

_SWITCHES = ("train", "training")
_RATES = ("dropout", "dropout_p")
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
    operand: Callable[[Any], int | None],
) -> OpaqueAttrs:
    """Describe one call; `operand(value)` numbers tensors and gives None for all else.

    Raises:
        GraphError: an argument has no JSON form (a symbolic size, a generator, a complex number).
    """
    arguments = {
        "args": [_encode(a, operand) for a in args],
        "kwargs": {k: _encode(v, operand) for k, v in kwargs.items()},
    }
    return OpaqueAttrs(target, json.dumps(arguments, separators=(",", ":")), result)


def _encode(value: Any, operand: Callable[[Any], int | None]) -> Any:
    index = operand(value)
    if index is not None:
        return {"t": index}
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
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
    ((kind, text),) = value.items()
    match kind:
        case "t":
            return tensors[text]
        case "float":
            return float(text)
        case "device":
            return torch.device(text)
        case "torch":
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


def draws_random_numbers(attrs: OpaqueAttrs) -> bool:
    """Say whether a call draws random numbers: its operator may, and no argument turns that off."""
    overload = operator(attrs.target)
    if torch.Tag.nondeterministic_seeded not in overload.tags:
        return False
    arguments = json.loads(attrs.arguments)
    declared = overload._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    given |= dict(zip((a.name for a in declared), arguments["args"], strict=False))
    given |= arguments["kwargs"]
    off = any(given.get(name) is False for name in _SWITCHES)
    return not off and all(given.get(name) != 0 for name in _RATES)


def flatten_result(result: Any) -> list[Any]:
    """Return the tensors of an operator's result, lists within tuples flattened, in order."""
    return list(pytree.tree_leaves(result))


def run_opaque(
    attrs: OpaqueAttrs, tensors: Sequence[torch.Tensor]
) -> "torch.Tensor | tuple[torch.Tensor, ...]":
    """Run the operator on `tensors`; several results come as a flat tuple."""
    arguments = json.loads(attrs.arguments)
    args = _decode(arguments["args"], tensors)
    kwargs = {k: _decode(v, tensors) for k, v in arguments["kwargs"].items()}
    result = operator(attrs.target)(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return result
    return tuple(flatten_result(result))
