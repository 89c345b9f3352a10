"""A run folder as the pipeline writes it, with real sound, is shown whole, safely, and without what was not run.

test_report_page.py looks at the same page in a browser.
"""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from trimlingual import report as reports
from trimlingual.pipeline import write_comparison
from trimlingual.report import ReportError, result_table, result_table_markdown, sounds, write_report
from trimlingual.report.listening import marked
from trimlingual.report.plots import Point, Series, plot
from trimlingual.run.artifacts import ArtifactError

from .made_run import HOSTILE, MACHINE, PROOF, SPLIT, make_run, write

VOID = {"meta", "br", "img", "link", "hr", "input", "source"}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def test_facts_of_a_stage_in_units_that_people_read():
    info = {
        "steps": 12,
        "training_loss": 7.51053,
        "peak_memory_bytes": 76_859_715_584,
        "losses": [],
        "num_bytes": 5_512_345,
    }
    told = "steps 12, training loss 7.511, peak memory 76,860 MB, size 5.5 MB"
    assert reports._facts(info | {"disk_bytes": None}) == told


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
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img"}
        for name in ("src", "srcset", "poster", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        assert attributes.get("href", f"#{identifiers[0]}").removeprefix("#") in identifiers
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    assert page.named("script") == [{}]
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert svg.get("aria-label") or set(svg["aria-labelledby"].split()) <= set(identifiers)
    assert "Rehearsal" not in page.text
    for expected in (
        "98.1 [96.4, 99.9]",
        "round 1, layer 7: 46, removed",
        "round 2, layer 7: removed in an earlier round",
        "round 1, layer 18: stopped early",
        "round 1, layer 0: not tried",
        "2 removed: 42",
        "quantized: 9.5 MB, chrF++ 48.8, 97.5 [95.8, 99.3] % of teacher",
        "teacher: learning rate",
        "step 10: 0.0009",
        "quantized, decoder layers: 0.0 MB",
        "nrefs:1|nw:2|version:2.6.0",
        "1 min 02 s",
        "The whole model scores 50 on",
        "0123abcd",
        "torch 2.13.0",
        "trimlingual compress recipe.json --run-dir run",
    ):
        assert expected in page.text


def test_every_clip_can_be_listened_to(run_dir, tmp_path):
    """What is small already goes in as it is; the rest as MP3 of the same length."""
    write_report(run_dir, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    sounds = [attributes["src"] for attributes in page.named("audio")]
    assert len(sounds) == 8
    for index, sound in enumerate(sounds):
        kind, content = sound.removeprefix("data:").split(";base64,")
        content = base64.b64decode(content, validate=True)
        if index % 2:
            assert kind == "audio/ogg"
            assert content == (run_dir / "data" / "audio" / f"clip{index}.ogg").read_bytes()
        else:
            assert kind == "audio/mpeg"
            samples, rate = soundfile.read(BytesIO(content))
            spectrum = np.abs(np.fft.rfft(samples))
            assert np.argmax(spectrum) * rate / len(samples) == pytest.approx(220 + 40 * index, abs=8)
    for index in range(8):
        for text in (f"Sentence {index}", f"Satz {index}", f"句子{index}", f"base c{index}", f"teacher c{index}"):
            assert text in page.text
    assert "cut off" in page.text
    assert "8 sounds are inside this page." in page.text


def test_sound_beyond_the_limit_lies_beside_the_page(run_dir, tmp_path, monkeypatch):
    sizes = [len(base64.b64decode(sound.split(",")[1])) for sound in _sounds(run_dir, tmp_path / "whole")]
    monkeypatch.setattr(sounds.Sounds.__init__, "__defaults__", (sizes[0] + sizes[1],))
    found = _sounds(run_dir, tmp_path / "out")
    outside = [sound for sound in found if not sound.startswith("data:")]
    assert len(outside) == 6
    for sound in outside:
        assert soundfile.info(tmp_path / "out" / sound).duration == pytest.approx(0.25, abs=0.1)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the other 6 are in the folder" in page


def _sounds(run_dir: Path, out: Path) -> list[str]:
    write_report(run_dir, out)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    return [attributes["src"] for attributes in page.named("audio")]


@pytest.mark.parametrize(
    ("text", "other", "code", "expected"),
    [
        (
            "Ist das gut",
            "Ist es gut",
            "de",
            [("Ist", False), (" ", False), ("das", True), (" ", False), ("gut", False)],
        ),
        ("第一层", "第二层", "zh", [("第", False), ("一", True), ("层", False)]),
        ("gleich", "gleich", "de", [("gleich", False)]),
        ("", "etwas", "de", []),
        ("neu", "", "de", [("neu", True)]),
    ],
)
def test_words_that_differ_are_marked(text, other, code, expected):
    assert marked(text, other, code) == expected


def test_runs_are_compared(run_dir, tmp_path):
    """Two runs whose folders are called alike; the second has another student."""
    second = make_run(tmp_path / "other" / "run")
    path = second / "evaluations" / "quantized" / "translations.de.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write(path, [{**line, "hypothesis": "etwas anderes"} for line in lines])
    merged = write_comparison([run_dir, second], tmp_path / "both")
    one, other = f"{tmp_path.name}/run", "other/run"
    assert [model["name"] for model in merged["models"]][4:6] == [f"{one}: quantized", f"{other}: base"]
    page = Page((tmp_path / "both" / "comparison.html").read_text(encoding="utf-8"))
    assert len(page.named("audio")) == 8
    for text in (f"{one}: teacher", f"{other}: quantized", "etwas anderes", "trimlingual comparison"):
        assert text in page.text
    runs = json.loads((tmp_path / "both" / "comparison.json").read_text(encoding="utf-8"))["runs"]
    assert list(runs) == [one, other]
    write_comparison([run_dir, second], tmp_path / "both")  # again: what it made itself may be replaced
    with pytest.raises(ArtifactError, match="holds what stage 'teacher' made"):
        write_comparison([run_dir, second], run_dir / "teacher")
    with pytest.raises(ValueError, match="at least two different run folders"):
        write_comparison([run_dir, run_dir / "."], tmp_path / "one")
    result = second / "evaluations" / "base" / "result.json"
    for name in ("base", "teacher", "pruned", "recovered", "quantized"):
        result = second / "evaluations" / name / "result.json"
        write(result, {**json.loads(result.read_text()), "split": {**SPLIT, "hash": "other"}})
    with pytest.raises(ReportError, match=r"different test splits .*other/run on other"):
        write_comparison([run_dir, second], tmp_path / "apart")
    assert not (tmp_path / "apart").exists()


def test_published_systems_stand_beside_the_papers_recipe(run_dir, tmp_path):
    write_report(run_dir, tmp_path / "out")
    assert "8.65" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    recipe = json.loads((run_dir / "recipe.json").read_text())
    known = reports.figures.published()
    recipe |= {"model": {"base": known["base"]}, "data": {"train": {"path": known["data"]}}}
    write(run_dir / "recipe.json", recipe)
    write_report(run_dir, tmp_path / "out")
    text = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    for system in known["systems"]:
        assert text.count(f"{system['name']} ") >= 2  # in the key of both languages
    assert "9,640 MB" in text


@pytest.mark.parametrize(
    "values", [[2e-4, 0.0], [1e-3, 1e-5], [0.15, 0.06], [98.1, 102.5], [16.79, 5.4], [7.0], [0.0, 0.0], [-3.0, 2.0]]
)
def test_axes_span_their_points_and_label_every_tick_otherwise(values):
    points = [Point(float(number), value, "") for number, value in enumerate(values)]
    chart = plot("x", "x", "x", "y", [Series("x", points)])
    for place, ticks in (("x", chart.x_ticks), ("y", chart.y_ticks)):
        labels = [label for _, label in ticks]
        assert len(labels) == len(set(labels)) <= 9
        assert place == "x" or len(labels) >= 2
    (drawn,) = chart.series
    assert all(chart.left <= dot.x <= chart.right and chart.top <= dot.y <= chart.bottom for dot in drawn.dots)
    order = sorted(range(len(values)), key=lambda index: drawn.dots[index].y, reverse=True)
    assert [values[index] for index in order] == sorted(values)


def test_damaged_weights_are_an_error(run_dir, tmp_path):
    (run_dir / "quantized" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ReportError, match=r"quantized are damaged .*make quantized again"):
        write_report(run_dir, tmp_path / "out")


def test_hostile_text_is_escaped(run_dir, tmp_path):
    recipe = json.loads((run_dir / "recipe.json").read_text())
    write(run_dir / "recipe.json", {**recipe, "name": HOSTILE, "description": HOSTILE})
    write_report(run_dir, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.count("<script") == 1  # ours
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
    assert len(page.named("audio")) == 7
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
