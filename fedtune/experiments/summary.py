"""The table at the end of a run, and the small words for numbers that progress and reports share.

Printed from the record alone, so that what a person reads is what the record says. Epsilon is never shown
without delta, unit and adjacency; an estimate is called one, and what is unknown unknown. Fits 80 columns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["duration", "human_bytes", "ledger_line", "money_line", "privacy_line", "summary"]


def duration(seconds: float) -> str:
    """Seconds as a person says them: `4.1 s`, `2 min 05 s`, `1 h 03 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_bytes(count: float | None) -> str:
    """Bytes in decimal units, as networks count them: `312 kB`, `4.2 MB`."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def summary(record: Mapping[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """Prints the table at the end of a run, from its record alone."""
    console = console or Console(highlight=False)
    privacy, metrics, cost = record["privacy"], record["metrics"], record["cost"]
    console.print()
    console.print(_sites(metrics))
    console.print()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("privacy", privacy_line(privacy))
    if privacy["reproducible_noise"]:
        facts.add_row(
            "", Text("the noise is reproducible from the seed: a simulation, no guarantee", style="yellow")
        )
    uses = ledger_line(privacy)
    if uses:
        facts.add_row("ledger", uses)
    facts.add_row("time", _time_line(record))
    facts.add_row("traffic", f"{human_bytes(cost['bytes_up'])} up, {human_bytes(cost['bytes_down'])} down")
    facts.add_row("memory", _memory_line(cost))
    facts.add_row("energy", _energy_line(cost))
    facts.add_row("cost", money_line(cost))
    dropped = record["federation"]["dropped"]
    if dropped:
        facts.add_row("dropped", Text(_dropped_line(dropped), style="yellow"))
    ended = record["federation"].get("ended_early")
    for note in [*([ended] if ended else []), *privacy.get("cautions", [])]:
        facts.add_row("note", Text(note, style="yellow"))
    console.print(facts)
    console.print()
    paths = Table.grid(padding=(0, 2))
    paths.add_column(style="bold", no_wrap=True)
    paths.add_column(overflow="fold")
    paths.add_row("record", str(run_dir / "record.json"))
    for name, path in record["artifacts"].items():
        paths.add_row(name, str(run_dir / path))
    console.print(paths)
    console.print()
    console.print(Text("next:", style="bold"))
    folder = shlex.quote(str(run_dir))
    for command in (
        f'fedtune predict {folder} "your text"',
        f"fedtune statement {folder}",
        "fedtune budget show",
    ):
        console.print(f"  {command}", soft_wrap=True)


def _sites(metrics: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("test site")
    table.add_column("records", justify="right")
    table.add_column("accuracy", justify="right")
    for site, row in metrics["per_site"].items():
        accuracy = row.get("accuracy") if isinstance(row, Mapping) else row
        count = row.get("num_records") if isinstance(row, Mapping) else None
        table.add_row(site, "-" if count is None else f"{count:,}", _share(accuracy))
    table.add_row("all", f"{metrics.get('num_records', 0):,}", _share(metrics["accuracy"]), style="bold")
    if metrics.get("majority_rate") is not None:
        table.add_row("(always the commonest label)", "", _share(metrics["majority_rate"]), style="dim")
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """Epsilon with delta, unit, adjacency and trust, or that there is none."""
    if privacy["epsilon"] is None:
        return "none: updates travelled without noise (trust none), epsilon is infinite"
    return (
        f"epsilon {privacy['epsilon']:.3f} at delta {privacy['delta']:.2e}, {privacy['adjacency']}, "
        f"trust {privacy['trust']}; the largest of {len(privacy['per_node'])} nodes ({privacy['accountant']})"
    )


def ledger_line(privacy: Mapping[str, Any]) -> str:
    """What the data's other uses add up to, this run included; empty if there were none."""
    mine = {one["node"]: one["releases"] for one in privacy["per_node"]}
    others = [one for one in privacy.get("ledger", []) if (one["releases"] or 0) > mine.get(one["node"], 0)]
    if not others:
        return ""
    worst = max(others, key=lambda one: math.inf if one["epsilon"] is None else one["epsilon"])
    if worst["epsilon"] is None:
        return f"the data of {worst['node']} was used without noise before: over all of its uses epsilon is infinite"
    return (
        f"over all uses of the same data, earlier runs included: epsilon {worst['epsilon']:.3f} at delta "
        f"{worst['delta']:.2e} ({worst['releases']} releases of {worst['node']})"
    )


def _time_line(record: Mapping[str, Any]) -> str:
    rounds = record["federation"]["rounds"]
    return (
        f"{duration(record['run']['seconds'])} for {rounds} rounds; nodes trained "
        f"{duration(record['cost']['train_seconds'])} in all"
    )


def _memory_line(cost: Mapping[str, Any]) -> str:
    encoder, adapter = human_bytes(cost["encoder_bytes"]), human_bytes(cost["adapter_bytes"])
    return f"{human_bytes(cost['peak_memory_bytes'])} at the peak; encoder {encoder}, adapter {adapter}"


def _energy_line(cost: Mapping[str, Any]) -> str:
    if cost["energy_kwh"] is None:
        return str(cost.get("energy", {}).get("note", "not measured"))
    return f"{1000 * cost['energy_kwh']:.2f} Wh ({cost['energy']['note']})"


def money_line(cost: Mapping[str, Any]) -> str:
    """Money by part, with the price book's name and date."""
    money, pricing = cost["money"], cost["pricing"]
    if money is None:
        return "not priced"
    book = f"prices '{pricing['name']}'" + (f" of {pricing['date']}" if pricing.get("date") else "")
    parts = [
        f"{name} {_amount(money[name])}"
        for name in ("compute", "network", "energy", "data")
        if money.get(name) != 0
    ]
    total = _amount(money["total"])
    return f"{total} {money['currency']} ({', '.join(parts) or 'nothing is charged for'}; {book})"


def _amount(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4f}" if value < 1 else f"{value:,.2f}"


def _dropped_line(dropped: Sequence[Mapping[str, Any]]) -> str:
    first = "; ".join(f"{one['node']} in round {one['round']} ({one['reason']})" for one in dropped[:3])
    return (
        first
        if len(dropped) <= 3
        else f"{first}; and {len(dropped) - 3} more (federation.dropped in the record)"
    )
