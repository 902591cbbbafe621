"""Faults in bounds on losses, in tests along a path, in the budgets that use them, and in bounds over a cone."""

from __future__ import annotations

from mutants.mutant import Mutant

BOUNDS = ("risk/test_risk_bounds.py",)
PATH = ("risk/test_risk_path.py",)
BUDGETS = ("pruning/test_risk_budgets.py",)
CONE = ("coreset/test_cone.py",)

MUTANTS = (
    Mutant(
        "t18-one-loss-too-few",
        "risk/bounds.py",
        "upper_quantile(k + 1, n - k, delta)",
        "upper_quantile(max(k, 1), n - k + 1, delta)",
        BOUNDS,
        "the bound counts one loss less than there were",
    ),
    Mutant(
        "t18-both-ends-at-delta",
        "risk/bounds.py",
        "lower_bound(losses, delta / 2), upper_bound(losses, delta / 2)",
        "lower_bound(losses, delta), upper_bound(losses, delta)",
        BOUNDS,
        "an interval that fails twice as often as it says",
    ),
    Mutant(
        "t18-best-bet-afterwards",
        "risk/bounds.py",
        "return float(torch.logsumexp(logs, dim=0)) - math.log(len(_BETS))",
        "return float(logs.max())",
        BOUNDS,
        "the best of all bets is taken when the samples are known",
    ),
    Mutant(
        "t18-kind-by-the-values",
        "risk/bounds.py",
        "if losses.dtype is torch.bool:\n        k = int",
        "if bool(((x == 0) | (x == 1)).all()):\n        k = int",
        BOUNDS,
        "losses between 0 and 1 get the bound of those that are 0 or 1, if they happen to be",
    ),
    Mutant(
        "t19-goes-on-after-a-failure",
        "risk/path.py",
        "        if not steps[-1].passed:\n            break\n",
        "",
        PATH,
        "models behind one that failed are tested, too",
    ),
    Mutant(
        "t19-by-the-mean",
        "risk/path.py",
        "bound, bound <= level))",
        "bound, float(losses.double().mean()) <= level))",
        PATH,
        "a model passes by its mean loss",
    ),
    Mutant(
        "t19-all-samples-for-pruning",
        "pruning/controlled.py",
        "replace(asked, spec=own, n=None)",
        "replace(asked, spec=given, n=None)",
        BUDGETS,
        "pruning uses the samples of the test",
    ),
    Mutant(
        "t19-returns-the-one-that-failed",
        "pruning/controlled.py",
        "chosen = last[-1] if path.steps[-1].passed else last[-2]",
        "chosen = last[-1]",
        BUDGETS,
        "the next smaller model is returned",
    ),
    Mutant(
        "t19-labels-of-other-samples",
        "queries/queries.py",
        "return replace(chosen, labels=labels)",
        "return replace(chosen, labels=None if labels is None else labels.flip(0))",
        BUDGETS,
        "labels and samples come apart",
    ),
    Mutant(
        "t19-few-samples-are-not-refused",
        "pruning/controlled.py",
        "    if best > level:\n",
        "    if best > 1:\n",
        BUDGETS,
        "hours of work before it shows that the samples cannot show the level",
    ),
    Mutant(
        "t19-optimised-together",
        "pruning/controlled.py",
        "        if few.jointly:\n",
        "        if False:\n",
        BUDGETS,
        "inputs that are no independent draws count as such",
    ),
    Mutant(
        "paired-loss-the-wrong-way",
        "pruning/reporting/certify.py",
        "(1 + alone(y, labels).double() - alone(x, labels).double()) / 2",
        "(1 + alone(x, labels).double() - alone(y, labels).double()) / 2",
        BUDGETS,
        "an increase is reported as a decrease",
    ),
    Mutant(
        "t4-cone-rows-of-one-direction-each-get-all",
        "coreset/cone.py",
        "out[live] = bounds[member] * lengths / total[member]",
        "out[live] = bounds[member] * lengths / total[member] * 0.5",
        CONE,
        "sensitivities that are too small",
    ),
    Mutant(
        "t4-cone-every-coordinate-is-nonnegative",
        "coreset/cone.py",
        "null = _null_space(directions[:, ~mask])\n    cone = directions[:, mask]",
        "null = None\n    cone = directions",
        CONE,
        "bounds over a cone that is smaller than the layer's inputs",
    ),
)
