"""Scores of the mini model, and proofs that its training path is the plain library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from tools.mini import network
from tools.mini.build_speech import MAX_CLIP_S
from tools.mini.material import WINDOW, Speech, say
from tools.mini.network import LANGUAGES, LogMel, Packer
from tools.mini.speech import SAMPLE_RATE, TEST_ONLY_VOICE


@torch.inference_mode()
def translate(
    model: Qwen2AudioForConditionalGeneration,
    packer: Packer,
    log_mel: LogMel,
    speech: Speech,
    language: str,
    max_new_tokens: int,
    chunk: int = 160,
) -> list[str]:
    """Greedy translations of all clips through the library's own `generate`; only the log-mels are made here."""
    device, tail = speech.samples.device, packer.tails[LANGUAGES.index(language)]
    texts: list[str] = []
    for start in range(0, len(speech.sentences), chunk):
        chosen = np.arange(start, min(start + chunk, len(speech.sentences)))
        frames = network.feature_frames(np.minimum(speech.lengths[chosen], WINDOW))
        prompts = [[*packer.head, *[packer.audio_id] * int(count), *tail] for count in network.audio_tokens(frames)]
        width = max(map(len, prompts))
        pad = model.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        heard = torch.arange(WINDOW // network.HOP) < torch.from_numpy(frames)[:, None]
        output = model.generate(
            input_ids=ids,
            attention_mask=real,
            input_features=log_mel(speech.waves(chosen, WINDOW)),
            feature_attention_mask=heard.long().to(device),
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


@torch.inference_mode()
def check_against_transformers(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, speech: Speech, clips: int = 3
) -> dict[str, float]:
    """Log-mels and logits of the training path must be those of the plain library, in fp32 on the CPU."""
    packer, log_mel = Packer(processor), LogMel(processor.feature_extractor)
    chosen = np.argsort(speech.lengths)[[0, len(speech.lengths) // 2, -1]][:clips]
    chosen = chosen[speech.lengths[chosen] <= MAX_CLIP_S * SAMPLE_RATE]
    frames = network.feature_frames(speech.lengths[chosen])
    waves = [speech.waves(chosen[[row]], int(speech.lengths[row_id]))[0].numpy() for row, row_id in enumerate(chosen)]
    mel = log_mel(speech.waves(chosen, WINDOW))
    theirs = processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    mel_gap = float((mel - theirs).abs().max())

    answers = [[packer.answer(getattr(speech.sentences[i], language)) for language in LANGUAGES] for i in chosen]
    num_audio = network.audio_tokens(frames)
    packed = packer.pack(num_audio.tolist(), answers)
    shortened = -(-(int(frames.max()) + 4) // 4) * 4
    _, states = network.encode(model.model.audio_tower, mel[..., :shortened], torch.from_numpy(frames))
    everything = [True] * len(model.model.language_model.layers)
    ours = network.decode(model, packed, states, torch.from_numpy(num_audio), everything)
    logit_gap, start = 0.0, 0
    for row, clip_answers in enumerate(answers):
        for language, answer in zip(LANGUAGES, clip_answers):
            prompt = processor.apply_chat_template(network.messages_for(language), add_generation_prompt=True)
            text = prompt + getattr(speech.sentences[chosen[row]], language) + network.END_OF_TURN
            inputs = processor(text=text, audio=waves[row], sampling_rate=SAMPLE_RATE, return_tensors="pt")
            plain = model(**inputs).logits[0, -len(answer) - 1 : -1]
            logit_gap = max(logit_gap, float((ours[start : start + len(answer)] - plain).abs().max()))
            start += len(answer)
    if mel_gap > 1e-3 or logit_gap > 1e-3:
        raise RuntimeError(f"training and inference disagree: log-mel by {mel_gap:.2g}, logits by {logit_gap:.2g}")
    return {"log_mel": mel_gap, "logits": logit_gap}


@torch.inference_mode()
def check_saved(folder: Path, speech: Speech, max_new_tokens: int, clips: int = 3) -> bool:
    """What a user does (AutoProcessor, from_pretrained, generate; here on the CPU) against `translate`, same weights."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    few = Speech(speech.samples.cpu(), speech.offsets[: clips + 1], speech.sentences[:clips], speech.voices[:clips])
    waves = [few.waves(np.array([row]), int(few.lengths[row]))[0].numpy() for row in range(clips)]
    same = True
    for language in LANGUAGES:
        prompt = processor.apply_chat_template(network.messages_for(language), add_generation_prompt=True)
        audio = {"audio": waves, "sampling_rate": SAMPLE_RATE}
        inputs = processor(text=[prompt] * clips, **audio, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
        plain = processor.batch_decode(output, skip_special_tokens=True)
        ours = translate(model, Packer(processor), LogMel(processor.feature_extractor), few, language, max_new_tokens)
        same &= [text.strip() for text in plain] == ours
    return same
