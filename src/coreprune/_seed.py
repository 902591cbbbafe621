"""`seed=` of every public function: a whole number, or a generator to draw from."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch

from coreprune.errors import InputError

_END = 1 << 64  # torch's generators take seeds below this


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """A new generator on the CPU for a number. A generator is returned as it is, so that draws continue from its state.

    Raises InputError for anything else.
    """
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(check_seed(seed))


def check_seed(seed: object) -> int:
    """The seed, if it is a whole number from 0 to 2⁶⁴ - 1. Raises InputError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed must be a whole number, such as 0, but it is {seed!r}.")
    number = int(seed)
    if not 0 <= number < _END:
        raise InputError(f"seed must lie between 0 and 2**64 - 1, but it is {number}.")
    return number


def seed_apart(seed: int, key: int) -> int:
    """A seed for inputs that nothing else has seen, made with the seed that prune() gets.

    prune() seeds its generator with the seed itself. With that, a source would make the same inputs that pruning uses.
    So the seed is hashed here. The hash equals a given seed of prune() with probability 2⁻³² (torch's generator takes
    32 bits).

    key: any number, another one for each use; those here are the numbers of the theorems.
    """
    (other,) = np.random.SeedSequence(check_seed(seed), spawn_key=(key,)).generate_state(1).tolist()
    return other
