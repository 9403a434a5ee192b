"""Recipes: what a growth of a checkpoint is asked for, as YAML that a user writes, or that a growth writes into its target."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from growkern.checkpoints.card import command_of, hub_id, name_of
from growkern.engine.history import DEPTHS, WIDTHS
from growkern.errors import CheckpointError, PlanError, raise_all
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.growth_record import digest
from growkern.planning.method_text import method_of, parsed
from growkern.planning.plan_fields import MAX_NAME, MAX_SEED, MAX_TEXT, is_int, is_text
from growkern.planning.sizes import Target
from growkern.support.text import one_line, short

RECIPE = "growkern_recipe.yaml"
VERSION = 1
HEADER = "# Repeats the growth of this checkpoint: {}\n"


@dataclass(frozen=True)
class Recipe:
    """What a growth of a checkpoint is asked for.

    Attributes:
        to: Target sizes, as in ``expand_inplace``.
        width: Width method as text; None for the default.
        depth: Depth method as text; None for the default.
        seed: Seed of the symmetry-breaking noise; None for the default.
        max_shard_size: Maximum size of a shard, such as ``"5GB"``; None for the default.
        source: Hub id or name of the source's folder. It is not checked.
        revision: Revision of a source on the Hub. It is not checked.
        dtype: Dtype of the source's weights, such as ``"bfloat16"``; None for any.
        digest: Digest of the plan; None for any plan.
        plan: The plan as JSON, of a growth that the other fields do not reproduce.
        growkern: Version of growkern that wrote the recipe.
        version: Version of the format.
    """

    to: Target = "2x"
    width: str | None = None
    depth: str | None = None
    seed: int | None = None
    max_shard_size: str | None = None
    source: str | None = None
    revision: str | None = None
    dtype: str | None = None
    digest: str | None = None
    plan: str | None = None
    growkern: str | None = None
    version: int = VERSION

    def methods(self) -> tuple[WidthMethod | None, DepthMethod | None]:
        """Make the methods; raise PlanError for a text that names none."""
        texts = ((self.width, WIDTHS), (self.depth, DEPTHS))
        made = [method_of(parsed(text), text, known) if text else None for text, known in texts]
        return cast(tuple[WidthMethod | None, DepthMethod | None], tuple(made))

    def check(self, plan: GrowthPlan, dtype: torch.dtype) -> None:
        """Raise PlanError if the source's dtype, or the plan, is not the recorded one."""
        problems: list[str] = []
        if self.dtype not in (None, stored := _text(dtype)):
            problems.append(
                f"dtype: is {self.dtype}, and the source stores {stored}; grow the source of the recipe."
            )
        if self.digest not in (None, made := digest(plan)):
            problems.append(
                f"digest: is {self.digest}, and the plan for this source has {made}: the source is another one, or this growkern plans "
                f"otherwise than growkern {self.growkern or ''}; remove digest: to grow all the same."
            )  # fmt: skip
        raise_all(PlanError, "the recipe does not fit:", problems)

    def write(self, folder: Path, source: Path) -> None:
        """Write the recipe of a source to a folder."""
        import yaml

        kept = {k: v for k, v in asdict(self).items() if v is not None}
        text = HEADER.format(command_of(source, RECIPE)) + yaml.safe_dump(kept, sort_keys=False)
        (folder / RECIPE).write_bytes(text.encode("utf-8", "backslashreplace"))


def recipe_of(
    plan: GrowthPlan, again: GrowthPlan | None, source: Path, dtype: torch.dtype, shard: str
) -> Recipe:
    """Make the recipe of a growth.

    Args:
        plan: Plan of the growth.
        again: Plan that the sizes, the methods as text and the seed of ``plan`` make; None if they make none.
        source: Folder of the source.
        dtype: Dtype of the source's weights.
        shard: Maximum size of a shard.
    """
    sizes, name = plan.target_sizes, hub_id(source)
    whole = again is None or digest(again) != digest(plan)
    try:
        own = version("growkern")
    except PackageNotFoundError:  # a source tree that is not installed
        own = None
    return Recipe(
        to={key: sizes[key] for key, n in sorted(plan.source_sizes.items()) if sizes[key] != n},
        width=plan.width, depth=plan.depth, seed=plan.seed, max_shard_size=shard, source=name or name_of(source),
        revision=source.absolute().name if name else None, dtype=_text(dtype), digest=digest(plan),
        plan=plan.to_json() if whole else None, growkern=own,
    )  # fmt: skip


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file: a mapping with fields of ``Recipe``, all of which may be left out.

    Raises:
        CheckpointError: The file cannot be read.
        PlanError: The file is no recipe; every reason at once.
    """
    import yaml

    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; pass a recipe.") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        raise PlanError(f"{path} is no YAML: {one_line(error, 300)}; correct the file.") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} is no mapping of names to values; write, for example, to: 2x.")
    given = cast(dict[Any, Any], data)
    raise_all(PlanError, f"{path} is no recipe:", [*_problems(given)])
    return Recipe(**given)


def _problems(data: Mapping[Any, Any]) -> Iterator[str]:
    """Yield a problem for every field that no recipe has, or of a value that the field does not take."""
    known = [field.name for field in fields(Recipe)]
    for name, value in data.items():
        if name not in known:
            yield f"{short(name)} is no field of a recipe; the fields are {', '.join(known)}."
        elif name == "version":
            if not is_int(value, 1, VERSION):
                yield f"version is {short(value)}, and this growkern reads {VERSION}; install a later growkern."
        elif name == "to":
            yield from _size_problems(value)
        elif name == "seed":
            if not is_int(value, 0, MAX_SEED):
                yield f"seed is {short(value)}; write an int from 0 to 2**64 - 1."
        elif not (isinstance(value, str) if name == "plan" else is_text(value, MAX_TEXT)):
            yield f"{name} is {short(value)}; write a text in quotation marks."


def _size_problems(to: Any) -> Iterator[str]:
    named = cast(dict[Any, Any], to) if isinstance(to, dict) else None
    sizes: dict[Any, Any] = {"to": to} if named is None else named
    for name, size in sizes.items():
        if not is_text(name, MAX_NAME) or not (
            is_text(size, MAX_NAME) or (named is not None and is_int(size, 1, MAX_SEED))
        ):
            yield f"to is {short(cast(object, to))}; write 2x, or a mapping of sizes, such as {{hidden: 1024, layers: 24}}."
            return


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
