from __future__ import annotations

import json
import os

import pytest

from trimlingual.artifacts import (
    ARTIFACT_FILE,
    ArtifactError,
    append_jsonl,
    find_artifact,
    produce,
    read_artifact,
    read_journal,
    write_text,
)


def work(folder):
    (folder / "result.txt").write_text("done")
    return {"answer": 42}


def test_made_once_then_found(tmp_path):
    calls = []

    def counted(folder):
        calls.append(folder)
        return work(folder)

    first = produce(tmp_path / "a", "stage", {"x": 1}, {"data": "abc"}, counted)
    again = produce(tmp_path / "a", "stage", {"x": 1}, {"data": "abc"}, counted)
    assert len(calls) == 1
    assert first == again
    assert first.info == {"answer": 42}
    assert not (tmp_path / "a.partial").exists()


def test_other_settings_stop_and_name_the_change(tmp_path):
    produce(tmp_path / "a", "stage", {"section": {"x": 1}}, {}, work)
    with pytest.raises(ArtifactError, match=r"section\.x: 1 -> 2.*--force"):
        produce(tmp_path / "a", "stage", {"section": {"x": 2}}, {}, work)
    with pytest.raises(ArtifactError, match="input data changed"):
        produce(tmp_path / "a", "stage", {"section": {"x": 1}}, {"data": "new"}, work)
    assert produce(tmp_path / "a", "stage", {"section": {"x": 2}}, {}, work, force=True).settings == {
        "section": {"x": 2}
    }


def test_half_work_is_never_an_artefact_and_is_gone_on_with(tmp_path):
    def dies(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "a", "stage", {"x": 1}, {}, dies)
    assert find_artifact(tmp_path / "a") is None
    with pytest.raises(ArtifactError, match=r"not finished .*a\.partial"):
        read_artifact(tmp_path / "a")
    seen = []
    produce(tmp_path / "a", "stage", {"x": 1}, {}, lambda folder: seen.append((folder / "half.txt").exists()) or {})
    assert seen == [True]
    assert (tmp_path / "a" / "half.txt").exists()


def test_half_work_of_other_settings_is_thrown_away(tmp_path):
    def dies(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "a", "stage", {"x": 1}, {}, dies)
    produce(tmp_path / "a", "stage", {"x": 2}, {}, work)
    assert not (tmp_path / "a" / "half.txt").exists()


def test_killed_between_the_last_write_and_the_renaming(tmp_path, monkeypatch):
    replace = os.replace

    def dies(source, target):
        if str(target).endswith("/a"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "a", "stage", {}, {}, work)
    assert find_artifact(tmp_path / "a") is None
    monkeypatch.setattr(os, "replace", replace)

    def never(folder):
        raise AssertionError("the work was done already")

    assert produce(tmp_path / "a", "stage", {}, {}, never).info == {"answer": 42}


def test_one_run_at_a_time(tmp_path):
    """The second run is told who is at it, and touches nothing; afterwards, also after a failure, the next one may."""

    def intruded(folder):
        with pytest.raises(ArtifactError, match=f"another run is making .*process {os.getpid()} on "):
            produce(tmp_path / "a", "stage", {"x": 2}, {}, work, force=True)
        assert folder.is_dir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "a", "stage", {"x": 1}, {}, intruded)
    produce(tmp_path / "a", "stage", {"x": 1}, {}, work)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_scratch_is_removed(tmp_path):
    def scratches(folder):
        (folder / "scratch").mkdir()
        (folder / "scratch" / "checkpoint").write_text("big")
        return {}

    produce(tmp_path / "a", "stage", {}, {}, scratches)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [ARTIFACT_FILE]


def test_damaged_and_foreign_folders(tmp_path):
    with pytest.raises(ArtifactError, match="not an artefact"):
        read_artifact(tmp_path)
    (tmp_path / ARTIFACT_FILE).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        read_artifact(tmp_path)


def test_journal_survives_a_cut_last_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    for i in range(3):
        append_jsonl(path, {"i": i, "text": "狗"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [r["i"] for r in read_journal(path)] == [0, 1]
    append_jsonl(path, {"i": 2, "text": "狗"})
    assert path.read_bytes() == whole


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old"


def test_record_names_versions_but_no_paths(tmp_path):
    artifact = produce(tmp_path / "a", "stage", {}, {}, work)
    assert artifact.machine["versions"]["torch"]
    assert str(tmp_path) not in (tmp_path / "a" / ARTIFACT_FILE).read_text()
    assert "path" not in json.loads((tmp_path / "a" / ARTIFACT_FILE).read_text())
