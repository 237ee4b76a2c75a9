"""`fedtune budget`: what each data set has spent, what its owner allows, and whether the books are whole.

Each function returns a `Report`: text for a terminal, JSON values for a program, and an exit status. Where
files lie is an argument, printing is the command line's; nothing here changes a ledger but `set_budget`.

Simulations share one ledger (`fedtune.privacy.ledger.simulation`). A node's name (`--node`) selects the
ledger that a real node keeps in the same folder, or else what a simulated node of that name released; a
budget belongs to data and not to a simulated node, so none is set by the name of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import LedgerError
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.ledger.simulation import NAME, ledgers_in
from fedtune.privacy.ledger.state import NamedData

__all__ = ["Report", "find_ledgers", "history", "set_budget", "set_budgets", "show", "verify"]


@dataclass(frozen=True)
class Report:
    """What a command found: for people, for programs, for the shell."""

    text: str
    json: Any
    status: int = 0


def find_ledgers(folder: Path, node: str | None = None) -> tuple[list[Path], str | None]:
    """The ledgers in `folder` to be read for `node`, and the simulated node that alone is meant in them.

    Raises `LedgerError` if `node` is given and neither has a ledger nor released anything in a simulation.
    """
    found = ledgers_in(folder)
    if node is None:
        return [ledger.path for ledger in found], None
    for ledger in found:
        if ledger.path.stem == node:
            return [ledger.path], None
    released = {release.node for ledger in found if ledger.path.stem == NAME for release in ledger.releases()}
    if node in released:
        return [folder / f"{NAME}.sqlite"], node
    known = sorted(released | {ledger.path.stem for ledger in found} - {NAME})
    raise LedgerError(
        f"There is no ledger of node '{node}' in {folder}, and no simulated node of that name has released "
        f"anything. Known nodes: {', '.join(known) or 'none'}."
    )


def show(paths: list[Path], dataset: str | None = None, node: str | None = None) -> Report:
    """What each data set has spent, and of how much.

    JSON: a list of {dataset, fingerprint, epsilon, delta, budget_epsilon, releases, unfinished, node, nodes,
    unit, public}, one for each set of records that was released from under one name. `fingerprint` is the
    ledger's own keyed id of these records, which says nothing to anybody else. `epsilon` is composed over all
    releases of any of them, whatever they were called: the worst over its records and persons; null where one
    had no noise. `budget_epsilon` is null where the owner has set none, `node` where there are several.
    """
    entries = [entry for path in paths for entry in _entries(PrivacyLedger(path), node)]
    known = {str(entry["dataset"]) for entry in entries}
    if dataset is not None:
        entries = [entry for entry in entries if entry["dataset"] == dataset]
    if not entries:
        what = f" of '{dataset}'" if dataset else ""
        return Report(f"No ledger knows of a release{what} yet, and no budget is set.{_others(known)}", [])
    header = ("node", "data set", "fingerprint", "unit", "epsilon", "budget", "delta", "releases")
    lines = [
        (
            _nodes(entry["nodes"]),
            entry["dataset"],
            (entry["fingerprint"] or "-")[:12],
            entry["unit"] or "-",
            "public" if entry["public"] else _number(entry["epsilon"]),
            "none" if entry["budget_epsilon"] is None else _number(entry["budget_epsilon"]),
            "-" if entry["delta"] is None else f"{entry['delta']:.2e}",
            str(entry["releases"]) + (f" ({entry['unfinished']} unfinished)" if entry["unfinished"] else ""),
        )
        for entry in entries
    ]
    note = (
        "Epsilon is an upper bound for whichever record or person of the data has spent most, over all its "
        "releases under any name and cut, for one unit added or removed (a client: all that it holds "
        "replaced by nothing), at the delta beside it. Over one run, fixed in advance, it is that of its "
        "privacy loss distribution; over several, chosen one after another, the Renyi number, which is "
        "larger. Unfinished releases count as spent."
    )
    return Report(_table([header, *lines]) + "\n\n" + note, entries)


def set_budget(
    path: Path, *, epsilon: float, delta: float, dataset: str | None = None, unit: str | None = None
) -> Report:
    """Sets the owner's budget in the file beside the ledger at `path`."""
    budget = PrivacyBudget(epsilon, delta, unit)
    ledger = PrivacyLedger(path)
    ledger.set_budget(budget, dataset=dataset)
    entries = _entries(ledger, None)
    over = [
        entry for entry in entries if (dataset is None or entry["dataset"] == dataset) and _is_over(entry)
    ]
    ledger.close()
    where = "Every simulation" if path.stem == NAME else f"Node '{path.stem}'"
    whose = f"'{dataset}'" if dataset else "every data set without a budget of its own"
    asked = f", protecting every {unit}" if unit else ""
    text = f"{where}: {whose} may spend epsilon {epsilon:g} at delta {delta:g}{asked}, in all, ever."
    known = {str(entry["dataset"]) for entry in entries if entry["releases"]}
    if dataset is not None and known and dataset not in known:
        text += f"\nNo release of {dataset!r} is known yet.{_others(known)}"
    for name in dict.fromkeys(str(entry["dataset"]) for entry in over):
        spent = [entry["epsilon"] for entry in over if entry["dataset"] == name]
        most = "infinite" if None in spent else f"{max(spent):.4g}"
        (holds, at), *_ = [(e["budget_epsilon"], e["delta"]) for e in over if e["dataset"] == name]
        text += (
            f"\nWarning: {name!r} has spent epsilon {most} at delta {at:g} already, more than its budget of "
            f"{holds:g}: no run may use it any more. What was released cannot be taken back."
        )
    spent_already = sorted({str(entry["dataset"]) for entry in over})
    return Report(text, {"node": path.stem, "dataset": dataset, **budget.to_json(), "over": spent_already})


def history(paths: list[Path], dataset: str | None = None, node: str | None = None) -> Report:
    """Every release, oldest first, with what it was. JSON: a list of objects."""
    entries = []
    for path in paths:
        for release in PrivacyLedger(path).releases(dataset=dataset, node=node):
            steps = release.steps
            entries.append(
                {
                    "node": release.node,
                    "row": release.seq,
                    "time": release.time,
                    "run": release.run,
                    "round": release.round,
                    "dataset": release.dataset,
                    "fingerprint": release.fingerprint,
                    "public": release.public,
                    "trust": release.trust,
                    "unit": release.unit,
                    "delta": release.delta or None,
                    "purpose": release.purpose,
                    "steps": sum(count for _, count in steps) if steps else None,
                    "sample_rate": steps[0][0].sample_rate if steps else None,
                    "noise_multiplier": steps[0][0].noise_multiplier if steps else 0.0,
                    "reproducible_noise": release.reproducible_noise,
                    "finished": release.committed,
                }
            )
    if not entries:
        known = {release.dataset for path in paths for release in PrivacyLedger(path).releases(node=node)}
        what = f" of '{dataset}'" if dataset else ""
        return Report(f"No ledger knows of a release{what} yet.{_others(known)}", [])
    header = ("time", "node", "run", "round", "data set", "unit", "for", "steps", "rate", "noise", "finished")
    lines = [
        (
            str(entry["time"])[:19],
            str(entry["node"]),
            str(entry["run"])[:20],
            str(entry["round"]),
            str(entry["dataset"]),
            str(entry["unit"]),
            str(entry["purpose"]),
            "-" if entry["steps"] is None else str(entry["steps"]),
            "-" if entry["sample_rate"] is None else f"{entry['sample_rate']:g}",
            _noise(entry),
            "yes" if entry["finished"] else "no",
        )
        for entry in entries
    ]
    return Report(_table([header, *lines]), entries)


def verify(paths: list[Path]) -> Report:
    """Reads every row of every ledger. Status 1 if one was edited, moved or removed; the text names it."""
    results: list[dict[str, Any]] = []
    for path in paths:
        rows, problems = PrivacyLedger(path).verify()
        results.append({"node": path.stem, "path": str(path), "rows": rows, "problems": problems})
    if not results:
        return Report("There is no ledger yet.", [])
    lines = []
    for result in results:
        if result["problems"]:
            lines.append(f"{result['node']}: NOT whole ({result['path']})")
            lines += [f"  {problem}" for problem in result["problems"]]
        else:
            lines.append(f"{result['node']}: whole, {result['rows']} rows")
    return Report("\n".join(lines), results, 1 if any(result["problems"] for result in results) else 0)


def set_budgets(
    folder: Path,
    *,
    epsilon: float,
    delta: float,
    node: str | None = None,
    dataset: str | None = None,
    unit: str | None = None,
) -> Report:
    """Sets a budget in the ledgers of `folder`.

    Args:
        folder: where ledgers lie.
        node: whose own ledger, or `simulation` for that of all simulations; None: theirs and every node's.
        dataset: of this data set; None: of all without one of their own.

    Raises:
        PrivacyError: the budget means nothing; no file was touched.
        LedgerError: `node` has no ledger of its own, or `dataset` is no name.
    """
    PrivacyBudget(epsilon, delta, unit)  # refuse before the first file is touched
    if node is not None and (node in ("", ".", "..") or "/" in node or "\\" in node):
        raise LedgerError(f"'{node}' is no name of a node.")
    if dataset == "":
        raise LedgerError(
            "--dataset is an empty text, and no budget was set. Name the data set as data.name does, or "
            "leave --dataset out to set the budget of every data set without its own."
        )
    own = [ledger.path for ledger in ledgers_in(folder) if ledger.path.stem != NAME]
    shared = folder / f"{NAME}.sqlite"
    paths = [shared, *own] if node is None else [p for p in (shared, *own) if p.stem == node]
    if not paths:
        known = f" Nodes with one: {', '.join(path.stem for path in own)}." if own else ""
        raise LedgerError(
            f"Node {node!r} has no ledger of its own in {folder}, and no budget was set. Simulated nodes "
            "share one, in which a budget belongs to data, whichever node holds it: '--node "
            f"{NAME}' sets it there, --dataset for one data set alone.{known} A site's own is set in its "
            "node.yaml."
        )
    reports = [set_budget(p, epsilon=epsilon, delta=delta, dataset=dataset, unit=unit) for p in paths]
    return Report("\n".join(report.text for report in reports), [report.json for report in reports])


def _is_over(entry: dict[str, Any]) -> bool:
    """Whether what the data has spent is more than the budget that holds for it."""
    budget = entry["budget_epsilon"]
    if budget is None or entry["public"]:
        return False
    return entry["epsilon"] is None or bool(entry["epsilon"] > budget)


def _entries(ledger: PrivacyLedger, node: str | None) -> list[dict[str, Any]]:
    state = ledger.state()
    budgets = ledger.budgets()
    unfinished: dict[NamedData, int] = {}
    public: dict[NamedData, bool] = {}
    for release in ledger.releases():
        body = NamedData(release.dataset, release.fingerprint)
        unfinished[body] = unfinished.get(body, 0) + (not release.committed)
        public[body] = public.get(body, True) and release.public
    entries = []
    for body, count in sorted(state.releases.items()):
        nodes = sorted(state.nodes[body])
        if node is not None and node not in nodes:
            continue
        account = ledger.account(dataset=body.dataset, fingerprint=body.fingerprint)
        found = budgets.of(account.names)
        budget = found[0] if found else None
        delta = budget.delta if budget else account.smallest_delta
        epsilon = ledger.epsilon(dataset=body.dataset, fingerprint=body.fingerprint, delta=delta)
        entries.append(
            {
                "dataset": body.dataset,
                "fingerprint": body.fingerprint,
                "epsilon": epsilon if math.isfinite(epsilon) else None,
                "delta": delta,
                "budget_epsilon": budget.epsilon if budget else None,
                "releases": count,
                "unfinished": unfinished[body],
                "node": nodes[0] if len(nodes) == 1 else None,
                "nodes": nodes,
                "unit": account.unit(),
                "public": public[body],
            }
        )
    known = {body.dataset for body in state.releases}
    whose = [] if ledger.path.stem == NAME else [state.node or ledger.path.stem]
    for name, budget in sorted(budgets.datasets.items()):
        if name not in known:
            entries.append(
                {
                    "dataset": name,
                    "fingerprint": None,
                    "epsilon": 0.0,
                    "delta": budget.delta,
                    "budget_epsilon": budget.epsilon,
                    "releases": 0,
                    "unfinished": 0,
                    "node": whose[0] if whose else None,
                    "nodes": whose,
                    "unit": budget.unit,
                    "public": False,
                }
            )
    return entries


def _others(known: Iterable[str]) -> str:
    """The data sets that are known, in a sentence; empty if there are none."""
    named = sorted(known)
    return f" Known data sets: {', '.join(named)}." if named else ""


def _nodes(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{len(names)} nodes"


def _noise(entry: dict[str, Any]) -> str:
    if entry["reproducible_noise"]:
        return "seed's"  # which counts as none
    return f"{entry['noise_multiplier']:.4g}" if entry["noise_multiplier"] else "none"


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3f}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
