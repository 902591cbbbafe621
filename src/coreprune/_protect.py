"""Parameters that a forward writes into. Twins share the memory of parameters, except of these.

Which they are is found in the first run of a model in each mode: it works on copies of all parameters, which are
compared with the originals after it.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coreprune._mapped import copies

_WRITTEN: WeakKeyDictionary[nn.Module, dict[bool, frozenset[str]]] = WeakKeyDictionary()  # by model and training mode


def protect(twin: nn.Module, model: nn.Module) -> None:
    """Let a twin write into copies of the model's parameters, and find out into which it writes."""
    known = _WRITTEN.setdefault(model, {})
    shared: dict[str, Tensor] = {}

    def before(module: nn.Module, args: Any) -> None:  # noqa: ARG001 (torch calls it)
        names = known.get(module.training)
        own = {n: p for n, p in module.named_parameters() if not is_lazy(p) and not p.is_meta}
        wanted = {n: p.data for n, p in own.items() if names is None or n in names}
        if names is None:
            shared.update(wanted)
        for name, copied in copies(wanted).items():
            own[name].data = copied

    def after(module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG001 (torch calls it)
        if not shared:
            return
        written = {name for name, p in module.named_parameters() if name in shared and not _same(p.data, shared[name])}
        for name, p in module.named_parameters():
            if name in shared and name not in written:
                p.data = shared[name]
        shared.clear()
        known[module.training] = frozenset(written)

    twin.register_forward_pre_hook(before)
    twin.register_forward_hook(after, always_call=True)


def separate(twin: nn.Module, model: nn.Module) -> None:
    """Give a twin copies of the parameters that the model is known to write into."""
    names = frozenset().union(*_WRITTEN.get(model, {}).values())
    own = {name: p for name, p in twin.named_parameters() if name in names}
    for name, copied in copies({name: p.data for name, p in own.items()}).items():
        own[name].data = copied


def as_in(model: nn.Module, other: nn.Module) -> None:
    """Say that a model writes into the same parameters as another, of which it is a smaller copy."""
    _WRITTEN[model] = dict(_WRITTEN.get(other, {}))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())
