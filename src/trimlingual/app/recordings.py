"""What `translate` is given: files, folders, patterns, standard input, videos."""

from __future__ import annotations

import glob
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trimlingual.data.audio import SAMPLE_RATE, DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")
THROUGH_FFMPEG = (".mp4", ".m4a", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".aac", ".wma", ".3gp")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,aac,asf"  # ffmpeg's names of the formats of such files
STANDARD_INPUT = "-"
STALLED_S = 60.0  # without a new sample; ffmpeg decodes many times as fast as speech
POLL_S = 0.1


@dataclass(frozen=True)
class Given:
    """One recording: the name that the user gave it, and its file."""

    name: str
    path: Path

    @property
    def shown(self) -> str:
        """What it is called in messages."""
        return "standard input" if self.name == STANDARD_INPUT else self.name

    @property
    def stem(self) -> str:
        """What output files are called."""
        return "stdin" if self.name == STANDARD_INPUT else Path(self.name).stem


def recordings(asked: Sequence[str | Path], scratch: Path) -> list[Given]:
    """Every recording that is meant, in order, each once. `-` is read to its end into the folder `scratch`.

    Of a folder these are the files in it with the name of a sound or video file, of a pattern (`talks/*.wav`) the files that match.
    Raises DataError where a folder or a pattern holds none.
    """
    found: dict[str, Given] = {}
    for each in map(str, asked):
        if each == STANDARD_INPUT:
            path = scratch / "stdin"
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            found[each] = Given(each, path)
            continue
        inside = _inside(each)
        found |= {str(path): Given(str(path), path) for path in inside}
    return list(found.values())


def _inside(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        known = SUFFIXES + THROUGH_FFMPEG
        inside = sorted(each for each in path.iterdir() if each.is_file() and each.suffix.lower() in known)
        if not inside:
            raise DataError(f"{path} is a folder without audio files ({', '.join(known)})")
        return inside
    if not path.exists() and glob.has_magic(name):
        inside = sorted(each for each in map(Path, glob.glob(name, recursive=True)) if each.is_file())
        if not inside:
            raise DataError(f"no file matches {name}")
        return inside
    return [path]


def readable(
    given: Given, scratch: Path, longest_s: float = math.inf, check: Callable[[], None] = lambda: None
) -> tuple[Path, str | None]:
    """A file that libsndfile reads, and what is suspicious about it: the recording's own file or, of a video, its sound as ffmpeg
    decodes it into `scratch`.

    Of a video that is longer than `longest_s` seconds a little more than that is decoded, so that it still counts as too long.
    `check` is called all along; what it raises ends ffmpeg. Raises DataError where ffmpeg is needed and missing, fails, or is stuck.
    """
    if given.path.suffix.lower() not in THROUGH_FFMPEG or not given.path.is_file():
        return given.path, None
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise DataError(
            f"{given.name} needs ffmpeg, which is not installed here: install it, or convert the sound to WAV or FLAC"
        )
    sound, log = scratch / "sound.wav", scratch / "ffmpeg.txt"
    sound.unlink(missing_ok=True)
    # A playlist that is named as a video would have ffmpeg open other files and addresses.
    words = [ffmpeg, "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-y", "-protocol_whitelist", "file"]
    words += ["-format_whitelist", CONTAINERS, "-i", str(given.path), "-vn", "-ac", "1", "-ar", str(SAMPLE_RATE)]
    if math.isfinite(longest_s):
        words += ["-t", str(longest_s + 1)]
    with (
        log.open("wb") as said,
        subprocess.Popen([*words, "-c:a", "pcm_s16le", str(sound)], stdout=said, stderr=said) as process,
    ):
        try:
            code = _wait(process, sound, given.name, check)
        except BaseException:
            process.kill()  # before it is waited for
            raise
    stated_s, trouble = _told(log)
    if code:
        raise DataError(f"ffmpeg cannot decode {given.name}: {trouble or 'no message'}")
    found_s = sound.stat().st_size / 2 / SAMPLE_RATE
    expected_s = min(stated_s, longest_s)
    if found_s < 0.99 * expected_s - 1:
        return sound, f"may be cut short or damaged: ffmpeg decoded {found_s:.1f} of its {expected_s:.1f} s"
    return sound, trouble and f"may be damaged, ffmpeg says: {trouble}"


def _wait(process: subprocess.Popen[bytes], sound: Path, name: str, check: Callable[[], None]) -> int:
    """The exit code of ffmpeg; DataError once it has written nothing for `STALLED_S` seconds."""
    num_bytes, since = 0, time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_S)
        check()
        now = sound.stat().st_size if sound.exists() else 0
        if now != num_bytes:
            num_bytes, since = now, time.monotonic()
        elif time.monotonic() - since > STALLED_S:
            raise DataError(
                f"ffmpeg has decoded nothing of {name} for {STALLED_S:g} s and was ended; convert the sound to WAV or FLAC"
            )


def _told(log: Path) -> tuple[float, str | None]:
    """From what ffmpeg said: the seconds that the file states (none: 0), and the last error."""
    stated_s, trouble = 0.0, None
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := re.search(r"\[info\]\s+Duration: (\d+):(\d+):([\d.]+)", line):
                stated_s = int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
            elif "[error]" in line or "[fatal]" in line:
                trouble = re.sub(r"\[[^\]]*\] ?", "", line).strip()
    return stated_s, trouble
