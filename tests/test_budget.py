"""The search under a budget: its candidates are what they claim to be, it takes what loses least per byte, and its sizes hold."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from trimlingual.data.splits import Split
from trimlingual.decoding.translate_clips import translate_clips
from trimlingual.estimate import estimate
from trimlingual.evaluation.cost import bytes_beside_weights
from trimlingual.evaluation.quality import corpus_score
from trimlingual.models.layers import without_layers
from trimlingual.models.loading import load_model
from trimlingual.models.saving import save_model
from trimlingual.pipeline import compress
from trimlingual.preflight import PreflightError
from trimlingual.recipe import (
    BudgetSettings,
    DecodeSettings,
    ModelSettings,
    QuantizeSettings,
    RankSettings,
    RecipeError,
    SharedSettings,
    load_recipe,
)
from trimlingual.report.figures import removal_curve
from trimlingual.report.heat_map import heat_maps
from trimlingual.run.artifacts import read_artifact
from trimlingual.run.lineage import ModelFolder, read_lineage
from trimlingual.search.actions import GONE, Action, Smaller, bits_after
from trimlingual.search.budget import BudgetSearch
from trimlingual.search.plan import PlanError, read_plan
from trimlingual.search.rounded import RoundedModel
from trimlingual.stages.rank import JOURNAL_FILE, rank

from .test_pipeline import SMALL

CPU = torch.device("cpu")
METRICS = {"de": "chrfpp", "zh": "chrf"}
EVERY = {"attention": [3, 2], "mlp": [3, 2], "embeddings": [4, 2], "lm_head": [4]}
STORED = QuantizeSettings(scheme="int4", group_size=32, eight_bit=["embeddings", "lm_head"], train=None)
DECODE = DecodeSettings(batch_size=4, max_new_tokens=8)


@pytest.fixture
def folder(make_model, tmp_path, processor):
    model = make_model(layers=4, heads=2, kv_heads=1, width=64, seed=5)
    save_model(model, processor, tmp_path / "model", "bfloat16")
    return tmp_path / "model"


def shared(task):
    return SharedSettings(task, ModelSettings(base="tiny", dtype="float32", device="cpu"), DECODE)


def searched(folder, split, task, out, size, stored=STORED, others=(), **more):
    out.mkdir(parents=True, exist_ok=True)
    settings = RankSettings.model_validate(
        {
            "num_layers_to_remove": 2,
            "metric": METRICS,
            "protect_first": 0,
            "protect_last": 0,
            "budget": {"size": size, "bits": EVERY},
        }
        | more
    )
    rank(ModelFolder(folder, read_lineage(folder, "tiny")), split, shared(task), settings, None, out, stored, others)
    return read_plan(out)


def bytes_of(folder, stored=STORED, **rank_settings):
    model = load_model(folder, "float32", CPU)
    settings = RankSettings.model_validate({"budget": {"size": "1 MB", "bits": EVERY}, **rank_settings})
    layers = read_lineage(folder, "tiny").layers
    return Smaller(model, layers, settings, stored, "bfloat16", bytes_beside_weights(folder))


def test_the_best_action_per_byte_is_taken(folder, processor, split, task, tmp_path):
    """Every candidate of the first round scores as the rounded model does, translated plainly, and the least loss per byte wins."""
    split = Split("select", split.clips[:4])
    start = bytes_of(folder, num_layers_to_remove=2).num_bytes()
    out = tmp_path / "rank"
    budget = {"size": f"{start * 0.8 / 1e3:.1f} kB", "bits": EVERY, "shortlist": 1}
    plan = searched(folder, split, task, out, "", budget=budget)
    assert plan.num_bytes <= start * 0.8
    model = load_model(folder, "float32", CPU)
    layers = read_lineage(folder, "tiny").layers
    rounded = RoundedModel(model, layers, STORED, "bfloat16")

    def score(part, bits):
        def said():
            return translate_clips(model, processor, task, split.clips, DECODE)

        if bits == GONE:
            with without_layers(model, {"decoder": [int(part.split(".")[1])]}):
                translations = said()
        else:
            with rounded.tried(part, bits):
                translations = said()
        scores = []
        for language, metric in METRICS.items():
            mine = {t.id: t.hypothesis for t in translations if t.language == language}
            texts = [mine[c.id] for c in split.clips]
            references = [c.references[language] for c in split.clips]
            scores.append(corpus_score(metric, texts, references, language).value)
        return sum(scores) / len(scores)

    first = [c for c in plan.candidates if c["round"] == 1]
    assert {c["bits"] for c in first} == {0, 3, 4}
    assert {c["part"] for c in first} >= {"decoder.0", "decoder.3.mlp", "decoder.2.attention", "embeddings", "lm_head"}
    for candidate in first:
        assert candidate["score"] == pytest.approx(score(candidate["part"], candidate["bits"]), abs=1e-6), candidate
    missing = start - start * 0.8
    assert [c["lost"] for c in first] == pytest.approx([plan.baseline_score - c["score"] for c in first])
    per_byte = {(c["part"], c["bits"]): max(0, c["lost"]) / min(c["saved_bytes"], missing) for c in first}
    taken = next((r.part, r.bits) for r in plan.bits if r.round == 1) if not _gone_in(plan, 1) else _gone_in(plan, 1)
    assert per_byte[taken] == min(per_byte.values())


def _gone_in(plan, number):
    return next(((f"{r.tower}.{r.layer}", GONE) for r in plan.removals if r.round == number), None)


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def test_several_actions_of_a_round_are_in_layers_of_their_own(folder, split, task, tmp_path):
    size = f"{(bytes_of(folder, num_layers_to_remove=1).num_bytes() - 14_000) / 1e3:.1f} kB"
    budget = {"size": size, "actions_per_round": 3, "bits": {"attention": [3, 2], "mlp": [3, 2]}}
    plan = searched(folder, split, task, tmp_path / "rank", size, budget=budget, protected=[0, 1, 2, 3])
    assert not plan.removals
    rounds = [[Action(b.part, b.bits).layer for b in plan.bits if b.round == n] for n in {b.round for b in plan.bits}]
    assert max(map(len, rounds)) > 1
    assert all(len(set(layers)) == len(layers) for layers in rounds)


def test_a_large_part_is_not_given_up_for_the_last_bytes(tmp_path):
    """Once the table has 4 bits, 20 bytes are missing: the head would save 100 and lose more than the MLP, which does as well."""
    budget = {"size": "1 kB", "actions_per_round": 3}
    settings = RankSettings.model_validate({"num_layers_to_remove": 1, "budget": budget})
    search = BudgetSearch(SimpleNamespace(settings=settings), None, tmp_path / JOURNAL_FILE)
    records = [
        {"part": "embeddings", "bits": 4, "lost": 0.0, "saved_bytes": 100},
        {"part": "lm_head", "bits": 4, "lost": 2.0, "saved_bytes": 100},
        {"part": "decoder.1.mlp", "bits": 3, "lost": 1.0, "saved_bytes": 30},
    ]
    chosen = search._choose(records, 120)
    assert [record["part"] for record in chosen] == ["embeddings", "decoder.1.mlp"]
    assert [record["part"] for record in search._choose(records, 170)] == ["embeddings", "lm_head"]


def test_what_the_budget_no_longer_needs_is_not_done(tmp_path):
    """A large part comes last and saves more than is missing: of what was chosen before it, what loses most is not done."""
    settings = RankSettings.model_validate(
        {"num_layers_to_remove": 1, "budget": {"size": "1 kB", "actions_per_round": 4}}
    )
    search = BudgetSearch(SimpleNamespace(settings=settings), None, tmp_path / JOURNAL_FILE)

    def chosen(missing, saved_bytes):
        parts = [("decoder.1.mlp", 0.0), ("decoder.2.mlp", 0.1), ("embeddings", 5.0)]
        records = [{"part": p, "bits": 3, "lost": lost, "saved_bytes": n} for (p, lost), n in zip(parts, saved_bytes)]
        return [record["part"] for record in search._choose(records, missing)]

    assert chosen(100, [40, 40, 500]) == ["embeddings"]
    assert chosen(100, [40, 40, 60]) == ["decoder.1.mlp", "embeddings"]
    assert chosen(100, [40, 40, 59]) == ["decoder.1.mlp", "decoder.2.mlp", "embeddings"]
    gains = [{"part": f"decoder.{n}.mlp", "bits": 8, "lost": -1.0, "saved_bytes": -30} for n in (1, 2)]
    assert search._choose(gains, -100) == gains  # what is left of the budget is spent


def test_a_budget_that_cannot_be_reached_is_refused_before_anything_is_scored(folder, split, task, tmp_path):
    with pytest.raises(ValueError, match="is the least that this recipe can reach"):
        searched(folder, split, task, tmp_path / "rank", "10 kB")
    assert not (tmp_path / "rank" / JOURNAL_FILE).exists()


def test_a_budget_out_of_reach_is_known_before_a_run_begins(manifests, tmp_path):
    stored = ["quantize.scheme=int4", "quantize.group_size=64", "quantize.eight_bit=[embeddings, lm_head]"]
    recipe = load_recipe("mini", [*manifests, *stored, "rank.budget={size: 2.5 MB}"])
    with pytest.raises(PreflightError, match=r"rank\.budget\.size is 2\.5 MB, but 3\.\d\d MB is the least"):
        compress(recipe, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_an_action_that_puts_the_budget_out_of_reach_is_none(make_model, processor, split, task, tmp_path):
    """One layer may go, and only without a decoder layer the budget holds: no layer of the encoder is tried."""
    save_model(make_model(layers=3, width=64, encoder_layers=3, seed=8), processor, tmp_path / "model", "bfloat16")
    rank_settings = {"num_layers_to_remove": 1, "towers": "both", "protect_first": 0, "protect_last": 0}
    smaller = bytes_of(tmp_path / "model", **rank_settings)
    size = smaller.num_bytes([Action("decoder.1", GONE)])
    assert smaller.num_bytes([Action("encoder.1", GONE)]) > size
    budget = {"size": f"{(size + 10) / 1e3:.2f} kB", "bits": {}}
    plan = searched(tmp_path / "model", split, task, tmp_path / "rank", "", budget=budget, **rank_settings)
    assert [removal.tower for removal in plan.removals] == ["decoder"]
    assert {candidate["part"] for candidate in plan.candidates} == {"decoder.0", "decoder.1", "decoder.2"}


def test_bytes_fall_with_every_action(folder):
    smaller = bytes_of(folder, num_layers_to_remove=1, protect_first=0, protect_last=0)
    actions, sizes = [], [smaller.num_bytes()]
    while possible := smaller.possible(actions):
        actions.append(possible[0])
        sizes.append(smaller.num_bytes(actions))
    assert all(a > b for a, b in pairwise(sizes))
    assert sizes[-1] == smaller.smallest()
    assert bits_after(actions)["embeddings"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank.budget={size: 3 GiB}", "quantize.scheme=int4"], "such as 3.3 GB"),
        (["quantize.scheme=nf4", "rank.budget={size: 5 MB}"], "needs quantize.scheme int4"),
        (["rank.budget={size: 5 MB, bits: {mlp: [5]}}", "quantize.scheme=int4"], "mlp 5 bits; allowed"),
        (
            ["rank.budget={size: 5 MB}", "quantize.scheme=int4", "rank.metric={de: loss, zh: chrf}"],
            "does not go with rank.metric",
        ),
        (["rank.budget={size: 5 MB}", "quantize.scheme=int4", "quantize.start=teacher"], "start pruned or recovered"),
    ],
)
def test_what_a_budget_needs_is_said(settings, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("mini", settings)


@pytest.mark.parametrize("size", ["3.3 GB", "3.3GB", " 3.30 GB "])
def test_a_size_has_one_spelling(size):
    budget = BudgetSettings(size=size)
    assert (budget.size, budget.num_bytes) == ("3.3 GB", 3_300_000_000)


def test_what_no_runtime_loads_is_refused_before_the_search(manifests, tmp_path):
    budget = "rank.budget={size: 5 MB, bits: {mlp: [3], embeddings: [4]}}"
    recipe = load_recipe("mini", [*manifests, budget, "quantize.scheme=int4", "quantize.group_size=64"])
    with pytest.raises(PreflightError, match=r"no embedding table of 4 bits; set rank\.budget\.bits"):
        compress(recipe, tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_dry_run_knows_the_size():
    stored = ["quantize.scheme=int4", "quantize.group_size=64"]
    plain, asked = (load_recipe("mini", [*stored, *more]) for more in ([], ["rank.budget={size: 4.2 MB}"]))
    assert estimate(plain)["exported"].disk > estimate(asked)["exported"].disk == 4_200_000
    assert estimate(asked)["pruned"].disk > estimate(plain)["pruned"].disk  # perhaps no layer goes


@pytest.mark.parametrize(
    ("part", "bits"), [("decoder.1.mlp", 5), ("decoder.01.mlp", 3), ("encoder.1.mlp", 3), ("rows", 4)]
)
def test_a_plan_edited_by_hand_is_read_strictly(tmp_path, part, bits):
    (tmp_path / "plan.json").write_text(json.dumps({"removals": [], "bits": [{"part": part, "bits": bits}]}))
    with pytest.raises(PlanError, match="is not a prune plan"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text('{"removals": [], "bits": [{"part": "decoder.10.attention", "bits": 3}]}')
    assert read_plan(tmp_path).bits[0].bits == 3


def test_an_empty_plan_is_none(tmp_path):
    (tmp_path / "plan.json").write_text('{"removals": []}')
    with pytest.raises(PlanError, match="removes no layer and gives no part other bits"):
        read_plan(tmp_path)


def test_the_stages_make_a_model_of_that_size(manifests, tmp_path):
    recipe = load_recipe(
        "mini",
        [
            *SMALL, *manifests, "finetune=null", "distill=null", "recover=null", "quantize.start=pruned", "quantize.train=null",
            "quantize.scheme=int4", "quantize.group_size=64", "quantize.eight_bit=[embeddings, lm_head]", "decode.max_new_tokens=8",
            "rank.budget={size: 4.9 MB, actions_per_round: 4}", "evaluate.models=[quantized]",
            "rank.protect_first=5", "rank.protect_last=5",
        ],
    )  # fmt: skip
    report = compress(recipe, tmp_path)
    plan = read_plan(tmp_path / "rank")
    assert plan.bits
    assert plan.num_bytes <= 4_900_000
    lineage = read_lineage(tmp_path / "quantized")
    assert len(lineage.layers["decoder"]) == 12 - len(plan.removals)
    planned = {b.part: b.bits for b in plan.bits}
    assert lineage.quantization["bits"] == planned
    shipped = [
        p for p in (tmp_path / "quantized").iterdir() if p.name not in ("artifact.json", "log.txt", "lineage.json")
    ]
    assert sum(p.stat().st_size for p in shipped) <= plan.num_bytes
    assert sum(p.stat().st_size for p in shipped) > 0.97 * plan.num_bytes
    assert read_artifact(tmp_path / "quantized").info[
        "num_3bit_modules" if 3 in planned.values() else "num_4bit_modules"
    ]
    assert removal_curve(report, "run").title == "Score against size"
    assert heat_maps(report)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"| {part} | {bits} |" in text for part, bits in planned.items())
    assert next(iter(planned)) in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("shortlist", [0.6, 1])
def test_what_is_left_of_the_budget_is_spent_on_what_gains_most_per_byte(folder, split, task, tmp_path, shortlist):
    smaller = bytes_of(folder, num_layers_to_remove=1)
    target = smaller.num_bytes([Action("decoder.1", GONE)]) + 12_000
    bits = {"attention": [8, 3], "mlp": [3], "lm_head": [4]}
    plans = {}
    for spend in (False, True):
        budget = {"size": f"{target / 1e3:.3f} kB", "bits": bits, "spend_rest": spend, "shortlist": shortlist}
        plans[spend] = searched(folder, split, task, tmp_path / f"{spend}", "", budget=budget, num_layers_to_remove=1)
    plain, spent = plans[False], plans[True]
    reached = len(plain.curve) - 1
    assert spent.curve[: reached + 1] == plain.curve
    assert spent.removals == plain.removals
    assert plain.num_bytes < spent.num_bytes <= target
    assert spent.num_bytes == spent.curve[-1]["num_bytes"]
    for number, (before, after) in enumerate(pairwise(spent.curve[reached:]), reached + 1):
        tried = [c for c in spent.candidates if c["round"] == number]
        assert all(before["num_bytes"] < before["num_bytes"] - c["saved_bytes"] <= target for c in tried)
        best = min((c for c in tried if c["score"] is not None), key=lambda c: c["lost"] / -c["saved_bytes"])
        assert best["lost"] < 0
        assert after["num_bytes"] - before["num_bytes"] == -best["saved_bytes"]
        assert after["score"] == best["score"] > before["score"]
    last = [c for c in spent.candidates if c["round"] == len(spent.curve)]
    assert all(c["score"] is None or c["lost"] >= 0 for c in last)
    state = {fewer.part: fewer.bits for fewer in spent.bits}
    assert all(number != STORED.bits_of(part) for part, number in state.items())
    actions = [*(Action(f"decoder.{gone.layer}", GONE) for gone in spent.removals), *map(Action._make, state.items())]
    assert smaller.num_bytes(actions) == spent.num_bytes


def test_more_bits_are_those_allowed_and_those_before(folder):
    smaller = bytes_of(folder)
    assert smaller.more_bits([]) == []
    lower = [Action("decoder.1.mlp", 3), Action("decoder.1.mlp", 2), Action("lm_head", 4), Action("decoder.2.mlp", 3)]
    assert set(smaller.more_bits(lower)) == {
        Action("decoder.1.mlp", 3),
        Action("decoder.2.mlp", 4),
        Action("lm_head", 8),
    }
    assert (
        smaller.more_bits([*lower, Action("decoder.1", GONE), Action("lm_head", 8), Action("decoder.2.mlp", 4)]) == []
    )


def test_those_are_translated_whose_loss_rises_least_per_byte(folder, split, task, tmp_path):
    smaller = bytes_of(folder, num_layers_to_remove=1)
    size = f"{smaller.num_bytes([Action(f'decoder.{layer}.mlp', 3) for layer in range(3)]) / 1e3:.3f} kB"
    budget = {"size": size, "bits": {"mlp": [3], "attention": [3]}, "shortlist": 0.25}
    plan = searched(folder, split, task, tmp_path / "rank", "", budget=budget, protected=[0, 1, 2, 3])
    assert plan.selection_mode == "budget, 25% translated"
    journal = [json.loads(line) for line in lines_of(tmp_path / "rank" / JOURNAL_FILE)]
    parents = [record["loss"] for record in journal if record["part"] is None and "loss" in record]
    for number, parent in enumerate(parents, 1):
        tried = [c for c in plan.candidates if c["round"] == number]
        rise = {
            c["part"]: max(0.0, sum(c["loss"][code] - parent[code] for code in parent)) / c["saved_bytes"]
            for c in tried
        }
        translated = [c["part"] for c in tried if c["score"] is not None]
        assert len(translated) == 2 == math.ceil(len(tried) / 4)
        if number == 1:  # later less may be missing than an action saves
            assert sorted(rise[part] for part in translated) == sorted(rise.values())[:2]
        assert all((c["lost"] is None) == (c["score"] is None) for c in tried)
    assert len(parents) > 1
