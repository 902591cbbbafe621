"""Models made without memory for their parameters, and filled with tensors that lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from coreprune._mapped import stored_as
from coreprune.errors import InputError

T = TypeVar("T")
_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like", "randn_like"}
_DRAWS |= {"randint_like", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_"}
_MOST_NAMED = 3
COUNTER = "num_batches_tracked"  # nothing reads it, and old files lack it


class UnfitError(Exception):
    """A model cannot be made without its parameters, in words."""


def weightless(make: Callable[[], T], *, fixed: bool = False) -> T:
    """What a function returns, with the parameters of the modules that it makes on the meta device.

    Buffers are made as ever. fixed: whether it is known that no buffer depends on random numbers.

    Raises UnfitError if the function fails like this, and if it draws numbers that buffers may depend on which no file
    holds: with parameters it would draw others.
    """
    with _no_parameters(), _Draws() as draws:
        try:
            made = make()
        except Exception as error:  # it reads its own parameters
            raise UnfitError(str(error)) from error
    found: Any = made[0] if isinstance(made, tuple) and made else made
    random = draws.real and not fixed and isinstance(found, nn.Module)
    if random and any(m._non_persistent_buffers_set for m in found.modules()):
        raise UnfitError("its buffers may be random")
    return made


@contextmanager
def _no_parameters() -> Iterator[None]:
    def on_meta(module: nn.Module, name: str, p: Any) -> Any:  # noqa: ARG001 (torch calls it)
        if type(p) is not nn.Parameter or p.is_meta:
            return None
        return nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


class _Draws(TorchFunctionMode):
    """Notes whether random numbers are drawn. real: whether for a tensor with content."""

    real = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _DRAWS:
            self.real |= any(isinstance(x, Tensor) and not x.is_meta for x in pytree.tree_leaves(result))
        return result


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors in the place of the parameters of a model from `weightless`, and copy them into its buffers.

    Parameters share the memory of the tensors, unless these have another dtype. Tied parameters stay tied.

    tensors: by name in the state dict; of tied parameters one is enough. where: they come from, for messages.

    Raises InputError if a tensor is missing, or has another shape. Then the model is not changed.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[int, list[str]] = {}
    for name, p in own.items():
        ties.setdefault(id(p), []).append(name)
    state = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in state}
    found = {names[0]: next((tensors[n] for n in names if n in tensors), None) for names in ties.values()}
    kind = type(model).__name__
    absent = [name for name, x in found.items() if x is None]
    absent += [name for name in buffers if name not in tensors and not name.endswith(COUNTER)]
    unknown = [name for name in tensors if name not in state]
    if absent or unknown:
        raise InputError(
            f"{where} does not fit {kind}: it lacks {absent[:_MOST_NAMED]} and has {unknown[:_MOST_NAMED]} too many."
        )
    for name, old in [*((n, own[n]) for n in found), *buffers.items()]:
        new = found.get(name, tensors.get(name, old))
        if new is not None and new.shape != old.shape:
            raise InputError(
                f"{where} does not fit {kind}: {name} has shape {tuple(new.shape)}, and the model has "
                f"{tuple(old.shape)}."
            )
    for names in ties.values():
        old, new = own[names[0]], found[names[0]]
        assert new is not None
        p = nn.Parameter(stored_as(new, new.to(old.dtype)), old.requires_grad)
        for name in names:
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, p)  # recurrent layers keep a second list of theirs
    for name in buffers.keys() & tensors.keys():
        buffers[name].copy_(tensors[name])
