from __future__ import annotations

import json
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml

from trimlingual.recipe import Recipe, RecipeError, list_recipes, load_recipe, parse_recipe, recipes_dir
from trimlingual.recipe.loading import SOURCE_KINDS

MINIMAL = {
    "name": "x",
    "model": {"base": "builtin:mini"},
    "task": {"target_languages": ["de"]},
    "data": {
        "train": {"kind": "builtin", "split": "train"},
        "select": {"kind": "builtin", "split": "select"},
        "test": {"kind": "builtin", "split": "test"},
    },
}


@pytest.mark.parametrize("name", list(list_recipes()))
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", list(list_recipes()))
def test_editors_accept_shipped_recipes_and_mark_what_is_wrong(name):
    """By the schema of `trimlingual recipes --schema`."""
    raw = yaml.safe_load((recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8"))
    editor = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    assert not list(editor.iter_errors(raw))
    raw["quantize"] = {**(raw.get("quantize") or {}), "scheme": "int5"}
    raw["finetine"] = {}
    assert {error.json_path for error in editor.iter_errors(raw)} == {"$", "$.quantize"}


def test_the_papers_settings():
    for language, metric in (("de", "chrfpp"), ("zh", "chrf")):
        b = load_recipe(f"qwen2-audio-en-{language}")
        assert b.finetune.epochs == 3
        assert (b.finetune.batch_size, b.finetune.learning_rate, b.finetune.weight_decay) == (4, 1e-5, 0.001)
        assert (b.finetune.lr_scheduler, b.finetune.warmup_steps) == ("cosine", 0)
        assert (b.rank.num_layers_to_remove, b.rank.metric, b.rank.strategy) == (8, metric, "greedy")
        assert (b.recover.epochs, b.recover.weight_decay) == (4, 0)
        lora = b.quantize.train.lora
        assert (lora.r, lora.alpha, lora.dropout, lora.rslora, lora.target_modules) == (64, 128, 0, True, "all-linear")
        assert (b.quantize.scheme, b.quantize.double_quantization, b.quantize.compute_dtype) == (
            "nf4",
            True,
            "bfloat16",
        )
        mixture = b.quantize.train.data
        assert (mixture.gold, mixture.distilled, mixture.out_of_domain) == (1, 10, 1)
        assert (b.quantize.train.epochs, b.quantize.train.batch_size, b.data.out_of_domain.max_clips) == (1, 8, 100_000)
        a = load_recipe(f"qwen2-audio-en-{language}-qlora")
        assert a.rank is None
        assert (a.quantize.train.epochs, a.quantize.start) == (4, "base")
        assert b.task.system_prompt == "You are a professional translator."


def test_every_problem_at_once_by_path():
    raw = {
        **MINIMAL,
        "finetune": {"epochs": "three", "learning_rate": "3e-4", "batchsize": 4},
        "rank": {"num_layers_to_remove": 0, "metric": "meteor"},
        "distill": {"drop_duplicates": "yes"},
    }
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    message = str(caught.value)
    for part in (
        "finetune.epochs", "finetune.learning_rate", "write 3.0e-4", "finetune.batchsize: unknown key",
        "rank.num_layers_to_remove", "greater than or equal to 1", "rank.metric", "'chrfpp', 'chrf', 'bleu' or 'loss'",
        "distill.drop_duplicates",
    ):  # fmt: skip
        assert part in message, part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"target_languages": ["tlh"]}}, "no prompt is known for target language 'tlh'"),
        ({"task": {"target_languages": []}}, "at least 1 item"),
        ({"task": {"target_languages": ["de", "de"]}}, "names a language twice"),
        ({"task": {"target_languages": ["de"], "prompt": "Translate:"}}, "must contain {language}"),
        ({"rank": None}, "recover is set but rank is null"),
        ({"finetune": None, "quantize": {"start": "teacher"}}, "no stage of this recipe makes that model"),
        ({"rank": {"metric": {"zh": "chrf"}}}, "names no metric for 'de'"),
        (
            {"model": {"base": "builtin:mini", "device": "gpu"}},
            "model.device: device is auto, cpu, cuda, cuda:1, mps or xpu (a GPU is cuda",
        ),
        ({"model": {"base": "builtin:mini", "device": "cuda:x"}}, "got 'cuda:x'"),
        ({"finetune": {"data": {"distilled": 1}}}, "finetune.data.distilled must be 0"),
        ({"recover": {"data": {"out_of_domain": 1}}}, "data.out_of_domain is not set"),
        ({"recover": {"data": {"gold": 0}}}, "nothing to train on"),
        ({"distill": None}, "the distill section is null"),
        ({"quantize": {"scheme": "nf4", "train": {"method": "full"}}}, "use scheme int4, or method lora"),
        ({"finetune": {"optimizer": "flash_adamw", "fsdp": True}}, "flash_adamw does not go with fsdp"),
        ({"finetune": {"optimizer": "adamw_bnb_8bit", "fsdp": True}}, "set optimizer: adamw_torch_fused"),
        ({"finetune": {"lr_scheduler": "constant", "warmup_steps": 5}}, "set constant_with_warmup"),
        ({"finetune": {"method": "lora", "fsdp": True}}, "fsdp does not go with method lora"),
        ({"rank": {"finetune_each_round": {"fsdp": True}}}, "does not go with fsdp"),
        ({"rank": {"strategy": "middle", "finetune_each_round": {}}}, "needs strategy greedy"),
    ],
)
def test_impossible_combinations(change, message):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, **change})
    assert message in str(caught.value)


def test_a_bare_no_is_not_a_boolean():
    assert load_recipe("mini", ["finetune.mixed_precision=no"]).finetune.mixed_precision == "no"


def test_overrides():
    recipe = load_recipe(
        "mini",
        [
            "rank.num_layers_to_remove=2",
            "finetune.learning_rate=3e-4",
            "distill=null",
            "recover.data.distilled=0",
            "quantize.train.data.distilled=0",
        ],
    )
    assert recipe.rank.num_layers_to_remove == 2
    assert recipe.finetune.learning_rate == 3e-4
    assert recipe.distill is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank", "must look like section.key=value"),
        ("name.x=1", "holds a value"),
        ("rank.num_layers=3", "rank.num_layers: unknown key"),
        ("finetune.learning_rate=.inf", "finetune.learning_rate: Input should be a finite number"),
        ("decode.tokens_per_second=1e400", "decode.tokens_per_second: Input should be a finite number"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("rank.budget.size=1000000000000 GB", "size is '1000000000000 GB'; it must be a number"),
        ("rank.budget.size=0.00001 kB", "size is '0.00001 kB'; it must be a number"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("mini", ["quantize.train.data.distilled=1", override])


@pytest.mark.parametrize(
    ("text", "line"),
    [("finetune: {epochs: 5}\nname: x\nfinetune: {batch_size: 2}\n", 3), ("finetune:\n  epochs: 1\n  epochs: 5\n", 3)],
)
def test_a_key_that_stands_there_twice_is_an_error(tmp_path, text, line):
    """YAML's last one would win, and the settings of the first be lost."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(
        RecipeError, match=rf"is not YAML: the key '\w+' stands there twice; remove one\n.*line {line},"
    ):
        load_recipe(path)
    with pytest.raises(RecipeError, match="the key 'r' stands there twice"):
        load_recipe("mini", ["recover.lora={r: 1, r: 2}"])


def test_merged_keys_may_be_given_again(tmp_path):
    path = tmp_path / "r.yaml"
    lora = (
        "finetune: {lora: &a {r: 1}}\nrecover: {lora: &b {<<: *a, r: 2}}\nquantize: {train: {lora: {<<: *b, r: 3}}}\n"
    )
    path.write_text(yaml.dump(MINIMAL) + lora)
    recipe = load_recipe(path)
    assert [train.lora.r for train in (recipe.finetune, recipe.recover, recipe.quantize.train)] == [1, 2, 3]


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match=r"neither a file nor a shipped recipe; shipped: .*, mini, "):
        load_recipe("nonsense")
    with pytest.raises(RecipeError, match="is a folder; give the YAML file"):
        load_recipe(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text("a: [1,")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(path)
    path.write_text("- 1")
    with pytest.raises(RecipeError, match="must hold a mapping"):
        load_recipe(path)


def test_reading_a_recipe_loads_no_torch():
    code = "import sys, trimlingual.recipe as r; r.load_recipe('mini'); sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("role", "source", "line"),
    [
        ("test", {"path": "d/test.jsonl"}, "data.test: a source needs kind, one of KINDS; got {path}"),
        ("train", {"path": "d/test.jsonl"}, "data.train: a source needs kind, one of KINDS; got {path}"),
        ("test", {"kind": "csv", "path": "x"}, "data.test: kind is 'csv'; it is one of KINDS"),
        ("test", {"kind": "manifest"}, "data.test.path: missing"),
        ("test", "d/test.jsonl", "data.test: must be a source or a number of clips to hold out of train; got 'd/test.jsonl'"),
        ("train", "d/train.jsonl", "data.train: must be a source; got 'd/train.jsonl'"),
        ("select", 0, "data.select: Input should be greater than or equal to 1; got 0"),
    ],
)  # fmt: skip
def test_a_wrong_source_is_one_line(role, source, line):
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**MINIMAL, "data": {**MINIMAL["data"], role: source}}, origin="my.yaml")
    expected = line.replace("KINDS", ", ".join(SOURCE_KINDS)).replace(
        "a source", "a source, {kind: ..., ...}" if "must" in line else "a source"
    )
    assert str(caught.value) == f"my.yaml: {expected}"


@pytest.mark.parametrize(
    "override",
    [
        "task.prompt=Translate: {language} please", "task.prompt={language", "model.base=[a", "name=2026-02-30", "name=@x", "name=%x",
        "name='x", "name=a: b: c", "name=*x",
    ],
)  # fmt: skip
def test_an_override_that_is_not_yaml_is_one_line_that_says_how(override):
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", [override])
    message = str(caught.value)
    assert "\n" not in message
    assert repr(override) in message
    path, _, value = override.partition("=")
    (suggested,) = shlex.split(message.split("--set ")[-1])
    assert suggested == f"{path}={json.dumps(value)}"
    section, _, key = path.partition(".")
    if "language}" in value or section == "name":  # else the text itself is no value for the key
        loaded = getattr(load_recipe("mini", [suggested]), section)
        assert (getattr(loaded, key) if key else loaded) == value
