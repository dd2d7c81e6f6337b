import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from superopt.signature import altered, signature, tensor_check


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Special(torch.Tensor):
    pass


def test_calls_of_one_kind_have_one_key():
    assert signature((torch.randn(3, 4), 2)) == signature((torch.randn(3, 4), 2))
    assert hash(signature((torch.randn(3),), {"p": 1.0})) is not None
    # each call has a NaN of its own
    assert signature((float("nan"),)) == signature((float("nan"),)) != signature((0.0,))


def test_every_difference_that_matters_is_in_the_key():
    base = torch.randn(4, 4)
    calls = [
        (base,),
        (base.t(),),
        (base.double(),),
        (torch.randn(4, 5),),
        (base, 1),
        (base, 1.0),
        (base, True),
        (base, None),
        (base, "1"),
        ([base, base],),
        ((base, base),),
        (base, base),
        ({"a": base},),
        ({"b": base},),
        (base, 0.0),
        (base, -0.0),
    ]
    keys = [signature(c) for c in calls]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert signature((base,), {"p": 1}) != signature((base,), {"q": 1})


def early(make):
    """Return what PyTorch warns of as a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def nested(*parts):
    return early(lambda: torch.nested.nested_tensor(list(parts)))


def unservable():
    x = torch.randn(3, 4)
    yield "a gradient", (x.clone().requires_grad_(),)
    yield "a subclass", (x.as_subclass(Special),)
    yield "a sparse tensor", (x.to_sparse(),)
    yield "a sparse tensor of rows", (early(x[None].to_sparse_csr),)
    yield "a nested tensor", (nested(x, x),)
    yield "a tensor without memory", (torch._efficientzerotensor((3,)),)
    yield "a negated view", (torch._neg_view(x),)
    yield "an object", (x, object())
    yield "an object in a list", ([x, object()],)


@pytest.mark.parametrize(("name", "args"), list(unservable()))
def test_what_no_plan_serves_has_no_key(name, args):
    assert signature(args) is None


def test_gradients_do_not_matter_where_they_are_off():
    with torch.no_grad():
        assert signature((torch.randn(3).requires_grad_(),)) is not None


def test_modes_have_no_key():
    x = torch.randn(3)
    with torch.autocast("cpu"):
        assert signature((x,)) is None
    with Functions():
        assert signature((x,)) is None
        assert altered()
    with torch.no_grad(), forward_ad.dual_level():
        assert signature((forward_ad.make_dual(x, x),)) is None
        assert altered()
    with Dispatch():
        assert signature((x,)) is None
    assert not altered()


def test_under_vmap_there_is_no_key():
    seen = []

    def function(x):
        seen.append(signature((x,)))
        return x

    torch.vmap(function)(torch.randn(2, 3))
    assert seen == [None]


def test_the_fast_check_agrees_with_the_key():
    x, y = torch.randn(3, 4), torch.randn(4)
    check = tensor_check((x, y))
    if check is None:
        pytest.skip("this version of PyTorch has no such check")
    assert check(torch.randn(3, 4), torch.randn(4))
    assert not check(torch.randn(4, 3).t(), y)
    assert not check(x, y.double())
    assert not check(x, torch.randn(5))
    assert not check(x, y.clone().requires_grad_())
    assert not check(x, torch._neg_view(y))
    assert not check(x, y.as_subclass(Special))
    assert not check(x, 3)
    assert not check(x, nested(y, y))
    assert not check(x, torch._efficientzerotensor((4,)))
    with torch.autocast("cpu"):
        assert not check(x, y)
    with Dispatch():
        assert not check(x, y)
    assert tensor_check((x, 3)) is None
    assert tensor_check(()) is None


def test_the_fast_check_takes_parameters_and_does_not_see_the_gradient_mode():
    weight = torch.nn.Parameter(torch.randn(3))
    check = tensor_check((weight,))
    if check is None:
        pytest.skip("this version of PyTorch has no such check")
    assert check(torch.nn.Parameter(torch.randn(3)))
    with torch.no_grad():
        assert check(weight)
    assert not check(None)
    assert not check(torch.randn(3))
    assert not check(torch.nn.Parameter(torch.randn(3), requires_grad=False))
    weight.data = torch.randn(4)
    assert not check(weight)
