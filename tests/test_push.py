"""What goes to the Hub is what was shown, and nothing over what is there. The Hub itself is not asked: its own library, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from typer.testing import CliRunner

import trimlingual
from trimlingual.app.push import PushError, check_repo, files_to_send, push, would_overwrite
from trimlingual.cli import app
from trimlingual.exports.card import model_card
from trimlingual.exports.target import Finished, Outcome
from trimlingual.recipe import load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage

MINI = Path(trimlingual.__file__).parent / "mini" / "model"


@pytest.fixture
def exported(tmp_path) -> Path:
    """An exported folder as export leaves it, with this tool's records and a hidden folder."""
    folder = shutil.copytree(MINI, tmp_path / "exported")
    lineage = read_lineage(MINI, "builtin:mini").with_seen("train", ["a" * 64])
    lineage.to_ship().save(folder)
    outcome = Outcome("transformers", "bfloat16", 1, unproven="this is a test")
    card = model_card(Finished(ModelFolder(MINI, lineage), load_recipe("mini")), "transformers", [outcome])
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name in ("artifact.json", "log.txt", ".cache/secret", "extra/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_what_is_sent_is_what_ships(exported):
    files = files_to_send(exported)
    names = {file.name for file in files}
    assert {
        "README.md",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "lineage.json",
        "extra/notes.txt",
    } <= names
    assert names.isdisjoint({"artifact.json", "log.txt", ".cache/secret"})
    assert {file.name: file.num_bytes for file in files}["model.safetensors"] == (
        MINI / "model.safetensors"
    ).stat().st_size


def test_what_is_no_export_is_refused(exported, tmp_path):
    with pytest.raises(PushError, match="no model card of this tool"):
        files_to_send(MINI)
    read_lineage(exported).with_seen("train", ["a" * 64]).save(exported)
    with pytest.raises(PushError, match="lists the clips of the training"):
        files_to_send(exported)
    read_lineage(exported).to_ship().save(exported)
    (exported / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(PushError, match="has no weights"):
        files_to_send(exported)
    (exported / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(PushError, match="links are not followed"):
        files_to_send(exported)


def test_files_that_are_there_are_named(exported):
    files = files_to_send(exported)
    assert would_overwrite(files, [".gitattributes", "other.bin"]) == []
    assert would_overwrite(files, ["README.md", "other.bin", "extra/notes.txt"]) == ["README.md", "extra/notes.txt"]


@pytest.mark.parametrize("repo", ["model", "a/b/c", "../up", "a b/c", ""])
def test_names_that_are_no_repository_are_refused(repo):
    with pytest.raises(PushError, match=r"owner/name|no name of a repository"):
        check_repo(repo)


def test_a_dry_run_shows_every_file_and_sends_nothing(exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shown = CliRunner().invoke(app, ["push", str(exported), "someone/model", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    for name in ("README.md", "model.safetensors", "extra/notes.txt"):
        assert name in shown.output
    assert "nothing is sent" in shown.output
    assert '"commit"' not in shown.output


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match=r"someone/model could not be reached.*hf auth login") as caught:
        push(exported, "someone/model", private=False, force=False, say=print)
    assert isinstance(caught.value.__cause__, OfflineModeIsEnabled)


def test_no_network_is_an_error_that_says_what_to_do(exported):
    """A port that nothing listens at, in a process of its own: the address is read once."""
    code = "import sys, pathlib; from trimlingual.app.push import push; push(pathlib.Path(sys.argv[1]), 'me/x', False, False, print)"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code, exported], env=environment, capture_output=True, text=True)
    assert "PushError: me/x could not be reached" in done.stderr.splitlines()[-1]
