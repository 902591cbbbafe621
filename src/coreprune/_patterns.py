"""Names of groups, and patterns of names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def shortened(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def no_match(option: str, pattern: str, names: Sequence[str]) -> str:
    """The message for a pattern that no group matches. option: as the caller wrote it, e.g. "exclude='conv*'"."""
    near = get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3) or names[:5]
    return (
        f"{option} matches no group of channels. Groups are called by the first layer that makes their channels, e.g. "
        f"{', '.join(near)}; `list_groups` lists them all."
    )
