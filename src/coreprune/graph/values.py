"""What the tracer knows about a tensor: its shape, and which channel every position along an axis belongs to.

A *layer* is an int64 tensor with as many axes as the tensor that it describes; it holds a channel id per position (-1:
a position that always stays) and has size 1 along every axis on which the id does not depend. A weight [out, in] has
two layers, of shapes [out, 1] and [1, in]; an activation [1, C, H, W] usually has one, of shape [1, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

FIXED = -1


@dataclass(frozen=True, eq=False)
class Value:
    """An abstract tensor.

    Attributes:
        shape: the real shape, at batch size 1.
        layers: id tensors, each of shape `shape` with 1 where the id does not depend on that axis.
        weight: computed from parameters and buffers only.
        created: made by the forward from sizes only (zeros, arange …); such sizes usually follow the model's widths.
    """

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()
    weight: bool = False
    created: bool = False

    def with_layers(self, layers: Sequence[Tensor], shape: Sequence[int] | None = None) -> Value:
        """The same kind of value with other layers (and shape). Layers without any axis left are dropped."""
        shape = self.shape if shape is None else tuple(shape)
        return replace(self, shape=shape, layers=tuple(x for x in layers if x.numel() > 1))


def axes(layer: Tensor) -> frozenset[int]:
    """The axes along which the ids of a layer vary."""
    return frozenset(a for a, n in enumerate(layer.shape) if n > 1)


def compact(ids: Tensor) -> Tensor:
    """Shrink to size 1 every axis along which the ids do not vary."""
    for a in range(ids.dim()):
        if ids.shape[a] > 1:
            first = ids.narrow(a, 0, 1)
            if ids.stride(a) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def align(layer: Tensor, ndim: int) -> Tensor:
    """Prepend axes of size 1, as broadcasting does."""
    return layer.reshape((1,) * (ndim - layer.dim()) + tuple(layer.shape))


def place(layer: Tensor, where: Sequence[int], ndim: int) -> Tensor:
    """Move axis i of a layer to axis where[i] of a space with ndim axes; the others have size 1."""
    order = sorted(range(layer.dim()), key=lambda i: where[i])
    shape = [1] * ndim
    for i in range(layer.dim()):
        shape[where[i]] = layer.shape[i]
    return layer.permute(order).reshape(shape)


def merge_kind(values: Sequence[Value]) -> tuple[bool, bool]:
    """(weight, created) of a result computed from several values."""
    solid = [v for v in values if not v.created]
    return bool(solid) and all(v.weight for v in solid), not solid
