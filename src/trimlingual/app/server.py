"""The HTTP server's routes, over a loaded model.

The routes and fields of a translation are those of the well-known speech API, so that its clients work here: a multipart upload in, the
translation out. Reading an upload is done in a few threads, translating in one (batching.py). One talk at a time is searched for its
pauses, in a thread beside those, so that clips do not wait for talks.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
import numpy as np
import soundfile as sf
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from trimlingual.app.batching import Batcher
from trimlingual.app.gate import Access, Gate, limited, too_large
from trimlingual.app.metrics import Metrics
from trimlingual.app.openapi import description, page
from trimlingual.app.recordings import Given
from trimlingual.app.refusals import Refusal
from trimlingual.app.requests import Asked, answer, checked
from trimlingual.app.translate import App, Heard, Key, Segment
from trimlingual.data.audio import SAMPLE_RATE, TooLongError, stated_s
from trimlingual.run.progress import say

TRANSLATE = ("/v1/audio/translations", "/v1/audio/transcriptions")
READERS = 4  # uploads that are decoded at the same time
FAILURES = 3  # in a row, after which /health tries a translation of its own
MAX_FIELDS, MAX_FIELD_BYTES = 20, 1 << 16

Value = TypeVar("Value")


@dataclass(frozen=True)
class Limits:
    """What a server takes: bytes of an upload, seconds of audio, translations at a time, seconds for each."""

    max_bytes: int
    longest_s: float
    at_once: int
    timeout_s: float


class Server:
    """A model with its routes; `asgi` is the application."""

    def __init__(self, app: App, model: str, limits: Limits, access: Access) -> None:
        self.app, self.model, self.limits = app, model, limits
        self.metrics = Metrics()
        self.batcher = Batcher(app, self.metrics)
        self.in_flight = 0
        self._failures = 0  # translations in a row that ended in an error of this program
        self._trying = asyncio.Lock()
        self._created, self._numbers = int(time.time()), itertools.count(1)
        self._readers, self._cutters = anyio.CapacityLimiter(READERS), anyio.CapacityLimiter(1)
        routes = [
            *(Route(path, self._translate, methods=["POST"]) for path in TRANSLATE),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._metrics_page),
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
        ]
        paths = frozenset(route.path for route in routes)
        self.asgi = Starlette(
            routes=routes,
            middleware=[Middleware(Gate, access, self.metrics, paths, limits.max_bytes)],
            exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _broken},
        )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.in_flight >= self.limits.at_once:
            message = f"{self.in_flight} translations are under way, the most that are taken at a time; ask again later"
            raise Refusal(429, "too_many_requests", message)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def _translate(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise Refusal(415, "unsupported_media_type", "send the fields as multipart/form-data")
        if _declared_length(request) > self.limits.max_bytes:
            raise too_large(self.limits.max_bytes)
        with self._admitted():
            try:
                async with asyncio.timeout(self.limits.timeout_s):
                    answered = await self._answered(request)
            except TimeoutError:
                message = f"not done within {self.limits.timeout_s:g} s, the most that a translation may take here"
                raise Refusal(504, "timeout", message) from None
            except ClientDisconnect:
                raise _gone() from None
            except (Refusal, HTTPException):
                raise
            except Exception:
                self._failures += 1
                raise
        self._failures = 0
        return answered

    async def _answered(self, request: Request) -> Response:
        body = Request(request.scope, limited(request.receive, self.limits.max_bytes))
        async with body.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            asked = checked(form, self.model, self.app.languages)
            with tempfile.TemporaryDirectory(prefix="trimlingual-") as scratch:
                path = Path(scratch) / f"upload{asked.suffix}"
                duration_s = await self._reading(lambda: _write(asked, path), self._readers)
                heard = Heard(Given(f"request {next(self._numbers)}", path), [asked.language])
                try:
                    record = await self._record(request, asked, heard, duration_s <= self.app.max_s)
                finally:
                    heard.given_up = True  # a thread that still reads it, because the time is over, ends
                return answer(record, asked.form)

    async def _record(self, request: Request, asked: Asked, heard: Heard, is_clip: bool) -> dict[str, Any]:
        said = await self._said(heard, is_clip, request.is_disconnected)
        if heard.error:
            message = str(heard.error).replace(heard.given.name, asked.filename)
            if isinstance(heard.error, TooLongError):
                raise Refusal(413, "audio_too_long", message, "file")
            raise Refusal(400, "unreadable_audio", message, "file")
        self.metrics.count_audio(heard.duration_s)
        (record,) = self.app.records(heard, said)
        return record

    async def _said(self, heard: Heard, is_clip: bool, is_gone: Callable[[], Awaitable[bool]]) -> dict[Key, Segment]:
        """The translations of a recording; what is wrong with it is noted in `heard`."""
        said: dict[Key, Segment] = {}
        stream = self.app.pieces(heard, heard.given.path.parent, said)
        limiter = self._readers if is_clip else self._cutters
        # So many at a time: a long talk holds little memory, and others are served between its parts.
        while pieces := await self._reading(lambda: list(itertools.islice(stream, self.app.batch_size)), limiter):
            limiter = self._readers  # a talk is cut before its first segment
            if await is_gone():
                raise _gone()
            for found in await asyncio.gather(*(asyncio.wrap_future(self.batcher.submit(piece)) for piece in pieces)):
                said |= found
        return said

    async def _reading(self, work: Callable[[], Value], limiter: anyio.CapacityLimiter) -> Value:
        return await anyio.to_thread.run_sync(work, limiter=limiter)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model:
            raise Refusal(404, "model_not_found", f"this server has the model {self.model!r} alone", "model")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        about = {"id": self.model, "object": "model", "created": self._created, "owned_by": "trimlingual"}
        return about | {"languages": self.app.languages}

    async def _health(self, request: Request) -> Response:
        """Whether requests should be sent here. After failures a translation is tried, so that health comes back with it."""
        if not self.batcher.is_alive:
            raise Refusal(503, "broken", "the thread that translates has ended; start the server again")
        if self.batcher.busy_s > self.limits.timeout_s:
            message = (
                f"a batch has taken more than {self.limits.timeout_s:g} s; start the server again, should it not end"
            )
            raise Refusal(503, "stuck", message)
        async with self._trying:
            if self._failures >= FAILURES:
                try:
                    async with asyncio.timeout(self.limits.timeout_s):
                        await self._try()
                except Exception as error:
                    say(f"error: a second of noise could not be translated: {type(error).__name__}: {error}")
                    message = f"{self._failures} translations in a row failed, and so did one of noise; the server's log says why"
                    raise Refusal(503, "failing", message) from error
                self._failures = 0
        return JSONResponse({"status": "ok"})

    async def _try(self) -> None:
        """Translate a second of noise, as an upload is translated."""
        with tempfile.TemporaryDirectory(prefix="trimlingual-") as scratch:
            path = Path(scratch) / "noise.wav"
            sf.write(path, np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE), SAMPLE_RATE)
            heard = Heard(Given("noise", path), self.app.languages[:1])
            await self._said(heard, True, _never)
            if heard.error:
                raise heard.error

    async def _metrics_page(self, request: Request) -> Response:
        gauges = {
            "translations_in_flight": (float(self.in_flight), "Translations under way."),
            "segments_waiting": (float(self.batcher.num_waiting), "Segments that no batch has taken yet."),
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(description(TRANSLATE, self.model, self.app.languages))

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(description(TRANSLATE, self.model, self.app.languages)))


async def _never() -> bool:
    return False


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _write(asked: Asked, path: Path) -> float:
    """The upload as a file; returns the seconds that it says it has."""
    with path.open("wb") as file:
        shutil.copyfileobj(asked.file.file, file)
    return stated_s(path)


def _gone() -> Refusal:
    """For the counts alone: nobody reads it."""
    return Refusal(499, "client_gone", "the client has closed the connection")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Of Starlette: no such route or method, or a body that is no form."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_body")
    message = {404: f"there is no route {request.url.path[:100]}; /docs lists them"}.get(
        error.status_code, error.detail
    )
    return Refusal(error.status_code, code, message).response()


async def _broken(request: Request, error: Exception) -> Response:
    return Refusal(500, "internal_error", "the translation failed; the server's log says why").response()
