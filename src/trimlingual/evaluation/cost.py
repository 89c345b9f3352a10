"""What a model costs: parameters, bytes on disk, memory while running, and time.

Parameters and bytes are stated apart, always: quantisation changes the bytes and not the parameters. Sizes are in
bytes, shown in decimal megabytes and gigabytes; times are wall-clock seconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from trimlingual.models.random_weights import random_weight_bytes
from trimlingual.run.artifacts import ARTIFACT_FILE, WORK_FILE
from trimlingual.run.lineage import LINEAGE_FILE, read_lineage
from trimlingual.run.progress import LOG_FILE

# Beside a model but no part of it: our own records, and what a Hub download leaves.
_NOT_SHIPPED = {ARTIFACT_FILE, WORK_FILE, LOG_FILE, "README.md", ".gitattributes", ".gitignore"}
_NOT_SHIPPED_FOLDERS = {"adapter"}  # the QLoRA adapter, kept beside the model it was merged into
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MeasureError(ValueError):
    """Something that cannot be measured as asked."""


def count_parameters(model: torch.nn.Module) -> int:
    """Logical weights: tied parameters once, a 4-bit weight as the weights it stands for (two of them share a byte)."""
    packed = sum(getattr(module, "num_weights", 0) for module in model.modules())  # which are no parameters
    return packed + sum(_logical_size(parameter) for parameter in model.parameters())


def _logical_size(parameter: torch.nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of a bitsandbytes Params4bit, once it is quantised
    return parameter.numel() if state is None else math.prod(state.shape)


def disk_bytes(folder: Path) -> int:
    """Bytes of every file that must be shipped: weights, configuration, tokenizer.

    Our records, README.md and an adapter that is merged already are left out, and the lists of clips that a run keeps in
    `lineage.json`, which an export replaces by digests.
    Hidden folders (a Hub download's .cache) are left out; links count as what they point to; weights of a rehearsal's base
    model, which are drawn instead of read, count as if they were stored in bfloat16. Raises MeasureError if nothing is left.
    """
    folder = Path(folder)
    shipped = _shipped(folder)
    if not shipped:
        raise MeasureError(f"{folder} holds no file to ship; disk_bytes needs the folder of a saved model")
    return sum(map(_shipped_bytes, shipped)) + random_weight_bytes(folder)


def bytes_beside_weights(folder: Path) -> int:
    """What of a model's `disk_bytes` is not weights."""
    return sum(_shipped_bytes(path) for path in _shipped(folder) if path.suffix != ".safetensors")


def _shipped(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in _NOT_SHIPPED
        and not any(
            part.startswith(".") or part in _NOT_SHIPPED_FOLDERS for part in path.relative_to(folder).parts[:-1]
        )
    ]


def _shipped_bytes(path: Path) -> int:
    if path.name == LINEAGE_FILE:
        return read_lineage(path.parent).bytes_to_ship()
    return path.stat().st_size


class Stopwatch:
    """Wall-clock seconds of a `with` block, the GPU's queue emptied at both ends (CUDA calls return early)."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._started: float | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far, over all blocks timed with this watch."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def __enter__(self) -> Stopwatch:
        self._synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # after a CUDA error, synchronising would raise again and hide it
            self._synchronize()
        self._seconds = self.seconds
        self._started = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(eq=False)
class PeakMemory:
    """The answer of `peak_memory`: `num_bytes` is set when the block ends, `method` says what was read."""

    num_bytes: int = 0
    method: str = ""


_open: list[tuple[torch.device, PeakMemory]] = []  # blocks that have not ended


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[PeakMemory]:
    """Peak memory of a `with` block in bytes; blocks may stand in one another.

    CUDA: the most that PyTorch's allocator had handed out on `device` (weights included, its cached free blocks and the
    CUDA context not). Elsewhere: the process's peak resident set, Linux's VmHWM, reset first by writing 5 to
    /proc/self/clear_refs (proc(5)); where that is forbidden, the peak since the process began, and `method` says so.
    """
    device = torch.device(device)
    for outer_device, outer in _open:  # what it has seen so far is forgotten by the reset
        if outer_device.type == device.type:
            outer.num_bytes = max(outer.num_bytes, peak_bytes(outer_device))
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.method = "torch.cuda.max_memory_allocated"
    else:
        peak.method = "VmHWM of the block" if _reset_high_water_mark() else "peak of the whole process"
    entry = (device, peak)
    _open.append(entry)
    try:
        yield peak
    finally:
        _open.remove(entry)
        peak.num_bytes = max(peak.num_bytes, peak_bytes(device))


def peak_bytes(device: torch.device) -> int:
    """The peak so far inside the innermost `peak_memory` block, in bytes; outside of one, that of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_mark()


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    """Peak resident set in bytes."""
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # "VmHWM:    123456 kB", kB being 1024 bytes
    except OSError:
        pass
    try:
        import resource  # POSIX only
    except ImportError:
        import psutil

        info = psutil.Process().memory_info()
        return getattr(info, "peak_wset", info.rss)  # Windows has the peak; elsewhere what is held now
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed(num_clips: int, num_tokens: int, audio_s: float, wall_s: float) -> dict[str, float]:
    """Rates of turning `num_clips` clips, `audio_s` seconds of audio, into `num_tokens` new tokens in `wall_s` seconds.

    `real_time_factor` is wall time over audio time: below 1 is faster than the speaker. Raises MeasureError for no
    clips, audio or time.
    """
    if num_clips < 1 or audio_s <= 0 or wall_s <= 0 or num_tokens < 0:
        raise MeasureError(
            f"speed of {num_clips} clips, {num_tokens} tokens, {audio_s} s of audio in {wall_s} s is undefined; "
            "clips, audio and time must be more than 0"
        )
    return {
        "seconds_per_clip": wall_s / num_clips,
        "tokens_per_second": num_tokens / wall_s,
        "real_time_factor": wall_s / audio_s,
    }
