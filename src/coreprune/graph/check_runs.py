"""Runs of a model and of what is cut from it: on inputs, and with weights, that hide nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._alive import amplified, enlivened
from coreprune._mapped import stored_as
from coreprune._twin import quiet
from coreprune.errors import ModelError, first_line
from coreprune.graph.caches import drop
from coreprune.graph.captured import Captured, capture
from coreprune.graph.check_inputs import BATCH, STYLES, Drawing, drawing
from coreprune.graph.check_sizes import longer, resized
from coreprune.graph.costs import CostModel
from coreprune.graph.groups import Group
from coreprune.graph.ops import operation
from coreprune.graph.replay import replay
from coreprune.graph.slicing import cut
from coreprune.graph.verify import compare, tensors, zeroed

log = logging.getLogger(__name__)

_CHEAP = 100_000_000  # multiply-accumulates of one sample up to which the check computes in float64
_TWICE = 4  # times the work of an image that is twice as high and wide
_FEW = 50_000_000  # parameters up to which it does
SEED = 0
_SEVERAL = 10_000  # entries of the inputs that show what happens along every axis

Masks = Mapping[tuple[str, int], Tensor]
Chosen = Sequence[tuple[Group, Tensor]]  # groups with the channels that stay


class Runs:
    """How a model and what is cut from it are run. Everything is found out when it is first needed.

    model, captured: the original and its graph. alive: what takes the place of weights, by name, once `inputs` is
    known.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured = model, captured
        self.alive: dict[str, Tensor] = {}
        self._graphs: dict[int, Captured | None] = {}

    # --- what is found out once ---------------------------------------------------------------------------------------
    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the computation; None for the model's own."""
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        parameters = sum(p.numel() for p in self.model.parameters())
        cheap = CostModel(self.captured, ())().macs <= _CHEAP and parameters <= _FEW
        tried = [torch.float64] * cheap + [torch.float32] * bool(own & {torch.float16, torch.bfloat16})
        for dtype in tried:
            args, kwargs = drawing(self.captured).inputs(SEED, dtype)
            try:
                with quiet(self.model) as still:
                    drop(still, self.captured.caches)
                    _cast(still, dtype)(*args, **kwargs)
            except Exception as error:
                log.debug("the model does not run in %s: %s", dtype, first_line(error))
            else:
                return dtype
        return None

    @cached_property
    def rounded(self) -> bool:
        """Whether the forward says itself in which precision it computes, as many norms and rotations do."""
        names = (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
        return any(
            operation(node).kind == "like" and any(x in names for x in (*node.args, *node.kwargs.values()))
            for node in self.captured.graph.graph.nodes
            if node.op == "call_function"
        )

    @cached_property
    def inputs(self) -> tuple[Drawing, ...]:
        """The inputs to compare on: like each of the examples, and with longer axes if the model takes them.

        Empty if for the first example no inputs are found on which the outputs are finite and depend on the inputs.
        """
        examples = [self.captured, *(c for c in self.captured.more if not c.training)]
        weights = cache(lambda amplify: self._amplified() if amplify else enlivened(self.model))
        # A network that was not trained is deaf to all styles: weights are amplified before the others are tried.
        for styles, amplify in product((STYLES[:1], STYLES[1:]), (False, True)):
            self.alive = weights(amplify)
            if first := self._drawn_like(drawing(examples[0]), styles):
                others = [x for example in examples[1:] for x in self._drawn_like(drawing(example))]
                return (*others, *first)
        return ()

    def _amplified(self) -> dict[str, Tensor]:
        """Weights that let more through than `alive`."""
        base = drawing(self.captured)
        several = replace(base, lengths={at: BATCH for at in base.single() if at[1] == 0})
        for inputs in (several, base):
            args, kwargs = self.draw(inputs)
            try:
                with self.original() as still:
                    new = amplified(still, lambda twin, a=args, k=kwargs: twin(*a, **k))
            except Exception as error:
                log.debug("the model does not run when its weights are amplified: %s", first_line(error))
            else:
                named = dict(self.model.named_parameters())
                return {**self.alive, **{name: value.to(named[name].dtype) for name, value in new.items()}}
        return self.alive

    def _drawn_like(self, example: Drawing, styles: Sequence[str] = STYLES) -> tuple[Drawing, ...]:
        for style in styles:
            base = replace(example, style=style)
            made = self._made(base)
            if made is None:
                continue
            found = {base: made, **self._resized(base, made), **longer(base, self._made)}
            if any(self._reacts(*x) for x in found.items()):
                return tuple(found)
        return ()

    def _resized(self, base: Drawing, usual: Any) -> dict[Drawing, Any]:
        """Inputs of another size, if the model makes as many samples of them as of `base`, which gives `usual`."""
        axes = self.captured.axes
        size = axes.size(base.inputs(SEED))

        def samples(outputs: Any) -> list[int | None]:
            rows = axes.rows([x for x in tensors(outputs) if x.is_floating_point()], size)
            return [None if x is None else len(x) for x in rows]

        def made(inputs: Drawing) -> Any:  # `view(-1, 400)` makes more samples of a larger image
            got = self._made(inputs)
            return got if got is not None and samples(got) == samples(usual) else None

        cheap = _TWICE * CostModel(self.captured, ())().macs <= _CHEAP
        return resized(base, dict(enumerate(axes.inputs)), made, cheap)

    def _reacts(self, inputs: Drawing, made: Any) -> bool:
        """Whether other inputs give other outputs, as far as `compare` sees it. made: the outputs of these."""
        other = self.of_original(inputs, seed=SEED + 1)
        return compare(made, other, rounded=self.rounded) is not None

    @property
    def light(self) -> Drawing:
        """The inputs to look at the original on: with one sample, unless the others have longer axes, too. Of large
        images, the smaller ones."""
        if any(axis for _, axis in self.inputs[-1].lengths):
            return self.inputs[-1]
        first = self.inputs[0]
        smaller = (x for x in self.inputs if x.lengths and x.entries < first.entries)
        return next((x for x in smaller if x.entries >= _SEVERAL), first)

    @cached_property
    def shapes(self) -> list[torch.Size] | None:
        """The shapes of the outputs in training mode; None if the model does not run in it."""
        try:
            return [x.shape for x in tensors(self.of_original(self.inputs[-1], training=True))]
        except Exception as error:
            log.debug("the model does not run in training mode: %s", first_line(error))
            return None

    def graph(self, inputs: Drawing) -> Captured | None:
        """The model traced on inputs, with the nodes of `captured`; None if it has others."""
        if id(inputs) not in self._graphs:
            self._graphs[id(inputs)] = self._same_graph(inputs) or self._new_graph(inputs)
        return self._graphs[id(inputs)]

    def _same_graph(self, inputs: Drawing) -> Captured | None:
        """`captured` itself with other inputs, if the inputs have its sizes and it computes what the model does."""
        if inputs.lengths:
            return None
        args, kwargs = self.draw(inputs)
        found = replace(self.captured, args=args, kwargs=kwargs)
        try:
            with self.original() as still:
                got = replay(found, still, {}, {})
        except Exception as error:  # such as constants in another dtype
            log.debug("the graph does not run on the inputs of the check: %s", first_line(error))
            return None
        want = tensors(self.of_original(inputs))
        return found if compare(want[: len(got)], got, True, self.rounded) is None else None

    def _new_graph(self, inputs: Drawing) -> Captured | None:
        args, kwargs = self.draw(inputs)
        try:
            with self.original(own_inputs=False) as still:
                axes = self.captured.axes
                found = capture(still, args, kwargs, axes.size((args, kwargs)), batch_axis=axes)
        except ModelError as error:
            log.debug("%s", error)
            return None
        return found if _nodes(found) == _nodes(self.captured) else None

    def _made(self, inputs: Drawing) -> Any:
        """What the original makes of inputs; None if it does not run on them, or gives no numbers."""
        try:
            got = self.of_original(inputs)
        except Exception as error:
            log.debug("the model does not run on inputs drawn %s: %s", inputs.style, first_line(error))
            return None
        return got if any(not x.is_floating_point() or bool(torch.isfinite(x).any()) for x in tensors(got)) else None

    # --- runs ---------------------------------------------------------------------------------------------------------
    def draw(self, inputs: Drawing, seed: int = SEED) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) in the dtype of the computation."""
        return inputs.inputs(seed, self.dtype)

    @contextmanager
    def original(self, chosen: Chosen = (), own_inputs: bool = True) -> Iterator[nn.Module]:
        """A twin of the original, to run and to change, with zeros where removed channels are read."""
        with self._ready(self.model, self.alive, own_inputs) as still:
            named = dict([*still.named_parameters(), *still.named_buffers()])
            for name, value in zeroed(still, chosen).items():
                named[name].data = value
            yield still

    @contextmanager
    def pruned(self, small: nn.Module, masks: Masks) -> Iterator[nn.Module]:
        """A twin of what was cut from the original, to run and to change. masks: `kept_positions`."""
        with self._ready(small, self._left(masks)) as still:
            yield still

    def of_original(self, inputs: Drawing, chosen: Chosen = (), seed: int = SEED, training: bool = False) -> Any:
        """The outputs of `original`."""
        args, kwargs = self.draw(inputs, seed)
        with self.original(chosen) as still:
            return still.train(training)(*args, **kwargs)

    def of_pruned(self, small: nn.Module, inputs: Drawing, masks: Masks, training: bool = False) -> Any:
        """The outputs of `pruned`."""
        args, kwargs = self.draw(inputs)
        with self.pruned(small, masks) as still:
            return still.train(training)(*args, **kwargs)

    def dress(self, module: nn.Module, path: str, masks: Masks) -> None:
        """Give a copy of the pruned model's module at `path` the weights that it has in `pruned`."""
        named = dict([*module.named_parameters(prefix=path), *module.named_buffers(prefix=path)])
        for name, value in self._left(masks).items():
            if name in named:
                named[name].data = value
        module.eval()
        if self.dtype is not None:
            _cast(module, self.dtype)

    def _left(self, masks: Masks) -> dict[str, Tensor]:
        """What is left of the weights that take the place of the model's."""
        return {name: cut(t, {d: m for (n, d), m in masks.items() if n == name}) for name, t in self.alive.items()}

    @contextmanager
    def _ready(self, model: nn.Module, own: Mapping[str, Tensor], own_inputs: bool = True) -> Iterator[nn.Module]:
        with quiet(model, own_inputs) as still:
            drop(still, self.captured.caches)
            named = dict([*still.named_parameters(), *still.named_buffers()])
            for name, value in own.items():
                named[name].data = value
            if self.dtype is not None:
                _cast(still, self.dtype)
            torch.manual_seed(SEED)  # so that both models draw the same numbers
            yield still


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    # `model.to` would drop imaginary parts
    return model._apply(lambda t: stored_as(t, t.to(dtype)) if t.is_floating_point() else t)


def _nodes(captured: Captured) -> list[str]:
    return [n.name for n in captured.graph.graph.nodes]
