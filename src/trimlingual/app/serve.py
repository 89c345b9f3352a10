"""`trimlingual serve`: a model behind HTTP, until the process is asked to stop."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from trimlingual.app.gate import Access
from trimlingual.app.segments import Cutting
from trimlingual.app.server import Limits, Server
from trimlingual.app.translate import App
from trimlingual.recipe import Recipe
from trimlingual.run.interruptions import Interrupted
from trimlingual.run.progress import say

TOKEN_VARIABLE = "TRIMLINGUAL_TOKEN"
SHORTEST_TOKEN = 16  # characters


class ServeError(ValueError):
    """Settings that no server starts with."""


def read_token(file: Path | None) -> str | None:
    """The token in the file, else in the environment; neither shows in the list of processes. ServeError for one that is short."""
    text = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE, "").strip()
    source = str(file) if file else TOKEN_VARIABLE
    if not text and not file:
        return None
    if len(text) < SHORTEST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise ServeError(
            f"the token in {source} has {len(text)} characters; it needs at least {SHORTEST_TOKEN}, ASCII and without spaces: "
            "openssl rand -hex 32 makes one"
        )
    return text


def check_host(host: str, token: str | None) -> None:
    """ServeError where others than this machine could reach the server without a token."""
    if token is None and not _is_loopback(host):
        raise ServeError(
            f"--host {host} can be reached from other machines, so a token is needed: set {TOKEN_VARIABLE} or give --token-file"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: str,
    languages: Sequence[str] | None,
    recipe: Recipe | None,
    device: str,
    address: tuple[str, int],
    limits: Limits,
    token: str | None,
    second_tries: bool,
) -> None:
    """Serve until SIGTERM or SIGINT; what was begun is finished first. Prints one line of JSON with the address once it listens.

    Raises ServeError, ModelError and OSError (the address is taken) before the model is loaded.
    """
    host, port = address
    check_host(host, token)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listening:
        app = App(model, languages, recipe, device, Cutting(), limits.longest_s, second_tries)
        server = Server(app, Path(model).name if Path(model).is_dir() else model, limits, Access(token))
        config = uvicorn.Config(
            server.asgi, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=int(limits.timeout_s) + 1,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        say(f"serving {server.model} into {', '.join(app.languages)} at {url}; {url}/docs says how to ask")
        print(json.dumps({"url": url, "model": server.model, "languages": app.languages}), flush=True)
        with suppress(Interrupted):  # uvicorn finishes what was begun, and then gives the signal on
            uvicorn.Server(config).run(sockets=[listening])
        server.batcher.stop()
        say(f"stopped; {server.metrics.num_requests} request(s) were answered")
