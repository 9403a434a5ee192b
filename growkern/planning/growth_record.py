"""Records of growths in checkpoints: the few hundred bytes from which a plan can be made again, and a digest to check the plan."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from re import fullmatch
from typing import Any

from growkern.errors import PlanError
from growkern.planning.growth_plan import UNREADABLE, GrowthPlan
from growkern.planning.options import DYNAMICS, STATES
from growkern.planning.plan_fields import (
    MAX_NAME,
    MAX_SEED,
    MAX_TEXT,
    is_int,
    is_text,
    sizes_problems,
)
from growkern.support.text import short

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


def _problems_of(record: GrowthRecord) -> Iterator[str]:
    """Yield a problem for every field of a type or range that no record has."""
    if not is_text(record.family, MAX_NAME) or not all(
        is_text(method, MAX_TEXT) for method in (record.width, record.depth)
    ):
        yield "a family, a method, a state or a digest is no text"
    if not isinstance(record.digest, str) or not fullmatch("[0-9a-f]{32}", record.digest):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield f"its digest {short(record.digest)} is not of 32 hexadecimal digits"
    if record.state not in [*STATES] or record.dynamics not in [*DYNAMICS]:
        yield f"its state {short(record.state)} or dynamics {short(record.dynamics)} is not known"
    if not is_int(record.seed, 0, MAX_SEED):
        yield f"seed is {short(record.seed)}, and not an int from 0 to 2**64 - 1"
    split: Any = record.split
    if split is not None and not (isinstance(split, list) and all(type(s) is bool for s in split)):  # pyright: ignore
        yield "its split is no list of booleans"
    if record.plan is not None and not isinstance(record.plan, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield "its plan is no text"
    source, to = record.source_sizes, record.to
    if not isinstance(source, dict) or not isinstance(to, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        yield "its sizes are no mapping from names to numbers"
    elif to.keys() - source.keys():
        yield "its sizes are not those of a model"
    else:
        yield from sizes_problems(source, source | to)


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
        if type(version) is not int or version != VERSION:
            raise PlanError(
                f"this growth was recorded in version {short(version)}, and this growkern reads version {VERSION}: install the "
                "growkern that wrote the checkpoint, or a later one."
            )
        record = GrowthRecord(**data)
        problems = [*_problems_of(record)]
        if problems:
            raise ValueError("; ".join(problem.removesuffix(".") for problem in problems))
        return record
    except PlanError:
        raise
    except UNREADABLE as error:
        raise PlanError(
            f"cannot read a growth of the history: {str(error)[:1000]}; pass config.growkern_history, or the history of "
            "schedule.state_dict()."
        ) from None
