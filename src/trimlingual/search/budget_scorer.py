"""Scores the actions of the search under a budget, by real translations of the selection set.

Layers that go are decoded together, as in the layer search. A part in fewer bits is rounded in place once, and translates all clips;
in the decoder it goes on from its parent's pass. Since a decoding step takes as long as reading the weights, such a candidate takes
several blocks of clips at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimlingual.recipe import ROW_PARTS
from trimlingual.search.actions import GONE, Action, layer_of
from trimlingual.search.allowed import Candidate
from trimlingual.search.from_parent import Trace, translate_changed
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import Scorer, Tally

BLOCKS_AT_ONCE = 4  # on a GPU; all at once would leave none after which a candidate can be given up


class BudgetScorer(Scorer):
    """Scores actions. `rounded` holds the model's weights as they ship."""

    rounded: RoundedModel

    def prepare(self) -> None:
        """Run the parent over all clips: every candidate starts from there. What earlier batches had in memory makes way for it."""
        self._stepper.release()
        for block in self.blocks:
            self._trace(block)

    def tallies(self, actions: Sequence[Action], floor: float | None) -> list[Tally | None]:
        """Tallies of the parent with each of these done, one action or layers that go; None where `floor` is out of reach."""
        if actions[0].bits == GONE:
            return self._without([Candidate(*layer_of(action)) for action in actions], floor)
        (action,) = actions
        return [self._changed(action, floor)]

    def _without(self, layers: Sequence[Candidate], floor: float | None) -> list[Tally | None]:
        tallies = {layer: Tally(self) for layer in layers}
        left = dict(tallies)
        for block in self.blocks:
            added = self.add(left, block, floor) if left else {}
            left = {c: t for c, t in left.items() if added[c] and (floor is None or t.bound() >= floor)}
        return [left.get(layer) for layer in layers]

    def _changed(self, action: Action, floor: float | None) -> Tally | None:
        tally, lots = Tally(self), self._lots()
        in_a_layer = action.part not in ROW_PARTS
        traces = [self._traced(lot) if in_a_layer else None for lot in lots]  # before the weights change
        with self.rounded.tried(*action):
            for lot, traced in zip(lots, traces):
                if not self._add_changed(action, tally, [clip for block in lot for clip in block], traced, floor):
                    return None
        return tally

    def _traced(self, lot: Sequence[Sequence[int]]) -> Trace | None:
        """The parent's pass over some blocks; None where memory does not allow it."""
        traces = [self._trace(block) for block in lot]
        whole = [trace for trace in traces if trace is not None]
        return Trace.together(whole) if len(whole) == len(traces) else None

    def _add_changed(
        self, action: Action, tally: Tally, clips: Sequence[int], traced: Trace | None, floor: float | None
    ) -> bool:
        """Add the translations of some clips, while the action is done; False where it is given up."""
        keys = [(clip, self.translated.index(language)) for clip in clips for language in self.languages(clip)]

        def hopeless(_number: int, rows: list[list[int]]) -> bool:
            return floor is not None and tally.bound(dict(zip(keys, rows))) < floor

        if traced is None:
            tally.add(self._translate(None, clips))
        else:
            position = self.present["decoder"].index(layer_of(action)[1])
            rows = translate_changed(self._stepper, traced, position, hopeless if floor is not None else None)
            if rows is None:
                return False
            self._count_accepted(traced.drafts, rows)
            tally.add(self._by_clip(clips, rows))
        return floor is None or tally.bound() >= floor

    def _lots(self) -> list[list[list[int]]]:
        """The blocks, so many at a time as are decoded together."""
        count = BLOCKS_AT_ONCE if self._stepper.decoder.device.type == "cuda" else 1
        return [self.blocks[start : start + count] for start in range(0, len(self.blocks), count)]

    def _may_change(self, active: Sequence[int]) -> list[int]:
        return list(active)
