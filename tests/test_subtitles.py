"""Subtitles can be read, and lose nothing of the text."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given as cases
from hypothesis import settings as tried
from hypothesis import strategies as st

from trimlingual.app.subtitles import GAP_S, LINES, LONGEST_S, cues, limits_of, to_srt, to_vtt

LONG = (
    "Gestern haben wir im Labor ein neues Verfahren geprüft, das die Schichten eines Modells einzeln entfernt, und am Ende hat sich "
    "gezeigt, dass die Übersetzung fast gleich gut bleibt. Das freut uns sehr."
)
CHINESE = "昨天我们在实验室里检查了一种新的方法，它一层一层地去掉模型的层，最后发现翻译的质量几乎没有变化。"


@pytest.mark.parametrize(("text", "code"), [(LONG, "de"), (CHINESE, "zh")])
def test_a_long_segment_becomes_several_that_fit(text, code):
    found = cues([(2.0, 16.0, text)], code)
    assert len(found) > 1
    assert found[0].start == 2.0
    for cue in found:
        lines = cue.text.split("\n")
        assert len(lines) <= LINES
        assert max(map(len, lines)) <= limits_of(code).line
        assert len(cue.text) / (cue.end - cue.start) < 1.4 * limits_of(code).per_second
    joined = (" " if code == "de" else "").join(cue.text.replace("\n", " " if code == "de" else "") for cue in found)
    assert joined == text


def test_a_short_answer_stays_long_enough_and_no_longer_than_the_next_begins():
    found = cues([(0.0, 0.4, "Ja."), (0.7, 1.1, "Nein."), (5.0, 30.0, "Vielleicht.")], "de")
    assert found[0].end == pytest.approx(0.7 - GAP_S)
    assert found[1].end == pytest.approx(1.7)
    assert found[2].end == pytest.approx(5.0 + LONGEST_S)


def test_the_files_are_as_the_formats_want_them():
    found = cues([(0.0, 1.5, "Eins & <zwei>"), (3661.2, 3663.0, "Drei")], "de")
    assert to_srt(found).split("\n\n")[:2] == [
        "1\n00:00:00,000 --> 00:00:01,500\nEins & <zwei>",
        "2\n01:01:01,200 --> 01:01:03,000\nDrei",
    ]
    assert to_vtt(found).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nEins &amp; &lt;zwei&gt;\n\n")


WORDS = st.lists(st.text(alphabet="abcdefghij.,;äöü", min_size=1, max_size=30), min_size=1, max_size=60)


@tried(max_examples=200, deadline=None)
@cases(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.1, 20.0), WORDS), min_size=1, max_size=6))
def test_no_word_is_lost_and_no_two_are_on_the_screen_at_once(segments):
    now, given, words = 0.0, [], []
    for pause, length, text in segments:
        given.append((now + pause, now + pause + length, " ".join(text)))
        now += pause + length
        words += text
    found = cues(given, "de")
    assert re.split(r"\s+", " ".join(cue.text for cue in found)) == words
    assert all(cue.end > cue.start for cue in found)
    assert all(
        first.end <= second.start + 1e-9 for first, second in pairwise(found) if second.start - first.start > GAP_S
    )
    assert all(max(map(len, cue.text.split("\n"))) <= limits_of("de").line for cue in found)
