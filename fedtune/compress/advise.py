"""`fedtune compress --advise`: of finished compressions, the cheapest to ask that keeps within limits.

A variant is one format of a compressed folder, or a run's own model in PyTorch, with its measured figures
(`compression.json`); nothing is interpolated, and what is not known meets no limit. Cheapest is whatever
costs least money for a million texts, and so, under one price book, whatever is fastest. If nothing keeps
all limits, each of them is relaxed by itself as little as suffices; pairs, and all, only where one alone
does not.

Money is that of the machine and its energy, without software (`fedtune price`). Speeds, times and memory
are of the processor that they were measured on. Those of different processors are not to be compared, and a
note says where they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.compress.compress import RECORD_NAME
from fedtune.config.loader import load
from fedtune.config.schema import PricingConfig
from fedtune.config.shapes import read_as
from fedtune.cost.inference import price_inference
from fedtune.errors import ConfigError, RecordError
from fedtune.runs.summary import human_bytes

__all__ = ["Limits", "Variant", "advise", "advise_text", "variants_below"]

_NAMES = ("within", "p99", "memory", "money")
_UNITS = {"within": "points", "p99": "ms", "memory": "MB", "money": ""}


@dataclass(frozen=True)
class Limits:
    """What a variant has to keep; None: no limit.

    Attributes:
        within: points of accuracy that it may lose, beside its run's own model.
        p99: milliseconds, of one text at a time.
        memory: megabytes (10^6 bytes) that its process may hold.
        money: for a million texts.

    Raises:
        ConfigError: a limit is no number of 0 or more.
    """

    within: float | None = None
    p99: float | None = None
    memory: float | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for name in self.given():
            value = getattr(self, name)
            if math.isnan(value) or value < 0:
                raise ConfigError(f"--{name} {value:g} is not allowed: give a number of 0 or more.")

    def given(self) -> tuple[str, ...]:
        """Names of the limits that are set."""
        return tuple(name for name in _NAMES if getattr(self, name) is not None)


@dataclass(frozen=True)
class Variant:
    """One model to ask.

    Attributes:
        name: its folder and format.
        run: the run that it comes from.
        processor: that its figures are of, with the number of threads.
        accuracy: on public texts.
        error: standard error of the difference to the run's own model, in points.
        bytes: of its weights.
        values: what limits are compared with, by their names; None: not known.
    """

    name: str
    run: str
    processor: str
    accuracy: float
    error: float
    bytes: int
    values: dict[str, float | None]

    def keeps(self, limits: Limits, names: Sequence[str] = _NAMES) -> bool:
        """Whether it keeps those of the limits that are `names`."""
        for name in names:
            limit, value = getattr(limits, name), self.values[name]
            if limit is not None and (value is None or value > limit + 1e-9):
                return False
        return True


def variants_below(folders: Sequence[Path], pricing: PricingConfig) -> list[Variant]:
    """All variants of the compressed models below `folders`.

    Raises:
        RecordError: there are none, or a record is none that this fedtune reads.
        ConfigError: a price is missing.
    """
    paths = sorted({path for folder in folders for path in folder.expanduser().rglob(RECORD_NAME)})
    found: list[Variant] = []
    for path in paths:
        try:
            made = read_as("compression", path)
            if made.get("run") is None:
                continue  # a base, which says nothing of a task
            where = f"{made['processor']}, {made['settings']['threads']} thread(s)"
            whole = f"run {made['run']}, not compressed (PyTorch)"
            parts = {f"{path.parent} ({name})": one for name, one in made["formats"].items()}
            if all(one.name != whole for one in found):
                parts[whole] = made["original"]
            found += [_variant(name, made["run"], where, one, pricing) for name, one in parts.items()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{path} is none that this fedtune reads ({type(error).__name__}: {error}). Compress the run "
                "again."
            ) from error
    if not found:
        raise RecordError(
            f"There is no compressed model of a run below {', '.join(map(str, folders))}. Make some: fedtune "
            "compress RUN_DIR, and fedtune compress RUN_DIR compress=pruned."
        )
    return found


def _variant(name: str, run: str, where: str, one: dict[str, Any], pricing: PricingConfig) -> Variant:
    memory = one.get("memory_bytes")
    price = price_inference(pricing, one["texts_per_second"])
    return Variant(
        name, run, where, one["accuracy"], 100 * one["difference_error"], one["bytes"],
        {
            "within": max(0.0, -100 * one["difference"]),
            "p99": one["p99_ms"],
            "memory": None if memory is None else memory / 1e6,
            "money": price.compute + price.energy,
        },
    )  # fmt: skip


def advise(folders: Sequence[Path], limits: Limits, prices: Sequence[str] = ()) -> dict[str, Any]:
    """The answer, as JSON values: `chosen`, or `must_give` with what would, `variants`, `notes`, `currency`.

    Raises:
        ConfigError: there is no limit, or a price is missing.
        RecordError: as `variants_below`.
    """
    if not limits.given():
        raise ConfigError("There is no limit: give --within, --p99, --memory or --money, or several.")
    pricing = load(list(prices)).pricing
    found = variants_below(folders, pricing)
    good = [one for one in found if one.keeps(limits)]
    notes = []
    if len({one.processor for one in found}) > 1:
        notes.append("The variants were measured on different processors or threads: compare them with care.")
    if len({one.run for one in found}) > 1:
        notes.append("The variants come from different runs: points are beside each one's own.")
    return {
        "limits": {name: getattr(limits, name) for name in limits.given()},
        "currency": pricing.currency,
        "chosen": _told(min(good, key=_cheapest)) if good else None,
        "must_give": [] if good else _must_give(found, limits),
        "variants": [_told(one) for one in sorted(found, key=_cheapest)],
        "notes": notes,
    }


def _cheapest(one: Variant) -> tuple[float, float]:
    money = one.values["money"]
    return (math.inf if money is None else money, -one.accuracy)


def _must_give(found: Sequence[Variant], limits: Limits) -> list[dict[str, Any]]:
    """The fewest limits that have to give, and to what, for some variant to keep the others."""
    for size in range(1, len(limits.given()) + 1):
        ways = []
        for names in itertools.combinations(limits.given(), size):
            others = [name for name in _NAMES if name not in names]
            able = [
                one
                for one in found
                if one.keeps(limits, others) and all(one.values[name] is not None for name in names)
            ]
            if able:
                nearest = min(able, key=lambda one: (_excess(one, limits, names), *_cheapest(one)))
                ways.append(
                    {"limits": {name: nearest.values[name] for name in names}, "variant": _told(nearest)}
                )
        if ways:
            return ways
    return []


def _excess(one: Variant, limits: Limits, names: Sequence[str]) -> float:
    """How far limits move, each beside itself, so that points and milliseconds can be added."""
    return sum(
        max(0.0, (one.values[name] or 0.0) - getattr(limits, name)) / max(getattr(limits, name), 1e-9)
        for name in names
    )


def _told(one: Variant) -> dict[str, Any]:
    return {
        "name": one.name, "run": one.run, "processor": one.processor, "accuracy": one.accuracy,
        "error": one.error, "bytes": one.bytes, **one.values,
    }  # fmt: skip


def advise_text(answer: dict[str, Any]) -> str:
    """The answer in words, with a table of all variants, cheapest first."""
    currency = answer["currency"]

    def limit(name: str, value: float) -> str:
        return f"--{name} {value:.3g}" + (f" {_UNITS[name]}" if _UNITS[name] else f" {currency}")

    wanted = ", ".join(limit(name, value) for name, value in answer["limits"].items())
    lines = []
    if answer["chosen"] is not None:
        one = answer["chosen"]
        lines.append(
            f"Take {one['name']}: the cheapest within {wanted}. It loses {one['within']:.1f} ± "
            f"{one['error']:.1f} points, and a million texts cost {one['money']:.3g} {currency}."
        )
    elif answer["must_give"]:
        lines.append(f"Nothing keeps {wanted}. What must give:")
        for way in answer["must_give"]:
            gives = " and ".join(limit(name, value) for name, value in way["limits"].items())
            lines.append(f"  {gives}   then {way['variant']['name']}")
    else:
        lines.append(f"Nothing keeps {wanted}, whatever gives: a figure of each variant is not known.")
    head = ["accuracy", "points lost", "p99 ms", "memory", f"{currency} a million", "variant"]
    rows = [
        [
            f"{one['accuracy']:.1%}", f"{one['within']:.1f}", f"{one['p99']:.1f}",
            "-" if one["memory"] is None else human_bytes(round(1e6 * one["memory"])), f"{one['money']:.3g}",
            one["name"],
        ]
        for one in answer["variants"]
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head) - 1)]
    lines.append("")
    for row in [head, *rows]:
        lines.append("  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]))
    return "\n".join([*lines, *answer["notes"]])
