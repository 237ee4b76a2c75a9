"""A submit that goes on by itself: `fedtune submit --detach`, and `fedtune follow` to look at it.

The submit is the run's ServerApp, so it needs a process of its own for as long as the run lasts; here that is
one which no terminal holds. What it would have shown goes to `submit.log` in the run folder, and
`submit.json` says which process it is. `follow` shows the log from its beginning, and new lines as they come,
until the process has ended; its exit status is 0 only if the run succeeded.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from fedtune.config.files import replace_whole
from fedtune.deploy.submit import NOTE, run_number_in
from fedtune.errors import ConfigError, FederationError, ResourceError

__all__ = ["detach", "end_before_it_begins", "follow", "new_folder"]

_LOG, _PROCESS = "submit.log", "submit.json"
_SHOW_SECONDS = 60.0  # to wait for the run to have started, or to wait for its turn
_LOOK_SECONDS = 0.5


def new_folder() -> Path:
    """A run folder as a run without `hydra.run.dir` has it."""
    return Path("outputs") / datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")


def detach(folder: Path, settings: Sequence[str], run_dir: Path) -> tuple[int, str | None]:
    """Starts `fedtune submit` in a process of its own, and waits until its run has started or waits.

    Args:
        folder: of the server.
        settings: as of `fedtune submit`, without the run folder.
        run_dir: the run folder.

    Returns:
        (process id, the server's number of the run: None if it waits for its turn).

    Raises:
        FederationError: it ended at once; the text says why.
        ConfigError: the run of this folder goes on already.
        ResourceError: the folder cannot be written.
    """
    if _process_of(run_dir) is not None:
        raise ConfigError(f"The run in {run_dir} goes on: look at it with `fedtune follow {run_dir}`.")
    where = [] if any(one.startswith("resume=") for one in settings) else [f"hydra.run.dir={run_dir}"]
    command = [sys.executable, "-m", "fedtune.cli.app", "submit", str(folder), *settings, *where]
    before = run_number_in(run_dir / "checkpoint" / NOTE)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / _PROCESS).unlink(missing_ok=True)
        with (run_dir / _LOG).open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        about = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        replace_whole(run_dir / _PROCESS, json.dumps({**about, "server": str(folder)}).encode())
    except OSError as error:
        raise ResourceError(f"{run_dir} cannot be written: {error.strerror}.") from error
    except psutil.NoSuchProcess:
        pass  # it has ended already, and its log says why
    end = time.monotonic() + _SHOW_SECONDS
    while time.monotonic() < end:
        number = run_number_in(run_dir / "checkpoint" / NOTE)
        if number is not None and number != before:
            return process.pid, number
        text = _text(run_dir)
        # A run of seconds may have ended already, all of its sites with it (0) or not (3).
        ended = (run_dir / "record.json").exists()
        if (status := process.poll()) is not None and status != 0 and not ended:
            raise FederationError(f"The run did not start. {_last_paragraph(text)}")
        if "waiting for this run's turn" in text or status is not None:
            return process.pid, None
        time.sleep(_LOOK_SECONDS)
    return process.pid, None


def follow(run_dir: Path, show: Callable[[str], None]) -> bool:
    """Shows what a detached submit has said, and what it says, until it ends.

    Args:
        run_dir: the run folder.
        show: is given pieces of text as they come.

    Returns:
        Whether the run succeeded.

    Raises:
        ConfigError: no detached submit wrote this folder.
    """
    if not (run_dir / _LOG).exists():
        raise ConfigError(
            f"{run_dir} has no {_LOG}: the run was not submitted with --detach from this machine. `fedtune "
            "status DIR` shows the runs of a server, and `fedtune follow DIR RUN` one of them."
        )
    with (run_dir / _LOG).open(encoding="utf-8", errors="replace") as log:
        while True:
            goes_on = _process_of(run_dir) is not None
            if text := log.read():
                show(text)
            elif not goes_on:
                return _succeeded(run_dir)
            else:
                time.sleep(_LOOK_SECONDS)


def end_before_it_begins(run_dir: Path) -> bool:
    """Ends a detached submit that the server has not given a run yet: it loads, or waits for its turn.

    Returns:
        False if there is none, or its run began meanwhile: that one is for the server to stop.
    """
    process = _process_of(run_dir)
    if process is None or run_number_in(run_dir / "checkpoint" / NOTE) is not None:
        return False
    process.terminate()
    process.wait()
    return run_number_in(run_dir / "checkpoint" / NOTE) is None


def _succeeded(run_dir: Path) -> bool:
    """Whether the last submit of a folder left a record; one of a run before it, that it resumed, is none."""
    try:
        began = float(json.loads((run_dir / _PROCESS).read_text())["created"])
        return (run_dir / "record.json").stat().st_mtime > began - 1.0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _process_of(run_dir: Path) -> psutil.Process | None:
    """The process that submits the run of a folder; None if it has ended. A number that another has now is
    not it."""
    try:
        about = json.loads((run_dir / _PROCESS).read_text())
        process = psutil.Process(int(about["pid"]))
        same = abs(process.create_time() - float(about["created"])) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _text(run_dir: Path) -> str:
    return (run_dir / _LOG).read_text(encoding="utf-8", errors="replace")


def _last_paragraph(text: str) -> str:
    return " ".join(text.strip().rsplit("\n\n", 1)[-1].split())[-2000:]
