"""Vocabulary methods: rows for new tokens. No method preserves the function: new tokens take probability from the old ones.

Pass a vocabulary method as width method (``width=vocab.MeanCov()`` with ``to={"vocab": n}``); it grows no other size. First
moments of new tokens start at 0, second moments at the mean second moment of the other tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal, cast

import torch
from torch import Tensor

from growkern.errors import PlanError, raise_all
from growkern.model.spec import ModelSpec
from growkern.planning.argument_checks import wrong_number, wrong_seed
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.method_spaces import refuse, spaces
from growkern.planning.vector import Vector

__all__ = ["CLPTransfer", "MeanCov", "Zero"]


def __dir__() -> list[str]:
    return __all__


LARGEST_SCALE = 1e6  # of the covariance of the old rows
CANCELS = 0.1  # smallest usable ratio of a sum of similarities to the sum of their absolute values
REASON = ("new tokens take probability from the old ones",)


@dataclass(frozen=True)
class Zero:
    """New rows are 0: every new token has logit 0.

    Preserves:
        Nothing: new tokens take probability from the old ones.

    Example:
        >>> growkern.plan(model, to={"vocab": 80}, width=vocab.Zero()).preserves
        'nothing'

    Reference:
        The simplest initialization that Hewitt compares: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales; raise PlanError when a size other than ``vocab`` grows."""
        return _width(self, spec, sizes, "zero")


@dataclass(frozen=True)
class MeanCov:
    """New rows are drawn around the mean of the old rows (Hewitt 2021; ``resize_token_embeddings`` of transformers).

    Rows are drawn from ``N(mean, scale * covariance)``, with mean and covariance of the rows of each tensor.

    Args:
        scale: Factor on the covariance.
        seed: Seed of the draws; equal seeds give equal rows.

    Preserves:
        Nothing: new tokens take probability from the old ones.

    Example:
        >>> growkern.plan(model, to={"vocab": 80}, width=vocab.MeanCov()).preserves
        'nothing'

    Reference:
        Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021:
        https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """

    scale: float = 1e-9
    seed: int = 0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales; raise PlanError when a size other than ``vocab`` grows, or for an invalid ``scale``."""
        wrong = *wrong_number("scale", self.scale, 0, LARGEST_SCALE), *wrong_seed(self.seed)
        raise_all(PlanError, f"cannot add tokens to {spec.family} by MeanCov:", [*wrong])
        return _width(self, spec, sizes, "from_method")

    def rows(self, source: Tensor, n: int) -> Tensor:
        """Draw ``n`` new rows for a tensor with the rows ``source``."""
        rows = source.to("cpu", torch.float64)
        mean, centered = rows.mean(0), rows - rows.mean(0)
        cov = centered.T @ centered * (self.scale / rows.shape[0])
        values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(cov))  # pyright: ignore[reportUnknownMemberType]
        root = vectors * values.clamp(min=0).sqrt()
        return (mean + _normal(n, rows.shape[1], self.seed) @ root.T).to(source)


@dataclass(frozen=True)
class CLPTransfer:
    """Change the tokenizer: shared tokens keep their rows, new tokens mix shared rows by similarity in a helper model's embedding.

    A new token ``t`` gets the row ``sum_o w_o e_o`` over the shared tokens ``o``, ``w = cos(h_t, h_o) / sum cos``. If the helper vector
    of ``t`` is 0, or its similarities cancel, the row is drawn from a normal with the mean and standard deviation of each dimension.

    Args:
        helper: Embedding of the target's tokens, ``[n_target, any]``, from a small model with the target's tokenizer.
        tokens: Source token of each target token; -1 for a new token.
        top_k: Number of shared tokens to mix, the most similar ones; None for all.
        seed: Seed of the draws.

    Preserves:
        Nothing: the target has another tokenizer.

    Example:
        >>> helper, tokens = torch.randn(80, 16), [*range(66), *[-1] * 14]
        >>> growkern.plan(model, to={"vocab": 80}, width=vocab.CLPTransfer(helper, tokens)).preserves
        'nothing'

    Reference:
        Ostendorff, Rehm, "Efficient Language Model Training through Cross-Lingual and Progressive Transfer Learning",
        arXiv:2301.09626.
    """

    helper: Tensor = field(repr=False, compare=False)
    tokens: Sequence[int] = field(repr=False)
    top_k: int | None = None
    seed: int = 0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Give index maps and stream scales; raise PlanError when ``helper``, ``tokens`` and ``sizes`` do not fit each other."""
        n_source, n_target = spec.sizes.get("vocab", 0), sizes.get("vocab", 0)
        if not isinstance(self.helper, Tensor) or not hasattr(self.tokens, "__len__"):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"CLPTransfer: helper is a {type(self.helper).__name__}, and tokens is a {type(self.tokens).__name__}; pass a tensor of "
                "embeddings, and a list with a source token, or -1, per target token."
            )
        raise_all(
            PlanError,
            f"cannot add tokens to {spec.family} by CLPTransfer:",
            [*wrong_seed(self.seed)],
        )
        if strange := [
            t for t in self.tokens if not hasattr(t, "__index__") or isinstance(t, bool)
        ]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                f"CLPTransfer: tokens has {strange[0]!r}, which is no token; pass ints, -1 for a new token."
            )
        if self.top_k is not None and type(self.top_k) is not int:
            raise PlanError(
                f"CLPTransfer: top_k={self.top_k!r} is not a number of tokens; pass an int, or None for all."
            )
        kept = [t for t in map(index, self.tokens) if t >= 0]
        checks = [
            (len(self.tokens) == n_target, f"tokens has {len(self.tokens)} entries, the target {n_target} tokens; pass one per token"),
            (len(self.helper) == n_target, f"helper has {len(self.helper)} rows, the target {n_target} tokens; pass a row per token"),
            (bool(self.helper.isfinite().all()), "helper has numbers that are not finite"),
            (self.helper.dim() == 2, f"helper has {self.helper.dim()} axes; pass a matrix, tokens x features"),
            (bool(kept), "tokens names no token of the source; use vocab.MeanCov() for new tokens alone"),
            (len(set(kept)) == len(kept), "tokens names a token of the source twice; pass -1 for its second use"),
            (max(kept, default=0) < n_source, f"tokens names {max(kept, default=0)}, the tokens of the source end at {n_source - 1}"),
            (self.top_k is None or self.top_k > 0, f"top_k={self.top_k!r} is not a number of tokens; pass an int, or None for all"),
        ]  # fmt: skip
        if problems := [problem for holds, problem in checks if not holds]:
            raise PlanError(f"CLPTransfer: {'; '.join(problems)}.")
        index_map = IndexMap.of((t if t >= 0 else PAD for t in map(index, self.tokens)), n_source)
        return _width(self, spec, sizes, "from_method", index_map)

    def rows(self, source: Tensor, n: int) -> Tensor:
        """Compute the rows of the ``n`` new tokens for a tensor with the rows ``source``."""
        tokens = torch.tensor([index(t) for t in self.tokens])
        new, both = (tokens < 0).nonzero()[:, 0], (tokens >= 0).nonzero()[:, 0]
        old = source.to("cpu", torch.float64)
        helper = torch.nn.functional.normalize(self.helper.to("cpu", torch.float64), dim=1)
        rows = old.mean(0) + _normal(n, old.shape[1], self.seed) * old.std(0)
        for start in range(0, n, 1024):  # the whole matrix of similarities would be too large
            some = torch.arange(start, min(start + 1024, n))
            cos = helper[new[some]] @ helper[both].T
            if self.top_k is not None and self.top_k < len(both):
                best = cos.topk(self.top_k, dim=1)
                cos = torch.zeros_like(cos).scatter(1, best.indices, best.values)
            total = cos.sum(1)
            known = total > CANCELS * cos.abs().sum(1)
            mixed = cos[known] @ old[tokens[both]] / total[known, None]
            rows[some[known]] = mixed
        return rows.to(source)


def _width(
    method: object,
    spec: ModelSpec,
    sizes: Mapping[str, int],
    pad: Literal["zero", "from_method"],
    index_map: IndexMap | None = None,
) -> WidthDecision:
    """Return a decision that adds vocabulary rows at the end, or where ``index_map`` has pads, and keeps every other space."""
    refuse(spec, sizes, type(method).__name__, grows=("vocab",))
    maps: dict[str, IndexMap] = {}
    stream_scales: dict[str, StreamScale] = {}
    for space in spaces(spec, sizes):
        own = index_map if space.name == "vocab" else None
        maps[space.name] = own or IndexMap.tail(space.n_source, space.n_target)
        ones = Vector.full(1.0, space.n_target)
        stream_scales |= dict.fromkeys(space.streams, StreamScale(ones, ones, pad))
    return WidthDecision(maps, stream_scales, reasons=REASON)


def _normal(n: int, width: int, seed: int) -> Tensor:
    """Draw float64 (n, width) from a standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)
