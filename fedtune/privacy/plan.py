"""One frozen object from which sampler, clipping, noise, averaging, weights and the accounted event come.

Frameworks of this kind lose their guarantee where two settings that must agree can be set apart: a
sampler here and a sampling rate in the accountant there, a clipping norm here and a sensitivity there.
A `PrivacyPlan` has each number once, and every part of a release asks the plan: `sample` draws the units,
`clip_factors` bounds them, `noise` covers them, `average` divides by a public constant, and `terms` says
to the accountant what exactly these four did.

One *release* is what one node publishes in one round. What differs between trust models is in the plan's
`mechanism`, one file each in `fedtune.privacy.mechanisms`. From settings to epsilon: `make_plan` below, the
mechanism's file, `fedtune.privacy.accounting.epsilon`, and `calibration` beside it for the way back.

Amplification by sampling is claimed only for units drawn in secret on a node. Adding or removing one unit
changes a sum of clipped units by at most `max_grad_norm`. Counts that nodes tell (of what they hold out, or
of their size) are inside the target epsilon (`fedtune.privacy.mechanisms.counts`). What the plan does not do:
bound the records of a person, or keep books (`fedtune.privacy.ledger.ledger`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.config.choices import resolved
from fedtune.config.recipe import centre_rounds, head_rounds
from fedtune.config.schema import Config
from fedtune.errors import CalibrationError, ConfigError, PrivacyError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, compose_terms, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.accounting.strength import caution, trade_off
from fedtune.privacy.checks import UNITS, default_delta, validate, whole
from fedtune.privacy.clipping import Clipping, clip_factors
from fedtune.privacy.mechanisms.base import Mechanism
from fedtune.privacy.mechanisms.counts import (
    DELTA,
    CountPlan,
    EvaluationPlan,
    SizePlan,
    check_told,
    evaluation_noise,
    evaluation_settings,
    largest,
    size_noise,
)
from fedtune.privacy.mechanisms.noise import Entropy, FloatArray, IntArray, on_grid
from fedtune.privacy.mechanisms.registry import mechanism_from_json, mechanism_of

if TYPE_CHECKING:
    from fedtune.privacy.mechanisms.matrix import BandedRoot

__all__ = ["UNITS", "PrivacyPlan", "ReleasePlan", "default_delta", "make_plan"]

_VERSION = 4  # 1: distributed noise was counted towards the server alone; 2: flat; 3: one clipping norm


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is promised, and everything that keeps the promise. See the module's docstring.

    All fields are public settings; what is private comes into the methods as arguments. Construction
    validates every field and raises `PrivacyError` naming the first that has no meaning.

    Attributes:
        mechanism: the trust model, with the settings that only it has.
        unit: of privacy: `record`, `person` or `client`.
        num_rounds: releases that a node agrees to, at most (resumed and retried ones included).
        noise_multiplier: standard deviation of the accounted noise over its sensitivity, which is
            `max_grad_norm` unless the mechanism says otherwise; 0.0 without privacy.
        max_grad_norm: L2 norm of one unit's contribution; infinite only without privacy.
        head_norm: that the head's part is clipped to by itself (`clipping`); 0.0: one norm over everything.
        head_share: of `max_grad_norm` squared, that the head's part is then worth.
        head_rounds: at the beginning, in which the head alone is trained.
        declared_size: units, public: of the node's shard, of the union, or clients.
        delta: 0.0 without privacy.
        records_per_unit: at most this many records of a person a step; 1 for unit=record.
        nodes: for which the plan was made.
        target_epsilon: what the noise was calibrated to, if it was.
        reproducible_noise: simulation only: whoever knows `seed` knows the noise.
        seed: drives sampling and noise only without privacy or with `reproducible_noise`.
        evaluation_share: of a node's units, held out to be evaluated on; 0.0: none.
        evaluation_answers: answers about them that a node agrees to, at most.
        evaluation_noise: of one answer: standard deviation over its sensitivity.
        size_noise: standard deviation, in units, of the sizes that nodes told; 0.0: declared ones.
        centre_rounds: 1 if the first round asks where texts lie, instead of for a gradient; else 0.
    """

    purpose: ClassVar[str] = "training"

    mechanism: Mechanism
    unit: str
    num_rounds: int
    noise_multiplier: float
    max_grad_norm: float
    declared_size: int
    delta: float
    head_norm: float = 0.0
    head_share: float = 0.0
    head_rounds: int = 0
    records_per_unit: int = 1
    nodes: int = 1
    target_epsilon: float | None = None
    reproducible_noise: bool = False
    seed: int = 0
    evaluation_share: float = 0.0
    evaluation_answers: int = 0
    evaluation_noise: float = 0.0
    size_noise: float = 0.0
    centre_rounds: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.mechanism, Mechanism):
            raise PrivacyError(f"A plan's mechanism must be a trust model's, not {self.mechanism!r}.")
        validate(self)

    # --- what the plan says -------------------------------------------------------------------------

    @property
    def trust(self) -> str:
        """The trust model's name."""
        return self.mechanism.trust

    @property
    def sample_rate(self) -> float:
        """Probability that a unit is in a step's batch, as it is drawn and as it is accounted."""
        return self.mechanism.sample_rate_accounted()

    @property
    def local_steps(self) -> int:
        """Noised steps in one release."""
        return self.mechanism.steps_per_release()

    @property
    def shares_noise(self) -> bool:
        """Whether no node's own noise is what is accounted, but that of a sum over nodes."""
        return self.mechanism.shares_noise

    def is_private(self) -> bool:
        """False exactly where there is no noise (trust `none`)."""
        return self.mechanism.is_private

    def settings(self) -> dict[str, Any]:
        """Every setting by name, the trust model's and its mechanism's among them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del own["mechanism"]
        return {**self.mechanism.to_json(), **own}

    def expected_batch_size(self) -> float:
        """Units that a step draws in expectation: a public constant, the divisor of every average."""
        return self.mechanism.expected_batch_size(self)

    def most_units(self) -> float:
        """Upper bound on the units that the guarantee is about: those held out for evaluation are among them,
        and as many as the noise on a size may hide. Delta must be below one over it."""
        told = self.declared_size / (1.0 - self.evaluation_share)
        return largest(told, self.size_noise, self.mechanism.nodes_in_size(self))

    def steps(self, releases: int | None = None) -> int:
        """Accounted steps in `releases` releases (default: `num_rounds`)."""
        return self.local_steps * (self.num_rounds if releases is None else releases)

    def root(self) -> BandedRoot | None:
        """The strategy matrix of noise that is correlated over rounds (dp_ftrl), None elsewhere."""
        return self.mechanism.root(self)

    def centres(self, round: int) -> bool:
        """Whether `round` (from 1), a step like any other, asks where texts lie instead of for gradients."""
        return round <= self.centre_rounds

    def check_round(self, node: str, run: str, round: int, earlier: Sequence[int]) -> None:
        """Raises `SeparationError` if a node that took part in rounds `earlier` may not do so in `round`."""
        if (root := self.root()) is not None:
            root.check(node, run, round, earlier)

    def terms(self, releases: int, answers: int = 0, *, after: int = 0) -> dict[Term, int] | None:
        """What rounds and answers cost in the accountant's own form: steps with counts; None without privacy.

        Without what a node told of its size before the first (`sizing`). `after`: releases that one run has
        made of this data before these (only dp_ftrl asks).
        """
        if isinstance(releases, bool) or releases < 0:
            raise PrivacyError(f"releases must be 0 or more, not {releases!r}.")
        answered = {} if (about := self.evaluation()) is None else about.terms(answers)
        if releases == 0:
            return answered
        return compose_terms(self.mechanism.terms(self, releases, after), answered)

    def everything(self, releases: int, answers: int = 0, *, told: bool = True) -> dict[Term, int] | None:
        """`terms`, and the size that a node told before, unless it was never asked for one (`told`)."""
        sizing = self.sizing() if told else None
        return compose_terms(self.terms(releases, answers), {} if sizing is None else sizing.terms(1))

    def epsilon(self, releases: int | None = None, answers: int = 0, *, told: bool = True) -> float:
        """Upper bound on epsilon, at the plan's delta, of `releases` rounds and `answers` answers about
        held-out data; by default of all that the plan allows. Whatever is shown of a run comes from here."""
        if releases is None:
            releases, answers = self.num_rounds, self.evaluation_answers
        terms = self.everything(releases, answers, told=told)
        return math.inf if terms is None else epsilon_of_terms(terms, self.delta)

    def epsilon_rdp(self, releases: int, answers: int = 0, *, told: bool = True) -> float:
        """As `epsilon`, by Renyi DP: looser, and independent code."""
        terms = self.everything(releases, answers, told=told)
        return math.inf if terms is None else epsilon_rdp_of_terms(terms, self.delta)

    def largest_epsilon(self, made: Iterable[tuple[int, int]]) -> float | None:
        """The largest over nodes that made so many (releases, answers), PITFALLS 29; None without privacy."""
        if not self.is_private():
            return None
        counts = set(made)
        # Of two nodes one may have answered less: only those that no other exceeds are accounted.
        most = [a for a in counts if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in counts)]
        return max((self.epsilon(*count) for count in most if any(count)), default=0.0)

    def epsilon_towards_server(self, releases: int | None = None, answers: int = 0) -> float:
        """As `epsilon`, towards the server alone; infinite if it sees raw updates."""
        if releases is None:
            releases, answers = self.num_rounds, self.evaluation_answers
        return self.mechanism.epsilon_towards_server(self, releases, answers)

    def sizing(self) -> SizePlan | None:
        """How a node told its size, before there was a plan; None where its owner declared it."""
        return None if self.size_noise == 0.0 else SizePlan(**self._count(self.size_noise))

    def evaluation(self) -> EvaluationPlan | None:
        """How a node may answer about its held-out units; None where it may not."""
        if self.evaluation_answers == 0:
            return None
        common = self._count(self.evaluation_noise)
        return EvaluationPlan(**common, share=self.evaluation_share, num_rounds=self.evaluation_answers)

    def _count(self, noise_multiplier: float) -> dict[str, Any]:
        """What a noised count of this run obeys, whatever is counted."""
        return {
            "trust": self.trust,
            "unit": self.unit,
            "noise_multiplier": noise_multiplier,
            "delta": self.delta,
            "reproducible_noise": self.reproducible_noise,
            "seed": self.seed,
        }

    def adjacency(self) -> str:
        """Which data sets count as neighbours, in words."""
        return self.mechanism.adjacency(self)

    def cautions(self) -> list[str]:
        """What a person should know before relying on this plan; empty where there is nothing to add."""
        found = []
        if self.reproducible_noise:
            found.append("Noise comes from `seed`: whoever knows it can subtract it. For simulations only.")
        found += self.mechanism.cautions(self)
        if self.is_private():
            terms, epsilon = self.everything(self.num_rounds, self.evaluation_answers), self.epsilon()
            weak = caution(trade_off(terms, epsilon, self.delta), epsilon, self.delta)
            found += [] if weak is None else [weak]
        return found

    # --- what the plan does -------------------------------------------------------------------------

    def entropy(self, node: str, round: int, repetition: int = 0) -> Entropy:
        """Randomness of one release: the operating system's, except where nothing is promised.

        System entropy has no state to repeat: a round that is resumed or repeated draws afresh. Elsewhere
        the draws follow from the seed, the node and the round alone, so that a run that was resumed ends as
        the one that was not. `repetition`: for an audit, which runs one plan many times.
        """
        if self.is_private() and not self.reproducible_noise:
            return Entropy.system()
        return Entropy.reproducible(self.seed, node, round, repetition)

    def sample(self, num_units: int, entropy: Entropy) -> IntArray:
        """Poisson sample: each of `num_units` units with probability `sample_rate`, independently. Indices,
        int64 [m]; m may be 0, and the step is taken all the same."""
        return np.flatnonzero(entropy.bernoulli(num_units, self.sample_rate)).astype(np.int64)

    def head_alone(self, round: int) -> bool:
        """Whether `round` (from 1) trains the head alone; what is released has the adapter's size as ever."""
        return round <= self.head_rounds

    @property
    def clipping(self) -> Clipping:
        """What is clipped together, and to what L2 norm."""
        return Clipping(self.max_grad_norm, self.head_norm, self.head_share)

    def clip_factors(self, norms: npt.ArrayLike, most: float | None = None) -> FloatArray:
        """See `fedtune.privacy.clipping`; `most` is `max_grad_norm` unless it is given."""
        return clip_factors(norms, self.max_grad_norm if most is None else most)

    def noise_std(self) -> float:
        """Of the noise on one whole sum (0.0 without privacy; dp_ftrl: before it is correlated)."""
        return self.update_noise_multiplier() * self.max_grad_norm if self.is_private() else 0.0

    def update_noise_multiplier(self) -> float:
        """Noise on one sum over `max_grad_norm`; more than is accounted, where more is paid for."""
        return self.mechanism.noise_multiplier_of_sum(self)

    def noise(self, size: int, entropy: Entropy) -> FloatArray:
        """Noise of one whole sum, float64 [size]; zeros without privacy. Where nodes share it, this is what
        those together add whose noise is counted on; for dp_ftrl it is white (`mechanisms.matrix`)."""
        return entropy.gaussian(size, self.noise_std())

    def average(self, noised_sum: npt.ArrayLike) -> FloatArray:
        """`noised_sum` over the expected batch size, rounded to a grid far below the noise. (The size of a
        Poisson batch depends on who was drawn, so dividing by it would release it.)"""
        values = on_grid(np.asarray(noised_sum, dtype=np.float64), self.noise_std())
        return values / self.expected_batch_size()

    def aggregation_weights(
        self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None = None
    ) -> FloatArray:
        """Weights [len(nodes)] with which the server averages the updates of `nodes`; see `Mechanism`."""
        if not nodes:
            return np.zeros(0, dtype=np.float64)
        return self.mechanism.weights(nodes, declared_sizes)

    def adapt_clip(self, norms: npt.ArrayLike, entropy: Entropy, learning_rate: float = 0.2) -> PrivacyPlan:
        """The next round's plan, its norm moved where the mechanism adapts it to `norms` [m] (paid for)."""
        return self.mechanism.adapt_clip(self, norms, entropy, learning_rate)

    # --- on a node ----------------------------------------------------------------------------------

    def for_shard(self, declared_size: int) -> PrivacyPlan:
        """With which a node of `declared_size` units trains. Raises `PrivacyError` if delta is none there."""
        return self.mechanism.for_shard(self, declared_size)

    def training_plan(self, declared_size: int) -> PrivacyPlan:
        """What the steps on one node obey: this plan itself, unless the server noises what they give."""
        inner = self.mechanism.client_training()
        if inner is None:
            return self.for_shard(declared_size)
        return PrivacyPlan(
            mechanism=inner,
            unit="record",
            num_rounds=self.num_rounds,
            noise_multiplier=0.0,
            max_grad_norm=math.inf,
            declared_size=whole(declared_size, "declared_size"),
            delta=0.0,
            seed=self.seed,
            head_rounds=self.head_rounds,
        )

    # --- as text ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite norm is null."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["mechanism"] = self.mechanism.to_json()
        if math.isinf(self.max_grad_norm):
            values["max_grad_norm"] = None
        return {"version": _VERSION, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """Reads what `to_json` wrote.

        Raises:
            PrivacyError: another version, missing or unknown keys, any value that the plan itself refuses.
        """
        if not isinstance(values, Mapping):
            raise PrivacyError(f"A privacy plan is a JSON object, not {type(values).__name__}.")
        given = dict(values)
        version = given.pop("version", None)
        if version != _VERSION or isinstance(version, bool):
            raise PrivacyError(
                f"A privacy plan of version {version!r} cannot be read; this is {_VERSION}. Use the same "
                "version of fedtune everywhere, or start a new run."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(set(given) ^ names):
            raise PrivacyError(f"A privacy plan has missing or unknown keys: {', '.join(map(str, wrong))}.")
        given["mechanism"] = mechanism_from_json(given["mechanism"])
        if given["max_grad_norm"] is None:
            given["max_grad_norm"] = math.inf
        return cls(**given)


# What a release is made by, as far as a ledger reads it.
ReleasePlan = PrivacyPlan | CountPlan


# --- a run's plan ------------------------------------------------------------------------------------


def make_plan(
    config: Config, declared_sizes: Sequence[int], largest_delta: float | None = None
) -> PrivacyPlan:
    """The plan of a run: settings checked, defaults filled in, the noise calibrated.

    It reads settings and public sizes and nothing else, before any private data is read; a node makes the
    same plan from its own configuration and compares.

    Args:
        config: complete.
        declared_sizes: the public size of each node's shard in units of `privacy.unit` (of clients only their
            number counts), without what is held out for evaluation.
        largest_delta: which a default delta is not to exceed (the smallest of the owners' budgets').

    Returns:
        A plan whose default delta is below 1/n for every shard (`default_delta`), or a constant where sizes
        are told with noise. A node takes its own plan with `for_shard`.

    Raises:
        PrivacyError: a setting without meaning; or one unit has all the data, and no delta is given.
        CalibrationError: no noise meets the target.
    """
    config = resolved(config)
    privacy = config.privacy
    if not declared_sizes:
        raise PrivacyError("A plan needs the declared size of at least one node.")
    sizes = [whole(size, "declared size of a node") for size in declared_sizes]
    kind = mechanism_of(privacy.trust)
    declared, nodes = kind.declared_size(sizes), len(sizes)
    share, answers = evaluation_settings(config)
    told = size_noise(config)
    if config.federation.cohort_size is not None:
        whole(config.federation.cohort_size, "federation.cohort_size")
    common: dict[str, Any] = {
        "unit": privacy.unit,
        "num_rounds": config.federation.num_rounds,
        "head_rounds": head_rounds(config),
        "declared_size": declared,
        "records_per_unit": 1,
        "nodes": nodes,
        "seed": config.seed,
        "evaluation_share": share,
        "evaluation_answers": answers,
        "size_noise": told,
        "centre_rounds": centre_rounds(config),
    }
    if privacy.unit == "person":
        common["records_per_unit"] = whole(privacy.records_per_unit, "privacy.records_per_unit")
    if not kind.is_private:
        if privacy.noise_multiplier not in (None, 0.0):
            raise PrivacyError(
                f"privacy.trust={kind.trust} adds no noise, but privacy.noise_multiplier is "
                f"{privacy.noise_multiplier}. Choose trust=local, distributed or central, or leave the noise "
                "multiplier out.",
                setting="privacy.noise_multiplier",
            )
        mechanism = kind.from_settings(config, nodes)
        return PrivacyPlan(
            **common, mechanism=mechanism, noise_multiplier=0.0, max_grad_norm=math.inf, delta=0.0
        )
    try:
        kind.check_server_noise(config)  # a setting of another mechanism is refused, never ignored
    except ConfigError as error:
        raise PrivacyError(str(error), setting=error.setting) from error
    mechanism = kind.from_settings(config, nodes)
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        both = privacy.epsilon is not None
        raise PrivacyError(
            f"privacy.epsilon and privacy.noise_multiplier are {'both' if both else 'neither'} set; one "
            "determines the other. Set one and give the other as null: privacy.epsilon=null to choose the "
            "noise, privacy.noise_multiplier=null to choose the guarantee."
        )
    if declared == 1 and not told and kind.tells_size and privacy.delta is None and largest_delta is None:
        way_out = ", privacy.unit=record, or another column in data.unit" if privacy.unit == "person" else ""
        raise PrivacyError(
            f"One {privacy.unit} holds all the data, so there is nobody to hide it among, and no delta can "
            f"be chosen for you. Choose a privacy.delta of your own (1e-5, say){way_out}."
        )
    # What is declared is what is trained on; who is held out is promised the same. Of sizes that were told
    # with noise no part of the mechanism may follow: it would then be chosen after a release was seen.
    default = DELTA if told else default_delta(declared / (1.0 - share))
    limit = math.inf if largest_delta is None else largest_delta
    delta = min(default, limit) if privacy.delta is None else privacy.delta
    if told:
        check_told(privacy.delta, delta, privacy.epsilon, largest(declared / (1.0 - share), told, nodes))
    common["evaluation_noise"] = evaluation_noise(config, delta, answers) if answers else 0.0
    common |= {
        "max_grad_norm": privacy.max_grad_norm,
        "head_norm": privacy.head_norm or 0.0,
        "head_share": privacy.head_share if privacy.head_norm else 0.0,
        "delta": delta,
        "target_epsilon": privacy.epsilon,
        "reproducible_noise": privacy.reproducible_noise,
    }

    def with_noise(noise: float) -> PrivacyPlan:
        return PrivacyPlan(**common, mechanism=mechanism.with_noise(noise), noise_multiplier=noise)

    # A plan with any noise first: it refuses every setting without meaning before time is spent.
    draft = with_noise(1.0 if privacy.noise_multiplier is None else privacy.noise_multiplier)
    if privacy.epsilon is None:
        return draft
    rate, steps = mechanism.to_calibrate(draft)
    also = draft.everything(0, answers)
    try:
        noise = noise_multiplier_for(privacy.epsilon, delta, sample_rate=rate, steps=steps, also=also)
    except CalibrationError as error:
        raise CalibrationError(f"{error}{mechanism.why_no_noise(draft)}", setting=error.setting) from error
    return with_noise(noise)
