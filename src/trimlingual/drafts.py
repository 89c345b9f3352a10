"""Translate a candidate of the layer search from what its parent has done already.

A candidate is its parent without one decoder layer. Two things follow, and neither changes the result:

* the layers below the missing one see the same input, so their hidden states and keys and values are the parent's;
* the parent's translation is a good draft: one pass verifies all its tokens, and decoding goes on from the first that differs
  (greedy speculative decoding with a fixed draft; Stern et al. 2018, blockwise parallel decoding).

Shapes: B batch, W prompt width (left-padded), K longest draft, D decoder width. The traced input is prompt and draft without its last
token, W + K - 1 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trimlingual.decode import Decoding, extend, left_pad, length_groups
from trimlingual.layers import without_layers
from trimlingual.models import embed, layer_list, lm_head, text_decoder


@dataclass(frozen=True)
class _Group:
    """One batch of the parent's pass."""

    chosen: list[int]  # which prompts
    mask: Tensor  # (B, W + K - 1) of prompt and draft
    width: int  # W
    lengths: Tensor  # (B,) prompt lengths
    draft: Tensor  # (B, K), -1 after a draft's end
    hidden: tuple[Tensor, ...]  # input of every layer, (B, W + K - 1, D)
    keys_values: list[tuple[Tensor, Tensor]]  # of every layer


@dataclass(frozen=True)
class Trace:
    """The parent's pass over its prompts and its own translations, kept for its candidates."""

    groups: list[_Group]
    drafts: list[list[int]]

    @staticmethod
    def num_bytes(model: Any, prompts: Sequence[Tensor], drafts: Sequence[Sequence[int]]) -> int:
        """Memory a trace takes: hidden states, keys and values of every layer at every position (padding not counted)."""
        config = text_decoder(model).config
        heads = config.num_key_value_heads / config.num_attention_heads
        positions = sum(len(prompt) + len(draft) for prompt, draft in zip(prompts, drafts))
        layers = len(layer_list(model, "decoder"))
        return int(positions * config.hidden_size * (1 + 2 * heads) * layers * prompts[0].element_size())


@torch.inference_mode()
def trace(model: Any, prompts: Sequence[Tensor], drafts: Sequence[list[int]], batch_size: int) -> Trace:
    """Run the parent over each prompt (T_i, D) followed by its translation."""
    limits = [len(draft) for draft in drafts]
    groups = [_trace_group(model, prompts, drafts, chosen) for chosen in length_groups(prompts, limits, batch_size)]
    return Trace(groups, [list(draft) for draft in drafts])


def _trace_group(model: Any, prompts: Sequence[Tensor], drafts: Sequence[Sequence[int]], chosen: list[int]) -> _Group:
    decoder = text_decoder(model)
    embeds, mask = left_pad([prompts[i] for i in chosen])
    device, lengths = embeds.device, mask.sum(-1)
    rows = [torch.tensor(drafts[i]) for i in chosen]
    draft = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
    fed = draft[:, :-1]
    full_mask = torch.cat([mask, (draft[:, 1:] >= 0).long()], dim=1)  # a draft's last token is only predicted
    cache = DynamicCache(config=decoder.config)
    output = decoder(
        inputs_embeds=torch.cat([embeds, embed(model, fed.clamp(min=0))], dim=1),
        attention_mask=full_mask,
        position_ids=(full_mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    hidden = output.hidden_states[: len(keys_values)]
    return _Group(chosen, full_mask, embeds.shape[1], lengths, draft, hidden, keys_values)


@torch.inference_mode()
def translate_without(
    model: Any, traced: Trace, position: int, limits: Sequence[int], eos: Sequence[int]
) -> list[list[int]]:
    """What the traced parent, standing in `model`, would translate without its decoder layer at `position`.

    Equal to decoding each prompt anew with that layer removed (float32; tests/test_drafts.py).
    """
    results = [list(draft) for draft in traced.drafts]
    for group in traced.groups:
        for i, tokens in _redecode(model, group, position, limits, eos).items():
            results[i] = tokens
    return results


def _redecode(
    model: Any, group: _Group, position: int, limits: Sequence[int], eos: Sequence[int]
) -> dict[int, list[int]]:
    """New token ids of the prompts whose translation changes."""
    hidden, cache = _verify(model, group, position)
    predicted = lm_head(model)(hidden[:, group.width - 1 :]).argmax(-1)  # (B, K)
    differs = (predicted != group.draft) & (group.draft >= 0)
    changed = differs.any(-1).nonzero()[:, 0]
    if not len(changed):
        return {}
    first = differs.int().argmax(-1)[changed]  # (changed,) index of the first token that differs
    token = predicted[changed, first]
    cache.batch_select_indices(changed)
    # Keys and values of the draft from the first difference on stay in the cache but are masked out.
    slot = torch.arange(group.draft.shape[1] - 1, device=token.device)[None, :]
    mask = torch.cat([group.mask[changed, : group.width], (slot < first[:, None]).long()], dim=1)
    kept = [group.draft[row, :n].tolist() for row, n in zip(changed.tolist(), first.tolist())]
    state = Decoding(
        cache=cache,
        mask=mask,
        position=group.lengths[changed] + first,
        out=kept,
        budget=torch.tensor([limits[group.chosen[row]] for row in changed.tolist()], device=token.device),
    )
    with without_layers(model, {"decoder": [position]}):
        extend(model, state, token, eos)
    return {group.chosen[row]: tokens for row, tokens in zip(changed.tolist(), state.out)}


def _verify(model: Any, group: _Group, position: int) -> tuple[Tensor, DynamicCache]:
    """The candidate's last hidden states over prompt and draft, and its cache there: the parent's below the missing layer."""
    decoder = text_decoder(model)
    own: list[tuple[Tensor, Tensor]] = []
    if position == len(group.keys_values) - 1:
        hidden = decoder.norm(group.hidden[position])
    else:
        with without_layers(model, {"decoder": list(range(position + 1))}):
            above = DynamicCache(config=decoder.config)
            hidden = decoder(
                inputs_embeds=group.hidden[position],
                attention_mask=group.mask,
                position_ids=(group.mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=above,
                use_cache=True,
            ).last_hidden_state
        own = [(layer.keys, layer.values) for layer in above.layers]
    with without_layers(model, {"decoder": [position]}):
        cache = DynamicCache(config=decoder.config)
    for index, (keys, values) in enumerate([*group.keys_values[:position], *own]):
        cache.update(keys, values, index)
    return hidden, cache
