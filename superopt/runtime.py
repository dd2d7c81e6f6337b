"""Run a plan's kernel graph: straight-line generated Python around compiled kernels.

In: a kernel graph and a compiled kernel per block graph. Out: a function from input tensors to output
tensors. Views of tensors become addresses, never copies, where the layout allows; library nodes
run through their PyTorch meaning. The function keeps no state, so threads may share it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological, users_of
from superopt.ir.ops import leaf, library, structural
from superopt.search.region import VIEWS, view_type
from superopt.verify.reference import DTYPES, TORCH, TorchDomain

Tensors = Sequence[torch.Tensor]
KernelCall = Callable[..., None]


def build(graph: Graph, kernels: Mapping[str, KernelCall]) -> Callable[..., tuple[Any, ...]]:
    """Return `run(*tensors) -> tuple of tensors` for a kernel graph.

    Args:
        graph: input tensors must lie as the graph's input types say.
        kernels: block graph digest -> function of input and output addresses.
    """
    source, names = _Writer(graph, kernels).write()
    scope: dict[str, Any] = dict(names)
    exec(compile(source, f"<plan {graph.name}>", "exec"), scope)
    function: Callable[..., tuple[Any, ...]] = scope["run"]
    function.__doc__ = source
    return function


class _Writer:
    def __init__(self, graph: Graph, kernels: Mapping[str, KernelCall]) -> None:
        self.graph = graph
        self.kernels = kernels
        self.scope: dict[str, Any] = {"empty": torch.empty}
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.results: dict[Node, list[str]] = {}
        self.users = users_of(graph.outputs)
        self.domain = TorchDomain()

    def write(self) -> tuple[str, dict[str, Any]]:
        for position, node in enumerate(self.graph.inputs):
            self.names[node] = f"a{position}"
        for node in topological(self.graph.outputs):
            # views and projections are made where they are read; kernels and library calls here
            if node.op is library.CUSTOM:
                self._kernel(node)
        outputs = ", ".join(self._tensor(o) for o in self.graph.outputs)
        arguments = ", ".join(self.names[i] for i in self.graph.inputs)
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def run({arguments}):\n{body}\n    return ({outputs},)\n", self.scope

    def _bind(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self.scope)}"
        self.scope[name] = value
        return name

    def _tensor(self, node: Node) -> str:
        """Return an expression for the tensor of `node`, computing it first where needed."""
        if node in self.names:
            return self.names[node]
        if node.op is library.CUSTOM:
            return self._kernel(node)[0]
        if node.op is leaf.ITEM and node.inputs[0].op is library.CUSTOM:
            return self._kernel(node.inputs[0])[node.attrs.index]
        arguments = "".join(f"{self._tensor(i)}, " for i in node.inputs)
        name = f"v{len(self.names)}"
        if node.op in VIEWS:
            self.lines.append(f"{name} = {self._view(node)}")
        else:
            rule = self._bind("library", _library_call(node, self.domain))
            self.lines.append(f"{name} = {rule}(({arguments}))")
        self.names[node] = name
        return name

    def _view(self, node: Node) -> str:
        x = self._tensor(node.inputs[0])
        if node.op is structural.RESHAPE:
            return f"{x}.reshape({node.attrs.shape!r})"
        if node.op is structural.PERMUTE:
            return f"{x}.permute({node.attrs.perm!r})"
        if node.op is structural.BROADCAST:
            return f"{x}.expand({node.attrs.shape!r})"
        a = node.attrs
        axis = len(node.shape) + a.axis
        index = ", ".join([":"] * axis + [f"{a.start}:{a.stop}:{a.step}"])
        return f"{x}[{index}]"

    def _kernel(self, node: Node) -> list[str]:
        if node in self.results:
            return self.results[node]
        digest = node.attrs.graph.digest()
        if digest not in self.kernels:
            raise GraphError(f"no compiled kernel for block graph {node.attrs.graph.name}")
        addresses = [self._address(i) for i in node.inputs]
        outputs = []
        for index, output in enumerate(node.attrs.graph.outputs):
            name = f"o{len(self.results)}_{index}"
            shape, viewed = self._final_shape(node, index)
            dtype = self._bind("dtype", DTYPES[output.tensor.dtype])
            self.lines.append(f"{name} = empty({shape!r}, dtype={dtype})")
            if viewed is not None:
                self.names[viewed] = name
            outputs.append(name)
        kernel = self._bind("kernel", self.kernels[digest])
        pointers = ", ".join([*addresses, *(f"{o}.data_ptr()" for o in outputs)])
        self.lines.append(f"{kernel}({pointers})")
        self.results[node] = outputs
        return outputs

    def _final_shape(self, node: Node, index: int) -> tuple[tuple[int, ...], Node | None]:
        """Allocate a result in the shape in which it is read, when that is the only one."""
        result = node
        if len(node.attrs.graph.outputs) > 1:
            items = [u for u in self.users[node] if u.attrs.index == index]
            if not items:
                return node.attrs.graph.outputs[index].shape, None
            result = items[0]
        users = self.users[result]
        if len(users) == 1 and users[0].op is structural.RESHAPE and (
            result not in self.graph.outputs
        ):
            return users[0].shape, users[0]
        return result.shape, None

    def _address(self, node: Node) -> str:
        """Return an expression for the address of the first element of a kernel operand."""
        lies = view_type(node)
        base, offset = node, 0
        if lies is not None:
            while base.op in VIEWS:
                if base.op is structural.SLICE:
                    inner = view_type(base.inputs[0])
                    assert inner is not None, "a view of something that is not a view"
                    axis = len(base.shape) + base.attrs.axis
                    offset += base.attrs.start * inner.element_strides[axis]
                if base in self.names:
                    # allocated in this shape: it is dense
                    break
                base = base.inputs[0]
        name = self._tensor(base)
        if base.op is not leaf.INPUT and base.op is not library.CUSTOM:
            dense = f"{name}c"
            self.lines.append(f"{dense} = {name}.contiguous()")
            name = dense
        shift = f" + {offset * base.tensor.dtype.size_bytes}" if offset else ""
        return f"{name}.data_ptr(){shift}"


def _library_call(node: Node, domain: TorchDomain) -> Callable[[Sequence[Any]], Any]:
    rule = TORCH[node.op]

    def call(arguments: Sequence[Any]) -> Any:
        return rule(node, arguments, domain)

    return call
