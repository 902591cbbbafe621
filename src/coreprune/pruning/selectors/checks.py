"""Run a selector on a layer, and check what it returns: the one place for our selectors and those of users."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreprune.coreset import Coreset, DrawStream
from coreprune.errors import CoreprunError, InputError, first_line
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors.base import Ranking, Selector, ranked
from coreprune.pruning.selectors.own import Own


def ranking_of(selector: Selector, layer: LayerWeights, generator: torch.Generator) -> Ranking:
    """Rank the units of one layer. Raises InputError for anything but one finite score a unit, or a sound Ranking."""
    say = _Complaint(selector.name, layer)
    found = _call(selector, (layer, generator), selector, say)
    if not isinstance(found, (Tensor, Ranking)):
        what = "None" if found is None else f"an object of type {type(found).__name__}"
        raise say(f"returned {what}", f"Return a float tensor of shape ({say.units},), one score a unit, or a Ranking.")
    if isinstance(found, Tensor):
        return ranked(selector.name, _scores(found, say))
    checked = replace(
        found,
        method=selector.name,
        scores=_scores(found.scores, say),
        order=_order(found.order, say),
        note=_note(found),
    )
    return _cuts(checked, selector, say) if isinstance(selector, Own) else checked


class _Complaint:
    """Makes an InputError that names the selector, the group and its shapes."""

    def __init__(self, selector: str, layer: LayerWeights) -> None:
        self.selector, self.layer = selector, layer
        self.units, self.device = len(layer.incoming), layer.incoming.device
        shapes = f"incoming {tuple(layer.incoming.shape)}, outgoing {tuple(layer.outgoing.shape)}"
        self.where = f"group {layer.name!r} ({self.units} units; {shapes})"

    def __call__(self, did: str, advice: str) -> InputError:
        return InputError(f"the selector {self.selector!r} {did} for {self.where}. {advice}")


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], selector: Selector, say: _Complaint) -> Any:
    """Call a selector or its rule; an error says at which group it happened."""
    try:
        return function(*arguments)
    except CoreprunError as error:
        error.add_note(f"This was the selector {say.selector!r} at {say.where}.")
        raise
    except Exception as error:
        if not isinstance(selector, Own):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise say(
            f"failed with {first_line(error)} ({Path(last.filename).name}, line {last.lineno})",
            "Its code must handle this layer, or leave the group out: exclude=.",
        ) from error


def _scores(scores: Any, say: _Complaint) -> Tensor:
    """The scores as float64 on the layer's device."""
    wanted = f"Return a float tensor of shape ({say.units},), one score a unit; units with larger scores stay."
    if not isinstance(scores, Tensor):
        raise say(f"returned scores of type {type(scores).__name__}", wanted)
    if scores.shape != (say.units,):
        raise say(f"returned scores of shape {tuple(scores.shape)}", wanted)
    if not scores.is_floating_point():
        raise say(
            f"returned scores of dtype {scores.dtype}",
            f"{wanted} If these are the units in order, return a Ranking; if they are scores, add .double().",
        )
    if scores.is_meta or scores.layout is not torch.strided:
        raise say("returned scores without values (meta or sparse)", wanted)
    if not bool((finite := torch.isfinite(scores)).all()):
        unit = int((~finite).nonzero()[0, 0])
        raise say(
            f"returned the score {float(scores[unit])} for unit {unit}, which is not finite,",
            "Check the layer's weights, its norms and the queries for NaN and infinite entries.",
        )
    return scores.detach().to(say.device, torch.float64)


def _order(order: Any, say: _Complaint) -> Tensor:
    """The order as int64 on the layer's device."""
    wanted = f"An order holds every unit from 0 to {say.units - 1} once, as an int64 tensor, best first."
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.is_meta:
        what = order.dtype if isinstance(order, Tensor) else type(order).__name__
        raise say(f"returned an order of type {what}", wanted)
    if sorted(order.reshape(-1).tolist()) != list(range(say.units)) or order.dim() != 1:
        raise say(f"returned an order of shape {tuple(order.shape)} that is no permutation", wanted)
    return order.to(say.device)


def _note(found: Ranking) -> str:
    return found.note if isinstance(found.note, str) else repr(found.note)


def _cuts(ranking: Ranking, selector: Own, say: _Complaint) -> Ranking:
    """A user's ranking, whose stream is checked now and whose rule is checked at every width that is asked for."""
    stream, rule = ranking.stream, ranking.rule
    if stream is not None:
        _check_stream(stream, say)
        stream = replace(stream, order=stream.order.to(say.device), probabilities=stream.probabilities.to(say.device))
    if rule is None:
        return replace(ranking, stream=stream)
    if not callable(rule):
        raise say(f"returned a rule of type {type(rule).__name__}", "A rule is a function from a width to a Coreset.")

    def checked(k: int) -> Coreset:
        coreset = _call(rule, (k,), selector, say)
        _check_coreset(coreset, k, say)
        return coreset

    return replace(ranking, stream=stream, rule=checked)


def _check_stream(stream: Any, say: _Complaint) -> None:
    """Refuse draws that are not of these units."""
    sound = (
        isinstance(stream, DrawStream)
        and stream.probabilities.shape in ((say.units,), (2 * say.units,))
        and stream.order.dim() == 1
        and len(stream.order) == len(stream.order.unique())
        and bool(((stream.order >= 0) & (stream.order < len(stream.probabilities))).all())
        and bool((stream.probabilities[stream.order] > 0).all())
        and abs(float(stream.probabilities.sum()) - 1) < 1e-6
    )
    if not sound:
        raise say(
            "returned a stream that does not fit", "Make it with coreprune.coreset.draw_stream(importance, generator)."
        )


def _check_coreset(coreset: Any, k: int, say: _Complaint) -> None:
    """Refuse what a rule must not return."""
    rule = f"has a rule that returned, at width {k},"
    if not isinstance(coreset, Coreset):
        raise say(f"{rule} an object of type {type(coreset).__name__}", "Return a coreprune.coreset.Coreset.")
    kept, merge = coreset.indices.tolist(), coreset.merge
    if kept != sorted(set(kept)) or len(kept) != k or kept[0] < 0 or kept[-1] >= say.units:
        raise say(f"{rule} the units {kept[:8]}…", f"Return {k} different units from 0 to {say.units - 1}, ascending.")
    factors = [coreset.weights] if coreset.negative_weights is None else [coreset.weights, coreset.negative_weights]
    if any(f.shape != (k,) or not bool(torch.isfinite(f).all()) for f in factors):
        raise say(f"{rule} weights that are not {k} finite numbers", "Return one factor for each kept unit.")
    if merge is None:
        return
    target = merge.target.tolist()
    if len(target) != say.units or any(target[i] != i for i in kept) or not {-1, *kept} >= set(target):
        raise say(
            f"{rule} a merge into units that it does not keep",
            "`Merge.target` is, for every unit, the kept unit that it goes into: itself for a kept one, -1 for none.",
        )
    if merge.scale.shape != (say.units,) or not bool(torch.isfinite(merge.scale).all()):
        raise say(
            f"{rule} a merge with scales that are not {say.units} finite numbers", "Use 1 where nothing is scaled."
        )
