"""Models whose weights accelerate keeps on another device or on the disk (`device_map`, offload), taken out of them."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from coreprune._twin import twin
from coreprune.errors import InputError, ModelError, first_line
from coreprune.pruning.validate import check_exclude, counterparts

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
_Place = tuple[int, torch.Size, torch.dtype]  # of the weights in memory
_HOOK, _FORWARD = "_hf_hook", "_old_forward"  # what accelerate leaves in a module


def of_offloaded(function: Callable[P, R]) -> Callable[P, R]:
    """Let a model have weights that accelerate brings when a module runs: do it with a copy that has them.

    The weights of the copy are those that accelerate keeps in memory, or maps from its files; they are not copied. The
    copy has none of its hooks, so what is made from it lies where these weights lie.

    Raises InputError if the model lies on several devices, or is to be changed in place.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module) or not any(_HOOK in vars(m) for m in model.modules()):
            return function(*args, **kwargs)
        if kwargs.get("inplace"):
            raise InputError(
                f"inplace=True does not go with a {type(model).__name__} whose weights accelerate keeps elsewhere. "
                "Leave it out: the result is a copy without accelerate's hooks."
            )
        whole: Any = _whole(model)
        if isinstance(kwargs.get("part"), nn.Module):
            kwargs["part"] = counterparts((kwargs["part"],), model, whole)[0]  # type: ignore[arg-type]
        if "exclude" in kwargs:
            kwargs["exclude"] = counterparts(check_exclude(kwargs["exclude"]), model, whole)  # type: ignore[arg-type]
        if args:
            return function(whole, *args[1:], **kwargs)  # type: ignore[arg-type]
        return function(*args, **{**kwargs, "model": whole})  # type: ignore[arg-type]

    return wrapped


def _whole(model: nn.Module) -> nn.Module:
    """A copy without hooks, with all weights."""
    devices = {t.device.type for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
    if devices - {"cpu"} and any(p.is_meta for p in model.parameters()):
        raise InputError(
            f"the {type(model).__name__} lies on several devices (device_map). Load it on one, or leave its weights in "
            "their files: coreprune.open_model(folder)."
        )
    values = dict[_Place, nn.Parameter]()
    new = twin(model, (hook for m in model.modules() for hook in _hooks(m)))  # they hold the weights
    for path, module in model.named_modules():
        copied = new.get_submodule(path)
        for hook in _hooks(module):
            for name, old in _absent(module):
                if (value := _kept(hook, name)) is not None:
                    _put(copied, name, old, value, values)
        _without_hooks(module, copied, path)
    left = [name for name, p in new.named_parameters() if p.is_meta]
    if left:
        raise ModelError(f"accelerate keeps no weights for {left[0]} and {len(left) - 1} more. Load the model anew.")
    vars(new).pop("hf_device_map", None)
    tie: Any = getattr(new, "tie_weights", None)
    if callable(tie):  # a model of transformers knows itself which of its weights are one
        tie()
    log.info("the weights of %s are taken from where accelerate keeps them", type(model).__name__)
    return new


def _hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get(_HOOK)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _absent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers without values, which a hook may bring: those of modules inside, too."""
    yield from ((name, t) for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta)


def _kept(hook: Any, name: str) -> Tensor | None:
    kept = getattr(hook, "weights_map", None)
    if not isinstance(kept, Mapping):
        return None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            value = kept[name]
    except KeyError:
        return None
    except Exception as error:
        raise ModelError(f"accelerate cannot read {name}: {first_line(error)}.") from error
    return torch.as_tensor(value)


def _put(module: nn.Module, name: str, old: Tensor, value: Tensor, values: dict[_Place, nn.Parameter]) -> None:
    """values: the parameters so far. Accelerate gives each of several layers that share a weight its own parameter, and
    keeps the weight once in memory, but more than once on the disk."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if key in owner._buffers:
        owner._buffers[key] = value
        return
    place = value.data_ptr(), value.shape, value.dtype
    same = values.setdefault(place, nn.Parameter(value, old.requires_grad and value.is_floating_point()))
    owner._parameters[key] = same


def _without_hooks(module: nn.Module, copied: nn.Module, path: str) -> None:
    mine = vars(module)
    if _HOOK not in mine:
        return
    before = mine.get(_FORWARD)
    if getattr(before, "__func__", None) is not type(module).forward:
        raise ModelError(
            f"{path or type(module).__name__} had a forward of its own before accelerate wrapped it. Take accelerate's "
            "hooks off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    for name in (_HOOK, _FORWARD, "forward"):
        vars(copied).pop(name, None)
