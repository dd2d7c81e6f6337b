"""Leaves, selection, casts, movement of elements, and unknown functions of whole tensors.

In: nodes and `FieldValue`s. Out: `FieldValue`s, tensors of integers and booleans, or tuples of those.
"""

from collections.abc import Sequence

import numpy as np
import torch

from superopt.ir.node import Node
from superopt.ir.ops import elementwise, leaf, library, structural
from superopt.ir.ops.registry import OpKind, all_ops
from superopt.ir.types import DType, TensorType, TupleType
from superopt.verify.arithmetic import here, mix
from superopt.verify.field.domain import (
    FIELD,
    FieldDomain,
    FieldValue,
    Value,
    each_residue,
    keyed,
    marks_of,
    no_marks,
)
from superopt.verify.needs import real_valued
from superopt.verify.reference import TORCH, TorchDomain


@FIELD.register(leaf.CONSTANT)
def _constant(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    if not real_valued(node):
        return TORCH[node.op](node, args, TorchDomain())
    return domain.embed(node.attrs.value, node.attrs.dtype).only(domain.needed(node))


@FIELD.register(leaf.IOTA)
def _iota(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    index = TORCH[node.op](node, args, TorchDomain())
    if not real_valued(node):
        return index
    return FieldValue({f: index.to(torch.float64) for f in domain.needed(node)})


@FIELD.register(leaf.ITEM)
def _item(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    return args[0][node.attrs.index]


FIELD.refuse("inputs are given by the test", leaf.INPUT)
for _op in list(all_ops()):
    if _op.kind is OpKind.TILE:
        FIELD.refuse("block graphs go through their meaning in primitives (ir.semantics)", _op)
    elif _op.kind is OpKind.GRAPH:
        FIELD.refuse("nested graphs are walked by the interpreter", _op)
    elif _op.kind is OpKind.COMPOSITE:
        FIELD.refuse("composites go through their definition", _op)


@FIELD.register(elementwise.WHERE)
def _where(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    condition, x, y = args
    residues = each_residue(
        node, domain, lambda m, f: torch.where(condition, x.residues[f], y.residues[f])
    )
    if no_marks(x, y):
        return FieldValue(residues)
    # marked residues of both are 0 already
    kind = torch.where(condition, marks_of(x), marks_of(y))
    return (
        FieldValue(residues, kind.expand(node.shape)) if bool(kind.any()) else FieldValue(residues)
    )


@FIELD.register(elementwise.CAST)
def _cast(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    if real_valued(node):
        if isinstance(x, FieldValue):
            return x.only(domain.needed(node))
        whole = x.to(torch.int64)
        return FieldValue(
            each_residue(
                node,
                domain,
                lambda m, f: m.reduce_(torch.remainder(whole, m.prime).to(torch.float64)),
            )
        )
    assert isinstance(x, FieldValue), node
    if node.attrs.dtype is DType.BOOL:
        return (x.residues["p"] != 0) if x.kind is None else (x.residues["p"] != 0) | (x.kind != 0)
    hashed = domain.hashed(x, keyed(domain.seed, "cast")) & 0x7F
    return TORCH[node.op](node, [hashed], TorchDomain())


@FIELD.register(
    structural.RESHAPE,
    structural.BROADCAST,
    structural.PERMUTE,
    structural.SLICE,
    structural.FLIP,
)
def _moved(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    rule = TORCH[node.op]
    return args[0].only(domain.needed(node)).map(lambda t: rule(node, [t], domain.torch))


@FIELD.register(structural.CONCAT)
def _concat(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    axis = node.attrs.axis
    residues = each_residue(
        node, domain, lambda m, f: torch.cat([a.residues[f] for a in args], axis)
    )
    if no_marks(*args):
        return FieldValue(residues)
    return FieldValue(residues, torch.cat([marks_of(a).expand(a.shape) for a in args], axis))


@FIELD.register(structural.PAD)
def _pad(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    (x,) = args
    attrs = node.attrs
    filler = domain.embed(attrs.value, node.tensor.dtype)
    widths = (0, 0) * (-1 - attrs.axis) + (attrs.before, attrs.after)
    pad = torch.nn.functional.pad
    residues = each_residue(
        node, domain, lambda m, f: pad(x.residues[f], widths, value=float(filler.residues[f]))
    )
    if no_marks(x, filler):
        return FieldValue(residues)
    marks = marks_of(x).expand(x.shape)
    return FieldValue(residues, pad(marks, widths, value=int(marks_of(filler))))


@FIELD.register(structural.TAKE, structural.GATHER)
def _taken(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    x, index = args
    # indices that the program computes from hashed values may fall outside: wrap them
    index = torch.remainder(index.to(torch.int64), x.shape[node.attrs.axis])
    rule = TORCH[node.op]
    return x.only(domain.needed(node)).map(lambda t: rule(node, [t, index], domain.torch))


@FIELD.register(
    elementwise.NOT,
    elementwise.AND,
    elementwise.OR,
    elementwise.XOR,
    elementwise.SHL,
    elementwise.SHR,
)
def _integers(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    return TORCH[node.op](node, args, domain.torch)


@FIELD.register(library.CONV, library.POOL, library.OPAQUE)
def _opaque(node: Node, args: Sequence[Value], domain: FieldDomain) -> Value:
    """Apply an unknown function of whole tensors: results drawn from a digest of all operands."""
    name = node.attrs.target + node.attrs.arguments if node.op is library.OPAQUE else node.attrs
    digest = keyed(domain.seed, node.op.name, name, *(_digest(a, domain) for a in args))
    if isinstance(node.type, TupleType):
        return tuple(
            _drawn(t, keyed(digest, i), frozenset(domain.fields), domain)
            for i, t in enumerate(node.type.items)
        )
    return _drawn(node.tensor, digest, domain.needed(node), domain)


def _digest(value: Value, domain: FieldDomain) -> int:
    hashed = domain.hashed(value, 1).reshape(-1)
    total = mix(hashed + torch.arange(hashed.numel()) * 0x9E3779B1, 2).sum().item()
    if isinstance(value, FieldValue) and value.kind is not None:
        total = keyed(int(total), value.kind.cpu().numpy().tobytes())
    return int(total)


def _drawn(type_: TensorType, key: int, needed: frozenset[str], domain: FieldDomain) -> Value:
    source = np.random.default_rng(key)
    if type_.dtype.is_float:
        return FieldValue({f: domain.fields[f].draw(type_.shape, source) for f in sorted(needed)})
    if type_.dtype is DType.BOOL:
        drawn = torch.from_numpy(source.integers(0, 2, size=type_.shape, dtype=np.int8) != 0)
    else:
        drawn = torch.from_numpy(source.integers(0, 128, size=type_.shape, dtype=np.int64))
    return drawn.to(here())
