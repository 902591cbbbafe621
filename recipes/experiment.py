"""What all recipes do: prune with some selectors, once or in rounds, fine-tune with labels and a teacher, compare.

Every combination of selector, share and seed is one line of results.jsonl, so that an interrupted run goes on where it
stopped; its training can also be followed in TensorBoard, where that is installed. With torchrun, every process has a
part of the batches.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from coreprune import Budget, Tuning, fine_tune_, prune
from coreprune.errors import CoreprunError
from coreprune.selectors import SELECTORS

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the data and networks of the benchmarks


@dataclass(frozen=True)
class Task:
    """A network and its data.

    dense: trained, in evaluation mode. example: one input. batches: of the training data; made anew for every run from
    its seed. test: the accuracy of a model as a share. tuning: of one round. queries: unlabelled inputs for what reads
    them; None to make them without data. reported: what the paper says of it, in words.
    """

    name: str
    dense: nn.Module
    example: Tensor
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    test: Callable[[nn.Module], float]
    tuning: Tuning
    queries: Tensor | None = None
    reported: str = ""


def parser(doc: str | None, methods: tuple[str, ...], shares: tuple[float, ...]) -> argparse.ArgumentParser:
    """The options that all recipes have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help="folder with the data")
    made.add_argument("--out", type=Path, default=Path("results"), help="folder for results and logs")
    made.add_argument("--methods", nargs="+", default=list(methods), help=f"of {', '.join(sorted(SELECTORS))}")
    made.add_argument("--shares", nargs="+", type=float, default=list(shares), help="of the MACs that stay")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--rounds", type=int, default=1, help="prune and train in so many steps")
    made.add_argument("--epochs", type=int, help="of each round; this and the next three: the recipe's own by default")
    made.add_argument("--lr", type=float, help="highest learning rate")
    made.add_argument("--soft", type=float, help="weight of the dense network's answers against the labels, 0 to 1")
    made.add_argument("--temperature", type=float, help="that softens those answers")
    made.add_argument(
        "--repair", choices=("own", "all", "none"), default="own", help="own: functional alone is repaired"
    )
    made.add_argument("--toy", action="store_true", help="tiny data and networks: whether everything runs")
    return made


def run(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations that are not in results.jsonl yet. Prints the table, and returns its rows."""
    if unknown := [name for name in options.methods if name not in SELECTORS]:
        raise SystemExit(f"no selector is called {', '.join(unknown)}. Known: {', '.join(sorted(SELECTORS))}.")
    if options.rounds < 1 or not all(0 < share < 1 for share in options.shares):
        raise SystemExit("--rounds must be at least 1, and --shares must lie between 0 and 1.")
    console, path = Console(highlight=False), options.out / "results.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["key"] for row in rows}
    before, given = task.test(task.dense), _given(options)
    task = replace(task, tuning=replace(task.tuning, **given))
    other = "".join(f"/{name} {value:g}" for name, value in given.items())
    for seed in range(options.seeds):
        for share in options.shares:
            for method in options.methods:
                key = f"{task.name}/{method}/{share:g}/{options.rounds} rounds/seed {seed}{other}"
                if key in done:
                    continue
                row = {"key": key, "method": method, "share": share, "seed": seed, "rounds": options.rounds, **given}
                rows.append({**row, "dense": before, **_one(task, method, share, seed, options, key)})
                if _first():
                    with path.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    console.print(f"{key}: {rows[-1]['pruned']:.2%} pruned, {rows[-1]['tuned']:.2%} tuned")
    if _first():
        console.print(table(task, rows))
    return rows


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the training."""
    found = {name: getattr(options, name) for name in ("epochs", "lr", "soft", "temperature")}
    return {name: value for name, value in found.items() if value is not None}


def _one(task: Task, method: str, share: float, seed: int, options: argparse.Namespace, key: str) -> dict[str, Any]:
    """Prune and train, in rounds. Each round leaves the same share of what the one before has left."""
    start, model, pruned = time.perf_counter(), copy.deepcopy(task.dense), 0.0
    repaired = options.repair == "all" or (options.repair == "own" and method == "functional")
    asked: dict[str, Any] = {"queries": None, "repair": False}
    if repaired or getattr(SELECTORS[method], "reads", True):
        asked = {"queries": "auto" if task.queries is None else task.queries, "repair": repaired}
    for i in range(options.rounds):
        torch.manual_seed(seed)
        budget = Budget(macs=share ** (1 / options.rounds))
        # The queries of the dense network serve all selectors and shares; those of later rounds do not.
        cache = None if i else options.out / f"queries-seed{seed}.safetensors"
        model = prune(model, task.example, budget, method, seed=seed + i, cache=cache, **asked).model
        pruned = task.test(model)
        name = "-".join([*key.replace(" ", "").split("/"), str(i)])
        epochs = _tuned(task, model, seed, options.out / name)
        _board(options.out / "tensorboard" / name, epochs)
    tuned = epochs[-1]["validation"] if epochs else task.test(model)  # none, where a checkpoint had all of them
    seconds = round(time.perf_counter() - start, 1)
    return {"pruned": pruned, "tuned": tuned, "epochs": options.rounds * task.tuning.epochs, "seconds": seconds}


def _tuned(task: Task, model: nn.Module, seed: int, place: Path) -> list[dict[str, float]]:
    """Train a model in place. place: of its checkpoint and its log, without their endings."""
    with Progress(transient=True) as bar:
        part = bar.add_task(place.name)
        return fine_tune_(
            _parallel(model),
            task.batches(seed),
            task.tuning,
            teacher=task.dense,
            validate=lambda _: task.test(model),
            checkpoint=place.with_name(f"{place.name}.safetensors"),
            log=place.with_name(f"{place.name}.jsonl"),
            progress=lambda _, done, total: bar.update(part, completed=done, total=total),
        )


def _parallel(model: nn.Module) -> nn.Module:
    """The model for a process of torchrun."""
    if not torch.distributed.is_initialized():
        return model
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def start_process_group() -> torch.device:
    """The device of this process, which torchrun may have started."""
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def _board(folder: Path, rows: list[dict[str, float]]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    if _first():
        with SummaryWriter(str(folder)) as writer:
            for step, row in enumerate(rows):
                for name in ("loss", "lr", "validation"):
                    writer.add_scalar(name, row[name], step)


def table(task: Task, rows: list[dict[str, Any]]) -> Table:
    """Mean and deviation over the seeds of accuracies in per cent, and what the paper reports.

    Rows of other training, or of other numbers of rounds, stand apart.
    """
    made = Table(title=f"{task.name}: dense {rows[0]['dense']:.2%}" if rows else task.name, title_justify="left")
    for name in ("selector", "MACs", "pruned", "tuned", "seeds"):
        made.add_column(name, justify="left" if name == "selector" else "right")
    alike: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((-row["share"], _label(row)), []).append(row)
    for (share, method), group in sorted(alike.items()):
        cells = [_spread([row[name] for row in group]) for name in ("pruned", "tuned")]
        made.add_row(method, f"{-share:.0%}", *cells, str(len(group)))
    made.caption = f"The paper reports: {task.reported}" if task.reported else None
    return made


def _label(row: dict[str, Any]) -> str:
    """The selector, and what was not the recipe's own."""
    rounds = {"rounds": row["rounds"]} if row["rounds"] > 1 else {}
    other = {name: row[name] for name in ("epochs", "lr", "soft", "temperature") if f"/{name} " in row["key"]}
    return ", ".join([row["method"], *(f"{name} {value:g}" for name, value in (rounds | other).items())])


def _spread(values: list[float]) -> str:
    found = torch.tensor(values, dtype=torch.float64) * 100
    return f"{found.mean():.2f}" + (f" ± {found.std():.2f}" if len(values) > 1 else "")


def main(recipe: Callable[[argparse.Namespace], Task], options: argparse.Namespace) -> None:
    """Run a recipe from the command line."""
    try:
        run(recipe(options), options)
    except CoreprunError as error:
        raise SystemExit(str(error)) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
