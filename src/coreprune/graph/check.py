"""The check after surgery: on which inputs, and with which weights, a model is compared with what is cut from it.

The inputs are drawn for the check (`check_inputs.py`): some like the example, some with several samples and with every
axis longer than 1 that may be, and some of another size (`check_sizes.py`). Weights that hide what is behind them,
because they are all equal, such as a scale of zero, are replaced by random ones in both models; where still nothing
reaches the outputs, weights are amplified. Cheap models are compared in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
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
from coreprune.graph.failure import failed
from coreprune.graph.groups import Group, ParamSlice
from coreprune.graph.members import Element
from coreprune.graph.ops import operation
from coreprune.graph.replay import replay
from coreprune.graph.shorter import passing_, shallow_
from coreprune.graph.slicing import cut
from coreprune.graph.verify import compare, differ, tensors, zero_masks, zeroed

log = logging.getLogger(__name__)

_CHEAP = 100_000_000  # multiply-accumulates of one sample up to which the check computes in float64
_TWICE = 4  # times the work of an image that is twice as high and wide
_FEW = 50_000_000  # parameters up to which it does
_SEED = 0
_SEVERAL = 10_000  # entries of the inputs that show what happens along every axis

IN_TRAINING = "in training mode"

Masks = Mapping[tuple[str, int], Tensor]


class Check:
    """How a model is compared with what is cut from it. Everything is found out when it is first needed.

    model, captured: the original and its graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.model, self.captured = model, captured
        self._alive: dict[str, Tensor] = {}  # what takes the place of weights, by name, once `_inputs` is known
        self._graphs: dict[int, Captured | None] = {}

    def difference(self, small: nn.Module, chosen: Sequence[tuple[Group, Tensor]], masks: Masks) -> str | None:
        """None if `small` runs and equals the original with the removed channels read as zeros, else what is wrong.

        If the removed channels enter the statistics of a norm, the model is only run and not compared: it cannot be
        equal.

        chosen: the groups with the channels that stay. masks: `kept_positions` of them.
        """
        if self.blind:
            return self.blind
        exact = not any("norm-statistics" in g.flags for g, _ in chosen)
        own = self._own(masks)
        reads, compared = zero_masks(self.captured, chosen), False
        for inputs in self._inputs:
            try:
                got = self._run(small, inputs, own)
            except Exception as error:
                return failed(error)
            if reads:
                graph = self._graph(inputs)
                if graph is None:
                    continue
                with self._ready(self.model, self._alive, chosen) as still:
                    want = replay(graph, still, {}, reads)
                got = tensors(got)[: len(want)]
            else:
                want = self._run(self.model, inputs, self._alive, chosen)
            compared, problem = True, compare(got, want, exact, self._rounded)
            if problem is not None:
                return problem + inputs.unlike
        if not compared:
            return "the model cannot be traced on the inputs of the check"
        return self._trained(small, own)

    def without(self, gone: Sequence[Element]) -> str | None:
        """None if the model runs without some elements, and computes what it computes when they pass on what enters.

        Both ways are tried: without them in their lists (`shallow_`), and with a `Passing` in their places.
        """
        if self.blind:
            return self.blind
        names, compared = [e.name for e in gone], False
        for inputs in self._inputs:
            graph = self._graph(inputs)
            args, kwargs = inputs.inputs(_SEED, self.dtype)
            want = None
            if graph is not None:
                with self._ready(self.model, self._alive) as still:
                    want = replay(graph, still, {}, {}, {e.exit.name: e.entry.name for e in gone})
            for take in (shallow_, partial(passing_, args=args, kwargs=kwargs)):
                try:
                    with self._ready(self.model, self._alive) as still:
                        take(still, names)
                        got = tensors(still(*args, **kwargs))
                except Exception as error:
                    return failed(error)
                if want is None:
                    continue
                compared, problem = True, compare(got[: len(want)], want, True, self._rounded)
                if problem is not None:
                    return problem
        return None if compared else "the model cannot be traced on the inputs of the check"

    def _trained(self, small: nn.Module, own: Mapping[str, Tensor]) -> str | None:
        """What is wrong in training mode, which is run and not compared. None if the original does not run, either."""
        if self._shapes is None:
            return None
        try:
            shapes = [x.shape for x in tensors(self._run(small, self._inputs[-1], own, training=True))]
        except Exception as error:
            return f"{IN_TRAINING}, {failed(error)}"
        return None if shapes == self._shapes else f"{IN_TRAINING}, the output changes shape"

    def unseen(self, groups: Sequence[Group]) -> dict[str, str]:
        """The groups of which nothing is seen in the outputs, with words for it."""
        if self.blind:
            return {g.name: self.blind for g in groups}
        moved, why = self._moved(groups), "its channels do not reach an output, so that the cut cannot be checked"
        unmoved = [g for g in groups if g.name not in moved]
        return {g.name: why for g in (self._hidden(unmoved) if unmoved else [])}

    def _hidden(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without which the outputs are the same. Mostly none is or all are, so all are tried at once."""
        usual, nothing = self._run(self.model, self._inputs[-1], self._alive), torch.zeros(0, dtype=torch.int64)

        def hidden(part: Sequence[Group]) -> list[Group]:
            without = self._run(self.model, self._inputs[-1], self._alive, [(g, nothing) for g in part])
            if not differ(without, usual):
                return list(part)
            half = len(part) // 2
            return hidden(part[:half]) + hidden(part[half:]) if half else []

        return hidden(groups)

    @contextmanager
    def oracle(
        self, chosen: Sequence[tuple[Group, Tensor]]
    ) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The original with the removed channels read as zeros, to run and to change, and (args, kwargs) for it."""
        args, kwargs = self._light.inputs(_SEED, self.dtype)
        with self._ready(self.model, self._alive, chosen) as still:
            yield still, args, kwargs

    def small_runs(self, small: nn.Module, masks: Masks) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The pruned model as `difference` runs it, to run and to change, with (args, kwargs): once for all inputs."""
        own = self._own(masks)
        for inputs in self._inputs:
            args, kwargs = inputs.inputs(_SEED, self.dtype)
            with self._ready(small, own) as still:
                yield still, args, kwargs

    def dress(self, module: nn.Module, path: str, masks: Masks) -> None:
        """Give a copy of the module at `path` the weights with which `difference` runs it."""
        named = dict([*module.named_parameters(prefix=path), *module.named_buffers(prefix=path)])
        for name, value in self._own(masks).items():
            if name in named:
                named[name].data = value
        module.eval()
        if self.dtype is not None:
            _cast(module, self.dtype)

    def _own(self, masks: Masks) -> dict[str, Tensor]:
        """What is left of the weights that take the place of the model's."""
        return {name: cut(t, {d: m for (n, d), m in masks.items() if n == name}) for name, t in self._alive.items()}

    # --- what is found out once ---------------------------------------------------------------------------------------
    @cached_property
    def blind(self) -> str | None:
        """Why the check could not tell a right result from a wrong one, or None."""
        if self._inputs:
            return None
        return "the outputs are not finite or do not depend on the inputs, so that the cut cannot be checked"

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the computation; None for the model's own."""
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        parameters = sum(p.numel() for p in self.model.parameters())
        cheap = CostModel(self.captured, ())().macs <= _CHEAP and parameters <= _FEW
        tried = [torch.float64] * cheap + [torch.float32] * bool(own & {torch.float16, torch.bfloat16})
        for dtype in tried:
            args, kwargs = drawing(self.captured).inputs(_SEED, dtype)
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
    def _rounded(self) -> bool:
        """Whether the forward says itself in which precision it computes, as many norms and rotations do."""
        names = (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
        return any(
            operation(node).kind == "like" and any(x in names for x in (*node.args, *node.kwargs.values()))
            for node in self.captured.graph.graph.nodes
            if node.op == "call_function"
        )

    @cached_property
    def _inputs(self) -> tuple[Drawing, ...]:
        """The inputs to compare on: like each of the examples, and with longer axes if the model takes them.

        Empty if for the first example no inputs are found on which the outputs are finite and depend on the inputs.
        """
        examples = [self.captured, *(c for c in self.captured.more if not c.training)]
        weights = cache(lambda amplify: self._amplified(self.model) if amplify else enlivened(self.model))
        # A network that was not trained is deaf to all styles: weights are amplified before the others are tried.
        for styles, amplify in product((STYLES[:1], STYLES[1:]), (False, True)):
            self._alive = weights(amplify)
            if first := self._drawn_like(drawing(examples[0]), styles):
                others = [x for example in examples[1:] for x in self._drawn_like(drawing(example))]
                return (*others, *first)
        return ()

    def _amplified(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights that let more through than `_alive`."""
        base = drawing(self.captured)
        several = replace(base, lengths={at: BATCH for at in base.single() if at[1] == 0})
        for inputs in (several, base):
            args, kwargs = inputs.inputs(_SEED, self.dtype)
            try:
                with self._ready(model, self._alive) as still:
                    new = amplified(still, lambda twin, a=args, k=kwargs: twin(*a, **k))
            except Exception as error:
                log.debug("the model does not run when its weights are amplified: %s", first_line(error))
            else:
                named = dict(model.named_parameters())
                return {**self._alive, **{name: value.to(named[name].dtype) for name, value in new.items()}}
        return self._alive

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

        def samples(outputs: Any) -> list[int | None]:
            rows = axes.rows([x for x in tensors(outputs) if x.is_floating_point()], axes.size(base.inputs(_SEED)))
            return [None if x is None else len(x) for x in rows]

        def made(inputs: Drawing) -> Any:  # `view(-1, 400)` makes more samples of a larger image
            got = self._made(inputs)
            return got if got is not None and samples(got) == samples(usual) else None

        cheap = _TWICE * CostModel(self.captured, ())().macs <= _CHEAP
        return resized(base, dict(enumerate(axes.inputs)), made, cheap)

    def _reacts(self, inputs: Drawing, made: Any) -> bool:
        """Whether other inputs give other outputs, as far as `compare` sees it. made: the outputs of these."""
        other = self._run(self.model, inputs, self._alive, seed=_SEED + 1)
        return compare(made, other, rounded=self._rounded) is not None

    @property
    def _light(self) -> Drawing:
        """The inputs to look at the original on: with one sample, unless the others have longer axes, too. Of large
        images, the smaller ones."""
        if any(axis for _, axis in self._inputs[-1].lengths):
            return self._inputs[-1]
        first = self._inputs[0]
        smaller = (x for x in self._inputs if x.lengths and x.entries < first.entries)
        return next((x for x in smaller if x.entries >= _SEVERAL), first)

    @cached_property
    def _shapes(self) -> list[torch.Size] | None:
        """The shapes of the outputs in training mode; None if the model does not run in it."""
        try:
            return [x.shape for x in tensors(self._run(self.model, self._inputs[-1], self._alive, training=True))]
        except Exception as error:
            log.debug("the model does not run in training mode: %s", first_line(error))
            return None

    def _graph(self, inputs: Drawing) -> Captured | None:
        """The model traced on inputs, with the nodes of `captured`; None if it has others."""
        if id(inputs) not in self._graphs:
            self._graphs[id(inputs)] = self._same_graph(inputs) or self._new_graph(inputs)
        return self._graphs[id(inputs)]

    def _same_graph(self, inputs: Drawing) -> Captured | None:
        """`captured` itself with other inputs, if the inputs have its sizes and it computes what the model does."""
        if inputs.lengths:
            return None
        args, kwargs = inputs.inputs(_SEED, self.dtype)
        found = replace(self.captured, args=args, kwargs=kwargs)
        try:
            with self._ready(self.model, self._alive) as still:
                got = replay(found, still, {}, {})
        except Exception as error:  # such as constants in another dtype
            log.debug("the graph does not run on the inputs of the check: %s", first_line(error))
            return None
        want = tensors(self._run(self.model, inputs, self._alive))
        return found if compare(want[: len(got)], got, True, self._rounded) is None else None

    def _new_graph(self, inputs: Drawing) -> Captured | None:
        args, kwargs = inputs.inputs(_SEED, self.dtype)
        try:
            with self._ready(self.model, self._alive, own_inputs=False) as still:
                axes = self.captured.axes
                found = capture(still, args, kwargs, axes.size((args, kwargs)), batch_axis=axes)
        except ModelError as error:
            log.debug("%s", error)
            return None
        return found if _nodes(found) == _nodes(self.captured) else None

    # --- runs ---------------------------------------------------------------------------------------------------------
    @contextmanager
    def _ready(
        self,
        model: nn.Module,
        own: Mapping[str, Tensor],
        chosen: Sequence[tuple[Group, Tensor]] = (),
        own_inputs: bool = True,
    ) -> Iterator[nn.Module]:
        """A twin with other weights: `own` in place of the model's, and zeros where removed channels are read."""
        with quiet(model, own_inputs) as still:
            drop(still, self.captured.caches)
            named = dict([*still.named_parameters(), *still.named_buffers()])
            for name, value in own.items():
                named[name].data = value
            for name, value in zeroed(still, chosen).items():
                named[name].data = value
            if self.dtype is not None:
                _cast(still, self.dtype)
            torch.manual_seed(_SEED)  # so that both models draw the same numbers
            yield still

    def _run(
        self,
        model: nn.Module,
        inputs: Drawing,
        own: Mapping[str, Tensor],
        chosen: Sequence[tuple[Group, Tensor]] = (),
        seed: int = _SEED,
        training: bool = False,
    ) -> Any:
        args, kwargs = inputs.inputs(seed, self.dtype)
        with self._ready(model, own, chosen) as still:
            return still.train(training)(*args, **kwargs)

    def _made(self, inputs: Drawing) -> Any:
        """What the original makes of inputs; None if it does not run on them, or gives no numbers."""
        try:
            got = self._run(self.model, inputs, self._alive)
        except Exception as error:
            log.debug("the model does not run on inputs drawn %s: %s", inputs.style, first_line(error))
            return None
        return got if any(not x.is_floating_point() or bool(torch.isfinite(x).any()) for x in tensors(got)) else None

    def _moved(self, groups: Sequence[Group]) -> set[str]:
        """The groups with weights on which the outputs depend, as far as the gradient shows it."""
        watched: dict[str, list[tuple[str, ParamSlice]]] = {}
        for group in groups:
            for s in group.slices:
                watched.setdefault(s.param, []).append((group.name, s))
        moved: set[str] = set()

        def note(name: str) -> Callable[[Tensor], None]:
            def hook(p: Tensor) -> None:
                grad, p.grad = p.grad, None
                moved.update(
                    group for group, s in watched[name] if grad is not None and bool(_rows(grad, s).count_nonzero())
                )

            return hook

        args, kwargs = self._light.inputs(_SEED, self.dtype)
        try:
            with self._ready(self.model, self._alive) as still, torch.enable_grad():
                for name, p in still.named_parameters():
                    p.requires_grad_(name in watched and p.is_floating_point())
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(note(name))
                out = [x for x in tensors(still(*args, **kwargs)) if x.requires_grad]
                noise = torch.Generator().manual_seed(_SEED)
                total = [(x.nan_to_num(0, 0, 0) * torch.randn(x.shape, generator=noise).to(x)).sum() for x in out]
                torch.stack([t.double() for t in total]).sum().backward()
        except Exception as error:  # a forward need not allow gradients
            log.debug("no gradients for the check: %s", first_line(error))
        return moved


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    # `model.to` would drop imaginary parts
    return model._apply(lambda t: stored_as(t, t.to(dtype)) if t.is_floating_point() else t)


def _rows(grad: Tensor, s: ParamSlice) -> Tensor:
    return grad if s.index.dim() == 2 else grad.movedim(s.dim, 0)[(s.index >= 0).to(grad.device)]


def _nodes(captured: Captured) -> list[str]:
    return [n.name for n in captured.graph.graph.nodes]
