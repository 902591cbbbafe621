"""Options that several commands share, each said once."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from coreprune.errors import InputError

SOURCE_HELP = (
    "package.module:factory (it returns a model or (model, example)), the folder of a Hugging Face model, "
    "or a .pt2 file."
)

LARGEST_SEED = (1 << 32) - 1  # numpy takes no larger one

Source = Annotated[str, typer.Argument(help=SOURCE_HELP, metavar="SOURCE", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="A folder that `coreprune prune` or coreprune.save wrote.", metavar="FOLDER")
]
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

    return ["auto", *SELECTORS]


def query_sources() -> list[str]:
    """Names of the sources of queries."""
    from coreprune.queries import QUERIES

    return ["auto", "none", *QUERIES]


def known_method(name: str) -> Any:
    """What `prune(method=)` takes, or an InputError, before anything is loaded for it. "module:name" is imported."""
    if ":" in name:
        from coreprune.cli.source import users_own
        from coreprune.pruning.selectors import resolve

        users_own(name)
        return resolve(name)
    if name not in methods():
        raise InputError(_unknown(f"--method {name}", "selector", name, methods()))
    return name


def known_queries(specs: Sequence[str], option: str = "--queries") -> list[str]:
    """Names of sources, module:function, and files that exist. Raises InputError, before any model is loaded."""
    from coreprune.cli.source import users_own
    from coreprune.queries.spec import is_reference

    for spec in specs:
        if spec.endswith((".npz", ".safetensors")):
            if not Path(spec).is_file():
                raise InputError(f"{option} {spec}: there is no such file.")
        elif is_reference(spec):
            users_own(spec)  # make_queries then finds it again
        elif spec not in query_sources():
            text = _unknown(f"{option} {spec}", "source of inputs", spec, query_sources())
            raise InputError(f"{text} Or pass a file of samples (.npz), or your own source as module:function.")
    return list(specs)


def _unknown(given: str, what: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name.replace("_", "-").lower(), known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{given}: there is no such {what}.{meant} There are {', '.join(sorted(known))}."


def keeps(given: Sequence[str] | None) -> float | dict[str, float] | None:
    """What `Budget(keep=)` takes: a share for all groups, or shares by pattern. Raises InputError."""
    if not given:
        return None
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        pairs = [text.rpartition("=") for text in given]
        shares = {pattern: float(share) for pattern, _, share in pairs}
    except ValueError:
        shares = {"": 0.0}
    if "" in shares or len(shares) < len(given):
        raise InputError(
            f"--keep {' --keep '.join(given)}: give one share, e.g. --keep 0.5, or one share for each pattern, "
            "e.g. --keep 'layer1.*=0.8' --keep '*=0.5'."
        )
    return shares


def one_budget(limits: dict[str, Any]) -> dict[str, Any]:
    """The one limit that was given; half of the multiply-accumulates where none was. Raises InputError for several."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"give one of {', '.join('--' + name for name in limits)}, not {len(given)} of them.")
    return given or {"macs": 0.5}
