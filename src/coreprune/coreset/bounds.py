"""Certificates: error bounds as values, with their assumptions and their kind.

F_j(x) = Σ_i V_ji φ⟨p_i, x⟩ + b_j is the next layer, and F'_j is the same layer on a coreset. `points` (n, d) holds the
p_i with the bias appended (so x has 1 appended), and `outgoing` (J, n) is V. All bounds are multiples of ‖x‖ in the
metric that they name.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import html_table
from coreprune._validate import as_points
from coreprune.coreset.sampling import Coreset
from coreprune.errors import InputError
from coreprune.geometry import lewis_weights, span

_LARGE = 10**9  # multiplications of a product of matrices in double precision
_HUGE = 10**10  # in any precision

Kind = Literal["proved", "sampled", "measured"]


@dataclass(frozen=True)
class Certificate:
    """One statement about a coreset. It is true under its assumptions, however large the bound is.

    theorem: its number in docs/theory.md. kind: "proved" (holds always), "sampled" (holds with probability 1−δ over the
    sampling) or "measured" (holds on the given queries). bound: the number. trivial: the bound that a constant answer
    (F' = b) achieves, in the same units. vacuous: bound ≥ trivial, so the certificate says nothing.
    statement, assumptions: in words. delta: δ, or None. interval: the ends of a two-sided statement at the same δ, if
    there is one (T18).
    """

    theorem: str
    kind: Kind
    bound: float
    trivial: float
    statement: str
    assumptions: tuple[str, ...]
    delta: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def vacuous(self) -> bool:
        """Whether the bound is no better than the trivial one."""
        return not self.bound < self.trivial

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. An infinite bound becomes None."""
        out = {**asdict(self), "vacuous": self.vacuous, "assumptions": list(self.assumptions)}
        for key in ("bound", "trivial"):
            if not math.isfinite(out[key]):
                out[key] = None
        return out

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        rows = [
            ("theorem", f"{self.theorem}, {self.kind}{' (says nothing)' if self.vacuous else ''}"),
            ("bound", f"{self.bound:.6g}; a constant answer: {self.trivial:.6g}"),
            ("statement", self.statement),
            ("assumes", "; ".join(self.assumptions)),
            ("δ", "" if self.delta is None else f"{self.delta:g}"),
        ]
        return html_table(("", ""), rows, "certificate", (0, 1))


def sampling_bound(
    points: Float[Tensor, "n d"],
    outgoing: Float[Tensor, "J n"],
    draws: int,
    delta: float = 0.01,
    *,
    metric: Literal["euclidean", "lewis", "queries"] = "euclidean",
    second_moment: Float[Tensor, "d d"] | None = None,
    probabilities: Float[Tensor, " n"] | None = None,
    lipschitz: float = 1.0,
    homogeneous: bool = True,
    stopped: bool = False,
) -> Certificate:
    """T6: bound the error of importance sampling, for every input and every output at once.

    Let φ be L-Lipschitz with φ(0) = 0, q_i = ‖a_i‖*/T and T = Σ‖a_i‖*. Draw m times with replacement, and add
    V_jk/(m q_k) to V'_jk for every draw k. With probability ≥ 1−δ, for all x and all j:

        |F'_j(x) − F_j(x)| ≤ ‖x‖ · L · T · (4 + √(2 ln(J/δ))) / √m.

    T is made of c_i = max_j |V_ji|, so this is one number for all outputs. It is not relative to an output: one with
    small weights may have less than the bound in all.

    "For all x" needs a positively homogeneous φ (ReLU, leaky ReLU, identity). For other φ (tanh, hardtanh, GELU …) the
    same holds for all ‖x‖ ≤ ρ with ρ in place of ‖x‖, for any ρ fixed beforehand (docs/theory.md, T6).

    draws: m. stopped: m was not fixed beforehand, but is the draw at which the last of k distinct channels appeared. δ
        is then spread over all m as δ/(m(m+1)), so that the bound also holds at that m.
    probabilities: (n,) the q of the sampling, if it is not the matching one. T becomes max_i ‖a_i‖*/q_i ≥ Σ‖a_i‖* (the
        proof uses T only through ‖a_i‖*/q_i ≤ T). The bound is infinite if a channel with a_i ≠ 0 has probability zero.
    metric: the norm of x. The default probabilities match it (see `importance`):
        "euclidean"  ‖x‖₂, importance c_i‖p_i‖.
        "lewis"      ‖diag(τ)^{-1/2} A x‖₂ ≤ ‖Ax‖₁, importance τ_i, T = r.
        "queries"    ‖Σ^{-1/2} x‖₂, importance c_i ‖Σ^{1/2} p_i‖, Σ = `second_moment` of the inputs (d, d).

    Source: symmetrisation, Ledoux–Talagrand contraction and McDiarmid. The proof is in docs/theory.md.
    """
    if not isinstance(draws, int) or draws < 1:
        raise InputError(f"draws must be a whole number ≥ 1, but it is {draws!r}.")
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, but it is {delta}.")
    size = importance(points, outgoing, metric=metric, second_moment=second_moment)
    matching = f"proportional to the {metric} importances"
    if probabilities is None:
        total = float(size.sum())
    else:
        matching = "as given"
        if probabilities.shape != size.shape:
            raise InputError(
                f"probabilities must have one entry per channel ({size.numel()}), not {tuple(probabilities.shape)}."
            )
        total = float(torch.where(size > 0, size / probabilities.to(size), 0.0).max())
    share = delta / (draws * (draws + 1)) if stopped else delta
    bound = lipschitz * total * (4 + math.sqrt(2 * math.log(outgoing.shape[0] / share))) / math.sqrt(draws)
    inputs = "every input" if homogeneous else "every input of norm at most ρ (ρ replaces ‖x‖)"
    norm = {"euclidean": "Euclidean", "lewis": "Lewis", "queries": "query"}[metric]
    slope = "1-Lipschitz" if lipschitz == 1 else f"{lipschitz:g}-Lipschitz"
    return Certificate(
        theorem="T6",
        kind="sampled",
        bound=bound,
        trivial=lipschitz * float(_response_norms(points, outgoing, metric, second_moment).max()),
        statement=f"|F'_j(x) − F_j(x)| ≤ bound · ‖x‖ ({norm} norm) for {inputs} and every output j",
        assumptions=(
            f"the activation is {slope} with φ(0) = 0" + (" and positively homogeneous" if homogeneous else ""),
            f"{draws} independent draws with probabilities {matching}",
        ),
        delta=delta,
    )


def importance(
    points: Float[Tensor, "n d"],
    outgoing: Float[Tensor, "J n"],
    *,
    metric: Literal["euclidean", "lewis", "queries"] = "euclidean",
    second_moment: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, " n"]:
    """The importances to sample by for T6: ‖a_i‖* = c_i‖p_i‖* in the dual of the metric, c_i = max_j |V_ji|, (n,)."""
    points, outgoing = _layer(points, outgoing)
    c = outgoing.abs().amax(dim=0)
    if metric == "euclidean":
        return c * points.norm(dim=1)
    if metric == "lewis":
        return lewis_weights(c[:, None] * points)
    if metric == "queries":
        if second_moment is None:
            raise InputError("metric 'queries' needs second_moment, the (d, d) mean of x xᵀ over the queries.")
        sigma = as_points(second_moment, "second_moment")
        if sigma.shape != (points.shape[1], points.shape[1]):
            raise InputError(f"second_moment must be {(points.shape[1],) * 2}, but it is {tuple(sigma.shape)}.")
        return c * (points @ sigma * points).sum(dim=1).clamp(min=0).sqrt()
    raise InputError(f"unknown metric {metric!r}; known: euclidean, lewis, queries.")


def merge(
    points: Float[Tensor, "n d"], kept: Int[Tensor, " k"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Assign every channel to the kept one that represents it best: (k(i), λ_i, ‖p_i − λ_i p_k(i)‖), each (n,).

    λ_i = max(0, ⟨p_i, p_k⟩/‖p_k‖²). k(i) is a row of `points`. Kept channels represent themselves, with λ = 1 and
    residual 0.
    """
    points = as_points(points)
    best, chosen = _nearest_rays(points, points[kept])
    residual = (points - chosen[:, None] * points[kept][best]).norm(dim=1)
    assignment = kept[best]
    assignment[kept], chosen[kept], residual[kept] = kept, 1.0, 0.0
    return assignment, chosen, residual


def _nearest_rays(points: Tensor, centres: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """For every point, the centre whose ray comes closest, and the factor λ ≥ 0 on that ray.

    dtype: of the search; that of the points by default.
    """
    # ‖p − λc‖² = ‖p‖² − λ²‖c‖² at the optimal λ ≥ 0: the best centre has the largest λ‖c‖ = ⟨p, c⟩/‖c‖.
    rays = centres / centres.norm(dim=1, keepdim=True).clamp(min=1e-300)
    dtype, size = dtype or points.dtype, points.abs().max().clamp(min=1e-300)
    best = ((points / size).to(dtype) @ rays.to(dtype).mT).argmax(dim=1)
    return best, _on_ray(points, centres[best])


def _on_ray(points: Tensor, rays: Tensor) -> Tensor:
    """The λ ≥ 0 with the smallest ‖p − λc‖, row by row."""
    return ((points * rays).sum(dim=1) / rays.square().sum(dim=1).clamp(min=1e-300)).clamp(min=0.0)


def merged_outgoing(
    points: Float[Tensor, "n d"], outgoing: Float[Tensor, "J n"], kept: Int[Tensor, " k"]
) -> Float[Tensor, "J k"]:
    """D_jk = V_jk + Σ_{i→k} λ_i V_ji: the outgoing weights that T8 measures against (Kim et al. 2020)."""
    points, outgoing = _layer(points, outgoing)
    assignment, factors, _ = merge(points, kept)
    onto = outgoing.new_zeros(outgoing.shape)
    onto.index_add_(1, assignment, outgoing * factors)
    return onto[:, kept]


def merge_bound(
    points: Float[Tensor, "n d"],
    outgoing: Float[Tensor, "J n"],
    coreset: Coreset | Int[Tensor, " k"],
    new_outgoing: Float[Tensor, "J k"] | None = None,
    *,
    new_points: Float[Tensor, "k d"] | None = None,
    bias_change: Float[Tensor, " J"] | None = None,
) -> Certificate:
    """T8: a deterministic bound for any kept set S and any new weights V'. φ is positively homogeneous and 1-Lipschitz.

    Assign each removed i to a kept k(i), with λ_i = max(0, ⟨p_i,p_k⟩/‖p_k‖²), and let D_jk = V_jk + Σ_{i→k} λ_i V_ji.
    For all x:

        |F'_j − F_j| ≤ ‖x‖ (Σ_{i∉S} |V_ji| ‖p_i−λ_i p_k(i)‖ + Σ_{k∈S} |V'_jk−D_jk| ‖p_k‖) + |b'_j−b_j|.

    Any assignment is allowed. Three are tried, and the smallest of their bounds counts for each output: kept channels
    with themselves and no others (λ = 0); the nearest kept rays, unless finding them takes too long; and for a coreset
    that merges, the merge's own targets and scales (with them, D = V' exactly). Where the rows of the kept channels are
    replaced by means, the means take the place of p_k, and kept channels are assigned like removed ones. x has 1
    appended, so ‖x‖ ≥ 1, and a bias change is added to the factor of ‖x‖.

    coreset: the kept channels. A `Coreset` has its own V'. new_outgoing: (J, k) V', in the order of the kept indices.
    new_points: (k, d) the new rows of the kept channels, where a repair has changed them. Like means, they take the
        place of p_k.
    bias_change: (J,) b' − b, if the biases have changed.

    Proof: |φ⟨p_i,x⟩ − λφ⟨p_k,x⟩| = |φ⟨p_i,x⟩ − φ⟨λp_k,x⟩| ≤ ‖x‖‖p_i−λp_k‖.
    """
    points, outgoing = _layer(points, outgoing)
    kept = (coreset.indices if isinstance(coreset, Coreset) else coreset).to(points.device)
    if new_outgoing is None:
        if not isinstance(coreset, Coreset):
            raise InputError("pass new_outgoing, the weights V' of the kept channels, or a Coreset that has its own.")
        new_outgoing = coreset.outgoing(outgoing)
    if kept.numel() == 0 or new_outgoing.shape != (outgoing.shape[0], kept.numel()):
        expected = (outgoing.shape[0], kept.numel())
        raise InputError(
            f"new_outgoing must be {expected} with at least one kept channel, not {tuple(new_outgoing.shape)}."
        )
    if int(kept.min()) < 0 or int(kept.max()) >= len(points):
        raise InputError(f"kept channels must lie in 0..{len(points) - 1}, but one is {int(kept.max())}.")
    centres = coreset.incoming(points) if isinstance(coreset, Coreset) else points[kept]
    if new_points is not None:
        if new_points.shape != centres.shape:
            raise InputError(f"new_points must be {tuple(centres.shape)}, not {tuple(new_points.shape)}.")
        centres = new_points.to(points)
    own, unchanged = torch.arange(len(kept), device=kept.device), bool((centres == points[kept]).all())
    place, scale = torch.zeros_like(points[:, 0], dtype=torch.int64), torch.zeros_like(points[:, 0])
    place[kept], scale[kept] = own, 1.0 if unchanged else _on_ray(points[kept], centres)
    assignments = [(place, scale)]
    if (work := points.numel() * len(centres)) <= _HUGE:
        place, scale = _nearest_rays(points, centres, torch.float32 if work > _LARGE else None)
        if unchanged:
            place[kept], scale[kept] = own, 1.0
        assignments.append((place, scale))
    if isinstance(coreset, Coreset) and coreset.merge is not None and bool((coreset.merge.scale >= 0).all()):
        target = coreset.merge.target.to(points.device)
        place = torch.searchsorted(kept, target.clamp(min=0)).clamp(max=len(kept) - 1)
        assignments.append((place, torch.where(target >= 0, coreset.merge.scale.to(points), 0.0)))
    new_outgoing = new_outgoing.to(outgoing)
    per_output = torch.stack([_assigned(points, outgoing, centres, new_outgoing, *a) for a in assignments]).amin(dim=0)
    if bias_change is not None:
        per_output = per_output + bias_change.to(per_output).abs()
    return Certificate(
        theorem="T8",
        kind="proved",
        bound=float(per_output.max()),
        trivial=float(_response_norms(points, outgoing, "euclidean", None).max()),
        statement="|F'_j(x) − F_j(x)| ≤ bound · ‖x‖₂ for every input x (1 appended) and every output j",
        assumptions=("the activation is positively homogeneous and 1-Lipschitz (ReLU, leaky ReLU, identity)",),
    )


def _assigned(
    points: Tensor, outgoing: Tensor, centres: Tensor, new_outgoing: Tensor, place: Tensor, scale: Tensor
) -> Tensor:
    """T8 per output, (J,), when channel i is represented by scale_i times the centre `place_i`."""
    residual = (points - scale[:, None] * centres[place]).norm(dim=1)
    onto = new_outgoing.new_zeros(new_outgoing.shape).index_add_(1, place, outgoing * scale)
    return outgoing.abs() @ residual + (new_outgoing - onto).abs() @ centres.norm(dim=1)


@dataclass(frozen=True)
class RelativeLimit:
    """T7 for one layer: whether a coreset smaller than n can have a relative error below 1 for all inputs x in R^d.

    n, rank: the number of non-zero channels, and the dimension r of their span. independent: n ≤ r. Then every relative
    sensitivity over all x is 1, and no method can find such a coreset. Over fewer inputs (x ≥ 0 behind a ReLU, or those
    that end in 1) the one-sided sensitivities may be smaller: see `cone_sensitivities` (T4″). ratio: n/r. For random
    weights and one-sided sensitivities over all x, the threshold is about 2.
    """

    n: int
    rank: int

    @property
    def independent(self) -> bool:
        """Whether the non-zero points are linearly independent."""
        return self.n <= self.rank

    @property
    def ratio(self) -> float:
        """n/r."""
        return self.n / max(self.rank, 1)


def relative_limit(points: Float[Tensor, "n d"]) -> RelativeLimit:
    """T7 (limits): if the p_i are linearly independent, all relative sensitivities over all x in R^d are 1.

    Proof: there is an x in R^d with ⟨p_i, x⟩ = 1 and ⟨p_k, x⟩ = 0 for all other k. Every coreset without i answers 0
    there.
    """
    points = as_points(points)
    nonzero = points[points.abs().amax(dim=1) > 0]
    return RelativeLimit(nonzero.shape[0], span(nonzero).rank if nonzero.shape[0] else 0)


def _response_norms(points: Tensor, outgoing: Tensor, metric: str, second_moment: Tensor | None) -> Tensor:
    """Σ_i |V_ji| ‖p_i‖*: the largest |F_j(x) − b_j| / ‖x‖ that the triangle inequality allows. Shape (J,)."""
    points, outgoing = _layer(points, outgoing)
    c = outgoing.abs().amax(dim=0)
    scaled = importance(points, outgoing, metric=metric, second_moment=second_moment)  # type: ignore[arg-type]
    return outgoing.abs() @ torch.where(c > 0, scaled / c.clamp(min=1e-300), 0.0)


def _layer(points: Tensor, outgoing: Tensor) -> tuple[Tensor, Tensor]:
    points, outgoing = as_points(points), as_points(outgoing, "outgoing")
    if outgoing.shape[1] != points.shape[0]:
        raise InputError(
            f"outgoing must have one column per point ({points.shape[0]}), but its shape is {tuple(outgoing.shape)}."
        )
    return points, outgoing
