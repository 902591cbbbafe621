"""Faults in graph/: which channels leave together, what they cost, and the surgery."""

from __future__ import annotations

from mutants.mutant import Mutant

SURGERY = ("graph/test_surgery.py",)
COSTS = ("graph/test_costs.py",)
GROUPING = ("graph/test_grouping.py",)

MUTANTS = (
    Mutant(
        "wrong-outputs-are-not-seen",
        "graph/verify.py",
        '    exact = not any("norm-statistics" in g.flags for g, _ in chosen)\n',
        "    exact = False\n",
        ("graph/test_surgery.py::test_a_boundary_that_moves_silently_is_caught",),
        "the pruned model is run, and its outputs are not compared",
    ),
    Mutant(
        "wide-tolerance",
        "graph/verify.py",
        "TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}",
        "TOLERANCE = {torch.float64: 1e7, torch.float32: 2e-3}",
        ("graph/test_surgery.py::test_a_boundary_that_moves_silently_is_caught",),
        "any difference of outputs is called rounding",
    ),
    Mutant(
        "groups-at-fault-take-others-along",
        "graph/surgery.py",
        "        good = grow(good, names[:half])\n        return grow(good, names[half:])\n",
        "        return grow(good, names[:half])\n",
        SURGERY,
        "the bisection gives up half of the groups",
    ),
    Mutant(
        "failure-half-way-is-not-undone",
        "graph/surgery.py",
        "        for target, a, b in reversed(undo):\n",
        "        for target, a, b in undo[:0]:\n",
        SURGERY,
        "an in-place removal that fails leaves a half-cut model",
    ),
    Mutant(
        "requires-grad-is-lost",
        "graph/surgery.py",
        "nn.Parameter(new, old.requires_grad)",
        "nn.Parameter(new)",
        SURGERY,
        "frozen parameters thaw",
    ),
    Mutant(
        "views-keep-the-old-memory",
        "graph/surgery.py",
        "    return out.clone() if out.data_ptr() == tensor.data_ptr() else out\n",
        "    return out\n",
        SURGERY,
        "a tensor that lost nothing shares its memory with the original",
        equivalent="index_select copies, and where no axis is cut the result is only read",
    ),
    Mutant(
        "heads-keep-their-number",
        "graph/attributes.py",
        "            new = value // total * kept\n",
        "            new = value\n",
        SURGERY,
        "num_heads stays what it was",
    ),
    Mutant(
        "depthwise-groups-are-forgotten",
        "graph/attributes.py",
        "        module.groups = n // multiplier\n",
        "        module.groups = module.groups\n",
        SURGERY,
        "a depthwise convolution keeps its number of groups",
    ),
    Mutant(
        "unequal-sections-are-legal",
        "graph/groups.py",
        "            if int(counts.min()) != int(counts.max()) or not int(counts.min()):\n",
        "            if False:\n",
        SURGERY,
        "a choice that leaves sections of different sizes is taken",
    ),
    Mutant(
        "norm-statistics-are-free",
        "graph/resolve.py",
        "            else:\n                locks.append((_real(s.ids), s.reason))\n",
        "",
        SURGERY,
        "channels that a norm averages over leave without being asked for",
    ),
    Mutant(
        "fixed-sizes-do-not-lock",
        "graph/resolve.py",
        "        if not _decided_without(ids, along, leaving):\n            locks.append((_real(ids), reason))\n",
        "        pass\n",
        GROUPING,
        "channels that meet a tensor of a fixed size leave; only the comparison of outputs puts them back",
    ),
    Mutant(
        "biases-are-not-made",
        "graph/rules/compute.py",
        "    for ids in bias.maps:\n        call.tracer.play(bias, ids, role)\n",
        "",
        GROUPING,
        "a bias goes along with the channels and is no part of the rows that make them: no theorem applies then",
    ),
    Mutant(
        "attention-heads-one-by-one",
        "graph/rules/compute.py",
        "scores = product(call, q, move(k, lambda ids: ids.transpose(-1, -2)), whole=True)",
        "scores = product(call, q, move(k, lambda ids: ids.transpose(-1, -2)))",
        GROUPING,
        "channels leave a head, and its scale is another one then",
    ),
    Mutant(
        "a-step-over-channels-is-followed",
        "graph/rules/movement.py",
        '            call.tracer.lock(ids, f"{call.name} with a fixed step along the channels ({call.node.name})")\n',
        "            pass\n",
        GROUPING,
        "every second channel: other ones after some have left",
    ),
    Mutant(
        "macs-of-a-grouped-convolution",
        "graph/rules/compute.py",
        "(ids_out.reshape(1, -1), ids_in.reshape(-1, 1)), groups, made=0))",
        "(ids_out.reshape(1, -1), ids_in.reshape(-1, 1)), made=0))",
        COSTS,
        "a grouped convolution costs as much as one without groups",
    ),
    Mutant(
        "kernels-cost-nothing",
        "graph/rules/compute.py",
        "sources=call.node.args[:2], factor=kernel * spatial",
        "sources=call.node.args[:2], factor=spatial",
        COSTS,
        "MACs without the size of the kernel",
    ),
    Mutant(
        "buffers-count-as-parameters",
        "graph/costs.py",
        "            if name in captured.parameters:\n",
        "            if True:\n",
        COSTS,
        "running means are called parameters",
    ),
)
