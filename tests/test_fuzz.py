"""Damaged input, at random: recipes, manifests, tables, sound files and the files of a run folder.

Every case is drawn from its own seed, so that a failing one can be made again: what fails is named with its seed.
What must hold: a right result, or an error of ours (a ValueError that this package raised, with a message); on the command line
exit code 1 and one `error:` line. Nothing half-written stays, and the user's files are as they were.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

import trimlingual
from trimlingual import cli
from trimlingual.data.audio import DataError, inspect_audio, load_audio
from trimlingual.data.splits import load_splits, prepare_data
from trimlingual.evaluation.results import read_result, read_translations
from trimlingual.recipe import (
    Covost2Source,
    FolderSource,
    ManifestSource,
    Recipe,
    TaskSettings,
    list_recipes,
    load_recipe,
    parse_recipe,
)
from trimlingual.run.artifacts import ARTIFACT_FILE, produce, read_artifact, write_json
from trimlingual.run.lineage import Lineage, read_lineage
from trimlingual.search.plan import check_plan, read_plan
from trimlingual.stages.distill import read_distilled

from .damage import (
    COUNTS,
    FOUND,
    TEXTS,
    cases,
    contents,
    failing,
    mutate_bytes,
    mutate_structure,
    mutate_text,
    places,
)


def test_at_least_a_thousand_cases():
    assert sum(COUNTS.values()) >= 1000


@pytest.fixture(autouse=True)
def _no_case_failed() -> Iterator[None]:
    """All cases of a test run; what they found is said together."""
    FOUND.clear()
    yield
    assert not FOUND, f"{len(FOUND)} case(s) failed:\n" + "\n".join(FOUND[:10])


@pytest.fixture(scope="module")
def recipes() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in list_recipes().values()]


def usable(recipe: Any) -> None:
    """What passed as a recipe is one: it can be written and read again."""
    assert isinstance(recipe, Recipe)
    json.dumps(recipe.model_dump(), ensure_ascii=False)


def test_recipe_text(recipes: list[str], tmp_path: Path):
    passed = 0
    for seed, rng in cases("recipe text"):
        data = mutate_text(rng, rng.choice(recipes))
        path = tmp_path / "recipe.yaml"
        path.write_bytes(data)
        with failing("recipe text", seed, data):
            usable(load_recipe(path))
            passed += 1
        assert path.read_bytes() == data
    assert 0 < passed < COUNTS["recipe text"]  # the mutations neither do nothing nor break everything


def test_recipe_structure(recipes: list[str], tmp_path: Path):
    parsed = [yaml.safe_load(text) for text in recipes]
    passed = 0
    for seed, rng in cases("recipe structure"):
        raw = mutate_structure(rng, rng.choice(parsed))
        with failing("recipe structure", seed, raw):
            if rng.random() < 0.5 and isinstance(raw, dict):
                usable(parse_recipe(raw))
            else:
                path = tmp_path / "recipe.yaml"
                path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
                usable(load_recipe(path))
            passed += 1
    assert 0 < passed < COUNTS["recipe structure"]


def test_overrides(recipes: list[str]):
    keys = sorted({str(key) for text in recipes for _, key in places(yaml.safe_load(text))})
    for seed, rng in cases("overrides"):
        path = ".".join(rng.choice([*keys, *TEXTS]) for _ in range(rng.randint(1, 4)))
        value = rng.choice(
            [
                rng.choice(TEXTS),
                "1" * 5000,
                "2020-13-45",
                "[" * 600,
                "&a [*a]",
                "{a: 1",
                "!!python/name:os.getcwd",
                "null",
                "-1",
                "{}",
            ]
        )
        override = rng.choice([f"{path}={value}", f"{path}={value}={value}", path, value, f"={value}"])
        with failing("overrides", seed, override):
            usable(load_recipe("mini", [override]))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short clips in every container that libsndfile writes and people have; no two alike."""
    folder = tmp_path_factory.mktemp("sounds")
    kinds = [
        ("wav", "PCM_16", 16000), ("wav", "FLOAT", 44100), ("wav", "ULAW", 8000), ("flac", "PCM_16", 16000), ("flac", "PCM_24", 48000),
        ("ogg", "VORBIS", 16000), ("ogg", "OPUS", 48000), ("aiff", "PCM_16", 22050), ("au", "PCM_16", 16000),
        ("mp3", "MPEG_LAYER_III", 16000),
    ]  # fmt: skip
    for i, (kind, subtype, rate) in enumerate(kinds):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * np.arange(int(0.3 * rate)) / rate)
        soundfile.write(folder / f"{i}.{kind}", tone.astype(np.float32), rate, format=kind.upper(), subtype=subtype)
    return folder


def test_audio(sounds: Path, tmp_path: Path):
    files = sorted(sounds.iterdir())
    passed = 0
    for seed, rng in cases("audio"):
        file = rng.choice(files)
        data = mutate_bytes(rng, file.read_bytes(), within=rng.choice([16, 64, 256, None]))
        path = tmp_path / f"clip{file.suffix}"
        path.write_bytes(data)
        with failing("audio", seed, (file.name, data[:80])):
            found = inspect_audio(path)
            if isinstance(found, DataError):
                assert str(path) in str(found)
                with pytest.raises(DataError):
                    load_audio(path)
                continue
            samples = load_audio(path)
            assert samples.ndim == 1
            assert samples.dtype == np.float32
            assert np.isfinite(samples).all()
            assert 0 < found.duration_s < 3600
            passed += 1
        assert path.read_bytes() == data
    assert 0 < passed < COUNTS["audio"]


def made(folder: Path, clips: list[Path], work: Path, source: Any, what: str, seed: int, shown: Any) -> bool:
    """Prepare data from `source` as a run does; True if it passed. Whole or not at all, and what the user has stays as it is."""
    before = contents(folder)
    out = work / f"{what.replace(' ', '-')}-{seed}"
    settings = trimlingual.recipe.DataSettings(train=source, select=1, test=1)
    task = TaskSettings(target_languages=["de"])
    done = False
    with failing(what, seed, shown):
        produce(out, "data", {}, {}, lambda partial: prepare_data(settings, task, partial, window_s=30.0))
        splits = load_splits(out)
        clips_in = [*splits.train.clips, *splits.select.clips, *splits.test.clips]
        assert all(clip.references["de"].strip() and clip.audio.is_file() for clip in clips_in)
        done = True
    assert done == (out / ARTIFACT_FILE).is_file()
    assert done or not out.exists()
    assert contents(folder) == before, f"{what}, seed {seed}: the user's folder was changed"
    return done


@pytest.fixture
def speech(sounds: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A user's folder with six whole clips."""
    folder = tmp_path / "user"
    folder.mkdir()
    files = [path for path in sorted(sounds.iterdir()) if path.suffix != ".mp3"][:6]
    for path in files:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder, [folder / path.name for path in files]


def test_manifests(speech: tuple[Path, list[Path]], tmp_path: Path):
    folder, clips = speech
    passed = 0
    records = [
        {"audio": clip.name, "references": {"de": f"Satz {i}.", "zh": "句"}, "source": f"sentence {i}", "id": f"c{i}"}
        for i, clip in enumerate(clips)
    ]
    for seed, rng in cases("manifest"):
        kind = rng.randrange(4)
        if kind == 0:
            changed = [mutate_structure(rng, record) if rng.random() < 0.3 else record for record in records]
            data = "\n".join(json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in changed)
            encoded = data.encode("utf-8", "surrogatepass")
        elif kind == 1:
            odd = [{**record, rng.choice(["audio", "id", "source"]): rng.choice(TEXTS)} for record in records[:2]]
            encoded = "\n".join(json.dumps(record) for record in [*odd, *records[2:]]).encode()
        elif kind == 2:
            line = rng.choice(
                ["[" * 5000, "1" * 6000, '{"audio":' * 3000, "null", "NaN", '"text"', '{"audio": "a.wav", "audio": 1}']
            )
            encoded = "\n".join([*(json.dumps(record) for record in records), line]).encode()
        else:
            encoded = mutate_text(rng, "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
        path = folder / "train.jsonl"
        path.write_bytes(encoded)
        passed += made(folder, clips, tmp_path / "runs", ManifestSource(path=str(path)), "manifest", seed, encoded)
    assert 0 < passed < COUNTS["manifest"]


def test_tables(speech: tuple[Path, list[Path]], tmp_path: Path):
    folder, clips = speech
    (folder / "clips").mkdir()
    for clip in clips:
        (folder / "clips" / clip.name).write_bytes(clip.read_bytes())
    csv = "file_name,german,english,name\n" + "".join(f'{c.name},"Satz, {c.stem}.",words,n{c.stem}\n' for c in clips)
    tsv = "path\tsentence\ttranslation\tclient_id\n" + "".join(f"{c.name}\twords\tSatz {c.stem}.\tx\n" for c in clips)
    passed = 0
    for seed, rng in cases("tables"):
        if rng.random() < 0.5:
            data = mutate_text(rng, csv)
            (folder / "metadata.csv").write_bytes(data)
            source: Any = FolderSource(
                kind="folder", path=str(folder), references={"de": "german"}, source="english", id="name"
            )
        else:
            data = mutate_text(rng, tsv)
            (folder / "c.tsv").write_bytes(data)
            source = Covost2Source(
                kind="covost2", tsv=str(folder / "c.tsv"), common_voice=str(folder), target_language="de"
            )
        passed += made(folder, clips, tmp_path / "runs", source, "tables", seed, data)
    assert 0 < passed < COUNTS["tables"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run: every kind of JSON file that stages leave, with the values that the readers need."""
    folder = tmp_path_factory.mktemp("run")
    lineage = Lineage(
        "builtin:mini",
        {"decoder": [0, 1, 3], "encoder": [0, 1]},
        {"decoder": 4, "encoder": 2},
        ["finetune"],
        {"train": ["ab"]},
    )

    def work(partial: Path) -> dict[str, Any]:
        lineage.save(partial)
        plan = {
            "removals": [{"layer": 1, "round": 1, "score": 3.5}],
            "layers": lineage.layers,
            "curve": [{"removed": 1}],
        }
        write_json(partial / "plan.json", plan)
        write_json(partial / "result.json", {"name": "base", "split": {"hash": "x"}, "languages": {"de": {}}})
        (partial / "translations.de.jsonl").write_text(
            '{"id": "a", "hypothesis": "b"}\n{"id": "c", "hypothesis": "d"}\n'
        )
        (partial / "distilled.jsonl").write_text('{"id": "a", "language": "de", "text": "b"}\n')
        clip = {
            "id": "a", "audio": "a.wav", "references": {"de": "b"}, "source": None, "duration_s": 1.0, "audio_sha256": "0" * 64,
        }  # fmt: skip
        for split in ("train", "select", "test"):
            (partial / f"{split}.jsonl").write_text(json.dumps(clip) + "\n")
        return {"steps": 3}

    produce(folder / "stage", "teacher", {"epochs": 1.0}, {"data": "0123"}, work)
    return folder / "stage"


READERS: dict[str, Callable[[Path], Any]] = {
    "artifact.json": read_artifact,
    "lineage.json": read_lineage,
    "plan.json": lambda folder: check_plan(read_plan(folder), read_lineage(folder)),
    "result.json": read_result,
    "translations.de.jsonl": lambda folder: read_translations(folder, "de"),
    "distilled.jsonl": read_distilled,
    "train.jsonl": load_splits,
}


def test_files_of_a_run_folder(run_folder: Path, tmp_path: Path):
    whole = {name: (run_folder / name).read_bytes() for name in READERS}
    for name, reader in READERS.items():
        reader(run_folder)  # whole files are read
        assert name in whole
    for seed, rng in cases("run folder"):
        name = rng.choice(list(READERS))
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        for other, data in whole.items():
            (folder / other).write_bytes(data)
        for split in ("select", "test"):
            (folder / f"{split}.jsonl").write_bytes(whole["train.jsonl"])
        if rng.random() < 0.4:
            lines = whole[name].decode().rstrip("\n").split("\n") if name.endswith("l") else [whole[name].decode()]
            data = "\n".join(json.dumps(mutate_structure(rng, json.loads(line))) for line in lines).encode()
        else:
            data = mutate_bytes(rng, whole[name])
        (folder / name).write_bytes(data)
        with failing("run folder", seed, (name, data)):
            READERS[name](folder)
        assert (folder / name).read_bytes() == data


def test_command_line(recipes: list[str], run_folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Through `main`: a right answer, or exit code 1 and one error line; no traceback."""
    monkeypatch.delenv("TRIMLINGUAL_DEBUG", raising=False)
    mini = next(text for text in recipes if text.startswith("name: mini"))
    failed = 0
    for seed, rng in cases("command line"):
        recipe = tmp_path / "recipe.yaml"
        damaged = mutate_text(rng, mini)
        recipe.write_bytes(damaged)
        plan = tmp_path / "plan.json"
        plan.write_bytes(mutate_bytes(rng, (run_folder / "plan.json").read_bytes()))
        run = tmp_path / f"run-{seed}"
        words = rng.choice(
            [
                ["compress", str(recipe), "--dry-run", "--run-dir", str(run)],
                ["prune", "mini", "--run-dir", str(run), "--model", str(run_folder), "--plan", str(plan)],
                ["rank", str(recipe), "--run-dir", str(run), "--set", f"rank.metric={rng.choice(TEXTS)}"],
                ["translate", str(run_folder), str(recipe), "--to", "de"],
                [
                    "compress",
                    "mini",
                    "--dry-run",
                    "--set",
                    f"data.train={{kind: manifest, path: {rng.choice(TEXTS)!r}}}",
                ],
                ["report", str(run)],
            ]
        )
        words = [
            word.replace("\0", "").encode("utf-8", "ignore").decode() for word in words
        ]  # what a shell can hand over
        monkeypatch.setattr(sys, "argv", ["trimlingual", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, (seed, words)
        code = ended.value.code or 0
        if code == 1:
            failed += 1
            assert shown.err.count("error: ") >= 1, (seed, words, shown.err)
            assert shown.err.strip().split("\n")[-1].strip()
        else:
            assert code in (0, 2), (seed, words, shown.err)
        assert recipe.read_bytes() == damaged
        assert not list(tmp_path.glob("run-*/**/artifact.json"))
    assert failed
