"""Merging: removed channels are added to kept ones instead of being dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief


@dataclass(frozen=True)
class Merge:
    """Which kept channel stands in for which removed one.

    target: (n,) int64, the kept channel that channel i is merged into. A kept channel has itself, a dropped one −1.
    scale: (n,) float64, V'_jk = Σ_{i: target i = k} scale_i V_ji. Kept channels have 1.
    mean: whether the row of a kept channel becomes the mean of the rows of all channels merged into it (folding).
    gains: by name of a parameter or buffer, (n,) float64, factors for every channel's entries before the mean is
        taken. With them, folding brings the channels of a normalisation layer to one scale.
    """

    target: Int[Tensor, " n"]
    scale: Float[Tensor, " n"]
    mean: bool = False
    gains: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    __repr__ = brief

    def outgoing(self, outgoing: Float[Tensor, "J n"]) -> Float[Tensor, "J n"]:
        """Σ_{i: target i = k} scale_i V_ji in column k, zero in the columns of removed channels. Shape (J, n)."""
        goes = (self.target >= 0).nonzero()[:, 0]
        moved = outgoing[:, goes] * self.scale[goes].to(outgoing)
        return outgoing.new_zeros(outgoing.shape).index_add(1, self.target[goes], moved)

    def incoming(self, incoming: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The channels' incoming rows after the merge. Shape (n, d). Rows of removed channels are unchanged."""
        if not self.mean:
            return incoming
        goes = (self.target >= 0).nonzero()[:, 0]
        total = incoming.new_zeros(incoming.shape).index_add(0, self.target[goes], incoming[goes])
        count = self.target[goes].bincount(minlength=len(incoming)).to(incoming)
        return (total / count.clamp(min=1)[:, None]).where((count > 0)[:, None], incoming)
