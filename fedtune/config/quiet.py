"""What libraries say over fedtune's display and matters to nobody here: the one place that keeps it back.

Errors of theirs still come through. `quiet_libraries` is for good, and for processes that are fedtune's own
(the command line, a node's worker, a run of the Python API); `hushed` is for one call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

__all__ = ["LOGGERS", "hushed", "quiet_libraries", "silence"]

LOGGERS = {
    "torchao": "which kernels of other machines it could not load, at every import",
    "torch.utils._pytree": "that torchao registers enums in an old way",
    "bitsandbytes": "which kernels could be installed, at its first product",
    "transformers": "advice on its own functions",
}


def quiet_libraries() -> None:
    """Keeps the libraries of `LOGGERS` from saying anything but errors; a second call changes nothing."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which sets the level
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence() -> None:
    """As `quiet_libraries`, and no warning of any library either: for a process that is fedtune's own."""
    quiet_libraries()
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def hushed(name: str, *, warned: bool = True) -> Iterator[None]:
    """Within it the logger `name` says errors only; its level is as before afterwards.

    Args:
        warned: warnings come through.
    """
    logger = logging.getLogger(name)
    level = logger.level
    with warnings.catch_warnings() if not warned else contextlib.nullcontext():
        if not warned:
            warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
