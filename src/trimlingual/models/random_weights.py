"""Base models of the true shapes with random weights, for rehearsals: see memory, time and sizes before anything is paid for.

`random:qwen2-audio-7b` is a folder without weights: configuration, tokenizer and a mark. `load_model` draws the weights on the device,
always the same ones for a seed, a kind of device and a version of torch. The real tokenizer cannot be shipped, so the built-in
model's tokenizer and chat template stand in for it, with a feature extractor as large as the real one's; the model has all its rows,
but those beyond the tokenizer get a zero in lm_head, so that answers are text. Scores mean nothing, and a random model seldom ends an
answer: decoding runs to its bound, which makes times upper ones. Nothing it says is fit to learn from, so distillation passes
references on instead.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trimlingual.run.artifacts import fingerprint, write_json
from trimlingual.run.version import version as own_version

RANDOM = "random:"
MARK = "random.json"  # in a folder whose weights are drawn instead of read
SEED = 0
# Qwen2-Audio-7B-Instruct as published (its config.json), and a model of its form that a CPU runs in seconds.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-audio-7b": {
        "text": {
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 156032, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        },
        "audio": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        "mels": 128,
        "window_s": 30,
    },
    "qwen2-audio-tiny": {
        "text": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 2304, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        },
        "audio": {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128},
        "mels": 128,
        "window_s": 8,
    },
}  # fmt: skip


def random_base(name: str) -> Path:
    """Folder that stands for `random:...`, made in the user's cache if it is not there; ValueError lists the known names."""
    shape = name.removeprefix(RANDOM)
    if shape not in SHAPES:
        raise ValueError(f"{name!r} is not known; random models: {', '.join(RANDOM + known for known in SHAPES)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimlingual" / "random"
    made_by = {"trimlingual": own_version(), "transformers": version("transformers"), "settings": SHAPES[shape]}
    folder = cache / f"{shape}-{fingerprint('random', made_by, {})}"
    if is_random(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / shape
        _write(shape, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not is_random(folder):  # else another process was faster
                raise
    return folder


def _write(shape: str, folder: Path) -> None:
    from transformers import AutoProcessor, GenerationConfig, WhisperFeatureExtractor

    processor = AutoProcessor.from_pretrained(Path(__file__).parents[1] / "mini" / "model")
    settings = SHAPES[shape]
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=settings["mels"], chunk_length=settings["window_s"]
    )
    processor.save_pretrained(folder)
    tokenizer = processor.tokenizer
    config = random_config(shape, tokenizer)
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    weight_bytes = 2 * sum(parameter.numel() for parameter in _meta(config).parameters())
    mark = {"shape": shape, "seed": SEED, "num_tokens": len(tokenizer), "weight_bytes": weight_bytes}
    write_json(folder / MARK, mark)


def random_config(shape: str, tokenizer: Any, **text: Any) -> Any:
    """Configuration of a random model; `text` overrides sizes of the decoder, e.g. `num_hidden_layers=24`."""
    from transformers import Qwen2AudioConfig

    settings = SHAPES[shape]
    audio = {"num_mel_bins": settings["mels"], "max_source_positions": 50 * settings["window_s"], **settings["audio"]}
    decoder = {
        **settings["text"], **text, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **audio},
        text_config={"model_type": "qwen2", "tie_word_embeddings": False, **decoder},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen2AudioForConditionalGeneration"],
    )


def _meta(config: Any) -> Any:
    from transformers import Qwen2AudioForConditionalGeneration

    with torch.device("meta"):
        return Qwen2AudioForConditionalGeneration(config)


def is_random(folder: Path) -> bool:
    """Whether the folder's weights are to be drawn."""
    return (folder / MARK).is_file()


def random_weight_bytes(folder: Path) -> int:
    """Bytes the weights of such a folder would have on disk, in bfloat16; 0 for any other folder."""
    return json.loads((folder / MARK).read_text(encoding="utf-8"))["weight_bytes"] if is_random(folder) else 0


def draw(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a random folder, its weights drawn on `device` in bfloat16 and held in `dtype`."""
    from transformers import AutoConfig, GenerationConfig

    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    model = draw_config(AutoConfig.from_pretrained(folder), mark["num_tokens"], dtype, device, mark["seed"])
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@torch.no_grad()
def draw_config(config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device, seed: int = SEED) -> Any:
    """A random model of any configuration; rows of lm_head from `num_tokens` on are zero."""
    from transformers import Qwen2AudioForConditionalGeneration

    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.manual_seed(seed)
            model = Qwen2AudioForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.lm_head.weight[num_tokens:] = 0
    for parameter in model.parameters():  # not `model.to`: it would round the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    return model
