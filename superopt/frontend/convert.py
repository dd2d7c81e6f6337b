"""Walk a decomposed FX graph and build IR nodes, operator by operator.

In: FX nodes in order, and IR nodes for the placeholders. Out: IR nodes for the outputs. An operator
without a rule, or with arguments that its rule declines, becomes an opaque node; so does what
touches complex numbers. The types of all results are compared with those PyTorch recorded.

What draws random numbers does so in the order of the layout in memory: its operands are described with
the strides that they have in PyTorch.
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
from superopt.frontend.errors import BREAKING, LiftError
from superopt.frontend.rules import RULES, Call, Decline
from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.node import Node, make
from superopt.ir.ops import library
from superopt.ir.types import TensorType, TupleType, Type
from superopt.verify.draws import draws_random_numbers
from superopt.verify.opaque import encode_call
from superopt.verify.reference import IR_DTYPES

# Checks without a result. Types are static here; a failed value check is the program's own error.
_NO_EFFECT = (
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


# Operators that fill a tensor like their first operand and do not look at its elements.
_FILLING = (
    "rand_like",
    "randn_like",
    "randint_like",
    "bernoulli.p",
    "bernoulli.Tensor",
    "uniform",
    "normal_functional",
    "exponential",
    "log_normal",
    "cauchy",
    "geometric",
    "random",
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
        sizes: tuple[Any, ...] = tuple(value.shape)
        if not all(d.node.has_hint() for d in sizes if isinstance(d, torch.SymInt)):
            raise LiftError(
                f"the shape {tuple(value.shape)} of its result depends on data; {BREAKING}"
            )
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
    """The state of one walk: the IR value of each FX node, and the last draw of random numbers."""

    values: dict[FxNode, Any]
    locations: dict[Node, str] = field(default_factory=dict)
    last_draw: Node | None = None

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
            except (Decline, GraphError):  # no graph in our operators: PyTorch's own has a meaning
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
        random = torch.Tag.nondeterministic_seeded in target.tags
        filled = node.args[0] if random and _fills(target) else None

        def operand(value: Any) -> dict[str, Any] | None:
            if not isinstance(value, FxNode):
                return None
            if value is filled:
                return _shell(value.meta["val"])
            index = operands.setdefault(self.values[value], len(operands))
            strides = list(value.meta["val"].stride()) if random else None
            return {"t": index, "strides": strides} if random else {"t": index}

        def tensors(argument: Any) -> Any:
            """Leave only those FX nodes that stand for tensors."""
            return pytree.tree_map_only(
                FxNode,
                lambda n: n if isinstance(self.values[n], Node) else self.values[n],
                argument,
                is_leaf=lambda a: isinstance(a, FxNode),
            )

        meta = node.meta["val"]
        type_: Type = results[0] if isinstance(meta, torch.Tensor) else TupleType(results)
        args, kwargs = tensors(node.args), tensors(node.kwargs)
        attrs = encode_call(str(target), args, kwargs, type_, operand)
        drawn = draws_random_numbers(attrs)
        if drawn and self.last_draw is not None:
            # keeps draws apart, and in the program's order: one reads the one before
            operands.setdefault(self.last_draw, len(operands))
        made = make(library.OPAQUE, tuple(operands), attrs)
        single = isinstance(type_, TensorType)
        items = [made] if single else [b.item(made, i) for i in range(len(results))]
        self.last_draw = items[0] if drawn else self.last_draw
        if single:
            return made
        return pytree.tree_unflatten(items, pytree.tree_structure(meta))

    def _remember(self, result: Any, node: FxNode) -> None:
        location = source_location(node)
        for made in pytree.tree_leaves(result):
            if isinstance(made, Node) and location:
                self.locations.setdefault(made, location)


def _fills(target: torch._ops.OpOverload) -> bool:
    return target._opname in _FILLING or str(target).partition(".")[2] in _FILLING


def _shell(value: torch.Tensor) -> dict[str, Any]:
    """Describe a tensor by everything but its elements."""
    dtype = str(value.dtype).removeprefix("torch.")
    strides = list(value.stride())
    return {
        "empty": list(value.shape),
        "strides": strides,
        "dtype": dtype,
        "device": str(value.device),
    }


def _result_types(node: FxNode) -> tuple[TensorType, ...]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            raise LiftError(f"it makes a number of data; {BREAKING}")
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
