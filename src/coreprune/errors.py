"""Every error that coreprune raises on purpose. Catch `CoreprunError` to catch them all."""

from __future__ import annotations


class CoreprunError(Exception):
    """Base class. The message says what happened, where, and what to do next."""


class InputError(CoreprunError, ValueError):
    """An argument is wrong: a shape, a dtype, a non-finite value, an unknown name."""


class GeometryError(CoreprunError):
    """A geometric question has no answer, for example a target outside the convex hull."""


class BudgetError(CoreprunError):
    """A budget contradicts itself or cannot be met by the channels that are free to leave."""


class ModelError(CoreprunError):
    """A model cannot be captured, or cannot be pruned in the way that was asked for."""


class ArtifactError(CoreprunError):
    """An artifact cannot be written, or what lies on the disk is not one that can be trusted."""


def first_line(error: Exception) -> str:
    """What an error of somebody else says, short enough for a sentence: its type and its first line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:200]}".removesuffix(": ").removesuffix(".")
