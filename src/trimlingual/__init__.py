"""trimlingual: cut speech-translation models, keep the translation."""

import logging
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimlingual.api import compress, evaluate, load_recipe, pareto, translate

# No downloaded code is ever run. The library `kernels` downloads compiled functions from the Hub, and bitsandbytes asks it for some,
# with no setting against it: on a CPU when it is imported, on a Mac's GPU when it computes. Here it is as if `kernels` were not
# installed, unless the program has imported it itself.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

__all__ = ["__version__", "compress", "evaluate", "load_recipe", "pareto", "translate"]


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
