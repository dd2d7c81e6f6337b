"""Decoder blocks in the manner of Llama, and kernels for them, from which tests make whole models."""

from superopt.ir import build as b
from superopt.ir.composite import ATTENTION, RMS_NORM, SILU, AttentionAttrs, NormAttrs
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, rewrite
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.search.algebra import FUSION_RULES, apply_rules
from superopt.search.emit import block_graph, place
from superopt.search.partition import partition
from superopt.search.region import make_region, substitute
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles


def llama(
    blocks: int = 1, *, size: int = 256, heads: int = 4, length: int = 64, hidden: int = 512
) -> Graph:
    """Chain decoder blocks: norms, rotary attention, gated MLP, two residual sums in each."""
    head = size // heads
    x = residual = b.input_("x", (length, size))
    tables = [b.input_(n, (length, head)) for n in ("cos", "sin")]
    inputs = [x, *tables]

    def parameter(name: str, *shape: int) -> Node:
        inputs.append(b.input_(f"{name}{len(inputs)}", shape))
        return inputs[-1]

    def linear(y: Node, name: str, columns: int) -> Node:
        return b.matmul(y, b.transpose(parameter(name, columns, y.shape[-1])))

    def norm(y: Node, name: str) -> Node:
        return make(RMS_NORM, (y, parameter(name, size)), NormAttrs((-1,), 1e-6))

    def split(y: Node) -> Node:
        return b.permute(b.reshape(y, (length, heads, head)), (1, 0, 2))

    def rotated(y: Node) -> Node:
        cos, sin = tables
        left, right = b.slice_(y, -1, 0, head // 2), b.slice_(y, -1, head // 2, head)
        return b.add(b.mul(y, cos), b.mul(b.concat([b.neg(right), left], -1), sin))

    for _ in range(blocks):
        y = norm(residual, "norm1")
        q, k, v = (split(linear(y, name, size)) for name in "qkv")
        a = make(ATTENTION, (rotated(q), rotated(k), v), AttentionAttrs(head**-0.5, True))
        a = b.reshape(b.permute(a, (1, 0, 2)), (length, size))
        residual = b.add(residual, linear(a, "o", size))
        y = norm(residual, "norm2")
        gate = make(SILU, (linear(y, "gate", hidden),))
        product = b.mul(gate, linear(y, "up", hidden))
        residual = b.add(residual, linear(product, "down", size))
    return b.kernel_graph(f"llama{blocks}", inputs, [residual])


def fused(graph: Graph, *, fuse_contractions: bool = True) -> Graph:
    """Replace every part that can be one kernel by the kernel that is predicted to be fastest."""
    machine = Target()
    variant = apply_rules(expand(graph), FUSION_RULES)
    groups = partition(variant, machine, products=None if fuse_contractions else 0)
    replacements: dict[Node, Node] = {}
    for number, group in enumerate(groups):
        region = make_region(variant, group)
        ranked = [
            (*best, schedule)
            for schedule in derive(region)
            for best in best_tiles(schedule, machine, 1)
        ]
        if ranked:
            _, tiles, schedule = min(ranked, key=lambda entry: entry[0])
            kernel = block_graph(schedule, tiles, f"kernel{number}")
            results = place(schedule, kernel, region.inputs)
            replacements.update(zip(region.outputs, results, strict=True))
    return substitute(variant, replacements)


def chained(block: Graph, blocks: int, parameters: tuple[Node, ...]) -> Graph:
    """Apply a block to its own result, each time with parameters of its own.

    `parameters` are the inputs of the whole; the first of a block is its input, two are tables.
    """
    value, *shared = parameters[:3]
    each = len(block.inputs) - 3
    for layer in range(blocks):
        own = parameters[3 + layer * each : 3 + (layer + 1) * each]
        operands = dict(zip(block.inputs, (value, *shared, *own), strict=True))
        (value,) = rewrite(
            block.outputs,
            lambda n, inputs, given=operands: given[n] if n in given else rebuild(n, inputs),
        )
    return b.kernel_graph(f"chain{blocks}", parameters, [value])
