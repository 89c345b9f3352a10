"""What ships: the finished model, written for a runtime, with a card that says what it is and what the runtime made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimlingual.evaluation.results import read_result
from trimlingual.exports.target import Finished, Outcome, target
from trimlingual.exports.vllm import dtype_of
from trimlingual.models.family import family_of_processor
from trimlingual.models.folders import check_folder
from trimlingual.models.loading import is_on_hub, load_processor
from trimlingual.recipe import Runtime
from trimlingual.report.tables import outcome_row, outcome_text
from trimlingual.run.artifacts import write_text
from trimlingual.run.progress import say
from trimlingual.run.version import version


def export(finished: Finished, runtime: Runtime, out_dir: Path) -> dict[str, Any]:
    """Write the finished model for a runtime to `out_dir`, with a model card, and have the runtime prove it.

    Raises ModelError or ExportError for what must not ship, or cannot.
    """
    check_folder(finished.model.path, "exported")
    outcomes = target(runtime).write(finished, out_dir)
    for outcome in outcomes:
        say(f"  {outcome.format}: {outcome_text(asdict(outcome))}")
    write_text(out_dir / "README.md", model_card(finished, runtime, outcomes))
    return {
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "files": sorted(path.name for path in out_dir.iterdir() if path.is_file() and path.name != "work.json"),
    }


def model_card(finished: Finished, runtime: Runtime, outcomes: Sequence[Outcome]) -> str:
    """The Hub model card: metadata block, how to use it, what was done, what was measured."""
    environment = Environment(
        loader=PackageLoader("trimlingual", "report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    recipe, lineage, processor = finished.recipe, finished.model.lineage, load_processor(finished.model.path)
    family = family_of_processor(processor)
    return environment.get_template("model_card.md.j2").render(
        recipe=recipe,
        runtime=runtime,
        lineage=lineage,
        family=family,
        text_only=bool(recipe.export and recipe.export.gguf.text_only),
        context=finished.context,
        vllm_dtype=dtype_of(finished),
        num_filled_up=processor.feature_extractor.n_samples if family.hears_padding(processor) else None,
        result=read_result(finished.evaluation_dir) if finished.evaluation_dir else None,
        outcomes=[(outcome_row(asdict(outcome)), outcome_text(asdict(outcome))) for outcome in outcomes],
        removed=lineage.removed("decoder"),
        version=version(),
        prompt=recipe.task.prompt_for(recipe.task.target_languages[0]),
        base=lineage.to_ship().base.removeprefix("builtin:"),
        on_hub=is_on_hub(lineage.base),
    )
