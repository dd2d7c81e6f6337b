"""Proof in pieces: whole models are proven, and no lie about what may be equal proves a wrong one."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, rewrite, topological
from superopt.ir.ops import library
from superopt.ir.semantics import to_primitives
from superopt.ir.types import TensorType
from superopt.verify import equivalence
from superopt.verify.certificate import CertificateError, certify, read_certificate
from superopt.verify.equivalence import Verdict, verify_field
from superopt.verify.ranges import Integers, integer_ranges
from superopt.verify.reference import run_reference
from superopt.verify.sweep import Claim, Sweep
from tests.verify.llama import chained, fused, llama
from tests.verify.mutators import MUTATORS
from tests.verify.test_mutations import differs
from tests.verify.workloads import attention

Pair = tuple[Graph, Graph]


@pytest.fixture(scope="module")
def block() -> Pair:
    original = llama()
    return original, fused(original, fuse_contractions=False)


@pytest.fixture(scope="module")
def small() -> Pair:
    original = llama(size=16, heads=2, length=6, hidden=20)
    return original, fused(original, fuse_contractions=False)


# -- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proof(block: Pair) -> Verdict:
    return verify_field(*block, seed=1)


def test_a_decoder_block_is_proven_in_pieces(proof: Verdict) -> None:
    assert proof.equivalent, proof
    assert proof.bound <= 2.0**-60
    assert len(proof.pieces) > 4


def test_repeated_blocks_make_the_same_claims() -> None:
    sizes = {"size": 64, "heads": 2, "length": 16, "hidden": 96}
    one, model = llama(**sizes), llama(4, **sizes)
    kernel = fused(one, fuse_contractions=False)
    proof = verify_field(one, kernel, seed=1)
    verdict = verify_field(model, chained(kernel, 4, model.inputs), seed=1)
    assert verdict.equivalent, verdict
    assert verdict.bound <= 2.0**-60
    # the input of the first block is no sum, as that of the others is; beyond this nothing is new
    assert len(verdict.pieces) <= len(proof.pieces) + 2


def test_pieces_are_certified_and_checked_again(
    small: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 0.0)
    verdict = verify_field(*small, seed=1)
    assert len(verdict.pieces) > 4
    certificate = read_certificate(certify(*small, verdict).to_json())
    assert certificate.pieces == verdict.pieces
    assert [p.digest for p in certificate.recheck().pieces] == [p.digest for p in verdict.pieces]
    for forged, message in {
        certificate.pieces[1:]: "recorded pieces",
        tuple(replace(p, primes=((7, 3),)) for p in certificate.pieces): "primes",
    }.items():
        with pytest.raises(CertificateError, match=message):
            replace(certificate, pieces=forged).recheck()


def test_digests_of_few_elements_change_no_value(
    small: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pair values that are not equal: claims about them fail, and nothing else follows from it."""
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 0.0)
    monkeypatch.setattr(equivalence, "_SAMPLE", 1)
    assert verify_field(*small, seed=1).counterexample is None


def test_one_weight_used_twice_is_found(block: Pair) -> None:
    model = llama(2)
    each = len(block[0].inputs) - 3
    used = (*model.inputs[: 3 + each], *model.inputs[3 : 3 + each])
    wrong = b.kernel_graph("wrong", model.inputs, chained(block[1], 2, used).outputs)
    verdict = verify_field(model, wrong, seed=3)
    assert not verdict
    assert verdict.counterexample is not None


# -- mutants, with the test of the whole out of the way --------------------------------------------


def kernels(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op is library.CUSTOM]


def with_kernel(graph: Graph, target: Node, change: Callable[[Node], Node]) -> Graph:
    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        return change(rebuild(node, inputs)) if node is target else rebuild(node, inputs)

    return graph.with_outputs(rewrite(graph.outputs, rule))


def damaged(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Damage one kernel inside, one graph for each kernel and every other kind of mistake."""
    for kind, mutate in list(MUTATORS.items())[::2]:
        for kernel in kernels(graph):
            inner = next(mutate(kernel.attrs.graph), None)
            if inner is not None:
                attrs = replace(kernel.attrs, graph=inner)
                yield kind, with_kernel(graph, kernel, lambda n, a=attrs: make(n.op, n.inputs, a))


def exchanged(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Exchange two operands of equal type, of a kernel or anything else."""
    for target in graph.nodes():
        for i, first in enumerate(target.inputs):
            for j in range(i):
                if first.type == target.inputs[j].type and first is not target.inputs[j]:

                    def change(node: Node, i: int = i, j: int = j) -> Node:
                        operands = list(node.inputs)
                        operands[i], operands[j] = operands[j], operands[i]
                        return make(node.op, operands, node.attrs)

                    yield "exchanged operands", with_kernel(graph, target, change)


def misread(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Read another value of equal type where a kernel's result is read."""
    values = [n for n in graph.nodes() if isinstance(n.type, TensorType)]
    for value in values:
        if value.inputs and value.inputs[0].op is library.CUSTOM:
            earlier = [v for v in topological([value]) if v.type == value.type and v is not value]
            if earlier:
                yield "misread value", with_kernel(graph, value, lambda n, e=earlier[-1]: e)


def swept(original: Graph, candidate: Graph, seed: int) -> bool:
    """Sweep where the pairs that may be equal are chosen by nothing but their number of elements."""
    outputs = to_primitives(original, original.inputs)
    found = to_primitives(candidate, original.inputs)
    own = list(topological(outputs))
    source = random.Random(seed)
    pairs: dict[Node, Node] = {}
    for node in topological(found):
        same = [n for n in own if n.inputs and alike(n, node)]
        if node not in own and same and source.random() < 0.1:
            pairs[node] = b.reshape(source.choice(same), node.shape)

    def prove(claim: Claim) -> bool:
        left, right = claim.graph.outputs
        sides = (claim.graph.with_outputs([left]), claim.graph.with_outputs([right]))
        return bool(verify_field(*sides, seed=seed, error_bound=2.0**-12))

    sweep = Sweep(outputs, pairs, finite(original, own), integer_ranges(original), prove)
    return sweep.equal(found)


def alike(left: Node, right: Node) -> bool:
    kinds = {n.tensor.dtype if isinstance(n.type, TensorType) else None for n in (left, right)}
    return len(kinds) == 1 and None not in kinds and left.tensor.elements == right.tensor.elements


def finite(original: Graph, nodes: list[Node]) -> frozenset[Node]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(i.shape, generator=generator) for i in original.inputs]
    values = run_reference(original.with_outputs(nodes), inputs)
    return frozenset(n for n, v in zip(nodes, values, strict=True) if bool(torch.isfinite(v).all()))


def test_a_right_program_is_proven_in_spite_of_lies(small: Pair) -> None:
    assert len(kernels(small[1])) > 4
    assert all(swept(*small, seed=seed) for seed in range(2))


def test_no_lie_proves_a_wrong_program(small: Pair) -> None:
    original, candidate = small
    seen: set[str] = set()
    for make_mutants in (damaged, exchanged, misread):
        for kind, mutant in make_mutants(candidate):
            if kind not in seen and differs(original, mutant):
                seen.add(kind)
                assert not swept(original, mutant, seed=len(seen)), (
                    f"{kind} was accepted:\n{mutant}"
                )
    assert len(seen) >= 8, seen
    assert {"exchanged operands", "misread value"} <= seen


def test_a_value_that_may_be_infinite_is_no_variable() -> None:
    x = b.input_("x", (4, 4))
    masked = b.where(b.ge(b.iota((4, 1), -2), b.iota((1, 4), -1)), b.mul(x, x), float("-inf"))
    left = b.exp(masked)
    # equal for every number, NaN for the infinite ones
    right = b.mul(left, b.add(b.mul(masked, 0.0), 1.0))

    def proven(variables: frozenset[Node]) -> bool:
        def prove(claim: Claim) -> bool:
            sides = [claim.graph.with_outputs([o]) for o in claim.graph.outputs]
            return bool(verify_field(sides[0], sides[1], seed=4))

        return Sweep((left,), {}, variables, {"x": Integers()}, prove).equal([right])

    assert proven(frozenset([masked]))
    assert not proven(frozenset())


def test_a_sum_over_several_axes_is_proven_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 0.0)
    x = b.input_("x", (64, 64))

    def quotients(x: Node) -> Node:
        return b.div(b.constant(1.0), b.add(b.mul(x, x), 1.0))

    left = b.reduce_sum(quotients(x), (-2, -1))
    right = b.reduce_sum(b.reduce_sum(quotients(b.flip(x, -1)), -1), -2)
    proof = verify_field(*(b.kernel_graph("sum", [x], [side]) for side in (left, right)), seed=5)
    assert proof.equivalent
    # a row of either has 64 divisors of degree 2, the whole 4096
    assert proof.error_per_test < 64 * 2 * 2.1 / (0.9 * 2**26)


def test_related_values_are_proven_over_a_larger_part() -> None:
    x, y = b.input_("x", (4, 4)), b.input_("y", (4, 4))
    whole, part = b.mul(x, y), b.mul(b.mul(x, y), y)
    left = b.kernel_graph("left", [x, y], [b.exp(part), b.mul(whole, y), b.sqrt(part)])
    right = b.kernel_graph("right", [x, y], [b.exp(part), part, b.sqrt(b.mul(whole, y))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivalence, "DIRECT_ERROR", 0.0)
        assert verify_field(left, right, seed=5)
        wrong = right.with_outputs([*right.outputs[:2], b.sqrt(whole)])
        assert not verify_field(left, wrong, seed=5)


def test_what_one_side_alone_reads_is_no_variable() -> None:
    """The gate hides the normalized rows from the other side, which computes them again."""
    x, w = b.input_("x", (4, 4)), b.input_("w", (4, 4))
    rows = b.add(x, b.mul(x, x))
    root = b.sqrt(b.add(b.reduce_sum(b.mul(rows, rows), -1), 1.0))
    normal = b.div(rows, root)
    gate = b.exp(normal)
    left = b.mul(gate, b.matmul(normal, w))
    right = b.mul(gate, b.div(b.matmul(rows, w), root))
    claims: list[int] = []

    def prove(claim: Claim) -> bool:
        claims.append(len(claim.graph.inputs))
        sides = [claim.graph.with_outputs([o]) for o in claim.graph.outputs]
        return bool(verify_field(sides[0], sides[1], seed=4))

    variables = frozenset([rows, root, normal, gate])
    ranges = {"x": Integers(), "w": Integers()}
    assert Sweep((left,), {}, variables, ranges, prove).equal([right])
    assert claims == [4], "the gate, the rows, their root, and the weights"


@pytest.mark.parametrize(
    ("after", "pieces"),
    [
        (b.sigmoid, 0),
        (lambda x: b.exp(b.sub(x, b.reduce_max(x, -1))), 0),
        (lambda x: b.exp(b.sigmoid(x)), 1),
    ],
)
def test_exponentials_of_what_exponentials_made(after: Callable[[Node], Node], pieces: int) -> None:
    """A kernel that multiplies exponentials where the program adds exponents, and what it gives is one."""
    plain, block = attention(causal=False)
    w = b.input_("w", (8, 8))

    def whole(attended: Node) -> Graph:
        result = after(b.matmul(attended, w))
        return b.kernel_graph("whole", [*plain.inputs, w], [result])

    original = whole(plain.outputs[0])
    (attended,) = b.apply_graph(block, plain.inputs)
    verdict = verify_field(original, whole(attended), seed=7)
    assert verdict, verdict
    assert len(verdict.pieces) == pieces
    rejected = 0
    for kind, mutate in MUTATORS.items():
        for mutant in list(mutate(block))[:1]:
            wrong = whole(*b.apply_graph(mutant, plain.inputs))
            if differs(original, wrong):
                assert not verify_field(original, wrong, seed=7), f"{kind} was accepted:\n{mutant}"
                rejected += 1
    assert rejected >= 8
