"""prune(depth=True): whole blocks leave where that is better than narrower layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from artifact.hf_cases import GQA, IDS, equal, hf
from coreprune import Budget, BudgetError, InputError, Plan, apply_plan, load, make_plan, prune, save
from coreprune.graph import Traced, capture, elements, find_groups, shallow
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.calibration.element_losses import ElementLosses
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.reporting.comparison import apart

SAMPLES = torch.randn(256, 6, generator=torch.Generator().manual_seed(3))
EXAMPLE = SAMPLES[:1]


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, 24), act, nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Four blocks, of which the second and the third do little."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, weak: float = 0.002) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inp, self.blocks = nn.Linear(6, 12), nn.ModuleList(Block(act()) for _ in range(4))
            self.out = nn.Linear(12, 5)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(1.5)
            for block in self.blocks[1:3]:
                for p in block.down.parameters():
                    p.mul_(weak)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def pruned(model: nn.Module | None = None, share: float = 0.53, **more: Any) -> Any:
    asked = {"queries": SAMPLES, "depth": True, **more}
    return prune(model or Net(), EXAMPLE, Budget(params=share), **asked)


def test_blocks_that_do_little_leave(tmp_path: Path) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    result = pruned(model)
    assert result.plan.dropped == result.report.dropped == ("blocks.1", "blocks.2")
    assert len(result.model.blocks) == 2
    assert len(model.blocks) == 4
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    left = sum(p.numel() for p in result.model.parameters())
    assert result.report.parameters == (sum(p.numel() for p in model.parameters()), left)
    assert left <= 0.53 * result.report.parameters[0]
    assert "2 of 4 blocks: blocks.1, blocks.2" in str(result.report)
    assert "inside of blocks.1, which was dropped" in result.report.locked["blocks.1.up"]
    assert "depth=True" in result.report.settings.call()
    errors = {one.name: one.error for one in result.report.compared}
    assert errors["the repaired cut"] < 0.8 * errors["the cut without repair"]  # the other blocks make up for those
    assert errors["the repaired cut"] < 0.5 * errors["the cut with all blocks"]
    save(result, tmp_path / "small")
    again = load(tmp_path / "small", Net)
    assert torch.equal(again(SAMPLES), result.model.eval()(SAMPLES))
    assert torch.equal(load(tmp_path / "small", model)(SAMPLES), again(SAMPLES))
    with pytest.raises(InputError, match="not the one that was pruned"):
        load(tmp_path / "small", lambda: nn.Sequential(nn.Linear(6, 5)))


def test_without_repair_the_result_is_the_original_with_identities_and_masks() -> None:
    model = Net().double()
    narrow = make_plan(model, EXAMPLE.double(), Budget(keep=0.75), "magnitude", queries=None, exclude="inp")
    left = {name: entry for name, entry in narrow.groups.items() if name in ("blocks.0.up", "blocks.3.up")}
    plan = replace(narrow, groups=left, dropped=("blocks.1", "blocks.2"))
    small = apply_plan(model, Plan.from_json(plan.to_json()))
    for name in plan.dropped:
        model.get_submodule(name).register_forward_hook(lambda _, args, out: args[0])
    cut = {name: entry for name, entry in plan.groups.items() if len(entry.kept) < entry.size}
    assert cut
    for name, entry in cut.items():
        gone = torch.ones(entry.size, dtype=torch.bool)
        gone[list(entry.kept)] = False
        model.get_submodule(name.replace(".up", ".down")).weight.data[:, gone] = 0
    torch.testing.assert_close(small(SAMPLES.double()), model(SAMPLES.double()), rtol=0, atol=1e-9)


def test_the_loss_of_a_block_is_the_error_without_it_where_the_model_is_linear() -> None:
    model = Net(nn.Identity, weak=0.5)
    captured = capture(model, (EXAMPLE,))
    traced = Traced(model, captured, find_groups(captured))
    calibration = gather(traced, Asked(EXAMPLE, SAMPLES), 0, lambda *_: None)
    losses = ElementLosses(elements(calibration.captured, model)[0].values())
    list(collect_readers(traced, calibration, Collect(), torch.Generator().manual_seed(0), lambda *_: None, losses))
    assert len(losses.found()) == 4
    for name, loss in losses.found().items():
        measured = apart(model, shallow(model, [name]), calibration.queries)
        assert measured is not None
        # A random projection of every query has a relative deviation of √2; there are 192 queries.
        assert loss == pytest.approx(measured.error, rel=0.35)


def test_a_plan_says_which_blocks_leave() -> None:
    plan = make_plan(Net(), EXAMPLE, Budget(params=0.53), queries=SAMPLES, depth=True)
    assert plan.dropped == ("blocks.1", "blocks.2")
    assert not any(name.startswith(plan.dropped) for name in plan.groups)
    assert Plan.from_json(plan.to_json()) == plan
    assert len(apply_plan(Net(), plan, queries=SAMPLES).blocks) == 2


def test_narrower_layers_are_taken_where_every_block_does_something() -> None:
    result = pruned(Net(weak=1.0), 0.9)
    assert result.plan.dropped == ()
    assert any("No block was left out whole" in note for note in result.report.notes)


def test_a_part_of_a_model(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = Net(), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.net(x))

    result = pruned(Around(), part="net", compare=False)
    assert result.plan.dropped == ("blocks.1", "blocks.2")
    assert result.recipe.dropped == ("net.blocks.1", "net.blocks.2")
    assert len(result.model.net.blocks) == 2
    save(result, tmp_path / "small")
    assert torch.equal(load(tmp_path / "small", Around)(SAMPLES), result.model.eval()(SAMPLES))


def test_half_precision_and_distillation() -> None:
    result = prune(
        Net().bfloat16(), EXAMPLE.bfloat16(), Budget(params=0.53), queries=SAMPLES.bfloat16(), depth=True, distill=2
    )
    assert len(result.model.blocks) == 2
    assert result.model(EXAMPLE.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"depth": 1}, "depth must be True or False, not 1"),
        ({"budget": Budget(keep=0.5)}, "budget of macs, params or bytes, not of keep"),
        ({"budget": Budget(error=0.1)}, "not of error"),
        ({"queries": None}, "goes by what the queries show"),
        ({"inplace": True}, "Leave inplace out"),
    ],
)
def test_what_does_not_go_with_depth(more: dict[str, Any], words: str, unchecked: None) -> None:
    asked: dict[str, Any] = {"budget": Budget(params=0.5), "queries": SAMPLES, "depth": True, **more}
    with pytest.raises(InputError, match=words):
        prune(Net(), EXAMPLE, **asked)


def test_a_budget_that_no_number_of_blocks_meets() -> None:
    with pytest.raises(BudgetError, match=r"params=0.002 cannot be met: without 3 blocks .* of the dense model's 2,"):
        pruned(share=0.002)


def test_a_model_without_blocks_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    result = pruned(model, 0.7, compare=False)
    assert result.plan.dropped == ()
    assert "depth=True changes nothing: no element of a list of modules is a block" in caplog.text
    assert any("0: no skip connection leads around it" in note for note in result.report.notes)


def test_plans_that_do_not_fit() -> None:
    plan = pruned(compare=False, repair=False).plan
    with pytest.raises(InputError, match="Leave inplace out"):
        apply_plan(Net(), plan, inplace=True)
    raw = plan.to_json()
    with pytest.raises(InputError, match=r"drops 'blocks\.9', which this model needs: there is no such element"):
        apply_plan(Net(), Plan.from_json(raw.replace("blocks.2", "blocks.9")))
    for bad in ('"dropped": 3', '"dropped": ["a", "a"]', '"dropped": [1]'):
        with pytest.raises(InputError, match="dropped of the plan must list names"):
            Plan.from_json(raw[: raw.index('"dropped"')] + bad + "}")


@pytest.mark.slow
def test_a_language_model_is_loaded_by_stock_transformers_and_generates(tmp_path: Path) -> None:
    values = {k: v for k, v in GQA[1].to_dict().items() if k != "layer_types"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig.from_dict({**values, "num_hidden_layers": 4})).eval()
    with torch.no_grad():
        for layer in model.model.layers[1:3]:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(0.01)
    samples = {"input_ids": torch.randint(3, 20, (48, 7), generator=torch.Generator().manual_seed(0))}
    result = prune(model, GQA[2], Budget(params=0.54), queries=samples, stock=True, depth=True)
    assert result.plan.dropped == ("model.layers.1", "model.layers.2")
    small: Any = result.model
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert [one.num_hidden_layers for one in (model.config, small.config, result.config)] == [4, 2, 4]
    small.save_pretrained(tmp_path / "stock")
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    equal(stock, small, GQA[2])
    asked = {"max_new_tokens": 6, "do_sample": False}
    tokens = small.generate(IDS, **asked)
    assert torch.equal(tokens, small.generate(IDS, use_cache=False, **asked))
    assert torch.equal(tokens, small.generate(IDS, cache_implementation="static", **asked))
    assert torch.equal(tokens, stock.generate(IDS, **asked))
    save(result, tmp_path / "small")
    again = load(tmp_path / "small")
    equal(again, small, GQA[2])
    again.save_pretrained(tmp_path / "again")
    equal(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), small, GQA[2])
    applied: Any = apply_plan(model, result.plan)
    assert applied.config.num_hidden_layers == 2
