"""What `trimlingual doctor` says of this machine, held against the machine."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from typer.testing import CliRunner

from trimlingual.app import doctor
from trimlingual.cli import app
from trimlingual.recipe import list_recipes, load_recipe
from trimlingual.run.extras import missing

run = CliRunner().invoke


@pytest.fixture(scope="module")
def facts():
    done = run(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_facts_are_the_machines(facts):
    assert facts["memory"]["bytes"] == psutil.virtual_memory().total
    assert facts["cores"] == os.cpu_count()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["programs"]["ffmpeg"] == shutil.which("ffmpeg")
    assert facts["four_bits"]["nf4"] == "bitsandbytes"  # tried, on this machine too
    commands = [each["command"] for each in facts["install"]]
    for extra, there in facts["extras"].items():
        assert there == (not missing(extra))
        assert not (there and f"pip install 'trimlingual[{extra}]'" in commands)


def test_every_recipe_is_judged(facts):
    by_name = {judged["recipe"]: judged for judged in facts["recipes"]}
    assert list(by_name) == list(list_recipes())
    assert by_name["mini"]["fits"]
    assert by_name["mini"]["set"] == []
    wanted = by_name["qwen2-audio-en-de"]
    assert wanted["memory_bytes"] > 16e9  # of the published shapes, and without the network
    assert wanted["fits"] == (not wanted["problems"])
    assert load_recipe("qwen2-audio-en-de", wanted["set"])


def test_a_machine_that_is_too_small(facts, monkeypatch, tmp_path):
    small = psutil.virtual_memory()._replace(total=10_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    judged = doctor._judged("qwen2-audio-en-de-qlora", tmp_path)
    assert not judged["fits"]
    assert any("wants ~16" in problem and "the device has ~10.00 GB" in problem for problem in judged["problems"])


def test_pruning_may_be_done_beside_the_gpu(monkeypatch):
    """On a GPU of 24 GB everything but pruning fits."""
    gpu = SimpleNamespace(total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64_000_000_000))
    settings = doctor._with_less_memory(load_recipe("qwen2-audio-en-de"))
    recipe = load_recipe("qwen2-audio-en-de", ["model.base=random:qwen2-audio-7b", *settings])
    wanted = doctor._wanted(recipe)
    notes = list(doctor.memory_notes(recipe, list(wanted), wanted))
    assert [note.split()[1] for note in notes] == ["pruned"]
    assert doctor._prunes_on_cpu(recipe, notes, wanted)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16_000_000_000))
    assert not doctor._prunes_on_cpu(recipe, notes, wanted)


def test_with_less_memory_everything_is_trained_by_lora():
    for name in ("qwen2-audio-en-de-int4", "qwen2-audio-en-de"):
        recipe = load_recipe(name, doctor._with_less_memory(load_recipe(name)))
        assert {train.method for train in (recipe.finetune, recipe.recover, recipe.quantize.train)} == {"lora"}
        assert not doctor._with_less_memory(recipe)


def test_the_lines_say_the_same(facts):
    text = "\n".join(doctor.lines(facts))
    assert "mini: fits as it is" in text
    for judged in facts["recipes"]:
        assert f"{judged['recipe']}: " in text
        assert all(problem in text for problem in judged["problems"])
    for each in facts["install"]:
        assert each["command"] in text
