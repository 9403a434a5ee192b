"""Model card of a grown checkpoint: the metadata of the Hugging Face Hub, the sizes, the methods, and how to repeat the growth."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

from growkern.engine.history import DEPTHS, SHRINKS, VOCABS, WIDTHS
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.text import one_line

CARD = "README.md"
TAGS = "growkern", "model-growth"
CARRIED = (  # fields of the source's card that hold for the target too
    "license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets", "base_model", "tags",
)  # fmt: skip
MAX_LENGTH, MAX_ENTRIES = 200, 200  # of a field
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
METHODS = WIDTHS | DEPTHS | SHRINKS | VOCABS


@dataclass(frozen=True)
class CardContents:
    """What a model card says of one growth.

    Attributes:
        plan: Plan of the growth.
        source: Folder of the source.
        architectures: Names of the model's classes, of a checkpoint that ``from_pretrained`` loads.
        n_params: Number of parameters of source and target.
        notes: Notes on the growth.
        fields: Fields of the source's metadata that hold for the target too, see ``carried``.
        recipe: Name of the recipe's file in the target's folder; None if there is none.
    """

    plan: GrowthPlan
    source: Path
    architectures: Sequence[str]
    n_params: tuple[int, int]
    notes: Sequence[str]
    fields: Mapping[str, Any]
    recipe: str | None = None

    def write(self, folder: Path) -> None:
        """Write the card to a folder."""
        from huggingface_hub import ModelCardData

        fields: dict[str, Any] = {"library_name": "transformers", **self.fields}
        if name := hub_id(self.source):
            fields["base_model"] = name
        if "base_model" in fields:
            fields["base_model_relation"] = "finetune"  # the Hub knows no relation for growth
        fields["tags"] = [*dict.fromkeys((*fields.get("tags", ()), *TAGS))]
        data = ModelCardData(**fields)
        text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(self._body()) + "\n"
        (folder / CARD).write_bytes(
            text.encode("utf-8", "backslashreplace")
        )  # names of folders need not be text

    def _body(self) -> Iterator[str]:
        plan, name = self.plan, hub_id(self.source)
        small = f"[{name}](https://huggingface.co/{name})" if name else f"`{name_of(self.source)}`"
        yield f"# {name or name_of(self.source)}, grown to {self.n_params[1]:,} parameters"
        yield (
            f"A {plan.family} of {self.n_params[1]:,} parameters, grown from {small} ({self.n_params[0]:,} parameters) by growkern, "
            "which computes the weights of a larger model from the weights of a trained smaller model. The target has not been trained "
            "since the growth."
        )
        rows = [(k, n, plan.target_sizes[k]) for k, n in sorted(plan.source_sizes.items())]
        changed = [(k, n, m) for k, n, m in (*rows, ("parameters", *self.n_params)) if n != m]
        lines = [f"| {k} | {n:,} | {m:,} |" for k, n, m in changed]
        yield "## Sizes\n\n" + "\n".join(["| size | source | target |", "|---|---:|---:|", *lines])
        yield "## Method\n\n" + "\n".join(self._methods())
        holds = one_line(plan.preserves_text, 2000)
        yield f"The growth {'' if plan.function_preserving else 'is '}{holds}."
        if notes := [f"- {one_line(note, 1000)}" for note in self.notes]:
            yield "## Notes\n\n" + "\n".join(notes)
        if self.architectures:
            kind = self.architectures[0]
            loads = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'
            yield f"## Load\n\nThe checkpoint loads with transformers alone. FOLDER is the folder of this file:\n\n```python\n{loads}\n```"
        if self.recipe:
            line = command_of(self.source, self.recipe)
            yield f"## Repeat the growth\n\nWith the same source, bit for bit:\n\n```\n{line}\n```"

    def _methods(self) -> Iterator[str]:
        """Yield an entry for the width method, for the depth method if blocks are new, and for the seed."""
        plan = self.plan
        for kind, text in (("width", plan.width), ("depth", plan.depth)):
            if kind == "width" or plan.new_blocks:
                links = [f"[arXiv:{n}](https://arxiv.org/abs/{n})" for n in papers(text)]
                yield f"- {kind}: `{one_line(text, 500)}`" + f" ({', '.join(links)})" * bool(links)
        yield f"- seed: {plan.seed}"


def papers(method: str) -> list[str]:
    """Return the arXiv numbers that the docstring of a method names, the method given as text; none for a method of the user."""
    known: Any = METHODS.get(method.partition("(")[0].strip())
    return [*dict.fromkeys(ARXIV.findall(known.__doc__ or ""))] if known else []


def hub_id(folder: Path) -> str | None:
    """Return the Hub id of a snapshot in Hugging Face's cache, ``models--OWNER--NAME/snapshots/REVISION``; None for other folders."""
    parts = folder.absolute().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return parts[0].removeprefix("models--").replace("--", "/")


def command_of(source: Path, recipe: str) -> str:
    """Return the command that grows a source by a recipe; a model of the Hub is named with its revision."""
    name = hub_id(source)
    origin = f"{name}@{source.absolute().name}" if name else name_of(source)
    return join(["growkern", "grow", origin, "OUT", "--recipe", recipe])


def carried(folder: Path, copied: Collection[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the fields of a source's card that hold for the target too, and a note if the card is unreadable.

    Args:
        folder: Folder of the source.
        copied: Names of the files that the target may take over from the source.
    """
    if CARD not in copied:
        return {}, ()
    from huggingface_hub import repocard

    try:
        fields: dict[str, Any] = getattr(repocard, "metadata_load")(folder / CARD) or {}  # noqa: B009  (untyped)
    except Exception as error:  # of YAML, of its constructors, or of the file's encoding
        why = one_line(error, 200)
        return {}, (f"no license was carried over: the metadata of the source's {CARD} is unreadable: {why}.",)  # fmt: skip
    kept = {key: fields[key] for key in CARRIED if _is_text(fields.get(key))}
    if isinstance(kept.get("tags"), str):
        kept["tags"] = [kept["tags"]]
    return kept, ()


def _is_text(value: Any) -> bool:
    """True for a text, and for a list of texts, of the length that a card's field has."""
    if isinstance(value, list):
        entries: list[Any] = [*value]  # pyright: ignore[reportUnknownArgumentType]
        return 0 < len(entries) <= MAX_ENTRIES and all(isinstance(v, str) and _is_text(v) for v in entries)  # fmt: skip
    return isinstance(value, str) and 0 < len(value) <= MAX_LENGTH


def name_of(folder: Path) -> str:
    """Return the name of a folder on one line."""
    return one_line(folder.resolve().name, MAX_LENGTH)
