"""Whether tensors that somebody else made can be inputs of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreprune.errors import InputError


def fitting(x: Any, like: Tensor, where: str, rows: int | None = None) -> Tensor:
    """`x` on the device and in the dtype of the example's tensor `like`.

    where: what the error calls x. rows: how many inputs x must hold; any number above zero when None.

    Raises InputError if x is no tensor or array, has another shape or another kind of numbers, or is not finite.
    """
    if isinstance(x, np.ndarray):
        x = as_tensor(x, where)
    if not isinstance(x, Tensor):
        raise InputError(f"{where}: a {type(x).__name__} where a tensor is needed.")
    one = tuple(like.shape[1:])
    if x.dim() == 0 or tuple(x.shape[1:]) != one or (rows is not None and len(x) != rows):
        needed = ", ".join(map(str, ("N" if rows is None else rows, *one))) + ("," if not one else "")
        raise InputError(
            f"{where}: shape {tuple(x.shape)}, but one input has shape {one}, so ({needed}) is needed. "
            "Pad, crop or reshape."
        )
    if len(x) == 0:
        raise InputError(f"{where}: empty, shape {tuple(x.shape)}. At least one input is needed.")
    if number_kind(x.dtype) != number_kind(like.dtype):
        raise InputError(
            f"{where}: {x.dtype}, but the example input is {like.dtype}. Prepare them as for the model's own inputs "
            "(normalised images, token ids)."
        )
    if x.is_floating_point() and not bool(torch.isfinite(x.sum())):  # the sum may overflow by itself
        bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=1)
        if bool(bad.any()):
            raise InputError(f"{where}: NaN or infinite numbers in row {int(bad.nonzero()[0, 0])}. Remove them first.")
    return x.detach().to(like.device, like.dtype)


def as_tensor(array: np.ndarray, where: str) -> Tensor:
    """Raises InputError for arrays of what torch does not know, such as strings."""
    try:
        return torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise InputError(f"{where}: arrays of {array.dtype} cannot be inputs of a model ({error}).") from error


def number_kind(dtype: torch.dtype) -> str:
    """Which numbers a dtype holds: bool, float, complex or integer."""
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"
