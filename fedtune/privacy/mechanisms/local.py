"""DP-SGD on the node: nobody but the node itself must be trusted.

A release is `local_steps` steps (Abadi et al. 2016; Poisson sampling as in Mironov et al. 2019), full noise
in each, so that what leaves the node is private already. The accountant may count on the sampling, for units
are drawn in secret on the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedtune.errors import PrivacyError
from fedtune.privacy.checks import probability, whole
from fedtune.privacy.mechanisms.base import NODES_SEE, USERS_SEE, Mechanism

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.privacy.mechanisms.noise import FloatArray
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["Local", "TrainingOnNodes"]


@dataclass(frozen=True, kw_only=True)
class TrainingOnNodes(Mechanism):
    """Nodes train by themselves, and the server averages what they send, with or without noise.

    Attributes:
        sample_rate: probability that a unit is in a step's batch.
        local_steps: steps in one release.
        weighting: `uniform`, or `declared`: by public sizes, never by what a node counted.
    """

    sample_rate: float
    local_steps: int
    weighting: str = "uniform"

    def __post_init__(self) -> None:
        """Raises `PrivacyError`, naming the first setting without meaning."""
        if self.weighting not in ("uniform", "declared"):
            raise PrivacyError(
                f"federation.weighting must be uniform or declared, not {self.weighting!r}.",
                setting="federation.weighting",
            )
        probability(self.sample_rate, "train.sample_rate")
        whole(self.local_steps, "local_steps")

    @classmethod
    def from_settings(cls, config: Config, nodes: int) -> TrainingOnNodes:
        train = config.train
        return cls(
            sample_rate=probability(train.sample_rate, "train.sample_rate"),
            local_steps=whole(train.local_steps, "train.local_steps"),
            weighting=config.federation.weighting or "uniform",
        )

    def sample_rate_accounted(self) -> float:
        return self.sample_rate

    def steps_per_release(self) -> int:
        return self.local_steps

    def weights(self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None) -> FloatArray:
        """They sum to 1."""
        if self.weighting == "uniform":
            return np.full(len(nodes), 1.0 / len(nodes), dtype=np.float64)
        missing = [name for name in nodes if name not in (declared_sizes or {})]
        if declared_sizes is None or missing:
            raise PrivacyError(
                f"federation.weighting=declared needs the declared size of every node; missing: "
                f"{', '.join(missing)}. Give them, or use federation.weighting=uniform.",
                setting="federation.weighting",
            )
        sizes = np.array([whole(declared_sizes[n], f"declared size of {n}") for n in nodes], dtype=np.float64)
        return np.asarray(sizes / sizes.sum(), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Local(TrainingOnNodes):
    """DP-SGD on each node. Guarantee: each update is private when it leaves, towards everybody."""

    trust: ClassVar[str] = "local"

    def describe(self, plan: PrivacyPlan) -> str:
        return (
            f"DP-SGD on each node: Poisson sampling, clipping of each {plan.unit}'s gradient, Gaussian noise "
            "in every step"
        )

    @classmethod
    def who_sees_what(cls, privacy: Mapping[str, Any]) -> list[str]:
        return [
            "The server sees each node's updates. They are already private when they leave, so neither the "
            "server nor whoever listens must be trusted.",
            NODES_SEE,
            USERS_SEE,
        ]

    @classmethod
    def attacker_sees(cls, privacy: Mapping[str, Any]) -> str:
        return "everything that ever left a node"

    @classmethod
    def whose_epsilon(cls, privacy: Mapping[str, Any]) -> str:
        nodes = len(privacy["per_node"])
        return f"; the largest of {nodes} nodes" if nodes > 1 else ""
