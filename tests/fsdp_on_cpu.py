"""The command line with FSDP on CPUs (gloo), for tests: accelerate offers it on GPUs only, though PyTorch's own runs on both."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from trimlingual import cli, resources
from trimlingual.training import sharding

GPUS_ONLY = AcceleratorState.__init__


def keep_the_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """What accelerate's state does with FSDP on GPUs, on CPUs too."""
    GPUS_ONLY(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    if getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


def main() -> None:
    AcceleratorState.__init__ = keep_the_plugin
    sharding.SHARED_ON.add("cpu")
    resources._device_kind = lambda recipe: "cuda"
    cli.main()
