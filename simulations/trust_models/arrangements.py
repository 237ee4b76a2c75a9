"""The arrangements that the study compares."""

from __future__ import annotations

EPSILONS = (1, 3, 8)

# A record is protected, and one delta is below 1/n for every size; a larger one would be another promise.
_RECORD = ("privacy.unit=record", "privacy.delta=2.5e-5")
# How each trains is the recipe's own choice. 100 clients are central's own unit, at delta 1 / (2 x 100).
ARRANGEMENTS: dict[str, tuple[str, ...]] = {
    "local": ("privacy=local", *_RECORD, "partition=natural"),
    "distributed": ("privacy=distributed", *_RECORD, "partition=natural"),
    "pooled": ("privacy=local", *_RECORD, "partition=iid", "federation.nodes=1"),
    "central": ("privacy=central", "privacy.delta=0.005", "partition=iid", "federation.nodes=100"),
}
