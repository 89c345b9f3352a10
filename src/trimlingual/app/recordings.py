"""What `translate` is given: files, folders, patterns, standard input, videos."""

from __future__ import annotations

import glob
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimlingual.data.audio import SAMPLE_RATE, DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")
THROUGH_FFMPEG = (".mp4", ".m4a", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".aac", ".wma", ".3gp")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,aac,asf"  # ffmpeg's names of the formats of such files
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Given:
    """One recording: the name that the user gave it, and its file."""

    name: str
    path: Path

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


def readable(given: Given, scratch: Path, longest_s: float = math.inf) -> Path:
    """A file that libsndfile reads: the recording's own or, of a video, its sound as ffmpeg decodes it into `scratch`.

    Of a video that is longer than `longest_s` seconds a little more than that is decoded, so that it still counts as too long.
    Raises DataError where ffmpeg is needed and missing, or fails.
    """
    if given.path.suffix.lower() not in THROUGH_FFMPEG or not given.path.is_file():
        return given.path
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise DataError(
            f"{given.name} needs ffmpeg, which is not installed here: install it, or convert the sound to WAV or FLAC"
        )
    sound = scratch / "sound.wav"
    # A playlist that is named as a video would have ffmpeg open other files and addresses.
    only = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    words = [
        ffmpeg,
        "-nostdin",
        "-v",
        "error",
        "-y",
        *only,
        "-i",
        str(given.path),
        "-vn",
        "-ac",
        "1",
        "-ar",
        str(SAMPLE_RATE),
    ]
    if math.isfinite(longest_s):
        words += ["-t", str(longest_s + 1)]
    done = subprocess.run([*words, "-c:a", "pcm_s16le", str(sound)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"ffmpeg cannot decode {given.name}: {reason}")
    return sound
