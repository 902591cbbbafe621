"""A partition of integer ids whose classes can only be united. The classes are computed all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, for work on many small tensors: several mostly wait for each other (20x slower on a busy CPU)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Partition:
    """Union-find over 0..n-1, computed as connected components, because unions come as whole tensors of pairs."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._labels: Tensor | None = None

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Put a[i] and b[i] into one class, for every i. Shapes broadcast; negative ids are skipped."""
        a, b = torch.broadcast_tensors(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        real = (a >= 0) & (b >= 0) & (a != b)
        if bool(real.any()):
            self._pairs.append((a[real], b[real]))
            self._labels = None

    def labels(self, n: int) -> Tensor:
        """The class of every id: int64 of shape [n]; classes are numbered from 0."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self._labels is None or len(self._labels) != n:
            if self._pairs:
                a = torch.cat([p[0] for p in self._pairs]).numpy()
                b = torch.cat([p[1] for p in self._pairs]).numpy()
                graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
                _, labels = connected_components(graph, directed=False)
                self._labels = torch.from_numpy(labels.astype(np.int64))
            else:
                self._labels = torch.arange(n)
        return self._labels

    def copy(self) -> Partition:
        """An independent partition with the same classes."""
        other = Partition()
        other._pairs = list(self._pairs)
        return other
