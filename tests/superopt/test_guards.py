import collections
import fractions
import functools
import importlib
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from superopt import provenance
from superopt.guards import take_guards
from superopt.provenance import is_installed, is_trusted, version_of
from superopt.watch import BOUND

SCALE = 2.0
TABLE = {"power": 2}


def helper(x):
    return x * SCALE


def uses_globals(x):
    return F.relu(helper(x)) + TABLE["power"]


def closing_over(value):
    def inner(x):
        return x * value

    return inner


class Block(torch.nn.Module):
    def __init__(self, width=4, power=2):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.power = power

    def forward(self, x):
        return self.linear(x) ** self.power


def test_guards_hold_while_nothing_changes():
    for subject in (uses_globals, closing_over(3), Block()):
        guards = take_guards(subject)
        assert guards.hold()
        assert guards.fingerprint is not None


def test_a_changed_global_is_seen_through_a_called_function(monkeypatch):
    guards = take_guards(uses_globals)
    before = guards.fingerprint
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert not guards.hold()
    assert take_guards(uses_globals).fingerprint != before


def test_an_int_is_not_the_equal_float(monkeypatch):
    guards = take_guards(uses_globals)
    monkeypatch.setitem(globals(), "SCALE", 2)
    assert not guards.hold()


def test_a_replaced_function_is_seen(monkeypatch):
    guards = take_guards(uses_globals)
    monkeypatch.setitem(globals(), "helper", lambda x: x)
    assert not guards.hold()


@pytest.mark.parametrize("part", ["__code__", "__defaults__", "__kwdefaults__"])
def test_what_is_put_into_a_function_is_seen(part):
    def scaled(x, factor=2, *, power=1):
        return x**power * factor

    def reloaded(x, factor=3, *, power=2):
        return x**power * factor + 1

    guards = take_guards(lambda x: scaled(x))
    setattr(scaled, part, getattr(scaled, part))
    assert guards.hold()
    setattr(scaled, part, getattr(reloaded, part))
    assert not guards.hold()


def test_a_changed_dict_is_seen(monkeypatch):
    guards = take_guards(uses_globals)
    monkeypatch.setitem(TABLE, "power", 3)
    assert not guards.hold()


def test_a_changed_closure_is_seen():
    function = closing_over(3)
    guards = take_guards(function)
    function.__closure__[0].cell_contents = 4
    assert not guards.hold()


def test_a_tensor_in_a_closure_is_watched_and_has_no_fingerprint():
    tensor = torch.ones(3)
    guards = take_guards(closing_over(tensor))
    assert guards.hold()
    assert guards.fingerprint is None
    tensor.add_(1)
    assert not guards.hold()


def test_module_configuration_children_hooks_and_mode_are_watched():
    changes = (
        lambda m: setattr(m, "power", 3),
        lambda m: setattr(m, "linear", torch.nn.Linear(4, 4)),
        lambda m: m.eval(),
        lambda m: m.register_forward_hook(lambda *a: None),
        lambda m: setattr(m.linear, "in_features", 5),
    )
    for change in changes:
        module = Block()
        guards = take_guards(module)
        assert guards.hold()
        change(module)
        assert not guards.hold()


def test_weights_are_no_part_of_the_guards():
    module = Block()
    guards = take_guards(module)
    with torch.no_grad():
        module.linear.weight.add_(1)
    module.linear.weight = torch.nn.Parameter(torch.zeros(4, 4))
    assert guards.hold()
    assert guards.modules[0] is module
    assert guards.modules[1] is module.linear


def test_fingerprints_tell_programs_apart():
    subjects = (
        closing_over(3),
        closing_over(4),
        Block(),
        Block(power=3),
        Block(width=5),
        uses_globals,
        helper,
        Block().eval(),
    )
    prints = [take_guards(s).fingerprint for s in subjects]
    assert len(set(prints)) == len(subjects)
    assert take_guards(Block()).fingerprint == prints[2]


def test_a_module_that_torch_compile_was_given_keeps_its_fingerprint():
    block = Block()
    before = take_guards(block).fingerprint
    torch.compile(block)
    assert take_guards(block).fingerprint == before is not None


def test_other_code_has_another_fingerprint():
    copy = types.FunctionType(
        helper.__code__.replace(co_consts=(None, 7)), {"SCALE": 2.0}, "helper"
    )
    assert take_guards(copy).fingerprint != take_guards(helper).fingerprint


def test_objects_of_unknown_classes_have_no_fingerprint_but_are_watched():
    class Config:
        def __init__(self):
            self.scale = 2.0

    config = Config()
    guards = take_guards(closing_over(config))
    assert guards.fingerprint is None
    assert guards.hold()
    config.scale = 3.0
    assert not guards.hold()


class Settings:
    factor = 2.0
    table = torch.ones(3)

    def scaled(self, x):
        return x * self.factor


class Configured(torch.nn.Module):
    factor = 2.0
    limits = (0.0, 1.0)

    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        return self.settings.scaled(x) * self.factor


def test_attributes_of_classes_are_watched_and_so_is_what_hides_them(monkeypatch):
    changes = (
        lambda m: setattr(m, "factor", 3.0),
        lambda m: setattr(m.settings, "factor", 3.0),
        lambda m: monkeypatch.setattr(Configured, "factor", 3.0),
        lambda m: monkeypatch.setattr(Configured, "limits", (0.0, 2.0)),
        lambda m: monkeypatch.setattr(Settings, "factor", 3.0),
        lambda m: monkeypatch.setattr(Settings, "scaled", lambda self, x: x),
        lambda m: Settings.table.add_(1),
    )
    for change in changes:
        module = Configured()
        guards = take_guards(module)
        assert guards.hold()
        change(module)
        assert not guards.hold()
        monkeypatch.undo()


def test_parameters_that_a_module_keeps_in_lists_too_are_no_part_of_the_guards():
    module = torch.nn.LSTM(4, 4)
    guards = take_guards(module)
    with torch.no_grad():
        module.weight_ih_l0.add_(1)
    module._flat_weights = list(module._flat_weights)
    assert guards.hold()
    assert guards.fingerprint == take_guards(torch.nn.LSTM(4, 4)).fingerprint is not None
    module._flat_weights[0] = torch.nn.Parameter(torch.randn(16, 4))
    assert not guards.hold()


def test_inference_tensors_have_no_version_to_watch():
    with torch.inference_mode():
        tensor = torch.ones(3)
    guards = take_guards(closing_over(tensor))
    assert guards.hold()
    assert guards.fingerprint is None


PACKAGE = """
import logging, types
import torch
log = logging.getLogger("bulky")
LIMIT = 2.0
UNREAD = 1.0

class Bulky(torch.nn.Module):
    def forward(self, x):
        log.debug("at work")
        return self.scaled(x)

    def scaled(self, x):
        return x * LIMIT

    def save(self):
        return UNREAD
"""


@pytest.fixture
def bulky(tmp_path, monkeypatch):
    """A package as pip installs it."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "bulky.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("bulky")
    sys.modules.pop("bulky")
    provenance._folder_kind.cache_clear()


def test_installed_classes_are_followed_as_far_as_code_names_their_members(bulky, monkeypatch):
    ignored = (
        lambda: monkeypatch.setattr(bulky, "UNREAD", 3.0),
        lambda: monkeypatch.setattr(bulky.Bulky, "save", None),
        lambda: monkeypatch.setattr(bulky.log, "level", 10),
    )
    watched = (
        lambda: monkeypatch.setattr(bulky, "LIMIT", 3.0),
        lambda: monkeypatch.setattr(bulky.Bulky, "scaled", lambda self, x: x),
        lambda: monkeypatch.setattr(bulky.Bulky, "forward", lambda self, x: x),
    )
    for change in (*ignored, *watched):
        guards = take_guards(bulky.Bulky())
        before = guards.fingerprint
        assert guards.hold()
        assert before is not None
        change()
        assert guards.hold() is (change in ignored)
        assert (take_guards(bulky.Bulky()).fingerprint == before) is (change in ignored)
        monkeypatch.undo()


def test_whose_code_is_whose(bulky):
    assert is_installed(bulky.Bulky)
    assert not is_trusted(bulky.Bulky)
    assert is_trusted(torch.nn.Linear)
    assert is_trusted(textwrap.dedent)
    assert not is_installed(Block)
    assert not is_trusted(Block)
    assert version_of("bulky") != version_of("tests.superopt")


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


def scaled_by(x, scale):
    return x * scale * SCALE


def test_objects_without_a_dict_are_watched_or_told_by_their_text(monkeypatch):
    changed = (
        (Slotted(2.0), lambda v: setattr(v, "scale", 3.0)),
        (np.array([2.0]), lambda v: v.fill(3.0)),
        (collections.deque([2.0]), lambda v: v.append(3.0)),
        (functools.partial(scaled_by, scale=2.0), lambda v: globals().update(SCALE=7.0)),
    )
    for value, change in changed:
        guards = take_guards(closing_over(value))
        assert guards.hold()
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "SCALE", SCALE)
            change(value)
            assert not guards.hold()
    pairs = [
        (np.float32(2.0), np.float32(3.0)),
        (np.array([2.0]), np.array([3.0])),
        (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
        (torch.finfo(torch.float32), torch.finfo(torch.float16)),
        (functools.partial(scaled_by, scale=2.0), functools.partial(scaled_by, scale=3.0)),
        (Slotted(2.0), Slotted(3.0)),
    ]
    for one, other in pairs:
        left, right = (take_guards(closing_over(v)).fingerprint for v in (one, other))
        assert left is None or left != right


def test_members_of_c_code_are_no_slots():
    guards = take_guards(closing_over(torch.Generator()))
    assert guards.hold()
    assert guards.put_back() == ""


def test_what_running_a_program_changes_in_slots_is_put_back():
    value = Slotted(2.0)
    guards = take_guards(closing_over(value))
    value.scale = 3.0
    assert guards.put_back() == "scale"
    assert value.scale == 2.0
    assert guards.hold()


class Stack(torch.nn.Module):
    """Everything that a place can be: numbers, containers, children, tensors in tables, or none there."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU())
        self.zero = 0.0
        self.pair = (1, 2)
        self.sizes = [2, 3]
        self.table = {"a": 1}
        self.kinds = {1}
        self.nested = [[1]]
        self.settings = Settings()
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return self.inner(x) * self.sizes[0] + self.zero + self.settings.factor + self.shift


SEEN = {
    "a number": lambda m: setattr(m, "zero", 1.0),
    "another zero": lambda m: setattr(m, "zero", -0.0),
    "a float for an int in a tuple": lambda m: setattr(m, "pair", (1, 2.0)),
    "a float for an int in a list": lambda m: m.sizes.__setitem__(0, 2.0),
    "a longer list": lambda m: m.sizes.append(4),
    "a float for an int in a dict": lambda m: m.table.update(a=1.0),
    "a new key": lambda m: m.table.update(b=1),
    "a bool for an int in a set": lambda m: setattr(m, "kinds", {True}),
    "an element of a set": lambda m: m.kinds.add(2),
    "an inner list": lambda m: m.nested[0].append(2),
    "an attribute hides that of a class": lambda m: setattr(m.settings, "factor", 2.0),
    "a new attribute": lambda m: setattr(m, "more", 1),
    "an attribute less": lambda m: delattr(m, "zero"),
    "a child more": lambda m: m.inner.append(torch.nn.ReLU()),
    "a child less": lambda m: m.inner.pop(1),
    "another child": lambda m: m.inner.__setitem__(1, torch.nn.GELU()),
    "a parameter where there was none": lambda m: setattr(
        m.inner[0], "bias", torch.nn.Parameter(torch.ones(4))
    ),
    "a new parameter": lambda m: m.register_parameter("more", torch.nn.Parameter(torch.ones(1))),
    "a new buffer": lambda m: m.register_buffer("more", torch.ones(1)),
    "a buffer less": lambda m: delattr(m, "shift"),
    "a hook": lambda m: m.inner[1].register_forward_hook(lambda *a: None),
}
AS_GOOD = {
    "the same number": lambda m: setattr(m, "zero", float("0")),
    "an equal tuple": lambda m: setattr(m, "pair", (int("1"), 2)),
    "an equal list": lambda m: setattr(m, "sizes", [2, 3]),
    "an equal dict": lambda m: setattr(m, "table", {"a": 1}),
    "an equal set": lambda m: setattr(m, "kinds", {1}),
    "another tensor in the place of a parameter": lambda m: setattr(
        m.inner[0], "weight", torch.nn.Parameter(torch.zeros(4, 4))
    ),
    "the methods that superopt keeps": lambda m: vars(m).update({BOUND: {}}),
}


@pytest.mark.parametrize("how", ["looped", "written", "compiled"])
def test_every_change_is_seen_and_what_is_as_good_is_not(how, tmp_path_factory, monkeypatch):
    if how == "written":  # as for few places
        monkeypatch.setattr("superopt.watch._WORTH_C", 1000)
    folder = tmp_path_factory.getbasetemp() / "guards"
    for name, change in (*SEEN.items(), *AS_GOOD.items()):
        module = Stack()
        guards = take_guards(module)
        assert (guards.places.quick is not None) is (how == "written")
        if how == "compiled":
            guards.compile(folder)
            assert guards.places.pointers
        assert guards.hold()
        change(module)
        assert guards.hold() is (name in AS_GOOD), name
        if name in AS_GOOD:  # it is watched as what it replaced was
            assert guards.hold()
            module.sizes[0] = 5
            assert not guards.hold(), name
            module.sizes[0] = 2
            assert guards.hold()
            module.table["a"] = 2
            assert not guards.hold(), name
            module.table["a"] = 1
            module.kinds.add(2)
            assert not guards.hold(), name


def test_a_changed_place_is_seen_behind_one_that_was_replaced_by_as_good(tmp_path):
    module = Stack()
    guards = take_guards(module)
    guards.compile(tmp_path)
    module.sizes, module.settings.more = [2, 3], 1
    assert not guards.hold()
    assert not guards.hold()


def test_a_buffer_that_became_a_part_of_a_plan_may_not_be_replaced():
    module = Stack()
    guards = take_guards(module)
    guards.fold([module.shift])
    assert guards.hold()
    module.shift = torch.ones(4)
    assert not guards.hold()


def test_classes_are_guarded_once_however_many_objects_they_have():
    few, many = (
        take_guards(torch.nn.Sequential(*(Block() for _ in range(n)))).classes for n in (1, 9)
    )
    assert [len(s.entries) for s in few.values()] == [len(s.entries) for s in many.values()]
