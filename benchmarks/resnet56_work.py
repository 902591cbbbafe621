"""What one cell of the ResNet-56 experiment does, in a process of its own: prune, measure, test, fine-tune."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from children import Row, measured
from cifar import SIDE, Augmented, normalised, pictures, predictions, trained
from coreprune import Budget, prune
from coreprune.finetune import Tuning, fine_tune_
from resnet56_cells import BOTH, IMAGES, MANY, MORE, PEER, Cell, untuned

TRAIN, TEST = 15_000, 10_000


@dataclass(frozen=True)
class Setup:
    """How large the experiment is. The first `certify` test images, without their labels, are for the agreement bound
    (confidence 1 − delta); the agreement itself is measured on the others."""

    data: str
    cache: str
    threads: int = 2
    test: int = TEST
    certify: int = 2_000
    delta: float = 0.01
    queries: int = 256
    train: int = TRAIN
    device: str = "cpu"


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning, the same for every network: `fine_tune_` with crops and flips.

    lr (of 3e-4, 1e-3, 3e-3) and the teacher were chosen on 2,000 held-out training images, after one epoch from
    Torch-Pruning's L2 norm at 35 %: 82.1, 85.2, 84.0 %, and 84.2 % at 1e-3 without the teacher. No test image was seen.
    """

    epochs: int = 1
    batch_size: int = 128
    lr: float = 1e-3
    teacher: bool = True


def work(job: Row) -> Row:
    """One row. job: {"cell": fields of Cell, "setup": fields of Setup}."""
    cell, setup = Cell(**job["cell"]), Setup(**job["setup"])
    torch.set_num_threads(setup.threads)
    if cell.tuned:
        return fine_tuned(cell, setup)
    if cell.kind == "queries":
        _queries_file(cell, setup).unlink(missing_ok=True)
        return measured(lambda: queries(cell, setup))[1]
    if cell.kind == "dense":
        return tested(network(setup), setup)
    model, row = pruned(cell, setup)
    saved = _place(cell, setup)
    saved.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model, saved)  # for the cell that fine-tunes it
    return row | tested(model, setup)


def network(setup: Setup) -> nn.Module:
    """The trained network, where the experiment runs."""
    return trained(Path(setup.data)).to(setup.device)


def example(device: str | torch.device = "cpu") -> Tensor:
    return torch.zeros(1, 3, SIDE, SIDE, device=device)


def queries(cell: Cell, setup: Setup) -> Any:
    """Made once per seed and kept in a file, unlabelled training images, drawn with the seed, or both together."""
    from coreprune.queries import make_queries

    generator, given = torch.Generator().manual_seed(cell.seed), None
    model, first = network(setup), example(setup.device)
    if cell.source in (IMAGES, BOTH):
        rows = torch.randperm(TRAIN, generator=generator)[: setup.queries].tolist()
        images = normalised(pictures(Path(setup.data), "train", rows)[0]).to(setup.device)
        given = make_queries(model, first, images, seed=generator)
        if cell.source == IMAGES:
            return given
    place = _queries_file(cell, setup)
    place.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(cell.seed)
    made = make_queries(model, first, "auto", n=_made(cell, setup), seed=generator, cache=place)
    return made if given is None else given + made


def pruned(cell: Cell, setup: Setup) -> tuple[nn.Module, Row]:
    """The pruned network, and what it took."""
    whole = network(setup)
    if cell.method.startswith(PEER):
        (model, settings), cost = measured(lambda: peer(whole, cell))
        return model, {"settings": settings, **sizes(model, whole), **cost}
    given = queries(cell, setup)
    result, cost = measured(
        lambda: prune(
            whole,
            example(setup.device),
            Budget(macs=cell.share),
            method=cell.method,
            queries=given,
            repair=cell.repair,
            distill=cell.distill,
            seed=cell.seed,
        )
    )
    settings = result.report.settings.as_dict()
    seconds = dict(result.report.seconds) or {"total": cost["wall_s"]}
    row = {"seconds": seconds, **cost, **sizes(result.model, whole), "settings": settings}
    row["widths"] = {g.name: g.kept for g in result.report.groups if g.locked_because is None}
    stated = getattr(result.report, "agreement", None)  # what the library itself says, on queries of its own
    return result.model, row if stated is None else row | {"report_agreement": _plain(stated)}


def sizes(model: nn.Module, dense: nn.Module) -> Row:
    """Shares of the dense network's multiply-accumulates and parameters."""
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, dense)]
    return {"macs": round(macs(model) / macs(dense), 5), "parameters": round(counts[0] / counts[1], 5)}


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example(next(model.parameters()).device))
    return counter.get_total_flops() // 2


def peer(dense: nn.Module, cell: Cell) -> tuple[nn.Module, Row]:
    """Torch-Pruning's smallest network with at least the share of the multiply-accumulates.

    Out of the box ("whole": the layer that makes the output ignored, as its README says) it also narrows the residual
    stream; "inner" has all but the first convolution of every block ignored. All else is its default.
    """
    import torch_pruning as tp

    _, importance, scope, part = cell.method.split()
    rate = {
        "L2": (tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance, {"p": 2}),
        "BN-scale": (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance, {}),
    }[importance]

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        inner = [name for name in layers if name.startswith("layer") and name.endswith(".conv1")]
        ignored = [m for name, m in layers.items() if (name == "linear" if part == "whole" else name not in inner)]
        kind, scorer, options = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind(
                model,
                example(next(model.parameters()).device),
                importance=scorer(**options),
                global_pruning=scope == "global",
                pruning_ratio=ratio,
                ignored_layers=ignored,
            ).step()
        return model

    low, high, wanted = 0.0, 1.0, cell.share * macs(dense)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_least(lambda r=middle: at(r), wanted) else (low, middle)
    settings = {
        "version": version("torch-pruning"),
        "pruner": rate[0].__name__,
        "importance": f"{rate[1].__name__}({', '.join(f'{k}={v}' for k, v in rate[2].items())})",
        "global_pruning": scope == "global",
        "pruning_ratio": low,
        "ignored_layers": "the last layer" if part == "whole" else "all but the first convolution of every block",
    }
    return at(low), settings


def _at_least(make: Callable[[], nn.Module], wanted: float) -> bool:
    """Whether that network runs and is no smaller; ratios near 1 may leave nothing."""
    try:
        return macs(make()) >= wanted
    except Exception:
        return False


def tested(model: nn.Module, setup: Setup) -> Row:
    """Accuracy on the test images, and how often the answer is the dense network's. Each network is tested once."""
    state = b"".join(name.encode() + t.cpu().numpy().tobytes() for name, t in model.state_dict().items())
    network = hashlib.sha256(state).hexdigest()[:16]
    known = Path(setup.cache) / f"tested-{setup.test}-{network}.json"
    if known.exists():
        return json.loads(known.read_text())
    images, labels = pictures(Path(setup.data), "test", range(setup.test))
    answers = predictions(model, images.to(setup.device)).cpu()
    row: Row = {"network": network, "accuracy": round(100 * float((answers == labels).double().mean()), 2)}
    same = answers == dense_answers(images, setup)
    n = min(setup.certify, setup.test // 2)
    agreeing = int(same[:n].sum())
    row["agreement"] = {
        "at_least": round(100 * agreement_bound(agreeing, n, setup.delta), 2),
        "on": n,
        "delta": setup.delta,
        "measured": round(100 * float(same[n:].double().mean()), 2),
        "measured_on": setup.test - n,
    }
    _write(known, json.dumps(row).encode())
    return row


def dense_answers(images: Tensor, setup: Setup) -> Tensor:
    """The dense network's classes of the test images, computed once."""
    known = Path(setup.cache) / f"dense-{setup.test}.json"
    if not known.exists():
        _write(known, json.dumps(predictions(network(setup), images.to(setup.device)).tolist()).encode())
    return torch.tensor(json.loads(known.read_text()))


def agreement_bound(agreeing: int, n: int, delta: float) -> float:
    """T11: the one-sided Clopper–Pearson bound, which holds with probability 1 − delta over the n images."""
    return float(stats.beta.ppf(delta, agreeing, n - agreeing + 1)) if agreeing else 0.0


def fine_tuned(cell: Cell, setup: Setup) -> Row:
    """Labelled images, for the first time: the pruned network before and after a few epochs on them."""
    folder, start, saved = Path(setup.data), untuned(cell), _place(untuned(cell), setup)
    if cell.kind == "dense":
        model, row = network(setup), {}
    elif saved.exists():
        model = torch.load(saved, weights_only=False, map_location=setup.device)  # our own file
        row = sizes(model, network(setup))
    else:
        model, row = pruned(start, setup)
    before = tested(model, setup)["accuracy"]
    recipe = Recipe()
    generator = torch.Generator().manual_seed(1000 + cell.seed)
    batches = Augmented(*pictures(folder, "train", range(setup.train)), recipe.batch_size, generator)
    teacher = network(setup) if recipe.teacher else None
    _, cost = measured(lambda: fine_tune_(model, batches, Tuning(recipe.epochs, recipe.lr), teacher=teacher))
    return {
        **{name: row[name] for name in ("macs", "parameters") if name in row},
        "before": before,
        **tested(model, setup),
        "fine_tune_s": cost["wall_s"],
        "recipe": asdict(recipe),
    }


def _queries_file(cell: Cell, setup: Setup) -> Path:
    return Path(setup.cache) / f"queries-{_made(cell, setup)}-{cell.seed}.safetensors"


def _made(cell: Cell, setup: Setup) -> int:
    """How many queries are made without data."""
    return setup.queries * (MANY if cell.source == MORE else 1)


def _place(cell: Cell, setup: Setup) -> Path:
    name = cell.key.replace("/", "-").replace(" ", "_")
    return Path(setup.cache) / f"{name}.pt"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, for two processes that want the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)


def _plain(value: Any) -> Any:
    """A value of the report, for JSON."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return vars(value) if hasattr(value, "__dict__") else value
