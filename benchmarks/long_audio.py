"""What cutting a long recording costs: talks joined from test clips, cut by `translate`, against the given segmentation.

    python benchmarks/long_audio.py [--model builtin:mini] [--languages de zh] [--talks 10] [--name long_audio_mini]

The test clips of the built-in data are joined to talks, with pauses of 0.3 to 1.2 seconds (`--pauses`). A talk's translation is
aligned with its sentences by minimum word error (mwerAlign, Matusov et al. 2005; the package `mweralign`, for this benchmark alone,
is GPL and not a part of trimlingual) and scored against them; beside it, the same model on the clips themselves. Also measured: memory
and time on an hour and on ten minutes of such talk (`--hour`). Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from trimlingual.app.segments import Cutting
from trimlingual.app.translate import translate_files
from trimlingual.data.audio import SAMPLE_RATE, load_audio
from trimlingual.data.rows import MINI_DATA
from trimlingual.evaluation.quality import corpus_score
from trimlingual.recipe import languages
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.jsonl import read_jsonl

RESULTS = Path(__file__).parent / "results"


def joined(clips: Sequence[dict[str, Any]], pauses: Sequence[float], seed: int) -> np.ndarray:
    """The clips one after the other, with a pause after each."""
    rng, parts = np.random.default_rng(seed), []
    for clip in clips:
        parts += [
            load_audio(MINI_DATA / clip["audio"]),
            np.zeros(round(rng.uniform(*pauses) * SAMPLE_RATE), np.float32),
        ]
    return np.concatenate(parts)


def aligned(text: str, references: Sequence[str], language: str) -> list[str]:
    """The text in as many parts as there are references, those with the least word errors (characters where words are not spaced)."""
    import mweralign

    spaced = languages.language(language).spaced

    def units(line: str) -> str:
        return line if spaced else " ".join(line.replace(" ", ""))

    found = mweralign.align_texts("\n".join(map(units, references)), units(text))
    lines = found.split("\n") if isinstance(found, str) else list(found)
    return [line if spaced else line.replace(" ", "") for line in lines][: len(references)]


def cost(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Scores of the clips as given and of the talks, by language."""
    clips = read_jsonl(MINI_DATA / "test.jsonl")
    order = np.random.default_rng(0).permutation(len(clips))
    talks = [[clips[i] for i in part] for part in np.array_split(order, args.talks)]
    paths = []
    for number, talk in enumerate(talks):
        paths.append(scratch / f"talk-{number}.wav")
        sf.write(paths[-1], joined(talk, args.pauses, number), SAMPLE_RATE)
    whole = list(translate_files(args.model, paths, args.languages, cutting=Cutting(pause_s=args.pause)))
    given = list(translate_files(args.model, [MINI_DATA / clip["audio"] for clip in clips], args.languages))
    by_clip = {(record["audio"], record["language"]): record["text"] for record in given}
    result: dict[str, Any] = {}
    for language in args.languages:
        references = [clip["references"][language] for talk in talks for clip in talk]
        said = [record for record in whole if record["language"] == language]
        parts = [
            line
            for record, talk in zip(said, talks, strict=True)
            for line in aligned(record["text"], [clip["references"][language] for clip in talk], language)
        ]
        plain = [by_clip[str(MINI_DATA / clip["audio"]), language] for talk in talks for clip in talk]
        scores = {
            name: {
                metric: round(corpus_score(metric, texts, references, language).value, 2)
                for metric in ("bleu", "chrfpp")
            }
            for name, texts in (("given", plain), ("cut", parts))
        }
        segments = sum(len(record["segments"]) for record in said)
        result[language] = scores | {"sentences": len(references), "segments": segments}
    return result


def memory(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Peak memory and time of `translate` in a process of its own, on talks of these minutes."""
    clips = read_jsonl(MINI_DATA / "test.jsonl")
    once = joined(clips, args.pauses, 0)
    found = {}
    for minutes in args.minutes:
        path = scratch / f"{minutes}.wav"
        repeats = -(-minutes * 60 * SAMPLE_RATE // len(once))
        sf.write(path, np.tile(once, repeats)[: minutes * 60 * SAMPLE_RATE], SAMPLE_RATE)
        words = [
            sys.executable,
            __file__,
            "--child",
            str(path),
            "--model",
            args.model,
            "--languages",
            args.languages[0],
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found[f"{minutes} minutes"] = json.loads(done.stdout.strip().splitlines()[-1])
        print(minutes, found[f"{minutes} minutes"], file=sys.stderr, flush=True)
    return found


def peak_mb() -> float:
    """The most memory this process has had, in MB; Linux. `getrusage` would count its parent's, if that had more."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def child(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    record = next(translate_files(args.model, [args.child], args.languages))
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "peak_mb": round(peak_mb(), 1),
                "seconds": round(seconds, 1),
                "real_time_factor": round(seconds / record["duration_s"], 4),
                "segments": len(record["segments"]),
                "second_tries": sum("second_try" in segment for segment in record["segments"]),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:mini")
    parser.add_argument("--languages", nargs="+", default=["de", "zh"])
    parser.add_argument("--talks", type=int, default=10)
    parser.add_argument("--pauses", type=float, nargs=2, default=[0.3, 1.2])
    parser.add_argument("--pause", type=float, default=Cutting().pause_s)
    parser.add_argument(
        "--minutes", type=int, nargs="*", default=[], help="also memory and time on talks of so many minutes"
    )
    parser.add_argument("--name", default="long_audio_mini")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = {"command": shlex.join(["python", "benchmarks/long_audio.py", *sys.argv[1:]]), "machine": machine()}
        result["cost"] = cost(args, Path(scratch))
        print(json.dumps(result["cost"]), file=sys.stderr, flush=True)
        result["memory"] = memory(args, Path(scratch))
    write_json(RESULTS / f"{args.name}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
