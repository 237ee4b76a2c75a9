"""Money, against sums that were done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from fedtune.config.schema import PricingConfig
from fedtune.cost.meter import Cost
from fedtune.cost.prices import carbon_kg, price
from fedtune.errors import ConfigError
from tests.support.golden import Golden

BOOK = PricingConfig(
    name="hand",
    currency="EUR",
    device_hour=0.36,
    gigabyte_up=0.02,
    gigabyte_down=0.09,
    kilowatt_hour=0.30,
    carbon_kg_per_kwh=0.4,
    record=0.001,
)
USAGE = Cost(train_seconds=1800.0, bytes_up=500_000_000, bytes_down=2_000_000_000, energy_kwh=0.1)


def test_every_part_by_hand() -> None:
    # Half an hour at 0.36; half a GB at 0.02 and two at 0.09; 0.1 kWh at 0.30; 1,000 records at 0.001.
    money = price(BOOK, USAGE, records=1000)
    assert money.compute == pytest.approx(0.18)
    assert money.network == pytest.approx(0.01 + 0.18)
    assert money.energy == pytest.approx(0.03)
    assert money.data == pytest.approx(1.0)
    assert money.total == pytest.approx(0.18 + 0.19 + 0.03 + 1.0)
    assert money.currency == "EUR"
    assert carbon_kg(BOOK, USAGE) == pytest.approx(0.04)


def test_wall_time_is_not_charged_but_training_time_is() -> None:
    longer = dataclasses.replace(USAGE, seconds=1e6)
    assert price(BOOK, longer) == price(BOOK, USAGE)
    twice = dataclasses.replace(USAGE, train_seconds=3600.0)
    assert price(BOOK, twice).compute == pytest.approx(0.36)


def test_charged_but_unknown_makes_the_total_unknown() -> None:
    money = price(BOOK, dataclasses.replace(USAGE, energy_kwh=None))
    assert money.energy is None and money.total is None
    assert money.compute == pytest.approx(0.18)
    assert price(BOOK, USAGE, records=None).total is None


def test_unknown_but_not_charged_is_nothing() -> None:
    book = dataclasses.replace(BOOK, kilowatt_hour=0.0)
    money = price(book, dataclasses.replace(USAGE, energy_kwh=None))
    assert money.energy == 0.0
    assert money.total == pytest.approx(0.18 + 0.19)
    assert carbon_kg(book, dataclasses.replace(USAGE, energy_kwh=None)) is None


@pytest.mark.parametrize("value", [None, -0.1, float("nan"), float("inf"), "0.3", True])
def test_a_price_that_is_none_is_refused_by_name(value: object, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        price(dataclasses.replace(BOOK, device_hour=value), USAGE)  # type: ignore[arg-type]
    golden(raised)


def test_a_book_without_currency_is_refused(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        price(dataclasses.replace(BOOK, currency=""), USAGE)
    golden(raised)


def test_json_has_the_keys_of_the_record() -> None:
    assert {"currency", "compute", "network", "total"} <= set(price(BOOK, USAGE).to_json())
