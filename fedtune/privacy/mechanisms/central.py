"""Client-level DP by a trusted server: it clips whole updates, sums them and adds the noise.

McMahan et al. 2018; the unit is a client. Nodes train without clipping or noise in between. Sampling of
clients is not counted: the server, and whoever watches the network, sees who takes part. Two variants:

- `adaptive_clipping`: the norm follows a private quantile of the updates' norms (Andrew et al. 2021), whose
  price is inside the noise multiplier.
- `method=dp_ftrl` (the setting `privacy.mechanism`): the noise is correlated over rounds, and the whole run
  is one Gaussian event (`fedtune.privacy.mechanisms.matrix`). Adaptive clipping and it exclude one another:
  noise that is taken back in later rounds must have one scale in all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.errors import ConfigError, PrivacyError
from fedtune.privacy.checks import HEAD_NORM, number, probability, whole
from fedtune.privacy.mechanisms.base import (
    CORRELATED,
    NODES_SEE,
    USERS_SEE,
    Mechanism,
    Round,
    check_server_values,
)
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.mechanisms.none import NoPrivacy

if TYPE_CHECKING:
    from fedtune.config.schema import Config, Evaluation, Strategy, Unit
    from fedtune.privacy.accounting.epsilon import Term
    from fedtune.privacy.mechanisms.noise import Entropy, FloatArray
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["Central"]

_FEW_CLIENTS = 100


@dataclass(frozen=True, kw_only=True)
class Central(Mechanism):
    """A trusted server over `plan.declared_size` clients.

    `plan.noise_multiplier` is over the sensitivity of what is accounted: `max_grad_norm`, or under dp_ftrl
    that times the sensitivity of the strategy matrix.

    Attributes:
        cohort_size: updates in one aggregation, which it divides by, however many come.
        training_sample_rate: rate at which a client draws its records in the steps that nobody noises.
        training_steps: such steps between two aggregations.
        adaptive_clipping: whether the norm follows a private quantile.
        clip_quantile: which quantile, in (0, 1).
        quantile_noise: standard deviation of the noise on the count of unclipped updates.
        method: `gaussian` (independent noise) or `dp_ftrl` (correlated).
        bands: dp_ftrl: rounds over which noise is correlated.
        min_separation: dp_ftrl: rounds between two participations of a client, at least.
    """

    trust: ClassVar[str] = "central"
    strategies: ClassVar[tuple[Strategy, ...]] = ("fedavg", "fedavgm", "fedadam")
    units: ClassVar[tuple[Unit, ...]] = ("client",)
    round: ClassVar[Round] = "clipped"
    no_own_release: ClassVar[str] = "nodes train by themselves, and the server adds the noise"
    tells_size: ClassVar[bool] = False
    clips_gradients: ClassVar[bool] = False
    answers: ClassVar[bool] = False

    cohort_size: int = 1
    training_sample_rate: float = 1.0
    training_steps: int = 1
    adaptive_clipping: bool = False
    clip_quantile: float = 0.5
    quantile_noise: float = 0.0
    method: str = "gaussian"
    bands: int = 1
    min_separation: int = 1

    def __post_init__(self) -> None:
        """Raises `PrivacyError`, naming the first setting without meaning."""
        if not isinstance(self.adaptive_clipping, bool):
            raise PrivacyError(
                f"privacy.adaptive_clipping must be true or false, not {self.adaptive_clipping!r}.",
                setting="privacy.adaptive_clipping",
            )
        probability(self.training_sample_rate, "train.sample_rate")
        for name in ("cohort_size", "training_steps"):
            whole(getattr(self, name), name)
        for name in ("bands", "min_separation"):
            whole(getattr(self, name), f"privacy.{name}")
        check_server_values(self.method, self.clip_quantile)
        if not self._is_correlated and (self.bands, self.min_separation) != (1, 1):
            raise PrivacyError(
                f"privacy.bands={self.bands} and privacy.min_separation={self.min_separation} are settings "
                f"of privacy.mechanism={CORRELATED}, and this plan's is {self.method}. Leave them out.",
                setting="privacy.bands",
            )
        if self._is_correlated and self.adaptive_clipping:
            raise PrivacyError(
                f"privacy.adaptive_clipping=true does not fit privacy.mechanism={CORRELATED}: noise that is "
                "taken back in later rounds must have one scale in all of them. Leave adaptive_clipping out.",
                setting="privacy.adaptive_clipping",
            )
        number(self.quantile_noise, "quantile_noise")

    @property
    def _is_correlated(self) -> bool:
        return self.method == CORRELATED

    # --- settings -----------------------------------------------------------------------------------

    @classmethod
    def default_unit(cls, persons_named: bool) -> Unit:
        return cls.units[0]

    @classmethod
    def default_evaluation(cls, config: Config) -> Evaluation:
        """No noise but the clients' own hides what one client tells."""
        return "none"

    @classmethod
    def check_settings(cls, config: Config) -> None:
        super().check_settings(config)
        if config.privacy.head_norm:
            raise ConfigError(
                HEAD_NORM.format(config.privacy.head_norm, cls.trust), setting="privacy.head_norm"
            )

    @classmethod
    def check_server_noise(cls, config: Config) -> None:
        check_server_values(config.privacy.mechanism, config.privacy.clip_quantile)
        cls.check_bands(config)

    @classmethod
    def check_evaluation(cls, config: Config) -> None:
        if config.federation.evaluation == "private":
            raise ConfigError(
                "federation.evaluation=private does not work with privacy.trust=central: the unit is a "
                "client, and the noise that hides one client hides all that a client could tell about its "
                "own data. Use federation.evaluation=public or none, or trust=local or distributed.",
                setting="federation.evaluation",
            )
        super().check_evaluation(config)

    @classmethod
    def from_settings(cls, config: Config, nodes: int) -> Central:
        privacy, train, federation = config.privacy, config.train, config.federation
        cls.check_equal_weights(config)
        cohort = nodes if federation.cohort_size is None else federation.cohort_size
        return cls(
            cohort_size=cohort,
            training_sample_rate=probability(train.sample_rate, "train.sample_rate"),
            training_steps=whole(train.local_steps, "train.local_steps"),
            adaptive_clipping=privacy.adaptive_clipping,
            clip_quantile=privacy.clip_quantile,
            method=privacy.mechanism,
            bands=privacy.min_separation if privacy.bands is None else privacy.bands,
            min_separation=privacy.min_separation,
        )

    @classmethod
    def declared_size(cls, sizes: Sequence[int]) -> int:
        """Only the number of clients counts."""
        return len(sizes)

    def with_noise(self, noise_multiplier: float) -> Central:
        """Adaptive clipping pays for its count from the same noise multiplier."""
        if not self.adaptive_clipping:
            return self
        # A twentieth of the cohort (Andrew et al. 2021), but enough that something is left for the updates.
        noise = number(noise_multiplier, "privacy.noise_multiplier")
        return dataclasses.replace(self, quantile_noise=max(self.cohort_size / 20.0, noise))

    def check(self, plan: PrivacyPlan) -> None:
        if self.cohort_size > plan.declared_size:
            raise PrivacyError(
                f"federation.cohort_size={self.cohort_size} is more than the {plan.declared_size} clients "
                "there are.",
                setting="federation.cohort_size",
            )
        if self.adaptive_clipping and not plan.noise_multiplier < 2.0 * self.quantile_noise < math.inf:
            raise PrivacyError(
                f"Adaptive clipping spends part of the noise multiplier {plan.noise_multiplier:g} on its "
                f"quantile, and noise of {self.quantile_noise:g} on the count leaves nothing: it must be "
                f"above {plan.noise_multiplier / 2:g}."
            )
        if self._is_correlated:
            self._check_participation(plan)
            if plan.head_rounds:
                raise PrivacyError(
                    f"train.head_rounds={plan.head_rounds} does not fit privacy.mechanism={CORRELATED}: what "
                    "is dropped of the noise of one round cannot be taken back in later ones. Use "
                    "train.head_rounds=0.",
                    setting="train.head_rounds",
                )

    def _check_participation(self, plan: PrivacyPlan) -> None:
        for name in ("min_separation", "bands"):
            if getattr(self, name) > plan.num_rounds:
                raise PrivacyError(
                    f"privacy.{name}={getattr(self, name)} is more than federation.num_rounds="
                    f"{plan.num_rounds}. Lower it, or raise the number of rounds."
                )
        needed = self.cohort_size * self.min_separation
        if needed > plan.declared_size:
            raise PrivacyError(
                f"privacy.min_separation={self.min_separation} and federation.cohort_size={self.cohort_size} "
                f"ask for {needed} clients to fill every round, and there are {plan.declared_size}. Lower "
                "one of the two; their product is at most the number of clients.",
                setting="privacy.min_separation",
            )

    # --- what the accountant is told ----------------------------------------------------------------

    def sample_rate_accounted(self) -> float:
        """Clients are seen to take part, so the accountant is told of no sampling."""
        return 1.0

    def steps_per_release(self) -> int:
        """A round is one aggregation."""
        return 1

    def root(self, plan: PrivacyPlan) -> BandedRoot | None:
        return BandedRoot(plan.num_rounds, self.bands, self.min_separation) if self._is_correlated else None

    def terms(self, plan: PrivacyPlan, releases: int, after: int) -> dict[Term, int] | None:
        """Under dp_ftrl a participation's share depends on how many came before."""
        if (root := self.root(plan)) is not None:
            return root.terms(plan.noise_multiplier, releases, after)
        return super().terms(plan, releases, after)

    def to_calibrate(self, plan: PrivacyPlan) -> tuple[float, int]:
        """Under dp_ftrl the whole run is one step."""
        return (1.0, 1) if self._is_correlated else super().to_calibrate(plan)

    def why_no_noise(self, plan: PrivacyPlan) -> str:
        root = self.root(plan)
        often = "every round" if root is None else f"{root.participations} of {root.num_rounds} rounds"
        return f" The unit here is a client, and each of {plan.nodes} takes part in {often} in sight of all."

    def epsilon_towards_server(self, plan: PrivacyPlan, releases: int, answers: int) -> float:
        """It sees every raw update."""
        return math.inf

    def adjacency(self, plan: PrivacyPlan) -> str:
        """Clients are known by name and only their number is asked in a round, so that taking one away would
        put another into its place; what is protected is what a client holds (Kairouz et al. 2021 call it
        zero-out): its update is then zero, and is not counted.
        """
        return (
            "replace all that one client holds by nothing, so that its updates are zero (the list of "
            "clients is public)"
        )

    # --- what is done -------------------------------------------------------------------------------

    def expected_batch_size(self, plan: PrivacyPlan) -> float:
        return float(self.cohort_size)

    def noise_multiplier_of_sum(self, plan: PrivacyPlan) -> float:
        """More than is accounted where a quantile is paid for too.

        The count of unclipped updates, shifted to +-1/2, has sensitivity 1/2. Releasing it with noise
        `quantile_noise` and the updates with (z^-2 - (2 quantile_noise)^-2)^(-1/2) costs exactly one Gaussian
        of noise multiplier z (Andrew et al. 2021, Theorem 1). Under dp_ftrl one client's sensitivity is that
        of the strategy matrix.
        """
        if (root := self.root(plan)) is not None:
            return plan.noise_multiplier * root.sensitivity()
        if not self.adaptive_clipping:
            return plan.noise_multiplier
        return (plan.noise_multiplier**-2 - (2.0 * self.quantile_noise) ** -2) ** -0.5

    def adapt_clip(
        self, plan: PrivacyPlan, norms: npt.ArrayLike, entropy: Entropy, learning_rate: float
    ) -> PrivacyPlan:
        """The norm moves towards the private quantile of `norms` [m].

        It draws the count's noise itself, so the norm cannot adapt for free. A client whose update is zero
        votes neither way: the neighbour in which a client holds nothing must not count it as unclipped, for
        then the vote of a large update would move the count by 1 and not by the 1/2 that is paid for.
        """
        if not self.adaptive_clipping:
            return plan
        values = np.asarray(norms, dtype=np.float64)
        votes = np.where(values <= plan.max_grad_norm, 0.5, -0.5)
        shifted = float(np.sum(np.where(values == 0.0, 0.0, votes)))
        noised = shifted + float(entropy.gaussian(1, self.quantile_noise)[0])
        fraction = min(max(noised / self.cohort_size + 0.5, 0.0), 1.0)
        norm = plan.max_grad_norm * math.exp(-learning_rate * (fraction - self.clip_quantile))
        return dataclasses.replace(plan, max_grad_norm=norm)

    def weights(self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None) -> FloatArray:
        """Noise and sensitivity were fixed before, whoever came."""
        return np.full(len(nodes), 1.0 / self.cohort_size)

    def for_shard(self, plan: PrivacyPlan, declared_size: int) -> PrivacyPlan:
        """How much one client holds changes nothing."""
        whole(declared_size, "declared_size")
        return plan

    def client_training(self) -> Mechanism:
        """A client trains without clipping or noise; the server does both afterwards."""
        return NoPrivacy(sample_rate=self.training_sample_rate, local_steps=self.training_steps)

    def free_settings(self) -> Collection[str]:
        """An adaptive norm moves from round to round, at a price that is accounted."""
        return ("declared_size", "max_grad_norm") if self.adaptive_clipping else ("declared_size",)

    def refusals(self, plan: PrivacyPlan, max_sample_rate: float, min_colluders: int) -> Iterable[str]:
        """The rate at which one client's own records are drawn protects nobody."""
        return ()

    def cohort(self, asked: int | None) -> int | None:
        """It divides by its cohort: more updates than that would be a larger step."""
        return self.cohort_size

    # --- in words -----------------------------------------------------------------------------------

    def cautions(self, plan: PrivacyPlan) -> list[str]:
        found = []
        if plan.declared_size < _FEW_CLIENTS:
            found.append(
                f"With {plan.declared_size} clients no client hides among many, and useful accuracy needs a "
                "large epsilon. unit=record or person with trust=local or distributed promises more here."
            )
        if (root := self.root(plan)) is not None and (ratio := root.error_ratio()) > 0.99:
            found.append(
                f"{CORRELATED} with {self.bands} bands and a client in every {self.min_separation} rounds "
                f"has {ratio:.2f} times the error of independent noise: it helps where clients take part "
                "rarely (privacy.min_separation)."
            )
        return found

    def describe(self, plan: PrivacyPlan) -> str:
        if (root := self.root(plan)) is None:
            return "DP-FedAvg: the server clips each client's update and adds Gaussian noise to their sum"
        return (
            "DP-FTRL: the server clips each client's update and adds Gaussian noise to their sum that is "
            f"correlated over {self.bands} rounds (banded square root of the prefix-sum matrix); a client "
            f"takes part in one of {self.min_separation} rounds at most, {root.participations} times in all"
        )

    @classmethod
    def recorded_rate(cls, privacy: Mapping[str, Any]) -> float:
        """Clients are seen to take part."""
        return 1.0

    @classmethod
    def sampling(cls, privacy: Mapping[str, Any]) -> str:
        if matrix := privacy.get("matrix"):
            return (
                f"the server chooses clients, each at most once in {matrix['min_separation']} rounds, which "
                "the client's own ledger enforces too; who takes part is seen, and no amplification "
                "is claimed"
            )
        return "the server chooses clients and sees who takes part; no amplification by sampling is claimed"

    @classmethod
    def who_sees_what(cls, privacy: Mapping[str, Any]) -> list[str]:
        return [
            "The server sees every node's raw update and must be trusted: the guarantee is towards everybody "
            "else.",
            NODES_SEE,
            USERS_SEE,
        ]

    @classmethod
    def attacker_sees(cls, privacy: Mapping[str, Any]) -> str:
        return "the finished model and every model on the way (but not what the server itself received)"
