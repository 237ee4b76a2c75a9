"""One frozen object from which sampler, clipping, noise, averaging, weights and the accounted event come.

Frameworks of this kind lose their guarantee where two settings that must agree can be set apart: a
sampler here and a sampling rate in the accountant there, a clipping norm here and a sensitivity there.
A `PrivacyPlan` has each number once, and every part of a release asks the plan: `sample` draws the units,
`clip_factors` bounds them, `noise` covers them, `average` divides by a public constant, and `event` says
to the accountant what exactly these four did.

One *release* is what one node publishes in one round. By trust model:

- `local`: `local_steps` steps of DP-SGD (Abadi et al. 2016; Poisson sampling as in Mironov et al. 2019),
  full noise in each, so that what leaves the node is already private.
- `distributed`: one step of DP-SGD over the union of all shards. Each node adds a share of the noise, and
  under secure aggregation only the sum is seen. Everybody in it sees the model of every round and knows its
  own share, so what is accounted is what the strongest observer cannot take off: the shares of
  `honest_shares` nodes, with `max_dropouts` missing and `max_colluders` (one at least) known. Towards the
  server alone less is lost (`epsilon_towards_server`). Accounted as the continuous Gaussian;
  `fedtune.privacy.mechanisms.discrete` says how far the discrete one is from it.
- `central`: one aggregation of whole updates, clipped and noised by a trusted server (McMahan et al.
  2018); the unit is a client. Sampling of clients is not counted: the server, and whoever watches the
  network, sees who takes part. With `mechanism=dp_ftrl` the noise is correlated over rounds and the run is
  one Gaussian event (`fedtune.privacy.mechanisms.matrix`).
- `none`: the same code path without noise; epsilon is infinite.

Amplification by sampling is claimed only for units drawn in secret on a node. Adding or removing one unit
changes a sum of clipped units by at most `max_grad_norm`, and the event is for that adjacency. What the
plan does not do: bound the records of a person (`records_per_unit` is applied where persons are formed),
or keep books (`fedtune.privacy.ledger.ledger`).

Where nodes answer questions about data that they hold out, the plan owns that mechanism too
(`PrivacyPlan.evaluation`, `fedtune.privacy.evaluation`): its answers are inside the target epsilon. So is
what nodes tell of their size, where no owner declares it (`PrivacyPlan.sizing`, `fedtune.privacy.sizes`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.accounting.strength import caution, trade_off
from fedtune.privacy.checks import TRUSTS, UNITS, validate, whole
from fedtune.privacy.evaluation import EvaluationPlan
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.mechanisms.noise import Entropy, FloatArray, IntArray, on_grid
from fedtune.privacy.sizes import SizePlan, largest

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = ["TRUSTS", "UNITS", "PrivacyPlan", "ReleasePlan"]

_VERSION = 2  # 1: distributed noise was counted towards the server alone


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is promised, and everything that keeps the promise. See the module's docstring.

    All fields are public settings; what is private comes into the methods as arguments. Construction
    validates every field and raises `PrivacyError` naming the first that has no meaning.
    """

    purpose: ClassVar[str] = "training"

    trust: str  # local | distributed | central | none
    unit: str  # record | person | client
    sample_rate: float  # probability that a unit is in a step's batch
    local_steps: int  # noised steps a release; 1 for distributed and central
    num_rounds: int  # releases that a node agrees to, at most (resumed and retried ones included)
    noise_multiplier: float  # standard deviation of the accounted noise over its sensitivity, which is
    # max_grad_norm (dp_ftrl: of the whole run, max_grad_norm times that of the strategy matrix);
    # distributed: of the noise that the strongest observer does not know
    max_grad_norm: float  # L2 norm of one unit's contribution; infinite only without privacy
    declared_size: int  # units, public: of the node's shard (local), of all shards (distributed), clients
    delta: float  # 0.0 without privacy
    records_per_unit: int = 1  # at most this many records of a person a step; 1 for unit=record
    target_epsilon: float | None = None  # what the noise was calibrated to, if it was
    reproducible_noise: bool = False  # simulation only: whoever knows `seed` knows the noise
    seed: int = 0  # drives sampling and noise only if trust is none or reproducible_noise is true
    weighting: str = "uniform"  # uniform | declared: how updates are averaged (local and none)
    nodes: int = 1  # distributed: nodes that share the noise; central: clients; else informative
    max_dropouts: int = 0  # distributed: nodes that may be missing from a sum
    max_colluders: int = 0  # distributed: nodes that may side with the server; the noise covers one at least
    cohort_size: int = 1  # central: updates in one aggregation
    training_sample_rate: float = 1.0  # central: record rate of the (not noised) steps on a client
    training_steps: int = 1  # central: steps on a client between two aggregations
    adaptive_clipping: bool = False  # central: the norm follows a private quantile
    clip_quantile: float = 0.5  # central: which quantile
    quantile_noise: float = 0.0  # central: standard deviation of the noise on the count of unclipped
    evaluation_share: float = 0.0  # of a node's units, held out to be evaluated on; 0.0: none
    evaluation_answers: int = 0  # answers about them that a node agrees to, at most
    evaluation_noise: float = 0.0  # of one answer: standard deviation over its sensitivity
    size_noise: float = 0.0  # standard deviation, in units, of the sizes that nodes told; 0.0: declared ones
    mechanism: str = "gaussian"  # gaussian | dp_ftrl (central): independent or correlated noise
    bands: int = 1  # dp_ftrl: rounds over which noise is correlated
    min_separation: int = 1  # dp_ftrl: rounds between two participations of a client, at least

    def __post_init__(self) -> None:
        validate(self)

    # --- what the plan says -------------------------------------------------------------------------

    def is_private(self) -> bool:
        """False exactly where there is no noise (trust `none`)."""
        return self.trust != "none"

    def expected_batch_size(self) -> float:
        """Units that a step draws in expectation: a public constant, the divisor of every average."""
        if self.trust == "central":
            return float(self.cohort_size)
        return self.sample_rate * self.declared_size

    def most_units(self) -> float:
        """Units that the guarantee may be about, at most: what is held out, and what a size that was told
        with noise may hide, included. Delta must be below one over it."""
        told = self.declared_size / (1.0 - self.evaluation_share)
        return largest(told, self.size_noise, self.nodes if self.trust == "distributed" else 1)

    def steps(self, releases: int | None = None) -> int:
        """Accounted steps in `releases` releases (default: `num_rounds`)."""
        return self.local_steps * (self.num_rounds if releases is None else releases)

    def root(self) -> BandedRoot | None:
        """The strategy matrix of dp_ftrl, None elsewhere."""
        if self.mechanism != "dp_ftrl":
            return None
        return BandedRoot(self.num_rounds, self.bands, self.min_separation)

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
        about = self.evaluation()
        answered = {} if about is None else about.terms(answers)
        if releases == 0:
            return answered
        if not self.is_private():
            return None
        if (root := self.root()) is not None:
            return root.terms(self.noise_multiplier, releases, after)
        # Clients are seen to take part, so for them the accountant is told of no sampling.
        rate = 1.0 if self.trust == "central" else self.sample_rate
        return compose_terms({Term(rate, self.noise_multiplier): self.steps(releases)}, answered)

    def event(self, releases: int, answers: int = 0) -> DpEvent:
        """What `releases` rounds and `answers` answers of this plan, and the size that was told before them,
        cost one unit, for the accountant."""
        import dp_accounting as dp

        terms = self.everything(releases, answers)
        if terms is None:
            return dp.NonPrivateDpEvent()
        if (root := self.root()) is not None:
            terms = root.merged(self.noise_multiplier, releases)
        parts = []
        for term, count in terms.items():
            step: DpEvent = dp.GaussianDpEvent(term.noise_multiplier)
            if term.sample_rate < 1.0:
                step = dp.PoissonSampledDpEvent(term.sample_rate, step)
            parts.append(dp.SelfComposedDpEvent(step, count))
        return parts[0] if len(parts) == 1 else dp.ComposedDpEvent(parts)

    def everything(self, releases: int, answers: int = 0) -> dict[Term, int] | None:
        """`event` in the accountant's own form: `terms`, and the size that the node told before."""
        sizing = self.sizing()
        return compose_terms(self.terms(releases, answers), {} if sizing is None else sizing.terms(1))

    def epsilon(self, releases: int | None = None, answers: int = 0) -> float:
        """Upper bound on epsilon, at the plan's delta, of `releases` rounds and `answers` answers about
        held-out data; by default of all that the plan allows. A size that was told with noise is in it."""
        from fedtune.privacy.accounting.epsilon import epsilon_of_terms

        if releases is None:
            releases, answers = self.num_rounds, self.evaluation_answers
        terms = self.everything(releases, answers)
        return math.inf if terms is None else epsilon_of_terms(terms, self.delta)

    def sizing(self) -> SizePlan | None:
        """How a node told its size, before there was a plan; None where its owner declared it."""
        if self.size_noise == 0.0:
            return None
        return SizePlan(
            trust=self.trust,
            unit=self.unit,
            noise_multiplier=self.size_noise,
            delta=self.delta,
            reproducible_noise=self.reproducible_noise,
            seed=self.seed,
        )

    def evaluation(self) -> EvaluationPlan | None:
        """How a node may answer about its held-out units; None where it may not."""
        if self.evaluation_answers == 0:
            return None
        return EvaluationPlan(
            trust=self.trust,
            unit=self.unit,
            share=self.evaluation_share,
            num_rounds=self.evaluation_answers,
            noise_multiplier=self.evaluation_noise,
            delta=self.delta,
            reproducible_noise=self.reproducible_noise,
            seed=self.seed,
        )

    def adjacency(self) -> str:
        """Which data sets count as neighbours, in words.

        Clients are known by name and only their number is asked in a round, so that taking one away would
        put another into its place; what is protected is what a client holds (Kairouz et al. 2021 call it
        zero-out): its update is then zero, and is not counted.
        """
        if self.trust == "central":
            return (
                "replace all that one client holds by nothing, so that its updates are zero (the list of "
                "clients is public)"
            )
        return f"add or remove one {self.unit}"

    def cautions(self) -> list[str]:
        """What a person should know before relying on this plan; empty where there is nothing to add."""
        found = []
        if self.reproducible_noise:
            found.append("Noise comes from `seed`: whoever knows it can subtract it. For simulations only.")
        if self.trust == "central" and self.declared_size < 100:
            found.append(
                f"With {self.declared_size} clients no client hides among many, and useful accuracy needs a "
                "large epsilon. unit=record or person with trust=local or distributed promises more here."
            )
        if (root := self.root()) is not None and (ratio := root.error_ratio()) > 0.99:
            found.append(
                f"dp_ftrl with {self.bands} bands and a client in every {self.min_separation} rounds has "
                f"{ratio:.2f} times the error of independent noise: it helps where clients take part rarely "
                "(privacy.min_separation)."
            )
        if self.is_private():
            terms, epsilon = self.everything(self.num_rounds, self.evaluation_answers), self.epsilon()
            weak = caution(trade_off(terms, epsilon, self.delta), epsilon, self.delta)
            found += [] if weak is None else [weak]
        return found

    # --- what the plan does -------------------------------------------------------------------------

    def entropy(self, node: str, round: int, repetition: int = 0) -> Entropy:
        """Randomness of one release: the operating system's, except where nothing is promised.

        System entropy has no state to repeat: a round that is resumed or repeated draws afresh. Elsewhere
        (no privacy, or reproducible noise, which whoever knows the seed can subtract anyway) the draws
        follow from the seed, the node and the round alone, so that a run that was interrupted and resumed
        ends as the one that was not. `repetition`: for an audit, which runs one plan many times.
        """
        if self.is_private() and not self.reproducible_noise:
            return Entropy.system()
        return Entropy.reproducible(self.seed, node, round, repetition)

    def sample(self, num_units: int, entropy: Entropy) -> IntArray:
        """Poisson sample: each of `num_units` units with probability `sample_rate`, independently.

        Returns the indices drawn, int64 [m]; m may be 0, and the step is taken all the same.
        """
        return np.flatnonzero(entropy.bernoulli(num_units, self.sample_rate)).astype(np.int64)

    def clip_factors(self, norms: npt.ArrayLike) -> FloatArray:
        """Factors [m] that scale contributions of L2 norm `norms` [m] to at most `max_grad_norm`.

        min(1, C / norm); 1 for a norm of 0; 0 for a norm that is not finite: a contribution that cannot
        be measured contributes nothing. (The caller must then replace NaN by 0, for 0 times NaN is NaN.)
        """
        values = np.asarray(norms, dtype=np.float64)
        finite = np.isfinite(values)
        safe = np.where(finite & (values > 0.0), values, 1.0)
        if math.isinf(self.max_grad_norm):
            return np.where(finite, 1.0, 0.0)
        with np.errstate(over="ignore"):  # a tiny norm: the quotient is infinite and 1 is the minimum
            factors = np.minimum(1.0, self.max_grad_norm / safe)
        # Below that floats lose digits, and the scaled norm could end up above the bound.
        factors = np.where(factors < 1e-290, 0.0, factors)
        return np.where(finite, np.where(values > 0.0, factors, 1.0), 0.0)

    def noise_std(self) -> float:
        """Standard deviation of the noise on one whole sum (0.0 without privacy; dp_ftrl: before it is
        correlated)."""
        return self.update_noise_multiplier() * self.max_grad_norm if self.is_private() else 0.0

    def noise(self, size: int, entropy: Entropy) -> FloatArray:
        """Noise of one whole sum, float64 [size]; zeros without privacy.

        For `distributed` this is what `honest_shares` nodes together add. For dp_ftrl it is white,
        and `fedtune.privacy.mechanisms.matrix.CorrelatedNoise` makes of it what is added.
        """
        return entropy.gaussian(size, self.noise_std())

    def average(self, noised_sum: npt.ArrayLike) -> FloatArray:
        """`noised_sum` over the expected batch size, rounded to a grid far below the noise.

        The size of a Poisson batch depends on who was drawn, so dividing by it would release it.
        """
        values = np.asarray(noised_sum, dtype=np.float64)
        size = self.expected_batch_size()
        return on_grid(values, self.noise_std()) / size

    def aggregation_weights(
        self, nodes: Sequence[str], declared_sizes: Mapping[str, int] | None = None
    ) -> FloatArray:
        """Weights [len(nodes)] with which the server averages the updates of `nodes`.

        Uniform, or by declared public sizes; never by what a node counted. Where the sum carries the
        noise (central, distributed) each update counts 1 / `cohort_size` whoever came, because noise and
        sensitivity were fixed before; elsewhere the weights sum to 1.
        """
        count = len(nodes)
        if count == 0:
            return np.zeros(0, dtype=np.float64)
        if self.trust == "central":
            return np.full(count, 1.0 / self.cohort_size)
        if self.trust == "distributed":
            return np.ones(count, dtype=np.float64)
        if self.weighting == "uniform":
            return np.full(count, 1.0 / count)
        missing = [name for name in nodes if name not in (declared_sizes or {})]
        if declared_sizes is None or missing:
            raise PrivacyError(
                f"federation.weighting=declared needs the declared size of every node; missing: "
                f"{', '.join(missing)}. Give them, or use federation.weighting=uniform."
            )
        sizes = np.array([whole(declared_sizes[n], f"declared size of {n}") for n in nodes], dtype=np.float64)
        return np.asarray(sizes / sizes.sum(), dtype=np.float64)

    # --- distributed --------------------------------------------------------------------------------

    def honest_shares(self) -> int:
        """Shares of the noise in every accepted sum that its strongest observer does not know (distributed).

        All nodes but `max_dropouts` are in it. `max_colluders` tell the server theirs; a node that looks at
        the result by itself knows its own. So one share at least is taken off, though no node colludes
        (none where there is one node: it protects its data from others).
        """
        return self.nodes - self.max_dropouts - max(min(1, self.nodes - 1), self.max_colluders)

    def epsilon_towards_server(self, releases: int | None = None, answers: int = 0) -> float:
        """As `epsilon`, towards the server alone, with which no node sides; infinite if it sees raw updates.

        Under `distributed` it knows no share of the noise: sigma * sqrt(1 + known / honest_shares).
        """
        if self.trust == "central":
            return math.inf
        if self.trust != "distributed":
            return self.epsilon(releases, answers)
        shares = self.nodes - self.max_dropouts
        noise = self.noise_multiplier * math.sqrt(shares / self.honest_shares()) * (1.0 - 1e-12)
        return dataclasses.replace(self, noise_multiplier=noise).epsilon(releases, answers)

    # --- central ------------------------------------------------------------------------------------

    def update_noise_multiplier(self) -> float:
        """Noise on the updates, over `max_grad_norm`: more than is accounted where a quantile is paid too.

        The count of unclipped updates, shifted to +-1/2, has sensitivity 1/2. Releasing it with noise
        `quantile_noise` and the updates with (z^-2 - (2 quantile_noise)^-2)^(-1/2) costs exactly one Gaussian
        of noise multiplier z (Andrew et al. 2021, Theorem 1). Under dp_ftrl one client's sensitivity is that
        of the strategy matrix.
        """
        if (root := self.root()) is not None:
            return self.noise_multiplier * root.sensitivity()
        if not self.adaptive_clipping:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2.0 * self.quantile_noise) ** -2) ** -0.5

    def adapt_clip(self, norms: npt.ArrayLike, entropy: Entropy, learning_rate: float = 0.2) -> PrivacyPlan:
        """The plan of the next round, its norm moved towards the private quantile of `norms` [m].

        Draws the count's noise itself, so the norm cannot adapt for free. With `adaptive_clipping` off
        the plan comes back as it is. The cost is in `event` already. A client whose update is zero votes
        neither way: the neighbour in which a client holds nothing must not count it as unclipped, for then
        the vote of a large update would move the count by 1 and not by the 1/2 that is paid for.
        """
        if not self.adaptive_clipping:
            return self
        values = np.asarray(norms, dtype=np.float64)
        votes = np.where(values <= self.max_grad_norm, 0.5, -0.5)
        shifted = float(np.sum(np.where(values == 0.0, 0.0, votes)))
        noised = shifted + float(entropy.gaussian(1, self.quantile_noise)[0])
        fraction = min(max(noised / self.cohort_size + 0.5, 0.0), 1.0)
        norm = self.max_grad_norm * math.exp(-learning_rate * (fraction - self.clip_quantile))
        return dataclasses.replace(self, max_grad_norm=norm)

    # --- on a node ----------------------------------------------------------------------------------

    def for_shard(self, declared_size: int) -> PrivacyPlan:
        """The plan with which a node of `declared_size` units (public) trains.

        For `local` and `none` its own size is the divisor. For `distributed` the union stays: all nodes
        divide by one constant. Raises `PrivacyError` if delta is no delta for a shard of that size.
        """
        if self.trust in ("distributed", "central"):
            whole(declared_size, "declared_size")
            return self
        return dataclasses.replace(self, declared_size=whole(declared_size, "declared_size"))

    def training_plan(self, declared_size: int) -> PrivacyPlan:
        """What the steps on one node obey: this plan itself, except under a trusted server.

        For `central` the node trains without clipping or noise, and the server does both afterwards;
        the plan that comes back says so (trust `none`).
        """
        if self.trust != "central":
            return self.for_shard(declared_size)
        return PrivacyPlan(
            trust="none",
            unit="record",
            sample_rate=self.training_sample_rate,
            local_steps=self.training_steps,
            num_rounds=self.num_rounds,
            noise_multiplier=0.0,
            max_grad_norm=math.inf,
            declared_size=whole(declared_size, "declared_size"),
            delta=0.0,
            seed=self.seed,
        )

    # --- as text ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite norm is null."""
        values = dataclasses.asdict(self)
        if math.isinf(self.max_grad_norm):
            values["max_grad_norm"] = None
        return {"version": _VERSION, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """Reads what `to_json` wrote. Raises `PrivacyError` on another version, missing or unknown keys, and
        on any value that the plan itself refuses."""
        if not isinstance(values, Mapping):
            raise PrivacyError(f"A privacy plan is a JSON object, not {type(values).__name__}.")
        given = dict(values)
        version = given.pop("version", None)
        if version == 1 and given.get("trust") == "distributed" and not isinstance(version, bool):
            raise PrivacyError(
                "This plan with privacy.trust=distributed was made by an earlier version of fedtune, which "
                "counted the noise towards the server alone; towards another node it promises less than it "
                "says. Start a new run."
            )
        if version not in (1, _VERSION) or isinstance(version, bool):
            raise PrivacyError(f"A privacy plan of version {version!r} cannot be read; this is {_VERSION}.")
        names = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted(set(given) ^ names)
        if wrong:
            raise PrivacyError(f"A privacy plan has missing or unknown keys: {', '.join(map(str, wrong))}.")
        if given["max_grad_norm"] is None:
            given["max_grad_norm"] = math.inf
        return cls(**given)


# What a release is made by, as far as a ledger reads it.
ReleasePlan = PrivacyPlan | EvaluationPlan | SizePlan
