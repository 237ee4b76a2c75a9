"""Where work on private data may be done: on the machine where its ledger lies.

A ledger is an SQLite file, which machines cannot share over a network. On another machine it would be
another ledger, and each would count for itself what the data has spent. So work that Ray or a launcher sends
elsewhere is refused there, unless the owner declared the data public, or nothing is promised.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from fedtune.privacy.mechanisms.registry import adds_noise

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = ["refusal_elsewhere", "stays_here"]


def stays_here(config: Config) -> bool:
    """Whether a run has to stay on the machine with the ledgers."""
    return not config.data.public and adds_noise(config.privacy.trust)


def refusal_elsewhere(machine: str) -> str | None:
    """Why work that stays on `machine` is not done here; None on that machine itself."""
    if platform.node() == machine:
        return None
    return (
        f"This was sent to the machine {platform.node()}, and the ledgers that know what this data has spent "
        f"lie on {machine}; SQLite cannot share them over a network. Stay on one machine (engine=local, or a "
        "Ray of this machine alone; for a sweep hydra/launcher=joblib), or set data.public=true if the "
        "data's owner declared it public."
    )
