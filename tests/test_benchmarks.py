"""Benchmarks run whole on something small: what fails here would fail on a GPU that costs money, or after an hour."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def own_folder_on_the_path(monkeypatch):
    """As Python puts a script's folder there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_command_in_a_result_can_be_given_to_a_shell():
    """Words with spaces ("by QLoRA", {size: 4 MB}) are quoted, which joining by spaces alone would not do."""
    plain = re.compile(r'" "\.join\(.*\b(argv|given)\b')
    assert [path.name for path in BENCHMARKS.rglob("*.py") if plain.search(path.read_text(encoding="utf-8"))] == []


def test_benchmarks_import_from_each_other_what_is_there():
    """A name that has moved would be missed on the GPU: most of them run there alone."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARKS.rglob("*.py"))}
    there = {path.stem: names_of(tree) for path, tree in trees.items()}
    missing = [
        f"{path.name} imports {name.name} from {node.module}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in there
        for name in node.names
        if name.name not in there[node.module]
    ]
    assert missing == []


def names_of(tree: ast.Module) -> set[str]:
    """What a module defines or imports."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {
                name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
            }
    return found


@pytest.mark.slow
def test_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = benchmark("formats").main(["--size", "tiny", "--out", str(tmp_path / "results" / "formats_tiny.json")])
    assert result["errors"] == {}
    assert json.loads((tmp_path / "results" / "formats_tiny.json").read_text(encoding="utf-8")) == result
    sizes = list(result["sizes"].values())
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert all(reload["equal"] for reload in result["reloads"].values())
    layers = set(result["parameters"])
    assert {name.replace("5 layers", "24 layers").replace("6 layers", "32 layers") for name in layers} >= {
        "nf4, 32 layers", "nf4, 24 layers", "int4, 24 layers, 8-bit embeddings and head",
    }  # fmt: skip


@pytest.mark.slow
def test_export(tmp_path):
    """What ships gives what was scored: in float32 to the letter, also where the weights are 4- and 8-bit integers."""
    exact = ["float32", "int4, 8-bit embeddings and head, in float32"]
    out = tmp_path / "export.json"
    result = benchmark("export").main(["--clips", "6", "--formats", *exact, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert [result["formats"][name]["plain"][0]["share_equal"] for name in exact] == [1.0, 1.0]


def test_runtimes(tmp_path):
    """llama.cpp runs the files of a model that never heard padding, and translates into nonsense: hence `audio_padding: window`."""
    out = tmp_path / "runtimes.json"
    result = benchmark("runtimes").main(["--unheard", "--only", "never heard", "--clips", "2", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    [row] = result.values()
    assert (row["compared"], row["equal"]) == (4, 0)
    assert row["chrf"]["de"]["runtime"] < 20 < row["chrf"]["de"]["ours"]


def test_decode(tmp_path, monkeypatch):
    """int4 is loaded from a folder of random words, and every row is on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "decode.json"
    asked = ["--size", "tiny", "--formats", "bf16,int4", "--batches", "1,3", "--engines", "ours,generate"]
    result = benchmark("decode").main([*asked, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert result["errors"] == []
    rows = {(row["format"], row["layers"], row["engine"], row["batch"]) for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 2 * 2 * 2
    assert all(row["prefill_s"] > 0 and row["ms_per_step"] > 0 for row in result["rows"])
    kernels = {row["format"]: sum(row["kernels"].values()) for row in result["models"]}
    assert kernels["bf16"] == 0
    assert kernels["int4"] > 6 * 4  # products of a decoder layer


def test_packed(tmp_path):
    """Every format is timed, and packed int4 is compared with unpacked."""
    out = tmp_path / "packed.json"
    result = benchmark("packed").main(["--clips", "2", "--rounds", "1", "--batches", "2", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert len({row["format"] for row in result["rows"]}) == len(result["rows"]) >= 6
    assert all(row["seconds_per_clip"] > 0 for row in result["rows"])
    assert [row["compared"] for row in result["rows"] if "compared" in row] == [4] * (len(result["rows"]) - 5)


@pytest.mark.parametrize(
    "model",
    [["--model", "builtin:mini"], pytest.param(["--random", "qwen2-audio-tiny"], marks=pytest.mark.slow)],
)
def test_serve(tmp_path, model):
    """No request is lost and none is mixed up, also with packed weights; timings take place."""
    pytest.importorskip("uvicorn")
    few = ["--requests", "40", "--clients", "12", "--clips", "5", "--timed", "8", "--repeats", "1", "--many", "4"]
    result = benchmark("serve").main([*model, *few, "--device", "cpu", "--out", str(tmp_path / "serve.json")])
    assert json.loads((tmp_path / "serve.json").read_text(encoding="utf-8")) == result
    assert (result["lost"], result["mixed_up"], result["own"] + result["different"]) == (0, 0, 40)
    assert result["own"] == 40 or model[0] == "--random"
    assert result["gain_of_many"] > 0


def test_budget_search(tmp_path):
    out = tmp_path / "budget_search.json"
    small = ["--size", "small", "--clips", "3", "--layers", "2", "--actions-per-round", "3", "--shortlist", "0.4"]
    result = benchmark("budget_search").main([*small, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    first, *later = (row["num_with_loss"] for row in result["rounds"])
    assert first == {"layer": 4, "attention": 6, "mlp": 6, "lm_head": 1, "embeddings": 1}
    assert sum(later[-1].values()) < sum(first.values())
    assert set(result["rounds"][0]["num_with_translation"]) == set(first)
    short, long = (result["whole_search"][f"num_with_{name}"] for name in ("translation", "loss"))
    assert sum(short.values()) < 0.6 * sum(long.values())
    assert result["whole_search"]["seconds"] > 0


def test_mixed_folders(tmp_path):
    """The parts add up to the folder, the search counts no less, and the model computes as it is stored."""
    out = tmp_path / "folders.json"
    result = benchmark("mixed_folders").main(["--size", "small", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    large, small = result["folders"].values()
    for folder in (large, small):
        assert sum(folder["bytes_by_part"].values()) == folder["disk_bytes"] <= folder["counted_by_the_search"]
        assert folder["num_logits"] == folder["rows"]
    assert small["disk_bytes"] < large["disk_bytes"]
    assert set(small["bits"].values()) == {2, 3, 4}


@pytest.mark.slow
def test_recipe_on_gpus(tmp_path):
    """Two processes come to what one comes to; a command that has no time left is followed by one that goes on."""
    out = tmp_path / "out.json"
    words = ["--base", "random:qwen2-audio-tiny", "--work", str(tmp_path / "work"), "--out", str(out)]
    script = benchmark("recipe_on_gpus")
    stopped = script.main([*words, "--minutes", "0.3"])
    assert not stopped["complete"]
    while not (result := script.main(words))["complete"]:
        pass
    assert json.loads(out.read_text(encoding="utf-8")) == result
    two = result["results"]["2"]
    assert two["search"]["same_plan"]
    assert two["recipe"]["losses_equal"]
    assert two["recipe"]["largest_loss_difference"].keys() == {"teacher", "recovered", "quantized"}
    assert two["recipe"]["share_of_equal_translations"].keys() == {"distilled", "teacher", "quantized"}
    assert min(two["recipe"]["share_of_equal_translations"].values()) > 0.8


@pytest.mark.slow
def test_several_gpus(tmp_path):
    """The search in two processes, and in one what each of several has to do."""
    words = ["--size", "small", "--clips", "6", "--parts", "search", "shares", "--out", str(tmp_path / "out.json")]
    results = benchmark("several_gpus").main(words)["results"]
    assert results["2"].keys() == {"search"}
    assert {results["1"]["shares"][str(n)]["num_candidates"] for n in (1, 2, 4, 8)} == {1, 2, 4}


def test_full_size(tmp_path):
    """Every part's recipe is one that the tool takes: the parts themselves are whole runs of the stages, on a GPU."""
    bench = benchmark("full_size").Bench("random:qwen2-audio-tiny", tmp_path, 24.0, 2)
    steps = {}
    for name, make in bench.parts.items():
        (tmp_path / name).mkdir(exist_ok=True)
        steps[name] = make()
    assert {step.folder for step in steps.values()} == {tmp_path / name for name in bench.parts}


@pytest.mark.slow
def test_reading(tmp_path):
    out = tmp_path / "reading.json"
    result = benchmark("reading").main(["--clips", "2", "--blocks", "1", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert result["equal_losses"]
