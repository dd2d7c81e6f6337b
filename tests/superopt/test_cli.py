import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from superopt import cli, commands, pipeline
from superopt.errors import UsageError


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "superopt_cli_program.py").write_text(
        textwrap.dedent(
            """
            import torch

            def norm(x, w):
                return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w

            number = 3

            class Norm(torch.nn.Module):
                pass

            class Shift(torch.nn.Module):
                def forward(self, x):
                    return x + 1

            shift = Shift()
            """
        )
    )
    return folder


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, workplace, first_found):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("SUPEROPT_CACHE_DIR", str(workplace / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def artifact(workplace):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_GAIN", float("inf"))
        patch.chdir(workplace)
        patch.setattr(sys, "path", list(sys.path))
        folder = workplace / "fast"
        program = "superopt_cli_program:norm"
        inputs = ["-i", "f32[8,64]", "-i", "f32[64]"]
        arguments = ["optimize", program, *inputs, "-o", str(folder), "--budget", "3"]
        assert cli.main([*arguments, "--cache", str(workplace / "cache")]) == 0
    return folder


def test_help_does_not_load_torch():
    code = (
        "import sys; from superopt.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "exit codes" in done.stdout
    assert done.stdout.endswith("False\n")


def test_every_verb_explains_itself(capsys):
    for verb in ("optimize", "run", "bench", "verify", "inspect", "targets", "cache", "ops"):
        code, out, _ = run(capsys, verb, "--help")
        assert code == 0
        assert "--json" in out


def test_an_artifact_runs_as_the_program_does(artifact, capsys, workplace):
    from superopt_cli_program import norm

    x, w = torch.randn(8, 64), torch.randn(64)
    np.savez(workplace / "in.npz", x=x.numpy(), w=w.numpy())
    files = ["--inputs", workplace / "in.npz", "--outputs", workplace / "out.npz"]
    code, out, _ = run(capsys, "run", artifact, *files)
    assert code == 0
    assert "float32[8, 64]" in out
    with np.load(workplace / "out.npz") as results:
        np.testing.assert_allclose(results["output0"], norm(x, w).numpy(), rtol=1e-5, atol=1e-6)
    np.savez(workplace / "wrong.npz", x=w.numpy(), w=x.numpy())
    code, _, err = run(capsys, "run", artifact, "--inputs", workplace / "wrong.npz")
    assert code == 2
    assert "f32[8,64]" in err


def test_an_artifact_is_verified_again_from_itself(artifact, capsys, tmp_path):
    code, out, _ = run(capsys, "verify", artifact, "--json")
    assert code == 0
    assert json.loads(out)["bound"] <= 2**-60
    code, out, _ = run(capsys, "verify", artifact, "--bound", "1e-40")
    assert code == 0


def test_a_kernel_that_computes_something_else_fails_verification(artifact, capsys, tmp_path):
    from dataclasses import replace

    from superopt.artifact import load_artifact, save_artifact

    plan = load_artifact(artifact)
    ((digest, kernel),) = plan.kernels.items()
    text = kernel.text.replace("float>(1e-06)", "float>(1.0)")
    assert text != kernel.text
    save_artifact(
        replace(plan, kernels={digest: replace(kernel, text=text)}), tmp_path / "wrong", {}
    )
    code, out, _ = run(capsys, "verify", tmp_path / "wrong")
    assert code == 4
    assert "NOT verified" in out


def test_a_certificate_of_another_program_fails_verification(artifact, capsys, tmp_path):
    from dataclasses import replace

    from superopt.artifact import load_artifact, save_artifact
    from superopt.ir import build as b

    plan = load_artifact(artifact)
    x, w = plan.original.inputs
    other = b.kernel_graph("other", [x, w], [b.mul(b.mul(x, 2.0), w)])
    save_artifact(replace(plan, original=other), tmp_path / "wrong", {})
    code, out, _ = run(capsys, "verify", tmp_path / "wrong")
    assert code == 4
    assert "other programs" in out


def test_a_damaged_artifact_fails_verification(artifact, capsys, tmp_path):
    import shutil

    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / "plan.json"
    path.write_text(path.read_text()[:-50])
    assert run(capsys, "verify", tmp_path / "copy")[0] == 4
    assert run(capsys, "bench", tmp_path / "copy")[0] == 2


def test_inspect_prints_graph_schedule_and_source(artifact, capsys):
    code, out, _ = run(capsys, "inspect", artifact)
    assert code == 0
    assert "custom" in out
    assert "superopt_kernel" in out
    code, out, _ = run(capsys, "inspect", artifact, "--program")
    assert out.startswith("// superopt ir")
    code, out, _ = run(capsys, "inspect", artifact, "--python")
    assert "def program(" in out


def test_bench_times_both(artifact, capsys):
    code, out, _ = run(capsys, "bench", artifact, "--seconds", "0.2", "--json")
    assert code == 0
    assert json.loads(out)["ratio"] > 0


def test_an_exported_file_becomes_an_artifact_with_its_weights(capsys, workplace, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.GELU()).eval()
    x = torch.randn(4, 32)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    folder = tmp_path / "out"
    arguments = ["optimize", tmp_path / "m.pt2", "-o", folder, "--budget", "2", "--json"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["event"] == "done"
    np.savez(tmp_path / "in.npz", x=x.numpy())
    files = ["--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz"]
    assert run(capsys, "run", folder, *files)[0] == 0
    with np.load(tmp_path / "out.npz") as results, torch.no_grad():
        np.testing.assert_allclose(results["output0"], module(x).numpy(), rtol=1e-4, atol=1e-5)
    assert run(capsys, *arguments)[0] == 2
    assert run(capsys, *arguments, "--force")[0] == 0


class Averaging(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, *, x, log):
        self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        log[:1] += 1
        return torch.tanh(x - self.mean) * 2


def test_keyword_arguments_and_what_changes_are_in_artifacts(capsys, workplace, tmp_path):
    module = Averaging()
    given = {"log": torch.zeros(2), "x": torch.randn(8, 16)}
    torch.export.save(torch.export.export(module, (), given), tmp_path / "m.pt2")
    folder = tmp_path / "out"
    code, _, err = run(capsys, "optimize", tmp_path / "m.pt2", "-o", folder, "--budget", "2")
    assert code == 0, err
    np.savez(tmp_path / "in.npz", **{name: t.numpy() for name, t in given.items()})
    files = ["--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz"]
    code, out, _ = run(capsys, "run", folder, *files)
    assert code == 0
    expected = {"output0": module(**given), "changed_log": given["log"]}
    with np.load(tmp_path / "out.npz") as results:
        (mean,) = set(results.files) - set(expected)
        assert mean.startswith("changed_")
        for name, value in {**expected, mean: module.mean}.items():
            np.testing.assert_allclose(results[name], value.numpy(), rtol=1e-5, atol=1e-6)
            assert f"{name}: torch.float32" in out
    assert run(capsys, "verify", folder)[0] == 0
    assert run(capsys, "bench", folder, "--seconds", "0.2")[0] == 0


def test_targets_cache_and_ops(capsys, artifact):
    code, out, _ = run(capsys, "targets")
    assert code == 0
    assert "GB/s (measured" in out
    assert "sm_100 (B200)" in out
    code, out, _ = run(capsys, "targets", "--json")
    assert json.loads(out)["gpus"]["sm_90"]["cores"] == 132
    code, out, _ = run(capsys, "cache", "list", "--json")
    assert json.loads(out)["files"] > 0
    code, out, _ = run(capsys, "ops")
    assert code == 0
    assert "matmul" in out
    assert "MISSING" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ""),
        (["nonsense"], 2, "invalid choice"),
        (["optimize", "superopt_cli_program:norm", "-o", "o"], 2, "--input"),
        (["optimize", "superopt_cli_program:norm", "-o", "o", "-i", "f32[2]"], 2, "argument: 'w'"),
        (
            ["optimize", "superopt_cli_program:shift", "-o", "o", "-i", "1", "-i", "2"],
            2,
            "too many",
        ),
        (["optimize", "superopt_cli_program:none", "-o", "o", "-i", "f32[2]"], 2, "none"),
        (["optimize", "superopt_cli_program:number", "-o", "o", "-i", "f32[2]"], 2, "int"),
        (["optimize", "no_such_module:f", "-o", "o", "-i", "f32[2]"], 2, "no_such_module"),
        (["optimize", "missing.pt2", "-o", "o"], 2, "missing.pt2"),
        (["optimize", __file__ + ".pt2", "-o", "o"], 2, "there is no file"),
        (["optimize", "superopt_cli_program:norm", "-o", "/dev/null/o"], 2, "cannot be written"),
        (["optimize", "neither", "-o", "o"], 2, "module:function"),
        (["optimize", "superopt_cli_program:norm", "-o", "o", "-i", "f31[2]"], 2, "f31"),
        (["bench", "nowhere"], 2, "nowhere"),
    ],
)
def test_usage_errors_say_what_is_wrong(capsys, arguments, code, words):
    found, _, err = run(capsys, *arguments)
    assert found == code
    assert words in err


def test_a_foreign_file_is_named_without_a_traceback(capsys, caplog, tmp_path):
    foreign = tmp_path / "foreign.pt2"
    foreign.write_text("nothing")
    code, _, err = run(capsys, "optimize", str(foreign), "-o", str(tmp_path / "o"))
    assert code == 2
    assert "foreign.pt2 is not a torch.export file" in err
    assert not caplog.records


def test_what_is_not_supported_has_its_own_code(capsys):
    arguments = ["optimize", "superopt_cli_program:norm", "-i", "f32[8,64]", "-i", "f32[64]"]
    code, _, err = run(capsys, *arguments, "-o", "o", "--backend", "triton", "--no-cache")
    assert code == 3
    assert "cpu" in err


def test_an_interrupt_has_its_own_code(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_targets", interrupted)
    assert run(capsys, "targets")[0] == 130


def test_output_that_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "superopt", "ops"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_input_specs():
    assert commands.parse_input("f32[2, 3]", 0).shape == (2, 3)
    assert commands.parse_input("bf16[4]", 0).dtype is torch.bfloat16
    assert commands.parse_input("f32[]", 0).shape == ()
    assert int(commands.parse_input("i64[100]:5", 0).max()) == 4
    assert commands.parse_input("3", 0) == 3
    assert commands.parse_input("0.5", 0) == 0.5
    assert torch.equal(commands.parse_input("f32[3]", 1), commands.parse_input("f32[3]", 1))
    with pytest.raises(UsageError):
        commands.parse_input("f32(2)", 0)


def test_errors_are_lines_for_machines_too(capsys, workplace):
    (workplace / "superopt_cli_broken.py").write_text("1 / 0\n")
    cases = [
        (("bench", "nowhere"), 2, "ArtifactError", "nowhere"),
        (("optimize", "superopt_cli_broken:f", "-o", "x"), 2, "UsageError", "ZeroDivisionError"),
        (("optimize", "superopt_cli_program:Norm", "-o", "x"), 2, "UsageError", "an instance"),
        (
            ("optimize", "superopt_cli_program:norm", "-i", "f32[8,4]", "-i", "f32[3]", "-o", "x"),
            3,
            "LiftError",
            "norm",
        ),
    ]
    for arguments, wanted, kind, says in cases:
        code, out, err = run(capsys, *arguments, "--json")
        record = json.loads(out)
        assert (code, record["exit_code"], record["error"]) == (wanted, wanted, kind)
        assert says in record["message"]
        assert record["message"] in err


def test_a_defect_of_ours_is_told_with_its_traceback(capsys, monkeypatch):
    def run_targets(options):
        raise AssertionError("never")

    monkeypatch.setattr(commands, "run_targets", run_targets)
    code, out, err = run(capsys, "targets", "--json")
    assert code == 1
    assert json.loads(out)["error"] == "internal error"
    assert "Traceback" in err
    assert "please report it: AssertionError: never" in err
