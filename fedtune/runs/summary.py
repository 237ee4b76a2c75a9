"""The table at the end of a run, and the small words for numbers that progress and reports share.

Printed from the record, so that what a person reads is what the record says, with what the run folder keeps
for the owner of the data alone (`fedtune.runs.record.whole`). Epsilon is never shown
without delta, unit and adjacency; an estimate is called one, and what is unknown unknown. Fits 80 columns.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedtune.privacy.mechanisms.registry import adds_noise, mechanism_of
from fedtune.privacy.statement.words import left_out

__all__ = [
    "accuracy_line",
    "duration",
    "facts_and_notes",
    "human_bytes",
    "ledger_line",
    "money_line",
    "privacy_line",
    "summary",
]


def duration(seconds: float) -> str:
    """Seconds as a person says them: `4.1 s`, `2 min 05 s`, `1 h 03 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_bytes(count: float | None) -> str:
    """Bytes in decimal units, as networks count them: `312 kB`, `4.2 MB`."""
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if round(size) < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or round(size, 1) >= 100 else f"{size:.1f} {unit}"


def facts_and_notes(record: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(facts, notes) of a run, each a name and a text; a text is empty where there is nothing to say."""
    privacy, cost, federation = record["privacy"], record["cost"], record["federation"]
    facts = [
        ("training", _training_line(record)),
        ("privacy", privacy_line(privacy)),
        ("ledger", ledger_line(privacy)),
        ("time", _time_line(record)),
        ("traffic", f"{human_bytes(cost['bytes_up'])} up, {human_bytes(cost['bytes_down'])} down"),
        ("memory", _memory_line(cost)),
        ("energy", _energy_line(cost)),
        ("cost", money_line(cost)),
    ]
    absent = left_out(record)
    lost = [one for one in federation["dropped"] if one["node"] not in absent]
    notes = [("left out", f"{node} took no part ({why})") for node, why in islice(absent.items(), 3)]
    if len(absent) > 3:
        notes.append(("left out", f"{len(absent) - 3} more (federation.left_out in the record)"))
    notes += [("dropped", _dropped_line(lost)), ("note", federation.get("ended_early") or "")]
    if privacy["reproducible_noise"]:
        notes.append(("note", "the noise is reproducible from the seed: a simulation, no guarantee"))
    notes += [("note", text) for text in privacy.get("cautions", [])]
    return facts, notes


def accuracy_line(metrics: Mapping[str, Any]) -> str:
    """Accuracy with its standard error where it was noised, or that it is not known."""
    error = (metrics.get("evaluation") or {}).get("standard_error")
    return "unknown" if metrics["accuracy"] is None else _share(metrics["accuracy"], error)


def summary(
    record: Mapping[str, Any], run_dir: Path, console: Console | None = None, tracked: str | None = None
) -> None:
    """Prints the table at the end of a run, from its record.

    Args:
        run_dir: as the person would type it.
        tracked: the command that shows what a tracker wrote.
    """
    console = console or Console(highlight=False)
    privacy = record["privacy"]
    paths = [("record", str(run_dir / "record.json"))]
    paths += [(name, str(run_dir / path)) for name, path in record["artifacts"].items()]
    paths += [("tracker", tracked)] if tracked else []
    folder = shlex.quote(str(run_dir))
    commands = [f'predict {folder} "your text"', f"statement {folder}", f"export {folder}"]
    if adds_noise(privacy["trust"]):
        commands.append(f"audit {folder}")
    if record["run"]["engine"] != "deployment":  # there the ledgers lie with the sites
        commands.append("budget show")

    facts, notes = facts_and_notes(record)
    for part in (_sites(record["metrics"]), _facts(facts, notes), _facts(paths, [])):
        console.print()
        console.print(part)
    console.print()
    console.print(Text("next:", style="bold"))
    for command in commands:
        console.print(Text(f"  fedtune {command}"), soft_wrap=True)


def _facts(facts: Sequence[tuple[str, str]], notes: Sequence[tuple[str, str]]) -> Table:
    """Two columns; empty facts are left out. Text, not str: what a name holds in brackets is no markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for rows, style in ((facts, ""), (notes, "yellow")):
        for name, text in rows:
            if text:
                table.add_row(name, Text(text, style=style))
    return table


def _sites(metrics: Mapping[str, Any]) -> RenderableType:
    evaluation = metrics.get("evaluation") or {"data": "public"}
    if evaluation["data"] == "none":
        return Text("The model was not evaluated (federation.evaluation=none).")
    noised = evaluation["data"] == "private"
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("held out at" if noised else "test site", overflow="fold")
    table.add_column("about" if noised else "records", justify="right")
    own = bool(metrics.get("personal"))
    table.add_column("common model" if own else "accuracy", justify="right")
    if own:
        table.add_column("with its own part", justify="right")
    for site, row in metrics["per_site"].items():
        count = row.get("units" if noised else "num_records")
        cells = [_count(count), _share(row.get("accuracy"), row.get("standard_error"))]
        table.add_row(Text(site), *cells, *([_own(row.get("personal"))] if own else []))
    count = evaluation.get("units") if noised else metrics.get("num_records")
    common = metrics["accuracy"] if evaluation.get("model") != "personal" else None
    cells = [_count(count), _share(common, evaluation.get("standard_error"))]
    table.add_row("all", *cells, *([_own(metrics["personal"])] if own else []), style="bold")
    if metrics.get("majority_rate") is not None:
        table.add_row("(always the commonest label)", "", _share(metrics["majority_rate"]), style="dim")
    if evaluation["data"] == "held_out":
        caution = "Held out of data that nobody declared public, and not noised: this run has no privacy."
        return Group(table, Text(caution, style="dim"))
    if not noised:
        return table
    return Group(table, Text(_noise_line(evaluation), style="dim"))


def _own(quality: Mapping[str, Any] | None) -> str:
    """Accuracy with a site's own part; '-' where it is not known."""
    return "-" if quality is None else _share(quality.get("accuracy"), quality.get("standard_error"))


def _noise_line(evaluation: Mapping[str, Any]) -> str:
    """How accuracy was measured where nodes answered for it, and who did not."""
    if evaluation.get("epsilon") is None:
        text = "From counts of the nodes, without noise (trust none)."
    else:
        text = (
            f"From noised counts of the nodes (standard deviation {evaluation['noise_std']:.3g}; epsilon "
            f"{evaluation['epsilon']:.3g} at delta {evaluation['delta']:.2e}, inside the total below). "
            "\u00b1 is one standard error; '-': the noise hides it."
        )
    missing = "; ".join(answer["node"] for answer in evaluation["missing"])
    return f"{text} No answer: {missing}." if missing else text


def _count(count: float | None) -> str:
    return "-" if count is None else f"{max(round(count), 0):,}"


def _share(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} \u00b1 {100 * error:.1f} %"


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """Epsilon with delta, unit, adjacency and trust, or that there is none."""
    if not adds_noise(privacy["trust"]):
        return "none: updates travelled without noise (trust none), epsilon is infinite"
    epsilon = "unknown" if privacy["epsilon"] is None else f"{privacy['epsilon']:.3f}"
    whose = mechanism_of(privacy["trust"]).whose_epsilon(privacy)
    return (
        f"epsilon {epsilon} at delta {privacy['delta']:.2e}, {privacy['adjacency']}, "
        f"trust {privacy['trust']}{whose} ({privacy['accountant']})"
    )


def ledger_line(privacy: Mapping[str, Any]) -> str:
    """What the data's other uses add up to, this run included; empty if the nodes say there were none."""
    # By epsilon and not by releases: a ledger counts releases of this very shard, and epsilon over its keys,
    # however they were cut into shards before.
    of_this_run = {node["node"]: node["epsilon"] or 0.0 for node in privacy["per_node"]}
    entries = privacy.get("ledger", [])
    others = [
        entry
        for entry in entries
        if adds_noise(privacy["trust"])
        and entry["releases"]
        and (entry["epsilon"] is None or entry["epsilon"] > 1.005 * of_this_run.get(entry["node"], 0.0))
    ]
    if not others:
        silent = [str(entry["node"]) for entry in entries if entry["releases"] is None]
        return f"earlier uses of the data are unknown here: {', '.join(silent)} did not say" if silent else ""
    worst = max(others, key=lambda entry: math.inf if entry["epsilon"] is None else entry["epsilon"])
    if worst["epsilon"] is None:
        return f"over all uses of the data of {worst['node']} epsilon is infinite: one was without noise"
    about = f" for one {worst['unit']}" if worst.get("unit") else ""
    return (
        f"over all uses of the same data, earlier runs included: epsilon {worst['epsilon']:.3f} at delta "
        f"{worst['delta']:.2e}{about} ({worst['node']})"
    )


def _training_line(record: Mapping[str, Any]) -> str:
    """How it was trained, and in which precision, unless real sites chose that."""
    recipe, run = record["federation"].get("recipe") or "", record["run"]
    precision = (run.get("hardware") or {}).get("precision")
    if not recipe or precision is None or run["engine"] == "deployment":
        return recipe
    slow = precision == "fp32" and record["config"]["train"]["precision"] == "auto"
    return f"{recipe}; computed in {precision}{', for bf16 is slow on this machine' if slow else ''}"


def _time_line(record: Mapping[str, Any]) -> str:
    rounds, took = record["federation"]["rounds"], record["run"]["seconds"]
    trained = record["cost"]["train_seconds"]
    if took is None:
        return "kept by the owner of the data (local.json of the run folder)"
    text = f"{duration(took)} for {rounds} round{'' if rounds == 1 else 's'}"
    return text if trained is None else f"{text}; nodes trained {duration(trained)} in all"


def _memory_line(cost: Mapping[str, Any]) -> str:
    encoder, adapter = human_bytes(cost["encoder_bytes"]), human_bytes(cost["adapter_bytes"])
    return f"{human_bytes(cost['peak_memory_bytes'])} at the peak; encoder {encoder}, adapter {adapter}"


def _energy_line(cost: Mapping[str, Any]) -> str:
    if cost["energy_kwh"] is None:
        return str((cost.get("energy") or {}).get("note", "not measured"))
    how = (cost.get("energy") or {}).get("note", "an estimate")
    return f"{1000 * cost['energy_kwh']:.2f} Wh ({how})"


def money_line(cost: Mapping[str, Any]) -> str:
    """Money by part, with the price book's name and date."""
    money, pricing = cost["money"], cost["pricing"]
    if money is None:
        return "not priced"
    book = f"prices '{pricing['name']}'" + (f" of {pricing['date']}" if pricing.get("date") else "")
    parts = [
        f"{name} {_amount(money.get(name))}"
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
    text = "; ".join(f"{lost['node']} in round {lost['round']} ({lost['reason']})" for lost in dropped[:3])
    more = f"; and {len(dropped) - 3} more (federation.dropped in the record)" if len(dropped) > 3 else ""
    return text + more
