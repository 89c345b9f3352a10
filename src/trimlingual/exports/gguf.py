"""GGUF files for llama.cpp: the decoder with the tokenizer in one, audio tower and projector in another (`mmproj`).

Written through the `gguf` package, one tensor after the other. It packs f16, q8_0 and q4_0; llama.cpp's own `llama-quantize` makes
q4_k_m from the f16 file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trimlingual.exports.card import license_of
from trimlingual.exports.gguf_tokenizer import Tokens, tokens_of
from trimlingual.exports.llama_cpp import MISSING, is_there, prove, quantize, quantize_program
from trimlingual.exports.target import ExportError, Finished, Outcome
from trimlingual.models.family import Family, family_named, family_of
from trimlingual.models.folders import is_bitsandbytes
from trimlingual.models.gguf_form import GgufForm
from trimlingual.models.loading import load_model, load_processor
from trimlingual.models.tree import PARTS, audio_tower, fine_part_of, lm_head, projector, text_decoder
from trimlingual.quantization.nf4 import dequantized, is_4bit
from trimlingual.recipe import GgufSettings, GgufType, QuantizeSettings, Recipe
from trimlingual.run.extras import install_line, missing

K_TYPE: GgufType = "q4_k_m"  # of llama-quantize
POSITIONS = 1500  # of the audio tower: llama.cpp fills every clip up to 30 s, and stops where there are fewer
PADDED = (
    "model.audio_padding is not window: llama.cpp has the model hear the silence that it fills every clip up with. A model that never "
    "heard it in training translates into nonsense. Train with audio_padding: window, or set export.gguf.text_only: true"
)


def problems(recipe: Recipe, config: Any, quantization: Mapping[str, Any] | None) -> Iterator[str]:
    """What llama.cpp does not load or would translate into nonsense. Quantised weights are written as what they stand for."""
    if missing("gguf"):
        yield f"export.for gguf: the package gguf is not installed: {install_line('gguf')}"
    settings = _settings(recipe)
    if K_TYPE in settings.types and not quantize_program(settings.llama_quantize):
        named = settings.llama_quantize or "llama-quantize on the PATH"
        yield f"export.gguf.types: llama.cpp's llama-quantize makes {K_TYPE}, and there is no {named}; set export.gguf.llama_quantize"
    bits = (quantization or {}).get("bits") or {}
    if few := [part for part, number in bits.items() if number < 4]:
        yield f"export.for gguf: no type of fewer than 4 bits is written, and quantize.bits has {', '.join(few)}; give them 4 or 8"
    if bits and K_TYPE in settings.types:
        yield f"export.gguf.types: llama-quantize chooses the bits of {K_TYPE} by itself, against quantize.bits; use q4_0"
    if config is None:
        return
    family = family_named(config.model_type)
    if family.gguf is None:
        yield f"export.for gguf: models of type {config.model_type} are not written as GGUF yet"
    if settings.text_only:
        return
    if family.gguf and not family.gguf.projector:
        yield f"export.for gguf: {family.gguf.no_audio}; set export.gguf.text_only: true"
        return
    if recipe.model.audio_padding != "window":
        yield f"export.for gguf: {PADDED}"
    if (positions := config.audio_config.max_source_positions) != POSITIONS:
        yield (
            f"export.for gguf: the model's window is {positions / 50:g} s, and llama.cpp computes windows of 30 s alone; "
            "set export.gguf.text_only: true"
        )


def write(finished: Finished, out_dir: Path) -> list[Outcome]:
    """A text model of each type that the recipe names and, if audio is wanted, `mmproj-f16.gguf`. ExportError where it cannot be."""
    recipe = finished.recipe
    settings = _settings(recipe)
    finished.check_padding()
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = {kind: out_dir / f"{recipe.name}-{kind}.gguf" for kind in settings.types}
    mmproj = None if settings.text_only else out_dir / "mmproj-f16.gguf"
    _write_files(finished, texts, mmproj)  # the model's memory is free again when llama.cpp loads it
    unproven, outcomes = _why_not_proven(finished), []
    for kind, path in texts.items():
        size = path.stat().st_size + (mmproj.stat().st_size if mmproj else 0)
        proof = prove(path, mmproj, kind, finished) if mmproj and not unproven else None
        outcomes.append(Outcome("gguf", kind, size, proof, unproven))
    return outcomes


class About(NamedTuple):
    """What a file says of itself: it often travels without its card."""

    recipe: Recipe
    license: Mapping[str, str]  # as the card has it

    def add_to(self, writer: Any) -> None:
        writer.add_name(self.recipe.name)
        writer.add_languages(list(dict.fromkeys(["en", *self.recipe.task.target_languages])))
        add = {
            "license": writer.add_license,
            "license_name": writer.add_license_name,
            "license_link": writer.add_license_link,
        }
        for key, value in self.license.items():
            add[key](value)


def _write_files(finished: Finished, texts: Mapping[GgufType, Path], mmproj: Path | None) -> None:
    processor = load_processor(finished.model.path)
    model = load_model(finished.model.path, finished.recipe.model.storage_dtype, torch.device("cpu"))
    family, four_bit = family_of(model), is_bitsandbytes(finished.model.path)
    about = About(finished.recipe, license_of(finished.model.lineage.base, family))
    if found := list(problems(finished.recipe, model.config, finished.model.lineage.quantization)):
        raise ExportError("; ".join(found))
    if mmproj:
        _write_audio(mmproj, model, family, about, four_bit)
    tokens = tokens_of(processor, finished.model.path, _form(family))
    bits = _bits(finished)
    for kind, path in texts.items():
        if kind != K_TYPE:
            _write_text(path, model, tokens, family, about, kind, four_bit, bits)
    if K_TYPE in texts:
        with tempfile.TemporaryDirectory(dir=texts[K_TYPE].parent) as folder:
            half = texts.get("f16", Path(folder) / "f16.gguf")
            if not half.exists():
                _write_text(half, model, tokens, family, about, "f16", four_bit, bits)
            quantize(half, texts[K_TYPE], K_TYPE, _settings(finished.recipe).llama_quantize)


def _settings(recipe: Recipe) -> GgufSettings:
    return recipe.export.gguf if recipe.export else GgufSettings()


def _bits(finished: Finished) -> Mapping[str, int]:
    """Bits of parts as the model was quantised, by the positions of its layers."""
    bits = (finished.model.lineage.quantization or {}).get("bits") or {}
    return QuantizeSettings(scheme="int4", bits=bits).at_positions(finished.model.lineage.layers["decoder"]).bits


def _why_not_proven(finished: Finished) -> str:
    settings = _settings(finished.recipe)
    if finished.is_random:
        return "the base model is random"
    if settings.text_only:
        return "without the audio tower there is nothing to translate"
    return "" if is_there(settings.llama_server) else MISSING


def _write_text(
    path: Path,
    model: Any,
    tokens: Tokens,
    family: Family,
    about: About,
    kind: GgufType,
    four_bit: bool,
    bits: Mapping[str, int],
) -> None:
    """The decoder, its head and the tokenizer."""
    import gguf

    form = _form(family)
    config = model.config.text_config
    if config.rope_parameters["rope_type"] != "default":
        raise ExportError(f"rotary embedding of type {config.rope_parameters['rope_type']} is not written as GGUF yet")
    writer = gguf.GGUFWriter(path, form.decoder)
    writer.add_type(gguf.GGUFType.MODEL)
    about.add_to(writer)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_size = text_decoder(model).layers[0].self_attn.head_dim
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens.add_to(writer, form, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.decoder.upper()], config.num_hidden_layers)
    parts = [("model.", "decoder", text_decoder(model)), ("lm_head.", "lm_head", lm_head(model))]
    tensors, fine_parts = [], {}
    for prefix, part, module in parts:
        for old, value in _weights(module, four_bit):
            tensors.append((new := _renamed(names, prefix + old), value))
            fine_parts[new] = fine_part_of(f"{PARTS[part]}.{old.removesuffix('.weight')}") or ""
    if form.rotates_neighbours:
        tensors = [
            (new, _neighbours(value, head_size) if ".attn_q." in new or ".attn_k." in new else value)
            for new, value in tensors
        ]
    types = {new: _text_type(new, value, kind, bits.get(fine_parts[new])) for new, value in tensors}
    _write_tensors(writer, tensors, types)


def _write_audio(path: Path, model: Any, family: Family, about: About, four_bit: bool) -> None:
    """Audio tower and projector, in f16."""
    import gguf

    tower = audio_tower(model)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    writer.add_type(gguf.GGUFType.MMPROJ)
    about.add_to(writer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_audio_encoder(True)
    projector_type = _form(family).projector
    assert projector_type, "problems() says it"
    writer.add_clip_projector_type(projector_type)
    writer.add_audio_projection_dim(model.config.text_config.hidden_size)
    writer.add_audio_embedding_length(tower.conv1.out_channels)
    writer.add_audio_feed_forward_length(tower.layers[0].fc1.out_features)
    writer.add_audio_block_count(len(tower.layers))
    writer.add_audio_head_count(tower.layers[0].self_attn.num_heads)
    writer.add_audio_num_mel_bins(tower.conv1.in_channels)
    writer.add_audio_attention_layernorm_eps(tower.layer_norm.eps)
    # The package numbers the two convolutions and the projector's layers as blocks, also where there are fewer blocks.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(3, len(tower.layers)))
    linear = (
        "audio." + PARTS["projector"].removeprefix("model.") + "."
    )  # as the package has it, apart from images' projectors
    parts = [("audio_tower.", tower), (linear, projector(model))]
    tensors = [
        # a bias of a convolution is added to (width, frames)
        (_renamed(names, prefix + old), value[:, None] if ".conv" in prefix + old and value.ndim == 1 else value)
        for prefix, part in parts
        for old, value in _weights(part, four_bit)
    ]
    f32, f16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
    # Vectors and the table of positions are added to float32 activations.
    types = {
        new: f32 if min(value.shape) == 1 or value.ndim == 1 or "position" in new else f16 for new, value in tensors
    }
    _write_tensors(writer, tensors, types)


def _form(family: Family) -> GgufForm:
    assert family.gguf is not None, "problems() says it"
    return family.gguf


def _weights(part: nn.Module, four_bit: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a part by its name there; 4-bit ones as what they stand for."""
    for prefix, module in part.named_modules():
        for name, value in module.named_parameters(recurse=False):
            whole = dequantized(module) if name == "weight" and four_bit and is_4bit(module) else value.detach()
            yield f"{prefix}.{name}".lstrip("."), whole


def _neighbours(value: Tensor, head_size: int) -> Tensor:
    """Rows (heads * E, ...) of a query or key projection with i and i + E / 2 of each head beside each other."""
    return value.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _renamed(names: Any, name: str) -> str:
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert new, f"GGUF has no name for {name}"
    return new


def _text_type(name: str, value: Tensor, kind: GgufType, bits: int | None) -> Any:
    """Vectors in float32, matrices as asked; but f16 for widths that blocks do not divide.

    Beside 4 bits, 8 where `quantize.bits` gave so many, and for table and head where it gave none.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    if value.ndim == 1:
        return types.F32
    asked = types[kind.upper()]
    is_row_part = name in ("token_embd.weight", "output.weight")
    if asked == types.Q4_0 and (bits or (8 if is_row_part else 4)) == 8:
        asked = types.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[asked]
    return types.F16 if value.shape[-1] % block else asked


def _write_tensors(writer: Any, tensors: Sequence[tuple[str, Tensor]], types: dict[str, Any]) -> None:
    """Header first, then tensor by tensor: no more than one is in memory packed."""
    import gguf

    for name, value in tensors:
        kind, shape = types[name], tuple(value.shape)
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
            writer.add_tensor_info(name, shape, dtype, value.numel() * dtype.itemsize)
        else:
            packed = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in tensors:
        writer.write_tensor_data(np.ascontiguousarray(gguf.quants.quantize(value.float().numpy(), types[name])))
    writer.close()
