"""The output of a growth deletes, publishes and follows nothing that is not its own, and leaves nothing behind."""

import os
import pickle
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saved import INDEX, MADE, contents, invoke, said, save

from growkern.checkpoints import grow as checkpoint
from growkern.checkpoints import output
from growkern.errors import CheckpointError

WEIGHTS = "model.safetensors"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, modes and locks of POSIX")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(tmp_path / "source", shard="1GB")
    return tmp_path / "source"


def write(path: Path, data: str | bytes = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


MORE = ["checkpoint-500/optimizer.pt", "notes.txt", "training_args.bin", ".git/HEAD", "optimizer.pt", "runs/events"]  # fmt: skip
MORE += [
    "adapter_model.safetensors",
    "model-1.safetensors",
    "config.json.bak",
    "tokenizer/vocab.json",
]


@pytest.mark.parametrize("name", MORE)
def test_a_folder_that_holds_more_than_a_checkpoint_is_not_overwritten(name, source, tmp_path):
    shutil.copytree(source, tmp_path / "out")
    write(tmp_path / "out" / name)
    before = contents(tmp_path)

    result = invoke("grow", source, tmp_path / "out", "--overwrite")

    shown = name.split("/")[0]
    assert result.exit_code == 1 and f"holds more than a checkpoint ({shown}); move it" in said(
        result
    )
    assert contents(tmp_path) == before


def test_what_comes_into_the_folder_during_a_growth_is_not_deleted(source, tmp_path):
    shutil.copytree(source, out := tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"holds more than a checkpoint \(notes.txt\)"):
        checkpoint.grow(
            source, out, overwrite=True, on_progress=lambda *_: write(out / "notes.txt")
        )

    assert contents(out) == contents(source) | {"notes.txt": b"precious"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_folder_that_comes_to_be_during_a_growth_is_not_replaced(source, tmp_path):
    with pytest.raises(CheckpointError, match="exists; name another folder"):
        checkpoint.grow(source, tmp_path / "out", on_progress=lambda *_: (tmp_path / "out").mkdir(exist_ok=True))  # fmt: skip

    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_checkpoint_with_its_tokenizer_is_overwritten(source, tmp_path):
    out = tmp_path / "out"
    write(source / "LICENSE")
    assert invoke("grow", source, out, "--max-shard-size", "50KB").exit_code == 0
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja"):
        write(out / name)

    assert invoke("grow", source, out, "--overwrite").exit_code == 0

    names = {"config.json", "generation_config.json", WEIGHTS, "LICENSE"}
    assert {path.name for path in out.iterdir()} == names | MADE


def test_the_folder_of_the_shell_is_overwritten(source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    result = invoke("grow", source, ".", "--overwrite")

    assert result.exit_code == 0 and (tmp_path / "out" / WEIGHTS).exists(), result.output
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_links_that_leave_the_checkpoint_are_not_followed(source, tmp_path):
    (tmp_path / "models").mkdir()
    source = source.rename(tmp_path / "models" / "source")
    write(tmp_path / "id_rsa", "SECRET")
    write(source / "vocab.json", "{}")
    write(tmp_path / "blobs" / "key", "SECRET")
    (source / "tokenizer.json").symlink_to(tmp_path / "id_rsa")
    (source / "merges.txt").symlink_to("../../id_rsa")
    (source / "chain").symlink_to("tokenizer.json")
    (source / "notes").symlink_to("../../blobs/key")
    (source / "same.json").symlink_to("vocab.json")
    (source / "gone.json").symlink_to("nowhere")

    result = invoke("grow", source, tmp_path / "out")

    assert result.exit_code == 0
    assert not any(b"SECRET" in data for data in contents(tmp_path / "out").values())
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert (
        out == {"config.json", "generation_config.json", WEIGHTS, "vocab.json", "same.json"} | MADE
    )
    assert not (tmp_path / "out" / "same.json").is_symlink()
    assert "merges.txt (a link to ../../id_rsa)" in said(result)


def test_blobs_of_a_cache_that_are_links_themselves_are_not_followed(source, tmp_path):
    write(tmp_path / "id_rsa", "SECRET")
    (snapshot := tmp_path / "cache" / "snapshots" / "1a").parent.mkdir(parents=True)
    (blobs := tmp_path / "cache" / "blobs").mkdir()
    source.rename(snapshot)
    (blobs / "0").symlink_to(tmp_path / "id_rsa")
    write(blobs / "1", "{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    (snapshot / "vocab.json").symlink_to("../../blobs/1")

    assert invoke("grow", snapshot, tmp_path / "out").exit_code == 0

    assert (tmp_path / "out" / "vocab.json").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_weights_may_be_links_to_another_disk(source, tmp_path):
    (source / WEIGHTS).rename(tmp_path / "weights")
    (source / WEIGHTS).symlink_to(tmp_path / "weights")

    assert invoke("grow", source, tmp_path / "out").exit_code == 0

    assert not (tmp_path / "out" / WEIGHTS).is_symlink()


FOREIGN = ["payload.pkl", "model.ckpt", "model.CKPT", "optimizer.pt", "scheduler.pt"]
FOREIGN += ["rng_state.pth", "pytorch_model.bin", "tf_model.h5", "training_args.bin"]
FOREIGN += ["flax_model.msgpack", "model.onnx", "adapter_model.safetensors", "trainer_state.json"]
FOREIGN += ["a.npz", "model.gguf", "x.joblib"]
FOREIGN += ["pytorch_model.bin.index.json", "model.fp16.safetensors", INDEX]


def test_pickles_and_foreign_weights_are_not_carried_along(source, tmp_path):
    for name in FOREIGN:
        write(source / name)
    write(source / "data", pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(2)}, source / "weights.dat")
    torch.save({"a": torch.ones(2)}, source / "old", _use_new_zipfile_serialization=False)
    save_file({"a": torch.ones(2)}, source / "other.safetensors")
    write(source / "tokenizer.model", b"\n\x0e\n\x05<unk>")

    result = invoke("grow", source, tmp_path / "out")

    assert result.exit_code == 0
    kept = {"config.json", "generation_config.json", WEIGHTS, "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | MADE
    named = re.search(r"not copied: (.*?)\. /", said(result))[1].split(", ")
    assert {*named} == {*FOREIGN, "data", "weights.dat", "old", "other.safetensors"}


def modes(folder: Path) -> dict[str, int]:
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    return files | {"": stat.S_IMODE(folder.stat().st_mode)}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "private", "others", "folder", "expected"),
    [
        (0o022, 0o600, 0o644, 0o755, (0o600, 0o644, 0o755)),
        (0o022, 0o644, 0o644, 0o700, (0o644, 0o644, 0o700)),
        (0o027, 0o666, 0o640, 0o777, (0o640, 0o640, 0o750)),
        (0o022, 0o400, 0o444, 0o500, (0o600, 0o644, 0o700)),
        (0o077, 0o644, 0o644, 0o755, (0o600, 0o600, 0o700)),
    ],
    ids=["weights", "folder", "umask", "read-only", "private umask"],
)
def test_the_target_is_as_private_as_the_source(
    mask, private, others, folder, expected, umask, tmp_path
):
    save(tmp_path / "source")
    write(tmp_path / "source" / "tokenizer.json")
    for path in (tmp_path / "source").iterdir():
        path.chmod(private if path.name.startswith("model") else others)
    (tmp_path / "source").chmod(folder)
    umask(mask)
    seen = []

    def look(*_):
        (part,) = tmp_path.glob(".out.*.part")
        seen.append(modes(part)[""])

    try:
        checkpoint.grow(tmp_path / "source", tmp_path / "out", max_shard_size="50KB", on_progress=look)  # fmt: skip
    finally:
        (tmp_path / "source").chmod(0o700)

    found = modes(tmp_path / "out")
    weights, rest, top = expected
    assert found.pop("") == top and {*seen} == {0o700}
    private = {name for name in found if name.startswith("model")} | MADE
    assert {found[name] for name in private} == {weights}
    assert {mode for name, mode in found.items() if name not in private} == {rest}
    assert INDEX in found and "tokenizer.json" in found


def test_one_private_shard_makes_all_private(umask, tmp_path):
    save(tmp_path / "source")
    sorted((tmp_path / "source").glob("*.safetensors"))[1].chmod(0o600)

    checkpoint.grow(tmp_path / "source", tmp_path / "out")

    assert modes(tmp_path / "out")[WEIGHTS] == 0o600


def left_behind(folder: Path, name: str) -> Path:
    write(folder / name / WEIGHTS)
    return folder / name


def test_what_a_killed_growth_left_is_removed_and_said(source, tmp_path):
    left = left_behind(tmp_path, f".out.{output.HOST}01234567.part")

    result = invoke("grow", source, tmp_path / "out")

    assert not left.exists()
    assert f"{left.name}, which a growth that was killed had left, was removed" in said(result).replace("part ,", "part,")  # fmt: skip


USEFUL = {
    "old": ".out.deadbeef.part",
    "other machine": ".out.0000000001234567.part",
    "replaced": f".out.{output.HOST}01234567.replaced",
}


@pytest.mark.parametrize("name", USEFUL.values(), ids=USEFUL)
def test_what_may_be_of_use_is_named_and_kept(name, source, tmp_path):
    left = left_behind(tmp_path, name)

    result = invoke("grow", source, tmp_path / "out")

    assert result.exit_code == 0 and name in said(result).replace(" ", "")
    assert contents(left) == {WEIGHTS: b"precious"}


def test_nothing_else_is_removed_or_named(source, tmp_path):
    tag = f"{output.HOST}01234567"
    names = [f".other.{tag}.part", ".out.part", f".out.{tag[:-1]}.part", f".out.{tag}.part.d"]
    kept = [left_behind(tmp_path, name) for name in names]
    (tmp_path / f".out.{output.HOST}89abcdef.part").symlink_to(kept[0])
    write(tmp_path / f".out.{output.HOST}76543210.part")

    result = invoke("grow", source, tmp_path / "out")

    assert result.exit_code == 0 and ".part" not in said(result)
    assert all(contents(path) == {WEIGHTS: b"precious"} for path in kept)
    assert len([*tmp_path.iterdir()]) == len(names) + 4


def test_the_folder_of_a_growth_that_is_alive_is_kept(source, tmp_path):
    swept = []

    def other(*_):
        swept.extend(output.sweep(tmp_path / "out"))

    checkpoint.grow(source, tmp_path / "out", on_progress=other)

    assert swept == [] and (tmp_path / "out" / WEIGHTS).exists()


def test_a_sweep_between_the_making_and_the_locking_of_a_folder_is_survived(
    source, tmp_path, monkeypatch
):
    lock, calls = output._lock, []

    def swept_first(folder):
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(output, "_lock", swept_first)
    checkpoint.grow(source, tmp_path / "out")

    assert len({*calls}) == 2 and {p.name for p in tmp_path.iterdir()} == {"source", "out"}


def test_a_folder_that_cannot_be_locked_is_named(source, tmp_path, monkeypatch):
    """Some network file systems lock no folders: there, no process can tell whether another one is alive."""
    import fcntl

    left = left_behind(tmp_path, f".out.{output.HOST}01234567.part")

    def refuse(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    grown = checkpoint.grow(source, tmp_path / "out")

    assert left.exists() and left.name in str(grown)


def test_an_interrupt_between_the_two_renames_gives_back_what_was_there(
    source, tmp_path, monkeypatch
):
    shutil.copytree(source, tmp_path / "out")
    before, rename = contents(tmp_path), Path.rename

    def interrupted(path, to):
        result = rename(path, to)
        if str(to).endswith(".replaced"):
            raise SystemExit(143)
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit):
        checkpoint.grow(source, tmp_path / "out", overwrite=True)

    assert contents(tmp_path) == before


def test_files_and_folder_are_on_disk_before_the_target_has_its_name_and_the_name_after_it(
    source, tmp_path, monkeypatch
):
    """A machine that loses power leaves the whole target or none."""
    out, fsync, named = tmp_path / "out", os.fsync, {}

    def noted(descriptor):
        named[os.fstat(descriptor).st_ino] = out.exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.grow(source, out)

    written = [path.stat().st_ino for path in (out, *out.iterdir())]
    assert named == dict.fromkeys(written, False) | {tmp_path.stat().st_ino: True}


def test_a_target_that_is_complete_is_not_locked(source, tmp_path):
    checkpoint.grow(source, tmp_path / "out")

    os.close(output._lock(tmp_path / "out"))
