"""Pruned models of transformers have true configurations: what save_pretrained writes, from_pretrained reads."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from artifact.hf_cases import BERT, CLIP, GPT2, GQA, IDS, VIT, Case, equal, hf, made, pruned
from coreprune import Budget, InputError, apply_plan, load, prune, save

GENERATION = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize(
    ("case", "exclude"),
    [
        pytest.param(BERT, ("*attention*", "*pooler*"), id="bert"),
        pytest.param(VIT, (), id="vit"),
        pytest.param(GQA, (), id="llama-gqa"),
        pytest.param(CLIP, ("*attn*",), id="clip", marks=pytest.mark.slow),
    ],
)
def test_save_pretrained_writes_what_from_pretrained_reads(
    tmp_path: Path, case: Case, exclude: tuple[str, ...]
) -> None:
    dense = made(case)
    before, own = dense.config.to_dict(), dense.config
    result = prune(dense, case[2], Budget(keep=0.5), "magnitude", queries=None, exclude=exclude)
    assert dense.config is own
    assert own.to_dict() == before
    assert result.config.to_dict() == before
    result.model.save_pretrained(tmp_path)
    stock = type(dense).from_pretrained(tmp_path, local_files_only=True)
    equal(stock, result.model, case[2])
    assert sum(p.numel() for p in stock.parameters()) < sum(p.numel() for p in dense.parameters())
    configs = {id(m.config) for m in result.model.modules() if isinstance(m, hf.PreTrainedModel)}
    assert not configs & {id(m.config) for m in dense.modules() if isinstance(m, hf.PreTrainedModel)}


def test_a_pruned_model_is_pruned_again(tmp_path: Path) -> None:
    once = pruned(GQA, keep=0.75).model
    twice = prune(once, GQA[2], Budget(keep=0.5), "magnitude", queries=None).model
    assert twice.config.intermediate_size < once.config.intermediate_size < GQA[1].intermediate_size
    twice.save_pretrained(tmp_path)
    equal(type(twice).from_pretrained(tmp_path), twice, GQA[2])


def test_what_no_configuration_can_say_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    small = pruned(BERT).model
    for model in (small, copy.deepcopy(small)):
        with pytest.raises(InputError, match=r"cannot say fewer heads.*exclude=\('\*attention\*'.*coreprune\.save"):
            model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    torch.save(small, file := io.BytesIO())
    file.seek(0)
    equal(torch.load(file, weights_only=False), small, BERT[2])
    again = prune(small, BERT[2], Budget(keep=0.9), "magnitude", queries=None).model
    with pytest.raises(InputError, match="cannot say fewer heads"):
        again.save_pretrained(tmp_path / "no")


def test_plans_and_in_place(tmp_path: Path) -> None:
    result = pruned(GQA)
    other, mine = made(GQA), made(GQA)
    own = mine.config
    applied = apply_plan(other, result.plan)
    assert apply_plan(mine, result.plan, inplace=True) is mine
    assert own.intermediate_size == 24
    for n, small in enumerate((applied, mine)):
        assert small.config.to_dict() == result.model.config.to_dict()
        small.save_pretrained(tmp_path / str(n))
        equal(type(small).from_pretrained(tmp_path / str(n)), small, GQA[2])


class Wrapped(nn.Module):
    """A user's model around one of transformers."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=input_ids).logits


def test_a_model_inside_of_another_and_a_part(tmp_path: Path) -> None:
    model = Wrapped(made(GQA))
    small = prune(model, IDS, Budget(keep=0.5), "magnitude", queries=None).model
    part = prune(model, IDS, Budget(keep=0.5), "magnitude", queries=None, part="inner.model").model
    assert model.inner.config.intermediate_size == 24
    for n, one in enumerate((small, part)):
        one.inner.save_pretrained(tmp_path / str(n))
        equal(type(one.inner).from_pretrained(tmp_path / str(n)), one.inner, GQA[2])


def test_artifacts_are_loaded_with_their_true_configuration(tmp_path: Path) -> None:
    result = pruned(GQA)
    save(result, tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.config.intermediate_size == 12
    again.save_pretrained(tmp_path / "again")
    equal(type(again).from_pretrained(tmp_path / "again"), result.model, GQA[2])
    odd = pruned(GPT2)
    save(odd, tmp_path / "odd")
    with pytest.raises(InputError, match="cannot say fewer heads"):
        load(tmp_path / "odd").save_pretrained(tmp_path / "no")


def test_generate_and_pipeline_on_the_folder(tmp_path: Path) -> None:
    small = pruned(GQA).model
    small.save_pretrained(tmp_path / "lm")
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert torch.equal(stock.generate(IDS, **GENERATION), small.generate(IDS, **GENERATION))
    static = {**GENERATION, "cache_implementation": "static"}  # allocates from the numbers of the configuration
    assert torch.equal(small.generate(IDS, **static), small.generate(IDS, **GENERATION))
    seeing = pruned(VIT).model
    seeing.save_pretrained(tmp_path / "vit")
    processor = hf.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "vit")
    pytest.importorskip("PIL", reason="the pipeline for images needs pillow")
    from PIL import Image

    found = hf.pipeline("image-classification", str(tmp_path / "vit"))(Image.new("RGB", (16, 16), (90, 10, 200)))
    assert abs(sum(f["score"] for f in found) - 1) < 1e-4


def test_a_trainer_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    small = pruned(GQA).model
    data = [{"input_ids": row, "labels": row} for row in IDS]
    asked = hf.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = hf.Trainer(small, asked, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    equal(stock, small.eval(), GQA[2])
    again = hf.Trainer(stock, asked, train_dataset=data)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2


def test_adapters_are_merged_and_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    small = pruned(GQA).model
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    equal(hf.AutoModelForCausalLM.from_pretrained(tmp_path), merged.eval(), GQA[2])


@pytest.mark.parametrize("case", [BERT, GPT2, VIT, GQA], ids=lambda case: case[0])
def test_stock_cuts_what_the_configuration_can_say(tmp_path: Path, case: Case) -> None:
    """Without patterns of the caller's: heads of BERT and GPT-2, and BERT's pooler, stay whole."""
    dense = made(case)
    result = prune(dense, case[2], Budget(keep=0.5), "magnitude", queries=None, stock=True)
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in dense.parameters())
    result.model.save_pretrained(tmp_path)
    equal(type(dense).from_pretrained(tmp_path), result.model, case[2])
    assert result.model.config.num_attention_heads == (2 if case in (VIT, GQA) else 4)
    assert result.report.settings.budget.uniform


def test_stock_is_for_models_of_transformers() -> None:
    with pytest.raises(InputError, match="stock=True is for models of transformers"):
        prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4), queries=None, stock=True)


def test_a_configuration_that_fails_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a number of its own")

    monkeypatch.setattr("coreprune.pruning.configured.stock_config", broken)
    result = pruned(GQA)
    assert result.report.parameters[1] < result.report.parameters[0]
    with pytest.raises(InputError, match=r"no configuration could be tried.*a number of its own"):
        result.model.save_pretrained(tmp_path)
