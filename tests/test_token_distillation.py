"""Token-level distillation: the loss is the divergence it says, and the teacher's tokens are the ones it gives."""

from __future__ import annotations

from pathlib import Path

import torch

from trimlingual.token_distillation import TeacherTokens, _read, _write, divergence, mixed_loss


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


def test_weights_mix_the_two_losses() -> None:
    logits, targets = torch.randn(6, 30), torch.randint(0, 30, (6,))
    log_probs, ids = torch.randn(6, 30).log_softmax(-1).topk(8)
    hard = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    soft = divergence(logits, ids, log_probs, 1.0)
    torch.testing.assert_close(mixed_loss(logits, targets, ids, log_probs, 0.0, 1.0), hard)
    torch.testing.assert_close(mixed_loss(logits, targets, ids, log_probs, 0.25, 1.0), 0.75 * hard + 0.25 * soft)


def test_store_gives_back_what_was_put_in(tmp_path: Path) -> None:
    tokens = [TeacherTokens(torch.randint(0, 9, (n, 3)).int(), torch.randn(n, 3).half()) for n in (2, 5, 1)]
    _write(tmp_path / "t.safetensors", tokens)
    for one, other in zip(tokens, _read(tmp_path / "t.safetensors", 3), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.log_probs, other.log_probs)
