"""Reading, checking and splitting speech; every file is written by libsndfile for the test that needs it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from trimlingual import data
from trimlingual.data import (
    Clip,
    DataError,
    Split,
    check_disjoint,
    load_audio,
    load_splits,
    prepare_data,
    read_source,
    source_fingerprint,
)
from trimlingual.recipe import (
    BuiltinSource,
    Covost2Source,
    DataSettings,
    FolderSource,
    HubSource,
    ManifestSource,
    TaskSettings,
)

GERMAN = TaskSettings(target_languages=["de"])


def sine(seconds: float = 0.5, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, seed: int, seconds: float = 0.2) -> Path:
    """A recording like no other seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000)), 16_000)
    return path


def write_manifest(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def make_manifest(folder: Path, name: str, num: int, seed: int = 0, seconds: float = 0.2) -> ManifestSource:
    """`num` clips with ids `<name>-<index>`."""
    lines = []
    for index in range(num):
        audio = write_wav(folder / "audio" / f"{name}-{index}.wav", seed + index, seconds)
        lines.append({"audio": f"audio/{audio.name}", "reference": f"Satz {index}", "source": f"sentence {index}"})
    return ManifestSource(path=str(write_manifest(folder / f"{name}.jsonl", lines)))


def read_lines(tmp_path: Path, lines: list[Any], languages: tuple[str, ...] = ("de",)) -> list[Clip]:
    source = ManifestSource(path=str(write_manifest(tmp_path / "m.jsonl", lines)))
    return read_source(source, languages, tmp_path / "work")


def clip(id: str, audio_hash: str) -> Clip:
    return Clip(id, Path(f"/audio/{id}-{audio_hash}.wav"), {"de": "Hallo"}, None, 1.0, audio_hash)


# --- load_audio


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (8_000, 1), (44_100, 2), (48_000, 1)])
def test_any_format_and_rate_becomes_16_khz_mono_of_the_same_pitch_and_length(tmp_path, ending, rate, channels):
    path = tmp_path / f"a.{ending}"
    sf.write(path, np.repeat(sine(1.0, rate)[:, None], channels, axis=1), rate)
    audio = load_audio(path)
    assert audio.dtype == np.float32
    assert audio.shape == (16_000,)
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))  # 1 s long: bin = Hz
    assert spectrum.argmax() == 440
    assert np.abs(audio[2000:-2000]).max() == pytest.approx(0.5, abs=0.05)


def test_16_khz_is_not_resampled(tmp_path):
    samples = sine()
    sf.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), samples)


def test_stereo_is_averaged(tmp_path):
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1).astype(np.float32)
    sf.write(tmp_path / "a.wav", stereo, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), np.full(100, 0.125, np.float32))


def test_audio_longer_than_one_block_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "READ_FRAMES", 1000)
    sf.write(tmp_path / "a.wav", sine(), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), sine())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"this is not audio at all" * 50, "not audio"),
        ("no samples", "no samples"),
        ("nan", "NaN"),
        ("infinite", "infinite"),
    ],
)
def test_bad_files_are_named(tmp_path, content, says):
    path = tmp_path / "bad.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        samples = {"no samples": [], "nan": [0.0, np.nan], "infinite": [0.0, np.inf]}[content]
        sf.write(path, np.array(samples, np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match=says) as caught:
        load_audio(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_not_audio(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        load_audio(tmp_path)


@pytest.mark.parametrize("keep", [0.98, 0.5])
@pytest.mark.parametrize(
    ("ending", "subtype"),
    [
        ("wav", "PCM_16"),
        ("wav", "FLOAT"),
        ("flac", None),
        ("ogg", "VORBIS"),
        ("ogg", "OPUS"),
        ("mp3", None),
        ("aiff", None),
        ("au", "PCM_16"),
    ],
)
def test_a_truncated_file_is_never_taken_for_a_shorter_one(tmp_path, ending, subtype, keep):
    path = tmp_path / f"a.{ending}"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype=subtype)
    assert len(load_audio(path)) == 48_000
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match="cut short"):
        load_audio(path)


def test_an_ogg_file_cut_between_two_pages_is_truncated(tmp_path):
    path = tmp_path / "a.ogg"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, subtype="OPUS")
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"OggS")])
    assert 0 < sf.info(path).frames < 48_000  # libsndfile takes it for a shorter file
    with pytest.raises(DataError, match="cut short"):
        load_audio(path)


def test_a_stream_recorded_to_a_pipe_is_not_taken_for_a_truncated_one(tmp_path):
    path = tmp_path / "a.wav"
    sf.write(path, sine(), 16_000)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"  # what ffmpeg writes when it cannot seek back
    path.write_bytes(content)
    assert len(load_audio(path)) == len(sine())


# --- manifests


def test_manifest_is_read_as_written(tmp_path):
    write_wav(tmp_path / "x" / "one.wav", 1, seconds=0.25)
    two = write_wav(tmp_path / "two.wav", 2)
    nfd = "u\u0308ber\u2028Nacht"
    lines = [
        "\ufeff"
        + json.dumps({"audio": "x/one.wav", "reference": f"  {nfd} ", "source": "over night", "duration_s": 99}),
        "",
        "   ",
        json.dumps({"audio": str(two), "references": {"de": "Zwei", "zh": "二"}, "id": "second", "voice": "slt"}),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines).replace("\\u2028", "\u2028"), encoding="utf-8")
    first, second = read_source(ManifestSource(path=str(tmp_path / "m.jsonl")), ["de"], tmp_path)
    assert first.id == "one"
    assert first.audio == tmp_path / "x" / "one.wav"
    assert first.references == {"de": "\u00fcber\u2028Nacht"}
    assert first.source == "over night"
    assert first.duration_s == 0.25
    assert first.audio_sha256 == data.hash_file(first.audio)
    assert (second.id, second.audio, second.source) == ("second", two, None)
    assert second.references == {"de": "Zwei"}


def test_several_languages_are_kept(tmp_path):
    write_wav(tmp_path / "a.wav", 1)
    (found,) = read_lines(tmp_path, [{"audio": "a.wav", "references": {"de": "Eins", "zh": "一"}}], ("de", "zh"))
    assert found.references == {"de": "Eins", "zh": "一"}


def test_every_problem_is_reported_at_once_with_its_line(tmp_path):
    write_wav(tmp_path / "good.wav", 1)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio")
    cut = write_wav(tmp_path / "cut.wav", 2)
    cut.write_bytes(cut.read_bytes()[:-1000])
    lines = [
        {"audio": "good.wav", "reference": "gut"},
        "{not json",
        {"reference": "no audio key"},
        ["a", "list"],
        {"audio": "good.wav", "id": "5"},
        {"audio": "good.wav", "id": "6", "reference": " \t "},
        {"audio": "good.wav", "id": "7", "references": {"fr": "bon"}},
        {"audio": "good.wav", "id": "8", "reference": 8},
        {"audio": "gone.wav", "reference": "x"},
        {"audio": "empty.wav", "reference": "x"},
        {"audio": "text.wav", "reference": "x"},
        {"audio": "cut.wav", "reference": "x"},
        {"audio": "good.wav", "reference": "id good again"},
        {"audio": "good.wav", "id": ["x"], "reference": "x"},
        {"audio": "good.wav", "id": "15", "references": "x"},
    ]
    with pytest.raises(DataError, match=r"m\.jsonl has 14 problem\(s\)") as caught:
        read_lines(tmp_path, lines)
    reported = str(caught.value).splitlines()[1:]
    expected = {
        2: "not JSON",
        3: "no audio",
        4: "no audio",
        **dict.fromkeys(range(5, 9), "reference for 'de' is missing, empty or not text"),
        9: "does not exist",
        10: "is empty",
        11: "not audio",
        12: "cut short",
        13: "was used in line 1",
        14: "id is ['x']",
        15: "must map languages",
    }
    assert len(reported) == len(expected)
    for line, (number, says) in zip(reported, expected.items()):
        assert line.startswith(f"  line {number}: ")
        assert says in line


def test_only_the_first_20_problems_are_spelled_out(tmp_path):
    with pytest.raises(DataError, match=r"has 23 problem\(s\)") as caught:
        read_lines(tmp_path, ["{"] * 23)
    assert "line 20:" in str(caught.value)
    assert "line 21:" not in str(caught.value)
    assert str(caught.value).endswith("... and 3 more")


def test_one_reference_does_not_serve_two_languages(tmp_path):
    write_wav(tmp_path / "a.wav", 1)
    with pytest.raises(DataError, match="write `references` for de, zh"):
        read_lines(tmp_path, [{"audio": "a.wav", "reference": "Eins"}], ("de", "zh"))


def test_an_empty_or_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no clips"):
        read_lines(tmp_path, [""])
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read_source(ManifestSource(path=str(tmp_path / "none.jsonl")), ["de"], tmp_path)
    (tmp_path / "latin.jsonl").write_bytes("größer".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_source(ManifestSource(path=str(tmp_path / "latin.jsonl")), ["de"], tmp_path)


def test_the_built_in_speech_is_a_manifest_beside_the_package(tmp_path, monkeypatch):
    make_manifest(tmp_path, "everyday", 2)
    monkeypatch.setattr(data, "MINI_DATA", tmp_path)
    found = read_source(BuiltinSource(kind="builtin", split="everyday"), ["de"], tmp_path)
    assert [c.id for c in found] == ["everyday-0", "everyday-1"]


# --- folders, CoVoST 2, Hub sets


def test_folder_with_metadata(tmp_path):
    write_wav(tmp_path / "clips" / "a.wav", 1)
    write_wav(tmp_path / "b.wav", 2)
    (tmp_path / "metadata.csv").write_text(
        'file_name,en,de,key\nclips/a.wav,"Yes, yes","Ja, ja",k1\nb.wav,No,Nein,k2\n'
    )
    source = FolderSource(kind="folder", path=str(tmp_path), references={"de": "de"}, source="en", id="key")
    first, second = read_source(source, ["de"], tmp_path)
    assert (first.id, first.source, first.references) == ("k1", "Yes, yes", {"de": "Ja, ja"})
    assert (second.id, second.audio) == ("k2", tmp_path / "b.wav")
    assert read_source(source.model_copy(update={"id": None, "source": None}), ["de"], tmp_path)[0].id == "a"


def test_folder_problems(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,de\n,Ja\na.wav,\n")
    source = FolderSource(kind="folder", path=str(tmp_path), references={"de": "de"})
    with pytest.raises(DataError, match=r"has 3 problem\(s\)") as caught:
        read_source(source, ["de"], tmp_path)
    for says in ("line 2: file_name is empty", "line 3: reference for 'de'", "line 3: " + str(tmp_path / "a.wav")):
        assert says in str(caught.value)
    with pytest.raises(DataError, match=r"no column german \(it has file_name, de\)"):
        read_source(source.model_copy(update={"references": {"de": "german"}}), ["de"], tmp_path)
    with pytest.raises(DataError, match="names no column for zh, only for de"):
        read_source(source, ["de", "zh"], tmp_path)


def make_covost2(tmp_path: Path, num: int = 6) -> Covost2Source:
    rows = ["path\tsentence\ttranslation\tsplit"]
    for index in range(num):
        write_wav(tmp_path / "cv" / "clips" / f"common_voice_en_{index}.wav", index)
        split = ["train", "dev"][index % 2]
        rows.append(f'common_voice_en_{index}.wav\t"Quoted" {index}\t"Zitat" {index}\t{split}')
    (tmp_path / "covost_v2.en_de.tsv").write_text("\n".join(rows) + "\n")
    tsv, voice = str(tmp_path / "covost_v2.en_de.tsv"), str(tmp_path / "cv")
    return Covost2Source(kind="covost2", tsv=tsv, common_voice=voice, target_language="de")


def test_covost2(tmp_path):
    source = make_covost2(tmp_path)
    everything = read_source(source, ["de"], tmp_path)
    assert [c.id for c in everything] == [f"common_voice_en_{index}" for index in range(6)]
    assert everything[1].references == {"de": '"Zitat" 1'}
    assert everything[1].source == '"Quoted" 1'
    dev = read_source(source.model_copy(update={"split": "dev"}), ["de"], tmp_path)
    assert [c.id[-1] for c in dev] == ["1", "3", "5"]


def test_covost2_takes_the_first_of_a_fixed_shuffle(tmp_path):
    source = make_covost2(tmp_path)
    four = [c.id for c in read_source(source.model_copy(update={"max_clips": 4}), ["de"], tmp_path)]
    two = [c.id for c in read_source(source.model_copy(update={"max_clips": 2}), ["de"], tmp_path)]
    assert len(four) == 4
    assert two == four[:2]
    assert four != sorted(four)
    header, *rows = Path(source.tsv).read_text().splitlines()
    Path(source.tsv).write_text("\n".join([header, *reversed(rows)]))
    assert [c.id for c in read_source(source.model_copy(update={"max_clips": 4}), ["de"], tmp_path)] == four


def test_covost2_file_of_one_split_and_without_sentences(tmp_path):
    source = make_covost2(tmp_path, 1)
    path = tmp_path / "covost_v2.en_de.train.tsv"
    path.write_text("path\ttranslation\ncommon_voice_en_0.wav\tJa\n")
    source = source.model_copy(update={"tsv": str(path), "split": "train"})
    assert read_source(source, ["de"], tmp_path)[0].source is None
    with pytest.raises(DataError, match="no split column to find 'dev'"):
        read_source(source.model_copy(update={"split": "dev"}), ["de"], tmp_path)


def test_covost2_problems(tmp_path):
    source = make_covost2(tmp_path)
    with pytest.raises(DataError, match=r"target_language 'de' but task\.target_languages is de, zh"):
        read_source(source, ["de", "zh"], tmp_path)
    for index in (2, 3):
        (tmp_path / "cv" / "clips" / f"common_voice_en_{index}.wav").unlink()
    with pytest.raises(DataError, match=r"2 of 6 clips .* are not in .*common_voice_en_2\.wav, common_voice_en_3\.wav"):
        read_source(source, ["de"], tmp_path)


def make_hub_set(tmp_path: Path, name: str, num: int, seed: int = 0) -> Any:
    datasets = pytest.importorskip("datasets")
    rows: dict[str, list[Any]] = {"audio": [], "text_de": [], "text_en": [], "key": []}
    for index in range(num):
        content = write_wav(tmp_path / "made" / f"{name}{index}.wav", seed + index).read_bytes()
        rows["audio"].append({"bytes": content, "path": f"{index}.wav"})
        rows["text_de"].append(f"Satz {index}")
        rows["text_en"].append(f"sentence {index}")
        rows["key"].append(100 + index)
    return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())  # decoded by default, as on the Hub


def hub(path: Path, *splits: str, **more: Any) -> HubSource:
    return HubSource(kind="hub", path=str(path), splits=list(splits), references={"de": "text_de"}, **more)


def test_hub_set_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"dev": make_hub_set(tmp_path, "d", 2), "eval": make_hub_set(tmp_path, "e", 1, seed=10)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    found = read_source(hub(tmp_path / "set", "dev", "eval", source="text_en"), ["de"], tmp_path / "work")
    assert [c.id for c in found] == ["dev-0", "dev-1", "eval-0"]
    assert [c.audio for c in found] == [tmp_path / "work" / "audio" / f"{c.id}.wav" for c in found]
    assert found[1].references == {"de": "Satz 1"}
    assert found[1].source == "sentence 1"
    assert found[2].audio.read_bytes() == (tmp_path / "made" / "e0.wav").read_bytes()
    named = read_source(hub(tmp_path / "set", "dev", id="key"), ["de"], tmp_path / "work")
    assert [c.id for c in named] == ["100", "101"]


def test_hub_set_of_one_split_and_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    made = make_hub_set(tmp_path, "d", 2)
    made.save_to_disk(tmp_path / "one")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    for folder in ("one", "parquet"):
        assert len(read_source(hub(tmp_path / folder, "train"), ["de"], tmp_path / "work")) == 2
    with pytest.raises(DataError, match="single split"):
        read_source(hub(tmp_path / "one", "dev", "test"), ["de"], tmp_path)
    with pytest.raises(DataError, match=r"'nope' of .* cannot be loaded"):
        read_source(hub(tmp_path / "parquet", "nope"), ["de"], tmp_path)


def test_hub_audio_is_written_once_and_repaired(tmp_path):
    make_hub_set(tmp_path, "d", 2).save_to_disk(tmp_path / "set")
    source = hub(tmp_path / "set", "dev")
    first, second = read_source(source, ["de"], tmp_path / "work")
    before = first.audio.stat().st_mtime_ns
    second.audio.write_bytes(b"half")  # as a killed copy would leave it
    assert read_source(source, ["de"], tmp_path / "work") == [first, second]
    assert first.audio.stat().st_mtime_ns == before


def test_hub_problems(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = make_hub_set(tmp_path, "d", 2)
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no column text_xx \(it has "):
        read_source(hub(tmp_path / "set", "dev", source="text_xx"), ["de"], tmp_path)
    rows = {"audio": [{"bytes": b"junk", "path": None}, None], "text_de": ["Ja", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"has 2 problem\(s\)") as caught:
        read_source(hub(tmp_path / "bad", "dev"), ["de"], tmp_path / "work")
    assert "dev[0]: " in str(caught.value)
    assert "not audio" in str(caught.value)
    assert "dev[1]: no audio" in str(caught.value)
    datasets.Dataset.from_dict({"audio": [[0.1, 0.2]], "text_de": ["Ja"]}).save_to_disk(tmp_path / "arrays")
    with pytest.raises(DataError, match="not audio files"):
        read_source(hub(tmp_path / "arrays", "dev"), ["de"], tmp_path)


# --- fingerprints


def test_fingerprints_follow_the_content(tmp_path):
    made = make_manifest(tmp_path, "a", 1)
    before = source_fingerprint(made)
    Path(made.path).touch()
    assert source_fingerprint(made) == before
    Path(made.path).write_text(Path(made.path).read_text() + "\n")
    assert source_fingerprint(made) != before
    covost2 = make_covost2(tmp_path)
    assert source_fingerprint(covost2)["sha256"] == data.hash_file(Path(covost2.tsv))
    with pytest.raises(DataError, match="does not exist"):
        source_fingerprint(FolderSource(kind="folder", path=str(tmp_path / "no"), references={"de": "de"}))


def test_hub_fingerprints(tmp_path):
    remote = HubSource(kind="hub", path="someone/set", revision="abc", splits=["dev"], references={"de": "text_de"})
    assert source_fingerprint(remote) == {"kind": "hub", "path": "someone/set", "name": None, "revision": "abc"}
    make_hub_set(tmp_path, "d", 2).save_to_disk(tmp_path / "set")
    before = source_fingerprint(hub(tmp_path / "set", "dev"))
    assert source_fingerprint(hub(tmp_path / "set", "dev")) == before
    state = (
        tmp_path / "set" / "state.json"
    )  # its _fingerprint follows the content; a change may leave every size as it was
    state.write_text(state.read_text()[::-1])
    assert source_fingerprint(hub(tmp_path / "set", "dev")) != before


# --- splits


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


def test_shared_ids_and_recordings_are_named():
    splits = {
        "train": Split("train", tuple(clip(f"t{index}", f"h{index}") for index in range(9))),
        "select": Split("select", (clip("t0", "other"),)),
        "test": Split("test", tuple(clip(f"new{index}", f"h{index}") for index in range(2, 9))),
    }
    with pytest.raises(DataError) as caught:
        check_disjoint(splits)
    message = str(caught.value)
    assert "train and select share 1 id(s): 't0' (/audio/t0-h0.wav) = 't0' (/audio/t0-other.wav)" in message
    assert "train and test share 7 recording(s): 't2' (/audio/t2-h2.wav) = 'new2' (/audio/new2-h2.wav)" in message
    assert "'new6'" in message
    assert "'new7'" not in message
    assert "... and 2 more" in message
    assert "select and test" not in message


def test_an_id_twice_in_one_split_is_an_error():
    with pytest.raises(DataError, match=r"train holds 1 id\(s\) more than once: 'a' \(2 times\)"):
        check_disjoint({"train": Split("train", (clip("a", "1"), clip("a", "2"), clip("b", "3")))})


def test_disjoint_splits_pass():
    check_disjoint(
        {"train": Split("train", (clip("a", "1"), clip("b", "1"))), "test": Split("test", (clip("c", "2"),))}
    )


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
