"""GGUF files read back: the model's weights, its tokenizer, llama.cpp's prompt; and llama.cpp itself, as the package xllamacpp."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from trimlingual.cli import app
from trimlingual.data.sources import Clip
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.exports import llama_cpp
from trimlingual.exports.gguf import problems
from trimlingual.exports.target import ExportError, Finished
from trimlingual.models.inputs import Prompter
from trimlingual.models.layers import drop_layers_
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.models.tree import audio_tower, lm_head, projector, text_decoder
from trimlingual.preflight import PreflightError
from trimlingual.quantization.int4 import save_packed
from trimlingual.quantization.nf4 import bitsandbytes_config, dequantized
from trimlingual.recipe import DecodeSettings, QuantizeSettings, Recipe, VocabSettings, load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.export import export
from trimlingual.stages.quantize import config_summary, sqnr_db
from trimlingual.vocabulary.rewrite import trim_vocab

WINDOW = ["model.audio_padding=window", "export.for=[gguf]", "model.device=cpu"]
SUFFIXES = {"weight", "bias"}


def recipe(*overrides: str) -> Recipe:
    return load_recipe("mini", [*WINDOW, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The built-in model, said to hear padding and without three of its layers."""
    source, out = resolve_base("builtin:mini"), tmp_path_factory.mktemp("model")
    model = load_model(source, "bfloat16", torch.device("cpu"))
    drop_layers_(model, {"decoder": [3, 7], "encoder": [1]})
    save_model(model, load_processor(source, "window"), out, "bfloat16")
    return out


def written(folder: Path, out: Path, *overrides: str) -> dict[str, Any]:
    made = export(Finished(ModelFolder(folder, read_lineage(folder, "builtin:mini")), recipe(*overrides)), "gguf", out)
    assert (out / "README.md").is_file()
    return made


def tensors(path: Path) -> dict[str, Any]:
    """Name -> values in float32, as GGUF's names have them."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).astype(np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    assert found is not None, key
    return found.contents()


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """The decoder's tensors by their names in GGUF, which are written out here once more."""
    decoder, found = text_decoder(model), {}
    found["token_embd.weight"], found["output_norm.weight"] = decoder.embed_tokens.weight, decoder.norm.weight
    found["output.weight"] = lm_head(model).weight
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        modules = {
            "attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj, "attn_output": attention.o_proj,
            "attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm, "ffn_gate": mlp.gate_proj,
            "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj,
        }  # fmt: skip
        for name, module in modules.items():
            found |= {f"blk.{number}.{name}.{key}": value for key, value in module.named_parameters()}
    return {name: value.detach().float() for name, value in found.items()}


@pytest.mark.parametrize(("kind", "least_db"), [("f16", 60), ("q8_0", 40), ("q4_0", 17)])
def test_the_decoder_reads_back(kind, least_db, folder, tmp_path):
    made = written(folder, tmp_path, f"export.gguf.types=[{kind}]")
    path = tmp_path / f"mini-{kind}.gguf"
    model = load_model(folder, "bfloat16", torch.device("cpu"))
    expected, found = matrices(model), tensors(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert sqnr_db(value, found[name].view_as(value)) > (least_db if value.ndim == 2 else 100), name
    assert field(path, "qwen2.block_count") == len(text_decoder(model).layers) == 10
    assert field(path, "qwen2.attention.head_count_kv") == model.config.text_config.num_key_value_heads
    for each in (path, tmp_path / "mmproj-f16.gguf"):  # which may be passed on without the card
        assert field(each, "general.license") == "apache-2.0"
        assert field(each, "general.languages") == ["en", "de", "zh"]
    [outcome] = made["outcomes"]
    assert outcome["disk_bytes"] == path.stat().st_size + (tmp_path / "mmproj-f16.gguf").stat().st_size
    assert "llama.cpp (xllamacpp" in (tmp_path / "README.md").read_text(encoding="utf-8")  # it loads them


@pytest.mark.skipif(shutil.which("llama-quantize") is None, reason="llama-quantize is not on the PATH")
@pytest.mark.parametrize("types", ["[q4_k_m]", "[q4_k_m,f16]"])
def test_llama_quantize_packs_what_we_wrote(types, folder, tmp_path):
    """Widths that blocks of 256 do not divide get another type of its choice; the f16 file stays only where it is asked for."""
    written(folder, tmp_path, f"export.gguf.types={types}")
    expected, found = (
        matrices(load_model(folder, "bfloat16", torch.device("cpu"))),
        tensors(tmp_path / "mini-q4_k_m.gguf"),
    )
    for name, value in expected.items():
        assert sqnr_db(value, found[name].view_as(value)) > 20, name
    kinds = {"q4_k_m", "f16"} if "f16" in types else {"q4_k_m"}
    assert {path.name for path in tmp_path.glob("*.gguf")} == {f"mini-{kind}.gguf" for kind in kinds} | {
        "mmproj-f16.gguf"
    }


def test_llama_quantize_is_missed_before_anything_runs(monkeypatch):
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: None)
    [problem] = problems(recipe("export.gguf.types=[q4_k_m]", "export.gguf.llama_quantize=nowhere"), None, None)
    assert "there is no nowhere; set export.gguf.llama_quantize" in problem
    assert not list(problems(recipe("export.gguf.types=[q4_0]"), None, None))


@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_packed_weights_are_written_as_what_they_stand_for(scheme, folder, tmp_path):
    processor, cpu = load_processor(folder), torch.device("cpu")
    settings = QuantizeSettings(scheme=scheme, group_size=64)
    if scheme == "nf4":
        packed = load_model(folder, "bfloat16", cpu, bitsandbytes_config(settings))
        attention = text_decoder(packed).layers[4].self_attn
        expected = dequantized(attention.v_proj)
        save_model(packed, processor, tmp_path / "packed")
    else:
        model = load_model(folder, "bfloat16", cpu)
        save_packed(model, processor, tmp_path / "packed", settings, "bfloat16")
        expected = text_decoder(load_model(tmp_path / "packed", "bfloat16", cpu)).layers[4].self_attn.v_proj.weight
    written(tmp_path / "packed", tmp_path / "out", "export.gguf.types=[f16]")
    found = tensors(tmp_path / "out" / "mini-f16.gguf")["blk.4.attn_v.weight"]
    torch.testing.assert_close(found, expected.detach().float(), rtol=1e-3, atol=1e-6)
    original = text_decoder(load_model(folder, "bfloat16", cpu)).layers[4].self_attn.v_proj.weight
    assert 15 < sqnr_db(original, found) < 30  # 4 bits


@pytest.fixture
def recorded(folder, split, monkeypatch) -> list[tuple[Clip, str, str]]:
    """What our decoder says to four clips in two languages, as an evaluation would have recorded it."""
    settings = DecodeSettings(max_new_tokens=8, min_new_tokens=8)
    model, clips = load_model(folder, "float32", torch.device("cpu")), split.clips[:4]
    said = translate_clips(model, load_processor(folder), recipe().task, clips, settings)
    by_id = {clip.id: clip for clip in clips}
    found = [(by_id[each.id], each.language, each.hypothesis) for each in said]
    monkeypatch.setattr(llama_cpp, "recorded_translations", lambda *given: found)
    return found


def test_llama_says_what_our_decoder_says(folder, recorded, tmp_path):
    """It fills clips up itself and makes the prompt by the template in the file."""
    assert len({text for *_, text in recorded}) > 4
    [outcome] = written(folder, tmp_path, "export.gguf.types=[f16]", "decode.max_new_tokens=8")["outcomes"]
    proof = outcome["proof"]
    assert (proof["runtime"], proof["compared"]) == ("llama.cpp", 8)
    assert proof["equal"] >= 7  # f16 rounds otherwise than bfloat16
    assert proof["seconds_per_clip"] > 0
    assert proof["peak_bytes"] > outcome["disk_bytes"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"and gives {proof['equal']} of 8 recorded translations unchanged" in card


def test_files_that_llama_runs_otherwise_do_not_ship(folder, recorded, tmp_path):
    recorded[:] = [(clip, language, "Etwas anderes.") for clip, language, _ in recorded]
    with pytest.raises(ExportError, match="8 of 8 translations by llama"):
        written(folder, tmp_path, "decode.max_new_tokens=8")
    (tmp_path / "mini-q8_0.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(ExportError, match="does not load what was exported"),
        llama_cpp.serving(tmp_path / "mini-q8_0.gguf", tmp_path / "mmproj-f16.gguf", 64),
    ):
        pass


def test_the_audio_tower_reads_back(folder, tmp_path):
    written(folder, tmp_path)
    path = tmp_path / "mmproj-f16.gguf"
    found, model = tensors(path), load_model(folder, "bfloat16", torch.device("cpu"))
    tower = audio_tower(model)
    assert len(found) == sum(1 for part in (tower, projector(model)) for _ in part.parameters())
    for name, value in {
        "a.conv1d.2.weight": tower.conv2.weight, "a.position_embd.weight": tower.embed_positions.weight,
        "a.post_ln.bias": tower.layer_norm.bias, "a.blk.1.ln1.weight": tower.layers[1].self_attn_layer_norm.weight,
        "a.blk.2.attn_out.weight": tower.layers[2].self_attn.out_proj.weight, "a.blk.0.ffn_up.bias": tower.layers[0].fc1.bias,
        "mm.a.fc.weight": projector(model).linear.weight,
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name], value.detach().float(), rtol=1e-3, atol=1e-7)
    assert found["a.conv1d.1.bias"].shape == (192, 1)
    assert (field(path, "clip.projector_type"), field(path, "clip.audio.block_count")) == ("qwen2a", 3)
    assert field(path, "clip.audio.num_mel_bins") == 80


def check_tokenizer(path: Path, model_dir: Path) -> None:
    """The file's tokens, merges and special tokens are the tokenizer's, and its template makes the prompt of training."""
    processor = load_processor(model_dir)
    tokenizer, tokens = processor.tokenizer, field(path, "tokenizer.ggml.tokens")
    assert {token: number for number, token in enumerate(tokens)} == tokenizer.get_vocab()
    merges = json.loads((model_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in field(path, "tokenizer.ggml.merges")] == [
        tuple(merge) for merge in merges
    ]
    control = {
        number for number, kind in enumerate(field(path, "tokenizer.ggml.token_type")) if kind == gguf.TokenType.CONTROL
    }
    assert control == set(tokenizer.added_tokens_decoder)
    assert tokens[field(path, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    task = recipe().task
    for marker in ("<__media__>", "<__media_x7Gz__>"):
        messages = [
            {"role": "system", "content": task.system_prompt},
            {"role": "user", "content": marker + task.prompt_for("de")},
        ]
        template = jinja2.Environment().from_string(field(path, "tokenizer.chat_template"))
        before, after = template.render(messages=messages, add_generation_prompt=True).split(marker)
        ids = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (before + "<|audio_bos|>", "<|audio_eos|>" + after)  # which llama.cpp puts around the states
        ]
        assert tuple(ids) == Prompter(processor, task).parts("de")


def test_the_tokenizer_and_the_prompt(folder, tmp_path):
    written(folder, tmp_path, "export.gguf.text_only=true")
    assert not (tmp_path / "mmproj-f16.gguf").exists()
    assert "not checked with llama.cpp: without the audio tower" in (tmp_path / "README.md").read_text(encoding="utf-8")
    check_tokenizer(tmp_path / "mini-q8_0.gguf", folder)


def test_a_trimmed_vocabulary(folder, tmp_path):
    texts = ["Der Hund schläft.", "Wir messen die Zeit."]
    settings = VocabSettings(max_tokens=1024)
    trim_vocab(ModelFolder(folder, read_lineage(folder)), texts, {}, recipe().task, settings, tmp_path / "cut")
    written(tmp_path / "cut", tmp_path / "out")
    check_tokenizer(tmp_path / "out" / "mini-q8_0.gguf", tmp_path / "cut")
    assert tensors(tmp_path / "out" / "mini-q8_0.gguf")["output.weight"].shape == (1024, 192)


def test_by_the_command_line(folder, tmp_path):
    """Two runtimes at once get a folder each; what cannot work is said before anything is written."""
    command = [
        "export",
        "mini",
        "--model",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    run = CliRunner().invoke
    refused = run(app, [*command, "--for", "gguf"])
    assert isinstance(refused.exception, PreflightError)
    assert not (tmp_path / "out").exists()
    made = run(app, [*command, "--for", "gguf", "--for", "vllm", "--set", "model.audio_padding=window"])
    assert made.exit_code == 0, made.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"exported-gguf", "exported-vllm"}
    files = {path.name for path in (tmp_path / "out" / "exported-gguf").iterdir()}
    assert files == {"README.md", "artifact.json", "log.txt", "mini-q8_0.gguf", "mmproj-f16.gguf"}
    card = (tmp_path / "out" / "exported-gguf" / "README.md").read_text(encoding="utf-8")
    assert "llama-server -m mini-q8_0.gguf --mmproj mmproj-f16.gguf" in card


def test_what_llama_would_translate_into_nonsense_is_refused(folder, tmp_path, monkeypatch):
    config = load_model(folder, "bfloat16", torch.device("cpu")).config
    assert not list(problems(recipe(), config, None))
    [problem] = problems(recipe("model.audio_padding=mask"), config, None)
    assert "never heard it in training translates into nonsense" in problem
    assert not list(problems(recipe("model.audio_padding=mask", "export.gguf.text_only=true"), config, None))
    config.audio_config.max_source_positions = 400
    [problem] = problems(recipe(), config, None)
    assert "the model's window is 8 s" in problem
    masked = shutil.copytree(folder, tmp_path / "masked")
    load_processor(masked, "mask").save_pretrained(masked)
    with pytest.raises(ExportError, match="was made with mask"):
        written(masked, tmp_path / "out")
    monkeypatch.setattr("trimlingual.run.extras.find_spec", lambda name: None)
    assert "pip install 'trimlingual[gguf]'" in next(problems(recipe(), None, None))


def test_a_plan_of_bits_is_kept_where_types_allow(folder, tmp_path):
    """By the base model's layers, of which two are gone: 8 bits are q8_0 beside q4_0, and table and head have what the plan gives."""
    bits = {"decoder.8.mlp": 8, "decoder.3.mlp": 8, "embeddings": 4, "lm_head": 4}
    settings = QuantizeSettings(scheme="int4", group_size=32, parts=["decoder"], bits=bits)
    kept = [layer for layer in range(12) if layer not in (3, 7)]
    lineage = replace(
        read_lineage(folder, "x"), quantization=config_summary(settings), layers={"decoder": kept, "encoder": [0, 2, 3]}
    )
    model = load_model(folder, "bfloat16", torch.device("cpu"))
    save_packed(model, load_processor(folder), tmp_path / "packed", settings.at_positions(kept), "bfloat16")
    finished = Finished(ModelFolder(tmp_path / "packed", lineage), recipe("export.gguf.types=[q4_0]"))
    export(finished, "gguf", tmp_path / "out")
    found = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out" / "mini-q4_0.gguf").tensors}
    assert {found["token_embd.weight"], found["output.weight"], found["blk.5.attn_q.weight"]} == {"Q4_0"}
    assert {name for name, kind in found.items() if kind == "Q8_0"} == {
        f"blk.6.ffn_{x}.weight" for x in ("up", "down", "gate")
    }
