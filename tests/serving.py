"""Asking a server: clips, uploads as a client sends them, and answers."""

from __future__ import annotations

import http.client
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trimlingual.data.rows import MINI_DATA
from trimlingual.run.jsonl import read_jsonl

from .processes import Command

CLIPS = [MINI_DATA / row["audio"] for row in read_jsonl(MINI_DATA / "test.jsonl")[:12]]
ROUTE = "/v1/audio/translations"
BOUNDARY = "trimlingual-boundary"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The word of an error, which has the form of the well-known API."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error["code"]


@dataclass
class Running:
    command: Command | subprocess.Popen[bytes]
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def post(self, audio: bytes | Path, name: str = "clip.ogg", path: str = ROUTE, **fields: str) -> Answer:
        data = audio.read_bytes() if isinstance(audio, Path) else audio
        return self.ask(
            "POST", path, form(data, name, fields), Content_Type=f"multipart/form-data; boundary={BOUNDARY}"
        )


def form(audio: bytes, name: str, fields: dict[str, str]) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{{}}"'
    parts = [f"{head.format(field)}\r\n\r\n{value}\r\n".encode() for field, value in fields.items()]
    parts.append(f'{head.format("file")}; filename="{name}"\r\n\r\n'.encode() + audio + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
