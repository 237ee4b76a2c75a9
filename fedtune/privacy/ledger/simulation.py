"""The one ledger of all simulations on this machine, whoever their nodes are called.

A simulation cuts data into nodes as it is told to; another partition or another number of nodes would find
other ledgers, and so a fresh budget for records that have none left, if each node had its own. Rows still
name the node. A real node, whose data is its own, has its own ledger (`ledger` in its node.yaml).

Version 0.1 kept one ledger for each simulated node in the same folder. They are taken over when they are
first met (`take_over`): their releases count for all records of data with the same name or content.
They stay where they are, and the ledger remembers how far it has read each. What they say of
trust=distributed is charged as another node sees it (`fedtune.privacy.ledger.state`).
"""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.errors import LedgerError
from fedtune.privacy.ledger.budget import Budgets, budgets_of, read_budgets, strictest, write_budgets
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.ledger.state import replay

__all__ = ["NAME", "ledgers_in", "simulation_ledger", "take_over"]

NAME = "simulation"
_looked: set[tuple[str, int]] = set()  # folders in which this process has looked for old ledgers


def simulation_ledger(folder: Path) -> PrivacyLedger:
    """The ledger of simulations in `folder`, with all that version 0.1 wrote there. Raises `LedgerError`."""
    path = folder / f"{NAME}.sqlite"
    _refuse_lost(path)
    ledger = PrivacyLedger.open(path, shared=True)
    seen = (str(folder.absolute()), os.getpid())
    if seen not in _looked:
        for path in _others(folder):
            if Chain(path).is_old():
                take_over(ledger, path)
        _looked.add(seen)
    return ledger


def _refuse_lost(path: Path) -> None:
    """Raises `LedgerError` for a ledger that is gone or empty while what it wrote beside itself is there.

    A ledger has its tables before its secret or a budget is written.
    """
    signs = [one for one in (path.with_suffix(".key"), path.with_suffix(".budget.json")) if one.exists()]
    if signs and (not path.exists() or path.stat().st_size == 0):
        raise LedgerError(
            f"The privacy ledger {path} is missing or empty, but {' and '.join(one.name for one in signs)} "
            "beside it tells that there was one: a new one would forget what was spent. Nothing is released. "
            "Restore the folder from a backup. Only if nothing was ever released from private data, delete "
            f"{' and '.join(str(one) for one in signs)} too."
        )


def take_over(ledger: PrivacyLedger, path: Path) -> int:
    """Counts in `ledger` what version 0.1 wrote for one node; how many releases were new.

    The old ledger is verified first and stays as it is; what was taken over before is not taken over again.
    From then on the strictest of all budgets hold. Raises `LedgerError` if it cannot be trusted.
    """
    old = Chain(path)
    with old.reading() as view:
        if view is None:
            return 0
        first = old.hash_of(view, 1)
        if first is None or ledger.state().has_imported(first, old.head(view)):
            return 0
        rows, problems = old.audit(view)
    problems += replay(rows)[1]
    old.close()
    if problems:
        raise LedgerError(
            f"The privacy ledger {path}, which an older version kept, cannot be trusted ({problems[0]}), so "
            "what its node has spent cannot be counted. Nothing is released. Restore it from a backup."
        )
    stored = read_budgets(path.with_suffix(".budget.json"), anew=True)
    budgets = stored or budgets_of(row.body for row in rows if row.kind == "budget")
    with ledger.writing() as writer:
        known = writer.state.imported_of(rows[0].hash, {row.seq: row.hash for row in rows})
        new = [row for row in rows[known:] if row.kind == "reserved"]
        for row in new:
            writer.write("imported", row.body, run=row.run)
        last = rows[-1]
        writer.write(
            "import", {"ledger": rows[0].hash, "node": path.stem, "seq": last.seq, "hash": last.hash}
        )
        if budgets != Budgets(None, {}):
            both = strictest(ledger.stored_budgets(writer.connection, writer.state), budgets)
            for name, budget in [(None, both.default), *both.datasets.items()]:
                if budget is not None:
                    writer.write("budget", {"dataset": name, **budget.to_json()})
            write_budgets(ledger.budget_path, both)
    return len(new)


def ledgers_in(folder: Path) -> list[PrivacyLedger]:
    """Every ledger in `folder` that has been written to: that of simulations first, then nodes' own."""
    found = [simulation_ledger(folder)] if folder.is_dir() else []
    own = [PrivacyLedger.open(path) for path in _others(folder) if not Chain(path).is_old()]
    return [ledger for ledger in [*found, *own] if ledger.path.exists()]


def _others(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.sqlite")) if path.stem != NAME]
