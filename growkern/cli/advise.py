"""The command ``growkern advise``: advice from a loss curve."""

from pathlib import Path
from typing import Annotated

import typer

from growkern.cli.commands import failures
from growkern.cli.output import Json, draw, show


def advise(
    context: typer.Context,
    curve: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False,
            help="Loss curve of the source: a CSV file with the columns tokens (or step) and loss (nats), or a trainer_state.json.",
        ),
    ],
    params: Annotated[float, typer.Option(help="Number of parameters of the source, without the input embedding.")],
    target_params: Annotated[float, typer.Option(help="Number of parameters of the target, without the input embedding.")],
    budget: Annotated[float, typer.Option(help="FLOPs of the whole run, including the FLOPs until now.")],
    flops_per_token: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="SOURCE TARGET", help="FLOPs of a token, forward and backward, of source and target. Default: 6 x parameters."
        ),
    ] = None,
    spent: Annotated[
        float | None, typer.Option(help="FLOPs until now. Default: the curve's tokens times the source's FLOPs of a token.")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE:PARAMS",
            help="Loss curve of a model of another size on the same data, and its number of parameters; "
            "the curve narrows every interval. The option may be repeated.",
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of the growth: width, depth or both. Default: the kind of the recipe, else width.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Name of a measured recipe. Default: the best one of the kind.")
    ] = None,
    tokens_per_step: Annotated[
        float | None, typer.Option(help="Number of tokens per step, for curves that count steps.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", "--picture", dir_okay=False, metavar="FILE", help="File to which the picture of the advice is drawn."),
    ] = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Say from a loss curve whether to grow now, later or never, or to start the target from scratch, and what growth would save."""
    with failures("advise"):
        import growkern
        from growkern.training.loss_curve import read_curve

        others = [_other(text, tokens_per_step) for text in other or []]
        advice = growkern.advise(
            read_curve(curve, tokens_per_step), source=params, target=target_params, budget=budget, others=others,
            kind=kind, recipe=recipe, flops_per_token=flops_per_token, spent=spent,
        )  # fmt: skip
        show(context, advice, json, advice)
        draw(advice.draw, plot)


def _other(text: str, tokens_per_step: float | None) -> tuple[float, list[tuple[float, float]]]:
    """Parse FILE:PARAMS; return the number of parameters and the loss curve."""
    from growkern.training.loss_curve import read_curve

    path, _, n_params = text.rpartition(":")
    try:
        return float(n_params), read_curve(Path(path), tokens_per_step)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not FILE:PARAMS, such as small.csv:4e7: {error}", param_hint="--other"
        ) from None
