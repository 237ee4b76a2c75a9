"""What asking a model costs in money: a price book times a measured speed. Pure arithmetic, to be checked by
hand.

A million texts keep a machine busy for a million over its texts a second, and it is paid for as long as it is
there: that time over `serving_load`, the share of its time that it is busy. Energy, where it is charged
apart, is what the machine takes while it is busy. Software (licences, and the hours of whoever looks after
it) is paid by the month whatever is asked, so a text's share of it follows from how many are asked a month:
without that number it is unknown, and so is the total.

Does not do: whole machines (half of one costs half, though at few texts a real one idles), networks, storage,
taxes, the training (`fedtune.cost.prices`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedtune.config.schema import PricingConfig
from fedtune.cost.prices import check
from fedtune.errors import ConfigError

__all__ = ["PerMillion", "Task", "price_inference", "tasks_of"]

_MILLION = 1e6
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class PerMillion:
    """Money for a million texts, in `currency`; `None`: charged, but how much is unknown.

    Attributes:
        currency: ISO 4217 code.
        compute: hours of the machine that serves.
        energy: kilowatt hours, where they are charged apart from the machine.
        software: licences and hours of work, spread over the texts of a month.
        total: the sum; None if any part is None.
    """

    currency: str
    compute: float
    energy: float
    software: float | None
    total: float | None


@dataclass(frozen=True)
class Task:
    """What somebody wants a model for.

    Attributes:
        name: what it is called.
        million_texts: that are asked a month, in millions.
        budget: money for it a month.
    """

    name: str
    million_texts: float
    budget: float


def price_inference(
    pricing: PricingConfig, texts_per_second: float, million_texts: float | None = None
) -> PerMillion:
    """What a million texts cost under the price book `pricing`.

    Args:
        pricing: prices in `pricing.currency`.
        texts_per_second: of the whole machine that `serving_hour` is the price of, when it is busy.
        million_texts: that are asked a month, in millions; None: unknown.

    Raises:
        ConfigError: a price is missing, negative or not finite, or a number of texts is not above 0.
    """
    check(pricing)
    for name, value in (("texts a second", texts_per_second), ("million texts a month", million_texts)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{value:g} {name} cannot be priced: give a number above 0.")
    busy = _MILLION / texts_per_second / _SECONDS_PER_HOUR
    compute = pricing.serving_hour * busy / pricing.serving_load
    energy = pricing.kilowatt_hour * pricing.serving_watts / 1000 * busy
    month = pricing.licences + pricing.engineering_hour * pricing.engineering_hours
    software = 0.0 if month == 0 else None if million_texts is None else month / million_texts
    total = None if software is None else compute + energy + software
    return PerMillion(pricing.currency, compute, energy, software, total)


def tasks_of(pricing: PricingConfig) -> list[Task]:
    """The tasks that the price book names.

    Raises:
        ConfigError: one of them is none, or two have one name.
    """
    tasks: list[Task] = []
    for text in pricing.tasks or ():
        parts = [part.strip() for part in text.rsplit(",", 2)]
        try:
            task = Task(parts[0], float(parts[1]), float(parts[2]))
        except (IndexError, ValueError):
            task = Task("", 0, 0)
        if not task.name or not 0 < task.million_texts < math.inf or not 0 <= task.budget < math.inf:
            raise ConfigError(
                f"The task {text!r} of the price book {pricing.name!r} is none. Write its name, the "
                "millions of texts a month and the budget a month, with commas: 'reviews, 5, 30'."
            )
        if any(task.name == other.name for other in tasks):
            raise ConfigError(
                f"The price book {pricing.name!r} has two tasks {task.name!r}. Give each a name of its own."
            )
        tasks.append(task)
    return tasks
