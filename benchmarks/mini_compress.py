"""Time and score the main job on the built-in model: `trimlingual compress mini` from nothing, and the second run that does nothing.

    python benchmarks/mini_compress.py [--set rank.strategy=middle ...]

Prints the result table, then one JSON document, and writes it to benchmarks/results/mini_compress.json (another name with --name).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from commit import commit

from trimlingual.report import result_table_markdown

RESULTS = Path(__file__).parent / "results"
KEPT = ("recipe", "created", "split", "machine", "models", "stages", "plan")


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="mini_compress")
    parser.add_argument("--commit", default="", help="where there is no Git: the commit that is written down")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    command = ["trimlingual", "compress", "mini", *[word for value in args.overrides for word in ("--set", value)]]
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", *command, "--run-dir", folder]
        seconds, again = timed(run), timed(run)
        report = json.loads((Path(folder) / "report" / "report.json").read_text(encoding="utf-8"))
    print(result_table_markdown(report))
    result = {
        "command": " ".join(command),
        "commit": commit(args.commit),
        "seconds": seconds,
        "seconds_second_run": again,
    }
    result |= {key: report[key] for key in KEPT}
    for stage in result["stages"]:
        stage.pop("info", None)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, ensure_ascii=False)
    (RESULTS / f"{args.name}.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(text)


if __name__ == "__main__":
    main()
