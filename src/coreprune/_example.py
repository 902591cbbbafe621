"""Example inputs from users."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._tree import decode, encode
from coreprune._twin import quiet
from coreprune.errors import InputError, ModelError, first_line

_MOST_ENTRIES = 1 << 28
_MOST_AXES = 64
_ENTRIES = 1 << 25  # of the outputs of samples that run together: 128 MiB in float32
ANY_BATCH = "export it again with a dynamic batch dimension (torch.export.export(..., dynamic_shapes=...))"


def normalise_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn what users pass as `example_inputs` into (args, kwargs).

    A tensor is the only positional argument. A tuple or list holds positional arguments, a mapping keyword arguments.

    Raises:
        InputError: anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments"
    )


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the model on its example. Raises ModelError if that fails."""
    try:
        with quiet(model) as still:
            still(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"the model does not run on the example inputs ({first_line(error)}). Correct them first."
        ) from error


def largest_batch(two: tuple[tuple[Any, ...], dict[str, Any]], most: int, *models: nn.Module) -> int:
    """How many samples to run together: `most`, fewer if their outputs are large, such as the logits of long texts, or
    1 if a model fails on two, as programs from torch.export often do.

    two: (args, kwargs) of two samples. If a model fails for another reason, a call with one sample will show it.
    """
    entries = 0
    try:
        with torch.no_grad():
            for model in models:
                found = [x.numel() for x in pytree.tree_leaves(model(*two[0], **two[1])) if isinstance(x, Tensor)]
                entries = max(entries, sum(found) // 2)
    except Exception:  # a model may raise anything
        return 1
    return fitting(most, entries)


def fitting(most: int, entries: int) -> int:
    """How many samples to run together, at most `most`, if the outputs of one have so many entries in all."""
    return min(most, max(1, _ENTRIES // max(1, entries)))


def describe_example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Structure, shapes, dtypes and ranges of an example, for JSON; None if it holds something that JSON cannot.

    `example_like` makes a similar example from it. The description has no entries of tensors, except the smallest and
    the largest of whole numbers, which may be ids of tokens.
    """

    def about(x: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
        if not x.is_floating_point() and not x.is_complex():
            found["least"], found["most"] = int(x.min()), int(x.max())
        return found

    try:
        return encode((args, kwargs), about)
    except (InputError, RuntimeError):  # torch has no minimum of some integer types, e.g. uint16
        return None


def example_like(description: Any, device: torch.device | str = "cpu") -> Any:
    """Example inputs of a description from `describe_example`: random numbers, the same in every call.

    Raises InputError if it is not such a description, or if it has more than 2²⁸ entries in all.
    """
    generator = torch.Generator().manual_seed(0)
    entries = 0

    def made(about: Any) -> Tensor:
        nonlocal entries
        shape, dtype = about["shape"], getattr(torch, str(about["dtype"]), None)
        if not isinstance(shape, list) or len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"{reprlib.repr(shape)} is no shape")
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no dtype {reprlib.repr(about['dtype'])}")
        # Axes of length 0 count as 1: torch also multiplies the lengths of empty tensors.
        entries += math.prod(max(n, 1) for n in shape)
        if entries > _MOST_ENTRIES:
            raise ValueError(f"it has more than {_MOST_ENTRIES:,} entries")
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(device, dtype)
        least, most = int(about["least"]), int(about["most"])
        return torch.randint(least, most + 1, shape, generator=generator).to(device, dtype)

    try:
        args, kwargs = decode(description, made)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise TypeError("an example has positional and keyword arguments")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(
            f"the plan's description of the example input cannot be used ({first_line(error)}). Pass an example."
        ) from error
    return kwargs or args


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU if the model has none."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def random_like(x: Tensor, generator: torch.Generator, *, uniform: bool = False, known: Tensor | None = None) -> Tensor:
    """Random numbers in the shape of x, in float64 on the CPU. Infinite entries, as of masks, stay.

    uniform: between 0 and 1; otherwise normal. known: values whose mean and spread the numbers get, such as x itself.
    """
    draw = torch.rand if uniform else torch.randn
    new = draw(x.shape, generator=generator, dtype=torch.float64)
    if known is not None:
        finite = known.detach().double()[torch.isfinite(known)]
        mean = float(finite.mean()) if len(finite) else 0.0
        spread = float(finite.std()) if len(finite) > 1 else 0.0
        new = mean + (spread if spread > 0 else max(abs(mean), 1.0)) * new
    old = x.detach().cpu().double()
    return torch.where(torch.isinf(old), old, new)


def as_real(x: Tensor) -> Tensor:
    """The tensor, and complex numbers as pairs of real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def reals(result: Any) -> list[Tensor]:
    """The floating-point tensors in an output: tensors, tuples, lists, mappings, dataclasses, also nested."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    if isinstance(result, Mapping):
        return [t for value in result.values() for t in reals(value)]
    if isinstance(result, (tuple, list)):
        return [t for value in result for t in reals(value)]
    if dataclasses.is_dataclass(result):
        return [t for field in dataclasses.fields(result) for t in reals(getattr(result, field.name))]
    return []


def first_tensor(result: Any) -> Tensor | None:
    """The first floating-point tensor in a model's output, or None."""

    found = (x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point())
    return next(found, None)
