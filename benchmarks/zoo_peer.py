"""Torch-Pruning on a model of the zoo, called as its README does, and whether what it returns is right.

Right means the same as for ours: equal to the original in which the removed channels are read as zeros. Which inputs of
which layers it removes is written down while it works.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune.graph import capture, find_groups
from zoo_models import Inputs

_SECONDS = 60
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TOLERANCE = 1e-3  # of float32, relative to the largest output


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the body takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no result after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    """The error as one short line."""
    lines = [x for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating-point outputs."""
    result = model(*inputs[0], **inputs[1])
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def peer(build: Callable[[], nn.Module], inputs: list[Inputs]) -> dict[str, Any]:
    """Its status: ok, wrong values, wrong output, broken model, error, nothing removed or not installed."""
    try:
        import torch_pruning as tp
    except ImportError:
        return {"status": "not installed"}
    try:
        model = build().float()
        inputs = pytree.tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
        zeros, before = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
        with time_limit(_SECONDS):
            args, kwargs = inputs[1]
            pruner = tp.pruner.MagnitudePruner(
                model,
                kwargs or args,
                importance=tp.importance.MagnitudeImportance(),
                pruning_ratio=0.5,
                ignored_layers=_output_layers(model, inputs[0]),
            )
            unclear = _prune(pruner, model, zeros)
    except Exception as error:
        return {"status": "error", "detail": first_line(error)}
    after = sum(p.numel() for p in model.parameters())
    if after == before:
        return {"status": "nothing removed"}
    found: dict[str, Any] = {"params_removed": round(1 - after / before, 4)}
    try:
        pairs = [(outputs(model, x), outputs(zeros, x)) for x in inputs]
    except Exception as error:
        return {**found, "status": "broken model", "detail": first_line(error)}
    for got, want in pairs:
        if [t.shape for t in got] != [t.shape for t in want]:
            shapes = f"{[tuple(t.shape) for t in want]} became {[tuple(t.shape) for t in got]}"
            return {**found, "status": "wrong output", "detail": shapes[:160]}
        off = max(
            (float((a - b).abs().max()) / max(1e-3, float(b.abs().max())) for a, b in zip(got, want, strict=True))
        )
        if not off <= _TOLERANCE:
            return {**found, "status": "wrong values", "detail": f"off by {off:.0%} of the largest{unclear}"}
    return {**found, "status": "ok"}


def _output_layers(model: nn.Module, example: Inputs) -> list[nn.Module]:
    """The layers that make the model's output; both tools have to leave those alone."""
    captured = capture(model, example[0], example[1])
    made = {
        s.param
        for g in find_groups(captured)
        if g.locked_because and ("model output" in g.locked_because or "looked up" in g.locked_because)
        for s in g.producers
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    return [modules[alias.rpartition(".")[0]] for alias, name in captured.aliases.items() if name in made]


def _prune(pruner: Any, model: nn.Module, zeros: nn.Module) -> str:
    """Prune, and put zeros where the original reads what is removed. Returns what may make the two differ."""
    names = {id(m): name for name, m in model.named_modules()}
    left: dict[str, list[int]] = {}
    norms = False
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            layer = dep.target.module
            norms |= isinstance(layer, (nn.LayerNorm, nn.GroupNorm))
            if not isinstance(layer, _READERS) or dep.handler.__name__ != "prune_in_channels":
                continue
            name = names[id(layer)]
            weight = zeros.get_submodule(name).get_parameter("weight")
            here = left.setdefault(name, list(range(weight.shape[1])))
            gone = sorted({here[i] for i in indices if i < len(here)})
            with torch.no_grad():
                weight[:, gone] = 0
            left[name] = [i for i in here if i not in set(gone)]
        group.prune()
    return "; it narrows norms over channels" if norms else ""
