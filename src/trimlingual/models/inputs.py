"""The chat prompt, and batches of it with the answer for training.

A prompt has one audio placeholder, which stands for as many tokens as the clip has audio states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimlingual.data.sources import Clip
from trimlingual.models.family import family_of_processor
from trimlingual.recipe import TaskSettings

IGNORED = -100  # label of positions that do not count, PyTorch's default ignore_index


@dataclass(frozen=True)
class Example:
    """One training example: a clip and its translation into one language. `clip` indexes the run's list of clips."""

    clip: int
    clip_id: str
    language: str
    text: str


@dataclass(frozen=True)
class TrainingData:
    """What is trained on: clips, and the examples that are made of them."""

    clips: Sequence[Clip]
    examples: Sequence[Example]


class Prompter:
    """Token ids of prompts and answers for one processor and task."""

    def __init__(self, processor: Any, task: TaskSettings):
        self.processor = processor
        self.task = task
        self.family = family_of_processor(processor)
        self.audio_token_id = self.family.audio_token(processor)
        self.end_id = self.family.end_token(processor)
        self._parts: dict[str, tuple[list[int], list[int]]] = {}

    def parts(self, language: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the audio."""
        if language not in self._parts:
            self._parts[language] = self.family.prompt(
                self.processor, self.task.system_prompt, self.task.prompt_for(language)
            )
        return self._parts[language]

    def prompt_ids(self, language: str, num_states: int) -> list[int]:
        """Token ids of the whole prompt with `num_states` audio placeholders."""
        before, after = self.parts(language)
        return [*before, *[self.audio_token_id] * num_states, *after]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of the answer, with the end token that the model must learn to give."""
        ids = self.processor.tokenizer(text, add_special_tokens=False, **self.family.spelled_out)["input_ids"]
        return [*ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def log_mels(
    processor: Any, audio: Sequence[np.ndarray], whole_window: bool = False, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Log-mel spectra (N, mels, M) and their mask (N, M) of clips, cut to what the longest needs, or to the whole window.

    Where the model hears padding, all clips are as long as the window. They are computed on `device`, in float32, and returned on the
    CPU. Raises ValueError for a clip longer than the model's window.
    """
    family, rate = family_of_processor(processor), processor.feature_extractor.sampling_rate
    longest, window = max(map(len, audio)) / rate, family.window_s(processor)
    if longest > window:
        raise ValueError(
            f"a clip of {longest:.1f} s is longer than the model's window of {window:.0f} s; "
            "split it, or drop it with data.too_long: drop"
        )
    heard = [family.fill_up(processor, samples) for samples in audio]
    return family.features(processor, heard, whole_window, device)


class Collator:
    """Examples to a padded batch: prompt and answer, labels on the answer only, audio as log-mels or stored tower states."""

    def __init__(
        self,
        prompter: Prompter,
        load: Callable[[int], np.ndarray],
        states: Sequence[Tensor] | None = None,
        whole_window: bool = False,
        teacher: Mapping[Example, tuple[Tensor, Tensor]] | None = None,
        mels_on: torch.device | str = "cpu",
    ):
        self.prompter = prompter
        self.load = load
        self.states = states
        self.whole_window = whole_window
        # of each example the teacher's tokens and their log probabilities, both (answer tokens, K)
        self.teacher = teacher
        self.mels_on = mels_on  # the device that computes log-mels; the CPU where workers collate

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Batch with `ids` (for error messages), `input_ids`, `attention_mask`, `labels` (B, T) and the audio."""
        audio, num_states = self._audio(examples)
        rows, starts = [], []
        for example, count in zip(examples, num_states):
            prompt = self.prompter.prompt_ids(example.language, count)
            rows.append([*prompt, *self.prompter.answer_ids(example.text)])
            starts.append(len(prompt))
        width = max(map(len, rows))
        pad = self.prompter.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), width), pad)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for i, (row, start) in enumerate(zip(rows, starts)):  # right padding: causal attention never looks at it
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
            labels[i, start : len(row)] = torch.tensor(row[start:])
        ids = [f"{example.clip_id}:{example.language}" for example in examples]
        batch = {"ids": ids, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **audio}
        if self.teacher is not None:
            read = [self.teacher[example] for example in examples]
            batch["teacher_ids"] = torch.cat([tokens for tokens, _ in read])
            batch["teacher_log_probs"] = torch.cat([log_probs for _, log_probs in read])
        return batch

    def _audio(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], list[int]]:
        if self.states is not None:
            chosen = [self.states[example.clip] for example in examples]
            lengths = torch.tensor([len(states) for states in chosen])
            padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            return {"audio_states": padded, "audio_lengths": lengths}, lengths.tolist()
        audio = [self.load(example.clip) for example in examples]
        features, mask = log_mels(self.prompter.processor, audio, self.whole_window, self.mels_on)
        return {"input_features": features, "feature_attention_mask": mask}, self.prompter.family.num_states(
            mask.sum(-1)
        ).tolist()
