"""The runtime: a kernel graph with compiled kernels becomes straight-line Python.

In: a kernel graph, one callable per block graph in it, the strides of its inputs, and how eager PyTorch laid
out the results. Out: a `Program`: generated Python, kept as readable text, that takes and returns
tensors. Kernels get addresses; views are resolved to offsets and strides while the text is written, so
that they cost nothing when it runs, and a copy is made only where a layout cannot be expressed.

Invariant: a program holds no state between calls but a pool of scratch buffers, taken and given
back by single list operations, so that it is re-entrant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Final, final

import torch

from superopt.errors import PlanError
from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, topological
from superopt.ir.ops import leaf, library, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType, TensorType, contiguous_strides
from superopt.plan import OutputSpec, StoredTensor
from superopt.search.region import view_type
from superopt.search.transposes import copied
from superopt.verify.memory import LARGE_BYTES, allocator
from superopt.verify.opaque import restride
from superopt.verify.reference import DTYPES, IR_DTYPES, TORCH, TorchDomain

CPU: Final = torch.device("cpu")
_ALIGNMENT: Final = 64
_FOLD_LIMIT_BYTES: Final = 64 << 20
_Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]


def _allocator() -> _Empty:
    """Return torch's short way to fresh memory (0.8 us, 2.0 by `empty_strided`), where it has one."""
    found: _Empty | None = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))


_empty: Final = _allocator()
_PLAIN_CALLS: Final = {"matmul": "torch.matmul"}


@final
@dataclass(frozen=True, slots=True)
class Program:
    """A runnable program and the Python text that it is made of."""

    source: str
    run: Callable[..., tuple[torch.Tensor, ...]] = field(repr=False)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run on the graph's inputs in order."""
        return self.run(*tensors)


def build_program(
    graph: Graph,
    kernels: Mapping[str, Callable[..., None]],
    *,
    strides: Sequence[tuple[int, ...]] | None = None,
    outputs: Sequence[OutputSpec] | None = None,
    writes: Mapping[int, int] | None = None,
    device: torch.device = CPU,
) -> Program:
    """Write and compile the program of `graph`.

    Args:
        graph: kernel level; its custom nodes are looked up in `kernels` by their block graph's digest.
        kernels: entry points that take addresses, inputs before outputs.
        strides: of the inputs as they will come (None: as the graph's input types say).
        outputs: how the results are to lie in memory (None: as it comes); further outputs are computed
            and not returned.
        writes: output index -> index of the input that it is copied into after all is computed.
        device: where all tensors are, inputs and results.
    """
    return _Writer(graph, kernels, strides, outputs, dict(writes or {}), device).program()


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node's value is: a view, described by a tensor without data, of a base."""

    base: Node
    view: torch.Tensor


@final
class _Writer:
    """Writes the text of one program."""

    def __init__(
        self,
        graph: Graph,
        kernels: Mapping[str, Callable[..., None]],
        strides: Sequence[tuple[int, ...]] | None,
        outputs: Sequence[OutputSpec] | None,
        writes: dict[int, int],
        device: torch.device,
    ) -> None:
        self.graph = graph
        self.device = device
        self.kernels = kernels
        self.outputs = outputs
        self.writes = writes
        self.lines: list[str] = []
        self.values: dict[str, Any] = {"torch": torch, "empty": _empty}
        self.names: dict[Node, str] = {}
        self.places: dict[Node, _Place] = {}
        self.addresses: dict[Node, str] = {}
        self.folded: dict[Node, torch.Tensor] = {}
        self.tensors: dict[Node, str] = {}
        self.workspace = 0
        self.domain = TorchDomain(device=device)
        self.pointer_only: set[Node] = set()
        self.shown: dict[Node, Node] = {}
        self.scratch: dict[Node, str] = {}
        for i, node in enumerate(graph.inputs):
            lies = node.tensor.element_strides if strides is None else strides[i]
            self.names[node] = f"x{i}"
            self._materialized(node, _meta(node, lies))

    # -- the whole -----------------------------------------------------------------------------

    def program(self) -> Program:
        """Write all nodes, the results, and compile the text."""
        order = [n for n in topological(self.graph.outputs) if n.op is not leaf.INPUT]
        self._fold(order)
        self.pointer_only = self._only_kernels_read(order)
        self.shown = self._shown()
        for node in order:
            if node not in self.folded:
                self._node(node)
        results = self._results()
        arguments = ", ".join(self.names[i] for i in self.graph.inputs)
        head = [f"def program({arguments}):"]
        tail = [*results]
        if self.workspace:
            # on a GPU PyTorch's allocator keeps blocks itself, and knows what streams still use them
            pooled = self.device.type == "cpu"
            work = "pool.pop() if pool else make_work()" if pooled else "make_work()"
            head += [f"    work = {work}", "    w = work.data_ptr()"]
            if pooled:
                tail.insert(len(tail) - 1, "pool.append(work)")
                self.values["pool"] = []
            self.values["make_work"] = self._allocator((self.workspace,), torch.uint8)
        text = "\n".join([*head, *(f"    {line}" for line in [*self.lines, *tail])]) + "\n"
        if self.device.type == "cuda":
            # kernels are launched on the current device
            body = text.splitlines()[1:]
            self.values["on_device"] = partial(torch.cuda.device, self.device)
            text = "\n".join([head[0], "    with on_device():", *(f"    {x}" for x in body)]) + "\n"
        # the text is made here, of numbers and names of our own: nothing of it comes from a file
        exec(compile(text, f"<superopt {self.graph.name}>", "exec"), self.values)
        return Program(text, self.values["program"])

    def _fold(self, order: Sequence[Node]) -> None:
        """Compute what depends on no input once, now."""
        for node in order:
            if node.op.kind is OpKind.GRAPH or node.op is library.OPAQUE:
                continue
            if any(i not in self.folded for i in node.inputs) or node.op is leaf.ITEM:
                continue
            if node.op not in structural.VIEWS and node.tensor.size_bytes > _FOLD_LIMIT_BYTES:
                continue
            args = [self.folded[i] for i in node.inputs]
            value = TORCH[node.op](node, args, self.domain)
            self.folded[node] = value
            if not isinstance(value, torch.Tensor):
                continue
            self.names[node] = f"c{len(self.folded)}"
            self._materialized(node, _meta(node, value.stride()))

    def _only_kernels_read(self, order: Sequence[Node]) -> set[Node]:
        """Return kernel results that need no tensor object: only kernels read them."""
        outputs = set(self.graph.outputs)
        wanted = set(outputs)
        for node in reversed(order):
            if node.op.kind is OpKind.GRAPH:
                continue
            if node.op in structural.VIEWS:
                if node in wanted:
                    wanted.update(node.inputs)
                continue
            if node.op is leaf.ITEM and node.inputs[0].op.kind is OpKind.GRAPH:
                continue
            wanted.update(node.inputs)
        return {n for n in order if n not in wanted}

    def _shown(self) -> dict[Node, Node]:
        """Return for a kernel's result as which reshaped one it is returned, if it is.

        Memory is asked for in that shape: another tensor object over it takes longer than to make it.
        """
        shown: dict[Node, Node] = {}
        for output in self.graph.outputs:
            base = output
            while base.op is structural.RESHAPE:
                base = base.inputs[0]
            made = base.inputs[0] if base.op is leaf.ITEM else base
            if base is not output and made.op.kind is OpKind.GRAPH:
                shown.setdefault(base, output)
        return shown

    # -- nodes ---------------------------------------------------------------------------------

    def _node(self, node: Node) -> None:
        if node.op.kind is OpKind.GRAPH:
            self._kernel(node)
        elif node.op in structural.VIEWS:
            self._view(node)
        elif node.op is leaf.ITEM:
            if node.inputs[0].op.kind is not OpKind.GRAPH:
                self._result(node, f"{self.names[node.inputs[0]]}[{node.attrs.index}]")
        else:
            self._library(node)

    def _result(self, node: Node, expression: str, *, dense: bool = False) -> None:
        name = self.names.setdefault(node, f"t{len(self.names)}")
        if not dense:
            expression = f"{expression}.contiguous()"
        self.lines.append(f"{name} = {expression}")
        self._materialized(node, _meta(node, None))

    def _materialized(self, node: Node, view: torch.Tensor) -> None:
        self.places[node] = _Place(node, view)

    def _library(self, node: Node) -> None:
        args = [self._tensor(i) for i in node.inputs]
        if node.op.name in _PLAIN_CALLS and node.tensor.dtype.is_float:
            self._result(node, f"{_PLAIN_CALLS[node.op.name]}({', '.join(args)})")
            return
        number = len(self.values)
        rule, record = f"{node.op.name}_{number}", f"node_{number}"
        self.values[rule] = TORCH[node.op]
        self.values[record] = node
        self.values["domain"] = self.domain
        call = f"{rule}({record}, [{', '.join(args)}], domain)"
        if hasattr(node.type, "items"):
            self.names[node] = f"t{len(self.names)}"
            self.lines.append(f"{self.names[node]} = {call}")
            return
        self._result(node, call)

    def _view(self, node: Node) -> None:
        source = node.inputs[0]
        place = self.places[source]
        view = _apply_view(node, place.view)
        if view is None:
            self._result(node, f"{self._tensor(source)}.reshape({node.shape})", dense=True)
            return
        self.places[node] = _Place(place.base, view)

    def _kernel(self, node: Node) -> None:
        block: Graph = node.attrs.graph
        entry = self.kernels.get(block.digest())
        if entry is None:
            raise PlanError(f"no kernel for the block graph {block.name}: optimize again")
        results = self._kernel_results(node, block)
        arguments = [
            self._pointer(operand, wanted)
            for operand, wanted in zip(node.inputs, block.inputs, strict=True)
        ]
        name = f"{_word(block.name)}_{len(self.values)}"
        self.values[name] = entry
        self.lines.append(f"{name}({', '.join([*arguments, *results])})")

    def _kernel_results(self, node: Node, block: Graph) -> list[str]:
        """Make room for the results; return their addresses."""
        single = len(block.outputs) == 1
        items: dict[int, Node] = {0: node} if single else {}
        if not single:
            for user in topological(self.graph.outputs):
                if user.op is leaf.ITEM and user.inputs[0] is node:
                    items[user.attrs.index] = user
        addresses = []
        for i, output in enumerate(block.outputs):
            result = items.get(i)
            if result is None or result in self.pointer_only:
                addresses.append(self._scratch(output.tensor.size_bytes))
                if result is not None:
                    self.addresses[result] = addresses[-1]
                    self.scratch[result] = addresses[-1]
                    self._materialized(result, _meta(result, None))
                continue
            self._allocate(result)
            addresses.append(self._address(result))
        return addresses

    def _allocate(self, node: Node) -> None:
        shown = self.shown.get(node, node)
        if node.tensor.size_bytes >= LARGE_BYTES or self.device.type != "cpu":
            name = f"allocate_{len(self.values)}"
            self.values[name] = self._allocator(shown.shape, DTYPES[node.tensor.dtype])
            self._result(node, f"{name}()", dense=True)
        else:
            dtype = f"dtype_{node.tensor.dtype.value}"
            self.values[dtype] = DTYPES[node.tensor.dtype]
            shape, strides = shown.shape, contiguous_strides(shown.shape)
            self._result(node, f"empty({shape}, {strides}, {dtype})", dense=True)
        self.tensors[shown] = self.names[node]

    def _allocator(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        if self.device.type == "cpu":
            return allocator(shape, dtype)
        return partial(torch.empty, shape, dtype=dtype, device=self.device)

    def _scratch(self, size_bytes: int) -> str:
        offset = self.workspace
        self.workspace += -(-max(size_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        return f"w + {offset}" if offset else "w"

    # -- operands ------------------------------------------------------------------------------

    def _address(self, base: Node) -> str:
        """Return the address of a base, read once per call."""
        if base not in self.addresses:
            if base in self.folded:
                value = self.folded[base]
                self.values[f"hold_{self.names[base]}"] = value
                self.addresses[base] = str(value.data_ptr())
            else:
                name = f"{self.names[base]}_at"
                self.lines.append(f"{name} = {self.names[base]}.data_ptr()")
                self.addresses[base] = name
        return self.addresses[base]

    def _pointer(self, operand: Node, wanted: Node) -> str:
        place = self.places[operand]
        strides = wanted.tensor.element_strides
        if _same_strides(place.view, strides):
            offset = place.view.storage_offset() * place.view.element_size()
            address = self._address(place.base)
            return f"{address} + {offset}" if offset else address
        name = f"t{len(self.values)}_copy"
        self.values.setdefault("restride", restride)
        self.values[name] = None
        self.lines.append(f"{name} = restride({self._tensor(operand)}, {strides})")
        return f"{name}.data_ptr()"

    def _tensor(self, node: Node) -> str:
        """Return the name of a tensor object for `node`, made if there is none yet."""
        if node in self.tensors:
            return self.tensors[node]
        place = self.places.get(node)
        if place is None:
            return self.names[node]
        if node in self.folded:
            self.values[self.names[node]] = self.folded[node]
        name = self.names.get(node)
        if place.base is not node or node in self.shown:
            shown = place.base in self.shown
            base = self.names[place.base] if shown else self._tensor(place.base)
            start = place.view.storage_offset()
            inside = place.base.op is leaf.INPUT or place.base in self.scratch
            origin = f"{base}.storage_offset() + " if inside else ""
            if origin and start == 0:
                origin, offset = f"{base}.storage_offset()", ""
            else:
                offset = str(start)
            name = f"t{len(self.tensors)}_view"
            self.lines.append(
                f"{name} = {base}.as_strided({tuple(place.view.shape)}, "
                f"{place.view.stride()}, {origin}{offset})"
            )
        elif node in self.scratch:
            name = self._scratch_tensor(node)
        assert name is not None, node
        self.tensors[node] = name
        return name

    def _scratch_tensor(self, node: Node) -> str:
        """Make a tensor object over scratch memory, for a copy into another layout."""
        offset = int(self.scratch[node].partition("+")[2] or 0)
        dtype = f"dtype_{node.tensor.dtype.value}"
        self.values[dtype] = DTYPES[node.tensor.dtype]
        name = f"s{len(self.tensors)}"
        self.lines.append(
            f"{name} = work.narrow(0, {offset}, {node.tensor.size_bytes})"
            f".view({dtype}).view({node.shape})"
        )
        return name

    # -- results -------------------------------------------------------------------------------

    def _results(self) -> list[str]:
        """Give the results the layout and the aliasing that eager PyTorch gives them."""
        names: list[str] = []
        fresh: set[Node] = set()
        returned: list[str] = []
        for i, node in enumerate(self.graph.outputs):
            name = self._tensor(node)
            if i in self.writes:
                # a value that is itself an input must not change before it is read
                is_input = self.places[node].base.op is leaf.INPUT
                names.append(self._line(f"{name}.clone()") if is_input else name)
                continue
            if self.outputs is None:
                names.append(name)
                returned.append(name)
                continue
            if len(returned) == len(self.outputs):
                break  # the last draw of random numbers: it is computed, and nobody sees it
            spec = self.outputs[len(returned)]
            name = self._as_eager(node, name, spec, returned, fresh)
            names.append(name)
            returned.append(name)
        copies = [f"x{target}.copy_({names[i]})" for i, target in self.writes.items()]
        comma = "," if len(returned) == 1 else ""
        return [*copies, f"return ({', '.join(returned)}{comma})"]

    def _as_eager(
        self, node: Node, name: str, spec: OutputSpec, earlier: list[str], fresh: set[Node]
    ) -> str:
        kind, _, index = spec.base.partition(":")
        if kind != "fresh":
            base = f"x{index}" if kind == "input" else earlier[int(index)]
            if spec.same:
                return base
            view = f"{base}.storage_offset() + {spec.offset}"
            return self._line(f"{base}.as_strided({spec.shape}, {spec.strides}, {view})")
        place = self.places[node]
        own = place.base.op is not leaf.INPUT and place.base not in self.folded
        if own and place.base not in fresh and _same_strides(place.view, spec.strides):
            fresh.add(place.base)
            return name
        self.values.setdefault("restride", restride)
        return self._line(f"restride({name}, {spec.strides})")

    def _line(self, expression: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name


def store_tensor(tensor: torch.Tensor) -> StoredTensor:
    """Return the raw bytes of a tensor, row-major."""
    dense = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    name = IR_DTYPES[tensor.dtype].value
    return StoredTensor(tuple(tensor.shape), name, dense.numpy().tobytes())


def load_tensor(stored: StoredTensor) -> torch.Tensor:
    """Return the tensor that was stored.

    Raises:
        PlanError: the bytes do not fill the shape.
    """
    dtype = DTYPES[DType(stored.dtype)]
    if len(stored.data) != prod(stored.shape) * dtype.itemsize:
        raise PlanError(f"a stored tensor of shape {stored.shape} has {len(stored.data)} bytes")
    if not stored.data:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored.data), dtype=dtype).reshape(stored.shape)


def with_layouts(graph: Graph, tensors: Sequence[torch.Tensor]) -> Graph:
    """Return `graph` with its inputs lying in memory as the tensors do."""
    new: dict[Node, Node] = {}
    for node, given in zip(graph.inputs, tensors, strict=True):
        type_ = TensorType(node.shape, node.tensor.dtype, tuple(given.stride()))
        new[node] = make(leaf.INPUT, (), leaf.InputAttrs(node.attrs.name, type_))
    for node in topological(graph.outputs):
        if node not in new:
            new[node] = rebuild(node, tuple(new[i] for i in node.inputs))
    inputs = tuple(new[i] for i in graph.inputs)
    return Graph(graph.level, graph.name, inputs, tuple(new[o] for o in graph.outputs))


def with_result_layouts(
    graph: Graph, outputs: Sequence[OutputSpec], writes: Mapping[int, int]
) -> Graph:
    """Return `graph` with copies of the results that eager PyTorch lays out otherwise than row-major.

    Kernels that make such a value write it so.
    """
    specs = iter(outputs)
    returned = [None if i in writes else next(specs, None) for i in range(len(graph.outputs))]
    pairs = zip(graph.outputs, returned, strict=True)
    return graph.with_outputs([o if s is None else _laid(o, s) for o, s in pairs])


def _laid(node: Node, spec: OutputSpec) -> Node:
    lies = view_type(node)
    if (
        spec.base != "fresh"
        or lies is None
        or _agree(node.shape, lies.element_strides, spec.strides)
    ):
        return node
    order = sorted(range(len(spec.shape)), key=lambda axis: -spec.strides[axis])
    moved = b.permute(node, order)
    dense = contiguous_strides(moved.shape)
    if not _agree(moved.shape, dense, [spec.strides[axis] for axis in order]):
        return node
    return b.permute(copied(moved), [order.index(axis) for axis in range(len(order))])


def _meta(node: Node, strides: Sequence[int] | None) -> torch.Tensor:
    dtype = DTYPES[node.tensor.dtype]
    if strides is None:
        return torch.empty(node.shape, dtype=dtype, device="meta")
    return torch.empty_strided(node.shape, tuple(strides), dtype=dtype, device="meta")


def _apply_view(node: Node, source: torch.Tensor) -> torch.Tensor | None:
    """Apply a view op to a tensor without data; None when it cannot be a view."""
    attrs = node.attrs
    if node.op is structural.PERMUTE:
        return source.permute(attrs.perm)
    if node.op is structural.BROADCAST:
        return source.expand(attrs.shape)
    if node.op is structural.SLICE:
        rest = (slice(None),) * (-1 - attrs.axis)
        return source[(..., slice(attrs.start, attrs.stop, attrs.step), *rest)]
    try:
        return source.view(attrs.shape)
    except RuntimeError:
        return None


def _same_strides(view: torch.Tensor, strides: Sequence[int]) -> bool:
    """Compare strides where they matter: along dims of more than one element."""
    return view.numel() == 0 or _agree(view.shape, view.stride(), strides)


def _agree(shape: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    return all(n == 1 or a == b for n, a, b in zip(shape, first, second, strict=True))


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
