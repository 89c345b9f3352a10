"""The mini model itself: tokenizer, processor, architecture, and a forward pass made for training.

The model is a `Qwen2AudioForConditionalGeneration` like the 7B original, only about a thousand times smaller, so every
stage of the pipeline meets the same module names, chat template and file layout as with the real one. All linear layers
have in_features divisible by 64 and out_features divisible by 32, which is what 4-bit nf4 needs on a CPU.

The forward pass here differs from the library's in cost only, and `train.check_against_transformers` proves it:

* the encoder runs on the frames that a batch needs, not on the whole 8 s window (the rest is masked there anyway);
* both target languages share one sequence: prompt and audio once, then a German and a Chinese branch that cannot see
  each other and start from the same position. Encoder and prompt are thus computed once per clip, not twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

SYSTEM_PROMPT = "You are a professional translator."
INSTRUCTIONS = {"de": "Translate the English speech into German:", "zh": "Translate the English speech into Chinese:"}
LANGUAGES = tuple(INSTRUCTIONS)
WINDOW_S = 8
HOP = 160
VOCABULARY = 2048  # a multiple of 32, special tokens included, so that lm_head can be quantised too
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")

# The conversation format Qwen2-Audio was trained with (ChatML, and "Audio N:" before each clip), in our own words.
CHAT_TEMPLATE = """\
{%- set seen = namespace(clips=0) -%}
{%- if messages[0].role != "system" -%}
  {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
  {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == "audio" or "audio" in part or "audio_url" in part -%}
        {%- set seen.clips = seen.clips + 1 -%}
        {{- "Audio " ~ seen.clips ~ ": <|audio_bos|><|AUDIO|><|audio_eos|>\\n" -}}
      {%- elif "text" in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""


def messages_for(language: str) -> list[dict]:
    """The conversation that asks for one translation; the clip itself goes to the processor as `audio=`."""
    instruction = {"type": "text", "text": INSTRUCTIONS[language]}
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": [{"type": "audio"}, instruction]},
    ]


def train_processor(texts: Sequence[str]) -> Qwen2AudioProcessor:
    """A byte-level BPE of Qwen2's kind, learned on the translations, inside a Qwen2-Audio processor with an 8 s window.

    The prompts are counted as if they stood before every twentieth sentence, so that each of their words becomes one
    token: they are read with every clip, and the base model spends as much on a prompt token as on an audio token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [f"system\n{SYSTEM_PROMPT}\nuser\nAudio 1: \n{text}\nassistant\n" for text in INSTRUCTIONS.values()]
    bpe.train_from_iterator([*texts, *prompts * max(20, len(texts) // 40)], trainer)
    tokenizer = _qwen2_tokenizer(bpe)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_S)
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def _qwen2_tokenizer(bpe: Tokenizer) -> Qwen2Tokenizer:
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        padding_side="left",
        model_max_length=1024,
    )
    # <|endoftext|> and <|im_end|> are there by now as pad and eos; this adds the rest and marks all as special.
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


def build_model(processor: Qwen2AudioProcessor, vocabulary: int = VOCABULARY) -> Qwen2AudioForConditionalGeneration:
    """The architecture, freshly initialised (see `_initialise`)."""
    tokenizer = processor.tokenizer
    text = Qwen2Config(
        vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, use_sliding_window=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=80, d_model=192, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=768,
        max_source_positions=WINDOW_S * 50,
    )  # fmt: skip
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
    )
    _initialise(model)
    return model


def _initialise(model: Qwen2AudioForConditionalGeneration) -> None:
    """Weights scaled by fan-in, and sinusoids as encoder positions.

    The library draws everything with a deviation of 0.02, meant for widths of a thousand and more. At width 192 the
    convolutions would then whisper below the position signal, and the first few hundred steps would go into growing
    the weights. Residual outputs are damped by depth as in GPT-2. Positions are Whisper's sinusoids, not trained.
    """
    tower, language_model = model.model.audio_tower, model.model.language_model
    depth = {"encoder": len(tower.layers), "decoder": len(language_model.layers)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1.0
            if name.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
                gain = (2 * depth["encoder" if "audio_tower" in name else "decoder"]) ** -0.5
            elif name.endswith(("lm_head", "multi_modal_projector.linear")):
                gain = 0.3  # quiet logits at the start; audio states as loud as the token embeddings below
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(language_model.embed_tokens.weight, std=0.3)
    positions, width = tower.embed_positions.weight.shape
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(positions)[:, None] * rates[None, :]
    with torch.no_grad():
        tower.embed_positions.weight.copy_(torch.cat([angles.sin(), angles.cos()], dim=1))


class LogMel(nn.Module):
    """`WhisperFeatureExtractor` for a batch on any device: same window, filters, logarithm and per-clip floor."""

    window: Tensor
    filters: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(extractor.n_fft))
        self.register_buffer("filters", torch.tensor(extractor.mel_filters, dtype=torch.float32).T.contiguous())

    def forward(self, waves: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(waves.device.type, enabled=False):  # a power spectrum has no place in bf16
            spectrum = torch.stft(waves, len(self.window), HOP, window=self.window, return_complex=True)
            mel = self.filters @ spectrum[..., :-1].abs().square()
            log = mel.clamp(min=1e-10).log10()
            return (torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


def spec_augment(mel: Tensor, bands: int = 2, band_width: int = 12, gaps: int = 2, gap_frames: int = 15) -> Tensor:
    """Blank a few mel bands and short gaps of every clip (SpecAugment without warping; Park et al. 2019)."""
    clips, bins, frames = mel.shape
    hidden = torch.zeros(clips, bins, frames, dtype=torch.bool, device=mel.device)
    for count, widest, size, shape in ((bands, band_width, bins, (1, -1, 1)), (gaps, gap_frames, frames, (1, 1, -1))):
        place = torch.arange(size, device=mel.device).view(shape)
        for _ in range(count):
            width = torch.randint(0, widest + 1, (clips, 1, 1), device=mel.device)
            start = (torch.rand(clips, 1, 1, device=mel.device) * (size - width)).long()
            hidden |= (place >= start) & (place < start + width)
    return mel.masked_fill(hidden, 0.0)


def feature_frames(samples: np.ndarray) -> np.ndarray:
    """Log-mel frames of clips with so many samples, as the processor counts them."""
    return -(-samples // HOP)


def audio_tokens(frames: np.ndarray) -> np.ndarray:
    """<|AUDIO|> positions for so many frames: a stride-2 convolution, then pairs averaged."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def encode(tower: Qwen2AudioEncoder, mel: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder states before the pooling (50 a second; the CTC head reads them) and after it, as the tower returns them.

    `mel` may be shorter than the window if every clip is followed by at least four frames of padding: further than
    that the two convolutions do not look.
    """
    gelu = nn.functional.gelu
    states = gelu(tower.conv2(gelu(tower.conv1(mel)))).permute(0, 2, 1)
    states = states + tower.embed_positions.weight[: states.shape[1]]
    valid = torch.arange(states.shape[1], device=mel.device) < ((frames - 1) // 2 + 1)[:, None]
    for layer in tower.layers:
        states = layer(states, valid[:, None, None, :])
    pooled = tower.avg_pooler(states.permute(0, 2, 1)).permute(0, 2, 1)
    return states, tower.layer_norm(pooled)


@dataclass(frozen=True)
class Packed:
    """Clips ready for `decode`: one row a clip, holding the prompt, the audio and one branch per language."""

    ids: Tensor  # (clips, length)
    positions: Tensor
    branches: Tensor  # 0 shared, 1.. one per language, -1 padding
    target_index: Tensor  # where, in the flattened rows, an answer token is predicted
    targets: Tensor
    audio_start: int
    longest_audio: int

    def to(self, device: torch.device) -> Packed:
        """Copied without making the host wait for the device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Packed(
            move(self.ids), move(self.positions), move(self.branches), move(self.target_index), move(self.targets),
            self.audio_start, self.longest_audio,
        )  # fmt: skip


class Packer:
    """Lays out rows. The prompt's halves come from the chat template, so that training sees what inference sends."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        self._tokenizer = processor.tokenizer
        self.audio_id = self._tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        prompts = [
            processor.apply_chat_template(messages_for(language), add_generation_prompt=True) for language in LANGUAGES
        ]
        halves = [prompt.split("<|AUDIO|>") for prompt in prompts]
        (self.head,) = {tuple(self.tokens(before)) for before, _ in halves}
        self.tails = [self.tokens(after) for _, after in halves]

    def tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, text: str) -> list[int]:
        return [*self.tokens(text), self._tokenizer.eos_token_id]

    def text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def pack(self, num_audio: Sequence[int], answers: Sequence[Sequence[list[int]]], pad_to: int = 32) -> Packed:
        """`answers` holds, per clip, one token list per language. Rows are padded on the right to a multiple of `pad_to`.

        A few fixed lengths keep the allocator and the kernels from meeting a new shape at every step.
        """
        longest = 0
        for audio, clip_answers in zip(num_audio, answers):
            branch_tokens = sum(len(tail) + len(answer) for tail, answer in zip(self.tails, clip_answers))
            longest = max(longest, len(self.head) + audio + branch_tokens)
        length = -(-longest // pad_to) * pad_to
        ids = np.full((len(answers), length), self._tokenizer.pad_token_id, np.int64)
        positions, branches = np.zeros_like(ids), np.full_like(ids, -1)
        index: list[np.ndarray] = []
        for row, (audio, clip_answers) in enumerate(zip(num_audio, answers)):
            shared = len(self.head) + audio
            ids[row, : len(self.head)] = self.head
            ids[row, len(self.head) : shared] = self.audio_id
            positions[row, :shared] = np.arange(shared)
            branches[row, :shared] = 0
            end = shared
            for number, (tail, answer) in enumerate(zip(self.tails, clip_answers), start=1):
                start, end = end, end + len(tail) + len(answer)
                ids[row, start:end] = tail + answer
                positions[row, start:end] = np.arange(shared, shared + end - start)
                branches[row, start:end] = number
                index.append(row * length + np.arange(start + len(tail) - 1, end - 1))
        flat = np.concatenate(index)
        targets = torch.from_numpy(ids.reshape(-1)[flat + 1])
        rows = torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(branches)
        return Packed(rows[0], rows[1], rows[2], torch.from_numpy(flat), targets, len(self.head), max(num_audio))


def decode(
    model: Qwen2AudioForConditionalGeneration,
    packed: Packed,
    audio_states: Tensor,
    num_audio: Tensor,
    keep: Sequence[bool],
) -> Tensor:
    """Logits at `packed.target_index`. `keep` says which decoder layers run (LayerDrop; all True otherwise)."""
    language_model = model.model.language_model
    embedded = language_model.embed_tokens(packed.ids)
    start, count = packed.audio_start, packed.longest_audio
    projected = model.model.multi_modal_projector(audio_states[:, :count])
    is_audio = (torch.arange(count, device=projected.device) < num_audio[:, None])[..., None]
    window = torch.where(is_audio, projected.to(embedded.dtype), embedded[:, start : start + count])
    states = torch.cat([embedded[:, :start], window, embedded[:, start + count :]], dim=1)

    branch = packed.branches
    causal = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool, device=branch.device).tril()
    # A padded query still sees the shared part, so no row of the softmax is empty.
    visible = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    rotary = language_model.rotary_emb(states, packed.positions)
    for layer, kept in zip(language_model.layers, keep, strict=True):
        if kept:
            states = layer(states, attention_mask=visible[:, None], position_embeddings=rotary)
    states = language_model.norm(states)
    return model.lm_head(states.reshape(-1, states.shape[-1])[packed.target_index])
