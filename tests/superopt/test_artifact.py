import json

import pytest

from superopt.artifact import load_artifact, save_artifact
from superopt.errors import ArtifactError
from superopt.ir import build as b
from superopt.plan import KernelSource, Plan, StoredTensor


def plan() -> Plan:
    builder = b.BlockBuilder("twice", grid={"m": 4})
    x = builder.load(b.input_("x", (8, 16)), ("m", 2), 16)
    builder.store(b.mul(x, 2.0), (8, 16), ("m", 2), 16)
    inner = builder.graph()
    x = b.input_("x", (8, 16))
    kernel = KernelSource("cpu", "twice", str(inner), "// text", "symbol", 2, {})
    return Plan(
        original=b.kernel_graph("f", [x], [b.mul(x, 2.0)]),
        program=b.kernel_graph("f", [x], list(b.apply_graph(inner, [x]))),
        kernels={inner.digest(): kernel},
        user_inputs=("arg:0",),
        parameters=(),
        constants={"w": StoredTensor((2,), "f32", b"12345678")},
        outputs=(),
        structure="{}",
        target="t",
        certificate={"tests": 3},
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "artifact"
    save_artifact(plan(), path, {"superopt": "1"})
    return path


def test_an_artifact_is_read_as_it_was_written(folder):
    assert load_artifact(folder) == plan()
    assert (folder / "program.mu").read_text() == str(plan().program)
    assert (folder / "certificate.json").exists()
    assert list(folder.glob("kernels/*.cpp"))


def test_every_file_is_checked(folder):
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]) + b"x")
        with pytest.raises(ArtifactError):
            load_artifact(folder)
        path.unlink()
        with pytest.raises(ArtifactError):
            load_artifact(folder)
        path.write_bytes(good)
    assert load_artifact(folder) == plan()


def test_a_manifest_cannot_name_files_outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = "0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside"):
        load_artifact(folder)


def test_other_versions_and_other_folders_are_named(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = "superopt artifact 0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="superopt artifact 0"):
        load_artifact(folder)
    with pytest.raises(ArtifactError, match="no artifact"):
        load_artifact(tmp_path)


def test_nothing_is_overwritten_unasked(folder, tmp_path):
    with pytest.raises(ArtifactError, match="--force"):
        save_artifact(plan(), folder, {})
    save_artifact(plan(), folder, {"superopt": "2"}, overwrite=True)
    assert load_artifact(folder) == plan()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="no artifact"):
        save_artifact(plan(), other, {}, overwrite=True)
    assert (other / "precious.txt").exists()
