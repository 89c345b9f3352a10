"""The interface of the model families: each has all of it, and nobody else knows one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import transformers

import trimlingual
from trimlingual.models.errors import ModelError
from trimlingual.models.family import Family, family_named, family_of_processor
from trimlingual.models.folders import FAMILIES, folder_problems

PACKAGE = Path(trimlingual.__file__).parent
# Names of families and their classes, modules that only a family's tree has, tokens of a family's prompt. What a user writes in a
# recipe is none of them: names of recipes and random bases (`qwen2-audio-en-de`) and of parts (`audio_tower`).
NAMES = re.compile(
    r"Qwen|qwen2_audio|Voxtral|voxtral(?!-)|\.audio_tower|multi_modal_projector|\blanguage_model\b|\.audio_token_i|<\|"
)


def test_no_other_file_names_a_family():
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".j2")]
    named = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in files
        if path.parent.name != "models"
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


def test_an_unknown_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper", "auto_map": {"AutoModel": "evil.Model"}}')
    (problem,) = folder_problems(tmp_path, "translate")
    assert problem.endswith(f"holds a 'whisper' model; supported: {', '.join(FAMILIES)}")
    with pytest.raises(ModelError, match=r"'os' are not supported; supported: qwen2_audio"):
        family_named("os")
    with pytest.raises(ModelError, match="a WhisperFeatureExtractor is no processor of a supported model"):
        family_of_processor(transformers.WhisperFeatureExtractor())
