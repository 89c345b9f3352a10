"""A headless Chromium for tests of pages. Where there is none (or no Playwright to drive it), these tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, DESK = {"width": 390, "height": 800}, {"width": 1280, "height": 900}


@contextmanager
def chromium(*more: str) -> Iterator[Any]:
    """Playwright's browser object, of a Chromium with these arguments besides."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", *more]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, **settings: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page, and the list that its errors and its requests to anywhere else are added to."""
    context = browser.new_context(**settings)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    here = url.split("?")[0].rsplit("/", 1)[0]
    page.on(
        "request",
        lambda request: None if request.url.startswith((here, "data:", "blob:")) else wrong.append(request.url),
    )
    page.goto(url)
    yield page, wrong
    context.close()
