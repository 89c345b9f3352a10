"""Vocabulary trimming of whole model folders: small random ones of every kind, and the built-in model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from tests.conftest import TEXTS
from trimlingual.cli import app
from trimlingual.data.audio import DataError
from trimlingual.data.sources import read_source
from trimlingual.data.splits import load_splits
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.models.errors import ModelError
from trimlingual.models.inputs import Prompter
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.saving import save_model
from trimlingual.pipeline import compress, plan
from trimlingual.quantization.nf4 import bitsandbytes_config, check_quantized
from trimlingual.recipe import (
    BuiltinSource,
    DecodeSettings,
    QuantizeSettings,
    RecipeError,
    TaskSettings,
    VocabSettings,
    load_recipe,
)
from trimlingual.run.artifacts import read_artifact
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.prune import probe
from trimlingual.vocabulary import rewrite
from trimlingual.vocabulary.bpe import VocabError
from trimlingual.vocabulary.rewrite import count_tokens, counted_texts, find_rows, read_lines, trim_vocab

CPU = torch.device("cpu")
GERMAN = TaskSettings(target_languages=["de"])
SETTINGS = VocabSettings(pad_to_multiple=32)


def trim(folder: Path, out: Path, texts=TEXTS[:3], settings=SETTINGS, held_out=None):
    return trim_vocab(ModelFolder(folder, read_lineage(folder)), texts, held_out or {}, GERMAN, settings, out)


def new_ids(before: Path, after: Path) -> list[tuple[int, int]]:
    """(old, new) id of every kept token."""
    old, new = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (before, after))
    return [(old[token], id) for token, id in new.items()]


@torch.inference_mode()
def logits(folder: Path, embeds=None):
    model = load_model(folder, "float32", CPU)
    embeds = probe(model) if embeds is None else embeds
    return embeds, model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)


def check_same_model(before: Path, after: Path) -> None:
    """Logits of kept tokens as before, every weight but the rows bit-equal, configured ids naming the same tokens."""
    pairs = new_ids(before, after)
    embeds, full = logits(before)
    _, cut = logits(after, embeds)
    old, new = map(list, zip(*pairs))
    assert cut.shape[-1] == len(pairs) < full.shape[-1]
    torch.testing.assert_close(cut[..., new], full[..., old], rtol=1e-5, atol=1e-5)
    ours, theirs = load_model(after, "float32", CPU), load_model(before, "float32", CPU)
    mine = ours.state_dict()
    for name, weight in theirs.state_dict().items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(mine[name][new], weight[old])
        else:
            assert torch.equal(mine[name], weight)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (before, after)]
    for key in ("eos_token_id", "pad_token_id"):
        tokens = [
            tokenizer.decode(getattr(model.generation_config, key))
            for tokenizer, model in zip(tokenizers, (theirs, ours))
        ]
        assert tokens[0] == tokens[1]
        assert getattr(tokenizers[0], key.removesuffix("_id")) == getattr(tokenizers[1], key.removesuffix("_id"))
    assert ours.config.audio_token_id == tokenizers[1].convert_tokens_to_ids("<|AUDIO|>")
    assert ours.config.text_config.pad_token_id == tokenizers[1].pad_token_id
    assert ours.config.text_config.vocab_size == len(pairs)


@pytest.mark.parametrize(("tied", "dtype"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
def test_small_models(make_model, processor, tmp_path, tied, dtype):
    save_model(make_model(layers=2, tied=tied), processor, tmp_path / "full", dtype)
    info = trim(tmp_path / "full", tmp_path / "cut", held_out={"chinese": TEXTS[4:], "german": TEXTS[:4]})
    check_same_model(tmp_path / "full", tmp_path / "cut")
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {getattr(torch, dtype)}
    width = 64
    gone = (info["rows"]["before"] - info["rows"]["after"]) * width * (1 if tied else 2)
    assert info["parameters_removed"] == gone
    if not tied:  # some writers store a tied head as well
        assert info["bytes_removed"] == gone * (4 if dtype == "float32" else 2)
    assert info["rows"]["after"] % 32 == 0
    assert info["coverage"]["chinese"]["share_sentences_unchanged"] == 0
    assert info["coverage"]["chinese"]["extra_tokens"] > 0
    assert info["coverage"]["german"]["sentences"] == 4
    assert info["coverage"]["german"]["sentences_unchanged"] >= 3
    assert read_lineage(tmp_path / "cut").stages == ["trim-vocab"]


def test_shards_and_what_is_beside_the_weights(make_model, processor, tmp_path):
    full, cut = tmp_path / "full", tmp_path / "cut"
    model = make_model(layers=2)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]
    model.generation_config.suppress_tokens = [processor.tokenizer.convert_tokens_to_ids("<|audio_bos|>")]
    processor.save_pretrained(full)
    model.save_pretrained(full, max_shard_size="100KB")
    (full / "vocab.json").write_text("{}")
    config = json.loads((full / "config.json").read_text())
    del config["tie_word_embeddings"]  # not every config.json has it
    (full / "config.json").write_text(json.dumps(config))
    trim(full, cut)
    files = {path.name for path in full.glob("*.safetensors")}
    assert len(files) > 3
    assert {path.name for path in cut.glob("*.safetensors")} == files
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    tensors = [tensor for path in cut.glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert not (cut / "vocab.json").exists()
    reloaded, tokenizer = load_model(cut, "float32", CPU), AutoProcessor.from_pretrained(cut).tokenizer
    assert tokenizer.convert_ids_to_tokens(reloaded.generation_config.eos_token_id) == ["<|im_end|>", "<|endoftext|>"]
    assert reloaded.generation_config.suppress_tokens is None  # decoding here knows no such thing, so none ships
    assert AutoProcessor.from_pretrained(cut).chat_template == processor.chat_template


def test_max_tokens_is_the_number_of_rows(model_dir, tmp_path):
    info = trim(
        model_dir, tmp_path / "cut", texts=TEXTS[:1], settings=VocabSettings(max_tokens=416, pad_to_multiple=32)
    )
    assert info["rows"]["after"] == 416
    assert load_model(tmp_path / "cut", "float32", CPU).lm_head.weight.shape[0] == 416
    check_same_model(model_dir, tmp_path / "cut")


def test_a_text_that_spells_a_special_token_is_counted_as_it_is_learned(model_dir, processor, tmp_path):
    """As text, of which every piece is kept, not as the special token, which is kept anyway."""
    texts = ["Nach <|im_end|> kommt <|AUDIO|>."]
    info = trim(
        model_dir, tmp_path / "cut", texts=texts, held_out={"same": texts}, settings=VocabSettings(pad_to_multiple=1)
    )
    learned = Prompter(processor, GERMAN).answer_ids(texts[0])[:-1]
    assert info["counted"]["tokens"] == info["coverage"]["same"]["tokens"] == len(learned)
    assert info["tokens"]["counted"] == len({*learned})
    assert not {*learned} & {*processor.tokenizer.all_special_ids}


def test_what_is_checked_is_drawn_from_all_that_is_counted(processor, monkeypatch):
    monkeypatch.setattr(rewrite, "NUM_CHECKED", 100)
    texts = [text for number in range(500) for text in (f"Satz {number}.", f"第{number}句")] + [
        f"Datei {n}" for n in range(1000)
    ]
    counts, sample = count_tokens(processor, iter(texts))
    found = Counter("Satz" if "Satz" in text else "Datei" if "Datei" in text else "zh" for text in sample)
    assert len(set(sample)) == 100
    assert found["Datei"] > 30
    assert min(found["Satz"], found["zh"]) > 10
    assert count_tokens(processor, iter(texts)) == (counts, sample)
    assert count_tokens(processor, TEXTS)[1] == TEXTS


def test_padding_rows_of_the_embedding_go(make_model, processor, tmp_path):
    model = make_model(layers=2)
    model.resize_token_embeddings(len(processor.tokenizer) + 40, mean_resizing=False)
    save_model(model, processor, tmp_path / "full", "float32")
    info = trim(tmp_path / "full", tmp_path / "cut", texts=TEXTS, settings=VocabSettings(pad_to_multiple=1))
    assert info["rows"] == {
        "before": len(processor.tokenizer) + 40,
        "after": len(new_ids(tmp_path / "full", tmp_path / "cut")),
    }


def test_twice_is_as_once(model_dir, tmp_path):
    trim(model_dir, tmp_path / "a", texts=TEXTS)
    trim(tmp_path / "a", tmp_path / "b", texts=TEXTS[:1])
    trim(model_dir, tmp_path / "c", texts=TEXTS[:1])
    b, c = (load_file(tmp_path / name / "model.safetensors") for name in "bc")
    assert b.keys() == c.keys()
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert read_lineage(tmp_path / "b").stages == ["trim-vocab", "trim-vocab"]


def test_a_finished_4bit_model(model_dir, processor, tmp_path):
    settings = QuantizeSettings(scheme="nf4", compute_dtype="float32")
    save_model(load_model(model_dir, "float32", CPU, bitsandbytes_config(settings)), processor, tmp_path / "full")
    trim(tmp_path / "full", tmp_path / "cut")
    check_same_model(tmp_path / "full", tmp_path / "cut")
    check_quantized(load_model(tmp_path / "cut", "float32", CPU), settings)


def test_a_4bit_head_is_refused(model_dir, processor, tmp_path):
    settings = QuantizeSettings(scheme="nf4", parts=["decoder", "lm_head"])
    save_model(load_model(model_dir, "float32", CPU, bitsandbytes_config(settings)), processor, tmp_path / "full")
    with pytest.raises(VocabError, match=r"lm_head.weight in .* is quantised, .* Trim before quantising"):
        trim(tmp_path / "full", tmp_path / "cut")


def test_wrong_folders_are_explained(make_model, processor, model_dir, tmp_path):
    model = make_model(layers=2)
    model.resize_token_embeddings(100)
    model.config.audio_token_index = model.generation_config.eos_token_id = model.config.text_config.pad_token_id = 0
    save_model(model, processor, tmp_path / "small", "float32")
    with pytest.raises(ModelError, match="the model has 100 rows"):
        trim(tmp_path / "small", tmp_path / "cut")
    with pytest.raises(VocabError, match="must hold an embedding and an output head of the same shape"):
        find_rows(tmp_path, tied=False)
    with pytest.raises(VocabError, match="no text to count"):
        trim(model_dir, tmp_path / "cut", texts=[])
    with pytest.raises(VocabError, match=r"alone are .* too few"):
        trim(model_dir, tmp_path / "cut", settings=VocabSettings(max_tokens=64))


# ---- texts and recipe


def test_what_is_counted_and_what_is_held_out(manifests, tmp_path):
    (tmp_path / "more.txt").write_text("Noch ein Satz.\n\n  Und einer. \n", encoding="utf-8")
    recipe = load_recipe("mini", [*manifests, "task.target_languages=[de]"])
    steps = {step.name: step for step in plan(recipe, tmp_path / "run")}
    steps["data"].run()
    splits = load_splits(tmp_path / "run" / "data")
    settings = VocabSettings(texts=[str(tmp_path / "more.txt")])
    texts, held_out = counted_texts(splits, ["de"], settings)
    found = list(texts)
    assert found[:24] == [clip.references["de"] for clip in splits.train.clips]
    assert found[24:] == ["Noch ein Satz.", "Und einer."]
    assert list(held_out) == ["select"]
    assert list(held_out["select"]) == [clip.references["de"] for clip in splits.select.clips]
    alone, nothing = counted_texts(None, ["de"], settings)
    assert (list(alone), nothing) == (["Noch ein Satz.", "Und einer."], {})


def test_unreadable_text_is_explained(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("größer".encode("latin-1"))
    for name in ("latin1.txt", "none.txt"):
        with pytest.raises(DataError, match=rf"{name} cannot be read .* UTF-8 files, one sentence a line"):
            list(read_lines(tmp_path / name))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vocab={references: false}", "nothing to count tokens on"),
        ("vocab={max_tokens: 1000}", "must be a multiple of pad_to_multiple 64"),
        ("vocab={when: after}", "rows of a 4-bit head cannot be taken out"),
        ("vocab={when: never}", "vocab.when"),
    ],
)
def test_impossible_settings(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("mini", [override, "quantize.parts=[decoder, lm_head]"])


def test_place_in_the_plan(tmp_path):
    def inputs(*overrides):
        steps = plan(load_recipe("mini", overrides), tmp_path)
        made = {step.folder: step.name for step in steps}
        return {
            step.name: {role: made.get(ref.path, "base") for role, ref in step.inputs.items() if role != "texts"}
            for step in steps
        }

    assert "trimmed" not in inputs()
    before = inputs("vocab={}")
    assert before["trimmed"] == {"model": "base", "data": "data"}
    assert before["teacher"]["model"] == "trimmed"
    assert before["evaluate base"]["model"] == "base"
    assert before["exported"]["model"] == "quantized"
    assert inputs("vocab={}", "quantize.start=base")["quantized"]["model"] == "trimmed"
    after = inputs("vocab={when: after, references: false, texts: [de.txt]}")
    assert after["trimmed"] == {"model": "quantized"}
    assert after["teacher"]["model"] == "base"
    assert after["exported"] == {"model": "trimmed", "evaluation": "evaluate trimmed"}


# ---- the built-in model


@pytest.fixture(scope="module")
def mini_de(tmp_path_factory) -> tuple[Path, list[str], dict]:
    """The built-in model cut for German, the counted texts, the record."""
    folder = resolve_base("builtin:mini")
    clips = [clip for split in ("train", "everyday") for clip in builtin(split)[:300]]
    texts = [clip.references["de"] for clip in clips]
    out = tmp_path_factory.mktemp("mini-de")
    held_out = {"test": [clip.references["de"] for clip in builtin("test")]}
    return out, texts, trim(folder, out, texts, VocabSettings(), held_out)


def builtin(split: str):
    return read_source(BuiltinSource(kind="builtin", split=split), ["de", "zh"], Path("unused"))


def test_mini_in_german_alone(mini_de):
    out, texts, info = mini_de
    assert info["rows"]["before"] == 2048
    assert info["rows"]["after"] < 1000
    assert info["coverage"]["test"]["share_tokens_kept"] > 0.98
    check_same_model(resolve_base("builtin:mini"), out)
    tokenizer = load_processor(out).tokenizer
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_translations_of_kept_tokens_are_identical(mini_de):
    out, _, _ = mini_de
    folder = resolve_base("builtin:mini")
    clips = [*builtin("everyday")[:8], *builtin("test")[:8]]
    decode = DecodeSettings(batch_size=16, max_new_tokens=48)
    full, cut = load_processor(folder), load_processor(out)
    said = [
        translate_clips(load_model(path, "float32", CPU), processor, GERMAN, clips, decode)
        for path, processor in ((folder, full), (out, cut))
    ]
    kept = {old for old, _ in new_ids(folder, out)}
    same = 0
    for before, after in zip(*said):
        if set(Prompter(full, GERMAN).answer_ids(before.hypothesis)) <= kept:
            assert (after.hypothesis, after.num_tokens) == (before.hypothesis, before.num_tokens)
            same += 1
    assert 8 <= same < 16  # what the base model says in domain takes tokens that were not counted, too


def test_in_a_run_and_by_its_verb(manifests, tmp_path):
    """Nothing but trimming, at the end of a run; then the same on the shipped folder, from text alone."""
    nothing = [f"{section}=null" for section in ("finetune", "rank", "distill", "recover", "quantize")]
    overrides = [*manifests, *nothing, "task.target_languages=[de]", "evaluate.bootstrap_samples=100"]
    report = compress(load_recipe("mini", [*overrides, "vocab={when: after}"]), tmp_path / "run")
    assert [model["name"] for model in report["models"]] == ["base", "trimmed"]
    assert report["models"][1]["params"] < report["models"][0]["params"]
    exported = tmp_path / "run" / "exported"
    lineage = read_lineage(exported)
    assert lineage.stages == ["trim-vocab"]
    assert lineage.seen_digests["train"]["count"] == 24
    assert "trim-vocab" in (exported / "README.md").read_text(encoding="utf-8")
    text = tmp_path / "de.txt"
    text.write_text("Das Modell ist gut.\n", encoding="utf-8")
    command = ["trim-vocab", "mini", "--run-dir", str(tmp_path / "none"), "--model", str(exported), "--text", str(text)]
    options = [
        "--set",
        "vocab.references=false",
        "--set",
        "task.target_languages=[de]",
        "--out",
        str(tmp_path / "small"),
    ]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "none").exists()
    info = read_artifact(tmp_path / "small").info
    assert info["rows"]["after"] < info["rows"]["before"] == len(AutoTokenizer.from_pretrained(exported))
