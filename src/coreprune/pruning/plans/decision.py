"""The decision about one group of channels, and how the state of an unfinished run holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from coreprune.coreset import Coreset, DrawStream, FunctionalCoreset, Merge
from coreprune.graph import Group
from coreprune.pruning.layer.weights import Reader
from coreprune.pruning.plans.plan import GroupPlan, group_from
from coreprune.pruning.selectors import Ranking
from coreprune.pruning.unfinished import Packed


@dataclass(frozen=True, eq=False)
class Decision:
    """The decision about one free group, and what it is based on.

    group: its channels. ranking: the selector's ranking of its units. curve: for every k, the error on the queries if
    the first k units of that order are kept; None without queries. held_out: (n+1,) the same on queries that the order
    and the refit have not seen; None with fewer than two queries. estimated: whether the errors are scaled by what some
    whole patches show (T14). readers: what reads the group, if it can be needed once widths are allocated; their
    moments are most of the memory of a run. owner: of several processes, the one that has ranked the group; it alone
    has the readers, and can cut the ranking. entry, coreset: what stays at the allocated width; None as long as no
    width is allocated.
    """

    group: Group
    ranking: Ranking
    curve: FunctionalCoreset | None
    held_out: Tensor | None = None
    estimated: bool = False
    readers: tuple[Reader, ...] = ()
    owner: int = 0
    entry: GroupPlan | None = None
    coreset: Coreset | None = None


def packed(decision: Decision, after: Tensor) -> Packed | None:
    """A decision for the disk, with the state of the generator after it; None if it needs moments, or a function."""
    if decision.ranking.rule is not None or decision.readers:
        return None
    about, tensors = _packed(decision)
    return about, {**tensors, "generator": after}


def unpacked(group: Group, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Decision, Tensor]:
    """The inverse of `packed`."""
    return _unpacked(group, about, tensors), tensors["generator"]


def packed_all(decisions: Mapping[str, Decision]) -> Packed | None:
    """Decisions with their widths, by name of the group; None if a product of two activations reads one of them.

    The rule of a ranking is left out, because nothing asks for another width once widths are allocated.
    """
    about: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, decision in decisions.items():
        if any(reader.partner for reader in decision.readers):
            return None
        about[name], own = _packed(decision)
        tensors |= {f"{len(about)} {key}": value for key, value in own.items()}
    return about, tensors


def unpacked_all(
    groups: Mapping[str, Group], about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Decision]:
    """The inverse of `packed_all`."""
    out = {}
    for i, (name, mine) in enumerate(about.items(), start=1):
        own = {key.partition(" ")[2]: value for key, value in tensors.items() if key.startswith(f"{i} ")}
        out[name] = _unpacked(groups[name], mine, own)
    return out


def _packed(decision: Decision) -> tuple[dict[str, Any], dict[str, Tensor]]:
    ranking, curve, coreset = decision.ranking, decision.curve, decision.coreset
    tensors = {"scores": ranking.scores, "order": ranking.order}
    about: dict[str, Any] = {"method": ranking.method, "note": ranking.note, "estimated": decision.estimated}
    if ranking.stream is not None:
        tensors |= {"stream": ranking.stream.order, "probabilities": ranking.stream.probabilities}
        about["seed"] = ranking.stream.seed
    if curve is not None:
        tensors |= {"curve": curve.order, "errors": curve.errors, "optimum": curve.optimum}
    if decision.held_out is not None:
        tensors["held_out"] = decision.held_out
    if decision.entry is not None:
        about["entry"] = asdict(decision.entry)
    if coreset is not None:
        about["draws"] = coreset.draws
        tensors |= {"indices": coreset.indices, "weights": coreset.weights}
        if coreset.negative_weights is not None:
            tensors["negative_weights"] = coreset.negative_weights
        if coreset.merge is not None:
            merge = coreset.merge
            about["mean"] = merge.mean
            tensors |= {"target": merge.target, "scale": merge.scale}
            tensors |= {f"gains {name}": value for name, value in merge.gains.items()}
    return about, tensors


def _unpacked(group: Group, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Decision:
    stream = DrawStream(tensors["stream"], tensors["probabilities"], about["seed"]) if "stream" in tensors else None
    ranking = Ranking(about["method"], tensors["scores"], tensors["order"], about["note"], stream)
    curve = coreset = merge = None
    if "curve" in tensors:
        curve = FunctionalCoreset(tensors["curve"], tensors["errors"], tensors["optimum"])
    if "target" in tensors:
        gains = {key.removeprefix("gains "): value for key, value in tensors.items() if key.startswith("gains ")}
        merge = Merge(tensors["target"], tensors["scale"], about["mean"], gains)
    if "indices" in tensors:
        negative = tensors.get("negative_weights")
        coreset = Coreset(tensors["indices"], tensors["weights"], negative, about["draws"], merge)
    entry = group_from(group.name, about["entry"]) if "entry" in about else None
    held_out = tensors.get("held_out")
    return Decision(group, ranking, curve, held_out, about["estimated"], entry=entry, coreset=coreset)
