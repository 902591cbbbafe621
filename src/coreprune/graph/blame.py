"""Which groups make the modules of a pruned model fail, found in one run.

A group whose parameters all lie inside one module is cut there alone. If the module fails, it is called once more with
the group whole. If it runs, the group is to blame, and the run goes on.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from coreprune.errors import first_line
from coreprune.graph.check import Check
from coreprune.graph.failure import failed
from coreprune.graph.groups import Group
from coreprune.graph.slicing import kept_positions

log = logging.getLogger(__name__)

_MOST_ALONE = 4  # groups of one module that are put back one by one, before all of them are

Chosen = Sequence[tuple[Group, Tensor]]
Part = Callable[[str, Chosen], Iterator[nn.Module]]  # (module, cuts) -> copies of it with these cuts, to be tried


def blamed(check: Check, small: nn.Module, chosen: Chosen, part: Part) -> dict[str, str]:
    """The groups that make modules of `small` fail, with what is wrong. Not all of those that do not work are found.

    small: cut in the chosen groups. part: makes the smaller copies of single modules.
    """
    found: dict[str, str] = {}
    for still, args, kwargs in check.small_runs(small, kept_positions(list(chosen))):
        modules = dict(still.named_modules())
        for path, names in _sites(modules, chosen).items():
            _guard(modules[path], path, names, _Putting(check, chosen, part, found))
        try:
            still(*args, **kwargs)
        except Exception as error:
            log.debug("no single module is to blame: %s", first_line(error))
        if found:
            break
    return found


def _sites(modules: dict[str, nn.Module], chosen: Chosen) -> dict[str, list[str]]:
    """For the innermost modules that hold all parameters of groups, the names of these groups."""
    sites: dict[str, list[str]] = defaultdict(list)
    for group, _ in chosen:
        parents = zip(*(s.param.split(".")[:-1] for s in group.slices), strict=False)
        common = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, parents)]
        depth = len(common)
        while depth and isinstance(modules.get(".".join(common[:depth])), (nn.ModuleList, nn.ModuleDict, type(None))):
            depth -= 1
        if depth:
            sites[".".join(common[:depth])].append(group.name)
    return sites


class _Putting:
    """Copies of modules in which some groups are put back. found: the groups that were to blame so far."""

    def __init__(self, check: Check, chosen: Chosen, part: Part, found: dict[str, str]) -> None:
        self.found = found
        self._check, self._chosen, self._part = check, chosen, part

    def __call__(self, path: str, back: Collection[str]) -> Iterator[nn.Module]:
        left = [(g, keep) for g, keep in self._chosen if g.name not in back and g.name not in self.found]
        for module in self._part(path, left):
            self._check.dress(module, path, kept_positions(left))
            yield module


def _guard(module: nn.Module, path: str, names: list[str], putting: _Putting) -> None:
    """Let the module go on without the groups that make it fail."""
    before, instead = module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if instead:
            return instead[0].forward(*args, **kwargs)
        try:
            return before(*args, **kwargs)
        except Exception as error:
            alone = [[name] for name in names[:_MOST_ALONE]] if len(names) > 1 else []
            for back in ([], *alone, names):
                for other in putting(path, back):
                    try:
                        result = other.forward(*args, **kwargs)
                    except Exception as further:
                        log.debug("%s fails with %s whole, too: %s", path, back, first_line(further))
                        continue
                    new = [name for name in back if name not in putting.found]
                    putting.found.update(dict.fromkeys(new, failed(error)))
                    instead.append(other)
                    return result
            raise

    vars(module)["forward"] = forward
