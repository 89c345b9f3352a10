"""What a request asks for: the fields of an upload, checked, and the forms of an answer.

Every field of the well-known API is either done or refused with the reason. Nothing that is asked for is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.responses import JSONResponse, PlainTextResponse, Response

from trimlingual.app.outputs import rendered
from trimlingual.app.recordings import SUFFIXES, THROUGH_FFMPEG
from trimlingual.app.refusals import Refusal

FORMS = ("json", "text", "srt", "vtt", "verbose_json")
MEDIA = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
GRANULARITIES = "timestamp_granularities[]"
# Fields with the values that change nothing; any other value asks for what is not done here.
IDLE = {
    "prompt": ("",),
    "stream": ("", "false", "False", "0"),
    GRANULARITIES: ("segment",),
}  # fmt: skip
REASONS = {
    "prompt": "the model is asked with the prompt that it was trained with",
    "stream": "an answer comes as a whole",
    GRANULARITIES: "times are those of segments, not of words",
}
KNOWN = ("file", "model", "language", "target_language", "response_format", "temperature", *IDLE)


@dataclass(frozen=True)
class Asked:
    """A checked request: the upload, its target language, and the form of the answer."""

    file: UploadFile
    language: str
    form: str

    @property
    def filename(self) -> str:
        """The upload's name without folders, for messages."""
        return PurePath((self.file.filename or "").replace("\\", "/")).name[:100] or "file"

    @property
    def suffix(self) -> str:
        """The ending by which a video is told from a sound file; none where it is unknown."""
        ending = PurePath(self.filename).suffix.lower()
        return ending if ending in SUFFIXES + THROUGH_FFMPEG else ""


def checked(form: FormData, model: str, languages: Sequence[str]) -> Asked:
    """What the fields ask for; Refusal for what is missing, unknown or not done here."""
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    for name in form:
        if name not in KNOWN:
            raise _bad(
                "unknown_field", f"the field {name[:100]!r} is unknown; known are {', '.join(KNOWN)}", name[:100]
            )
    for name, value in form.multi_items():
        if name in IDLE and value not in IDLE[name]:
            raise _bad("not_supported", f"{name} is not supported: {REASONS[name]}; leave it out", name)
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise _bad(
            "missing_file", "the field 'file' holds no upload; send the recording there, with a file name", "file"
        )
    if (asked := fields.get("model", model)) != model:
        message = f"the model {asked[:100]!r} is not served here; this is {model!r}"
        raise Refusal(404, "model_not_found", message, "model")
    if not _is_zero(fields.get("temperature", "0")):
        raise _bad("not_supported", "temperature must be 0: the most probable token is always taken", "temperature")
    form_of_answer = fields.get("response_format", "json")
    if form_of_answer not in FORMS:
        message = f"response_format {form_of_answer[:100]!r} is unknown; choose one of {', '.join(FORMS)}"
        raise _bad("invalid_value", message, "response_format")
    return Asked(file, _language(fields, languages), form_of_answer)


def _language(fields: dict[str, str], languages: Sequence[str]) -> str:
    named = {name: fields[name] for name in ("language", "target_language") if fields.get(name)}
    if len(set(named.values())) > 1:
        raise _bad(
            "invalid_value", "language and target_language both name the target language, and differ", "language"
        )
    if not named and len(languages) > 1:
        message = f"name the target language in the field 'language'; it can be {', '.join(languages)}"
        raise _bad("missing_language", message, "language")
    name, code = next(iter(named.items()), ("language", languages[0]))
    if code not in languages:
        message = f"{name} {code[:100]!r} is not served; the target language can be {', '.join(languages)}"
        raise _bad("invalid_value", message, name)
    return code


def _is_zero(text: str) -> bool:
    try:
        return float(text or 0) == 0
    except ValueError:
        return False


def _bad(code: str, message: str, param: str) -> Refusal:
    return Refusal(400, code, message, param)


def answer(record: dict[str, Any], form: str) -> Response:
    """A record of `App.records` in the form that was asked for."""
    if form in MEDIA:
        return PlainTextResponse(rendered(record, form), media_type=MEDIA[form])  # type: ignore[arg-type]
    if form == "json":
        return JSONResponse({key: record[key] for key in ("text", "warning") if key in record})
    segments = [
        {"id": i, "seek": 0, "tokens": [], "temperature": 0.0, **segment}
        for i, segment in enumerate(record["segments"])
    ]
    head = {"task": "translate", "language": record["language"], "duration": record["duration_s"]}
    rest = {key: record[key] for key in ("text", "truncated", "warning") if key in record}
    return JSONResponse(head | rest | {"segments": segments})
