"""The report in a browser: it loads nothing, its players play, its list is searched, filtered and sorted, and it fits a phone."""

from __future__ import annotations

import pytest

from trimlingual.report import sounds, write_report

from .browser import DESK, PHONE, chromium, opened
from .made_run import make_run

PAPER = {"width": 680, "height": 1000}  # what margins leave of A4, in CSS pixels
VISIBLE = "li => li.querySelector('h3').firstChild.textContent.trim()"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """The page of a made run; half of its sounds lie beside it."""
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "run")
    spoken = {"c0": "ganz anders", "c5": "Satz 5"}
    path = run / "evaluations" / "quantized" / "translations.de.jsonl"
    text = path.read_text(encoding="utf-8")
    for clip, said in spoken.items():
        text = text.replace(f"quantized {clip}", said)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sounds.Sounds.__init__, "__defaults__", (12_000,))
        write_report(run, folder / "out")
    assert list((folder / "out" / "audio").iterdir())
    return (folder / "out" / "report.html").as_uri()


def clips(page) -> list[str]:
    """Ids of the clips that are shown, in order."""
    return page.eval_on_selector_all("#clips > li:not([hidden])", f"found => found.map({VISIBLE})")


def test_the_list_is_searched_filtered_and_sorted(browser, url):
    with opened(browser, url, viewport=DESK) as (page, wrong):
        assert clips(page) == [f"c{number}" for number in range(8)]
        page.get_by_label("Search").fill("sentence 3")
        assert clips(page) == ["c3"]
        assert page.locator("#count").inner_text() == "1 of 8 clips"
        page.get_by_label("Search").fill("")
        page.get_by_label("Language").select_option("de")
        assert page.locator("#clips .line:visible").count() == 8
        page.get_by_label("Sort").select_option("best")
        assert clips(page)[0] == "c5"
        page.get_by_label("Sort").select_option("worst")
        assert clips(page)[-1] == "c5"
        page.get_by_label("Show").select_option("cut")
        assert clips(page) == ["c0"]
        page.get_by_label("Show").select_option("")
        page.get_by_label("Sort").select_option("order")
        assert clips(page) == [f"c{number}" for number in range(8)]
        assert wrong == []


def test_the_players_play_one_at_a_time(browser, url):
    with opened(browser, url, viewport=DESK) as (page, wrong):
        for index in range(8):  # Ogg and MP3, inside the page and beside it
            player = page.locator("audio").nth(index)
            played = "player => player.play().then(() => new Promise(done => { player.onended = () => done(player.duration); }))"
            assert player.evaluate(played) == pytest.approx(0.25, abs=0.1)
        both = """() => {
            const [a, b] = document.querySelectorAll("audio");
            a.loop = true;
            return a.play().then(() => b.play()).then(() => a.paused);
        }"""
        assert page.evaluate(both) is True
        assert wrong == []


@pytest.mark.parametrize(("viewport", "scheme"), [(PHONE, "dark"), (PHONE, "light"), (DESK, "dark"), (DESK, "light")])
def test_it_fits_and_can_be_read(browser, url, viewport, scheme):
    """No sideways scrolling of the page, and text that stands out from the ground by WCAG's 4.5 to 1."""
    with opened(browser, url, viewport=viewport, color_scheme=scheme) as (page, wrong):
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        pairs = {"body": "body", ".lead": "body", ".caption": "body", "mark": "mark", ".kind": "body"}
        for text, ground in pairs.items():
            ink, paper = (page.eval_on_selector(name, f"e => getComputedStyle(e).{kind}")
                          for name, kind in ((text, "color"), (ground, "backgroundColor")))  # fmt: skip
            assert contrast(ink, paper) >= 4.5, (text, ink, paper)
        assert wrong == []


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_everything_is_reached_by_keyboard_and_printed(browser, url):
    with opened(browser, url, viewport=DESK) as (page, wrong):
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.name || document.activeElement.tagName.toLowerCase()"))
        assert {"a", "search", "language", "filter", "sort", "audio", "summary"} <= reached
        page.emulate_media(media="print")
        assert not page.locator(".controls").is_visible()
        assert page.pdf()[:5] == b"%PDF-"
        page.set_viewport_size(PAPER)
        beyond = "found => found.filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.textContent)"
        assert page.eval_on_selector_all("td, th, pre, figure, svg", beyond) == []
        assert wrong == []


def test_without_scripts_the_list_is_whole(browser, url):
    with opened(browser, url, viewport=DESK, java_script_enabled=False) as (page, _):
        assert page.locator("#clips > li").count() == 8
        assert not page.get_by_label("Search").is_visible()
