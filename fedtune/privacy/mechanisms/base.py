"""What a trust model decides: the contract that each file beside this one fulfils.

A `Mechanism` says who must be believed, and owns everything that follows from that: its settings and what
they must obey, at which rate units are drawn as far as the accountant may know, how much noise is added
where, by what a sum is divided, what a release costs, towards whom, how a round is done, and the sentences in
which all of it is told. A `PrivacyPlan` (`fedtune.privacy.plan`) holds one, beside the numbers that every
mechanism needs; what samples and noises asks the plan, and so does what is accounted.

Three kinds of member: class attributes say what a trust model is; class methods read settings, before there
is a plan, or a finished run's record; methods take the plan that holds the mechanism. The defaults here are
those of a mechanism whose node noises what it sends: a subclass overrides what differs.

Pure: nothing here or in a subclass knows of a network, a model or a file.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from fedtune.errors import ConfigError, PrivacyError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.checks import number, whole

if TYPE_CHECKING:
    from fedtune.config.schema import Config, Evaluation, Strategy, Unit
    from fedtune.privacy.mechanisms.matrix import BandedRoot
    from fedtune.privacy.mechanisms.noise import Entropy, FloatArray
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["CORRELATED", "NODES_SEE", "USERS_SEE", "Mechanism", "Round", "check_server_values"]

NODES_SEE = "Each node sees its own data and the shared adapter of every round."
USERS_SEE = "Whoever gets the model sees the finished adapter."
Round = Literal["plain", "clipped", "secure_sum"]
CORRELATED = "dp_ftrl"  # privacy.mechanism: noise that is correlated over rounds
_METHODS = ("gaussian", CORRELATED)


def check_server_values(method: Any, clip_quantile: Any) -> None:
    """Raises `PrivacyError` for a `privacy.mechanism` or `privacy.clip_quantile` without any meaning."""
    if method not in _METHODS:
        raise PrivacyError(
            f"privacy.mechanism must be one of {', '.join(_METHODS)}, not {method!r}.",
            setting="privacy.mechanism",
        )
    quantile = number(clip_quantile, "privacy.clip_quantile")
    if not 0.0 < quantile < 1.0:
        raise PrivacyError(
            f"privacy.clip_quantile must lie strictly between 0 and 1, not {quantile}.",
            setting="privacy.clip_quantile",
        )


class Mechanism(ABC):
    """One trust model. Subclasses are frozen dataclasses; their fields are its public settings.

    Attributes:
        trust: its name, as `privacy.trust` has it.
        is_private: whether it adds noise at all.
        units: the units of privacy that it can protect, the finest first.
        round: how the server forms a round's sum: of updates as they come (`plain`), of updates that it clips
            and noises itself (`clipped`), or without seeing any of them (`secure_sum`).
        strategies: values of `federation.strategy` that it can be trained with, its default first.
        takes_local_steps: `train.local_steps` means something to it.
        fixed_nodes: the noise is shared out over the nodes of the beginning, so that none may join later.
        shares_noise: no node's noise is enough by itself: the sum holds what is accounted.
        tells_size: the plan follows from the sizes of shards, so that nodes tell them.
        clips_gradients: nodes clip the gradients of units; else whole updates are clipped, or nothing is.
        answers: nodes may answer, with noise, about data that they hold out.
        no_own_release: why what a node sends is no release by itself, where `round` is not `plain`.
        adding_up: what happens to delta where one person's data lies on several nodes.
        arithmetic: how noise and training are computed, and what that leaves open.
    """

    trust: ClassVar[str]
    is_private: ClassVar[bool] = True
    units: ClassVar[tuple[Unit, ...]] = ("record", "person")
    round: ClassVar[Round] = "plain"
    strategies: ClassVar[tuple[Strategy, ...]] = ("fedsgd", "fedavg", "fedavgm", "fedadam")
    takes_local_steps: ClassVar[bool] = True
    fixed_nodes: ClassVar[bool] = False
    shares_noise: ClassVar[bool] = False
    tells_size: ClassVar[bool] = True
    clips_gradients: ClassVar[bool] = True
    answers: ClassVar[bool] = True
    no_own_release: ClassVar[str] = ""
    adding_up: ClassVar[str] = ""
    arithmetic: ClassVar[str] = (
        "noise is a float; the known attack on its low bits is countered, which is no proof."
    )

    # --- settings, before there is a plan -----------------------------------------------------------

    @classmethod
    def default_unit(cls, persons_named: bool) -> Unit:
        """What `privacy.unit=auto` means where the data does, or does not, say whose record is whose."""
        return "person" if persons_named else "record"

    @classmethod
    def default_evaluation(cls, config: Config) -> Evaluation:
        """What `federation.evaluation=auto` means where no test data is public.

        Where the noise is given, nobody has said what answers may cost.
        """
        given = config.privacy.epsilon is None and config.federation.evaluation_epsilon is None
        return "none" if given else "private"

    @classmethod
    def check_settings(cls, config: Config) -> None:
        """Raises `ConfigError`, naming both settings, for a combination that this trust model refuses."""
        privacy = config.privacy
        if privacy.epsilon is not None and privacy.noise_multiplier is not None:
            raise ConfigError(
                f"privacy.epsilon={privacy.epsilon:g} and privacy.noise_multiplier="
                f"{privacy.noise_multiplier:g} were both given, but each follows from the other. Give "
                "privacy.epsilon to have the noise calibrated, or privacy.noise_multiplier to have the "
                "epsilon computed.",
                setting="privacy.epsilon",
            )
        if privacy.epsilon is None and privacy.noise_multiplier is None:
            raise ConfigError(
                f"privacy.trust={cls.trust} needs privacy.epsilon (the noise is then calibrated) or "
                "privacy.noise_multiplier (epsilon is then computed). For a run without any privacy, say "
                "privacy.trust=none.",
                setting="privacy.trust",
            )
        if privacy.noise_multiplier == 0:
            raise ConfigError(
                f"privacy.noise_multiplier=0 with privacy.trust={cls.trust} would promise privacy without "
                "noise. Give a multiplier above 0, or say privacy.trust=none.",
                setting="privacy.noise_multiplier",
            )
        cls.check_server_noise(config)
        cls.check_evaluation(config)

    @classmethod
    def check_server_noise(cls, config: Config) -> None:
        """Raises `ConfigError` for settings of noise that a trusted server makes, which only `central` has;
        `PrivacyError` for values without meaning.
        """
        privacy = config.privacy
        check_server_values(privacy.mechanism, privacy.clip_quantile)
        if privacy.adaptive_clipping:
            raise ConfigError(
                f"privacy.adaptive_clipping=true works with privacy.trust=central only, not with "
                f"{cls.trust}.",
                setting="privacy.adaptive_clipping",
            )
        if privacy.mechanism == CORRELATED:
            raise ConfigError(
                f"privacy.mechanism={CORRELATED} works with privacy.trust=central only, not with "
                f"{cls.trust}: a server that all clients trust makes its noise.",
                setting="privacy.mechanism",
            )
        cls.check_bands(config)

    @classmethod
    def check_bands(cls, config: Config) -> None:
        """Raises `ConfigError` for settings of correlated noise where there is none."""
        privacy = config.privacy
        if privacy.mechanism != CORRELATED and (privacy.bands is not None or privacy.min_separation != 1):
            raise ConfigError(
                f"privacy.bands and privacy.min_separation are settings of privacy.mechanism={CORRELATED}, "
                f"and it is {privacy.mechanism}. Leave them out, or start from privacy=central_ftrl."
            )

    @classmethod
    def check_equal_weights(cls, config: Config) -> None:
        """Raises `PrivacyError` for weights other than those that the noise was sized for."""
        if config.federation.weighting != "uniform":
            raise PrivacyError(
                f"federation.weighting={config.federation.weighting} does not fit privacy.trust={cls.trust}: "
                "the noise was sized for equal weights. Use federation.weighting=uniform.",
                setting="federation.weighting",
            )

    @classmethod
    def check_evaluation(cls, config: Config) -> None:
        """Raises `ConfigError` if the model may not be evaluated as `federation.evaluation` says."""
        privacy, federation = config.privacy, config.federation
        if federation.evaluation == "held_out":
            raise ConfigError(
                "federation.evaluation=held_out evaluates on private data without noise, which only a run "
                f"without privacy does (privacy.trust=none), and privacy.trust is {cls.trust}. Leave "
                "federation.evaluation out, or use private or none.",
                setting="federation.evaluation",
            )
        if federation.evaluation != "private":
            return
        part, target = federation.evaluation_epsilon, privacy.epsilon
        if part is not None and target is not None and part >= target:
            raise ConfigError(
                f"federation.evaluation_epsilon={part:g} leaves nothing for training of "
                f"privacy.epsilon={target:g}, which it is a part of. Lower it (a quarter costs training "
                "little), or raise privacy.epsilon.",
                setting="federation.evaluation_epsilon",
            )
        if part is None and target is None:
            raise ConfigError(
                "federation.evaluation=private with privacy.noise_multiplier needs "
                "federation.evaluation_epsilon, which says what all answers about held-out data may cost.",
                setting="federation.evaluation_epsilon",
            )

    @classmethod
    @abstractmethod
    def from_settings(cls, config: Config, nodes: int) -> Mechanism:
        """The mechanism of a run of `nodes` nodes. Raises `PrivacyError`, naming the setting."""

    @classmethod
    def declared_size(cls, sizes: Sequence[int]) -> int:
        """Units that a plan is about, from the declared sizes of all shards: those of the largest."""
        return max(sizes)

    # --- what the accountant is told ----------------------------------------------------------------

    @abstractmethod
    def sample_rate_accounted(self) -> float:
        """Probability that a unit is in a step, as far as it is drawn in secret; 1.0 where it is seen."""

    @abstractmethod
    def steps_per_release(self) -> int:
        """Noised steps in what one node releases in one round."""

    def terms(self, plan: PrivacyPlan, releases: int, after: int) -> dict[Term, int] | None:
        """What `releases` (1 or more) cost a unit; None without privacy. `after`: releases before these."""
        return {Term(self.sample_rate_accounted(), plan.noise_multiplier): plan.steps(releases)}

    def to_calibrate(self, plan: PrivacyPlan) -> tuple[float, int]:
        """(sampling rate, number of steps) for which noise is sought that meets the plan's target."""
        return self.sample_rate_accounted(), plan.steps()

    def why_no_noise(self, plan: PrivacyPlan) -> str:
        """What to add to the message that no noise meets the target; empty where there is nothing."""
        return ""

    def epsilon_towards_server(self, plan: PrivacyPlan, releases: int, answers: int) -> float:
        """Epsilon towards a server that no node colludes with; infinite if it sees raw updates."""
        return plan.epsilon(releases, answers)

    def adjacency(self, plan: PrivacyPlan) -> str:
        """Which data sets count as neighbours, in words."""
        return f"add or remove one {plan.unit}"

    # --- what is done -------------------------------------------------------------------------------

    def expected_batch_size(self, plan: PrivacyPlan) -> float:
        """Units in a step, in expectation: a public constant."""
        return self.sample_rate_accounted() * plan.declared_size

    def noise_multiplier_of_sum(self, plan: PrivacyPlan) -> float:
        """Noise on one sum over `max_grad_norm`; 0.0 without privacy."""
        return plan.noise_multiplier

    def noise_on_average(self, plan: PrivacyPlan, sizes: Mapping[str, int]) -> float:
        """Standard deviation of the noise on each number of what the server makes of one step by each of the
        nodes of declared `sizes` (one or more), by name."""
        weights = self.weights(list(sizes), sizes)
        # Each divides by its own size; one that no delta allows is its node's to refuse, no error here.
        of_one_unit = plan.noise_std() / plan.expected_batch_size() * plan.declared_size
        noise = of_one_unit / np.array(list(sizes.values()), dtype=np.float64)
        return float(np.linalg.norm(weights * noise) / weights.sum())

    def noise_over_gradients(self, plan: PrivacyPlan, sizes: Mapping[str, int], numbers: int) -> float:
        """How long the noise of all steps together is, over what gradients together can be at most.

        The average of a step has noise of s on each of its P numbers, and a norm of at most C: over T steps
        that is s sqrt(P / T) / C. From public numbers; 0.0 where no gradient is noised.

        Args:
            plan: the run's.
            sizes: declared sizes of the nodes that take part, by name.
            numbers: P, that are trained.
        """
        if not self.is_private or not self.clips_gradients:
            return 0.0
        return self.noise_on_average(plan, sizes) * math.sqrt(numbers / plan.steps()) / plan.max_grad_norm

    @abstractmethod
    def weights(self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None) -> FloatArray:
        """Weights [len(nodes)] of the updates of `nodes` (one or more) in what the server makes of them."""

    def with_noise(self, noise_multiplier: float) -> Mechanism:
        """This mechanism, with whatever else follows from the noise."""
        return self

    def adapt_clip(
        self, plan: PrivacyPlan, norms: npt.ArrayLike, entropy: Entropy, learning_rate: float
    ) -> PrivacyPlan:
        """The plan of the next round, from the norms of this round's updates."""
        return plan

    def root(self, plan: PrivacyPlan) -> BandedRoot | None:
        """The strategy matrix of noise that is correlated over rounds; None: it is independent."""
        return None

    # --- on a node ----------------------------------------------------------------------------------

    def for_shard(self, plan: PrivacyPlan, declared_size: int) -> PrivacyPlan:
        """The plan with which a node of `declared_size` units trains: its own size is the divisor."""
        return dataclasses.replace(plan, declared_size=whole(declared_size, "declared_size"))

    def client_training(self) -> Mechanism | None:
        """The mechanism of steps on a node whose result somebody else noises; None: they are the plan's."""
        return None

    def sizes_like(self, plan: PrivacyPlan) -> list[int]:
        """Sizes of shards for which a plan with the numbers of `plan` would be made, whatever they were."""
        return [plan.declared_size] * plan.nodes

    def free_settings(self) -> Collection[str]:
        """What a server may choose in a plan that a node compares with its own, beside the noise."""
        return ()

    def check_shard(self, plan: PrivacyPlan, node: str, declared_size: int) -> None:
        """Raises `PrivacyError` if a node of `declared_size` units cannot be part of `plan`."""
        return

    def refusals(self, plan: PrivacyPlan, max_sample_rate: float, min_colluders: int) -> Iterable[str]:
        """What a site's owner does not permit of what only this mechanism has, each in words."""
        if not self.sample_rate_accounted() <= max_sample_rate:
            yield f"sample_rate={plan.sample_rate:g} is above the permitted {max_sample_rate:g}"

    # --- on the server ------------------------------------------------------------------------------

    def least_nodes(self, plan: PrivacyPlan) -> int:
        """Nodes without which a round cannot be done."""
        return 1

    def cohort(self, asked: int | None) -> int | None:
        """Nodes that a round asks at most, where `asked` are configured; None: all."""
        return asked

    def nodes_in_size(self, plan: PrivacyPlan) -> int:
        """How many nodes' told sizes are in the plan's declared size."""
        return 1

    # --- what must hold -----------------------------------------------------------------------------

    def check(self, plan: PrivacyPlan) -> None:
        """Raises `PrivacyError` if a private plan's numbers do not fit this mechanism's."""
        return

    def cautions(self, plan: PrivacyPlan) -> list[str]:
        """What a person should know before relying on the plan."""
        return []

    # --- in words -----------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, plan: PrivacyPlan) -> str:
        """The mechanism in words, as a run's record has it."""

    # --- of a finished run's record: `privacy` is that part of it --------------------------------------

    @classmethod
    def recorded_rate(cls, privacy: Mapping[str, Any]) -> float:
        """The sampling rate that a record's steps were accounted with."""
        return float(privacy["sample_rate"])

    @classmethod
    def sampling(cls, privacy: Mapping[str, Any]) -> str:
        """How units were drawn."""
        if privacy["sample_rate"] == 1.0:
            return f"every {privacy['unit']} takes part in every step"
        return (
            f"Poisson: in every step each {privacy['unit']} is drawn by itself with probability "
            f"{privacy['sample_rate']:g}, in secret on its node; sums are divided by the expected, never the "
            "drawn, size"
        )

    @classmethod
    @abstractmethod
    def who_sees_what(cls, privacy: Mapping[str, Any]) -> list[str]:
        """Who sees what, and who must therefore be believed, a sentence or more each."""

    @classmethod
    @abstractmethod
    def attacker_sees(cls, privacy: Mapping[str, Any]) -> str:
        """What the guarantee's attacker looks at, as the object of a sentence."""

    @classmethod
    def epsilon_of_others(cls, privacy: Mapping[str, Any]) -> str:
        """A sentence on an epsilon that is larger than the one claimed; empty where there is none."""
        return ""

    @classmethod
    def whose_epsilon(cls, privacy: Mapping[str, Any]) -> str:
        """What to add to the claimed epsilon in one line: over whom, or towards whom, it is."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the trust model's name, and each setting."""
        return {"trust": self.trust, **vars(self)}
