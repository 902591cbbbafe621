"""How often two networks agree on a query distribution, measured on fresh queries."""

from __future__ import annotations

import math

from coreprune.coreset.bounds import Certificate
from coreprune.errors import InputError
from coreprune.risk import upper_quantile as _quantile


def agreement_bound(
    disagreements: int,
    queries: int,
    delta: float = 0.01,
    *,
    trivial: float = 1.0,
    source: str = "the query source",
    candidates: int = 1,
) -> Certificate:
    """T11: an upper bound on how often two networks disagree on inputs from the source of the queries.

    Of n independent queries, k had different answers. With probability ≥ 1−δ over the queries, the probability p that
    the two networks disagree on a further query is at most the one-sided Clopper–Pearson bound, that is the p with
    P(Binomial(n, p) ≤ k) = δ:

        p ≤ BetaInv(1−δ; k+1, n−k),    so that the agreement is at least 1 − bound.

    The bound is 1 − δ^{1/n} at k = 0 (about ln(1/δ)/n) and 1 at k = n.

    disagreements, queries: k and n. source: where the queries come from, in words, for the statement. For a user's
        unlabelled samples, this is the user's data. trivial: the bound must be below this value to say anything. An
        example is the disagreement of a constant answer, 1 − (share of the most frequent answer).

    If one of the networks was chosen among m candidates with these queries, δ/m takes the place of δ: then the bounds
    of all candidates hold together with probability ≥ 1−δ, and so does that of the chosen one.

    candidates: m. The queries must be drawn independently, and after all candidates were fixed. None of them may have
    been used for selection, repair or distillation. Source: Clopper & Pearson 1934.

    Raises InputError unless the counts are whole numbers with 0 ≤ k ≤ n and n ≥ 1, δ lies in (0, 1) and `trivial` in
    [0, 1].
    """
    counts = (("disagreements", disagreements, 0), ("queries", queries, 1), ("candidates", candidates, 1))
    for name, value, least in counts:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number ≥ {least}, but it is {value!r}.")
    if disagreements > queries:
        raise InputError(f"there are {disagreements} disagreements on only {queries} queries.")
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, but it is {delta}.")
    if not 0 <= trivial <= 1:
        raise InputError(f"trivial is a share of the queries, between 0 and 1, but it is {trivial}.")
    bound = (
        1.0 if disagreements == queries else _quantile(disagreements + 1, queries - disagreements, delta / candidates)
    )
    agreement = math.floor((1 - bound) * 1e6) / 1e6  # round a printed bound to the safe side
    return Certificate(
        theorem="T11",
        kind="sampled",
        bound=bound,
        trivial=trivial,
        statement=(
            f"on queries from {source} the two networks give the same answer with probability at least {agreement:.6f} "
            f"(bound: the probability of different answers; {disagreements} of {queries} queries had one)"
        ),
        assumptions=(
            f"the {queries} queries are independent draws from {source}",
            "none of them was used to make either network"
            + (" or to choose it" if candidates == 1 else f"; the choice among {candidates} is accounted for"),
        ),
        delta=delta,
    )
