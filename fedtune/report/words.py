"""Numbers and settings as reports say them: short, with their unit, and never more digits than are meant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["money_text", "number", "percent", "setting_words", "short_names"]


def percent(share: float) -> str:
    """`78.1 percent`."""
    return f"{100 * share:.1f} percent"


def number(value: float) -> str:
    """Three significant digits, without a trailing zero: `8`, `7.97`, `0.5`; `infinite`."""
    if math.isinf(value):
        return "infinite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def money_text(amount: float, currency: str | None) -> str:
    """`0.0013 USD`, `1,234.50 USD`: two significant digits below one, two decimals above."""
    if amount == 0:
        text = "0"
    elif abs(amount) < 1:
        # Decimals down to a millionth, where a reader still counts the zeros.
        text = f"{amount:.{max(2, 1 - math.floor(math.log10(abs(amount))))}f}"
        text = text.rstrip("0").rstrip(".") if abs(amount) >= 1e-6 else f"{amount:.1e}"
    else:
        text = f"{amount:,.2f}"
    return f"{text} {currency}" if currency else text


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name where that is enough, else the whole name."""
    lasts = [name.rpartition(".")[2] for name in names]
    return {
        name: last if lasts.count(last) == 1 and last not in ("name", "path") else name
        for name, last in zip(names, lasts, strict=True)
    }


def setting_words(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings in `names`, as `quantization=nf4, epsilon=2`; `group.name` is said as `group`."""
    short = short_names(names)
    parts = []
    for name in names:
        value = settings.get(name)
        if name not in settings or (name == "privacy.trust" and value == "none"):
            continue
        if value is None:
            if name in ("privacy.epsilon", "privacy.noise_multiplier"):
                continue  # the one follows from the other, or from trust=none
            value = "null"
        if isinstance(value, float):
            value = f"{value:g}"
        parts.append(f"{short[name].removesuffix('.name')}={value}")
    if names and settings.get("privacy.trust") == "none":
        parts.append("no privacy")
    return ", ".join(parts)
