"""The server's description: OpenAPI 3.1, and the same as a page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment

from trimlingual.app.requests import FORMS
from trimlingual.run.version import version

ERRORS = {
    "400": "A field is missing, unknown or not supported, or the recording cannot be read.",
    "401": "The token is missing or wrong.",
    "404": "The model is not the one that is served.",
    "413": "The upload has too many bytes, or the recording is too long.",
    "415": "The body is not multipart/form-data.",
    "429": "Too many translations are under way.",
    "500": "The translation failed.",
    "504": "The translation took too long.",
}

PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ api.info.title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
pre { overflow-x: auto }
</style>
<h1>{{ api.info.title }}</h1><p>{{ api.info.description }} <a href="openapi.json">openapi.json</a></p>
{% for path, methods in api.paths.items() %}{% for method, operation in methods.items() %}
<h2><code>{{ method | upper }} {{ path }}</code></h2><p>{{ operation.summary }}</p>
{% if operation.requestBody %}<table><tr><th>Field<th>Meaning</tr>
{% for name, field in operation.requestBody.content["multipart/form-data"].schema.properties.items() %}
<tr><td><code>{{ name }}</code><td>{{ field.description }}</tr>{% endfor %}</table>{% endif %}
<table><tr><th>Status<th>Meaning</tr>
{% for status, response in operation.responses.items() %}<tr><td>{{ status }}<td>{{ response.description }}</tr>{% endfor %}</table>
{% endfor %}{% endfor %}</html>
""")


def description(translate: Sequence[str], model: str, languages: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI document; `translate` are the paths that translate."""
    schema = {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {"type": "string", "format": "binary", "description": "The recording, with a file name."},
            "model": {"enum": [model], "description": f"{model}, or left out."},
            "language": {
                "enum": list(languages),
                "description": f"The target language: {', '.join(languages)}. Can be left out where there is one.",
            },
            "target_language": {"enum": list(languages), "description": "The same as language."},
            "response_format": {"enum": list(FORMS), "default": "json", "description": f"{', '.join(FORMS)}."},
            "temperature": {"const": 0, "description": "0, or left out: the most probable token is always taken."},
            "prompt": {"const": "", "description": "Empty, or left out: the model has its own prompt."},
        },
    }
    answers = {"200": {"description": "The translation."}} | {
        status: _response(meaning, {"$ref": "#/components/schemas/Error"}) for status, meaning in ERRORS.items()
    }
    translation = {
        "summary": "Translate a recording.",
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}},
        "responses": answers,
    }
    texts = {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")}
    error = {"type": "object", "properties": {"error": {"type": "object", "properties": texts}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "trimlingual", "version": version(), "description": f"Speech translation with {model}."},
        "paths": {path: {"post": translation} for path in translate}
        | {
            "/v1/models": _get("The model that is served, with its target languages."),
            "/health": _get("Whether requests should be sent here: 200, or 503; needs no token."),
            "/metrics": _get("Counts and times, for Prometheus."),
        },
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(api: dict[str, Any]) -> str:
    """The document as HTML."""
    return PAGE.render(api=api)


def _get(summary: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": {"200": {"description": "What was asked for."}}}}


def _response(meaning: str, schema: dict[str, str]) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}
