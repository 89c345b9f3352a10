"""Score candidates of the layer search: translate the selection set without a layer, and compare with the references.

What candidates share is done once: every clip is encoded once, every prompt embedded once, and within a round each candidate starts
from its parent's pass and translation (from_parent.py). Only a candidate that lacks a layer of the audio tower encodes anew, and is
decoded from the beginning. The selection set is worked through in blocks of clips, so that a candidate can be given up between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

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
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_, without_layers
from trimlingual.models.qwen2_audio import eos_token_ids
from trimlingual.recipe import TOWERS, RankSettings, SharedSettings, Tower
from trimlingual.run.artifacts import append_jsonl, read_journal
from trimlingual.run.lineage import Lineage
from trimlingual.run.progress import say
from trimlingual.search.bounds import best_possible, settled_counts
from trimlingual.search.from_parent import NO_DRAFT, Trace, losses, losses_without, trace, translate_without

MIN_ACCEPTED = 0.1  # of the drafts' tokens: below this, verifying them costs more than decoding from the beginning
TRACE_SHARE = 0.5  # of the memory that is free, what candidates share may take
ENCODE_BATCH = 32  # clips
GPU_BLOCK_ROWS = 13  # rows of a block: few, because it is decoded until its last row has ended
ROWS_IN_FLIGHT = 256  # on a GPU: up to here a decode step is bound by reading the weights


class Candidate(NamedTuple):
    """A layer that may go, by its index in the base model."""

    tower: Tower
    layer: int


class Tally:
    """What one candidate has given so far: translations and losses by clip, and the scores that follow."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer
        self.tokens: dict[int, list[list[int]]] = {}  # clip -> a translation for each translated language
        self.losses: dict[str, dict[int, tuple[float, int]]] = {}  # language -> clip -> (nats, tokens) of its reference
        self._counts = {language: counts.copy() for language, counts in scorer.empty_counts.items()}

    def add(self, tokens: Mapping[int, list[list[int]]]) -> None:
        """Take in the translations of some clips."""
        self.tokens.update(tokens)
        for language in self.scorer.translated:
            rows = {
                clip: row
                for clip, said in tokens.items()
                for spoken, row in zip(self.scorer.languages(clip), said)
                if spoken == language
            }
            if rows:
                texts = [self.scorer.prompter.decode(row) for row in rows.values()]
                references = [self.scorer.reference(clip, language) for clip in rows]
                metric = self.scorer.metrics[language]
                self._counts[language][list(rows)] = sentence_statistics(metric, texts, references, language).counts

    def scores(self) -> dict[str, float]:
        """Score by language on the clips so far, higher is better; a loss counts negative."""
        return {
            language: self.statistics(language).score() if metric != "loss" else self._negative_loss(language)
            for language, metric in self.scorer.metrics.items()
        }

    def statistics(self, language: str) -> SentenceStatistics:
        """Counts of the clips so far, in the clips' order; zeros for a clip without a reference in `language`."""
        counts = self._counts[language][sorted(self.tokens)]
        return SentenceStatistics(self.scorer.metrics[language], counts, self.scorer.signatures[language])

    def num_runaways(self) -> int:
        """Translations that ran into their bound."""
        return sum(ids[-1] not in self.scorer.eos for rows in self.tokens.values() for ids in rows)

    def bound(self, going: Mapping[tuple[int, int], list[int]] | None = None) -> float:
        """The best mean score that is still possible; `going` are unfinished translations, (clip, number of the language) -> tokens."""
        if len(self.scorer.translated) < len(self.scorer.metrics):
            return math.inf  # a loss has no bound
        bounds = []
        for number, language in enumerate(self.scorer.translated):
            metric, counts = self.scorer.metrics[language], self._counts[language]
            started = {clip: ids for (clip, n), ids in (going or {}).items() if n == number}
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
    """The model under search and what its candidates share.

    `present[tower]` are the original layers that stand in `model`: fewer than in `lineage` once rounds were fine-tuned.
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
        self.eos = eos_token_ids(model, processor)
        self.metrics = {language: settings.metric_for(language) for language in self.task.target_languages}
        self.translated = [language for language, metric in self.metrics.items() if metric != "loss"]
        self._sharing = settings.towers != "encoder"
        self._drafting, self._accepted, self._offered = True, 0, 0  # whether drafts are verified; tokens in this round
        self._states: dict[
            tuple[int, ...], dict[int, Tensor]
        ] = {}  # encoder layers that are gone -> clip -> its states
        self._stepper = Stepper(PackedDecoder(model), self.eos)
        self.begin_round({}, None)

    def _blocks(self) -> list[list[int]]:
        """Clips in blocks of like length, the longest first.

        On a GPU, where rows are not padded but a block is decoded until its last row has ended, it is the parent's translations that
        are of like length, as far as they are known.
        """
        on_gpu = self._stepper.decoder.device.type == "cuda"
        rows = GPU_BLOCK_ROWS if on_gpu else self.decode.batch_size
        clips = self.select.clips

        def length(clip: int) -> tuple[int, float, str]:
            tokens = max(map(len, self.parent.get(clip, [()]))) if on_gpu else 0
            return (-tokens, -clips[clip].duration_s, clips[clip].id)

        order = sorted(range(len(clips)), key=length)
        count = math.ceil(max(len(order), self._num_rows(order)) / rows)
        return (
            [block.tolist() for block in np.array_split(np.array(order), count)]
            if count < len(order)
            else [[c] for c in order]
        )

    @cached_property
    def empty_counts(self) -> dict[str, np.ndarray]:
        """Counts (N, K) by language of a translation of which nothing is known yet."""
        clips = range(len(self.select.clips))
        return {
            language: sentence_statistics(
                self.metrics[language], [""] * len(clips), [self.reference(c, language) for c in clips], language
            ).counts
            for language in self.translated
        }

    @cached_property
    def signatures(self) -> dict[str, str]:
        """sacreBLEU signature by language."""
        one = {language: [self.reference(0, language)] for language in self.translated}
        return {
            lang: sentence_statistics(self.metrics[lang], texts, texts, lang).signature for lang, texts in one.items()
        }

    def reference(self, clip: int, language: str) -> str:
        """Reference translation of the clip with this index; empty where it has none in `language`."""
        return self.select.clips[clip].references.get(language, "")

    def languages(self, clip: int) -> list[str]:
        """Those that the clip with this index is translated into, one row of the decoder for each."""
        return self.select.clips[clip].languages(self.translated)

    def _with_reference(self, block: Sequence[int], language: str) -> list[int]:
        return [clip for clip in block if language in self.select.clips[clip].references]

    def _num_rows(self, block: Sequence[int]) -> int:
        return sum(len(self.languages(clip)) for clip in block)

    def begin_round(self, removed: Mapping[Tower, Sequence[int]], parent: Mapping[int, list[list[int]]] | None) -> None:
        """Candidates from here on lack the original layers in `removed`, beside their own; `parent` are the translations without."""
        self.removed = {tower: list(removed.get(tower, ())) for tower in TOWERS}
        self.parent = dict(parent or {})
        self.blocks = self._blocks()
        if self._offered:
            self._drafting = self._accepted >= MIN_ACCEPTED * self._offered
        self._accepted = self._offered = 0
        self._traces: dict[tuple[tuple[int, ...], str | None], Trace] = {}

    def drop_(self, tower: Tower, layer: int) -> None:
        """Take an original layer out of the model for good; the model is about to be trained, so nothing that was shared holds."""
        drop_layers_(self.model, {tower: [self.present[tower].index(layer)]})
        self.present = {t: [i for i in layers if (t, i) != (tower, layer)] for t, layers in self.present.items()}
        self._stepper = Stepper(PackedDecoder(self.model), self.eos)
        self._states, self._traces = {}, {}

    def candidates(self, lineage: Lineage) -> list[Candidate]:
        """Layers that may still go."""
        found: list[Candidate] = []
        for tower in TOWERS:
            if self.settings.towers in (tower, "both"):
                layers = lineage.layers[tower]
                start, end = self.settings.protect_first, len(layers) - self.settings.protect_last
                kept = set(self.settings.protected) if tower == "decoder" else set()
                found += [Candidate(tower, layer) for layer in layers[start:end] if layer not in kept]
        return found

    def influence(self, candidate: Candidate) -> float:
        """Block Influence of a decoder layer in the parent's pass (see drafts.Trace); infinite where none is known."""
        language = None if self.translated else next(iter(self.metrics))
        if candidate.layer not in self.present[candidate.tower]:  # gone for good, in a round that is read again
            return math.inf
        block = self._with_reference(self.blocks[0], language) if language else self.blocks[0]
        traced = self._trace(block, language) if block and candidate.tower == "decoder" else None
        return traced.influence[self._position(candidate)] if traced else math.inf

    def add(
        self, tallies: Mapping[Candidate, Tally], block: Sequence[int], floor: float | None = None
    ) -> dict[Candidate, bool]:
        """Translate a block of clips without each candidate's layer and add that to its tally.

        False, with nothing added, for a candidate that is certain to stay below `floor` however the rest turns out.
        """
        done = dict.fromkeys(tallies, True)
        for candidate, tally in tallies.items():
            for language, metric in self.metrics.items():
                if metric == "loss":
                    tally.losses.setdefault(language, {}).update(self._losses(candidate, block, language))
            if self.translated and candidate.tower == "encoder":
                tally.add(self._translate(candidate, block))
        candidates = [candidate for candidate in tallies if candidate.tower == "decoder"]
        if not self.translated or not candidates:
            return done
        traced = self._trace(block)
        if traced is None:
            for candidate in candidates:
                tallies[candidate].add(self._translate(candidate, block))
            return done
        keys = [(clip, self.translated.index(language)) for clip in block for language in self.languages(clip)]
        size = self._batch(traced)

        def translate(group: Sequence[Candidate]) -> list[list[list[int]] | None]:
            def hopeless(index: int, rows: list[list[int]]) -> bool:
                return floor is not None and tallies[group[index]].bound(dict(zip(keys, rows))) < floor

            positions = [self._position(candidate) for candidate in group]
            return translate_without(self._stepper, traced, positions, hopeless if floor is not None else None)

        for start in range(0, len(candidates), size):
            group = candidates[start : start + size]
            for candidate, rows in zip(group, split_on_oom(translate, group)):
                done[candidate] = rows is not None
                if rows is not None:
                    tallies[candidate].add(self._by_clip(block, rows))
                    self._count(traced.drafts, rows)
        return done

    def _count(self, drafts: Sequence[list[int]], rows: Sequence[list[int]]) -> None:
        """Add up how many of the drafts' tokens were right."""
        if self._drafting:
            self._offered += sum(map(len, drafts))
            for draft, row in zip(drafts, rows):
                self._accepted += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft, row)))

    def parent_tally(self, journal: Path | None = None) -> Tally:
        """The round's parent on all clips. Parts go to `journal` as they are made, and those that stand there are not made again."""
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
        """Candidates that are decoded together: on a GPU a step costs little more for many rows, on a CPU as much for each."""
        if not self._sharing or self._stepper.decoder.device.type != "cuda":
            return 1
        return max(1, ROWS_IN_FLIGHT // max(1, *map(self._num_rows, self.blocks)))

    def _batch(self, traced: Trace) -> int:
        """How many candidates' rows memory holds at once."""
        prompts, slots = sum(traced.lengths), sum(traced.lengths) + sum(traced.limits)
        return max(1, min(self.group_size(), (self._stepper.room() - prompts) // slots))

    def _translate(self, candidate: Candidate | None, block: Sequence[int]) -> dict[int, list[list[int]]]:
        """Translations by clip, decoded from the beginning."""
        prompts = self._prompts(block, self.translated, candidate)
        rows = greedy(self._stepper, prompts, self._limits(block), self.decode.batch_size, self._active(candidate))
        return self._by_clip(block, rows)

    def _by_clip(self, block: Sequence[int], rows: Sequence[list[int]]) -> dict[int, list[list[int]]]:
        remaining = iter(rows)
        return {clip: list(islice(remaining, len(self.languages(clip)))) for clip in block}

    def _losses(self, candidate: Candidate | None, block: Sequence[int], language: str) -> dict[int, tuple[float, int]]:
        """Teacher-forced loss of each clip's reference: nats in all, and tokens."""
        block = self._with_reference(block, language)
        if not block:
            return {}
        answers = [self.prompter.answer_ids(self.reference(clip, language)) for clip in block]
        traced = self._trace(block, language) if candidate and candidate.tower == "decoder" else None
        if traced and candidate:
            sums = losses_without(self._stepper.decoder, traced, self._position(candidate))
        else:
            prompts = self._prompts(block, [language], candidate)
            sums = losses(self._stepper.decoder, prompts, answers, self._active(candidate))
        return {clip: (nats, len(answer)) for clip, nats, answer in zip(block, sums, answers)}

    def _trace(self, block: Sequence[int], language: str | None = None) -> Trace | None:
        """The parent's pass over the block and its own translations, or over the references in `language`; made once a round.

        None, with a word, where it would not fit in memory.
        """
        key = (tuple(block), language)
        if not self._sharing or key in self._traces:
            return self._traces.get(key)
        decoder = self._stepper.decoder
        prompts = self._prompts(block, [language] if language else self.translated)
        if language:
            limits = [0] * len(block)
            drafts = [self.prompter.answer_ids(self.reference(clip, language)) for clip in block]
        else:
            limits = self._limits(block)
            if any(clip not in self.parent for clip in block):
                self.parent.update(self._translate(None, block))
            drafts = [ids if self._drafting else NO_DRAFT for clip in block for ids in self.parent[clip]]
        active, allowed = self._active(None), self.candidates(self.lineage)
        positions = [p for p in active if Candidate("decoder", self.present["decoder"][p]) in allowed]
        needed = Trace.num_bytes(decoder, len(active), len(positions), prompts, drafts)
        free = decoder.free_bytes()
        if needed > TRACE_SHARE * free:
            say(
                f"  {needed / 1e9:.1f} GB for sharing the prefill, {free / 1e9:.1f} GB free: going on without, more slowly"
            )
            self._sharing, self._traces = False, {}
            return None
        self._traces[key] = trace(decoder, prompts, drafts, limits, active, positions)
        return self._traces[key]

    def _prompts(
        self, block: Sequence[int], languages: Sequence[str], candidate: Candidate | None = None
    ) -> list[Tensor]:
        states = self._encoded(block, candidate)
        return [
            embed_prompt(self.model, self.prompter, states[clip], language)
            for clip in block
            for language in self.select.clips[clip].languages(languages)
        ]

    def _encoded(self, block: Sequence[int], candidate: Candidate | None) -> dict[int, Tensor]:
        """Audio states by clip, of this block at least; kept for the round's tower (all clips at once) and one candidate's."""
        gone, shared = (tuple(sorted(self._gone(c, "encoder"))) for c in (candidate, None))
        states = self._states.get(gone, {})
        missing = [clip for clip in (block if gone != shared else range(len(self.select.clips))) if clip not in states]
        if missing:
            with without_layers(self.model, {"encoder": list(gone)}):
                clips = [self.select.clips[clip] for clip in missing]
                states |= dict(zip(missing, encode_clips(self.model, self.processor, clips, ENCODE_BATCH)))
            self._states = {key: value for key, value in self._states.items() if key == shared} | {gone: states}
        return states

    def _limits(self, block: Sequence[int]) -> list[int]:
        clips = self.select.clips
        return [max_new_tokens(clips[clip].duration_s, self.decode) for clip in block for _ in self.languages(clip)]

    def _active(self, candidate: Candidate | None) -> list[int]:
        """Positions of the decoder layers that are run."""
        gone = self._gone(candidate, "decoder")
        return [position for position in range(len(self.present["decoder"])) if position not in gone]

    def _gone(self, candidate: Candidate | None, tower: Tower) -> list[int]:
        """Positions in `model` of the layers of a tower that the candidate lacks, as far as they still stand there."""
        layers = [*self.removed[tower], *([candidate.layer] if candidate and candidate.tower == tower else [])]
        return [self.present[tower].index(layer) for layer in layers if layer in self.present[tower]]

    def _position(self, candidate: Candidate) -> int:
        return self.present[candidate.tower].index(candidate.layer)
