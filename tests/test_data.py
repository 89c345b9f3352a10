"""Splitting speech: held-out clips, the model's window, and the proof that no clip stands in two splits."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from scipy.signal import resample_poly

from trimlingual.data.audio import DataError, load_audio
from trimlingual.data.disjoint import check_disjoint, same_audio
from trimlingual.data.rows import MINI_DATA
from trimlingual.data.sources import Clip
from trimlingual.data.splits import Split, _hold_out_rows, load_splits, prepare_data
from trimlingual.recipe import DataSettings, ManifestSource, TaskSettings, load_recipe

from .made_sources import hub, make_hub_set, make_manifest, write_manifest, write_wav

GERMAN = TaskSettings(target_languages=["de"])


def clip(id: str, audio_hash: str) -> Clip:
    return Clip(id, Path(f"/audio/{id}-{audio_hash}.wav"), {"de": "Hallo"}, None, 1.0, audio_hash)


def test_split_hash_depends_on_all_that_matters_and_on_nothing_else():
    one, two = clip("a", "1"), clip("b", "2")
    base = Split("train", (one, two))
    assert base.hash == Split("test", (replace(one, source="x", audio=Path("elsewhere")), two)).hash
    changed = [(two, one), (one,), (replace(one, id="c"), two), (replace(one, audio_sha256="3"), two)]
    changed.append((replace(one, references={"de": "Tag"}), two))
    assert len({base.hash, *(Split("train", clips).hash for clips in changed)}) == 1 + len(changed)
    assert len(base.hash) == 16
    assert base.hours == 2 / 3600
    assert (base.ids, base.audio_hashes) == ({"a", "b"}, {"1", "2"})


def proven(**splits: list[Clip]) -> None:
    check_disjoint(splits, same_audio(splits))


def test_shared_ids_and_recordings_are_named():
    with pytest.raises(DataError) as caught:
        proven(
            train=[clip(f"t{index}", f"h{index}") for index in range(9)],
            select=[clip("t0", "other")],
            test=[clip(f"new{index}", f"h{index}") for index in range(2, 9)],
        )
    message = str(caught.value)
    assert "train and select share 1 id(s): 't0' (/audio/t0-h0.wav) = 't0' (/audio/t0-other.wav)" in message
    assert "train and test share 7 recording(s): 't2' (/audio/t2-h2.wav) = 'new2' (/audio/new2-h2.wav)" in message
    assert "'new6'" in message
    assert "'new7'" not in message
    assert "... and 2 more" in message
    assert "select and test" not in message


def test_an_id_twice_in_one_split_is_an_error():
    with pytest.raises(DataError, match=r"train holds 1 id\(s\) more than once: 'a' \(2 times\)"):
        proven(train=[clip("a", "1"), clip("a", "2"), clip("b", "3")])


def test_disjoint_splits_pass():
    proven(train=[clip("a", "1"), clip("b", "1")], test=[clip("c", "2")])


def test_prepared_splits_are_read_back_even_after_the_folder_is_renamed(tmp_path):
    make_hub_set(tmp_path, "d", 3, seed=50).save_to_disk(tmp_path / "set")
    settings = DataSettings(
        train=make_manifest(tmp_path, "train", 3, seed=0),
        select=make_manifest(tmp_path, "select", 2, seed=10),
        test=make_manifest(tmp_path, "test", 1, seed=20),
        out_of_domain=hub(tmp_path / "set", "dev"),
    )
    info = prepare_data(settings, GERMAN, tmp_path / "data.partial", window_s=30.0)
    (tmp_path / "data.partial").rename(tmp_path / "data")
    splits = load_splits(tmp_path / "data")
    assert [c.id for c in splits.train.clips] == ["train-0", "train-1", "train-2"]
    assert splits.out_of_domain is not None
    for split in (splits.train, splits.select, splits.test, splits.out_of_domain):
        expected = {"num_clips": len(split.clips), "hours": round(split.hours, 4), "hash": split.hash}
        assert info["splits"][split.name] == expected
        assert all(len(load_audio(c.audio)) == 3200 for c in split.clips)
    assert info["num_too_long_dropped"] == dict.fromkeys(("train", "select", "test", "out_of_domain"), 0)
    assert splits.train.clips[0].source == "sentence 0"


def test_held_out_clips_do_not_depend_on_the_order_of_the_file(tmp_path):
    made = make_manifest(tmp_path, "m", 20)

    def split(name: str, **changed: Any) -> dict[str, list[str]]:
        settings = DataSettings(train=made, **{"select": 3, "test": 5, **changed})
        info = prepare_data(settings, GERMAN, tmp_path / name, window_s=None)
        splits = load_splits(tmp_path / name)
        assert splits.out_of_domain is None
        found = {s.name: [c.id for c in s.clips] for s in (splits.train, splits.select, splits.test)}
        assert {name: len(ids) for name, ids in found.items()} == {
            name: described["num_clips"] for name, described in info["splits"].items()
        }
        return found

    first = split("first")
    assert {name: len(ids) for name, ids in first.items()} == {"train": 12, "select": 3, "test": 5}
    assert len({id for ids in first.values() for id in ids}) == 20
    lines = Path(made.path).read_text().splitlines()
    random.Random(3).shuffle(lines)
    Path(made.path).write_text("\n".join(lines))
    assert split("shuffled") == first
    assert split("other seed", split_seed=1)["test"] != first["test"]
    assert split("more to select by", select=6)["test"] == first["test"]  # test is drawn first
    own = make_manifest(tmp_path, "own", 2, seed=100)
    assert split("own test", test=own)["test"] == ["own-0", "own-1"]


def test_too_few_clips_to_hold_out(tmp_path):
    made = make_manifest(tmp_path, "m", 5)
    with pytest.raises(DataError, match=r"5 usable clips but data\.test 2 and data\.select 3 .* leaves 0"):
        prepare_data(DataSettings(train=made, select=3, test=2), GERMAN, tmp_path / "out", window_s=None)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    prepare_data(DataSettings(train=made, select=2, test=2), GERMAN, tmp_path / "out", window_s=None)


@pytest.mark.parametrize("role", ["select", "test"])
def test_out_of_domain_shares_nothing_with_what_is_selected_by_or_reported(tmp_path, role):
    sources = {
        name: make_manifest(tmp_path, name, 2, seed=10 * index)
        for index, name in enumerate(("train", "select", "test"))
    }
    same_audio = make_manifest(tmp_path, "ood", 1, seed={"select": 11, "test": 21}[role])
    settings = DataSettings(**sources, out_of_domain=same_audio)
    with pytest.raises(DataError, match=rf"{role} and out_of_domain share 1 recording\(s\): '{role}-1' .* = 'ood-0'"):
        prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)


def test_the_same_clip_held_out_and_trained_on_is_an_error(tmp_path):
    made = make_manifest(tmp_path, "m", 4)
    with pytest.raises(DataError, match=r"train and test share 3 id\(s\)"):
        prepare_data(DataSettings(train=made, select=1, test=made), GERMAN, tmp_path / "out", window_s=None)


def test_default_hub_ids_of_two_sets_do_not_clash_but_the_same_recording_does(tmp_path):
    make_hub_set(tmp_path, "d", 4).save_to_disk(tmp_path / "one")
    make_hub_set(tmp_path, "e", 2, seed=10).save_to_disk(tmp_path / "two")
    one, two = hub(tmp_path / "one", "train"), hub(tmp_path / "two", "train")
    settings = DataSettings(train=one, select=1, test=1, out_of_domain=two)
    prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
    splits = load_splits(tmp_path / "out")
    assert splits.out_of_domain is not None
    assert splits.out_of_domain.ids == {"out_of_domain-train-0", "out_of_domain-train-1"}
    assert splits.train.ids | splits.select.ids | splits.test.ids == {f"train-{index}" for index in range(4)}
    assert not splits.train.audio_hashes & splits.out_of_domain.audio_hashes
    with pytest.raises(DataError, match="and out_of_domain share"):
        prepare_data(settings.model_copy(update={"out_of_domain": one}), GERMAN, tmp_path / "out2", window_s=None)


def test_clips_beyond_the_window_are_refused_or_dropped_and_counted(tmp_path):
    made = make_manifest(tmp_path, "m", 4, seconds=1.0)
    write_wav(tmp_path / "audio" / "m-1.wav", 1, seconds=1.5)
    write_wav(tmp_path / "audio" / "m-2.wav", 2, seconds=2.5)
    own = make_manifest(tmp_path, "own", 1, seed=50)
    settings = DataSettings(train=made, select=1, test=own)
    with pytest.raises(DataError, match=r"^2 clip\(s\) .* window of 1 s \(2 in train\)") as caught:
        prepare_data(settings, GERMAN, tmp_path / "out", window_s=1.0)
    for says in ("'m-2' with 2.5 s", "first ids: 'm-1', 'm-2'", "data.too_long: drop"):
        assert says in str(caught.value)
    dropping = settings.model_copy(update={"too_long": "drop"})
    info = prepare_data(dropping, GERMAN, tmp_path / "out", window_s=1.0)
    assert info["num_too_long_dropped"] == {"train": 2, "test": 0}
    assert info["splits"]["train"]["num_clips"] + info["splits"]["select"]["num_clips"] == 2
    with pytest.raises(DataError, match=r"all clips of data\.train are longer"):
        prepare_data(dropping, GERMAN, tmp_path / "out", window_s=0.5)


def test_an_unreadable_file_is_not_dropped_even_when_long_ones_are(tmp_path):
    made = make_manifest(tmp_path, "m", 4)
    (tmp_path / "audio" / "m-1.wav").write_bytes(b"")
    settings = DataSettings(train=made, select=1, test=1, too_long="drop")
    with pytest.raises(DataError, match=r"line 2: .*m-1\.wav is empty"):
        prepare_data(settings, GERMAN, tmp_path / "out", window_s=30.0)


def test_missing_or_damaged_splits_are_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl is missing or damaged"):
        load_splits(tmp_path)
    made = make_manifest(tmp_path, "m", 4)
    prepare_data(DataSettings(train=made, select=1, test=1), GERMAN, tmp_path / "out", window_s=None)
    (tmp_path / "out" / "test.jsonl").write_text('{"id": "half')
    with pytest.raises(DataError, match=r"test\.jsonl is missing or damaged"):
        load_splits(tmp_path / "out")


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    settings = DataSettings(train=make_manifest(tmp_path, "m", 4), select=1, test=1)
    assert prepare_data(settings, GERMAN, tmp_path / "out", window_s=None) == {}
    assert not (tmp_path / "out").exists()


# --- what is heard


SPEECH = sorted((MINI_DATA / "audio").rglob("*.ogg"))[:20] or sorted(MINI_DATA.rglob("*.ogg"))[:20]


def speech_manifest(folder: Path, name: str, files: list[Path], **more: Any) -> ManifestSource:
    lines = [
        {"audio": str(file), "reference": f"{name} {index}", "id": f"{name}-{index}", **more}
        for index, file in enumerate(files)
    ]
    return ManifestSource(path=str(write_manifest(folder / f"{name}.jsonl", lines)))


@pytest.mark.parametrize("how", ["flac", "mp3", "opus", "quieter", "8 kHz", "start cut off"])
def test_a_copy_in_another_form_is_the_same_recording(tmp_path, how):
    samples, rate = sf.read(SPEECH[0])
    path = tmp_path / {"flac": "a.flac", "mp3": "a.mp3", "opus": "a.ogg"}.get(how, "a.wav")
    if how == "quieter":
        samples = samples * 0.3
    if how == "8 kHz":
        samples, rate = resample_poly(samples, 1, 2), rate // 2
    sf.write(
        path, samples[1037:] if how == "start cut off" else samples, rate, subtype="OPUS" if how == "opus" else None
    )
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", SPEECH[:8]),
        select=speech_manifest(tmp_path, "select", SPEECH[8:12]),
        test=speech_manifest(tmp_path, "test", [*SPEECH[12:], path]),
    )
    if how == "flac":  # sample by sample the same
        with pytest.raises(DataError, match=r"train and test share 1 recording\(s\): 'train-0' .* = 'test-8'"):
            prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
    else:
        info = prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
        assert any("train and test: 1 pair(s)" in w and "'train-0' and 'test-8'" in w for w in info["warnings"])


def test_sentences_that_share_a_word_and_their_silence_are_not_the_same_recording(tmp_path):
    """As one synthetic voice speaks them: the same first word, sample by sample, and nothing else but silence in common."""
    word = sf.read(SPEECH[0])[0][4_000:12_000]
    for index, file in enumerate(SPEECH[1:7]):
        samples, rate = sf.read(file)
        sf.write(tmp_path / f"{index}.wav", np.concatenate([word, samples[4_000:20_000], np.zeros(24_000)]), rate)
    made = sorted(tmp_path.glob("*.wav"))
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", made[:2]),
        select=speech_manifest(tmp_path, "select", made[2:4]),
        test=speech_manifest(tmp_path, "test", made[4:]),
    )
    assert not prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)["warnings"]


def test_a_recording_twice_in_a_split_is_said(tmp_path):
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", SPEECH[:4]),
        select=speech_manifest(tmp_path, "select", [SPEECH[4], SPEECH[5], SPEECH[4]]),
        test=speech_manifest(tmp_path, "test", SPEECH[6:8]),
    )
    (warning,) = prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)["warnings"]
    assert warning == "select holds 1 recording(s) again, which count twice: 'select-0' = 'select-2'"


def test_unusable_clips_are_refused_or_dropped_and_counted(tmp_path):
    sf.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    sf.write(tmp_path / "short.wav", np.full(100, 0.5), 16_000)
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", [*SPEECH[:4], tmp_path / "silent.wav"]),
        select=speech_manifest(tmp_path, "select", SPEECH[4:6]),
        test=speech_manifest(tmp_path, "test", [tmp_path / "short.wav", SPEECH[6]]),
    )
    with pytest.raises(DataError, match=r"^2 clip\(s\) hold nothing") as caught:
        prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
    for says in ("train 'train-4'", "silent", "test 'test-0'", "too short", "data.unusable: drop"):
        assert says in str(caught.value)
    dropping = settings.model_copy(update={"unusable": "drop"})
    info = prepare_data(dropping, GERMAN, tmp_path / "out", window_s=None)
    assert info["num_unusable_dropped"] == {"train": 1, "select": 0, "test": 1}
    assert load_splits(tmp_path / "out").test.ids == {"test-1"}


def test_clipped_clips_are_said_and_kept(tmp_path):
    samples, rate = sf.read(SPEECH[0])
    sf.write(tmp_path / "loud.wav", np.clip(samples * 50, -1, 1), rate)
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", [tmp_path / "loud.wav", SPEECH[1]]),
        select=speech_manifest(tmp_path, "select", SPEECH[4:6]),
        test=speech_manifest(tmp_path, "test", SPEECH[6:8]),
    )
    info = prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
    assert info["splits"]["train"]["num_clips"] == 2
    assert "1 clip(s) of train may be damaged: 'train-0' is clipped" in info["warnings"][0]


def test_references_that_nobody_says_in_so_little_time_are_named(tmp_path):
    """One of them is trained on as any other, and its tokens can fill the memory."""
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", SPEECH[:3]),
        select=speech_manifest(tmp_path, "select", SPEECH[4:6]),
        test=speech_manifest(tmp_path, "test", SPEECH[6:8]),
    )
    assert prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)["warnings"] == []
    listing = Path(settings.train.path)
    listing.write_text(listing.read_text().replace("train 1", " ".join(["Wort"] * 3000)))
    (warning,) = prepare_data(settings, GERMAN, tmp_path / "again", window_s=None)["warnings"]
    assert warning.startswith(
        "1 reference(s) of train are too long for their clips: 'train-1' in 'de' (14,999 characters for "
    )


def test_equal_source_sentences_are_said_or_dropped_from_training(tmp_path):
    settings = DataSettings(
        train=speech_manifest(tmp_path, "train", SPEECH[:2], source="Good morning, Mary!"),
        select=speech_manifest(tmp_path, "select", SPEECH[2:4], source="Another one."),
        test=speech_manifest(tmp_path, "test", SPEECH[4:5], source="good  morning \uff2dary"),
        out_of_domain=speech_manifest(tmp_path, "ood", SPEECH[5:7]),
    )
    info = prepare_data(settings, GERMAN, tmp_path / "out", window_s=None)
    assert "train and test share 1 source sentence(s)" in info["warnings"][0]
    assert "num_equal_sources_dropped" not in info
    dropping = settings.model_copy(update={"equal_sources": "drop"})
    with pytest.raises(DataError, match=r"every clip of data\.train has a source sentence"):
        prepare_data(dropping, GERMAN, tmp_path / "out", window_s=None)
    both = json.loads(Path(settings.train.path).read_text().split("\n")[1])
    lines = [
        {**both, "audio": str(SPEECH[0]), "source": "GOOD MORNING MARY", "id": "x"},
        {**both, "source": "Good evening."},
    ]
    write_manifest(Path(settings.train.path), lines)
    info = prepare_data(dropping, GERMAN, tmp_path / "out", window_s=None)
    assert info["num_equal_sources_dropped"] == {"train": 1, "out_of_domain": 0}
    assert (info["splits"]["train"]["num_clips"], info["warnings"]) == (1, [])


# --- the paper's split


def test_rows_are_held_out_as_train_test_split_does():
    datasets = pytest.importorskip("datasets")
    rows = [clip(f"{index}", str(index)) for index in range(884)]
    one = ManifestSource(path="unused")
    settings = DataSettings(train=one, test=100, select=100, hold_out="train_test_split")
    clips = {"train": list(rows)}
    _hold_out_rows(settings, clips)
    published = datasets.Dataset.from_dict({"row": range(884)}).train_test_split(test_size=100, seed=0)
    drawn = np.random.default_rng(0).permutation(884)
    assert {int(c.id) for c in clips["test"]} == set(published["test"]["row"]) == set(drawn[:100].tolist())
    assert {int(c.id) for c in clips["select"]} == set(published["train"]["row"][:100]) == set(drawn[100:200].tolist())
    assert len(clips["train"]) == 684
    assert all(found == sorted(found, key=lambda c: int(c.id)) for found in clips.values())


def test_what_is_dropped_does_not_change_which_rows_are_held_out(tmp_path):
    made = make_manifest(tmp_path, "m", 12, seconds=0.2)
    settings = DataSettings(train=made, test=3, select=3, hold_out="train_test_split", too_long="drop")
    prepare_data(settings, GERMAN, tmp_path / "all", window_s=1.0)
    before = load_splits(tmp_path / "all")
    write_wav(tmp_path / "audio" / f"{before.test.clips[0].id}.wav", 77, seconds=1.5)
    info = prepare_data(settings, GERMAN, tmp_path / "fewer", window_s=1.0)
    after = load_splits(tmp_path / "fewer")
    assert info["num_too_long_dropped"] == {"train": 0, "test": 1, "select": 0}
    assert after.test.ids == before.test.ids - {before.test.clips[0].id}
    assert (after.select.ids, after.train.ids) == (before.select.ids, before.train.ids)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").glob("qwen2-audio-*.yaml")), ids=lambda p: p.stem
)
def test_the_recipes_hold_out_the_published_clips(path):
    data = load_recipe(str(path)).data
    assert (data.hold_out, data.test, data.select, data.split_seed) == ("train_test_split", 100, 100, 0)
    assert data.train.splits == ["dev", "eval"]
