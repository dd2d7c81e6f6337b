"""Random numbers: which operators draw them, and with what state of PyTorch's generators.

A draw is an opaque node. Each reads the draw before it, so that equal draws are different nodes, and a
program's draws come in its own order; the last one is an output of the graph, so that none is lost. To
the verifier a draw is an unknown function of its operands, the draws before it among them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import library
from superopt.ir.ops.library import OpaqueAttrs
from superopt.verify.opaque import call_of

_SWITCHES: Final = ("train", "training")
_RATES: Final = ("dropout", "dropout_p")
_DROPOUTS: Final = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")


def draws_numbers(
    overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Say whether a call draws random numbers: its operator may, and no argument turns that off."""
    if torch.Tag.nondeterministic_seeded not in overload.tags:
        return False
    declared = overload._schema.arguments
    given = {a.name: a.default_value for a in declared if a.has_default_value()}
    given |= dict(zip((a.name for a in declared), args, strict=False))
    given |= kwargs
    if any(given.get(name) is False for name in _SWITCHES):
        return False
    rates = (*_RATES, "p") if overload._opname in _DROPOUTS else _RATES
    return all(given.get(name) != 0 for name in rates)


def draws_random_numbers(attrs: OpaqueAttrs) -> bool:
    """Say whether an opaque call draws random numbers."""
    return draws_numbers(*call_of(attrs))


def is_draw(node: Node) -> bool:
    """Say whether a node is an opaque operator that draws random numbers."""
    return node.op is library.OPAQUE and draws_random_numbers(node.attrs)


def draws(graph: Graph) -> list[Node]:
    """Return the draws of a kernel graph in their order."""
    return [node for node in graph.nodes() if is_draw(node)]


@contextmanager
def generators(device: torch.device | str, seed: int | None = None) -> Iterator[None]:
    """Give PyTorch's default generators their state back in the end; seed them first if asked to.

    Those are the CPU's and the one of `device`.
    """
    kept = [torch.default_generator]
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        kept.append(torch.cuda.default_generators[index])
    states = [g.get_state() for g in kept]
    try:
        if seed is not None:
            for generator in kept:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(kept, states, strict=True):
            generator.set_state(state)
