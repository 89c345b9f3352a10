"""The one reader and the one writer of JSONL: what a text may hold, and what is said of a damaged file."""

from __future__ import annotations

import json

import pytest

from trimlingual.evaluation.results import read_translations
from trimlingual.run.jsonl import JsonlError, read_jsonl, write_jsonl
from trimlingual.stages.distill import DISTILLED_FILE, read_distilled

# Everything at which str.splitlines() splits, and a text beyond the BMP
SEPARATORS = "a\nb\rc\r\nd\x0be\x0cf\x1cg\x1dh\x1ei\x85j\u2028k\u2029l\U0001f600"


def test_every_text_comes_back_as_it_was(tmp_path):
    records = [{"id": "1", "text": SEPARATORS}, {"id": "2", "text": "größer 二"}]
    write_jsonl(tmp_path / "a.jsonl", iter(records))
    assert read_jsonl(tmp_path / "a.jsonl") == records
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_stage_writes_may_hold_any_separator(tmp_path):
    rows = [{"id": "1", "language": "de", "text": SEPARATORS, "hypothesis": SEPARATORS}]
    write_jsonl(tmp_path / DISTILLED_FILE, rows)
    write_jsonl(tmp_path / "translations.de.jsonl", rows)
    assert read_distilled(tmp_path) == read_translations(tmp_path, "de") == rows


def test_a_mark_at_the_start_and_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\r\n\n  \n{"a": 2}', encoding="utf-8")
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b'{"a": 1}\n{"a"', "line 2 is not JSON"),
        (b"[1]\n", "line 1 holds a list, not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JsonlError, match=says) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"a": 1}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "a.jsonl", [{"a": object()}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"a": 1}
