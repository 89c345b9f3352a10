"""A run folder as the pipeline writes it, with real sound, is shown whole, safely, and without what was not run."""

import base64
import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from trimlingual.report import ReportError, result_table, result_table_markdown, write_report

HOSTILE = "<script>alert('x')</script> & \"quoted\" | piped"
VOID = {"meta", "br", "img", "link", "hr", "input", "source"}
PROOF = {"versions": {"transformers": "5.23.0", "torch": "2.13.0"}, "dtype": "bfloat16", "compared": 16, "equal": 15}
SPLIT = {"name": "test", "hash": "0123abcd", "num_clips": 8}
MACHINE = {"system": "Linux", "cpu": "A CPU", "cores": 2, "versions": {"trimlingual": "0.1.0", "torch": "2.13.0"}}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(v, ensure_ascii=False) for v in value] if isinstance(value, list) else [json.dumps(value)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def scores(chrfpp: float, ratio: float | None, main: str = "chrfpp", truncated: int = 0) -> dict:
    retained = ratio and {
        "baseline": "teacher",
        "metric": main,
        "ratio": ratio,
        "low": ratio - 0.017,
        "high": ratio + 0.018,
        "confidence": 0.95,
    }
    return {
        "bleu": {"value": chrfpp / 2, "signature": "nrefs:1|tok:13a|version:2.6.0"},
        "chrf": {"value": chrfpp + 1, "signature": "nrefs:1|nw:0|version:2.6.0"},
        "chrfpp": {"value": chrfpp, "signature": "nrefs:1|nw:2|version:2.6.0"},
        "comet": {},
        "num_clips": 8,
        "num_truncated": truncated,
        "main_metric": main,
        "retained": retained,
    }


def result(name: str, layers: int, size: int, languages: dict, seconds: float) -> dict:
    return {
        "name": name,
        "params": 7_500_000 if layers == 20 else 5_100_000,
        "disk_bytes": size,
        "num_decoder_layers": layers,
        "removed_layers": [] if layers == 20 else [3, 7],
        "quantization": None,
        "split": SPLIT,
        "languages": languages,
        "speed": {
            "seconds_per_clip": seconds,
            "tokens_per_second": 400.0,
            "real_time_factor": 0.01,
            "audio_s": 8.0,
            "wall_s": 8 * seconds,
            "batch_size": 8,
        },
        "peak_memory_bytes": 10**8,
        "machine": MACHINE,
    }


def write_clips(folder: Path) -> list[dict]:
    """Eight tones, WAV and Ogg by turns, the first named by an absolute path; and their manifest."""
    (folder / "audio").mkdir(parents=True)
    clips = []
    for index in range(8):
        tone = 0.3 * np.sin(np.arange(4000) * 2 * np.pi * (220 + 40 * index) / 16000)
        name = f"audio/clip{index}.{'ogg' if index % 2 else 'wav'}"
        soundfile.write(folder / name, tone, 16000)
        clip = {"id": f"c{index}", "audio": name, "source": f"Sentence {index}", "duration_s": 0.25}
        clips.append({**clip, "references": {"de": f"Satz {index}", "zh": f"句子{index}"}})
    clips[0]["audio"] = str(folder / "audio" / "clip0.wav")
    write(folder / "test.jsonl", clips)
    return clips


def write_evaluations(folder: Path, clips: list[dict]) -> None:
    for name, layers, size, ratio, seconds in (
        ("base", 20, 30_000_000, None, 0.2),
        ("teacher", 20, 30_000_000, None, 0.2),
        ("pruned", 18, 26_000_000, 0.7, 0.15),
        ("recovered", 18, 26_000_000, 0.981, 0.15),
        ("quantized", 18, 9_500_000, 0.975, 0.18),
    ):
        german = scores(50 * (ratio or 1), ratio)
        chinese = scores(30 * (ratio or 1), ratio, main="chrf", truncated=1)
        record = result(name, layers, size, {"de": german, "zh": chinese}, seconds)
        write(folder / name / "result.json", record)
        for language in ("de", "zh"):
            said = []
            for clip in clips:
                text = HOSTILE if name == "pruned" else f"{name} {clip['id']}"
                record = {"id": clip["id"], "hypothesis": text, "reference": clip["references"][language]}
                record |= {"source": clip["source"], "duration_s": 0.25, "num_tokens": 5}
                said.append({**record, "truncated": clip["id"] == "c0"})
            write(folder / name / f"translations.{language}.jsonl", said)


def plan() -> dict:
    """Two rounds; layer 18 was stopped early in both."""
    candidates = [
        {"round": turn, "tower": "decoder", "layer": layer, "score": None if layer == 18 else 40.0 + layer - turn}
        for turn in (1, 2)
        for layer in range(1, 19)
        if (turn, layer) != (2, 7)
    ]
    removals = [
        {"round": 1, "tower": "decoder", "layer": 7, "score": 46.0},
        {"round": 2, "tower": "decoder", "layer": 3, "score": 41.0},
    ]
    metric = {"de": "chrfpp", "zh": "chrf"}
    found = {"strategy": "greedy", "metric": metric, "baseline_score": 50.0}
    return {**found, "removals": removals, "candidates": candidates}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of a 20-layer model on two languages, whole."""
    run = tmp_path / "run"
    recipe = {"name": "mini-de-zh", "description": "", "rank": {"num_layers_to_remove": 2}}
    recipe |= {"task": {"target_languages": ["de", "zh"]}, "model": {"base": "builtin:mini"}}
    write(run / "recipe.json", recipe)
    write_evaluations(run / "evaluations", write_clips(run / "data"))
    write(run / "rank" / "plan.json", plan())
    for stage in ("data", "teacher", "rank", "pruned", "distilled", "recovered", "quantized", "exported"):
        record = {"stage": stage, "seconds": 61.5, "settings": {}, "machine": MACHINE, "fingerprint": "f00"}
        write(run / stage / "artifact.json", {**record, "info": {"num_clips": 8, "loss": 0.123456}})
    return run


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_report_json_has_the_fields(run_dir, tmp_path):
    report = write_report(run_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert [model["name"] for model in report["models"]] == ["base", "teacher", "pruned", "recovered", "quantized"]
    last = report["models"][-1]
    assert (last["params"], last["disk_bytes"], last["num_decoder_layers"]) == (5_100_000, 9_500_000, 18)
    assert (last["seconds_per_clip"], last["tokens_per_second"], last["real_time_factor"]) == (0.18, 400.0, 0.01)
    german = last["languages"]["de"]
    assert german["chrfpp"] == pytest.approx(48.75)
    assert german["retained"]["ratio"] == 0.975
    assert german["signatures"]["chrfpp"] == "nrefs:1|nw:2|version:2.6.0"
    assert german["num_truncated"] == 0
    assert report["models"][0]["languages"]["de"]["retained"] is None
    assert [stage["stage"] for stage in report["stages"]][0::7] == ["data", "exported"]
    assert report["stages"][2]["seconds"] == 61.5
    assert report["plan"]["removals"][0]["layer"] == 7
    assert report["split"] == SPLIT
    assert report["machine"] == MACHINE
    assert report["rehearsal"] is False
    assert any("1 of 8 translations were cut off" in note for note in report["notes"])


def test_page_is_whole_and_loads_nothing(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img"}
        for name in ("src", "href", "data", "srcset", "poster", "action"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert set(svg["aria-labelledby"].split()) <= set(identifiers)
    assert "Rehearsal" not in page.text
    for expected in (
        "98.1 [96.4, 99.9]",
        "round 1, layer 7: 46, removed",
        "round 2, layer 7: removed in an earlier round",
        "round 1, layer 18: stopped early",
        "round 1, layer 0: not tried",
        "nrefs:1|nw:2|version:2.6.0",
        "1 min 02 s",
        "The whole model scores 50 on",
        "0123abcd",
        "torch 2.13.0",
    ):
        assert expected in page.text


def test_audio_is_the_files_bytes(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    sounds = [attributes["src"] for attributes in page.named("audio")]
    files = [run_dir / "data" / "audio" / f"clip{i}.{'ogg' if i % 2 else 'wav'}" for i in (0, 1, 2, 4, 5, 6)]
    assert len(sounds) == 6
    for sound, file in zip(sounds, files):
        kind, content = sound.removeprefix("data:").split(";base64,")
        assert kind == ("audio/ogg" if file.suffix == ".ogg" else "audio/wav")
        assert base64.b64decode(content, validate=True) == file.read_bytes()
    for text in ("Sentence 0", "Satz 0", "句子0", "base c0", "teacher c0", "quantized c6", "cut off"):
        assert text in page.text


def test_hostile_text_is_escaped(run_dir, tmp_path):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    write(run_dir / "recipe.json", {**recipe, "name": HOSTILE, "description": HOSTILE})
    write_report(run_dir, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert HOSTILE in Page(html).text
    assert "<script" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_markdown_table_reads_back(run_dir, tmp_path):
    report = write_report(run_dir, tmp_path / "out")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in result_table_markdown(report).splitlines()]
    assert lines[0] == [
        "model",
        "layers",
        "parameters",
        "disk (MB)",
        "de BLEU",
        "de chrF++",
        "de kept, % of teacher",
        "zh BLEU",
        "zh chrF",
        "zh kept, % of teacher",
        "s/clip",
    ]
    assert len(lines) == 7
    recovered = dict(zip(lines[0], lines[5]))
    assert recovered["parameters"] == "5.1 M"
    assert recovered["disk (MB)"] == "26.0"
    assert recovered["de kept, % of teacher"] == "98.1 [96.4, 99.9]"
    assert recovered["zh chrF"] == "30.43"
    assert dict(zip(lines[0], lines[2]))["de kept, % of teacher"] == "–"
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert result_table_markdown(report) in markdown
    assert "| 1 | decoder | 7 | 46 |" in markdown


def test_terminal_table_has_a_row_a_model(run_dir, tmp_path):
    report = write_report(run_dir, tmp_path / "out")
    console = Console(file=StringIO(), width=200)
    console.print(result_table(report))
    shown = console.file.getvalue()
    for text in ("mini-de-zh", "quantized", "97.5 [95.8, 99.3]", "9.5", "0.180"):
        assert text in shown


def test_comet_gets_a_column_and_its_model_is_named(run_dir, tmp_path):
    path = run_dir / "evaluations" / "teacher" / "result.json"
    teacher = json.loads(path.read_text())
    teacher["languages"]["de"]["comet"] = {"Unbabel/wmt22-comet-da": 0.8123}
    write(path, teacher)
    report = write_report(run_dir, tmp_path / "out")
    header, _, _, row, *_ = result_table_markdown(report).splitlines()
    assert "de COMET" in header
    assert "zh COMET" not in header
    assert "0.8123" in row
    assert "Unbabel/wmt22-comet-da" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("proof", "said"),
    [
        (PROOF, "plain transformers 5.23.0 with torch 2.13.0 loads the folder whole, and generate() in bfloat16 gives 15 of 16"),
        (PROOF | {"compared": 0, "equal": 0}, "nothing was recorded that its translations could be compared with"),
        ({"compared": 16, "equal": 16}, "plain transformers loads the folder whole, and generate() gives 16 of 16"),  # version 0.1
        (PROOF | {"runtime": "llama.cpp"}, "torch 2.13.0) loads what was written, and gives 15 of 16"),
        (None, ""),  # of a random model
    ],
)  # fmt: skip
def test_what_the_export_has_proven_is_shown(run_dir, tmp_path, proof, said):
    path = run_dir / "exported" / "artifact.json"
    write(path, json.loads(path.read_text()) | {"info": {"proof": proof}})
    write_report(run_dir, tmp_path / "out")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert said in text
        assert ("What ships" in text) == bool(said)


def test_what_ships_is_a_table(run_dir, tmp_path):
    outcomes = [
        {"runtime": "transformers", "format": "nf4", "disk_bytes": 7_900_000, "unproven": "",
         "proof": PROOF | {"seconds_per_clip": 0.1234, "peak_bytes": 612_000_000, "scores": {"de": 71.26, "zh": 66.0}}},
        {"runtime": "other", "format": "a|b", "disk_bytes": 5_000_000, "proof": None, "unproven": "it is not installed"},
    ]  # fmt: skip
    path = run_dir / "exported" / "artifact.json"
    write(path, json.loads(path.read_text()) | {"info": {"outcomes": outcomes}})
    write_report(run_dir, tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| transformers | nf4 | 7.9 | 15 of 16 | de 71.3, zh 66.0 | 0.123 | 612 |" in markdown
    assert r"| other | a\|b | 5.0 | – | – | – | – |" in markdown
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    for text in (markdown, page):
        assert "not checked with other: it is not installed" in text


def test_rehearsal_is_marked(run_dir, tmp_path):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    write(run_dir / "recipe.json", {**recipe, "model": {"base": "random:Qwen/Qwen2-Audio-7B-Instruct"}})
    report = write_report(run_dir, tmp_path / "out")
    assert report["rehearsal"] is True
    assert "Rehearsal" in Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert "Rehearsal" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    console = Console(file=StringIO(), width=200)
    console.print(result_table(report))
    assert "Rehearsal" in console.file.getvalue()


def test_what_was_not_run_is_left_out(run_dir, tmp_path):
    """Only the data, the base model and its evaluation: no search, no teacher; and one clip has lost its sound."""
    for path in sorted(run_dir.rglob("*"), reverse=True):
        kept = path.relative_to(run_dir).parts[0] in ("recipe.json", "data") or "base" in path.parts
        if not kept and path.is_file():
            path.unlink()
        elif not kept and path != run_dir / "evaluations":
            path.rmdir()
    (run_dir / "data" / "audio" / "clip1.ogg").unlink()
    report = write_report(run_dir, tmp_path / "out")
    assert [model["name"] for model in report["models"]] == ["base"]
    assert [stage["stage"] for stage in report["stages"]] == ["data"]
    assert report["plan"] is None
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.named("audio")) == 5
    assert "No sound: the audio file is not on this machine" in page.text
    assert "Which layers went" not in page.text
    (run_dir / "data" / "test.jsonl").unlink()
    write_report(run_dir, tmp_path / "out")
    assert "Listen and compare" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_no_evaluation_is_an_error(run_dir, tmp_path):
    (run_dir / "evaluations").rename(tmp_path / "elsewhere")
    with pytest.raises(ReportError, match=r"holds no evaluation of base.*run `trimlingual evaluate`"):
        write_report(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ReportError, match=r"recipe\.json is missing: it is not the folder of a run"):
        write_report(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "evaluation of pruned is not finished"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, not list"),
        (json.dumps({"name": "pruned"}), "lacks params, disk_bytes, split, languages, speed"),
    ],
)
def test_a_damaged_evaluation_is_an_error(run_dir, tmp_path, content, message):
    path = run_dir / "evaluations" / "pruned" / "result.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ReportError, match=message):
        write_report(run_dir, tmp_path / "out")


def test_models_of_different_splits_are_not_compared(run_dir, tmp_path):
    path = run_dir / "evaluations" / "pruned" / "result.json"
    write(path, {**json.loads(path.read_text()), "split": {**SPLIT, "hash": "other"}})
    with pytest.raises(ReportError, match="different test splits"):
        write_report(run_dir, tmp_path / "out")


def test_times_of_different_machines_carry_a_note(run_dir, tmp_path):
    path = run_dir / "evaluations" / "pruned" / "result.json"
    write(path, {**json.loads(path.read_text()), "machine": {**MACHINE, "gpu": ["A GPU"]}})
    report = write_report(run_dir, tmp_path / "out")
    assert any("not all measured on the same machine" in note for note in report["notes"])
