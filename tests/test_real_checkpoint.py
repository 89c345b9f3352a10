"""The kit for a first run with the published checkpoint, on models that are at hand."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import trimlingual
from trimlingual.run.artifacts import find_artifact

PACKAGE = Path(trimlingual.__file__).parent


@pytest.fixture(scope="module")
def kit() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("real_checkpoint")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Some built-in speech as a manifest that stands for ACL 60/60."""
    data = PACKAGE / "mini" / "data"
    records = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").split("\n")[:24]]
    path = tmp_path / "acl.jsonl"
    text = "".join(json.dumps({**r, "audio": str(data / r["audio"])}, ensure_ascii=False) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def lines(result: dict, part: str) -> dict[str, dict]:
    return {line["what"]: line for line in result["parts"][part]["lines"]}


def test_expected_stands_beside_found(kit, clips, tmp_path, capsys):
    arguments = [
        "--model",
        "builtin:mini",
        "--data",
        str(clips),
        "--out",
        str(tmp_path / "out"),
        "--parts",
        "files",
        "tokens",
    ]
    result = kit.main(arguments)
    assert result["failed"] == []
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8")) == result
    found = lines(result, "files")
    assert found["config.json model_type"]["equal"] is True
    assert found["config.json text_config.num_hidden_layers"] | {"what": ""} == {
        "what": "", "expected": 32, "found": 12, "equal": False,
    }  # fmt: skip
    tokens = lines(result, "tokens")
    assert tokens["our prompt's ids are the processor's, de"]["equal"] is True
    assert tokens["prompt, zh"]["equal"] is True
    assert "files: config.json text_config.num_hidden_layers" in result["different"]
    assert str(tmp_path) not in json.dumps(result)  # no folder of the machine is sent back
    capsys.readouterr()
    assert kit.main(arguments) == result
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="choose another --out"):
        kit.main([*arguments, "--steps", "3"])


def test_a_folder_of_the_users_is_left_alone(kit, clips, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        kit.main(["--data", str(clips), "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_part_that_fails_is_said_and_run_again(kit, tmp_path):
    arguments = ["--model", "builtin:mini", "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")]
    result = kit.main([*arguments, "--parts", "zero-shot"])
    assert result["failed"]
    assert "does not exist" in result["failed"][0]
    assert str(tmp_path) not in json.dumps(result)
    assert kit.main([*arguments, "--parts", "zero-shot", "tokens"])["not_run"] == [
        "files", "finetune", "search", "recover", "qlora", "export",
    ]  # fmt: skip


def test_the_papers_split(kit):
    split = kit.paper_split(list(range(884)))
    assert split["test"] == np.random.default_rng(0).permutation(884)[:100].tolist()
    assert len(split["select"]) == 100
    assert sorted(split["test"] + split["select"] + split["train"]) == list(range(884))


def test_the_whole_kit(kit, clips, tmp_path):
    out = tmp_path / "out"
    trial = ["--steps", "2", "--max-new-tokens", "6", "--languages", "de", "--tidy"]
    result = kit.main(["--model", "random:qwen2-audio-tiny", "--data", str(clips), "--out", str(out), *trial])
    assert result["failed"] == []
    assert result["not_run"] == []
    assert lines(result, "finetune")["finetune: steps"]["equal"] is True
    assert lines(result, "qlora")["qlora: every loss is a number"]["equal"] is True
    assert lines(result, "search")["candidates of the first round"]["found"] == 4
    assert lines(result, "export")["the folder's generation is greedy"]["equal"] is True
    assert find_artifact(out / "de" / "exported")
    assert not any((out / "de" / gone).exists() for gone in ("teacher", "pruned", "recovered"))
    assert str(tmp_path) not in json.dumps(result)
