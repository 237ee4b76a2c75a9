"""The frontier as a table for other programs: CSV, and the same as Parquet.

One row a configuration. An infinite epsilon is an empty cell in CSV and null in Parquet, with `private`
beside it, so that no program takes a missing number for a promise.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.errors import ResourceError
from fedtune.report.commands import command
from fedtune.report.frontier import COSTS, Point

__all__ = ["rows", "save", "write_csv", "write_parquet"]


def rows(points: Sequence[Point], names: Sequence[str], currency: str | None) -> list[dict[str, Any]]:
    """One row a point: promise, accuracy with its error, costs, marks, settings that vary, command."""
    return [_row(point, names, currency) for point in points]


def _row(point: Point, names: Sequence[str], currency: str | None) -> dict[str, Any]:
    first, accuracy = point.runs[0], point.accuracy
    private = math.isfinite(point.epsilon)
    row: dict[str, Any] = {
        "configuration": point.id,
        "group": point.group,
        "runs": len(point.runs),
        "seeds": " ".join(str(seed) for seed in point.seeds),
        "private": private,
        "epsilon": point.epsilon if private else None,
        "delta": point.delta if private else None,
        "unit": first.unit,
        "adjacency": first.adjacency,
        "trust": first.trust,
        "accuracy": None if accuracy is None else accuracy.mean,
        "accuracy_error": None if accuracy is None else accuracy.error,
        "currency": currency,
    }
    for name, stat in point.costs.items():
        row[name] = None if stat is None else float(stat.mean)
        row[f"{name}_error"] = None if stat is None else stat.error
    row |= {f"accuracy_{site}": stat.mean for site, stat in point.per_site.items()}
    row["non_dominated_epsilon"] = point.best["epsilon"]
    row |= {f"non_dominated_{name}": point.best[name] for name in COSTS}
    row |= {name: _cell(point.settings.get(name)) for name in names}
    row["command"] = command(point.settings, point.seeds)
    return row


def _cell(value: Any) -> str | None:
    """Settings as text: one of them may be a number in one row and null or a list in another."""
    return None if value is None else str(value)


def _columns(table: Sequence[dict[str, Any]]) -> list[str]:
    """All columns in the order of their first row; sites may differ between data sets."""
    names = dict.fromkeys(name for row in table for name in row)
    return [*(name for name in names if name != "command"), "command"]


def write_csv(table: Sequence[dict[str, Any]], path: Path, *, mode: int = 0o666) -> None:
    """Writes `table` as CSV (RFC 4180, UTF-8). Raises `ResourceError` if the disk does not take it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(table), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    save(path, text.getvalue().encode(), mode=mode)


def write_parquet(table: Sequence[dict[str, Any]], path: Path, *, mode: int = 0o666) -> None:
    """Writes `table` as Parquet. Raises `ResourceError` if the disk does not take it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [row.get(name) for row in table] for name in _columns(table)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    save(path, buffer.getvalue(), mode=mode)


def save(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Writes `content` to `path`, whole or not at all, readable as `mode` and the umask say.

    Raises `ResourceError` with the way out.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content, mode=mode)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. Choose another folder with --output FOLDER."
        ) from error
