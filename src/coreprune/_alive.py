"""Weights with which a model shows what depends on what, where its own hide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NOISE = 0.1  # deviation of the weights that replace equal ones


def enlivened(model: nn.Module) -> dict[str, Tensor]:
    """New values, by name, for real parameters that hide what is behind them: whose entries are all equal, or that have
    one entry, which is 0, such as the gain of a branch at the start of training.

    The same in every call.
    """
    generator, out = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        if not p.is_floating_point() or not p.numel():
            continue
        if p.numel() == 1:
            if not p.detach().any():
                out[name] = torch.ones_like(p.detach())
            continue
        flat = p.detach().reshape(-1)
        first = flat[0]
        if bool(torch.isfinite(first)) and bool((flat[:64] == first).all()) and bool((flat == first).all()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            out[name] = (float(first) + _NOISE * noise).to(p)
    return out


def amplified(still: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """New values, by name, for weights and biases, with which the outputs of layers differ by 1 between samples.

    In a deep network that was not trained, small weights and norms without statistics let nothing through.

    still: a twin, which is spoilt. run: calls it, best with several samples along the first axis.
    """
    names = {id(p): name for name, p in still.named_parameters()}
    out: dict[str, Tensor] = {}

    def amplify(layer: nn.Module, _given: Any, made: Any) -> Any:
        own = {names[id(p)]: p for p in layer._parameters.values() if p is not None and p.is_floating_point()}
        linear = any(p.dim() > 1 for p in own.values()) and isinstance(made, Tensor) and made.dim()
        if not linear or not made.is_floating_point() or own.keys() & out.keys():  # a layer may be called twice
            return None
        values = made.double()
        size = float(values.var(0, correction=0).mean().sqrt() if len(made) > 1 else values.std(correction=0))
        if not 0 < size < float("inf"):
            return None
        out.update({name: p.detach() / size for name, p in own.items()})
        return made / size

    for layer in still.modules():
        layer.register_forward_hook(amplify)
    run(still)
    return out
