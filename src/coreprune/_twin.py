"""Copies of models: twins, which share the weights and run in the model's place, and copies with other weights.

A forward may write into buffers, fill caches, keep activations and draw random numbers. In a twin it does so without a
trace in the model.
"""

from __future__ import annotations

import copy
import logging
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from coreprune._chatter import without_chatter
from coreprune._mapped import mapped_copies
from coreprune._protect import protect, separate
from coreprune.errors import ModelError, first_line

log = logging.getLogger(__name__)

_MOST_SHARED = 100  # objects in a model that cannot be copied
_DEEPEST = 4  # objects within objects that a forward returns
_CALLERS: ContextVar[torch.device | None] = ContextVar("default device of the caller", default=None)
_ONE = threading.RLock()  # torch.export and the global random state are not made for several threads


@contextmanager
def guarded(model: object) -> Iterator[None]:
    """What a public function does with a model: by one thread at a time, outside of inference mode, without a trace.

    torch's own logs are kept out. Tensors of ours are made on the CPU unless we say otherwise, whatever the caller's
    default device; a forward sees that device.

    model: anything; what is not a module is not guarded.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE)
        stack.enter_context(without_chatter())
        stack.enter_context(torch.inference_mode(False))
        device = _CALLERS.get() or torch.get_default_device()
        stack.callback(_CALLERS.reset, _CALLERS.set(device))
        if device.type != "cpu":  # a mode, which every call of torch goes through
            stack.enter_context(torch.device("cpu"))
        if isinstance(model, nn.Module):
            stack.enter_context(_unchanged(model))
            stack.enter_context(_own_random_state(model))
        yield


@contextmanager
def quiet(model: nn.Module, own_inputs: bool = True) -> Iterator[nn.Module]:
    """A twin of the model to run: in evaluation mode, without gradients and without a key/value cache.

    Nothing of what its forward does reaches the model, the inputs or the caller's random state. Where it returns
    objects that hold tensors, such as dataclasses, the twin returns dicts of their fields, which torch.export knows.

    own_inputs: whether the twin copies the tensors that it is called with.
    """
    still = twin(model).eval()
    for module in still.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is not None:
            config.use_cache = False
        if isinstance(module, nn.EmbeddingBag):
            module.register_forward_pre_hook(_check_bags, with_kwargs=True)
    still.register_forward_hook(_plain_outputs)
    if (device := _CALLERS.get()) is not None and device.type != "cpu":
        _run_on(still, device)
    if own_inputs:
        still.register_forward_pre_hook(_copy_inputs, with_kwargs=True)
        protect(still, model)
    else:
        separate(still, model)
    with _unchanged(model), _own_random_state(model), torch.inference_mode(False), torch.no_grad():
        yield still


def _check_bags(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse bags of words that begin in no order, as made-up inputs may say: torch would read beyond the words, or end
    the process."""
    words: Any = args[0] if args else kwargs["input"]
    begin: Any = args[1] if len(args) > 1 else kwargs.get("offsets")
    if begin is None or torch.compiler.is_compiling():
        return
    empty = begin.numel() < 1 + module.include_last_offset
    if empty or int(begin[0]) or bool((begin.diff() < 0).any()) or int(begin[-1]) > words.numel():
        raise IndexError(f"bags that begin at {begin.tolist()[:9]} do not divide {words.numel()} words")


def twin(model: nn.Module, shared: Iterable[Any] = ()) -> nn.Module:
    """A copy whose parameters share the memory of the model's. Everything else is copied, buffers too.

    shared: objects in the model that are not copied.

    Raises ModelError if the model cannot be copied.
    """
    memo: dict[int, Any] = {id(x): x for x in shared}
    for p in model.parameters():
        if not is_lazy(p) and not p.is_inference():  # autograd refuses tensors of inference mode, but not their copies
            same = nn.Parameter(p.detach(), p.requires_grad)
            vars(same).update(vars(p))
            memo[id(p)] = same
    return duplicate(model, memo)


def duplicate(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a model.

    Functions that close over the model's modules, such as hooks, work on those of the copy. Tensors that a forward has
    left behind lose their history. What cannot be copied, such as a lock or an open file, is shared with the original.

    memo: what takes the place of which object, by id(object). It is not changed.

    Raises ModelError if the model cannot be copied.
    """
    own = dict([*model.named_parameters(), *model.named_buffers()])
    memo = {**mapped_copies({n: t for n, t in own.items() if id(t) not in memo and not is_lazy(t)}), **memo}
    for _ in range(_MOST_SHARED):
        filled = dict(memo)
        try:
            with _Copying():
                _copy_modules(model, filled)
                new = copy.deepcopy(model, filled)
        except Exception as error:
            stuck = _in_hand(error)
            if stuck is None or isinstance(stuck, (nn.Module, Tensor)) or id(stuck) in memo:
                raise ModelError(
                    f"{type(model).__name__} cannot be copied: {first_line(error)}. "
                    "Take what copy.deepcopy refuses off the model before pruning."
                ) from error
            log.info("a %s cannot be copied and is shared by both models", type(stuck).__name__)
            memo[id(stuck)] = stuck
        else:
            _follow(new, filled)
            return new
    raise ModelError(f"{type(model).__name__} holds more than {_MOST_SHARED} objects that cannot be copied.")


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copy modules into `memo` as `copy.deepcopy` does, the inner ones first.

    A module has a dozen tables of hooks, mostly empty, on which `copy.deepcopy` spends most of its time.
    """
    states = {m: m.__getstate__() for m in model.modules() if id(m) not in memo and _copied_by_state(type(m))}
    new = {m: type(m).__new__(type(m)) for m, state in states.items() if type(state) is dict}
    memo.update({id(m): n for m, n in new.items()})
    memo.setdefault(id(memo), []).append(states)  # as `copy.deepcopy` does: an id must not be given to something else
    for old, copied in reversed(new.items()):
        copied.__setstate__({key: _copy(value, memo) for key, value in states[old].items()})


def _copied_by_state(kind: type[nn.Module]) -> bool:
    """Whether a class leaves it to `__getstate__` and `__setstate__` how its objects are copied."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
    return all(getattr(kind, name, None) is getattr(object, name, None) for name in own)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, with a short way for what modules mostly hold."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) not in (dict, OrderedDict) or not {*map(type, value)} <= {str}:
        return copy.deepcopy(value, memo)
    new = memo[id(value)] = type(value)()
    for key, inside in value.items():
        new[key] = _copy(inside, memo)
    return new


class _Copying(TorchFunctionMode):
    """How tensors that are no parameters are copied: those that are no leaves, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if isinstance(tensor, FakeTensor):  # left by a trace; it has no content
            return tensor
        if tensor.is_leaf and not tensor.is_inference():
            with torch._C.DisableTorchFunction():
                return tensor.__deepcopy__(memo)
        new = memo[id(tensor)] = tensor.detach().clone()
        return new


def _in_hand(error: Exception) -> Any:
    """The object whose copying raised an error, or None."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            found = trace.tb_frame.f_locals["x"]
        trace = trace.tb_next
    return found


def _follow(new: nn.Module, copies: dict[int, Any]) -> None:
    """Let functions that the modules hold, and that close over copied objects, close over the copies.

    copies: by id of the original.
    """
    for module in new.modules():
        for holder in (vars(module), *(v for v in vars(module).values() if isinstance(v, dict) and v)):
            for key in [k for k, value in holder.items() if isinstance(value, types.FunctionType)]:
                holder[key] = _rebound(holder[key], copies)


def _rebound(function: types.FunctionType, copies: dict[int, Any]) -> Callable[..., Any]:
    """The function with copies in place of the originals in its closure and defaults."""
    if id(function) in copies:
        return copies[id(function)]
    cells = function.__closure__ or ()
    held = [cell.cell_contents for cell in cells if _is_filled(cell)] + list(function.__defaults__ or ())
    if not any(isinstance(x, types.FunctionType) or id(x) in copies for x in held):
        return function
    new = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType() for _ in cells),
    )
    vars(new).update(vars(function))
    new.__kwdefaults__ = function.__kwdefaults__
    copies[id(function)] = new  # before its closure, in which it may be itself

    def copied(x: Any) -> Any:
        return _rebound(x, copies) if isinstance(x, types.FunctionType) else copies.get(id(x), x)

    new.__defaults__ = None if function.__defaults__ is None else tuple(map(copied, function.__defaults__))
    for cell, old in zip(new.__closure__ or (), cells, strict=True):
        if _is_filled(old):
            cell.cell_contents = copied(old.cell_contents)
    return new


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _run_on(still: nn.Module, device: torch.device) -> None:
    """Let the forward see another default device than we do."""
    entered: list[torch.device] = []

    def enter(module: nn.Module, args: Any) -> None:  # noqa: ARG001 (torch calls it)
        device.__enter__()
        entered.append(device)

    def leave(module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG001 (torch calls it)
        if entered:
            entered.pop().__exit__(None, None, None)

    still.register_forward_pre_hook(enter)
    still.register_forward_hook(leave, always_call=True)


def _copy_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG001 (torch calls it)
    return pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))


def _plain_outputs(module: nn.Module, args: Any, result: Any) -> Any:  # noqa: ARG001 (torch calls it)
    return _plain(result, _DEEPEST)


def _plain(result: Any, deepest: int) -> Any:
    """The same with dicts in place of objects that hold tensors, or that hold such objects."""

    def plain(x: Any) -> Any:
        if isinstance(x, (Tensor, nn.Module)) or not hasattr(x, "__dict__") or not deepest:
            return x
        fields = _plain(dict(vars(x)), deepest - 1)
        return fields if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(fields)) else x

    return pytree.tree_map(plain, result)


def _own_random_state(model: nn.Module) -> AbstractContextManager[None]:
    """Puts back torch's global random states, on the CPU and on the model's GPUs."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back the attributes of the model's modules: hooks may reach them by a global name."""
    before = [
        (vars(m), dict(vars(m)), {k: _items(v) for k, v in vars(m).items() if isinstance(v, (dict, list, set))})
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for mine, was, inside in before:
            for holder, content in ((mine, was), *((was[key], value) for key, value in inside.items())):
                if not _identical(holder, content):
                    holder.clear()
                    holder.extend(content) if isinstance(holder, list) else holder.update(content)


def _items(holder: dict[Any, Any] | list[Any] | set[Any]) -> Any:
    return dict(holder) if isinstance(holder, dict) else list(holder) if isinstance(holder, list) else set(holder)


def _identical(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if not a:
        return True
    if isinstance(a, set):  # in which a copy has another order
        return {id(x) for x in a} == {id(x) for x in b}
    if isinstance(a, dict) and any(k != n for k, n in zip(a, b, strict=True)):
        return False
    values = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
    return all(x is y for x, y in values)
