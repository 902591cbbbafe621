"""`Queries`: inputs of a model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes
from coreprune._seed import as_generator
from coreprune._shown import brief
from coreprune.errors import InputError, first_line
from coreprune.queries import storage


@dataclass(frozen=True, eq=False)
class Queries:
    """N inputs of a model, along the first axis of the tensors.

        for args, kwargs in queries.batches(64):
            model(*args, **kwargs)

    args, kwargs: the inputs. `batches` calls the model with them: it moves the first axis to where the model has its
        batch, or passes one whole example at a time if the model has none.
    source: name of what made the inputs.
    note: how they were made, in words, for the report.
    shared: positions, among the leaves of (args, kwargs), of the tensors that have no batch axis. All inputs share
        them.
    axes: which axis of the model's inputs holds the samples; None for the first.
    jointly: whether the inputs were optimised together, so that they are no independent draws from their source.
    labels: (N, …), what the user's samples came with; None if they had no labels. Only losses of the user get them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str
    note: str = ""
    shared: frozenset[int] = frozenset()
    axes: BatchAxes | None = None
    jointly: bool = False
    labels: Tensor | None = None
    __repr__ = brief

    def __post_init__(self) -> None:
        lengths = {len(x) for i, x in enumerate(self._leaves()) if self._batched(i, x)}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"queries need tensors of one length N ≥ 1 along their first axis; found {sorted(lengths) or 'none'}."
            )
        if self.labels is not None and (self.labels.dim() == 0 or len(self.labels) not in lengths):
            raise InputError(f"labels must be (N, …) for N = {lengths.pop()} inputs, not {tuple(self.labels.shape)}.")

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def _batched(self, i: int, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and i not in self.shared

    def __len__(self) -> int:
        return next(len(x) for i, x in enumerate(self._leaves()) if self._batched(i, x))

    @property
    def whole(self) -> bool:
        """Whether each input is a whole example of a model without a batch, which takes one at a time."""
        return self.axes is not None and self.axes.whole

    def batches(self, size: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield (args, kwargs) of `size` inputs at a time, in order. The last batch may be smaller.

        Of a model without a batch, whole examples come one at a time.
        """
        if size < 1:
            raise InputError(f"batches hold at least one input, not {size}.")
        size = 1 if self.whole else size
        for start in range(0, len(self), size):
            yield self._rows(start, start + size)._given()

    def blocks(self, size: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The former name of `batches`, until the release after 0.1."""
        warnings.warn("Queries.blocks is now Queries.batches.", DeprecationWarning, stacklevel=2)
        return self.batches(size)

    def __add__(self, other: Queries) -> Queries:
        """These inputs followed by the others, e.g. a few samples followed by many made inputs.

        Raises InputError if they differ in structure, shapes, dtypes, or in a tensor that all inputs share.
        """
        if not isinstance(other, Queries):
            return NotImplemented
        (mine, tree), (theirs, its) = (pytree.tree_flatten((q.args, q.kwargs)) for q in (self, other))
        axes = [None if q.axes is None or q.axes.first else q.axes.inputs for q in (self, other)]
        if (
            axes[0] != axes[1]
            or tree != its
            or not all(self._alike(i, x, y) for i, (x, y) in enumerate(zip(mine, theirs, strict=True)))
        ):
            raise InputError(
                f"queries from {self.source} and from {other.source} are not inputs of the same form. "
                "Make both for one example."
            )
        alone = replace(self, labels=None)
        both = alone.changed(lambda i, x: torch.cat([x, theirs[i].to(x.device)]) if self._batched(i, x) else x)
        named = [q.labels for q in (self, other) if q.labels is not None]
        fit = len(named) == 2 and named[0].shape[1:] == named[1].shape[1:]
        return replace(
            both,
            labels=torch.cat([x.cpu() for x in named]) if fit else None,
            source=f"{self.source} + {other.source}",
            note=f"{self.note}, and {other.note}",
            jointly=self.jointly or other.jointly,
        )

    def _alike(self, i: int, x: Any, y: Any) -> bool:
        """Whether two leaves can be joined: the same value, or rows of one shape and dtype."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return type(x) is type(y) and x == y
        if self._batched(i, x):
            return y.dim() > 0 and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype
        return torch.equal(x, y.to(x.device))

    def take(self, n: int) -> Queries:
        """The first n inputs, or all if there are fewer."""
        if n < 1:
            raise InputError(f"take at least one input, not {n}.")
        return self._rows(0, n)

    def split(self, n: int, seed: int | torch.Generator | None = None) -> tuple[Queries, Queries]:
        """Split into n inputs and the rest. Both keep their order.

        seed: a number, or a generator to draw from; the n inputs are then random. None: the first n.

        Raises InputError if one of the parts would be empty.
        """
        if not 1 <= n < len(self):
            raise InputError(f"{len(self)} inputs split after 1 to {len(self) - 1} of them, not after {n}.")
        if seed is None:
            return self._rows(0, n), self._rows(n, len(self))
        generator = as_generator(seed)
        order = torch.randperm(len(self), generator=generator, device=generator.device).cpu()
        return self._chosen(order[:n].sort().values), self._chosen(order[n:].sort().values)

    def sample(self, n: int, seed: int | torch.Generator = 0) -> Queries:
        """n random inputs in their order, or all if there are no more.

        seed: a number, or a generator to draw from.
        """
        return self if n >= len(self) else self.split(n, seed)[0]

    def distinct(self) -> Queries:
        """The same inputs in their order, each once. Two inputs are equal if all their tensors are, bit by bit."""
        first: dict[bytes, int] = {}
        rows = [x.detach().cpu().contiguous() for i, x in enumerate(self._leaves()) if self._batched(i, x)]
        for n in range(len(self)):
            parts = (x[n].reshape(-1).view(torch.uint8).numpy().tobytes() for x in rows)
            first.setdefault(hashlib.blake2b(b"".join(parts)).digest(), n)
        return self if len(first) == len(self) else self._chosen(torch.tensor(list(first.values())))

    def shuffled(self, seed: int | torch.Generator = 0) -> Queries:
        """The same inputs in a random order. seed: a number, or a generator to draw from."""
        generator = as_generator(seed)
        return self._chosen(torch.randperm(len(self), generator=generator, device=generator.device).cpu())

    def repeated(self, n: int) -> Queries:
        """The first n of the same inputs, which come again from the first on if there are fewer."""
        return self if n == len(self) else self._chosen(torch.arange(n) % len(self))

    def to(self, device: torch.device | str) -> Queries:
        """The same inputs on a device."""
        return self.changed(lambda i, x: x.to(device) if isinstance(x, Tensor) else x)  # noqa: ARG005

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, completely or not at all. The structure is JSON in its metadata.

        Raises InputError if there are arguments other than tensors, numbers, strings, None, and tuples, lists and dicts
        of these.
        """
        about = {"source": self.source, "note": self.note, "shared": sorted(self.shared), "jointly": self.jointly}
        labels = () if self.labels is None else (self.labels,)
        if self.axes is not None and not self.axes.first:
            about["axes"] = [list(self.axes.inputs), list(self.axes.outputs)]
        storage.write(Path(path), (self.args, self.kwargs, *labels), about)

    @classmethod
    def load(cls, path: str | Path) -> Queries:
        """Read what `save` wrote. The tensors are on the CPU. Raises InputError for any other file."""
        tree, about = storage.read(Path(path))
        if not {"source", "note", "shared"} <= set(about):
            raise InputError(f"{path} is a cache of unfinished queries. Pass it to make_queries(cache=...).")
        try:
            args, kwargs, labels = (*tree, None) if len(tree) == 2 else tree
            if not isinstance(args, tuple) or not isinstance(kwargs, dict):
                raise TypeError("they are no arguments of a model")
            shared, axes = frozenset(map(int, about["shared"])), about.get("axes")
            if axes is not None:
                axes = BatchAxes(*(tuple(None if a is None else int(a) for a in part) for part in axes))
                if len(axes.inputs) != len(pytree.tree_leaves((args, kwargs))):
                    raise ValueError("they do not have the inputs that it speaks of")
            if not isinstance(labels, Tensor | None):
                raise TypeError("their labels are no tensor")
            source, note, jointly = str(about["source"]), str(about["note"]), bool(about.get("jointly"))
            return cls(args, kwargs, source, note, shared, axes, jointly, labels)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path} cannot be read as queries ({first_line(error)}). Make them anew.") from error

    def _chosen(self, rows: Tensor) -> Queries:
        return self._picked(lambda x: x[rows.to(x.device)])

    def _rows(self, start: int, stop: int) -> Queries:
        return self._picked(lambda x: x[start:stop])

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> Queries:
        """Some of the inputs, with their labels."""
        labels = None if self.labels is None else pick(self.labels)
        # Without the labels in between: neither all of them nor those picked fit both sides of the change.
        chosen = replace(self, labels=None).changed(lambda i, x: pick(x) if self._batched(i, x) else x)
        return replace(chosen, labels=labels)

    def _given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as the model takes them."""
        axes = self.axes
        if axes is None:
            return self.args, self.kwargs
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        given = [axes.given(i, x) if self._batched(i, x) else x for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(given, tree)

    def changed(self, change: Callable[[int, Any], Any]) -> Queries:
        """Other inputs. change: from (position among the leaves of (args, kwargs), leaf) to the new leaf."""
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten([change(i, x) for i, x in enumerate(leaves)], tree)
        return replace(self, args=args, kwargs=kwargs)
