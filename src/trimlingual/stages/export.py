"""What ships: the finished model, written for a runtime, with a card that says what it is and what the runtime made of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimlingual.exports.card import model_card
from trimlingual.exports.target import Finished, target
from trimlingual.models.folders import check_folder
from trimlingual.recipe import Runtime
from trimlingual.report.tables import outcome_text
from trimlingual.run.artifacts import write_text
from trimlingual.run.progress import say


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
