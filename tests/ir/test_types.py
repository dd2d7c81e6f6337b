"""Runs of reshapes against PyTorch's `view`."""

from itertools import product
from math import prod

import pytest

from superopt.ir.types import contiguous_strides, reshape_runs, reshape_strides

torch = pytest.importorskip("torch")


def layouts():
    for shape in ((4, 6), (2, 3, 4), (6, 1, 4), (12,), ()):
        dense = contiguous_strides(shape)
        yield shape, dense
        yield shape, tuple(2 * s for s in dense)
        yield shape, (dense[0] + 3, *dense[1:]) if shape else ()
        yield shape, dense[::-1] if len(set(shape)) == 1 else tuple(0 for _ in shape)


def shapes(count: int):
    for new in product((1, 2, 3, 4, 6, 12, 24), repeat=3):
        if prod(new) == count:
            yield new


def test_strides_are_those_of_a_view():
    tried = set()
    for shape, strides in layouts():
        x = torch.empty(400).as_strided(shape, strides)
        for new in shapes(prod(shape)):
            found = reshape_strides(shape, strides, new)
            try:
                expected = x.view(new).stride()
            except RuntimeError:
                expected = None
            tried.add(expected is None)
            if expected is None or found is None:
                assert found == expected, (shape, strides, new)
                continue
            for extent, ours, theirs in zip(new, found, expected, strict=True):
                assert ours == theirs or extent == 1, (shape, strides, new)
    assert tried == {True, False}


def test_runs_hold_the_elements_in_their_order():
    # queries, keys and values of two heads of four: [24, 3, 2, 16] seen as [24, 96]
    assert reshape_runs((24, 3, 2, 16), (1, 1536, 384, 24), (24, 96)) == [
        [(24, 1)],
        [(3, 1536), (32, 24)],
    ]
    assert reshape_runs((4, 6), (7, 1), (3, 8)) is None
