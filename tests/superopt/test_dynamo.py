import logging

import pytest
import torch
import torch.nn.functional as F

from superopt import dynamo


@pytest.fixture(autouse=True)
def fresh(first_found):
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        return x + F.gelu(self.linear(F.layer_norm(x, (64,)))), None


def compiled(subject, tmp_path, **settings):
    options = {"budget_s": 60, "cache": str(tmp_path), **settings.pop("options", {})}
    return torch.compile(subject, backend="superopt", options=options, **settings)


def test_the_entry_point_finds_the_backend():
    assert "superopt" in torch._dynamo.list_backends(exclude_tags=())


def test_a_compiled_module_gives_what_eager_gives(tmp_path, monkeypatch):
    served = []
    plain = dynamo._serve
    monkeypatch.setattr(dynamo, "_serve", lambda *a: served.append(1) or plain(*a))
    module = Block().eval()
    fast = compiled(module, tmp_path, dynamic=False)
    for rows in (8, 3):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            result, nothing = fast(x)
            torch.testing.assert_close(result, module(x)[0])
            assert nothing is None
            module.linear.weight.mul_(1.5)
            torch.testing.assert_close(fast(x)[0], module(x)[0])
    assert len(served) == 2


def test_gradients_run_as_they_were(tmp_path, caplog):
    module = Block()
    fast = compiled(module, tmp_path, dynamic=False)
    with caplog.at_level(logging.INFO, "superopt"):
        fast(torch.randn(4, 64))[0].sum().backward()
    assert module.linear.weight.grad is not None
    assert "runs as it was: it needs gradients" in caplog.text


def test_symbolic_shapes_run_as_they_were(tmp_path, caplog):
    fast = compiled(lambda x: x * 2 + x.shape[0], tmp_path, dynamic=True)
    with caplog.at_level(logging.INFO, "superopt"):
        for rows in (3, 5):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(fast(x), x * 2 + rows)
    assert "dynamic=False" in caplog.text


def test_a_float_argument_that_changes_runs_as_it_was(tmp_path, caplog):
    fast = compiled(lambda x, scale: x.exp() * scale, tmp_path, options={"budget_s": 0.1})
    x = torch.randn(3, 4)
    with caplog.at_level(logging.INFO, "superopt"):
        for scale in (0.5, 1.5):
            torch.testing.assert_close(fast(x, scale), x.exp() * scale)
    assert "a float argument changes" in caplog.text


def test_calls_under_autocast_run_as_they_were_and_say_so(tmp_path, caplog):
    module = Block().eval()
    fast = compiled(module, tmp_path, dynamic=False)
    x = torch.randn(4, 64)
    with caplog.at_level(logging.INFO, "superopt"), torch.no_grad(), torch.autocast("cpu"):
        torch.testing.assert_close(fast(x)[0], module(x)[0])
    assert "autocast is on" in caplog.text


def test_fallback_error_raises_what_stood_in_the_way(tmp_path):
    fast = compiled(
        lambda x: x * 2 + x.shape[0], tmp_path, dynamic=True, options={"fallback": "error"}
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="known sizes"):
        fast(torch.randn(3, 4))


def test_unknown_options_name_what_is_near(tmp_path):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean seed"):
        compiled(lambda x: x + 1, tmp_path, options={"sed": 3})(torch.randn(2))


def test_a_print_and_a_number_of_data_break_the_graph_and_both_sides_have_plans(
    tmp_path, monkeypatch, capsys
):
    served = []
    plain = dynamo._serve
    monkeypatch.setattr(dynamo, "_serve", lambda *a: served.append(1) or plain(*a))

    def program(x):
        y = torch.tanh(x) * 2
        print("at work")
        total = float(y.sum())
        return torch.exp(-y) + total

    options = {"budget_s": 3}
    fast = compiled(program, tmp_path, dynamic=False, options=options)
    x = torch.randn(16, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), program(x))
        capsys.readouterr()
        torch.testing.assert_close(fast(x), fast(x))
    assert capsys.readouterr().out == "at work\nat work\n"
    assert len(served) >= 2
