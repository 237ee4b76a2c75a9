"""Numbers, settings and commands as reports write them.

Numbers are short, have their unit and no more digits than are meant. The command that repeats a configuration
has what differs from the defaults and no more; read back by `fedtune.config.loader.load` it gives the same
configuration, and a test holds it to that.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.privacy.mechanisms.registry import adds_noise
from fedtune.runs.record import flatten

__all__ = [
    "describe_settings",
    "format_money",
    "format_number",
    "format_percent",
    "repeat_command",
    "short_names",
]


def format_percent(share: float) -> str:
    """`78.1 percent`."""
    return f"{100 * share:.1f} percent"


def format_number(value: float) -> str:
    """Three significant digits, without trailing zeros.

    Example:
        >>> format_number(8.0), format_number(7.9652), format_number(12345.6), format_number(math.inf)
        ('8', '7.97', '12,346', 'infinite')
    """
    if math.isinf(value):
        return "infinite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_money(amount: float, currency: str | None) -> str:
    """Two significant digits below one, two decimals above.

    Example:
        >>> format_money(0.00131, "USD"), format_money(1234.5, "USD")
        ('0.0013 USD', '1,234.50 USD')
    """
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


def describe_settings(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings in `names`, as `quantization=nf4, epsilon=2`; `group.name` is said as `group`."""
    short = short_names(names)
    parts = []
    for name in names:
        value = settings.get(name)
        if name not in settings or (name == "privacy.trust" and not adds_noise(value)):
            continue
        if value is None:
            if name in ("privacy.epsilon", "privacy.noise_multiplier"):
                continue  # the one follows from the other, or from trust=none
            value = "null"
        if isinstance(value, float):
            value = f"{value:g}"
        parts.append(f"{short[name].removesuffix('.name')}={value}")
    if names and not adds_noise(settings.get("privacy.trust")):
        parts.append("no privacy")
    return ", ".join(parts)


def repeat_command(settings: Mapping[str, Any], seeds: Sequence[int] = ()) -> str:
    """`fedtune run ...` for flat `settings` (by dotted name) and `seeds`; several seeds make a sweep.

    Settings that this version of fedtune does not have are left out.
    """
    from fedtune.config.convert import value_text

    defaults = _defaults()
    trust = settings.get("privacy.trust")
    parts = []
    for name, value in settings.items():
        if name not in defaults or value == defaults[name]:
            continue
        # Without privacy, and where the noise is given, the loader itself takes the target epsilon out.
        if name == "privacy.epsilon" and value is None:
            continue
        if not adds_noise(trust) and name in ("privacy.epsilon", "privacy.noise_multiplier"):
            continue
        parts.append(f"{name}={value_text(value)}")
    if len(seeds) == 1:
        parts.append(f"seed={seeds[0]}")
    elif seeds:
        parts.append(f"seed={','.join(str(seed) for seed in seeds)}")
    head = ["fedtune", "run"] + (["-m"] if len(seeds) > 1 else [])
    return " ".join([*head, *(shlex.quote(part) for part in parts)])


@functools.cache
def _defaults() -> dict[str, Any]:
    from fedtune.config.loader import load, to_dict

    return {
        name: value
        for name, value in flatten(to_dict(load())).items()
        if not name.startswith(("pricing.", "tracker.")) and name not in ("seed", "resume", "output")
    }
