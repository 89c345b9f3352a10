"""A server under load: whether every request gets its own clip's translation, and what many clients gain over one.

    python benchmarks/serve.py                                  # the built-in model, 10,000 requests from 64 clients
    python benchmarks/serve.py --requests 1000                  # a shorter one
    # random packed int4 at the true shapes, on one GPU
    python benchmarks/serve.py --random qwen2-audio-7b --clips 16 --requests 320 --timed 96 --name serve_7b

A client asks again as soon as it has its answer. What a clip's own translation is, one client has found out before, with nobody beside
it. `lost` are requests without an answer; `mixed_up` those that got another clip's; `different` those that got neither their own nor
another's (a near tie that batching turned). Then the throughput with one client and with --many, in turns, --repeats times. Random
weights give runaways, which are not decoded again here. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from random_int4 import write_random_int4

from trimlingual.data.rows import MINI_DATA
from trimlingual.exports.shipped import Shipped
from trimlingual.models.family import family_named
from trimlingual.models.loading import load_processor, resolve_base
from trimlingual.recipe import DecodeSettings, QuantizeSettings, TaskSettings
from trimlingual.run.artifacts import machine, write_json
from trimlingual.run.jsonl import read_jsonl

RESULTS = Path(__file__).parent / "results"
BOUNDARY = "a-boundary-that-no-clip-holds"
Work = tuple[str, str]
"""A clip's path and a language."""


def write_model(shape: str, folder: Path) -> None:
    """A model folder of these shapes with random packed words, as `serve` takes it."""
    family = family_named("qwen2_audio")
    processor = load_processor(resolve_base(f"random:{shape}"))
    group = 128 if shape.endswith("7b") else 64
    settings = QuantizeSettings(scheme="int4", group_size=group, eight_bit=["embeddings", "lm_head"])
    config = family.random_config(family.shapes[shape], processor)
    write_random_int4(config, processor, folder, settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    Shipped(TaskSettings(target_languages=["de", "zh"]), DecodeSettings(), "bfloat16", (3.0, 8.0)).save(folder)


@contextmanager
def server(model: str, device: str, at_once: int, options: Sequence[str]) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own: its port and the process. It has to end cleanly, and when this program is told to."""
    words = ["serve", model, "--port", "0", "--device", device, "--at-once", str(at_once), *options]
    process = subprocess.Popen([sys.executable, "-m", "trimlingual", *words], stdout=subprocess.PIPE, text=True)

    def end(*_: object) -> None:
        process.terminate()
        os._exit(143)  # clients' threads would be waited for

    signal.signal(signal.SIGTERM, end)
    try:
        assert process.stdout
        yield int(json.loads(process.stdout.readline())["url"].rpartition(":")[2]), psutil.Process(process.pid)
    finally:
        process.terminate()
        assert process.wait(120) == 0


class Client:
    """One connection, as a client library keeps it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, work: Work) -> tuple[str | None, float]:
        """The translation (none without an answer) and the seconds it took."""
        started = time.perf_counter()
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{{}}"'
        field = f'{head.format("language")}\r\n\r\n{work[1]}\r\n{head.format("file")}; filename="{Path(work[0]).name}"\r\n\r\n'
        body = field.encode() + Path(work[0]).read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        try:
            self._connection.request("POST", "/v1/audio/translations", body, headers)
            answer = self._connection.getresponse()
            said = answer.read()
            text = json.loads(said)["text"] if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            self._connection.close()
            text = None
        return text, time.perf_counter() - started


def load(port: int, work: Sequence[Work], clients: int) -> tuple[list[tuple[str | None, float]], float]:
    """All answers, in the order of `work`, which the clients share out; and the seconds it took."""

    def one(first: int) -> list[tuple[str | None, float]]:
        client = Client(port)
        return [client.ask(each) for each in work[first::clients]]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        parts = list(threads.map(one, range(clients)))
    seconds = time.perf_counter() - started
    return [parts[i % clients][i // clients] for i in range(len(work))], seconds


def judged(work: Sequence[Work], answers: Sequence[tuple[str | None, float]], own: dict[Work, str]) -> Counter[str]:
    """How many answers are the clip's own, lost, mixed up or different."""
    others = {(language, text) for (_, language), text in own.items()}
    found: Counter[str] = Counter(own=0, lost=0, mixed_up=0, different=0)
    for each, (text, _) in zip(work, answers):
        is_other = (each[1], text) in others
        found["lost" if text is None else "own" if text == own[each] else "mixed_up" if is_other else "different"] += 1
    return found


def run(port: int, process: psutil.Process, args: argparse.Namespace, clips: Sequence[Work]) -> dict[str, Any]:
    """The whole benchmark on a server that listens."""
    rng = random.Random(0)
    alone, _ = load(port, clips, 1)
    own = {each: text for each, (text, _) in zip(clips, alone) if text is not None}
    assert len(own) == len(clips), "a request was lost with a single client"
    work = [clips[i % len(clips)] for i in range(args.requests)]
    rng.shuffle(work)
    answers, seconds = load(port, work, args.clients)
    times = sorted(taken for _, taken in answers)
    result: dict[str, Any] = {
        "requests": len(work), "clients": args.clients, **judged(work, answers, own),
        "seconds": round(seconds, 2), "requests_per_second": round(len(work) / seconds, 2),
        "latency_s": {name: round(times[int(share * (len(times) - 1))], 3) for name, share in (("median", 0.5), ("99 %", 0.99))},
        "server_memory_mb": round(process.memory_info().rss / 1e6),
    }  # fmt: skip
    rates: dict[int, list[float]] = {1: [], args.many: []}
    for _ in range(args.repeats):
        for clients, found in rates.items():
            part = rng.choices(clips, k=args.timed if clients > 1 else max(8, args.timed // 4))
            answers, seconds = load(port, part, clients)
            result["lost"] += sum(text is None for text, _ in answers)
            found.append(round(len(part) / seconds, 2))
    ratio = statistics.median(rates[args.many]) / statistics.median(rates[1])
    throughput = {str(clients): found for clients, found in rates.items()}
    return result | {"throughput_per_second": throughput, "gain_of_many": round(ratio, 2)}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:mini")
    parser.add_argument("--random", help="shapes of a model with random packed int4 weights, instead of --model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--many", type=int, default=16)
    parser.add_argument(
        "--timed", type=int, default=160, help="requests of a timing with --many clients; one has a quarter"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--name", default="serve_mini")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    rows = read_jsonl(MINI_DATA / "test.jsonl")[: args.clips]
    clips = [(str(MINI_DATA / row["audio"]), language) for row in rows for language in ("de", "zh")]
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            write_model(args.random, Path(folder))
        options = ["--no-second-tries"] if args.random else []
        with server(folder if args.random else args.model, args.device, args.clients, options) as (port, process):
            result = run(port, process, args, clips)
    result = {"model": f"random int4, {args.random}" if args.random else args.model} | result | {"machine": machine()}
    write_json(args.out or RESULTS / f"{args.name}.json", result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
