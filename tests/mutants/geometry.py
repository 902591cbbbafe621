"""Faults in geometry/."""

from __future__ import annotations

from mutants.mutant import Mutant

ELLIPSOID = ("geometry/test_ellipsoid.py",)
SOLVERS = ("geometry/test_solvers.py", "geometry/test_ellipsoid.py")
CARATHEODORY = ("geometry/test_convex_combination.py",)
RECOMBINATION = ("geometry/test_recombination.py",)
KMEANS = ("geometry/test_clustering.py",)

MUTANTS = (
    Mutant(
        "gap-without-rounding-of-the-moment",
        "geometry/ellipsoid.py",
        "gap = max(0.0, worst / ((rank + lift) * (1 - error)) - 1)",
        "gap = max(0.0, worst / (rank + lift) - 1)",
        ELLIPSOID,
        "the gap trusts the whitening instead of bounding its error",
    ),
    Mutant(
        "gap-of-a-general-cloud-without-the-lift",
        "geometry/ellipsoid.py",
        "worst = (float(distances.max()) ** 0.5 + slip) ** 2 + lift",
        "worst = (float(distances.max()) ** 0.5 + slip) ** 2",
        ELLIPSOID,
        "the certified gap of a general ellipsoid is too small by 1/(r+1)",
    ),
    Mutant(
        "radius-of-a-general-cloud-as-if-symmetric",
        "geometry/ellipsoid.py",
        "radius_squared=(1 + gap) * rank if symmetric else rank + gap * (rank + 1),",
        "radius_squared=(1 + gap) * rank,",
        ELLIPSOID,
        "the radius of a general ellipsoid leaves points outside",
    ),
    Mutant(
        "ellipsoid-not-centred",
        "geometry/ellipsoid.py",
        "    center = origin + shift\n",
        "    center = origin + 0.999 * shift\n",
        ELLIPSOID,
        "the centre that is reported is not the one that the shape belongs to",
    ),
    Mutant(
        "not-converged-is-not-said",
        "geometry/ellipsoid.py",
        "    return Status(False, text + advice)\n",
        "    return Status(True, text + advice)\n",
        ELLIPSOID,
        "a solver that ran out of iterations says that it converged",
    ),
    Mutant(
        "working-set-trusts-its-guess",
        "geometry/_solvers/working_set.py",
        "        if not bool(missed.any()):\n            break\n",
        "        break\n",
        SOLVERS,
        "points outside the working set that violate the bound do not come back",
    ),
    Mutant(
        "away-steps-go-too-far",
        "geometry/_solvers/wolfe_atwood.py",
        "step = -min((1 - low / r) / (low - 1), most) if low > 1 else -most",
        "step = -(1 - low / r) / (low - 1) if low > 1 else -most",
        SOLVERS,
        "an away step makes a weight negative",
    ),
    Mutant(
        "support-threshold-too-high",
        "geometry/_solvers/working_set.py",
        "return 1 + e / 2 - (e * (4 + e - 4 / r)) ** 0.5 / 2",
        "return 1 + e / 2 - (e * (e - e / r)) ** 0.5 / 2",
        SOLVERS,
        "screening drops points that are in the optimal support",
    ),
    Mutant(
        "interior-point-keeps-the-last-iterate",
        "geometry/_solvers/interior_point.py",
        "best = Solution(w / total, omega * total, gap, iteration + 1)",
        "best = Solution(w, omega, gap, iteration + 1)",
        SOLVERS,
        "the weights of the interior point do not sum to one",
    ),
    Mutant(
        "lewis-weights-of-the-wrong-power",
        "geometry/lewis.py",
        "new = (leverage * t.pow(2 / p - 1)).pow(p / 2)",
        "new = (leverage * t.pow(2 / p - 1)).pow(p / 3)",
        ("geometry/test_lewis.py",),
        "the iteration has another fixed point",
    ),
    Mutant(
        "rank-cut-per-row-count-only",
        "geometry/subspace.py",
        "    keep = s > max(a.shape) * 2.0**-52 * s[0]\n",
        "    keep = s > 0 * s[0]\n",
        ("geometry/test_subspace.py", "geometry/test_ellipsoid.py"),
        "directions that are rounding count as dimensions",
    ),
    Mutant(
        "caratheodory-outside-the-hull",
        "geometry/convex_combination.py",
        "        if not miss <= tol:\n",
        "        if False:\n",
        CARATHEODORY,
        "a target outside the hull gets the nearest combination as if it were one of it",
    ),
    Mutant(
        "caratheodory-signs-lost",
        "geometry/convex_combination.py",
        "found.append(_merge(columns[used], w[used] * signs[used], float(miss), device))",
        "found.append(_merge(columns[used], w[used], float(miss), device))",
        CARATHEODORY,
        "symmetric combinations lose the signs of their weights",
    ),
    Mutant(
        "recombination-lets-new-points-in",
        "geometry/recombination.py",
        "    null = null[rows] if alive.all() else _restricted(null, alive)\n",
        "    null = null[rows]\n",
        RECOMBINATION,
        "null vectors of all points are cut to the used ones, where they are none",
    ),
    Mutant(
        "recombination-unchecked-sum",
        "geometry/recombination.py",
        "        if z.sum() > 0:\n            z = -z\n",
        "",
        RECOMBINATION,
        "Σ|w| may grow",
    ),
    Mutant(
        "k-means-donor-runs-empty",
        "geometry/clustering.py",
        "at = int(torch.where(count[labels] > 1, nearest, -1.0).argmax())",
        "at = int(nearest.argmax())",
        KMEANS,
        "an empty cluster takes the only point of another",
    ),
    Mutant(
        "k-means-donor-not-counted",
        "geometry/clustering.py",
        "        count[labels[at]] -= 1\n",
        "",
        KMEANS,
        "a cluster of two gives both away",
    ),
    Mutant(
        "k-means-takes-the-worst-start",
        "geometry/clustering.py",
        "labels, _ = min(runs, key=lambda run: run[1])",
        "labels, _ = max(runs, key=lambda run: run[1])",
        KMEANS,
        "of several starts the worst is kept",
    ),
)
