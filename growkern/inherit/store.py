"""Store a teacher's logits: a few columns and weights per position, shard by shard, so that a killed store goes on where it stopped."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growkern.errors import CheckpointError, PlanError, UnsupportedModelError
from growkern.inherit.head import is_encoder_decoder
from growkern.inherit.linear_loss import check_numbers
from growkern.inherit.stored import (
    INDEX,
    NARROW,
    SHARD,
    Header,
    Shard,
    Stored,
    opened,
    tokenizer_hash,
)
from growkern.inherit.teachers import Live
from growkern.support.argument_types import typed_arguments
from growkern.support.names import canonical
from growkern.support.text import one_line
from growkern.support.wrappers import unwrapped

SAMPLES = 64  # draws per position by default
ROWS = 1 << 15  # positions per shard: what a kill loses at most
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes per number
CHUNK = 512  # positions whose logits exist at a time


@dataclass
class _Writer:
    """Rows that wait to be written, and the shards so far."""

    folder: Path
    header: Header
    shards: list[Shard]
    held: list[tuple[float, int]]  # sum of the held mass, and positions, of each shard
    waiting: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])

    @property
    def n_rows(self) -> int:
        return sum(s.n_rows for s in self.shards) + sum(len(rows["token"]) for rows in self.waiting)

    def add(self, rows: dict[str, Tensor], limit: int) -> None:
        self.waiting.append(rows)
        if sum(len(held["token"]) for held in self.waiting) >= limit:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as a shard: under another name first, so that a shard is whole or absent."""
        if not self.waiting:
            return
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

        tensors = {
            name: torch.cat([rows[name] for rows in self.waiting]) for name in self.waiting[0]
        }
        first = sum(s.n_rows for s in self.shards)
        n_rows, path = len(tensors["token"]), self.folder / SHARD.format(len(self.shards))
        mass = tensors["mass"].sum().item() if "mass" in tensors else float(n_rows)
        said = {"header": asdict(self.header), "first": first, "held": mass}
        part = path.with_suffix(".part")
        save_file(tensors, str(part), metadata={"growkern": json.dumps(said)})
        _synced(part)
        os.replace(part, path)
        self.shards.append(Shard(path.name, first, n_rows))
        self.held.append((mass, n_rows))
        self.waiting.clear()

    def close(self) -> None:
        """Write the index, which makes the store complete."""
        self.flush()
        said = {
            "header": asdict(self.header),
            "shards": [asdict(shard) for shard in self.shards],
            "held_mass": sum(mass for mass, _ in self.held) / max(1, self.n_rows),
        }
        part = self.folder / f"{INDEX}.part"
        part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        _synced(part)
        os.replace(part, self.folder / INDEX)


@typed_arguments(PlanError)
def store(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    top_k: int | None = None,
    sampled: int | None = None,
    tau: float = 2.0,
    tokenizer: object | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Stored:
    """Run a teacher over a corpus once, and store a few probabilities per position.

    The batches come in the order of the corpus: ``input_ids`` (batch, length), every sequence of the same length, and whatever else the
    model's forward takes. Row i of the store is the teacher's output at position i: the first sequence has the positions 0 to length - 1.
    A store that was killed goes on where it stopped, when it is called again with the same arguments; the stored part is compared with the
    batches, and the teacher does not run on it. An error or Ctrl-C loses nothing that the teacher has said, and a kill one shard at most.
    For a masked language model the inputs hold the masks, and training needs the same masks.

    Args:
        teacher: The teacher; it is put into eval mode.
        batches: Batches of the whole corpus.
        path: Folder of the store; it is made.
        top_k: Store the ``top_k`` largest probabilities, and the mass that they hold.
        sampled: Store this many draws; the expected gradient is that of the whole distribution. Default: 64.
        tau: Temperature of the teacher, which must be that of the training.
        tokenizer: Tokenizer of the corpus; its hash is stored and compared when the logits are used.
        seed: Seed of the draws; equal seeds and equal batches give equal bits.
        name: Name of the teacher in the store; default: its class.

    Returns:
        The store; ``print`` shows what it holds.

    Raises:
        PlanError: An argument is out of range, a batch has no or other ``input_ids``, or the corpus is not that of the stored part.
        CheckpointError: The folder holds logits of other arguments or of a teacher with other weights, or is damaged.
        UnsupportedModelError: The teacher is an encoder-decoder.

    Example:
        >>> ids = torch.randint(0, teacher.config.vocab_size, (4, 16))
        >>> stored = growkern.inherit.store(teacher, [{"input_ids": ids}], "logits", sampled=8)
        >>> stored.n_rows
        64
    """
    check_numbers(0.0, tau)
    k = _n_weights(top_k, sampled)
    if is_encoder_decoder(unwrapped(teacher)):
        raise UnsupportedModelError(
            f"the logits of a {type(unwrapped(teacher)).__name__} depend on the labels too, which a store does not hold; pass the model to "
            "KnowledgeInheritance, where it runs live."
        )
    known = "" if tokenizer is None else tokenizer_hash(tokenizer)
    teacher_name = name or type(unwrapped(teacher)).__name__
    live = Live(teacher, top_k, None if top_k is not None else k, float(tau), None)
    kind = "sampled" if top_k is None else "top"
    folder, writer, done = Path(path), None, 0
    try:
        for batch in batches:
            ids = _ids(batch)
            if writer is None:
                width, length = _width(live), ids.shape[1]
                header = Header(
                    kind,
                    k,
                    float(tau),
                    width,
                    length,
                    seed,
                    teacher_name,
                    known,
                    weights_hash(teacher),
                )
                writer = _begun(folder, header)
            done = _advance(writer, live, batch, ids, done)
    except BaseException:
        if writer is not None:
            writer.flush()  # what the teacher has said so far
        raise
    finally:
        if live.head is not None:
            live.head.remove()
    if writer is None:
        raise PlanError("batches: there is none; pass the batches of the corpus.")
    if done < writer.n_rows:
        raise PlanError(
            f"the batches have {done} positions, and {folder} holds {writer.n_rows} already: it is of another corpus. Pass another path."
        )
    writer.close()
    return Stored(folder)


def _advance(writer: _Writer, live: Live, batch: Mapping[str, Any], ids: Tensor, done: int) -> int:
    """Store what is missing of a batch, compare the rest, and return the number of positions so far."""
    length = writer.header.length
    if ids.shape[1] != length:
        raise PlanError(
            f"a sequence of {ids.shape[1]} tokens follows sequences of {length}; cut the corpus into sequences of one length."
        )
    said = batch.get("teacher_at")
    at = torch.arange(len(ids)) * length + done
    if isinstance(said, Tensor) and said.flatten().tolist() != at.tolist():
        raise PlanError(
            f"teacher_at: the batch at position {done} says {said.flatten().tolist()[:3]}; store takes batches in the order of the corpus."
        )
    n_old = min(len(ids), max(0, writer.n_rows - done) // length)
    if n_old:
        _compare(writer, ids[:n_old], done)
    if n_old < len(ids):
        rest = {k: v[n_old:] if isinstance(v, Tensor) and v.dim() and len(v) == len(ids) else v for k, v in batch.items()}  # fmt: skip
        rest["labels"] = ids[n_old:]
        writer.add(_rows(writer.header, live, rest, ids[n_old:], done + n_old * length), ROWS)
    return done + ids.numel()


def _rows(
    header: Header, live: Live, batch: Mapping[str, Any], ids: Tensor, first: int
) -> dict[str, Tensor]:
    """Run the teacher on a batch; return what is stored of it."""
    narrow = torch.uint16 if header.vocab <= NARROW else torch.int32
    keep = torch.arange(ids.numel())
    targets = live(batch, keep, header.vocab, ((header.seed << 40) + first) % (1 << 63))
    pairs = [targets(slice(i, i + CHUNK)) for i in range(0, len(keep), CHUNK)]
    index = torch.cat([index for index, _ in pairs if index is not None])
    weight = torch.cat([weight for _, weight in pairs]).float()
    mass = weight.sum(1)
    rows = {"index": index.to(narrow), "prob": (weight / mass[:, None]).half()}
    rows |= {"mass": mass} if header.kind == "top" else {}
    return rows | {"token": ids.flatten().cpu().to(narrow)}


def _compare(writer: _Writer, ids: Tensor, first: int) -> None:
    """Compare tokens with those of the stored part; raise PlanError where they differ."""
    shards = [
        s for s in writer.shards if s.first < first + ids.numel() and first < s.first + s.n_rows
    ]
    tokens = torch.cat([opened(writer.folder / s.file).get_tensor("token") for s in shards]).long()
    a = first - shards[0].first
    if not torch.equal(tokens[a : a + ids.numel()], ids.flatten().cpu()):
        raise PlanError(
            f"the tokens at position {first} are not those that {writer.folder} holds: it is of another corpus. Pass another path."
        )


def _begun(folder: Path, header: Header) -> _Writer:
    """Make the folder, or read the shards that an earlier store has written."""
    writer = _Writer(folder, header, [], [])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {one_line(error)}; pass another path.") from None  # fmt: skip
    while (path := folder / SHARD.format(len(writer.shards))).exists():
        file = opened(path)
        try:
            said = json.loads(str(file.metadata()["growkern"]))
            found, held = Header(**said["header"]), float(said["held"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} is no shard of stored logits; pass another path.") from None  # fmt: skip
        if found != header:
            raise CheckpointError(
                f"{folder} holds logits of other arguments ({found.differences(header)}); pass another path, or the same arguments."
            )
        n_rows = file.get_slice("token").get_shape()[0]
        writer.shards.append(Shard(path.name, writer.n_rows, n_rows))
        writer.held.append((held, n_rows))
    return writer


def _ids(batch: Mapping[str, Any]) -> Tensor:
    ids: Any = batch.get("input_ids") if isinstance(batch, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise PlanError("a batch for store has input_ids of shape (batch, length); this one has none.")  # fmt: skip
    return ids


def _n_weights(top_k: int | None, sampled: int | None) -> int:
    """Return the number of weights per position."""
    if top_k is not None and sampled is not None:
        raise PlanError("top_k and sampled exclude each other; pass one of them.")
    k = top_k if top_k is not None else SAMPLES if sampled is None else sampled
    if k < 1:
        name = "sampled" if top_k is None else "top_k"
        raise PlanError(f"{name}: {k} is no number of weights; pass 1 or more.")
    return k


def _width(live: Live) -> int:
    """Return the number of columns of the teacher's logits; raise PlanError if it is not known before a forward."""
    if live.width is None:
        raise PlanError(
            f"the teacher, a {type(live.model).__name__}, names no linear output head, so its vocabulary is not known before it runs; "
            "define get_output_embeddings()."
        )
    return live.width


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the sums of the bits of a model's parameters and buffers; of offloaded or packed ones, the names alone."""
    found = sha256()
    for name, tensor in unwrapped(model).state_dict().items():
        found.update(canonical(name).encode())
        if type(tensor) is Tensor and tensor.numel() and not tensor.is_meta:
            flat = tensor.contiguous().reshape(-1)
            total = flat.view(BITS.get(flat.element_size(), torch.int64)).sum(dtype=torch.int64)
            found.update(f" {tensor.dtype} {tuple(tensor.shape)} {int(total)}\n".encode())
    return found.hexdigest()


def _synced(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
