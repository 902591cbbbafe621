"""The batches for training on queries, as a function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune.errors import InputError
from coreprune.pruning.calibration.augment import is_image, varied
from coreprune.queries import Queries

Batch = tuple[tuple[Any, ...], dict[str, Any]]


@runtime_checkable
class Inputs(Protocol):
    """N inputs, in batches of (args, kwargs), such as `coreprune.queries.Queries`.

    Tensors have the N inputs along their first axis, unless they are `Queries`. Exceptions are the leaves of
    (args, kwargs) at the positions in the attribute `shared`, if there is one.
    """

    def batches(self, size: int) -> Iterator[Batch]: ...  # noqa: D102
    def __len__(self) -> int: ...


class Rows:
    """The inputs of every step. They depend on the step and the seed alone, so there is no state to save."""

    def __init__(self, queries: Inputs, size: int, augment: bool, seed: int) -> None:
        if not isinstance(queries, Inputs):
            raise InputError(f"queries must be Queries, not {type(queries).__name__}. Make them with make_queries().")
        self.count = len(queries)
        self.axes = queries.axes if isinstance(queries, Queries) else None
        if isinstance(queries, Queries):
            whole = (queries.args, queries.kwargs)
        else:  # all of them; these are slices, so nothing is copied
            whole = next(iter(queries.batches(self.count)), None)
        if whole is None:
            raise InputError("there are no queries to train on.")
        self.leaves, self.tree = pytree.tree_flatten(whole)
        shared = getattr(queries, "shared", frozenset())
        self.batched = {
            i
            for i, x in enumerate(self.leaves)
            if isinstance(x, Tensor) and x.dim() > 0 and i not in shared and len(x) == self.count
        }
        self.size, self.seed = min(size, self.count), seed
        alone = len(self.batched) == 1
        self.augment = augment and alone and all(is_image(self.leaves[i]) for i in self.batched)

    def batch(self, step: int) -> Batch:
        """(args, kwargs) of one step. Every input is used once before any is used again."""
        return self._given(self._picked(step))

    def parts(self, step: int, batch: int) -> Iterator[Batch]:
        """The inputs of one step, at most `batch` at a time; one at a time if they are whole examples."""
        leaves = self._picked(step)
        batch = 1 if self.axes is not None and self.axes.whole else batch
        for start in range(0, self.size, batch):
            yield self._given([x[start : start + batch] if i in self.batched else x for i, x in enumerate(leaves)])

    def _picked(self, step: int) -> list[Any]:
        """The leaves of one step, with the inputs along the first axis."""
        first = step * self.size
        passes = range(first // self.count, (first + self.size - 1) // self.count + 1)
        order = torch.cat([torch.randperm(self.count, generator=self._generator(2 * p)) for p in passes])
        chosen = order[first - passes.start * self.count :][: self.size]
        random = self._generator(2 * step + 1)

        def pick(i: int, x: Any) -> Any:
            if i not in self.batched:
                return x
            x = x[chosen.to(x.device)]
            return varied(x, random) if self.augment else x

        return [pick(i, x) for i, x in enumerate(self.leaves)]

    def _given(self, leaves: list[Any]) -> Batch:
        """The leaves as the model takes them."""
        if self.axes is not None:
            leaves = [self.axes.given(i, x) if i in self.batched else x for i, x in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, self.tree)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + number)
