"""Provable filter pruning: sampling by empirical sensitivities on queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor
from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.selectors.base import Ranking, ranked
from coreprune.pruning.selectors.sampling import sampled

# Entries of (samples, outputs, units) worked on at once: 128 MiB in float64.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Pfp:
    """Sample channels by their empirical sensitivity, and re-weight them.

    Liebenwein, Baykal, Lang, Feldman & Rus, *Provable Filter Pruning for Efficient Neural Networks*, ICLR 2020.
    s_i = max over samples x, outputs j and signs of V_ji a_i(x) / Σ_k V_jk a_k(x), where positive and negative weights,
    and positive and negative activations, are treated apart (`sensitivity`); p_i = s_i/Σs, and V'_ji = V_ji·n_i/(m p_i)
    when i was drawn n_i times of m.

    Needs queries: `LayerWeights.readers` with samples. A group with several readers has the largest of their
    sensitivities. Their rule for the number of draws per layer from one ε is not used: widths come from the budget.

    deterministic: keep the most sensitive channels with their weights as they are (their deterministic variant).
    """

    deterministic: bool = False
    reads = True
    name = "pfp"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the channels of one layer.

        Raises InputError without samples, or where they are not finite.
        """
        readers = [reader for reader in layer.readers if len(reader.samples)]
        if not readers:
            raise InputError(
                "pfp needs to see features: no samples reached the consumers of this group. Pass queries, or use a "
                "selector that needs none, such as 'norm'."
            )
        units = len(layer.incoming)
        found = torch.stack([sensitivity(reader, units) for reader in readers]).amax(dim=0)
        note = f"{sum(len(reader.samples) for reader in readers)} samples"
        if self.deterministic:
            return ranked(self.name, found, f"{note}; the most sensitive stay, not re-weighted")
        return sampled(self.name, found, generator, note)


def sensitivity(reader: Reader, units: int) -> Float[Tensor, " n"]:
    """s_i of every unit for one reader, (units,) float64 in [0, 1].

    With V⁺ = max(V, 0), V⁻ = max(−V, 0) and the same for the activations a, s_i is the largest over samples, outputs j
    and the four pairs of signs of Σ_{f∈i} V±_jf a±_f / Σ_f V±_jf a±_f, where unit i owns the features f ∈ i. 0/0 is 0.
    """
    samples, weight = reader.samples.to(torch.float64), reader.weight.to(torch.float64)
    if not bool(torch.isfinite(samples).all()) or not bool(torch.isfinite(weight).all()):
        raise InputError(
            "pfp: the features or the weights of a reader have a NaN or infinite entry. Check the queries."
        )
    m, features = samples.shape
    if units < 1 or features % units or weight.shape[1] != features:
        raise InputError(f"pfp: {features} features and {weight.shape[1]} weights do not belong to {units} units.")
    found = samples.new_zeros(units)
    step = max(1, _AT_ONCE // max(1, m * units))
    for activations in (samples.clamp(min=0), (-samples).clamp(min=0)):
        if not bool(activations.any()):
            continue
        seen = activations.reshape(m, units, -1)
        for rows in weight.split(step):
            for part in (rows.clamp(min=0), (-rows).clamp(min=0)):
                shares = torch.einsum("mup,jup->mju", seen, part.reshape(len(part), units, -1))
                whole = shares.sum(dim=2, keepdim=True)
                shares = torch.where(whole > 0, shares / whole, 0.0)
                found = torch.maximum(found, shares.amax(dim=(0, 1)))
    return found
