from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from trimlingual.run import artifacts
from trimlingual.run.artifacts import (
    ARTIFACT_FILE,
    ArtifactError,
    append_jsonl,
    find_artifact,
    produce,
    read_artifact,
    read_journal,
    write_text,
)
from trimlingual.run.progress import LOG_FILE


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


def test_an_error_before_anything_was_made_leaves_nothing_in_the_way(tmp_path):
    def refuses(folder):
        (folder / LOG_FILE).write_text("reading")
        raise ValueError("no such column")

    with pytest.raises(ValueError, match="no such column"):
        produce(tmp_path / "a", "stage", {"column": "wrong"}, {}, refuses)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert produce(tmp_path / "a", "stage", {"column": "right"}, {}, work).info == {"answer": 42}


def test_half_work_of_other_settings_is_kept_until_it_is_given_up(tmp_path):
    def dies(folder):
        (folder / "half.txt").write_text("half")
        (folder / "scratch" / "checkpoint-40").mkdir(parents=True)
        append_jsonl(folder / "journal.jsonl", {"i": 1})
        append_jsonl(folder / "journal.jsonl", {"i": 2})
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "a", "stage", {"x": 1}, {"data": "old"}, dies)
    with pytest.raises(ArtifactError) as caught:
        produce(tmp_path / "a", "stage", {"x": 2}, {"data": "new"}, work)
    for said in (
        "x: 1 -> 2",
        "input data changed",
        "after step 40",
        "2 lines in journal.jsonl",
        "0 minutes",
        "--force",
    ):
        assert said in str(caught.value)
    assert (tmp_path / "a.partial" / "half.txt").exists()
    produce(tmp_path / "a", "stage", {"x": 2}, {"data": "new"}, work, force=True)
    assert not (tmp_path / "a" / "half.txt").exists()


def make(folder, x=1, force=False, stage="stage"):
    return produce(folder, stage, {"x": x}, {}, work, force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["a", "a.partial"])
def test_a_folder_of_the_users_is_never_touched(tmp_path, name, force):
    (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / name / "deep" / "thesis.txt").write_text("three years")
    with pytest.raises(ArtifactError, match=rf"{name} was not made by this tool .*holds deep"):
        make(tmp_path / "a", force=force)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        name,
        f"{name}/deep",
        f"{name}/deep/thesis.txt",
    ]


@pytest.mark.parametrize("record", ["{", "[]", '{"name": "of another program"}'])
def test_another_programs_record_is_no_mark(tmp_path, record):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ARTIFACT_FILE).write_text(record)
    with pytest.raises(ArtifactError, match=r"artifact\.json"):
        make(tmp_path / "a", force=True)
    assert (tmp_path / "a" / ARTIFACT_FILE).read_text() == record


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_lock_of_the_users_is_refused(tmp_path, force):
    for name in ("a", "a.partial", ".a.lock", ".a.replaced"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ArtifactError, match=name):
            make(tmp_path / "a", force=force)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        make(tmp_path / "file" / "a", force=force)


def test_a_kill_while_removing_leaves_what_is_still_known_as_the_tools(tmp_path, monkeypatch):
    def dies(folder):
        for i in range(3):
            (folder / f"checkpoint-{i}").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "a", "stage", {"x": 1}, {}, dies)
    rmtree, removed = shutil.rmtree, []

    def slow(path, **keywords):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        rmtree(path, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", slow)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "a", x=2, force=True)
    assert len(list((tmp_path / "a.partial").iterdir())) == 3
    assert make(tmp_path / "a", x=2, force=True).files == {"result.txt": 4}


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    assert make(tmp_path / "a").info == {"answer": 42}
    (tmp_path / "b.partial").mkdir()
    assert make(tmp_path / "b").info == {"answer": 42}


def test_the_folder_one_stands_in_is_refused(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for folder in (Path("."), Path(".."), Path("/"), tmp_path):
        with pytest.raises(ArtifactError, match="the folder this command runs in"):
            make(folder, force=True)


def test_what_was_put_into_or_changed_in_an_artefact_is_not_removed(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"did not make \(sub/notes\.txt\)"):
        make(tmp_path / "a", x=2, force=True)
    make(tmp_path / "a")  # nothing to do, so nothing is in the way
    (tmp_path / "a" / "sub" / "notes.txt").unlink()
    (tmp_path / "a" / "result.txt").write_text("done, and edited by hand")
    with pytest.raises(ArtifactError, match=r"changed since \(result\.txt\)"):
        make(tmp_path / "a", x=2, force=True)
    (tmp_path / "a" / "result.txt").write_text("done")
    assert make(tmp_path / "a", x=2, force=True).settings == {"x": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_linked_folder_stays_linked(tmp_path):
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "big")
    make(tmp_path / "a")
    make(tmp_path / "a", x=2, force=True)
    assert (tmp_path / "a").is_symlink()
    assert read_artifact(tmp_path / "disk" / "big").settings == {"x": 2}


@pytest.mark.parametrize("dying_call", [0, 1, 2, 3])
def test_a_kill_while_replacing_loses_neither(tmp_path, monkeypatch, dying_call):
    """Before and after each renaming and removal of the exchange, one of the two is whole, and the next run ends it."""
    make(tmp_path / "a")
    calls = []

    def dying(function, matters):
        def call(*arguments, **keywords):
            if matters(arguments):
                calls.append(arguments)
                if len(calls) == dying_call + 1:
                    raise KeyboardInterrupt
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        folders = ("a", "a.partial", ".a.replaced")
        patch.setattr(os, "replace", dying(os.replace, lambda arguments: arguments[0].name in folders))
        patch.setattr(artifacts, "remove", dying(artifacts.remove, lambda arguments: True))
        if dying_call < 3:
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path / "a", x=2, force=True)
        else:
            make(tmp_path / "a", x=2, force=True)
            assert len(calls) == 3
    whole = [
        path for path in tmp_path.iterdir() if (path / ARTIFACT_FILE).is_file() and (path / "result.txt").is_file()
    ]
    assert whole

    def never(folder):
        raise AssertionError("the work was done already")

    assert produce(tmp_path / "a", "stage", {"x": 2}, {}, never, force=dying_call < 2).settings == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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


def test_a_kill_while_scratch_is_removed_repeats_no_work(tmp_path, monkeypatch):
    """Checkpoints and journals go only when nothing depends on them any more."""

    def scratches(folder):
        (folder / "scratch").mkdir()
        (folder / "scratch" / "checkpoint").write_text("big")
        return work(folder)

    def dies(folder, **_):
        (folder / "checkpoint").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            produce(tmp_path / "a", "stage", {}, {}, scratches)

    def never(folder):
        raise AssertionError("the work was done already")

    assert produce(tmp_path / "a", "stage", {}, {}, never).files == {"result.txt": 4}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [ARTIFACT_FILE, "result.txt"]


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


@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_disk_without_locks_is_worked_on_and_named(tmp_path, monkeypatch, capsys, error):
    """And nothing is left there that would keep out the run after one that was killed."""
    if error != "ENOSYS" and not hasattr(FileLock, "fallback_to_soft"):
        pytest.skip("older versions of filelock take it for a lock that somebody holds")

    def flock(_descriptor, _operation):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    def looks(folder):
        assert not any(path.stat().st_size for path in tmp_path.glob(".a.lock"))
        return work(folder)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert produce(tmp_path / "a", "stage", {}, {}, looks).info == {"answer": 42}
    assert f"the disk of {tmp_path} has no locks" in capsys.readouterr().err.replace("\n", " ")
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
