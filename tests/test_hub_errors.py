"""A Hub that is there and fails: it hangs up, stops in the middle of a file, answers with a proxy's page. Each is an error of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

COMMIT = "a" * 40
ASKS = """
import sys
from pathlib import Path
from trimlingual.data.audio import DataError
from trimlingual.data.hub import hub_rows
from trimlingual.models.errors import ModelError
from trimlingual.models.loading import resolve_base
from trimlingual.recipe import HubSource

how, kind = sys.argv[1:]
try:
    if kind == "model":
        resolve_base(f"someone/{how}")
    else:
        source = HubSource(kind="hub", path=f"someone/{how}", splits=["train"], audio="audio", references={"de": "de"})
        hub_rows(source, ["de"], Path("work"))
except (ModelError, DataError) as error:
    print(error)
"""


class FailingHub(BaseHTTPRequestHandler):
    """Fails as the repository is named."""

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if "proxy" in self.path:
            self.send(b"<html>Log in to this network</html>", with_body)
        elif "/api/" in self.path:
            info = {"id": "someone/x", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            tree = [{"type": "file", "path": "config.json", "oid": "b" * 40, "size": 100}]
            self.send(json.dumps(tree if "/tree/" in self.path else info).encode(), with_body)
        elif "short" in self.path:
            self.send(b"{", with_body, length=100)
        # else it hangs up

    def send(self, body: bytes, with_body: bool, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{"c" * 40}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FailingHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("hangs-up", "model", "could not be downloaded from the Hub"),
        ("short", "model", "could not be downloaded from the Hub"),
        ("proxy", "model", "could not be downloaded from the Hub"),
        ("proxy", "set", "cannot be loaded"),
    ],
)
def test_it_is_an_error_that_says_what_to_do(hub, tmp_path, how, kind, says):
    """In a process of its own, because the Hub's address is read once."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASKS, how, kind], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"someone/{how}" in done.stdout
    assert says in done.stdout
    assert "network" in done.stdout
