"""What the teacher read for one stage, the next one does not have it read again; and only if it is the same in everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimlingual.models.inputs import Example, TrainingData
from trimlingual.models.loading import load_processor
from trimlingual.models.saving import save_model
from trimlingual.pipeline import compress, run_stage
from trimlingual.recipe import LoraSettings, QuantizeSettings, TokenDistillation, TrainSettings, load_recipe
from trimlingual.run.handed_on import TEACHER_TOKENS, discard, give, take
from trimlingual.run.ownership import WORK_FILE
from trimlingual.stages.finetune import finetune
from trimlingual.stages.quantize import quantize
from trimlingual.training import token_distillation
from trimlingual.training.selection import Guide
from trimlingual.training.trainer import read_teacher

from .conftest import make_clips
from .test_pipeline import SMALL

TRAIN = TrainSettings(
    max_steps=3, batch_size=4, learning_rate=3e-3, logging_steps=1, freeze=["audio_tower"],
    token_distillation=TokenDistillation(top_k=8),
)  # fmt: skip
LORA = TRAIN.model_copy(update={"method": "lora", "lora": LoraSettings(r=4, alpha=8)})
IN_4_BITS = {
    "full": QuantizeSettings(group_size=32, compute_dtype="float32", parts=["decoder"], train=TRAIN),
    "lora": QuantizeSettings(scheme="nf4", compute_dtype="float32", train=LORA),
}


@pytest.fixture
def examples(split) -> list[Example]:
    return [Example(i, c.id, code, c.references[code]) for i, c in enumerate(split.clips) for code in ("de", "zh")]


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many examples the teacher read, batch by batch."""
    counts: list[int] = []
    original = token_distillation._read

    def counted(load_teacher: Any, *args: Any) -> Any:
        for rows in original(load_teacher, *args):
            counts.append(len(rows))
            yield rows

    monkeypatch.setattr(token_distillation, "_read", counted)
    return counts


@pytest.fixture
def teacher_dir(make_model, model_dir, tmp_path) -> Path:
    save_model(make_model(layers=2, seed=1), load_processor(model_dir), tmp_path / "teacher", "float32")
    return tmp_path / "teacher"


@pytest.fixture
def guide(teacher_dir, tmp_path) -> Guide:
    (tmp_path / "run").mkdir()
    return Guide(teacher_dir=teacher_dir, reading=tmp_path / "run" / TEACHER_TOKENS)


@pytest.mark.parametrize("method", IN_4_BITS)
def test_the_second_stage_trains_as_if_it_had_asked(given, data, shared, guide, read, tmp_path, method):
    run = tmp_path / "run"
    finetune(given, data, shared, TRAIN, run / "recovered", guide)
    assert sum(read) == len(data.examples)
    assert guide.reading.is_dir()
    found = quantize(given, data, shared, IN_4_BITS[method], run / "quantized", guide)
    assert sum(read) == len(data.examples)
    assert guide.reading.is_dir()  # for whoever comes next, until the run ends
    asked = quantize(given, data, shared, IN_4_BITS[method], tmp_path / "alone", replace(guide, reading=None))
    assert sum(read) == 2 * len(data.examples)
    assert len(found["losses"]) == 3
    assert found["losses"] == asked["losses"]
    assert found["change"] == asked["change"]


def _changed(what: str, given: dict[str, Any], make_model: Any, tmp_path: Path) -> dict[str, Any]:
    """What `read_teacher` is given, with one thing changed."""
    data, shared, settings = given["data"], given["shared"], given["settings"]
    clips, texts = data.clips, data.examples
    if what == "teacher":  # other weights in the same folder, in files of the same size
        save_model(make_model(layers=2, seed=2), given["processor"], given["guide"].teacher_dir, "float32")
    elif what == "audio":
        (tmp_path / "other").mkdir()
        clips = [replace(clips[0], audio_sha256=make_clips(tmp_path / "other", 1, 99)[0].audio_sha256), *clips[1:]]
    elif what == "text":
        texts = [replace(texts[0], text=texts[1].text), *texts[1:]]
    elif what == "order":
        texts = texts[::-1]
    elif what == "top_k":
        settings = settings.model_copy(update={"token_distillation": TokenDistillation(top_k=4)})
    elif what == "temperature":
        settings = settings.model_copy(update={"token_distillation": TokenDistillation(top_k=8, temperature=2.0)})
    elif what == "prompt":
        shared = replace(shared, task=shared.task.model_copy(update={"system_prompt": "Translate."}))
    elif what == "dtype":
        shared = replace(shared, model=shared.model.model_copy(update={"dtype": "bfloat16"}))
    elif what == "padding":
        given["processor"].feature_extractor.audio_padding = "window"
    return {**given, "data": TrainingData(clips, texts), "shared": shared, "settings": settings}


THINGS = ["teacher", "audio", "text", "order", "top_k", "temperature", "prompt", "dtype", "padding"]


@pytest.mark.parametrize("what", ["nothing", *THINGS])
def test_what_differs_is_read_anew(model_dir, data, shared, guide, make_model, read, tmp_path, what):
    given = {
        "processor": load_processor(model_dir),
        "data": data,
        "shared": shared,
        "settings": TRAIN,
        "guide": guide,
    }
    first = read_teacher(**given, work_dir=tmp_path / "first")
    given = _changed(what, given, make_model, tmp_path)
    second = read_teacher(**given, work_dir=tmp_path / "second")
    num = len(data.examples)
    assert sum(read) == (num if what == "nothing" else 2 * num)
    alone = read_teacher(**{**given, "guide": replace(guide, reading=None)}, work_dir=tmp_path / "alone")
    assert second.keys() == alone.keys()
    assert all((mine == others).all() for e in second for mine, others in zip(second[e], alone[e], strict=True))
    assert first.keys() == second.keys() or what == "text"
    assert [path.name for path in guide.reading.parent.iterdir()] == [TEACHER_TOKENS]  # one reading at a time


def test_examples_that_a_mixture_repeats_are_read_once(model_dir, data, shared, guide, read, tmp_path):
    processor, repeated = load_processor(model_dir), TrainingData(data.clips, [*data.examples] * 3)
    read_teacher(processor, data, shared, TRAIN, guide, tmp_path / "first")
    found = read_teacher(processor, repeated, shared, TRAIN, guide, tmp_path / "second")
    assert sum(read) == len(found) == len(data.examples)


def test_killed_while_it_trains_nothing_is_read_again(given, data, shared, guide, read, tmp_path, killed_in_step):
    out = tmp_path / "run" / "recovered"
    straight = finetune(given, data, shared, TRAIN, tmp_path / "straight", replace(guide, reading=None))
    read.clear()
    with killed_in_step(2):
        finetune(given, data, shared, TRAIN, out, guide)
    resumed = finetune(given, data, shared, TRAIN, out, guide)
    assert sum(read) == len(data.examples)
    assert resumed["losses"] == straight["losses"]


@pytest.mark.parametrize("moment", ["reading", "taken", "given"])
def test_killed_around_the_reading_nothing_is_lost(model_dir, data, shared, guide, read, tmp_path, monkeypatch, moment):
    """In the third batch; after it was taken for a second stage; before it is given back."""
    monkeypatch.setattr(token_distillation, "BATCH", 4)
    monkeypatch.setattr("trimlingual.training.parts.PART_S", 0.0)
    processor, place = load_processor(model_dir), guide.reading

    def stage(name: str) -> Any:
        return read_teacher(processor, data, shared, TRAIN, guide, tmp_path / "run" / name)

    def dies(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if moment == "reading":
            patch.setattr("trimlingual.training.parts._write", _dies_in_call(3))
        elif moment == "taken":
            stage("first")
            patch.setattr("trimlingual.training.trainer.teacher_tokens", dies)
        else:
            patch.setattr("trimlingual.training.trainer.give", dies)
        with pytest.raises(KeyboardInterrupt):
            stage("killed")
    assert not place.exists()
    before = sum(read)
    rows = stage("killed")
    assert sum(read) - before == (len(data.examples) - 8 if moment == "reading" else 0)
    assert len(rows) == len(data.examples)
    before = sum(read)
    stage("next")
    assert sum(read) == before
    assert place.is_dir()


def _dies_in_call(number: int) -> Any:
    from trimlingual.training.parts import _write

    calls: list[int] = []

    def write(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return _write(*args)

    return write


@pytest.mark.parametrize("kind", ["folder", "file", "record"])
def test_what_the_user_put_there_stays(model_dir, data, shared, guide, read, tmp_path, kind):
    place = guide.reading
    if kind != "file":
        place.mkdir()
    mine = place if kind == "file" else place / (WORK_FILE if kind == "record" else "notes.txt")
    mine.write_text(json.dumps({"mine": True}))
    for name in ("first", "second"):
        read_teacher(load_processor(model_dir), data, shared, TRAIN, guide, tmp_path / name)
    discard(place)
    assert sum(read) == 2 * len(data.examples)
    assert json.loads(mine.read_text()) == {"mine": True}
    assert list(place.parent.iterdir()) == [place]


def test_two_stages_never_have_it_at_once(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "rows").write_text("rows")
    place = tmp_path / TEACHER_TOKENS
    give(tmp_path / "first", "key", place)
    take(place, "key", tmp_path / "second")
    take(place, "key", tmp_path / "third")
    assert (tmp_path / "second" / "rows").read_text() == "rows"
    assert not place.exists()
    assert not (tmp_path / "third").exists()
    (tmp_path / "third").mkdir()
    give(tmp_path / "third", "key", place)
    give(tmp_path / "second", "key", place)  # nothing is overwritten
    assert (tmp_path / "second" / "rows").is_file()


def test_a_run_reads_once_and_keeps_no_reading(manifests, read, tmp_path):
    taught = [f"{section}.token_distillation={{top_k: 8}}" for section in ("recover", "quantize.train")]
    mixed = [f"{section}.data={{gold: {times}}}" for section, times in (("recover", 1), ("quantize.train", 2))]
    short = ["rank.strategy=middle", "distill=null", "export=null", "evaluate.models=[quantized]"]
    short += [f"{section}.max_steps=1" for section in ("finetune", "recover", "quantize.train")]
    recipe = load_recipe("mini", [*SMALL, *manifests, *short, *taught, *mixed, "quantize.rounding=nearest"])
    place = tmp_path / TEACHER_TOKENS
    for stage in ("data", "teacher", "rank", "pruned", "recovered"):
        run_stage(recipe, tmp_path, stage)
    assert sum(read) == 48  # 24 clips in two languages
    assert (place / WORK_FILE).is_file()
    run_stage(recipe, tmp_path, "quantized")
    assert sum(read) == 48
    assert not place.exists()
    (tmp_path / "left").mkdir()
    give(tmp_path / "left", "of a run that was killed", place)
    compress(recipe, tmp_path)
    assert not place.exists()
