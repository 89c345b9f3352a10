"""Score candidates of the layer search: translate the selection set without a layer, and compare with the references.

Work that candidates have in common is done once. Every clip is encoded once, and within a round every candidate starts from its
parent's forward pass and translations (from_parent.py). A candidate that lacks a layer of the audio tower is the exception: for it
the clips are encoded anew and decoded from the beginning.

The selection set is cut into blocks of clips. After each block a candidate that can no longer win is given up.

A clip is named by its index in the selection set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trimlingual.data.splits import Split
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import (
    CPU_BATCH,
    embed_prompt,
    encode_clips,
    greedy,
    max_new_tokens,
    split_on_oom,
)
from trimlingual.evaluation.quality import SentenceStatistics, sentence_statistics
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_, without_layers
from trimlingual.recipe import TOWERS, RankSettings, SharedSettings, Tower
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.lineage import Lineage
from trimlingual.run.processes import num_processes
from trimlingual.run.progress import say
from trimlingual.search.allowed import Candidate, may_go
from trimlingual.search.bounds import best_possible, settled_counts
from trimlingual.search.from_parent import NO_DRAFT, Trace, losses, losses_without, trace, translate_without
from trimlingual.search.sharing import ROWS_IN_FLIGHT, gpu_block_rows

MIN_ACCEPTED = 0.1  # share of the drafts' tokens that are right; below, verifying drafts costs more than it saves
TRACE_SHARE = 0.5  # of the free memory may be taken by a trace
ENCODE_BATCH = 32  # clips


class Tally:
    """The translations and losses of one candidate so far, and its scores."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.tokens: dict[int, list[list[int]]] = {}  # clip -> one translation per language (Scorer.languages)
        self.losses: dict[str, dict[int, tuple[float, int]]] = {}  # language -> clip -> (nats, tokens)
        self._counts = {language: counts.copy() for language, counts in scorer.empty_counts.items()}

    def add(self, tokens: Mapping[int, list[list[int]]]) -> None:
        """Add the translations of some clips."""
        self.tokens.update(tokens)
        for language in self.scorer.translated:
            rows = {
                clip: row
                for clip, translations in tokens.items()
                for row_language, row in zip(self.scorer.languages(clip), translations)
                if row_language == language
            }
            if rows:
                texts = [self.scorer.prompter.decode(row) for row in rows.values()]
                references = [self.scorer.reference(clip, language) for clip in rows]
                metric = self.scorer.metrics[language]
                self._counts[language][list(rows)] = sentence_statistics(metric, texts, references, language).counts

    def scores(self) -> dict[str, float]:
        """Score per language on the clips so far. Higher is better: of a loss, the negative mean per token."""
        return {
            language: self.statistics(language).score() if metric != "loss" else self._negative_loss(language)
            for language, metric in self.scorer.metrics.items()
        }

    def statistics(self, language: str) -> SentenceStatistics:
        """N-gram counts of the clips so far, in the clips' order. A clip without a reference in `language` has zeros."""
        counts = self._counts[language][sorted(self.tokens)]
        return SentenceStatistics(self.scorer.metrics[language], counts, self.scorer.signatures[language])

    def num_runaways(self) -> int:
        """How many translations reached the bound on new tokens before they ended."""
        return sum(ids[-1] not in self.scorer.eos for rows in self.tokens.values() for ids in rows)

    def bound(self, unfinished: Mapping[tuple[int, int], list[int]] | None = None) -> float:
        """The best mean score that this candidate can still reach.

        `unfinished` are translations under way: (clip, number of the language) -> tokens so far.
        """
        if len(self.scorer.translated) < len(self.scorer.metrics):
            return math.inf  # a loss has no bound
        bounds = []
        for number, language in enumerate(self.scorer.translated):
            metric, counts = self.scorer.metrics[language], self._counts[language]
            started = {clip: ids for (clip, n), ids in (unfinished or {}).items() if n == number}
            if started:
                prefixes = [self.scorer.prompter.decode(ids) for ids in started.values()]
                references = [self.scorer.reference(clip, language) for clip in started]
                counts = counts.copy()
                counts[list(started)] = settled_counts(metric, prefixes, references, language)
            finished = np.zeros(len(counts), dtype=bool)
            finished[list(self.tokens)] = True
            bounds.append(best_possible(metric, counts, finished))
        return sum(bounds) / len(bounds)

    def _negative_loss(self, language: str) -> float:
        sums = self.losses[language].values()
        return -sum(loss for loss, _ in sums) / sum(count for _, count in sums)


class Scorer:
    """The model under search, and the work that its candidates have in common.

    `lineage` says which layers the search began with. `present[tower]` are the layers that `model` has now, as layers of the base
    model. They are fewer than in `lineage` if the model is fine-tuned between rounds, because then a layer is removed for good.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        select: Split,
        shared: SharedSettings,
        settings: RankSettings,
        lineage: Lineage,
        present: dict[str, list[int]],
    ):
        self.model, self.processor, self.select = model, processor, select
        self.task, self.decode = shared.task, shared.decode
        self.settings, self.lineage, self.present = settings, lineage, present
        self.prompter = Prompter(processor, self.task)
        self.eos = family_of(model).end_tokens(model, processor)
        self.metrics = {language: settings.metric_for(language) for language in self.task.target_languages}
        self.translated = [language for language, metric in self.metrics.items() if metric != "loss"]
        self._sharing = settings.towers != "encoder"
        self._drafting = True  # whether the parent's translations are drafts
        self._num_drafted, self._num_accepted = 0, 0  # tokens of this round's drafts, and how many of them were right
        # Layers of the audio tower that are left out -> clip -> its states.
        self._states: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self._stepper = Stepper(PackedDecoder(model), self.eos)
        self.begin_round({}, None)

    def _blocks(self) -> list[list[int]]:
        """The clips in blocks of similar length, the longest first.

        On a GPU the length is that of the parent's translation, as far as it is known: rows are not padded there, and a block takes
        as long as its longest answer. On a CPU it is that of the audio.
        """
        on_gpu = self._stepper.decoder.device.type == "cuda"
        rows = self._gpu_block_rows() if on_gpu else self.decode.batch_size
        clips = self.select.clips

        def length(clip: int) -> tuple[int, float, str]:
            num_tokens = max(map(len, self.parent.get(clip, ())), default=0) if on_gpu else 0
            return (-num_tokens, -clips[clip].duration_s, clips[clip].id)

        order = sorted(range(len(clips)), key=length)
        count = math.ceil(max(len(order), self._num_rows(order)) / rows)
        return (
            [block.tolist() for block in np.array_split(np.array(order), count)]
            if count < len(order)
            else [[c] for c in order]
        )

    def _gpu_block_rows(self) -> int:
        return gpu_block_rows(len(self.candidates(self.lineage.without(self.removed))), num_processes())

    @cached_property
    def empty_counts(self) -> dict[str, np.ndarray]:
        """N-gram counts (N clips, K) per language of translations of which nothing is known yet."""
        clips = range(len(self.select.clips))
        return {
            language: sentence_statistics(
                self.metrics[language], [""] * len(clips), [self.reference(c, language) for c in clips], language
            ).counts
            for language in self.translated
        }

    @cached_property
    def signatures(self) -> dict[str, str]:
        """sacreBLEU signature per language."""
        one = {language: [self.reference(0, language)] for language in self.translated}
        return {
            lang: sentence_statistics(self.metrics[lang], texts, texts, lang).signature for lang, texts in one.items()
        }

    def reference(self, clip: int, language: str) -> str:
        """Reference translation of a clip; empty if it has none in `language`."""
        return self.select.clips[clip].references.get(language, "")

    def languages(self, clip: int) -> list[str]:
        """The languages that a clip is translated into; the decoder has one row for each."""
        return self.select.clips[clip].languages(self.translated)

    def _answer(self, clip: int, language: str) -> list[int]:
        """What a loss is of: the tokens of the clip's reference."""
        return self.prompter.answer_ids(self.reference(clip, language))

    def _with_reference(self, block: Sequence[int], language: str) -> list[int]:
        return [clip for clip in block if language in self.select.clips[clip].references]

    def _num_rows(self, block: Sequence[int]) -> int:
        return sum(len(self.languages(clip)) for clip in block)

    def begin_round(self, removed: Mapping[Tower, Sequence[int]], parent: Mapping[int, list[list[int]]] | None) -> None:
        """Begin a round whose candidates lack the layers `removed` and one more.

        `parent` are the translations of the model without `removed`, as far as they are known: clip -> one translation per
        language.
        """
        self.removed: dict[str, list[int]] = {tower: list(removed.get(tower, ())) for tower in TOWERS}
        self.parent = dict(parent or {})
        self.blocks = self._blocks()
        if self._num_drafted:
            self._drafting = self._num_accepted >= MIN_ACCEPTED * self._num_drafted
        self._num_accepted = self._num_drafted = 0
        self._traces: dict[tuple[tuple[int, ...], str | None], Trace] = {}

    def drop_(self, tower: Tower, layer: int) -> None:
        """Remove a layer of the base model from `model`, and forget what was computed: the model is trained next."""
        drop_layers_(self.model, {tower: [self.present[tower].index(layer)]})
        self.present = {t: [i for i in layers if (t, i) != (tower, layer)] for t, layers in self.present.items()}
        self._stepper = Stepper(PackedDecoder(self.model), self.eos)
        self._states, self._traces = {}, {}

    def candidates(self, lineage: Lineage) -> list[Candidate]:
        """The layers in `lineage` that may go."""
        return may_go(self.settings, lineage.layers)

    def influence(self, candidate: Candidate) -> float:
        """Block Influence of a decoder layer in the parent (see `Trace`), on the first block; infinite where it is not known."""
        language = None if self.translated else next(iter(self.metrics))
        if candidate.layer not in self.present[candidate.tower]:  # removed for good; the round comes from the journal
            return math.inf
        block = self._with_reference(self.blocks[0], language) if language else self.blocks[0]
        traced = self._trace(block, language) if block and candidate.tower == "decoder" else None
        return traced.influence[self._layer_index(candidate)] if traced else math.inf

    def add(
        self, tallies: Mapping[Candidate, Tally], block: Sequence[int], floor: float | None = None
    ) -> dict[Candidate, bool]:
        """Translate a block of clips with each candidate and add the translations to its tally.

        Per candidate, whether it was added. False is for a candidate that was given up, because it is certain to stay below
        `floor`.
        """
        added = dict.fromkeys(tallies, True)
        for candidate, tally in tallies.items():
            for language, metric in self.metrics.items():
                if metric == "loss":
                    tally.losses.setdefault(language, {}).update(self._losses(candidate, block, language))
            if self.translated and candidate.tower == "encoder":
                tally.add(self._translate(candidate, block))
        candidates = [candidate for candidate in tallies if candidate.tower == "decoder"]
        if not self.translated or not candidates:
            return added
        traced = self._trace(block)
        if traced is None:
            for candidate in candidates:
                tallies[candidate].add(self._translate(candidate, block))
            return added
        keys = [(clip, self.translated.index(language)) for clip in block for language in self.languages(clip)]
        size = self._group_size_in_memory(traced)

        def translate(group: Sequence[Candidate]) -> list[list[list[int]] | None]:
            def hopeless(index: int, rows: list[list[int]]) -> bool:
                return floor is not None and tallies[group[index]].bound(dict(zip(keys, rows))) < floor

            layers = [self._layer_index(candidate) for candidate in group]
            return translate_without(self._stepper, traced, layers, hopeless if floor is not None else None)

        for start in range(0, len(candidates), size):
            group = candidates[start : start + size]
            for candidate, rows in zip(group, split_on_oom(translate, group)):
                added[candidate] = rows is not None
                if rows is not None:
                    tallies[candidate].add(self._by_clip(block, rows))
                    self._count_accepted(traced.drafts, rows)
        return added

    def _count_accepted(self, drafts: Sequence[list[int]], rows: Sequence[list[int]]) -> None:
        """Count the drafts' tokens, and those up to the first that was wrong."""
        if self._drafting:
            self._num_drafted += sum(map(len, drafts))
            for draft, row in zip(drafts, rows):
                self._num_accepted += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, row)))

    def parent_tally(self, journal: Path | None = None) -> Tally:
        """The tally of the round's parent on all clips. Each part is written to `journal`; parts found there are not made again."""
        tally = Tally(self)
        known = {tuple(record["clips"]): record for record in (read_journal(journal) if journal else ())}
        size = CPU_BATCH if self._stepper.decoder.device.type == "cpu" else len(self.select.clips)
        for part in (block[start : start + size] for block in self.blocks for start in range(0, len(block), size)):
            record = known.get(tuple(part))
            if record is None:
                by_loss = [language for language, metric in self.metrics.items() if metric == "loss"]
                record = {
                    "clips": list(part),
                    "tokens": self._translate(None, part) if self.translated else {},
                    "losses": {language: self._losses(None, part, language) for language in by_loss},
                }
                if journal:
                    append_jsonl(journal, record)
            for language, sums in record["losses"].items():
                tally.losses.setdefault(language, {}).update({int(clip): tuple(pair) for clip, pair in sums.items()})
            if record["tokens"]:
                tally.add({int(clip): rows for clip, rows in record["tokens"].items()})
        return tally

    def group_size(self) -> int:
        """How many candidates are decoded together. On a GPU a step takes hardly longer with more rows; on a CPU it does."""
        if not self._sharing or self._stepper.decoder.device.type != "cuda":
            return 1
        return max(1, ROWS_IN_FLIGHT // max(1, *map(self._num_rows, self.blocks)))

    def _group_size_in_memory(self, traced: Trace) -> int:
        """`group_size`, or as many candidates as the memory for keys and values allows."""
        prompts, slots = sum(traced.lengths), sum(traced.lengths) + sum(traced.limits)
        return max(1, min(self.group_size(), (self._stepper.room() - prompts) // slots))

    def _translate(self, candidate: Candidate | None, block: Sequence[int]) -> dict[int, list[list[int]]]:
        """Translations of a block, decoded from the beginning: clip -> one translation per language. No candidate: the parent's."""
        prompts = self._prompts(block, candidate)
        rows = greedy(self._stepper, prompts, self._limits(block), self.decode.batch_size, self._active(candidate))
        return self._by_clip(block, rows)

    def _by_clip(self, block: Sequence[int], rows: Sequence[list[int]]) -> dict[int, list[list[int]]]:
        remaining = iter(rows)
        return {clip: list(islice(remaining, len(self.languages(clip)))) for clip in block}

    def _losses(self, candidate: Candidate | None, block: Sequence[int], language: str) -> dict[int, tuple[float, int]]:
        """Teacher-forced loss of each clip's `_answer`: clip -> (sum in nats, tokens). No candidate: the parent's."""
        block = self._with_reference(block, language)
        if not block:
            return {}
        answers = [self._answer(clip, language) for clip in block]
        traced = self._trace(block, language) if candidate and candidate.tower == "decoder" else None
        if traced and candidate:
            sums = losses_without(self._stepper.decoder, traced, self._layer_index(candidate))
        else:
            prompts = self._prompts(block, candidate, language)
            sums = losses(self._stepper.decoder, prompts, answers, self._active(candidate))
        return {clip: (nats, len(answer)) for clip, nats, answer in zip(block, sums, answers)}

    def _trace(self, block: Sequence[int], language: str | None = None) -> Trace | None:
        """The parent's pass over a block's prompts and translations, or over its references in `language`. Made once per round.

        None if it would not fit in memory, which is said once, or if an earlier one did not; and for clips that are not translated,
        because their only reference is in a language that is scored by its loss.
        """
        key = (tuple(block), language)
        if not self._sharing or key in self._traces:
            return self._traces.get(key)
        decoder = self._stepper.decoder
        prompts = self._prompts(block, language=language)
        if not prompts:
            return None
        if language:
            limits = [0] * len(block)
            drafts = [self._answer(clip, language) for clip in block]
        else:
            limits = self._limits(block)
            if any(clip not in self.parent for clip in block):
                self.parent.update(self._translate(None, block))
            drafts = [ids if self._drafting else NO_DRAFT for clip in block for ids in self.parent[clip]]
        active = self._active(None)
        may_go = self._may_change(active)
        needed = Trace.num_bytes(decoder, 0 if language else len(active), len(may_go), prompts, drafts)
        free = decoder.free_bytes()
        if needed > TRACE_SHARE * free:
            say(
                f"  {needed / 1e9:.1f} GB for sharing the prefill, {free / 1e9:.1f} GB free: going on without, more slowly"
            )
            self._sharing, self._traces = False, {}
            return None
        self._traces[key] = trace(decoder, prompts, drafts, limits, active, may_go, for_losses=bool(language))
        return self._traces[key]

    def _may_change(self, active: Sequence[int]) -> list[int]:
        """The layers in which a candidate of this round can differ from the parent: a trace keeps their inputs."""
        allowed = self.candidates(self.lineage)
        return [i for i in active if Candidate("decoder", self.present["decoder"][i]) in allowed]

    def _prompts(
        self, block: Sequence[int], candidate: Candidate | None = None, language: str | None = None
    ) -> list[Tensor]:
        """Prompts of a block's clips in every language that they are translated into, or in one."""
        states = self._encoded(block, candidate)
        return [
            embed_prompt(self.model, self.prompter, states[clip], each)
            for clip in block
            for each in ([language] if language else self.languages(clip))
        ]

    def _encoded(self, block: Sequence[int], candidate: Candidate | None) -> dict[int, Tensor]:
        """Audio states per clip, of this block's clips at least.

        Kept are the states of the parent's tower, for all clips at once, and of one candidate's tower.
        """
        left_out, of_parent = (tuple(sorted(self._left_out(c, "encoder"))) for c in (candidate, None))
        states = self._states.get(left_out, {})
        clips_needed = block if left_out != of_parent else range(len(self.select.clips))
        missing = [clip for clip in clips_needed if clip not in states]
        if missing:
            with without_layers(self.model, {"encoder": list(left_out)}):
                clips = [self.select.clips[clip] for clip in missing]
                states |= dict(zip(missing, encode_clips(self.model, self.processor, clips, ENCODE_BATCH)))
            self._states = {key: value for key, value in self._states.items() if key == of_parent} | {left_out: states}
        return states

    def _limits(self, block: Sequence[int]) -> list[int]:
        clips = self.select.clips
        return [max_new_tokens(clips[clip].duration_s, self.decode) for clip in block for _ in self.languages(clip)]

    def _active(self, candidate: Candidate | None) -> list[int]:
        """Indices in `model` of the decoder layers that the candidate runs."""
        left_out = self._left_out(candidate, "decoder")
        return [layer for layer in range(len(self.present["decoder"])) if layer not in left_out]

    def _left_out(self, candidate: Candidate | None, tower: Tower) -> list[int]:
        """Indices in `model` of the tower's layers that the candidate lacks. Layers that were removed for good have none."""
        layers = [*self.removed[tower], *([candidate.layer] if candidate and candidate.tower == tower else [])]
        return [self.present[tower].index(layer) for layer in layers if layer in self.present[tower]]

    def _layer_index(self, candidate: Candidate) -> int:
        """Index of the candidate's layer in `model`."""
        return self.present[candidate.tower].index(candidate.layer)
