"""Which trust models there are. Whoever adds one adds a file beside this one, a line here, a page in
`conf/privacy/`, its name in `fedtune.config.schema` and a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.base import Mechanism
from fedtune.privacy.mechanisms.central import Central
from fedtune.privacy.mechanisms.distributed import Distributed
from fedtune.privacy.mechanisms.local import Local
from fedtune.privacy.mechanisms.none import NoPrivacy

__all__ = ["MECHANISMS", "adds_noise", "mechanism_from_json", "mechanism_of"]

MECHANISMS: Mapping[str, type[Mechanism]] = {
    kind.trust: kind for kind in (Local, Distributed, Central, NoPrivacy)
}


def mechanism_of(trust: str) -> type[Mechanism]:
    """The mechanism of a trust model. Raises `PrivacyError` if there is none of that name."""
    if not isinstance(trust, str) or trust not in MECHANISMS:
        raise PrivacyError(
            f"privacy.trust must be one of {', '.join(MECHANISMS)}, not {trust!r}.", setting="privacy.trust"
        )
    return MECHANISMS[trust]


def adds_noise(trust: object) -> bool:
    """Whether a trust model, by its name in settings or in a record, promises anything; yes, if it is
    unknown: what is asked of a private run is asked of it too."""
    kind = MECHANISMS.get(trust) if isinstance(trust, str) else None
    return kind is None or kind.is_private


def mechanism_from_json(values: Any) -> Mechanism:
    """Inverse of `Mechanism.to_json`. Raises `PrivacyError` for anything else."""
    if not isinstance(values, Mapping):
        raise PrivacyError(f"The mechanism of a privacy plan is a JSON object, not {type(values).__name__}.")
    kind = mechanism_of(values.get("trust", ""))
    given = {name: value for name, value in values.items() if name != "trust"}
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if wrong := sorted(map(str, set(given) ^ names)):
        raise PrivacyError(
            f"A plan with privacy.trust={kind.trust} has missing or unknown keys: {', '.join(wrong)}."
        )
    return kind(**given)
