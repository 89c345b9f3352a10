"""Reading each kind of source: what is taken from it, and what is said of each line that cannot be used."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile as sf

from trimlingual.data import hub as hub_module
from trimlingual.data import rows
from trimlingual.data.audio import DataError, inspect_audio
from trimlingual.data.hub import COMMIT_FILE, resolve_commit
from trimlingual.data.sources import Clip, listing_problems, read_source, source_fingerprint
from trimlingual.recipe import BuiltinSource, Covost2Source, FolderSource, HubSource, ManifestSource
from trimlingual.run.artifacts import hash_file

from .made_sources import hub, make_hub_set, make_manifest, write_manifest, write_wav


def read_lines(tmp_path: Path, lines: list[Any], languages: tuple[str, ...] = ("de",)) -> list[Clip]:
    source = ManifestSource(path=str(write_manifest(tmp_path / "m.jsonl", lines)))
    return read_source(source, languages, tmp_path / "work")


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
    assert first.audio_sha256 == inspect_audio(first.audio).samples_sha256
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


@pytest.mark.parametrize("part", ["offset", "start", "begin"])
def test_a_manifest_of_parts_of_recordings_is_refused(tmp_path, part):
    """Each line would be trained on with the whole recording."""
    write_wav(tmp_path / "talk.wav", 1)
    lines = [{"audio": "talk.wav", "id": str(n), part: 0.5 * n, "duration": 0.5, "reference": "ja"} for n in range(2)]
    with pytest.raises(DataError, match=f"line 2: {part} is 0.5, but recordings are read whole"):
        read_lines(tmp_path, lines)
    assert len(read_lines(tmp_path, lines[:1])) == 1


def test_an_id_twice_is_found_before_anything_is_decoded(tmp_path):
    write_wav(tmp_path / "a.wav", 1)
    lines = [{"audio": "a.wav", "id": "x", "reference": text} for text in ("eins", "zwei")]
    source = ManifestSource(path=str(write_manifest(tmp_path / "m.jsonl", lines)))
    (problem,) = listing_problems(source, ["de"])
    assert "line 2: id 'x' was used in line 1" in problem


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
    monkeypatch.setattr(rows, "MINI_DATA", tmp_path)
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


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            "file_name,de\na.wav,Hallo\nb.wav,Guten Tag, du\n",
            r"line 3 has 1 cell\(s\) more than the header, the first ' du'",
        ),
        ('file_name,de\na.wav,"Hallo\nb.wav,Tag\n', "a quote in it may not be closed"),
        ('file_name,de\na.wav,"Hallo" sagt er\n', "a quote in it may not be closed or not be doubled"),
        ("file_name,de,de\na.wav,Hallo,Tag\n", "has more than one column de"),
    ],
)
def test_a_table_that_would_lose_text_is_refused(tmp_path, table, says):
    for name in ("a.wav", "b.wav"):
        write_wav(tmp_path / name, 1)
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(DataError, match=says):
        read_source(FolderSource(kind="folder", path=str(tmp_path), references={"de": "de"}), ["de"], tmp_path)


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


def test_hub_set_saved_to_disk(tmp_path):
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


@pytest.mark.parametrize("path", ["~/sets/acl", "./acl", "/sets/acl"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(path):
    source = HubSource(kind="hub", path=path, splits=["train"], references={"de": "de"})
    assert resolve_commit(source, ask=True) is None
    (problem,) = listing_problems(source, ["de"])
    assert problem.startswith(f"{path} does not exist or is no folder")


def test_hub_problems(tmp_path):
    made = make_hub_set(tmp_path, "d", 2)
    # Not of audio: datasets 4.0 cannot save an empty column of it.
    empty = datasets.Dataset.from_dict({"audio": [], "text_de": []})
    datasets.DatasetDict({"dev": empty}).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError):
        read_source(hub(tmp_path / "empty", "dev"), ["de"], tmp_path)
    made.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no column text_xx \(it has "):
        read_source(hub(tmp_path / "set", "dev", source="text_xx"), ["de"], tmp_path)
    rows = {"audio": [{"bytes": b"junk", "path": None}, None], "text_de": ["Ja", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "texts")
    with pytest.raises(DataError, match=r"has 1 problem\(s\):\n  dev\[1\]: reference for 'de' is missing"):
        read_source(hub(tmp_path / "texts", "dev"), ["de"], tmp_path / "early")
    assert not (tmp_path / "early").exists()  # texts come before audio
    datasets.Dataset.from_dict({**rows, "text_de": ["Ja", "Nein"]}).save_to_disk(tmp_path / "bad")
    with pytest.raises(DataError, match=r"has 2 problem\(s\)") as caught:
        read_source(hub(tmp_path / "bad", "dev"), ["de"], tmp_path / "work")
    assert "dev[0]: " in str(caught.value)
    assert "not audio" in str(caught.value)
    assert "dev[1]: column 'audio': no audio" in str(caught.value)
    datasets.Dataset.from_dict({"audio": [[0.1, 0.2]], "text_de": ["Ja"]}).save_to_disk(tmp_path / "arrays")
    with pytest.raises(DataError, match="samples alone do not tell their rate"):
        read_source(hub(tmp_path / "arrays", "dev"), ["de"], tmp_path)


def test_hub_set_of_samples_and_nested_texts(tmp_path):
    samples = [0.1, -0.2, 0.3] * 1000
    rows = {
        "audio": [{"array": samples, "sampling_rate": 8_000}, {"array": [samples, samples], "sampling_rate": 8_000}],
        "translation": [{"en": "One", "de": "Eins"}, {"en": "Two", "de": "Zwei"}],
    }
    rows["audio"][1] = {"array": samples[::-1], "sampling_rate": 8_000}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    source = hub(tmp_path / "set", "dev", source="translation.en")
    for column in ("translation.de", "translation"):
        first, second = read_source(source.model_copy(update={"references": {"de": column}}), ["de"], tmp_path / "work")
        assert (first.references, first.source, first.duration_s) == ({"de": "Eins"}, "One", 3000 / 8000)
        assert second.references == {"de": "Zwei"}
    np.testing.assert_array_equal(sf.read(first.audio, dtype="float32")[0], np.float32(samples))
    before = first.audio.stat().st_mtime_ns
    assert read_source(source.model_copy(update={"references": {"de": "translation"}}), ["de"], tmp_path / "work")
    assert first.audio.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"no column text\.de"):
        read_source(source.model_copy(update={"references": {"de": "text.de"}}), ["de"], tmp_path)
    with pytest.raises(DataError, match=r"dev\[0\]: reference for 'de' is missing"):
        read_source(source.model_copy(update={"references": {"de": "translation.fr"}}), ["de"], tmp_path)


def test_samples_that_cannot_be_audio_are_named(tmp_path):
    rows = {
        "audio": [
            {"array": [], "sampling_rate": 8_000},
            {"array": [0.1], "sampling_rate": 0},
            {"array": [2000.0] * 2000, "sampling_rate": 1_000},
        ],
        "text_de": ["Ja"] * 3,
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"has 3 problem\(s\)") as caught:
        read_source(hub(tmp_path / "set", "dev"), ["de"], tmp_path / "work")
    for says in (
        "dev[0]: column 'audio': array is",
        "dev[1]: column 'audio': sampling_rate is 0",
        "dev[2]:",
        "scale of integers",
    ):
        assert says in str(caught.value)


def test_folder_with_metadata_jsonl(tmp_path):
    write_wav(tmp_path / "a.wav", 1)
    rows = [{"file_name": "a.wav", "translation": {"de": "Ja"}, "n": 7}]
    write_manifest(tmp_path / "metadata.jsonl", rows)
    source = FolderSource(kind="folder", path=str(tmp_path), references={"de": "translation.de"}, id="n")
    (found,) = read_source(source, ["de"], tmp_path)
    assert (found.id, found.references) == ("7", {"de": "Ja"})
    write_manifest(tmp_path / "metadata.jsonl", [*rows, "{", [1], {"de": "Ja"}])
    with pytest.raises(DataError, match=r"has 3 problem\(s\)"):
        read_source(source, ["de"], tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name\n")
    with pytest.raises(DataError, match=r"holds metadata\.csv and metadata\.jsonl"):
        read_source(source, ["de"], tmp_path)


def test_covost2_rows_of_its_first_version_belong_to_train(tmp_path):
    source = make_covost2(tmp_path)
    path = Path(source.tsv)
    path.write_text(path.read_text().replace("\ttrain\n", "\ttrain_covost\n", 1))
    assert [c.id[-1] for c in read_source(source.model_copy(update={"split": "train"}), ["de"], tmp_path)] == [
        "0",
        "2",
        "4",
    ]


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_from_other_systems_are_found(tmp_path, written, stored):
    name = unicodedata.normalize(stored, "gr\u00fc\u00dfe")
    write_wav(tmp_path / name / f"{name}.wav", 1)
    asked = unicodedata.normalize(written, "gr\u00fc\u00dfe")
    for path in (f"{asked}/{asked}.wav", f"{asked}\\{asked}.wav", f".\\{asked}/{asked}.wav"):
        (found,) = read_lines(tmp_path, [{"audio": path, "reference": "Ja"}])
        assert found.audio.is_file()
    write_wav(tmp_path / "back\\slash.wav", 2)  # a name of its own on this system
    assert read_lines(tmp_path, [{"audio": "back\\slash.wav", "reference": "Ja"}])[0].audio.name == "back\\slash.wav"


# --- fingerprints


def test_fingerprints_follow_the_content(tmp_path):
    made = make_manifest(tmp_path, "a", 1)
    before = source_fingerprint(made)
    Path(made.path).touch()
    assert source_fingerprint(made) == before
    Path(made.path).write_text(Path(made.path).read_text() + "\n")
    assert source_fingerprint(made) != before
    covost2 = make_covost2(tmp_path)
    assert source_fingerprint(covost2)["sha256"] == hash_file(Path(covost2.tsv))
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


def test_the_commit_of_a_hub_set_is_kept(tmp_path, monkeypatch):
    loaded = make_hub_set(tmp_path, "d", 2).cast_column("audio", datasets.Audio(decode=False))
    commit = "0123456789abcdef0123456789abcdef01234567"
    loaded.info.download_checksums = {f"hf://datasets/someone/set@{commit}/data/dev.parquet": {"num_bytes": 1}}
    monkeypatch.setattr(hub_module, "_load_split", lambda source, split: loaded)
    read_source(hub(tmp_path / "set", "dev"), ["de"], tmp_path / "work")
    assert (tmp_path / "work" / COMMIT_FILE).read_text() == commit
