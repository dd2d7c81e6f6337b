"""Walk a decomposed FX graph and build IR nodes, operator by operator.

In: FX nodes in order, and IR nodes for the placeholders. Out: IR nodes for the outputs. An operator
without a rule, or with arguments that its rule declines, becomes an opaque node; so does what
touches complex numbers. The types of all results are compared with those PyTorch recorded.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch.fx.node import Node as FxNode
from torch.utils import _pytree as pytree

# imported for their registrations
from superopt.frontend import elementwise as _elementwise  # noqa: F401
from superopt.frontend import networks as _networks  # noqa: F401
from superopt.frontend import reductions as _reductions  # noqa: F401
from superopt.frontend import shapes as _shapes  # noqa: F401
from superopt.frontend.errors import LiftError
from superopt.frontend.rules import RULES, Call, Decline
from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.node import Node, make
from superopt.ir.ops import library
from superopt.ir.types import TensorType, TupleType, Type
from superopt.verify.opaque import draws_random_numbers, encode_call
from superopt.verify.reference import IR_DTYPES

# Checks without a result. Types are static here; a failed value check is the program's own error.
_NO_EFFECT = (
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


_OWN_FOLDER = str(Path(__file__).parent)


def source_location(node: FxNode) -> str:
    """Return the user's line for an FX node, or an empty text.

    PyTorch records the frames of `forward` methods only, so plain functions have none.
    """
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    for position in range(len(lines) - 1, -1, -1):
        if lines[position].startswith("File ") and _OWN_FOLDER not in lines[position]:
            code = lines[position + 1] if position + 1 < len(lines) else ""
            return f"{lines[position]}: {code}".removesuffix(": ")
    return ""


def tensor_type(value: torch.Tensor, *, layout: bool = False) -> TensorType:
    """Return the IR type of a tensor; with its strides when `layout` is set.

    Raises:
        LiftError: a symbolic dim, a sparse or quantized tensor, an element type the IR lacks.
    """
    dtype = IR_DTYPES.get(value.dtype)
    if dtype is None:
        raise LiftError(f"element type {value.dtype} is not supported")
    if value.layout is not torch.strided:
        raise LiftError(f"layout {value.layout} is not supported; use a dense tensor")
    if any(type(d) is not int for d in value.shape):
        raise LiftError(f"dynamic shape {tuple(value.shape)}: export with fixed sizes")
    shape = tuple(value.shape)
    if not layout or any(type(s) is not int for s in value.stride()):
        return TensorType(shape, dtype)
    dense = TensorType(shape, dtype).element_strides
    strides = tuple(
        d if size == 1 else s for s, d, size in zip(value.stride(), dense, shape, strict=True)
    )
    return TensorType(shape, dtype, strides)


@final
@dataclass(slots=True)
class Converter:
    """The state of one walk: the IR value of each FX node, and the last random operator."""

    values: dict[FxNode, Any]
    locations: dict[Node, str] = field(default_factory=dict)
    last_random: Node | None = None

    def run(self, nodes: Sequence[FxNode]) -> None:
        """Convert every operator call in `nodes`."""
        for node in nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op not in ("placeholder", "output"):
                raise LiftError(f"cannot lift {node.op} {node.target}", source_location(node))

    def value(self, argument: Any) -> Any:
        """Replace FX nodes inside an argument by their IR values."""
        return pytree.tree_map_only(
            FxNode, lambda n: self.values[n], argument, is_leaf=lambda a: isinstance(a, FxNode)
        )

    def _call(self, node: FxNode) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, FxNode), node
            return self.values[source][index]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise LiftError(f"operator {node.target} has no form in a graph", source_location(node))
        if node.target._opname in _NO_EFFECT:
            return None
        if node.target._schema.is_mutable:
            raise LiftError(f"{node.target} changes its operands", source_location(node))
        try:
            result = self._lift(node, node.target)
        except (GraphError, LiftError) as error:
            raise LiftError(f"{node.target}: {error}", source_location(node)) from error
        self._remember(result, node)
        return result

    def _lift(self, node: FxNode, target: torch._ops.OpOverload) -> Any:
        results = _result_types(node)
        rule = RULES.get(target)
        if rule is not None and not _touches_complex(node):
            call = Call(target, results, _used_results(node))
            arguments = [self.value(a) for a in _all_arguments(node, target)]
            try:
                lifted = rule(call, *arguments)
            except Decline:
                return self._opaque(node, target, results)
            if _agrees(lifted, call):
                return lifted
        return self._opaque(node, target, results)

    def _opaque(
        self, node: FxNode, target: torch._ops.OpOverload, results: tuple[TensorType, ...]
    ) -> Any:
        if not results:
            raise LiftError("it returns no tensor")
        operands: dict[Node, int] = {}

        def operand(value: Any) -> int | None:
            if isinstance(value, Node):
                return operands.setdefault(value, len(operands))
            return None

        meta = node.meta["val"]
        type_: Type = results[0] if isinstance(meta, torch.Tensor) else TupleType(results)
        args = self.value(node.args)
        kwargs = self.value(node.kwargs)
        attrs = encode_call(str(target), args, kwargs, type_, operand)
        random = draws_random_numbers(attrs)
        if random and self.last_random is not None:
            # keeps random operators apart, and in the program's order: one reads the one before
            operands.setdefault(self.last_random, len(operands))
        made = make(library.OPAQUE, tuple(operands), attrs)
        if isinstance(type_, TensorType):
            self.last_random = made if random else self.last_random
            return made
        items = [b.item(made, i) for i in range(len(results))]
        self.last_random = items[0] if random else self.last_random
        return pytree.tree_unflatten(items, pytree.tree_structure(meta))

    def _remember(self, result: Any, node: FxNode) -> None:
        location = source_location(node)
        for made in pytree.tree_leaves(result):
            if isinstance(made, Node) and location:
                self.locations.setdefault(made, location)


def _result_types(node: FxNode) -> tuple[TensorType, ...]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise LiftError(f"a result of type {type(leaf).__name__} depends on data")
    return tuple(tensor_type(leaf) for leaf in leaves)


def _touches_complex(node: FxNode) -> bool:
    metas = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(isinstance(m, torch.Tensor) and m.is_complex() for m in pytree.tree_leaves(metas))


def _used_results(node: FxNode) -> frozenset[int]:
    used = set()
    for user in node.users:
        if user.target is operator.getitem and not user.users:
            continue
        index = user.args[1] if user.target is operator.getitem else 0
        used.add(index if isinstance(index, int) else 0)
    return frozenset(used)


def _all_arguments(node: FxNode, target: torch._ops.OpOverload) -> list[Any]:
    """Return the call's arguments in schema order with defaults filled in."""
    result = []
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            result.append(node.args[position])
        elif argument.name in node.kwargs:
            result.append(node.kwargs[argument.name])
        else:
            result.append(argument.default_value if argument.has_default_value() else None)
    return result


def _agrees(lifted: Any, call: Call) -> bool:
    made = lifted if isinstance(lifted, tuple) else (lifted,)
    return all(
        node.tensor.shape == type_.shape and node.tensor.dtype is type_.dtype
        for node, type_ in zip(made, call.results, strict=False)
    )


def is_random(node: Node) -> bool:
    """Say whether a node is an opaque operator that draws random numbers."""
    return node.op is library.OPAQUE and draws_random_numbers(node.attrs)
