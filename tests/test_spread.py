"""A few of many come from all of them: the helper, and what is calibrated, measured and compared on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from trimlingual.data.sources import Clip
from trimlingual.data.spread import spread
from trimlingual.exports.proof import NUM_CLIPS, recorded_translations
from trimlingual.models.inputs import Example
from trimlingual.recipe import ModelSettings, QuantizeSettings, load_recipe
from trimlingual.stages import quantize


@pytest.mark.parametrize(("count", "num"), [(881, 256), (881, 766), (511, 256), (720, 32), (9, 8), (8, 8)])
def test_the_whole_is_covered_evenly(count, num):
    chosen = spread(range(count), num)
    gaps = {after - before for before, after in pairwise([*chosen, count])}  # the last one: what stands behind it
    assert (chosen[0], len(chosen)) == (0, num)
    assert gaps <= {count // num, -(-count // num)}


@pytest.mark.parametrize("num", [3, 4, 100])
def test_where_there_are_no_more_all_are_taken(num):
    assert spread("abc", num) == ["a", "b", "c"]
    assert spread("", num) == []


def test_one_by_hand():
    assert spread("abcdefghij", 4) == ["a", "c", "f", "h"]


@pytest.mark.parametrize(("num_clips", "num"), [(512, 256), (440, 256), (3, 256)])
def test_calibration_sees_every_language_from_first_to_last(num_clips, num, monkeypatch):
    """Two languages take turns, so an even step would see one alone."""
    seen: list[Example] = []

    def collate(chosen: list[Example]) -> dict[str, object]:
        seen.extend(chosen)
        return {"ids": None}

    monkeypatch.setattr(quantize, "answer_forward", lambda model: lambda **batch: None)
    monkeypatch.setattr(quantize, "round_calibrated_", lambda model, settings, passes, *rest: [run() for run in passes])
    examples = [Example(clip, f"{clip}", code, "") for clip in range(num_clips) for code in ("de", "zh")]
    settings = QuantizeSettings(calibration_examples=num)
    quantize._calibrated(torch.nn.Linear(1, 1), settings, collate, examples, ModelSettings(base="tiny"))  # type: ignore[arg-type]
    each = min(num, len(examples)) // 2
    for code in ("de", "zh"):
        clips = [example.clip for example in seen if example.language == code]
        assert (len(clips), clips[0]) == (each, 0)
        assert clips == sorted({*clips})
        assert num_clips - clips[-1] <= -(-num_clips // each)


def test_the_change_is_measured_in_every_language():
    examples = [Example(clip, f"{clip}", code, "") for clip in range(360) for code in ("de", "zh")]
    codes = [example.language for example in quantize._some(examples)]
    assert codes.count("de") == codes.count("zh") == quantize.NUM_PROBE_EXAMPLES // 2


def test_an_export_is_compared_on_clips_from_the_whole_evaluation(tmp_path):
    ids = [f"{number}" for number in range(2 * NUM_CLIPS - 1)]
    for code in ("de", "zh"):
        rows = [json.dumps({"id": each, "hypothesis": f"{code} {each}", "truncated": False}) + "\n" for each in ids]
        (tmp_path / f"translations.{code}.jsonl").write_text("".join(rows), encoding="utf-8")
    clips = [Clip(each, Path(each), {}, None, 1.0, "") for each in ids]
    recorded = recorded_translations(load_recipe("mini"), tmp_path, clips)
    assert [text for *_, text in recorded] == [f"{code} {each}" for code in ("de", "zh") for each in spread(ids, 8)]
    assert {clip.id for clip, *_ in recorded} >= {"0", ids[-2]}
