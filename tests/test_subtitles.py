"""Subtitles can be read, and lose nothing of the text."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given as cases
from hypothesis import settings as tried
from hypothesis import strategies as st

from trimlingual.app.subtitles import GAP_S, LINES, LONGEST_S, SHORTEST_S, cues, limits_of, to_srt, to_vtt

LONG = (
    "Gestern haben wir im Labor ein neues Verfahren geprüft, das die Schichten eines Modells einzeln entfernt, und am Ende hat sich "
    "gezeigt, dass die Übersetzung fast gleich gut bleibt. Das freut uns sehr."
)
CHINESE = "昨天我们在实验室里检查了一种新的方法，它一层一层地去掉模型的层，最后发现翻译的质量几乎没有变化。"


@pytest.mark.parametrize(("text", "code"), [(LONG, "de"), (CHINESE, "zh")])
def test_a_long_segment_becomes_several_that_fit(text, code):
    found = cues([(2.0, 16.0, text)], code, 20.0)
    assert len(found) > 1
    assert found[0].start == 2.0
    for cue in found:
        lines = cue.text.split("\n")
        assert len(lines) <= LINES
        assert max(map(len, lines)) <= limits_of(code).line
        assert len(cue.text) / (cue.end - cue.start) < 1.4 * limits_of(code).per_second
    joined = (" " if code == "de" else "").join(cue.text.replace("\n", " " if code == "de" else "") for cue in found)
    assert joined == text


def test_a_subtitle_that_is_too_short_becomes_one_with_its_neighbour():
    (found,) = cues([(0.0, 0.4, "Ja."), (0.7, 1.1, "Nein.")], "de", 9.0)
    assert (found.start, found.end, found.text) == (0.0, pytest.approx(1.1), "Ja.\nNein.")
    (found,) = cues([(0.0, 0.3, "好。"), (0.3, 2.0, "我们" * 12)], "zh", 9.0)
    assert found.text.replace("\n", "") == "好。" + "我们" * 12
    far = cues([(0.0, 0.4, "Ja."), (2.0, 2.4, "Nein.")], "de", 9.0)
    assert [(cue.start, cue.end) for cue in far] == [(0.0, 1.0), (2.0, 3.0)]  # each has the time it needs
    long = cues([(0.0, 0.4, "Ja."), (0.4, 9.0, "Und dann sagen sie lange nichts.")], "de", 9.0)
    assert len(long) == 2  # one would be on the screen for too long
    assert long[1].end - long[1].start <= LONGEST_S


def test_the_next_subtitle_waits_if_it_can():
    """The first needs 2 seconds to be read and has 1.2; the second has time to spare, the third has not."""
    text = "Das sind vierunddreißig Zeichen ..", "Und das hier sind etwas mehr Zeichen, nämlich fünfundfünfzig."
    found = cues([(0.0, 1.2, text[0]), (1.2, 6.5, text[1]), (6.5, 9.0, text[1])], "de", 9.0)
    assert [cue.text.replace("\n", " ") for cue in found] == [text[0], text[1], text[1]]
    assert found[0].end == pytest.approx(2.0)
    assert found[1].start == pytest.approx(2.08)
    assert found[2].start == 6.5
    assert found[2].end == 9.0  # the recording's end, though it takes longer to read


def test_nothing_is_shown_after_the_end():
    assert cues([(1.0, 2.05, "Ja, das ist es.")], "de", 2.0)[0].end == 2.0
    (found,) = cues([(1.0, 30.0, "Vielleicht.")], "de", 60.0)
    assert found.end == 1.0 + LONGEST_S


def test_no_word_stands_alone_that_would_not_have_to():
    text = "Nach der Arbeit zeigt der Student immer unseren großen Freunden unseren Regenschirm."
    assert min(len(cue.text) for cue in cues([(0.0, 7.0, text)], "de", 7.0)) > 30


def test_the_files_are_as_the_formats_want_them():
    found = cues([(0.0, 1.5, "Eins & <zwei>"), (3661.2, 3663.0, "Drei")], "de", 4000.0)
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
    found = cues(given, "de", now)
    assert re.split(r"\s+", " ".join(cue.text for cue in found)) == words
    assert all(cue.end > cue.start for cue in found)
    assert all(first.end <= second.start + 1e-9 for first, second in pairwise(found))
    assert found[-1].end <= now
    assert all(max(map(len, cue.text.split("\n"))) <= limits_of("de").line for cue in found)
    assert all(len(cue.text.split("\n")) <= LINES for cue in found)
    # A subtitle that is too fast or too short has no time left before the next, nor the next one time to spare.
    for first, second in pairwise(found):
        needed = max(SHORTEST_S, len(first.text) / limits_of("de").per_second)
        if first.end - first.start < needed - 1e-9:
            assert second.start - first.end <= GAP_S + 1e-9


@tried(max_examples=200, deadline=None)
@cases(
    st.lists(st.tuples(st.floats(0.1, 3.0), st.integers(1, 80)), min_size=1, max_size=8), st.sampled_from(["de", "zh"])
)
def test_speech_that_leaves_time_for_reading_is_read_in_time(segments, code):
    """Whatever the pauses, each sentence with time enough until the next one is shown for long enough, and not late."""
    now, given = 0.0, []
    for pause, count in segments:
        text = ("wort " * count).strip() if code == "de" else "字" * count
        length = max(SHORTEST_S, (len(text) + 8) / limits_of(code).per_second) + 0.5
        given.append((now, now + length, text))
        now += length + pause
    for cue in cues(given, code, now):
        assert cue.end - cue.start >= min(LONGEST_S, max(SHORTEST_S, len(cue.text) / limits_of(code).per_second)) - 1e-6
