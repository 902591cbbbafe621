"""What the tracer knows about a tensor: its shape, and which channel every position along an axis belongs to.

An *id map* says which channel every position of a tensor belongs to. It is an int64 tensor with as many axes as the
tensor that it describes. It holds one channel id per position, or -1 for a position that always stays. It has size 1
along every axis on which the id does not depend. A weight [out, in] has two id maps, of shapes [out, 1] and [1, in]. An
activation [1, C, H, W] usually has one, of shape [1, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

FIXED = -1


@dataclass(frozen=True, eq=False)
class Value:
    """An abstract tensor: its shape and its channels, without its numbers.

    Attributes:
        shape: the real shape, at batch size 1.
        maps: its id maps, each of shape `shape`, but with size 1 where the id does not depend on the axis.
        weight: computed from parameters and buffers only.
        created: made by the forward from sizes alone (zeros, arange …). Such sizes usually follow the model's widths.
    """

    shape: tuple[int, ...]
    maps: tuple[Tensor, ...] = ()
    weight: bool = False
    created: bool = False

    def with_maps(self, maps: Sequence[Tensor], shape: Sequence[int] | None = None) -> Value:
        """The same kind of value with other id maps (and shape). A map with one entry is dropped."""
        shape = self.shape if shape is None else tuple(shape)
        return replace(self, shape=shape, maps=tuple(x for x in maps if x.numel() > 1))


def axes(ids: Tensor) -> frozenset[int]:
    """The axes along which the ids of an id map vary."""
    return frozenset(a for a, n in enumerate(ids.shape) if n > 1)


def compact(ids: Tensor) -> Tensor:
    """Shrink to size 1 every axis along which the ids do not vary."""
    for a in range(ids.dim()):
        if ids.shape[a] > 1:
            first = ids.narrow(a, 0, 1)
            if ids.stride(a) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def align(ids: Tensor, ndim: int) -> Tensor:
    """Prepend axes of size 1, as broadcasting does."""
    return ids.reshape((1,) * (ndim - ids.dim()) + tuple(ids.shape))


def place(ids: Tensor, where: Sequence[int], ndim: int) -> Tensor:
    """Move axis i of an id map to axis where[i] of a space with ndim axes. The other axes have size 1."""
    order = sorted(range(ids.dim()), key=lambda i: where[i])
    shape = [1] * ndim
    for i in range(ids.dim()):
        shape[where[i]] = ids.shape[i]
    return ids.permute(order).reshape(shape)


def merge_kind(values: Sequence[Value]) -> tuple[bool, bool]:
    """(weight, created) of a result computed from several values."""
    solid = [v for v in values if not v.created]
    return bool(solid) and all(v.weight for v in solid), not solid
