"""Plans: what a search found for one program at one set of input types, ready to be stored.

In: graphs, generated sources, the evidence. Out: JSON that `Plan.from_json` reads back, on a machine and
in a version that fit, or a `PlanError`. A plan holds text and numbers only, so that loading one
executes nothing: graphs are parsed and checked, sources are compiled from their text.

Invariant: the text ends in its own sha256, and every kernel is found by the digest of its block graph.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

from superopt.errors import PlanError
from superopt.ir.errors import SuperoptError
from superopt.ir.graph import Graph
from superopt.ir.text import parse_graph, print_graph

FORMAT: Final = "superopt plan 2"


@final
@dataclass(frozen=True, slots=True)
class KernelSource:
    """Generated source of one kernel, and the configuration that it was generated with."""

    backend: str
    name: str
    block: str
    text: str
    symbol: str
    pointers: int
    config: dict[str, Any]


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A folded constant: raw bytes in row-major order."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class OutputSpec:
    """How the caller sees one result, as eager PyTorch gave it.

    `base` says what the result is a view of: "fresh" memory, "input:i" or "output:j" (an earlier one);
    `offset` is counted in elements from the start of that base; `same` says that it is the very
    object.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    base: str = "fresh"
    offset: int = 0
    same: bool = False


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What to run for one program at one set of input types.

    `program` is None when nothing better than the original was proven: the original runs then.
    `parameters` are the graph inputs after the user's: a dotted path into the module, or the name of a
    stored tensor in `constants`. `structure` is the pytree of the result as JSON-able text. `writes` maps
    the graph outputs that are no results to the inputs that they are the new values of.
    """

    original: Graph
    program: Graph | None
    kernels: dict[str, KernelSource]
    user_inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    constants: dict[str, StoredTensor]
    outputs: tuple[OutputSpec, ...]
    structure: str
    target: str
    writes: dict[int, int] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the sealed text of the plan."""
        body = {
            "format": FORMAT,
            "original": print_graph(self.original),
            "program": None if self.program is None else print_graph(self.program),
            "kernels": {digest: asdict(k) for digest, k in self.kernels.items()},
            "user_inputs": self.user_inputs,
            "parameters": self.parameters,
            "constants": {n: _tensor_json(t) for n, t in self.constants.items()},
            "outputs": [asdict(o) for o in self.outputs],
            "structure": self.structure,
            "target": self.target,
            "writes": list(self.writes.items()),
            "certificate": self.certificate,
            "report": self.report,
        }
        return seal(json.dumps(body, indent=1))

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: the text is damaged, or of another format.
        """
        try:
            body = json.loads(unseal(text))
            if body.get("format") != FORMAT:
                raise PlanError(
                    f"this plan has the format {body.get('format')!r}, this version reads "
                    f"{FORMAT!r}: optimize again"
                )
            return _plan(body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the plan is damaged ({error}): optimize again") from error
        except PlanError:
            raise
        except SuperoptError as error:
            raise PlanError(f"a graph in the plan is damaged: {error}") from error


def binding_digest(
    user_inputs: Sequence[str],
    parameters: Sequence[str],
    constants: Mapping[str, StoredTensor],
    structure: str,
) -> str:
    """Return a digest of all that programs of one graph may differ in: their plan is under one key."""
    values = {name: hashlib.sha256(t.data).hexdigest() for name, t in constants.items()}
    text = json.dumps([list(user_inputs), list(parameters), values, structure])
    return hashlib.sha256(text.encode()).hexdigest()


def seal(text: str) -> str:
    """Append the sha256 of `text` as a last line."""
    return f"{text}\nsha256:{hashlib.sha256(text.encode()).hexdigest()}\n"


def unseal(text: str) -> str:
    """Return the sealed text.

    Raises:
        PlanError: the seal is missing or does not match.
    """
    body, mark, digest = text.rpartition("\nsha256:")
    if not mark or hashlib.sha256(body.encode()).hexdigest() != digest.strip():
        raise PlanError("the file is truncated or was changed (its sha256 does not match)")
    return body


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    data = base64.b64encode(tensor.data).decode()
    return {"shape": tensor.shape, "dtype": tensor.dtype, "data": data}


def _plan(body: dict[str, Any]) -> Plan:
    kernels = {d: KernelSource(**k) for d, k in body["kernels"].items()}
    for digest, kernel in kernels.items():
        if parse_graph(kernel.block).digest() != digest:
            raise PlanError(f"kernel {kernel.name} does not belong to its block graph")
    program = body["program"]
    return Plan(
        original=parse_graph(body["original"]),
        program=None if program is None else parse_graph(program),
        kernels=kernels,
        user_inputs=tuple(body["user_inputs"]),
        parameters=tuple(body["parameters"]),
        constants={
            n: StoredTensor(tuple(t["shape"]), t["dtype"], base64.b64decode(t["data"]))
            for n, t in body["constants"].items()
        },
        outputs=tuple(
            OutputSpec(tuple(o["shape"]), tuple(o["strides"]), o["base"], o["offset"], o["same"])
            for o in body["outputs"]
        ),
        structure=body["structure"],
        target=body["target"],
        writes={int(output): int(target) for output, target in body["writes"]},
        certificate=body["certificate"],
        report=body["report"],
    )
