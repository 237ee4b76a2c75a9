"""simulations/mutation/record.json and README.md: what was run, what survived, and why that may be."""

from __future__ import annotations

import ast
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedtune.runs.environment import hardware
from scripts.mutation import operators
from scripts.mutation.runner import MutationRun, Source

__all__ = ["write_page", "write_record"]

_HEAD = """# Mutation testing

Small faults are put into `fedtune/privacy` and `fedtune/training/dp_step.py`, one at a time, and the tests
run: a fault that no test notices has survived. `scripts/mutate` makes this page and `record.json` again; it
is not part of the usual run of CI. What survives is explained in `survivors.yaml`: `equivalent` cannot be
noticed by any test (the program does the same), `accepted` could be, and the line says why it is left.

A verdict belongs to the text of its module: as long as that stays, a mutant that was killed is not run again
(`--again` runs all), so that one page may hold verdicts of several runs and of earlier versions of the tests.
A module that was merged or renamed since has the counts of the files that it was measured as (`measured_as`
in `record.json`); survivors whose line is gone are counted, and not listed.
"""


def write_record(folder: Path, run: MutationRun) -> None:
    """Puts what `run` has found into `record.json`; what is said there of other modules stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {"modules": {}}
    record |= {
        "schema": 1,
        "made_by": "scripts/mutate",
        "tool": "scripts/mutation of this repository, no other tool: a forked process a mutant",
        "operators": ast.get_docstring(ast.parse(Path(operators.__file__).read_text())),
        "python": platform.python_version(),
        "machine": {"processor": hardware()["processor"], "cores": run.cores},
        "tests": run.described,
    }
    record["modules"] |= {source.name: _entry(source, run) for source in run.sources}
    path.write_text(json.dumps(record, indent=1) + "\n")


def write_page(folder: Path, every: Sequence[Source]) -> list[str]:
    """Adds the reasons of `survivors.yaml` to `record.json` and writes README.md.

    Returns what is not explained, or explained and no survivor. A module that has changed since it was
    measured is named as such.
    """
    path = folder / "record.json"
    record = json.loads(path.read_text())
    reasons, used, complaints = _reasons(folder / "survivors.yaml"), set(), []
    modules: dict[str, Any] = {}
    for source in every:
        entry = record["modules"].get(source.name) or {"mutants": len(source.mutants()[1]), "tested": 0}
        modules[source.name] = entry
        if not entry["tested"]:
            continue
        entry["changed_since"] = entry["source"] != source.digest
        for survivor in entry["survivors"]:
            survivor["kind"], survivor["why"] = reasons.get(survivor["mutant"], ("", ""))
            used.add(survivor["mutant"])
            if not survivor["why"]:
                complaints.append(f"not explained: {survivor['mutant']}")
        counted = Counter(s["kind"] for s in entry["survivors"])
        entry |= {kind: counted[kind] for kind in ("equivalent", "accepted")} | {"unexplained": counted[""]}
    complaints += [f"explained, and no survivor: {name}" for name in reasons if name not in used]
    record |= {"modules": modules, "total": _total(modules)}
    path.write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_page(record))
    return complaints


def _reasons(path: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by the mutant's name."""
    found = {}
    for group in yaml.safe_load(path.read_text()) or [] if path.exists() else []:
        (kind,) = group.keys() & {"equivalent", "accepted"}
        for name in group["mutants"]:
            found[name] = (kind, group[kind])
    return found


def _entry(source: Source, run: MutationRun) -> dict[str, Any]:
    every = source.mutants()[1]
    mutants = [m for m in every if m.name in source.verdicts]
    how = Counter(_how(source.verdicts[m.name]) for m in mutants)
    alive = [m for m in mutants if not source.verdicts[m.name]]
    return {
        "source": source.digest,
        "commit": _git("log", "-1", "--format=%h", "--abbrev=10", "--", str(source.path)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "mutants": len(every),
        "tested": len(mutants),
        "killed": len(mutants) - len(alive),
        "of_which_timeout": how["timeout"],
        "of_which_crash": how["crash"],
        "survived": len(alive),
        "not_reached_by_a_test": sum(not run.reaches(m) for m in alive),
        "survivors": [{"mutant": m.name, "line": m.lines.start} for m in alive],
        "tests": run.described,
    }


def _how(verdict: str) -> str:
    return verdict[1 : verdict.index(")")] if verdict.startswith("(") else "test" if verdict else "alive"


def _total(modules: dict[str, Any]) -> dict[str, Any]:
    keys = ("mutants", "tested", "killed", "survived", "equivalent", "accepted", "unexplained")
    total: dict[str, Any] = {k: sum(m.get(k, 0) for m in modules.values()) for k in keys}
    total["killed_share"] = _share(total["killed"], total["tested"])
    total["killed_share_without_equivalent"] = _share(total["killed"], total["tested"] - total["equivalent"])
    total["modules_not_tested"] = [name for name, m in modules.items() if not m["tested"] and m["mutants"]]
    total["modules_changed_since"] = [name for name, m in modules.items() if m.get("changed_since")]
    return total


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _tested(module: dict[str, Any]) -> str:
    whole = module["mutants"] == module["tested"]
    return str(module["tested"]) if whole else f"{module['tested']} of {module['mutants']}"


def _page(record: dict[str, Any]) -> str:
    total = record["total"]
    rows = [
        "| module | mutants | killed | equivalent | accepted | not explained | share | as of, on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, m in record["modules"].items():
        short = name.removeprefix("fedtune.")
        if not m["tested"]:
            rows.append(f"| {short} | {m['mutants']} | not run | | | | | |")
            continue
        changed = " (changed since)" if m["changed_since"] else ""
        rows.append(
            f"| {short}{changed} | {_tested(m)} | {m['killed']} | {m['equivalent']} | {m['accepted']} | "
            f"{m['unexplained']} | {_percent(m['killed'], m['tested'])} | {m['commit']}, {m['date']} |"
        )
    rows.append(
        f"| **all** | {total['tested']} | {total['killed']} | {total['equivalent']} | {total['accepted']} | "
        f"{total['unexplained']} | **{_percent(total['killed'], total['tested'])}** "
        f"({_percent(total['killed'], total['tested'] - total['equivalent'])} without the equivalent) | |"
    )
    missing = []
    if total["modules_not_tested"]:
        missing.append(f"Not run: {', '.join(total['modules_not_tested'])}.")
    if total["modules_changed_since"]:
        missing.append(f"Changed since they were measured: {', '.join(total['modules_changed_since'])}.")
    machine, tests = record["machine"], record["tests"]
    how = (
        f"Tool: {record['tool']}. Python {record['python']}; "
        f"{machine['processor']}, {machine['cores']} cores. "
        f"Tests of the last run: {tests['used']} of {tests['collected']} in {', '.join(tests['folders'])}; "
        f"left out: {tests['left_out']}. An entry in `record.json` names its own, where they were noted."
    )
    return "\n".join(
        [_HEAD, *rows, "", *missing, "", how, "", "## The faults", "", "```", record["operators"], "```", ""]
    )


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
