"""What `import trimlingual` offers, and that the docs name it all."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimlingual
from tools import recipe_tables
from trimlingual.data.rows import MINI_DATA
from trimlingual.recipe import Recipe, RecipeError

ROOT = Path(__file__).parents[1]


def test_importing_it_imports_nothing():
    code = "import sys; before = set(sys.modules); import trimlingual; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydantic" not in done.stdout
    assert "torch" not in done.stdout


def test_public_names_and_their_parameters_stand_in_the_docs():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)(\(.*\))?` \|", text, re.MULTILINE))
    assert set(documented) == set(dir(trimlingual))
    for name in set(documented) - {"__version__"}:
        signature = inspect.signature(getattr(trimlingual, name))
        parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        written = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
        assert written.replace("'", '"') == documented[name]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = trimlingual.compres
    with pytest.raises(RecipeError, match="neither a file nor a shipped recipe"):
        trimlingual.compress("no-such-recipe")


def test_translate_and_evaluate(manifests, tmp_path):
    clip = sorted((MINI_DATA / "everyday").glob("*.ogg"))[0]
    (line,) = trimlingual.translate("builtin:mini", clip, to="de", device="cpu")
    assert line["audio"] == str(clip)
    assert line["text"]
    recipe = trimlingual.load_recipe("mini", [*manifests, "evaluate.bootstrap_samples=100"])
    model = MINI_DATA.parent / "model"
    scores = trimlingual.evaluate(recipe, model, tmp_path / "scores", run_dir=tmp_path / "run")
    assert set(scores["languages"]) == {"de", "zh"}
    assert scores == trimlingual.evaluate(recipe, model, tmp_path / "scores", run_dir=tmp_path / "run")


def test_the_docs_have_every_key_of_a_recipe():
    """`python -m tools.recipe_tables` writes them."""
    text = recipe_tables.DOCUMENT.read_text(encoding="utf-8")
    assert text == recipe_tables.document(text)


def test_every_key_has_a_description():
    schema = Recipe.model_json_schema()
    bare = [
        f"{name}.{key}"
        for name, section in {"Recipe": schema, **schema["$defs"]}.items()
        for key, field in section["properties"].items()
        if not field.get("description")
    ]
    assert not bare
