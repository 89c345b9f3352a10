"""trimlingual: cut speech-translation models, keep the translation."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__` is found when it is first asked for: in a source checkout that takes a call of git."""
    if name == "__version__":
        from trimlingual.run.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
