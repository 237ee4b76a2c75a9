"""How long the pages of docs/ take somebody new: their commands, typed as they stand, in a fresh environment.

    python simulations/first_hour/study.py FOLDER setup start     clone and set up there, then type one page
    python simulations/first_hour/study.py FOLDER                 all of them
    python simulations/first_hour/study.py --report               README.md from the records alone

FOLDER gets a clone of this repository at its last commit, the environment that `scripts/setup` makes in it,
state and caches of its own (`FEDTUNE_HOME`), and a folder for each page. `sessions/PAGE.txt` has what is
typed, a command a line:

    COMMAND          as it stands on the page (`tests/test_first_hour.py` compares them)
    COMMAND &        the same, one that does not end by itself; it is ended after the page, or by
    end: COMMAND     Ctrl-C to the first such that still runs
    python N         the page's N-th block of Python
    hand: COMMAND    what the reader does beside the page: fills in a file, reads a line out by telephone; it
                     takes no time here
    left: COMMAND: REASON    on the page, and not typed

A record has each command with its seconds and its exit status. A page that was interrupted goes on where it
was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from fedtune.runs.summary import duration  # noqa: E402
from tests.support.pages import blocks  # noqa: E402

RECORDS, SESSIONS = HERE / "records", HERE / "sessions"
SETUP = "setup"
PAGES = (
    *("start", "own-data", "training", "epsilon", "sweeps", "service", "promises", "how-it-works"),
    *("administrator", "index"),
)


def lines_of(page: str) -> list[str]:
    """The lines of a session."""
    text = (SESSIONS / f"{page}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def type_page(page: str, folder: Path) -> dict[str, Any]:
    """Types a session in `folder`, or what is missing of it, and keeps its record after each command.

    Raises:
        SystemExit: a command ended with another status than 0.
    """
    place = folder / "pages" / page
    place.mkdir(parents=True, exist_ok=True)
    state, path = place / ".typed.json", RECORDS / f"{page}.json"
    done: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {"lines": 0, "at": str(place)}
    record = json.loads(path.read_text()) if done["lines"] else begun(folder)
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        for line in lines_of(page)[done["lines"] :]:
            what, _, rest = line.partition(": ")
            if what == "left":
                command, _, why = rest.rpartition(": ")
                record["left"].append({"command": command, "why": why})
            elif what == "end":
                ended(running.pop([words for words, _ in running].index(f"{rest} &"))[1])
            elif line.endswith(" &"):
                running.append((line, started(line.removesuffix(" &"), done["at"], folder)))
                record["typed"].append({"command": line, "seconds": None, "status": None})
            else:
                hand = what == "hand"
                begin = time.perf_counter()
                status, done["at"] = typed(rest if hand else as_shell(line, page), done["at"], folder)
                seconds = round(time.perf_counter() - begin, 1)
                print(f"{page}: {duration(seconds)}: {line}", flush=True)
                if status:
                    raise SystemExit(f"{page}: status {status}: {line}")
                if not hand:
                    record["typed"].append({"command": line, "seconds": seconds, "status": status})
            done["lines"] += 1
            record["seconds"] = round(sum(one["seconds"] or 0.0 for one in record["typed"]), 1)
            path.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
            state.write_text(json.dumps(done))
    finally:
        for _, process in running:
            ended(process)
    return dict(record)


def ended(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does."""
    process.send_signal(signal.SIGINT)
    process.wait()


def begun(folder: Path) -> dict[str, Any]:
    """A record without commands: when, on what, and how the machine was used beside it."""
    from scripts.benchmarks.common import machine

    measured = machine()
    commit = subprocess.run(
        ["git", "-C", str(folder / "fedtune"), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "machine": {name: measured[name] for name in ("processor", "cores", "instructions", "load_average")},
        "typed": [],
        "left": [],
        "seconds": 0.0,
    }


def as_shell(line: str, page: str) -> str:
    """A line of a session as the shell runs it."""
    if not line.startswith("python ") or not line.split()[1].isdigit():
        return line
    found = [block for block in blocks(ROOT / "docs" / f"{page}.md") if block.language == "python"]
    return f"python - <<'PYTHON'\n{found[int(line.split()[1]) - 1].text}\nPYTHON"


def environment(folder: Path) -> dict[str, str]:
    """What a new user's shell has, without what developers set; and names for those who write sessions."""
    ours = ("FEDTUNE", "HF_", "HYDRA", "PYTHON", "VIRTUAL_ENV")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "HF_HOME": str(folder / "hub"),
        "PATH": f"{folder / 'fedtune' / '.venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "FEDTUNE_HOME": str(folder / "home"),
        "CLONE": str(folder / "fedtune"),
        "PAGES": str(folder / "pages"),
        "SOURCE": str(ROOT),
    }


def typed(command: str, at: str, folder: Path) -> tuple[int, str]:
    """Runs a command in the folder `at`; its exit status, and the folder in which the shell is then."""
    where = folder / "where"
    script = f"{command}\nstatus=$?\npwd >'{where}'\nexit $status\n"
    status = subprocess.run(["bash", "-c", script], cwd=at, env=environment(folder), check=False).returncode
    return status, where.read_text().strip() if where.exists() else at


def started(command: str, at: str, folder: Path) -> subprocess.Popen[bytes]:
    """A command that goes on beside the next ones."""
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=at, env=environment(folder))
    time.sleep(5)
    if process.poll() is not None:
        raise SystemExit(f"It ended at once, with {process.returncode}: {command}")
    return process


def report() -> str:
    """The table of README.md."""
    rows = ["| page | commands | seconds | longest |", "|---|---:|---:|---|"]
    for page in (SETUP, *PAGES):
        if not (path := RECORDS / f"{page}.json").exists():
            continue
        record = json.loads(path.read_text())
        longest = max(record["typed"], key=lambda one: one["seconds"] or 0.0)
        words = longest["command"] if len(longest["command"]) < 60 else longest["command"][:57] + "..."
        rows.append(
            f"| {page} | {len(record['typed'])} | {duration(record['seconds'])} | `{words}` "
            f"{duration(longest['seconds'])} |"
        )
    return "\n".join(rows)


def write() -> None:
    """Puts the table into README.md."""
    path = HERE / "README.md"
    head, _, rest = path.read_text(encoding="utf-8").partition("<!-- table -->")
    tail = rest.partition("<!-- end -->")[2]
    path.write_text(f"{head}<!-- table -->\n{report()}\n<!-- end -->{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Types the commands of docs/ in a fresh environment.")
    parser.add_argument("folder", type=Path, nargs="?", help="new, or where an earlier call left off")
    parser.add_argument("pages", nargs="*", help=f"{SETUP}, {', '.join(PAGES)} (default: all)")
    parser.add_argument("--report", action="store_true", help="type nothing; make README.md")
    options = parser.parse_args()
    if not options.report:
        if options.folder is None:
            parser.error("name a FOLDER")
        folder = options.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        RECORDS.mkdir(exist_ok=True)
        for page in options.pages or (SETUP, *PAGES):
            type_page(page, folder)
    write()


if __name__ == "__main__":
    main()
