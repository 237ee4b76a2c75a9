"""`fedtune price FOLDER...`: what asking compressed models costs, and which tasks become affordable.

Each folder was made by `fedtune compress`, which measured the speed of the original and of what each step
made of it. They are priced per million texts (`fedtune.cost.inference`), and for each of them it is counted
how many of the price book's tasks (so many texts a month for so much money a month) come under their budgets,
now and as the prices of machines and energy fall; `fedtune report` shows the same of all such folders below
the ones that it is given (`serving_numbers`). A model that lost more accuracy than is allowed counts for
no task. Speeds of folders that were measured in several runs compare only as far as the machine was equally
busy; those in one folder were measured in turn.

Does not do: predict that prices fall, or speeds on other machines than the one that measured them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.files import save
from fedtune.config.schema import PricingConfig
from fedtune.config.shapes import read_as
from fedtune.cost.inference import PerMillion, Task, price_inference, tasks_of
from fedtune.errors import ConfigError, RecordError
from fedtune.report.constraints import CUTS
from fedtune.report.frontier import parse_prices
from fedtune.report.words import format_money, format_percent
from fedtune.runs.figures import COLORS, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "ALLOWED_LOSS",
    "Adoption",
    "Variant",
    "adoption",
    "adoption_text",
    "draw",
    "serving_numbers",
    "write_adoption",
]

ALLOWED_LOSS = 0.02  # accuracy that a variant may lose of the original's
_RECORD = "compression.json"


@dataclass(frozen=True)
class Variant:
    """A model that was measured.

    Attributes:
        name: its folder, and which step or format of it.
        accuracy: on the folder's public texts; None: unknown.
        lost: of the original's accuracy; None: unknown.
        texts_per_second: as it was measured.
        price: of a million texts.
        affordable: how many tasks are, at each of `CUTS`.
    """

    name: str
    accuracy: float | None
    lost: float | None
    texts_per_second: float
    price: PerMillion
    affordable: tuple[int, ...]


@dataclass(frozen=True)
class Adoption:
    """All variants, and what they were priced by."""

    variants: list[Variant]
    tasks: list[Task]
    pricing: PricingConfig
    notes: list[str]


def adoption(
    folders: Sequence[Path], prices: Sequence[str], *, allowed_loss: float = ALLOWED_LOSS
) -> Adoption:
    """Prices every variant in `folders`, or below those that are no compressed model: of a run, of several.

    Args:
        prices: `pricing=NAME` and single prices; empty: the book `serving`.
        allowed_loss: accuracy that a variant may lose and still serve a task.

    Raises:
        RecordError: a folder was not made by `fedtune compress`, and holds none that was.
        ConfigError: the prices mean nothing.
    """
    if not 0 <= allowed_loss <= 1:
        raise ConfigError(f"--loss {allowed_loss:g} is no share of the texts: give one from 0 to 1 (0.02).")
    pricing = parse_prices(list(prices) or ["pricing=serving"])
    assert pricing is not None
    tasks = tasks_of(pricing)
    variants, notes = [], []
    compressed = list(dict.fromkeys(one for folder in folders for one in _compressed(folder)))
    for folder in compressed:
        made, called = _read(folder), _called(folder, compressed)
        notes.append(f"{called}: measured with {made['settings']['threads']} thread(s), {made['processor']}.")
        variants += [
            _variant(f"{called}/{name}", one, made["original"], pricing, tasks, allowed_loss)
            for name, one in _measured(made)
        ]
    if not tasks:
        notes.append(f"The price book {pricing.name!r} has no tasks: set pricing.tasks to count with some.")
    return Adoption(variants, tasks, pricing, notes)


def _compressed(folder: Path) -> list[Path]:
    """The folder itself, or the compressed models below it."""
    if (folder / _RECORD).exists():
        return [folder]
    return sorted(path.parent for path in folder.rglob(_RECORD)) or [folder]


def _called(folder: Path, folders: Sequence[Path]) -> str:
    """Its name, or where it is if another one has that name too."""
    return folder.name if sum(folder.name == other.name for other in folders) == 1 else str(folder)


def serving_numbers(folders: Sequence[Path], prices: Sequence[str]) -> dict[str, Any]:
    """What the report's page shows of models that `fedtune compress` measured, wherever below `folders`.

    Args:
        prices: as of `adoption`; a book without tasks is not counted with, the book `serving` is.

    Returns:
        text, for a reader; and, where there are such models, tasks (how many) and variants, in the order in
        which they were made, each {name, accuracy, price, affordable}.

    Raises:
        ConfigError: the prices mean nothing.
    """
    roots = [folder for folder in folders if folder.is_dir()]
    made, damaged = list[Path](), list[str]()
    for folder in sorted({path.parent for root in roots for path in root.rglob(_RECORD)}):
        try:
            _read(folder)
        except RecordError:  # one of many that the report found by itself
            damaged.append(f"The {_RECORD} of {folder.name} cannot be read and is left out.")
        else:
            made.append(folder)
    if not made:
        return {
            "text": "No model that 'fedtune compress' made and measured lies below these folders, so what "
            "compression does for adoption is not known here, and nothing is assumed. Make one: fedtune "
            "compress RUN_DIR -o FOLDER; then name FOLDER among those of the report too."
        }
    chosen = parse_prices(list(prices))
    found = adoption(made, prices if chosen is not None and tasks_of(chosen) else [])
    book = found.pricing
    text = (
        "Each row is a model as it was measured after a step of its compression; its cells count how many of "
        f"the {len(found.tasks)} tasks of the price book {book.name!r} ({book.source}) come under their "
        "monthly budgets, today and as machines and energy get cheaper. A model that lost more than "
        f"{100 * ALLOWED_LOSS:g} points of accuracy counts for none. {' '.join([*found.notes, *damaged])}"
    )
    variants = [
        {
            "name": one.name,
            "accuracy": one.accuracy,
            "price": format_money(one.price.compute + one.price.energy, book.currency),
            "affordable": list(one.affordable),
        }
        for one in found.variants
    ]
    return {"text": text, "tasks": len(found.tasks), "variants": variants}


def _read(folder: Path) -> dict[str, Any]:
    try:
        return dict(read_as("compression", folder / _RECORD))
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{folder} has no {_RECORD} that can be read ({error}). Name folders that 'fedtune compress' "
            "made, or runs that it compressed."
        ) from error


def _measured(made: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    steps = [(f"{number} {one['step']}", one) for number, one in enumerate(made["steps"], start=1)]
    return [("original", made["original"]), *steps, *made["formats"].items()]


def _variant(
    name: str,
    one: Mapping[str, Any],
    original: Mapping[str, Any],
    pricing: PricingConfig,
    tasks: Sequence[Task],
    allowed_loss: float,
) -> Variant:
    speed = float(one["texts_per_second"])
    accuracy, before = one.get("accuracy"), original.get("accuracy")
    lost = None if accuracy is None or before is None else before - accuracy
    good = lost is not None and lost <= allowed_loss + 1e-12
    price = price_inference(pricing, speed)
    affordable = tuple(good * sum(_affordable(task, pricing, speed, cut) for task in tasks) for cut in CUTS)
    return Variant(name, accuracy, lost, speed, price, affordable)


def _affordable(task: Task, pricing: PricingConfig, speed: float, cut: float) -> bool:
    """Whether a month of the task comes under its budget once machines and energy cost `cut` less."""
    price = price_inference(pricing, speed, task.million_texts)
    assert price.software is not None
    month = task.million_texts * ((1 - cut) * (price.compute + price.energy) + price.software)
    return month <= task.budget * (1 + 1e-9)


def adoption_text(found: Adoption) -> str:
    """The table for a reader."""
    pricing = found.pricing
    head = ["model", "accuracy", "texts/s", "a million texts", *(f"-{cut:.0%}" for cut in CUTS)]
    rows = [
        [
            one.name,
            "-" if one.accuracy is None else format_percent(one.accuracy),
            f"{one.texts_per_second:,.0f}",
            format_money(one.price.compute + one.price.energy, pricing.currency),
            *(str(count) for count in one.affordable),
        ]
        for one in found.variants
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    month = pricing.licences + pricing.engineering_hour * pricing.engineering_hours
    notes = [
        f"Machine and energy by the price book {pricing.name!r} ({pricing.date or 'no date'}; "
        f"{pricing.source}); software and work come to {format_money(month, pricing.currency)} a month.",
        f"Last columns: how many of {len(found.tasks)} tasks are affordable as prices of machines and "
        "energy fall.",
        *found.notes,
    ]
    return "\n".join([*lines, "", *notes])


def write_adoption(found: Adoption, folder: Path) -> list[Path]:
    """Writes adoption.json and adoption.png into `folder`.

    Raises:
        ResourceError: they cannot be written.
    """
    values = {"cuts": CUTS, **asdict(found)}
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    made = {"adoption.json": text.encode(), "adoption.png": draw(found)}
    for name, content in made.items():
        save(folder / name, content)
    return [folder / name for name in made]


def draw(found: Adoption) -> bytes:
    """adoption.png: tasks that are affordable, by the fall of prices, a line a variant; and the prices."""
    return picture(lambda _, axes: _fill(axes, found), (9.6, 4.4), columns=2)


def _fill(axes: Sequence[Axes], found: Adoption) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    left, right = axes
    names = [one.name for one in found.variants]
    colors = [f"C{place % len(COLORS)}" for place in range(len(names))]
    # Lines that lie on one another are moved apart a little: counts are whole numbers.
    for place, (one, color) in enumerate(zip(found.variants, colors, strict=True)):
        moved = [count + 0.03 * (place - (len(names) - 1) / 2) for count in one.affordable]
        left.plot(CUTS, moved, "o-", color=color, ms=4, label=one.name)
    left.set(xlabel="machines and energy cost less by", ylabel="tasks that are affordable")
    left.set_ylim(-0.4, len(found.tasks) + 0.4)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_title(f"Which of {len(found.tasks)} tasks come under their budgets")
    left.legend()
    prices = [one.price.compute + one.price.energy for one in found.variants]
    right.barh(names[::-1], prices[::-1], color=colors[::-1])
    right.set(xlabel=f"{found.pricing.currency} a million texts, machine and energy")
    right.set_title("What a million texts cost")
