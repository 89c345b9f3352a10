"""Scores the actions of the search under a budget, by real translations of the selection set.

Layers that go are decoded together, as in the layer search. A part in fewer bits is rounded in place once, and translates all clips.
It goes on from its parent's pass: a block of the decoder from its layer, the head from the last one. Other embeddings change the
pass from the first layer on, so that it is run again over the prompts and the parent's translations, which stay the drafts. Since a
decoding step takes as long as reading the weights, a candidate of bits takes several blocks of clips at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimlingual.models.tree import lm_head, text_decoder
from trimlingual.search.actions import GONE, Action, layer_of
from trimlingual.search.allowed import Candidate
from trimlingual.search.from_parent import Trace, trace, translate_changed
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import TRACE_SHARE, Scorer, Tally

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
        traces = [self._traced(lot) for lot in lots]  # before the weights change
        with self.rounded.tried(*action):
            for lot, traced in zip(lots, traces):
                clips = [clip for block in lot for clip in block]
                if traced and self._changes_input(action):
                    traced = self._traced_anew(clips, traced)
                if not self._add_changed(action, tally, clips, traced, floor):
                    return None
        return tally

    def _changes_input(self, action: Action) -> bool:
        """Whether other embeddings come into the first layer: they change, or they are the head's, which changes."""
        tied = text_decoder(self.model).embed_tokens.weight is lm_head(self.model).weight
        return action.part == "embeddings" or (tied and action.part == "lm_head")

    def _traced_anew(self, clips: Sequence[int], traced: Trace) -> Trace | None:
        """The pass over the same clips and drafts with the embeddings as they are now; None where memory does not allow it."""
        decoder, last = self._stepper.decoder, traced.active[-1:]
        prompts = self._prompts(clips, self.translated)
        needed = Trace.num_bytes(decoder, len(traced.active), len(last), prompts, traced.drafts)
        if needed > TRACE_SHARE * decoder.free_bytes():
            return None
        return trace(decoder, prompts, traced.drafts, traced.limits, traced.active, last)

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
            in_a_layer = action.layer is not None
            position = self.present["decoder"].index(layer_of(action)[1]) if in_a_layer else traced.active[-1]
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
