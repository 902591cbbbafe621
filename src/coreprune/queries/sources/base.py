"""What every source of queries takes and gives.

    inputs = source(target, n, generator, tell)  # (n, *target.shape), on the example's device, in its dtype

A source is a small frozen dataclass. Its fields are its options. `make_queries(spec=...)` takes one, or its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes, usual
from coreprune._example import first_tensor, largest_batch
from coreprune._single import answering
from coreprune.errors import InputError
from coreprune.queries.check import fitting
from coreprune.queries.leaves import by_name, shared, title, with_leaves
from coreprune.queries.tokenizer import Tokens, beside, tokens_of

KINDS = ("tokens", "pixels", "vectors", "reals")
Tell = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor among the example inputs, for which a source makes inputs.

    model: in evaluation mode. Its parameters require no gradient.
    args, kwargs: the example inputs: one sample, as the model takes it.
    leaf: position of the tensor among the leaves of (args, kwargs).
    said: which axes hold the samples; None for the first.
    tokenizer: what the caller passed, None, or False for none. See `tokens`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaf: int
    said: BatchAxes | None = None
    tokenizer: Any = None

    @cached_property
    def tokens(self) -> Tokens | None:
        """What the caller's tokenizer says of the tokens, or the one in the folder that the model was loaded from."""
        place = beside(self.model) if self.tokenizer is None else self.tokenizer
        return None if place is None or place is False else tokens_of(place)

    @cached_property
    def mask(self) -> int | None:
        """Position of the mask that says which of these tokens are padding, as transformers has it; None without."""
        places = by_name(self.model, self.args, self.kwargs)
        own = next((name for name, i in places.items() if i == self.leaf), "")
        found = places.get(f"{own.removesuffix('input_ids')}attention_mask") if own.endswith("input_ids") else None
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return found if found is not None and leaves[found].shape == self.given.shape else None

    @property
    def unmasked(self) -> Target:
        """The same with a mask that leaves every token."""
        if self.mask is None:
            return self
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        leaves[self.mask] = torch.ones_like(leaves[self.mask])
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return replace(self, args=args, kwargs=kwargs)

    @cached_property
    def axes(self) -> BatchAxes:
        """Which axes of the inputs hold the samples."""
        return self.said or usual((self.args, self.kwargs))

    @property
    def given(self) -> Tensor:
        """The tensor itself, as the model takes it."""
        return pytree.tree_leaves((self.args, self.kwargs))[self.leaf]

    @property
    def example(self) -> Tensor:
        """The tensor with the sample along axis 0, (1, *shape)."""
        return self.axes.stored(self.leaf, self.given)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(self.example.shape[1:])

    @property
    def title(self) -> str:
        """What messages call it, such as "input 'image'"."""
        return title(self.args, self.kwargs, self.leaf)

    @property
    def kind(self) -> str:
        """tokens for whole numbers, pixels for (N, C, H, W), vectors for (N, d), reals for other real numbers."""
        if not self.example.is_floating_point():
            return "tokens"
        return {1: "vectors", 3: "pixels"}.get(len(self.shape), "reals")

    def cast(self, x: Tensor) -> Tensor:
        """Inputs (n, ...) in the shape (n, *shape), on the example's device, in its dtype.

        Raises InputError for real numbers where tokens are needed.
        """
        if x.is_floating_point() and not self.example.is_floating_point():
            raise InputError(
                f"this source makes real numbers, but the input to be drawn is {self.example.dtype}, probably tokens. "
                "Choose another source: auto, random-tokens or zipf-tokens."
            )
        return x.reshape(len(x), *self.shape).to(self.example.device, self.example.dtype)

    def call(self, x: Tensor) -> Any:
        """Run the model on x (n, *shape). Every other input is the example's, repeated n times.

        n is 1 for a model without a batch.
        """
        args, kwargs = self._inputs(x)
        return self.model(*args, **kwargs)

    def _inputs(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model for x (n, *shape)."""
        new = {self.leaf: x}
        kept = shared(self.args, self.kwargs, self.axes, new)
        leaves, tree = pytree.tree_flatten(with_leaves(self.args, self.kwargs, self.axes, new, len(x)))
        given = [
            self.axes.given(i, leaf) if isinstance(leaf, Tensor) and i not in kept else leaf
            for i, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(given, tree)

    @cached_property
    def together(self) -> bool:
        """Whether the model takes several inputs at once."""
        if self.axes.whole:
            return False
        return largest_batch(self._inputs(torch.cat([self.example, self.example])), 2, self.model) > 1

    def logits(self, x: Tensor) -> Tensor:
        """The output field `logits` for x if the model has one, otherwise its first tensor of real numbers.

        A model that takes one input at a time is called once for each of them. Raises InputError if it returns no
        such tensor.
        """
        if len(x) > 1 and not self.together:
            return torch.cat([self.logits(row) for row in x.split(1)])
        out = self.call(x)
        named = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
        found = named if isinstance(named, Tensor) else first_tensor(out)
        if found is None:
            raise InputError(f"the model returns a {type(out).__name__} without any tensor of real numbers.")
        return found


@runtime_checkable
class Source(Protocol):
    """A full source of queries, which can use the model. If yours need not, write a function (n, generator) instead.

    name: what reports call it.
    kind: what it makes: tokens (whole numbers), pixels (images, flat ones too), vectors, or reals (real numbers of any
        shape). If a model takes several inputs, the source fills those of its kind. The others are left to "auto".

    A source whose inputs are no independent draws, because they are optimised together, says so with an attribute
    jointly = True. Nothing is then certified on them that counts draws (T11).

    A source may also have a method remark(target, inputs) that returns a sentence about the inputs that it made, for
    the report, and a method also(target, inputs) that returns further inputs that go with them: a dict from positions
    among the leaves of (args, kwargs) to tensors (n, ...). Without it, an attention mask that goes with tokens follows
    the padding in them, and leaves every token if none is known to be padding.
    """

    @property
    def name(self) -> str:
        """What reports call it. An attribute of the class is enough."""
        ...

    @property
    def kind(self) -> str:
        """What it makes. An attribute of the class is enough."""
        ...

    def at_once(self, target: Target) -> int | None:
        """How many inputs to make in one call. None: any number."""
        ...

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs, (n, *target.shape). Draw from the generator only. Call tell(done, total) after every step."""
        ...


def meant(kind: str, targets: Sequence[Target]) -> list[Target]:
    """Those inputs of the model that a source of some kind is for.

    They are the inputs of its kind. Where there is none, a source of real numbers gets all real inputs: images may be
    flat vectors. Where there is none either, it gets all inputs, and will say why it cannot make them.

    Raises InputError for an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"the kind of a source of queries must be one of {', '.join(KINDS)}, but it is {kind!r}.")
    same = [target for target in targets if target.kind == kind]
    real = [target for target in targets if target.kind != "tokens"]
    if kind == "tokens":
        return same or list(targets)
    return (real if kind == "reals" else same or real) or list(targets)


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
    """Make n inputs in batches of about equal size.

    Every batch has a seed of its own, so an interrupted run that goes on gives the same inputs. What the source returns
    is checked: InputError names the source and what is wrong.

    parts: the first batches, if they exist already. finished: called after each batch with all batches so far.
    """
    at_once = source.at_once(target) or n
    sizes = [len(rows) for rows in torch.arange(n).tensor_split(-(-n // at_once))]
    seeds = torch.randint(2**62, (len(sizes),), generator=generator, device=generator.device).tolist()
    made = list(parts)
    for i in range(len(made), len(sizes)):

        def told(done: int, total: int, before: int = i) -> None:
            tell(before * total + done, len(sizes) * total)

        batch = source(target, sizes[i], torch.Generator().manual_seed(seeds[i]), told)
        made.append(fitting(batch, target.example, f"the source {source.name!r}, {target.title}", sizes[i]))
        if finished is not None:
            finished(made)
    return torch.cat(made)


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """A twin to run (`answering`), whose parameters get no gradients."""
    with answering(model) as still:
        yield still.requires_grad_(False)
