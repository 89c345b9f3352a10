"""Scores the actions of the search under a budget, by the loss of the model's own translations and by real ones of the selection set.

Layers that go are decoded together, as in the layer search. A part in fewer bits is rounded in place once, and translates all clips.
It goes on from its parent's pass: a block of the decoder from its layer, the head from the last one. Other embeddings change the
pass from the first layer on, so that it is run again over the prompts and the parent's translations, which stay the drafts. Since a
decoding step takes as long as reading the weights, a candidate of bits takes several blocks of clips at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from trimlingual.models.tree import lm_head, text_decoder
from trimlingual.search.actions import GONE, Action, layer_of
from trimlingual.search.allowed import Candidate
from trimlingual.search.from_parent import Trace, losses_changed, trace, translate_changed
from trimlingual.search.rounded import RoundedModel
from trimlingual.search.scorer import TRACE_SHARE, Scorer, Tally

BLOCKS_AT_ONCE = 4  # on a GPU


class BudgetScorer(Scorer):
    """Scores actions. `rounded` holds the model's weights as they ship."""

    rounded: RoundedModel
    answers: Mapping[int, list[list[int]]] | None = None  # what losses are of: clip -> one per language

    def loss(self, action: Action | None) -> dict[str, float]:
        """Loss of the answers per language, in nats per token, of the parent with this action done; None: of the parent."""
        found = {}
        for language, by_clip in self.answer_losses(action).items():
            nats, tokens = map(sum, zip(*by_clip.values()))
            found[language] = nats / tokens
        return found

    def answer_losses(self, action: Action | None) -> dict[str, dict[int, tuple[float, int]]]:
        """Per language and clip the loss of the answer, (nats, tokens), of the parent with this action done; None: of the parent."""
        every = range(len(self.select.clips))
        if action is None or action.bits == GONE:
            candidate = Candidate(*layer_of(action)) if action else None
            return {language: self._losses(candidate, every, language) for language in self.metrics}
        blocks = {language: self._with_reference(every, language) for language in self.metrics}
        traces = {language: self._trace(block, language) for language, block in blocks.items()}  # before weights change
        found = {}
        with self.rounded.tried(*action):
            for language, traced in traces.items():
                if traced is None or self._changes_input(action):
                    found[language] = self._losses(None, every, language)
                else:
                    nats = losses_changed(self._stepper.decoder, traced, self._position(action, traced))
                    found[language] = dict(zip(blocks[language], zip(nats, map(len, traced.drafts))))
        return found

    def languages(self, clip: int) -> list[str]:
        """All that are scored, by loss too: the clip is translated once at least, for the answers."""
        return self.select.clips[clip].languages([*self.metrics])

    def parent_tally(self, journal: Path | None = None) -> Tally:
        """As in any search. By loss it has translations where there are no answers yet, which are these from then on."""
        if self.translated:
            return super().parent_tally(journal)
        tally = Tally(self)
        if self.answers is None:
            self.answers = {clip: rows for block in self.blocks for clip, rows in self._translate(None, block).items()}
            tally.add(self.answers)
        tally.losses = self.answer_losses(None)
        return tally

    def prepare(self) -> None:
        """Run the parent over all clips: every translation starts from there. What was in memory before makes way for it."""
        self._stepper.release()
        self._traces = {}
        for block in self.blocks:
            self._trace(block)

    def tallies(self, actions: Sequence[Action]) -> list[Tally]:
        """Tallies of the parent with each of these done, one action or layers that go."""
        if actions[0].bits == GONE:
            return self._without([Candidate(*layer_of(action)) for action in actions])
        (action,) = actions
        return [self._changed(action)]

    def _without(self, layers: Sequence[Candidate]) -> list[Tally]:
        tallies = {layer: Tally(self) for layer in layers}
        for block in self.blocks:
            self.add(tallies, block)
        return [tallies[layer] for layer in layers]

    def _changed(self, action: Action) -> Tally:
        tally, lots = Tally(self), self._lots()
        traces = [self._traced(lot) for lot in lots]  # before the weights change
        with self.rounded.tried(*action):
            for lot, traced in zip(lots, traces):
                clips = [clip for block in lot for clip in block]
                if traced and self._changes_input(action):
                    traced = self._traced_anew(clips, traced)
                if traced is None:
                    tally.add(self._translate(None, clips))
                else:
                    rows = translate_changed(self._stepper, traced, self._position(action, traced))
                    self._count_accepted(traced.drafts, rows)
                    tally.add(self._by_clip(clips, rows))
        return tally

    def _position(self, action: Action, traced: Trace) -> int:
        """The layer of the model from which on a candidate of bits differs from its parent; for the head, the last one."""
        return self.present["decoder"].index(layer_of(action)[1]) if action.layer is not None else traced.active[-1]

    def _changes_input(self, action: Action) -> bool:
        """Whether other embeddings come into the first layer: they change, or they are the head's, which changes."""
        tied = text_decoder(self.model).embed_tokens.weight is lm_head(self.model).weight
        return action.part == "embeddings" or (tied and action.part == "lm_head")

    def _traced_anew(self, clips: Sequence[int], traced: Trace) -> Trace | None:
        """The pass over the same clips and drafts with the embeddings as they are now; None where memory does not allow it."""
        decoder, last = self._stepper.decoder, traced.active[-1:]
        prompts = self._prompts(clips)
        needed = Trace.num_bytes(decoder, len(traced.active), len(last), prompts, traced.drafts)
        if needed > TRACE_SHARE * decoder.free_bytes():
            return None
        return trace(decoder, prompts, traced.drafts, traced.limits, traced.active, last)

    def _traced(self, lot: Sequence[Sequence[int]]) -> Trace | None:
        """The parent's pass over some blocks; None where memory does not allow it."""
        traces = [self._trace(block) for block in lot]
        whole = [trace for trace in traces if trace is not None]
        return Trace.together(whole) if len(whole) == len(traces) else None

    def _lots(self) -> list[list[list[int]]]:
        """The blocks, so many at a time as are decoded together."""
        count = BLOCKS_AT_ONCE if self._stepper.decoder.device.type == "cuda" else 1
        return [self.blocks[start : start + count] for start in range(0, len(self.blocks), count)]

    def _answer(self, clip: int, language: str) -> list[int]:
        assert self.answers is not None
        return self.answers[clip][self.languages(clip).index(language)]

    def _may_change(self, active: Sequence[int]) -> list[int]:
        return list(active)
