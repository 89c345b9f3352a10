"""What every request passes before its route: the token, the address it was sent to, and the count of answers.

An answer that comes before the upload was read (401, 413, 429) waits until the client has sent it, as far as the limit on its size
goes: most clients read no answer while they write.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimlingual.app.metrics import Metrics
from trimlingual.app.refusals import Refusal

OPEN = ("/health",)  # needs no token: load balancers have none
DRAIN_S = 10.0
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Access:
    """Who may ask: whoever has the `token` or, without one, whoever asks this machine by one of its local names."""

    token: str | None

    def refusal(self, path: str, headers: Headers) -> Refusal | None:
        """Why a request is not let in."""
        if self.token is None:
            # A page in a browser can have its own name point to this machine; it cannot choose the name that is sent.
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOCAL_NAMES:
                return Refusal(400, "wrong_host", "this server answers to localhost alone")
            return None
        if path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        return Refusal(
            401, "invalid_api_key", "the token is missing or wrong; send it as 'Authorization: Bearer TOKEN'"
        )


class Gate:
    """ASGI middleware that lets requests in, and counts them."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, routes: frozenset[str], max_bytes: int) -> None:
        self._app, self._access, self._metrics = app, access, metrics
        self._routes, self._max_bytes = routes, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.perf_counter(), Headers(scope=scope)
        body = _Body(receive, self._max_bytes, waits="expect" in headers)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] != 504:  # the time is over already
                    await body.drain()
                route = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.count_request(route, message["status"], time.perf_counter() - started)
            await send(message)

        if refusal := self._access.refusal(scope["path"], headers):
            await refusal.response()(scope, body, counted)
        else:
            await self._app(scope, body, counted)


class _Body:
    """An upload as it comes; `waits` if the client sends it only once it was asked to."""

    def __init__(self, receive: Receive, max_bytes: int, waits: bool) -> None:
        self._receive, self._left, self._waits, self._whole = receive, max_bytes, waits, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self._waits = False
        self._whole = self._whole or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read what is left of it, within limits."""
        if self._whole or self._waits:
            return
        try:
            async with asyncio.timeout(DRAIN_S):
                while not self._whole and self._left > 0:
                    await self()
        except TimeoutError:
            return


def limited(receive: Receive, max_bytes: int) -> Receive:
    """The body, or a Refusal (413) as soon as it is larger than that."""
    seen = 0

    async def receive_limited() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise too_large(max_bytes)
        return message

    return receive_limited


def too_large(max_bytes: int) -> Refusal:
    """The refusal of an upload over the limit."""
    message = f"the upload is larger than {max_bytes / 1e6:g} MB, the most that is taken here; compress it or cut it into parts"
    return Refusal(413, "file_too_large", message, "file")
