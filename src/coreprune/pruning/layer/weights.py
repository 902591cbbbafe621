"""What selectors see of one group of channels: the weights in and out, the norms behind it, and its readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coreprune._shapes import Bool, Float, Tensor
from coreprune._shown import brief
from coreprune.coreset import Fold, Patches
from coreprune.pruning.layer.activations import Activation


@dataclass(frozen=True)
class Reader:
    """One layer that reads a group, as seen on the queries: its weights, and the statistics of what it reads.

    The features are the numbers that the layer reads at one position. A unit of the group owns p consecutive features:
    unit i owns those from i·p to (i+1)·p − 1. p is the number of channels in a unit, times the number of kernel
    positions that the layer sees at once. That is 1 for linear layers, and k² for a k×k convolution, unless its
    features are too many: then each kernel position is a row of its own, and p is the number of channels in a unit.

    weight: (J, n·p) float64, V: the layer's weights over the features.
    mean: (n·p,) float64: mean of the features over queries and positions.
    covariance: (n·p, n·p) float64, K: their covariance.
    gram: (n·p, n·p) float64, G = VᵀWV. W weighs the errors of the layer's outputs by what they do to the model's
        outputs; it is the identity where that is not known.
    samples: (m, n·p) float64: some of the feature vectors themselves.
    folds: the moments of one half of the queries and of the other half, both ways; empty if there is only one query.
    patches: if each kernel position is a row of its own, some whole patches less the means of their channels.
    partner: if a product of two activations reads the group (q·k), the weight of the layer that makes the operand that
        is not among the features, or "" if that is not one layer. V is then the identity.
    """

    weight: Float[Tensor, "J np"]
    mean: Float[Tensor, " np"]
    covariance: Float[Tensor, "np np"]
    gram: Float[Tensor, "np np"]
    samples: Float[Tensor, "m np"]
    folds: tuple[Fold, ...] = ()
    patches: Patches | None = None
    partner: str = ""
    __repr__ = brief


@dataclass(frozen=True)
class NormStatistics:
    """A batch norm directly behind a layer. It turns channel i into γ_i (y_i − μ_i) / √(σ²_i + eps) + β_i.

    scale γ, shift β, mean μ, variance σ²: (n,) float64, as stored in the model; γ = 1 and β = 0 if the norm has none.
    bias: (n,) float64, the bias of the layer in front of the norm, or 0.
    columns: which columns of `LayerWeights.incoming` hold that layer's weights: the first, and one past the last.
    names: the names of its parameters and buffers in the model, under "weight" and "bias" (of the layer in front),
        "scale", "shift", "mean" and "variance".
    """

    scale: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    variance: Float[Tensor, " n"]
    eps: float
    bias: Float[Tensor, " n"]
    columns: tuple[int, int]
    names: Mapping[str, str]
    __repr__ = brief

    @property
    def deviation(self) -> Float[Tensor, " n"]:
        """√(σ² + eps), shape (n,)."""
        return (self.variance + self.eps).sqrt()


@dataclass(frozen=True)
class LayerWeights:
    """One group of n units: the weights that make them, and the weights that read them.

    A unit is a channel, or several channels that can only be removed together, such as a head. If several layers make
    the same channels (a residual sum), or several layers read them, their weights stand side by side.

    incoming: (n, d) float64. Row i holds the weights that make unit i, and its biases in the last columns.
    outgoing: (J, n) float64, V. Column i holds the weights that read unit i. For units of several channels, and for
        convolutions, each weight is a row of its own.
    activation: the function φ between the two.
    bias_columns: how many of the last columns of `incoming` are biases: 0 or 1 if a unit is one channel.
    readers: the layers, and the products of two activations, that read the group, with statistics on the queries. Empty
        if there are no queries, and for the few groups that are read otherwise, such as by a sum.
    norms: the batch norms directly behind the layers that make the channels. There are several if residual branches
        meet. If there is a norm, `incoming` has a bias column, even if it is zero.
    others: (n, e) float64, all other parameters of a unit: depthwise filters, scales, norms that are not in `norms`.
    no_mean: why two units cannot be replaced by their mean (heads, sections, …), in words; empty if they can.
    no_scale: why a unit cannot stand for a multiple of another (a gate, a GELU, …), in words; empty if it can.
    name: of the group, as in `list_groups`.
    nonnegative: (d,) bool: the columns of `incoming` whose inputs are never negative. They are those of layers behind
        a ReLU or the like, and the biases, whose input is 1. None: nothing is known of the inputs.
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
    name: str = ""
    nonnegative: Bool[Tensor, " d"] | None = None
    __repr__ = brief

    @property
    def weights(self) -> Float[Tensor, "n w"]:
        """`incoming` without the bias columns, shape (n, w)."""
        return self.incoming[:, : self.incoming.shape[1] - self.bias_columns]

    @property
    def norm(self) -> NormStatistics | None:
        """The batch norm behind the layer that makes the channels; None if there is none, or several such layers."""
        whole = len(self.norms) == 1 and self.norms[0].columns == (0, self.weights.shape[1])
        return self.norms[0] if whole else None

    @property
    def effective(self) -> Float[Tensor, "n d"]:
        """`incoming` with the norms folded in, shape (n, d): weights times γ/σ, and bias β + (b − μ)γ/σ.

        These are the weights of what the activation really sees.
        """
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
        """c_i = max_j |V_ji|, the largest weight that reads unit i, shape (n,)."""
        return self.outgoing.abs().amax(dim=0)
