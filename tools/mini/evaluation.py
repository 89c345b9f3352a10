"""Scores of the mini model, and proofs that its training path is the plain library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoProcessor

from tools.mini import network
from tools.mini.blueprint import HOP, Blueprint
from tools.mini.build_speech import MAX_CLIP_S
from tools.mini.material import Speech, say
from tools.mini.network import LogMel, Packer
from tools.mini.speech import SAMPLE_RATE, TEST_ONLY_VOICE
from tools.mini.tokens import INSTRUCTIONS, LANGUAGES, SYSTEM_PROMPT
from trimlingual.exports.proof_script import model_inputs


@torch.inference_mode()
def translate(
    model: Any,
    packer: Packer,
    log_mel: LogMel,
    speech: Speech,
    language: str,
    max_new_tokens: int,
    chunk: int = 160,
) -> list[str]:
    """Greedy translations of all clips through the library's own `generate`; only the log-mels are made here."""
    device, tail, blueprint = speech.samples.device, packer.tails[LANGUAGES.index(language)], packer.blueprint
    texts: list[str] = []
    for start in range(0, len(speech.sentences), chunk):
        chosen = np.arange(start, min(start + chunk, len(speech.sentences)))
        frames = network.feature_frames(np.minimum(speech.lengths[chosen], blueprint.window))
        prompts = [[*packer.head, *[packer.audio_id] * int(count), *tail] for count in blueprint.num_states(frames)]
        width = max(map(len, prompts))
        pad = model.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        mel = log_mel(speech.waves(chosen, blueprint.window))
        output = model.generate(
            input_ids=ids,
            attention_mask=real,
            **blueprint.model_arguments(mel, torch.from_numpy(frames)),
            max_new_tokens=max_new_tokens,
        )
        texts.extend(packer.text(row) for row in output[:, width:].tolist())
    return texts


def scores(hypotheses: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """BLEU (characters for Chinese), chrF and chrF++. sacreBLEU takes lists of unequal length silently: hence the check."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} translations for {len(references)} references")
    metrics = {
        "bleu": BLEU(tokenize="zh" if language == "zh" else "13a"),
        "chrf": CHRF(),
        "chrf++": CHRF(word_order=2),
    }
    return {name: round(metric.corpus_score(hypotheses, [references]).score, 2) for name, metric in metrics.items()}


def evaluate(translate_all: Callable[[str], list[str]], speech: Speech, label: str) -> dict:
    """Scores by language and domain, and within a domain by whether training knows the voice."""
    result: dict = {}
    for language in LANGUAGES:
        hypotheses = translate_all(language)
        references = [getattr(sentence, language) for sentence in speech.sentences]
        unknown = np.array([voice.name == TEST_ONLY_VOICE.name for voice in speech.voices])
        domains = np.array([sentence.domain for sentence in speech.sentences])
        for domain in sorted(set(domains)):
            groups = {"all": domains == domain, "known voices": (domains == domain) & ~unknown,
                      "unknown voice": (domains == domain) & unknown}  # fmt: skip
            for group, member in groups.items():
                rows = np.flatnonzero(member)
                if len(rows) == 0:
                    continue
                score = scores([hypotheses[i] for i in rows], [references[i] for i in rows], language)
                result.setdefault(language, {}).setdefault(domain, {})[group] = {"clips": len(rows), **score}
            whole = result[language][domain]["all"]
            say(f"{label}  {language} {domain}: BLEU {whole['bleu']}  chrF {whole['chrf']}  chrF++ {whole['chrf++']}")
        say(f"    heard  {speech.sentences[-1].en}\n    wrote  {hypotheses[-1]}\n    wanted {references[-1]}")
    return result


def plain_inputs(blueprint: Blueprint, processor: Any, wave: np.ndarray, language: str) -> Any:
    """What plain transformers is given for one clip."""
    family = blueprint.family
    return model_inputs(
        processor, family.conversation(SYSTEM_PROMPT, INSTRUCTIONS[language]), wave, family.chat_reads_audio
    )


@torch.inference_mode()
def check_against_transformers(
    model: Any, packer: Packer, processor: Any, speech: Speech, clips: int = 3
) -> dict[str, float]:
    """Log-mels and logits of the training path must be those of the plain library, in fp32 on the CPU."""
    blueprint, log_mel = packer.blueprint, LogMel(processor.feature_extractor)
    chosen = np.argsort(speech.lengths)[[0, len(speech.lengths) // 2, -1]][:clips]
    chosen = chosen[speech.lengths[chosen] <= MAX_CLIP_S * SAMPLE_RATE]
    frames = network.feature_frames(speech.lengths[chosen])
    waves = [speech.waves(chosen[[row]], int(speech.lengths[row_id]))[0].numpy() for row, row_id in enumerate(chosen)]
    mel = log_mel(speech.waves(chosen, blueprint.window))
    theirs = processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    mel_gap = float((mel - theirs).abs().max())

    answers = [[packer.answer(getattr(speech.sentences[i], language)) for language in LANGUAGES] for i in chosen]
    num_audio = blueprint.num_states(frames)
    packed = packer.pack(num_audio.tolist(), answers)
    shortened = blueprint.padded(int(speech.lengths[chosen].max())) // HOP
    _, states = blueprint.encode(model, mel[..., :shortened], torch.from_numpy(frames))
    everything = [True] * len(model.model.language_model.layers)
    ours = network.decode(model, packed, states, torch.from_numpy(num_audio), everything)
    logit_gap, start = 0.0, 0
    for row, clip_answers in enumerate(answers):
        for language, answer in zip(LANGUAGES, clip_answers):
            inputs = plain_inputs(blueprint, processor, waves[row], language)
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            forced = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            plain = model(**forced).logits[0, -len(answer) - 1 : -1]
            logit_gap = max(logit_gap, float((ours[start : start + len(answer)] - plain).abs().max()))
            start += len(answer)
    if mel_gap > 1e-3 or logit_gap > 1e-3:
        raise RuntimeError(f"training and inference disagree: log-mel by {mel_gap:.2g}, logits by {logit_gap:.2g}")
    return {"log_mel": mel_gap, "logits": logit_gap}


@torch.inference_mode()
def check_saved(blueprint: Blueprint, folder: Path, speech: Speech, max_new_tokens: int, clips: int = 3) -> bool:
    """What a user does (AutoProcessor, from_pretrained, generate; here on the CPU) against `translate`, same weights."""
    processor = AutoProcessor.from_pretrained(folder)
    model = blueprint.family.transformers_class.from_pretrained(folder, dtype=torch.float32).eval()
    few = Speech(speech.samples.cpu(), speech.offsets[: clips + 1], speech.sentences[:clips], speech.voices[:clips])
    waves = [few.waves(np.array([row]), int(few.lengths[row]))[0].numpy() for row in range(clips)]
    packer, log_mel = Packer(blueprint, processor), LogMel(processor.feature_extractor)
    same = True
    for language in LANGUAGES:
        plain = []
        for wave in waves:
            inputs = plain_inputs(blueprint, processor, wave, language)
            output = model.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
            plain.append(packer.text(output.tolist()))
        same &= plain == translate(model, packer, log_mel, few, language, max_new_tokens)
    return same
