"""trimlingual: cut speech-translation models, keep the translation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("trimlingual")
except PackageNotFoundError:  # a source tree put on sys.path without installing
    __version__ = "0+unknown"
