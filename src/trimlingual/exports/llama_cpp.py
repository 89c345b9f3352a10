"""The proof of GGUF files: llama.cpp's own server loads them and is asked, over HTTP, for the recorded translations.

The server is the program `llama-server` or, where there is none, that of the package xllamacpp, which brings llama.cpp along.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import soundfile

from trimlingual.data.audio import SAMPLE_RATE, load_audio
from trimlingual.data.sources import Clip
from trimlingual.exports.proof import compare, recorded_translations
from trimlingual.exports.target import ExportError, Finished
from trimlingual.recipe import GgufType, TaskSettings
from trimlingual.run.extras import install_line

START_S = 600  # that a large model may take to load
ANSWER_S = 600
# Share of translations that may differ from the recorded ones, which were made with other roundings. 4 bits make another model: how
# many are equal is told, and refuses nothing.
DIFFERING: dict[GgufType, float] = {"f16": 0.1, "q8_0": 0.2, "q4_0": 1.0, "q4_k_m": 1.0}
MISSING = f"llama-server is not on the PATH, nor the package xllamacpp installed ({install_line('llama')})"


@dataclass(frozen=True)
class Server:
    """A running llama.cpp."""

    url: str
    process: psutil.Process
    versions: dict[str, str]

    def translate(self, clip: Clip, language: str, task: TaskSettings, max_tokens: int) -> str:
        """The answer to one clip, as a user of the server asks for it."""
        wav = io.BytesIO()
        soundfile.write(wav, load_audio(clip.audio), SAMPLE_RATE, format="WAV", subtype="FLOAT")
        audio = {"format": "wav", "data": base64.b64encode(wav.getvalue()).decode("ascii")}
        request = {
            "temperature": 0,
            "max_tokens": max_tokens,
            "messages": [
                {"role": "system", "content": task.system_prompt},
                {
                    "role": "user",
                    "content": [
                        {"type": "input_audio", "input_audio": audio},
                        {"type": "text", "text": task.prompt_for(language)},
                    ],
                },
            ],
        }
        return ask(f"{self.url}/v1/chat/completions", request)["choices"][0]["message"]["content"].strip()


def server_program(named: str | None) -> str | None:
    """The `llama-server` to use: the one named, or on the PATH."""
    return shutil.which(named or "llama-server")


def quantize_program(named: str | None) -> str | None:
    """The `llama-quantize` to use: the one named, or on the PATH."""
    return shutil.which(named or "llama-quantize")


def quantize(source: Path, path: Path, kind: GgufType, named: str | None) -> None:
    """Have llama.cpp pack the f16 file `source` as `kind`; ExportError where it cannot."""
    program = quantize_program(named)
    assert program, "problems() says it"
    done = subprocess.run([program, source, path, kind.upper()], capture_output=True, text=True, errors="replace")
    if done.returncode or not path.is_file():
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{program} does not make {path.name}: {lines[-1]}")


def prove(text: Path, mmproj: Path, kind: GgufType, finished: Finished) -> dict[str, Any]:
    """Have llama.cpp translate recorded clips; ExportError where it does not load the files, or says too much else."""
    recipe = finished.recipe
    assert recipe.export is not None
    recorded = recorded_translations(recipe, finished.evaluation_dir, finished.clips)
    with serving(text, mmproj, finished.context, recipe.export.gguf.llama_server) as server:
        started, peak, said = time.perf_counter(), 0, []
        for clip, language, _ in recorded:
            said.append(server.translate(clip, language, recipe.task, recipe.decode.max_new_tokens))
            peak = max(peak, server.process.memory_info().rss)
        seconds = (time.perf_counter() - started) / len(recorded) if recorded else None
    outcome = compare(recorded, said, DIFFERING[kind], f"llama.cpp of {text.name}")
    measured = {"seconds_per_clip": seconds, "peak_bytes": peak or None}
    return {"runtime": "llama.cpp", "versions": server.versions, "loads_whole": True, **outcome, **measured}


@contextmanager
def serving(text: Path, mmproj: Path | None, context: int, named: str | None = None) -> Iterator[Server]:
    """llama.cpp's server on a free port of this machine, for text alone without `mmproj`; ExportError where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = server_program(named)
    if program:
        audio = ["--mmproj", mmproj] if mmproj else []
        command = [program, "-m", text, *audio, "--port", port, "-c", context, "-np", 1, "--jinja", "--no-warmup"]
    else:
        script = Path(__file__).with_name("llama_server.py")
        command = [sys.executable, "-P", script, text, mmproj or "", port, context]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            _wait(url, started, log)
            own = {"llama.cpp": ask(f"{url}/props")["build_info"]} if program else {"xllamacpp": version("xllamacpp")}
            yield Server(url, psutil.Process(started.pid), own)
        finally:
            started.kill()
            started.wait()


def is_there(named: str | None) -> bool:
    """Whether a llama.cpp can be run here."""
    return server_program(named) is not None or find_spec("xllamacpp") is not None


def _wait(url: str, started: subprocess.Popen[bytes], log: Any) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if started.poll() is not None:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise ExportError(f"llama.cpp does not load what was exported: {lines[-1]}")
        try:
            ask(f"{url}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise ExportError(f"llama.cpp has not loaded what was exported within {START_S} s")


def ask(url: str, content: Any = None) -> Any:
    """The server's JSON answer to a request, or to JSON that is sent."""
    body = json.dumps(content).encode("utf-8") if content is not None else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.load(answer)
