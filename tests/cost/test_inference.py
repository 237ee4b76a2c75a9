"""Money for a million texts, against sums that were done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.config.loader import load
from fedtune.config.pages import group_options
from fedtune.config.schema import PricingConfig
from fedtune.cost.inference import Task, price_inference, tasks_of
from fedtune.errors import ConfigError
from tests.support.golden import Golden

BOOK = PricingConfig(
    name="hand",
    currency="EUR",
    serving_hour=0.36,
    serving_watts=50.0,
    serving_load=0.5,
    kilowatt_hour=0.30,
    licences=10.0,
    engineering_hour=80.0,
    engineering_hours=1.5,
    tasks=["a, b, 5, 30", "c,0.5, 1.5"],
)


def test_every_part_by_hand() -> None:
    # A million texts at 250 a second: 4,000 s busy, 8,000 s of a machine that is busy half of its time.
    # 50 W for 4,000 s are 0.0556 kWh. Software and work are 130 a month, over 5 million texts.
    found = price_inference(BOOK, 250.0, 5.0)
    assert found.compute == pytest.approx(0.36 * 8000 / 3600)
    assert found.energy == pytest.approx(0.30 * 50 / 1000 * 4000 / 3600)
    assert found.software == pytest.approx(26.0)
    assert found.total == pytest.approx(0.8 + 1 / 60 + 26)
    assert found.currency == "EUR"
    faster = price_inference(BOOK, 500.0, 5.0)
    assert faster.compute == pytest.approx(found.compute / 2) and faster.software == found.software


def test_without_the_texts_of_a_month_the_total_is_unknown() -> None:
    found = price_inference(BOOK, 250.0)
    assert found.software is None and found.total is None and found.compute > 0
    free = replace(BOOK, licences=0.0, engineering_hours=0.0)
    assert price_inference(free, 250.0).total == pytest.approx(0.8 + 1 / 60)


@pytest.mark.parametrize(("speed", "month"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_what_cannot_be_priced(speed: float, month: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        price_inference(BOOK, speed, month)
    with pytest.raises(ConfigError, match="serving_load"):
        price_inference(replace(BOOK, serving_load=0.0), 1.0)


def test_tasks(golden: Golden) -> None:
    assert tasks_of(BOOK) == [Task("a, b", 5.0, 30.0), Task("c", 0.5, 1.5)]
    assert tasks_of(replace(BOOK, tasks=None)) == []
    for text in ("reviews", "reviews, 5", ", 5, 30", "r, x, 1", "r, 0, 1", "r, 1, -1", "r, inf, 1"):
        with pytest.raises(ConfigError, match="is none"):
            tasks_of(replace(BOOK, tasks=[text]))
    with pytest.raises(ConfigError) as raised:
        tasks_of(replace(BOOK, tasks=["reviews 5 30"]))
    golden(raised)
    with pytest.raises(ConfigError, match="two tasks"):
        tasks_of(replace(BOOK, tasks=["a, 1, 1", "a, 2, 2"]))


@pytest.mark.parametrize("name", group_options("pricing"))
def test_the_books_price_inference(name: str) -> None:
    book = load([f"pricing={name}"]).pricing
    tasks_of(book)
    assert price_inference(book, 100.0, 1.0).total is not None
