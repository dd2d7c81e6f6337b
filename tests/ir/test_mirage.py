"""The importer of Mirage's JSON: damage is reported, never imported."""

import json
from pathlib import Path
from typing import Any

import pytest

from superopt.ir.errors import ParseError
from superopt.ir.mirage import read_mirage
from superopt.ir.text import parse_graph, print_graph

FILE = Path(__file__).parents[1] / "oracles" / "mirage" / "lora_bs8.json"


@pytest.fixture
def entries() -> Any:
    return json.loads(FILE.read_text())


def test_graphs_print_and_parse() -> None:
    for graph in read_mirage(FILE.read_text()):
        assert parse_graph(print_graph(graph)) == graph


def _kernel(entries: Any) -> Any:
    return next(o for o in entries[0] if o["op_type"] == "kn_customized_op")


def _step(entries: Any, kind: str) -> Any:
    return next(o for o in _kernel(entries)["bgraph"]["operators"] if o["op_type"] == kind)


def _drop(place: dict[str, Any], key: str) -> None:
    del place[key]


DAMAGE = {
    "no op_type": lambda e: _drop(e[0][0], "op_type"),
    "no dims": lambda e: _drop(e[0][0]["output_tensors"][0], "dim"),
    "negative dim": lambda e: e[0][0]["output_tensors"][0].update(dim=[-1, 4, 0, 0]),
    "dims that do not fit": lambda e: e[0][0]["output_tensors"][0].update(dim=[3, 5, 0, 0]),
    "unknown operator": lambda e: _step(e, "tb_add_op").update(op_type="tb_teleport_op"),
    "unknown kernel operator": lambda e: e[0][-1].update(op_type="kn_teleport_op"),
    "missing operand": lambda e: _step(e, "tb_add_op")["input_tensors"].pop(),
    "unknown tensor": lambda e: _step(e, "tb_add_op")["input_tensors"][0].update(guid=1),
    "wrong result shape": lambda e: _step(e, "tb_add_op")["output_tensors"][0].update(
        dim=[1, 1, 0, 0]
    ),
    "grid that does not divide": lambda e: _kernel(e)["bgraph"]["grid_dim"].update(x=63),
    "empty grid": lambda e: _kernel(e)["bgraph"]["grid_dim"].update(x=0),
    "no output": lambda e: e[0].pop(),
    "a graph that is a number": lambda e: e.__setitem__(0, 3),
    "an operator that is a number": lambda e: e[0].__setitem__(0, 3),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_parse_error(entries: Any, kind: str) -> None:
    DAMAGE[kind](entries)
    with pytest.raises(ParseError, match=r"expected"):
        read_mirage(json.dumps(entries))


@pytest.mark.parametrize("text", ["", "{", "[[{]]", "null", '{"a": 1}', FILE.read_text()[:500]])
def test_text_that_is_not_a_file_is_a_parse_error(text: str) -> None:
    with pytest.raises(ParseError):
        read_mirage(text)
