"""`Queries`: inputs of a model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.errors import InputError, first_line
from coreprune.queries import storage


@dataclass(frozen=True, eq=False)
class Queries:
    """Inputs of a model, N of them along the first axis of every tensor with a batch axis.

        for args, kwargs in queries.batches(64):
            model(*args, **kwargs)

    args, kwargs: what the model is called with. source: name of what made them. note: in words, for the report.
    shared: positions, among the leaves of (args, kwargs), of tensors without a batch axis: the same for all inputs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str
    note: str = ""
    shared: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        lengths = {len(x) for i, x in enumerate(self._leaves()) if self._batched(i, x)}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"queries need tensors of one length N ≥ 1 along their first axis; found {sorted(lengths) or 'none'}."
            )

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def _batched(self, i: int, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and i not in self.shared

    def __len__(self) -> int:
        return next(len(x) for i, x in enumerate(self._leaves()) if self._batched(i, x))

    def batches(self, size: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """(args, kwargs) of up to `size` inputs at a time, in order; the last batch may be smaller."""
        if size < 1:
            raise InputError(f"batches hold at least one input, not {size}.")
        for start in range(0, len(self), size):
            part = self._rows(start, start + size)
            yield part.args, part.kwargs

    def __add__(self, other: Queries) -> Queries:
        """These and the others behind them, e.g. a few samples and many made inputs.

        Raises InputError where the two are not inputs of one model: another structure, other shapes or dtypes, or
        other tensors that all inputs share.
        """
        if not isinstance(other, Queries):
            return NotImplemented
        (mine, tree), (theirs, its) = (pytree.tree_flatten((q.args, q.kwargs)) for q in (self, other))
        if tree != its or not all(self._alike(i, x, y) for i, (x, y) in enumerate(zip(mine, theirs, strict=True))):
            raise InputError(f"queries from {self.source} and from {other.source} are not inputs of the same form.")
        both = self._map(lambda i, x: torch.cat([x, theirs[i].to(x.device)]) if self._batched(i, x) else x)
        return replace(both, source=f"{self.source} + {other.source}", note=f"{self.note}, and {other.note}")

    def _alike(self, i: int, x: Any, y: Any) -> bool:
        """Whether two leaves can lie in one: the same value, or rows of the same kind."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return type(x) is type(y) and x == y
        if self._batched(i, x):
            return y.dim() > 0 and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype
        return torch.equal(x, y.to(x.device))

    def take(self, n: int) -> Queries:
        """The first n, or all where there are fewer."""
        if n < 1:
            raise InputError(f"take at least one input, not {n}.")
        return self._rows(0, n)

    def split(self, n: int, generator: torch.Generator | None = None) -> tuple[Queries, Queries]:
        """The first n, and the rest; with a generator, n at random and the rest, both in their order.

        Raises InputError where one of them would be empty.
        """
        if not 1 <= n < len(self):
            raise InputError(f"{len(self)} inputs split after 1 to {len(self) - 1} of them, not after {n}.")
        if generator is None:
            return self._rows(0, n), self._rows(n, len(self))
        order = torch.randperm(len(self), generator=generator, device=generator.device).cpu()
        return self._chosen(order[:n].sort().values), self._chosen(order[n:].sort().values)

    def sample(self, n: int, generator: torch.Generator) -> Queries:
        """n at random, in their order; all where there are no more."""
        return self if n >= len(self) else self.split(n, generator)[0]

    def to(self, device: torch.device | str) -> Queries:
        """The same on a device."""
        return self._map(lambda i, x: x.to(device) if isinstance(x, Tensor) else x)  # noqa: ARG005

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the structure as JSON in its metadata. It is complete or not there at all.

        Raises InputError for arguments other than tensors, numbers, strings, None, and tuples, lists and dicts of them.
        """
        about = {"source": self.source, "note": self.note, "shared": sorted(self.shared)}
        storage.write(Path(path), (self.args, self.kwargs), about)

    @classmethod
    def load(cls, path: str | Path) -> Queries:
        """Read what `save` wrote, on the CPU. Raises InputError for anything else."""
        tree, about = storage.read(Path(path))
        if not {"source", "note", "shared"} <= set(about):
            raise InputError(f"{path} is a cache of unfinished queries. Pass it to make_queries(cache=...).")
        try:
            args, kwargs = tree
            if not isinstance(args, tuple) or not isinstance(kwargs, dict):
                raise TypeError("they are no arguments of a model")
            return cls(args, kwargs, str(about["source"]), str(about["note"]), frozenset(map(int, about["shared"])))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path} cannot be read as queries ({first_line(error)}). Make them anew.") from error

    def _chosen(self, rows: Tensor) -> Queries:
        return self._map(lambda i, x: x[rows.to(x.device)] if self._batched(i, x) else x)

    def _rows(self, start: int, stop: int) -> Queries:
        return self._map(lambda i, x: x[start:stop] if self._batched(i, x) else x)

    def _map(self, change: Callable[[int, Any], Any]) -> Queries:
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten([change(i, x) for i, x in enumerate(leaves)], tree)
        return replace(self, args=args, kwargs=kwargs)
