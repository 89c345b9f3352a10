"""The chat prompt, and batches of it with the answer for training.

A prompt is the chat template's text with one audio placeholder, which stands for as many tokens as the clip has audio states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimlingual.data.sources import Clip
from trimlingual.models.qwen2_audio import num_audio_states
from trimlingual.recipe import TaskSettings

IGNORED = -100  # label of positions that do not count, PyTorch's default ignore_index
# Mel frames beyond a clip's last that its last audio state depends on: convolutions of width 3 and stride 1, then 2, see frame 2p + 2
# from position p, and the last valid position is at most half the last frame. The spectra of both are those of silence, or nearly.
CONTEXT_FRAMES = 2
FRAMES_MULTIPLE = 64  # 0.64 s, 16 audio states: few different shapes, and aligned ones, at little padding


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
        self.audio_token_id = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
        self.end_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._parts: dict[str, tuple[list[int], list[int]]] = {}

    def text(self, language: str) -> str:
        """The prompt as text, with one audio placeholder, ending where the answer begins."""
        conversation = [
            {"role": "system", "content": self.task.system_prompt},
            {
                "role": "user",
                "content": [
                    {"type": "audio", "audio_url": "clip"},
                    {"type": "text", "text": self.task.prompt_for(language)},
                ],
            },
        ]
        return self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    def parts(self, language: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the audio."""
        if language not in self._parts:
            ids = self.processor.tokenizer(self.text(language), add_special_tokens=False)["input_ids"]
            if ids.count(self.audio_token_id) != 1:
                raise ValueError(
                    f"the chat template yields {ids.count(self.audio_token_id)} audio placeholders for one clip; "
                    "expected 1: is the processor Qwen2-Audio's?"
                )
            at = ids.index(self.audio_token_id)
            self._parts[language] = (ids[:at], ids[at + 1 :])
        return self._parts[language]

    def prompt_ids(self, language: str, num_states: int) -> list[int]:
        """Token ids of the whole prompt with `num_states` audio placeholders."""
        before, after = self.parts(language)
        return [*before, *[self.audio_token_id] * num_states, *after]

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of the answer, with the end token that the model must learn to give."""
        return [*self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def log_mels(
    processor: Any, audio: Sequence[np.ndarray], whole_window: bool = False, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Log-mel spectra (N, mels, M) and their mask (N, M), as the processor makes them over its window but cut to what is needed.

    They are computed on `device`, in float32, and returned on the CPU.

    M is the longest clip's frames and the two that the encoder's convolutions see beyond it, rounded up to a multiple of
    FRAMES_MULTIPLE; what is left out is padding that the encoder masks. Values are those of the whole window: silence is the
    least value there is, so the maximum that a clip is normalised by is found within the clip. `whole_window`: M is the window's
    length, which transformers' own forward insists on. Raises ValueError for a clip longer than the window: it would be cut silently.
    """
    extractor = processor.feature_extractor
    longest = max(len(samples) for samples in audio)
    if longest > extractor.n_samples:
        raise ValueError(
            f"a clip of {longest / extractor.sampling_rate:.1f} s is longer than the model's window of "
            f"{extractor.n_samples / extractor.sampling_rate:.0f} s; split it, or drop it with data.too_long: drop"
        )
    num_frames = -(-longest // extractor.hop_length) + CONTEXT_FRAMES
    num_frames = -(-num_frames // FRAMES_MULTIPLE) * FRAMES_MULTIPLE
    num_samples = extractor.n_samples if whole_window else min(num_frames * extractor.hop_length, extractor.n_samples)
    features = extractor(
        list(audio),
        sampling_rate=extractor.sampling_rate,
        padding="max_length",
        max_length=num_samples,
        return_attention_mask=True,
        return_tensors="pt",
        device=str(device),
    )
    # A copy: NumPy aligns memory by 16 bytes, PyTorch by 64, and what a kernel gives may depend on it in its last bits.
    return features["input_features"].clone(), features["attention_mask"]


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
        return {"input_features": features, "feature_attention_mask": mask}, num_audio_states(mask.sum(-1)).tolist()
