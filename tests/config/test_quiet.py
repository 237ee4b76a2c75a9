"""What libraries say over fedtune's display is kept back, and no more than that."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import suppress

import pytest

from fedtune.config.quiet import LOGGERS, hushed, quiet_libraries, silence


@pytest.fixture(autouse=True)
def _levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in (*LOGGERS, "chatty")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_advice_on_kernels_is_kept_back_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    quiet_libraries()
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    logging.getLogger("bitsandbytes").error("no memory")
    assert [one.getMessage() for one in caplog.records] == ["no memory"]


def test_a_call_is_hushed_and_no_later_one(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("chatty")
    logger.setLevel(logging.INFO)
    with suppress(ZeroDivisionError), hushed("chatty", warned=False):
        logger.info("a")
        assert warnings.filters[0][0] == "ignore"
        raise ZeroDivisionError
    logger.info("c")
    assert [one.getMessage() for one in caplog.records] == ["c"]


def test_what_is_logged_has_one_form_whatever_a_library_sets_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with warnings.catch_warnings():
        silence()
    logging.basicConfig(format="%(asctime)s:%(levelname)s:%(message)s")  # as opacus does when it is imported
    logging.getLogger("fedtune.any").warning("noise is\nheavy")
    try:
        raise ValueError("a bug")
    except ValueError:
        logging.getLogger("fedtune.any").exception("it failed")
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["note: noise is heavy", "error: it failed", "Traceback (most recent call last):"]
