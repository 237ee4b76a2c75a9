"""The arrangements that the study compares."""

from __future__ import annotations

EPSILONS = (1, 3, 8)

# A record is protected, and one delta is below 1/n for every size; a larger one would be another promise.
_RECORD = ("privacy.unit=record", "privacy.delta=2.5e-5")
# How 48 steps are spent. A distributed round is one step, and its optimizer lives on the server for all 48;
# the pool takes them in one round, for a node's optimizer lives for a round. Local nodes meet 12 times.
# 100 clients are central's own privacy unit, and there its delta is 1 / (2 x 100), once fedtune's default.
ARRANGEMENTS: dict[str, tuple[str, ...]] = {
    "local": (
        "privacy=local",
        *_RECORD,
        "partition=natural",
        "federation.num_rounds=12",
        "train.local_steps=4",
    ),
    "distributed": ("privacy=distributed", *_RECORD, "partition=natural", "federation.num_rounds=48"),
    "pooled": (
        "privacy=local",
        *_RECORD,
        "partition=iid",
        "federation.nodes=1",
        "federation.num_rounds=1",
        "train.local_steps=48",
    ),
    "central": (
        "privacy=central",
        "privacy.delta=0.005",
        "privacy.max_grad_norm=1",
        "partition=iid",
        "federation.nodes=100",
        "federation.num_rounds=6",
        "train.local_steps=8",
    ),
}
