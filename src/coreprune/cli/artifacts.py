"""Commands that take an artifact: certify, report, export, bench."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from coreprune._telling import telling
from coreprune.cli import options, show, source
from coreprune.cli.commands import app, console
from coreprune.errors import ArtifactError, CoreprunError, InputError, first_line


@app.command(epilog="Example: coreprune certify small --samples fresh.npz")
def certify(
    folder: options.Folder,
    samples: Annotated[
        str, typer.Option(help="Unlabelled samples (.npz) that pruning has not seen, or the name of a source.")
    ],
    n: Annotated[int | None, typer.Option(min=1, help="How many samples to use; by default all.")] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of the source. Pruning has seen none of its inputs."),
    ] = 0,
    delta: Annotated[float, typer.Option(help="The statement holds with probability 1 - delta.")] = 0.01,
    dense: options.Dense = None,
    shape: options.Shapes = None,
    example: options.Example = None,
    weights: options.Weights = None,
    batch_axis: options.BatchAxis = None,
    json: options.Json = False,
) -> None:
    """Certify how often, at least, the dense and the pruned model give the same answer on samples like these."""
    from coreprune.artifact.manifest import QUERIES
    from coreprune.pruning import certify as run

    if samples == "none":
        raise InputError("--samples none: the agreement is measured on samples. Pass some (.npz), or a source of them.")
    options.known_queries([samples], "--samples")
    if (folder / QUERIES).exists() and Path(samples).exists() and (folder / QUERIES).samefile(samples):
        raise InputError(f"pruning has seen {samples}, so it proves nothing. Pass samples that it has not seen.")
    model, small, given, axis = both(folder, dense, weights, shape, example, batch_axis)
    with redirect_stdout(sys.stderr), telling(True) as tell:  # the user's source may print
        found = run(model, small, given, samples, n=n, delta=delta, seed=seed, progress=tell, batch_axis=axis).as_dict()
    if json:
        sys.stdout.write(json_.dumps(found, indent=1) + "\n")
        return
    console.print(show.agreement(found), soft_wrap=True, highlight=False)


@app.command(
    epilog="Examples:\n\ncoreprune report small --html page.html\n\ncoreprune report half quarter --html runs.html"
)
def report(
    folder: Annotated[
        list[Path],
        typer.Argument(
            help="An artifact: a folder that `coreprune prune` or coreprune.save wrote. Several are compared.",
            metavar="FOLDER",
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report's page to this file.")] = None,
    json: options.Json = False,
) -> None:
    """Print an artifact's report, or write its page again. With several artifacts, compare them."""
    from coreprune._files import whole_file
    from coreprune.artifact.manifest import PAGE
    from coreprune.report import render_runs

    found = [_reported(one) for one in folder]
    if len(found) == 1:
        (data, table, notes), written = found[0], html or folder[0] / PAGE
        if html is not None:
            _write_page(folder[0], data, html)
    else:
        data, notes, written = [one for one, _, _ in found], "", html
        runs = list(zip(_names(folder), data, strict=True))
        table = show.runs_table(runs)
        if html is not None:
            with whole_file(html) as temporary:
                temporary.write_text(render_runs(runs), encoding="utf-8")
    if json:
        sys.stdout.write(json_.dumps(data, indent=1) + "\n")
        return
    console.print(table)
    if notes:
        console.print(notes, soft_wrap=True, highlight=False)
    if written is not None and written.exists():
        console.print(f"report    {written.resolve()}", soft_wrap=True, highlight=False)


def _reported(folder: Path) -> tuple[dict[str, Any], Any, str]:
    """The content of an artifact's report, and what is printed of it. Raises ArtifactError and InputError."""
    from coreprune.artifact.manifest import REPORT, check_file, json_of, read_manifest

    manifest = read_manifest(folder)
    if REPORT not in manifest.files:
        raise InputError(f"{folder} holds no {REPORT}.")
    data = json_of(check_file(folder, REPORT, manifest.files[REPORT]))
    with _of_ours(folder):
        return data, show.result_table(data), show.result_notes(data)


def _write_page(folder: Path, data: dict[str, Any], html: Path) -> None:
    from coreprune._files import whole_file
    from coreprune.artifact.saving import first_images
    from coreprune.queries import Queries
    from coreprune.report import write

    found = _own_queries(folder)
    images = first_images(found.args) if isinstance(found, Queries) else None
    with _of_ours(folder), whole_file(html) as temporary:
        write(data, temporary, images)


@contextmanager
def _of_ours(folder: Path) -> Iterator[None]:
    """Say in our words that a report has another form than ours."""
    from coreprune.artifact.manifest import REPORT

    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        if isinstance(error, CoreprunError):
            raise
        raise ArtifactError(f"{folder / REPORT} is not a report that coreprune wrote ({first_line(error)}).") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """What to call folders: their own names where these differ, else their paths."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


@app.command(
    epilog="Examples:\n\ncoreprune export small --to small.onnx\n\ncoreprune export small --to small.onnx --int8"
)
def export(
    folder: options.Folder,
    to: Annotated[Path, typer.Option(help="The file to write: .onnx, or .pt2 for torch.export.", show_default=False)],
    int8: Annotated[
        bool, typer.Option("--int8", help="With int8 weights (.onnx), compared with the model on held-out queries.")
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="With --int8: static (fixed ranges of activations, for convolutions) or dynamic (ranges of every "
            "batch, for matrix products). By default what the model has more of.",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="With --int8: samples (.npz) or the name of a source. By default the artifact's own, else made ones.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="With --int8: the largest share of held-out queries that may get another answer, by default 0.1. "
            "Without classes: the largest squared error, relative to the variance.",
            show_default=False,
        ),
    ] = None,
    dense: options.Dense = None,
    shape: options.Shapes = None,
    example: options.Example = None,
    weights: options.Weights = None,
    batch_axis: options.BatchAxis = None,
    json: options.Json = False,
) -> None:
    """Export the pruned model to ONNX or torch.export, and compare the outputs with the model's."""
    from coreprune.artifact import export_int8, export_onnx, export_program

    run = {".onnx": export_onnx, ".pt2": export_program}.get(to.suffix)
    if run is None:
        raise InputError(f"--to must end in .onnx or .pt2, not {to.name!r}.")
    more = {"mode": mode, "queries": queries, "tolerance": tolerance}
    given_too = [f"--{name}" for name, value in more.items() if value is not None]
    if given_too and not int8:
        raise InputError(f"{' and '.join(given_too)} {'are' if len(given_too) > 1 else 'is'} for --int8. Add --int8.")
    if int8 and to.suffix != ".onnx":
        raise InputError(f"--int8 writes an ONNX file, so --to must end in .onnx, not {to.name!r}.")
    if queries is not None:
        options.known_queries([queries], "--queries")
    if int8 and queries == "none":
        raise InputError("--queries none: int8 is measured on queries. Pass some (.npz), or a source of them.")
    _, small, given, axis = both(folder, dense, weights, shape, example, batch_axis)
    if int8:
        asked = {name: value for name, value in more.items() if value is not None}
        asked.setdefault("queries", _own_queries(folder))
        with redirect_stdout(sys.stderr):  # the user's source may print
            done = export_int8(small, given, to, batch_axis=axis, **asked)
        measured = done.as_dict()
    else:
        done, measured = run(small, given, to, batch_axis=axis), {}
    if json:
        said = {**measured, "path": str(to.resolve()), "summary": str(done)}
        sys.stdout.write(json_.dumps(said, indent=1) + "\n")
        return
    console.print(str(done), soft_wrap=True, highlight=False)


def _own_queries(folder: Path) -> Any:
    """The queries that an artifact holds, or "auto" if it holds none."""
    from coreprune.artifact.manifest import QUERIES, check_file, read_manifest
    from coreprune.queries import Queries

    entry = read_manifest(folder).files.get(QUERIES)
    return "auto" if entry is None else Queries.load(check_file(folder, QUERIES, entry))


@app.command(epilog="Example: coreprune bench small --batch 1 --batch 32")
def bench(
    folder: options.Folder,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; by default 1 and 32. Repeat for more.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.05, help="Seconds of measurement per model and batch size.")] = 1.0,
    dense: options.Dense = None,
    shape: options.Shapes = None,
    example: options.Example = None,
    weights: options.Weights = None,
    batch_axis: options.BatchAxis = None,
    json: options.Json = False,
) -> None:
    """Measure how long the dense and the pruned model take on this machine."""
    from coreprune.latency import compare_latency

    model, small, given, axis = both(folder, dense, weights, shape, example, batch_axis)
    found = compare_latency(model, small, given, batch_sizes=tuple(batch or (1, 32)), seconds=seconds, batch_axis=axis)
    if json:
        sys.stdout.write(json_.dumps(found.as_dict(), indent=1) + "\n")
        return
    console.print(str(found), soft_wrap=True, highlight=False)


def both(
    folder: Path,
    dense: str | None,
    weights: Path | None,
    shape: list[str] | None,
    example: Path | None,
    batch_axis: list[str] | None,
) -> tuple[nn.Module, nn.Module, Any, Any]:
    """The dense model, the pruned model, an example, and its batch axis.

    The arguments override what the artifact says.
    """
    from coreprune.artifact import load, read_manifest, read_plan

    manifest = read_manifest(folder)
    known = dict(manifest.source)
    place = dense or _named(folder, known.get("source"))
    if dense is None:
        weights = weights or (Path(str(known["weights"])) if "weights" in known else None)
        if shape is None and example is None:
            shape = [str(text) for text in _list(known.get("shape"))]
            example = Path(str(known["example"])) if "example" in known else None
        batch_axis = batch_axis or [str(text) for text in _list(known.get("batch_axis"))]
    described = read_plan(folder, manifest).example
    model, given = source.load(place, weights, list(shape or []), example, described)
    return model, load(folder, model), given, options.batch_axis(batch_axis)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _named(folder: Path, place: Any) -> str:
    """The source that the manifest names. Raises InputError unless it is the user's own code.

    An artifact is data, so it must not name code inside its own folder or in Python's modules, to be run on loading.
    """
    if not isinstance(place, str) or not place:
        raise InputError(f"{folder} does not say where its dense model is. Pass --source package.module:factory.")
    module = place.partition(":")[0]
    inside = [Path(place), Path.cwd().joinpath(*module.split("."))]
    if module.split(".")[0] in sys.stdlib_module_names or any(
        path.resolve().is_relative_to(folder.resolve()) for path in inside
    ):
        raise InputError(
            f"{folder} names {place!r} as its dense model, which is code of Python or of that folder itself. "
            "If you trust it, pass it as --source."
        )
    return place
