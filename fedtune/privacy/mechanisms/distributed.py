"""DP-SGD over the union of all shards: central accuracy without a trusted server.

Each round is one step. Every node draws from its own shard, clips, and adds a share of the noise; under
secure aggregation the server sees the sum alone, whose noise suffices. Everybody in the run sees the model of
every round and knows its own share, so what is accounted is what the strongest observer cannot take off: the
shares of `honest_shares` nodes. It is accounted as the continuous Gaussian;
`fedtune.privacy.mechanisms.discrete` says how far the discrete one is from it.

The server must follow the protocol (honest but curious): it passes the nodes' keys on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedtune.errors import PrivacyError
from fedtune.privacy.checks import probability, whole
from fedtune.privacy.mechanisms.base import NODES_SEE, USERS_SEE, Mechanism, Round

if TYPE_CHECKING:
    from fedtune.config.schema import Config, PrivacyConfig, Strategy
    from fedtune.privacy.mechanisms.noise import FloatArray
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["Distributed"]


@dataclass(frozen=True, kw_only=True)
class Distributed(Mechanism):
    """One step a round over the union, by secure sums of partly noised gradients.

    `plan.noise_multiplier` is that of the noise which the strongest observer does not know, and
    `plan.declared_size` that of the union.

    Attributes:
        sample_rate: probability that a unit is in a round's batch.
        max_dropouts: nodes that may be missing from a sum.
        max_colluders: nodes that may side with the server; the noise covers one at least.
    """

    trust: ClassVar[str] = "distributed"
    round: ClassVar[Round] = "secure_sum"
    strategies: ClassVar[tuple[Strategy, ...]] = ("fedsgd",)
    takes_local_steps: ClassVar[bool] = False
    fixed_nodes: ClassVar[bool] = True
    shares_noise: ClassVar[bool] = True
    no_own_release: ClassVar[str] = "only the sum of all sites has enough noise"
    adding_up: ClassVar[str] = ", and delta grows faster"
    arithmetic: ClassVar[str] = "noise is exact (discrete Gaussian), training itself is in floats."

    sample_rate: float
    max_dropouts: int = 0
    max_colluders: int = 0

    def __post_init__(self) -> None:
        """Raises `PrivacyError`, naming the first setting without meaning."""
        probability(self.sample_rate, "train.sample_rate")
        for name in ("max_dropouts", "max_colluders"):
            whole(getattr(self, name), f"privacy.{name}", 0)

    @classmethod
    def from_settings(cls, config: Config, nodes: int) -> Distributed:
        cls.check_equal_weights(config)
        privacy = config.privacy
        return cls(
            sample_rate=probability(config.train.sample_rate, "train.sample_rate"),
            max_dropouts=privacy.max_dropouts,
            max_colluders=_colluders(privacy, nodes),
        )

    @classmethod
    def declared_size(cls, sizes: Sequence[int]) -> int:
        """That of the union."""
        return sum(sizes)

    def check(self, plan: PrivacyPlan) -> None:
        if self.honest_shares(plan) < 1:
            raise PrivacyError(
                f"With {plan.nodes} nodes, privacy.max_dropouts={self.max_dropouts} and "
                f"privacy.max_colluders={self.max_colluders} leave no honest node to add noise: dropouts and "
                f"colluders (one at least, for a node knows its own noise) must be fewer than {plan.nodes} "
                "together. Lower privacy.max_dropouts or privacy.max_colluders, or use privacy.trust=local."
            )

    # --- what the accountant is told ----------------------------------------------------------------

    def sample_rate_accounted(self) -> float:
        return self.sample_rate

    def steps_per_release(self) -> int:
        """A round is one step."""
        return 1

    def honest_shares(self, plan: PrivacyPlan) -> int:
        """Shares of the noise in every accepted sum that its strongest observer does not know.

        All nodes but `max_dropouts` are in it. `max_colluders` tell the server theirs; a node that looks at
        the result by itself knows its own. So one share at least is taken off, though no node colludes (none
        where there is one node: it protects its data from others).
        """
        return plan.nodes - self.max_dropouts - max(min(1, plan.nodes - 1), self.max_colluders)

    def epsilon_towards_server(self, plan: PrivacyPlan, releases: int, answers: int) -> float:
        """It knows no share of the noise: sigma * sqrt(1 + known / honest_shares)."""
        shares = plan.nodes - self.max_dropouts
        noise = plan.noise_multiplier * math.sqrt(shares / self.honest_shares(plan)) * (1.0 - 1e-12)
        return dataclasses.replace(plan, noise_multiplier=noise).epsilon(releases, answers)

    # --- what is done -------------------------------------------------------------------------------

    def noise_on_average(self, plan: PrivacyPlan, sizes: Mapping[str, int]) -> float:
        """Each node in the sum adds its share, and those that are counted on are fewer."""
        shares = len(sizes) / self.honest_shares(plan)
        return plan.noise_std() * math.sqrt(shares) / plan.expected_batch_size()

    def weights(self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None) -> FloatArray:
        """Sums are added up: noise and sensitivity were fixed before."""
        return np.ones(len(nodes), dtype=np.float64)

    def for_shard(self, plan: PrivacyPlan, declared_size: int) -> PrivacyPlan:
        """The union stays: all nodes divide by one constant."""
        whole(declared_size, "declared_size")
        return plan

    def sizes_like(self, plan: PrivacyPlan) -> list[int]:
        """Any that add up to the union, which is all that a node knows."""
        others = [1] * (plan.nodes - 1)
        return [max(1, plan.declared_size - len(others)), *others]

    def check_shard(self, plan: PrivacyPlan, node: str, declared_size: int) -> None:
        """Delta follows from the size of the union, which this node's part is in."""
        if plan.declared_size < declared_size:
            raise PrivacyError(
                f"The server proposes a plan for a union of {plan.declared_size} units, and node {node!r} "
                f"alone declares {declared_size}. Start server and nodes with the same configuration."
            )

    def refusals(self, plan: PrivacyPlan, max_sample_rate: float, min_colluders: int) -> Iterable[str]:
        if max(1, self.max_colluders) < min_colluders:
            yield f"privacy.max_colluders={self.max_colluders} is below the least permitted, {min_colluders}"
        yield from super().refusals(plan, max_sample_rate, min_colluders)

    def least_nodes(self, plan: PrivacyPlan) -> int:
        return plan.nodes - self.max_dropouts

    def nodes_in_size(self, plan: PrivacyPlan) -> int:
        return plan.nodes

    # --- in words -----------------------------------------------------------------------------------

    def describe(self, plan: PrivacyPlan) -> str:
        return (
            "one DP-SGD step over the union of all shards a round: Poisson sampling, clipping, discrete "
            "Gaussian noise shared between the nodes, secure aggregation"
        )

    # --- of a finished run's record -----------------------------------------------------------------

    @classmethod
    def who_sees_what(cls, privacy: Mapping[str, Any]) -> list[str]:
        answers = [
            "Evaluation does not go through secure aggregation: the server sees each node's two noised "
            "counts. Each node adds all the noise of its answer by itself, so they are private towards "
            "the server too."
        ]
        return [
            "The server sees only the sum over the nodes, through secure aggregation; the sum holds all the "
            "noise that the guarantee needs. No single node's part is private by itself.",
            "The server must follow the protocol (honest but curious): it passes the nodes' keys on, and "
            "nothing but its word ties a key to a node or says who dropped out. A server that puts keys of "
            "its own in their place, or tells nodes different stories, can see single nodes' parts or sums "
            "with less noise, and towards it this guarantee does not hold.",
            _what_noise_covers(privacy.get("max_dropouts"), privacy.get("max_colluders")),
            *(answers if privacy.get("evaluation") else []),
            f"{NODES_SEE} {_towards_nodes(privacy)}",
            USERS_SEE,
        ]

    @classmethod
    def attacker_sees(cls, privacy: Mapping[str, Any]) -> str:
        server = "everything that the server received (sums over the nodes)"
        return f"{server} and the noise of one of the other nodes" if _covers_a_node(privacy) else server

    @classmethod
    def epsilon_of_others(cls, privacy: Mapping[str, Any]) -> str:
        """That towards another node, in records of earlier versions."""
        towards = privacy.get("epsilon_towards_nodes")
        if towards is None or _covers_a_node(privacy):
            return ""
        return f" One of the nodes itself can learn somewhat more: towards it epsilon is {towards:.3g}."

    @classmethod
    def whose_epsilon(cls, privacy: Mapping[str, Any]) -> str:
        towards, claimed = privacy.get("epsilon_towards_nodes"), privacy["epsilon"]
        server = privacy.get("epsilon_towards_server")
        if towards is not None and claimed is not None and towards > claimed:
            return f"; towards another node {towards:.3f}"  # a record of an earlier version
        return "" if server is None else f"; towards the server alone {server:.3f}"


def _covers_a_node(privacy: Mapping[str, Any]) -> bool:
    """Whether epsilon is towards the other nodes too: always, but in records of earlier versions."""
    towards, epsilon = privacy.get("epsilon_towards_nodes"), privacy["epsilon"]
    return bool(privacy.get("max_colluders")) or (
        towards is not None and epsilon is not None and towards <= epsilon
    )


def _what_noise_covers(dropouts: int | None, colluders: int | None) -> str:
    if dropouts is None or colluders is None:
        return "The record does not say how many dropouts and colluding nodes the noise covers."
    missing = (
        f"{dropouts} of the nodes may drop out of a round" if dropouts else "No node may drop out of a round"
    )
    told = (
        f"{colluders} {'node' if colluders == 1 else 'nodes'} may tell the server what noise they added"
        if colluders
        else "none may help the server to unmask another's part"
    )
    return f"{missing} (a round with more dropouts is discarded, and charged all the same), and {told}."


def _towards_nodes(privacy: Mapping[str, Any]) -> str:
    known = "It knows its own share of the noise and can take it off"
    epsilon, towards = privacy["epsilon"], privacy.get("epsilon_towards_nodes")
    if epsilon is None:
        return f"{known}."
    if not _covers_a_node(privacy):  # a record of an earlier version
        if towards is None:
            return f"{known}: towards it epsilon is larger than above (by how much the record does not say)."
        return f"{known}: **towards another node epsilon is {towards:.4g}** at the same delta."
    server = privacy.get("epsilon_towards_server")
    alone = "" if server is None else f" Towards the server alone it is {server:.4g}."
    return f"{known}, which epsilon above counts with: the guarantee holds towards it too.{alone}"


def _colluders(privacy: PrivacyConfig, nodes: int) -> int:
    """`privacy.max_colluders`, or what can be had: one, unless dropouts leave secure aggregation too few
    answers for that (it needs those of more than half of nodes and colluders together)."""
    if privacy.max_colluders is not None:
        return privacy.max_colluders
    return 1 if nodes > 1 and (nodes + 1) // 2 + 1 <= nodes - privacy.max_dropouts else 0
