"""Everything about a model and about torch that a call could change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def whole_state(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """A snapshot that equals a later one only if nothing has changed.

    Tensors are compared by identity and bits; everything else that modules hold by identity, and by value if it is
    plain; also modes, gradients, hooks, the bits of inputs, and the random state of torch and numpy.
    (That of Python moves because the tests check argument types of random items.)
    """
    found: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],  # noqa: NPY002
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            found[f"{name}:{key}"] = _held(value)
    for i, x in enumerate(inputs):
        found[f"input {i}"] = _held(x)
    return found


def _held(value: Any, depth: int = 5) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad is None else _held(value.grad)
        bits = () if value.is_meta else value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
        return id(value), type(value), value.requires_grad, value.stride(), bits, grad
    if isinstance(value, nn.Module) or not depth:
        return id(value)
    if isinstance(value, Mapping):
        return id(value), [(key, _held(x, depth - 1)) for key, x in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [_held(x, depth - 1) for x in value]
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return value
    inside = vars(value) if hasattr(value, "__dict__") and not callable(value) else {}
    return id(value), [(key, _held(x, depth - 1)) for key, x in inside.items()]
