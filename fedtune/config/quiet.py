"""What libraries say over fedtune's display and matters to nobody here: the one place that keeps it back.

Errors of theirs still come through. `quiet_libraries` is for good, and for processes that are fedtune's own
(the command line, a node's worker, a run of the Python API); `hushed` is for one call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
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


class _Notes(logging.Handler):
    """Prints what is logged as fedtune's own notes and errors look, to whatever is the error stream then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            kind = "note" if record.levelno < logging.ERROR else "error"
            print(f"{kind}: {' '.join(record.getMessage().split())}", file=sys.stderr)
            if record.exc_info:
                print(logging.Formatter().formatException(record.exc_info), file=sys.stderr)


def silence() -> None:
    """As `quiet_libraries`, and no warning of any library either: for a process that is fedtune's own.

    What is logged has one form: a library (opacus) that sets one up by itself, with dates, comes too late.
    """
    quiet_libraries()
    warnings.simplefilter("ignore")
    logging.basicConfig(handlers=[_Notes()], level=logging.WARNING)


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
