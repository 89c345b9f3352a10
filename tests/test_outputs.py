"""Where translations go: files of one's own are safe, a run that was stopped goes on, one broken recording stops no other."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from trimlingual.app import outputs
from trimlingual.app import recordings as app_recordings
from trimlingual.app.outputs import JOURNAL_FILE, MADE_FILE, OutputFolder, rendered
from trimlingual.app.recordings import Given, readable, recordings
from trimlingual.app.translate import App, translate_files
from trimlingual.cli import app
from trimlingual.data.audio import DataError, describe_audio
from trimlingual.data.rows import MINI_DATA
from trimlingual.models.loading import resolve_base
from trimlingual.recipe import list_recipes
from trimlingual.run.artifacts import ArtifactError, alone
from trimlingual.run.jsonl import read_jsonl

from .damage import mutate_bytes

CLIPS = read_jsonl(MINI_DATA / "everyday.jsonl")[:3]
GERMAN = [clip["references"]["de"] for clip in CLIPS]


@pytest.fixture
def talks(tmp_path) -> Path:
    folder = tmp_path / "talks"
    folder.mkdir()
    for number, clip in enumerate(CLIPS):
        shutil.copy(MINI_DATA / clip["audio"], folder / f"{number}.ogg")
    return folder


def translate(*words: object):
    return CliRunner().invoke(app, ["translate", "builtin:mini", *map(str, words), "--to", "de", "--device", "cpu"])


def test_one_broken_recording_stops_no_other(talks):
    (talks / "1.ogg").write_bytes(b"OggS, or so it says")
    done = translate(talks)
    assert done.exit_code == 3
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["text"] for record in records] == [GERMAN[0], "", GERMAN[2]]
    assert "1.ogg is cut short" in records[1]["error"]
    assert "1 could not be read" in done.stderr
    assert translate(talks / "1.ogg").exit_code == 1
    into = ["--out-dir", talks / "out"]
    assert [translate(talks, *into).exit_code for _ in range(2)] == [3, 3], "what an earlier run translated counts too"


def test_an_answer_that_stayed_wrong_shows_in_the_exit_code(talks, tmp_path):
    """The built-in model was not made for French. What an earlier run left counts too."""
    words = ["translate", "builtin:mini", str(talks / "0.ogg"), "--to", "fr", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 4
    assert json.loads(done.stdout)["segments"][0]["fault"] == "wrong language"
    assert "0.ogg (fr) stayed wrong at 0.0 s (wrong language)" in done.stderr
    into = [*words, "--format", "srt", "--out-dir", str(tmp_path / "out")]
    assert [CliRunner().invoke(app, into).exit_code for _ in range(2)] == [4, 4]
    (talks / "1.ogg").write_bytes(b"OggS, or so it says")
    assert CliRunner().invoke(app, [*words[:3], str(talks / "1.ogg"), *words[3:]]).exit_code == 3


def test_files_of_ones_own_are_never_overwritten(talks, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.de.srt").write_text("mine")
    for force in ([], ["--force"]):
        done = translate(talks, "--format", "srt", "--out-dir", out, *force)
        assert done.exit_code == 1
        assert "0.de.srt was not made by this command" in str(done.exception)
        assert (out / "0.de.srt").read_text() == "mine"
        assert sorted(os.listdir(out)) == ["0.de.srt"]


@pytest.mark.parametrize("name", [MADE_FILE, JOURNAL_FILE])
@pytest.mark.parametrize("content", ['{"files": {}}', "[1, 2]", "notes of mine"])
def test_not_even_those_that_have_our_names(talks, tmp_path, name, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    for force in ([], ["--force"]):
        done = translate(talks, "--format", "srt", "--out-dir", out, *force)
        assert f"{name} was not made by this command" in str(done.exception)
        assert (out / name).read_text() == content
        assert os.listdir(out) == [name]


@pytest.mark.parametrize("name", ["0.de.srt", MADE_FILE, JOURNAL_FILE])
@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_folders_and_links_of_ones_own_stay(talks, tmp_path, name, kind):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).mkdir() if kind == "folder" else (out / name).symlink_to(tmp_path / "on another disk")
    done = translate(talks, "--format", "srt", "--out-dir", out, "--force")
    assert f"{name} was not made by this command" in str(done.exception)
    assert os.listdir(out) == [name]
    assert (out / name).is_dir() if kind == "folder" else (out / name).is_symlink()


def test_a_file_in_the_folders_place_and_beside_its_files_stays(talks, tmp_path):
    (tmp_path / "notes").write_text("mine")
    done = translate(talks, "--format", "srt", "--out-dir", tmp_path / "notes")
    assert "notes is a file; move it away" in str(done.exception)
    done = translate(talks, "--out-dir", tmp_path / "notes" / "out")
    assert "notes is a file, so " in str(done.exception)
    (tmp_path / "unplugged").symlink_to(tmp_path / "disk")
    done = translate(talks, "--format", "srt", "--out-dir", tmp_path / "unplugged")
    assert "unplugged is a link to nothing; move it away" in str(done.exception)
    for name in ("0.de.srt.tmp", f"{MADE_FILE}.tmp"):
        (tmp_path / name).write_text("mine")
    assert translate(talks / "0.ogg", "--format", "srt", "--out-dir", tmp_path).exit_code == 0
    assert {(tmp_path / name).read_text() for name in ("0.de.srt.tmp", f"{MADE_FILE}.tmp", "notes")} == {"mine"}


@pytest.mark.parametrize("content", ["mine", ""])
def test_a_lock_of_ones_own_stays(tmp_path, content):
    """Taking it as the lock would empty it, and remove it in the end. An empty one is as we leave it in a kill, a link never is."""
    lock, aim = tmp_path / f".{MADE_FILE}.lock", tmp_path / "aim"
    aim.write_text(content)
    lock.symlink_to(aim) if not content else lock.write_text(content)
    with pytest.raises(ArtifactError, match="was not made by this tool"), alone(tmp_path / MADE_FILE):
        pass
    assert (lock.read_text(), lock.is_symlink()) == (content, not content)


def test_a_file_that_came_while_the_command_ran_stays(talks, tmp_path):
    """Corrected by hand, say, while --force makes the others again."""
    given = Given("0.ogg", talks / "0.ogg")
    record = {"audio": "0.ogg", "language": "de", "text": "Hallo."}
    for force in (False, True):
        folder = OutputFolder(tmp_path, "text", ["de"], {}, force)
        assert folder.left([given]) == [given]
        mine = tmp_path / "0.de.txt"
        mine.write_text("mine")
        with pytest.raises(DataError, match=r"0\.de\.txt was not made by this command, or was changed since"):
            folder.write(given, record)
        assert mine.read_text() == "mine"
        mine.unlink()
        folder.write(given, record)


def test_files_are_made_once_and_again_only_by_force(talks, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert translate(talks, "--format", "text", "--out-dir", out).exit_code == 0
    assert [(out / f"{i}.de.txt").read_text(encoding="utf-8").strip() for i in range(3)] == GERMAN
    assert sorted(os.listdir(out)) == ["0.de.txt", "1.de.txt", "2.de.txt", MADE_FILE]
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "App", None)  # nothing is left to translate
        assert translate(talks, "--format", "text", "--out-dir", out).exit_code == 0
    shutil.copy(talks / "2.ogg", talks / "0.ogg")
    done = translate(talks, "--format", "text", "--out-dir", out)
    assert "was made from another recording or with other settings" in str(done.exception)
    assert translate(talks, "--format", "text", "--out-dir", out, "--force").exit_code == 0
    assert (out / "0.de.txt").read_text(encoding="utf-8").strip() == GERMAN[2]
    (out / "1.de.txt").write_text("corrected by hand")
    done = translate(talks, "--format", "text", "--out-dir", out, "--force")
    assert "was changed since" in str(done.exception)
    assert (out / "1.de.txt").read_text() == "corrected by hand"


def test_another_model_or_another_prompt_makes_other_translations(talks, tmp_path):
    """What stands in a model's folder counts, not the folder's name; and what a recipe says, not the recipe's name."""
    folder, recipe = tmp_path / "model", tmp_path / "mine.yaml"
    shutil.copytree(resolve_base("builtin:mini"), folder)
    shutil.copy(list_recipes()["mini"], recipe)
    words = ["translate", str(folder), str(talks / "0.ogg"), "--to", "de", "--device", "cpu", "--recipe", str(recipe)]
    words += ["--out-dir", str(tmp_path / "out")]
    assert [CliRunner().invoke(app, words).exit_code for _ in range(2)] == [0, 0]
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("max_new_tokens: 64", "max_new_tokens: 3"), encoding="utf-8")
    assert "with other settings" in str(CliRunner().invoke(app, words).exception)
    recipe.write_text(text, encoding="utf-8")
    assert CliRunner().invoke(app, words).exit_code == 0
    os.utime(folder / "model.safetensors")  # made anew
    assert "with other settings" in str(CliRunner().invoke(app, words).exception)


def test_a_run_that_was_stopped_goes_on_with_what_is_left(talks, tmp_path, monkeypatch):
    out, batches = tmp_path / "out", []
    translated = App._batches

    def stops(self, ahead):
        for number, batch in enumerate(translated(self, ahead)):
            if number == stop_at:
                raise KeyboardInterrupt
            batches.append(list(batch))
            yield batch

    stop_at = 2
    monkeypatch.setattr(App, "_batches", stops)
    monkeypatch.setattr("trimlingual.decoding.translate_clips.CPU_BATCH", 1)
    translate(talks, "--format", "srt", "--out-dir", out)
    assert (out / JOURNAL_FILE).is_file()
    done = translate(talks, "--format", "vtt", "--out-dir", out)
    assert "unfinished work of other settings (2 segments)" in str(done.exception)
    batches.clear()
    stop_at = 99
    assert translate(talks, "--format", "srt", "--out-dir", out).exit_code == 0
    assert len(batches) == 1
    assert sorted(os.listdir(out)) == ["0.de.srt", "1.de.srt", "2.de.srt", MADE_FILE]


def test_a_kill_at_any_write_is_gone_on_from(talks, tmp_path, monkeypatch):
    """At each in turn, and then at the first of the next start: nothing is taken for somebody else's, no segment is lost."""
    translated, fsync, batches = [], os.fsync, App._batches

    def counted(self, ahead):
        for batch in batches(self, ahead):
            translated.extend(batch)
            yield batch

    def run(out: Path, num_writes: int):
        def dies(descriptor):
            nonlocal num_writes
            num_writes -= 1
            if num_writes < 0:
                raise KeyboardInterrupt
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dies)
            return translate(talks / "0.ogg", "--format", "srt", "--out-dir", out)

    monkeypatch.setattr(App, "_batches", counted)
    for kills in range(99):
        out = tmp_path / f"out-{kills}"
        translated.clear()
        if run(out, kills).exit_code == 0:
            break
        run(out, 0)
        done = run(out, 99)
        assert done.exit_code == 0, done.exception
        assert sorted(os.listdir(out)) == ["0.de.srt", MADE_FILE]
        assert len(translated) == 1
    assert kills > 3


def test_two_commands_do_not_write_into_one_folder(talks, tmp_path):
    out = tmp_path / "out"
    with alone(out / MADE_FILE):
        done = translate(talks, "--format", "srt", "--out-dir", out)
    assert "another run is making" in str(done.exception)
    assert os.listdir(out) == []
    assert translate(talks, "--format", "srt", "--out-dir", out).exit_code == 0


def test_formats():
    segments = [{"start": 0.0, "end": 2.0, "text": "Hallo."}, {"start": 2.5, "end": 3.0, "text": ""}]
    record = {"audio": "a.wav", "language": "de", "text": "Hallo.", "duration_s": 3.0, "segments": segments}
    assert rendered(record, "text") == "Hallo.\n"
    assert json.loads(rendered(record, "json")) == record
    assert rendered(record, "srt") == "1\n00:00:00,000 --> 00:00:02,000\nHallo.\n\n"
    assert rendered(record, "vtt").startswith("WEBVTT\n\n00:00:00.000")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{talks}", "--format", "srt"], "needs --out-dir"),
        (["{talks}", "--format", "docx"], "--format docx is unknown; choose one of json, text, srt, vtt"),
        (["{talks}/nothing*.wav"], "no file matches"),
        (
            ["{talks}/0.ogg", "{talks}/../0.wav", "--format", "text", "--out-dir", "{talks}/out"],
            "would both be written as 0.",
        ),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(talks, monkeypatch, words, problem):
    monkeypatch.setattr(outputs, "App", None)
    done = translate(*[word.format(talks=talks) for word in words])
    assert done.exit_code == 1
    assert problem in str(done.exception)


def test_patterns_folders_and_standard_input(talks, tmp_path, monkeypatch):
    (talks / "notes.txt").write_text("no sound")
    names = [f"{talks}/{i}.ogg" for i in range(3)]
    assert [each.name for each in recordings([talks], tmp_path)] == names
    assert [each.name for each in recordings([f"{talks}/[12].ogg", talks / "1.ogg"], tmp_path)] == names[1:]
    monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": io.BytesIO((talks / "0.ogg").read_bytes())}))
    (given,) = recordings(["-"], tmp_path)
    assert (given.name, given.stem) == ("-", "stdin")
    assert given.path.read_bytes() == (talks / "0.ogg").read_bytes()


def test_messages_name_standard_input_and_no_scratch_file(monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": io.BytesIO(b"no sound at all")}))
    (record,) = translate_files("builtin:mini", ["-"], ["de"])
    assert record["error"].startswith("standard input is not audio")


def test_a_video_says_that_it_needs_ffmpeg(tmp_path, monkeypatch):
    video = tmp_path / "talk.mp4"
    video.write_bytes(b"\0" * 100)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"talk.mp4 needs ffmpeg, which is not installed here"):
        readable(Given(str(video), video), tmp_path)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_video_is_decoded_by_ffmpeg(talks, tmp_path):
    import subprocess

    video = tmp_path / "talk.mkv"
    subprocess.run(["ffmpeg", "-v", "error", "-i", talks / "0.ogg", "-c:a", "copy", video], check=True)
    assert json.loads(translate(video).stdout)["text"] == GERMAN[0]
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    assert "may be cut short or damaged: ffmpeg decoded" in json.loads(translate(video).stdout)["warning"]
    assert "note: " + str(video) + ": the recording may be cut short" in translate(video, "--format", "text").stderr
    video.write_bytes(whole[:64])
    assert "ffmpeg cannot decode" in json.loads(translate(video).stdout)["error"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("ending", ["mp4", "m4a", "mov", "mkv", "webm", "avi", "aac", "wma", "3gp"])
def test_ffmpeg_opens_these_and_no_playlist(talks, tmp_path, ending):
    """A playlist under the name of a video would have it open other files."""
    import subprocess

    video = tmp_path / f"talk.{ending}"
    codec = ["-c:a", "libopus"] if ending == "webm" else ["-c:a", "wmav2"] if ending == "wma" else ["-c:a", "aac"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", talks / "0.ogg", *codec, video], check=True)
    sound, suspicious = readable(Given(str(video), video), tmp_path)
    assert sound.stat().st_size > 10_000
    assert suspicious is None
    sound, suspicious = readable(Given(str(video), video), tmp_path, 0.5)
    assert describe_audio(sound).duration_s == pytest.approx(1.5, abs=0.1)
    assert suspicious is None
    shutil.copy(talks / "0.ogg", tmp_path / "other.ogg")
    video.write_text("ffconcat version 1.0\nfile other.ogg\n", encoding="utf-8")
    with pytest.raises(DataError, match="ffmpeg cannot decode"):
        readable(Given(str(video), video), tmp_path)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_damaged_videos_are_errors_or_recordings(talks, tmp_path):
    import subprocess

    for ending, codec in (
        ("mp4", "aac"),
        ("mkv", "aac"),
        ("webm", "libopus"),
        ("avi", "aac"),
        ("wma", "wmav2"),
        ("aac", "aac"),
    ):
        video = tmp_path / f"talk.{ending}"
        subprocess.run(["ffmpeg", "-v", "error", "-i", talks / "0.ogg", "-t", "1", "-c:a", codec, video], check=True)
        whole, refused = video.read_bytes(), 0
        for seed in range(20):
            rng = random.Random(seed)
            video.write_bytes(mutate_bytes(rng, whole, rng.choice([60, 400, 4000])))
            try:
                describe_audio(readable(Given(str(video), video), tmp_path, 30.0)[0], 30.0)
            except DataError:
                refused += 1
        assert refused > 0, ending


@pytest.fixture
def stuck(tmp_path, monkeypatch) -> Path:
    """A video, and an ffmpeg that writes its process id to `pid` and then does nothing."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}.new; mv {tmp_path / 'pid'}.new {tmp_path / 'pid'}; exec sleep 600\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent) + os.pathsep + os.environ["PATH"])
    video = tmp_path / "talk.mp4"
    video.write_bytes(b"\0" * 100)
    return video


def is_running(pid: Path) -> bool:
    return psutil.pid_exists(int(pid.read_text()))


def test_an_ffmpeg_that_is_stuck_is_ended(stuck, tmp_path, monkeypatch):
    monkeypatch.setattr(app_recordings, "STALLED_S", 0.5)
    with pytest.raises(DataError, match=r"ffmpeg has decoded nothing of .*talk.mp4 for 0.5 s and was ended"):
        readable(Given(str(stuck), stuck), tmp_path)
    assert not is_running(tmp_path / "pid")


def test_ffmpeg_ends_once_nobody_waits_for_it(stuck, tmp_path):
    def check() -> None:
        if (tmp_path / "pid").exists():
            raise DataError("given up")

    with pytest.raises(DataError, match="given up"):
        readable(Given(str(stuck), stuck), tmp_path, check=check)
    assert not is_running(tmp_path / "pid")


def test_ffmpeg_ends_with_the_command(stuck, tmp_path, start):
    """SIGTERM comes to the command alone."""
    command = start(["translate", "builtin:mini", str(stuck), "--to", "de"], PATH=os.environ["PATH"])
    command.until((tmp_path / "pid").exists)
    command.send_signal(signal.SIGTERM)
    assert command.wait(60) == 128 + signal.SIGTERM
    assert not is_running(tmp_path / "pid")


def test_a_folder_knows_what_it_made(talks, tmp_path):
    folder = OutputFolder(tmp_path / "new", "text", ["de"], {"model": "m"}, False)
    given = recordings([talks], tmp_path)
    assert folder.left(given) == given
    assert not (tmp_path / "new").exists()
