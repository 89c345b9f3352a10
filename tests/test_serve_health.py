"""What `/health` says when translating fails, ends or hangs."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from trimlingual.app.recordings import Given
from trimlingual.app.segments import Cutting
from trimlingual.app.translate import App, Heard

from .serving import CLIPS, Running

for library in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(library)

from trimlingual.app.gate import Access  # noqa: E402
from trimlingual.app.refusals import Refusal  # noqa: E402
from trimlingual.app.server import Limits, Server  # noqa: E402


def test_health_follows_translations_that_fail(tmp_path):
    """The folder for uploads is taken away, so that none can be translated, and comes back."""
    uploads, said = tmp_path / "uploads", tmp_path / "stderr"
    uploads.mkdir()
    words = [
        sys.executable,
        "-m",
        "trimlingual",
        "serve",
        "builtin:mini",
        "--to",
        "de",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    environment = {
        **os.environ,
        "TMPDIR": str(uploads),
    }  # read once by a process, so this is no fork of one that has read it
    with (
        said.open("w") as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        server = Running(process, json.loads(process.stdout.readline())["url"])
        assert server.post(CLIPS[0]).status == 200
        uploads.rmdir()
        for _ in range(2):
            assert (server.post(CLIPS[0]).status, server.ask("GET", "/health").status) == (500, 200)
        assert server.post(CLIPS[0]).code == "internal_error"
        assert (server.ask("GET", "/health").status, server.ask("GET", "/health").code) == (503, "failing")
        uploads.mkdir()
        assert server.ask("GET", "/health").json == {"status": "ok"}
        assert server.post(CLIPS[0]).status == 200
        process.terminate()
        assert process.wait(60) == 0
    assert "noise could not be translated: FileNotFoundError" in said.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_ends_with_the_thread_that_translates(tmp_path):
    """It is killed in the middle of a batch; nobody waits for it any more."""
    given = Heard(Given("clip", CLIPS[0]), ["de"])
    app = App("builtin:mini", ["de"], None, "cpu", Cutting())
    server = Server(app, "builtin:mini", Limits(10**6, 60.0, 10, 60.0), Access(None))
    (piece,) = app.pieces(given, tmp_path, {})
    assert server.batcher.submit(piece).result(60)
    thread = next(each for each in threading.enumerate() if each is server.batcher._thread)
    futures = [server.batcher.submit(piece) for _ in range(40)]
    while not server.batcher.busy_s:
        time.sleep(0.001)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    thread.join(60)
    assert any(future.exception(1) for future in futures)
    assert isinstance(server.batcher.submit(piece).exception(1), RuntimeError)
    with pytest.raises(Refusal) as refused:
        asyncio.run(server._health(None))
    assert (refused.value.status, refused.value.code) == (503, "broken")


def test_health_tells_a_batch_that_does_not_end(tmp_path):
    """A batch takes longer than a translation may; that is over in a moment."""
    app = App("builtin:mini", ["de"], None, "cpu", Cutting())
    server = Server(app, "builtin:mini", Limits(10**6, 60.0, 10, 0.001), Access(None))
    (piece,) = app.pieces(Heard(Given("clip", CLIPS[0]), ["de"]), tmp_path, {})
    future = server.batcher.submit(piece)
    codes = set()
    while not future.done():
        try:
            asyncio.run(server._health(None))
        except Refusal as refusal:
            codes.add((refusal.status, refusal.code))
    assert codes == {(503, "stuck")}
    while server.batcher.busy_s:
        time.sleep(0.001)
    assert asyncio.run(server._health(None)).status_code == 200
    server.batcher.stop()
