"""What every source of queries takes and gives: one signature.

    inputs = source(target, n, generator, tell)      # (n, *target.shape), on the example's device, in its dtype

A source is a small frozen dataclass whose fields are its options. `make_queries(spec=...)` takes one, or its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import batch_size, largest_batch, quiet
from coreprune.errors import InputError

Progress = Callable[[str, int, int], None]
Tell = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor among the example inputs: what a source makes inputs for.

    model: in evaluation mode, without gradients for its parameters. args, kwargs: the example, at batch size 1.
    leaf: position of the tensor among the leaves of (args, kwargs).
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaf: int

    @property
    def example(self) -> Tensor:
        """The tensor itself, (1, *shape)."""
        return pytree.tree_leaves((self.args, self.kwargs))[self.leaf]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(self.example.shape[1:])

    def cast(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, *shape), on the example's device and in its dtype. Raises InputError for reals as tokens."""
        if x.is_floating_point() and not self.example.is_floating_point():
            raise InputError(
                f"this source makes real numbers, and the input that is to be drawn is {self.example.dtype}: tokens, "
                "most likely. Take another source: auto, random-tokens or zipf-tokens."
            )
        return x.reshape(len(x), *self.shape).to(self.example.device, self.example.dtype)

    def call(self, x: Tensor) -> Any:
        """What the model makes of x (n, *shape); every other input is the example's, repeated."""
        args, kwargs = with_leaves(self.args, self.kwargs, {self.leaf: x}, len(x))
        return self.model(*args, **kwargs)

    @cached_property
    def together(self) -> bool:
        """Whether the model takes several inputs at once."""
        two = with_leaves(self.args, self.kwargs, {self.leaf: torch.cat([self.example, self.example])}, 2)
        return largest_batch(two, 2, self.model) > 1

    def logits(self, x: Tensor) -> Tensor:
        """The first tensor that the model returns for x, or its field `logits` where it has one.

        A model that does not take several inputs at once is called for each of them.
        """
        if len(x) > 1 and not self.together:
            return torch.cat([self.logits(row) for row in x.split(1)])
        out = self.call(x)
        named = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
        return named if isinstance(named, Tensor) else first_tensor(out)


@runtime_checkable
class Source(Protocol):
    """The one signature."""

    name: ClassVar[str]

    def at_once(self, target: Target) -> int | None:
        """How many inputs are best made in one call; None: any number."""
        ...

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs, (n, *target.shape); tell(done, total) after every step."""
        ...


def with_leaves(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[int, Tensor], n: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with some leaves replaced; every other tensor with a batch axis is its first row, n times."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    batch = batch_size(args, kwargs)
    for i, leaf in enumerate(leaves):
        if i in new:
            leaves[i] = new[i]
        elif has_batch(leaf, batch):
            leaves[i] = leaf[:1].expand(n, *leaf.shape[1:])
    return pytree.tree_unflatten(leaves, tree)


def has_batch(leaf: Any, batch: int | None) -> bool:
    """Whether a leaf of the example is a tensor with a batch axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def first_tensor(out: Any) -> Tensor:
    """The first tensor in whatever a model returns: a tensor, a tuple, a dict, an output object of transformers."""
    if isinstance(out, Tensor):
        return out
    values = out.values() if hasattr(out, "values") else out if isinstance(out, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"no tensor in a {type(out).__name__}")


def draw(
    source: Source,
    target: Target,
    n: int,
    generator: torch.Generator,
    tell: Tell,
    *,
    parts: tuple[Tensor, ...] = (),
    finished: Callable[[list[Tensor]], None] | None = None,
) -> Tensor:
    """All n inputs, in batches of equal size, each from a seed of its own: going on later gives the same.

    parts: the first batches, where they exist already. finished: called with all batches so far after each.
    """
    at_once = source.at_once(target) or n
    sizes = [len(rows) for rows in torch.arange(n).tensor_split(-(-n // at_once))]
    seeds = torch.randint(2**62, (len(sizes),), generator=generator, device=generator.device).tolist()
    made = list(parts)
    for i in range(len(made), len(sizes)):

        def told(done: int, total: int, before: int = i) -> None:
            tell(before * total + done, len(sizes) * total)

        made.append(source(target, sizes[i], torch.Generator().manual_seed(seeds[i]), told))
        if finished is not None:
            finished(made)
    return torch.cat(made)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; mode, flags, buffers and the global random state are put back, errors or not."""
    grads = {p: p.requires_grad for p in model.parameters()}
    buffers = [
        (m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    devices = sorted({p.device.index or 0 for p in grads if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), quiet(model):
        try:
            for p in grads:
                p.requires_grad_(False)
            yield
        finally:
            for p, was in grads.items():
                p.requires_grad_(was)
            for module, name, buffer, was in buffers:
                module._buffers[name] = buffer  # a forward may have put another tensor there
                if not torch.equal(buffer, was):  # not in vain: an expanded buffer cannot be written to
                    buffer.copy_(was)
