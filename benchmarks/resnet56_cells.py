"""The cells of the ResNet-56 experiment: what is measured, in which order, and what each is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

SHARES = (0.5, 0.35, 0.25)
FINAL = "functional"
NO_DATA, IMAGES, BOTH, MORE = "no data", "images", "images and made", "no data, more"
MANY = 4  # times as many made images in MORE
Source = Literal["", "no data", "images", "images and made", "no data, more"]
PEER = "torch-pruning"
# inner: only the first convolution of every block; whole: out of the box, the residual stream included
PEERS = tuple(
    f"{PEER} {importance} {scope} {part}"
    for importance, scope, part in product(("L2", "BN-scale"), ("uniform", "global"), ("inner", "whole"))
)
TUNED_PEERS = tuple(f"{PEER} {name}" for name in ("L2 uniform whole", "L2 global inner", "BN-scale global inner"))
SAME = ("magnitude", "mussay")  # as l2, and in a ReLU network as norm


@dataclass(frozen=True)
class Cell:
    """One measurement.

    kind: dense (the network as it is), queries (making them), prune. method: a selector, or one of PEERS; "" for the
    dense network. source: of the queries: none but the network itself, unlabelled training images, as many of each, or
    more made ones.
    distill: steps. share: of the dense network's multiply-accumulates. tuned: fine-tuned on labelled images afterwards.
    """

    kind: Literal["dense", "queries", "prune"]
    method: str = ""
    repair: bool = False
    distill: int = 0
    source: Source = ""
    share: float = 1.0
    seed: int = 0
    tuned: bool = False

    @property
    def stage(self) -> int:
        """Cells of a stage need those of the earlier ones and not each other."""
        return 0 if self.kind != "prune" and not self.tuned else 2 if self.tuned else 1

    @property
    def treatment(self) -> str:
        """What is done to the weights after selection."""
        return f"distill {self.distill}" if self.distill else "repair" if self.repair else "none"

    @property
    def key(self) -> str:
        """A name for people and regular expressions, e.g. prune/functional/repair/no data/50/seed 0."""
        parts: list[str] = [self.kind]
        if self.kind == "queries":
            parts += [self.source, f"seed {self.seed}"]
        elif self.kind == "prune":
            parts += [self.method, self.treatment, self.source or "-", f"{100 * self.share:g}", f"seed {self.seed}"]
        elif self.tuned:
            parts += [f"seed {self.seed}"]
        return "/".join(parts + ["fine-tuned"] * self.tuned)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def untuned(cell: Cell) -> Cell:
    """The cell whose network this one fine-tunes."""
    return replace(cell, tuned=False)


def cells(
    selectors: Mapping[str, Any], seeds: int, seeds_rest: int, seeds_tuned: int, distill: int, shares: Iterable[float]
) -> Iterator[Cell]:
    """All cells, each once, what matters most first: the final method, then everyone else, then more seeds.

    selectors: by name. One that reads no queries, and is not repaired on them, is not run again for other queries.
    """
    shares = tuple(shares)
    others = {name: bool(getattr(s, "reads", True)) for name, s in selectors.items() if name not in (FINAL, *SAME)}
    seen: dict[str, Cell] = {}
    for cell in _listed(others, seeds, seeds_rest, seeds_tuned, distill, shares):
        seen.setdefault(cell.key, cell)
    yield from sorted(seen.values(), key=lambda c: (c.stage, c.seed))


def _listed(
    others: dict[str, bool], seeds: int, seeds_rest: int, seeds_tuned: int, distill: int, shares: tuple[float, ...]
) -> Iterator[Cell]:
    yield Cell("dense")
    every = max(seeds, seeds_rest, seeds_tuned)
    for seed in range(every):
        yield Cell("queries", source=NO_DATA, seed=seed)
    for seed, repair, source, share in product(range(seeds), (True, False), (NO_DATA, IMAGES), shares):
        yield Cell("prune", FINAL, repair, 0, source, share, seed)
    for seed, share in product(range(seeds), shares):
        yield Cell("prune", FINAL, True, 0, BOTH, share, seed)
    for share, method in product(shares, PEERS):  # no chance in these
        yield Cell("prune", method, share=share)
    for seed, share in product(range(seeds), shares):
        yield from (Cell("prune", FINAL, True, distill, source, share, seed) for source in (NO_DATA, MORE, IMAGES))
    for seed, method, repair, source, share in product(
        range(seeds_rest), others, (True, False), (NO_DATA, IMAGES), shares
    ):
        if repair or source == NO_DATA or others[method]:
            yield Cell("prune", method, repair, 0, source, share, seed)
    for seed in range(seeds_tuned):
        yield Cell("dense", seed=seed, tuned=True)
        for share in shares:
            starts = [
                Cell("prune", FINAL, True, 0, NO_DATA, share, seed),
                *(Cell("prune", method, share=share, seed=seed) for method in TUNED_PEERS),
                Cell("prune", FINAL, True, distill, NO_DATA, share, seed),
                Cell("prune", FINAL, True, 0, IMAGES, share, seed),
                *(Cell("prune", name, False, 0, NO_DATA, share, seed) for name in others if name == "l2"),
            ]
            yield from (replace(start, tuned=True) for start in starts)
