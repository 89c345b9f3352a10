"""The server as its users meet it: a process, a socket, the built-in model."""

from __future__ import annotations

import io
import json
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trimlingual.app.translate import translate_files
from trimlingual.data.audio import SAMPLE_RATE

from .damage import mutate_bytes
from .processes import Command
from .serving import BOUNDARY, CLIPS, ROUTE, Running, form

for library in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(library)


UPLOADS = 1000  # mutated ones


def begin(folder: Path, *options: str, **environment: str) -> Running:
    command = Command(["serve", "builtin:mini", "--port", "0", *options], folder, environment=environment)
    command.until(lambda: command.stdout().endswith("\n"))
    return Running(command, json.loads(command.stdout())["url"])


@pytest.fixture
def started(tmp_path):
    """A function that starts a server with other options."""
    running = []

    def start(*options: str, **environment: str) -> Running:
        running.append(begin(tmp_path, *options, **environment))
        return running[-1]

    yield start
    for each in running:
        each.command.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests that change nothing about it; it has to be well at the end."""
    running = begin(tmp_path_factory.mktemp("server"), "--max-mb", "1", "--max-minutes", "0.5")
    yield running
    assert running.ask("GET", "/health").json == {"status": "ok"}
    running.command.send_signal(signal.SIGTERM)
    assert running.command.wait(60) == 0
    assert "Traceback" not in running.command.stderr()


@pytest.fixture(scope="module")
def expected():
    """The clips' own translations, by file and language."""
    return {(r["audio"], r["language"]): r["text"] for r in translate_files("builtin:mini", CLIPS, ["de", "zh"])}


def test_the_forms_of_an_answer(server, expected):
    text = expected[str(CLIPS[0]), "de"]
    assert server.post(CLIPS[0], language="de").json == {"text": text}
    assert server.post(CLIPS[0], path="/v1/audio/transcriptions", target_language="de").json == {"text": text}
    plain = server.post(CLIPS[0], language="de", response_format="text")
    assert plain.body.decode() == text + "\n"
    srt = server.post(CLIPS[0], language="de", response_format="srt").body.decode()
    assert srt.startswith("1\n00:00:00,000 --> ")
    assert " ".join(srt.split("\n")[2:]).strip() == text
    assert server.post(CLIPS[0], language="de", response_format="vtt").body.startswith(b"WEBVTT\n\n00:00:00.000 --> ")
    whole = server.post(CLIPS[0], language="zh", response_format="verbose_json").json
    assert (whole["language"], whole["text"]) == ("zh", expected[str(CLIPS[0]), "zh"])
    assert [segment["text"] for segment in whole["segments"]] == [whole["text"]]
    assert whole["segments"][0]["end"] == pytest.approx(whole["duration"], abs=0.001)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own word on its older route
def test_the_official_client_works_unchanged(server, expected):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)
    text = expected[str(CLIPS[1]), "de"]
    with CLIPS[1].open("rb") as file:
        assert client.audio.transcriptions.create(model="builtin:mini", file=file, language="de").text == text
    found = client.audio.translations.create(
        model="builtin:mini", file=CLIPS[1], temperature=0, extra_body={"language": "de"}
    )
    assert found.text == text
    beginnings = {"text": "", "srt": "1\n00:00:00,000 --> ", "vtt": "WEBVTT\n\n00:00:00.000 --> "}
    for response_format in ("json", "text", "srt", "vtt", "verbose_json"):
        found = client.audio.translations.create(
            model="builtin:mini", file=CLIPS[1], response_format=response_format, extra_body={"language": "de"}
        )
        if beginning := beginnings.get(response_format):
            assert found.startswith(beginning)
        assert getattr(found, "text", found).replace("\n", " ").rstrip().endswith(text)
    whole = client.audio.transcriptions.create(
        model="builtin:mini", file=CLIPS[1], language="de", response_format="verbose_json",
        timestamp_granularities=["segment"],
    )  # fmt: skip
    assert whole.segments[0].text == text
    assert [model.id for model in client.models.list()] == ["builtin:mini"]
    assert client.models.retrieve("builtin:mini").id == "builtin:mini"
    with pytest.raises(openai.BadRequestError, match="name the target language") as refused:
        client.audio.translations.create(model="builtin:mini", file=CLIPS[1])
    assert refused.value.code == "missing_language"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.audio.translations.create(model="whisper-1", file=CLIPS[1])
    with pytest.raises(openai.APIStatusError, match="larger than 1 MB") as refused:
        client.audio.translations.create(model="builtin:mini", file=("a.wav", bytes(3_000_000)))
    assert refused.value.status_code == 413


def test_many_at_once_get_each_their_own(server, expected):
    asked = [(clip, language) for clip in CLIPS for language in ("de", "zh")] * 2
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda each: server.post(each[0], language=each[1]), asked))
    assert [answer.json["text"] for answer in answers] == [expected[str(clip), language] for clip, language in asked]
    metrics = server.ask("GET", "/metrics").body.decode()
    batches = int(metrics.split("\ntrimlingual_batch_segments_count ")[1].split()[0])
    translations = int(metrics.split("\ntrimlingual_translations_total ")[1].split()[0])
    assert translations >= batches + len(asked) / 2  # many shared a batch


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_language"),
        ({"language": "fr"}, "invalid_value"),
        ({"language": "de", "target_language": "zh"}, "invalid_value"),
        ({"language": "de", "model": "whisper-1"}, "model_not_found"),
        ({"language": "de", "response_format": "xml"}, "invalid_value"),
        ({"language": "de", "temperature": "0.7"}, "not_supported"),
        ({"language": "de", "temperature": "nan"}, "not_supported"),
        ({"language": "de", "prompt": "Be brief."}, "not_supported"),
        ({"language": "de", "stream": "true"}, "not_supported"),
        ({"language": "de", "timestamp_granularities[]": "word"}, "not_supported"),
        ({"language": "de", "diarize": "1"}, "unknown_field"),
    ],
)
def test_fields_that_are_refused(server, fields, code):
    answer = server.post(CLIPS[0], **fields)
    assert answer.code == code
    assert answer.status == (404 if code == "model_not_found" else 400)


def test_fields_that_change_nothing(server, expected):
    answer = server.post(CLIPS[0], language="de", prompt="", temperature="0.0", stream="false", model="builtin:mini")
    assert answer.json["text"] == expected[str(CLIPS[0]), "de"]


def noise(seconds: float) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)
    soundfile.write(buffer, samples, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def test_bodies_and_recordings_that_are_refused(server):
    assert (server.ask("POST", ROUTE, b"{}", Content_Type="application/json")).status == 415
    assert server.post(b"", language="de").status == 400
    unread = server.post(b"this is no sound", language="de")
    assert (unread.status, unread.code) == (400, "unreadable_audio")
    assert unread.json["error"]["message"].startswith("clip.ogg is not audio")  # no path of this machine
    cut = server.post(CLIPS[0].read_bytes()[:-100], language="de")
    assert "cut short" in cut.json["error"]["message"]
    long = server.post(noise(31), language="de")
    assert (long.status, long.code) == (413, "audio_too_long")
    for large in (bytes(1_000_001), bytes(20_000_000)):
        answer = server.post(large, language="de")
        assert (answer.status, answer.code) == (413, "file_too_large")
    assert server.ask("POST", ROUTE, form(b"", "a", {}), Content_Type="multipart/form-data").status == 400
    assert server.ask("GET", ROUTE).status == 405
    assert server.ask("GET", "/nothing").code == "not_found"


def test_a_chunked_upload_has_no_length_and_the_same_limit(server):
    def chunks():
        yield form(b"", "a.wav", {"language": "de"}).rpartition(b"\r\n--")[0]
        for _ in range(30):
            yield bytes(100_000)

    answer = server.ask("POST", ROUTE, chunks(), Content_Type=f"multipart/form-data; boundary={BOUNDARY}")
    assert (answer.status, answer.code) == (413, "file_too_large")


def test_silence_has_no_text(server):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(SAMPLE_RATE), SAMPLE_RATE, format="WAV")
    answer = server.post(buffer.getvalue(), language="de")
    assert (answer.status, answer.json["text"]) == (200, "")
    assert "silent" in answer.json["warning"]


def test_the_description_and_its_page(server):
    api = server.ask("GET", "/openapi.json").json
    assert api["openapi"].startswith("3.")
    page = server.ask("GET", "/docs").body.decode()
    assert all(path in page for path in api["paths"])
    assert "http://" not in page
    assert "https://" not in page  # nothing from elsewhere


def test_other_names_for_this_machine_are_refused(server):
    """A page in a browser whose name was pointed here cannot ask."""
    assert server.ask("GET", "/v1/models", Host="evil.example").code == "wrong_host"
    assert server.ask("GET", "/v1/models", Host=f"localhost:{server.port}").status == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_token_is_asked_for(started, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n", encoding="utf-8")
    server = started("--host", "0.0.0.0", "--token-file", str(token), "--to", "de")
    assert server.ask("GET", "/health").status == 200
    for path in ("/v1/models", "/metrics", "/docs"):
        assert server.ask("GET", path).code == "invalid_api_key"
    assert server.ask("GET", "/v1/models", Authorization="Bearer 0123456789abcdeg").status == 401
    assert server.ask("GET", "/v1/models", Authorization="Bearer 0123456789abcdef").json["data"][0]["languages"] == [
        "de"
    ]
    assert server.post(CLIPS[0]).status == 401
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url.replace('0.0.0.0', '127.0.0.1')}/v1", api_key="0123456789abcdef")
    assert client.audio.translations.create(model="builtin:mini", file=CLIPS[0]).text  # one language: not named


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--host", "0.0.0.0"), {}, "a token is needed"),
        (("--host", "::"), {}, "a token is needed"),
        (("--host", "0.0.0.0"), {"TRIMLINGUAL_TOKEN": "short"}, "needs at least 16"),
        (("--to", "xx"), {}, "xx"),
    ],
)
def test_settings_that_no_server_starts_with(start, options, environment, message):
    command = start(["serve", "builtin:mini", "--port", "0", *options], **environment)
    assert command.wait() == 1
    assert message in command.stderr()


def test_too_many_and_too_slow(started):
    server = started("--at-once", "1", "--timeout", "3")
    slow = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    slow.sendall(f"{head}Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode())
    server.command.until(lambda: b"in_flight 1" in server.ask("GET", "/metrics").body)
    answer = server.post(CLIPS[0], language="de")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "too_many_requests", "1")
    slow.settimeout(30)
    assert slow.recv(100).startswith(b"HTTP/1.1 504")
    slow.close()
    assert server.post(CLIPS[0], language="de").status == 200


def talk(minutes: int, channels: int, level: float) -> bytes:
    buffer = io.BytesIO()
    minute = np.random.default_rng(0).normal(0, level, (60 * SAMPLE_RATE, channels))
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, channels, format="FLAC") as file:
        for _ in range(minutes):
            file.write(minute)
    return buffer.getvalue()


def test_clips_do_not_wait_for_talks(started):
    """More talks than there are readers are searched for pauses, which takes seconds, and a clip gets through."""
    pytest.importorskip("silero_vad")
    server = started()
    audio = talk(6, 1, 0.1)
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(server.post, audio, "talk.flac", language="de") for _ in range(6)]
        server.command.until(lambda: b"in_flight 6" in server.ask("GET", "/metrics").body)
        time.sleep(0.5)  # their uploads are written
        assert server.post(CLIPS[0], language="de").status == 200
        assert not any(each.done() for each in asked)
        server.command.kill()
    assert all(each.exception() for each in asked)


def test_reading_ends_with_the_time(started):
    """Long silence is a small upload; its decoding is not to go on once the time is over, nor keep the server from stopping."""
    server = started("--timeout", "1")
    audio = talk(100, 8, 0.0)
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: server.post(audio, "talk.flac", language="de"), range(6)))
    assert {(answer.status, answer.code) for answer in answers} == {(504, "timeout")}
    server.command.send_signal(signal.SIGTERM)
    assert server.command.wait(60) == 0


def test_who_hangs_up_is_not_translated_for(server):
    def metrics() -> str:
        return server.ask("GET", "/metrics").body.decode()

    body = form(CLIPS[0].read_bytes(), "a.ogg", {"language": "de"})
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    for sent in (len(body), len(body) // 2):  # after the upload, and within it
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(head.encode() + body[:sent])
        number = f'{ROUTE}",status="499"}} {1 + (sent < len(body))}'
        server.command.until(lambda number=number: number in metrics(), 20)
    server.command.until(lambda: "trimlingual_translations_in_flight 0" in metrics(), 20)


def test_what_was_begun_is_finished_when_asked_to_stop(started, expected):
    server = started()
    answers = []

    def ask(clip):
        answers.append((clip, server.post(clip, language="de")))

    threads = [threading.Thread(target=ask, args=(clip,)) for clip in CLIPS]
    for thread in threads:
        thread.start()
    server.command.until(lambda: b"in_flight 12" in server.ask("GET", "/metrics").body or len(answers) == 12)
    server.command.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert len(answers) == len(CLIPS)
    assert all(answer.json["text"] == expected[str(clip), "de"] for clip, answer in answers)
    assert server.command.wait(60) == 0
    assert "stopped" in server.command.stderr()


def test_hostile_uploads_never_end_it(server):
    """Damaged recordings, damaged forms and odd names; each gets an answer of ours, and the server goes on."""

    def one(seed: int) -> int:
        rng = random.Random(seed)
        audio = CLIPS[seed % len(CLIPS)].read_bytes()
        kind = seed % 4
        if kind == 0:
            audio = mutate_bytes(rng, audio, 400)
        elif kind == 1:
            audio = mutate_bytes(rng, wav(rng), 60)
        name = rng.choice(["a.ogg", "a.mp4", "../../a.wav", "a" * 500, "\0", "a.raw", "a.mkv", "%s", "ä.wav", ""])
        body = form(audio, name, {"language": rng.choice(["de", "de", "de", "", "\0", "x" * 2000])})
        if kind == 2:
            body = mutate_bytes(rng, body, 300)
        elif kind == 3:
            body = mutate_bytes(rng, body)
        kinds = ["", "; charset=nonsense", "; boundary=other", "; boundary="]
        content = f"multipart/form-data; boundary={BOUNDARY}" + rng.choice([""] * 9 + kinds)
        answer = server.ask("POST", ROUTE, body, Content_Type=content)
        assert answer.status == 200 or answer.code, seed
        assert answer.status < 500, (seed, answer)
        return answer.status

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(one, range(UPLOADS)))
    assert {200, 400} <= set(statuses)
    assert server.command.stderr().count("Traceback") == 0


def wav(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(rng.randrange(1 << 30)).normal(0, 0.1, (2000, rng.choice([1, 2, 8])))
    soundfile.write(buffer, samples, rng.choice([8000, 16000, 44100]), format=rng.choice(["WAV", "FLAC", "AIFF", "AU"]))
    return buffer.getvalue()
