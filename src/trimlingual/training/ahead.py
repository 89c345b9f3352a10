"""What other processes load and prepare while this one computes on what came before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, get_worker_info

from trimlingual.run import interruptions

AHEAD = 4  # batches per process

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


class _Prepared(Dataset, Generic[Item, Prepared]):
    def __init__(self, prepare: Callable[[Item], Prepared], items: Sequence[Item]):
        self.prepare, self.items = prepare, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Prepared:
        if get_worker_info():
            interruptions.ignored_here()
        return self.prepare(self.items[number])


def _as_it_is(prepared: Any) -> Any:
    return prepared


def prepared_ahead(
    prepare: Callable[[Item], Prepared], items: Sequence[Item], num_workers: int
) -> Generator[Prepared, None, None]:
    """`prepare(item)` of each item, in order, by `num_workers` processes; 0: by this one, when its turn comes.

    To be closed by the caller (`contextlib.closing`): the processes ignore signals, and end with the generator. Where processes are
    not forked, `prepare` is pickled.
    """
    several: dict[str, Any] = {"prefetch_factor": AHEAD} if num_workers else {}
    dataset = _Prepared(prepare, items)
    yield from DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **several)
