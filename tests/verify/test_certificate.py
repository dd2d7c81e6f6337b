"""Certificates: what passed can be checked again from the text alone; what was changed is refused."""

import json
from dataclasses import replace

import pytest

from superopt.ir import build as b
from superopt.ir.text import print_graph
from superopt.verify.certificate import Certificate, CertificateError, certify, read_certificate
from superopt.verify.equivalence import verify_field
from superopt.verify.floating import verify_float
from superopt.verify.reference import run_reference
from tests.verify.workloads import rms_linear


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    original, kernel = rms_linear()
    verdict = verify_field(original, kernel, seed=3)
    floating = verify_float(original, lambda t: run_reference(kernel, t), seed=3)
    return certify(original, kernel, verdict, floating)


def test_round_trip_and_recheck(certificate: Certificate) -> None:
    read = read_certificate(certificate.to_json())
    assert read == certificate
    verdict = read.recheck()
    assert verdict.seeds == certificate.seeds
    assert verdict.bound <= 2.0**-60


def test_what_did_not_pass_is_not_certified() -> None:
    original, _ = rms_linear()
    other = original.with_outputs([b.mul(original.outputs[0], 2.0)])
    with pytest.raises(CertificateError, match="nothing to certify"):
        certify(original, other, verify_field(original, other, seed=1))


def test_a_forged_candidate_is_found_by_rechecking(certificate: Certificate) -> None:
    original, _ = rms_linear()
    wrong = original.with_outputs([b.mul(original.outputs[0], 2.0)])
    forged = replace(certificate, candidate=print_graph(wrong), candidate_digest=wrong.digest())
    with pytest.raises(CertificateError, match="not equivalent"):
        read_certificate(forged.to_json()).recheck()


def test_a_forged_bound_is_found_by_rechecking(certificate: Certificate) -> None:
    with pytest.raises(CertificateError, match="too small"):
        replace(certificate, error_per_test=1e-30).recheck()
    with pytest.raises(CertificateError, match="primes"):
        replace(certificate, primes=((7, 3),) * certificate.tests).recheck()


DAMAGE = {
    "empty": lambda c: "",
    "cut short": lambda c: json.dumps(c)[:200],
    "not an object": lambda c: "[1, 2]",
    "foreign": lambda c: json.dumps({"format": "something else"}),
    "another version": lambda c: json.dumps({**c, "version": 99}),
    "a field missing": lambda c: json.dumps({k: v for k, v in c.items() if k != "bound"}),
    "a field of the wrong type": lambda c: json.dumps({**c, "seeds": "none"}),
    "tests without primes": lambda c: json.dumps({**c, "primes": []}),
    "a graph changed": lambda c: json.dumps({**c, "original": c["candidate"]}),
    "a graph cut": lambda c: json.dumps({**c, "original": c["original"][:60]}),
    "errors of another shape": lambda c: json.dumps({**c, "float_errors": [1]}),
    "versions of another shape": lambda c: json.dumps({**c, "versions": 3}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported(certificate: Certificate, kind: str) -> None:
    text = DAMAGE[kind](json.loads(certificate.to_json()))
    with pytest.raises(CertificateError):
        read_certificate(text)
