"""Provable filter pruning: sample channels by their sensitivities on the queries."""

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
    The sensitivity s_i is the largest share that channel i has in an output: the maximum of
    V_ji a_i(x) / Σ_k V_jk a_k(x) over samples x and outputs j, with positive and negative weights and activations
    treated apart (`sensitivity`). Channels are drawn with probability p_i = s_i/Σs. If i is drawn n_i times of m, then
    V'_ji = V_ji·n_i/(m p_i).

    It needs queries. If several layers read a group, the largest of their sensitivities counts. The paper derives the
    number of draws in each layer from one ε; here the budget gives the widths.

    deterministic: keep the most sensitive channels, with their weights as they are (a variant in the paper).
    """

    deterministic: bool = False
    reads = True
    name = "pfp"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer.

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
    """s_i of every unit, for one layer that reads them, (units,) float64 in [0, 1].

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
