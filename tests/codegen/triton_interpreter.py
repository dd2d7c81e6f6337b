"""Triton's interpreter, made strict: what kernels touch in memory is checked, element by element.

What a masked load leaves undefined is NaN here, or another number that shows. Import only in a process
with TRITON_INTERPRET=1. The interpreter has no device math library; numpy and
PyTorch stand in for it. It keeps bfloat16 as bits, which its `dot` would multiply as integers.
"""

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle, _get_np_dtype, interpreter_builder

_TORCH_FUNCTIONS = {
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "log10": torch.log10,
    "tan": torch.tan,
    "asin": torch.asin,
    "acos": torch.acos,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "acosh": torch.acosh,
    "atanh": torch.atanh,
    "tanh": torch.tanh,
    "erfinv": torch.erfinv,
    "lgamma": torch.lgamma,
    "rint": torch.round,
    "trunc": torch.trunc,
    "fmod": torch.fmod,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "copysign": torch.copysign,
}


def _function(name):
    def call(*args):
        like = next(a for a in args if isinstance(a, tl.tensor))
        values = [
            torch.from_numpy(np.array(a.handle.data))
            if isinstance(a, tl.tensor)
            else torch.tensor(float(getattr(a, "value", a)))
            for a in args
        ]
        values = [
            v.to(torch.float64 if like.dtype == tl.float64 else torch.float32) for v in values
        ]
        result = _TORCH_FUNCTIONS[name](*values).numpy()
        kind = tl.block_type(like.dtype, list(result.shape)) if result.shape else like.dtype
        return tl.tensor(TensorHandle(result, like.dtype), kind)

    return call


class OutOfBounds(AssertionError):
    """A kernel touched memory that is no element of a tensor that it was given."""


_readable: np.ndarray = np.zeros(0, np.uint64)
_writable: np.ndarray = np.zeros(0, np.uint64)


def _elements(tensors):
    found = [np.zeros(0, np.uint64)]
    for t in tensors:
        index = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(t.shape, t.stride(), strict=True):
            index = index[..., None] + torch.arange(size) * stride
        found.append(
            (index.reshape(-1) * t.element_size() + t.data_ptr()).numpy().astype(np.uint64)
        )
    return np.unique(np.concatenate(found))


def allow(inputs, outputs):
    """Let kernels read elements of `inputs` and write elements of `outputs`, and nothing else."""
    global _readable, _writable
    _readable, _writable = _elements(inputs), _elements(outputs)


def _check(pointers, mask, allowed, what):
    touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if not np.isin(touched, allowed).all():
        raise OutOfBounds(f"a kernel {what} outside its tensors")


def _undefined(pointers):
    kind = pointers.get_element_ty()
    dtype = _get_np_dtype(kind)
    # the bits of a bfloat16 NaN; numpy has no such type
    value = (
        0x7FC0
        if kind == tl.bfloat16
        else np.nan
        if dtype.kind == "f"
        else 1
        if kind == tl.int1
        else 77
    )
    return TensorHandle(np.full(pointers.data.shape, value, dtype), kind)


def install():
    """Check every access, give `libdevice` its functions and `dot` its bfloat16."""
    builder = type(interpreter_builder)
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def checked_load(self, ptrs, mask, other, *rest):
        _check(ptrs, mask, _readable, "reads")
        if other is None:
            other = _undefined(ptrs)
        return load(self, ptrs, mask, other, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        _check(ptrs, mask, _writable, "writes")
        return store(self, ptrs, value, mask, *rest)

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def wide_dot(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    builder.create_masked_load = checked_load
    builder.create_masked_store = checked_store
    builder.create_dot = wide_dot
    for name in _TORCH_FUNCTIONS:
        setattr(libdevice, name, _function(name))
