"""Report: what pruning did to a model, in plain values."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from coreprune.coreset import Certificate
from coreprune.pruning.repair.descent import Descended
from coreprune.pruning.repair.refit import Refit
from coreprune.pruning.reporting import text
from coreprune.pruning.settings import Settings
from coreprune.pruning.timing.pace import MetLatency


@dataclass(frozen=True)
class GroupReport:
    """One group of channels.

    name: of the first layer that makes the channels. channels, kept: how many there were, and how many stayed.
    unit: how many channels can only be removed together. note: which form of the selector ran. locked_because: why the
    group stayed whole, or None. certificates: what is known about the error at its consumers. rank: r of the incoming
    rows (T7), or None if no theorem applies, or if the layer is large and its units are no drawn coreset. errors: the
    error on the queries (T10) at every width from 0 on, weighed by what it does to the model's outputs: to first order,
    in shares of their variance. None without queries. held_out: the same on queries that neither the choice nor the
    refit has seen (T12); None with fewer than two queries. macs: (before, after) for the whole pruned model, the
    multiply–accumulates of the convolutions and linear layers whose
    outputs are the channels (`CostModel.making`).
    """

    name: str
    channels: int
    kept: int
    unit: int = 1
    note: str = ""
    locked_because: str | None = None
    certificates: tuple[Certificate, ...] = ()
    rank: int | None = None
    errors: tuple[float, ...] | None = None
    held_out: tuple[float, ...] | None = None
    macs: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = {**self.__dict__, "certificates": [c.as_dict() for c in self.certificates]}
        if self.rank is not None:
            out["channels_per_rank"] = self.channels / max(self.rank, 1)
        return out


@dataclass(frozen=True)
class Compared:
    """One of the models that could be returned.

    name: what it is. error: the squared error of its outputs on the held-back queries, relative to their variance; of
    logits over a vocabulary, twice the divergence of the probabilities, relative to what the logits vary (T21).
    agreement: the share of these queries with the same class; None if the model does not return scores of classes.
    chosen: whether it is the one that is returned.
    """

    name: str
    error: float
    agreement: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Tested:
    """One model of the path of a budget of risk. share: of the dense model's cost that it was allowed. macs,
    parameters: what it has. risk: its mean loss on the samples that were set aside. bound: T18's, on its expected loss.
    passed: whether that is at most the level.
    """

    share: float
    macs: int
    parameters: int
    risk: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class TestedPath:
    """What a budget of risk has tested (T19), from the largest model to the first that failed, or to the smallest.

    asked: the budget, in words. level: of the loss. samples: how many were set aside. source: where they come from.
    certificate: T19 about the model that was chosen.
    """

    asked: str
    level: float
    delta: float
    samples: int
    source: str
    steps: tuple[Tested, ...]
    certificate: Certificate

    @property
    def chosen(self) -> Tested:
        """The last model that passed."""
        return [step for step in self.steps if step.passed][-1]

    @property
    def next_one(self) -> Tested | None:
        """The next smaller model, which failed; None if there was none."""
        return None if self.steps[-1].passed else self.steps[-1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "certificate": self.certificate.as_dict()}


@dataclass(frozen=True)
class Memory:
    """How much memory a run took, in bytes.

    limit: what was asked for, or half of what was free. held: the most that was kept of what the model computes on the
    queries. spilled: how much of it was written into files. peaks: by phase, the most that the process had held when
    the phase ended; empty where the system does not say.
    """

    limit: int = 0
    held: int = 0
    spilled: int = 0
    peaks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Sizes before and after pruning, all groups with their certificates, and the settings.

    groups: in the order of the forward. parameters, macs, bytes: (before, after). MACs are multiply–accumulates of one
    sample, or of one whole example of a model without a batch. settings: the arguments of `prune`. queries: where they
    come from. refits: the layers that were repaired. descended: the blocks that were trained after that.
    compared: the models that could be returned, on queries that were held back. agreement: T11 on the same queries, or
    on fresh ones from the same source; T19 if the budget is one of agreement. path: the models that
    such a budget has tested, or None. model: the name of its class. notes: what else the caller should know of the
    result, in sentences, such as that almost nothing could be removed. seconds: per phase. memory: what was used of it.
    versions: software and hardware that the result depends on. unread: the parameters that nothing reads on the
        examples. latency_budget: how a budget of time was met; None for other budgets. dropped: the blocks that were
        left out whole, by the names that they have in the dense model.
    """

    groups: tuple[GroupReport, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    settings: Settings
    queries: str = ""
    refits: tuple[Refit, ...] = ()
    descended: tuple[Descended, ...] = ()
    compared: tuple[Compared, ...] = ()
    agreement: Certificate | None = None
    path: TestedPath | None = None
    model: str = ""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    memory: Memory = field(default_factory=Memory)
    latency_budget: MetLatency | None = None
    dropped: tuple[str, ...] = ()

    @property
    def locked(self) -> dict[str, str]:
        """The groups that stayed whole, and why: name -> reason."""
        return {g.name: g.locked_because for g in self.groups if g.locked_because}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        sizes = {
            name: dict(zip(("before", "after"), getattr(self, name), strict=True))
            for name in ("parameters", "macs", "bytes")
        }
        plain = {
            "schema": 1,
            "model": self.model,
            **sizes,
            "notes": list(self.notes),
            "queries": self.queries,
            "agreement": None if self.agreement is None else self.agreement.as_dict(),
            "path": None if self.path is None else self.path.as_dict(),
            "groups": [g.as_dict() for g in self.groups],
            "refits": [asdict(fit) for fit in self.refits],
            "descended": [asdict(block) for block in self.descended],
            "compared": [asdict(one) for one in self.compared],
            "settings": self.settings.as_dict(),
            "call": self.settings.call(),
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
            "unread": list(self.unread),
            "memory": asdict(self.memory),
            "latency_budget": None if self.latency_budget is None else asdict(self.latency_budget),
            "dropped": list(self.dropped),
        }
        return _finite(plain)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        """A short plain-text summary."""
        return text.as_text(self.as_dict())

    def _repr_html_(self) -> str:
        """The summary for a notebook: static HTML without styles of its own."""
        return text.as_html(self.as_dict())


def _finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions and hardware that the result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("coreprune")
    except PackageNotFoundError:  # the package runs from a source tree without being installed
        own = "source tree"
    return {
        "coreprune": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
