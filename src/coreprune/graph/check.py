"""The check after surgery: on which inputs, and with which weights, a model is compared with what is cut from it.

The inputs are drawn for the check (`check_inputs.py`): some like the example, some with several samples and with every
axis longer than 1 that may be, and some of another size (`check_sizes.py`). Weights that hide what is behind them,
because they are all equal, such as a scale of zero, are replaced by random ones in both models; where still nothing
reaches the outputs, weights are amplified. Cheap models are compared in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from coreprune.errors import first_line
from coreprune.graph.captured import Captured
from coreprune.graph.check_runs import SEED, Chosen, Masks, Runs
from coreprune.graph.failure import failed
from coreprune.graph.groups import Group, ParamSlice
from coreprune.graph.members import Element
from coreprune.graph.replay import replay
from coreprune.graph.shorter import passing_, shallow_
from coreprune.graph.verify import compare, differ, tensors, zero_masks

log = logging.getLogger(__name__)

IN_TRAINING = "in training mode"


class Check:
    """How a model is compared with what is cut from it. Everything is found out when it is first needed.

    model, captured: the original and its graph.
    """

    def __init__(self, model: nn.Module, captured: Captured) -> None:
        self.runs = Runs(model, captured)

    @cached_property
    def blind(self) -> str | None:
        """Why the check could not tell a right result from a wrong one, or None."""
        if self.runs.inputs:
            return None
        return "the outputs are not finite or do not depend on the inputs, so that the cut cannot be checked"

    def dress(self, module: nn.Module, path: str, masks: Masks) -> None:
        """Give a copy of the module at `path` the weights with which `difference` runs it."""
        self.runs.dress(module, path, masks)

    def difference(self, small: nn.Module, chosen: Chosen, masks: Masks) -> str | None:
        """None if `small` runs and equals the original with the removed channels read as zeros, else what is wrong.

        If the removed channels enter the statistics of a norm, the model is only run and not compared: it cannot be
        equal.

        chosen: the groups with the channels that stay. masks: `kept_positions` of them.
        """
        if self.blind:
            return self.blind
        exact = not any("norm-statistics" in g.flags for g, _ in chosen)
        reads, compared = zero_masks(self.runs.captured, chosen), False
        for inputs in self.runs.inputs:
            try:
                got = self.runs.of_pruned(small, inputs, masks)
            except Exception as error:
                return failed(error)
            if reads:
                graph = self.runs.graph(inputs)
                if graph is None:
                    continue
                with self.runs.original(chosen) as still:
                    want = replay(graph, still, {}, reads)
                got = tensors(got)[: len(want)]
            else:
                want = self.runs.of_original(inputs, chosen)
            compared, problem = True, compare(got, want, exact, self.runs.rounded)
            if problem is not None:
                return problem + inputs.unlike
        if not compared:
            return "the model cannot be traced on the inputs of the check"
        return self._trained(small, masks)

    def without(self, gone: Sequence[Element]) -> str | None:
        """None if the model runs without some elements, and computes what it computes when they pass on what enters.

        Both ways are tried: without them in their lists (`shallow_`), and with a `Passing` in their places.
        """
        if self.blind:
            return self.blind
        names, compared = [e.name for e in gone], False
        for inputs in self.runs.inputs:
            graph = self.runs.graph(inputs)
            args, kwargs = self.runs.draw(inputs)
            want = None
            if graph is not None:
                with self.runs.original() as still:
                    want = replay(graph, still, {}, {}, {e.exit.name: e.entry.name for e in gone})
            for take in (shallow_, partial(passing_, args=args, kwargs=kwargs)):
                try:
                    with self.runs.original() as still:
                        take(still, names)
                        got = tensors(still(*args, **kwargs))
                except Exception as error:
                    return failed(error)
                if want is None:
                    continue
                compared, problem = True, compare(got[: len(want)], want, True, self.runs.rounded)
                if problem is not None:
                    return problem
        return None if compared else "the model cannot be traced on the inputs of the check"

    def _trained(self, small: nn.Module, masks: Masks) -> str | None:
        """What is wrong in training mode, which is run and not compared. None if the original does not run, either."""
        if self.runs.shapes is None:
            return None
        try:
            made = self.runs.of_pruned(small, self.runs.inputs[-1], masks, training=True)
        except Exception as error:
            return f"{IN_TRAINING}, {failed(error)}"
        same = [x.shape for x in tensors(made)] == self.runs.shapes
        return None if same else f"{IN_TRAINING}, the output changes shape"

    def unseen(self, groups: Sequence[Group]) -> dict[str, str]:
        """The groups of which nothing is seen in the outputs, with words for it."""
        if self.blind:
            return {g.name: self.blind for g in groups}
        moved, why = self._moved(groups), "its channels do not reach an output, so that the cut cannot be checked"
        unmoved = [g for g in groups if g.name not in moved]
        return {g.name: why for g in (self._hidden(unmoved) if unmoved else [])}

    def _hidden(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without which the outputs are the same. Mostly none is or all are, so all are tried at once."""
        usual, nothing = self.runs.of_original(self.runs.inputs[-1]), torch.zeros(0, dtype=torch.int64)

        def hidden(part: Sequence[Group]) -> list[Group]:
            without = self.runs.of_original(self.runs.inputs[-1], [(g, nothing) for g in part])
            if not differ(without, usual):
                return list(part)
            half = len(part) // 2
            return hidden(part[:half]) + hidden(part[half:]) if half else []

        return hidden(groups)

    @contextmanager
    def oracle(self, chosen: Chosen) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The original with the removed channels read as zeros, to run and to change, and (args, kwargs) for it."""
        args, kwargs = self.runs.draw(self.runs.light)
        with self.runs.original(chosen) as still:
            yield still, args, kwargs

    def small_runs(self, small: nn.Module, masks: Masks) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """The pruned model as `difference` runs it, to run and to change, with (args, kwargs): once for all inputs."""
        for inputs in self.runs.inputs:
            args, kwargs = self.runs.draw(inputs)
            with self.runs.pruned(small, masks) as still:
                yield still, args, kwargs

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

        args, kwargs = self.runs.draw(self.runs.light)
        try:
            with self.runs.original() as still, torch.enable_grad():
                for name, p in still.named_parameters():
                    p.requires_grad_(name in watched and p.is_floating_point())
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(note(name))
                out = [x for x in tensors(still(*args, **kwargs)) if x.requires_grad]
                noise = torch.Generator().manual_seed(SEED)
                total = [(x.nan_to_num(0, 0, 0) * torch.randn(x.shape, generator=noise).to(x)).sum() for x in out]
                torch.stack([t.double() for t in total]).sum().backward()
        except Exception as error:  # a forward need not allow gradients
            log.debug("no gradients for the check: %s", first_line(error))
        return moved


def _rows(grad: Tensor, s: ParamSlice) -> Tensor:
    return grad if s.index.dim() == 2 else grad.movedim(s.dim, 0)[(s.index >= 0).to(grad.device)]
