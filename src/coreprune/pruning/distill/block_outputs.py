"""Find the inner outputs of a pruned model that can be compared with the original's, and collect them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import reals
from coreprune.pruning.calibration.rows import Batch

_MOST = 8  # features


class Watched:
    """A context that collects the first floating-point output of every call of the named modules, in their order."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self._modules = [model.get_submodule(name) for name in names]
        self._seen: list[Tensor] = []

    def __enter__(self) -> Watched:
        self._handles = [m.register_forward_hook(self._keep) for m in self._modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002 - torch's signature
        self._seen.append(reals(output)[0])

    def take(self) -> list[Tensor]:
        """What was collected since the last call of `take`."""
        seen, self._seen = self._seen, []
        return seen


def shared_features(student: nn.Module, teacher: nn.Module, batch: Batch) -> list[str]:
    """Names of modules whose outputs can be compared: blocks, or single layers if no block can be.

    The outputs of blocks have the same shapes in both models, or fewer channels in the student (`Readout`). The outputs
    of single layers have the same shapes. The whole model is left out. So is a module whose output is returned
    unchanged by the module around it.
    """
    mine, theirs = _shapes(student, batch), _shapes(teacher, batch)
    found = [name for name, shapes in mine.items() if shapes and len(theirs.get(name, ())) == len(shapes)]
    same = [name for name in found if mine[name] == theirs[name]]
    narrow = [
        name for name in found if all(a == b or lost_axis(a, b) for a, b in zip(mine[name], theirs[name], strict=True))
    ]
    blocks = [name for name in narrow if any(True for _ in student.get_submodule(name).children())]
    return blocks or same


def spread(names: list[str]) -> list[str]:
    """At most eight of the names, evenly over the depth, and the last: what the teacher says there has to be kept."""
    if len(names) <= _MOST:
        return names
    return [names[(i + 1) * len(names) // _MOST - 1] for i in range(_MOST)]


def lost_axis(mine: torch.Size, theirs: torch.Size) -> int | None:
    """The one axis, not the first, along which a shape has lost entries; None if the shapes differ in any other way."""
    if len(mine) != len(theirs):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    return axes[0] if len(axes) == 1 and axes[0] > 0 and mine[axes[0]] < theirs[axes[0]] else None


def _shapes(model: nn.Module, batch: Batch) -> dict[str, list[torch.Size]]:
    """For every module by name, the shapes of its outputs, one per call; empty if they cannot be compared."""
    found: dict[str, list[torch.Size]] = {}
    last: list[Any] = [None, ""]
    bad: set[str] = set()

    def record(name: str, output: Any) -> None:
        tensor = next(iter(reals(output)), None)
        if tensor is None or tensor.dim() < 2:
            bad.add(name)
            return
        if tensor is last[0]:  # a container returns the output of its last child
            bad.add(last[1])
        last[:] = [tensor, name]
        found.setdefault(name, []).append(tensor.shape)

    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            output = model(*batch[0], **batch[1])
    finally:
        for handle in handles:
            handle.remove()
    # The output of this module is the model's output, which is compared anyway.
    bad |= {last[1]} if any(t is last[0] for t in reals(output)) else set()
    return {name: [] if name in bad else shapes for name, shapes in found.items()}
