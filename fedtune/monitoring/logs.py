"""Lines of a log, with times: for a person, or one JSON object each.

What a line quotes may come from somebody else (a server, a site, a library), so no line holds what a terminal
would obey. Log rotation is of whoever keeps the stream: journald, the container's log driver.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
from typing import Any

from fedtune.privacy.publication import one_line

__all__ = ["JsonLines", "TextLines", "log_to_stderr", "without_cut_off_requests"]


class JsonLines(logging.Formatter):
    """A record as one JSON object: its message, where that is an object itself, or else as `message`.

    Args:
        part: of the program, which each line names; None: it has one.
    """

    def __init__(self, part: str | None = None) -> None:
        super().__init__()
        self._part = {} if part is None else {"part": part}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), **self._part}
        line |= record.msg if isinstance(record.msg, dict) else {"message": one_line(record.getMessage())}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """`2026-11-30T11:08:00.123+00:00 fedtune node: joined ...`; a traceback below it.

    Args:
        part: of the program, which each line names.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of a traceback."""
        lines = [f"{_time(record)} fedtune {self._part}: {one_line(record.getMessage())}"]
        if record.exc_info:
            lines += [
                line[: len(line) - len(line.lstrip())] + one_line(line)
                for line in self.formatException(record.exc_info).splitlines()
            ]
        return "\n".join(lines)


def log_to_stderr(part: str | None, *, as_json: bool) -> None:
    """Sends this process' log to stderr: what fedtune says, and warnings of the libraries.

    Args:
        part: of the program: `server`, `node`, `worker`; its logger is `fedtune.PART`. None: it has one.
        as_json: one JSON object a line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(part) if as_json or part is None else TextLines(part))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("serve",) if part is None else ("server", "node"):
        logging.getLogger(f"fedtune.{name}").setLevel(logging.INFO)


def _was_not_cut_off(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def without_cut_off_requests() -> None:
    """Keeps out of uvicorn's log the traceback of each request that is cut off when a server ends.

    Who ended it knows, and uvicorn says in one line how many there were. To be called when uvicorn's
    configuration was made.
    """
    logging.getLogger("uvicorn.error").addFilter(_was_not_cut_off)


def _time(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
