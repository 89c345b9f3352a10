"""Score one candidate of the layer search: translate the selection set without a layer, and compare with the references.

What candidates share is done once: every clip is encoded once, every prompt embedded once, and within a round each candidate starts
from its parent's pass and translation (drafts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from trimlingual.audio import load_audio
from trimlingual.data import Split
from trimlingual.decode import embed_prompt, encode_clips, greedy, max_new_tokens, to_translation
from trimlingual.drafts import Trace, trace, translate_without
from trimlingual.layers import drop_layers_, without_layers
from trimlingual.lineage import Lineage
from trimlingual.loss import answer_loss
from trimlingual.metrics import corpus_score
from trimlingual.models import eos_token_ids
from trimlingual.plan import TOWERS
from trimlingual.progress import say
from trimlingual.prompts import Collator, Example, Prompter
from trimlingual.recipe import DecodeSettings, RankSettings, TaskSettings, Tower

TRACE_SHARE = 0.5  # of the memory that is free, a trace may take


class Scorer:
    """The model under search and what its candidates share.

    `present[tower]` are the original layers that stand in `model`: fewer than in `lineage` once rounds were fine-tuned.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        select: Split,
        task: TaskSettings,
        decode: DecodeSettings,
        settings: RankSettings,
        lineage: Lineage,
        present: dict[str, list[int]],
    ):
        self.model, self.processor, self.select, self.task = model, processor, select, task
        self.decode, self.settings, self.lineage, self.present = decode, settings, lineage, present
        self.signatures: dict[str, str] = {}
        self.prompter = Prompter(processor, task)
        self.eos = eos_token_ids(model, processor)
        self._share = settings.towers == "decoder"
        self._states: list[Tensor] | None = None
        self._tokens: dict[tuple[Tower, int], list[list[int]]] = {}  # this round's translations, by candidate
        self.begin_round({})

    def begin_round(self, removed: Mapping[Tower, Sequence[int]]) -> None:
        """Candidates from here on lack the original layers in `removed`, beside their own."""
        self.removed = {tower: list(removed.get(tower, ())) for tower in TOWERS}
        newest = {(t, layers[-1]) for t, layers in self.removed.items() if layers}
        kept = [tokens for candidate, tokens in self._tokens.items() if candidate in newest]
        self._parent_tokens = kept[0] if len(kept) == 1 and self._share else None
        self._tokens = {}
        self._trace: Trace | None = None

    def drop_(self, tower: Tower, layer: int) -> None:
        """Take an original layer out of the model for good; the model is about to be trained, so nothing that was shared holds."""
        drop_layers_(self.model, self._positions({tower: [layer]}))
        self.present = {t: [i for i in layers if (t, i) != (tower, layer)] for t, layers in self.present.items()}
        self._states, self._tokens = None, {}

    def candidates(self, lineage: Lineage) -> list[tuple[Tower, int]]:
        """(tower, original layer) that may still go."""
        found: list[tuple[Tower, int]] = []
        for tower in TOWERS:
            if self.settings.towers in (tower, "both"):
                layers = lineage.layers[tower]
                start, end = self.settings.protect_first, len(layers) - self.settings.protect_last
                kept = set(self.settings.protected) if tower == "decoder" else set()
                found += [(tower, layer) for layer in layers[start:end] if layer not in kept]
        return found

    def scores(self, candidate: tuple[Tower, int] | None) -> tuple[dict[str, float], int]:
        """Score by language (higher is better) of the model without the candidate's layer, and the number of runaways."""
        metrics = {language: self.settings.metric_for(language) for language in self.task.target_languages}
        scores, runaways = {}, 0
        tokens = self._translate(candidate) if set(metrics.values()) != {"loss"} else []
        for number, (language, metric) in enumerate(metrics.items()):
            if metric == "loss":
                scores[language] = -self._loss(candidate, language)
                continue
            rows = tokens[number :: len(metrics)]
            clips = self.select.clips
            done = [to_translation(self.prompter, c.id, language, ids, self.eos) for c, ids in zip(clips, rows)]
            references = [clip.references[language] for clip in clips]
            result = corpus_score(metric, [t.hypothesis for t in done], references, language)
            scores[language], self.signatures[language] = result.value, result.signature
            runaways += sum(t.truncated for t in done)
        return scores, runaways

    def examples(self, language: str) -> list[Example]:
        """The selection set with its references, for teacher-forced measures."""
        return [Example(i, c.id, language, c.references[language]) for i, c in enumerate(self.select.clips)]

    def _translate(self, candidate: tuple[Tower, int] | None) -> list[list[int]]:
        """Token ids of every clip in every language, clip by clip."""
        limits = [
            max_new_tokens(c.duration_s, self.decode) for c in self.select.clips for _ in self.task.target_languages
        ]
        if candidate and self._share:
            with without_layers(self.model, self._positions(self.removed)):
                traced = self._traced(limits)
                if traced:
                    standing = [i for i in self.present["decoder"] if i not in self.removed["decoder"]]
                    position = standing.index(candidate[1])
                    tokens = translate_without(self.model, traced, position, limits, self.eos)
                    self._tokens[candidate] = tokens
                    return tokens
        with without_layers(self.model, self._positions(self._gone(candidate))):
            return greedy(self.model, self._prompts(), limits, self.eos, self.decode.batch_size)

    def _traced(self, limits: Sequence[int]) -> Trace | None:
        """The parent's pass over its own translations; None, with a word, when it would not fit in memory."""
        if self._trace is None:
            prompts = self._prompts()
            parent = self._parent_tokens or greedy(self.model, prompts, limits, self.eos, self.decode.batch_size)
            needed, free = Trace.num_bytes(self.model, prompts, parent), _free_bytes(prompts[0].device)
            if needed > TRACE_SHARE * free:
                say(
                    f"  {needed / 1e9:.1f} GB for sharing the prefill, {free / 1e9:.1f} GB free: going on without sharing"
                )
                self._share = False
                return None
            self._trace = trace(self.model, prompts, parent, self.decode.batch_size)
        return self._trace

    def _prompts(self) -> list[Tensor]:
        if self._states is None or self.settings.towers != "decoder":  # the tower may be another than last time
            self._states = encode_clips(self.model, self.processor, self.select.clips, self.decode.batch_size)
        return [
            embed_prompt(self.model, self.prompter, states, language)
            for states in self._states
            for language in self.task.target_languages
        ]

    def _loss(self, candidate: tuple[Tower, int] | None, language: str) -> float:
        collator = Collator(self.prompter, lambda i: load_audio(self.select.clips[i].audio))
        with without_layers(self.model, self._positions(self._gone(candidate))):
            return answer_loss(self.model, collator, self.examples(language), self.decode.batch_size)

    def _gone(self, candidate: tuple[Tower, int] | None) -> dict[Tower, list[int]]:
        extra = {candidate[0]: [candidate[1]]} if candidate else {}
        return {tower: [*layers, *extra.get(tower, [])] for tower, layers in self.removed.items()}

    def _positions(self, gone: Mapping[Tower, Sequence[int]]) -> dict[Tower, list[int]]:
        """Positions in `model` of the given original layers, as far as they still stand there."""
        return {t: [self.present[t].index(i) for i in layers if i in self.present[t]] for t, layers in gone.items()}


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
