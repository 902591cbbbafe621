"""Options that several commands share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coreprune.errors import InputError

SOURCE_HELP = (
    "package.module:factory (it returns a model or (model, example)), the folder of a Hugging Face model, "
    "or a .pt2 file."
)

Source = Annotated[str, typer.Argument(help=SOURCE_HELP, show_default=False)]
Folder = Annotated[Path, typer.Argument(help="A folder that `coreprune prune` or coreprune.save wrote.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", help="Example input, e.g. 1,3,224,224 or input_ids=1,16:int. Repeat for more inputs."),
]
Example = Annotated[
    Path | None, typer.Option("--example", help="Example input as an .npz file: one array, or one per argument name.")
]
Weights = Annotated[Path | None, typer.Option(help="A .safetensors file to load into the factory's model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Dense = Annotated[
    str | None,
    typer.Option("--source", help="The dense model, if the artifact does not say where it is. " + SOURCE_HELP),
]


def methods() -> list[str]:
    """Names of the selectors, for completion and messages."""
    from coreprune.pruning import SELECTORS

    return list(SELECTORS)


def query_sources() -> list[str]:
    """Names of the sources of queries."""
    from coreprune.queries import QUERIES

    return ["auto", "none", *QUERIES]


def one_budget(limits: dict[str, float | None]) -> dict[str, float]:
    """The one limit that was given; half of the multiply-accumulates where none was. Raises InputError for several."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"give one of {', '.join('--' + name for name in limits)}, not {len(given)} of them.")
    return given or {"macs": 0.5}
