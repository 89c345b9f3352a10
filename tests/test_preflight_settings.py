"""Settings that cannot go with the base model are refused before anything runs, not by the stage that comes to use them."""

from __future__ import annotations

import json
import shutil

import pytest

from trimlingual.models.loading import resolve_base
from trimlingual.pipeline import compress, plan
from trimlingual.preflight import PreflightError, check
from trimlingual.recipe import RecipeError, load_recipe
from trimlingual.run.lineage import read_lineage

MINI = resolve_base("builtin:mini")  # 12 layers in the decoder, 4 in the encoder


def problems(tmp_path, *overrides):
    recipe = load_recipe("mini", overrides)
    return check(recipe, tmp_path / "run", plan(recipe, tmp_path / "run")).problems


def test_a_middle_block_with_protected_layers_is_refused_before_the_teacher(tmp_path):
    recipe = load_recipe("mini", ["rank.strategy=middle", "rank.num_layers_to_remove=4", "rank.protected=[5, 9]"])
    with pytest.raises(PreflightError, match=r"middle removes the block 4 to 7, and of it \[5\] are protected"):
        compress(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert problems(tmp_path, "rank.strategy=middle", "rank.num_layers_to_remove=4", "rank.protected=[3, 9]") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rank.num_layers_to_remove=11"], "of 12 decoder layers at most 10 can go"),
        (["rank.num_layers_to_remove=12", "rank.protect_first=0", "rank.protect_last=0"], "at most 11 can go"),
        (["rank.num_layers_to_remove=13", "rank.towers=both"], "of 12 decoder and 4 encoder layers at most 12 can go"),
        (["rank.num_layers_to_remove=9", "rank.protected=[0, 5, 6]"], "at most 8 can go"),
        (["rank.protected=[5, 12]"], "rank.protected names layers [12]; the decoder has 0 to 11"),
    ],
)
def test_layers_that_cannot_go(tmp_path, settings, said):
    (found,) = problems(tmp_path, *settings)
    assert said in found


def test_layers_are_those_of_the_base_before_it_was_pruned(tmp_path):
    shutil.copytree(MINI, tmp_path / "pruned")
    read_lineage(MINI, "builtin:mini").without({"decoder": [2, 3]}).save(tmp_path / "pruned")
    pruned = [f"model.base={tmp_path / 'pruned'}", "vocab=null"]
    assert problems(tmp_path, *pruned, "rank.protected=[11]", "rank.num_layers_to_remove=8") == []
    (found,) = problems(tmp_path, *pruned, "rank.protected=[3]")
    assert "layers [3]; the decoder has 0, 1, 4, 5, 6, 7, 8, 9, 10, 11" in found
    (found,) = problems(tmp_path, *pruned, "rank.num_layers_to_remove=9")
    assert "of 10 decoder layers at most 8 can go" in found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quantize.train.lora.target_modules=[q_porj]"], "quantize.train.lora.target_modules ['q_porj'] matches no module"),
        (["recover.method=lora", "recover.lora.target_modules=lm_head", "recover.freeze=[lm_head]"],
         "recover.lora.target_modules 'lm_head' matches no module of the model outside freeze"),
        (["finetune.optimizer=galore_adamw"], "finetune.optimizer: galore_adamw cannot be used: You need to install"),
        (["recover.fsdp=true", "recover.method=full", "model.device=cpu"], "recover.fsdp: it needs several processes"),
    ],
)  # fmt: skip
def test_training_that_cannot_start(tmp_path, settings, said):
    (found,) = problems(tmp_path, *settings)
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("changed", "uneven"),
    [({"num_key_value_heads": 1}, "[(256, 16)]"), ({"intermediate_size": 96}, "[(96, 256)]")],
)
def test_shapes_that_bitsandbytes_cannot_compute_on_a_cpu(tmp_path, changed, uneven):
    folder = shutil.copytree(MINI, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 256, "num_attention_heads": 16, **changed}
    (folder / "config.json").write_text(json.dumps(config))
    settings = [f"model.base={folder}", "model.device=cpu", "quantize.parts=[decoder]", "quantize.group_size=32"]
    (found,) = problems(tmp_path, *settings)
    assert f"the decoder has layers of {uneven}" in found
    for other in (["quantize.train=null"], ["quantize.train={method: full, data: {distilled: 1}}"]):
        assert problems(tmp_path, *settings, "quantize.scheme=int4", *other) == []  # all by this package itself


def test_vocabularies_that_cannot_be_trimmed_so(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Grüße\n".encode("latin-1"))
    trimming = [f"vocab={{when: after, texts: [{tmp_path / 'latin.txt'}], max_tokens: 64}}"]
    not_text, too_few = problems(tmp_path, *trimming)
    assert "latin.txt cannot be read ('utf-8' codec" in not_text
    assert "tokens: vocab.max_tokens 64 is too few" in too_few
    before = problems(tmp_path, "vocab={when: before, max_tokens: 64}")
    assert before == [too_few]
    assert problems(tmp_path, "vocab={when: after, max_tokens: 1024}") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rank.strategy=middle", "rank.towers=both"], "strategy middle works on one tower"),
        (["rank.finetune_each_round={deepspeed: zero2.json}"], "does not go with fsdp or deepspeed"),
        (["rank.finetune_each_round={data: {distilled: 1}}"], "finetune_each_round.data.distilled must be 0"),
        (["rank.finetune_each_round={data: {out_of_domain: 1}}"], "but data.out_of_domain is not set"),
        (["rank.finetune_each_round={token_distillation: {}}"], "token_distillation must be null"),
        (["rank.finetune_each_round={selection_checks: 2}"], "selection_checks must be 0"),
        (["vocab={when: after}", "quantize.scheme=int4", "quantize.eight_bit=[embeddings]"], "rows in 8 bits cannot be taken"),
        (["finetune.optimizer_args=beta1"], "it must look like name=value, name=value"),
        (["quantize.train.lora.target_modules=(a"], "one text is a regular expression, and this is none"),
    ],
)  # fmt: skip
def test_the_recipe_alone_tells(settings, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini", settings)
    assert said in str(caught.value)
