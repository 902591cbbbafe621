"""Which architectures can be pruned, how much of them, and whether the result is right; beside Torch-Pruning.

    make zoo                      # an environment with torchvision, timm, ultralytics and segmentation-models-pytorch
    python benchmarks/zoo.py [--only REGEX] [--threads 2]

For every model: groups, how many are free, why the others are locked, the share of multiply-accumulates that can go,
the seconds that `list_groups` takes for it. Then half of the units of every free group is removed at random, and the
result is compared in float64, on fresh random inputs of other batch and spatial sizes, with the original in which the
weights that read a removed channel are zero. That original is made by the oracle of the tests, which uses no code of
coreprune but the description of the groups. Groups that are also read without a weight have no such original: they stay
whole in the comparison, and are counted. The pruned model also runs in training mode where the original does.

Torch-Pruning is called as its README does (MagnitudePruner, half of the channels, layers that make the output ignored,
at most 60 s) on the same models in float32, and its result is compared with the same kind of original.

Every row runs in a process of its own and is appended to a journal, so that an interrupted run goes on where it
stopped. Writes results/zoo.json, from which benchmarks/page.py makes docs/architectures.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", "/tmp")

import torch
from torch import nn

from children import Row
from coreprune import list_groups
from coreprune.graph import CostModel, Group, Traced, remove
from coreprune.pruning.tracing import trace
from table import run
from zoo_models import Inputs, Model, models
from zoo_peer import first_line, outputs, peer

PACKAGES = ("transformers", "torchvision", "timm", "ultralytics", "segmentation-models-pytorch", "torch-pruning")


def prepared(model: Model) -> nn.Module:
    """The model in float64, with random numbers at which no term can hide."""
    from graph.zoo import randomise

    torch.manual_seed(0)
    built = randomise(model.build())
    for part in built.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False
    return built


def ours(model: nn.Module, inputs: list[Inputs]) -> Row:
    """What coreprune finds in one model, and whether half of it leaves without a trace."""
    from graph.oracle import random_halves

    list_groups(nn.Linear(2, 2), torch.zeros(1, 2))  # what torch loads once does not count
    start = time.perf_counter()
    traced = trace(model, example(inputs[0]), lambda *_: None)
    seconds = time.perf_counter() - start
    costs = CostModel(traced.captured, traced.groups)
    keep = random_halves(list(traced.groups), torch.Generator().manual_seed(0))
    row: Row = {
        "nodes": len(traced.captured.graph.graph.nodes),
        "parameters": int(costs().params),
        "macs": int(costs().macs),
        "groups": len(traced.groups),
        "free": len(traced.free),
        "free_share_macs": round(costs.free_share(), 4),
        "locked": _reasons(list(traced.groups)),
        "list_s": round(seconds, 2),
        "params_removed": round(1 - costs({n: len(k) for n, k in keep.items()}).params / costs().params, 4),
    }
    odd = [g.name for g in traced.groups if g.name in keep and any(not c.slices for c in g.consumers)]
    for name in odd:
        del keep[name]
    row |= {"read_without_weight": len(odd), "plain": len(traced.plain), **_compared(traced, keep, inputs)}
    if traced.plain and not _same(model.eval(), traced.model.eval(), inputs):
        row |= {"equal": False, "why": "the copy with plain weights computes something else"}
    return row


def example(inputs: Inputs) -> Any:
    """Inputs as prune() takes them: a tuple, or a dict by name."""
    args, kwargs = inputs
    if args and kwargs:
        raise ValueError("the model gets arguments by position and by name")
    return kwargs or args


def _same(model: nn.Module, other: nn.Module, inputs: list[Inputs]) -> bool:
    from graph.oracle import assert_same

    for x in inputs:
        with contextlib.suppress(Exception):  # not every model takes other sizes
            want = outputs(model, x)
            try:
                assert_same(outputs(other, x), want)
            except AssertionError:
                return False
    return True


def _reasons(groups: list[Group]) -> dict[str, int]:
    """Why groups are locked, and how many."""
    reasons = [g.locked_because for g in groups if g.locked_because]
    return dict(collections.Counter(re.sub(r" \([a-z_0-9]+\)", "", reason).split(":")[0] for reason in reasons))


def _compared(traced: Traced, keep: dict[str, Any], inputs: list[Inputs]) -> Row:
    """Half of the groups removed: whether the outputs are those of the original that reads zeros."""
    from graph.oracle import assert_same, zeroed_original

    if not keep:
        return {"equal": None, "compared_at": 0}
    start = time.perf_counter()
    result = remove(traced, keep)
    row: Row = {"remove_s": round(time.perf_counter() - start, 2), "put_back": result.locked}
    zeros = zeroed_original(traced.model, list(traced.groups), result.kept)
    compared, equal, why = 0, True, ""
    for x in inputs:
        with contextlib.suppress(Exception):  # not every model takes other sizes
            want = outputs(zeros, x)
            compared += 1
            try:
                assert_same(outputs(result.model, x), want)
            except Exception as error:
                equal, why = False, first_line(error)
    trains = True
    try:
        outputs(zeros.train(), inputs[0])
    except Exception:
        trains = False
    if trains:
        try:
            outputs(result.model.train(), inputs[0])
        except Exception as error:
            equal, why = False, f"in training mode: {first_line(error)}"
    return {**row, "equal": equal, "why": why, "compared_at": compared, "trains": trains}


def work(job: Row) -> Row:
    """One row. job: the key of the model."""
    torch.set_num_threads(job["threads"])
    model = next(m for m in models() if m.key == job["key"])
    row: Row = {}
    try:
        row["coreprune"] = ours(prepared(model), model.inputs())
    except Exception as error:
        row["coreprune"] = {"error": first_line(error)}
    row["torch_pruning"] = peer(lambda: prepared(model), model.inputs())
    return row


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:  # noqa: ARG001 (the runner calls it)
    for model in models():
        yield model.key, {"key": model.key, "package": model.package, "architecture": model.name}


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=PACKAGES, limit=900)
