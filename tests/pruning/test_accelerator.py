"""Where there is an accelerator: a model on it gets the plan that it gets on the CPU, and every call works there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune import Budget, Distill, Repair, load, perplexity, prune, save
from coreprune.finetune import Tuning, fine_tune_
from coreprune.selectors import Folding, Loewner, Merging, Mussay
from graph.zoo import ZOO, gen, randomise
from small_networks import EXAMPLE, mlp
from zoo_examples import call, example

PLACE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(PLACE is None, reason="there is no accelerator")
SHORT = Repair(descent=False)  # training multiplies the errors of rounding


def there(value: Any) -> Any:
    """The same tensors, or a copy of the model, on the accelerator."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(PLACE)
    return pytree.tree_map(lambda t: t.to(PLACE) if isinstance(t, Tensor) else t, value)


def single(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}


def places(model: nn.Module) -> set[str]:
    return {t.device.type for t in [*model.parameters(), *model.buffers()]}


def off(small: nn.Module, dense: nn.Module, inputs: dict[str, Tensor]) -> float:
    found, wanted = call(small, inputs).double(), call(dense, inputs).double()
    return float((found - wanted).norm() / wanted.norm())


EXACT = ("vgg", "densenet", "mobilenet-v2", "efficientnet", "swin", "bert", "llama-gqa", "t5", "mixtral", "unet")


@pytest.mark.parametrize("name", EXACT)
def test_the_same_plan_and_weights(name: str) -> None:
    entry = ZOO[name]
    model = entry.build().double().eval()
    inputs, queries, asked = example(entry.inputs(2)), example(entry.inputs(32)), {"repair": SHORT}
    here = prune(copy.deepcopy(model), inputs, Budget(macs=0.6), queries=queries, **asked)
    moved = there(model)
    far = prune(moved, there(inputs), Budget(macs=0.6), queries=there(queries), **asked)
    assert {n: g.kept for n, g in far.plan.groups.items()} == {n: g.kept for n, g in here.plan.groups.items()}
    assert places(far.model) == places(moved) == {PLACE.type}  # type: ignore[union-attr]
    wanted = call(here.model, entry.inputs(3))
    found = call(far.model, there(entry.inputs(3))).cpu()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_network_is_pruned_as_well_as_on_the_cpu(name: str) -> None:
    entry = ZOO[name]
    dense, given, tests = randomise(entry.build()).float(), single(entry.inputs(24)), single(entry.inputs(32))
    found = {}
    for place in (lambda x: x, there):
        model, test = place(dense), place(tests)
        asked = {"queries": place(example(given)), "norm_statistics": entry.norm_statistics, "tokenizer": False}
        small = prune(model, place(example(single(entry.inputs(2)))), Budget(keep=0.7), repair=SHORT, **asked).model
        found[next(iter(places(small)))] = off(small, model, test)
    here, away = found["cpu"], found[PLACE.type]  # type: ignore[union-attr]
    assert away <= 1.5 * here + 1e-3, found


def conv() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
        ).eval()  # fmt: skip


IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"distill": Distill(steps=5)},
        {"method": "magnitude", "queries": None, "n_queries": None},
        {"method": Loewner()},
        {"method": Mussay()},
        {"method": Merging()},
        {"method": Folding()},
        {"repair": Repair(descent=True)},
        {"budget": Budget(error=0.2)},
        {"budget": Budget(bytes=0.6), "memory": "64MiB"},
    ],
    ids=str,
)
def test_without_data(asked: dict[str, Any], tmp_path: Path) -> None:
    model = there(conv())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = prune(model, there(IMAGE), **{"budget": Budget(macs=0.6), "n_queries": 64, **asked})
    assert "budget" in asked or result.report.macs[1] <= 0.6 * result.report.macs[0]
    assert places(result.model) == places(model)
    save(result, tmp_path / "small")
    x = {"x": there(torch.randn(4, 3, 16, 16, generator=gen(0)))}
    assert call(result.model, x).isfinite().all()
    assert torch.allclose(call(load(tmp_path / "small", model), x), call(result.model, x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_latency_on_the_accelerator() -> None:
    model, x = there(conv()), there(torch.zeros(1, 3, 256, 256))  # large enough for the widths to matter
    result = prune(model, x, Budget(latency=0.8, batch=64), n_queries=16, repair=False)
    assert places(result.model) == places(model)


def test_the_answers_stay_with_high_probability() -> None:
    x = torch.randn(400, 8, generator=gen(0))
    result = prune(there(mlp()), there(EXAMPLE), Budget(agreement=0.8), queries=there(x), delta=0.1, repair=SHORT)
    assert places(result.model) == {PLACE.type}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(200, 8, generator=gen(0)).to(dtype)
    result = prune(there(mlp(dtype=dtype)), there(EXAMPLE.to(dtype)), queries=there(x), distill=3)
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_a_distillation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("distill", 4):
            raise KeyboardInterrupt

    model, x = there(conv()), there(torch.randn(64, 3, 16, 16, generator=gen(0)))
    asked = {"queries": x, "distill": Distill(steps=6, save_every=2), "checkpoint": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        prune(model, there(IMAGE), progress=stop, **asked)
    resumed = prune(model, there(IMAGE), **asked).model
    straight = prune(model, there(IMAGE), **{**asked, "checkpoint": None}).model
    test = {"x": there(torch.randn(8, 3, 16, 16, generator=gen(1)))}
    assert off(resumed, straight, test) < 1e-3  # not the same bits: a GPU adds in any order


def llama() -> tuple[nn.Module, Any]:
    hf: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["the cat sat"], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 280, "use_cache": False, "max_position_embeddings": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **more, bos_token_id=None, eos_token_id=None)).eval()
    return there(model), made


@pytest.mark.parametrize("asked", [{"distill": 3}, {"residual": "rotate"}, {"depth": True}, {"stock": True}], ids=str)
def test_language_models_without_data(asked: dict[str, Any]) -> None:
    model, tokenizer = llama()
    words = {"input_ids": there(torch.zeros(1, 12, dtype=torch.int64))}
    result = prune(model, words, Budget(params=0.85), tokenizer=tokenizer, n_queries=48, **asked)
    assert places(result.model) == places(model)
    read = perplexity.windows(model, words, tokenizer=tokenizer, context=12)
    assert perplexity.compare_perplexity(model, result.model, words, read).after > 1


def test_samples_of_a_language_model_may_lie_on_the_cpu() -> None:
    model, tokenizer = llama()
    ids = torch.randint(280, (40, 12), generator=gen(0))
    words = {"input_ids": there(ids[:1])}
    small = prune(model, words, Budget(params=0.9), queries={"input_ids": ids}, tokenizer=tokenizer, distill=2).model
    assert places(small) == places(model)


def test_fine_tuning() -> None:
    model = there(conv())
    pairs = [(torch.randn(16, 3, 16, 16, generator=gen(i)), torch.arange(16) % 5) for i in range(4)]
    fine_tune_(model, pairs, Tuning(epochs=1), teacher=there(conv()))
    assert places(model) == {PLACE.type}  # type: ignore[union-attr]
