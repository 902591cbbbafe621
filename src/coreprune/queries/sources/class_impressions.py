"""Class impressions: inputs that a classifier takes for mixtures of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreprune._shapes import Float
from coreprune.errors import InputError
from coreprune.queries.sources.base import Source, Target, Tell, draw
from coreprune.queries.sources.function import as_source
from coreprune.queries.sources.noise_like import noise_like


@dataclass(frozen=True)
class ClassImpressions:
    """Inputs that are optimised until the classifier gives them random soft labels.

    Nayak et al., Zero-Shot Knowledge Distillation, ICML 2019. The labels for class k come from a Dirichlet
    distribution, so that similar classes share probability: its parameters are `concentration` times row k of the
    cosine similarities between the weight rows of the last layer, scaled to [0, 1]. The classes take turns. Adam
    minimises the cross-entropy, and the inputs stay within the range of the starting ones.

    start: a source of the starting inputs, or a function (n, generator). None: noise that suits the input.
    steps: of Adam.
    lr: learning rate, in quarters of the range of the starting inputs.
    temperature: divides the logits, so that soft labels can be reached. Few steps at a high temperature change the
        starting inputs little. That measured best.
    concentration: a larger one gives softer labels.
    batch: number of inputs that are made together.
    """

    start: Source | Callable[[int, torch.Generator], Any] | None = None
    steps: int = 10
    lr: float = 0.05
    temperature: float = 20.0
    concentration: float = 1.0
    batch: int = 256
    name = "class-impressions"
    kind = "reals"

    @property
    def jointly(self) -> bool:
        """Whether the starting inputs are no independent draws. The optimisation treats each input alone."""
        return self.start is not None and getattr(as_source(self.start), "jointly", False)

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """A batch at once."""
        return self.batch

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        if self.steps < 1 or not self.lr > 0 or not self.temperature > 0 or not self.concentration > 0:
            raise InputError(f"{self}: steps, lr, temperature and concentration have to be positive.")
        if not target.example.is_floating_point():
            raise InputError(f"class impressions are real numbers; these inputs are {target.example.dtype}.")
        similar = similarities(classifier(target))
        labels = self._labels(similar, n, generator).to(target.example.device, torch.float32)
        start = noise_like(target)[0] if self.start is None else as_source(self.start)
        x = draw(start, target, n, generator, lambda done, total: None).float()  # noqa: ARG005
        low, high = x.min(), x.max()
        x.requires_grad_()
        optimiser = torch.optim.Adam([x], lr=self.lr * float(high - low) / 4 or self.lr)
        for step in range(self.steps):
            with torch.enable_grad():
                logits = target.logits(x.to(target.example.dtype)).float() / self.temperature
                loss = -(labels * F.log_softmax(logits, dim=1)).sum()
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimiser.step()
            with torch.no_grad():
                x.clamp_(low, high)
            tell(step + 1, self.steps)
        return target.cast(x.detach())

    def _labels(self, similar: Tensor, n: int, generator: torch.Generator) -> Float[Tensor, "n k"]:
        """Soft labels for the classes in turn."""
        alpha = (self.concentration * similar).clamp_min(1e-2)[torch.arange(n) % len(similar)]
        # torch's Dirichlet takes no generator; numpy's gamma does.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        gamma = torch.from_numpy(np.random.default_rng(seed).standard_gamma(alpha.numpy())).clamp_min(1e-30)
        return gamma / gamma.sum(dim=1, keepdim=True)


def is_classifier(target: Target) -> bool:
    """Whether `classifier` finds a layer."""
    try:
        classifier(target)
    except InputError:
        return False
    return True


def classifier(target: Target) -> Float[Tensor, "k d"]:
    """Weight of the linear layer (or 1×1 convolution) whose output is the logits, in float64 on the CPU.

    Raises InputError if the model does not return scores (N, classes) from such a layer.
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:  # noqa: ARG001
        seen.append((module, out))

    layers = [m for m in target.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [m.register_forward_hook(hook) for m in layers]
    try:
        logits = target.logits(target.example)
    except InputError as error:
        raise InputError(f"class impressions need a classifier, but {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if logits.dim() == 2 and logits.shape[1] >= 2:
        for module, out in reversed(seen):
            weight = module.weight
            if (
                isinstance(weight, Tensor)
                and out.numel() == logits.numel()
                and torch.equal(out.flatten(), logits.flatten())
            ):
                return weight.detach().flatten(1).to("cpu", torch.float64)
    raise InputError(
        f"class impressions need a classifier, a model that returns the output (N, classes) of a linear layer, but the "
        f"output has shape {tuple(logits.shape)}. Choose another source, such as leaves, strokes or white-noise."
    )


def similarities(weight: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """Cosine similarities of the rows. Every row of the result is scaled to [0, 1]."""
    rows = F.normalize(weight, dim=1)
    similar = rows @ rows.T
    low, high = similar.amin(dim=1, keepdim=True), similar.amax(dim=1, keepdim=True)
    return (similar - low) / (high - low).clamp_min(1e-12)
