"""The commands on saved checkpoints: describe, plan, grow, verify, compare."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from growkern.cli.hub import local
from growkern.cli.output import STDOUT, Json, Plot, draw, plain, show
from growkern.cli.progress import bytes_of, steps_of
from growkern.planning.plan_fields import MAX_SEED

if TYPE_CHECKING:
    from growkern.planning.growth_plan import GrowthPlan

T = TypeVar("T")
LR = 1e-4
BATCH_SEEDS = 2**62  # torch's generators take 64 bits, and batches add to the seed
N_FORWARDS = 4  # of ``verify``
FOLDER = typer.Argument(
    help="Folder of the checkpoint, written by save_pretrained, or OWNER/NAME@REVISION on the Hub."
)
To = Annotated[
    list[str] | None,
    typer.Option(
        help="Target sizes: 2x (every width), or hidden=1024,layers=24; the option may be repeated. Default: 2x."
    ),
]
Width = Annotated[
    str | None, typer.Option(help="Width method: Lossless, 'HyperClone(noise_db=10)', ...")
]
Depth = Annotated[str | None, typer.Option(help="Depth method: IdentityBlocks, 'Stack()', ...")]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_SEED,
        help="Seed of the symmetry-breaking noise. Default: the number of growths of the checkpoint so far.",
    ),
]
Tokens = Annotated[int, typer.Option(min=2, help="Number of tokens per row.")]


def add(cli: typer.Typer) -> None:
    """Add the commands to a command line."""
    for command, example in EXAMPLES.items():
        cli.command(epilog=f"Example: {example}")(command)


def describe(
    context: typer.Context, checkpoint: Annotated[Path, FOLDER], json: Json = None
) -> None:
    """Show what every axis of every tensor of a checkpoint is, which sizes grow, and which stay and why."""
    with failures("describe"):
        import growkern
        from growkern.checkpoints.load import load
        from growkern.support.progress import listening

        folder = local(context, checkpoint)
        with steps_of(context, 1.0) as now:
            now("loading", 0)
            model = load(folder, mapped=True).model
            with listening(now):
                spec = growkern.describe(model)
        tensors = {name: [*map(str, axes)] for name, axes in spec.tensors.items()}
        data = {
            "family": spec.family, "sizes": spec.sizes, "tensors": tensors, "ties": spec.ties, "fixed": spec.fixed,
            "whole_multiples": spec.whole_multiples, "attributes": spec.attributes, "config": spec.config,
        }  # fmt: skip
        show(context, spec, json, data)


def plan(
    context: typer.Context,
    checkpoint: Annotated[Path, FOLDER],
    to: To = None,
    width: Width = None,
    depth: Depth = None,
    seed: Seed = None,
    json: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            metavar="FILE",
            help="File to which the plan is written, for grow --plan; - prints the plan.",
        ),
    ] = None,
    plot: Plot = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Predict memory, bytes received and seconds of a growth in training on this number of processes, with AdamW in float32.",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="GB per second that a process receives, with --ranks. Default: 50."
        ),
    ] = None,
) -> None:
    """Show what a growth of a checkpoint would do, tensor by tensor; nothing is grown."""
    if bandwidth is not None and ranks is None:
        raise typer.BadParameter("pass --ranks, the number of processes.", param_hint="--bandwidth")
    if bandwidth is not None and not isfinite(bandwidth):
        raise typer.BadParameter(
            f"{bandwidth} is not a number of GB per second.", param_hint="--bandwidth"
        )
    options = _options(to, width, depth, seed)
    with failures("plan"):
        from growkern.checkpoints.grow import plan_for
        from growkern.checkpoints.load import load
        from growkern.execution.cost import cost_of
        from growkern.support.progress import listening

        folder = local(context, checkpoint)
        with steps_of(context, 1.0) as now, listening(now):
            now("loading", 0)
            made = plan_for(load(folder, mapped=True), **options)
        show(context, made, json, made.to_json())
        if ranks is not None:
            cost = cost_of(made, ranks, bandwidth=(bandwidth or 50) * 1e9)
            typer.echo(f"\n{cost}", err=json == STDOUT)
        draw(lambda path: made.plot().savefig(path), plot)


def grow(
    context: typer.Context,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Folder of a checkpoint of save_pretrained or torch.distributed.checkpoint, or OWNER/NAME@REVISION on the Hub."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the grown checkpoint.")],
    to: To = None,
    width: Width = None,
    depth: Depth = None,
    seed: Seed = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False,
            help="Plan file that growkern plan --json wrote, in place of --to, --width, --depth and --seed.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in the folder OUT.")] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False,
            help="Recipe in YAML, in place of --to, --width, --depth and --seed, such as the growkern_recipe.yaml of a grown checkpoint.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Maximum size of a file of weights, such as 500MB, of a checkpoint of save_pretrained. Default: 5GB."),
    ] = None,
    optim: Annotated[
        str | None, typer.Option(help="Optimizer of a checkpoint of torch.distributed.checkpoint: AdamW, or another class of torch.optim.")
    ] = None,
    dynamics: Annotated[
        str | None, typer.Option(help="mup multiplies the stored learning rates by the law's factors, none keeps them. Default: mup.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder with the config.json of the source, for a checkpoint of torch.distributed.checkpoint. Default: CHECKPOINT.",
        ),
    ] = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Grow a checkpoint into another one, with the optimizer state that torch.distributed.checkpoint stores. Needs little memory."""
    told = bool(to or width or depth or seed is not None or dynamics)
    options = _from_file("--plan", plan, told or recipe is not None, _saved)
    options |= _from_file("--recipe", recipe, told, _recipe)
    options |= {} if options else _options(to, width, depth, seed)
    if dynamics is not None:
        options["dynamics"] = _read("--dynamics", lambda: _arguments().dynamics_of(dynamics))
    with failures("grow"):
        from growkern.checkpoints.output import METADATA

        checkpoint = local(context, checkpoint)
        stored = any(checkpoint.glob("*.safetensors"))  # METADATA is a pickle
        if (checkpoint / METADATA).is_file() and not stored:
            from growkern.checkpoints.dcp_folder import grow_folder

            if recipe is not None:
                raise typer.BadParameter(
                    "a recipe grows a checkpoint of save_pretrained; pass --to, --width, --depth and --seed.",
                    param_hint="--recipe",
                )
            run = partial(grow_folder, config=config, optim=optim)
        else:
            from growkern.checkpoints.grow import grow

            if optim or dynamics or config:
                raise typer.BadParameter(
                    f"{checkpoint} has no {METADATA}: it is no checkpoint of torch.distributed.checkpoint; leave --optim, --dynamics and "
                    "--config out."
                )
            run = partial(grow, max_shard_size=max_shard_size)
        with bytes_of(context, "growing") as advance:
            grown = run(checkpoint, out, overwrite=overwrite, on_progress=advance, **options)
        show(context, grown, json, grown.summary)


def verify(
    context: typer.Context,
    source: Annotated[Path, FOLDER],
    target: Annotated[Path, typer.Argument(help="Folder of the grown checkpoint.")],
    tokens: Tokens = 32,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random inputs.")] = 0,
    json: Json = None,
) -> None:
    """Compare a grown checkpoint with its source on random inputs; exit code 1 where their outputs differ.

    The table also lists elements without gradient. Units that no token reaches (behind a ReLU, in an expert) and biases of keys have none.
    """
    with failures("verify"):
        import growkern
        from growkern.checkpoints.load import load
        from growkern.cli.inputs import common_inputs

        folders = [local(context, folder) for folder in (source, target)]
        with steps_of(context, 2 + N_FORWARDS) as now:
            now("loading", 0)
            before = load(folders[0]).model
            now("loading")
            after = load(folders[1]).model

            def count(*_: object) -> None:
                now("comparing")

            for model in (before, after):
                model.register_forward_pre_hook(count)
            inputs = common_inputs(before, after, 2, tokens, seed)
            verification = growkern.verify(before, after, inputs)
        result = {"same_function": verification.same_function, "ok": verification.ok}
        show(context, verification, json, plain(verification) | result)
    if not verification.same_function:
        raise typer.Exit(1)


def compare(
    context: typer.Context,
    checkpoint: Annotated[Path, FOLDER],
    methods: Annotated[
        list[str],
        typer.Option(
            help="Method to compare: Lossless, 'FPI()', 'Stack()', 'AKI() + Stack()', ...; the option may be repeated."
        ),
    ],
    to: To = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text file to train on. Default: random tokens."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Number of AdamW steps after each growth.")
    ] = 10,
    tokens: Tokens = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows per batch.")] = 4,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of the source.")] = LR,
    seed: Seed = None,
    plot: Plot = None,
    json: Json = None,
) -> None:
    """Grow a checkpoint by several methods, in memory, train each for a few steps, and show losses side by side."""
    sizes = _read("--to", lambda: _arguments().sizes_of(to or ["2x"]))
    chosen = [
        _read("--methods", lambda name=name: _arguments().methods_of(name)) for name in methods
    ]
    with failures("compare"):
        import torch

        import growkern
        from growkern.analysis.comparison import Outcome, loss_of
        from growkern.checkpoints.load import load
        from growkern.cli.inputs import training_batches

        model = load(folder := local(context, checkpoint)).model
        drawn = (seed or 0) % BATCH_SEEDS
        batches = training_batches(model, folder, text, max(1, steps), batch_size, tokens, drawn)
        optim = torch.optim.AdamW(model.parameters(), lr=lr)
        n = steps + 2  # losses of a method: before the steps, in each step, and after the steps
        with steps_of(context, 1 + n * (1 + len(chosen))) as now:
            done: list[Outcome] = []

            def loss(model: Any, batch: Any) -> Any:
                now("comparing")
                return loss_of(model, batch)

            def count(outcome: Outcome) -> None:  # a method that refuses the model computes no loss
                done.append(outcome)
                now("comparing", 1 + n * len(done))

            compared = growkern.compare(
                model, optim, methods=chosen, batch=batches, to=sizes, steps=steps, seed=seed, loss=loss, on_outcome=count
            )  # fmt: skip
        show(context, compared, json, compared)
        draw(lambda path: compared.plot().savefig(path), plot)


def _arguments() -> Any:
    from growkern.cli import parse as arguments

    return arguments


def _options(
    to: list[str] | None, width: str | None, depth: str | None, seed: int | None
) -> dict[str, Any]:
    read = _arguments()
    return {
        "to": _read("--to", lambda: read.sizes_of(to or ["2x"])),
        "width": _read("--width", lambda: read.width_of(width)) if width else None,
        "depth": _read("--depth", lambda: read.depth_of(depth)) if depth else None,
        "seed": seed,
    }


def _read(option: str, read: Callable[[], T]) -> T:
    """Parse an option; turn an error into typer's BadParameter."""
    from growkern.errors import CheckpointError, PlanError

    try:
        return read()
    except (PlanError, CheckpointError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _from_file(
    option: str, path: Path | None, more: bool, read: Callable[[Path], object]
) -> dict[str, Any]:
    """Read the file of an option, which takes the place of the options that say what to grow; return the argument of ``grow``."""
    if path is None:
        return {}
    name = option.removeprefix("--")
    if more:
        others = " ".join(o for o in ("--plan", "--recipe") if o != option)
        raise typer.BadParameter(
            f"the {name} already says what to grow; leave --to, --width, --depth, --seed, --dynamics and {others} out.",
            param_hint=option,
        )
    return {name: read(path)}


def _recipe(path: Path) -> Any:
    from growkern.checkpoints.recipe import read_recipe

    return _read("--recipe", lambda: read_recipe(path))


def _saved(path: Path) -> "GrowthPlan":
    from growkern.planning.growth_plan import GrowthPlan

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}", param_hint="--plan") from None
    return _read("--plan", lambda: GrowthPlan.from_json(text))


@contextmanager
def failures(command: str) -> Generator[None]:
    """Turn GrowthError, and errors of the file system, into an error message and exit code 1."""
    from growkern.errors import GrowthError

    try:
        yield
    except BrokenPipeError:  # typer ends the command quietly
        raise
    except (GrowthError, OSError) as error:
        typer.echo(f"growkern {command} failed: {error}", err=True)
        raise typer.Exit(1) from None


EXAMPLES: dict[Callable[..., None], str] = {
    describe: "growkern describe small",
    plan: "growkern plan small --to hidden=2x,layers=24 --json plan.json",
    grow: "growkern grow small large --to hidden=2x,layers=24",
    verify: "growkern verify small large",
    compare: "growkern compare small --methods Lossless --methods 'FPI() + Stack()' --text corpus.txt",
}
