"""Targets: one JSON form, refused where it is not one; the data of GPUs is plausible."""

import json
from dataclasses import fields, replace

import pytest

from superopt.ir.errors import SuperoptError
from superopt.ir.target import GPUS, Target


@pytest.mark.parametrize("target", [Target(), *GPUS.values()], ids=lambda t: t.name)
def test_a_target_comes_back(target: Target) -> None:
    assert Target.from_json(target.to_json()) == target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "superopt target 0"}, "format"),
        ({"cores": "two"}, "cores is like 2, got 'two'"),
        ({"cores": None}, "cores"),
        ({"name": 3}, "name"),
        ({"colour": 1}, "no colour"),
    ],
)
def test_what_is_no_target_is_refused(change: dict[str, object], says: str) -> None:
    body = {**json.loads(Target().to_json()), **change}
    with pytest.raises(SuperoptError, match=says):
        Target.from_json(json.dumps(body))
    for text in ("", "[]", "{}"):
        with pytest.raises(SuperoptError, match="a target is"):
            Target.from_json(text)


def test_newer_gpus_have_more_of_everything() -> None:
    older, newer = list(GPUS.values())[:-1], list(GPUS.values())[1:]
    for a, b in zip(older, newer, strict=True):
        for name in ("cores", "peak_flops", "half_flops", "memory_bandwidth", "outer_cache_bytes"):
            assert getattr(a, name) < getattr(b, name)
        assert a.half_flops > a.peak_flops > a.cores * a.vector_ops
    same = {f.name: f.default for f in fields(Target) if f.name.startswith("library")}
    assert replace(older[0], **same) == older[0]
