"""Budget: what the pruned model may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coreprune._runtimes import RUNTIMES
from coreprune.errors import BudgetError
from coreprune.pruning.allocation.durations import seconds_of

KINDS = ("keep", "macs", "params", "bytes", "cost", "error", "agreement", "metric", "latency")
RISKS = ("agreement", "metric")  # the sizes that they allow are found by a test on samples
_TIMING = {"batch": 1, "runtime": "eager", "table": None}  # how a latency is measured

Loss = Callable[
    ..., Tensor
]  # (output of the model, output of the pruned one[, labels]) to losses (n,), bool or in [0, 1]


@dataclass(frozen=True)
class Budget:
    """How much of the model may stay. Give at most one of the first nine; `Budget()` is `Budget(keep=0.5)`.

    keep: the share of channels that stays in every free group, in (0, 1], rounded to the nearest whole unit. Or shares
        by names or patterns of groups, e.g. `{"layer1.*": 0.8, "*": 0.5}`: the first pattern that matches a group
        decides, and a group that none matches stays whole. `list_groups` lists the names.
    macs, params, bytes: what the whole pruned model may cost. Numbers up to 1 are shares of the dense model, larger
        ones are absolute. MACs are those of one sample. The limit is never exceeded; widening any group by one step
        would exceed it. A step is one unit, or `round_to` channels; with `uniform` equal groups take it together.
    cost: the same, in a cost of your own, which goes into `prune(cost=...)` (`CostFunction`).
    error: the largest error that may be predicted for the model's outputs on the queries. It is the mean squared error
        relative to the variance of the outputs, to first order and summed over the groups. Errors of logits over the
        vocabulary of a language model count as they change the probabilities (T21). The model becomes as cheap as that
        allows.
    agreement: the least share of inputs that get the same answer as from the dense model, such as 0.99: the class with
        the highest score, or the next token of a causal language model. The smallest model is returned that is shown to
        do so with probability 1 − `delta`, on samples that are set aside for this alone (T19). It needs samples:
        ln(delta)/ln(agreement) of them are set aside at the least, which is 459 for 0.99 and delta = 0.01.
    metric, loss: the same for any loss: the smallest model whose expected `metric` is shown to be at most `loss`.
        metric(output of the dense model, output of the pruned one) returns for a batch one number in [0, 1] for each
        sample, or a bool; a function of three arguments gets the samples' labels as the third.
    latency: the time of one call on this machine: a share of the dense model's, below 1, or text such as "8ms", "1.5s"
        or "800us". Layers are timed at several widths; then the whole pruned model is timed in turn with the dense one,
        and the widths are corrected until its median is within the limit.
    uniform: take about the same share from every free group, and leave equal widths in equal groups (those with the
        same channels, unit and sections), so that a config.json with one width for all layers can express it. By
        default the errors on the queries decide; without queries the shares are about equal.
    min_width: at least this many units stay in every group, or in every section of it.
    round_to: widths are multiples of this many channels, or whole groups; `keep` rounds up to them. None means
        multiples of 8 (or `min_width`) in groups of at least 128 channels, which is faster on most processors, and any
        width in narrower groups and with `keep`.
    absolute: take macs, params, bytes or cost as an absolute number. A number between 1 and 100 is refused without it,
        because a percentage may be meant; larger ones are absolute anyway.
    batch: samples per call, for `latency`.
    runtime: what runs the model, for `latency`: "eager", "compile" (torch.compile) or "onnx" (ONNX Runtime, on the CPU;
        `pip install 'coreprune[onnx]'`). Each uses as many threads as torch does at that time.
    table: a file for the measured times, for `latency`. By default it is in `$XDG_CACHE_HOME/coreprune`, or
        `~/.cache/coreprune`. Times are kept apart by processor, threads, versions and runtime, and not measured again.

    Raises BudgetError for values that contradict each other.
    """

    keep: int | float | Mapping[str, int | float] | None = field(default=None, hash=False)
    macs: int | float | None = None
    params: int | float | None = None
    bytes: int | float | None = None
    cost: int | float | None = None
    error: float | None = None
    agreement: float | None = None
    metric: Loss | None = None
    loss: float | None = None
    latency: int | float | str | None = None
    uniform: bool = False
    min_width: int = 1
    round_to: int | None = None
    absolute: bool = False
    batch: int = 1
    runtime: str = "eager"
    table: str | Path | None = None

    def __post_init__(self) -> None:
        """Raise BudgetError for values that contradict each other, or that no model can meet."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)} are given, but a budget has one of {', '.join(KINDS)}.")
        if not given:
            object.__setattr__(self, "keep", 0.5)
        if isinstance(self.keep, Mapping):
            object.__setattr__(self, "keep", _shares(self.keep))
        elif self.kind != "metric":
            _check_limit(self.kind, getattr(self, self.kind))
        self._check_metric()
        if self.kind == "error" and self.uniform:
            raise BudgetError(
                "an error budget gives every group the width that its errors ask for, so it does not go with uniform "
                "widths. Leave one of them out."
            )
        self._check_absolute()
        self._check_timing()
        for name in ("min_width", "round_to", "batch"):
            value = getattr(self, name)
            if name == "round_to" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name} must be a whole number ≥ 1, but it is {value!r}.")

    def _check_metric(self) -> None:
        if self.metric is None and self.loss is None:
            return
        if self.metric is None or self.loss is None:
            raise BudgetError("metric and loss go together: Budget(metric=function, loss=0.01).")
        if not callable(self.metric):
            raise BudgetError(f"metric must be a function of two outputs, or of two and labels, not {self.metric!r}.")
        _check_limit("loss", self.loss)

    def _check_timing(self) -> None:
        """Raise BudgetError for how to measure a latency, where it is wrong or nothing is measured."""
        if self.runtime not in RUNTIMES:
            raise BudgetError(f"runtime must be one of {', '.join(RUNTIMES)}, but it is {self.runtime!r}.")
        if self.table is not None and (not isinstance(self.table, (str, Path)) or not str(self.table)):
            raise BudgetError(f"table must be the path of a file for measured times, but it is {self.table!r}.")
        if self.table is not None:
            object.__setattr__(self, "table", str(self.table))  # plans and reports are JSON
        given = [name for name, value in _TIMING.items() if getattr(self, name) != value]
        if given and self.latency is None:
            raise BudgetError(
                f"{' and '.join(given)} say how a latency is measured, but the budget limits {self.kind}. Use "
                "Budget(latency=0.5, ...), or leave them out."
            )

    def _check_absolute(self) -> None:
        if not isinstance(self.absolute, bool):
            raise BudgetError(f"absolute must be True or False, but it is {self.absolute!r}.")
        if not self.absolute:
            return
        if self.kind == "latency":
            raise BudgetError("absolute=True does not go with latency: an absolute time is text, latency='8ms'.")
        if self.kind in ("keep", "error", *RISKS):
            raise BudgetError(
                f"absolute=True goes with macs, params, bytes or cost; {self.kind} is always a share. Leave it out."
            )
        if self.kind != "cost" and self.limit <= 1:
            raise BudgetError(
                f"{self.kind}={self.limit:g} is a share of the dense model, so it does not go with absolute=True. "
                "Leave absolute out, or give a number above 1."
            )

    @property
    def kind(self) -> str:
        """Which of keep, macs, params, bytes, cost, error, agreement, metric and latency is limited."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def limit(self) -> Any:
        """The value of the limit."""
        return self.loss if self.kind == "metric" else getattr(self, self.kind)

    def sized(self, kind: str, limit: float) -> Budget:
        """A budget of another kind, with the same rules about widths."""
        others = dict.fromkeys((*KINDS, "loss"))
        return replace(self, **{**others, **(_TIMING if kind != "latency" else {}), kind: limit})

    def in_numbers(self, dense: Mapping[str, float]) -> Budget:
        """The same, with a share of one of these costs as a number. dense: kind -> what the dense model has of it."""
        if self.absolute or self.kind not in dense or self.limit > 1:
            return self
        return replace(self, absolute=True, **{self.kind: max(self.limit * dense[self.kind], 2)})


_USUAL = {"agreement": 0.99, "loss": 0.01}


def _check_limit(kind: str, value: Any) -> None:
    """Raise BudgetError unless the value is a number in the range of its kind, or a time."""
    if kind == "latency" and isinstance(value, str):
        seconds_of(value)
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BudgetError(f"{kind} must be a number, e.g. {kind}=0.5, but it is {value!r}.")
    if value <= 0:
        raise BudgetError(f"{kind}={value:g} would remove every channel. Use a share in (0, 1], e.g. {kind}=0.5.")
    if kind in ("agreement", "loss") and value >= 1:
        raise BudgetError(f"{kind}={value:g} must lie between 0 and 1. Use e.g. {kind}={_USUAL[kind]}.")
    if kind == "error" and value >= 1:
        raise BudgetError(
            f"error={value:g} must lie below 1, which is as bad as a constant output. Use e.g. error=0.05."
        )
    if kind == "latency" and value >= 1:
        raise BudgetError(
            f"latency={value:g} is not below the dense model's own time, which is 1. Give a share such as "
            "latency=0.5, or a time as text: latency='8ms'."
        )
    if kind == "keep" and value > 1:
        raise BudgetError(f"keep={value:g} is more than everything. It is a share: keep=0.5 keeps half.")


def _shares(keep: Mapping[Any, Any]) -> dict[str, int | float]:
    """A copy of the shares by pattern. Raises BudgetError unless patterns and shares are valid."""
    if not keep or not all(isinstance(pattern, str) and pattern for pattern in keep):
        raise BudgetError(
            f"keep must be a share, or shares by names or patterns, e.g. {{'layer1.*': 0.8}}, not {keep!r}."
        )
    for pattern, share in keep.items():
        try:
            _check_limit("keep", share)
        except BudgetError as error:
            raise BudgetError(f"groups {pattern!r}: {error}") from None
    return dict(keep)
