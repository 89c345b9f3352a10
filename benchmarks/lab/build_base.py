"""A Qwen2-Audio-shaped base from parts that others pretrained: Whisper-base's encoder and SmolLM2-135M's decoder.

    python benchmarks/lab/build_base.py --lab runs/lab --encoder whisper-base --decoder SmolLM2-135M

writes `runs/lab/untrained/`, a folder like any other Hugging Face model: the encoder as it is (10 s window), a new linear projector,
and the decoder's 30 layers. A Llama layer is a Qwen2 layer whose query, key and value biases are zero, so nothing of it is lost.
Embedding and head, tied in SmolLM2, are two tensors here, as in Qwen2-Audio. Training it is `trimlingual finetune` (base.yaml).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from trimlingual.models.saving import save_model

NUM_ROWS = 49_216  # 49,152 tokens, three for audio, and a multiple of 64
WINDOW_S = 10
AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
ENCODER = {
    "num_mel_bins": 80,
    "d_model": 512,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "max_source_positions": 50 * WINDOW_S,
}
# Qwen2-Audio's own conversation format, for one clip and one text.
CHAT_TEMPLATE = """\
{% set audio = namespace(number=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}{% set audio.number = audio.number + 1 %}Audio {{ audio.number }}: <|audio_bos|><|AUDIO|><|audio_eos|>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def load_encoder(source: str) -> dict[str, Tensor]:
    """Whisper's encoder weights under the names of transformers, float32: from a safetensors file, or a Whisper model by its Hub id."""
    if source.endswith(".safetensors"):
        weights = load_file(source)
    else:
        from transformers import WhisperModel

        weights = WhisperModel.from_pretrained(source).encoder.state_dict()
    weights = {name: tensor.float() for name, tensor in weights.items()}
    weights["embed_positions.weight"] = weights["embed_positions.weight"][: ENCODER["max_source_positions"]]
    return weights


def load_decoder(source: str) -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2: from a GGUF file, or by a Hub id."""
    if source.endswith(".gguf"):
        folder, file = str(Path(source).parent), Path(source).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def configuration(llama: Any, audio_token: int, pad: int, eos: int) -> Qwen2AudioConfig:
    """Qwen2-Audio with this encoder and the Llama model's shape."""
    theta = getattr(llama, "rope_parameters", None) or {"rope_theta": llama.rope_theta}
    text = {
        "model_type": "qwen2",
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_attention_heads": llama.num_attention_heads,
        "num_key_value_heads": llama.num_key_value_heads,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_theta": theta["rope_theta"],
        "vocab_size": NUM_ROWS,
        "max_position_embeddings": llama.max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": llama.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    audio = {"model_type": "qwen2_audio_encoder", **ENCODER}
    return Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=audio_token, tie_word_embeddings=False
    )


@torch.no_grad()
def assemble(encoder: dict[str, Tensor], llama: Any, tokenizer: Any) -> tuple[Any, Any]:
    """(model, processor). The new rows of the embedding are the mean of the others."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(AUDIO_TOKENS)})
    tokenizer.pad_token = tokenizer.unk_token
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    audio_token = tokenizer.convert_tokens_to_ids(AUDIO_TOKENS[0])
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        configuration(llama.config, audio_token, tokenizer.pad_token_id, eos)
    ).float()
    model.model.audio_tower.load_state_dict(encoder)
    rows = llama.model.embed_tokens.weight.float()
    table = torch.cat([rows, rows.mean(0, keepdim=True).expand(NUM_ROWS - len(rows), -1)])
    theirs = {name: tensor.float() for name, tensor in llama.model.state_dict().items()}
    ours = model.model.language_model.state_dict()
    for name, tensor in ours.items():
        if name == "embed_tokens.weight":
            tensor.copy_(table)
        elif name in theirs:
            tensor.copy_(theirs[name])
        else:
            assert name.endswith("bias"), name
            tensor.zero_()
    model.lm_head.weight.copy_(table)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear.weight, std=0.02)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    extractor = WhisperFeatureExtractor(feature_size=ENCODER["num_mel_bins"], chunk_length=WINDOW_S)
    return model, Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True)
    parser.add_argument("--encoder", default="openai/whisper-base", help="Hub id, or a safetensors file of the encoder")
    parser.add_argument(
        "--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, or a GGUF file of the model"
    )
    args = parser.parse_args()
    out = args.lab / "untrained"
    if (out / "config.json").is_file():
        print("the untrained base is there")
        return
    model, processor = assemble(load_encoder(args.encoder), *load_decoder(args.decoder))
    save_model(model, processor, out, "float32")
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
