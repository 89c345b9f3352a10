from __future__ import annotations

import json

import pytest
import torch

from trimlingual.data.audio import load_audio
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.translate_clips import (
    embed_prompt,
    encode_audio,
    encode_clips,
    greedy,
    max_new_tokens,
    split_on_oom,
    translate_clips,
    translate_split,
)
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Prompter
from trimlingual.models.tree import embed
from trimlingual.recipe import DecodeSettings

from .conftest import EVERY_FAMILY
from .plain_inputs import plain_inputs


def plain_generate(model, processor, task, clip, language, limit):
    """The published way: processor, then Hugging Face generate, one clip at a time."""
    inputs = plain_inputs(processor, task, load_audio(clip.audio), language)
    ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("family", "shape", "batch_size"),
    [
        *[("qwen2_audio", {"heads": 4, "kv_heads": 2}, size) for size in (1, 3, 16)],
        *[("qwen2_audio", {"heads": 4, "kv_heads": 4, "layers": 2}, size) for size in (1, 3, 16)],
        *[("qwen2_audio", {"heads": 2, "kv_heads": 1, "width": 48, "tied": True}, size) for size in (1, 3, 16)],
        *[("voxtral", {"heads": 4, "kv_heads": 2}, size) for size in (1, 3)],
        ("voxtral", {"heads": 4, "kv_heads": 4, "layers": 2, "width": 96}, 16),
        *[("audioflamingo3", {"heads": 4, "kv_heads": 2}, size) for size in (1, 3)],
        ("audioflamingo3", {"heads": 4, "kv_heads": 4, "layers": 2, "width": 96}, 16),
    ],
    indirect=["family"],
    scope="session",
)
def test_equals_generate_one_clip_at_a_time(make_model, processor, split, task, shape, batch_size):
    model = make_model(**shape)
    prompter = Prompter(processor, task)
    settings = DecodeSettings(batch_size=batch_size, max_new_tokens=20)
    ours = {(t.id, t.language): t for t in translate_clips(model, processor, task, split.clips, settings)}
    for clip in split.clips:
        for language in task.target_languages:
            limit = max_new_tokens(clip.duration_s, settings)
            theirs = plain_generate(model, processor, task, clip, language, limit)
            assert ours[clip.id, language].hypothesis == prompter.decode(theirs)
            assert ours[clip.id, language].num_tokens == len(theirs)
    assert len({t.hypothesis for t in ours.values()}) > len(task.target_languages)  # not one answer for every clip


def test_rows_end_at_different_times(make_model, processor, split, task):
    """The end token is made likely, so that rows leave the batch one after the other."""
    model = make_model(seed=3)
    eos = family_of(model).end_tokens(model, processor)
    prompter = Prompter(processor, task)
    states = encode_clips(model, processor, split.clips, 4)
    prompts = [embed_prompt(model, prompter, s, "de") for s in states]
    with torch.no_grad():
        model.lm_head.weight[eos[0]] *= 4
    stepper = Stepper(PackedDecoder(model), eos)
    together = greedy(stepper, prompts, [20] * len(prompts), 16)
    alone = [greedy(stepper, [p], [20], 1)[0] for p in prompts]
    assert together == alone
    lengths = {len(tokens) for tokens in together}
    assert len(lengths) > 2, f"this test needs answers of different length; got {lengths}"
    assert any(tokens[-1] in eos for tokens in together)


def test_limits_bound_each_row(make_model, processor, split, task):
    model = make_model()
    prompter = Prompter(processor, task)
    states = encode_clips(model, processor, split.clips, 4)
    limits = list(range(1, len(states) + 1))
    stepper = Stepper(PackedDecoder(model), [])
    tokens = greedy(stepper, [embed_prompt(model, prompter, s, "de") for s in states], limits, 4)
    assert [len(t) for t in tokens] == limits


@EVERY_FAMILY
def test_prompt_tokens_are_the_processors(make_model, processor, split, task):
    prompter = Prompter(processor, task)
    for clip in split.clips:
        theirs = plain_inputs(processor, task, load_audio(clip.audio), "de")
        num_states = int((theirs["input_ids"] == prompter.audio_token_id).sum())
        assert prompter.prompt_ids("de", num_states) == theirs["input_ids"][0].tolist()


@EVERY_FAMILY
def test_encoded_audio_and_prompt_equal_the_models_own(make_model, processor, split, task):
    """Logits from our embedded prompt are those of the model's own forward."""
    model, prompter = make_model(), Prompter(processor, task)
    clip = split.clips[0]
    inputs = plain_inputs(processor, task, load_audio(clip.audio), "zh")
    with torch.inference_mode():
        theirs = model(**inputs).logits[0]
        states = encode_audio(model, processor, [load_audio(c.audio) for c in split.clips])[0]
        ours = model(inputs_embeds=embed_prompt(model, prompter, states, "zh")[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert embed(model, torch.tensor([1])).shape == (1, 64)


def test_bound_grows_with_the_audio():
    settings = DecodeSettings(max_new_tokens=100, min_new_tokens=10, tokens_per_second=5.0)
    assert max_new_tokens(0.0, settings) == 10
    assert max_new_tokens(4.0, settings) == 30
    assert max_new_tokens(60.0, settings) == 100


def test_truncation_is_counted(make_model, processor, split, task):
    settings = DecodeSettings(batch_size=8, max_new_tokens=3)
    done = translate_clips(make_model(), processor, task, split.clips, settings)
    assert [t.truncated for t in done] == [t.num_tokens == 3 for t in done]
    assert any(t.truncated for t in done)


def test_a_split_goes_on_from_every_journal(make_model, processor, split, task, tmp_path):
    """Of three batches one is done, by a second process that is not there any more, and the next was being written."""
    model, settings = make_model(), DecodeSettings(batch_size=3, max_new_tokens=12)
    whole = translate_clips(model, processor, task, split.clips, settings)
    first = translate_split(model, processor, task, split.clips, settings, tmp_path / "all", label="first")
    assert first.translations == whole
    lines = (tmp_path / "all" / "0.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 3
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    slow = json.loads(lines[1]) | {"seconds": 1000.0, "num_processes": 2, "peak_memory_bytes": 10**15}
    (stopped / "1.jsonl").write_text(json.dumps(slow) + "\n", encoding="utf-8")
    (stopped / "0.jsonl").write_text(lines[0][:40], encoding="utf-8")
    again = translate_split(model, processor, task, split.clips, settings, stopped, label="again")
    assert again.translations == whole
    mine = [json.loads(line) for line in (stopped / "0.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["translations"] for record in mine] == [json.loads(lines[i])["translations"] for i in (0, 2)]
    assert again.seconds == pytest.approx(1000 + sum(record["seconds"] for record in mine))
    assert (again.num_processes, again.peak_memory_bytes) == (2, 10**15)


def test_a_split_goes_on_with_another_batch_size(make_model, processor, split, task, tmp_path):
    model, three, two = make_model(), DecodeSettings(batch_size=3), DecodeSettings(batch_size=2)
    whole = translate_split(model, processor, task, split.clips, three, tmp_path, label="first")
    journal = tmp_path / "0.jsonl"
    journal.write_text(journal.read_text(encoding="utf-8").split("\n")[1] + "\n", encoding="utf-8")
    again = translate_split(model, processor, task, split.clips, two, tmp_path, label="again")
    assert again.translations == whole.translations
    records = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    assert sum(len(record["translations"]) for record in records) == len(split.clips) * 2


def test_out_of_memory_halves_the_batch(caplog):
    seen = []

    def work(items):
        seen.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item * 10 for item in items]

    assert split_on_oom(work, [1, 2, 3, 4, 5]) == [10, 20, 30, 40, 50]
    assert seen[0] == 5
    assert max(seen[1:]) <= 3
    assert "out of GPU memory" in caplog.text


def test_out_of_memory_with_one_clip_is_an_error():
    def work(items):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        split_on_oom(work, [1, 2])
