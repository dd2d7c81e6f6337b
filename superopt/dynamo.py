"""`torch.compile(backend="superopt")`: every captured subgraph through the same pipeline.

In: an FX graph and example inputs, as Dynamo gives them. Out: a callable. A subgraph that cannot be lifted,
has symbolic shapes (`dynamic=False` avoids them), needs gradients, or is not made faster runs as Dynamo captured it, with one log
line that says why. `options={...}` takes the options of `superopt.optimize`, and `fallback="error"` to
raise instead.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from superopt.errors import Unsupported, unknown
from superopt.frontend import lift_fx
from superopt.ir.errors import SuperoptError
from superopt.pipeline import make_options, make_plan
from superopt.signature import refusal, signature
from superopt.subject import Binding, make_request, preserved, shares_written

logger = logging.getLogger("superopt")

_FALLBACKS: Final = ("original", "error")
_SYMBOLIC: Final = (
    "a plan is for known sizes and numbers, and torch.compile(dynamic=False) makes one for each"
)
Compiled = Callable[..., Any]


def backend(
    graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], **settings: Any
) -> Compiled:
    """Compile one captured graph (the protocol of torch._dynamo backends)."""
    given = dict(settings.get("options") or {})
    fallback = given.pop("fallback", "original")
    if fallback not in _FALLBACKS:
        raise ValueError(unknown("fallback", str(fallback), _FALLBACKS))
    options = make_options(given)
    started = time.monotonic()
    try:
        example = _examples(example_inputs)
        with torch.no_grad():
            key = signature(example)
        if key is None:
            raise Unsupported(refusal(example, {}))
        lifted = lift_fx(graph_module, example)
        modules = list(graph_module.modules())
        with preserved(lifted):
            request, binding = make_request(graph_module, modules, lifted, example, {})
            planned = make_plan(request, options, started=started)
    except SuperoptError as error:
        if fallback == "error":
            raise
        logger.info("a subgraph runs as it was: %s", error)
        return graph_module.forward
    except Exception:  # a defect of ours must not become the user's: it is logged whole
        if fallback == "error":
            raise
        logger.warning("a subgraph runs as it was after an internal error", exc_info=True)
        return graph_module.forward
    if planned.program is None:
        logger.info("a subgraph runs as it was: %s", planned.plan.report.get("why"))
        return graph_module.forward
    return _serve(graph_module, planned.program.run, binding, key)


def _examples(inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Return real tensors like the example inputs, which Dynamo may give as fakes."""
    found = []
    for value in inputs:
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"it takes a {type(value).__name__}: {_SYMBOLIC}")
        if not all(isinstance(d, int) for d in value.shape):
            raise Unsupported(f"its shapes are symbolic: {_SYMBOLIC}")
        if value.requires_grad and torch.is_grad_enabled():
            raise Unsupported("it needs gradients")
        found.append(_real(value))
    return tuple(found)


def _real(value: torch.Tensor) -> torch.Tensor:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.detach()
    made = torch.empty_strided(
        tuple(value.shape), tuple(value.stride()), dtype=value.dtype, device=value.device
    )
    if value.is_floating_point():
        return made.normal_(generator=torch.Generator(value.device).manual_seed(0))
    return made.zero_()


def _serve(
    graph_module: torch.fx.GraphModule, program: Compiled, binding: Binding, key: Any
) -> Compiled:
    positions = binding.leaves
    original = graph_module.forward
    build = binding.build
    fetch = binding.fetcher()

    def call(*args: Any) -> Any:
        if signature(args) != key:
            return original(*args)
        rest = fetch()
        if rest is None:
            return original(*args)
        inputs = [*(args[i] for i in positions), *rest]
        if shares_written(inputs, binding.writes):
            return original(*args)
        results = program(*inputs)
        return results[0] if build is None else build(results)

    return call
