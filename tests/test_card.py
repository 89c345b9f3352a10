"""The model card of what ships: metadata that the Hub's own library reads back, scores as a model-index, and code that runs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import trimlingual
from trimlingual.data.audio import load_audio
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.exports.card import license_of, messages_for_curl, model_card
from trimlingual.exports.target import Finished, Outcome
from trimlingual.models.family import family_named, family_of_processor
from trimlingual.models.loading import load_model, load_processor
from trimlingual.models.saving import finish_saved
from trimlingual.recipe import DecodeSettings, QuantizeSettings, TrainSettings, load_recipe
from trimlingual.run.lineage import Lineage, ModelFolder, read_lineage
from trimlingual.stages.quantize import config_summary

from .conftest import EVERY_FAMILY
from .made_run import scores, write

MINI = Path(trimlingual.__file__).parent / "mini" / "model"
OUTCOME = Outcome("transformers", "nf4", 8_100_000, unproven="this is a test")
RECIPE = load_recipe("mini")


@pytest.fixture
def evaluation(tmp_path) -> Path:
    languages = {"de": scores(48.75, 0.975), "zh": scores(29.2, 0.98, main="chrf")}
    languages["de"]["comet"] = {"Unbabel/wmt22-comet-da": 0.8123}
    languages["de"]["wrong_language"] = {"count": 1, "share": 0.125}
    split = {"name": "test", "hash": "0123abcd", "num_clips": 8}
    record = {"name": "quantized", "params": 5_100_000, "disk_bytes": 9_500_000, "split": split, "languages": languages}
    write(tmp_path / "evaluation" / "result.json", record)
    return tmp_path / "evaluation"


def lineage(base: str, **values) -> Lineage:
    layers = {"decoder": [0, 1, 3], "encoder": [0]}
    return Lineage(base, layers, {"decoder": 4, "encoder": 1}, ["finetune", "prune"], **values)


def card(base="builtin:mini", recipe=RECIPE, runtime="transformers", evaluation_dir=None, **values) -> ModelCard:
    finished = Finished(ModelFolder(MINI, lineage(base, **values)), recipe, evaluation_dir)
    return ModelCard(model_card(finished, runtime, [OUTCOME]))


def test_the_hub_reads_back_what_was_measured(evaluation, tmp_path):
    """Through a file and the Hub's own parser: every language and metric once, with value, split and signature."""
    overrides = ["model.base=Qwen/Qwen2-Audio-7B-Instruct", "task.target_languages=[de, zh]", "data.test=8",
                 "data.train={kind: hub, path: someone/talks, splits: [dev], audio: audio, references: {de: de, zh: zh}}"]  # fmt: skip
    recipe = load_recipe("mini", overrides)
    nf4 = {"scheme": "nf4", "method": "bitsandbytes", "parts": ["decoder"]}
    written = card("Qwen/Qwen2-Audio-7B-Instruct", recipe, evaluation_dir=evaluation, quantization=nf4)
    written.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "Qwen/Qwen2-Audio-7B-Instruct"
    named = data.to_dict()
    assert [named[key] for key in ("base_model_relation", "license", "library_name")] == [
        "quantized",
        "apache-2.0",
        "transformers",
    ]
    assert data.language == ["en", "de", "zh"]
    assert data.datasets == ["someone/talks"]
    assert data.metrics == ["bleu", "chrf", "comet"]
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == recipe.name
    found = {(each.dataset_config, each.metric_name): each for each in results}
    assert len(found) == len(results) == 7
    assert found["en-de", "chrF++"].metric_value == pytest.approx(48.75)
    assert found["en-zh", "chrF"].metric_value == pytest.approx(30.2)
    assert found["en-de", "COMET"].metric_args == {"signature": "Unbabel/wmt22-comet-da"}
    bleu = found["en-de", "BLEU"]
    assert bleu.metric_args == {"signature": "nrefs:1|tok:13a|version:2.6.0"}
    assert (bleu.dataset_type, bleu.dataset_split) == ("someone/talks", "test")
    assert bleu.dataset_args == {"sha256_prefix": "0123abcd", "num_clips": 8}


def test_a_person_reads_results_origin_use_and_limits(evaluation):
    text = card(evaluation_dir=evaluation).text
    for expected in (
        "| de | 24.38 | 49.75 | 48.75 | 97.5 % [95.8, 99.3] | 12.5 % |",
        "COMET, de: 0.8123",
        "English speech to German, Chinese text",
        "Decoder layers removed (numbered as in the base model): 2",
        "Stages: finetune -> prune",
        "clips of up to 30 s",
        "The base model's license (apache-2.0)",
        "trimlingual translate PATH",
    ):
        assert expected in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Results", "## Use in transformers", "## How it was made", "## Limits",
    ]  # fmt: skip


@pytest.mark.parametrize("runtime", ["transformers", "vllm", "gguf"])
def test_each_runtime_has_its_use(runtime):
    written = card(runtime=runtime)
    assert written.data.to_dict()["library_name"] == ("gguf" if runtime == "gguf" else "transformers")
    assert ("## Use in vLLM" in written.text) == (runtime == "vllm")
    assert ("## Use in llama.cpp" in written.text) == (runtime == "gguf")
    assert ("## Use in transformers" in written.text) == (runtime != "gguf")
    assert written.data.eval_results is None


@pytest.mark.parametrize("runtime", ["vllm", "gguf"])
def test_the_request_on_the_card_is_what_the_model_was_trained_to_be_asked(runtime, tmp_path):
    """As the shell makes it, for words that JSON or a shell would read otherwise."""
    words = {"system_prompt": 'Say "it" for $HOME\\n,\nnot `id`.', "prompt": "Into {language}: \\"}
    recipe = RECIPE.model_copy(update={"task": RECIPE.task.model_copy(update=words)})
    (tmp_path / "clip.wav").write_bytes(b"sound")
    shell = re.search(r"-d @- (<<END\n.*?\nEND\n)", card(recipe=recipe, runtime=runtime).text, re.DOTALL)[1]
    ran = subprocess.run(["bash", "-c", f"cat {shell}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    system, user = json.loads(ran.stdout)["messages"]
    assert system == {"role": "system", "content": words["system_prompt"]}
    assert user["content"] == [
        {"type": "input_audio", "input_audio": {"format": "wav", "data": base64.b64encode(b"sound").decode()}},
        {"type": "text", "text": "Into German: \\"},
    ]


def test_a_chat_without_system_message_has_none_in_the_request():
    made = messages_for_curl(family_named("voxtral").conversation("Be brief.", "Go:"))
    assert [message["role"] for message in json.loads(made)] == ["user"]
    assert '"text": "Be brief. Go:"' in made


def test_the_packages_that_the_code_needs_are_named():
    """`device_map` asks for accelerate, and Voxtral's processor for a library of its own."""
    nf4 = {"scheme": "nf4", "method": "bitsandbytes", "parts": ["decoder"]}
    for quantization, named in ((None, ""), (nf4, ", `bitsandbytes`")):
        text = str(card(quantization=quantization))
        assert f"Needs torch, transformers 5.17 or newer, `accelerate`, `soundfile`{named}." in text
    assert family_named("voxtral").packages == ("mistral-common",)


def test_a_gguf_card_claims_nothing_of_files_that_are_not_there(evaluation):
    """Scores and bytes are those of the model before; the folder has GGUF files alone."""
    text = card(runtime="gguf", evaluation_dir=evaluation).text
    assert "before it was written as GGUF" in text
    assert "bytes on disk" not in text
    assert "lineage.json" not in text
    assert f"{OUTCOME.disk_bytes:,} bytes on disk" in card(evaluation_dir=evaluation).text


@pytest.mark.parametrize(
    ("train", "expected"),
    [(None, "not trained in 4 bits"), ("lora", "adapter merged"), ("full", "trained on rounded weights")],
)
def test_how_it_was_trained_in_4_bits_is_said(train, expected):
    settings = QuantizeSettings(scheme="int4", train=train and TrainSettings(method=train))
    text = str(card(quantization=config_summary(settings)))
    assert f"(compressed-tensors, groups of 128): audio_tower, decoder, projector; {expected}\n" in text
    if train != "full":  # which nf4 has not
        assert expected in str(card(quantization=config_summary(settings.model_copy(update={"scheme": "nf4"}))))


def test_what_is_not_known_is_left_out(tmp_path):
    """A base in a folder of the user's, and a random one: no base_model, no license, and no local path."""
    folder = shutil.copytree(MINI, tmp_path / "private" / "base")
    written = card(str(folder))
    assert {"base_model", "license"}.isdisjoint(written.data.to_dict())
    assert str(tmp_path) not in str(written)
    assert "It was not at hand" in written.text
    written = card("random:qwen2-audio-tiny")
    assert "Rehearsal" in written.text
    assert {"base_model", "license", "model-index"}.isdisjoint(written.data.to_dict())


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: other\nlicense_name: acme\n---\n# x", {"license": "other", "license_name": "acme"}),
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("no metadata", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
    ],
)  # fmt: skip
def test_the_license_is_that_of_the_bases_card(tmp_path, readme, expected):
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    assert license_of(str(tmp_path), family_of_processor(load_processor(MINI))) == expected


def code_says(folder: Path, recipe, samples, cwd: Path) -> str:
    """What the Python code on the card of a model folder prints, run as a person would, in a process of its own."""
    (cwd / "PATH").symlink_to(folder)
    soundfile.write(cwd / "clip.wav", samples, 16_000, subtype="FLOAT")
    finished = Finished(ModelFolder(folder, read_lineage(folder, "builtin:mini")), recipe)
    code = re.search(r"```python\n(.*?)```", model_card(finished, "transformers", [OUTCOME]), re.DOTALL)[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_code_on_the_card_translates(tmp_path):
    """A built-in clip, by the built-in model: what this package says."""
    clip = json.loads((MINI.parent / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    audio = MINI.parent / "data" / clip["audio"]
    said = trimlingual.translate(MINI, audio, "de")[0]["text"]
    assert code_says(MINI, RECIPE, soundfile.read(audio, dtype="float32")[0], tmp_path) == said


@EVERY_FAMILY
@pytest.mark.parametrize("padding", ["mask", "window"])
def test_it_does_for_every_family(padding, model_dir, split, tmp_path):
    """Random models, of both ways to hear padding."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    load_processor(folder, padding).save_pretrained(folder)
    finish_saved(folder, 6)
    recipe = load_recipe("mini", ["model.dtype=float32", "task.target_languages=[de]"])
    model, processor = load_model(folder, "float32", torch.device("cpu")), load_processor(folder)
    settings = DecodeSettings(batch_size=4, max_new_tokens=6, min_new_tokens=6)
    clip = split.clips[0]
    (said,) = translate_clips(model, processor, recipe.task, [replace(clip, references={})], settings)
    assert code_says(folder, recipe, load_audio(clip.audio), tmp_path) == said.hypothesis


def test_the_bits_of_each_part_are_named():
    bits = {"decoder.3.mlp": 3, "embeddings": 2, "decoder.5.mlp": 3}
    text = str(
        card(quantization={"method": "compressed-tensors", "scheme": "int4", "parts": ["decoder"], "bits": bits})
    )
    assert "- 2-bit integers (layers numbered as in the base model): embeddings\n" in text
    assert "- 3-bit integers (layers numbered as in the base model): decoder.3.mlp, decoder.5.mlp\n" in text
