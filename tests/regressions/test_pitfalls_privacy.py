"""Privacy bugs that such frameworks have shipped (see PITFALLS), as far as plan and ledger decide them.

Where the design makes a bug impossible, the test shows that it cannot be written down; where it could come
back, the test holds the right value and rejects the wrong one.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import dp_accounting as dp
import numpy as np
import pytest

import fedtune.privacy
from fedtune.config.recipe import filled
from fedtune.config.schema import Config, FederationConfig, TrainConfig
from fedtune.errors import BudgetExhausted, PrivacyError
from fedtune.privacy.accounting.epsilon import Term, conversions, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, spent
from fedtune.privacy.ledger import budget_report as budget
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.mechanisms import noise
from fedtune.privacy.mechanisms.noise import Entropy, on_grid
from fedtune.privacy.plan import PrivacyPlan, make_plan
from fedtune.privacy.statement.facts import statement_markdown
from tests.privacy.statement.test_statement import record
from tests.support.events import epsilon_of, epsilon_rdp, terms_of
from tests.support.ledgers import charged
from tests.support.plans import central_plan, distributed_plan, event_of, local_plan, public_plan


def release(ledger: PrivacyLedger, plan: PrivacyPlan, round: int = 0, run: str = "run-1") -> None:
    ledger.reserve(dataset="d", fingerprint="f", node="n", run=run, round=round, plan=plan)


def test_pitfall_01_poisson_accounting_for_batches_that_are_not_poisson() -> None:
    """The sampler is the plan's, and its rate is the event's: sizes vary as Poisson sampling's do."""
    plan = local_plan(sample_rate=0.1)
    ((term, _),) = (plan.terms(1) or {}).items()
    sizes = np.array([len(plan.sample(400, Entropy.system())) for _ in range(2000)])
    expected = 400 * term.sample_rate
    assert abs(sizes.mean() - expected) < 6 * math.sqrt(expected * 0.9 / 2000)
    assert sizes.var() > 0.7 * expected * 0.9  # a fixed or cyclic batch has none
    assert terms_of(event_of(plan, 1)) == {term: 5}


def test_pitfall_02_accountant_starts_afresh_every_round(tmp_path: Path) -> None:
    plan = local_plan()
    one = epsilon_of(event_of(plan, 1), plan.delta)
    for round in range(12):
        # As the example does it: a new object every round. The books are in the file.
        release(PrivacyLedger(tmp_path / "n.sqlite"), plan, round)
    shown = PrivacyLedger(tmp_path / "n.sqlite").epsilon(dataset="d", fingerprint="f")
    assert shown == epsilon_of(event_of(plan, 12), plan.delta) > 1.9 * one


def test_pitfall_03_the_plan_of_a_resumed_or_late_node_is_the_whole_plan() -> None:
    """Every round carries the plan; no method works without noise unless the plan says trust none."""
    arrived = PrivacyPlan.from_json(local_plan().to_json())
    assert arrived.noise_std() > 0 and arrived.clip_factors([5.0]).tolist() == [0.2]
    with pytest.raises(PrivacyError):
        PrivacyPlan.from_json({**local_plan().to_json(), "noise_multiplier": 0.0})
    with pytest.raises(PrivacyError):
        PrivacyPlan.from_json({k: v for k, v in local_plan().to_json().items() if k != "max_grad_norm"})


def test_pitfall_04_weights_by_example_counts_break_the_noise_scale() -> None:
    with pytest.raises(TypeError, match="weighting"):  # there is no such setting, nor in a plan's JSON
        central_plan(weighting="declared")
    plan = central_plan(cohort_size=20)
    for present in (1, 5, 20):
        weights = plan.aggregation_weights([f"n{i}" for i in range(present)])
        # One update moves the weighted sum by at most C / cohort, which is what the noise was sized for.
        assert weights.max() * plan.max_grad_norm <= plan.max_grad_norm / plan.expected_batch_size()
    uneven = np.array([0.7, 0.1, 0.1, 0.1])
    assert uneven.max() > central_plan(cohort_size=4).aggregation_weights(list("abcd")).max()


def test_pitfall_05_clip_and_sensitivity_cannot_disagree() -> None:
    names = {field.name for field in dataclasses.fields(PrivacyPlan)}
    assert not {name for name in names if "sensitivity" in name or name in ("sigma", "noise_std", "clip")}
    for norm in (1e-4, 1.0, 50.0):
        plan = local_plan(max_grad_norm=norm)
        largest = 1e9 * plan.clip_factors([1e9])[0]  # what one unit can add
        assert plan.noise_std() / largest == pytest.approx(plan.noise_multiplier)
        ((term, _),) = (plan.terms(1) or {}).items()
        assert term.noise_multiplier == plan.noise_std() / plan.max_grad_norm


def test_pitfall_06_client_rate_times_batch_rate_as_if_each_step_drew_the_client_anew() -> None:
    config = Config(train=TrainConfig(sample_rate=0.1, local_steps=4))
    config.federation.cohort_size = 1  # of four nodes: a quarter of the rounds each
    few = make_plan(config, [1000] * 4)
    config.federation.cohort_size = None
    all_of_them = make_plan(config, [1000] * 4)
    assert few.terms(12) == all_of_them.terms(12)
    ((term, _),) = (few.terms(12) or {}).items()
    assert term.sample_rate == config.train.sample_rate  # not a quarter of it


def test_pitfall_07_the_classical_gaussian_formula_above_epsilon_one_and_no_composition() -> None:
    epsilon, delta = 6.0, 1e-5
    classical = math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # "valid" for epsilon below 1 only
    config = Config()
    config.privacy.epsilon, config.privacy.delta = epsilon, delta
    config.train.sample_rate, config.train.local_steps, config.federation.num_rounds = 1.0, 1, 10
    plan = make_plan(config, [1000])
    assert epsilon_of_terms({Term(1.0, classical): 10}, delta) > 2 * epsilon  # what not composing promises
    assert plan.epsilon() <= epsilon and plan.noise_multiplier > 2 * classical
    # Where the classical formula is not valid at all, we do not use it: epsilon 20 in one shot.
    once = math.sqrt(2 * math.log(1.25 / 0.4)) / 20
    assert epsilon_of_terms({Term(1.0, once): 1}, 0.4) > 20


def test_pitfall_08_an_estimate_where_an_upper_bound_is_meant() -> None:
    """A Gaussian DP central limit is below the truth here; what we report never is."""
    terms, delta = {Term(0.01, 0.6): 100}, 1e-6
    mu = conversions(terms).mu
    claimed = epsilon_of_terms({Term(1.0, 1 / mu): 1}, delta)  # the epsilon of that mu
    reported = epsilon_of_terms(terms, delta)
    assert claimed < reported <= epsilon_rdp(dp.SelfComposedDpEvent(
        dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(0.6)), 100), delta)  # fmt: skip
    assert "not a bound" in conversions(terms).mu_is
    assert "not a bound" in statement_markdown(record())


def test_pitfall_09_heuristics_sold_as_privacy() -> None:
    for delta in (0.5, 1e-3, 1.0):  # n is 1000
        with pytest.raises(PrivacyError, match="delta"):
            local_plan(delta=delta)
    assert Config().privacy.epsilon is not None and Config().privacy.epsilon <= 10
    config = Config()
    config.privacy.epsilon = 100.0
    assert any("A weak protection at best" in caution for caution in make_plan(config, [1000]).cautions())
    assert "without any privacy guarantee" in statement_markdown(record("none"))


def test_pitfall_10_metrics_on_private_data_unaccounted(tmp_path: Path) -> None:
    """Accuracy on a node's own data is two noised counts, charged like a round, inside the target."""
    config = Config()
    config.federation.evaluation, config.privacy.epsilon = "private", 3.0
    plan = make_plan(config, [1000])
    evaluation = plan.evaluation()
    assert evaluation is not None
    ledger = PrivacyLedger.open(tmp_path / "n.sqlite")
    for round in range(plan.num_rounds):
        release(ledger, plan, round)
    trained = ledger.epsilon(dataset="d", fingerprint="f", delta=plan.delta)
    ledger.reserve(
        dataset="d", fingerprint="f", node="n", run="run-1", round=plan.num_rounds, plan=evaluation
    )
    assert trained < ledger.epsilon(dataset="d", fingerprint="f", delta=plan.delta) <= 3.0
    # Calibrate the training alone to the target, as frameworks do, and the counts come on top.
    config.federation.evaluation, config.privacy.delta = "public", plan.delta
    free = make_plan(config, [1000])
    assert (
        epsilon_of_terms({**(free.terms(free.num_rounds) or {}), **(evaluation.terms(1) or {})}, free.delta)
        > 3.0
    )


def test_pitfall_11_tuning_leaks(tmp_path: Path) -> None:
    """Every run of a sweep is in the ledger, so the best one cannot be quoted as if it had been the only."""
    ledger = PrivacyLedger(tmp_path / "n.sqlite")
    for trial in range(5):
        for round in range(3):
            release(ledger, local_plan(), round, run=f"trial-{trial}")
    best = ledger.epsilon(dataset="d", fingerprint="f", run="trial-3", delta=1e-5)
    total = ledger.epsilon(dataset="d", fingerprint="f", delta=1e-5)
    # Each trial was chosen after the last one was seen: their sum is counted by Renyi DP, which is larger.
    assert total == spent([RunSteps({Term(0.05, 1.0): 15}, None)] * 5, 1e-5)
    assert total > epsilon_of_terms({Term(0.05, 1.0): 75}, 1e-5) > best
    text = statement_markdown(record())
    assert "Choice of settings" in text and "epsilon over all uses" in text


def test_pitfall_15_division_by_the_drawn_batch_size() -> None:
    plan = local_plan(sample_rate=0.1, declared_size=1000)
    total = np.full(4, 30.0)
    # `average` cannot know the drawn size: it is no argument, and only public settings are fields.
    assert list(inspect.signature(plan.average).parameters) == ["noised_sum"]
    assert plan.average(total) == pytest.approx(np.full(4, 0.3), abs=1e-9)
    # For the union it is the union's declared size on every node, whatever the shard holds.
    union = distributed_plan(declared_size=5000, sample_rate=0.1)
    assert union.for_shard(700).expected_batch_size() == 500.0


def test_pitfall_16_an_empty_batch_or_a_nan_skips_the_step_or_divides_by_zero() -> None:
    plan = local_plan(sample_rate=1e-12)
    assert len(plan.sample(1000, Entropy.system())) == 0
    empty = plan.average(np.zeros(3) + plan.noise(3, Entropy.system()))
    assert np.isfinite(empty).all() and empty.all()  # noise alone, and the step is taken
    assert plan.clip_factors([math.nan, math.inf, 0.0]).tolist() == [0.0, 0.0, 1.0]


def test_pitfall_17_adaptive_clipping_is_not_free() -> None:
    fixed = central_plan(noise_multiplier=1.0)
    adaptive = central_plan(noise_multiplier=1.0, adaptive_clipping=True, quantile_noise=1.0)
    # The same epsilon, so the updates get more noise: that is what the quantile costs.
    assert adaptive.epsilon() == fixed.epsilon()
    assert adaptive.noise_std() > 1.1 * fixed.noise_std()
    with pytest.raises(PrivacyError, match="quantile"):
        central_plan(noise_multiplier=1.0, adaptive_clipping=True, quantile_noise=0.4)
    with pytest.raises(TypeError, match="adaptive_clipping"):
        local_plan(adaptive_clipping=True)


def test_pitfall_18_weighted_samplers_change_the_inclusion_probability() -> None:
    """There is one rate for all units, and no argument through which a unit could get another."""
    assert list(inspect.signature(local_plan().sample).parameters) == ["num_units", "entropy"]
    counts = np.zeros(50)
    plan = local_plan(sample_rate=0.2)
    for _ in range(4000):
        counts[plan.sample(50, Entropy.system())] += 1
    assert np.max(np.abs(counts / 4000 - 0.2)) < 6 * math.sqrt(0.2 * 0.8 / 4000)
    # What a weighted sampler would really cost: the rarest class, ten times as likely.
    assert epsilon_of_terms({Term(0.5, 1.0): 60}, 1e-5) > 3 * epsilon_of_terms({Term(0.05, 1.0): 60}, 1e-5)


def test_pitfall_19_the_number_of_steps_is_fixed_before_data_is_read() -> None:
    parameters = inspect.signature(make_plan).parameters
    # Public settings, public sizes, and the delta of the owners' budgets, which they chose beforehand.
    assert list(parameters) == ["config", "declared_sizes", "largest_delta"]
    config = Config(train=TrainConfig(local_steps=3), federation=FederationConfig(num_rounds=7))
    assert make_plan(config, [1000]).steps() == 21
    # What nobody set is the recipe's, which has no way to look at data.
    assert list(inspect.signature(filled).parameters) == ["config"]


def test_pitfall_20_a_guarantee_per_record_where_a_person_has_many(tmp_path: Path) -> None:
    text = statement_markdown(record(unit="record"))
    assert "A person with several records" in text
    owner = PrivacyLedger(tmp_path / "n.sqlite")
    owner.set_budget(PrivacyBudget(8.0, 1e-5, unit="person"))
    with pytest.raises(BudgetExhausted, match="person"):
        release(owner, local_plan(unit="record"))


def test_pitfall_21_a_repeated_round_is_charged_again_and_dropouts_leave_enough_noise(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "n.sqlite")
    for _ in range(2):
        release(ledger, local_plan(), round=3)  # failed, and asked again
    assert charged(ledger, "d", "f") == {Term(0.05, 1.0): 10}
    plan = distributed_plan(nodes=10, max_dropouts=3, noise_multiplier=1.0)
    share = 1.0 / math.sqrt(plan.mechanism.honest_shares(plan))
    # as much as promised, with three gone and one that knows its own
    assert math.sqrt(10 - 3 - 1) * share == pytest.approx(1.0)
    naive = 1.0 / math.sqrt(10)
    assert math.sqrt(10 - 3 - 1) * naive < 0.78  # what shares for ten nodes would leave


def test_pitfall_22_resuming_reuses_the_noise() -> None:
    plan = local_plan(seed=42)
    before = plan.noise(100, plan.entropy("n", 5, 0))
    resumed = PrivacyPlan.from_json(plan.to_json())  # a new process with the same plan, node, round
    after = resumed.noise(100, resumed.entropy("n", 5, 0))
    assert not np.intersect1d(before, after).size
    # Only noise that the seed gives away from the start comes back, for a resumed simulation to end alike.
    simulated = local_plan(seed=42, reproducible_noise=True)
    first = simulated.noise(100, simulated.entropy("n", 5))
    assert np.array_equal(first, simulated.noise(100, simulated.entropy("n", 5)))
    assert any("subtract" in caution for caution in simulated.cautions())


def off_grid(values: np.ndarray, grid: float) -> float:
    """How far, in steps of `grid`, the worst of `values` lies from a whole number of them."""
    steps = values / grid
    return float(np.max(np.abs(steps - np.round(steps))))


def test_pitfall_42_a_test_that_cannot_fail() -> None:
    """Rounding noise was tested with a relative tolerance of 1e-5 on numbers near 1e9: all numbers passed."""
    raw = Entropy.system().gaussian(2000, 1.0)
    raw = raw[np.abs(raw) > 1e-3]  # the relative tolerance hides nothing near 0
    assert np.allclose(raw * 2.0**30, np.round(raw * 2.0**30), atol=1e-3)  # nothing was rounded here
    assert off_grid(raw, 2.0**-30) > 0.4
    assert off_grid(on_grid(raw, 1.0), 2.0**-30) == 0.0


def test_pitfall_23_ordinary_generators_and_floating_point_noise() -> None:
    """Noise comes from the operating system, and its low bits, which tell the value, are rounded away."""
    plan = local_plan()
    values = np.array([0.0, 0.1])  # neighbours: which of them lies under the noise?
    for value in values:
        raw = value + plan.noise(2000, Entropy.system())
        shown = plan.average(raw) * plan.expected_batch_size()
        # An absolute tolerance: there are near 1e9 steps, and relative to that every number is a whole one.
        assert off_grid(shown, 2.0**-30) < 1e-5
        assert off_grid(raw, 2.0**-30) > 0.4  # the mutant: the average without its grid
        assert np.max(np.abs(shown - raw)) <= 2.0**-31 * 1.001  # and no more is rounded than that
    for node in ast.walk(ast.parse(Path(noise.__file__).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            # The only numpy generator is Philox, in `reproducible`.
            assert node.value.attr != "random" or node.attr in ("Generator", "Philox")


def test_pitfall_24_a_public_seed_drives_the_noise() -> None:
    for seed in (0, 42):
        plans = [make(seed=seed) for make in (local_plan, distributed_plan, central_plan)]
        for plan in plans:
            one, two = plan.entropy("n", 0, 0), plan.entropy("n", 0, 0)
            assert not one.is_reproducible
            assert not np.array_equal(plan.noise(9, one), plan.noise(9, two))
            assert not np.array_equal(one.words(9, "sampling"), two.words(9, "sampling"))
    assert public_plan(seed=42).entropy("n", 0, 0).is_reproducible
    for path in Path(fedtune.privacy.__path__[0]).glob("*.py"):
        assert "default_rng" not in path.read_text(), path


def test_pitfall_27_epsilon_without_delta_unit_or_adjacency() -> None:
    for trust, unit in (("local", "record"), ("distributed", "person"), ("central", "client")):
        text = statement_markdown(record(trust, unit))
        for line in (line for line in text.splitlines() if "**Epsilon" in line):
            assert "at delta" in line
        assert f"Unit of privacy: {unit}" in text and "Adjacency:" in text
    assert {"delta", "unit", "mechanism"} <= {f.name for f in dataclasses.fields(PrivacyPlan)}
    with pytest.raises(TypeError):
        epsilon_of(event_of(local_plan(), 1))  # type: ignore[call-arg]


def test_pitfall_28_amplification_although_the_adversary_sees_who_took_part() -> None:
    sampled = central_plan(cohort_size=20, declared_size=200)  # a tenth of the clients a round
    everyone = central_plan(cohort_size=200, declared_size=200)
    with pytest.raises(TypeError, match="sample_rate"):  # there is no rate that an accountant could read
        central_plan(sample_rate=0.1)
    assert central_plan(training_sample_rate=0.1).terms(12) == sampled.terms(12)
    assert sampled.terms(12) == everyone.terms(12) == {Term(1.0, 1.0): 12}
    amplified = epsilon_of_terms({Term(0.1, 1.0): 12}, sampled.delta)
    assert sampled.epsilon() > 3 * amplified  # what would be claimed wrongly


def test_pitfall_29_averaging_epsilon_over_clients(tmp_path: Path) -> None:
    paths = [tmp_path / "a.sqlite", tmp_path / "b.sqlite"]
    for path, rounds in zip(paths, (12, 2), strict=True):
        for round in range(rounds):
            PrivacyLedger.open(path).reserve(
                dataset="d", fingerprint=path.stem, node=path.stem, run="r", round=round, plan=local_plan()
            )
    shown = {entry["node"]: entry["epsilon"] for entry in budget.show(paths).json}
    assert shown == {
        "a": epsilon_of_terms({Term(0.05, 1.0): 60}, 1e-5),
        "b": epsilon_of_terms({Term(0.05, 1.0): 10}, 1e-5),
    }
    per_node = [{"node": n, "epsilon": e, "delta": 1e-5, "releases": 1} for n, e in shown.items()]
    text = statement_markdown(record(epsilon=max(shown.values()), per_node=per_node))
    assert "the largest over all nodes" in text


def test_pitfall_30_zero_dimensional_arrays_slip_through() -> None:
    plan = local_plan(max_grad_norm=1.0)
    assert plan.clip_factors(np.float64(4.0)).item() == 0.25
    assert plan.clip_factors(np.float64(math.nan)).item() == 0.0
    averaged = plan.average(np.array(100.0))
    assert averaged.shape == () and averaged == pytest.approx(100.0 / plan.expected_batch_size())
    assert plan.noise(1, Entropy.system())[0] != 0.0
