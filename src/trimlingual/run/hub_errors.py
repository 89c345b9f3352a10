"""What the Hub's library raises where the Hub is out of reach, refuses, or answers with something else."""

from __future__ import annotations

from importlib import import_module
from json import JSONDecodeError


def hub_errors() -> tuple[type[Exception], ...]:
    """For an `except` around anything that asks the Hub.

    Some of it is raised by the HTTP library below: httpx2 or httpx, and requests in older versions. A proxy's page instead of JSON is a
    JSONDecodeError, trouble with the Hub's storage (hf-xet) a RuntimeError.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    library = import_module(type(get_session()).__module__.partition(".")[0])
    return (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        OSError,
        JSONDecodeError,
        RuntimeError,
        library.HTTPError,
    )
