"""All errors that coreprune raises on purpose. Catch `CoreprunError` to catch every one of them."""

from __future__ import annotations


class CoreprunError(Exception):
    """The base class. The message says what happened, where, and what to do next."""


class InputError(CoreprunError, ValueError):
    """An argument is wrong: a shape, a dtype, a non-finite value, an unknown name."""


class GeometryError(CoreprunError):
    """A geometric question has no answer, for example a target outside the convex hull."""


class BudgetError(CoreprunError):
    """A budget contradicts itself, or cannot be met by removing the channels that are free."""


class ModelError(CoreprunError):
    """A model cannot be captured, or cannot be pruned in the requested way."""


class ArtifactError(CoreprunError):
    """An artifact cannot be written, or the one on the disk cannot be trusted."""


class RankError(CoreprunError):
    """In a run over several processes, another one has failed, died, fallen silent, or does not do the same."""


def first_line(error: BaseException) -> str:
    """The type and the first line of an error from other code, short enough for a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}".removesuffix(": ").removesuffix(".")
