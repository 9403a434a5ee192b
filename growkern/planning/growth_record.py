"""Records of growths in checkpoints: the few hundred bytes from which a plan can be made again, and a digest to check the plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from growkern.errors import PlanError
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.sizes import MAX_LAYERS, MAX_SIZE

VERSION = 1


@dataclass(frozen=True)
class GrowthRecord:
    """Record of a growth: the request, without the rows of the plan. ``to_json`` writes a record and ``read`` reads it.

    Attributes:
        family: Family of the model.
        source_sizes: Named sizes before.
        to: Named sizes after, for the sizes that changed.
        width: Width method, or shrink method, as text.
        depth: Depth method, as text.
        seed: Seed of the noise and of all drawn weights.
        state: Mode of the optimizer state.
        dynamics: Mode of the learning rates.
        digest: Digest of the plan, without notes and reasons (see ``digest``).
        split: For each optimizer, True when the growth split its param groups by learning rate; None if not recorded.
        plan: The plan as JSON, of a method that text cannot represent; None for a plan that the other fields reproduce.
    """

    family: str
    source_sizes: Mapping[str, int]
    to: Mapping[str, int]
    width: str
    depth: str
    seed: int
    state: str
    dynamics: str | None
    digest: str
    split: Sequence[bool] | None = None
    plan: str | None = None

    @staticmethod
    def of(plan: GrowthPlan, split: Sequence[bool] | None = None) -> "GrowthRecord":
        """Make the record of a plan, and of the optimizers whose param groups it splits."""
        same = ("family", "source_sizes", "width", "depth", "seed", "state", "dynamics")
        sizes = plan.target_sizes.items()
        to = {name: n for name, n in sizes if plan.source_sizes[name] != n}
        return GrowthRecord(
            **{name: getattr(plan, name) for name in same}, to=to, digest=digest(plan), split=split
        )

    @property
    def target_sizes(self) -> dict[str, int]:
        """Named sizes after."""
        return {**self.source_sizes, **self.to}

    @property
    def shrinks(self) -> bool:
        """True when a size got smaller."""
        return any(self.target_sizes[name] < n for name, n in self.source_sizes.items())

    def to_json(self) -> str:
        """Return the record as JSON."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps({"version": VERSION, "dynamics": None} | known, sort_keys=True)


def digest(plan: GrowthPlan) -> str:
    """Return 32 hexadecimal digits that identify a plan; its notes and reasons, which are text, do not count."""
    return sha256(replace(plan, notes=(), reasons=()).to_json().encode()).hexdigest()[:32]


def digest_of(growth: GrowthPlan | GrowthRecord) -> str:
    """Return the digest of a plan, or the recorded digest of a record."""
    return growth.digest if isinstance(growth, GrowthRecord) else digest(growth)


def _check(record: GrowthRecord) -> None:
    """Raise ValueError for fields of the wrong type, and for sizes that no model has."""
    texts = record.family, record.width, record.depth, record.state, record.digest
    others = record.dynamics or "", record.plan or ""
    if not all(isinstance(text, str) for text in (*texts, *others)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("a family, a method, a state or a digest is no text")
    split: Any = record.split
    if split is not None and not (isinstance(split, list) and all(type(s) is bool for s in split)):  # pyright: ignore
        raise ValueError("its split is no list of booleans")
    source, to = record.source_sizes, record.to
    if not isinstance(source, dict) or not isinstance(to, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("its sizes are no mapping from names to numbers")
    if to.keys() - source.keys() or any(
        type(n) is not int for n in (*source.values(), *to.values())
    ):
        raise ValueError("its sizes are not those of a model")
    for name, n in to.items():
        limit = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
        if not 1 <= n <= max(limit, source[name]):
            raise ValueError(f"{name}: the target {n:,} is not from 1 to {limit:,}")


def read(text: str) -> GrowthPlan | GrowthRecord:
    """Read an entry of a growth history: a record, or a whole plan (of a method that text cannot represent, or of growkern 0.1).

    Raises:
        PlanError: The text is neither a record nor a plan, or has a version that this growkern cannot read.
    """
    try:
        data: Any = json.loads(text)
        if "digest" not in data:
            return GrowthPlan.from_json(text)
        version = data.pop("version", VERSION)
        if version != VERSION:
            raise PlanError(
                f"this growth was recorded in version {version!r}, and this growkern reads version {VERSION}: install the "
                "growkern that wrote the checkpoint, or a later one."
            )
        record = GrowthRecord(**data)
        _check(record)
        return record
    except PlanError:
        raise
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise PlanError(
            f"cannot read a growth of the history: {error}; pass config.growkern_history, or the history of schedule.state_dict()."
        ) from None
