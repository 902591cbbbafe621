"""An interior point method for many small linear programs at once: those of `cone.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Float, Tensor

_GAP = 1e-3  # relative distance of a bound from the optimum at which its program is done
_ITERATIONS = 60  # 15 to 20 are usual
_ROUNDING = 1e-12  # by which a constraint may be missed, in lengths of a_i
_TO_THE_BOUNDARY = 0.99
_JITTER = 1e-14


@dataclass(frozen=True, eq=False)
class Programs:
    """min s over (y, s) with v = own + N y, one program for each row of `own`; written as G z ≥ h with z = (y, s):

    v_k + κ s ρ_k ≥ 0,  s ρ_k − v_k ≥ 0,  and (Bᵀ N) y ≥ 0, which is Bᵀ v ≥ Bᵀ own.

    own: ±e_i. ratio: ρ > 0. null: N; None stands for the identity. sees: Nᵀ B. two_sided: κ = 1 instead of 0.
    """

    own: Float[Tensor, "b n"]
    ratio: Float[Tensor, "b n"]
    null: Float[Tensor, "n m"] | None
    sees: Float[Tensor, "m c"]
    two_sided: bool

    @property
    def h(self) -> Float[Tensor, "b k"]:
        """The right side."""
        return torch.cat([-self.own, self.own, self.own.new_zeros(len(self.own), self.sees.shape[1])], dim=1)

    def moved(self, y: Float[Tensor, "b m"]) -> Float[Tensor, "b n"]:
        """N y."""
        return y if self.null is None else y @ self.null.mT

    def apply(self, z: Float[Tensor, "b m1"]) -> Float[Tensor, "b k"]:
        """G z."""
        y, s = z[:, :-1], z[:, -1:] * self.ratio
        v = self.moved(y)
        return torch.cat([v + s if self.two_sided else v, s - v, y @ self.sees], dim=1)

    def transposed(self, dual: Float[Tensor, "b k"]) -> Float[Tensor, "b m1"]:
        """Gᵀ times a vector."""
        low, high, cone = self._parts(dual)
        v = low - high if self.null is None else (low - high) @ self.null
        s = (high + low if self.two_sided else high) * self.ratio
        return torch.cat([v + cone @ self.sees.mT, s.sum(dim=1, keepdim=True)], dim=1)

    def normal(self, weight: Float[Tensor, "b k"]) -> Float[Tensor, "b m1 m1"]:
        """Gᵀ diag(weight) G."""
        low, high, cone = self._parts(weight)
        m = len(self.sees)
        out = weight.new_zeros(len(weight), m + 1, m + 1)
        out[:, :-1, :-1] = (self.sees * cone[:, None]) @ self.sees.mT
        box, cross, last = low + high, -high, high
        if self.two_sided:
            cross, last = cross + low, last + low
        cross = cross * self.ratio
        if self.null is None:
            out[:, :-1, :-1].diagonal(dim1=1, dim2=2).add_(box)
        else:
            out[:, :-1, :-1] += (self.null.mT * box[:, None]) @ self.null
            cross = cross @ self.null
        out[:, -1, :-1] = out[:, :-1, -1] = cross
        out[:, -1, -1] = (last * self.ratio.square()).sum(dim=1)
        return out

    def _parts(self, rows: Float[Tensor, "b k"]) -> tuple[Tensor, Tensor, Tensor]:
        n = self.own.shape[1]
        return rows[:, :n], rows[:, n : 2 * n], rows[:, 2 * n :]

    def proved(self, z: Float[Tensor, "b m1"]) -> Float[Tensor, " b"]:
        """The bound that v proves: max |v_k|/ρ_k where the constraints hold up to rounding, and otherwise 1."""
        v = self.own + self.moved(z[:, :-1])
        holds = (z[:, :-1] @ self.sees >= -_ROUNDING).all(dim=1)
        if not self.two_sided:
            holds &= (v >= -_ROUNDING).all(dim=1)
        s = (v.abs() / self.ratio).amax(dim=1)
        return torch.where(holds & torch.isfinite(s), s, 1.0).clamp(max=1.0)


def least(programs: Programs) -> Float[Tensor, " b"]:
    """For each program a value that some feasible v proves, within 0.1 % of the least where such a v is found.

    Mehrotra's predictor and corrector (SIAM J. Optim. 1992) from an infeasible start. v = own gives 1.
    """
    h = programs.h
    z = h.new_zeros(len(h), len(programs.sees) + 1)
    z[:, -1] = 2.0
    goal = torch.zeros_like(z)
    goal[:, -1] = 1.0
    slack = (programs.apply(z) - h).clamp(min=0.1)
    dual = torch.full_like(slack, 1.0 / slack.shape[1])
    best = torch.ones_like(z[:, 0])
    for _ in range(_ITERATIONS):
        dz, dslack, ddual = _direction(programs, z, slack, dual, goal)
        z = z + _reach(slack, dslack) * dz
        slack, dual = slack + _reach(slack, dslack) * dslack, dual + _reach(dual, ddual) * ddual
        best = torch.minimum(best, programs.proved(z))
        off = (goal - programs.transposed(dual)).abs().amax(dim=1)
        below = torch.where(off <= _GAP, (h * dual).sum(dim=1), 0.0)  # no v has less, where the dual is feasible
        if bool((best - below <= _GAP * best).all()):
            break
    return best


def _direction(
    programs: Programs, z: Tensor, slack: Tensor, dual: Tensor, goal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of z, of the slack G z − h and of the dual variables; zero where a program cannot be solved further."""
    weight = dual / slack
    primal_gap, dual_gap = programs.apply(z) - slack - programs.h, goal - programs.transposed(dual)
    matrix = programs.normal(weight)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(_JITTER * diagonal.amax(dim=1, keepdim=True))
    factor, failed = torch.linalg.cholesky_ex(matrix)

    def step(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Newton's step towards slack · dual = slack · dual + product."""
        right = programs.transposed(product / slack - weight * primal_gap) - dual_gap
        dz = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        dslack = programs.apply(dz) + primal_gap
        return dz, dslack, product / slack - weight * dslack

    mu = (slack * dual).mean(dim=1, keepdim=True)
    _, dslack, ddual = step(-slack * dual)
    ahead = (slack + _reach(slack, dslack) * dslack) * (dual + _reach(dual, ddual) * ddual)
    sigma = (ahead.mean(dim=1, keepdim=True) / mu).pow(3).clamp(1e-6, 1.0)
    dz, dslack, ddual = step(sigma * mu - slack * dual - dslack * ddual)
    ok = (failed == 0)[:, None] & torch.isfinite(dz).all(dim=1, keepdim=True)
    return torch.where(ok, dz, 0.0), torch.where(ok, dslack, 0.0), torch.where(ok, ddual, 0.0)


def _reach(x: Float[Tensor, "b k"], dx: Float[Tensor, "b k"]) -> Float[Tensor, "b one"]:
    """The largest step of at most 1 that stays inside x + step · dx > 0."""
    return _TO_THE_BOUNDARY * torch.where(dx < 0, -x / dx, 1.0).amin(dim=1, keepdim=True).clamp(max=1.0)
