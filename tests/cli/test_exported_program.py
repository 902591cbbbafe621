"""A .pt2 file as SOURCE: torch.export fixes the number of samples unless it is told otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cli_tools import samples
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own


def exported(place, count: int) -> None:
    import net_for_cli

    program = torch.export.export(net_for_cli.net().eval(), (torch.zeros(count, 8),))
    torch.export.save(program, place / "net.pt2")


def test_a_program_of_one_sample_goes_through_distillation_agreement_and_certify(place, run):
    """Each of them ran blocks of samples, and ended in a traceback."""
    exported(place, 1)
    np.savez("many.npz", samples(300))
    done = run("prune", "net.pt2", "--queries", "many.npz", "--distill", "2", "--no-latency", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert "agree" in done.stdout
    for more in ("samples.npz", "white-noise"):
        done = run("certify", "small", "--samples", more, "--n", "40")
        assert done.exit_code == 0, done.stderr
        assert "the same answer for" in done.stdout


def test_a_program_of_one_sample_with_made_queries(place, run):
    sequence = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    torch.export.save(torch.export.export(sequence, (torch.zeros(1, 2, 8),)), place / "net.pt2")
    done = run("prune", "net.pt2", "--no-latency", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert "agree" in done.stdout


def test_a_program_of_several_samples_says_how_to_export_it(place, run):
    exported(place, 4)
    done = run("prune", "net.pt2", "--queries", "samples.npz", "--out", "small")
    assert done.exit_code == 2
    assert "export it again with a dynamic batch dimension (torch.export.export(..., dynamic_shapes" in done.stderr
