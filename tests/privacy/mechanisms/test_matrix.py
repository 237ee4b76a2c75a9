"""The banded square root: its sensitivity against brute force, its noise against the matrix, its error."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import Config
from fedtune.errors import BudgetExhausted, ConfigError, PrivacyError, SeparationError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, spent
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.mechanisms.matrix import BandedRoot, CorrelatedNoise, _down
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.events import epsilon_of
from tests.support.golden import Golden
from tests.support.plans import central_plan, event_of

SHAPES = [
    (n, bands, b)
    for n in (1, 2, 5, 9)
    for bands in (1, 2, 3, 9)
    for b in (1, 2, 3, 4, 9)
    if bands <= n and b <= n
]


def dense(root: BandedRoot) -> np.ndarray:
    """C as a whole, from binomial coefficients: independent of `coefficients`."""
    c = np.zeros((root.num_rounds, root.num_rounds))
    for i in range(root.num_rounds):
        for j in range(i + 1):
            if i - j < root.bands:
                c[i, j] = math.comb(2 * (i - j), i - j) / 4 ** (i - j)
    return c


def patterns(n: int, b: int) -> list[tuple[int, ...]]:
    """Every set of rounds, no two of which are closer than b."""
    every = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
    return [one for one in every if all(later - sooner >= b for sooner, later in itertools.pairwise(one))]


def ftrl(**changes: Any) -> PrivacyPlan:
    """Forty rounds; a client takes part in one of ten, four times in all."""
    values = {"method": "dp_ftrl", "num_rounds": 40, "bands": 10, "min_separation": 10, "cohort_size": 20}
    return central_plan(**{**values, **changes})


# --- sensitivity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "bands", "b"), SHAPES)
def test_the_closed_form_is_the_worst_of_all_patterns(n: int, bands: int, b: int) -> None:
    root = BandedRoot(n, bands, b)
    c = dense(root)
    worst = [0.0] * (root.participations + 1)
    for pattern in patterns(n, b):
        norm = float(np.linalg.norm(c[:, list(pattern)].sum(axis=1)))
        worst[len(pattern)] = max(worst[len(pattern)], norm)
    assert root.participations == max(len(one) for one in patterns(n, b))
    for k in range(root.participations + 1):
        # At most k participations: the worst of them has k.
        assert root.sensitivity(k) == pytest.approx(max(worst[: k + 1]), rel=1e-12)
    assert root.sensitivity() == pytest.approx(max(worst), rel=1e-12)


def test_no_directions_of_the_updates_are_worse_than_equal_ones() -> None:
    root = BandedRoot(9, 4, 2)
    c, rng, every = dense(root), np.random.default_rng(0), patterns(9, 2)
    for _ in range(300):
        pattern = every[rng.integers(len(every))]
        updates = np.zeros((9, 3))
        updates[list(pattern)] = rng.standard_normal((len(pattern), 3))
        updates /= np.maximum(np.linalg.norm(updates, axis=1, keepdims=True), 1e-300)
        assert np.linalg.norm(c @ updates) <= root.sensitivity() * (1 + 1e-12)


def test_leaving_rounds_out_or_losing_noise_never_raises_the_sensitivity() -> None:
    """What a crash may do: entries of C become zero, row by row."""
    root, rng, every = BandedRoot(9, 5, 2), np.random.default_rng(1), patterns(9, 2)
    for _ in range(60):
        torn = dense(root) * (rng.random((9, 9)) < 0.7)
        for pattern in every:
            assert np.linalg.norm(torn[:, list(pattern)].sum(axis=1)) <= root.sensitivity()


def test_mutant_the_sensitivity_of_one_participation_is_too_small_for_several() -> None:
    root = BandedRoot(40, 10, 10)
    c = dense(root)
    one = float(np.linalg.norm(c, axis=0).max())
    assert root.sensitivity(1) == pytest.approx(one)
    assert float(np.linalg.norm(c[:, ::10].sum(axis=1))) > 1.9 * one
    assert root.sensitivity() > 1.9 * one


def test_full_participation_is_every_round() -> None:
    assert BandedRoot(7, 1, 1).sensitivity() == pytest.approx(math.sqrt(7))
    root = BandedRoot(7, 3, 1)
    assert root.participations == 7
    assert root.sensitivity() == pytest.approx(np.linalg.norm(dense(root).sum(axis=1)))


@pytest.mark.parametrize("values", [(0, 1, 1), (5, 0, 1), (5, 1, 0), (5, True, 1), (5, 1.5, 1)])
def test_a_matrix_without_meaning_is_refused(values: tuple[Any, Any, Any]) -> None:
    with pytest.raises(PrivacyError, match="whole number of 1 or more"):
        BandedRoot(*values)


# --- charges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 4, 10, 40])
def test_charges_add_up_to_the_one_gaussian_of_the_run(bands: int) -> None:
    root = BandedRoot(40, bands, 10)
    charged: dict[Term, int] = {}
    for k in range(4):
        for term, count in root.terms(2.0, 1, after=k).items():
            charged[term] = charged.get(term, 0) + count
        rho = sum(count / (2 * term.noise_multiplier**2) for term, count in charged.items())
        right = root.sensitivity(k + 1) ** 2 / (2 * (2.0 * root.sensitivity()) ** 2)
        assert rho == pytest.approx(right, rel=1e-8)
        assert rho >= right * (1.0 - 1e-14)
    assert charged == root.terms(2.0, 4)
    whole = epsilon_of_terms(charged, 1e-5)
    assert whole == pytest.approx(epsilon_of_terms({Term(1.0, 2.0): 1}, 1e-5), rel=1e-3)
    assert root.terms(2.0, 3, after=4) == {}


def test_a_column_is_charged_whole_when_its_client_takes_part() -> None:
    """What it gave in round 1 is in the rows of later rounds too: a charge of c_0 alone would forget them."""
    root = BandedRoot(40, 10, 10)
    ((term, count),) = root.terms(2.0, 1).items()
    column = float(np.linalg.norm(dense(root)[:, 0]))
    assert count == 1
    assert term.noise_multiplier == pytest.approx(2.0 * root.sensitivity() / column, rel=1e-8)
    assert column > 1.2


def test_the_plans_event_is_one_gaussian() -> None:
    import dp_accounting as dp

    plan = ftrl(noise_multiplier=2.0)
    event = event_of(plan, 4)
    assert isinstance(event, dp.SelfComposedDpEvent) and event.count == 1
    assert event.event.noise_multiplier == pytest.approx(2.0, rel=1e-8)
    assert epsilon_of(event, plan.delta) == pytest.approx(plan.epsilon(), rel=1e-3)
    assert plan.epsilon(1) < plan.epsilon(2) < plan.epsilon(4) == plan.epsilon(40)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 5, 12])
def test_streamed_noise_is_the_inverse_of_c(bands: int) -> None:
    root = BandedRoot(12, bands, 3)
    white = np.random.default_rng(2).standard_normal((12, 4))
    source = CorrelatedNoise(root, 4)
    streamed = [source.next(t + 1, white[t]) for t in range(12)]
    np.testing.assert_allclose(streamed, np.linalg.solve(dense(root), white), atol=1e-12)


@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_noise_goes_on_after_a_restart_as_if_there_had_been_none(stop: int) -> None:
    root = BandedRoot(12, 5, 3)
    white = np.random.default_rng(3).standard_normal((12, 4))
    straight, first, second = (CorrelatedNoise(root, 4) for _ in range(3))
    wanted = [straight.next(t + 1, white[t]) for t in range(12)]
    got = [first.next(t + 1, white[t]) for t in range(stop)]
    second.restore(first.round, first.rows())
    got += [second.next(t + 1, white[t]) for t in range(stop, 12)]
    np.testing.assert_array_equal(got, wanted)
    # Mutant: the noise that is kept gets lost on the way. Private as before, but another noise.
    lost = CorrelatedNoise(root, 4)
    lost.restore(stop, np.zeros((0, 4)))
    assert np.abs(lost.next(stop + 1, white[stop]) - wanted[stop]).max() > 0.01


def test_a_round_gets_noise_once(golden: Golden) -> None:
    source = CorrelatedNoise(BandedRoot(9, 3, 1), 2)
    source.next(4, np.ones(2))
    for round in (1, 4):
        with pytest.raises(PrivacyError) as raised:
            source.next(round, np.ones(2))
        golden(raised)
    with pytest.raises(PrivacyError, match="shape"):
        source.next(5, np.ones(3))
    with pytest.raises(ValueError, match="bands"):
        source.restore(5, np.zeros((3, 2)))


def test_a_round_that_is_left_out_counts_as_no_noise() -> None:
    root = BandedRoot(9, 4, 1)
    source, white = CorrelatedNoise(root, 1), np.random.default_rng(4).standard_normal((9, 1))
    kept = {t: source.next(t, white[t - 1])[0] for t in (1, 2, 5, 6)}
    c = root.coefficients()
    assert kept[5] == pytest.approx(white[4, 0] - c[3] * kept[2])
    assert kept[6] == pytest.approx(white[5, 0] - c[1] * kept[5])


def _covariance(plan: PrivacyPlan, correlated: bool, size: int = 20_000) -> np.ndarray:
    """Of the noise of six rounds, over coordinates, in units of the plan's white variance."""
    root = plan.root()
    assert root is not None
    source, entropy = CorrelatedNoise(root, size), Entropy.reproducible(0, "server", 1, 1)
    rows = []
    for t in range(1, 7):
        white = plan.noise(size, entropy)
        rows.append(source.next(t, white) if correlated else white)
    noise = np.array(rows)
    return noise @ noise.T / size / (plan.noise_multiplier * root.sensitivity() * plan.max_grad_norm) ** 2


def _fits(found: np.ndarray, plan: PrivacyPlan) -> bool:
    root = plan.root()
    assert root is not None
    inverse = np.linalg.inv(dense(root))[:6, :6]
    wanted = inverse @ inverse.T
    # The deviation of an entry is below 2 / sqrt(20000) = 0.014; five of these.
    return bool(np.abs(found - wanted).max() < 0.07)


def test_the_noise_has_the_covariance_of_the_matrix_and_no_other() -> None:
    plan = ftrl(noise_multiplier=1.5, max_grad_norm=0.5, reproducible_noise=True)
    found = _covariance(plan, correlated=True)
    assert _fits(found, plan)
    assert not _fits(found * 1.5, plan) and not _fits(found / 1.5, plan)
    assert not _fits(_covariance(plan, correlated=False), plan)  # mutant: independent, accounted as if
    # What the accountant counts on: C x is white, at the scale of the whole run's sensitivity.
    c = dense(BandedRoot(40, 10, 10))[:6, :6]
    assert np.abs(c @ found @ c.T - np.eye(6)).max() < 0.07


def test_mutant_equal_noise_on_two_sums_shows_their_difference() -> None:
    """Why noise is never made again from a key: a repeated round would subtract to the data."""
    plan = ftrl(reproducible_noise=True)
    root = plan.root()
    assert root is not None
    noises = []
    for _ in range(2):
        source = CorrelatedNoise(root, 50)
        noises.append(source.next(1, plan.noise(50, plan.entropy("server", 1, repetition=1))))
    np.testing.assert_array_equal(*noises)
    other = CorrelatedNoise(root, 50).next(1, plan.noise(50, plan.entropy("server", 1, repetition=2)))
    assert np.abs(other - noises[0]).min() > 0.0


# --- error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "bands", "b"), [(1, 1, 1), (6, 3, 2), (12, 12, 4), (12, 1, 3)])
def test_the_error_is_that_of_the_dense_matrices(n: int, bands: int, b: int) -> None:
    root = BandedRoot(n, bands, b)
    prefix = np.tril(np.ones((n, n)))
    left = prefix @ np.linalg.inv(dense(root))
    right = root.sensitivity() ** 2 * np.square(np.linalg.norm(left, axis=1)).mean()
    assert root.mean_square_error() == pytest.approx(right, rel=1e-12)


def test_over_many_rounds_running_sums_are_better_than_with_independent_noise() -> None:
    # Equal epsilon on both sides, for the same pattern of participation.
    assert BandedRoot(100, 25, 25).error_ratio() == pytest.approx(0.352, abs=0.001)
    assert BandedRoot(400, 100, 100).error_ratio() == pytest.approx(0.208, abs=0.001)
    assert BandedRoot(1000, 50, 50).error_ratio() == pytest.approx(0.210, abs=0.001)


def test_with_full_participation_it_gains_nothing() -> None:
    assert BandedRoot(100, 1, 1).error_ratio() == 1.0
    for bands in (2, 8, 100):
        assert BandedRoot(100, bands, 1).error_ratio() > 1.0
    assert any("independent noise" in one for one in ftrl(bands=1, min_separation=1).cautions())
    assert not any("independent noise" in one for one in ftrl().cautions())


def test_simulated_running_sums_have_the_error_of_the_closed_form() -> None:
    """Two thousand clients, 200 rounds of ten, through the server's own clipping, noise and division."""
    from fedtune.federation.server.rounds import ClippedUpdates

    rng, size = np.random.default_rng(5), 40
    common = {"num_rounds": 200, "min_separation": 200, "declared_size": 2000, "nodes": 2000,
              "cohort_size": 10, "delta": 1e-4, "noise_multiplier": 2.0,
              "reproducible_noise": True}  # fmt: skip
    updates = rng.standard_normal((200, 10, size)) / 5.0
    errors = {}
    for bands in (1, 200):
        plan = ftrl(bands=bands, **common)
        root = plan.root()
        assert root is not None
        source, published, right, squares = CorrelatedNoise(root, size), np.zeros(size), np.zeros(size), []
        for t in range(200):
            server = ClippedUpdates(plan, size)
            for update in updates[t]:
                server.add(update)
                right += update * plan.clip_factors([np.linalg.norm(update)])[0] / 10.0
            published += server.release(plan.entropy("server", t + 1, bands), source, t + 1)[0]
            squares.append(float(np.square(published - right).mean()))
        errors[bands] = math.sqrt(np.mean(squares))
        closed = 2.0 * math.sqrt(root.mean_square_error()) / 10.0
        assert errors[bands] == pytest.approx(closed, rel=0.25)
        assert plan.epsilon() == pytest.approx(epsilon_of_terms({Term(1.0, 2.0): 1}, 1e-4), rel=1e-3)
    assert errors[200] < 0.4 * errors[1]


def test_a_release_without_the_noise_of_earlier_rounds_is_refused(golden: Golden) -> None:
    from fedtune.federation.server.rounds import ClippedUpdates

    with pytest.raises(PrivacyError) as raised:
        ClippedUpdates(ftrl(), 4).release(Entropy.system())
    golden(raised)


# --- participation -------------------------------------------------------------------------------


def test_a_participation_too_soon_is_refused_with_the_numbers() -> None:
    root = BandedRoot(40, 10, 10)
    root.check("a", "r", 1, [])
    root.check("a", "r", 21, [1, 11])
    for round, earlier in ((10, [1]), (1, [1]), (5, [11]), (20, [1, 11])):
        with pytest.raises(SeparationError, match=f"'a' refuses round {round} .* one participation in 10"):
            root.check("a", "r", round, earlier)
    for round in (0, 41):
        with pytest.raises(SeparationError, match="rounds 1 to 40"):
            root.check("a", "r", round, [])


# --- in the ledger and in the plan ---------------------------------------------------------------


def _reserve(ledger: PrivacyLedger, plan: PrivacyPlan, round: int, run: str = "run-1") -> None:
    ledger.commit(
        ledger.reserve(dataset="visits", fingerprint="f", node="clinic", run=run, round=round, plan=plan)
    )


def test_the_ledger_charges_each_participation_and_refuses_one_too_soon(
    tmp_path: Path, golden: Golden
) -> None:
    plan, ledger = ftrl(noise_multiplier=2.0), PrivacyLedger(tmp_path / "clinic.sqlite")
    known = {"dataset": "visits", "fingerprint": "f", "delta": 1e-4}
    for k, round in enumerate((3, 13, 30), start=1):  # further apart than it must be: charged as the worst
        _reserve(ledger, plan, round)
        root = plan.root()
        assert root is not None
        one = epsilon_of_terms(root.merged(2.0, k), 1e-4)
        assert ledger.epsilon(**known) == pytest.approx(one, rel=2e-3)
        assert ledger.epsilon(**known, run="run-1") == pytest.approx(one, rel=2e-3)
    for round in (30, 31, 39, 24):
        with pytest.raises(SeparationError) as raised:
            _reserve(ledger, plan, round)
        assert "10" in str(raised.value)
        golden(raised)
    assert len(ledger.releases(run="run-1")) == 3
    _reserve(ledger, plan, 40)
    assert ledger.epsilon(**known) == pytest.approx(epsilon_of_terms({Term(1.0, 2.0): 1}, 1e-4), rel=2e-3)
    _reserve(ledger, plan, 1, run="run-2")  # another run has noise of its own, and adds up
    # Which run came second was chosen, so both together are counted by Renyi DP.
    both = [RunSteps(plan.terms(4), None), RunSteps(plan.terms(1), None)]
    assert ledger.epsilon(**known) == pytest.approx(spent(both, 1e-4), rel=2e-3)
    assert ledger.verify()[1] == []


def test_a_budget_that_holds_for_the_whole_run_lets_all_of_it_pass(tmp_path: Path) -> None:
    plan, ledger = ftrl(noise_multiplier=2.0), PrivacyLedger(tmp_path / "clinic.sqlite")
    ledger.set_budget(PrivacyBudget(1.002 * plan.epsilon(), plan.delta))
    for round in (1, 11, 21, 31):
        _reserve(ledger, plan, round)
    with pytest.raises(BudgetExhausted, match="over its budget"):
        _reserve(ledger, plan, 1, run="run-2")


def _config(**changes: Any) -> Config:
    config = Config()
    config.federation.num_rounds, config.federation.cohort_size = 40, 20
    values = {
        "trust": "central",
        "unit": "client",
        "mechanism": "dp_ftrl",
        "min_separation": 10,
        "epsilon": 3.0,
    }
    for name, value in {**values, **changes}.items():
        setattr(config.privacy, name, value)
    return config


def test_noise_is_calibrated_to_the_whole_run() -> None:
    plan = make_plan(_config(), [5] * 200)
    said = plan.settings()
    assert (said["method"], said["bands"], said["min_separation"]) == ("dp_ftrl", 10, 10)
    assert 0.98 * 3.0 <= plan.epsilon() <= 3.0
    # By dp_accounting alone, from the dense matrix: one Gaussian.
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    sensitivity = float(np.linalg.norm(dense(BandedRoot(40, 10, 10))[:, ::10].sum(axis=1)))
    whole = from_gaussian_mechanism(plan.noise_std() / (sensitivity * plan.max_grad_norm))
    assert plan.epsilon() == pytest.approx(whole.get_epsilon_for_delta(plan.delta), rel=0.01)
    assert PrivacyPlan.from_json(plan.to_json()) == plan
    assert make_plan(_config(bands=3), [5] * 200).settings()["bands"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trust": "local", "unit": "record"}, "trust=central"),
        ({"adaptive_clipping": True}, "adaptive_clipping=true does not fit"),
        ({"bands": 41}, "bands=41 is more than federation.num_rounds=40"),
        ({"min_separation": 11}, "ask for 220 clients"),
        ({"min_separation": 41}, "min_separation=41 is more"),
        ({"mechanism": "gaussian"}, "settings of privacy.mechanism=dp_ftrl"),
        ({"mechanism": "tree"}, "must be one of gaussian, dp_ftrl"),
        ({"bands": 0}, "bands must be a whole number of 1 or more"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        make_plan(_config(**changes), [5] * 200)


@pytest.mark.parametrize(
    "wrong",
    [
        ["privacy.mechanism=dp_ftrl"],
        ["privacy=central", "privacy.min_separation=2"],
        ["privacy=central", "privacy.bands=2"],
        ["privacy=central_ftrl", "privacy.trust=none", "privacy.epsilon=null"],
    ],
)
def test_the_command_line_refuses_them_by_name(wrong: list[str]) -> None:
    from fedtune.config.loader import load

    with pytest.raises(ConfigError, match="privacy.mechanism=dp_ftrl"):
        load(wrong)


@pytest.mark.parametrize(
    ("value", "down"),
    [
        (1.23456789019, 1.234567890),
        (9.9999999999, 9.999999999),
        (98765.43210987, 98765.43210),
        (0.00123456789199, 0.001234567891),
        (123456789019.0, 123456789000.0),
        (10.0, 10.0),
        (0.5, 0.5),
    ],
)
def test_a_charge_has_ten_digits_and_is_rounded_down(value: float, down: float) -> None:
    assert _down(value) == pytest.approx(down, rel=1e-15)
    assert _down(value) <= value


def test_what_is_merged_is_rounded_down_and_nothing_is_nothing() -> None:
    root = BandedRoot(40, 20, 10)
    exact = 1.7 * root.sensitivity() / root.sensitivity(2)
    assert root.merged(1.7, 2) == {Term(1.0, _down(exact)): 1} and _down(exact) < exact
    assert root.merged(1.7, 0) == {} and root.terms(1.7, 0) == {}
    assert root.merged(1.7, 9) == root.merged(1.7, 4)


def test_rounds_far_apart_are_let_pass_in_either_order(golden: Golden) -> None:
    root = BandedRoot(40, 10, 10)
    root.check("a", "r", 1, [30])
    root.check("a", "r", 40, [30])
    for round, earlier in ((21, [30]), (39, [30])):
        with pytest.raises(SeparationError) as raised:
            root.check("a", "r", round, earlier)
        assert "30" in str(raised.value)
        golden(raised)


def test_rows_of_rounds_that_were_left_out_are_zero() -> None:
    source = CorrelatedNoise(BandedRoot(9, 4, 1), 2)
    assert source.rows().shape == (0, 2)
    source.next(1, np.ones(2))
    source.next(3, np.ones(2))
    rows = source.rows()
    assert rows.shape == (3, 2) and rows.dtype == np.float64
    assert rows[1].tolist() == [0.0, 0.0] and rows[2].tolist() == [1.0, 1.0]
    assert rows[0] == pytest.approx(np.full(2, 1.0 - 3 / 8))


def test_every_charge_is_rounded_down() -> None:
    root = BandedRoot(40, 20, 10)
    squares = [root.sensitivity(k) ** 2 for k in range(5)]
    for k in range(4):
        exact = 1.7 * root.sensitivity() / math.sqrt(squares[k + 1] - squares[k])
        ((term, count),) = root.terms(1.7, 1, after=k).items()
        assert count == 1 and term.noise_multiplier == _down(exact) < exact
