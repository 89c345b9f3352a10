"""Where translations go: standard output, or a folder with one file for each recording and language.

In the folder `translations.json` lists the files that were made, with their hashes: these alone are ever replaced, and only as they
were left. Segments are kept in `translations.partial.jsonl` as they come; a run that was stopped goes on with those that are left.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trimlingual.app.recordings import Given, recordings
from trimlingual.app.segments import Cutting
from trimlingual.app.subtitles import cues, to_srt, to_vtt
from trimlingual.app.translate import App, Key, Segment
from trimlingual.data.audio import DataError
from trimlingual.exports.shipped import SHIPPED_FILE
from trimlingual.models.loading import is_on_hub, resolve_base
from trimlingual.recipe import Recipe
from trimlingual.run.artifacts import alone, append_jsonl, fingerprint, read_journal, write_json, write_text
from trimlingual.run.jsonl import write_jsonl
from trimlingual.run.ownership import why_not_below
from trimlingual.run.progress import say

Format = Literal["json", "text", "srt", "vtt"]
ENDING: dict[Format, str] = {"json": "json", "text": "txt", "srt": "srt", "vtt": "vtt"}
MADE_FILE = "translations.json"
MADE_BY = "made by trimlingual translate"
JOURNAL_FILE = "translations.partial.jsonl"
SHOWN = 5  # places that stayed wrong, of a recording


def rendered(record: dict[str, Any], form: Format) -> str:
    """A record of `translate_files` in this format; ends in a line feed, or is empty."""
    if form == "json":
        return json.dumps(record, ensure_ascii=False) + "\n"
    if form == "text":
        return record["text"] + "\n"
    segments = [(each["start"], each["end"], each["text"]) for each in record.get("segments", []) if each["text"]]
    found = cues(segments, record["language"], record["duration_s"])
    return to_srt(found) if form == "srt" else to_vtt(found)


class OutputFolder:
    """A folder of translations under way.

    `settings` decide what a translation is (model, languages, cutting); unfinished work of other settings is refused unless `force`.
    """

    def __init__(self, folder: Path, form: Format, languages: Sequence[str], settings: dict[str, Any], force: bool):
        self.folder, self.form, self.languages, self.force = folder, form, list(languages), force
        self.settings = settings | {"format": form}
        self.made: dict[str, dict[str, Any]] = _read_made(folder / MADE_FILE)

    def left(self, given: Sequence[Given]) -> list[Given]:
        """The recordings that are not done yet. DataError for two that would be one file, or where a file of the user's stands."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            what = "a link to nothing" if self.folder.is_symlink() else "a file"
            raise DataError(f"{self.folder} is {what}; move it away, or choose another folder (--out-dir)")
        if problem := why_not_below(self.folder):
            raise DataError(problem)
        names: dict[str, str] = {}
        for each in given:
            if other := names.get(each.stem):
                raise DataError(f"{other} and {each.name} would both be written as {each.stem}.*; use two folders")
            names[each.stem] = each.name
        _read_segments(self.folder / JOURNAL_FILE)
        return [each for each in given if not all(self._is_done(each, code) for code in self.languages)]

    def known(self, given: Sequence[Given]) -> dict[Key, Segment]:
        """Segments of an earlier run that was stopped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = self.folder / JOURNAL_FILE
        header, *lines = _read_segments(journal) or [{}]
        now = {"settings": self.settings, "recordings": {each.name: _identity(each.path) for each in given}}
        if not header or self.force:
            write_jsonl(journal, [now])
            return {}
        if header.get("settings") != self.settings:
            raise DataError(
                f"{journal} holds unfinished work of other settings ({len(lines)} segments); finish it with those, choose another "
                "folder, or give --force to begin again"
            )
        same = {name for name, identity in now["recordings"].items() if header["recordings"].get(name) == identity}
        kept = [line for line in lines if line["key"][0] in same]
        found = {tuple(line["key"]): Segment(**line["segment"]) for line in kept}
        write_jsonl(journal, [now, *kept])
        if found:
            say(f"  {len(found)} segments were translated by an earlier run")
        return found

    def remember(self, key: Key, segment: Segment) -> None:
        """Keep a segment, should the run be stopped."""
        append_jsonl(self.folder / JOURNAL_FILE, {"key": list(key), "segment": vars(segment)})

    def write(self, given: Given, record: dict[str, Any]) -> Path:
        """The file of one recording in one language. It is listed first: a kill leaves no file that nobody is known to have made.

        DataError where a file of the user's came there while the command ran.
        """
        path = self._path(given, record["language"])
        text = rendered(record, self.form)
        made = {"sha256": _digest(text.encode()), "of": self._of(given), "faults": len(_faults(record))}
        if digest := self._ours(path):
            made["replaces"] = digest
        self.made[path.name] = made
        write_json(self.folder / MADE_FILE, {MADE_BY: self.made})
        write_text(path, text)
        return path

    def faults(self, done: Sequence[Given]) -> int:
        """Answers that stayed wrong in the files of recordings that are done."""
        names = [self._path(each, code).name for each in done for code in self.languages]
        return sum(self.made[name].get("faults", 0) for name in names)

    def finish(self) -> None:
        """All is done: the segments are not needed any more."""
        (self.folder / JOURNAL_FILE).unlink(missing_ok=True)

    def _path(self, given: Given, code: str) -> Path:
        return self.folder / f"{given.stem}.{code}.{ENDING[self.form]}"

    def _of(self, given: Given) -> dict[str, Any]:
        return {"recording": _identity(given.path), "settings": self.settings}

    def _is_done(self, given: Given, code: str) -> bool:
        path = self._path(given, code)
        digest = self._ours(path)
        if digest is None:
            return False
        made = self.made[path.name]
        if (made["sha256"], made["of"]) == (digest, self._of(given)) and not self.force:
            return True
        if not self.force:
            raise DataError(f"{path} was made from another recording or with other settings; --force makes it again")
        return False

    def _ours(self, path: Path) -> str | None:
        """The hash of a file that this command made, of none nothing. DataError where it is the user's, or changed by them."""
        if not os.path.lexists(path):
            return None
        made = self.made.get(path.name)
        digest = _digest(path.read_bytes()) if path.is_file() else None
        if made is None or digest is None or digest not in (made["sha256"], made.get("replaces")):
            raise DataError(
                f"{path} was not made by this command, or was changed since: move it away, or choose another folder (--out-dir)"
            )
        return digest


def _read_made(path: Path) -> dict[str, dict[str, Any]]:
    """What this command made in a folder, by file name. DataError where a file of the user's has that name."""
    if not os.path.lexists(path):
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[MADE_BY])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_ours(path) from error


def _read_segments(path: Path) -> list[dict[str, Any]]:
    """The journal of segments, its header first. DataError where a file of the user's has that name."""
    if not os.path.lexists(path):
        return []
    if not path.is_file() or not path.read_text(encoding="utf-8", errors="replace").startswith('{"settings": '):
        raise _not_ours(path)
    return read_journal(path)


def _not_ours(path: Path) -> DataError:
    return DataError(
        f"{path} was not made by this command, which would write a file of that name; choose another folder (--out-dir)"
    )


def _identity(path: Path) -> list[int]:
    """Size and time of change of a file; of one that is not there, nothing."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _content(model: str) -> list[list[Any]]:
    """Names, sizes and times of change of a model folder's weights and of how it is asked; nothing of one on the Hub."""
    if is_on_hub(model):
        return []
    folder = resolve_base(model)
    return [[path.name, *_identity(path)] for path in (*sorted(folder.glob("*.safetensors")), folder / SHIPPED_FILE)]


def _asked(recipe: Recipe) -> str:
    """Stands for what a recipe says of how a model is asked."""
    return fingerprint("translate", {"task": recipe.task, "decode": recipe.decode, "dtype": recipe.model.dtype}, {})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def translate_to(
    model: str,
    audio: Sequence[str],
    languages: Sequence[str],
    recipe: Recipe | None,
    device: str,
    cutting: Cutting,
    form: str,
    out_dir: Path | None,
    force: bool,
) -> int:
    """`trimlingual translate`, with its options; returns the exit code.

    So many parameters because they are the command's. Raises ModelError and DataError before anything is translated.
    """
    if form not in ENDING:
        raise DataError(f"--format {form} is unknown; choose one of {', '.join(ENDING)}")
    chosen: Format = form
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        given = recordings(audio, Path(scratch))
        if chosen in ("srt", "vtt") and not out_dir and len(given) * len(languages) > 1:
            raise DataError(
                f"--format {form} of {len(given)} recordings in {len(languages)} language(s) needs --out-dir"
            )
        folder, count = None, Counts()
        if out_dir:
            decide = {
                "model": model,
                "content": _content(model),
                "languages": list(languages),
                "cutting": vars(cutting),
                "recipe": recipe and _asked(recipe),
            }
            opened = partial(OutputFolder, out_dir, chosen, languages, decide, force)
            if opened().left(given):  # which refuses what cannot be, before anything is written
                stack.enter_context(alone(out_dir / MADE_FILE))
            folder = opened()  # as it is now that no other command changes it
            todo = folder.left(given)
            if done := [each for each in given if each not in todo]:
                say(f"  {len(done)} of {len(given)} recordings are done already")
                count.done_before = len(done)
                count.left += folder.faults(done)
            given = todo
        if given:
            app = App(model, languages, recipe, device, cutting)
            known, remember = (folder.known(given), folder.remember) if folder else ({}, None)
            by_name = {each.name: each for each in given}
            for record in app.translate(given, Path(scratch), known, remember):
                count.add(record)
                if "error" in record:
                    say(f"error: {record['error']}")
                elif folder:
                    say(f"  {folder.write(by_name[record['audio']], record)}")
                _tell(record, chosen, languages)
                if not folder:
                    _print(record, chosen, several=len(given) * len(languages) > 1)
            if folder:
                folder.finish()
        say(count.summary())
    return count.exit_code()


@dataclass
class Counts:
    """What happened to recordings and segments."""

    recordings: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    segments: int = 0
    second_tries: Counter[str] = field(default_factory=Counter)
    left: int = 0
    done_before: int = 0  # recordings that an earlier run translated

    def add(self, record: dict[str, Any]) -> None:
        """Take in a record of `translate_files`."""
        (self.failed if "error" in record else self.recordings).add(record["audio"])
        segments = record.get("segments", [])
        self.segments += len(segments)
        self.second_tries.update(segment["second_try"] for segment in segments if "second_try" in segment)
        self.left += len(_faults(record))

    def summary(self) -> str:
        """In a line."""
        text = f"{len(self.recordings)} recording(s), {self.segments} segment(s)"
        if self.failed:
            text += f"; {len(self.failed)} could not be read"
        if self.second_tries:
            tries = ", ".join(f"{count} for {reason}" for reason, count in self.second_tries.items())
            text += f"; second tries: {tries}"
        if self.left:
            text += f"; {self.left} answer(s) stayed wrong"
        return text

    def exit_code(self) -> int:
        """0: all well; 1: no recording could be read; 3: some could not; 4: all could, and an answer stayed wrong."""
        if self.failed:
            return 3 if self.recordings or self.done_before else 1
        return 4 if self.left else 0


def _faults(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The segments of a record whose answer stayed wrong."""
    return [segment for segment in record.get("segments", []) if "fault" in segment]


def _tell(record: dict[str, Any], form: Format, languages: Sequence[str]) -> None:
    """What is odd about a recording and its answers, on standard error: texts and subtitles have no place for it."""
    if form != "json" and record.get("warning") and record["language"] == languages[0]:
        say(f"note: {record['audio']}: {record['warning']}")
    if wrong := _faults(record):
        more = f" and at {len(wrong) - SHOWN} other places" if len(wrong) > SHOWN else ""
        places = ", ".join(f"{each['start']:.1f} s ({each['fault']})" for each in wrong[:SHOWN])
        say(f"note: {record['audio']} ({record['language']}) stayed wrong at {places}{more}")


def _print(record: dict[str, Any], form: Format, several: bool) -> None:
    """A record on standard output; of several texts each under a line that names it."""
    if "error" in record and form != "json":
        return
    if several and form != "json":
        print(f"# {record['audio']} ({record['language']})")
    print(rendered(record, form), end="", flush=True)
