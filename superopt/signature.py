"""Signatures: by what a call is matched to a plan, and which calls no plan may serve.

In: the arguments of a call. Out: a hashable key (shape, strides, element type and device of every
tensor, the value of everything else), or None where the original has to run: gradients, autocast,
tracing, function modes, tensor subclasses, and everything whose meaning a plan does not know.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_PLAIN: Final = (bool, int, float, complex, str, type(None), torch.dtype)


def _probe(name: str, *arguments: Any) -> Callable[[], Any]:
    """Return a query of torch's state; versions without it never are in that state."""
    found = getattr(torch._C, name, None)
    if found is None:
        return lambda: False
    return (lambda: found(*arguments)) if arguments else found


_functorch = getattr(torch._C, "_functorch", None)
_peek = getattr(_functorch, "peek_interpreter_stack", lambda: None)
_autocast = _probe("_is_any_autocast_enabled")
_dispatch_modes = _probe("_len_torch_dispatch_stack")
_function_modes = _probe("_len_torch_function_stack")
_tracing = _probe("_get_tracing_state")
_grad_enabled = torch.is_grad_enabled
_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter


def altered() -> bool:
    """Say whether function modes, tracing or forward gradients are on, which `tensor_check` does not see."""
    # `torch.no_grad` leaves tangents on
    return bool(_function_modes() or _tracing() or forward_ad._current_level >= 0)


def tensor_check(args: Sequence[Any]) -> Callable[..., bool] | None:
    """Return a fast check that tensors are as `args` are: type, shape, strides, dispatch keys, state.

    It sees everything that `signature` looks at but function modes, tracing and, of tensors that require
    gradients, whether these are on: all in one call.
    None where this version of PyTorch has no such check, or an argument is no tensor.
    """
    if not args or any(type(a) not in (_Tensor, _Parameter) for a in args):
        return None
    try:
        from torch._C._dynamo.guards import TensorGuards

        make: Any = TensorGuards  # its stub gives the lists another type than it takes
        check = make(
            *args,
            dynamic_dims_sizes=[list(a.shape) for a in args],
            dynamic_dims_strides=[list(a.stride()) for a in args],
        ).check
        good: bool = check(*args)
        other = check(*args[:-1], args[-1].new_empty((*args[-1].shape, 3)))
    except (ImportError, TypeError, ValueError, RuntimeError):
        return None
    if not good or other:
        return None
    return _with_strides(check, len(args))


def _with_strides(check: Callable[..., bool], count: int) -> Callable[..., bool]:
    """Return the check behind another: it ends the process where a tensor has no strides.

    Written out for `count` tensors, since this is on the path of every call.
    """
    names = [f"x{i}" for i in range(count)]
    nested = " or ".join(f"{name}.is_nested" for name in names)
    given = ", ".join(names)
    text = f"""
def checked({given}):
    try:
        return not ({nested}) and check({given})
    except AttributeError:  # no tensor
        return False
"""
    scope: dict[str, Any] = {"check": check}
    exec(text, scope)
    checked: Callable[..., bool] = scope["checked"]
    return checked


def signature(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return the key of a call, or None where only the original may run."""
    if _autocast() or _dispatch_modes() or altered() or _peek() is not None:
        return None
    parts: list[Any] = []
    gradients = _grad_enabled()
    for value in args:
        kind = type(value)
        if kind is _Tensor or kind is _Parameter:
            if gradients and value.requires_grad:
                return None
            if not is_as_it_lies(value):
                return None
            parts += (value.shape, value.dtype, value.device, value.stride())
            continue
        part = _other(value, gradients)
        if part is None:
            return None
        parts.append(part)
    if kwargs:
        for name, value in sorted(kwargs.items()):
            part = signature((value,))
            if part is None:
                return None
            parts += (name, part)
    return tuple(parts)


def is_as_it_lies(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is what its memory holds, each element where its strides say."""
    if type(tensor) not in (_Tensor, _Parameter):
        return False
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return dense and not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())


def _other(value: Any, gradients: bool) -> Any:
    """Return the key of an argument that is no tensor; None where it cannot be one."""
    if isinstance(value, _PLAIN):
        # NaN is equal to nothing, and one NaN is as good as another
        return (type(value), value if value == value else None, str(value))
    if type(value) in (list, tuple):
        inner = signature(value)
        return None if inner is None else (type(value), len(value), inner)
    if type(value) is dict:
        inner = signature(tuple(value.values()))
        return None if inner is None else (dict, tuple(value), inner)
    return _registered(value)


def _registered(value: Any) -> Any:
    """Return the key of a named tuple, or of an object of a class that pytree knows."""
    kind = type(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inner = signature(value)
        return None if inner is None else (kind, inner)
    node = pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return None
    children, context = node.flatten_fn(value)
    if not all(isinstance(c, (*_PLAIN, type)) for c in pytree.tree_leaves(context)):
        return None
    inner = signature(tuple(children))
    return None if inner is None else (kind, repr(context), inner)


def refusal(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say why a call has no signature, and what would give it one."""
    if _autocast():
        return "autocast is on"
    if _dispatch_modes() or _function_modes():
        return "a mode that changes what functions of PyTorch do is on"
    if forward_ad._current_level >= 0:
        return "forward gradients are on"
    if _tracing() or _peek() is not None:
        return "the call is part of a trace or a transform, such as vmap or jit.trace"
    places = [*((str(i), v) for i, v in enumerate(args)), *kwargs.items()]
    for place, value in places:
        if signature((value,)) is None:
            for leaf in pytree.tree_leaves(value):
                why = _refused(leaf)
                if why:
                    return f"argument {place} {why}"
            return f"argument {place} is a {type(value).__name__}, whose content is not known"
    return "its arguments have no signature"


def _refused(leaf: Any) -> str:
    kind = type(leaf)
    if not isinstance(leaf, torch.Tensor):
        known = isinstance(leaf, _PLAIN)
        return "" if known else f"has a {kind.__name__}, which pytree does not know as a container"
    if kind is not _Tensor and kind is not _Parameter:
        return f"is a {kind.__name__}, not a plain tensor"
    if _grad_enabled() and leaf.requires_grad:
        return "requires gradients: plans are for inference, under torch.no_grad()"
    if leaf.layout is not torch.strided or leaf.is_nested:
        return "is no dense tensor"
    return "" if is_as_it_lies(leaf) else "is a view of other values than its memory holds"
