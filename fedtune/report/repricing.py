"""What finished runs cost under a price book that is chosen now: usage times price, nothing is run again.

A record keeps the usage and the book that it was priced with. `fedtune report DIR pricing=NAME` takes
another book, and every amount follows. Without one each run is priced by its own book; if those differ in
currency, amounts cannot be compared, and no money is shown until one book is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fedtune.config.schema import PricingConfig
from fedtune.cost.prices import Money, check, price
from fedtune.errors import ConfigError
from fedtune.report.compared import Run

__all__ = ["Book", "book", "money_of", "parse"]

# ISO 4217, the codes in use in 2026.
_CODES = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF
CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD
HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL
LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP
PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT
TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
"""
_CURRENCIES = frozenset(_CODES.split())


@dataclasses.dataclass(frozen=True)
class Book:
    """The price book of a report.

    Attributes:
        pricing: the one book; None: each run by its own.
        currency: of all amounts; None: they cannot be compared, and there is no money.
        name: what to call it.
        notes: what a reader of the amounts should know.
    """

    pricing: PricingConfig | None
    currency: str | None
    name: str
    notes: tuple[str, ...] = ()


def parse(words: Sequence[str]) -> PricingConfig | None:
    """The book that `pricing=NAME` and `pricing.PRICE=NUMBER` ask for; None if nothing was asked.

    Raises:
        ConfigError: another setting, an unknown book, a price or a currency that means nothing.
    """
    for word in words:
        name = word.partition("=")[0]
        if name != "pricing" and not name.startswith("pricing."):
            raise ConfigError(
                f"{word!r}: only prices can be changed after a run, by pricing=NAME or pricing.PRICE=NUMBER."
            )
    if not words:
        return None
    from fedtune.config.loader import load

    chosen = load(words).pricing
    check(chosen)
    _check_currency(chosen)
    return chosen


def book(runs: Sequence[Run], chosen: PricingConfig | None) -> Book:
    """The book to report `runs` with. Raises `ConfigError` if `chosen` cannot be reckoned with."""
    if chosen is not None:
        check(chosen)
        _check_currency(chosen)
        return Book(chosen, chosen.currency, _title(chosen), (_dated(chosen),))
    currencies = sorted({run.pricing.currency for run in runs} - {""})
    names = sorted({run.pricing.name for run in runs})
    if len(currencies) != 1:
        why = (
            f"the runs were priced in {', '.join(currencies)}" if currencies else "no run names a price book"
        )
        return Book(None, None, "none", (f"Money is left out: {why}. Name one book: pricing=NAME.",))
    notes = []
    if currencies[0] not in _CURRENCIES:
        notes.append(f"The currency {currencies[0]!r} of the price book is no ISO 4217 code.")
    if len(names) == 1:
        first = max(runs, key=lambda run: run.started).pricing
        if any(run.pricing != first for run in runs):
            notes.append(
                f"The price book '{names[0]}' changed between runs; each is priced by its own. "
                f"pricing={names[0]} prices all of them by today's."
            )
        return Book(None, currencies[0], _title(first), (*notes, _dated(first)))
    notes.append(
        f"The runs were priced by different books ({', '.join(names)}), so amounts compare only in part. "
        "pricing=NAME prices all of them by one."
    )
    return Book(None, currencies[0], "several", tuple(notes))


def money_of(run: Run, using: Book) -> Money | None:
    """What `run` costs by that book; None without a common currency, or if a price is missing."""
    if using.currency is None:
        return None
    try:
        return price(using.pricing or run.pricing, run.cost, records=run.records)
    except ConfigError:
        return None  # a record may come from elsewhere; a missing price is no price of 0


def _title(pricing: PricingConfig) -> str:
    return f"{pricing.name} ({pricing.date})" if pricing.date else pricing.name


def _dated(pricing: PricingConfig) -> str:
    return (
        f"Prices: book '{pricing.name}', {pricing.currency}, of {pricing.date or 'unknown date'}; source: "
        + (f"{pricing.source}." if pricing.source else "unknown.")
    )


def _check_currency(pricing: PricingConfig) -> None:
    if pricing.currency not in _CURRENCIES:
        raise ConfigError(
            f"The price book '{pricing.name}' counts in {pricing.currency!r}, which is no ISO 4217 currency "
            "(USD, EUR, CHF, ...). Set pricing.currency."
        )
