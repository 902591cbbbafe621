"""Which of many cuts work together, in few attempts.

An attempt runs a pruned model, so attempts are what costs. First the cuts go that make a module fail (`blame.py`). Any
others that do not work are found by bisection. Networks repeat their blocks, and what does not work in one block mostly
does not work in any. So cuts of one kind are kept together, and judged by the first and the last of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from coreprune.graph.groups import Group

Attempt = Callable[[list[str], bool], str]  # (cuts, whether to try hard) -> what is wrong, empty if they work together
Blame = Callable[[list[str]], dict[str, str]]  # cuts -> those of them without which modules no longer fail, and why


def kind_of(group: Group) -> Hashable:
    """The same for groups at the same place of repeated blocks."""
    slices = frozenset((_numberless(s.param), s.dim) for s in group.slices)
    return _numberless(group.name), group.size, group.unit, group.flags, slices


def working(
    names: Sequence[str],
    kinds: Mapping[str, Hashable],
    good: list[str],
    attempt: Attempt,
    blame: Blame,
    hopeless: str | None = None,
    doubtful: Collection[str] = (),
) -> dict[str, str]:
    """Extend `good`, in place, by those of `names` that work with it and with each other. Returns why others do not.

    kinds: cuts of one kind are expected to work or not to work together. hopeless: if what is wrong with all cuts
    together begins with these words, no search is made, and none of them works. doubtful: cuts that fail more often,
    such as those of heads; they are tried after the others.
    """
    search = _Search(good, attempt)
    if search.add(list(names), hard=True):
        return {}
    if hopeless is not None and search.problem.startswith(hopeless):
        return dict.fromkeys(names, search.problem)
    blamed = {name: why for name, why in blame([*good, *names]).items() if name in kinds and name not in good}
    if not blamed:
        sure, rest = ([n for n in names if (n in doubtful) == is_] for is_ in (False, True))
        if sure and rest:
            search.grow(_sorted(sure, kinds))
            search.grow(_sorted(rest, kinds))
        else:
            search.split(_sorted(names, kinds))
        return search.bad
    search.grow(_sorted([n for n in names if n not in blamed], kinds))
    if search.bad:  # beside fewer others, those that were blamed may work
        again = blame([*good, *blamed])
        search.grow(_sorted([n for n in blamed if n not in again], kinds))
        blamed = {n: why for n, why in again.items() if n in blamed}
    return search.bad | blamed


def _sorted(names: Sequence[str], kinds: Mapping[str, Hashable]) -> list[list[str]]:
    sorts: dict[Hashable, list[str]] = {}
    for name in names:
        sorts.setdefault(kinds[name], []).append(name)
    return list(sorts.values())


@dataclass
class _Search:
    """good: cuts that work together. bad: the others that were judged, with the reasons."""

    good: list[str]
    attempt: Attempt
    bad: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def add(self, names: list[str], hard: bool = False) -> bool:
        """Whether some cuts work with the good ones. Then they are good as well."""
        self.problem = self.attempt(self.good + names, hard)
        if not self.problem:
            self.good += names
        return not self.problem

    def grow(self, sorts: list[list[str]]) -> None:
        """Add what works of several kinds of cuts."""
        alone = len(sorts) == 1 and len(sorts[0]) == 1
        if sorts and not self.add([name for names in sorts for name in names], hard=alone):
            self.split(sorts)

    def split(self, sorts: list[list[str]]) -> None:
        """Add what works of several kinds of cuts, which do not all work together."""
        if len(sorts) > 1:
            half = len(sorts) // 2
            self.grow(sorts[:half])
            self.grow(sorts[half:])
        elif len(sorts[0]) == 1:
            self.bad[sorts[0][0]] = self.problem
        else:
            self._one_kind(sorts[0])

    def _one_kind(self, names: list[str]) -> None:
        first, *middle, last = names
        self.grow([[first]])
        self.grow([[last]])
        if not middle:
            return
        if first in self.bad and last in self.bad:
            if not self.add(middle):
                self.bad.update(dict.fromkeys(middle, self.bad[first]))
        else:
            self.grow([[name] for name in middle])


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
