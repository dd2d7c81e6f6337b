"""Certificates: what was proven of a kernel, in a form that can be checked again from itself alone.

A certificate is JSON: the texts of both graphs and their digests, primes and seeds of the field
tests (also of every piece, where the programs were proven in pieces) with the computed bound,
floating-point errors, versions. `recheck` parses the graphs and repeats the field test with the recorded
seed. Reading one executes nothing but this module.
"""

import json
import platform
from dataclasses import asdict, dataclass
from typing import Any, final

import torch

from superopt.ir.errors import SuperoptError
from superopt.ir.graph import Graph
from superopt.ir.text import parse_graph, print_graph
from superopt.verify.equivalence import Piece, Verdict, verify_field
from superopt.verify.floating import FloatError, FloatVerdict

FORMAT = "superopt-certificate"
VERSION = 5


class CertificateError(SuperoptError):
    """A certificate that is damaged, foreign or from another version."""


@final
@dataclass(frozen=True)
class Certificate:
    """Evidence that `candidate` computes what `original` computes."""

    original: str
    candidate: str
    original_digest: str
    candidate_digest: str
    seed: int
    seeds: tuple[int, ...]
    primes: tuple[tuple[int, int], ...]
    tests: int
    error_per_test: float
    bound: float
    decisions: bool
    by_order: bool
    pieces: tuple[Piece, ...]
    alike: tuple[tuple[int, int], ...]
    float_seed: int | None
    float_errors: tuple[FloatError, ...]
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the certificate as JSON text."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def graphs(self) -> tuple[Graph, Graph]:
        """Return the original and the candidate.

        Raises:
            CertificateError: a text does not parse, or is not the graph whose digest is recorded.
        """
        return (
            _graph(self.original, self.original_digest, "original"),
            _graph(self.candidate, self.candidate_digest, "candidate"),
        )

    def recheck(self, *, error_bound: float | None = None) -> Verdict:
        """Repeat the field test from the stored graphs and seed.

        Raises:
            CertificateError: the graphs are damaged, or the test contradicts what is recorded.
        """
        original, candidate = self.graphs()
        wanted = self.bound if error_bound is None else error_bound
        verdict = verify_field(original, candidate, seed=self.seed, error_bound=max(wanted, 1e-300))
        if not verdict.equivalent:
            raise CertificateError(f"the programs are not equivalent: {verdict.reason}")
        if verdict.primes[: self.tests] != self.primes[: verdict.tests]:
            raise CertificateError("the recorded primes are not those that the seed gives")
        _confirm(self.error_per_test, verdict.error_per_test)
        if verdict.alike != self.alike:
            raise CertificateError(
                "the recorded axes are not those along which the programs are alike"
            )
        if [(p.digest, p.alike) for p in verdict.pieces] != [
            (p.digest, p.alike) for p in self.pieces
        ]:
            raise CertificateError("the recorded pieces are not those that were proven")
        for recorded, found in zip(self.pieces, verdict.pieces, strict=True):
            count = min(len(recorded.primes), len(found.primes))
            if recorded.primes[:count] != found.primes[:count]:
                raise CertificateError("a piece's primes are not those that the seed gives")
            _confirm(recorded.error_per_test, found.error_per_test)
        return verdict


def _confirm(recorded: float, found: float) -> None:
    if found > recorded:
        raise CertificateError(
            f"the recorded error of {recorded:.3g} per test is too small: it is {found:.3g}"
        )


def certify(
    original: Graph, candidate: Graph, verdict: Verdict, floating: FloatVerdict | None = None
) -> Certificate:
    """Return the certificate of a candidate that passed.

    Raises:
        CertificateError: it did not pass.
    """
    if not verdict.equivalent:
        raise CertificateError(f"nothing to certify: {verdict}")
    if floating is not None and not floating.accurate:
        raise CertificateError(f"nothing to certify: {floating.reason}")
    return Certificate(
        original=print_graph(original),
        candidate=print_graph(candidate),
        original_digest=original.digest(),
        candidate_digest=candidate.digest(),
        seed=verdict.seed,
        seeds=verdict.seeds,
        primes=verdict.primes,
        tests=verdict.tests,
        error_per_test=verdict.error_per_test,
        bound=verdict.bound,
        decisions=verdict.decisions,
        by_order=verdict.by_order,
        pieces=verdict.pieces,
        alike=verdict.alike,
        float_seed=None if floating is None else floating.seed,
        float_errors=() if floating is None else floating.errors,
        versions={"python": platform.python_version(), "torch": str(torch.__version__)},
    )


def read_certificate(text: str) -> Certificate:
    """Read a certificate.

    Raises:
        CertificateError: the text is not a certificate of this version; the message says why.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CertificateError(f"not a certificate: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CertificateError(f"not a certificate: no format {FORMAT!r}; make it anew")
    version = content.pop("version", None)
    if version != VERSION:
        raise CertificateError(f"certificate version {version}, this reads {VERSION}; make it anew")
    fields = Certificate.__dataclass_fields__
    if content.keys() != fields.keys():
        wrong = ", ".join(sorted(content.keys() ^ fields.keys()))
        raise CertificateError(f"damaged certificate: fields {wrong} are missing or unknown")
    try:
        certificate = _decoded(content)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise CertificateError(f"damaged certificate: {error}") from None
    certificate.graphs()
    return certificate


def _decoded(content: dict[str, Any]) -> Certificate:
    errors = tuple(
        FloatError(str(e["distribution"]), float(e["original"]), float(e["candidate"]))
        for e in content["float_errors"]
    )
    primes, seeds = _tests(content)
    tests = int(content["tests"])
    if not len(primes) == len(seeds) == tests:
        raise ValueError(f"{len(primes)} primes and {len(seeds)} seeds for {tests} tests")
    texts = {
        k: content[k] for k in ("original", "candidate", "original_digest", "candidate_digest")
    }
    if not all(isinstance(t, str) for t in texts.values()):
        raise TypeError("graphs and digests must be text")
    return Certificate(
        **texts,
        seed=int(content["seed"]),
        seeds=seeds,
        primes=primes,
        tests=tests,
        error_per_test=float(content["error_per_test"]),
        bound=float(content["bound"]),
        decisions=bool(content["decisions"]),
        by_order=bool(content["by_order"]),
        pieces=tuple(_piece(p) for p in content["pieces"]),
        alike=_alike(content),
        float_seed=None if content["float_seed"] is None else int(content["float_seed"]),
        float_errors=errors,
        versions={str(k): str(v) for k, v in content["versions"].items()},
    )


def _tests(content: dict[str, Any]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    primes = tuple((int(p), int(q)) for p, q in content["primes"])
    return primes, tuple(int(s) for s in content["seeds"])


def _alike(content: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(kept), int(of)) for kept, of in content["alike"])


def _piece(content: dict[str, Any]) -> Piece:
    primes, seeds = _tests(content)
    return Piece(
        digest=str(content["digest"]),
        alike=_alike(content),
        primes=primes,
        seeds=seeds,
        error_per_test=float(content["error_per_test"]),
        by_order=bool(content["by_order"]),
    )


def _graph(text: str, digest: str, which: str) -> Graph:
    try:
        graph = parse_graph(text)
    except SuperoptError as error:
        raise CertificateError(f"the {which} graph does not parse: {error}") from None
    if graph.digest() != digest:
        raise CertificateError(f"the {which} graph is not the one that was certified")
    return graph
