from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from trimlingual import __version__
from trimlingual.cli import app
from trimlingual.data.rows import MINI_DATA

VERBS = [
    "compress",
    "pareto",
    "finetune",
    "rank",
    "prune",
    "distill",
    "quantize",
    "trim-vocab",
    "evaluate",
    "export",
    "report",
    "compare",
    "doctor",
    "translate",
    "serve",
    "ui",
    "push",
    "recipes",
]
run = CliRunner().invoke


def test_version_and_help_without_torch():
    code = (
        "import sys; sys.argv = ['trimlingual', '--version']; from trimlingual.cli import app;"
        "app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    done = run(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert f"Example: trimlingual {verb}" in done.stdout


def test_help_groups_the_verbs():
    shown = run(app, ["--help"], env={"COLUMNS": "120"}).stdout
    found = [line.split()[1] for line in shown.splitlines() if line.startswith(("╭─", "│ ")) and len(line.split()) > 2]
    compress, use, look = (shown.index(panel) for panel in ("Compress a model", "Use a model", "Look at what there is"))
    assert shown.index("distill") in range(compress, use)
    assert all(shown.index(f"│ {verb} ") in range(use, look) for verb in ("translate", "ui", "serve", "push"))
    assert shown.index("│ report ") > look
    assert set(VERBS) <= set(found)  # none is left out


def test_recipes_lists_all():
    shown = run(app, ["recipes"], env={"COLUMNS": "200"}).stdout
    for name in (
        "mini",
        "qwen2-audio-en-de",
        "qwen2-audio-en-zh",
        "qwen2-audio-en-de-qlora",
        "qwen2-audio-en-zh-qlora",
        "qwen2-audio-en-de-int4",
        "qwen2-audio-en-zh-int4",
        "voxtral-mini-en-de",
        "voxtral-small-en-de",
        "audio-flamingo-3-en-de",
        "audio-flamingo-3-en-zh",
    ):
        assert name in shown


def test_shell_completion_is_offered():
    assert "--install-completion" in run(app, ["--help"], env={"COLUMNS": "200"}).stdout


def test_a_missing_model_folder_is_explained(tmp_path, start):
    done = start(["rank", "mini", "--run-dir", str(tmp_path), "--model", str(tmp_path / "none")])
    assert done.wait() == 1
    assert "does not exist (given as the model of stage 'rank')" in done.stderr()
    assert "Traceback" not in done.stderr()


def test_translate_prints_one_json_line_a_file(tmp_path):
    from trimlingual.data.rows import MINI_DATA

    record = json.loads((MINI_DATA / "everyday.jsonl").read_text(encoding="utf-8").splitlines()[1])
    command = [
        sys.executable,
        "-m",
        "trimlingual",
        "translate",
        str(MINI_DATA.parent / "model"),
        str(MINI_DATA / record["audio"]),
    ]
    done = subprocess.run([*command, "--to", "zh"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"] == record["references"]["zh"]


def test_what_the_terminal_cannot_show_is_escaped_and_ends_nothing(tmp_path):
    """In an old locale, or a pipe on Windows."""
    clip = tmp_path / "grün 😀.ogg"
    shutil.copy(MINI_DATA / json.loads((MINI_DATA / "test.jsonl").read_text().split("\n")[0])["audio"], clip)
    words = [sys.executable, "-m", "trimlingual", "translate", "builtin:mini", str(clip), "--to", "zh"]
    plain = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, capture_output=True)
    ascii_only = subprocess.run(words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (plain.returncode, ascii_only.returncode) == (0, 0), plain.stderr + ascii_only.stderr
    shown, escaped = json.loads(plain.stdout), json.loads(ascii_only.stdout)
    assert shown == escaped
    assert shown["audio"] == str(clip)
    assert ascii_only.stdout.isascii()
    assert not shown["text"].isascii()


def test_streams_that_were_closed_are_not_missed():
    words = f"{shlex.quote(sys.executable)} -m trimlingual recipes"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        assert subprocess.run(["sh", "-c", f"{words} {closed}"], capture_output=True).returncode == 0, closed


def test_dry_run_of_a_hub_recipe_downloads_nothing(tmp_path):
    """Without network or data: the stages are shown, and what is missing."""
    done = run(app, ["compress", "qwen2-audio-en-de", "--dry-run", "--run-dir", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 1, done.output
    assert "problem: data.out_of_domain: data/covost_v2.en_de.tsv does not exist" in done.output
    for stage in ("data", "teacher", "rank", "pruned", "distilled", "recovered", "quantized", "exported"):
        assert stage in done.stdout
    assert "missing" in done.stdout


def test_estimates_at_the_true_size(monkeypatch):
    """Against the measured bytes of docs: 16.79 GB in bf16; 6.24 GB in nf4 with embeddings and head in bf16."""
    from transformers import Qwen2AudioConfig

    from trimlingual import estimate
    from trimlingual.estimate import gb
    from trimlingual.recipe import load_recipe

    text = {
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "vocab_size": 156032,
    }
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32}
    monkeypatch.setattr(estimate, "config_of", lambda recipe: Qwen2AudioConfig(text_config=text))
    rows = estimate.estimate(load_recipe("qwen2-audio-en-de-qlora"))
    # Weights and gradients of 2 bytes, a byte more of each weight, two states of 1 and their scales.
    assert (gb(rows["teacher"].disk), rows["teacher"].memory_text) == ("~16.79 GB", "~59.83 GB")
    assert gb(rows["teacher"].while_running / 2) == "~51.43 GB"
    # The same without what is more, but states of the token embedding of 4.
    bitsandbytes = load_recipe("qwen2-audio-en-de-qlora", ["finetune.optimizer=adamw_bnb_8bit"])
    assert estimate.estimate(bitsandbytes)["teacher"].memory_text == "~54.22 GB"
    # Weights, gradients and states in float32.
    divided = ["finetune.fsdp=true", "finetune.optimizer=adamw_torch_fused", "finetune.mixed_precision=bf16"]
    rows_divided = estimate.estimate(load_recipe("qwen2-audio-en-de-qlora", divided))
    # The main process was measured at 38.62 GB of host memory (fsdp_memory_7b.json).
    assert rows_divided["teacher"].memory_text == (
        "~134.35 GB over all GPUs + ~38.59 GB of host memory in the main process"
    )
    assert gb(rows_divided["teacher"].while_running / 2) == "~100.77 GB"
    assert gb(rows["exported"].disk) in ("~6.23 GB", "~6.24 GB", "~6.25 GB")
    # The adapter of the unpruned model, counted by PEFT, stays beside it.
    assert rows["quantized"].disk - rows["exported"].disk == pytest.approx(207_437_824 * 4)
    # q8_0 takes 34 bytes for 32 weights; audio tower and projector stay in f16.
    files = ["quantize=null", "export.for=[gguf]", "export.gguf.types=[q8_0]"]
    assert estimate.estimate(load_recipe("qwen2-audio-en-de-qlora", files))["exported gguf"].disk_text == "~9.52 GB"
    # q4_k_m takes about 5 bits a weight, and is made of an f16 file.
    files[-1] = "export.gguf.types=[q4_k_m]"
    assert estimate.estimate(load_recipe("qwen2-audio-en-de-qlora", files))["exported gguf"].disk_text == (
        "~6.14 GB + ~15.53 GB while it runs"
    )
    # Between two rounds of a search that trains stand two models, and two checkpoints of the one that is trained.
    each_round = ["rank.finetune_each_round={optimizer: flash_adamw}"]
    rows_trained = estimate.estimate(load_recipe("qwen2-audio-en-de", each_round))
    teacher = rows_trained["teacher"]
    assert rows_trained["rank"].disk == teacher.disk
    assert rows_trained["rank"].while_running == teacher.disk + teacher.while_running
    # Beside the checkpoints of the adapter stands the merged model, which bitsandbytes reads.
    without_training = ["quantize.train=null"]
    rows_merged = estimate.estimate(load_recipe("qwen2-audio-en-de-qlora", without_training))
    assert gb(rows_merged["quantized"].while_running) == "~16.79 GB"
    small = ["quantize.scheme=int4", "quantize.eight_bit=[embeddings, lm_head]"]
    rows = estimate.estimate(load_recipe("qwen2-audio-en-de", [*small, "vocab={max_tokens: 48000, when: before}"]))
    assert rows["exported"].disk_text == "~3.24 GB"  # 3,241,882,247 bytes in benchmarks/results/formats_7b.json
    assert gb(rows["teacher"].disk) == "~15.02 GB"
    afterwards = ["quantize=null", "vocab={max_tokens: 48000, when: after}"]
    rows = estimate.estimate(load_recipe("qwen2-audio-en-de", afterwards))
    assert (gb(rows["teacher"].disk), rows["exported"].disk_text) == ("~16.79 GB", "~11.79 GB")


@pytest.mark.parametrize(("stage", "section"), [("teacher", "finetune"), ("recovered", "recover")])
def test_tune_tries_rates_in_the_stage_that_trains(tmp_path, monkeypatch, stage, section):
    seen = []

    def stop(recipe, *_args, **_kwargs):
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("trimlingual.pipeline.run_stage", stop)
    CliRunner().invoke(app, ["finetune", "mini", "--stage", stage, "--tune", "--run-dir", str(tmp_path)])
    swept = {name: bool(getattr(seen[0], name).sweep) for name in ("finetune", "recover")}
    assert swept == {name: name == section for name in swept}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compress", "mini", "--tune", "--dry-run", "--set", "finetune=null"], "finetune is null: nothing trains"),
        (["finetune", "mini", "--tune", "--stage", "recovered", "--set", "recover=null"], "recover is null: nothing trains"),
        (["finetune", "mini", "--stage", "rank"], "'rank' is not one of 'teacher', 'recovered'"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_or_trained_is_refused(tmp_path, words, says):
    settings = ["distill=null", "recover.data.distilled=0", "quantize=null", "evaluate.models=[base]"]
    verb, recipe, *rest = words
    sets = [word for setting in settings for word in ("--set", setting)]
    done = run(app, [verb, recipe, "--run-dir", str(tmp_path / "run"), *sets, *rest])
    assert done.exit_code
    assert says in " ".join(f"{done.exception} {done.output}".replace("│", " ").split())
    assert not (tmp_path / "run").exists()
