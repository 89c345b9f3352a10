"""The page of `trimlingual ui`, as a process of its own: asked over a real socket, and used in a browser with a real recording.

Gradio is an extra; `make test-ui` has an environment with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import trimlingual
from trimlingual.app.page import Answer, Models, build, said, subtitles
from trimlingual.data.audio import SAMPLE_RATE, load_audio
from trimlingual.models.errors import ModelError
from trimlingual.run.extras import MissingExtra

from .browser import DESK, PHONE, chromium, opened

MINI = Path(trimlingual.__file__).parent / "mini"
CLIP = MINI / "data" / "test" / "0000.ogg"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs Gradio: pip install 'trimlingual[ui]'")


def answer(text: str, code: str = "de", **record) -> Answer:
    segments = [{"start": 0.0, "end": 2.0, "text": text}]
    return Answer(
        "small",
        False,
        {"language": code, "text": text, "segments": segments, "duration_s": 2.0, **record},
        0.5,
        8e6,
        1e6,
    )


def test_words_that_differ_are_marked_and_text_is_escaped():
    shown = said(answer("Das <b>ist</b> gut"), answer("Das war gut"))
    assert "Das <mark>&lt;b&gt;ist&lt;/b&gt;</mark> gut" in shown
    assert "0.50 s for 2.0 s, 4.0 times as fast as speech. Memory: 8 MB of weights and 1 MB more" in shown
    assert "<mark>" not in said(answer("Das ist gut"), None)
    assert "第<mark>一</mark>层" in said(answer("第一层", "zh"), answer("第二层", "zh"))
    assert 'role="alert">no &lt;sound&gt;' in said(answer("", error="no <sound>"), None)
    assert "look wrong" in said(
        answer("x", segments=[{"start": 0, "end": 1, "text": "x", "fault": "wrong language"}]), None
    )


def test_subtitles_are_files(tmp_path):
    srt, vtt = (Path(path) for path in subtitles(answer("Hallo."), tmp_path, "talk"))
    assert srt.read_text(encoding="utf-8") == "1\n00:00:00,000 --> 00:00:02,000\nHallo.\n\n"
    assert vtt.name == "talk.de.vtt"
    assert subtitles(answer("", error="no sound"), tmp_path, "talk") == []


def test_what_is_no_model_is_said_before_the_page_is_there(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        Models([str(tmp_path / "nothing")], "cpu")


@pytest.mark.skipif(find_spec("gradio") is not None, reason="Gradio is installed")
def test_a_missing_extra_names_its_install_line(tmp_path):
    with pytest.raises(MissingExtra, match=re.escape("pip install 'trimlingual[ui]'")):
        build(Models([], "cpu"), tmp_path)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """A running page with the built-in model and a copy of it that says something else; stopped as by Ctrl-C."""
    other = shutil.copytree(MINI / "model", tmp_path_factory.mktemp("models") / "other")
    task = {"target_languages": ["de", "zh"], "prompt": "Translate the English speech into {language}, loudly:"}
    settings = {"format": 1, "task": task, "decode": {"max_new_tokens": 12}, "dtype": "float32"}
    (other / "trimlingual.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "trimlingual",
        "ui",
        "builtin:mini",
        str(other),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < until
                time.sleep(0.3)
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGINT


@needs_gradio
def test_programs_can_ask_it(url):
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    for code in ("de", "zh"):
        one, files, two, _ = client.predict(
            handle_file(str(CLIP)), code, "builtin:mini", "other", api_name="/translate"
        )
        expected = trimlingual.translate("builtin:mini", CLIP, code)[0]["text"]
        assert re.sub(r"<[^>]+>", "", one).startswith(f"builtin:mini{expected}")
        assert "<mark>" in one + two
        assert {Path(file).suffix for file in files} == {".srt", ".vtt"}


@needs_gradio
@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "light"), (PHONE, "dark")])
def test_people_can_use_it(url, viewport, scheme, tmp_path):
    """Upload, translate, read, download; nothing is asked of any other server, and nothing is wider than the page."""
    with chromium() as browser, opened(browser, url, viewport=viewport, color_scheme=scheme) as (page, wrong):
        page.wait_for_selector("input[type=file]", state="attached", timeout=60_000)
        page.set_input_files("input[type=file]", str(CLIP))
        page.wait_for_selector("#recording audio, #recording .waveform-container", state="attached")
        page.get_by_role("button", name="Translate").click()
        page.wait_for_selector("#said-2 .said", timeout=120_000)
        expected = trimlingual.translate("builtin:mini", CLIP, "de")[0]["text"]
        assert page.locator("#said-1 .said").inner_text() == expected
        assert "Memory" in page.locator("#said-2 .facts").inner_text()
        assert page.locator("#said-1 h3").inner_text() == "builtin:mini"
        with page.expect_download() as download:
            page.locator("a[href$='.srt']").first.click()
        download.value.save_as(tmp_path / "got.srt")
        words = " ".join((tmp_path / "got.srt").read_text(encoding="utf-8").split("\n")[2:]).split()
        assert words == expected.split()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [text for text in wrong if "Method not implemented" not in text] == []  # of Gradio's own waveform


@needs_gradio
def test_a_microphone_is_heard(url, tmp_path):
    """Chromium's false microphone hears a clip once, after a second of silence; what is recorded is translated."""
    samples = np.concatenate([np.zeros(SAMPLE_RATE, np.float32), load_audio(CLIP)])
    sf.write(tmp_path / "heard.wav", samples, SAMPLE_RATE, subtype="PCM_16")
    microphone = [
        "--use-fake-ui-for-media-stream",  # nobody is asked whether it may be used
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'heard.wav'}%noloop",
    ]
    with chromium(*microphone) as browser, opened(browser, url, viewport=DESK, permissions=["microphone"]) as (page, _):
        page.get_by_role("button", name="Record audio").click(timeout=60_000)
        page.locator("#recording .record-button").click()
        page.wait_for_timeout(1000 * len(samples) / SAMPLE_RATE + 1000)
        page.locator("#recording .stop-button:visible").click()
        page.wait_for_selector("#recording .waveform-container", state="attached")
        page.wait_for_timeout(1000)  # it is uploaded
        page.get_by_role("button", name="Translate").click()
        page.wait_for_selector("#said-2 .said", timeout=120_000)
        said = page.locator("#said-1 .said").inner_text().split()
        seconds = float(re.search(r"s for ([\d.]+) s", page.locator("#said-1 .facts").inner_text())[1])
    expected = trimlingual.translate("builtin:mini", CLIP, "de")[0]["text"].split()
    # Another sampling rate, and noughts at both ends: not every word is the same.
    assert len(set(said) & set(expected)) > len(set(expected)) / 2, (said, expected)
    assert abs(seconds - len(samples) / SAMPLE_RATE) < 3
