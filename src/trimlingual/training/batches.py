"""The order in which examples are trained on: batches of clips of similar length, so that little of a batch is padding.

Pure order: no audio and no model here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Steps whose examples are sorted together: transformers' LengthGroupedSampler has 50, or a quarter of small data, so that epochs
# differ in who shares a step; at least 4, or there is nothing to sort.
MAX_GROUP_STEPS = 50
GROUPS_OF_SMALL_DATA = 4
MIN_GROUP_STEPS = 4


def divided(step_size: int, processes: int, batch_size: int) -> tuple[int, int] | None:
    """Batch size per process, at most `batch_size`, and accumulation with which `processes` share a step of `step_size` examples.

    None if they cannot share it equally. The order of examples stays that of any other number of processes.
    """
    share, rest = divmod(step_size, processes)
    if rest:
        return None
    largest = max(size for size in range(1, min(share, batch_size) + 1) if share % size == 0)
    return largest, share // largest


class LengthGroupedSampler(Sampler[int]):
    """Indices of examples, shuffled, in steps of `step_size` examples of similar length; the steps in random order.

    The step with the longest example comes first, so that too little memory shows at once; an incomplete step comes last. Unlike
    transformers' sampler of this name the steps do not run from long to short, and the order is a function of seed and epoch alone:
    a resumed run and every process of a distributed one see the same.
    """

    def __init__(self, lengths: Sequence[float], step_size: int, seed: int):
        self.lengths = lengths
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        group_steps = len(shuffled) // (self.step_size * GROUPS_OF_SMALL_DATA)
        group_size = self.step_size * max(MIN_GROUP_STEPS, min(MAX_GROUP_STEPS, group_steps))
        ordered: list[int] = []
        for start in range(0, len(shuffled), group_size):
            ordered += sorted(shuffled[start : start + group_size], key=lambda i: self.lengths[i], reverse=True)
        steps = [ordered[start : start + self.step_size] for start in range(0, len(ordered), self.step_size)]
        incomplete = [steps.pop()] if steps and len(steps[-1]) < self.step_size else []
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        longest = max(self.lengths, default=0)
        steps.sort(key=lambda step: all(self.lengths[i] < longest for i in step))  # stable: the longest first
        yield from (i for step in steps + incomplete for i in step)
