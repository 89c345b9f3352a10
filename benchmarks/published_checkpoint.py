"""The published checkpoint: what its files and its tokenizer hold, and whether those at hand do (two parts of real_checkpoint.py)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trimlingual.data.audio import SAMPLE_RATE
from trimlingual.models.inputs import Prompter
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.models.qwen2_audio import FAMILY
from trimlingual.recipe import TaskSettings

CONFIG = {
    "model_type": "qwen2_audio", "vocab_size": 156032, "audio_token_index": 151646, "text_config.model_type": "qwen2",
    "text_config.vocab_size": 156032, "text_config.hidden_size": 4096, "text_config.num_hidden_layers": 32,
    "text_config.num_attention_heads": 32, "text_config.num_key_value_heads": 32, "text_config.intermediate_size": 11008,
    "audio_config.d_model": 1280, "audio_config.encoder_layers": 32, "audio_config.encoder_attention_heads": 20,
    "audio_config.encoder_ffn_dim": 5120, "audio_config.num_mel_bins": 128, "audio_config.max_source_positions": 1500,
}  # fmt: skip


GENERATION = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1, "pad_token_id": 151643,
    "eos_token_id": [151643, 151645],
}  # fmt: skip


WINDOW = {"feature_size": 128, "sampling_rate": 16000, "n_samples": 480000, "hop_length": 160, "n_fft": 400}


TOKENS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|AUDIO|>": 151646, "<|audio_bos|>": 151647,
    "<|audio_eos|>": 151648,
}  # fmt: skip


PREFIXES = ("audio_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")


PROMPT = (
    "<|im_start|>system\nYou are a professional translator.<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "Translate the English speech into {language}:<|im_end|>\n<|im_start|>assistant\n"
)


def check_files(kit: Any) -> None:
    """Configuration, names and shapes of the weights."""
    folder = resolve_base(kit.options.model)
    if folder.parent.name == "snapshots":
        kit.line("commit on the Hub", "any; recorded", folder.name, None)
    # what is not written is the default of the class
    config = _config(folder)
    for path, expected in CONFIG.items():
        kit.same(f"config.json {path}", expected, _value(config, path))
    generation = read_json(folder / "generation_config.json")
    for key, expected in GENERATION.items():
        found = generation.get(key)
        kit.same(f"generation_config.json {key}", expected, sorted(found) if isinstance(found, list) else found)
    extractor = read_json(folder / "preprocessor_config.json") or read_json(folder / "processor_config.json").get(
        "feature_extractor", {}
    )
    for key, expected in WINDOW.items():
        kit.same(f"feature extractor {key}", expected, extractor.get(key))
    tensors = stored_tensors(folder)
    shards = len(list(folder.glob("*.safetensors")))
    kit.same("files of weights", 5, shards)
    kit.same("tensors", 876, len(tensors))
    odd = sorted(name for name in tensors if not name.startswith(PREFIXES) or ".model.model." in name)
    kit.same("tensors under other names than the published ones", [], odd[:10])
    kit.same("parameters", 8_397_094_912, sum(math.prod(shape) for _, shape in tensors.values()))
    kit.same("types of the weights", {"BF16": 876}, dict(Counter(dtype for dtype, _ in tensors.values())))
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        kit.same(f"shape of {name}", [156032, 4096], list(tensors.get(name, ("", ()))[1]))


def check_tokens(kit: Any) -> None:
    """Ids, the chat template, and that our prompt is the processor's own."""
    processor = load_processor(resolve_base(kit.options.model))
    tokenizer = processor.tokenizer
    for token, expected in TOKENS.items():
        kit.same(f"id of {token}", expected, tokenizer.convert_tokens_to_ids(token))
    kit.line("tokens of the tokenizer", "about 153,400; the model has 156,032 rows", len(tokenizer), None)
    kit.same("pad token", "<|endoftext|>", tokenizer.pad_token)
    kit.same("longest clip, seconds", 30.0, processor.feature_extractor.n_samples / SAMPLE_RATE)
    task = TaskSettings(target_languages=kit.options.languages)
    prompter = Prompter(processor, task)
    clip = np.zeros(2 * SAMPLE_RATE, np.float32)
    for language in kit.options.languages:
        text = FAMILY.chat(processor, task.system_prompt, task.prompt_for(language))
        kit.same(f"prompt, {language}", PROMPT.replace("{language}", task.language_name(language)), text)
        theirs = processor(text=[text], audio=[clip], sampling_rate=SAMPLE_RATE, return_tensors="np")["input_ids"][0]
        states = int((theirs == prompter.audio_token_id).sum())
        kit.same(f"audio states of 2 s, {language}", 50, states)
        ours = prompter.prompt_ids(language, states)
        kit.line(
            f"our prompt's ids are the processor's, {language}",
            True,
            ours == theirs.tolist(),
            ours == theirs.tolist(),
        )
        kit.line(f"ids of the prompt, {language}", "recorded", [i for i in ours if i != prompter.audio_token_id], None)
    answer = "Guten Morgen, 早上好。"
    kit.same("an answer comes back from its ids", answer, prompter.decode(prompter.answer_ids(answer)[:-1]))


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every stored tensor by name, from the heads of the safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: (t["dtype"], tuple(t["shape"])) for name, t in head.items() if name != "__metadata__"}
    return found


def _config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    return {
        **config,
        **{key: value for key, value in read_json(folder / "config.json").items() if not isinstance(value, dict)},
    }


def _value(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
