"""Watching the calls of a forward that get numbers which modules remember, and what these have to become.

Two runs differ in the removed channels and nowhere else, so every activation shows which of its positions stay. A call
shows what its numbers have to become: the values with which it makes, of what is left of its inputs, what is left of
its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coreprune.graph.slicing import cut
from coreprune.graph.tracked import Env, Number, Shape, Slot, after_cut, known, leaves, plain, replaced

Demand = list[dict[Slot, int]]  # values that the numbers of one call may have

_MOST_TRIES = 512  # values for the numbers of one call

# Functions that can hide a channel, or mix it with others, and keep the shape: their first input takes their place.
_SAME_SHAPE = frozenset(
    """
    relu relu_ relu6 hardtanh hardtanh_ threshold threshold_ hardswish hardsigmoid clamp clamp_ clamp_min clamp_min_
    layer_norm rms_norm group_norm instance_norm
    """.split()  # noqa: SIM905
)

Prints = tuple[Tensor, ...]  # per axis, one number for every position
Seen = tuple[list[Prints], list[Prints]]  # of the inputs and the outputs of a call


class Watch(TorchFunctionMode):
    """Watches the calls that get numbers which modules remember.

    values: the numbers. cuts: parameters that are cut. ratios: (units, units that stay) of the groups. before: what the
    first run saw, or None if this is the first.
    """

    def __init__(
        self,
        values: dict[Slot, int],
        cuts: Mapping[int, dict[int, Tensor]] | None = None,
        ratios: frozenset[tuple[int, int]] = frozenset(),
        before: list[Seen] | None = None,
    ) -> None:
        super().__init__()
        self.events: list[Seen] = []
        self.demands: dict[int, Demand] = {}  # by the number of the call
        self.read: set[Slot] = set()
        self._values, self._cuts, self._ratios, self._before = values, cuts or {}, ratios, before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.shape.__get__ or func is Tensor.size:  # type: ignore[comparison-overlap]
            return self._shape(args[0], *args[1:], *kwargs.values())
        slots = sorted({s for n in leaves((args, kwargs), Number) for s in n.slots}, key=str)
        if not slots:
            return _called(func, args, kwargs)
        inputs = [x for x in leaves((args, kwargs), Tensor)]
        if inputs and not getattr(func, "__name__", "").startswith("new_"):  # of new tensors nothing is seen
            self.read.update(slots)
        seen_inputs = [_prints(x) for x in inputs]
        given = [x.clone() if func is Tensor.__setitem__ else x for x in inputs]
        result = _called(func, plain(args), plain(kwargs))
        outputs = [inputs[0]] if func is Tensor.__setitem__ else list(leaves(result, Tensor))
        self.events.append((seen_inputs, [_prints(x) for x in outputs]))
        if self._before is not None:
            self._solve(func, args, kwargs, given, outputs, slots)
        return result

    def _shape(self, tensor: Tensor, axis: int | None = None) -> Any:
        shape = tuple(int(n) for n in tensor.shape)
        self.events.append(([_prints(tensor)], []))
        if self._before is None:
            return torch.Size(shape) if axis is None else shape[axis]
        stays = self._stays(tensor, self._then_seen(len(self.events) - 1)[0][0])
        left = [int(stays[i].sum()) if i in stays else n for i, n in enumerate(shape)]
        after = Shape(known({(): new}, (), n) for n, new in zip(shape, left, strict=True))
        return after if axis is None else after[axis]

    def _then_seen(self, i: int) -> Seen:
        """What the first run saw at the same place."""
        assert self._before is not None
        if i >= len(self._before) or [len(p) for p in self._before[i]] != [len(p) for p in self.events[i]]:
            raise RuntimeError("the two runs call different functions")
        return self._before[i]

    def _stays(self, tensor: Tensor, before: Prints) -> dict[int, Tensor]:
        """Which positions of a tensor stay, for the axes of which some leave."""
        if id(tensor) in self._cuts:
            return self._cuts[id(tensor)]
        now, found = _prints(tensor), {}
        for axis, (a, b) in enumerate(zip(before, now, strict=True)):
            same = a == b
            if bool(same.any()) and not bool(same.all()):
                found[axis] = same
        if len(found) > 1:  # a part of another axis may depend on no channel, such as padding
            near = {axis: m for axis, m in found.items() if self._likely(len(m), int(m.sum()))}
            found = near if len(near) == 1 else {}
        return found

    def _likely(self, length: int, stay: int) -> bool:
        return any(length * k == stay * n for n, k in self._ratios)

    def _solve(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], slots: list[Slot]
    ) -> None:
        """Find the numbers with which a call makes what is left of its outputs."""
        then_inputs, then_outputs = self._then_seen(len(self.events) - 1)
        ins = [self._stays(x, p) for x, p in zip(inputs, then_inputs, strict=True)]
        outs = [self._stays(x, p) for x, p in zip(outputs, then_outputs, strict=True)]
        if not any(ins) and not any(outs):
            return
        left = [cut(x, m) for x, m in zip(inputs, ins, strict=True)]
        want = [cut(x, m) for x, m in zip(outputs, outs, strict=True)]
        statistic = getattr(func, "__name__", "") in _SAME_SHAPE

        def works(env: Env, enough: Callable[[Iterator[bool]], bool] = all) -> bool:
            tensors = iter([x.clone() for x in left])
            try:
                a, k = replaced((args, kwargs), lambda n: after_cut(n, env), lambda _: next(tensors))
                got = func(*a, **k)
            except Exception:
                return False
            found = [next(leaves(a, Tensor))] if func is Tensor.__setitem__ else list(leaves(got, Tensor))
            if [x.shape for x in found] != [y.shape for y in want]:
                return False
            return enough(statistic or _close(x, y) for x, y in zip(found, want, strict=True))

        if works({}):
            return
        marks = [m for s in (*ins, *outs) for m in s.values() if m.dim() == 1]
        values = [self._candidates(self._values[s], marks) for s in slots]
        tries = [dict(zip(slots, tried, strict=True)) for tried in islice(product(*values), _MOST_TRIES)]
        # A further output may be a statistic over channels that nobody reads, such as weights averaged over heads.
        if options := [env for env in tries if works(env)] or [env for env in tries if works(env, any)]:
            self.demands[len(self.events) - 1] = options

    def _candidates(self, value: int, marks: list[Tensor]) -> list[int]:
        """What a number may become, likely ones first. marks: for axes that get shorter, which positions stay."""
        found = []
        for m in marks:
            length, stay = len(m), int(m.sum())
            if value <= length:
                found.append(int(m[:value].sum()))
            if length % value == 0 and stay % (length // value) == 0:
                found.append(stay // (length // value))
            if value % length == 0:
                found.append(value // length * stay)
        found += [value * stay // units for units, stay in sorted(self._ratios) if value * stay % units == 0]
        return [n for n in dict.fromkeys([*found, value]) if n > 0]


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    if getattr(func, "__name__", "") in _SAME_SHAPE and args and isinstance(args[0], Tensor):
        return args[0]
    return func(*plain(args), **plain(kwargs))


def _prints(x: Tensor) -> Prints:
    """Per axis, a weighted sum for every position: equal where nothing changed. A plain sum of a softmax always is."""
    x = (x.abs() if x.is_complex() else x).detach().double().nan_to_num()
    x = x * (0.5 + 0.618 * torch.arange(x.numel(), device=x.device).view(x.shape) % 1)
    return tuple(x.sum([a for a in range(x.dim()) if a != axis]) if x.dim() > 1 else x for axis in range(x.dim()))


def _close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) if x.is_floating_point() else torch.equal(x, y)
