"""The samples of a torch Dataset, whose items are single samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from coreprune._batch import BatchAxes
from coreprune.errors import InputError, first_line
from coreprune.queries.leaves import by_keyword

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def items(
    dataset: Dataset[Any], inputs: Inputs, axes: BatchAxes, places: list[int], n: int, generator: torch.Generator
) -> Iterator[Any]:
    """The items as batches of one sample: n at random, or the first ones of a dataset that only goes forward.

    inputs: of the example, whose samples lie along `axes`. places: its tensors that differ between samples.

    Raises InputError if the dataset fails.
    """
    forward = isinstance(dataset, IterableDataset)
    try:
        order = None if forward else torch.randperm(len(dataset), generator=generator)[:n].sort().values.tolist()  # type: ignore[arg-type]
        for item in DataLoader(dataset, batch_size=None, sampler=order, generator=generator):
            yield item if axes.whole else _as_batch(item, inputs, axes, places)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the dataset {type(dataset).__name__} gives no samples ({first_line(error)}). It needs __len__ and "
            "__getitem__, which return tensors or arrays. Or pass the samples themselves."
        ) from error


def _as_batch(item: Any, inputs: Inputs, axes: BatchAxes, places: list[int]) -> Any:
    """An item with the sample axis that the example's tensors have."""

    def longer(x: Any, leaf: int) -> Any:
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        axis = axes.inputs[leaf]
        return x.unsqueeze(axis) if isinstance(x, Tensor) and axis is not None and axis <= x.dim() else x

    if isinstance(item, Mapping):
        place = by_keyword(*inputs)
        others = {k: x if k in place else _row(x) for k, x in item.items()}
        return {k: longer(x, place[k]) if place.get(k) in places else x for k, x in others.items()}
    listed = list(item) if isinstance(item, (tuple, list)) else [item]
    return [longer(x, leaf) for x, leaf in zip(listed, places, strict=False)] + [_row(x) for x in listed[len(places) :]]


def _row(label: Any) -> Any:
    """What is known of one sample as a batch of one, if it is made of numbers."""
    x = torch.from_numpy(label) if isinstance(label, np.ndarray) and label.dtype.kind in "biuf" else label
    if isinstance(x, (bool, int, float, np.number, np.bool_)):
        x = torch.tensor(x.item() if isinstance(x, np.generic) else x)
    return x[None] if isinstance(x, Tensor) else label
