"""Find and load a model: built in, random, in a folder, or on the Hub. Safetensors only, and no code of a model folder is ever run."""

from __future__ import annotations

import gc
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from trimlingual.models.errors import ModelError
from trimlingual.models.family import family_named
from trimlingual.models.folders import is_bitsandbytes, model_problems, processor_problems, refuse
from trimlingual.models.packed_layers import no_slower_packed
from trimlingual.models.packed_weights import can_stay_packed, keep_packed_, loading, unpack_
from trimlingual.models.random_weights import RANDOM, draw, is_random, random_base
from trimlingual.models.saving import DTYPES, save_model
from trimlingual.recipe import AudioPadding, Dtype
from trimlingual.run.hub_errors import hub_errors

BUILTIN = "builtin:"
OTHER_FORMATS = ["consolidated*"]  # the same weights once more, for another library


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

    try:
        patterns = ["*.json", "*.txt", "*.jinja", "README.md"] + ["*.safetensors"] * weights
        return Path(
            snapshot_download(
                base,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=OTHER_FORMATS,
                local_files_only=not download,
            )
        )
    except hub_errors() as error:
        raise ModelError(
            f"model {base!r} is not a folder and could not be downloaded from the Hub ({type(error).__name__}). "
            "Check the name and the network, log in with `hf auth login` if it is gated, or give a local folder."
        ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU; under torchrun the process's own GPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ModelError(f"device {device!r} is unknown; choose auto, cpu, cuda, cuda:1, mps or xpu") from error
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def free_memory() -> None:
    """Give the GPU back what nothing uses any more. Trainers, models and CUDA graphs refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(
    folder: Path, dtype: Dtype, device: torch.device, quantization_config: Any = None, keep_packed: bool = False
) -> Any:
    """Load a model for inference (eval mode). Safetensors only; code in the folder is never run.

    Packed integers are unpacked: what is loaded is a plain model. With `keep_packed` it computes on the packed ones, where that is no
    slower, and can only be run. Random weights are drawn. Raises ModelError when the folder holds no usable model.
    """
    if is_random(folder):
        return _load_random(folder, dtype, device, quantization_config)
    refuse(model_problems(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
        stays_packed = keep_packed and is_packed_folder(config) and no_slower_packed(device, DTYPES[dtype])
        with loading() if is_packed_folder(config) else nullcontext():
            model, found = family_named(config.model_type).transformers_class.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                device_map={"": torch.device("cpu") if stays_packed else device},
                use_safetensors=True,
                quantization_config=quantization_config,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random weights
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} of the tensors that its config.json asks for (first: {missing[0]}); the two "
            "do not belong together, or files are missing: copy or download the folder again"
        )
    if stays_packed and can_stay_packed(model):
        keep_packed_(model, DTYPES[dtype], device)
    elif is_packed_folder(config):
        unpack_(model.to(device), DTYPES[dtype])
    if is_bitsandbytes(folder):
        # transformers 5.23 casts the biases, and leaves weights that are not 4-bit as they are stored
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[dtype])
    return model.eval()


def is_packed_folder(config: Any) -> bool:
    """Whether a folder with this configuration holds weights packed by compressed-tensors."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors"


def _load_random(folder: Path, dtype: Dtype, device: torch.device, quantization_config: Any) -> Any:
    """A random model; to be quantised it goes through the disk, because transformers quantises only what it reads."""
    if quantization_config is None:
        return draw(folder, DTYPES[dtype], device).eval()
    with tempfile.TemporaryDirectory() as stored:
        save_model(draw(folder, torch.bfloat16, device), load_processor(folder), Path(stored), "bfloat16")
        return load_model(Path(stored), dtype, device, quantization_config)


def load_processor(folder: Path, audio_padding: AudioPadding | None = None) -> Any:
    """Load the processor, padding on the left: right-padded generation is wrong and the setting is not saved with it.

    With `audio_padding` this is how clips are filled up from now on, also in folders that the processor is saved to. Raises ModelError
    when one of its files is not there.
    """
    refuse(processor_problems(folder))
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    if audio_padding:
        processor.feature_extractor.audio_padding = audio_padding
    return processor
