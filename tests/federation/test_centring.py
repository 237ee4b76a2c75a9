"""The centre of the texts: a noised mean that round 1 gives, from which the head then sees every text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.audit.canaries import released_sum
from fedtune.config.choices import resolved
from fedtune.config.schema import AdapterConfig, Config
from fedtune.engines import local
from fedtune.errors import FederationError, PrivacyError
from fedtune.federation.client.policy import check_plan
from fedtune.federation.events import FederationResult
from fedtune.federation.personal import PersonalPart
from fedtune.federation.resources import run_resources
from fedtune.federation.server import centring, loop
from fedtune.federation.server.centring import next_adapter, shrunk
from fedtune.federation.server.optimizers import GradientOptimizer, server_optimizer
from fedtune.federation.server.rounds import PlainRound, RoundAsk, RoundOutcome
from fedtune.models.classifier import LENGTH, load_saved
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.plans import changed, distributed_plan, local_plan, public_plan
from tests.support.tiny_federation import private

Make = Callable[..., Config]
SIZES = [30, 30, 30, 30]
WIDTH = 32


def config_of(tiny: Make, trust: str = "none", **changes: Any) -> Config:
    config = tiny(
        **{"federation__num_rounds": 4, "train__centre": True, "train__sample_rate": 1.0, **changes}
    )
    config.adapter, config.train.local_steps = AdapterConfig(name="head"), None
    if trust != "none":
        config = private(config, epsilon=200.0)
        config.privacy.trust = trust  # type: ignore[assignment]
    return resolved(config)


def run(config: Config, folder: Path) -> FederationResult:
    return local.run(config, folder)


def vectors(config: Config) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Of all records: vectors of length 1 [n, d], labels [n]; and how many each shard has."""
    resources = run_resources(config)
    with resources.using_model() as model:
        parts = [Features.of(model, s.data, 64, precision="fp32")._vectors for s in resources.prepared.shards]
    pooled = np.concatenate(parts).astype(np.float64)
    labels = np.concatenate([s.data.labels for s in resources.prepared.shards])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), labels, [len(part) for part in parts]


# --- a run -------------------------------------------------------------------------------------------


def test_a_run_without_noise_is_what_is_written_out_here(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray]
) -> None:
    """Round 1 the mean of all texts, then three steps of plain gradient descent on what lies around it."""
    plain = {"train__optimizer": "sgd", "train__schedule": "constant", "train__averaging": 0.0}
    config = config_of(tiny, **plain, train__learning_rate=0.7)
    unit, labels, counts = vectors(config)
    assert counts == SIZES  # as declared: the mean is over what is there
    result = run(config, tmp_path)
    mean = unit.mean(0)
    assert 0.1 < np.linalg.norm(mean) < 1.0
    around = unit - mean
    x = LENGTH * around / np.linalg.norm(around, axis=1, keepdims=True)
    x = np.hstack([x, np.ones((len(x), 1))])
    head = np.zeros((2, WIDTH + 1))
    wanted = [head]
    for _ in range(3):
        p = np.exp(x @ head.T)
        p /= p.sum(1, keepdims=True)
        head = head - 0.7 * (p - np.eye(2)[labels]).T @ x / len(x)
        wanted.append(head)
    for adapter, want in zip(adapters, wanted, strict=True):
        packed = np.concatenate([want[:, :WIDTH].ravel(), want[:, WIDTH], mean])
        np.testing.assert_allclose(adapter, packed, atol=2e-5)
    assert np.abs(wanted[-1]).max() > 0.1
    np.testing.assert_array_equal(result.adapter, adapters[-1])


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["none", "local"])
def test_a_run_that_was_stopped_after_the_centre_ends_as_the_other(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str
) -> None:
    config = config_of(tiny, trust)
    config.privacy.reproducible_noise = trust == "local"
    whole = run(config, tmp_path / "whole")
    real = loop._evaluate

    def stopped(setting: Any, evaluator: Any, state: Any, roster: Any) -> Any:
        if state.round == 2:
            raise KeyboardInterrupt
        return real(setting, evaluator, state, roster)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "stopped")
    config.resume = str(tmp_path / "stopped")
    resumed = run(config, tmp_path / "stopped")
    assert resumed.adapter.tobytes() == whole.adapter.tobytes()
    assert whole.adapter[-WIDTH:].any() and whole.adapter[:-WIDTH].any()
    assert resumed.epsilon == whole.epsilon and resumed.releases == whole.releases


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_the_centre_stays_as_round_one_left_it(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray], trust: str
) -> None:
    """Whatever noise lies on it in later rounds; the head begins to move when the centre is set."""
    config = config_of(tiny, trust)
    result = run(config, tmp_path)
    unit, _, _ = vectors(config)
    assert not result.dropped and len(adapters) == 4
    mean = unit.mean(0)
    cosine = adapters[0][-WIDTH:] @ mean / np.linalg.norm(adapters[0][-WIDTH:]) / np.linalg.norm(mean)
    assert cosine > 0.9
    assert not adapters[0][:-WIDTH].any() and adapters[1][:-WIDTH].any()
    for adapter in [*adapters[1:], result.adapter]:
        np.testing.assert_array_equal(adapter[-WIDTH:], adapters[0][-WIDTH:])


def test_a_server_that_trains_the_centre_would_be_noticed(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GradientOptimizer.step
    monkeypatch.setattr(GradientOptimizer, "step", lambda self, *one, fixed=0: real(self, *one))
    run(config_of(tiny, "local"), tmp_path)
    # By how much depends on the drawn noise; the test above allows no bit.
    assert (adapters[1][-WIDTH:] != adapters[0][-WIDTH:]).any()


def test_a_centre_that_is_all_noise_leaves_everything_as_without(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its rounds gave nothing: the heads are those of a run without it, one round later."""
    monkeypatch.setattr(centring, "shrunk", lambda mean, noise_std: 0.0 * mean)
    run(config_of(tiny, train__schedule="constant", train__averaging=0.0), tmp_path / "with")
    found = list(adapters)
    adapters.clear()
    off = {"train__centre": False, "federation__num_rounds": 3}
    run(config_of(tiny, train__schedule="constant", train__averaging=0.0, **off), tmp_path / "without")
    for mine, plain in zip(found[1:], adapters, strict=True):
        assert mine[:-WIDTH].tobytes() == plain.tobytes() and not mine[-WIDTH:].any() and plain.any()


def test_the_centre_is_saved_with_the_head(tiny: Make, tmp_path: Path) -> None:
    config = config_of(tiny)
    result = run(config, tmp_path / "run")
    resources = run_resources(config)
    resources.save(result.adapter, tmp_path / "adapter")
    test = resources.prepared.test
    want = resources.evaluate(result.adapter).probabilities
    loaded = load_saved(tmp_path / "adapter", "cpu")
    import torch

    for row in range(5):
        ids = torch.from_numpy(test.tokens(row).astype(np.int64))[None]
        got = torch.softmax(loaded(input_ids=ids), dim=1)[0].detach().numpy()
        np.testing.assert_allclose(got, want[row], atol=2e-3)  # kept outputs are float16
    at_zero = result.adapter.copy()
    at_zero[-WIDTH:] = 0.0
    assert np.abs(resources.evaluate(at_zero).probabilities - want).max() > 0.01


def test_the_schedule_is_that_of_the_rounds_that_train(tiny: Make) -> None:
    changes = {"train__schedule": "rise", "train__optimizer": "sgd", "train__averaging": 0.0}
    optimizer = server_optimizer(config_of(tiny, train__learning_rate=1.0, **changes))
    adapter, steps = np.zeros(1, np.float32), []
    for _ in range(3):
        adapter, before = optimizer.step(adapter, np.ones(1)), adapter
        steps.append(float((adapter - before)[0]))
    assert steps == pytest.approx([0.5 + t / 3 for t in range(3)])  # four rounds, of which three train


def test_a_first_round_that_is_void_leaves_no_centre_and_the_rest_trains(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PlainRound.run_round

    def void(self: PlainRound, grid: Any, ask: RoundAsk, observer: Any) -> RoundOutcome:
        outcome = real(self, grid, ask, observer)
        return dataclasses.replace(outcome, aggregate=None) if ask.round == 1 else outcome

    monkeypatch.setattr(PlainRound, "run_round", void)
    monkeypatch.setattr(loop, "most_void", lambda state, dynamic: 3)  # as of real sites
    result = run(config_of(tiny, "local"), tmp_path)
    assert [summary.void for summary in result.history] == [True, False, False, False]
    assert result.adapter[:-WIDTH].any() and not result.adapter[-WIDTH:].any()
    assert set(result.releases.values()) == {4}  # it was charged


@pytest.mark.parametrize("which", ["head", "adapter"])
def test_a_sites_own_part_waits_for_the_centre_and_leaves_it_alone(
    tiny: Make, tmp_path: Path, which: str
) -> None:
    config = config_of(tiny, train__personalize=which)
    head = run_resources(config).head()
    part = PersonalPart(tmp_path / "part.npz", "abc", config, head)
    update, adapter = np.ones(len(head), np.float32), np.zeros(len(head), np.float32)
    part.move(update, 1, 1)
    assert part.steps == 1 and not part.training(adapter, 2).any()
    part.move(update, 2, 2)
    moved = PersonalPart(tmp_path / "part.npz", "abc", config, head).training(adapter, 3)
    assert moved[:-WIDTH].all() and not moved[-WIDTH:].any()
    result = run(config, tmp_path / "run")
    assert result.adapter[-WIDTH:].any() and not result.dropped


# --- the server's part -------------------------------------------------------------------------------


def noise_of_a_round(plan: PrivacyPlan, sizes: dict[str, int], size: int) -> np.ndarray:
    """What the server averages of nodes that hold nothing: noise alone, float64 [size]."""
    if plan.mechanism.round == "secure_sum":
        shares = [released_sum(changed(plan, nodes=2, max_colluders=0), np.zeros(size), Entropy.system())]
        return plan.average(shares[0])
    weights = plan.aggregation_weights(list(sizes), sizes)
    own = [plan.for_shard(n) for n in sizes.values()]
    parts = [one.average(one.noise(size, Entropy.system())) for one in own]
    return np.average(parts, axis=0, weights=weights)


@pytest.mark.parametrize("weighting", ["uniform", "declared"])
@pytest.mark.parametrize("used", [["a", "b", "c"], ["a", "c"]])
def test_the_noise_that_is_shrunk_by_is_the_noise_that_is_there(weighting: str, used: list[str]) -> None:
    declared = {"a": 900, "b": 100, "c": 40}
    plan = local_plan(local_steps=1, weighting=weighting, nodes=3, sample_rate=0.5)
    sizes = {name: declared[name] for name in used}
    noise = noise_of_a_round(plan, sizes, 40_000)
    assert plan.mechanism.noise_on_average(plan, sizes) == pytest.approx(noise.std(), rel=0.02)
    # Without a node, or with the other weights, it would be another number.
    other = changed(plan, weighting="declared" if weighting == "uniform" else "uniform")
    assert abs(other.mechanism.noise_on_average(other, sizes) / noise.std() - 1) > 0.1
    assert (open_ := public_plan(local_steps=1)).mechanism.noise_on_average(open_, sizes) == 0.0


def test_the_noise_of_a_secure_sum_is_that_of_the_nodes_in_it() -> None:
    """Of four nodes three are counted on, and any that come add a share each."""
    from fedtune.privacy.mechanisms.discrete import DiscreteMechanism

    plan = distributed_plan(max_colluders=1, max_dropouts=1, sample_rate=0.5, delta=1e-4)
    mechanism = DiscreteMechanism.for_plan(plan, 100)
    for count in (3, 4):
        sizes = dict.fromkeys("abcd"[:count], 250)
        want = mechanism.noise_std(count) / plan.expected_batch_size()
        assert plan.mechanism.noise_on_average(plan, sizes) == pytest.approx(want, rel=2e-3)
        assert want > plan.noise_std() / plan.expected_batch_size() * 1.1


def test_a_mean_loses_the_share_that_is_noise() -> None:
    """The closed form, and what it is for: on average nearer to the truth than the noised mean itself."""
    generator = np.random.default_rng(0)
    truth = generator.normal(size=200)
    truth /= np.linalg.norm(truth)
    noised = truth + 0.05 * generator.normal(size=(50, 200))
    found = np.array([shrunk(one, 0.05) for one in noised])
    for one, mine in zip(noised, found, strict=True):
        np.testing.assert_allclose(mine, one * (1 - 200 * 0.05**2 / np.sum(one**2)), rtol=1e-12)
    error = [np.square(one - truth).sum(1).mean() for one in (found, noised)]
    assert error[0] < 0.75 * error[1]
    np.testing.assert_array_equal(shrunk(truth, 0.1), np.zeros(200))  # all of it may be noise
    np.testing.assert_array_equal(shrunk(truth, 0.0), truth)
    np.testing.assert_array_equal(shrunk(np.zeros(3), 0.0), np.zeros(3))


def test_the_server_makes_a_centre_of_the_first_aggregate() -> None:
    plan = local_plan(local_steps=1, max_grad_norm=0.5, centre_rounds=1, nodes=2)
    from fedtune.config.schema import TrainConfig

    optimizer = GradientOptimizer(TrainConfig(optimizer="adam", learning_rate=0.1, averaging=0.5), 3)
    mean = np.array([0.3, -0.4, 0.1])
    noise = plan.mechanism.noise_on_average(plan, {"a": 1000, "b": 1000}) / 0.5
    aggregate = np.concatenate([np.full(4, 9.0), -0.5 * mean])
    before = np.array([0, 1, 2, 3, 0, 0, 0], dtype=np.float32)
    sizes = {"a": 1000, "b": 1000}
    first = next_adapter(optimizer, before, aggregate, plan, 1, sizes, 3)
    np.testing.assert_allclose(first[4:], mean * (1 - 3 * noise**2 / 0.26), rtol=1e-6)
    np.testing.assert_array_equal(first[:4], before[:4])
    assert optimizer.state_dict() == {}  # it begins with the next
    # A centre that public texts have set is moved by what is not noise of the way to the private one.
    known = np.concatenate([before[:4], mean + np.array([0.1, 0.0, 0.0])]).astype(np.float32)
    nearer = next_adapter(optimizer, known, aggregate, plan, 1, sizes, 3)
    moved = 0.1 * (1 - 3 * noise**2 / 0.01)
    np.testing.assert_allclose(nearer[4:], mean + np.array([0.1 - moved, 0.0, 0.0]), rtol=1e-5)
    there = np.concatenate([before[:4], mean + np.array([0.5 * noise, 0.0, 0.0])]).astype(np.float32)
    assert next_adapter(optimizer, there, aggregate, plan, 1, sizes, 3).tobytes() == there.tobytes()
    second = next_adapter(optimizer, first, aggregate, plan, 2, sizes, 3)
    np.testing.assert_allclose(second[:4] - first[:4], 0.1, rtol=1e-5)
    np.testing.assert_array_equal(second[4:], first[4:])
    assert optimizer.result(second)[4:].tolist() == first[4:].tolist()
    assert optimizer.state_dict()["m"].shape == (4,)
    with pytest.raises(FederationError, match="shape"):
        next_adapter(optimizer, second, aggregate[:-1], plan, 3, sizes, 3)


def test_one_second_moment_does_not_see_the_centre() -> None:
    """The mutant keeps zeros there: the mean of the squares is smaller then, and the step larger."""
    from fedtune.config.schema import TrainConfig

    steps = []
    for update, fixed in ((np.ones(4), 0), (np.ones(400), 396)):
        one = GradientOptimizer(TrainConfig(optimizer="adam_mini", learning_rate=0.1, averaging=0.0), 3)
        steps.append(one.step(np.zeros(len(update), np.float32), update, fixed=fixed)[:4])
    np.testing.assert_array_equal(*steps)


# --- plan and price ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_it_costs_one_of_the_rounds_and_nothing_else(tiny: Make, trust: str) -> None:
    """Noise, epsilon and the accounted steps are those of as many gradients."""
    config = config_of(tiny, trust)
    without = dataclasses.replace(config, train=dataclasses.replace(config.train, centre=False))
    plan, plain = make_plan(config, SIZES), make_plan(without, SIZES)
    assert (plan.centre_rounds, plain.centre_rounds) == (1, 0)
    assert dataclasses.replace(plan, centre_rounds=0) == plain
    for releases in range(5):
        assert plan.terms(releases) == plain.terms(releases)
    assert plan.epsilon() == plain.epsilon()
    assert [plan.centres(round) for round in range(1, 5)] == [True, False, False, False]
    assert PrivacyPlan.from_json(plan.to_json()) == plan
    check_plan(plan, config)
    with pytest.raises(PrivacyError, match="centre_rounds=0.* permits centre_rounds=1"):
        check_plan(plain, config)


def test_what_a_text_is_multiplied_by_is_what_it_may_contribute() -> None:
    assert local_plan(max_grad_norm=0.25).clipping.whole == 0.25
    assert public_plan().clipping.whole == 1.0 and math.isinf(public_plan().max_grad_norm)


@pytest.mark.parametrize(
    "changes", [{"centre_rounds": 2}, {"num_rounds": 1}, {"local_steps": 2}, {"centre_rounds": -1}], ids=str
)
def test_a_plan_that_cannot_set_a_centre_is_refused(changes: dict[str, int]) -> None:
    right: dict[str, Any] = {"centre_rounds": 1, "local_steps": 1, "num_rounds": 3}
    local_plan(**right)
    with pytest.raises(PrivacyError, match="centre"):
        local_plan(**(right | changes))


@pytest.mark.slow
def test_the_statement_says_what_left_in_round_one(tiny: Make, tmp_path: Path) -> None:
    from fedtune.privacy.statement.facts import statement_markdown
    from fedtune.runs.run import run as whole_run

    told = []
    for centre in (True, False):
        config = config_of(tiny, "local", train__centre=centre, output=str(tmp_path / str(centre)))
        record = json.loads(whole_run(config).read_text())
        assert record["privacy"]["centre_rounds"] == int(centre)
        told.append("Round 1 released, in place of a gradient" in statement_markdown(record))
    assert told == [True, False]
