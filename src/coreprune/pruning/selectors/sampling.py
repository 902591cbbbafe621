"""Selectors that sample channels and re-weight those drawn: Löwner (the paper), cone, Lewis, norms, Mussay, uniform.

They see the weights with a batch norm directly behind them folded in (`LayerWeights.effective`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from coreprune._shapes import Tensor
from coreprune.coreset import authors_importance, draw_stream, peel, sensitivities, spectral_ridge
from coreprune.coreset.linf import Variant
from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors.base import Ranking, ranked


def sampled(name: str, importance: Tensor, seed: int | torch.Generator = 0, note: str = "") -> Ranking:
    """Draw units with probabilities proportional to their importance, and re-weight those drawn.

    name: of the selector. importance: (n,) float64, finite and ≥ 0; or (2, n), for the positive and the negative
    outgoing weights, which are then sampled apart. seed: a number, or the generator that the selector is called with.
    note: as in `Ranking`.
    """
    n = importance.shape[-1]
    if float(importance.sum()) == 0:  # No channel matters to the next layer, so any choice is as good.
        return ranked(name, importance.reshape(-1, n).sum(dim=0), "every channel is dead; the first ones stay")
    stream = draw_stream(importance.reshape(-1), seed)
    first, seen = [], set()
    for item in stream.order.tolist():
        if item % n not in seen:
            seen.add(item % n)
            first.append(item % n)
    order = torch.tensor(first + [i for i in range(n) if i not in seen], device=importance.device)
    return Ranking(name, importance.reshape(-1, n).sum(dim=0), order, note, stream)


# Recombination costs r·(k−r)²·k for k contact points in r dimensions: seconds at this rank, minutes at twice it.
_WIDEST_AXES = 320


@dataclass(frozen=True)
class Loewner:
    """The paper: Löwner ellipsoid → Carathéodory → L∞ coreset → peeling → sensitivities → sampling → re-weighting.

    Tukan, Mualem & Maalouf, NeurIPS 2022.

    ridge: "auto" runs the plain bound if that tells channels apart. It does not if the points are independent (n ≤ r,
        T7), because the first round takes them all. Then the form with a ridge runs (λ = mean squared norm of the
        points, `peel`). None or 0 always runs the plain bound. A number is λ as a multiple of that mean. The ranking's
        note says which form ran.
    variant: "axes" is the paper's construction. "contact" makes smaller sets with a smaller factor (T1). "auto" is the
        paper's up to 320 dimensions, where recombining all the axes takes seconds, and contact points above.
    tight: True sharpens the bound with a factor for each point (T4′); False is the paper's α/l.
    preset: "authors" samples as public code of the first author does that has this construction as a part
        (`authors_importance`): general ellipsoid, α = 4·r^1.5, peeling down to 2(r + 1) points. The other options do
        not go with it. Layers with at most 2(r + 1) channels are then sampled uniformly.

    "The paper's" is our reading of what is public: the abstract and that code. It was not checked against the full
    text.
    """

    ridge: float | Literal["auto"] | None = "auto"
    variant: Variant | Literal["auto"] = "auto"
    tight: bool = True
    preset: Literal["authors"] | None = None
    reads = False
    name = "loewner"

    def __post_init__(self) -> None:
        if self.preset not in (None, "authors"):
            raise InputError(f"unknown preset {self.preset!r}; known: authors.")
        if self.preset is not None and (self.ridge, self.variant, self.tight) != ("auto", "auto", True):
            raise InputError("preset='authors' fixes ridge, variant and tight; leave them out.")

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        weighted = layer.outgoing_sizes[:, None] * layer.effective
        if self.preset == "authors":
            found, rounds = authors_importance(weighted)
            note = f"as in the first author's public code, {rounds} rounds"
            if rounds == 0:
                note += "; too few channels for their inputs, so this is uniform sampling"
            return sampled(self.name, found, generator, note)
        if self.ridge == "auto":
            ranking, rounds = self._peeled(weighted, 0.0, generator)
            return ranking if rounds > 1 else self._peeled(weighted, 1.0, generator)[0]
        return self._peeled(weighted, self.ridge or 0.0, generator)[0]

    def _peeled(self, weighted: Tensor, share: float, generator: torch.Generator) -> tuple[Ranking, int]:
        """Run one form of the bound; returns its rounds, too. share: λ as a multiple of the mean squared norm."""
        variant = self.variant
        if variant == "auto":
            variant = "axes" if min(weighted.shape) <= _WIDEST_AXES else "contact"
        ridge = share * spectral_ridge(weighted)
        bound = peel(weighted, variant=variant, tight=self.tight, ridge=ridge)
        form = f"ridge form, λ = {ridge:.3g}" if ridge else "plain bound"
        note = f"{form}, {variant}, {bound.rounds} rounds, rank {bound.rank} of {len(weighted)} channels"
        if bound.rounds <= 1:
            note += "; the bound is constant, so this is uniform sampling (T7)"
        return sampled(self.name, bound.importance, generator, note), bound.rounds


@dataclass(frozen=True)
class Lewis:
    """Sample by ℓ1 Lewis weights (T5, and T6 in the Lewis metric). If n ≤ r, all of them are 1: uniform sampling."""

    reads = False
    name = "lewis"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        found = sensitivities(layer.effective, layer.outgoing_sizes, "lewis")
        note = "every weight is 1, so this is uniform sampling (T7)" if found.vacuous else f"rank {found.rank}"
        return sampled(self.name, found.bounds, generator, note)


_MOST_WORK = 1e11  # n³(n + d) of the programs of `Cone`: some three minutes on one core


@dataclass(frozen=True)
class Cone:
    """Sample by the sensitivities over the inputs that the layer can see (T4″), by n linear programs without data.

    Behind a ReLU no input is negative, and the 1 that the bias is read with is not. Over these inputs a layer may have
    small sensitivities where the paper's bound, which is over all inputs, is 1 for every channel (T7). The activation
    is taken for a ReLU where it is not known; where it is another one, |⟨a, x⟩| takes the place of relu⟨a, x⟩.

    Layers with n channels and d inputs, n³(n + d) > 10¹¹, are sampled by norm, and the ranking's note says so.
    """

    reads = False
    name = "cone"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        n, d = layer.effective.shape
        if n**3 * (n + d) > _MOST_WORK:
            note = f"too large for {n} linear programs, so sampled as by norm"
            return sampled(self.name, layer.outgoing_sizes * layer.effective.norm(dim=1), generator, note)
        one_sided = layer.activation.function is torch.relu
        never = layer.nonnegative
        if never is None:
            never = torch.arange(d) >= d - layer.bias_columns
        found = sensitivities(layer.effective, layer.outgoing_sizes, "cone", one_sided=one_sided, nonnegative=never)
        inputs = "none of which is negative" if bool(never.all()) else f"{int(never.sum())} of which are never negative"
        note = f"{'one' if one_sided else 'two'}-sided over {d} inputs, {inputs}; sum {found.total:.3g} of {n}"
        if found.vacuous:
            note += "; every sensitivity is 1, so this is uniform sampling (T7)"
        return sampled(self.name, found.bounds, generator, note)


@dataclass(frozen=True)
class Norm:
    """Sample by c_i‖p_i‖, the bound that does not depend on the dimension (T6, Euclidean).

    sign_split: sample positive and negative outgoing weights apart.
    """

    sign_split: bool = False
    reads = False
    name = "norm"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        lengths = layer.effective.norm(dim=1)
        return sampled(self.name, _sizes(layer, self.sign_split) * lengths, generator)


@dataclass(frozen=True)
class Mussay:
    """Sample by max_j |V_ji| · |φ(β‖p_i‖)| (Mussay, Osadchy, Braverman, Zhou & Feldman, ICLR 2020).

    beta: a bound on the norm of the inputs. If φ is homogeneous it cancels, and the rule equals `Norm`.
    sign_split: sample positive and negative outgoing weights apart, as the paper does for weights of both signs.
    """

    beta: float = 1.0
    sign_split: bool = False
    reads = False
    name = "mussay"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        response = sensitivities(
            layer.effective, method="mussay", activation=layer.activation.function, radius=self.beta
        ).bounds
        note = "equals 'norm': the activation is homogeneous" if layer.activation.homogeneous else f"β = {self.beta:g}"
        return sampled(self.name, _sizes(layer, self.sign_split) * response, generator, note)


@dataclass(frozen=True)
class Uniform:
    """Sample every channel with the same probability, and re-weight: what the others have to beat."""

    reads = False
    name = "uniform"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer."""
        return sampled(self.name, torch.ones_like(layer.outgoing_sizes), generator)


def _sizes(layer: LayerWeights, sign_split: bool) -> Tensor:
    """c_i, (n,); or with sign_split the largest positive and the largest negative outgoing weight, (2, n)."""
    if not sign_split:
        return layer.outgoing_sizes
    return torch.stack([layer.outgoing.clamp(min=0).amax(dim=0), (-layer.outgoing).clamp(min=0).amax(dim=0)])
