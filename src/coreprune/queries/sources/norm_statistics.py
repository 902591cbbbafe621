"""What the batch norms of a model say about its inputs: how far their statistics are from the running ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._shapes import Float
from coreprune.queries.sources.base import Target


def norms(model: nn.Module) -> list[Any]:
    """The batch norms that hold running statistics, frozen ones too, in the order of registration."""
    return [m for m in model.modules() if _running(m) and not isinstance(m, nn.modules.instancenorm._InstanceNorm)]


def _running(module: nn.Module) -> bool:
    found = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    return all(isinstance(t, Tensor) and not isinstance(t, nn.UninitializedBuffer) for t in found)


def sizes(target: Target) -> list[int]:
    """How many numbers each batch norm reads, each time that it runs on the example. Empty if none runs."""
    seen: list[int] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args, kwargs: seen.append(_read(args, kwargs).numel()), with_kwargs=True)
        for m in norms(target.model)
    ]
    try:
        target.call(target.example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def reached(target: Target) -> bool:
    """Whether a batch norm with running statistics runs on the example."""
    return bool(sizes(target))


def mismatch(target: Target, x: Float[Tensor, "n ..."]) -> Float[Tensor, " norms"]:
    """For every batch norm, how far the statistics of the inputs x are from the running ones.

    It is the mean over the channels of ((μ − μ_running)/σ_running)² + (σ/σ_running − 1)².
    """
    return torch.stack(mismatch_during(target.model, lambda: target.call(x.to(target.example.dtype))))


def mismatch_during(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """The same for a call of the model, each time that a batch norm runs; empty if none does."""
    found: list[Tensor] = []

    def hook(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mean, var = _Moments.apply(_read(args, kwargs).float())  # type: ignore[misc]
        eps = getattr(norm, "eps", 1e-5)
        sd = (norm.running_var + eps).sqrt()
        off = ((mean - norm.running_mean) / sd).square().mean() + ((var + eps).sqrt() / sd - 1).square().mean()
        found.append(off)

    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a batch norm reads, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


def sigma(off: Tensor) -> float:
    """Root mean square distance of means and standard deviations from the running ones, in σ. off: of every norm."""
    return float(off.detach().mean() / 2) ** 0.5


class _Moments(torch.autograd.Function):
    """Mean and variance of every channel. On a CPU torch.var_mean takes half of the time of a step; this, a tenth."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "n c ..."]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Var = E x² − (E x)². Rounding costs digits only where the mean is hundreds of deviations away from zero."""
        axes = [0, *range(2, x.dim())]
        ctx.count = x.numel() // x.shape[1]
        mean = x.mean(axes)
        var = torch.linalg.vector_norm(x, dim=axes).square() / ctx.count - mean.square()
        ctx.save_for_backward(x, mean)
        return mean, var.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Of the mean 1/N, and of the variance 2(x − mean)/N, in one pass over x."""
        x, mean = ctx.saved_tensors
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = 2 * grads[1] / ctx.count
        return torch.addcmul((grads[0] / ctx.count - scale * mean).view(shape), x, scale.view(shape))
