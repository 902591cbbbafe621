"""Names of groups, and patterns of them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def no_match(option: str, pattern: str, names: Sequence[str]) -> str:
    """What to say of a pattern that no group matches. option: how the caller wrote it, e.g. "exclude='conv*'"."""
    near = get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3) or names[:5]
    return (
        f"{option} matches no group of channels. Groups are called by the first layer that makes their channels, e.g. "
        f"{', '.join(near)}; `list_groups` lists them all."
    )
