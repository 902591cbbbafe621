"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from coreprune.errors import InputError

SOURCE_HELP = (
    "package.module:factory (a function that returns a model or (model, example)), timm:NAME, torchvision:NAME, the "
    "folder of a Hugging Face model, a .gguf file, or a .pt2 file."
)

# How the help groups the options.
MODEL, BUDGET, METHOD = "The model and its example", "The budget", "Method, queries and repair"
WIDTHS, MEASURED = "Where channels may leave", "Measurements"

LARGEST_SEED = (1 << 32) - 1  # numpy accepts no larger one

Source = Annotated[str, typer.Argument(help=SOURCE_HELP, metavar="SOURCE", show_default=False)]
Folder = Annotated[
    Path, typer.Argument(help="An artifact: a folder that `coreprune prune` or coreprune.save wrote.", metavar="FOLDER")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        help="Example input, such as 1,3,224,224 or input_ids=1,16:int. Repeat for more inputs.",
        rich_help_panel=MODEL,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        help="A further example input that makes other parts of the model run, such as a larger image: 1,3,512,512. "
        'Several inputs in one text: "input_ids=1,64:int mask=1,64:bool". Repeat for more examples.',
        rich_help_panel=MODEL,
    ),
]
Example = Annotated[
    Path | None,
    typer.Option(
        "--example", help="Example input as an .npz file: one array, or one per argument name.", rich_help_panel=MODEL
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The weights of the model: a .safetensors file, or a state dict or checkpoint (.pt, .pth, .ckpt). "
        "FILE::KEY takes one of several state dicts in a checkpoint.",
        rich_help_panel=MODEL,
    ),
]
BatchAxis = Annotated[
    list[str] | None,
    typer.Option(
        "--batch-axis",
        help="Which axis of the inputs holds the samples: a number for all inputs, none for a model without a batch, "
        "or name=axis for one input (a keyword, or its position); repeat for more inputs. By default it is found out.",
        rich_help_panel=MODEL,
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        help="Only this module of the model, e.g. backbone. The inputs are still those of the model.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
NormStatistics = Annotated[
    bool,
    typer.Option(
        "--norm-statistics",
        help="Let channels leave that a LayerNorm, RMSNorm or GroupNorm with one group takes its statistics over, such "
        "as a residual stream. This is not exact; the repair does the rest.",
        rich_help_panel=METHOD,
    ),
]
Depth = Annotated[
    bool,
    typer.Option(
        "--depth",
        help="Let whole blocks leave, such as those of a transformer, where that is better than narrower layers.",
        rich_help_panel=METHOD,
    ),
]
Residual = Annotated[
    str | None,
    typer.Option(
        help="rotate: let the residual streams of a transformer shrink, along their principal axes on the queries.",
        rich_help_panel=METHOD,
    ),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        help="A folder with a tokenizer.json, for a model that reads text; by default the model's own folder. With it, "
        "texts of this machine are among the queries; none leaves them out.",
        rich_help_panel=METHOD,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="How much of main memory may hold what the model computes on the queries, such as 8GiB. The rest lies in "
        "files in the folder for temporary files. By default half of what is free.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Dense = Annotated[
    str | None,
    typer.Option(
        "--source", help="The dense model, if the artifact does not name it: " + SOURCE_HELP, rich_help_panel=MODEL
    ),
]


def methods() -> list[str]:
    """The names of the selectors, for completion and messages."""
    from coreprune.selectors import SELECTORS

    return ["auto", *SELECTORS]


def query_sources() -> list[str]:
    """The names of the sources of queries."""
    from coreprune.queries import QUERIES

    return ["auto", "none", *QUERIES]


def known_method(name: str) -> Any:
    """Turn a name into what `prune(method=)` takes. "module:name" is imported. Raises InputError for unknown names."""
    if ":" in name:
        from coreprune.cli.source import users_own
        from coreprune.pruning.selectors import resolve

        users_own(name)
        return resolve(name)
    if name not in methods():
        raise InputError(_unknown(f"--method {name}", "selector", name, methods()))
    return name


def known_queries(specs: Sequence[str], option: str = "--queries") -> list[str]:
    """Check that each spec is the name of a source, module:function, or an existing file. Else raise InputError."""
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
    """Turn the texts into what `Budget(keep=)` takes: one share, or shares by pattern. Raises InputError."""
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


def latency(given: str | None) -> float | str | None:
    """Turn the text into what `Budget(latency=)` takes: a share, or a time as text, which `Budget` reads itself."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def batch_axis(given: Sequence[str] | None) -> Any:
    """Turn the texts into what `prune(batch_axis=)` takes. Raises InputError."""
    if not given:
        return "auto"
    try:
        if len(given) == 1 and "=" not in given[0]:
            return given[0] if given[0] == "auto" else _axis(given[0])
        pairs = [text.rpartition("=") for text in given]
        axes = {int(name) if name.isdecimal() else name: _axis(axis) for name, _, axis in pairs}
    except ValueError:
        axes = {"": None}
    if "" in axes or len(axes) < len(given):
        raise InputError(
            f"--batch-axis {' --batch-axis '.join(given)}: give a number, none, or one axis for each input, e.g. "
            "--batch-axis x=1 --batch-axis mask=0."
        )
    return axes


def _axis(text: str) -> int | None:
    return None if text == "none" else int(text)


def one_budget(limits: dict[str, Any]) -> dict[str, Any]:
    """The one limit that was given, by default half of the multiply-accumulates. Raises InputError for several."""
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"give one of {', '.join('--' + name for name in limits)}, not {len(given)} of them.")
    return given or {"macs": 0.5}
