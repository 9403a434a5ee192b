"""The command ``growkern inherit store``: a checkpoint's logits of a text, for training with a teacher that does not run."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from growkern.cli.commands import FOLDER, failures
from growkern.cli.hub import local
from growkern.cli.progress import is_shown

cli = typer.Typer(no_args_is_help=True, help="Train with a teacher: store what the teacher says.")


@cli.callback()
def inherit() -> None:  # with a callback, typer keeps a single command's name
    """Train with a teacher: store what the teacher says."""


@cli.command(epilog="Example: growkern inherit store teacher corpus.txt logits --tokens 1024")
def store(
    context: typer.Context,
    teacher: Annotated[Path, FOLDER],
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Text file of the corpus.")],
    out: Annotated[Path, typer.Argument(help="Folder of the stored logits. A killed store goes on there.")],
    sampled: Annotated[int | None, typer.Option(min=1, help="Number of draws per position. Default: 64.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Store the largest probabilities in place of draws.")] = None,
    tau: Annotated[float, typer.Option(help="Temperature of the teacher, and of the training.")] = 2.0,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence, as in the training; the rest of the text is left out.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of sequences per batch.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**22, help="Seed of the draws.")] = 0,
) -> None:  # fmt: skip
    """Run a teacher over a text once, and store a few probabilities per token."""
    with failures("inherit store"):
        import torch
        from rich.console import Console
        from rich.progress import track

        import growkern
        from growkern.checkpoints.load import load
        from growkern.cli.inputs import sequences

        model = load(teacher := local(context, teacher)).model
        ids, tokenizer = sequences(model, teacher, text, tokens)
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def batches() -> Generator[dict[str, torch.Tensor]]:
            starts = range(0, len(ids), batch_size)
            disable = not is_shown(context)
            for i in track(starts, "storing", console=Console(stderr=True), disable=disable):
                yield {"input_ids": ids[i : i + batch_size]}

        with closing(batches()) as given:  # a refusal ends the bar
            made = growkern.inherit.store(
                model.to(device), given, out, top_k=top_k, sampled=sampled, tau=tau, seed=seed, name=str(teacher), tokenizer=tokenizer,
            )  # fmt: skip
        typer.echo(made)
