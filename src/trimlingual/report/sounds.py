"""Sound for the page: inside it as long as it is small, in files beside it beyond that."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import soundfile

MAX_INLINE_BYTES = 15_000_000  # of sound inside the page, which takes 4/3 of that as text
FOLDER = "audio"  # beside the page, for the rest
# What browsers play, and is small already. Anything else that can be read becomes MP3, which every browser plays.
TYPES = {".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".opus": "audio/ogg", ".m4a": "audio/mp4", ".webm": "audio/webm"}


class Sounds:
    """The page's sounds. `num_files` counts those that did not go into the page, but into files of `out_dir`/audio."""

    def __init__(self, out_dir: Path, limit_bytes: int = MAX_INLINE_BYTES):
        self.out_dir, self.limit_bytes = out_dir, limit_bytes
        self.num_inline = self.num_files = self.inline_bytes = 0

    def add(self, name: str | None, folder: Path) -> tuple[str | None, str]:
        """What a player of this clip plays (a data URI or a relative path), or None and why not.

        `name` is the clip's in its manifest, relative to the manifest's `folder` or absolute.
        """
        if not name:
            return None, "no audio file is named for this clip"
        path = folder / name  # an absolute name stays absolute
        if not path.is_file():
            return None, "the audio file is not on this machine"
        try:
            suffix, content = _small(path)
        except soundfile.LibsndfileError:
            return None, f"the audio file cannot be read as {path.suffix or 'sound'}"
        if self.inline_bytes + len(content) <= self.limit_bytes:
            self.num_inline += 1
            self.inline_bytes += len(content)
            return f"data:{TYPES[suffix]};base64,{base64.b64encode(content).decode('ascii')}", ""
        self.num_files += 1
        beside = self.out_dir / FOLDER / f"{self.num_files:05}{suffix}"
        beside.parent.mkdir(exist_ok=True)
        beside.write_bytes(content)
        return f"{FOLDER}/{beside.name}", ""

    @property
    def note(self) -> str:
        """Where the sounds are."""
        if not self.num_files:
            return f"{self.num_inline} sounds are inside this page."
        inside = f"{self.num_inline} sounds are inside this page" if self.num_inline else "No sound is inside this page"
        return (
            f"{inside}, which takes up to {self.limit_bytes / 1e6:.0f} MB; the other {self.num_files} are in the folder "
            f"“{FOLDER}” beside it, which must travel with it."
        )


def _small(path: Path) -> tuple[str, bytes]:
    """Ending and content: the file's own where that is small and can be played, else MP3."""
    if path.suffix.lower() in TYPES:
        return path.suffix.lower(), path.read_bytes()
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    encoded = io.BytesIO()
    # Speech: about 40 kbit per second at 16 kHz, one channel.
    soundfile.write(encoded, samples.mean(axis=1), rate, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)
    return ".mp3", encoded.getvalue()
