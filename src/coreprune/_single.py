"""Half precision on the CPU: such models are computed in float32, which is many times faster there, and rounds less."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from coreprune._mapped import is_mapped, stored_as
from coreprune._twin import quiet, twin
from coreprune.errors import ModelError, first_line

log = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
_MOST = 500_000_000  # parameters that are copied: 2 GB
_ROWS = 64  # from which on it is faster to convert the weights (4,096 inputs, 11,008 outputs, one core: 32)
_STORED = "_coreprune_stored_dtype"


@dataclass(frozen=True, eq=False)
class Single:
    """A model in float32 that stands for one in half precision.

    own: the user's model. model: the same in float32. example: (args, kwargs) of the user; real tensors have one dtype.
    """

    own: nn.Module
    model: nn.Module
    example: tuple[tuple[Any, ...], dict[str, Any]]

    def up(self, x: Any) -> Any:
        """The same inputs in float32."""
        return pytree.tree_map(lambda leaf: leaf.float() if _is_half(leaf) else leaf, x)

    def as_given(self, i: int, leaf: Any) -> Any:
        """An input in the dtype of the example's leaf at position i."""
        like = pytree.tree_leaves(self.example)[i]
        return leaf.to(like.dtype) if isinstance(leaf, Tensor) and isinstance(like, Tensor) else leaf

    def down_(self, small: nn.Module) -> nn.Module:
        """Give a model that was cut from `model` the dtypes of `own`, in place.

        Raises ModelError if an entry becomes infinite.
        """
        mine = {name: t.dtype for name, t in [*self.own.named_parameters(), *self.own.named_buffers()]}
        for name, t in [*small.named_parameters(), *small.named_buffers()]:
            vars(t).pop(_STORED, None)
            if mine[name] == t.dtype:
                continue
            stored = stored_as(t, t.detach().to(mine[name]))
            if bool((torch.isfinite(t) & ~torch.isfinite(stored)).any()):
                raise ModelError(
                    f"{name} has entries that are too large for {mine[name]}. Leave the repair out, or in Python use a "
                    "larger ridge: Repair(ridge=0.01)."
                )
            t.data = stored
        return small


@contextmanager
def answering(model: nn.Module) -> Iterator[nn.Module]:
    """A twin to run for its outputs (`quiet`). Its linear layers compute in float32 where their weights are half on the
    CPU, and round what they return: with many rows half the precision takes many times as long there, and rounds the
    sums inside of a layer as well. The weights of one layer at a time are converted.
    """
    with quiet(model) as still:
        for module in still.modules():
            if _is_plain(module) and _is_half(module.weight) and module.weight.device.type == "cpu":
                vars(module)["forward"] = partial(_in_single, module)
        yield still


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer computes what torch's does: neither its class, nor it alone, nor its weight is special."""
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return own and type(module.weight) in (nn.Parameter, Tensor)


def _in_single(module: Any, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if not _is_half(weight) or x.dtype != weight.dtype or x.numel() < _ROWS * weight.shape[1]:
        return nn.functional.linear(x, weight, bias)
    bias = None if bias is None else bias.float()
    return nn.functional.linear(x.float(), weight.float(), bias).to(x.dtype)


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor, or of the one that it stands for."""
    return getattr(tensor, _STORED, tensor.dtype)


def single(model: Any, example: tuple[tuple[Any, ...], dict[str, Any]]) -> Single | None:
    """A model in half precision on the CPU, and its example, in float32. None for others, and where it does not run."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return None
    named = [*model.named_parameters(), *model.named_buffers()]
    if any(is_lazy(t) or t.device.type != "cpu" for _, t in named) or not any(_is_half(t) for _, t in named):
        return None
    given = [x for x in pytree.tree_leaves(example) if isinstance(x, Tensor)]
    real = {x.dtype for x in given if x.is_floating_point()}
    if any(x.device.type != "cpu" for x in given) or len(real) > 1 or not real <= set(HALF):
        return None
    if sum(t.numel() for _, t in named if not is_mapped(t)) > _MOST:
        return None
    new = twin(model)
    before = {name: t.dtype for name, t in named}
    new._apply(lambda t: stored_as(t, t.float()) if _is_half(t) else t)
    for name, t in [*new.named_parameters(), *new.named_buffers()]:
        if before[name] != t.dtype:
            vars(t)[_STORED] = before[name]
    found = Single(model, new, example)
    args, kwargs = found.up(example)
    try:
        with quiet(new) as still:
            still(*args, **kwargs)
    except Exception as error:
        log.info("the model does not run in float32, and stays in half precision: %s", first_line(error))
        return None
    log.info("the model is computed in float32, because half precision is slow on the CPU")
    return found


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in HALF
