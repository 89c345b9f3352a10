"""A data set on the Hub counts by its commit. What the Hub's client and `datasets` leave on a machine is laid out in a folder here."""

from __future__ import annotations

import json
import shutil

import pytest

from trimlingual.data.audio import DataError
from trimlingual.data.hub import resolve_commit
from trimlingual.pipeline import plan, version_notes
from trimlingual.recipe import HubSource, load_recipe
from trimlingual.run.artifacts import ARTIFACT_FILE
from trimlingual.run.fingerprint import HashCache

from .made_sources import make_hub_set

FIRST, SECOND = "1" * 40, "2" * 40
SOURCE = "{kind: hub, path: someone/speech, splits: [train], references: {de: text_de}}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Put a commit of the set on the machine, as the newest there; the machine is offline."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    assert datasets.config.HF_HUB_OFFLINE

    def has(commit: str, seed: int = 0, noted: bool = True) -> None:
        loaded = make_hub_set(tmp_path / commit, "d", 8, seed)
        shutil.rmtree(tmp_path / "datasets", ignore_errors=True)
        folder = tmp_path / "datasets" / "someone___speech" / "default" / "0.0.0" / commit
        loaded.save_to_disk(tmp_path / commit / "saved")
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / commit / "saved" / "data-00000-of-00001.arrow", folder / "speech-train.arrow")
        info = json.loads((tmp_path / commit / "saved" / "dataset_info.json").read_text())
        info |= {
            "builder_name": "parquet", "dataset_name": "speech", "config_name": "default", "version": {"version_str": "0.0.0"},
            "splits": {"train": {"name": "train", "num_bytes": 1, "num_examples": 8, "dataset_name": "speech"}},
            "download_checksums": {f"hf://datasets/someone/speech@{commit}/train.parquet": {"num_bytes": 1, "checksum": None}},
        }  # fmt: skip
        (folder / "dataset_info.json").write_text(json.dumps(info))
        if noted:
            refs = tmp_path / "hub" / "datasets--someone--speech" / "refs"
            refs.mkdir(parents=True, exist_ok=True)
            (refs / "main").write_text(commit)

    return has


def data_step(tmp_path, run="run", source=SOURCE, reading=True):
    recipe = load_recipe("mini", [f"data.train={source}", "data.select=2", "data.test=2", "task.target_languages=[de]"])
    return plan(recipe, tmp_path / run, HashCache(tmp_path / "hashes", reading=reading))[0]


def test_the_commit_is_recorded_and_counts(machine, tmp_path):
    machine(FIRST)
    step = data_step(tmp_path)
    artifact = step.run()
    assert artifact.info["commits"] == {"train": FIRST}
    assert artifact.origins == {"train source": f"someone/speech@{FIRST}"}
    assert data_step(tmp_path).status() == data_step(tmp_path, reading=False).status() == "done"
    machine(SECOND, seed=50)
    other = data_step(tmp_path, "other")
    assert other.fingerprint != step.fingerprint
    assert other.run().info["commits"] == {"train": SECOND}


def test_a_run_keeps_its_commit_and_says_so(machine, tmp_path):
    machine(FIRST)
    step = data_step(tmp_path)
    step.run()
    assert version_notes([data_step(tmp_path)]) == []
    machine(SECOND, seed=50)
    again = data_step(tmp_path)
    assert (again.status(), again.fingerprint) == ("done", step.fingerprint)
    (note,) = version_notes([again])
    assert f"someone/speech@{FIRST} -> {SECOND}" in note
    # Made again, offline, it would silently become the other commit's.
    with pytest.raises(DataError, match=f"was to be read at commit {FIRST}, but this machine has {SECOND} of it"):
        again.run(force=True)
    # The machine has lost the set: what the run was made from is known from its own record.
    shutil.rmtree(tmp_path / "hub")
    assert data_step(tmp_path, reading=False).status() == "done"


def test_offline_without_a_note_a_set_goes_by_its_name_and_stays_so(machine, tmp_path):
    machine(FIRST, noted=False)
    step = data_step(tmp_path)
    assert step.run().info["commits"] == {"train": FIRST}  # as the library says once it has loaded it
    assert data_step(tmp_path).fingerprint == step.fingerprint
    machine(FIRST)
    assert data_step(tmp_path).status() == "done"


def test_data_made_before_commits_counted_stay_as_they_are(machine, tmp_path):
    machine(FIRST, noted=False)
    data_step(tmp_path).run()
    path = tmp_path / "run" / "data" / ARTIFACT_FILE
    record = json.loads(path.read_text())
    del record["info"]["commits"]
    path.write_text(json.dumps(record))
    machine(SECOND)
    assert data_step(tmp_path).status() == "done"


def test_another_set_in_the_same_place_is_not_looked_for_at_the_commit_of_the_first(machine, tmp_path):
    machine(FIRST)
    data_step(tmp_path).run()
    other = data_step(tmp_path, source=SOURCE.replace("speech", "talks"))
    assert other.status() == "stale"
    assert other.inputs["train source"].commit is None


def test_where_a_commit_comes_from(machine, tmp_path, monkeypatch):
    def source(path: str = "someone/speech", revision: str | None = None) -> HubSource:
        return HubSource(kind="hub", path=path, revision=revision, splits=["train"], references={})

    machine(FIRST)
    assert resolve_commit(source(), ask=True) == FIRST
    assert resolve_commit(source(revision="main"), ask=False) == FIRST
    assert resolve_commit(source(revision=SECOND), ask=False) == SECOND
    assert resolve_commit(source(str(tmp_path)), ask=True) is None
    asked = []

    def info(self: object, path: str, **how: object) -> object:
        asked.append((path, how["revision"]))
        if path == "nobody/nothing":
            raise ConnectionError
        return type("Info", (), {"sha": SECOND})

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    assert resolve_commit(source(revision="v2"), ask=False) is None
    assert resolve_commit(source(revision="v2"), ask=True) == SECOND
    assert resolve_commit(source("nobody/nothing"), ask=True) is None
    assert asked == [("someone/speech", "v2"), ("nobody/nothing", None)]
