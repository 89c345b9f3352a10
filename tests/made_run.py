"""A run folder as the pipeline writes it, with real sound and real headers of weights, made in no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

HOSTILE = "<script>alert('x')</script> & \"quoted\" | piped"
PROOF = {"versions": {"transformers": "5.23.0", "torch": "2.13.0"}, "dtype": "bfloat16", "compared": 16, "equal": 15}
SPLIT = {"name": "test", "hash": "0123abcd", "num_clips": 8}
LOSSES = [{"step": step, "loss": 4 / step, "learning_rate": 1e-3 - 1e-5 * step} for step in (1, 10, 20, 30)]
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
    found["curve"] = [{"num_removed": n, "score": 50.0 - 4 * n, "retained": 1 - 0.08 * n} for n in range(3)]
    return {**found, "removals": removals, "candidates": candidates}


def make_run(run: Path) -> Path:
    """A run of a 20-layer model on two languages, whole."""
    recipe = {"name": "mini-de-zh", "description": "", "rank": {"num_layers_to_remove": 2}}
    recipe |= {"task": {"target_languages": ["de", "zh"]}, "model": {"base": "builtin:mini"}}
    write(run / "recipe.json", recipe)
    write_evaluations(run / "evaluations", write_clips(run / "data"))
    write(run / "rank" / "plan.json", plan())
    for stage in ("data", "teacher", "rank", "pruned", "distilled", "recovered", "quantized", "exported"):
        record = {
            "stage": stage,
            "seconds": 61.5,
            "settings": {},
            "inputs": {},
            "machine": MACHINE,
            "fingerprint": "f00",
        }
        trained = {"losses": LOSSES} if stage in ("teacher", "recovered") else {}
        write(run / stage / "artifact.json", {**record, "info": {"num_clips": 8, "loss": 0.123456, **trained}})
    weights = {"audio_tower.conv.weight": 10, "model.embed_tokens.weight": 20, "model.layers.0.weight": 70}
    save_file({name: torch.zeros(size) for name, size in weights.items()}, run / "quantized" / "model.safetensors")
    return run
