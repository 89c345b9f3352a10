"""A disk without space: each library says it in words of its own, or hides it; the user hears it in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors has the error's number and words in its text, and so has whatever quotes another error.
TEXTS = ("No space left", "StorageFull", "File too large", "Disk quota exceeded", "os error 28")
# How torch.save ends, whatever kept it from writing; PyTorch's distributed checkpoints quote it. Reading a damaged file ends otherwise.
TORCH_TEXTS = ("unexpected pos", "PytorchStreamWriter failed writing")


class DiskFullError(ValueError):
    """A disk, a quota or a limit on the size of files that was reached; the message says what to do."""


@contextmanager
def explained_disk_full(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises when the disk is full (or a file-size limit is hit) into a DiskFullError that says so."""
    try:
        yield
    except DiskFullError:
        raise
    except BaseException as error:  # PyTorch's CheckpointException is no Exception
        text = str(error)
        known = getattr(error, "errno", None) in CODES or any(words in text for words in TEXTS)
        if known or any(words in text for words in TORCH_TEXTS):
            doubt = "" if known else " (or the disk takes no more for another reason: PyTorch does not tell)"
            raise DiskFullError(
                f"no space left while saving to {folder}{doubt}; free some disk and run again: finished stages and whole "
                "checkpoints are kept"
            ) from error
        raise
