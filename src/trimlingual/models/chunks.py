"""Recordings that are longer than an encoder's window, as chunks of one window each.

Shapes: N clips, M mel frames, C chunks of the longest clip, P chunks of all clips, A width of the audio states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def side_by_side(spectra: Sequence[Tensor]) -> Tensor:
    """Log-mel spectra (mels, M) of clips of unlike length as one tensor (N, mels, M), padded on the right."""
    return pad_sequence([spectrum.T for spectrum in spectra], batch_first=True).mT


def encode_chunks(features: Tensor, mask: Tensor, frames: int, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `encode` makes of each chunk, a clip's chunks one after the other: (N, states, A), zeros where a clip has no chunk.

    `features` (N, mels, M) and their mask (N, M) have C times `frames` frames; `encode` takes (P, mels, frames) and (P, frames).
    """
    chunks = features.unflatten(-1, (-1, frames)).transpose(1, 2)  # (N, C, mels, frames)
    masks = mask.unflatten(-1, (-1, frames))  # (N, C, frames)
    heard = masks[..., 0].bool()
    found = encode(chunks[heard.to(chunks.device)], masks[heard])
    states = found.new_zeros((*heard.shape, *found.shape[1:]))
    states[heard.to(states.device)] = found
    return states.flatten(1, 2)
