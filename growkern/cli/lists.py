"""The commands methods, families and procedures: tables of what growkern knows. Names, sentences and papers are those of the docstrings."""

from collections.abc import Mapping
from inspect import isfunction

import typer


def methods() -> None:
    """List the growth methods with their papers, for --width and --depth of plan and grow."""
    from growkern.engine.history import DEPTHS, WIDTHS

    _print("method", {"width": WIDTHS, "depth": DEPTHS})


def procedures() -> None:
    """List the published training procedures with their papers; call them as growkern.procedures.NAME in a training script."""
    from growkern import procedures as known

    named = {name: getattr(known, name) for name in known.__all__}
    runs = {n: f for n, f in named.items() if isfunction(f) and "model" in f.__annotations__}
    _print("procedure", {"schedule": runs})


def families() -> None:
    """List the model classes that growkern knows by name; it describes others by tracing a forward."""
    from growkern.model.describe import FAMILIES
    from growkern.model.hints import Hint
    from growkern.support.text import table

    rows = [
        [
            name,
            "transformers",
            ", ".join({**dict.fromkeys(own.fields.values()), **dict.fromkeys(own.derived)}),
        ]
        if isinstance(own, Hint)
        else [name, "torch.nn", "ffn; hidden and heads as part of a model that a spec describes"]
        for name, own in FAMILIES.items()
    ]
    typer.echo(table(["class", "package", "sizes"], rows))
    typer.echo(
        "\nOther classes are described by tracing one forward: growkern describe CHECKPOINT shows what grows."
    )


def _print(title: str, kinds: Mapping[str, Mapping[str, object]]) -> None:
    """Print a row per name: the kind, the arXiv numbers, and the first line of the docstring."""
    from growkern.checkpoints.card import ARXIV
    from growkern.support.text import table

    rows: list[list[str]] = []
    for kind, entries in kinds.items():
        for name, one in entries.items():
            text = (one.__doc__ or "").strip().replace("``", "")
            papers = ", ".join(dict.fromkeys(ARXIV.findall(text)))
            rows.append([name, kind, papers, text.partition("\n")[0]])
    typer.echo(table([title, "kind", "arXiv", "what it does"], rows))
