"""What usage costs in money: a price book times a `Cost`. Pure arithmetic, to be checked by hand.

Prices come from `conf/pricing/*`, with their date and source; the record keeps the whole book beside the
result, so that a number can be checked years later. A price of 0 means that this part is not charged (in a
cloud, energy is inside the device hour). A part that *is* charged but whose usage is unknown makes that part
and the total `None`: a total that leaves something out would be too low without saying so.

Does not do: currency conversion, free tiers, price steps, taxes, storage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from fedtune.config.convert import build
from fedtune.config.schema import PricingConfig
from fedtune.cost.meter import Cost

__all__ = ["Money", "carbon_kg", "check", "price"]

_SECONDS_PER_HOUR = 3600.0
_BYTES_PER_GIGABYTE = 1e9  # network providers charge decimal gigabytes


@dataclass(frozen=True)
class Money:
    """Amounts in `currency`; `None`: charged, but the usage is unknown.

    Attributes:
        currency: ISO 4217 code.
        compute: training device hours.
        network: bytes up and down.
        energy: kilowatt hours, where they are charged apart from the device.
        data: bought records.
        total: the sum; None if any part is None.
    """

    currency: str
    compute: float | None
    network: float | None
    energy: float | None
    data: float | None
    total: float | None

    def to_json(self) -> dict[str, str | float | None]:
        """As in `record.json`, `cost.money`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def price(pricing: PricingConfig, cost: Cost, *, records: int | None = 0) -> Money:
    """What `cost` comes to under the price book `pricing`.

    Compute is charged for the seconds that nodes trained, summed over the nodes (`cost.train_seconds`):
    in a simulation they run one after another on one machine, in life each pays for its own.

    Args:
        pricing: prices in `pricing.currency`.
        cost: what was used.
        records: data records that were bought; None if unknown.

    Raises:
        ConfigError: a price is missing, negative or not finite, or the book names no currency.
    """
    check(pricing)
    hours = None if cost.train_seconds is None else cost.train_seconds / _SECONDS_PER_HOUR
    compute = _part(pricing.device_hour, hours)
    network = _sum(
        _part(pricing.gigabyte_up, cost.bytes_up / _BYTES_PER_GIGABYTE),
        _part(pricing.gigabyte_down, cost.bytes_down / _BYTES_PER_GIGABYTE),
    )
    energy = _part(pricing.kilowatt_hour, cost.energy_kwh)
    data = _part(pricing.record, records)
    return Money(pricing.currency, compute, network, energy, data, _sum(compute, network, energy, data))


def carbon_kg(pricing: PricingConfig, cost: Cost) -> float | None:
    """Kilograms of CO2 equivalent of the estimated energy; None if energy or intensity is unknown."""
    check(pricing)
    if cost.energy_kwh is None or pricing.carbon_kg_per_kwh == 0.0:
        return None
    return cost.energy_kwh * pricing.carbon_kg_per_kwh


def _part(unit_price: float, usage: float | None) -> float | None:
    if unit_price == 0.0:
        return 0.0
    return None if usage is None else unit_price * usage


def _sum(*parts: float | None) -> float | None:
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def check(pricing: PricingConfig) -> None:
    """Holds a price book to its schema, whoever built it; before a run, not after.

    Raises:
        ConfigError: a price is no finite number of 0 or more, or the book names no currency.
    """
    build(PricingConfig, asdict(pricing), f"the price book {pricing.name!r}")
