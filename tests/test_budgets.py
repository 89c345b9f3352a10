"""Several budgets over shared work: what is shared is made once, the larger one's search is the smaller one's, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trimlingual
from trimlingual import report
from trimlingual.budgets import Budget, budgets_of, findings, pareto
from trimlingual.preflight import PreflightError
from trimlingual.recipe import RecipeError, load_recipe
from trimlingual.report.collect import ReportError
from trimlingual.report.figures import trades
from trimlingual.report.frontier import bits_text, budget_rows, layers_text, merge_budgets
from trimlingual.run.artifacts import ArtifactError, read_artifact
from trimlingual.run.lineage import read_lineage
from trimlingual.search.plan import read_plan

from .test_pipeline import SMALL, as_words

SIZES = ["5 MB", "4.8MB"]
STORED = [
    "quantize.start=pruned", "quantize.train=null", "quantize.scheme=int4", "quantize.group_size=64",
    "quantize.eight_bit=[embeddings, lm_head]",
]  # fmt: skip
SEARCH = "rank.budget={size: 1 GB, actions_per_round: 4, bits: {mlp: [3], lm_head: [4]}}"


@pytest.fixture(scope="module")
def overrides(manifests) -> list[str]:
    return [
        *SMALL, *manifests, *STORED, SEARCH, "finetune.max_steps=2", "distill=null", "recover=null", "decode.max_new_tokens=8",
        "evaluate.models=[teacher, quantized]", "rank.protect_first=5", "rank.protect_last=5", "export=null",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(overrides, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frontier") / "run"
    pareto(load_recipe("mini", overrides), SIZES, folder)
    return folder


def made(run_dir: Path) -> dict[str, str]:
    """When each artefact was made."""
    found = (path for path in run_dir.rglob("artifact.json") if path.parent.name not in ("frontier", "report"))
    return {str(path.relative_to(run_dir)): path.stat().st_mtime_ns for path in found if not path.parent.is_symlink()}


def test_what_no_budget_changes_is_made_once(run_dir):
    stages = {name.removesuffix("/artifact.json") for name in made(run_dir) if not name.startswith("budgets")}
    assert stages == {"data", "teacher", "evaluations/teacher"}
    for size in ("5MB", "4.8MB"):
        folder = run_dir / "budgets" / size
        for stage in stages:
            assert (folder / stage).is_symlink()
            assert (folder / stage).resolve() == (run_dir / stage).resolve()
        shipped = sum(p.stat().st_size for p in (folder / "quantized").iterdir() if p.name not in NOT_SHIPPED)
        assert shipped <= float(size.removesuffix("MB")) * 1e6
        assert report.collect(folder)["plan"]["num_bytes"] >= shipped
    first, second = (read_artifact(run_dir / "budgets" / size / "rank").info for size in ("4.8MB", "5MB"))
    assert first["num_shared"] == 0 < first["num_candidates"]
    assert second["num_shared"] == second["num_candidates"]


NOT_SHIPPED = ("artifact.json", "log.txt", "lineage.json")


def test_the_frontier_has_sizes_scores_and_plans(run_dir):
    facts = json.loads((run_dir / "frontier" / "frontier.json").read_text(encoding="utf-8"))
    assert [each["budget"] for each in facts["budgets"]] == ["5MB", "4.8MB"]
    assert [model["name"] for model in facts["models"]] == ["teacher"]
    for each in facts["budgets"]:
        folder = run_dir / "budgets" / each["budget"]
        plan = read_plan(folder / "rank")
        assert [gone["layer"] for gone in each["removals"]] == plan.layers_of("decoder")
        assert each["bits"] == {fewer.part: fewer.bits for fewer in plan.bits}
        assert sorted(read_lineage(folder / "quantized").removed("decoder")) == sorted(plan.layers_of("decoder"))
        for code, metric in (("de", "chrfpp"), ("zh", "chrf")):
            scores = each["languages"][code]
            low, high = scores["intervals"][metric]
            assert low <= scores[metric] <= high
            assert low < high
            assert scores["retained"]["baseline"] == "teacher"
    text = (run_dir / "frontier" / "frontier.md").read_text(encoding="utf-8")
    page = (run_dir / "frontier" / "frontier.html").read_text(encoding="utf-8")
    for each in facts["budgets"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {each['budget']} | "))
        assert f"| {each['disk_bytes'] / 1e6:.2f} |" in row
        assert f"| {bits_text(each['bits'])} |" in row
        assert bits_text(each["bits"]) in page
    assert "trimlingual frontier" in page
    ids = [f"plot-{kind}-{code}-title" for kind in ("frontier", "trade") for code in ("de", "zh")]
    assert sorted(ids, key=page.index) == ids


def test_the_chart_joins_the_models_that_no_smaller_one_equals(run_dir):
    reports = {size: report.collect(run_dir / "budgets" / size) for size in ("5MB", "4.8MB")}
    merged = merge_budgets(reports)
    small, large = sorted((m for m in merged["models"] if m.get("budget")), key=lambda model: model["disk_bytes"])
    for model, score, kept in ((small, 30.0, 0.9), (large, 35.0, 0.95)):
        model["languages"] = {"de": {**model["languages"]["de"], "chrfpp": score}}
        model["languages"]["de"]["retained"] = {"baseline": "teacher", "ratio": kept, "low": kept, "high": kept}
    (chart,) = (trade.chart for trade in trades(merged) if trade.chart.id == "plot-trade-de")
    assert [(series.name, len(series.dots), bool(series.path)) for series in chart.series] == [
        ("frontier", 2, True), ("colour 1", 1, False),
    ]  # fmt: skip
    large["languages"]["de"]["retained"]["ratio"] = 0.8
    (chart,) = (trade.chart for trade in trades(merged) if trade.chart.id == "plot-trade-de")
    assert [(series.name, len(series.dots)) for series in chart.series] == [
        ("frontier", 1),
        ("colour 1", 1),
        ("colour 2", 1),
    ]
    assert [row[0] for row in budget_rows(merged)[1]] == ["5MB", "4.8MB"]


def test_a_table_says_layers_and_bits_shortly():
    assert bits_text({"decoder.1.mlp": 3, "decoder.2.mlp": 3, "decoder.0.mlp": 2, "lm_head": 4}) == (
        "lm_head 4; mlp 3 (2 layers), 2 (1 layer)"
    )
    assert layers_text([{"tower": "decoder", "layer": 4}, {"tower": "encoder", "layer": 1}]) == "4, encoder 1"
    assert (bits_text({}), layers_text([])) == ("–", "–")


def test_it_goes_on_from_what_is_there(overrides, run_dir):
    before = made(run_dir)
    (run_dir / "budgets" / "5MB" / "evaluations" / "quantized").rename(run_dir.parent / "evaluation")
    facts = trimlingual.pareto(load_recipe("mini", overrides), SIZES, run_dir)
    after = made(run_dir)
    again = "budgets/5MB/evaluations/quantized/artifact.json"
    assert [name for name in before if before[name] != after[name]] == [again]
    assert [each["budget"] for each in facts["budgets"]] == ["5MB", "4.8MB"]


@pytest.mark.slow
@pytest.mark.parametrize("there", ["budgets/4.8MB/rank.partial/candidates.jsonl", "budgets/5MB/pruned.partial"])
def test_killed_it_goes_on_to_the_same_frontier(start, overrides, run_dir, tmp_path, there):
    folder = tmp_path / "run"
    sizes = [word for size in SIZES for word in ("--budget", size)]
    command = start(["pareto", "mini", "--run-dir", str(folder), *sizes, *as_words(*overrides)])
    command.until(lambda: (folder / there).exists())
    command.kill()
    before = made(folder)
    pareto(load_recipe("mini", overrides), SIZES, folder)
    assert {name: time for name, time in made(folder).items() if name in before} == before
    found, wanted = (json.loads((each / "frontier" / "frontier.json").read_text()) for each in (folder, run_dir))
    for one, other in zip(found["budgets"], wanted["budgets"], strict=True):
        assert {**one, "search": 0, "seconds_per_clip": 0} == {**other, "search": 0, "seconds_per_clip": 0}


def test_a_run_of_one_budget_is_a_run(start, overrides, run_dir):
    """Its folder is what `compress` would make: with the same recipe there is nothing to do."""
    words = ["compress", "mini", "--run-dir", str(run_dir / "budgets" / "5MB")]
    sized = [*overrides, "rank.budget.size=5.0 MB"]
    command = start([*words, *as_words(*sized)])
    assert command.wait(60) == 0
    assert command.stderr().count("already done") >= 6


def test_a_dry_run_shows_shared_stages_once_and_makes_nothing(start, overrides, run_dir):
    before = sorted(run_dir.rglob("*"))
    words = ["pareto", "mini", "--run-dir", str(run_dir), "--budget", "4.8MB", "--budget", "4.7MB", "--dry-run"]
    command = start([*words, *as_words(*overrides)])
    assert command.wait(60) == 0
    lines = [line for line in command.stdout().splitlines() if line.startswith("│")]
    status = {line.split("│")[1].strip(): line.split("│")[3].strip() for line in lines}
    assert [name for name in status if "teacher" in name] == ["teacher", "evaluate teacher"]
    assert status["teacher"] == status["4.8MB: rank"] == "done"
    assert status["4.7MB: rank"] == "missing"
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize(
    "place", ["budgets/4.7MB/rank", "budgets/4.7MB/teacher", "frontier-of-mine", "budgets/4.8MB/rank"]
)
def test_nothing_of_the_users_is_touched(overrides, run_dir, tmp_path, place):
    """What is the user's is said before anything runs, in a budget's folder where a link is to be, too."""
    if place == "frontier-of-mine":
        folder, mine = tmp_path, tmp_path / "frontier" / "notes.txt"
    else:
        folder, mine = run_dir, run_dir / place / "notes.txt"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    recipe = load_recipe("mini", [*overrides, "rank.num_layers_to_remove=1"])
    before = made(run_dir)
    with pytest.raises(ArtifactError, match=r"not made by this tool|files that it did not make"):
        pareto(recipe, ["4.8MB", "4.7MB"], folder, force=True)
    assert mine.read_text() == "mine"
    assert made(run_dir) == before
    mine.unlink()
    if place.startswith("budgets/4.7MB"):
        mine.parent.rmdir()


def test_other_settings_are_refused_for_all_budgets_before_any_runs(overrides, run_dir):
    recipe = load_recipe("mini", [*overrides, "quantize.group_size=32"])
    with pytest.raises(ArtifactError, match=r"it invalidates 5 stage\(s\):\n  rank: "):
        pareto(recipe, SIZES, run_dir)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (["5 MB"], [], "at least two sizes"),
        (["5 MB", "5000 kB"], [], "given twice"),
        (["5 MB", "4 MiB"], [], "rank.budget.size: size is '4 MiB'; it must be a number with kB, MB or GB"),
        (["5 MB", "4 MB"], ["evaluate.models=[teacher]"], "add quantized to evaluate.models"),
        (
            ["5 MB", "4 MB"],
            ["quantize.scheme=nf4", "quantize.eight_bit=[]", "rank.budget=null"],
            "needs quantize.scheme int4",
        ),
        (["5 MB", "4 MB"], ["rank=null", "quantize.start=teacher"], "needs a rank section"),
    ],
)
def test_what_is_no_frontier_is_refused(overrides, tmp_path, sizes, settings, message):
    with pytest.raises((ValueError, RecipeError), match=message):
        pareto(load_recipe("mini", [*overrides, *settings]), sizes, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_a_runtime_does_not_load_is_said_once(overrides, tmp_path):
    recipe = load_recipe("mini", [*overrides, "export={}", "rank.budget.bits={mlp: [3], embeddings: [4]}"])
    with pytest.raises(PreflightError, match=r"no embedding table of 4 bits"):
        pareto(recipe, SIZES, tmp_path)
    budgets: list[Budget] = budgets_of(recipe, SIZES, tmp_path)
    assert [budget.name for budget in budgets] == ["4.8MB", "5MB"]
    assert len(findings(budgets, tmp_path).problems) == 1


def test_a_run_without_its_last_model_is_no_point(run_dir):
    reports = {size: report.collect(run_dir / "budgets" / size) for size in ("5MB", "4.8MB")}
    reports["5MB"]["models"] = reports["5MB"]["models"][:1]
    with pytest.raises(ReportError, match="the run of 5MB has no evaluation of quantized"):
        merge_budgets(reports)
