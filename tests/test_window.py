"""The audio window cut to a batch's longest clip gives what the whole window gives."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers.masking_utils import create_bidirectional_mask

from tests.conftest import EVERY_FAMILY, WINDOW_S
from tests.plain_inputs import own_inputs
from trimlingual.data.audio import SAMPLE_RATE, load_audio
from trimlingual.decoding.translate_clips import encode_audio
from trimlingual.models.inputs import Collator, Example, Prompter, log_mels
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.qwen2_audio import FAMILY, FRAMES_MULTIPLE
from trimlingual.training.loss import answer_forward

HOP = 160
# Samples of one clip: short, around a frame's edge, around a multiple of frames less the context, nearly and exactly the window.
LENGTHS = (400, 999, 10 * HOP - 1, 10 * HOP, 62 * HOP, 62 * HOP + 1, 63 * HOP, 64 * HOP, WINDOW_S * SAMPLE_RATE - 3 * HOP,
           WINDOW_S * SAMPLE_RATE - HOP + 1, WINDOW_S * SAMPLE_RATE)  # fmt: skip


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def theirs(model, features, mask):
    """States of transformers' own tower over the whole window."""
    tower = model.model.audio_tower
    lengths = (mask.sum(-1) - 1) // 2 + 1
    valid = torch.arange(tower.max_source_positions)[None, :] < lengths[:, None]
    dummy = torch.zeros((*valid.shape, 1))
    attention = create_bidirectional_mask(config=tower.config, inputs_embeds=dummy, attention_mask=valid.long())
    return tower(features, attention_mask=attention).last_hidden_state


def assert_equal_states(model, processor, audio):
    features, mask = log_mels(processor, audio)
    whole_features, whole_mask = log_mels(processor, audio, whole_window=True)
    width = features.shape[-1]
    assert torch.equal(features, whole_features[..., :width])
    assert torch.equal(mask, whole_mask[:, :width])
    assert torch.equal(mask.sum(-1), whole_mask.sum(-1))
    with torch.no_grad():
        cut = FAMILY.audio_states(model, features, mask)
        whole = theirs(model, whole_features, whole_mask)
    for row, other, count in zip(cut, whole, FAMILY.num_states(mask.sum(-1)).tolist()):
        assert count > 0
        torch.testing.assert_close(row[:count], other[:count], rtol=0, atol=1e-5)
    return width


@pytest.mark.parametrize("samples", LENGTHS)
def test_one_clip(make_model, processor, samples):
    width = assert_equal_states(make_model(), processor, [noise(samples)])
    assert width == min(-(-(-(-samples // HOP) + 2) // FRAMES_MULTIPLE) * FRAMES_MULTIPLE, WINDOW_S * 100)


def test_clips_of_very_different_length(make_model, processor):
    loud, silent = noise(8000, 1) * 8, np.zeros(4000, np.float32)
    assert_equal_states(make_model(), processor, [noise(500), loud, silent, noise(15000, 2)])
    assert_equal_states(make_model(), processor, [noise(500), noise(WINDOW_S * SAMPLE_RATE, 3)])


def test_the_mini_model():
    folder = resolve_base("builtin:mini")
    model, processor = load_model(folder, "float32", torch.device("cpu")), load_processor(folder)
    width = assert_equal_states(model, processor, [noise(7000), noise(31 * HOP, 1), noise(40000, 2)])
    assert width < processor.feature_extractor.nb_max_frames


def test_states_do_not_depend_on_the_company(make_model, processor):
    """A clip encoded alone (short window) and beside the longest there can be."""
    model = make_model()
    alone = encode_audio(model, processor, [noise(6000)])[0]
    beside = encode_audio(model, processor, [noise(WINDOW_S * SAMPLE_RATE, 1), noise(6000)])[1]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_loss_and_gradients_equal_those_of_the_published_set_up(make_model, processor, split, task):
    """Ours (cut window, logits of answers alone) and transformers' own forward over the whole window, on the same batch, in float32."""
    prompter = Prompter(processor, task)
    examples = [Example(i, c.id, "de", c.references["de"]) for i, c in enumerate(split.clips)][:4]
    losses, gradients = [], []
    for whole_window in (False, True):
        model = make_model()
        collator = Collator(prompter, lambda i: load_audio(split.clips[i].audio), whole_window=whole_window)
        batch = collator(examples)
        batch.pop("ids")
        loss = model(**own_inputs(model, batch)).loss if whole_window else answer_forward(model)(**batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    assert any("audio_tower.conv1" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_clip_beyond_the_window_is_an_error(processor):
    with pytest.raises(ValueError, match="longer than the model's window"):
        log_mels(processor, [noise(WINDOW_S * SAMPLE_RATE + 1)])


def test_padding_that_is_heard_is_part_of_every_input(model_dir, split, task, tmp_path):
    """With `audio_padding: window` a clip is as long as the window everywhere, unmasked as in llama.cpp; a folder keeps it."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    load_processor(folder, "window").save_pretrained(folder)
    model, processor = load_model(folder, "float32", torch.device("cpu")), load_processor(folder)
    audio = [noise(8000, 1), noise(WINDOW_S * SAMPLE_RATE, 2)]
    features, mask = log_mels(processor, audio)
    assert features.shape[-1] == mask.sum(-1).min() == WINDOW_S * 100
    with torch.no_grad():
        unmasked = model.model.audio_tower(features).last_hidden_state
    for row, other in zip(encode_audio(model, processor, audio), unmasked, strict=True):
        assert len(row) == WINDOW_S * 25
        torch.testing.assert_close(row, other, rtol=0, atol=1e-5)
    masked = load_processor(folder, "mask")
    assert len(encode_audio(model, masked, audio[:1])[0]) < WINDOW_S * 25
    collator = Collator(Prompter(processor, task), lambda i: load_audio(split.clips[i].audio))
    batch = collator([Example(i, str(i), "de", "Ja.") for i in range(2)])
    placeholders = batch["input_ids"] == FAMILY.audio_token(processor)
    assert placeholders.sum(-1).tolist() == [WINDOW_S * 25] * 2


@EVERY_FAMILY
@pytest.mark.parametrize("padding", ["mask", "window"])
def test_a_clip_has_as_many_states_as_is_estimated(family, make_model, processor, padding, monkeypatch):
    """Also clips of more than one window of the encoder, where the family takes them."""
    monkeypatch.setattr(processor.feature_extractor, "audio_padding", padding, raising=False)
    model, extractor = make_model(), processor.feature_extractor
    lengths = [4_807, 16_480, WINDOW_S * SAMPLE_RATE]
    if family.window_s(processor) * SAMPLE_RATE > extractor.n_samples:
        lengths.append(extractor.n_samples + 4_807)
    for num in lengths:
        (states,) = encode_audio(model, processor, [noise(num)])
        seconds = family.encoded_s(model.config, num / SAMPLE_RATE, padding == "window")
        assert states.shape[1] == family.state_width(model.config)
        assert len(states) == pytest.approx(seconds * family.states_per_s, abs=1), num
