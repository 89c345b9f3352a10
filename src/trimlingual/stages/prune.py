"""Apply a PrunePlan, and prove that the pruned model is what it claims to be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trimlingual.models.errors import ProofError
from trimlingual.models.family import family_of
from trimlingual.models.folders import check_folder
from trimlingual.models.layers import drop_layers_
from trimlingual.models.loading import load_model, load_processor, pick_device
from trimlingual.models.saving import round_weights_, save_model
from trimlingual.models.tree import embed, layer_list, lm_head, text_decoder
from trimlingual.recipe import TOWERS, ModelSettings, Tower
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.search.plan import FINETUNED, PlanError, check_plan, read_plan

# Cached and uncached attention add up in another order; logits may differ by rounding only. Relative to the largest logit.
CACHE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
MOST_THREADS = 8  # each holds a copy of a weight of a model that is on a GPU


def prune(folder: ModelFolder, plan_path: Path, model_settings: ModelSettings, out_dir: Path) -> dict[str, Any]:
    """Remove the plan's layers from the model in `folder`, save it to `out_dir` and prove it.

    The clips that chose the layers become part of what the pruned model has seen. A plan whose search fine-tuned between rounds
    brings the pruned model with it; that one is taken. Raises PlanError when the plan does not fit the model, ProofError when
    reload differs from memory, cached from uncached, or a kept layer is not bit-equal.
    """
    check_folder(folder.path, "pruned")
    plan = read_plan(plan_path)
    positions = check_plan(plan, folder.lineage)
    removed: dict[str, list[int]] = {tower: plan.layers_of(tower) for tower in TOWERS}
    after = folder.lineage.unpacked().without(removed).after("prune")
    after = after.with_seen("select", plan.selection.get("audio_sha256", ()))
    device = pick_device(model_settings.device)
    processor = load_processor(folder.path, model_settings.audio_padding)
    if plan.finetuned:
        source = (plan_path if plan_path.is_dir() else plan_path.parent) / FINETUNED
        if not source.is_dir():
            raise PlanError(
                f"the plan belongs to a search that fine-tuned between rounds, but its model {source} is missing"
            )
        after = after.with_seen("train", read_lineage(source).seen.get("train", ()))
        positions = {}
    else:
        source = folder.path
    model = load_model(source, model_settings.dtype, device)
    round_weights_(model, model_settings.storage_dtype)
    kept = _kept(layer_digests(model), positions)
    drop_layers_(model, positions)
    save_model(model, processor, out_dir, model_settings.storage_dtype)
    after.save(out_dir)
    proof = prove(model, out_dir, model_settings, kept)
    return {"removed": removed, "num_decoder_layers": len(after.layers["decoder"]), "proof": proof}


def _kept(digests: dict[str, str], positions: Mapping[Tower, Sequence[int]]) -> dict[str, str]:
    """Digests of the layers that stay, under the positions they will have."""
    kept: dict[str, str] = {}
    for tower in TOWERS:
        in_order = [digest for name, digest in digests.items() if name.startswith(tower)]
        staying = [digest for position, digest in enumerate(in_order) if position not in positions.get(tower, ())]
        kept.update({f"{tower}.{position}": digest for position, digest in enumerate(staying)})
    return kept


def prove(model: Any, folder: Path, model_settings: ModelSettings, kept: dict[str, str]) -> dict[str, Any]:
    """Show that the saved model equals the one in memory, decodes with a cache as without, and kept its layers bit for bit."""
    device = next(model.parameters()).device
    reloaded = load_model(folder, model_settings.dtype, device)
    found = layer_digests(reloaded)
    changed = sorted(name for name in {*kept, *found} if kept.get(name) != found.get(name))
    if changed:
        raise ProofError(f"these layers changed while pruning: {changed}")
    with torch.inference_mode():
        embeds = probe(model)
        in_memory = lm_head(model)(text_decoder(model)(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        on_disk = lm_head(reloaded)(
            text_decoder(reloaded)(inputs_embeds=probe(reloaded), use_cache=False).last_hidden_state
        )
        if not torch.equal(in_memory, on_disk):
            raise ProofError(f"the saved model's logits differ by {(in_memory - on_disk).abs().max().item():.3g}")
        difference = _cached_difference(reloaded, embeds, on_disk)
    tolerance = CACHE_TOLERANCE[on_disk.dtype]
    if not difference <= tolerance:
        raise ProofError(f"decoding with a cache differs from without by {difference:.3g} (allowed: {tolerance})")
    return {
        "layers_bit_equal": len(kept),
        "reload_equal": True,
        "cached_difference": difference,
        "tolerance": tolerance,
    }


def probe(model: Any) -> Tensor:
    """A fixed decoder input (2, T, D) that passes through the audio tower: noise as log-mels, then a run of token ids."""
    generator = torch.Generator().manual_seed(0)
    audio = model.config.audio_config
    parameter = next(model.parameters())
    features = torch.randn((2, audio.num_mel_bins, audio.max_source_positions * 2), generator=generator)
    mask = torch.ones((2, features.shape[-1]), dtype=torch.long)
    family, features = family_of(model), features.to(parameter.device, parameter.dtype)
    states = family.audio_states(model, features, mask.to(parameter.device))[:, :16]
    ids = torch.randint(0, model.config.text_config.vocab_size, (2, 16), generator=generator)
    embeds = embed(model, ids.to(parameter.device))
    return torch.cat([family.project(model, states).to(embeds.dtype), embeds], dim=1)


def _cached_difference(model: Any, embeds: Tensor, uncached: Tensor, split: int = 20) -> float:
    """Largest difference of the logits, relative to the largest logit, when all after `split` is fed token by token."""
    decoder, head = text_decoder(model), lm_head(model)
    cache = DynamicCache(config=decoder.config)
    parts = [head(decoder(inputs_embeds=embeds[:, :split], past_key_values=cache, use_cache=True).last_hidden_state)]
    for position in range(split, embeds.shape[1]):
        step = embeds[:, position : position + 1]
        parts.append(head(decoder(inputs_embeds=step, past_key_values=cache, use_cache=True).last_hidden_state))
    cached = torch.cat(parts, dim=1)
    return ((cached - uncached).abs().max() / uncached.abs().max()).item()


def layer_digests(model: Any) -> dict[str, str]:
    """SHA-256 of every layer's weights, by tower and position."""
    layers = {
        f"{tower}.{position}": layer for tower in TOWERS for position, layer in enumerate(layer_list(model, tower))
    }
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # hashing lets go of the interpreter lock
        return dict(zip(layers, pool.map(_digest, layers.values())))


def _digest(layer: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(layer.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.hexdigest()
