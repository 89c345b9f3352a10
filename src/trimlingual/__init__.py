"""trimlingual: cut speech-translation models, keep the translation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimlingual.api import compress, evaluate, load_recipe, translate

__all__ = ["__version__", "compress", "evaluate", "load_recipe", "translate"]


def __getattr__(name: str) -> Any:
    """Every name is found when it is first asked for: importing the package imports nothing.

    `__version__` takes a call of git in a source checkout.
    """
    if name == "__version__":
        from trimlingual.run.version import version

        return version()
    if name in __all__:
        from trimlingual import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
