"""A fingerprint covers what can change a result, and only that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, create_model

from trimlingual.data.sources import listing_problems
from trimlingual.pipeline import plan
from trimlingual.recipe import (
    DecodeSettings,
    ManifestSource,
    MixSettings,
    QuantizeSettings,
    RankSettings,
    Recipe,
    TrainSettings,
    load_recipe,
)
from trimlingual.recipe.section import Section
from trimlingual.run.artifacts import ArtifactError
from trimlingual.run.fingerprint import (
    UNREAD,
    HashCache,
    decisive,
    differences,
    fingerprint,
    hash_files,
    hash_model,
    is_whole,
    plain,
)
from trimlingual.step_inputs import base_ref

NEUTRAL_VALUES = Path(__file__).parent / "neutral_values.json"


def prints(*overrides: str, run: str = "run") -> dict[str, str]:
    """Fingerprint of every stage of the mini recipe."""
    return {step.name: step.fingerprint for step in plan(load_recipe("mini", overrides), Path(run))}


# --- settings


@pytest.mark.parametrize(
    "override",
    [
        "finetune.num_workers=3", "recover.logging_steps=1", "quantize.train.save_steps=7", "finetune.save_minutes=2.5",
        "finetune.report_to=[tensorboard]", "decode.batch_size=3", "model.device=cpu", "finetune.gradient_checkpointing=true",
        "description=another", "evaluate.models=[base, teacher, pruned, recovered, quantized]",
    ],
)  # fmt: skip
def test_what_cannot_change_a_result_makes_nothing_stale(override):
    assert prints(override) == prints()


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("finetune.learning_rate=2e-5", "teacher"), ("recover.batch_size=3", "recovered"), ("seed=1", "teacher"),
        ("task.prompt='Say it in {language}:'", "teacher"), ("decode.max_new_tokens=9", "rank"), ("data.split_seed=5", "data"),
        ("quantize.train.lora.r=8", "quantized"), ("model.dtype=bfloat16", "teacher"),
    ],
)  # fmt: skip
def test_what_can_change_a_result_makes_its_stage_and_all_after_it_stale(override, first):
    before, after = prints(), prints(override)
    changed = [name for name in before if before[name] != after[name]]
    assert changed[0] == first
    assert "report" in changed


def test_how_a_model_is_decoded_ships_with_it_evaluated_or_not():
    for evaluated in ("[base]", "[base, teacher]"):
        settings = (f"evaluate.models={evaluated}", "rank=null", "distill=null", "recover=null", "quantize=null")
        assert prints(*settings)["exported"] != prints(*settings, "decode.max_new_tokens=9")["exported"]


FOUND = {"removals": [{"layer": 5}, {"layer": 4}], "bits": [{"part": "decoder.6.mlp", "bits": 3}], "strategy": "greedy"}


@pytest.mark.parametrize(
    ("edited", "stale"),
    [
        (FOUND, []),
        (FOUND | {"strategy": "by hand", "removals": [{"layer": 4, "score": 1.5}, {"layer": 5}]}, []),
        (FOUND | {"removals": [{"layer": 5}, {"layer": 7}]}, ["pruned", "quantized"]),
        (FOUND | {"bits": [{"part": "decoder.6.mlp", "bits": 2}]}, ["pruned", "quantized"]),
        ({"damaged": True}, ["pruned", "quantized"]),
    ],
    ids=["as it was found", "in another form", "other layers", "other bits", "damaged"],
)
def test_what_an_edited_plan_asks_for_counts(edited, stale, tmp_path):
    """That the search found another stands in its artifact.json, of older runs too. The search is as it was."""
    overrides = ["rank.budget={size: 4.2 MB}", "quantize.scheme=int4", "quantize.group_size=64"]
    ranking = next(step for step in plan(load_recipe("mini", overrides), tmp_path) if step.name == "rank")
    written = ranking.folder / "plan.json"

    def found(inputs, folder):
        (folder / "plan.json").write_text(json.dumps(FOUND))
        return {"removed": ["decoder.5", "decoder.4"], "bits": {"decoder.6.mlp": 3}}

    before = prints(*overrides, run=str(tmp_path))
    replace(ranking, work=found).run()
    assert prints(*overrides, run=str(tmp_path)) == before
    written.write_text(json.dumps(edited, indent=1))
    now = prints(*overrides, run=str(tmp_path))
    assert [
        name for name in ("data", "teacher", "rank", "pruned", "distilled", "quantized") if now[name] != before[name]
    ] == stale
    written.unlink()
    assert prints(*overrides, run=str(tmp_path)) == before


def test_another_runtime_makes_nothing_stale():
    before, after = prints(), prints("export.for=[transformers, gguf]")
    assert {name for name in after if before.get(name) != after[name]} == {"exported gguf", "report"}
    changed = prints("export.for=[transformers, gguf]", "export.gguf.types=[f16]")
    assert {name for name in after if after[name] != changed[name]} == {"exported gguf", "report"}


def with_field(section: type[BaseModel], name: str, kind: Any, field: Any) -> type[BaseModel]:
    return create_model(section.__name__, __base__=section, **{name: (kind, field)})


def test_a_new_setting_or_section_with_a_neutral_default_invalidates_nothing():
    class Smoothing(Section):
        amount: float = 0.0
        kind: str = "uniform"

    Later = with_field(TrainSettings, "label_smoothing", float, Field(default=0.0))
    Later = with_field(Later, "smoothing", Smoothing, Field(default=Smoothing(kind="beta")))
    Later = with_field(Later, "teacher_forcing", Smoothing | None, Field(default=None))
    given = {"batch_size": 2, "learning_rate": 3e-5}

    def stage(train, **more):
        return fingerprint("teacher", {"seed": 0, "train": train, **more}, {"data": "abc"})

    before = stage(TrainSettings(**given))
    assert stage(Later(**given)) == before
    assert stage(Later(**given), smoothing=Smoothing()) == before  # a section of its own
    changed = [
        stage(Later(**given, label_smoothing=0.1)),
        stage(Later(**given, smoothing=Smoothing())),
        stage(Later(**given, teacher_forcing=Smoothing())),
        stage(Later(**given), smoothing=Smoothing(amount=0.5)),
    ]
    assert len({before, *changed}) == 5


def test_a_changed_default_changes_the_fingerprint_and_the_old_value_does_not():
    changed = Field(default=8, json_schema_extra={"neutral": 4})
    Later = with_field(TrainSettings, "batch_size", int, changed)
    before = fingerprint("teacher", {"train": TrainSettings()}, {})
    assert fingerprint("teacher", {"train": Later()}, {}) != before
    assert fingerprint("teacher", {"train": Later(batch_size=4)}, {}) == before


def neutral_values(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Path -> neutral value of every setting that a fingerprint leaves out at that value."""
    found = {}
    for name, field in section.model_fields.items():
        marks = field.json_schema_extra or {}
        if marks.get("result", True) is False or (field.is_required() and "neutral" not in marks):
            continue
        value = marks.get("neutral", field.get_default(call_default_factory=True))
        found[f"{section.__name__}.{name}"] = decisive(value)
    return found


def sections() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []

    def descend(one: type[BaseModel]) -> None:
        for child in one.__subclasses__():
            if child.__module__.startswith("trimlingual.") and child is not Recipe:
                found.append(child)
            descend(child)

    descend(Section)
    return found


def all_neutral_values() -> dict[str, Any]:
    return {path: value for section in sections() for path, value in neutral_values(section).items()}


def test_no_default_changed_without_saying_what_was_neutral():
    """Otherwise an old run made with the old default would pass for one made with the new one."""
    stated = json.loads(NEUTRAL_VALUES.read_text(encoding="utf-8"))
    now = all_neutral_values()
    wrong = {path: (value, now[path]) for path, value in stated.items() if path in now and now[path] != value}
    assert not wrong, 'state the old default: json_schema_extra={"neutral": ...}'
    assert not now.keys() - stated.keys(), f"new settings: run `python {Path(__file__).name}` in tests/ to state them"


def test_differences_name_values_also_where_one_is_the_default():
    old = {
        "settings": plain({"train": TrainSettings(batch_size=2)}),
        "decisive": decisive({"train": TrainSettings(batch_size=2)}),
    }
    new = {"train": TrainSettings(learning_rate=1e-3, num_workers=4)}
    assert differences(old, new, {}) == ["train.batch_size: 2 -> 4", "train.learning_rate: 1e-05 -> 0.001"]
    old = {"settings": {"rank": plain(RankSettings())}, "decisive": decisive({"rank": RankSettings()})}
    assert differences(old, {"rank": RankSettings(finetune_each_round=TrainSettings())}, {}) == [
        "rank.finetune_each_round: None -> {}"
    ]


def test_sections_within_sections():
    assert decisive(QuantizeSettings(scheme="nf4")) == {}
    train = TrainSettings(method="lora", epochs=1.0, num_workers=2)
    assert decisive(QuantizeSettings(scheme="nf4", train=train)) == {}
    assert decisive(QuantizeSettings(train=train)) == {"scheme": "int4", "rounding": "calibrated"}
    assert decisive({"decode": DecodeSettings(batch_size=1), "mix": MixSettings(gold=2)}) == {"mix": {"gold": 2}}


# --- contents


def copy_mini(folder: Path) -> Path:
    import trimlingual

    shutil.copytree(Path(trimlingual.__file__).parent / "mini" / "model", folder)
    return folder


def test_a_base_model_is_known_by_its_content_wherever_it_stands(tmp_path):
    cache = HashCache(tmp_path / "cache")
    first = copy_mini(tmp_path / "a")
    content = hash_model(first, cache)
    (first / "README.md").write_text("a card")
    moved = first.rename(tmp_path / "elsewhere")
    assert hash_model(moved, cache) == content
    assert prints(f"model.base={moved}") == prints() == prints("model.base=builtin:mini")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        other = copy_mini(tmp_path / name)
        data = bytearray((other / name).read_bytes())
        data[len(data) // 2] ^= 1  # in the middle: no size changes
        (other / name).write_bytes(data)
        assert hash_model(other, cache) != content, name


def test_lineage_counts_but_for_the_name_of_the_base(tmp_path):
    cache = HashCache(tmp_path / "cache")
    folder = copy_mini(tmp_path / "a")

    def content(**lineage):
        (folder / "lineage.json").write_text(json.dumps(lineage))
        return hash_model(folder, cache)

    assert (
        content(base="/home/a", layers=[1])
        == content(base="/home/b", layers=[1])
        != content(base="/home/a", layers=[2])
    )


def test_a_pipe_or_device_as_audio_keeps_nobody_waiting(tmp_path):
    """Neither the estimate of the work nor the hash of the content opens what never ends."""
    os.mkfifo(tmp_path / "pipe.wav")
    names = ["pipe.wav", "/dev/zero", "zero\0byte.wav"]
    lines = [json.dumps({"audio": name, "references": {"de": "Hallo."}, "id": name[:4]}) for name in names]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    code = (
        "from trimlingual.data.sources import source_files, speech_seconds\n"
        "from trimlingual.recipe import ManifestSource\n"
        "from trimlingual.run.fingerprint import HashCache\n"
        f"source = ManifestSource(path={str(tmp_path / 'm.jsonl')!r})\n"
        "print(speech_seconds(source, ['de'], float), *HashCache().hashes(source_files(source)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "missing", "missing", "missing"]
    problems = listing_problems(ManifestSource(path=str(tmp_path / "m.jsonl")), ["de"])
    assert problems
    assert problems[0].count("does not exist or is not a file") == 3


def test_hashes_are_remembered_by_size_and_time_of_change(tmp_path, monkeypatch):
    path, cache = tmp_path / "weights.safetensors", tmp_path / "cache"
    path.write_bytes(b"a" * 100)
    read = []
    monkeypatch.setattr(
        "trimlingual.run.fingerprint.hash_file", lambda path: read.append(path) or path.read_bytes().hex()[:4]
    )
    first = hash_files([path], HashCache(cache))
    assert hash_files([path], HashCache(cache)) == first
    assert len(read) == 1
    stat = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps the time
    assert hash_files([path], HashCache(cache)) != first
    assert len(read) == 2


def test_a_dry_run_reads_nothing_and_says_what(tmp_path):
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    known.write_bytes(b"1")
    unknown.write_bytes(b"22")
    content = hash_files([known], HashCache(tmp_path / "cache"))
    dry = HashCache(tmp_path / "cache", reading=False)
    assert hash_files([known], dry) == content
    assert hash_files([known, unknown], dry) == UNREAD
    assert dry.unread == {unknown: 2}
    assert fingerprint("stage", {}, {"a": UNREAD}) == UNREAD


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "clip"
    path.write_text("sound")
    assert hash_files([path], HashCache(tmp_path / "file" / "cache")) == hash_files(
        [path], HashCache(tmp_path / "cache")
    )


def test_processes_share_a_cache(tmp_path):
    """Several at once: every one gets the right answer, and what is kept is whole."""
    for i in range(40):
        (tmp_path / f"{i}.bin").write_bytes(bytes([i]) * 1000)
    code = (
        "import sys; from pathlib import Path; from trimlingual.run.fingerprint import HashCache, hash_files;"
        "root = Path(sys.argv[1]); print(hash_files(sorted(root.glob('*.bin')), HashCache(root / 'cache')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in processes}) == 1
    dry = HashCache(tmp_path / "cache", reading=False)
    assert hash_files(sorted(tmp_path.glob("*.bin")), dry) != UNREAD


def test_a_replaced_clip_or_listing_makes_the_data_stale(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    rows = [{"audio": name, "references": {"de": "Ja.", "zh": "是"}} for name in ("a.wav", "b.wav")]
    listing = tmp_path / "train.jsonl"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    override = f"data.train={{kind: manifest, path: {listing}}}"
    before = prints(override)
    assert prints(override) == before
    (tmp_path / "b.wav").write_bytes(b"c.wav" * 100)
    replaced = prints(override)
    assert all(replaced[name] != before[name] for name in ("data", "teacher", "report"))
    (tmp_path / "notes.txt").write_text("not a clip")
    assert prints(override) == replaced
    (tmp_path / "b.wav").unlink()
    assert prints(override)["data"] not in (before["data"], replaced["data"])


def test_planning_reads_nothing_where_nothing_stands(tmp_path):
    """So that what is wrong is said before 16 GB are downloaded or read."""
    dry = HashCache(tmp_path / "cache", reading=False)
    steps = plan(load_recipe("mini", ["model.base=someone/model"]), tmp_path / "run", dry)
    assert {step.status() for step in steps} == {"missing"}
    assert not dry.unread
    assert not dry.absent


# --- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A download as the Hub's client leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    copy_mini(repo / "snapshots" / commit)
    return repo / "snapshots" / commit


def test_a_download_of_the_same_files_is_the_same_model(hub, tmp_path):
    ref = base_ref(load_recipe("mini", ["model.base=someone/model"]), HashCache(tmp_path / "cache"))
    assert ref.fingerprint == base_ref(load_recipe("mini")).fingerprint
    assert ref.folder == hub
    assert ref.origin == f"someone/model@{hub.name}"
    # The download is gone: what is remembered stands for it, and a dry run knows it too.
    shutil.rmtree(hub)
    later = base_ref(load_recipe("mini", ["model.base=someone/model"]), HashCache(tmp_path / "cache", reading=False))
    assert later.fingerprint == ref.fingerprint


def test_half_a_download_is_not_taken_for_the_model(hub, tmp_path):
    assert is_whole(hub)
    (hub / "model.safetensors").unlink()
    assert not is_whole(hub)
    dry = HashCache(tmp_path / "cache", reading=False)
    assert base_ref(load_recipe("mini", ["model.base=someone/model"]), dry).fingerprint == UNREAD
    assert dry.absent == ["someone/model"]


def test_a_model_that_changed_on_the_hub_is_said(hub, tmp_path, monkeypatch):
    cache = HashCache(tmp_path / "cache")
    recipe = load_recipe("mini", ["model.base=someone/model"])
    planned = base_ref(recipe, cache)
    assert planned.fingerprint
    aside = hub.rename(tmp_path / "aside")
    moved_on = hub.with_name("f" * 40)

    def download(self):
        aside.rename(moved_on)
        (moved_on / "config.json").write_text((moved_on / "config.json").read_text() + "\n")
        return moved_on

    monkeypatch.setattr("trimlingual.step_inputs.HubRef._download", download)
    with pytest.raises(ArtifactError, match="someone/model has changed on the Hub"):
        _ = base_ref(recipe, cache).folder


if __name__ == "__main__":
    NEUTRAL_VALUES.write_text(json.dumps(all_neutral_values(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
