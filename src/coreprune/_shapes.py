"""Shape annotations. jaxtyping is a test dependency only, so at run time the annotations are plain tensors.

Signatures read `Float[Tensor, "n d"]`. Type checkers see jaxtyping. The test suite sets COREPRUNE_CHECK_SHAPES=1,
which makes beartype check every shape at run time; users never import jaxtyping.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING or os.environ.get("COREPRUNE_CHECK_SHAPES") == "1":
    from jaxtyping import Bool, Float, Int, Num
else:

    class _Plain:
        """`Float[Tensor, "n d"]` is `Tensor` when shapes are not checked."""

        def __class_getitem__(cls, item: object) -> object:
            return item[0] if isinstance(item, tuple) else item

    Bool = Float = Int = Num = _Plain

__all__ = ["Bool", "Float", "Int", "Num", "Tensor"]
