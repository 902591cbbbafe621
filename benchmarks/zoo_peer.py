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
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # their inputs lie along axis 1 of the weight
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # along axis 0
_NORMS = (nn.LayerNorm, nn.GroupNorm)
_CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.PReLU)
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
    """Its status: ok, other values, not comparable, wrong output, broken model, error, nothing removed, not installed.

    Other values: it narrowed norms over channels. Not comparable: the values differ without that, but it may have cut
    what no weight reads, such as the queries and keys of attention, for which we cannot say what the right ones are.
    """
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
            unknown, narrowed = _prune(pruner, model, zeros)
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
            why = f"; it cuts {', '.join(sorted(unknown))}" if unknown else narrowed
            status = "other values" if narrowed and not unknown else "not comparable"
            return {**found, "status": status, "detail": f"off by {off:.0%} of the largest{why}"}
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


def _prune(pruner: Any, model: nn.Module, zeros: nn.Module) -> tuple[set[str], str]:
    """Prune, and put zeros where the original reads what is removed.

    Returns the kinds of cut layers for which that is not known, and words if norms over channels are narrowed.
    """
    names = {id(m): name for name, m in model.named_modules()}
    left: dict[str, list[int]] = {}
    unknown: set[str] = set()
    norms = False
    for group in pruner.step(interactive=True):
        if not any(dep.handler.__name__ == "prune_in_channels" for dep, _ in group):
            unknown.add("channels that no weight reads")
        for dep, indices in group:
            layer = dep.target.module
            norms |= isinstance(layer, _NORMS)
            reads = isinstance(layer, (*_READERS, *_TRANSPOSED)) and dep.handler.__name__ == "prune_in_channels"
            if not reads:
                made = isinstance(layer, (*_READERS, *_TRANSPOSED, *_NORMS, *_CHANNELWISE))
                if not made and (isinstance(layer, nn.Parameter) or any(True for _ in layer.parameters())):
                    unknown.add(type(layer).__name__)
                continue
            if getattr(layer, "groups", 1) > 1 or id(layer) not in names:
                unknown.add(f"grouped {type(layer).__name__}")
                continue
            name, axis = names[id(layer)], 0 if isinstance(layer, _TRANSPOSED) else 1
            weight = zeros.get_submodule(name).get_parameter("weight")
            here = left.setdefault(name, list(range(weight.shape[axis])))
            gone = sorted({here[i] for i in indices})
            with torch.no_grad():
                weight.index_fill_(axis, torch.tensor(gone), 0.0)
            left[name] = [i for i in here if i not in set(gone)]
        group.prune()
    return unknown, "; it narrows norms over channels" if norms else ""
