"""The output folder of a growth: written beside its place and moved there when complete, without a loss of other files."""

import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from platform import node
from uuid import uuid4

from growkern.checkpoints.shards import CONFIG, INDEX, SINGLE
from growkern.errors import CheckpointError
from growkern.support.interrupts import uninterrupted

HOST = sha256(node().encode()).hexdigest()[:8]  # a lock counts on one machine only
WEIGHTS = (  # endings of weights, pickles and training state, which do not belong to the target
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".hdf5", ".msgpack", ".onnx", ".gguf", ".ggml", ".ot", ".npy",
    ".npz", ".joblib", ".distcp", ".tflite", ".nemo", ".zip", ".index.json", "trainer_state.json",
)  # fmt: skip
# first bytes of pickles, torch's and numpy's archives, HDF5, GGUF and numpy files
MAGIC = (*(b"\x80%c" % n for n in range(2, 6)), b"PK\x03\x04", b"\x89HDF", b"GGUF", b"\x93NUMPY")
METADATA = ".metadata"  # of torch.distributed.checkpoint
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|__\d+_\d+\.distcp")
FILES = {  # files of a checkpoint that save_pretrained or torch.distributed.checkpoint writes
    METADATA, CONFIG, SINGLE, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "README.md",
    "growkern_recipe.yaml",
}  # fmt: skip


def refuse_out(
    folder: Path, out: Path, overwrite: bool, copied: Collection[str] | None = None
) -> None:
    """Raise CheckpointError if a growth of ``folder`` cannot write ``out``, or would delete files there that are of no checkpoint.

    Args:
        folder: Folder of the source.
        out: Folder of the target.
        overwrite: True to replace a checkpoint at ``out``.
        copied: Names of the source's files that the growth copies; None if they are not known yet.
    """
    source, target = folder.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(
            f"cannot write {out}: the folder is, is inside, or contains the source {folder}; name another folder."
        )
    if not out.parent.is_dir():
        raise CheckpointError(
            f"cannot write {out}: the folder {out.parent} does not exist; make it first."
        )
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise CheckpointError(f"{out} exists; name another folder, or pass --overwrite.")
    if out.is_symlink() or not out.is_dir():
        raise CheckpointError(f"cannot overwrite {out}: {out} is no folder; name another path.")
    held = sorted(out.iterdir())
    if held and not any((out / name).is_file() for name in (CONFIG, METADATA)):
        raise CheckpointError(
            f"cannot overwrite {out}: the folder has no {CONFIG} and no {METADATA}, so it is no checkpoint; remove the folder yourself."
        )
    known = FILES.union(copied or ())
    more = [
        path.name
        for path in held
        if path.is_dir() or not (path.name in known or SHARD.fullmatch(path.name))
    ]
    if more and copied is not None:
        raise CheckpointError(
            f"cannot overwrite {out}: the folder holds more than a checkpoint ({', '.join(more[:5])}{', ...' * (len(more) > 5)}); move "
            "it elsewhere, or name another folder."
        )


def others(folder: Path, own: Collection[str]) -> tuple[list[str], list[str]]:
    """List the files of a checkpoint beside its config and weights.

    Args:
        folder: Folder of the checkpoint.
        own: Names of the config, the index and the shards.

    Returns:
        Names of the files that belong to the model (tokenizer, generation config, ...), and what is left out: folders, training state,
        pickles, other weights, and links that lead out of the folder.
    """
    copied: list[str] = []
    left: list[str] = []
    for path in sorted(p for p in folder.iterdir() if p.name not in own):
        if _leads_out(path):
            left.append(f"{path.name} (a link to {os.readlink(path)})")
        elif path.is_dir():
            left.append(f"{path.name}/")
        elif not path.is_file() or path.name.lower().endswith(WEIGHTS) or _is_binary(path):
            left.append(path.name)
        else:
            copied.append(path.name)
    return copied, left


def _leads_out(path: Path) -> bool:
    """True for a link to a file outside the folder. Links of the Hugging Face cache, ``snapshots/REV/FILE`` to ``blobs/HASH``, do not."""
    if not path.is_symlink():
        return False
    place, folder = path.resolve(), path.parent.resolve()
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    return folder not in place.parents and place.parent != cache


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8).startswith(MAGIC)


def modes(folder: Path, weights: Collection[str], copied: Collection[str]) -> dict[str, int]:
    """Return the file mode of each file of a target that has a counterpart in the source, and under ``""`` that of all others: the bits
    that all files of weights have.
    """
    shared = 0o666
    for name in weights:
        shared &= (folder / name).stat().st_mode
    own = {*copied, CONFIG} if (folder / CONFIG).is_file() else copied
    return {"": shared} | {name: (folder / name).stat().st_mode for name in own}


def restrict(folder: Path, allowed: Mapping[str, int]) -> None:
    """Take from the files of a folder the permissions that ``modes`` does not allow; the owner keeps reading and writing."""
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode & (allowed.get(path.name, allowed[""]) | 0o600) & 0o777)


@contextmanager
def aside(out: Path, overwrite: bool, mode: int) -> Generator[Path]:
    """Yield a temporary folder beside ``out``, which is renamed to ``out`` on success and removed on failure.

    The folder is locked while the process lives, so that ``sweep`` can tell folders of processes that were killed. Its owner alone can
    read it until it is complete.

    Args:
        out: The output folder.
        overwrite: True to replace a folder at ``out``.
        mode: Permissions of the folder, of which the umask takes its part.

    Raises:
        CheckpointError: ``out`` cannot be written.
    """
    place = out.resolve()  # out may be "."
    try:
        folder, lock = _make(place, mode)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Nothing was changed.") from error
    replaced = folder.with_suffix(".replaced")
    try:
        final = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(0o700)
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        folder.chmod(final)
        with uninterrupted():
            _move(folder, place, replaced, overwrite)
        _sync(place.parent)
    except BaseException as error:
        with uninterrupted():
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {out}: {error}. Nothing was changed.") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def sweep(out: Path) -> list[str]:
    """Remove the temporary folders that killed processes of this machine have left beside ``out``.

    Returns:
        A note on each folder that was removed, and on each one that may still be in use or may be needed.
    """
    out = out.resolve()
    left = re.compile(rf"\.{re.escape(out.name)}\.([0-9a-f]{{8}})?[0-9a-f]{{8}}\.(part|replaced)")
    notes: list[str] = []
    for path in sorted(out.parent.iterdir()):
        if not (match := left.fullmatch(path.name)) or path.is_symlink() or not path.is_dir():
            continue
        if match[2] == "replaced":
            notes.append(
                f"{path} is what a growth that was killed was replacing; rename or remove the folder."
            )
            continue
        try:
            lock = _lock(path)
        except BlockingIOError:  # a process is writing the folder
            continue
        if lock is not None and match[1] == HOST:
            shutil.rmtree(path, ignore_errors=True)
        did = "could not be removed: remove it, unless a growth on another machine writes it"
        did = did if path.exists() else "was removed"
        notes.append(f"{path}, which a growth that was killed had left, {did}.")
        if lock is not None:
            os.close(lock)
    return notes


def _make(out: Path, mode: int) -> tuple[Path, int | None]:
    """Make and lock a temporary folder beside ``out``; return the folder and the lock."""
    while True:
        folder = out.with_name(f".{out.name}.{HOST}{uuid4().hex[:8]}.part")
        folder.mkdir(mode=stat.S_IMODE(mode) | 0o700)
        try:
            lock = _lock(folder)
        except BlockingIOError:  # a sweep came between
            continue
        if folder.exists():
            return folder, lock


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends.

    Returns:
        The descriptor; None where a folder cannot be locked (Windows, some network file systems).

    Raises:
        BlockingIOError: A process holds the lock.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None


def _move(folder: Path, out: Path, replaced: Path, overwrite: bool) -> None:
    """Rename ``folder`` to ``out``, after renaming what is there to ``replaced``; undo all of it on failure."""
    try:
        if overwrite and out.exists():
            out.rename(replaced)
        folder.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
