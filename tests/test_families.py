"""The interface of the model families: each has all of it, and nobody else knows one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from typer.testing import CliRunner

import trimlingual
from trimlingual import estimate, preflight
from trimlingual.cli import app
from trimlingual.exports import gguf
from trimlingual.models import folders
from trimlingual.models.errors import ModelError
from trimlingual.models.family import Family, family_named, family_of_processor, meta_model
from trimlingual.models.folders import FAMILIES, folder_problems
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.tree import layer_list
from trimlingual.pipeline import plan
from trimlingual.recipe import VocabSettings, load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.vocabulary.bpe import VocabError
from trimlingual.vocabulary.files import tokenizer_file
from trimlingual.vocabulary.rewrite import trim_vocab

from .conftest import EVERY_FAMILY, TEXTS

PACKAGE = Path(trimlingual.__file__).parent
# Names of families and their classes, modules that only a family's tree has, tokens of a family's prompt. What a user writes in a
# recipe is none of them: names of recipes and random bases (`qwen2-audio-en-de`) and of parts (`audio_tower`).
NAMES = re.compile(
    r"Qwen|qwen2_audio|Voxtral|voxtral(?!-)|Flamingo|flamingo(?!-)|\.audio_tower|multi_modal_projector|\blanguage_model\b|\.audio_token_i|<\|"
)


def test_no_other_file_names_a_family():
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".j2")]
    named = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in files
        if path.parent.name != "models" and path.name != "extras.py"  # one of the extras is called as its family
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(line)
    ]
    assert not named
    assert len(files) > 80


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_whole_interface(name):
    family = family_named(name)
    assert isinstance(family, Family)
    assert not inspect.isabstract(type(family))
    assert set(inspect.get_annotations(Family)) <= {*dir(family)}
    assert family.transformers_class.config_class.model_type == name
    assert hasattr(transformers, family.processor_class)
    for function, _ in inspect.getmembers(Family, inspect.isfunction):
        theirs, ours = (inspect.signature(getattr(kind, function)) for kind in (Family, type(family)))
        assert list(theirs.parameters) == list(ours.parameters), function


@pytest.mark.parametrize(
    ("family", "shape", "expected"),
    [
        ("voxtral", "voxtral-mini-3b", 4_676_271_104),
        ("voxtral", "voxtral-small-24b", 24_261_800_960),
        ("audioflamingo3", "audio-flamingo-3", 8_267_215_360),
    ],
    indirect=["family"],
    scope="session",
)
def test_parameters_of_the_true_shapes(family, processor, shape, expected):
    """Mini's number is the published one; the others follow from published shapes."""
    model = meta_model(family.random_config(family.shapes[shape], processor))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("family", ["voxtral"], indirect=True, scope="session")
def test_a_random_base(family, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = resolve_base("random:voxtral-tiny")
    model = load_model(folder, "float32", torch.device("cpu"))
    assert len(layer_list(model, "decoder")) == 6
    assert read_lineage(folder).layers == {"decoder": list(range(6)), "encoder": [0, 1]}


def test_a_family_is_not_written_as_the_one_that_it_extends():
    recipe = load_recipe("audio-flamingo-3-en-de", ["export={for: [gguf]}"])
    assert any("are not written as GGUF" in p for p in gguf.problems(recipe, transformers.AudioFlamingo3Config(), None))


@EVERY_FAMILY
def test_a_vocabulary_is_trimmed(family, model_dir, processor, task, lineage, tmp_path):
    """The placeholder keeps its row; plain loading and our prompt agree on all ids, which `trim_vocab` proves."""
    (tmp_path / "out").mkdir()
    settings = VocabSettings(pad_to_multiple=1)
    info = trim_vocab(ModelFolder(model_dir, lineage), TEXTS[:1], {}, task, settings, tmp_path / "out")
    rows = info["rows"]["after"]
    assert rows < info["rows"]["before"] == len(processor.tokenizer)
    (counted,) = info["coverage"].values()
    assert counted["share_sentences_unchanged"] == 1
    trimmed, own = load_model(tmp_path / "out", "float32", torch.device("cpu")), load_processor(tmp_path / "out")
    assert trimmed.lm_head.weight.shape[0] == rows
    placeholder = family.audio_token(own)
    assert trimmed.config.audio_token_id == placeholder < rows
    before = family.audio_token(processor)
    assert own.tokenizer.convert_ids_to_tokens(placeholder) == processor.tokenizer.convert_ids_to_tokens(before)
    full = load_model(model_dir, "float32", torch.device("cpu"))
    assert torch.equal(trimmed.lm_head.weight[placeholder], full.lm_head.weight[before])


@pytest.mark.parametrize(
    ("family", "recipe", "base", "memory"),
    [
        ("voxtral", "voxtral-mini-en-de", "random:voxtral-mini-3b", "~33.32 GB"),
        ("voxtral", "voxtral-small-en-de", "random:voxtral-small-24b", "~53.38 GB"),
        ("audioflamingo3", "audio-flamingo-3-en-de", "random:audio-flamingo-3", "~58.90 GB"),
    ],
    indirect=["family"],
    scope="session",
)
def test_a_dry_run_estimates_the_true_shapes(family, recipe, base, memory, tmp_path, monkeypatch):
    """Memory of the teacher's training before activations: adapters of Small, all weights of the others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["compress", recipe, "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", f"model.base={base}"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "200"}).output
    assert memory in shown
    assert "mistral" not in shown


def test_a_missing_library_is_named_before_a_download(tmp_path, monkeypatch):
    """The configuration of a model on the Hub tells the family."""
    monkeypatch.setattr(preflight, "config_of", lambda recipe: transformers.VoxtralConfig())
    monkeypatch.setattr(estimate, "config_of", lambda recipe: transformers.VoxtralConfig())
    monkeypatch.setattr("trimlingual.run.extras.find_spec", lambda name: None)
    recipe = load_recipe("voxtral-mini-en-de")
    found = preflight.check(recipe, tmp_path, plan(recipe, tmp_path))
    assert any("pip install 'trimlingual[voxtral]'" in problem for problem in found.problems)


def test_a_tokenizer_in_no_known_file_is_not_trimmed(processor, tmp_path):
    """Of a processor that keeps its vocabulary for itself."""
    with pytest.raises(VocabError, match=r"neither a tokenizer.json nor a tekken.json \(WhisperFeatureExtractor\)"):
        tokenizer_file(SimpleNamespace(tokenizer=processor.feature_extractor), tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "encoded"),
    [
        ("qwen2_audio", transformers.Qwen2AudioConfig(), 31.5),
        ("voxtral", transformers.VoxtralConfig(), 60.0),
        ("audioflamingo3", transformers.AudioFlamingo3Config(), 31.5),
    ],
)
def test_seconds_that_are_encoded(name, config, encoded):
    assert family_named(name).encoded_s(config, 31.5, fills_up=False) == encoded
    assert family_named(name).encoded_s(config, 31.5, fills_up=True) == 60


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "voxtral"}')
    monkeypatch.setattr("trimlingual.run.extras.find_spec", lambda name: None)
    problems = folders.processor_problems(tmp_path)
    assert "has no tekken.json" in problems[1]
    assert "pip install 'trimlingual[voxtral]'" in problems[2]
    with pytest.raises(ModelError, match="not installed: pip install"):
        resolve_base("random:voxtral-tiny")


def test_an_unknown_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper", "auto_map": {"AutoModel": "evil.Model"}}')
    (problem,) = folder_problems(tmp_path, "translate")
    assert problem.endswith(f"holds a 'whisper' model; supported: {', '.join(FAMILIES)}")
    with pytest.raises(ModelError, match=r"'os' are not supported; supported: qwen2_audio"):
        family_named("os")
    with pytest.raises(ModelError, match="a WhisperFeatureExtractor is no processor of a supported model"):
        family_of_processor(transformers.WhisperFeatureExtractor())
