"""What ships: greedy generation, published names, nothing local, settings inside, proven by plain transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import binom

import trimlingual
from trimlingual.app.translate import translate_files
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.evaluation.cost import disk_bytes
from trimlingual.exports import proof
from trimlingual.exports.proof import most_different, prove_export
from trimlingual.exports.shipped import SHIPPED_FILE, read_shipped
from trimlingual.exports.target import ExportError, Finished
from trimlingual.models.errors import ModelError
from trimlingual.models.loading import load_model, load_processor
from trimlingual.models.saving import (
    DOUBLED,
    finish_saved,
    greedy_generation,
    save_model,
    use_published_names,
)
from trimlingual.recipe import DecodeSettings, load_recipe
from trimlingual.run.lineage import LeakError, ModelFolder, check_unseen, read_lineage
from trimlingual.stages.export import export

from .conftest import EVERY_FAMILY

MINI = Path(trimlingual.__file__).parent / "mini" / "model"
PUBLISHED = {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def mini_clips(tmp_path_factory) -> list[Path]:
    """Four of the built-in recordings in a folder of their own."""
    data, folder = MINI.parent / "data", tmp_path_factory.mktemp("clips")
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    return [Path(shutil.copy(data / json.loads(line)["audio"], folder)) for line in lines]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The built-in model with the generation values of the published checkpoint."""
    folder = shutil.copytree(MINI, tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PUBLISHED))
    return folder


def test_generation_keeps_tokens_and_nothing_else():
    kept = greedy_generation({**PUBLISHED, "eos_token_id": [5, 6], "pad_token_id": 6, "no_repeat_ngram_size": 3}, 64)
    assert kept == {"do_sample": False, "eos_token_id": [5, 6], "pad_token_id": 6, "max_new_tokens": 64}


def test_doubled_prefix_is_renamed_in_place(tmp_path):
    tensors = {
        "language_model.model.model.norm.weight": torch.arange(4.0),
        "language_model.lm_head.weight": torch.ones(2),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert use_published_names(tmp_path) == 1
    loaded = load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["language_model.model.norm.weight"], torch.arange(4.0))
    assert (tmp_path / "model.safetensors").stat().st_size == size
    assert set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == set(loaded)


def test_the_built_in_model_has_published_names():
    with safe_open(MINI / "model.safetensors", framework="pt") as file:
        assert not any(name.startswith(DOUBLED) for name in file.keys())  # noqa: SIM118  (not a dict)


def test_saved_files_are_readable_and_name_no_path(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me", "vocab_size": 9}))
    (base / "model.safetensors").chmod(0o600)
    finish_saved(base)
    written = json.loads((base / "config.json").read_text())
    assert "_name_or_path" not in written
    assert written["vocab_size"] == written["text_config"]["vocab_size"]
    assert (base / "model.safetensors").stat().st_mode == (base / "config.json").stat().st_mode


def test_what_is_saved_can_be_read_by_transformers_4_too(make_model, processor, tmp_path):
    """It takes special tokens as a list under their old name only, and the rotary embedding's base from where it used to stand."""
    model = make_model()
    for config in (model.config.text_config, model.model.language_model.config):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    save_model(model, processor, tmp_path, "float32")
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["additional_special_tokens"] == processor.tokenizer.extra_special_tokens
    assert "extra_special_tokens" not in tokenizer
    text = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500_000.0
    loaded = load_processor(tmp_path)
    assert loaded.tokenizer.extra_special_tokens == processor.tokenizer.extra_special_tokens
    assert loaded.tokenizer("<|AUDIO|> gut")["input_ids"] == processor.tokenizer("<|AUDIO|> gut")["input_ids"]
    reloaded = load_model(tmp_path, "float32", torch.device("cpu"))
    assert reloaded.config.text_config.rope_parameters["rope_theta"] == 500_000.0


def test_so_many_may_differ_as_keep_the_promise_of_95_percent():
    """A share of 5 % is refused in less than one case in a hundred, half of the answers hardly ever let through."""
    assert [most_different(count, exact=False) for count in (8, 16, 40, 240)] == [2, 3, 6, 20]
    assert most_different(240, exact=True) == 0
    for count in (8, 16, 40, 240):
        allowed = most_different(count, exact=False)
        assert binom.sf(allowed, count, 0.05) < 0.01 < binom.sf(allowed - 1, count, 0.05)
    assert binom.cdf(most_different(16, exact=False), 16, 0.5) < 0.02


def test_export_ships_settings_and_nothing_local(base, tmp_path, capsys):
    recipe = load_recipe("mini")
    lineage = read_lineage(base).with_seen("train", ["a", "b"])
    made = export(Finished(ModelFolder(base, lineage), recipe), "transformers", tmp_path / "out")
    [outcome] = made["outcomes"]
    assert (outcome["runtime"], outcome["format"]) == ("transformers", "bfloat16")
    assert outcome["disk_bytes"] == disk_bytes(tmp_path / "out")
    assert outcome["proof"]["loads_whole"]
    assert outcome["proof"]["compared"] == 0
    assert outcome["proof"]["versions"] == {"transformers": transformers.__version__, "torch": torch.__version__}
    for told in (capsys.readouterr().err, (tmp_path / "out" / "README.md").read_text(encoding="utf-8")):
        assert "nothing was recorded that its translations could be compared with" in told
        assert "0 of 0" not in told
    assert not {*PUBLISHED} - {"do_sample"} & {*json.loads((tmp_path / "out" / "generation_config.json").read_text())}
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    shipped = read_lineage(tmp_path / "out")
    assert shipped.seen == {}
    assert shipped.seen_digests["train"]["count"] == 2
    with pytest.raises(LeakError):
        check_unseen(shipped, "test", [("x", "b"), ("y", "a")])
    check_unseen(shipped, "test", [("x", "b")])  # a note only: it cannot be known
    found = read_shipped(tmp_path / "out")
    assert found is not None
    assert (found.task, found.decode, found.dtype) == (recipe.task, recipe.decode, recipe.model.dtype)


def recorded_from(folder: Path, clips: list[Path]) -> list[tuple[Clip, str, str]]:
    """(clip, language, what our decoder says), as the proof reads them from an evaluation."""
    rows = translate_files(folder, clips, ["de", "zh"], load_recipe("mini"))
    return [(Clip(row["audio"], Path(row["audio"]), {}, None, 1.0, ""), row["language"], row["text"]) for row in rows]


def test_plain_generate_gives_what_was_recorded(base, mini_clips, monkeypatch):
    recipe, recorded = load_recipe("mini"), recorded_from(base, mini_clips[:2])
    monkeypatch.setattr(proof, "recorded_translations", lambda *given: recorded)
    finish_saved(base)
    assert prove_export(base, recipe, None, [], exact=True)["equal"] == len(recorded)
    monkeypatch.setattr(
        proof, "recorded_translations", lambda *given: [(*recorded[0][:2], "Etwas anderes."), *recorded[1:]]
    )
    with pytest.raises(ExportError, match="not the recorded ones"):
        prove_export(base, recipe, None, [], exact=True)
    generation = base / "generation_config.json"  # a rule that is not greedy is no near-tie, whatever the dtype
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"repetition_penalty": 9.0}))
    monkeypatch.setattr(proof, "recorded_translations", lambda *given: recorded)
    with pytest.raises(ExportError, match="not the recorded ones"):
        prove_export(base, recipe, None, [], exact=False)


def test_a_near_tie_does_not_count_in_16_bits(base, mini_clips, monkeypatch):
    """Two tokens with the same row in the head are as likely as each other: `generate()` takes the one, a record the other."""
    tokenizer = load_processor(base).tokenizer
    text = recorded_from(base, mini_clips[:1])[0][2]
    first, *rest = tokenizer(text, add_special_tokens=False)["input_ids"]
    twins = (token for token in range(first + 1, len(tokenizer)) if token not in tokenizer.all_special_ids)
    twin = next(t for t in twins if tokenizer(tokenizer.decode([t, *rest]))["input_ids"][:1] == [t])
    model = load_model(base, "float32", torch.device("cpu"))
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
    save_model(model, load_processor(base), base, "float32")
    finish_saved(base)
    recorded = recorded_from(base, mini_clips[:2])
    assert recorded[0][2] == text
    other = (*recorded[0][:2], tokenizer.decode([twin, *rest]))
    monkeypatch.setattr(proof, "recorded_translations", lambda *given: [other, *recorded[1:]])
    [different] = prove_export(base, load_recipe("mini"), None, [], exact=False)["different"]
    assert (different["exported"], different["margin"]) == (text, 0)
    monkeypatch.setattr(proof, "most_different", lambda *given: 0)
    assert prove_export(base, load_recipe("mini"), None, [], exact=False)["equal"] == len(recorded) - 1
    with pytest.raises(ExportError, match="not the recorded ones"):
        prove_export(base, load_recipe("mini"), None, [], exact=True)


@EVERY_FAMILY
@pytest.mark.parametrize("padding", ["mask", "window"])
def test_plain_generate_gives_what_our_decoder_gives(padding, model_dir, split, tmp_path, monkeypatch):
    """A saved random model, in a fresh process, in float32; how it hears padding is known from its folder."""
    recipe = load_recipe("mini", ["model.dtype=float32", "model.device=cpu"])
    folder = shutil.copytree(model_dir, tmp_path / "model")
    load_processor(folder, padding).save_pretrained(folder)
    finish_saved(folder, 6)
    model, processor = load_model(folder, "float32", torch.device("cpu")), load_processor(folder)
    settings = DecodeSettings(batch_size=4, max_new_tokens=6, min_new_tokens=6)
    said = translate_clips(model, processor, recipe.task, split.clips, settings)
    assert len({t.hypothesis for t in said}) > len(split.clips) / 2
    clips = {clip.id: clip for clip in split.clips}
    recorded = [(clips[t.id], t.language, t.hypothesis) for t in said]
    monkeypatch.setattr(proof, "recorded_translations", lambda *given: recorded)
    assert prove_export(folder, recipe, None, [], exact=True)["equal"] == len(recorded)


def test_what_is_no_model_is_refused(base, tmp_path):
    lineage, recipe = read_lineage(base), load_recipe("mini")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(ModelError, match="lacks 1 of 1"):
        export(Finished(ModelFolder(base, lineage), recipe), "transformers", tmp_path / "shard")
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        export(Finished(ModelFolder(base, lineage), recipe), "transformers", tmp_path / "adapter")


def test_weights_that_do_not_cover_the_architecture_are_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors.pop("language_model.model.layers.3.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="1 missing keys"):
        export(Finished(ModelFolder(base, read_lineage(base)), load_recipe("mini")), "transformers", tmp_path / "out")


def test_a_local_base_ships_by_name(base):
    assert replace(read_lineage(base), base=str(base)).to_ship().base == "base"


def test_what_holds_no_speech_is_answered_in_a_sentence(tmp_path, capsys):
    """And is not given to the model, which would make up a translation."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(32000), 16000)
    soundfile.write(tmp_path / "tiny.wav", np.array([0.1]), 16000)
    silent, tiny = translate_files("builtin:mini", [tmp_path], ["de"])
    assert silent["text"] == tiny["text"] == ""
    assert silent["warning"] == "not translated: the recording is silent (every sample is 0)"
    assert (
        tiny["warning"] == "not translated: the recording is too short for speech (0.062 ms; it takes at least 100 ms)"
    )
    assert "0 to do" not in capsys.readouterr().err


def test_translate_takes_folders_of_audio_and_the_built_in_model(mini_clips, base, capsys):
    said = list(translate_files("builtin:mini", [mini_clips[0].parent], ["de"]))
    assert len(said) == len(mini_clips)
    assert SHIPPED_FILE not in capsys.readouterr().err
    next(translate_files(base, mini_clips[:1], ["de"]))
    assert f"{base} has no {SHIPPED_FILE}" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r"\./nosuch does not exist"):
        next(translate_files("./nosuch", mini_clips, ["de"]))
