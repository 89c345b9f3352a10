"""The processes of a distributed run (torchrun, accelerate launch): who writes, waiting for all, telling all."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any, NoReturn

# One process may work for hours while the others wait. A process that dies is noticed by the launcher, which ends the rest.
PATIENCE = timedelta(days=7)
GRACE_S = 10.0  # what the main process, should it fail too, and then the launcher, have time to end the others in


def num_processes() -> int:
    """How many processes this run has; 1 unless started by torchrun or accelerate launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True in the one process that writes."""
    return process_index() == 0


def wait_for_everyone() -> None:
    """Barrier between the processes; nothing in a plain run."""
    if num_processes() > 1:
        _group().barrier()


def gather(value: Any) -> list[Any]:
    """Everybody's `value` (anything that can be pickled), in every process, in the order of the processes."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    _group().all_gather_object(values, value)
    return values


def broadcast(tensor: Any) -> None:
    """Fill everybody's tensor with the main process's; nothing in a plain run."""
    if num_processes() > 1:
        _group().broadcast(tensor, src=0)


def launched() -> bool:
    """Whether a launcher started this process, be it as the only one."""
    return "WORLD_SIZE" in os.environ


def let_main_process_fail_first() -> None:
    """For any other process that has failed, before it says why.

    What is wrong for all of them (the recipe, a folder) the main process says, and the launcher ends the others during this wait.
    Who comes out of it has failed alone.
    """
    if not is_main_process():
        time.sleep(GRACE_S)


def end(code: int) -> NoReturn:
    """End the process. One of several ends without ado: tidying up could wait for others, and they for the launcher to see it dead."""
    if num_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _group() -> Any:
    """torch.distributed, with the process group that accelerate, when it comes to training, will find and take."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=PATIENCE)
    return distributed
