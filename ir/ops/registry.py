"""The list of operators and the rule tables keyed by it.

An op is declared once, with what is true of it in every package: arity, attributes, type rule,
algebraic laws, operation count. Every other meaning is a `RuleTable` in the package that needs
it; a table says for each op either a rule or why it has none.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar, final

from superopt.ir.errors import GraphError, MissingRule
from superopt.ir.types import Type

TypeRule = Callable[[tuple[Type, ...], Any], Type]


@final
class OpKind(Enum):
    """What an op does to indices; search and code generation go by it."""

    LEAF = "leaf"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    CONTRACTION = "contraction"
    STRUCTURAL = "structural"
    LIBRARY = "library"
    COMPOSITE = "composite"
    TILE = "tile"
    GRAPH = "graph"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Declaration of one operator.

    `linear_in` lists operands in which the op is linear when the others are fixed.
    `flops(input_types, result_type)` counts arithmetic operations, transcendental functions as 1.
    `batched(attrs, batch_shape)` gives the attributes of the same op under leading batch
    dimensions; None where they do not change (axes are counted from the end).
    `expand(inputs, attrs)` defines a composite in primitives.
    """

    name: str
    kind: OpKind
    arity: int | None
    attrs_class: type | None
    infer: TypeRule
    meaning: str
    commutative: bool = False
    associative: bool = False
    linear_in: frozenset[int] = frozenset()
    flops: Callable[[tuple[Type, ...], Type], int] | None = None
    batched: Callable[[Any, tuple[int, ...]], Any] | None = None
    expand: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return f"Op({self.name})"


_ops: dict[str, Op] = {}


def declare(op: Op) -> Op:
    """Add an op to the registry; a name can be declared once."""
    if op.name in _ops:
        raise GraphError(f"op {op.name} is declared twice: {_ops[op.name].meaning!r} and this")
    _ops[op.name] = op
    return op


def op_named(name: str) -> Op:
    """Return the op called `name`; the error suggests the nearest names."""
    found = _ops.get(name)
    if found is None:
        near = difflib.get_close_matches(name, _ops, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise GraphError(f"no op is called {name!r}{hint}")
    return found


def all_ops() -> Iterator[Op]:
    """Yield every declared op in declaration order."""
    yield from _ops.values()


Rule = TypeVar("Rule")


@final
@dataclass(slots=True)
class RuleTable(Generic[Rule]):
    """One purpose's rule per op, or the written reason why there is none."""

    purpose: str
    how_to_add: str
    rules: dict[Op, Rule] = field(default_factory=dict)
    unsupported: dict[Op, str] = field(default_factory=dict)

    def register(self, *ops: Op) -> Callable[[Rule], Rule]:
        """Decorate a rule with the ops that it serves."""

        def add(rule: Rule) -> Rule:
            for op in ops:
                if op in self.rules or op in self.unsupported:
                    raise GraphError(f"two {self.purpose} rules for {op.name}")
                self.rules[op] = rule
            return rule

        return add

    def refuse(self, reason: str, *ops: Op) -> None:
        """Record why these ops have no rule in this table."""
        for op in ops:
            if op in self.rules or op in self.unsupported:
                raise GraphError(f"two {self.purpose} rules for {op.name}")
            self.unsupported[op] = reason

    def __getitem__(self, op: Op) -> Rule:
        rule = self.rules.get(op)
        if rule is None:
            why = self.unsupported.get(op, self.how_to_add)
            raise MissingRule(f"no {self.purpose} rule for {op.name}: {why}")
        return rule

    def __contains__(self, op: Op) -> bool:
        return op in self.rules

    def missing(self) -> list[str]:
        """Names of ops with neither a rule nor a reason."""
        return [op.name for op in all_ops() if op not in self.rules and op not in self.unsupported]
