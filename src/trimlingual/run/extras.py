"""Libraries that only some of the work needs: which extra installs them, and what is said where they are missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

# Extra -> the modules that it brings; tests/test_extras.py compares the names with pyproject.toml.
EXTRAS = {
    "flash": ("flashoptim",),
    "int4-gpu": ("humming",),
    "gguf": ("gguf",),
    "llama": ("xllamacpp",),
    "voxtral": ("mistral_common",),
    "vad": ("silero_vad",),
    "ui": ("gradio",),
    "serve": ("starlette", "uvicorn", "python_multipart"),
}
# What each is good for, as words after its install line.
GIVES = {
    "flash": "full fine-tuning of 7B models in 80 GB",
    "int4-gpu": "faster int4 models on a GPU",
    "gguf": "exports for llama.cpp",
    "llama": "proving exports for llama.cpp, where that is not installed",
    "voxtral": "Mistral's audio models",
    "vad": "long recordings cut at pauses",
    "ui": "the page of `trimlingual ui`",
    "serve": "the server of `trimlingual serve`",
}
FOR_GPUS = ("flash", "int4-gpu")


class MissingExtra(RuntimeError):
    """Work that needs an extra which is not installed."""


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if find_spec(module) is None]


def install_line(extra: str) -> str:
    """The command that installs an extra."""
    assert extra in EXTRAS, extra
    return f"pip install 'trimlingual[{extra}]'"


def library_names(modules: Iterable[str]) -> str:
    """Modules under the names that they are installed by."""
    return ", ".join(module.replace("_", "-") for module in modules)


def need(extra: str, what: str) -> None:
    """MissingExtra with the line that installs it, where `what` cannot be done without it."""
    if modules := missing(extra):
        raise MissingExtra(f"{what} needs {library_names(modules)}, not installed here: {install_line(extra)}")
