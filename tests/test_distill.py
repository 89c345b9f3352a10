from __future__ import annotations

import json

import pytest
import torch

from trimlingual.data.splits import DataSplits, Split
from trimlingual.decoding.translate_clips import Translation
from trimlingual.evaluation.answers import has_repetition_loop
from trimlingual.models.loading import load_model
from trimlingual.models.saving import save_model
from trimlingual.recipe import DecodeSettings, DistillSettings, MixSettings, SharedSettings
from trimlingual.stages.distill import distill, mix, read_distilled, reject

from .conftest import make_clips


@pytest.mark.parametrize(
    ("text", "language", "loops"),
    [
        ("das Modell das Modell das Modell das Modell das Modell", "de", True),
        ("das Modell das Modell das Modell das Modell", "de", False),
        ("sehr sehr sehr sehr gut", "de", False),
        ("sehr sehr sehr sehr sehr gut", "de", True),
        ("a b c d a b c d a b c d a b c d a b c d", "de", True),
        ("我们我们我们我们我们训练", "zh", True),
        ("我们训练模型。", "zh", False),
        ("哈哈哈哈", "zh", False),
        ("ein langer Satz ganz ohne jede Wiederholung von Wörtern", "de", False),
    ],
)
def test_repetition_loops(text, language, loops):
    assert has_repetition_loop(text, language, 4) is loops


def test_reasons():
    settings = DistillSettings()

    def why(text, truncated=False, gold="Das ist gut."):
        return reject(Translation("a", "de", text, 5, truncated), gold, settings)

    assert why("") == "empty"
    assert why("Das", truncated=True) == "runaway"
    assert why("so so so so so so") == "repetition"
    assert why("Das ist gut.") == "duplicate"
    assert why("Das ist sehr gut.") is None
    assert why("This is the same model that we trained before.") == "language"
    assert (
        reject(Translation("a", "de", "Das ist gut.", 5, False), "Das ist gut.", DistillSettings(drop_duplicates=False))
        is None
    )


def test_teacher_translations_are_filtered_and_counted(model_dir, processor, split, task, model_settings, tmp_path):
    """The random teacher of this test hardly ever ends an answer, so most are runaways and some are not."""
    decode = DecodeSettings(batch_size=3, max_new_tokens=60, min_new_tokens=60)
    model = load_model(model_dir, "float32", torch.device("cpu"))
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id] *= 3
    save_model(model, processor, tmp_path / "teacher", "float32")
    info = distill(
        tmp_path / "teacher", split.clips, SharedSettings(task, model_settings, decode), DistillSettings(), tmp_path
    )
    kept = read_distilled(tmp_path)
    assert sum(sum(counts.values()) for counts in info["counts"].values()) == 2 * len(split.clips)
    assert 0 < len(kept) == sum(counts["kept"] for counts in info["counts"].values())
    assert len((tmp_path / "translations.jsonl").read_text().splitlines()) == 2 * len(split.clips)


def test_nothing_fit_to_learn_from_is_an_error(model_dir, split, task, model_settings, tmp_path):
    decode = DecodeSettings(batch_size=3, max_new_tokens=1)
    with pytest.raises(ValueError, match="no teacher translation is fit to learn from"):
        distill(model_dir, split.clips, SharedSettings(task, model_settings, decode), DistillSettings(), tmp_path)


def test_mixture(tmp_path):
    clips = make_clips(tmp_path, 4)
    other = [clip for clip in make_clips(tmp_path, 3, first_seed=100)]
    other = [type(c)(c.id, c.audio, {"de": c.references["de"]}, c.source, c.duration_s, c.audio_sha256) for c in other]
    splits = DataSplits(
        Split("train", tuple(clips)), Split("select", ()), Split("test", ()), Split("out_of_domain", tuple(other))
    )
    taught = [{"id": clips[2].id, "language": "de", "text": "Lehrer"}]
    used, examples = mix(splits, taught, MixSettings(gold=1, distilled=10, out_of_domain=2), ["de", "zh"])
    assert len(used) == 7
    assert len(examples) == 4 * 2 + 10 + 3 * 2
    assert sum(e.text == "Lehrer" for e in examples) == 10
    assert all(used[e.clip].id == e.clip_id for e in examples)
    only, examples = mix(splits, taught, MixSettings(gold=0, distilled=1), ["de", "zh"])
    assert [e.text for e in examples] == ["Lehrer"]
    assert only[examples[0].clip].id == clips[2].id
    taught.append({"id": other[1].id, "language": "zh", "text": "老师"})
    _, examples = mix(splits, taught, MixSettings(gold=0, out_of_domain=1, distilled_out_of_domain=3), ["de", "zh"])
    assert [e.text for e in examples if e.language == "zh"] == ["老师"] * 3  # where no reference is
    assert len(examples) == 3 + 3
    _, gold = mix(splits, (), MixSettings(), ["de", "zh"])
    assert json.dumps([e.text for e in gold]) == json.dumps(
        [c.references[lang] for c in clips for lang in ("de", "zh")]
    )
