"""The app, its first commands, and one handler that turns every CoreprunError into a message and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import coreprune
from coreprune._chatter import without_chatter
from coreprune._telling import telling
from coreprune.cli import options, processes, show
from coreprune.errors import CoreprunError

_ORDER = ("prune", "inspect", "report", "certify", "bench", "export", "demo")


class Commands(TyperGroup):
    """A group of commands that report a CoreprunError as a message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of use."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def invoke(self, ctx: Any) -> object:
        """Run a command."""
        try:
            with without_chatter():
                return super().invoke(ctx)
        except CoreprunError as error:
            number = processes.number()  # torchrun shows what all of them say
            errors.print("error" if number is None else f"error in process {number}:", style="bold red", end=" ")
            for text in (str(error), *getattr(error, "__notes__", ())):
                errors.print(text, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            errors.print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="coreprune",
    cls=Commands,
    help="Make trained PyTorch networks physically smaller without their training data, and show what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First steps: coreprune demo, or coreprune prune mypackage.models:resnet --shape 1,3,224,224 --out small. "
    "With --help, every command says what it takes.\n\n"
    "Exit codes: 0 success; 1 an error in coreprune or in the model's code; 2 wrong input, a budget that cannot "
    "be met, or a file that cannot be written; 130 interrupted.",
)
console = Console()
errors = Console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"coreprune {coreprune.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options of all commands."""


@app.command(epilog="Example: coreprune demo --out my-report")
def demo(
    out: Annotated[Path, typer.Option(help="The folder for report.json and accuracy.png.")] = Path("demo-report"),
    seed: Annotated[int, typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of training and sampling.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Train a small network on handwritten digits, prune it in eight ways, and compare."""
    from coreprune.demo import demo as job

    job.prepare(out)
    with telling(True) as tell:
        found = job.run(seed, tell)
    report, plot = job.write(found, out)
    if json:
        sys.stdout.write(report.read_text(encoding="utf-8") + "\n")
        return
    console.print(show.demo_table(found))
    console.print(show.demo_notes(found))
    console.print(f"report  {report.resolve()}\nplot    {plot.resolve()}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: coreprune inspect mypackage.models:resnet --shape 1,3,224,224")
def inspect(
    source: options.Source,
    shape: options.Shapes = None,
    also: options.Also = None,
    example: options.Example = None,
    weights: options.Weights = None,
    batch_axis: options.BatchAxis = None,
    part: options.Part = None,
    norm_statistics: options.NormStatistics = False,
    json: options.Json = False,
) -> None:
    """List the groups of channels that can be removed, what they cost, and which are locked and why."""
    from coreprune.cli import source as sources
    from coreprune.pruning import list_groups

    axis = options.batch_axis(batch_axis)
    model, example = sources.load(source, weights, shape or [], example)
    with telling(True) as tell:
        more = sources.further(also)
        found = list_groups(
            model, example, also=more, progress=tell, batch_axis=axis, part=part, norm_statistics=norm_statistics
        )
    if json:
        sys.stdout.write(found.to_json() + "\n")
        return
    console.print(show.inspection_table(found))
