"""Function-space coresets: the units that best stand in for the others on given queries (ours).

One reader (a consumer of the group) sees n units with p features each. K is the covariance of the features on the
queries. G = VᵀWV weighs errors of the features: V holds the reader's weights, and W weighs errors of its outputs. For
a set S of units (S also denotes their features), let

    R_S = K − K_:S K_SS⁻¹ K_S:,    e(S) = Σ_readers tr(G R_S).

e(S) is the weighed error E‖W^{1/2}(…)‖² of the readers' outputs after the best refit of their weights on S, with
intercept (T10). It is their mean squared error only where W is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune.coreset._pivoting import Pair, diagonal_blocks, gain, largest, least_gain, log_det, pivot_all
from coreprune.coreset._readers import Moments, ScaledReader, alive, as_readers, curve, features
from coreprune.coreset.bounds import Certificate
from coreprune.errors import InputError
from coreprune.geometry import mvee

__all__ = [
    "FunctionalCoreset",
    "Moments",
    "d_optimal",
    "function_space_ratio",
    "functional_coreset",
    "functional_order",
    "in_order",
    "unit_floor",
]

Search = Literal["forward", "backward", "best"]


@dataclass(frozen=True)
class FunctionalCoreset:
    """A nested order of the units with its error curve. Errors are float64, in the units of tr(GK).

    order: (n,) int64. The first k units are the choice of size k.
    errors: (n+1,) e(k) of the first k units, with the ridge that `functional_coreset` describes. errors[0] = tr(GK) and
        errors[n] = 0. The curve never increases and is never below the error of the least-squares refit.
    optimum: (n+1,) T10's floor. No k units, and no map of rank k·p, have a smaller error.
    """

    order: Int[Tensor, " n"]
    errors: Float[Tensor, " m"]
    optimum: Float[Tensor, " m"]
    __repr__ = brief


def functional_order(
    moments: Sequence[Moments], units: int, *, ridge: float = 1e-4, search: Search = "best"
) -> Int[Tensor, " n"]:
    """Return only the order of `functional_coreset`, (n,) int64, without the error curve and the floor."""
    ways = _ways(search)
    readers = as_readers(moments, units, ridge)
    way, *more = ways
    if more:
        return _best(readers, ways)
    start = _start(readers, way)
    del readers  # each of its matrices may be a gigabyte
    return _found(*start)


def functional_coreset(
    moments: Sequence[Moments], units: int, *, ridge: float = 1e-4, search: Search = "best"
) -> FunctionalCoreset:
    """T10: order the units so that, for every k, the first k stand in for all of them on the queries.

    The weighed error of the best refit on S is e(S) = Σ_readers tr(G R_S). No choice of k units, and no map of the
    features of rank k·p, has an error below Σ_readers (the sum of the eigenvalues of G^{1/2}KG^{1/2} beyond the
    (k·p)-th). The proof is in docs/theory.md.

    search:
        "forward"   greedy residual pivoting: next comes the unit that lowers e(S) most.
        "backward"  greedy elimination: the unit whose removal raises e(S) least comes last, and so on.
        "best"      run both, and return the order whose error curve is lower on average (geometric mean over k).
    ridge: λ as a multiple of the mean diagonal of K, per reader. The refit has a ridge towards the original weights:
        min over V' of E‖V a − V' a_S‖² + λ‖V' − V_S‖². This objective is minimised and reported. It is at or above the
        error of that refit, and equals the least-squares error at λ = 0. A ridge below 1e-9 (4·2⁻⁵²·f² from f = 1,061
        features on) is raised to that value.

    Units whose features are all constant come last. Takes O((n·p)³) time, mostly in products of matrices, and memory
    for about 5 matrices of the size of K. Runs on the device of the covariances.

    Raises InputError for an unknown search, a negative ridge, moments that are empty, non-finite, not symmetric or
    indefinite, and shapes that do not fit `units`.
    """
    ways = _ways(search)
    readers = as_readers(moments, units, ridge)
    order = _best(readers, ways)
    return _coreset(readers, order, curve(readers, order))


def _ways(search: Search) -> list[str]:
    if search not in get_args(Search):
        raise InputError(f"unknown search {search!r}; known: {', '.join(get_args(Search))}.")
    return ["forward", "backward"] if search == "best" else [search]


def _best(readers: list[ScaledReader], ways: Sequence[str]) -> Tensor:
    """The order with the lower curve, of those that the searches find."""
    found = [_found(*_start(readers, way)) for way in ways]
    return found[0] if len(found) == 1 else min(found, key=lambda order: _level(curve(readers, order)))


def _start(readers: list[ScaledReader], way: str) -> tuple[str, list[Pair], Tensor, Tensor]:
    """The start of a search over the units that vary, which they are, and the others."""
    live, dead = _split(readers)
    inside = [reader.restricted(live) for reader in readers] if live.numel() else []
    return way, [reader.forward() if way == "forward" else reader.backward() for reader in inside], live, dead


def _found(way: str, pairs: list[Pair], live: Tensor, dead: Tensor) -> Tensor:
    """The order that the search finds, with constant units last."""
    if not live.numel():
        return dead
    order = pivot_all(pairs, largest(gain) if way == "forward" else least_gain).to(live.device)
    return torch.cat([live[order if way == "forward" else order.flip(0)], dead])


def d_optimal(moments: Sequence[Moments], units: int, *, ridge: float = 1e-4) -> FunctionalCoreset:
    """Order the units by the D-optimal design on their features as functions: the Löwner support in function space.

    Let KK = C K C + λ, with C the units' outgoing sizes c_i = √tr(G_BB). The features are points c_i·f_i of a Euclidean
    space. The first layer holds the units with a feature in the support of the Löwner ellipsoid of these points
    (`mvee`, symmetric, on the directions with variance above λ). The next layer is the same for the remaining units,
    and so on. By T1, each layer bounds all later features in every direction of function space, up to √r. The order
    within a layer is greedy for log det KK_SS, the D-optimal choice of k points: next comes the unit with the largest
    log det of its residual block. If the features are linearly independent, they are all contact points, and the one
    layer holds all units.

    Only K and the sizes c are used, not what the reader computes from the features. Errors and optimum are those of
    T10, so that the order can be compared with `functional_coreset`. For several readers, a layer is the union of their
    layers, and the log determinants are added. Arguments and errors are as in `functional_coreset`.
    """
    readers = as_readers(moments, units, ridge)
    live, dead = _split(readers)
    order = dead
    if live.numel():
        weighted = [_weighted(reader.restricted(live)) for reader in readers]
        pairs = [Pair(each.ridged, None, each.charge) for each in weighted]
        order = torch.cat([live[pivot_all(pairs, largest(log_det, _layers(weighted))).to(live.device)], dead])
    return _coreset(readers, order, curve(readers, order))


def in_order(
    moments: Sequence[Moments],
    units: int,
    order: Int[Tensor, " n"],
    *,
    ridge: float = 1e-4,
    unit_floor: bool = False,
) -> FunctionalCoreset:
    """Compute the error curve of any order of the units, to compare it with those of the functions above.

    order: (n,) int64, every unit once. unit_floor: raise the optimum to the floor of T10′ where that is higher. This
    takes a second for about 1,200 features.

    Other arguments and errors are as in `functional_coreset`.
    """
    if order.numel() != units or not torch.equal(order.sort().values.cpu(), torch.arange(units)):
        raise InputError(f"order must name each of the {units} units once.")
    # Permuted beforehand, so that one Cholesky factor serves the check, the curve and the unit floor.
    readers = as_readers([_permuted(each, order, units) for each in moments], units, ridge)
    found = _coreset(readers, order.to(readers[0].covariance.device), curve(readers, torch.arange(units)))
    if not unit_floor:
        return found
    return replace(found, optimum=torch.minimum(torch.maximum(found.optimum, _unit_floor(readers)), found.errors))


def _permuted(moments: Moments, order: Tensor, units: int) -> Moments:
    """The moments with their units in another order. Wrong shapes are returned unchanged: `as_readers` reports them."""
    f = moments.covariance.shape[0]
    if moments.covariance.shape != (f, f) or moments.gram.shape != (f, f) or f % units:
        return moments
    keep = features(order.to(moments.covariance.device), f // units)
    return Moments(moments.covariance[keep[:, None], keep], moments.gram[keep[:, None], keep])


def function_space_ratio(
    errors: Float[Tensor, " m"],
    optimum: Float[Tensor, " m"],
    k: int,
    *,
    held_out: float | None = None,
    estimated: bool = False,
) -> Certificate:
    """T10 as a certificate: the error of the first k units on the queries, and how far it can be from the optimum.

    errors, optimum: (n+1,) each, as in `FunctionalCoreset`. The optimum may also be `unit_floor`, or the larger of the
    two.

    The errors are those of the readers' outputs, weighed by W, what an error at each output is worth. They are the mean
    squared error, and errors[0] the variance, only where W is the identity; so the statement claims neither.

    held_out: the error of k units on queries that the refit has not seen (T12), in the same units, for the statement.
    estimated: whether the errors are no bounds, because they are scaled by what a sample of patches shows (T14).

    The bound is errors[k]; with `estimated` it is no bound, and the statement says so. The trivial bound is errors[0],
    the error of constant outputs. Raises InputError for curves of different lengths and for k outside 0..n.
    """
    n = errors.numel() - 1
    if errors.shape != optimum.shape or n < 1:
        raise InputError(f"errors and optimum must both be (n+1,), not {tuple(errors.shape)}, {tuple(optimum.shape)}.")
    if not 0 <= k <= n:
        raise InputError(f"k must lie in 0..{n}, but it is {k}.")
    error, floor, constant = float(errors[k]), float(optimum[k]), float(errors[0])
    share = f"{100 * error / constant:.3g} % of that of constant outputs" if constant > 0 else "as they do not vary"
    if error <= 0:
        compared = "nothing is lost"
    elif floor > 1e-12 * constant:
        compared = f"that is at most {error / floor:.3g} times what the best choice of {k} units has"
    else:
        compared = f"the floor for {k} units is zero here, so the distance to the best choice is not known"
    return Certificate(
        theorem="T10",
        kind="measured",
        bound=error,
        trivial=constant,
        statement=(
            f"with the linear layers that read them refitted on {k} of {n} units, the weighed error of these layers' "
            f"outputs is {'about this number' if estimated else 'at most the bound'}, {share}; {compared}"
            + ("" if held_out is None or constant <= 0 else f"; on unseen queries {100 * held_out / constant:.3g} %")
        ),
        assumptions=(
            "an error at these outputs counts by its worth W, here what it does to the model's outputs to first order",
            "the queries, and their positions in images and texts, are those that the moments were measured on",
            "the layer's inputs are those of the unpruned network",
            "the refit is by least squares with intercept, with no more ridge than the errors were computed with",
            *(
                ["some whole patches stand for all of them (T14): this is an estimate, not a bound"]
                if estimated
                else []
            ),
        ),
    )


def unit_floor(moments: Sequence[Moments], units: int, *, ridge: float = 1e-4) -> Float[Tensor, " m"]:
    """T10′: a floor on the error of any choice of k units, for every k; (n+1,) float64.

    T10's floor holds for any map of rank k·p, so it is zero once k·p reaches the number of a reader's outputs. With
    convolution kernels this happens early. This floor is about units. Let P = (K + λ)⁻¹, let δ_B = tr(G_BB P_BB⁻¹) be
    the error of removing unit B alone, and let c be the largest eigenvalue of P after scaling every diagonal block to
    the identity (1 ≤ c ≤ n). Removing a set T leaves an error of at least

        e(S) ≥ max_{B∈T} δ_B    and    e(S) ≥ (1/c) Σ_{B∈T} δ_B.

    For n − k removed units, the smallest such values are taken. The result is a floor on the `errors` with the same
    ridge, and like them it excludes the ridge's own share λ tr(G_TT). The proof is in docs/theory.md. Arguments and
    errors are as in `functional_coreset`.
    """
    return _unit_floor(as_readers(moments, units, ridge))


def _unit_floor(readers: list[ScaledReader]) -> Tensor:
    units = readers[0].units
    alone, summed, charge = (torch.zeros_like(readers[0].charge) for _ in range(3))
    for reader in readers:
        inverse = torch.cholesky_inverse(reader.factor)
        blocks = diagonal_blocks(inverse, units)
        by_unit = reader.root.view(-1, units, reader.p).transpose(0, 1)
        factors = torch.linalg.cholesky(blocks)
        delta = torch.linalg.solve_triangular(factors, by_unit.mT, upper=False).square().sum(dim=(1, 2))
        alone, summed, charge = alone + delta, summed + delta / _coupling(inverse, factors), charge + reader.charge
    first = alone.sort().values - charge.sort(descending=True).values.cumsum(dim=0)
    second = (summed - charge).sort().values.cumsum(dim=0)
    removed = torch.maximum(first, second).clamp_min(0)  # for 1..n removed units
    return torch.cat([removed.flip(0), removed.new_zeros(1)])


def _coupling(inverse: Tensor, factors: Tensor) -> float:
    """An upper bound, within a few per cent, on the largest eigenvalue of P with its diagonal blocks scaled to 1."""
    units, p, _ = factors.shape
    rows = torch.linalg.solve_triangular(factors, inverse.reshape(units, p, -1), upper=False).reshape(inverse.shape)
    columns = torch.linalg.solve_triangular(factors, rows.mT.reshape(units, p, -1), upper=False)
    scaled = columns.reshape(inverse.shape)
    vector = torch.ones_like(scaled[0])
    for _ in range(50):
        vector = scaled @ (vector / vector.norm())
    bound = 1.01 * float(vector.norm())
    while bound < units:
        # If this is positive definite, no eigenvalue is larger. The power iteration alone could be too low.
        shifted = -scaled
        shifted.diagonal().add_(bound)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return bound
        bound *= 1.1
    return float(units)


def _coreset(readers: list[ScaledReader], order: Tensor, errors: Tensor) -> FunctionalCoreset:
    optimum = torch.stack([reader.floor() for reader in readers]).sum(dim=0)
    return FunctionalCoreset(order, errors, torch.minimum(optimum, errors))  # only rounding can put it above


def _split(readers: list[ScaledReader]) -> tuple[Tensor, Tensor]:
    """The indices of the units that vary, and of those that do not."""
    varies = alive(readers)
    return varies.nonzero()[:, 0], (~varies).nonzero()[:, 0]


def _level(errors: Tensor) -> float:
    """The mean logarithm of a curve relative to its start, cut off at 1e-9."""
    return float((errors / errors[0].clamp_min(1e-300)).clamp_min(1e-9).log().mean())


def _weighted(reader: ScaledReader) -> ScaledReader:
    """The reader with every unit's features multiplied by the unit's outgoing size, and without other weights."""
    p = reader.p
    size = reader.gram.diagonal().view(-1, p).sum(dim=1).sqrt().repeat_interleave(p)
    covariance = size[:, None] * reader.covariance * size
    scale = float(covariance.diagonal().mean())
    return ScaledReader(covariance / (scale if scale > 0 else 1.0), reader.gram, reader.ridge, reader.units)


def _layers(readers: list[ScaledReader]) -> Int[Tensor, " n"]:
    """The round of peeling in which each unit is a contact point of the Löwner ellipsoid, (n,), counted from 0."""
    clouds: list[Tensor] = []
    for reader in readers:
        values, vectors = torch.linalg.eigh(reader.covariance)
        seen = values > reader.ridge
        clouds.append((vectors[:, seen] * values[seen].sqrt()).view(reader.units, reader.p, int(seen.sum())))
    units = readers[0].units
    layers = torch.zeros(units, dtype=torch.int64, device=clouds[0].device)
    left = torch.arange(units, device=layers.device)
    depth = 0
    while left.numel():
        touches = torch.zeros_like(left, dtype=torch.bool)
        for cloud in clouds:
            points = cloud[left].flatten(0, 1)
            if points.shape[1] and points.shape[0] > points.shape[1]:
                touches |= (mvee(points).weights.view(left.numel(), -1) > 0).any(dim=1)
            else:
                touches[:] = True  # with no more points than dimensions, all are contact points
        left, depth = left[~touches], depth + 1
        if not touches.any():  # all remaining points are at the origin
            break
        layers[left] = depth
    return layers
