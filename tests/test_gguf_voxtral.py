"""Voxtral's decoder as a GGUF file: llama.cpp tokenizes as mistral-common does and computes as transformers; audio is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch

from tests.test_gguf import field, tensors
from tools.mini.sentences import everyday
from trimlingual.exports.gguf import problems
from trimlingual.exports.llama_cpp import ask, serving
from trimlingual.exports.target import ExportError, Finished
from trimlingual.models.inputs import Prompter
from trimlingual.models.loading import load_model, load_processor
from trimlingual.models.saving import save_model
from trimlingual.models.tree import lm_head, text_decoder
from trimlingual.recipe import load_recipe
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.export import export

pytestmark = pytest.mark.parametrize("family", ["voxtral"], indirect=True, scope="session")
CPU = torch.device("cpu")
RECIPE = load_recipe("mini", ["export.for=[gguf]", "export.gguf.types=[f16]", "export.gguf.text_only=true"])


@pytest.fixture(scope="module")
def folder(make_model: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    save_model(make_model(), processor, out, "bfloat16")
    return out


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf")
    export(Finished(ModelFolder(folder, read_lineage(folder, "x")), RECIPE), "gguf", out)
    assert not (out / "mmproj-f16.gguf").exists()
    return out / "mini-f16.gguf"


def test_the_decoder_reads_back(folder, path):
    """Queries and keys are turned for neighbours; everything else is as it was."""
    model, found = load_model(folder, "float32", CPU), tensors(path)
    decoder = text_decoder(model)
    assert len(found) == sum(1 for part in (decoder, lm_head(model)) for _ in part.parameters())
    for name, weight in {
        "token_embd.weight": decoder.embed_tokens.weight, "output.weight": lm_head(model).weight,
        "blk.1.attn_v.weight": decoder.layers[1].self_attn.v_proj.weight, "blk.3.ffn_up.weight": decoder.layers[3].mlp.up_proj.weight,
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-3, atol=1e-6)
    assert field(path, "llama.attention.key_length") == 32  # wider than width / heads


def test_llama_computes_what_transformers_does(folder, path):
    """The same ids for sentences, and the same probabilities after them."""
    processor, model = load_processor(folder), load_model(folder, "float32", CPU)
    tokenizer = processor.tokenizer
    sentences = [sentence.en for sentence in everyday(40, seed=5)] + [
        "Wörter, 12 Äpfel / 3!",
        "a  b\n\nc   ",
        "猫は 眠る",
    ]
    with serving(path, None, 512) as server:
        for text in sentences:
            ids = ask(f"{server.url}/tokenize", {"content": text, "add_special": False})["tokens"]
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], text
        compared = 0
        for text in sentences[:20]:
            ids = tokenizer(text)["input_ids"]
            with torch.inference_mode():
                expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 20}
            # None where a random model's answer ends at once, or begins with a part of a character
            for said in ask(f"{server.url}/completion", asked).get("completion_probabilities", ()):
                for each in said["top_logprobs"]:
                    assert abs(each["logprob"] - expected[each["id"]]) < 0.02, text
                    compared += 1
    assert compared >= 100


def test_the_prompt(folder, path):
    """The template's words around the clip; llama.cpp adds `<s>` before it."""
    processor = load_processor(folder)
    template = jinja2.Environment().from_string(field(path, "tokenizer.chat_template"))
    tokenizer, task = processor.tokenizer, RECIPE.task
    for system in ("", "You translate."):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": "<__media_x7Gz__>" + task.prompt_for("de")})
        before, after = template.render(messages=messages, add_generation_prompt=True).split("<__media_x7Gz__>")
        assert before == "[INST]"
        assert after.endswith("[/INST]")
        asked = task.model_copy(update={"system_prompt": system})
        ids = Prompter(processor, asked).parts("de")
        assert tokenizer(after.removesuffix("[/INST]"), add_special_tokens=False)["input_ids"] == list(ids[1])[:-1]


def test_its_audio_is_refused(folder, tmp_path):
    """By llama.cpp's builds 11434 and 11549 a window has 187 audio states, by transformers 375."""
    heard = load_recipe("mini", ["export.for=[gguf]"])
    config = load_model(folder, "float32", CPU).config
    [problem] = problems(heard, config, None)
    assert "hears half of what it should" in problem
    with pytest.raises(ExportError, match="text_only"):
        export(Finished(ModelFolder(folder, read_lineage(folder, "x")), heard), "gguf", tmp_path)
