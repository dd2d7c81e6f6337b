import json
from types import SimpleNamespace

import pytest
import torch

from superopt import pipeline
from superopt.errors import PlanError
from superopt.ir import build as b
from superopt.plan import FORMAT, KernelSource, OutputSpec, Plan, StoredTensor, seal, unseal


def block() -> "b.Graph":
    builder = b.BlockBuilder("twice", grid={"m": 4})
    x = builder.load(b.input_("x", (8, 16)), ("m", 2), 16)
    builder.store(b.mul(x, 2.0), (8, 16), ("m", 2), 16)
    return builder.graph()


def plan() -> Plan:
    x = b.input_("x", (8, 16))
    inner = block()
    (result,) = b.apply_graph(inner, [x])
    kernel = KernelSource("cpu", "twice", str(inner), "// text", "symbol", 2, {"rows": 6})
    return Plan(
        original=b.kernel_graph("f", [x], [b.mul(x, 2.0)]),
        program=b.kernel_graph("f", [x], [result]),
        kernels={inner.digest(): kernel},
        user_inputs=("arg:0",),
        parameters=("constant:c",),
        constants={"c": StoredTensor((2,), "f32", bytes(8))},
        outputs=(OutputSpec((8, 16), (16, 1)), OutputSpec((8,), (1,), "input:0", 3)),
        structure="{}",
        target="t",
        certificate={"tests": 3},
        report={"improved": True},
    )


def test_a_plan_is_read_as_it_was_written():
    written = plan()
    assert Plan.from_json(written.to_json()) == written


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_changed_byte_is_noticed(at):
    text = plan().to_json()
    position = int(len(text) * at)
    changed = text[:position] + ("x" if text[position] != "x" else "y") + text[position + 1 :]
    with pytest.raises(PlanError):
        Plan.from_json(changed)


def test_a_truncated_plan_is_noticed():
    with pytest.raises(PlanError, match="truncated"):
        Plan.from_json(plan().to_json()[:-200])


def test_another_format_is_refused_by_name():
    body = json.loads(unseal(plan().to_json()))
    body["format"] = "superopt plan 0"
    with pytest.raises(PlanError, match="superopt plan 0") as caught:
        Plan.from_json(seal(json.dumps(body)))
    assert FORMAT in str(caught.value)


def test_a_kernel_of_another_block_graph_is_refused():
    body = json.loads(unseal(plan().to_json()))
    (digest,) = body["kernels"]
    body["kernels"] = {digest[::-1]: body["kernels"][digest]}
    with pytest.raises(PlanError, match="block graph"):
        Plan.from_json(seal(json.dumps(body)))


def test_a_missing_field_is_a_damaged_plan():
    body = json.loads(unseal(plan().to_json()))
    del body["outputs"]
    with pytest.raises(PlanError, match="damaged"):
        Plan.from_json(seal(json.dumps(body)))


def test_a_plan_is_restored_by_the_backend_that_made_it(monkeypatch):
    mine, cpu = SimpleNamespace(name="mine"), torch.device("cpu")
    monkeypatch.setattr(pipeline, "NAMES", (*pipeline.NAMES, "mine"))
    plain = pipeline.backend_named
    monkeypatch.setattr(
        pipeline, "backend_named", lambda name, *a: mine if name == "mine" else plain(name, *a)
    )
    options = pipeline.make_options({"cache": False})

    def found(*names):
        kernels = {str(i): SimpleNamespace(backend=name) for i, name in enumerate(names)}
        return pipeline._backend_of(SimpleNamespace(kernels=kernels), options, cpu).name

    assert (found(), found("cpu"), found("mine", "mine")) == ("cpu", "cpu", "mine")
    for names in (("triton",), ("cpu", "mine"), ("gone",)):
        with pytest.raises(PlanError, match=f"for the {' and '.join(names)} backend"):
            found(*names)


def test_a_budget_is_the_same_however_it_is_written():
    whole, fraction = (pipeline.make_options({"budget_s": b}) for b in (6, 6.0))
    cpu = torch.device("cpu")
    keys = {pipeline.key_of(pipeline.environment(o, cpu)) for o in (whole, fraction)}
    assert len(keys) == 1
