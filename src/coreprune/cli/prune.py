"""coreprune prune: from a SOURCE to an artifact, with a folder for what an interrupted run has done so far."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from coreprune.cli import options, show, source
from coreprune.cli.app import app, console, errors
from coreprune.errors import ArtifactError, InputError

EPILOG = (
    "Examples:\n\n"
    "coreprune prune models:resnet --shape 1,3,224,224 --macs 0.5 --out small\n\n"
    "coreprune prune ./my-bert --params 0.7 --uniform --exclude '*attention*' --out small-bert\n\n"
    "coreprune prune models:net --queries images.npz --labelled test.npz --out small --resume"
)


@dataclass(frozen=True)
class Unfinished:
    """The folder beside OUT that holds the queries and the state of the polish until OUT is there."""

    folder: Path

    @classmethod
    def beside(cls, out: Path, resume: bool) -> Unfinished:
        """Refuse to throw away what an interrupted run did, unless told to go on with it."""
        folder = out.parent / f".{out.name}.unfinished"
        if os.path.exists(folder) and not resume:  # where we may not look, `check_place` says so
            raise ArtifactError(
                f"an earlier run that did not end left {folder}. Add --resume to go on with it, or delete that folder."
            )
        return cls(folder)

    @property
    def queries(self) -> Path:
        """Finished batches of queries."""
        return self.folder / "queries.safetensors"

    @property
    def polish(self) -> Path:
        """State of the training."""
        return self.folder / "polish.safetensors"

    def done(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder, ignore_errors=True)


@app.command(epilog=EPILOG)
def prune(
    source_: options.Source,
    out: Annotated[Path, typer.Option(help="Folder of the artifact; it must be absent or empty.", show_default=False)],
    macs: Annotated[float | None, typer.Option(help="Share (or number) of multiply-accumulates that may stay.")] = None,
    params: Annotated[float | None, typer.Option(help="Share (or number) of parameters that may stay.")] = None,
    bytes_: Annotated[float | None, typer.Option("--bytes", help="Share (or number) of bytes that may stay.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the channels of every group that stays.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Predicted error of the outputs, share of their variance.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Selector.", autocompletion=options.methods, show_default=True)
    ] = "functional",
    queries: Annotated[
        list[str] | None,
        typer.Option(
            help="auto (the default), a source of inputs, unlabelled samples (.npz), the queries.safetensors of an "
            "artifact, or none. Repeat to put several together, e.g. a few samples and auto.",
            autocompletion=options.query_sources,
        ),
    ] = None,
    uniform: Annotated[bool, typer.Option(help="The same share, and for alike groups the same width.")] = False,
    round_to: Annotated[
        int | None, typer.Option(min=1, help="Widths are multiples of this; chosen per device.")
    ] = None,
    min_width: Annotated[int, typer.Option(min=1, help="Units that stay in every group.")] = 1,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of groups that stay whole. Repeat for more.")
    ] = None,
    repair: Annotated[bool, typer.Option(help="Refit what reads pruned channels.")] = True,
    distill: Annotated[int, typer.Option(min=0, help="Steps of polish on the queries after the repair.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of queries and sampling.")] = 0,
    shape: options.Shapes = None,
    example: options.Example = None,
    weights: options.Weights = None,
    labelled: Annotated[
        Path | None, typer.Option(help="Test samples (.npz with inputs and labels): accuracy before and after.")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure seconds per batch before and after on this machine.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new artifact is done.")] = False,
    json: options.Json = False,
) -> None:
    """Prune a model, and write it as a folder with weights, plan, certificates and a report."""
    from coreprune._files import check_place, tidy
    from coreprune.artifact import save
    from coreprune.pruning import Budget
    from coreprune.pruning import prune as run

    limit = options.one_budget({"macs": macs, "params": params, "bytes": bytes_, "keep": keep, "error": error})
    budget = Budget(**limit, uniform=uniform, round_to=round_to, min_width=min_width)  # pyright: ignore[reportArgumentType]
    out = Path(os.path.realpath(out))
    unfinished = Unfinished.beside(out, resume)
    tidy(out)
    check_place(out, overwrite)
    tests = None if labelled is None else source.labelled(labelled)
    model, given = source.load(source_, weights, shape or [], example)
    try:
        with show.progress(errors) as tell:
            spec = source.queries(queries or ["auto"], model, given, seed, unfinished.queries, tell)
            result = run(
                model, given, budget, method, queries=spec, repair=repair, distill=distill, seed=seed,
                exclude=tuple(exclude or ()), cache=unfinished.queries, checkpoint=unfinished.polish, progress=tell,
            )  # fmt: skip
            extra = measured(model, result.model, given, tests, latency, result.report.macs, tell)
    except KeyboardInterrupt:
        kept = (
            f" What was made so far is in {unfinished.folder}; --resume goes on." if unfinished.folder.exists() else ""
        )
        errors.print(f"interrupted. {out} was not written.{kept}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    found_by = {
        "source": source_,
        "weights": weights and str(weights),
        "shape": shape,
        "example": example and str(example),
    }
    save(result, out, overwrite=overwrite, extra=extra, source={k: v for k, v in found_by.items() if v})
    unfinished.done()
    if json:
        sys.stdout.write((out / "report.json").read_text(encoding="utf-8") + "\n")
        return
    console.print(show.result_table(result.report.as_dict() | extra))
    console.print(show.result_notes(result.report), soft_wrap=True, highlight=False)
    console.print(
        f"artifact  {out.resolve()}\nreport    {(out / 'report.html').resolve()}", soft_wrap=True, highlight=False
    )


def measured(
    model: nn.Module,
    small: nn.Module,
    given: Any,
    tests: Any,
    latency: bool,
    macs: tuple[int, int],
    tell: show.Tell,
) -> dict[str, Any]:
    """Entries of the report that are measured: accuracy on labelled samples, seconds per batch."""
    from coreprune.latency import compare_latency

    found: dict[str, Any] = {}
    if tests is not None:
        inputs, labels = tests
        tell("accuracy", 0, 2)
        before = accuracy(model, given, inputs, labels)
        tell("accuracy", 1, 2)
        after = accuracy(small, given, inputs, labels)
        tell("accuracy", 2, 2)
        found["accuracy"] = {"before": before, "after": after, "samples": len(labels)}
    if latency:
        tell("latency", 0, 1)
        found["latency"] = compare_latency(model, small, given, macs=macs).as_dict()
        tell("latency", 1, 1)
    return found


def accuracy(model: nn.Module, given: Any, inputs: Any, labels: Any) -> float:
    """Share of the samples whose highest score is their label. Raises InputError where there are no such scores."""
    import torch

    from coreprune._example import quiet
    from coreprune.pruning.evidence import first_tensor
    from coreprune.queries import make_queries

    samples = make_queries(model, given, inputs, generator=torch.Generator().manual_seed(0))
    right = at = 0
    with quiet(model):
        for args, kwargs in samples.blocks(64):
            scores = first_tensor(model(*args, **kwargs))
            if scores is None or scores.dim() != 2:
                raise InputError("--labelled needs a model that returns scores of shape (samples, classes).")
            said = scores.argmax(dim=1).cpu()
            right += int((said == labels[at : at + len(said)]).sum())
            at += len(said)
    return right / at
