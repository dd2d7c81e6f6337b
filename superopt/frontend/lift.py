"""Lift a function, a module, an exported program or an FX graph to a kernel graph.

In: a PyTorch program and example arguments, which fix shapes, element types and strides. Out: a
`Lifted` program. Its graph takes the caller's tensors first and then the parameters; its outputs are
new values of changed buffers and arguments first and then the results.
"""

import copy
import inspect
import logging
import re
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import Node as FxNode
from torch.utils import _pytree as pytree

from superopt.frontend.convert import Converter, source_location, tensor_type
from superopt.frontend.decompose import decompose
from superopt.frontend.errors import BREAKING, LiftError
from superopt.frontend.fold import fold
from superopt.frontend.output import last_line, silenced
from superopt.frontend.simplify import simplified
from superopt.ir.build import graph_inputs, kernel_graph
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rewrite
from superopt.ir.ops import leaf
from superopt.ir.types import TensorType
from superopt.verify.draws import draws_numbers


@final
@dataclass(frozen=True, slots=True)
class Mutation:
    """Output `output` of the graph is the new value of a buffer or of an argument.

    `target` is the parameter or user input of the graph that changes.
    """

    output: int
    kind: Literal["buffer", "argument"]
    target: str


@final
@dataclass(frozen=True, slots=True)
class Constant:
    """A result or an argument that is no tensor."""

    value: Any


@final
@dataclass(frozen=True)
class Lifted:
    """A program as a kernel graph, and how its arguments and results are laid out.

    The graph's inputs are `user_inputs`, then the keys of `parameters`, in order. Its outputs are
    those of `mutations`, then the results, then the last draw of random numbers where it `draws`
    any. `folded_sources` are the buffers whose values are part of folded parameters: whoever
    changes one of them lifts anew.
    """

    graph: Graph
    device: torch.device
    draws: bool
    user_inputs: list[str]
    parameters: dict[str, torch.Tensor]
    mutations: list[Mutation]
    folded_sources: list[torch.Tensor]
    locations: dict[Node, str]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    leaves: tuple[str | Constant, ...] = field(repr=False)
    results: tuple[int | Constant, ...] = field(repr=False)

    def flatten(
        self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors of a call in the order of `user_inputs`.

        Raises:
            LiftError: the call differs from the example in structure, shape, type or a number.
        """
        given, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        if spec != self.in_spec:
            raise LiftError(f"the program was lifted for arguments {self.in_spec}, got {spec}")
        tensors = []
        types = {n.attrs.name: n.tensor for n in self.graph.inputs}
        for value, leaf_ in zip(given, self.leaves, strict=True):
            if isinstance(leaf_, Constant):
                # by their text too: NaN is not equal to itself
                same = value == leaf_.value or repr(value) == repr(leaf_.value)
                if type(value) is not type(leaf_.value) or not same:
                    raise LiftError(f"the program was lifted for {leaf_.value!r}, got {value!r}")
                continue
            _check_argument(leaf_, value, types[leaf_])
            tensors.append(value)
        return tensors

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """Return what the program returns, from the outputs of the graph."""
        values = [r.value if isinstance(r, Constant) else outputs[r] for r in self.results]
        return pytree.tree_unflatten(values, self.out_spec)

    def write_back(self, tensors: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Copy changed values into the arguments (`tensors`, as `flatten` gives) and buffers."""
        arguments = dict(zip(self.user_inputs, tensors, strict=True))
        with torch.no_grad():
            for mutation in self.mutations:
                table = self.parameters if mutation.kind == "buffer" else arguments
                table[mutation.target].copy_(outputs[mutation.output])


def _check_argument(name: str, value: Any, type_: TensorType) -> None:
    if not isinstance(value, torch.Tensor):
        raise LiftError(f"argument {name} was a tensor {type_}, got {type(value).__name__}")
    got = tensor_type(value)
    if got.shape != type_.shape or got.dtype is not type_.dtype:
        raise LiftError(f"argument {name} was lifted as {type_}, got {got}")


class _FunctionModule(torch.nn.Module):
    """A function as a module; modules that it closes over are its submodules.

    Where the arguments fit its signature, they keep their names in the graph.
    """

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        super().__init__()
        for index, module in enumerate(_captured_modules(function)):
            self.add_module(f"captured_{index}", module)

        traced = _recorded(function)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return traced(*args, **kwargs)

        with suppress(TypeError, ValueError):  # built-in functions tell none
            signature = inspect.signature(function)
            signature.bind(*args, **kwargs)
            vars(forward)["__signature__"] = signature
        vars(self)["forward"] = forward


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a plain function under the one name by which PyTorch records a program's lines."""
    if not isinstance(function, types.FunctionType):
        return function
    code = function.__code__.replace(co_name="forward")
    named = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made = types.FunctionType(code, *named)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _captured_modules(function: Callable[..., Any]) -> list[torch.nn.Module]:
    owner = getattr(function, "__self__", None)
    found = [owner] if isinstance(owner, torch.nn.Module) else []
    try:
        variables = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):
        return found
    for value in (*variables.nonlocals.values(), *variables.globals.values()):
        if isinstance(value, torch.nn.Module) and all(value is not f for f in found):
            found.append(value)
    return found


def lift(
    program: Callable[..., Any] | torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Lifted:
    """Lift a function or module at the shapes of example arguments.

    Raises:
        LiftError: PyTorch cannot export it (control flow on data, say), or no graph can hold it.
    """
    is_module = isinstance(program, torch.nn.Module)
    kwargs = dict(kwargs or {})
    if isinstance(program, torch.nn.Module):
        module = program
    else:
        module = _FunctionModule(program, args, kwargs)
    name = type(program).__name__ if is_module else getattr(program, "__name__", "program")
    try:
        # under no_grad a program's own no_grad blocks leave no trace in the graph
        with torch.no_grad(), _quiet_export(), silenced() as written:
            exported = torch.export.export(module, tuple(args), kwargs, strict=False)
    except Exception as error:
        raise LiftError(
            f"PyTorch cannot export {name}: {_first_lines(error)}{_advice(error)}",
            last_line(traceback.walk_tb(error.__traceback__)),
        ) from error
    if written:
        raise LiftError(f"{name} prints, which a plan would not do; {BREAKING}", written[0])
    return lift_exported(exported, name=name)


_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Hide what export says of its own code, and what we report ourselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        # modules such as LSTM set attributes of their own as they run
        warnings.filterwarnings("ignore", message=".*assigned during export", category=UserWarning)
        # programs that branch on data, or raise, are reported by us
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _advice(error: BaseException) -> str:
    """Say what to do about an error of export that a user can do something about."""
    if "data-dependent" in str(error):
        return f"; {BREAKING}"
    # torch 2.11 puts what a program returns into a table, whatever it is
    signs = ("not a known type", "pytree", "unhashable type")
    if not any(sign in str(error) for sign in signs):
        return ""
    return (
        "; make the class known with torch.export.register_dataclass, or "
        "torch.utils._pytree.register_pytree_node where it is no dataclass"
    )


def _first_lines(error: BaseException) -> str:
    # what follows is advice for people who work on PyTorch
    own = str(error).partition(" See https://github.com/pytorch/")[0]
    text = [line for line in own.splitlines() if line.strip()]
    return " ".join(text[:2]) or type(error).__name__


def lift_fx(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Lifted:
    """Lift an FX graph as `torch.compile` gives it to a backend.

    Example inputs may be fake tensors; numbers among them must not be symbolic.

    Raises:
        LiftError: as `lift`, and for symbolic sizes.
    """
    for value in example_inputs:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise LiftError("symbolic sizes: compile with dynamic=False")
    for node in graph_module.graph.nodes:
        if node.target == "item" and node.args and node.args[0].op == "placeholder":
            raise LiftError(
                "a float argument changes from call to call: compile with dynamic=False"
            )
    graph_module = _with_effective_autocast(graph_module)
    from torch._guards import detect_fake_mode, tracing

    if detect_fake_mode(list(example_inputs)) is None:
        return lift(graph_module, example_inputs)
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with tracing(None), unset_fake_temporarily():
        return lift(graph_module, [_stand_in(v) for v in example_inputs])


def _with_effective_autocast(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a graph whose regions of autocast are in force while it is exported.

    The functions by which Dynamo enters and leaves them are noted by export, and not called.
    """
    mode = torch.amp.autocast_mode
    effective = {mode._enter_autocast: _enter_autocast, mode._exit_autocast: _exit_autocast}
    if all(node.target not in effective for node in graph_module.graph.nodes):
        return graph_module
    graph = copy.deepcopy(graph_module.graph)
    for node in graph.nodes:
        node.target = effective.get(node.target, node.target)
    return torch.fx.GraphModule(graph_module, graph)


def _enter_autocast(device: str, dtype: Any, enabled: bool, cached: bool | None) -> ExitStack:
    region = ExitStack()
    region.enter_context(torch.autocast(device, dtype, enabled, cached))
    return region


def _exit_autocast(region: ExitStack) -> None:
    region.close()


def _stand_in(value: Any) -> Any:
    """Return a real tensor of the same type and layout; export looks at no elements."""
    if not isinstance(value, torch.Tensor):
        return value
    if any(type(d) is not int for d in value.shape):
        raise LiftError("symbolic sizes: compile with dynamic=False")
    return torch.empty_strided(
        tuple(value.shape), tuple(value.stride()), dtype=value.dtype, device=value.device
    ).zero_()


def lift_exported(program: ExportedProgram, *, name: str = "program") -> Lifted:
    """Lift a program of `torch.export`.

    Raises:
        LiftError: an operator or type that no graph can hold; the message names the user's line.
    """
    try:
        with torch.no_grad(), _quiet_export():
            count = _draw_count(program)
            program = decompose(program)
    except Exception as error:
        raise LiftError(f"PyTorch cannot decompose {name}: {_first_lines(error)}") from error
    if _draw_count(program) < count:
        raise LiftError(f"{name} draws random numbers that it does not use")
    return _Lifter(program, re.sub(r"[^A-Za-z0-9_.]", "_", name)).run()


def _draw_count(program: ExportedProgram) -> int:
    """Return how often a program draws random numbers."""
    return sum(
        isinstance(node.target, torch._ops.OpOverload)
        and draws_numbers(node.target, node.args, node.kwargs)
        for node in program.graph.nodes
    )


_EFFECTS = {
    InputKind.TOKEN: "does something beside computing results (it prints, checks or sends data)",
    InputKind.CUSTOM_OBJ: "uses an object that is no tensor",
}

Rewriting = Callable[[Node, tuple[Node, ...]], Node]


def _carrying(locations: dict[Node, str], rule: Rewriting) -> Rewriting:
    """Give what a rewriting makes the source location of what it replaces."""

    def rewritten(node: Node, inputs: tuple[Node, ...]) -> Node:
        result = rule(node, inputs)
        if node in locations:
            locations.setdefault(result, locations[node])
        return result

    return rewritten


def _device(graph: torch.fx.Graph) -> torch.device:
    """Return the one device of all values; numbers may be on the CPU beside tensors on a GPU.

    Raises:
        LiftError: the program moves tensors between devices, which graphs do not say.
    """
    found: dict[torch.device, FxNode] = {}
    numbers: dict[torch.device, FxNode] = {}
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, torch.Tensor):
                (found if value.dim() else numbers).setdefault(value.device, node)
    if len(found) > 1:
        names = ", ".join(str(d) for d in found)
        where = source_location(list(found.values())[1])
        raise LiftError(f"its tensors are on several devices ({names})", where)
    return next(iter(found or numbers), torch.device("cpu"))


@final
class _Lifter:
    def __init__(self, program: ExportedProgram, name: str) -> None:
        self.program = program
        self.name = name
        self.users: list[str] = []
        self.leaves: list[str | Constant] = []
        self.nodes: dict[str, Node] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.foldable: dict[Node, torch.Tensor] = {}
        self.placeholders: dict[FxNode, Any] = {}
        self.by_target: dict[str, str] = {}

    def run(self) -> Lifted:
        graph = self.program.graph
        device = _device(graph)
        self._bind_placeholders([n for n in graph.nodes if n.op == "placeholder"])
        converter = Converter(self.placeholders)
        converter.run(list(graph.nodes))
        returned = converter.value(next(n for n in graph.nodes if n.op == "output").args[0])
        outputs, mutations, results = self._outputs(returned)
        if not outputs:
            raise LiftError(f"{self.name} returns no tensor")
        draw = converter.last_draw
        outputs += [] if draw is None else [draw]
        locations = converter.locations
        simple = rewrite(outputs, _carrying(locations, simplified))
        folded = fold(simple, self._unchanged(mutations), device)
        changed = {m.target for m in mutations}
        reached = set(graph_inputs(folded.outputs))
        parameters = {
            key: value
            for key, value in self.parameters.items()
            if self.nodes[key] in reached or key in changed
        }
        table = {n.attrs.name: v for n, v in folded.values.items()}
        inputs = [self.nodes[key] for key in (*self.users, *parameters)] + list(folded.values)
        spec = self.program.call_spec
        return Lifted(
            graph=kernel_graph(self.name, inputs, folded.outputs),
            device=device,
            draws=draw is not None,
            user_inputs=self.users,
            parameters={**parameters, **table},
            mutations=mutations,
            folded_sources=[self.foldable[n] for n in folded.sources],
            locations=locations,
            in_spec=spec.in_spec,
            out_spec=spec.out_spec,
            leaves=tuple(self.leaves),
            results=tuple(results),
        )

    def _unchanged(self, mutations: list[Mutation]) -> dict[Node, torch.Tensor]:
        changed = {m.target for m in mutations}
        return {n: t for n, t in self.foldable.items() if n.attrs.name not in changed}

    def _bind_placeholders(self, placeholders: list[FxNode]) -> None:
        specs = self.program.graph_signature.input_specs
        for node, spec in zip(placeholders, specs, strict=True):
            value = node.meta.get("val")
            if spec.kind is InputKind.USER_INPUT:
                self._bind_user_input(node, spec, value)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self._bind_parameter(node, spec)
            else:
                raise LiftError(f"it {_EFFECTS.get(spec.kind, f'takes a {spec.kind.name}')}")

    def _bind_user_input(self, node: FxNode, spec: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.placeholders[node] = self._input(node.name, value)
            self.users.append(node.name)
            self.leaves.append(node.name)
            return
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise LiftError(f"argument {node.name} is symbolic: export with fixed sizes")
        known = getattr(spec.arg, "value", value)
        self.placeholders[node] = known
        self.leaves.append(Constant(known))

    def _bind_parameter(self, node: FxNode, spec: Any) -> None:
        tensor = self.program.state_dict.get(spec.target)
        if tensor is None:
            tensor = self.program.constants[spec.target]
        if not isinstance(tensor, torch.Tensor):
            raise LiftError(f"constant {spec.target} is no tensor")
        made = self._input(node.name, tensor)
        self.placeholders[node] = made
        self.parameters[node.name] = tensor
        self.by_target[spec.target] = node.name
        fixed = spec.kind is not InputKind.PARAMETER and not tensor.requires_grad
        watched = type(tensor) is torch.Tensor and not tensor.is_inference()
        if fixed and watched and tensor.device.type != "meta":
            self.foldable[made] = tensor

    def _input(self, name: str, value: torch.Tensor) -> Node:
        type_ = tensor_type(value, layout=True)
        self.nodes[name] = make(leaf.INPUT, (), leaf.InputAttrs(name, type_))
        return self.nodes[name]

    def _outputs(
        self, returned: Sequence[Any]
    ) -> tuple[list[Node], list[Mutation], list[int | Constant]]:
        outputs: list[Node] = []
        mutations: list[Mutation] = []
        results: list[int | Constant] = []
        specs = self.program.graph_signature.output_specs
        for value, spec in zip(returned, specs, strict=True):
            if (
                spec.kind is OutputKind.BUFFER_MUTATION
                or spec.kind is OutputKind.PARAMETER_MUTATION
            ):
                mutations.append(Mutation(len(outputs), "buffer", self.by_target[spec.target]))
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                mutations.append(Mutation(len(outputs), "argument", spec.target))
            elif spec.kind is not OutputKind.USER_OUTPUT:
                raise LiftError(f"a result of kind {spec.kind.name} is not supported")
            elif not isinstance(value, Node):
                results.append(Constant(value))
                continue
            else:
                results.append(len(outputs))
            outputs.append(value)
        return outputs, mutations, results
