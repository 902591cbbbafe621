"""Ways to run a model: each gives what the model gives. How long they take is not tested."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune import _onnx, _runtimes
from coreprune._runtimes import check_runtime, runner, versions_of
from coreprune.errors import InputError, ModelError
from coreprune.graph import capture, find_groups
from coreprune.pruning.timing.calls import calls_of
from coreprune.pruning.timing.pieces import prepared


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3))) * scale


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", pytest.param("compile", marks=needs_compiler), "onnx"])
def test_every_runtime_gives_what_the_model_gives(runtime):
    """Several widths in one process: torch.compile gives up on a function with too many variants."""
    for width in (5, 6):
        model = Net(width).eval()
        x, scale = torch.randn(2, 3, 6, 6), torch.tensor(2.0)
        found = runner(runtime, model, ((x,), {"scale": scale}))()
        found = torch.as_tensor(found[0]) if runtime == "onnx" else found
        assert torch.allclose(found, model(x, scale=scale), atol=1e-5)
        assert not found.requires_grad


@pytest.mark.slow
def test_operations_run_alone_in_onnx_runtime():
    """One export for all of them, whose branches must not be mixed up."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    captured = capture(model, (torch.zeros(1, 3, 6, 6),))
    groups = find_groups(captured)
    calls = calls_of(captured, groups, "onnx", {})
    cells = [
        (c, {e: e.at(dict.fromkeys((g.name for g in groups), n)) for e in c.varying}) for c in calls for n in (2, 4)
    ]
    cpu = torch.device("cpu")
    for count in (1, len(cells)):
        found = [run()[0] for run in prepared(cells[:count], cpu, "onnx")]
        wanted = [run() for run in prepared(cells[:count], cpu, "eager")]
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(torch.as_tensor(a), b, atol=1e-4)


def test_what_a_runtime_needs_is_said_before_anything_is_measured(monkeypatch):
    cpu = torch.device("cpu")
    check_runtime("eager", torch.device("meta"))
    with pytest.raises(InputError, match="timed on the CPU, but the model is on meta"):
        check_runtime("onnx", torch.device("meta"))
    monkeypatch.setattr(_onnx, "missing", lambda: ["onnxruntime"])
    with pytest.raises(
        InputError, match=r"needs onnxruntime, which cannot be found here.*pip install 'coreprune\[onnx\]'"
    ):
        check_runtime("onnx", cpu)
    assert versions_of("eager").keys() == {"torch"}
    assert versions_of("onnx").keys() == {"torch", "onnxruntime"}


def test_a_model_that_a_runtime_refuses_is_said_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_runtimes.torch, "compile", refuse)
    with pytest.raises(ModelError, match=r"Linear does not run with runtime='compile'.*no compiler.*runtime='eager'"):
        runner("compile", nn.Linear(3, 2), ((torch.zeros(1, 3),), {}))
