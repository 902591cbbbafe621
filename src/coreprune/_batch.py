"""Which axis of the inputs holds the samples: what is known of it is passed on, so that nothing guesses again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.errors import InputError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class BatchAxes:
    """Which axis of every input holds the samples.

    inputs: for every leaf of (args, kwargs) the axis, or None if all samples share the leaf. If it is None for all
    leaves, the model has no batch: a sample is a whole example, and the model takes one at a time.
    outputs: the same for the real tensors that the model returns, in their order; empty if that is not known.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether a sample is a whole example."""
        return all(axis is None for axis in self.inputs)

    @property
    def first(self) -> bool:
        """Whether the samples lie along the first axis, as in most models."""
        return not self.whole and all(axis in (None, 0) for axis in self.inputs)

    def size(self, inputs: Inputs) -> int:
        """How many samples the inputs hold."""
        leaves = pytree.tree_leaves(inputs)
        return next((x.shape[a] for x, a in zip(leaves, self.inputs, strict=True) if a is not None), 1)

    def cut(self, inputs: Inputs, size: int = 1) -> Inputs:
        """The first `size` samples, or all if there are fewer."""
        return self._each(inputs, lambda x, axis: x.detach().narrow(axis, 0, min(size, x.shape[axis])))

    def repeated(self, inputs: Inputs, size: int) -> Inputs:
        """`size` samples: those of the inputs, again and again. A whole example stays as it is."""

        def take(x: Tensor, axis: int) -> Tensor:
            return x.detach().index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])

        return self._each(inputs, take)

    def stored(self, leaf: int, x: Tensor) -> Tensor:
        """A tensor of samples as the model takes it -> with the samples along axis 0. A whole example is one row."""
        axis = self.inputs[leaf]
        return x.movedim(axis, 0) if axis is not None else x[None] if self.whole else x

    def given(self, leaf: int, x: Tensor) -> Tensor:
        """The inverse of `stored`."""
        axis = self.inputs[leaf]
        return x.movedim(0, axis) if axis is not None else x.squeeze(0) if self.whole else x

    def rows(self, outputs: Sequence[Tensor], size: int) -> list[Tensor | None]:
        """Outputs with the samples along axis 0; None for those that have no such axis.

        outputs: the real tensors that the model returned for `size` samples.
        """
        if self.whole:
            return [x[None] for x in outputs]
        if self.first or len(outputs) != len(self.outputs):
            return [x if x.dim() and len(x) == size else None for x in outputs]
        pairs = zip(outputs, self.outputs, strict=True)
        return [None if a is None or x.shape[a] != size else x.movedim(a, 0) for x, a in pairs]

    def _each(self, inputs: Inputs, change: Callable[[Tensor, int], Tensor]) -> Inputs:
        leaves, tree = pytree.tree_flatten(inputs)
        pairs = zip(leaves, self.inputs, strict=True)
        return pytree.tree_unflatten([x if axis is None else change(x, axis) for x, axis in pairs], tree)


def usual(inputs: Inputs) -> BatchAxes:
    """Axis 0 of the first tensor that has axes, and of all tensors with that length."""
    leaves = pytree.tree_leaves(inputs)
    length = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), None)
    return BatchAxes(tuple(0 if isinstance(x, Tensor) and x.dim() and x.shape[0] == length else None for x in leaves))


def said_axes(inputs: Inputs, said: Any) -> BatchAxes:
    """What the user says, for every leaf."""
    owners: list[Any] = [k for k, x in [*enumerate(inputs[0]), *inputs[1].items()] for _ in pytree.tree_leaves(x)]
    leaves = pytree.tree_leaves(inputs)
    if said is None:
        return BatchAxes((None,) * len(leaves))
    if _is_axis(said):
        axes = _everywhere(leaves, said)
    elif isinstance(said, Mapping) and said and all(a is None or _is_axis(a) for a in said.values()):
        if unknown := [k for k in said if k not in owners]:
            known = ", ".join(map(repr, dict.fromkeys(owners))) or "none"
            raise InputError(f"batch_axis names the input {unknown[0]!r}, but the inputs are {known}.")
        axes = [_axis_of(x, said.get(owner), owner) for owner, x in zip(owners, leaves, strict=True)]
    else:
        raise InputError(
            f'batch_axis={said!r}: pass a number, None for "no batch", "auto", or a dict with a number or None for '
            'each input by its position or keyword, e.g. {"x": 1, "mask": 0}.'
        )
    lengths = {x.shape[a]: k for x, a, k in zip(leaves, axes, owners, strict=True) if a is not None}
    if len(lengths) > 1:
        told = ", ".join(f"{n} in input {owner!r}" for n, owner in lengths.items())
        raise InputError(f"batch_axis={said!r}: the inputs differ in the number of samples along it: {told}.")
    return BatchAxes(tuple(axes))


def _is_axis(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _everywhere(leaves: list[Any], said: int) -> list[int | None]:
    """One axis for all tensors that have it, if it is as long as in the first of them. The others are shared."""
    having = [x for x in leaves if isinstance(x, Tensor) and -x.dim() <= said < x.dim()]
    if not having:
        shapes = ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor)) or "none"
        raise InputError(f"batch_axis={said}: no input has such an axis; their shapes are {shapes}.")
    length, mine = having[0].shape[said], {id(x) for x in having}
    return [said % x.dim() if id(x) in mine and x.shape[said] == length else None for x in leaves]


def _axis_of(x: Any, said: int | None, owner: Any) -> int | None:
    """The axis of one leaf of an input for which it was said."""
    if said is None or not isinstance(x, Tensor):
        return None
    if not -x.dim() <= said < x.dim():
        raise InputError(f"batch_axis gives axis {said} for input {owner!r}, whose shape is {tuple(x.shape)}.")
    return said % x.dim()
