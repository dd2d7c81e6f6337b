"""The text form of graphs: printer and parser, `parse_graph(print_graph(g)) == g`.

One node per line, in SSA form, type at the end:

    // superopt ir 1
    kernel @square(%x: f32[16,64]) {
      %0 = mul %x, %x : f32[16,64]
      return %0
    }

Names of graphs and inputs that are not letters, digits, `_` and `.` stand in quotes: `%"q-proj"`.
Attributes stand in braces as `key=value`; a nested graph is the value of the key `graph`. An index
map prints as `(m,k):64`: the axes that split the dim, outermost first, and the tile size. Types are
printed to be read; the parser infers them anew and compares.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, final

from superopt.ir.errors import GraphError, ParseError
from superopt.ir.graph import Axis, Bound, Graph, Level
from superopt.ir.node import Node, intern, make, topological
from superopt.ir.ops import leaf
from superopt.ir.ops.registry import op_named
from superopt.ir.ops.tile import DimMap
from superopt.ir.types import DType, TensorType, TupleType, Type

VERSION = 1
_STRING = r"\"(?:[^\"\\]|\\.)*\""
_NAME = r"[A-Za-z0-9_.]+"
_PLAIN_NAME = re.compile(_NAME)
Notes = Mapping[tuple[Graph, Node | None], Sequence[str]]


# -- printing ----------------------------------------------------------------------------------


def print_graph(graph: Graph, notes: Notes | None = None) -> str:
    """Return the text of `graph`, deterministic and readable.

    `notes` are comments to print under a node of a graph, or under its first line (None).
    """
    lines = _graph_lines(graph, "", notes or {})
    return f"// superopt ir {VERSION}\n" + "\n".join(lines) + "\n"


def _graph_lines(graph: Graph, indent: str, notes: Notes) -> list[str]:
    names: dict[Node, str] = {n: "%" + _name_text(n.attrs.name) for n in graph.inputs}
    params = ", ".join(f"{names[n]}: {n.type}" for n in graph.inputs)
    head = f"{indent}{graph.level.value} @{_name_text(graph.name)}({params})"
    head += _axes_text("grid", graph) + _axes_text("loops", graph) + " {"
    lines = [head, *_notes(graph, None, indent, notes)]
    for node in graph.inputs:
        lines += _notes(graph, node, indent, notes)
    taken = set(names.values())
    counter = 0
    for node in topological(graph.outputs):
        if node in names:
            continue
        while f"%{counter}" in taken:
            counter += 1
        names[node] = f"%{counter}"
        counter += 1
        operands = ", ".join(names[i] for i in node.inputs)
        text = f"{indent}  {names[node]} = {node.op.name}"
        text += f" {operands}" if operands else ""
        text += _attrs_text(node.attrs, indent + "  ", notes)
        lines += f"{text} : {node.type}".split("\n")
        lines += _notes(graph, node, indent, notes)
    lines.append(f"{indent}  return {', '.join(names[o] for o in graph.outputs)}")
    lines.append(f"{indent}}}")
    return lines


def _notes(graph: Graph, node: Node | None, indent: str, notes: Notes) -> list[str]:
    return [f"{indent}  // ^ {note}" for note in notes.get((graph, node), ())]


def _axes_text(kind: str, graph: Graph) -> str:
    axes = graph.grid if kind == "grid" else graph.loops
    if not axes:
        return ""
    return f" {kind}({', '.join(_axis_text(a) for a in axes)})"


def _axis_text(axis: Axis) -> str:
    text = f"{axis.name}={axis.count}"
    for bound in axis.bounds:
        terms = " + ".join(f"{c} * {n}" for n, c in bound.terms)
        text += f" if {terms} + {bound.constant} >= 0"
    return text


def _attrs_text(attrs: Any, indent: str, notes: Notes) -> str:
    if attrs is None:
        return ""
    values = [(f, getattr(attrs, f.name)) for f in fields(attrs)]
    parts = [f"{f.name}={_value_text(v, indent, notes)}" for f, v in values if v != f.default]
    return f" {{{', '.join(parts)}}}" if parts else ""


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {text: character for character, text in _ESCAPES.items()}


def _quoted(text: str) -> str:
    return '"' + "".join(_ESCAPES.get(c, c) for c in text) + '"'


def _unquoted(text: str) -> str:
    return re.sub(r"\\.", lambda m: _UNESCAPES.get(m.group(), m.group()), text[1:-1])


def _name_text(name: str) -> str:
    return name if _PLAIN_NAME.fullmatch(name) else _quoted(name)


def _value_text(value: Any, indent: str, notes: Notes) -> str:
    if isinstance(value, Graph):
        return "\n".join(_graph_lines(value, indent + "  ", notes)).lstrip()
    if isinstance(value, DimMap):
        names = ",".join(f"{name}={count}" for name, count in value.axes)
        return f"({names}):{value.tile}"
    if isinstance(value, tuple):
        return f"[{', '.join(_value_text(v, indent, notes) for v in value)}]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else str(value)


# -- parsing -----------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<space>\s+|//[^\n]*)"
    rf"|(?P<string>{_STRING})"
    rf"|(?P<value>%(?:{_NAME}|{_STRING}))"
    rf"|(?P<symbol>@(?:{_NAME}|{_STRING}))"
    r"|(?P<number>-?(?:inf|nan)\b|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_.]*)"
    r"|(?P<mark>>=|[(){}\[\]<>,:=*+])"
)


@final
class _Token:
    __slots__ = ("kind", "position", "text")

    def __init__(self, kind: str, text: str, position: int) -> None:
        self.kind = kind
        self.text = text
        self.position = position


def parse_graph(text: str) -> Graph:
    """Return the graph that `text` describes.

    Raises:
        ParseError: what was expected, what came, and where, with a caret.
    """
    header = re.match(r"\s*// superopt ir (\d+)", text)
    if header and int(header.group(1)) != VERSION:
        raise ParseError(f"ir version {header.group(1)}, this reads {VERSION}", 1, 1, "")
    parser = _Parser(text)
    graph = parser.graph()
    parser.expect_end()
    return graph


@final
class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._scan())
        self.position = 0

    def _scan(self) -> Iterator[_Token]:
        position = 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise self._error(f"unexpected character {self.text[position]!r}", position)
            text = match.group()
            if match.lastgroup in ("value", "symbol") and text[1] == '"':
                text = text[0] + _unquoted(text[1:])
            if match.lastgroup != "space":
                yield _Token(str(match.lastgroup), text, position)
            position = match.end()
        yield _Token("end", "end of text", position)

    def _error(self, message: str, position: int) -> ParseError:
        line = self.text.count("\n", 0, position) + 1
        start = self.text.rfind("\n", 0, position) + 1
        stop = self.text.find("\n", position)
        source = self.text[start : stop if stop >= 0 else len(self.text)]
        return ParseError(message, line, position - start + 1, source)

    def _next(self) -> _Token:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def _peek(self, text: str) -> bool:
        return self.tokens[self.position].text == text

    def _accept(self, text: str) -> bool:
        if self._peek(text):
            self.position += 1
            return True
        return False

    def _expect(self, text: str) -> _Token:
        token = self._next()
        if token.text != text:
            raise self._error(f"expected {text!r}, got {token.text!r}", token.position)
        return token

    def _kind(self, kind: str) -> _Token:
        token = self._next()
        if token.kind != kind:
            raise self._error(f"expected a {kind}, got {token.text!r}", token.position)
        return token

    def expect_end(self) -> None:
        self._kind("end")

    def graph(self) -> Graph:
        token = self._kind("word")
        try:
            level = Level(token.text)
        except ValueError:
            raise self._error(
                f"expected kernel, block or thread, got {token.text!r}", token.position
            ) from None
        name = self._kind("symbol").text[1:]
        values: dict[str, Node] = {}
        inputs = self._params(values)
        grid = self._axes("grid")
        loops = self._axes("loops")
        self._expect("{")
        while not self._accept("return"):
            self._statement(values)
        outputs = [self._operand(values)]
        while self._accept(","):
            outputs.append(self._operand(values))
        self._expect("}")
        return Graph(level, name, tuple(inputs), tuple(outputs), grid, loops)

    def _params(self, values: dict[str, Node]) -> list[Node]:
        self._expect("(")
        inputs = []
        while not self._accept(")"):
            token = self._kind("value")
            self._expect(":")
            type_ = self._tensor_type()
            node = intern(leaf.INPUT, (), leaf.InputAttrs(token.text[1:], type_), type_)
            values[token.text] = node
            inputs.append(node)
            if not self._peek(")"):
                self._expect(",")
        return inputs

    def _axes(self, kind: str) -> tuple[Axis, ...]:
        if not self._accept(kind):
            return ()
        self._expect("(")
        axes = []
        while not self._accept(")"):
            name = self._kind("word").text
            self._expect("=")
            count = self._integer()
            bounds = []
            while self._accept("if"):
                bounds.append(self._bound())
            axes.append(Axis(name, count, tuple(bounds)))
            if not self._peek(")"):
                self._expect(",")
        return tuple(axes)

    def _bound(self) -> Bound:
        terms: list[tuple[str, int]] = []
        while True:
            number = self._integer()
            if not self._accept("*"):
                self._expect(">=")
                self._expect("0")
                return Bound(tuple(terms), number)
            terms.append((self._kind("word").text, number))
            self._expect("+")

    def _integer(self) -> int:
        token = self._kind("number")
        try:
            return int(token.text)
        except ValueError:
            raise self._error(f"expected an integer, got {token.text}", token.position) from None

    def _operand(self, values: dict[str, Node]) -> Node:
        token = self._kind("value")
        if token.text not in values:
            raise self._error(f"{token.text} is not defined above", token.position)
        return values[token.text]

    def _statement(self, values: dict[str, Node]) -> None:
        target = self._kind("value")
        if target.text in values:
            raise self._error(f"{target.text} is defined twice", target.position)
        self._expect("=")
        name = self._kind("word")
        operands = []
        if self.tokens[self.position].kind == "value":
            operands.append(self._operand(values))
            while self._accept(","):
                operands.append(self._operand(values))
        attributes = self._attributes() if self._peek("{") else None
        self._expect(":")
        position = self.tokens[self.position].position
        stated = self._type()
        try:
            op = op_named(name.text)
            attrs = None
            if op.attrs_class is not None:
                attrs = op.attrs_class(**(attributes or {}))
            node = make(op, operands, attrs)
        except (GraphError, TypeError) as error:
            raise self._error(str(error), name.position) from error
        if node.type != stated:
            raise self._error(f"the type is {node.type}, not {stated}", position)
        values[target.text] = node

    def _attributes(self) -> dict[str, Any]:
        self._expect("{")
        result: dict[str, Any] = {}
        while not self._accept("}"):
            key = self._kind("word").text
            self._expect("=")
            result[key] = self._value()
            if not self._peek("}"):
                self._expect(",")
        return result

    def _value(self) -> Any:
        token = self.tokens[self.position]
        if token.text == "[":
            self.position += 1
            items = []
            while not self._accept("]"):
                items.append(self._value())
                if not self._peek("]"):
                    self._expect(",")
            return tuple(items)
        if token.text == "(":
            return self._dim_map_or_tuple_type()
        if token.kind == "string":
            self.position += 1
            return _unquoted(token.text)
        if token.kind == "number":
            self.position += 1
            plain = re.fullmatch(r"-?\d+", token.text)
            return int(token.text) if plain else float(token.text)
        return self._word_value()

    def _word_value(self) -> Any:
        token = self._kind("word")
        constants = {"true": True, "false": False, "none": None}
        if token.text in constants:
            return constants[token.text]
        self.position -= 1
        if token.text in {level.value for level in Level}:
            return self.graph()
        if self.tokens[self.position + 1].text == "[":
            return self._tensor_type()
        return self._dtype()

    def _dim_map_or_tuple_type(self) -> Any:
        after = self.tokens[self.position + 1]
        if after.kind == "word" and self.tokens[self.position + 2].text == "[":
            return self._type()
        self._expect("(")
        axes = []
        while not self._accept(")"):
            name = self._kind("word").text
            self._expect("=")
            axes.append((name, self._integer()))
            if not self._peek(")"):
                self._expect(",")
        self._expect(":")
        return DimMap(tuple(axes), self._integer())

    def _dtype(self) -> DType:
        token = self._kind("word")
        try:
            return DType(token.text)
        except ValueError:
            raise self._error(f"no element type {token.text!r}", token.position) from None

    def _tensor_type(self) -> TensorType:
        dtype = self._dtype()
        shape = self._integers("[", "]")
        strides = self._integers("<", ">") if self._peek("<") else None
        return TensorType(shape, dtype, strides)

    def _integers(self, left: str, right: str) -> tuple[int, ...]:
        self._expect(left)
        result = []
        while not self._accept(right):
            result.append(self._integer())
            if not self._peek(right):
                self._expect(",")
        return tuple(result)

    def _type(self) -> Type:
        if not self._accept("("):
            return self._tensor_type()
        items = []
        while not self._accept(")"):
            items.append(self._tensor_type())
            if not self._peek(")"):
                self._expect(",")
        return TupleType(tuple(items))
