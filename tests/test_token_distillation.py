"""Token-level distillation: the loss is the divergence it says, and what is stored is what the teacher gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.models.inputs import Collator, Example, Prompter
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.saving import save_model
from trimlingual.pipeline import compress
from trimlingual.recipe import TokenDistillation, TrainSettings, load_recipe
from trimlingual.stages.finetune import finetune
from trimlingual.training.loss import answer_forward, divergence
from trimlingual.training.selection import Guide
from trimlingual.training.token_distillation import teacher_tokens

from .test_pipeline import SMALL


@pytest.fixture
def examples(split):
    return [Example(i, clip.id, "de", clip.references["de"]) for i, clip in enumerate(split.clips)]


@pytest.fixture
def collator(processor, task, split):
    return Collator(Prompter(processor, task), lambda index: load_audio(split.clips[index].audio))


def test_divergence_over_all_tokens_is_kl() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 7), torch.randn(5, 7)
    log_probs, ids = (teacher / 2).log_softmax(-1).topk(6)
    found = divergence(student, ids, log_probs, 2.0)
    expected = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(found, expected * 4, rtol=1e-4, atol=1e-4)  # six of seven, and the rest is the seventh


def test_equal_models_have_no_divergence_and_no_gradient() -> None:
    logits = torch.randn(4, 50, requires_grad=True)
    log_probs, ids = logits.detach().log_softmax(-1).topk(8)
    loss = divergence(logits, ids, log_probs, 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert logits.grad.abs().max() < 1e-6


def test_a_certain_teacher_gives_finite_loss_and_gradient() -> None:
    logits = torch.randn(3, 20, requires_grad=True)
    certain = torch.zeros(3, 20)
    certain[:, 4] = 60.0
    log_probs, ids = certain.log_softmax(-1).topk(8)
    divergence(logits, ids, log_probs.half(), 1.0).backward()
    assert logits.grad.isfinite().all()


def test_loss_of_the_teacher_itself_is_the_hard_part_alone(model_dir, examples, collator, tmp_path: Path) -> None:
    model = load_model(model_dir, "float32", pick_device("cpu"))
    settings = TokenDistillation(weight=0.25, top_k=10**6)
    stored = teacher_tokens(lambda: model, collator, examples, settings, tmp_path)
    collator.teacher = stored
    batch = collator(examples[:3])
    batch.pop("ids")
    mixed = answer_forward(model, settings)(**batch)["loss"]
    del batch["teacher_ids"], batch["teacher_log_probs"]
    torch.testing.assert_close(mixed, 0.75 * answer_forward(model)(**batch)["loss"], rtol=1e-3, atol=1e-3)


def test_store_is_read_again_without_the_teacher(model_dir, examples, collator, tmp_path: Path) -> None:
    model = load_model(model_dir, "float32", pick_device("cpu"))
    settings = TokenDistillation(top_k=4)
    first = teacher_tokens(lambda: model, collator, examples, settings, tmp_path / "work")
    again = teacher_tokens(lambda: pytest.fail("loaded"), collator, examples, settings, tmp_path / "work")
    by_workers = teacher_tokens(lambda: model, collator, examples, settings, tmp_path / "workers", num_workers=2)
    for example in examples:
        ids, log_probs = first[example]
        assert len(ids) == len(collator.prompter.answer_ids(example.text))
        for other in (again[example], by_workers[example]):
            assert torch.equal(other[0], ids)
            assert torch.equal(other[1], log_probs)
    fewer = teacher_tokens(lambda: model, collator, examples, TokenDistillation(top_k=3), tmp_path / "work")
    assert fewer[examples[0]][0].shape[1] == 3  # what was asked of the teacher is part of what it was asked


def test_a_killed_reading_goes_on(model_dir, examples, collator, tmp_path: Path, monkeypatch) -> None:
    """Killed in the third batch: the first two are not read again, and everything is as if never killed."""
    monkeypatch.setattr("trimlingual.training.token_distillation.BATCH", 2)
    monkeypatch.setattr("trimlingual.training.parts.PART_S", 0.0)
    model = load_model(model_dir, "float32", pick_device("cpu"))
    settings = TokenDistillation(top_k=4)
    straight = teacher_tokens(lambda: model, collator, examples, settings, tmp_path / "straight")
    read: list[int] = []

    def counted(chosen, **kwargs):
        read.append(len(chosen))
        if len(read) == 3:
            raise KeyboardInterrupt
        return collator(chosen, **kwargs)

    counted.prompter = collator.prompter
    with pytest.raises(KeyboardInterrupt):
        teacher_tokens(lambda: model, counted, examples, settings, tmp_path / "killed")
    assert len(read) == 3
    resumed = teacher_tokens(lambda: model, counted, examples, settings, tmp_path / "killed")
    assert sum(read) - read[2] == len(examples)
    for example in examples:
        assert all(torch.equal(a, b) for a, b in zip(straight[example], resumed[example], strict=True))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_student_comes_nearer_to_its_teacher(
    make_model, given, model_dir, data, examples, shared, collator, tmp_path: Path, method
) -> None:
    settings = TrainSettings(
        method=method,
        max_steps=12,
        batch_size=4,
        learning_rate=3e-3,
        freeze=["audio_tower"],
        token_distillation=TokenDistillation(weight=1.0),
    )
    teacher_dir = tmp_path / "teacher"
    save_model(make_model(layers=2, seed=1), load_processor(model_dir), teacher_dir, "float32")
    guide = Guide(teacher_dir=teacher_dir)
    finetune(given, data, shared, settings, tmp_path / "out", guide)
    device = pick_device("cpu")
    teacher = load_model(teacher_dir, "float32", device)
    collator.teacher = teacher_tokens(lambda: teacher, collator, examples, TokenDistillation(), tmp_path / "read")
    batch = collator(examples)
    batch.pop("ids")
    only = TokenDistillation(weight=1.0)
    before, after = (
        answer_forward(load_model(folder, "float32", device), only)(**batch)["loss"].item()
        for folder in (model_dir, tmp_path / "out")
    )
    assert after < 0.9 * before


def test_a_base_that_is_its_own_teacher(manifests, tmp_path):
    """It is pruned, teaches by its translations and its distribution, and is what the student is compared with."""
    words = ["finetune=null", "rank.strategy=middle", "quantize=null", "export=null", "recover.token_distillation={}"]
    compress(load_recipe("mini", [*SMALL, *manifests, *words]), tmp_path)
    assert not (tmp_path / "teacher").exists()
    result = json.loads((tmp_path / "evaluations" / "recovered" / "result.json").read_text())
    assert result["languages"]["de"]["retained"]["baseline"] == "base"
    assert "kept, % of base" in (tmp_path / "report" / "report.md").read_text()
