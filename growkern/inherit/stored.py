"""Stored logits of a teacher: safetensors shards with columns and weights per position of the corpus, read memory-mapped."""

import json
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from growkern.errors import CheckpointError, PlanError
from growkern.inherit.targets import Pair, Targets, refuse_length
from growkern.support.argument_types import typed_arguments, wrong_fields
from growkern.support.text import one_line, table

INDEX, SHARD = "index.json", "teacher-{:05d}.safetensors"
NARROW = 1 << 16  # columns below it are stored in 16 bits
MOST_OPEN = 256  # shards; a process may have 1024 open files
PEAKED = 0.9  # held mass below which renormalized weights teach another distribution


@dataclass(frozen=True)
class Header:
    """What stored logits are of; every shard holds it.

    Attributes:
        kind: ``"top"``: the largest probabilities, or ``"sampled"``: drawn columns with their share of the draws.
        k: Weights per position.
        tau: Temperature of the teacher.
        vocab: Columns of the teacher's logits.
        length: Tokens per sequence; the teacher saw a position's own sequence only.
        seed: Seed of the draws.
        teacher: Name of the teacher.
        tokenizer: Hash of the tokenizer (``tokenizer_hash``); "" if it was not given.
        weights: Hash of the teacher's weights; "" in stores of older versions.
        version: Version of the format.
    """

    kind: str
    k: int
    tau: float
    vocab: int
    length: int
    seed: int
    teacher: str
    tokenizer: str
    weights: str = ""
    version: int = 1

    def differences(self, other: "Header") -> str:
        """Return the fields in which another header differs, as text."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(f"{k}: {mine[k]!r} and {theirs[k]!r}" for k in mine if mine[k] != theirs[k])  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A file of stored logits: positions ``first`` to ``first + n_rows`` of the corpus."""

    file: str
    first: int
    n_rows: int


class Stored:
    """Stored logits of a teacher, read from a folder that ``store`` has written. ``print`` shows what they are of.

    Row i belongs to position i of the tokenized corpus. A batch names the position of the first token of each of its sequences in
    ``teacher_at`` (int64, (batch,)), so that shuffling and resuming need no log. Batches without ``teacher_at`` are refused.

    Attributes:
        folder: The folder.
        header: What the logits are of.
        n_rows: Number of positions.
        n_bytes: Bytes of the shards.
        held_mass: Mean over the positions of the probability that the stored columns hold, before sampling or renormalizing.

    Args:
        folder: Folder of the stored logits.
        renormalize: True to divide the weights of a position by their sum, as the paper does.

    Raises:
        CheckpointError: The folder holds no complete store.
        PlanError: An argument has another type.

    Example:
        >>> stored = growkern.inherit.store(teacher, [{"input_ids": batch["input_ids"]}], "logits", top_k=8)
        >>> print(growkern.inherit.Stored("logits"))
        stored logits  logits
        -------------  --------------------------
        teacher        LlamaForCausalLM
        weights        top, 8 per position, tau 2
        vocabulary     66
        positions      32 in sequences of 16
        bytes          1,808 (56 per position)
        held mass      0.178
        The top 8 hold 18% of the teacher's probability at tau 2: too little to renormalize, and the gradient is biased. ...
    """

    width: int

    @typed_arguments(PlanError)
    def __init__(self, folder: str | Path, *, renormalize: bool = False) -> None:
        self.folder, self.renormalize = Path(folder), renormalize
        data = _read_index(self.folder)
        try:
            self.header = Header(**data["header"])
            self.shards = [Shard(**shard) for shard in data["shards"]]
            self.held_mass = float(data["held_mass"])
            problems = [
                *wrong_fields(self.header),
                *(p for s in self.shards for p in wrong_fields(s)),
            ]
        except (KeyError, TypeError, ValueError) as error:
            problems = [f"{type(error).__name__}: {one_line(error)}"]
        if problems:
            raise CheckpointError(
                f"{self.folder / INDEX} is damaged ({problems[0]}); run the same store again, which rewrites the index."
            )
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        self.width = self.header.vocab
        self.n_bytes = sum(_size(self.folder / shard.file) for shard in self.shards)
        self._opened: dict[str, Any] = {}

    def __call__(self, batch: Mapping[str, Any], keep: Tensor, width: int, seed: int) -> Targets:
        """Read the rows of a batch, and give the probability of columns from ``width`` on to the others."""
        ids, starts = batch.get("input_ids"), batch.get("teacher_at")
        if not (isinstance(ids, Tensor) and isinstance(starts, Tensor)):
            raise PlanError(
                "a batch for stored logits has the keys input_ids and teacher_at (int64, position of the first token of each sequence in "
                f"the corpus); this one has {', '.join(map(str, batch))}. Let the dataset return teacher_at, or pass a live teacher."
            )
        refuse_length(ids.shape, batch["labels"].shape)
        index, weight = self.read(starts, ids)
        index = index.reshape(-1, index.shape[-1])[keep.cpu()]
        weight = weight.reshape(-1, weight.shape[-1])[keep.cpu()]
        outside = index >= width  # padding of the teacher's vocabulary
        padded = weight.masked_fill(~outside, 0.0).sum(1, keepdim=True)
        weight, index = weight.masked_fill_(outside, 0.0), index.masked_fill_(outside, 0)
        tokens = torch.maximum(
            1 - padded, weight.sum(1, keepdim=True)
        )  # the rest, whatever rounding did
        weight = weight / tokens.clamp_min_(torch.finfo(torch.float32).tiny)
        index, weight = index.to(keep.device), weight.to(keep.device)

        def targets(rows: slice) -> Pair:
            return index[rows], weight[rows]

        return targets

    def read(self, starts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read columns (int64) and weights (float32) of sequences, both (batch, length, K).

        Args:
            starts: Position of the first token of each sequence (batch,).
            ids: Tokens of the sequences (batch, length), which are compared with the tokens that the teacher saw.

        Raises:
            PlanError: The sequences are cut otherwise, lie outside the corpus, or have other tokens.
        """
        length = self.header.length
        at = [int(start) for start in starts.flatten().cpu()]
        if ids.dim() != 2 or len(at) != len(ids) or ids.shape[1] != length:
            raise PlanError(
                f"teacher_at {tuple(starts.shape)} and input_ids {tuple(ids.shape)} do not fit logits stored for sequences of {length} "
                f"tokens. Cut the corpus into sequences of {length}, or store again with these."
            )
        wrong = [start for start in at if start % length or not 0 <= start <= self.n_rows - length]
        if wrong:
            raise PlanError(
                f"teacher_at: {wrong[0]} is not the start of a sequence: {self.folder} has {self.n_rows} positions in sequences of "
                f"{length} tokens. The batches are of another corpus, or cut otherwise; store logits of this one."
            )
        parts = [self._sequence(start) for start in at]
        seen = torch.stack([part["token"] for part in parts])
        differ = (seen != ids.cpu()).nonzero()
        if len(differ):
            row, column = (int(i) for i in differ[0])
            raise PlanError(
                f"the tokens of this batch are not those that the teacher saw: position {at[row] + column} of {self.folder} is token "
                f"{int(seen[row, column])}, and the batch has {int(ids[row, column])}. Logits belong to one tokenizer, one corpus and, "
                "for masked language models, one draw of the masks; store logits of these tokens, or run the teacher live."
            )
        return torch.stack([part["index"] for part in parts]), torch.stack([part["prob"] for part in parts])  # fmt: skip

    def _sequence(self, start: int) -> dict[str, Tensor]:
        shard = self.shards[bisect_right(self.shards, start, key=lambda s: s.first) - 1]
        if shard.file not in self._opened:
            if len(self._opened) == MOST_OPEN:
                self._opened.pop(next(iter(self._opened)))
            self._opened[shard.file] = opened(self.folder / shard.file)
        file, a = self._opened[shard.file], start - shard.first
        rows = {name: file.get_slice(name)[a : a + self.header.length] for name in file.keys()}  # noqa: SIM118
        prob, mass = rows["prob"].float(), rows.get("mass")
        total = prob.sum(1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        prob = prob / total  # float16 has rounded the weights
        prob = prob if mass is None or self.renormalize else prob * mass[:, None]
        return {"index": rows["index"].long(), "prob": prob, "token": rows["token"].long()}

    def __str__(self) -> str:
        h = self.header
        rows = [
            ["teacher", h.teacher],
            ["weights", f"{h.kind}, {h.k} per position, tau {h.tau:g}"],
            ["vocabulary", f"{h.vocab:,}"],
            ["positions", f"{self.n_rows:,} in sequences of {h.length:,}"],
            ["bytes", f"{self.n_bytes:,} ({self.n_bytes / max(self.n_rows, 1):.0f} per position)"],
            ["held mass", f"{self.held_mass:.3f}"],
        ]
        return table(["stored logits", str(self.folder)], rows) + "".join(f"\n{a}" for a in self.advice)  # fmt: skip

    @property
    def advice(self) -> tuple[str, ...]:
        """What the held mass says about these logits."""
        if self.header.kind == "sampled" or self.held_mass >= PEAKED:
            return ()
        return (
            f"The top {self.header.k} hold {self.held_mass:.0%} of the teacher's probability at tau {self.header.tau:g}: too little to "
            "renormalize, and the gradient is biased. Store with sampled=64, a larger top_k, or a lower tau.",
        )


def agreed_tau(stored: Stored, tau: float | None, tokenizer: object | None) -> float:
    """Return the temperature of stored logits, which that of the loss must equal; compare tokenizers."""
    header = stored.header
    if tau is not None and tau != header.tau:
        raise PlanError(
            f"tau: {tau:g} is not the temperature of the stored logits, {header.tau:g}; leave tau out, or store again with tau={tau:g}."
        )
    if tokenizer is not None and header.tokenizer not in ("", tokenizer_hash(tokenizer)):
        raise PlanError(
            f"{stored.folder} holds logits for another tokenizer; store logits of a teacher of this tokenizer."
        )
    if stored.renormalize and stored.advice:
        warn(stored.advice[0], stacklevel=4)
    return header.tau


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary; raise PlanError if it has no ``get_vocab``."""
    get: Any = getattr(tokenizer, "get_vocab", None)
    if get is None:
        raise PlanError(
            f"tokenizer: a {type(tokenizer).__name__} has no get_vocab(); pass a tokenizer of transformers."
        )
    return sha256(json.dumps(sorted(get().items())).encode()).hexdigest()


def opened(path: Path) -> Any:
    """Open a shard, memory-mapped; raise CheckpointError if it is missing or damaged."""
    import safetensors

    open_file: Any = safetensors.safe_open
    try:
        return open_file(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path}: {one_line(error)}. Remove the file and run the same store again, which makes what is missing."
        ) from None


def _read_index(folder: Path) -> Any:
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = any(folder.glob(SHARD.format(0)))
        raise CheckpointError(
            f"{folder} has no {INDEX}, so it holds no complete stored logits"
            + (": store was interrupted. Run the same store again, which goes on where it stopped." if begun else
               ". Pass a folder that growkern.inherit.store has written.")
        ) from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {folder / INDEX}: {one_line(error)}; run the same store again, which rewrites the index."
        ) from None


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        raise CheckpointError(
            f"{path} is missing; run the same store again, which makes what is missing."
        ) from None
