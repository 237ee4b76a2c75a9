"""What studies of many runs share: a run is done once and kept as a record; and how a script ends.

A study's script says which cells there are (a name, and what makes it this run and no other) and what is made
of their records. Here: a finished cell is kept as `RECORDS/NAME.json` and skipped the next time, an
interrupted one goes on from its checkpoint, and a record that was made with other settings is refused, not
mixed in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = ["Cell", "differences", "known", "run_all", "run_cell", "script"]

_LENGTH = 64  # tokens, of `data.max_length` in every study


class Cell(Protocol):
    """One run of a study."""

    @property
    def name(self) -> str:
        """Of its record file and run folder."""

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""


def script(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process: an error of fedtune's is one paragraph, Ctrl-C says how to go on."""
    from fedtune.errors import FedtuneError

    try:
        sys.exit(main())
    except FedtuneError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        sys.exit(130)


def known(words: str, allowed: Sequence[str]) -> list[str]:
    """The words of a comma-separated list. Raises SystemExit if one is not among `allowed`."""
    chosen = words.split(",")
    for word in chosen:
        if word not in allowed:
            raise SystemExit(f"there is no {word!r}; choose from {', '.join(allowed)}")
    return chosen


def run_all(
    cells: Sequence[Cell], records: Path, work: Path, extra: list[str], max_runs: int | None = None
) -> bool:
    """Runs `cells`, at most `max_runs` of them anew; whether all are done. Raises FedtuneError."""
    ran = 0
    for number, cell in enumerate(cells, start=1):
        if max_runs is not None and ran >= max_runs:
            print(f"stopped after {ran} runs; call again to go on")
            return False
        print(f"\n[{number}/{len(cells)}] {cell.name}", flush=True)
        if run_cell(cell, records, work, extra):
            ran += 1
        else:
            print("  done before", flush=True)
    return True


def run_cell(cell: Cell, records: Path, work: Path, extra: list[str]) -> bool:
    """Runs one cell, with the overrides `extra` too, unless its record is there; whether it ran.

    Raises:
        RecordError: its record was made with other settings.
        FedtuneError: as a run does.
    """
    from fedtune.config.loader import load
    from fedtune.errors import RecordError
    from fedtune.runs import record, run

    config = load([*cell.overrides(), *extra])
    path = records / f"{cell.name}.json"
    if path.exists():
        if different := differences(record.read(path)["config"], config):
            raise RecordError(
                f"{path} was made with other settings ({', '.join(different)}), and a study "
                "mixes no settings. Delete it to run it again, or choose another folder with --records."
            )
        return False
    folder = work / cell.name
    if (folder / "checkpoint").exists():
        config = load([f"resume={folder}"])
    else:
        config.output = str(folder)
    _write(record.read(run.run(config)), path)
    return True


def differences(kept: dict[str, Any], config: Config) -> list[str]:
    """Dotted names of the settings in which the run of a record's `kept` was not that of `config`."""
    from fedtune.runs import record

    return _differences(_settings_of(kept), _settings_of(record.clean(dataclasses.asdict(config))))


def _settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share to be the same run: all but where files are, when it was looked at, and what
    it is priced by. What an earlier version did not know is as it is where nobody chooses."""
    from fedtune.config.schema import Config
    from fedtune.runs import record

    shared = {
        name: {**unset, **(config.get(name) or {})} if isinstance(unset, dict) else config.get(name, unset)
        for name, unset in record.clean(dataclasses.asdict(Config())).items()
        if name not in ("output", "resume", "pricing")
    }
    public = shared["public"]
    return shared | {
        "public": {**public, "path": public["path"] and Path(public["path"]).name},
        # What nobody gave is as many as public texts need, which for those of the studies is 64.
        "data": {**shared["data"], "path": None, "max_length": shared["data"]["max_length"] or _LENGTH},
        "federation": {**shared["federation"], "evaluate_every": None},
    }


def _write(finished: dict[str, Any], path: Path) -> None:
    """A study's copy of a record: small, a line for each section, without what no study reads."""
    config = finished["config"]
    config["output"] = config["data"]["path"] = None  # it says nothing to others
    if config.get("public", {}).get("path"):  # records of before have no such group
        config["public"]["path"] = Path(config["public"]["path"]).name
    finished["privacy"].pop("ledger", None)
    sections = (
        f"{json.dumps(name)}: {json.dumps(finished[name], separators=(',', ':'))}" for name in finished
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Dotted names of the settings in which two configurations differ. Null beside false is off."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [_differences(one.get(key), other.get(key), f"{name}.{key}") for key in {**one, **other}]
        return list(itertools.chain.from_iterable(found))
    off = not one and not other and (one is None or other is None)
    return [] if one == other or off else [name.removeprefix(".")]
