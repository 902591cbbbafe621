"""Which numbers a module has to remember after a cut, found by watching the original run.

The original runs twice, with zeros where removed channels are read and with two sets of weights that make these
channels. So the two runs differ in the removed channels and nowhere else, and every activation shows which of its
positions stay. The numbers that modules remember are replaced by numbers that know where they came from, through sums
and products too. A call that gets such a number shows what the number has to become: the value with which the call
makes, of what is left of its inputs, what is left of its outputs.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice, product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coreprune.graph.groups import Group
from coreprune.graph.numbers import Keys, change_numbers, numbers
from coreprune.graph.slicing import cut, kept_positions

log = logging.getLogger(__name__)

Slot = tuple[str, Keys]  # (module, where it keeps the number)
Env = Mapping[Slot, int]
Demand = list[dict[Slot, int]]  # values that the numbers of one call may have
Chosen = Sequence[tuple[Group, Tensor]]
Run = Callable[[Chosen], AbstractContextManager[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]

_MOST_TRIES = 512  # values for the numbers of one call
_MOST_ALONE = 8  # groups that are looked at one by one

# Functions that can hide a channel, or mix it with others, and keep the shape: their first input takes their place.
_SAME_SHAPE = frozenset(
    """
    relu relu_ relu6 hardtanh hardtanh_ threshold threshold_ hardswish hardsigmoid clamp clamp_ clamp_min clamp_min_
    layer_norm rms_norm group_norm instance_norm
    """.split()  # noqa: SIM905
)


class _Number(int):
    """A whole number that knows where it came from.

    slots: the numbers that it was computed from. then: its value after the cut, from theirs.
    """

    slots: frozenset[Slot]
    then: Callable[[Env], int]

    def __new__(cls, value: int, slots: frozenset[Slot], then: Callable[[Env], int]) -> _Number:
        new = super().__new__(cls, value)
        new.slots, new.then = slots, then
        return new

    def __deepcopy__(self, memo: Any) -> _Number:
        return self

    __hash__ = int.__hash__


def _computes(name: str, reverse: bool = False) -> Callable[[Any, Any], Any]:
    function, plain = getattr(operator, name), getattr(int, f"__{'r' if reverse else ''}{name}__")

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return plain(self, other)
        return _computed(function, other, self) if reverse else _computed(function, self, other)

    return method


def _computed(function: Callable[[int, int], int], a: int, b: int) -> _Number:
    slots = frozenset().union(*(x.slots for x in (a, b) if isinstance(x, _Number)))
    return _Number(function(int(a), int(b)), slots, lambda env: function(_then(a, env), _then(b, env)))


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(_Number, f"__{_name}__", _computes(_name))
    setattr(_Number, f"__r{_name}__", _computes(_name, reverse=True))
_Number.__neg__ = lambda self: _computed(operator.mul, self, -1)  # type: ignore[method-assign]


def _then(x: int, env: Env) -> int:
    return x.then(env) if isinstance(x, _Number) else x


class _Shape(tuple):  # torch.Size keeps no numbers of ours
    """The shape of a tensor, in numbers that know what is left of it."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return _Shape(found) if isinstance(key, slice) else found

    def numel(self) -> int:
        return prod(self)


def numbers_read(run: Run) -> frozenset[Slot]:
    """The numbers that modules remember and that reach a function of tensors when the original runs.

    A number that only gives new tensors their shape, such as a bias of zeros for every head, is none of them: nothing
    shows what it has to become.
    """
    try:
        with run(()) as (still, args, kwargs):
            values = _follow(still)
            if not values:
                return frozenset()
            watch = _Watch(values)
            with watch:
                still(*args, **kwargs)
    except Exception as error:  # a forward may refuse numbers of ours
        log.debug("the numbers that modules remember cannot be followed: %s", error)
        return frozenset()
    return frozenset(watch.read)


def numbers_demanded(run: Run, small: nn.Module, chosen: Chosen) -> dict[Slot, int]:
    """What the numbers that modules remember have to become when only the given channels are left.

    run: gives the original with zeros where removed channels are read, and inputs for it. small: the copy of it whose
        layers of torch are cut.
    """
    exact = [(g, keep) for g, keep in chosen if "functional" not in g.flags]
    odd = [(g, keep) for g, keep in chosen if "functional" in g.flags]  # these may move everything behind them
    demands: list[Demand] = []
    for together in ([exact] if exact else []) + [[one] for one in odd[:_MOST_ALONE]]:
        try:
            demands += _demands(run, small, chosen, together)
        except Exception as error:
            log.debug("the numbers that modules remember cannot be followed: %s", error)
    return _agreed(demands)


def put_numbers(model: nn.Module, values: Mapping[Slot, int]) -> None:
    """Change numbers that modules remember. Containers that several modules hold are not changed, but copied."""
    modules, by_path = dict(model.named_modules()), {}
    for (path, keys), n in values.items():
        by_path.setdefault(path, {})[keys] = n
    shared: dict[Any, Any] = {}
    for path, changes in by_path.items():
        change_numbers(modules[path], lambda keys, old, changes=changes: changes.get(keys, old), shared)


def _demands(run: Run, small: nn.Module, chosen: Chosen, moved: Chosen) -> list[Demand]:
    """The demands of all calls, seen by moving the channels of some groups."""
    ratios = frozenset((g.size // g.unit, len(keep) // g.unit) for g, keep in moved)
    masks = kept_positions(list(chosen))
    before: list[_Seen] | None = None
    watch = None
    for again in (False, True):
        with run(chosen) as (still, args, kwargs):
            if again:
                _shake(still, moved)
            watch = _Watch(_follow(still, small), _cuts(still, masks), ratios, before)
            with watch:
                still(*args, **kwargs)
        before = watch.events
    assert watch is not None
    return watch.demands


def _agreed(demands: list[Demand]) -> dict[Slot, int]:
    """Values that satisfy the demands, as far as these do not contradict each other."""
    fixed: dict[Slot, int] = {}
    waiting = list({str(d): d for d in demands}.values())
    while waiting:
        fits = [[o for o in demand if all(fixed.get(s, n) == n for s, n in o.items())] for demand in waiting]
        waiting = sorted((demand for demand in fits if demand), key=len)
        if waiting:
            first, *waiting = waiting
            fixed.update(first[0])
    return fixed


def _follow(model: nn.Module, small: nn.Module | None = None) -> dict[Slot, int]:
    """Put numbers that know where they came from in the place of those that modules remember, and return those.

    small: the copy whose layers of torch are cut. It says what the numbers of these layers become.
    """
    values: dict[Slot, int] = {}
    theirs = {} if small is None else dict(small.named_modules())
    for path, module in model.named_modules():
        if remembers(module):
            change_numbers(module, partial(_tracked, values, path))
        elif path in theirs:
            change_numbers(module, partial(_known, dict(numbers(theirs[path]))))
    return values


def _known(after: Mapping[Keys, int], keys: Keys, value: int) -> int:
    new = after.get(keys, value)
    return value if new == value else _Number(value, frozenset(), lambda _: new)


def _tracked(values: dict[Slot, int], path: str, keys: Keys, value: int) -> int:
    if value < 2:
        return value
    slot = (path, keys)
    values[slot] = value
    return _Number(value, frozenset([slot]), lambda env: env.get(slot, value))


def remembers(module: nn.Module) -> bool:
    """Whether a module has numbers that do not follow its weights (`attributes.py`)."""
    return not (type(module).__module__.startswith("torch.nn.") and "weight" in module._parameters)


def _shake(model: nn.Module, moved: Chosen) -> None:
    """Other weights for what makes the removed channels."""
    generator = torch.Generator().manual_seed(1)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for group, keep in moved:
        gone = torch.ones(group.size + 1, dtype=torch.bool)
        gone[keep] = gone[-1] = False
        for s in (*group.producers, *group.others):
            weight, mask = named[s.param].data, gone[s.index]
            if not weight.is_floating_point():
                continue
            if weight.dim() == 1:  # biases, and the statistics and scales of norms: positive
                noise = 0.5 + torch.rand(weight.shape, generator=generator, dtype=torch.float64)
            else:
                spread = float(weight.double().std()) if weight.numel() > 1 else 1.0
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * (spread or 1.0)
            new, noise = weight.clone(), noise.to(weight)
            sections = mask if mask.dim() == 2 else mask[None]
            for section, other, m in zip(new.chunk(len(sections)), noise.chunk(len(sections)), sections, strict=True):
                where = m.to(weight.device)
                section.movedim(s.dim, 0)[where] = other.movedim(s.dim, 0)[where]
            named[s.param].data = new


def _cuts(model: nn.Module, masks: Mapping[tuple[str, int], Tensor]) -> dict[int, dict[int, Tensor]]:
    """For parameters and buffers that are cut, by id: the positions that stay, per axis."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    out: dict[int, dict[int, Tensor]] = {}
    for (name, dim), mask in masks.items():
        out.setdefault(id(named[name]), {})[dim] = mask
    return out


_Prints = tuple[Tensor, ...]  # per axis, one number for every position
_Seen = tuple[list[_Prints], list[_Prints]]  # of the inputs and the outputs of a call


class _Watch(TorchFunctionMode):
    """Watches the calls that get numbers which modules remember.

    values: the numbers. cuts: parameters that are cut. ratios: (units, units that stay) of the groups. before: what the
    first run saw, or None if this is the first.
    """

    def __init__(
        self,
        values: dict[Slot, int],
        cuts: Mapping[int, dict[int, Tensor]] | None = None,
        ratios: frozenset[tuple[int, int]] = frozenset(),
        before: list[_Seen] | None = None,
    ) -> None:
        super().__init__()
        self.events: list[_Seen] = []
        self.demands: list[Demand] = []
        self.read: set[Slot] = set()
        self._values, self._cuts, self._ratios, self._before = values, cuts or {}, ratios, before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.shape.__get__ or (func is Tensor.size and not kwargs):  # type: ignore[comparison-overlap]
            return self._shape(args[0], *args[1:])
        slots = sorted({s for n in _leaves((args, kwargs), _Number) for s in n.slots}, key=str)
        if not slots:
            return _called(func, args, kwargs)
        inputs = [x for x in _leaves((args, kwargs), Tensor)]
        if inputs and not getattr(func, "__name__", "").startswith("new_"):  # of new tensors nothing is seen
            self.read.update(slots)
        seen_inputs = [_prints(x) for x in inputs]
        given = [x.clone() if func is Tensor.__setitem__ else x for x in inputs]
        result = _called(func, _plain(args), _plain(kwargs))
        outputs = [inputs[0]] if func is Tensor.__setitem__ else list(_leaves(result, Tensor))
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
        known = _Shape(_known({(): new}, (), n) for n, new in zip(shape, left, strict=True))
        return known if axis is None else known[axis]

    def _then_seen(self, i: int) -> _Seen:
        """What the first run saw at the same place."""
        assert self._before is not None
        if i >= len(self._before) or [len(p) for p in self._before[i]] != [len(p) for p in self.events[i]]:
            raise RuntimeError("the two runs call different functions")
        return self._before[i]

    def _stays(self, tensor: Tensor, before: _Prints) -> dict[int, Tensor]:
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
                a, k = _replaced((args, kwargs), lambda n: _then(n, env), lambda _: next(tensors))
                got = func(*a, **k)
            except Exception:
                return False
            found = [next(_leaves(a, Tensor))] if func is Tensor.__setitem__ else list(_leaves(got, Tensor))
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
            self.demands.append(options)

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


def _leaves(x: Any, kind: type) -> Iterator[Any]:
    """The values of a kind among the arguments of a call."""
    if isinstance(x, kind):
        yield x
    elif isinstance(x, slice):
        yield from _leaves((x.start, x.stop, x.step), kind)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _leaves(item, kind)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()), kind)


def _replaced(x: Any, number: Callable[[Any], int], tensor: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a call with other numbers and tensors."""
    if isinstance(x, _Number):
        return number(x)
    if isinstance(x, Tensor):
        return tensor(x)
    if isinstance(x, slice):
        return slice(*(_replaced(n, number, tensor) for n in (x.start, x.stop, x.step)))
    if isinstance(x, dict):
        return {k: _replaced(v, number, tensor) for k, v in x.items()}
    if isinstance(x, torch.Size):
        return tuple(_replaced(v, number, tensor) for v in x)
    if isinstance(x, list) or type(x) in (tuple, _Shape):
        return type(x)(_replaced(v, number, tensor) for v in x)
    return x


def _called(func: Any, args: Any, kwargs: Any) -> Any:
    if getattr(func, "__name__", "") in _SAME_SHAPE and args and isinstance(args[0], Tensor):
        return args[0]
    return func(*_plain(args), **_plain(kwargs))


def _plain(x: Any) -> Any:
    return _replaced(x, int, lambda tensor: tensor)


def _prints(x: Tensor) -> _Prints:
    """Per axis, a weighted sum for every position: equal where nothing changed. A plain sum of a softmax always is."""
    x = (x.abs() if x.is_complex() else x).detach().double().nan_to_num()
    x = x * (0.5 + 0.618 * torch.arange(x.numel(), device=x.device).view(x.shape) % 1)
    return tuple(x.sum([a for a in range(x.dim()) if a != axis]) if x.dim() > 1 else x for axis in range(x.dim()))


def _close(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) if x.is_floating_point() else torch.equal(x, y)
