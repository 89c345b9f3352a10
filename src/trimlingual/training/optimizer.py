"""The optimizer for full fine-tuning of bfloat16 weights within one GPU's memory: FlashOptim's AdamW, its gradients scaled.

FlashOptim (Gonzalez Ortiz et al. 2026) keeps Adam's states in 8 bits and 8 more bits of each bfloat16 weight, so that steps too small
for bfloat16 add up; its update is one kernel a tensor. It scales every 32 values of a state by a number in float16, which ends at
6e-8: too coarse for the gradients of billions of weights whose norm is cut to 1 (1e-5 each in the mean), and the second moment is then
lost before the first, so that steps come out too long. Adam's step does not change when gradients and epsilon are scaled alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trimlingual.recipe import TrainSettings

LARGEST_GRADIENT = 2.0**15  # within float16
EPSILON = 1e-8


class TrainingError(RuntimeError):
    """Training cannot start, or cannot go on; the message says what to do."""


def flash_adamw(model: Any, settings: TrainSettings) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and its arguments, as the Trainer takes them. Raises TrainingError where it cannot run."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if weights[0].device.type != "cuda":
        raise TrainingError("optimizer: flash_adamw needs a CUDA GPU; set optimizer: adamw_torch")
    try:
        from flashoptim import FlashAdamW
    except ImportError:
        raise TrainingError(
            "optimizer: flash_adamw needs FlashOptim: pip install 'trimlingual[flash]'; or set optimizer: adamw_bnb_8bit"
        ) from None
    scale = 2.0 ** math.floor(math.log2(LARGEST_GRADIENT / settings.max_grad_norm))  # a power of two changes no bit

    class ScaledFlashAdamW(FlashAdamW):
        """FlashAdamW that multiplies the gradients by `scale` first."""

        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, scale)
            return super().step(closure)

    bits = None if all(weight.dtype == torch.float32 for weight in weights) else 24
    return ScaledFlashAdamW, {"lr": settings.learning_rate, "eps": EPSILON * scale, "master_weight_bits": bits}
