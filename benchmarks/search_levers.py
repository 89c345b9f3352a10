"""What each lever of the layer search brings, one added after the other (a part of search.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from published_search import Case, clock, generate_embedded, prompts_of

from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.shared_prompts import MOST_ROWS
from trimlingual.decoding.translate_clips import encode_clips, greedy
from trimlingual.models.family import family_of
from trimlingual.search import from_parent
from trimlingual.search.from_parent import NO_DRAFT, Trace, trace, translate_without


class Levers:
    """Seconds a candidate, adding one lever after the other; means over removals at the given depths."""

    def __init__(self, case: Case, positions: Sequence[int]):
        self.case, self.positions, self.gpu = case, positions, case.device.type == "cuda"
        self.count = len(case.model.model.language_model.layers)
        order = sorted(range(len(case.split.clips)), key=lambda clip: -case.split.clips[clip].duration_s)
        with torch.inference_mode():
            states = encode_clips(case.model, case.processor, case.split.clips, 32)
            self.prompts = prompts_of(case, states, order)
        self.limits = [case.limit(clip) for clip in order for _ in case.task.target_languages]
        self.stepper = Stepper(
            PackedDecoder(case.model),
            () if case.num_tokens else family_of(case.model).end_tokens(case.model, case.processor),
        )
        self.few = positions[::6] if self.gpu else positions
        self.table: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """The table, a line for each lever."""
        self.one_prompt_at_a_time()
        self.in_batches()
        self.our_decoder()
        self.from_the_parent()
        if self.gpu:
            self.several_candidates()
        return self.table

    def one_prompt_at_a_time(self) -> None:
        """Timed on some prompts; the whole by tokens, which is what takes time."""
        some = list(range(0, len(self.prompts), max(1, len(self.prompts) // 12)))

        def one_at_a_time() -> None:
            for i in some:
                generate_embedded(self.case, [self.prompts[i]], self.limits[i])

        if self.gpu:
            one_at_a_time()
        started = clock(self.case.device)
        one_at_a_time()
        seconds = clock(self.case.device) - started
        tokens = sum(self.limits[i] for i in some) if self.case.num_tokens else len(some)
        total = sum(self.limits) if self.case.num_tokens else len(self.prompts)
        self._note("clips encoded once, no copy of the model", seconds / tokens * total)

    def in_batches(self) -> None:
        """The library's `generate`."""
        halves = [range(i, min(i + 50, len(self.prompts))) for i in range(0, len(self.prompts), 50)]

        def generate_all() -> None:
            for half in halves:
                generate_embedded(self.case, [self.prompts[i] for i in half], max(self.limits[i] for i in half))

        self._add("all clips in batches of 50 (generate)", generate_all)

    def our_decoder(self) -> None:
        """Each candidate on its own, from the beginning."""
        self.parent = greedy(self.stepper, self.prompts, self.limits, 128)  # this also captures the graphs
        name = "our decoder: no padding, slots" + (", CUDA graphs" if self.gpu else ", ended rows leave")
        alone = [[i for i in range(self.count) if i != position] for position in self.few]
        self._add(
            name,
            lambda: [greedy(self.stepper, self.prompts, self.limits, 128, active) for active in alone],
            len(self.few),
        )

    def from_the_parent(self) -> None:
        """What a candidate has from its parent: the pass below its missing layer, and a draft."""
        every = [range(i, min(i + 128, len(self.prompts))) for i in range(0, len(self.prompts), 128)]
        for name, verify in (
            ("prefill below the missing layer shared", False),
            ("the parent's translation as a draft", True),
        ):
            traces = self._traced(every, verify)
            self._add(name, lambda traces=traces: self._without(traces, self.few, 1), len(self.few))
            del traces

    def several_candidates(self) -> None:
        """On a GPU: a step reads the weights, and then the prompts too, once for several candidates."""
        by_length = sorted(range(len(self.prompts)), key=lambda i: -len(self.parent[i]))
        traces = self._traced([block.tolist() for block in np.array_split(by_length, 8)], True)
        for name, most in (("several candidates in one batch", 0), ("a prompt read once for all of them", MOST_ROWS)):
            from_parent.MOST_ROWS = most
            self._add(name, lambda: self._without(traces, self.positions, len(self.positions)), len(self.positions))

    def _traced(self, blocks: Sequence[Sequence[int]], verify: bool) -> list[Trace]:
        kept = [tokens if verify else NO_DRAFT for tokens in self.parent]
        given = (self.prompts, kept, self.limits)
        return [
            trace(self.stepper.decoder, *([x[i] for i in block] for x in given), range(self.count), self.positions)
            for block in blocks
        ]

    def _without(self, traces: Sequence[Trace], gone: Sequence[int], group: int) -> None:
        for one in traces:
            room = self.stepper.room() // (sum(one.lengths) + sum(one.limits))
            size = max(1, min(group, room))
            for start in range(0, len(gone), size):
                translate_without(self.stepper, one, gone[start : start + size])

    def _add(self, name: str, work: Callable[[], Any], per: int = 1) -> None:
        if self.gpu:
            work()  # warm-up: PyTorch prepares attention for every new shape
        started = clock(self.case.device)
        work()
        self._note(name, (clock(self.case.device) - started) / per)

    def _note(self, name: str, seconds: float) -> None:
        self.table.append({"lever": name, "seconds": seconds})
        print(f"{seconds:9.2f} s  {name}", flush=True)
