"""The command that repeats a configuration: `fedtune run` with what differs from the defaults, no more.

Read back by `fedtune.config.loader.load`, the command gives the same configuration; a test holds it to that.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.runs.record import flatten

__all__ = ["command"]

# What Hydra takes for something else than a text, or would split.
_PLAIN = re.compile(r"[A-Za-z_./:@-][\w./:@-]*")
_WORDS = frozenset({"null", "true", "false", "nan", "inf"})


def command(settings: Mapping[str, Any], seeds: Sequence[int] = ()) -> str:
    """`fedtune run ...` for flat `settings` (by dotted name) and `seeds`; several seeds make a sweep.

    Settings that this version of fedtune does not have are left out.
    """
    defaults = _defaults()
    trust = settings.get("privacy.trust")
    parts = []
    for name, value in settings.items():
        if name not in defaults or value == defaults[name]:
            continue
        # Without privacy, and where the noise is given, the loader itself takes the target epsilon out.
        if name == "privacy.epsilon" and value is None:
            continue
        if trust == "none" and name in ("privacy.epsilon", "privacy.noise_multiplier"):
            continue
        parts.append(f"{name}={_value(value)}")
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


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value).removesuffix(".0")
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_value(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
