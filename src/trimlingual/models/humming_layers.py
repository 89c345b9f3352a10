"""Linear layers on humming-kernels (Apache-2.0, of the vLLM project), which compiles a kernel for each shape when it is first needed.

Compiled kernels are kept in HUMMING_CACHE_DIR (default: ~/.humming/cache). This file alone imports humming.

Shapes: N outputs, K inputs, G groups of inputs that share a scale, T tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimlingual.models.errors import ModelError

logger = logging.getLogger(__name__)
# A kernel for up to so many tokens each, one clip's prompt among them. The library's own list has three times as many.
MOST_TOKENS = (8, 16, 32, 64, 128, 192, 288, 352, 512, 1 << 30)
ROWS, WIDTH = 128, 64  # the smallest tile that the kernels have; N is filled up to it
PROBE = 256  # N and K of the layer that shows whether anything can be compiled here


class HummingLinear(nn.Module):
    """A linear layer on integers of 1 to 8 bits, in 16 bits on a GPU."""

    kernel: ClassVar[str] = "humming-kernels"
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    locks: Tensor

    def __init__(self, words: Tensor, scale: Tensor, bias: Tensor | None, num_bits: int):
        """`words` (N, K * num_bits / 32) int32 with half the range added to each integer; `scale` (N, G); `bias` (N,)."""
        from humming import dtypes
        from humming.schema import HummingWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        super().__init__()
        self.out_features, self.in_features = len(words), words.shape[1] * 32 // num_bits
        schema = HummingWeightSchema(
            b_dtype=dtypes.DataType.from_str(f"uint{num_bits}"),
            bs_dtype=dtypes.DataType.from_torch_dtype(scale.dtype),
            weight_scale_group_size=0 if scale.shape[1] == 1 else self.in_features // scale.shape[1],
        )
        tensors = {"weight": words, "weight_scale": scale} | ({} if bias is None else {"bias": bias})
        config, packed = prepare_and_transform_humming_tensors(
            tensors, self.out_features, self.in_features, schema,
            pad_n_to_multiple=ROWS, has_bias=bias is not None, torch_dtype=scale.dtype, device=words.device,
        )  # fmt: skip
        self.config: str = config.to_str()
        self.kernels: Tensor | None = None
        self.register_buffer("weight", packed["weight"])
        self.register_buffer("scale", packed["weight_scale"])
        self.register_buffer("bias", packed.get("bias"))
        self.register_buffer("locks", torch.zeros(2048, dtype=torch.int32, device=words.device))

    def compile(self) -> None:
        """Have the kernels for every number of tokens; compiled, read from disk, or known."""
        from humming.kernel.humming import HummingKernel
        from humming.tune import get_heuristics_config

        device = self.weight.device
        chosen = [
            get_heuristics_config(json.loads(self.config), min(most, 4096), device=device) for most in MOST_TOKENS
        ]
        tuning = json.dumps([*zip((0, *MOST_TOKENS), MOST_TOKENS, chosen)])
        self.kernels = HummingKernel.prepare_kernels(self.config, None, tuning, device)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        from humming.ops import launch_kernel

        if self.kernels is None:
            self.compile()
        assert self.kernels is not None
        out = launch_kernel(
            configs=self.kernels,
            inputs=inputs.reshape(-1, self.in_features).contiguous(),
            weight=self.weight,
            weight_scale=self.scale,
            bias=self.bias,
            locks=self.locks,
        )
        return out.view(*inputs.shape[:-1], self.out_features)

    @property
    def num_weights(self) -> int:
        """Logical weights, with the bias."""
        return self.out_features * (self.in_features + (self.bias is not None))


def fits(rows: int, width: int, scale: Tensor) -> bool:
    """Whether a layer of `rows` outputs and `width` inputs can be computed here in the dtype of `scale`."""
    suits = scale.device.type == "cuda" and scale.dtype in (torch.bfloat16, torch.float16)
    return suits and rows % 8 == 0 and width % WIDTH == 0 and _works(scale.device)


def compile_all(modules: Iterable[nn.Module]) -> None:
    """Compile what these modules need, in parallel, so that no later call waits for it. ModelError where a shape has no kernel."""
    layers = [module for module in modules if isinstance(module, HummingLinear)]
    first_of = {layer.config: layer for layer in layers}
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(HummingLinear.compile, first_of.values()))
    except Exception as error:
        raise ModelError(
            f"humming-kernels has no kernel for a layer of this model on this GPU ({type(error).__name__}: {error}); "
            "without it (pip uninstall humming-kernels) the model runs on PyTorch's"
        ) from error
    for layer in layers:
        layer.compile()


@cache
def _works(device: torch.device) -> bool:
    """Whether humming-kernels is installed and can compile: it needs NVRTC or nvcc, and CUDA's headers. Says why not."""
    if find_spec("humming") is None:
        return False
    words = torch.zeros((PROBE, PROBE // 8), dtype=torch.int32, device=device)
    scale: Any = torch.ones((PROBE, 2), dtype=torch.bfloat16, device=device)
    try:
        HummingLinear(words, scale, None, 4)(torch.ones((1, PROBE), dtype=torch.bfloat16, device=device))
    except Exception as error:  # of the compiler, of a missing header, of a GPU that is too old
        logger.warning(
            "humming-kernels is installed and cannot be used (%s); 4-bit weights are computed without it", error
        )
        return False
    return True
