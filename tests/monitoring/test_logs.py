"""Lines of a log: with times, for a person or a program, and nothing in them that a terminal would obey."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from fedtune.monitoring.logs import JsonLines, TextLines

CLEAR = "refused: \x1b[2Jnothing\u202e to see\nfedtune node: all is well"


def line(formatter: logging.Formatter, text: str, error: Exception | None = None) -> str:
    record = logging.LogRecord("fedtune.node", logging.INFO, "", 0, text, (), None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    return formatter.format(record)


@pytest.mark.parametrize("formatter", [TextLines("node"), JsonLines("node")], ids=["text", "json"])
def test_what_a_server_said_neither_clears_the_terminal_nor_makes_a_line_of_its_own(
    formatter: logging.Formatter,
) -> None:
    try:
        raise ValueError(CLEAR)
    except ValueError as error:
        for shown in (line(formatter, CLEAR), line(formatter, "it failed", error)):
            assert "nothing" in shown
            assert [one for one in shown if not one.isprintable() and one != "\n"] == []
    shown = line(formatter, CLEAR)
    assert "\n" not in shown
    if isinstance(formatter, JsonLines):  # and whoever reads the field gets no more than was shown
        assert json.loads(shown)["message"].isprintable()


def test_a_line_says_when_and_which_part() -> None:
    assert line(TextLines("node"), "joined").endswith("+00:00 fedtune node: joined")
    found = json.loads(line(JsonLines("node"), "joined"))
    assert found["part"] == "node" and found["message"] == "joined" and found["level"] == "info"
    assert found["time"].endswith("+00:00")
    assert "part" not in json.loads(line(JsonLines(), "joined"))


def test_a_traceback_keeps_its_form() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        shown = line(TextLines("server"), "it failed", error).splitlines()
    assert shown[1] == "Traceback (most recent call last):" and shown[2].startswith("  File ")
    assert shown[-1] == "ValueError: why"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_process_logs_to_stderr(as_json: bool) -> None:
    program = (
        "import logging\nfrom fedtune.monitoring.logs import log_to_stderr\n"
        f"log_to_stderr('server', as_json={as_json})\n"
        "logging.getLogger('fedtune.server').info('it %s', 'runs')\n"
        "logging.getLogger('a.library').info('a detail')\nlogging.getLogger('a.library').warning('a worry')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and done.stdout == ""
    for said, shown in zip(("it runs", "a worry"), lines, strict=True):
        assert json.loads(shown)["message"] == said if as_json else shown.endswith(f"fedtune server: {said}")
