"""The laboratory's sets: which sentences belong to which set, who speaks them, and one WAV file with one manifest line for each.

    python -m benchmarks.lab.speech --lab runs/lab [--espeak-root DIR --flite-root DIR]

The setting is the paper's. A base model is trained on general text; a small in-domain set makes the teacher, and a larger one is
there to compare; the selection clips choose; half of the test clips are in a voice that nothing else is spoken in. German has two kinds
of text (everyday sentences, image captions), so its in-domain set is a real change of domain. Chinese has one kind, so its in-domain
set differs in sentences only.

Whisper's encoder was trained on clips that end in silence, with no mask over it, and is used here as it is: every clip gets some.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from tools.mini.speech import SAMPLE_RATE, VOICES, Engines, Voice, synthesise

HEARD = tuple(voice for voice in VOICES if voice.name in ("flite-slt", "flite-rms", "espeak-us-m3"))
UNHEARD = next(voice for voice in VOICES if voice.name == "flite-awb")
END_SILENCE_S = 0.8
MAX_CLIP_S = 9.9  # the window is 10 s
LANGUAGES = {"ende": "de", "enzh": "zh"}
# (set, text file, first row, rows), before the sets are mixed. `general` trains the base; `small` and `large` are in-domain.
GENERAL = (("ende_general.train", 0, 37_000), ("ende.train", 20_000, 6_000), ("enzh.train", 7_000, 22_000))
SMALL = (("ende.train", 0, 784), ("enzh.train", 0, 784))
LARGE = (("ende.train", 0, 3_000), ("enzh.train", 0, 3_000))
SELECT = (("ende.dev", 0, 500), ("enzh.dev", 0, 500))
TEST = (("ende.test", 0, 500), ("enzh.test", 0, 500))
SETS = {"general": GENERAL, "large": LARGE, "select": SELECT, "test": TEST}
CHUNK = 64  # clips spoken by a process


@dataclass(frozen=True)
class Item:
    """A sentence of a set, with who speaks it."""

    set: str
    id: str
    text: str
    language: str
    target: str
    voice: Voice
    heard: bool


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a text file (`name.jsonl`, or gzipped): id, en, tgt."""
    path = folder / f"{name}.jsonl"
    packed = path.with_name(path.name + ".gz")
    data = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def items(folder: Path, scale: float = 1.0, general: float = 1.0) -> Iterator[Item]:
    """All sentences of all sets; `scale` takes fewer of each (for a trial on a CPU), `general` fewer of the general text."""
    texts = {name: rows(folder, name) for parts in SETS.values() for name, _, _ in parts}
    for name, rule in texts.items():  # everyday sentences are shuffled, so that a part of them is like all
        if name == "ende_general.train":
            random.Random(1).shuffle(rule)
    for role, parts in SETS.items():
        share = scale * general if role == "general" else scale
        for name, first, count in parts:
            language = LANGUAGES[name[:4]]
            for number, row in enumerate(texts[name][first : first + max(4, round(count * share))]):
                heard = role != "test" or number % 2 == 0
                rng = np.random.default_rng(zlib.crc32(f"{role} {row['id']}".encode()))
                voice = HEARD[rng.integers(len(HEARD))] if heard else UNHEARD
                identity = f"{language}-{name.rpartition('.')[2]}-{row['id']}".replace("/", "_")
                yield Item(role, identity, row["en"], language, row["tgt"], voice.jittered(rng), heard)


def speak(chunk: Sequence[Item], lab: Path, engines: Engines) -> list[dict[str, Any] | None]:
    """WAV files and manifest lines; None for a sentence that takes longer than the window."""
    lines: list[dict[str, Any] | None] = []
    for item in chunk:
        samples = synthesise(item.text, item.voice, engines)
        samples = np.concatenate([samples, np.zeros(round(END_SILENCE_S * SAMPLE_RATE), dtype=np.float32)])
        if len(samples) > MAX_CLIP_S * SAMPLE_RATE:
            lines.append(None)
            continue
        path = lab / "clips" / item.set / f"{item.id}.wav"
        sf.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        lines.append(
            {
                "id": item.id,
                "audio": path.relative_to(lab).as_posix(),
                "references": {item.language: item.target},
                "source": item.text,
                "voice": item.voice.name,
                "heard": item.heard,
            }
        )
    return lines


def manifests(spoken: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Manifests by name: the sets and their smaller parts, languages alternating so that any beginning has as much of both; and each
    language's lines alone, as `NAME-LANGUAGE`."""
    mixed: dict[str, list[dict[str, Any]]] = {}
    for role, lines in spoken.items():
        by_language = [[x for x in lines if language in x["references"]] for language in LANGUAGES.values()]
        longest = max(map(len, by_language))
        mixed[role] = [part[i] for i in range(longest) for part in by_language if i < len(part)]
    sizes = {f"select-{count}": ("select", count) for count in (100, 200, 400)}
    sizes |= {f"general-{count}": ("general", count) for count in (5_000, 10_000, 20_000, 40_000)}
    small = max(8, 2 * SMALL[0][2] * len(mixed["large"]) // (2 * LARGE[0][2]))
    sizes |= {"small": ("large", small)}
    both = mixed | {name: mixed[role][:count] for name, (role, count) in sizes.items()}
    alone = {
        f"{name}-{language}": [line for line in lines if language in line["references"]]
        for (name, lines), language in product(both.items(), LANGUAGES.values())
    }
    return both | alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True, help="folder of the laboratory; text in its text/")
    parser.add_argument("--espeak-root", help="folder with libespeak-ng.so; default: the system's")
    parser.add_argument("--flite-root", help="folder with libflite.so; default: the system's")
    parser.add_argument("--scale", type=float, default=1.0, help="share of every set, for a trial")
    parser.add_argument("--general", type=float, default=1.0, help="share of the general text, to save time")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    lab: Path = args.lab.absolute()
    if (lab / "speech.json").is_file():
        print("the speech is there")
        return
    every = list(items(lab / "text", args.scale, args.general))
    for role in SETS:
        (lab / "clips" / role).mkdir(parents=True, exist_ok=True)
    work = partial(speak, lab=lab, engines=Engines(args.espeak_root, args.flite_root))
    spoken: dict[str, list[dict[str, Any]]] = {role: [] for role in SETS}
    dropped = done = 0
    chunks = [every[start : start + CHUNK] for start in range(0, len(every), CHUNK)]
    # What a synthesiser says depends on what it said before, so each chunk gets a process of its own.
    with multiprocessing.Pool(args.workers, maxtasksperchild=1) as pool:
        for chunk, lines in zip(chunks, pool.imap(work, chunks)):
            for item, line in zip(chunk, lines):
                if line is None:
                    dropped += 1
                else:
                    spoken[item.set].append(line)
            done += len(chunk)
            if done % (100 * CHUNK) == 0:
                print(f"spoken: {done} of {len(every)}", flush=True)
    written = manifests(spoken)
    for name, lines in written.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (lab / f"{name}.jsonl").write_text(text, encoding="utf-8")
    summary: dict[str, Any] = {"clips": {name: len(lines) for name, lines in written.items()}, "too_long": dropped}
    summary |= {"scale": args.scale, "general": args.general}
    (lab / "speech.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
