from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from typer.testing import CliRunner

from trimlingual import preflight, resources
from trimlingual.app.translate import translate_files
from trimlingual.cli import app
from trimlingual.data.splits import load_splits
from trimlingual.estimate import Estimate, disk_peak, estimate, frozen_towers
from trimlingual.models.errors import ModelError
from trimlingual.models.folders import folder_problems
from trimlingual.models.inputs import TrainingData
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.pipeline import compress, plan, run_stage
from trimlingual.preflight import PreflightError, check
from trimlingual.recipe import load_recipe
from trimlingual.resources import memory_notes
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.stages.finetune import finetune
from trimlingual.stages.prune import prune
from trimlingual.stages.quantize import quantize
from trimlingual.step_inputs import model_ref
from trimlingual.training.stored_audio import stored_states

MINI = resolve_base("builtin:mini")
CUDA_WIDE = "cuda:99"  # no machine has it


def problems(tmp_path, *overrides, recipe="mini", stages=None):
    loaded = load_recipe(recipe, overrides)
    steps = [step for step in plan(loaded, tmp_path) if stages is None or step.name in stages]
    return check(loaded, tmp_path, steps).problems


@pytest.fixture
def manifest(tmp_path):
    """Path of a manifest with two good clips, and a function that writes it with other rows."""
    sf.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    path = tmp_path / "own.jsonl"

    def write(*rows):
        defaults = {"audio": "a.wav", "references": {"de": "Gut.", "zh": "好。"}, "source": "Good."}
        lines = [json.dumps({**defaults, "id": str(i), **row}) for i, row in enumerate(rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    write({}, {})
    return write


def test_the_shipped_recipe_for_everyone_has_no_problem(tmp_path):
    assert problems(tmp_path) == []


def test_all_problems_are_in_one_list_before_anything_runs(tmp_path):
    loaded = load_recipe(
        "mini",
        ["data.train={kind: manifest, path: nowhere.jsonl}", f"model.device={CUDA_WIDE}", "finetune.report_to=[nosuch]",
         "finetune.optimizer=adam_w", "rank.num_layers_to_remove=99", "vocab.texts=[gone.txt]", "quantize.train.deepspeed=gone.json"],
    )  # fmt: skip
    with pytest.raises(PreflightError) as caught:
        compress(loaded, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("nothing was run, because\n  ")
    for part in (
        "data.train: nowhere.jsonl does not exist", f"model.device is {CUDA_WIDE}", "finetune.report_to: 'nosuch' is unknown",
        "finetune.optimizer: 'adam_w' is unknown", "rank.num_layers_to_remove is 99", "vocab: gone.txt does not exist",
        "quantize.train.deepspeed: gone.json does not exist",
    ):  # fmt: skip
        assert part in message, part
    assert not (tmp_path / "run").exists()


def test_a_single_verb_is_asked_only_for_what_it_needs(tmp_path):
    wrong = ["finetune.report_to=[nosuch]", "quantize.train.optimizer=nosuch"]
    assert problems(tmp_path, *wrong, stages=["data", "rank"]) == []
    assert [p.split(":")[0] for p in problems(tmp_path, *wrong, stages=["data", "teacher"])] == ["finetune.report_to"]
    with pytest.raises(PreflightError, match=r"finetune\.report_to"):
        run_stage(load_recipe("mini", wrong), tmp_path / "run", "teacher")
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.skipif(resources.find_spec("MeCab") is not None, reason="the tokenizer is installed")
def test_a_missing_tokenizer_is_found_first(tmp_path, manifest):
    path = manifest({"references": {"ja": "はい。"}}, {"references": {"ja": "いいえ。"}})
    sources = [f"data.{role}={{kind: manifest, path: {path}}}" for role in ("train", "select", "test")]
    japanese = [*sources, "task.target_languages=[ja]", "rank.metric=chrf"]
    found = problems(tmp_path, *japanese)
    assert len(found) == 1
    assert "pip install 'sacrebleu[ja]'" in found[0]
    assert problems(tmp_path, *japanese, stages=["data", "rank"]) == []
    assert len(problems(tmp_path, *japanese, "rank.metric=bleu", stages=["data", "rank"])) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ({"references": {"de": "Gut."}}, {"references": {"de": "Ja."}}),
            "has no reference in 'zh' in any of its 2 clips",
        ),
        (({}, {"references": {"de": "Gut."}}), "line 2: reference for 'zh' is missing"),
        (({"audio": "b.wav"}, {}), "line 1: "),
        ((), "holds no clips"),
    ],
)
def test_local_listings_are_read(tmp_path, manifest, rows, said):
    path = manifest(*rows)
    (found,) = problems(tmp_path, f"data.test={{kind: manifest, path: {path}}}")
    assert found.startswith("data.test: ")
    assert said in found


def test_columns_are_checked_before_a_download(tmp_path):
    found = problems(tmp_path, "data.out_of_domain=null", "quantize.train.data.out_of_domain=0", "task.target_languages=[fr]",
                     "model.base=builtin:mini", recipe="qwen2-audio-en-de")  # fmt: skip
    assert any("`references` names no column for fr" in problem for problem in found)
    saved = tmp_path / "set"
    saved.mkdir()
    (saved / "dataset_info.json").write_text(json.dumps({"features": {"audio": {}, "text_de": {}}}), encoding="utf-8")
    source = f"data.test={{kind: hub, path: {saved}, splits: [test], references: {{de: text_de, zh: text_zh}}}}"
    (found,) = problems(tmp_path, source)
    assert "has no column text_zh (it has audio, text_de)" in found


def test_comet_needs_its_environment_and_sources(tmp_path, manifest, monkeypatch):
    monkeypatch.delenv("TRIMLINGUAL_COMET_PYTHON", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = manifest({}, {"source": None})
    wanted = [f"data.test={{kind: manifest, path: {path}}}", "evaluate.comet=[Unbabel/wmt22-comet-da]"]
    found = problems(tmp_path, *wanted)
    assert any("COMET is not installed" in problem for problem in found)
    assert any("line 2: no source text" in problem for problem in found)
    assert problems(tmp_path, *wanted, stages=["data", "teacher"]) == []


def test_group_sizes_that_do_not_fit(tmp_path):
    found = problems(tmp_path, "quantize.group_size=128")
    assert any("quantize.group_size 128 does not divide widths" in problem for problem in found)
    assert problems(tmp_path, "quantize.group_size=64") == []


def test_flash_adamw_needs_a_gpu(tmp_path):
    (found,) = problems(tmp_path, "finetune.optimizer=flash_adamw", "model.device=cpu")
    assert found.startswith("finetune.optimizer: flash_adamw needs a CUDA GPU")


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "find_spec", lambda name: None)
    monkeypatch.setattr("trimlingual.run.extras.find_spec", lambda name: None)
    found = problems(tmp_path, "finetune.report_to=[wandb]", "finetune.optimizer=flash_adamw")
    for part in ("bitsandbytes is not installed", "pip install wandb", "trimlingual[flash]"):
        assert any(part in problem for problem in found), part


def test_disk_is_checked_against_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000_000))
    (found,) = problems(tmp_path)
    assert found.startswith(f"disk: {tmp_path} has ~100.0 MB free, but the run wants")
    assert problems(tmp_path, stages=["data", "rank"]) == []


def test_the_peak_counts_what_stands_and_what_stands_for_a_while():
    rows = {"a": Estimate(disk=10, while_running=30), "b": Estimate(disk=5, while_running=20), "c": Estimate(disk=1)}
    assert disk_peak(rows, ["a", "b", "c", "unknown"]) == 40
    assert disk_peak(rows, ["b", "a"]) == 45
    assert disk_peak(rows, []) == 0


@pytest.mark.parametrize(("padding", "num_clips"), [("mask", 40), ("window", 5)])
def test_what_a_frozen_tower_makes_of_the_clips_is_in_the_estimate(padding, num_clips, tmp_path):
    """Against what training writes: of the first built-in clips, told from their headers and, once prepared, from the data."""
    data, path = MINI.parent / "data", tmp_path / "own.jsonl"
    records = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").split("\n")[:num_clips]]
    path.write_text(
        "\n".join(json.dumps(record | {"audio": str(data / record["audio"])}) for record in records), encoding="utf-8"
    )
    settings = [f"data.train={{kind: manifest, path: {path}}}", f"model.audio_padding={padding}"]
    recipe, unfrozen = load_recipe("mini", settings), load_recipe("mini", [*settings, "finetune.freeze=[]"])
    data_step, teacher = plan(recipe, tmp_path / "run")[:2]

    def states(steps):
        with_states, without = (check(one, tmp_path / "run", steps).estimates["teacher"] for one in (recipe, unfrozen))
        assert with_states.while_running - without.while_running == pytest.approx(with_states.host)
        return with_states.host - without.host

    listed = states([data_step, teacher])
    data_step.run()
    clips = load_splits(tmp_path / "run" / "data").train.clips
    stored_states(load_model(MINI, "float32", torch.device("cpu")), load_processor(MINI, padding), clips, tmp_path)
    written = sum(file.stat().st_size for file in (tmp_path / "audio-states").iterdir())
    assert listed == pytest.approx(written, rel=0.03)
    assert states([teacher]) == pytest.approx(written, rel=0.03)


def test_a_tower_is_frozen_where_lora_leaves_it_out(tmp_path):
    """The mini recipe's adapters are on the decoder alone; on all linear layers the tower trains too."""

    def frozen(*settings):
        return set(frozen_towers(load_recipe("mini", settings)))

    assert frozen() == {"teacher", "recovered", "quantized"}
    assert frozen("quantize.train.lora.target_modules=all-linear", "recover.freeze=[]") == {"teacher"}
    assert frozen("quantize.train.lora.target_modules=[q_proj, fc1]") == {"teacher", "recovered"}
    assert frozen("quantize.train.lora.target_modules=[gate_proj]") == {"teacher", "recovered", "quantized"}


def test_speech_on_the_hub_is_said_not_to_be_counted(tmp_path):
    hub = "data.train={kind: hub, path: some/set, splits: [train], references: {de: de, zh: zh}}"
    recipe = load_recipe("mini", [hub])
    notes = check(recipe, tmp_path, plan(recipe, tmp_path)).notes
    assert (
        "not in the estimates: what the frozen audio tower makes of data.train, ~69.1 MB on disk and in host memory per hour of speech"
        in notes
    )


def test_memory_is_a_note(tmp_path, monkeypatch):
    loaded = load_recipe("mini", ["model.device=cpu"])
    steps = plan(loaded, tmp_path)
    monkeypatch.setattr(preflight, "estimate", lambda recipe, speech_s: {"teacher": Estimate(memory=1e15)})
    found = check(loaded, tmp_path, steps)
    assert found.problems == []
    assert any("stage teacher wants ~1000000.00 GB of memory" in note for note in found.notes)
    monkeypatch.setattr(preflight, "estimate", lambda recipe, speech_s: {"teacher": Estimate(memory=1e9, host=1e15)})
    assert any("stage teacher wants ~1000001.00 GB of memory" in note for note in check(loaded, tmp_path, steps).notes)
    monkeypatch.setattr(resources, "_device_kind", lambda recipe: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8e10))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert any(
        "stage teacher wants ~2000000.00 GB of host memory" in note for note in check(loaded, tmp_path, steps).notes
    )


@pytest.mark.parametrize(("machine", "said"), [(38e9, True), (40e9, False)])
def test_fsdp_without_the_host_memory_for_the_whole_model_is_said_before_it_runs(tmp_path, monkeypatch, machine, said):
    """At the true size the main process was measured at 38.6 GB (docs/distributed.md)."""
    monkeypatch.setattr(resources, "_device_kind", lambda recipe: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8e10))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=machine))
    fsdp = ["finetune.fsdp=true", "finetune.optimizer=adamw_torch_fused", "finetune.mixed_precision=bf16"]
    recipe = load_recipe("qwen2-audio-en-de", ["model.base=random:qwen2-audio-7b", *fsdp])
    (note,) = [*memory_notes(recipe, ["teacher"], estimate(recipe))] or [""]
    assert said == ("wants ~38.59 GB of host memory for the model that FSDP's main process reads whole" in note)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MINI, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_a_sound_folder_has_no_problem(folder):
    assert folder_problems(folder, "teacher") == []


@pytest.mark.parametrize(
    ("change", "stage", "said"),
    [
        (lambda f: edit(f / "config.json", model_type="whisper"), "rank", "holds a 'whisper' model; supported: qwen2_audio"),
        (lambda f: edit(f / "config.json", quantization_config={"quant_method": "bitsandbytes"}), "pruned", "is in 4 bits"),
        (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'), "rank", "LoRA adapter, not a model"),
        (lambda f: (f / "preprocessor_config.json").unlink(missing_ok=True) or (f / "processor_config.json").unlink(missing_ok=True),
         "rank", "copy the processor's files"),
        (lambda f: (f / "tokenizer.json").unlink(), "rank", "has no tokenizer.json"),
        (lambda f: [path.unlink() for path in f.glob("*.safetensors")], "rank", "holds no *.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}'), "rank",
         "lacks 1 of 1 weight files: model-00002.safetensors"),
        (lambda f: (f / "config.json").unlink(), "rank", "holds no config.json"),
    ],
)  # fmt: skip
def test_model_folders_that_cannot_work(folder, change, stage, said):
    change(folder)
    (found,) = folder_problems(folder, stage)
    assert said in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: edit(f / "config.json", model_type="whisper"), "holds a 'whisper' model; supported: qwen2_audio"),
        (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'), "LoRA adapter, not a model"),
        (lambda f: [path.unlink() for path in f.glob("*.safetensors")], "holds no *.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'), "lacks 1 of 1"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "processor_config.json").unlink(), "copy the processor's files"),
    ],
)  # fmt: skip
def test_the_message_is_the_same_whatever_the_way_in(folder, tmp_path, change, said):
    """A verb, `translate`, and the functions that load a model and a processor."""
    change(folder)

    def load():
        load_model(folder, "float32", torch.device("cpu"))
        load_processor(folder)

    messages = set()
    for way in (
        load,
        lambda: next(translate_files(folder, [tmp_path / "clip.wav"], ["de"])),
        lambda: run_stage(load_recipe("mini"), tmp_path / "run", "teacher", replaced={"model": folder}),
    ):
        with pytest.raises((ModelError, PreflightError), match=re.escape(said)) as caught:
            way()
        messages.add(str(caught.value))
    assert len(messages) == 1, messages


def test_a_4_bit_model_can_be_ranked_and_nothing_else(folder, tmp_path):
    """Which is said before the search, not after it."""
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    steps = {step.name: step for step in plan(load_recipe("mini"), tmp_path)}
    rank = replace(steps["rank"], inputs={**steps["rank"].inputs, "model": model_ref(folder)})
    found = check(load_recipe("mini"), tmp_path, [rank])
    assert found.problems == []
    (note,) = [note for note in found.notes if "4 bits" in note]
    assert "it cannot be pruned or trained" in note
    given, nothing = ModelFolder(folder, read_lineage(folder, "x")), TrainingData([], [])
    recipe, out = load_recipe("mini"), tmp_path / "out"
    for stage in (
        lambda: finetune(given, nothing, recipe.shared, recipe.finetune, out),
        lambda: prune(given, tmp_path / "plan.json", recipe.model, out),
        lambda: quantize(given, nothing, recipe.shared, recipe.quantize, out),
    ):
        with pytest.raises(ModelError, match=r"is in 4 bits .* give the model that it was made from"):
            stage()


def test_embedding_rows_against_the_tokenizer(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit(folder / "config.json", text_config={**config["text_config"], "vocab_size": 100})
    (found,) = folder_problems(folder, "teacher")
    assert "the model has 100 rows" in found


def test_a_model_given_to_a_verb_is_checked_before_the_data_is_read(folder, tmp_path):
    edit(folder / "config.json", model_type="whisper")
    with pytest.raises(PreflightError, match="holds a 'whisper' model"):
        run_stage(load_recipe("mini"), tmp_path / "run", "rank", replaced={"model": folder})
    assert not (tmp_path / "run").exists()


def test_a_dry_run_lists_the_problems_and_fails(tmp_path):
    command = [
        "compress",
        "mini",
        "--dry-run",
        "--run-dir",
        str(tmp_path / "run"),
        "--set",
        f"model.device={CUDA_WIDE}",
    ]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert str(done.exception) == "this run would not start: 1 problem(s)"
    assert f"problem: model.device is {CUDA_WIDE}" in done.output
    assert "while it runs" in done.output
    assert not (tmp_path / "run").exists()


def test_no_weights_are_fetched_for_the_data(tmp_path, monkeypatch):
    """The data stage needs the processor alone, and other weights leave it as it is."""
    import huggingface_hub

    fetched = []

    def snapshot_download(name, revision=None, allow_patterns=(), ignore_patterns=(), local_files_only=False):
        folder = tmp_path / "hub"
        if local_files_only and not folder.is_dir():
            raise OSError("not here")
        if not local_files_only:
            fetched.append(allow_patterns)
        shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    recipe = load_recipe("mini", ["model.base=someone/model"])
    (data,) = [step for step in plan(recipe, tmp_path / "run") if step.name == "data"]
    data.run()
    assert (tmp_path / "run" / "data" / "train.jsonl").is_file()
    assert len(fetched) == 1
    assert "*.safetensors" not in fetched[0]


def test_no_torch_without_need():
    code = "import sys, trimlingual.preflight, trimlingual.resources, trimlingual.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_place_that_cannot_be_written_to_is_said_before_anything_runs(tmp_path):
    """As a user whom permissions bind: root is bound by them without this capability."""
    bound = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    if bound and (not shutil.which("setpriv") or subprocess.run([*bound, "true"], capture_output=True).returncode):
        pytest.skip("root cannot give up its capabilities here")
    (tmp_path / "locked").mkdir(mode=0o555)
    words = [
        sys.executable,
        "-m",
        "trimlingual",
        "compress",
        "mini",
        "--dry-run",
        "--run-dir",
        tmp_path / "locked" / "run",
    ]
    done = subprocess.run([*bound, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count(f"problem: {tmp_path / 'locked'} cannot be written to") == 1, done.stderr
