"""`fedtune report`: all runs below some folders on one page, with the frontier as picture and as table.

Writes `report.html` (one file that needs nothing else and no network), `frontier.png`, `frontier.csv` and
`frontier.parquet`. The numbers are made by the modules beside this one; `templates/` holds the page, its
style and its scripts, written by hand for two reasons: a page of a thousand runs stays below a megabyte or
two where an embedded plotting library alone is five, and it prints, reads aloud and fits a phone.
"""

from __future__ import annotations

import datetime
import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.report import export, figure
from fedtune.report.collect import Collection, collect
from fedtune.report.frontier import Point, points_of, varied
from fedtune.report.page_data import page_data
from fedtune.report.repricing import book, parse

__all__ = ["Report", "report"]

_FOR_OWNERS = (
    "Not for publication: this page shows times, energy and prices that depend on private records and are in "
    "no guarantee. Make it without --local for others."
)
_SCRIPTS = ("util.js", "axes.js", "points.js", "lines.js", "parallel.js", "table.js", "page.js")


@dataclass(frozen=True)
class Report:
    """What was written, and what to say on the terminal."""

    page: Path
    picture: Path
    csv: Path
    parquet: Path
    text: str


def report(
    folders: Sequence[Path],
    prices: Sequence[str] = (),
    output: Path | None = None,
    *,
    local: bool = False,
) -> Report:
    """Writes the report of all runs below `folders` into `output` (default: the first of them).

    Args:
        prices: `pricing=NAME` and single prices; empty: each run by its own book.
        local: show also what depends on private records and was not charged, on a page that says so, in files
            of their own (`local-report.html` and so on) that only their owner can read.

    Raises:
        RecordError: no usable record below `folders`.
        ConfigError: the prices mean nothing.
        ResourceError: the report cannot be written.
    """
    chosen = parse(prices)
    found = collect(folders, local=local)
    if local:
        found.notes.insert(0, _FOR_OWNERS)
    using = book(found.runs, chosen)
    points = points_of(found.runs, using)
    names = varied(points)
    data = page_data(found, points, names, using)
    data["command"] = " ".join(["fedtune", "report", *(shlex.quote(str(f)) for f in folders), *prices])
    if local:
        data["command"] += " --local"
    data["made"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    data["version"] = __version__
    data["local"] = local
    target = output or _folder_of(folders[0])
    # For the owner alone: never in the place of what may be published, and readable by nobody else.
    prefix, mode = ("local-", 0o600) if local else ("", 0o666)
    files = Report(
        target / f"{prefix}report.html",
        target / f"{prefix}frontier.png",
        target / f"{prefix}frontier.csv",
        target / f"{prefix}frontier.parquet",
        _summary(found, points, data),
    )
    table = export.rows(points, names, using.currency)
    export.write_csv(table, files.csv, mode=mode)
    export.write_parquet(table, files.parquet, mode=mode)
    main = [point for point in points if point.group == data["groups"][0]["name"]]
    export.save(files.picture, figure.draw(main, names, _small_print(main, data)), mode=mode)
    export.save(files.page, page(data).encode(), mode=mode)
    return files


def page(data: dict[str, Any]) -> str:
    """The page for `data`, whole: markup, style, scripts and numbers in one text."""
    parts = resources.files("fedtune.report") / "templates"

    def read(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    # Inside a script element only '<' could end it; escaped it is still the same JSON.
    numbers = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    text = read("report.html")
    for name, content in (
        ("TITLE", html.escape(_title(data))),
        ("STYLE", read("report.css")),
        ("SCRIPT", "\n".join(read(name) for name in _SCRIPTS)),
        ("NUMBERS", numbers),
    ):
        text = text.replace(f"%{name}%", content, 1)
    return text


def _title(data: dict[str, Any]) -> str:
    runs = sum(len(point["runs"]) for point in data["points"])
    mark = " (not for publication)" if data.get("local") else ""
    return f"{data['groups'][0]['name']}: {runs} runs{mark}"


def _folder_of(folder: Path) -> Path:
    return folder if folder.is_dir() else folder.parent


def _small_print(points: Sequence[Point], data: dict[str, Any]) -> str:
    """The promise in one line; and the error bars, if there are any."""
    first = next((point for point in points if point.delta is not None), points[0])
    seeds = max((point.accuracy.count for point in points if point.accuracy), default=0)
    promise = (
        f"delta {first.delta:.2g}, {first.runs[0].adjacency}" if first.delta is not None else "no privacy"
    )
    bars = f"; bars: standard error over up to {seeds} seeds" if seeds > 1 else "; one seed each"
    return f"{data['groups'][0]['name']}; {promise}{bars}; filled: not dominated"


def _summary(found: Collection, points: Sequence[Point], data: dict[str, Any]) -> str:
    lines = [f"{len(found.runs):,} runs of {len(points):,} configurations"]
    for group in data["groups"]:
        head = f"{group['name']}: " if len(data["groups"]) > 1 else ""
        lines += ["", head + group["advice"], group["promise"], *group["doubts"]]
    lines += [""] + [f"Note: {note}" for note in data["notes"]]
    return "\n".join(lines).rstrip()
