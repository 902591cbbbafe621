"""The models that are timed: cut to some widths, with as many samples and in the dtypes as the user's model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coreprune._single import HALF
from coreprune._twin import quiet
from coreprune.errors import InputError, ModelError, first_line
from coreprune.graph import Captured, Group, Traced, capture


def at_batch(traced: Traced, batch: int) -> Captured:
    """The trace with so many samples. Raises InputError if the model does not run with them."""
    one = traced.captured
    if batch == 1:
        return one
    if one.axes.whole:
        raise InputError(f"batch={batch}, but this model has no batch: a call is of one example. Leave batch out.")
    try:
        args, kwargs = one.axes.repeated((one.args, one.kwargs), batch)
        return capture(traced.model, args, kwargs, batch, batch_axis=one.axes)
    except ModelError as error:
        raise InputError(f"the model does not run with batch={batch}: {first_line(error)}.") from error


def timed_dtypes(traced: Traced) -> dict[torch.dtype, torch.dtype]:
    """The dtype to time in place of float32, in a copy of a model that is stored in half precision."""
    stored = traced.captured.tensors
    half = [d for name, t in traced.tensors.items() if t.dtype == torch.float32 and (d := stored[name][1]) in HALF]
    return {torch.float32: max(set(half), key=half.count)} if half else {}


def as_timed(x: Tensor, dtypes: Mapping[torch.dtype, torch.dtype]) -> Tensor:
    """An input in the dtype in place of its own."""
    return x.to(dtypes[x.dtype]) if x.dtype in dtypes else x


@contextmanager
def as_stored(model: nn.Module, traced: Traced) -> Iterator[nn.Module]:
    """A twin to run, with the dtypes in which the user's model is stored."""
    own = {name: dtype for name, (_, dtype) in traced.captured.tensors.items()}
    with quiet(model, own_inputs=False) as still:
        for name, tensor in [*still.named_parameters(), *still.named_buffers()]:
            if own.get(name, tensor.dtype) != tensor.dtype:
                tensor.data = tensor.data.to(own[name])
        yield still


def first_units(group: Group, width: int) -> Tensor:
    """The channels of the first units of every section: which ones they are changes no time."""
    units = group.units()
    sections = torch.zeros(len(units), dtype=torch.int64) if group.sections is None else group.sections
    stay = torch.cat([(sections == b).nonzero()[:width, 0] for b in range(group.section_count)])
    return units[stay].reshape(-1).sort().values
