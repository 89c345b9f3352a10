"""Load, save and take apart audio-language models: the only place that knows where a family keeps its parts.

In memory (transformers 5) Qwen2-Audio holds `model.audio_tower`, `model.multi_modal_projector`, `model.language_model`, `lm_head`;
on disk the published names remain and `save_pretrained` maps between them.
"""

from __future__ import annotations

import errno
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoProcessor, Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from trimlingual.models.kernels import add_norm, gated
from trimlingual.models.random_weights import PREFIX as RANDOM
from trimlingual.models.random_weights import draw, is_random, random_base
from trimlingual.models.saving import finish_saved
from trimlingual.recipe import Dtype, Tower
from trimlingual.run.artifacts import write_json

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names of the parts as modules in memory; used by quantisation, freezing and reports.
PARTS = {
    "audio_tower": "model.audio_tower",
    "projector": "model.multi_modal_projector",
    "decoder": "model.language_model",
    "lm_head": "lm_head",
}
# How the names of the stored tensors with one row a token end: the embedding, the output head (absent when tied).
ROWS_BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")
BUILTIN = "builtin:"


class ModelError(ValueError):
    """A model that cannot be used here; the message says what to do."""


def is_on_hub(base: str) -> bool:
    """Whether a base model's name is a Hub id: neither built in, nor random, nor a folder, nor spelled like a path."""
    return not (base.startswith((BUILTIN, RANDOM, ".", "/", "~")) or Path(base).is_dir())


def resolve_base(base: str, revision: str | None = None, download: bool = True, weights: bool = True) -> Path:
    """Folder of a base model: `builtin:mini`, `random:...` (weights drawn when loaded), a local folder, or a Hub id.

    One from the Hub is downloaded (all but the weights, if `weights` is false); ModelError if it is not there and `download` is false.
    """
    if base.startswith(RANDOM):
        try:
            return random_base(base)
        except ValueError as error:
            raise ModelError(str(error)) from error
    if base.startswith(BUILTIN):
        folder = Path(__file__).parents[1] / base.removeprefix(BUILTIN) / "model"
        if not folder.is_dir():
            raise ModelError(f"{base!r} is not shipped with this package; built in: builtin:mini")
        return folder
    if Path(base).is_dir():
        return Path(base)
    if not is_on_hub(base):
        raise ModelError(f"model folder {base} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns, local_files_only=not download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {base!r} is not a folder and could not be downloaded from the Hub ({type(error).__name__}). "
            "Check the name and the network, log in with `hf auth login` if it is gated, or give a local folder."
        ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU; under torchrun the process's own GPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        import os

        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_model(folder: Path, dtype: Dtype, device: torch.device, quantization_config: Any = None) -> Any:
    """Load a model for inference (eval mode). Safetensors only; code in the folder is never run.

    Packed weights are unpacked, random ones drawn. Raises ModelError when the folder holds no usable model.
    """
    if is_random(folder):
        return _load_random(folder, dtype, device, quantization_config)
    check_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen2_audio":
        raise ModelError(f"{folder} holds a {config.model_type!r} model; supported: qwen2_audio")
    try:
        with _packed_loading(config):
            model = Qwen2AudioForConditionalGeneration.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                device_map={"": device},
                use_safetensors=True,
                quantization_config=quantization_config,
            )
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    if hasattr(model, "ct_decompress_hook"):  # packed by compressed-tensors
        from trimlingual.quantization.int4 import unpack_

        unpack_(model, DTYPES[dtype])
    return model.eval()


def _packed_loading(config: Any) -> AbstractContextManager[None]:
    """In which a model is loaded; one of compressed-tensors by each process for itself, not in shares that would be waited for."""
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != "compressed-tensors":
        return nullcontext()
    from trimlingual.quantization.int4 import alone

    return alone()


def _load_random(folder: Path, dtype: Dtype, device: torch.device, quantization_config: Any) -> Any:
    """A random model; to be quantised it goes through the disk, because transformers quantises only what it reads."""
    if quantization_config is None:
        return draw(folder, DTYPES[dtype], device).eval()
    with weights_on_disk(folder, device) as stored:
        return load_model(stored, dtype, device, quantization_config)


@contextmanager
def weights_on_disk(folder: Path, device: torch.device) -> Iterator[Path]:
    """A folder whose weights are files: `folder` itself or, if its weights are drawn, a temporary one with them in bfloat16."""
    if not is_random(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_model(draw(folder, torch.bfloat16, device), load_processor(folder), Path(temporary), "bfloat16")
        yield Path(temporary)


def check_folder(folder: Path) -> None:
    """ModelError unless `folder` looks like a Hugging Face model with safetensors weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: not a Hugging Face model folder")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors weights (other formats are not loaded: they can run code)")


def load_processor(folder: Path) -> Any:
    """Load the processor, padding on the left: right-padded generation is wrong and the setting is not saved with it."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return processor


def save_model(
    model: Any,
    processor: Any,
    folder: Path,
    storage_dtype: Dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Save model and processor as safetensors; with `weights`, these instead of the model's.

    With `storage_dtype` the weights are rounded to it in memory too, so that what is evaluated is what is on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = weights
    if storage_dtype is not None:
        if weights is None:
            round_weights_(model, storage_dtype)
        target = DTYPES[storage_dtype]
        state = {k: v.to(target) if v.is_floating_point() else v for k, v in (weights or model.state_dict()).items()}
    with explained_disk_full(folder):
        model.save_pretrained(folder, state_dict=state, max_shard_size="4GB")
        if storage_dtype is not None:
            _write_stored_dtype(folder, storage_dtype)
        processor.save_pretrained(folder)
        finish_saved(folder)


@contextmanager
def explained_disk_full(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises when the disk is full (or a file-size limit is hit) into a ModelError that says so."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        texts = (
            "No space left",
            "StorageFull",
            "File too large",
            "os error 28",
        )  # safetensors hides the errno in its text
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(text in str(error) for text in texts):
            raise ModelError(
                f"no space left while saving to {folder}; free some disk and run again: finished stages are kept"
            ) from error
        raise


@torch.no_grad()
def round_weights_(model: Any, storage_dtype: Dtype) -> None:
    """Round every floating-point weight to `storage_dtype`, keeping the dtype it is held in."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(DTYPES[storage_dtype]))


def _write_stored_dtype(folder: Path, storage_dtype: Dtype) -> None:
    """The saved config must name the dtype on disk; transformers writes the one in memory."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, config["text_config"], config["audio_config"]):
        section["dtype"] = storage_dtype
    write_json(path, config)


# ---- parts. Shapes: B batch, N clips, M mel frames, F audio states of a clip, A tower width, T tokens, D decoder width, V vocabulary


def text_decoder(model: Any) -> Any:
    """The decoder without its head: embeddings (B, T, D) in, hidden states (B, T, D) out."""
    return unwrap(model).model.language_model


def lm_head(model: Any) -> nn.Module:
    """The output projection, D -> V."""
    return unwrap(model).lm_head


def layer_list(model: Any, tower: Tower) -> nn.ModuleList:
    """The layers of the decoder or of the audio encoder."""
    inner = unwrap(model).model
    return inner.language_model.layers if tower == "decoder" else inner.audio_tower.layers


def set_layer_list(model: Any, tower: Tower, layers: nn.ModuleList) -> None:
    """Put `layers` in place and make the config and the cache indices agree with them."""
    inner = unwrap(model).model
    config = unwrap(model).config
    if tower == "encoder":
        inner.audio_tower.layers = layers
        for audio_config in {id(c): c for c in (config.audio_config, inner.audio_tower.config)}.values():
            audio_config.encoder_layers = len(layers)
        return
    decoder = inner.language_model
    decoder.layers = layers
    kinds = [getattr(layer, "attention_type", "full_attention") for layer in layers]
    for text_config in {id(c): c for c in (config.text_config, decoder.config)}.values():
        text_config.num_hidden_layers = len(layers)
        text_config.layer_types = kinds
    layer: Any
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT (or DDP) wrapper."""
    while hasattr(model, "module") or hasattr(model, "get_base_model"):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    return model


def eos_token_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Tokens that end an answer, from the generation config (Qwen2-Audio has two)."""
    eos = unwrap(model).generation_config.eos_token_id
    if eos is None:
        eos = processor.tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)


def window_s(processor: Any) -> float:
    """Longest clip in seconds that the model takes whole (Qwen2-Audio: 30); what is beyond would be cut silently."""
    extractor = processor.feature_extractor
    return extractor.n_samples / extractor.sampling_rate


def num_audio_states(num_frames: Tensor) -> Tensor:
    """Audio states of a clip for its number of mel frames: convolution of stride 2, then average pool of 2."""
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def tower_states(model: Any, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
    """Audio tower output (N, F_max, A) for log-mels (N, mels, M) and their mask (N, M), with padding masked as in training.

    M may be less than the model's window, which the tower's own forward refuses: so its modules are called one by one here.
    Valid states are those of the whole window if M holds two frames beyond the longest clip, or is the window.
    """
    tower = unwrap(model).model.audio_tower
    weight = tower.conv1.weight
    hidden = nn.functional.gelu(tower.conv1(input_features.to(weight.device, weight.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden)).permute(0, 2, 1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    lengths = (feature_attention_mask.to(hidden.device).sum(-1) - 1) // 2 + 1
    valid = positions[None, :] < lengths[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=valid.long())
    hidden = nn.functional.dropout(hidden + tower.embed_positions(positions), p=tower.dropout, training=tower.training)
    with attention_for_unlike_lengths():
        for layer in tower.layers:
            hidden = layer(hidden, mask)
    return tower.layer_norm(tower.avg_pooler(hidden.permute(0, 2, 1)).permute(0, 2, 1))


def attention_for_unlike_lengths() -> AbstractContextManager[None]:
    """PyTorch's attention without cuDNN's kernels, for which PyTorch builds a plan at every new shape."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def project(model: Any, states: Tensor) -> Tensor:
    """Audio states (..., A) to decoder width (..., D)."""
    return unwrap(model).model.multi_modal_projector(states)


def embed(model: Any, input_ids: Tensor) -> Tensor:
    """Token embeddings (..., D)."""
    return text_decoder(model).embed_tokens(input_ids)


def freeze_(model: Any, parts: Sequence[str]) -> None:
    """Stop the named parts from training: audio_tower, projector, embeddings, lm_head."""
    inner = unwrap(model)
    modules = {
        "audio_tower": inner.model.audio_tower,
        "projector": inner.model.multi_modal_projector,
        "embeddings": inner.model.language_model.embed_tokens,
        "lm_head": inner.lm_head,
    }
    for part in parts:
        modules[part].requires_grad_(False)


def part_of(module_name: str, parts: Mapping[str, str] = PARTS) -> str | None:
    """The part (audio_tower, projector, decoder, lm_head) a module name in memory belongs to."""
    for part, prefix in parts.items():
        if module_name == prefix or module_name.startswith(prefix + "."):
            return part
    return None


def decoder_layer(
    layer: Any, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], wanted: Tensor | None = None
) -> Tensor:
    """One Qwen2 decoder layer over N tokens, (N, D) to (N, D), with rotary embedding and attention left to the caller.

    `attend` gets queries (N, H, E), keys and values (N, K, E), which it may overwrite, and returns (N, H, E). With `wanted` (M,) only
    these tokens' outputs are computed: queries and result have M rows.
    """
    attention = layer.self_attn
    normed = rms_norm(layer.input_layernorm, hidden)
    key, value = (
        linear(normed).view(len(hidden), -1, attention.head_dim) for linear in (attention.k_proj, attention.v_proj)
    )
    if wanted is not None:
        normed, hidden = normed[wanted], hidden[wanted]
    mixed = attend(attention.q_proj(normed).view(len(hidden), -1, attention.head_dim), key, value)
    hidden, normed = add_norm(hidden, attention.o_proj(mixed.flatten(1)), layer.post_attention_layernorm)
    mlp = layer.mlp
    return hidden + mlp.down_proj(gated(mlp.act_fn, mlp.gate_proj(normed), mlp.up_proj(normed)))


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """A Qwen2RMSNorm (..., D) in one kernel, where transformers' own takes six."""
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
