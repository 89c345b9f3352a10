"""A page on this machine: record or upload, hear what one or two models make of it, side by side. Needs `trimlingual[ui]`.

Nothing is sent anywhere: the page is served to this machine alone, its fonts are the system's, and Gradio's statistics are off.
"""

from __future__ import annotations

import html
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from trimlingual.app.outputs import rendered
from trimlingual.app.recordings import recordings
from trimlingual.app.segments import Cutting
from trimlingual.app.translate import App, made_for
from trimlingual.evaluation.cost import peak_memory
from trimlingual.models.loading import pick_device, resolve_base
from trimlingual.recipe.languages import language_name
from trimlingual.report.listening import marked
from trimlingual.run import interruptions
from trimlingual.run.extras import need
from trimlingual.run.lineage import public_name
from trimlingual.run.progress import say

BUILT_IN = "builtin:mini"
SIDES = 2
SYSTEM_FONTS = ("system-ui", "sans-serif")
CSS = """
.said { font-size: 1.25rem; line-height: 1.6; min-height: 3rem; overflow-wrap: anywhere; }
.said mark { border-radius: 3px; background: #ffe08a; color: #1d2026; text-decoration: underline; text-underline-offset: 3px; }
.facts { font-size: .9rem; opacity: .8; }
.warning { font-weight: 600; }
"""


@dataclass(frozen=True)
class Answer:
    """What a model made of a recording, and what that took. `weights` and `rise` are bytes of memory.

    The `first` answer after a model was loaded is slower, and takes more.
    """

    model: str
    first: bool
    record: dict[str, Any]
    seconds: float
    weights: int
    rise: int

    @property
    def facts(self) -> str:
        """Time and memory in a line."""
        duration = self.record.get("duration_s") or 0.0
        speed = f", {duration / self.seconds:.1f} times as fast as speech" if duration else ""
        return (
            f"{self.seconds:.2f} s for {duration:.1f} s{speed}. Memory: {self.weights / 1e6:,.0f} MB of weights and "
            f"{self.rise / 1e6:,.0f} MB more while translating."
            f"{' The first translation after loading is slower.' if self.first else ''}"
        )


class Models:
    """The models of the page by the names they are shown with; each is loaded when it is first asked."""

    def __init__(self, names: Sequence[str], device: str):
        self.device = device
        self.folders = _shown_names(names or [BUILT_IN])
        for name in self.folders.values():
            resolve_base(name)  # what is no model is said before the page is there
        self._loaded: dict[str, App] = {}

    def languages(self) -> list[str]:
        """Those that any of the models was made for, in order."""
        return list(dict.fromkeys(code for name in self.folders.values() for code in made_for(name, self.device)))

    def answer(self, shown: str, audio: str, code: str) -> Answer:
        """Translate a recording of any length. Raises ModelError and DataError for what cannot be used."""
        first = shown not in self._loaded
        app = self._loaded.get(shown) or App(self.folders[shown], self.languages(), None, self.device, Cutting())
        self._loaded[shown] = app
        app.languages = [code]
        device = pick_device(self.device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        with tempfile.TemporaryDirectory() as scratch, peak_memory(device) as peak:
            started = time.perf_counter()
            (record,) = app.translate(recordings([audio], Path(scratch)), Path(scratch))
            seconds = time.perf_counter() - started
        return Answer(shown, first, record, seconds, app.weight_bytes, max(0, peak.num_bytes - before))


def _shown_names(names: Sequence[str]) -> dict[str, str]:
    """Name on the page -> name that was given: a folder's last part, or as much of it as tells it from the others."""
    short = [public_name(name) if len(Path(name).parts) > 1 and Path(name).is_dir() else name for name in names]
    return dict(zip(short if len(set(short)) == len(names) else names, names))


def said(answer: Answer, other: Answer | None) -> str:
    """The translation as HTML, with the words marked that the other model says otherwise."""
    name = f"<h3>{html.escape(answer.model)}</h3>"
    if error := answer.record.get("error"):
        return f'{name}<p class="warning" role="alert">{html.escape(error)}</p>'
    code, text = answer.record["language"], answer.record["text"]
    pieces = marked(text, other.record["text"] if other else text, code)
    shown = "".join(
        f"<mark>{html.escape(piece)}</mark>" if differs else html.escape(piece) for piece, differs in pieces
    )
    notes = [answer.record["warning"]] if answer.record.get("warning") else []
    faults = sum("fault" in segment for segment in answer.record["segments"])
    notes += [f"{faults} segment(s) look wrong: another language, or words again and again"] if faults else []
    warning = "".join(f'<p class="warning">{html.escape(note)}</p>' for note in notes)
    facts = f'<p class="facts">{html.escape(answer.facts)}</p>'
    return f'{name}<p class="said" lang="{code}" dir="auto">{shown}</p>{facts}{warning}'


def subtitles(answer: Answer, folder: Path, stem: str) -> list[str]:
    """SRT and VTT files of the translation in `folder`; none of a recording that could not be read."""
    if "error" in answer.record:
        return []
    found = []
    for form in ("srt", "vtt"):
        path = folder / f"{stem}.{answer.record['language']}.{form}"
        path.write_text(rendered(answer.record, form), encoding="utf-8")
        found.append(str(path))
    return found


def build(models: Models, scratch: Path) -> Any:
    """The page, a Gradio Blocks; subtitles are written below `scratch`."""
    gradio = _gradio()
    names, codes = list(models.folders), models.languages()
    sides = min(SIDES, len(names))
    with gradio.Blocks(title="trimlingual", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown("# trimlingual\nEnglish speech to text in another language, on this machine.")
        with gradio.Row():
            audio = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="Recording",
                elem_id="recording",
                buttons=["download"],
            )
            with gradio.Column():
                code = gradio.Dropdown([(language_name(c) or c, c) for c in codes], value=codes[0], label="Into")
                chosen = [
                    gradio.Dropdown(names, value=names[side], label=f"Model {side + 1}" if sides > 1 else "Model")
                    for side in range(sides)
                ]
                go = gradio.Button("Translate", variant="primary")
        outputs = []
        with gradio.Row():
            for side in range(sides):
                with gradio.Column():
                    outputs.append(gradio.HTML(label=f"Model {side + 1}", elem_id=f"said-{side + 1}"))
                    outputs.append(gradio.File(label="Subtitles", file_count="multiple", interactive=False))

        def translate(audio: str | None, code: str, *chosen: str) -> Iterator[list[Any]]:
            """Each model in turn; the words that differ are marked once both have answered."""
            if not audio:
                raise gradio.Error("Record or upload something first.")
            folder = Path(tempfile.mkdtemp(dir=scratch))
            answers: list[Answer] = []
            for name in chosen:
                try:
                    answers.append(models.answer(name, audio, code))
                except (ValueError, OSError) as error:
                    raise gradio.Error(f"{name}: {error}") from error
                yield _shown(answers, folder, Path(audio).stem, len(chosen))

        go.click(translate, [audio, code, *chosen], outputs, api_name="translate", concurrency_limit=1)
    return page


def _shown(answers: Sequence[Answer], folder: Path, stem: str, sides: int) -> list[Any]:
    """Values of the page's outputs, two for each side."""
    values: list[Any] = []
    for number, answer in enumerate(answers):
        other = next((each for each in answers if each is not answer and "error" not in each.record), None)
        side = folder / str(number + 1)
        side.mkdir(exist_ok=True)
        values += [said(answer, other), subtitles(answer, side, stem)]
    return values + ["<p>…</p>", None] * (sides - len(answers))


def serve(names: Sequence[str], device: str, port: int, open_browser: bool) -> None:
    """Show the page on this machine until it is stopped. Raises MissingExtra without Gradio, ModelError for what is no model."""
    gradio = _gradio()
    models = Models(names, device)
    with tempfile.TemporaryDirectory(prefix="trimlingual-ui-") as scratch:
        page = build(models, Path(scratch))
        theme = gradio.themes.Default(font=SYSTEM_FONTS, font_mono=("ui-monospace", "monospace"))
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            theme=theme,
            css=CSS,
            allowed_paths=[scratch],
            ssr_mode=False,
            run_history=False,
            footer_links=[],
        )
        say(f"{address} shows {', '.join(models.folders)}; Ctrl-C ends it")
        try:
            while not interruptions.asked():
                time.sleep(0.2)
        finally:
            page.close(verbose=False)
    interruptions.check("the page is closed")


def _gradio() -> Any:
    need("ui", "the page")
    import gradio

    return gradio
