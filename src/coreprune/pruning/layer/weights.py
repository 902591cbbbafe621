"""One group of channels as the selectors see it: weights in and out, norms behind it, and its readers on queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coreprune._shapes import Float, Tensor
from coreprune.pruning.layer.activations import Activation


@dataclass(frozen=True)
class Reader:
    """One consumer of a group, on the queries: what it reads and how it weighs it.

    A unit of the group owns p consecutive features: unit i those at i·p … (i+1)·p − 1. p is the number of channels in
    the unit times the kernel's positions that the consumer sees at once (1 for linear layers and in the channel
    version, k² for a k×k convolution).

    weight: (J, n·p) float64, V: the consumer's weights over the features (the channel version stacks the kernel's
        positions along J).
    mean: (n·p,) float64. covariance: (n·p, n·p) float64, K: of the features over queries and positions.
    gram: (n·p, n·p) float64, G = VᵀWV; W says what an error at each output is worth (the identity, when unknown).
    samples: (m, n·p) float64: some of the feature rows themselves.
    """

    weight: Float[Tensor, "J np"]
    mean: Float[Tensor, " np"]
    covariance: Float[Tensor, "np np"]
    gram: Float[Tensor, "np np"]
    samples: Float[Tensor, "m np"]


@dataclass(frozen=True)
class NormStatistics:
    """A batch norm that reads a layer's output directly: channel i becomes γ_i (y_i − μ_i) / √(σ²_i + eps) + β_i.

    scale γ, shift β, mean μ, variance σ²: (n,) float64, the running ones; γ = 1 and β = 0 where the norm has none.
    bias: (n,) float64, the layer's own bias, or 0.
    columns: where `LayerWeights.incoming` has this layer's weights, from the first column to before the last.
    names: of its parameters and buffers: "weight", "bias" (the layer's), "scale", "shift", "mean", "variance".
    """

    scale: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]
    eps: float
    bias: Float[Tensor, " n"]
    columns: tuple[int, int]
    names: Mapping[str, str]

    @property
    def deviation(self) -> Float[Tensor, " n"]:
        """√(σ² + eps)."""
        return (self.variance + self.eps).sqrt()


@dataclass(frozen=True)
class LayerWeights:
    """One layer between two linear maps, as the theory sees it.

    incoming: (n, d) float64, row i is p_i: the weights that make channel i, bias appended.
    bias_columns: how many of the last columns are biases (0 or 1 for a single channel).
    outgoing: (J, n) float64, V: the weights that read the channels.
    activation: φ between the two.
    readers: the consumers on the queries; empty when a selector asks for none.
    norms: the batch norms directly behind the layers that make the channels (more than one where residual branches
        meet); then `incoming` has a bias column, even if it is zero.
    others: (n, e) float64, what else belongs to a channel: depthwise filters, scales, norms that are not in `norms`.
    no_mean: why two units cannot become one (heads, sections …), in words; empty where they can.
    no_scale: why a unit cannot stand for a multiple of another (a gate, a GELU …); empty where it can.
    """

    incoming: Float[Tensor, "n d"]
    outgoing: Float[Tensor, "J n"]
    activation: Activation
    bias_columns: int = 1
    readers: tuple[Reader, ...] = ()
    norms: tuple[NormStatistics, ...] = ()
    others: Float[Tensor, "n e"] | None = None
    no_mean: str = ""
    no_scale: str = ""

    @property
    def weights(self) -> Float[Tensor, "n w"]:
        """`incoming` without the bias columns."""
        return self.incoming[:, : self.incoming.shape[1] - self.bias_columns]

    @property
    def norm(self) -> NormStatistics | None:
        """The batch norm behind the only layer that makes the channels, or None."""
        whole = len(self.norms) == 1 and self.norms[0].columns == (0, self.weights.shape[1])
        return self.norms[0] if whole else None

    @property
    def effective(self) -> Float[Tensor, "n d"]:
        """`incoming` with the norms folded in: weights times γ/σ, bias β + (b − μ)γ/σ. The real pre-activations."""
        if not self.norms:
            return self.incoming
        rows = self.incoming.clone()
        for norm in self.norms:
            slope = norm.scale / norm.deviation
            rows[:, slice(*norm.columns)] *= slope[:, None]
            rows[:, -1] += norm.shift + (norm.bias - norm.mean) * slope - norm.bias
        return rows

    @property
    def outgoing_sizes(self) -> Float[Tensor, " n"]:
        """c_i = max_j |V_ji|, shape (n,)."""
        return self.outgoing.abs().amax(dim=0)
