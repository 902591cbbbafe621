"""What one input costs, counted and not timed, so that what follows from it is the same on every machine."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from coreprune.queries.sources.base import Target
from coreprune.queries.sources.norm_statistics import sizes

_NUMBER = 250  # operations in whose time a number that a batch norm reads goes through memory, a dozen times


def work(target: Target) -> float:
    """Floating-point operations of one forward pass on the example, with those that its batch norms are worth.

    On one core of 2026 about 3·10¹⁰ of them take a second. 2.5·10⁹ for EfficientNet-Lite0, 1.1·10¹⁰ for a ResNet-50,
    both at 224×224, and 4·10⁸ for a ResNet-56 at 32×32.
    """
    with FlopCounterMode(display=False) as counter:
        numbers = sum(sizes(target))
    return float(counter.get_total_flops() + _NUMBER * numbers)
