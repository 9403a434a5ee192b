"""The command line. typer and the demo's extras are imported on use, so that a missing package gives a message, not a traceback."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

if TYPE_CHECKING:
    from typer import Typer

EXTRAS = {"typer", "rich", "transformers", "safetensors", "huggingface_hub", "yaml", "matplotlib"}

EXIT_CODES = (
    "Exit codes: 0 when the command is done; 1 when it fails, or when verify finds a difference; 2 when the arguments are wrong; "
    "128 + N when signal N ends it."
)
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Run the command line."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    with _extras():
        app()()


def _end(number: int, _: object) -> NoReturn:
    """End the process as Ctrl-C does, so that a command removes its temporary files; the exit code is a shell's for the signal."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def app() -> "Typer":
    """Build the command line with all subcommands."""
    import typer

    from growkern.cli import advise, commands, inherit, lists

    cli = typer.Typer(no_args_is_help=True, epilog=EXIT_CODES, pretty_exceptions_enable=False)

    @cli.callback()
    def growkern(  # pyright: ignore[reportUnusedFunction]  # with a callback, typer keeps a single command's name
        context: typer.Context,
        quiet: Annotated[
            bool,
            typer.Option(
                "--quiet",
                "-q",
                help="Print errors only, and the JSON of --json -.",
            ),
        ] = False,
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_version, help="Print the version."),
        ] = False,
    ) -> None:
        """Grow a transformer in the middle of training, in place."""
        context.obj = sys.stdout  # of --json -
        if quiet:
            context.with_resource(redirect_stdout(StringIO()))

    @cli.command(epilog="Example: growkern demo --quick")
    def demo(  # pyright: ignore[reportUnusedFunction]
        out: Annotated[
            Path, typer.Option(file_okay=False, help="Folder to which the picture is written.")
        ] = Path("growkern-demo"),
        seed: Annotated[
            int,
            typer.Option(
                min=0,
                max=commands.BATCH_SEEDS,
                help="Seed of the weights, the batches and the growth noise.",
            ),
        ] = 0,
        compare: Annotated[
            bool,
            typer.Option(
                help="Also train the target from scratch and the source without growth, at equal FLOPs."
            ),
        ] = True,
        device: Annotated[
            str, typer.Option(help="Device to train on: auto, cpu, cuda, cuda:1, ...")
        ] = "auto",
        quick: Annotated[
            bool,
            typer.Option(
                help="Run for a few seconds at tiny sizes, to check that the demo works; the losses measure nothing."
            ),
        ] = False,
    ) -> None:
        """Train a small Llama on Python's own library, grow it twice on the way, and compare at equal FLOPs."""
        import torch

        from growkern.cli import demo
        from growkern.errors import GrowthError

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros(1, device=device).item()  # the meta device has no values
        except (RuntimeError, AssertionError) as error:
            raise typer.BadParameter(
                f"torch cannot use {device!r}: {str(error).splitlines()[0]}; pass cpu.",
                param_hint="--device",
            ) from None
        if quick:
            typer.echo(
                "quick: tiny sizes and few steps, to see that the demo works; the losses measure nothing"
            )
        try:
            with _extras():
                demo.run(
                    out,
                    seed=seed,
                    compare=compare,
                    device=device,
                    setup=demo.QUICK if quick else demo.FULL,
                )
        except GrowthError as error:
            typer.echo(f"growkern demo failed: {error}", err=True)
            raise typer.Exit(1) from None

    commands.add(cli)
    example = "growkern advise curve.csv --params 1e8 --target-params 4e8 --budget 1e19"
    cli.command(epilog=f"Example: {example}")(advise.advise)
    for command in (lists.methods, lists.families, lists.procedures):
        cli.command(epilog=f"Example: growkern {command.__name__}")(command)
    cli.add_typer(inherit.cli, name="inherit")
    return cli


def _version(asked: bool) -> None:
    if asked:
        import typer

        import growkern

        typer.echo(f"growkern {growkern.__version__}")
        raise typer.Exit


@contextmanager
def _extras() -> Generator[None]:
    """Turn a missing extra into a message with the pip command."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in EXTRAS:
            raise
        print(f'{name} is missing: pip install "growkern[demo]"', file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
