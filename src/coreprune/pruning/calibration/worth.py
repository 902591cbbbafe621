"""What errors at the outputs of a reader are worth: the second moment of the gradient there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from coreprune.pruning.calibration.sites import Site


def add_worth(site: Site, gradient: Tensor, window: int, queries: int, tensors: Mapping[str, Tensor]) -> None:
    """Add the second moment of the gradient at a reader's output, as a part of the mean over all queries."""
    if site.operator.kernel:
        images = gradient if site.operator.channel_axis else gradient[None]
        gradient = over_windows(images, window).reshape(gradient.shape)
    flat = site.operator.outputs(gradient).transpose(0, 1).flatten(1).double()
    flat = flat @ site.weights(tensors) if site.over_features(flat.shape[1]) else flat
    worth = flat.T @ flat / queries
    site.worth = worth if site.worth is None else site.worth + worth


def over_windows(gradient: Tensor, window: int) -> Tensor:
    """Sums over windows of neighbouring positions, divided by the root of the number of positions in a window.

    Errors at neighbouring positions of an image are similar. So they add up where the gradient keeps its sign, and
    cancel where its sign alternates. Squares of single positions would miss this, especially before pooling.
    """
    dims = gradient.dim() - 2
    for axis in range(2, 2 + dims):  # axis by axis; sums of slices are faster than torch's pooling
        length = gradient.shape[axis]
        sides = [0, 0] * (dims + 1 - axis) + [window // 2, (window - 1) // 2]
        padded = nn.functional.pad(gradient, sides)
        gradient = sum(padded.narrow(axis, i, length) for i in range(window))  # type: ignore[assignment]
    return gradient / window ** (dims / 2)
