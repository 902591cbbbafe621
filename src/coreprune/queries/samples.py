"""The user's own unlabelled samples as queries."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from coreprune._batch import BatchAxes
from coreprune.errors import InputError
from coreprune.queries.check import as_tensor, fitting
from coreprune.queries.datasets import items
from coreprune.queries.leaves import batched, by_keyword, shared, with_leaves
from coreprune.queries.queries import Queries

_LABELS = ("labels", "label", "targets", "target")  # names of what is known of a sample, if it is no input
_FIRST = 512  # of a loader, which may have no end; half of them are held back for the agreement


@dataclass(frozen=True, eq=False)
class Example:
    """The example inputs: one sample, as the model takes it. axes: where its samples lie."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axes: BatchAxes

    @property
    def leaves(self) -> list[Any]:
        """The leaves of (args, kwargs)."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def batched(self) -> list[int]:
        """Positions of the tensors that differ between samples."""
        return batched(self.args, self.kwargs, self.axes)

    @property
    def one_input(self) -> Tensor | None:
        """The only tensor with a batch axis, with its sample along axis 0. None if there are several."""
        found = self.batched
        return self.stored(found[0]) if len(found) == 1 else None

    def stored(self, leaf: int) -> Tensor:
        """A tensor with its sample along axis 0."""
        return self.axes.stored(leaf, self.leaves[leaf])

    def rows(self, leaf: int, x: Any, where: str) -> Any:
        """The user's samples for a leaf, which lie as in the example, with the samples along axis 0."""
        like = self.leaves[leaf]
        x = as_tensor(x, where) if isinstance(x, np.ndarray) else x
        # Whole examples may also be stacked along a new first axis.
        lies = isinstance(x, Tensor) and x.dim() == like.dim() and not (self.axes.first or x.dim() == 0)
        return self.axes.stored(leaf, x) if lies else x


def is_samples(spec: Any) -> bool:
    """Whether a spec holds samples or is a file of them. Otherwise it says how to make inputs."""
    if isinstance(spec, str):
        return spec.endswith(".npz")
    return isinstance(spec, (Path, Tensor, np.ndarray, Mapping, Dataset)) or (
        isinstance(spec, Iterable) and not isinstance(spec, type)
    )


def goes_on(spec: Any) -> bool:
    """Whether a spec may have no end, or be large, so that by default only the first samples are taken of it."""
    held = isinstance(spec, (str, Path, Queries, Tensor, np.ndarray, Mapping))
    return not held and is_samples(spec) and not (isinstance(spec, (tuple, list)) and _all_tensors(spec))


def from_samples(spec: Any, example: Example, n: int | None, generator: torch.Generator) -> Queries:
    """Queries from a tensor, a tuple or dict of tensors, an iterable of batches, a Dataset, or an .npz file.

    A tuple holds the model's inputs in their order. Labels may follow them; only a loss that wants them sees them. The
    same holds for each batch. A list of tensors that all have the shape of the only input is a list of batches. Each
    item of a Dataset is one sample.

    If the model has no batch, a sample is a whole example: a list holds them, or tensors in which they are stacked.

    example: Inputs that the samples do not name stay as in it.
    n: how many. From tensors, files and datasets they are drawn at random; from an iterable the first ones are taken.
        When None, all tensors or the whole file are taken, and 512 inputs of a dataset or an iterable.

    Raises InputError if the samples do not fit the example, are empty, or are not finite.
    """
    where = "the samples"
    if isinstance(spec, (str, Path)):
        where, spec = str(spec), _from_file(Path(spec), example)
    if isinstance(spec, np.ndarray):
        spec = as_tensor(spec, where)
    if isinstance(spec, (tuple, list)) and _all_tensors(spec):
        like = example.one_input
        if type(spec) is list and like is not None and not _has_labels(spec, like):
            whole = _from_batches(spec, example, sys.maxsize)
            return _counted(whole if n is None else whole.sample(n, generator))
        if like is not None and len(spec) == 2 and not example.axes.whole and spec[1].shape[1:] == like.shape[1:]:
            raise InputError(
                f"{where} are two tensors of shapes {tuple(spec[0].shape)} and {tuple(spec[1].shape)}, but the model "
                "takes one. If the second holds the wanted outputs, pass the first alone. If both are inputs, pass a "
                "list: queries=[x1, x2]."
            )
    if isinstance(spec, (Tensor, Mapping)) or (isinstance(spec, (tuple, list)) and _all_tensors(spec)):
        whole = _fitted(spec, example, where)
        return _counted(whole if n is None else whole.sample(n, generator))
    most = _FIRST if n is None else n
    if isinstance(spec, Dataset):
        spec = items(spec, (example.args, example.kwargs), example.axes, example.batched, most, generator)
    return _counted(_from_batches(spec, example, most))


def _has_labels(spec: Any, like: Tensor) -> bool:
    """Whether a pair of tensors is inputs and one number for each of them."""
    return len(spec) == 2 and spec[1].ndim == 1 and like.dim() > 1 and len(spec[0]) == len(spec[1])


def _counted(queries: Queries) -> Queries:
    """With the number of samples in front of the note that `_fitted` wrote."""
    return replace(queries, note=f"{len(queries)} samples of the user{queries.note}")


def _all_tensors(spec: Any) -> bool:
    return len(spec) > 0 and all(isinstance(x, (Tensor, np.ndarray)) for x in spec)


def _from_batches(batches: Iterable[Any], example: Example, n: int) -> Queries:
    parts: list[Queries] = []
    found = 0
    for i, batch in enumerate(batches):
        parts.append(_fitted(batch, example, f"batch {i} of the samples"))
        found += len(parts[-1])
        if found >= n:
            break
    if not parts:
        raise InputError("the samples are empty: the loader yields no batch. Check its dataset and drop_last.")
    first = parts[0]
    leaves = [pytree.tree_leaves((p.args, p.kwargs)) for p in parts]
    labels = [p.labels for p in parts if p.labels is not None]
    same = len(labels) == len(parts) and len({x.shape[1:] for x in labels}) == 1
    whole = replace(first, labels=None).changed(
        lambda i, x: torch.cat([row[i] for row in leaves]) if first._batched(i, x) else x
    )
    return replace(whole, labels=torch.cat(labels) if same else None).take(n)


def _from_file(path: Path, example: Example) -> Any:
    arrays = read_arrays(path)
    args, kwargs = example.args, example.kwargs
    labels = {name: arrays.pop(name) for name in _LABELS if len(arrays) > 1 and name in arrays and name not in kwargs}
    if len(arrays) == 1 and not (set(arrays) & set(kwargs)):
        inputs = as_tensor(next(iter(arrays.values())), str(path))
        return (inputs, next(iter(labels.values()))) if labels and example.one_input is not None else inputs
    known = {name: as_tensor(array, str(path)) for name, array in arrays.items() if name in kwargs}
    if args or not known:
        wanted = ", ".join(kwargs) or "one array, for the one positional input"
        raise InputError(f"{path} holds {', '.join(arrays) or 'nothing'}; the example inputs ask for {wanted}.")
    return {**known, **labels}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name. Raises InputError, without numpy's advice to load the file as a pickle."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with path.open("rb") as raw:
            if not is_zipfile(raw):
                raise BadZipFile
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except PermissionError as error:
        raise InputError(f"{path} may not be read. Look at its permissions.") from error
    except (ValueError, OSError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is no .npz file of plain arrays: it holds Python objects, or it is damaged. Write plain arrays "
            "with numpy.savez."
        ) from error


def _fitted(samples: Any, example: Example, where: str) -> Queries:
    """Samples in place of the example's tensors. The note says what was left out."""
    args, kwargs, axes, places = example.args, example.kwargs, example.axes, example.batched
    labels = None
    if isinstance(samples, Mapping):
        given = _named(samples, example, where)
        left = ", ".join(str(name) for name in samples if name not in kwargs)
        labels = next((samples[name] for name in _LABELS if name in samples and name not in kwargs), None)
    else:
        listed = list(samples) if isinstance(samples, (tuple, list)) else [samples]
        if axes.whole:  # nested as the example, perhaps followed by labels
            listed = pytree.tree_leaves(samples if len(pytree.tree_leaves(samples)) <= len(places) + 1 else listed[0])
        if len(listed) not in (len(places), len(places) + 1):
            raise InputError(
                f"{where}: {len(listed)} tensors, but the example inputs have {len(places)}"
                f"{'' if axes.whole else ' with a batch axis'}."
            )
        given = dict(zip(places, listed, strict=False))
        left = "labels" if len(listed) > len(places) else ""
        labels = listed[len(places)] if left else None
    try:
        new = {i: fitting(example.rows(i, x, where), example.stored(i), where) for i, x in given.items()}
    except InputError as error:
        if not axes.whole:
            raise
        raise InputError(
            f"{error} No axis of the inputs was found to hold samples, so each is a whole example. If one does, say "
            "which: batch_axis=0 (--batch-axis 0)."
        ) from error
    lengths = {len(x) for x in new.values()}
    if len(lengths) != 1:
        raise InputError(f"{where}: the tensors have {sorted(lengths)} rows, but all need the same number.")
    (n,) = lengths
    whole = with_leaves(args, kwargs, axes, new, n)
    note = f"; {left} left out" if left else ""
    given_to = shared(args, kwargs, axes, new)
    return Queries(*whole, "samples", note, given_to, axes, labels=_as_labels(labels, n))


def _as_labels(labels: Any, n: int) -> Tensor | None:
    """Labels (n, …) on the CPU; None for what is no tensor with a row per sample, which nobody may ever need."""
    x = torch.from_numpy(labels) if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf" else labels
    return x.detach().cpu() if isinstance(x, Tensor) and x.dim() and len(x) == n else None


def _named(samples: Mapping[str, Any], example: Example, where: str) -> dict[int, Any]:
    """Samples by position among the leaves, for the keywords that the example has. Others are no inputs."""
    args, kwargs = example.args, example.kwargs
    place = by_keyword(args, kwargs)
    given = {place[name]: samples[name] for name in samples if name in place}
    main = next(iter(kwargs), None)
    if not given or args or main not in samples:
        raise InputError(
            f"{where} are named {', '.join(map(str, samples)) or 'nothing'}; the example inputs are "
            f"{', '.join(kwargs) if kwargs and not args else 'positional: pass tensors in their order'}."
        )
    return given
