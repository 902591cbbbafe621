"""coreprune prune: from a SOURCE to an artifact. A folder beside it keeps the work of an interrupted run."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from coreprune._files import check_place, tidy
from coreprune._mapped import is_mapped
from coreprune._telling import telling
from coreprune._untrained import untrained
from coreprune.cli import libraries, options, processes, show, source
from coreprune.cli.commands import app, console
from coreprune.cli.measuring import Exam, as_figures, measured, reading
from coreprune.cli.unfinished import Unfinished

log = logging.getLogger(__name__)

EPILOG = (
    "Examples:\n\n"
    "coreprune prune models:resnet --shape 1,3,224,224 --macs 0.5 --out small\n\n"
    "coreprune prune ./my-bert --params 0.7 --uniform --exclude '*attention*' --out small-bert\n\n"
    "coreprune prune ./my-llama --params 0.8 --uniform --text my.txt --out small-llama\n\n"
    "coreprune prune models:net --agreement 0.99 --queries images.npz --out small\n\n"
    "coreprune prune models:net --latency 8ms --batch 32 --out small\n\n"
    "coreprune prune models:net --queries images.npz --labelled test.npz --out small --resume"
)


@app.command(epilog=EPILOG)
def prune(
    source_: options.Source,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write. It must be absent or empty, unless --overwrite is given.", show_default=False
        ),
    ],
    macs: Annotated[
        float | None,
        typer.Option(
            help="Share (or number) of multiply-accumulates that may stay; 0.5 if no other limit is given.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(
            help="Share (or number) of parameters that may stay.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    bytes_: Annotated[
        float | None,
        typer.Option(
            "--bytes",
            help="Share (or number) of bytes that may stay.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Share of the channels to keep in every group, e.g. 0.5, or in the groups that match a pattern, "
            "e.g. 'layer1.*=0.8'. Repeat for more patterns. Groups that match none are not pruned.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    absolute: Annotated[
        bool,
        typer.Option(
            "--absolute",
            help="Take --macs, --params or --bytes as a number, also from 1 to 100.",
            rich_help_panel=options.BUDGET,
        ),
    ] = False,
    error: Annotated[
        float | None,
        typer.Option(
            help="Largest predicted error of the outputs, as a share of their variance.", rich_help_panel=options.BUDGET
        ),
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            help="Find the smallest model that gives the same answer on at least this share of inputs, such as 0.99, "
            "shown with probability 1 - delta on samples that are set aside. It needs --queries with many samples.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            help="Time of a call on this machine: a share of the dense model's, e.g. 0.5, or e.g. 8ms.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples per call, for --latency.", rich_help_panel=options.BUDGET)
    ] = 1,
    runtime: Annotated[
        str,
        typer.Option(
            help="What runs the model, for --latency: eager, compile or onnx.", rich_help_panel=options.BUDGET
        ),
    ] = "eager",
    latency_table: Annotated[
        Path | None,
        typer.Option(
            help="File of measured times, for --latency; by default in the user's cache folder.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How channels are chosen: auto, functional, loewner, magnitude, …, or your own selector as "
            "package.module:function. A wrong name lists all.",
            autocompletion=options.methods,
            show_default=True,
            rich_help_panel=options.METHOD,
        ),
    ] = "auto",
    queries: Annotated[
        list[str] | None,
        typer.Option(
            help="auto (the default), the name of a source, your own source as module:function, unlabelled samples "
            "(.npz), the queries.safetensors of an artifact, or none. Repeat the option to combine several, e.g. a few "
            "samples and auto.",
            autocompletion=options.query_sources,
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            help="Equal shares for all groups, and equal widths in equal groups.", rich_help_panel=options.WIDTHS
        ),
    ] = False,
    stock: Annotated[
        bool,
        typer.Option(
            "--stock",
            help="Cut only what the config.json of a Hugging Face model can say; equal widths.",
            rich_help_panel=options.WIDTHS,
        ),
    ] = False,
    round_to: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Round widths to multiples of this; by default 8 in groups of 128 channels or more.",
            rich_help_panel=options.WIDTHS,
        ),
    ] = None,
    min_width: Annotated[
        int,
        typer.Option(
            min=1,
            help="Smallest number of units to keep in every group.",
            rich_help_panel=options.WIDTHS,
        ),
    ] = 1,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Do not prune groups whose name matches this pattern. Repeat for more.", rich_help_panel=options.WIDTHS
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            help="Refit the layers that read pruned channels.",
            rich_help_panel=options.METHOD,
        ),
    ] = True,
    distill: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of distillation on the queries, after the repair.", rich_help_panel=options.METHOD
        ),
    ] = 0,
    n_queries: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of queries; by default all samples, 4096 vectors, or 256 others.",
            rich_help_panel=options.METHOD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of queries and sampling.")] = 0,
    delta: Annotated[
        float,
        typer.Option(
            help="The sampled certificates hold with probability 1 - delta.", rich_help_panel=options.MEASURED
        ),
    ] = 0.01,
    shape: options.Shapes = None,
    also: options.Also = None,
    example: options.Example = None,
    weights: options.Weights = None,
    batch_axis: options.BatchAxis = None,
    part: options.Part = None,
    norm_statistics: options.NormStatistics = False,
    memory: options.Memory = None,
    depth: options.Depth = False,
    residual: options.Residual = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Test samples (.npz with inputs and labels), to measure the accuracy.",
            rich_help_panel=options.MEASURED,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file, to measure the perplexity of a language model. By default a text is made.",
            rich_help_panel=options.MEASURED,
        ),
    ] = None,
    tokenizer: options.Tokenizer = None,
    measure: Annotated[
        bool,
        typer.Option(
            " /--no-latency",
            help="Do not measure seconds per batch before and after on this machine.",
            rich_help_panel=options.MEASURED,
        ),
    ] = True,
    log_: Annotated[
        Path | None,
        typer.Option("--log", help="Append what happens to this file while the run goes on: one JSON object a line."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run: the same command again, with this.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT when the new artifact is complete.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Under torchrun: seconds that the processes wait for each other.")
    ] = 1800,
    json: options.Json = False,
) -> None:
    """Prune a model, and write a folder with its weights, the plan, certificates and a report.

    Under torchrun all processes share the work, and the first one writes.
    """
    from coreprune import _ranks
    from coreprune.artifact import save
    from coreprune.pruning import Budget
    from coreprune.pruning import prune as run

    limits = {"macs": macs, "params": params, "bytes": bytes_, "keep": options.keeps(keep), "error": error}
    limits["agreement"] = agreement
    limits["latency"] = options.latency(latency)
    rules = {"uniform": uniform, "round_to": round_to, "min_width": min_width, "absolute": absolute}
    rules |= {"batch": batch, "runtime": runtime, "table": latency_table}
    budget = Budget(**options.one_budget(limits), **rules)
    axis = options.batch_axis(batch_axis)
    specs, chosen = options.known_queries(queries or ["auto"]), options.known_method(method)
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        first = stack.enter_context(processes.joined(timeout))
        unfinished = Unfinished(out)
        if first:
            unfinished = Unfinished.beside(out, resume, overwrite)
            tidy(out)
            check_place(out, overwrite)
            stack.enter_context(unfinished.explained(out))
        # What the user's code prints goes to standard error, so that standard output stays clean for --json.
        stack.enter_context(redirect_stdout(sys.stderr))
        tell = stack.enter_context(telling(first, log_ if first else None))
        model, given = source.load(source_, weights, shape or [], example)
        if first and untrained(model):
            log.warning(
                "the weights look as initialisation draws them: no training shows in any of them. What is pruned from "
                "random weights is worth nothing. Load the trained ones: --weights FILE, or inside of the factory."
            )
        words = libraries.tokenizer(tokenizer, source_)
        read = reading(model, given, text, words, seed, axis) if first else None
        exam = Exam.of(model, given, labelled, tell, axis) if first and labelled is not None else None
        spec = _ranks.from_first(
            "the queries", lambda: source.queries(specs, model, given, seed, unfinished.queries, tell, axis, words)
        )
        mapped = any(map(is_mapped, model.parameters()))
        result = run(
            model, given, budget, chosen, queries=spec, n_queries=n_queries, exclude=tuple(exclude or ()),
            repair=repair, distill=distill, seed=seed, delta=delta, cache=unfinished.queries,
            checkpoint=unfinished.distill if distill else None, progress=tell, batch_axis=axis,
            also=source.further(also), part=part, norm_statistics=norm_statistics, tokenizer=words, memory=memory,
            depth=depth, stock=stock, residual=residual,  # type: ignore[arg-type]
            resume=unfinished.folder if not depth and not residual and mapped else None,
        )  # fmt: skip
        if not first:
            return
        extra = measured(model, result.model, given, exam, measure, result.report.macs, tell, axis, read)
        tell.note("measured", **as_figures(extra))
        found_by = {
            "source": source_,
            "weights": weights and str(weights),
            "shape": shape,
            "example": example and str(example),
            "batch_axis": batch_axis,
            "tokenizer": tokenizer and str(tokenizer),
        }
        save(result, out, overwrite=overwrite, extra=extra, source={k: v for k, v in found_by.items() if v})
    unfinished.done()
    if json:
        sys.stdout.write((out / "report.json").read_text(encoding="utf-8") + "\n")
        return
    data = result.report.as_dict() | extra
    console.print(show.result_table(data))
    console.print(show.result_notes(data), soft_wrap=True, highlight=False)
    console.print(f"artifact  {out}", soft_wrap=True, highlight=False)
    if (page := out / "report.html").exists():
        console.print(f"report    {page}", soft_wrap=True, highlight=False)
