"""The optimizer for full fine-tuning of bfloat16 weights in the memory of one GPU: FlashOptim's AdamW, with scaled gradients.

FlashOptim (Gonzalez Ortiz et al. 2026) stores Adam's two states (the running means of the gradient and of its square) in 8 bits per
value. It keeps 8 more bits per bfloat16 weight, so that steps too small for bfloat16 add up. Its update is one kernel per tensor.

The gradients are multiplied by a constant first. The reason: every 32 values of a state have a common scale in float16, whose
smallest positive number is 6e-8. When the gradient norm of billions of weights is clipped to 1, a gradient is 1e-5 on average. For
so small values the scales are too coarse. The second state, by whose root Adam divides, is lost before the first, so the steps come
out too long. Adam's step does not change when the gradients and epsilon are multiplied by the same number.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trimlingual.recipe import TrainSettings
from trimlingual.run.extras import install_line

LARGEST_GRADIENT = 2.0**15  # after scaling; float16 ends at 65504
EPSILON = 1e-8


class TrainingError(RuntimeError):
    """Training cannot start, or cannot go on; the message says what to do."""


def flash_adamw(model: Any, settings: TrainSettings) -> tuple[type, dict[str, Any]]:
    """The optimizer's class and keyword arguments, for the Trainer. Raises TrainingError without a CUDA GPU or without FlashOptim."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if weights[0].device.type != "cuda":
        raise TrainingError("optimizer: flash_adamw needs a CUDA GPU; set optimizer: adamw_torch")
    try:
        from flashoptim import FlashAdamW
    except ImportError:
        raise TrainingError(
            f"optimizer: flash_adamw needs FlashOptim: {install_line('flash')}; or set optimizer: adamw_bnb_8bit"
        ) from None
    # A power of two changes no significant bit.
    scale = 2.0 ** math.floor(math.log2(LARGEST_GRADIENT / settings.max_grad_norm))

    class ScaledFlashAdamW(FlashAdamW):
        """FlashAdamW that multiplies the gradients by `scale` before each step."""

        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, scale)
            return super().step(closure)

    # bfloat16 weights get 8 bits beside their own 16. None: float32 weights need no more.
    bits = None if all(weight.dtype == torch.float32 for weight in weights) else 24
    return ScaledFlashAdamW, {"lr": settings.learning_rate, "eps": EPSILON * scale, "master_weight_bits": bits}
