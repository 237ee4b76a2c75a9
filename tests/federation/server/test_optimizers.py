"""Server optimizers against their equations, computed another way."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import FederationConfig, TrainConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError
from fedtune.federation.server.optimizers import (
    OPTIMIZERS,
    FedAdam,
    FedAvg,
    FedAvgM,
    GradientOptimizer,
    averaging_optimizer,
    damping,
)
from fedtune.privacy.plan import PrivacyPlan
from tests.support.golden import Golden
from tests.support.plans import central_plan, distributed_plan, local_plan, public_plan

UPDATES = np.random.default_rng(0).normal(size=(7, 5))


def test_fedavg_with_rate_one_is_the_mean_of_the_nodes_adapters() -> None:
    start = np.array([1.0, -2.0, 0.5], dtype=np.float32)
    adapters = np.array([[2.0, 0.0, 1.0], [0.0, -1.0, 3.0]], dtype=np.float32)
    result = FedAvg().step(start, (adapters - start).mean(axis=0))
    np.testing.assert_array_equal(result, adapters.mean(axis=0))
    assert result.dtype == np.float32


def test_fedavgm_closed_form() -> None:
    # x_T = x_0 + s sum_t sum_{k<=t} b^(t-k) D_k
    strategy, x = FedAvgM(learning_rate=0.3, momentum=0.8), np.zeros(5, dtype=np.float32)
    for update in UPDATES:
        x = strategy.step(x, update)
    expected = sum(0.3 * 0.8 ** (t - k) * UPDATES[k] for t in range(7) for k in range(t + 1))
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_fedadam_closed_form() -> None:
    # m_t = (1 - b1) sum b1^(t-k) D_k, v_t = b2^(t+1) tau^2 + (1 - b2) sum b2^(t-k) D_k^2, no bias correction
    s, b1, b2, tau = 0.1, 0.9, 0.99, 1e-2
    strategy, x = FedAdam(s, b1, b2, tau), np.zeros(5, dtype=np.float32)
    expected = np.zeros(5)
    for t in range(7):
        x = strategy.step(x, UPDATES[t])
        m = sum((1 - b1) * b1 ** (t - k) * UPDATES[k] for k in range(t + 1))
        v = b2 ** (t + 1) * tau**2 + sum((1 - b2) * b2 ** (t - k) * UPDATES[k] ** 2 for k in range(t + 1))
        expected = expected + s * m / (np.sqrt(v) + tau)
    np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_fedadam_first_step_of_a_zero_update_does_nothing() -> None:
    x = np.ones(5, dtype=np.float32)
    np.testing.assert_array_equal(FedAdam().step(x, np.zeros(5)), x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_strategy_goes_on_exactly(name: str) -> None:
    config = FederationConfig(strategy=name, server_learning_rate=0.1)
    whole, x = averaging_optimizer(config), np.zeros(5, dtype=np.float32)
    for update in UPDATES:
        x = whole.step(x, update)
    first, y = averaging_optimizer(config), np.zeros(5, dtype=np.float32)
    for update in UPDATES[:3]:
        y = first.step(y, update)
    second = averaging_optimizer(config)
    second.load_state_dict(first.state_dict())
    for update in UPDATES[3:]:
        y = second.step(y, update)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_fails_leaves_the_state_as_it_was(name: str, golden: Golden) -> None:
    strategy = averaging_optimizer(FederationConfig(strategy=name))
    x = strategy.step(np.zeros(5, dtype=np.float32), UPDATES[0])
    before = strategy.state_dict()
    with pytest.raises(FederationError) as raised:
        strategy.step(x, np.zeros(4))
    golden(raised)
    with pytest.raises(FederationError) as raised:
        strategy.step(x, np.full(5, np.nan))
    golden(raised)
    after = strategy.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key])


def test_the_state_of_another_strategy_is_refused() -> None:
    adam = FedAdam()
    adam.step(np.zeros(5, dtype=np.float32), UPDATES[0])
    with pytest.raises(CheckpointError, match="fedavgm"):
        FedAvgM().load_state_dict(adam.state_dict())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "fedprox"),
        ("server_learning_rate", 0.0),
        ("server_learning_rate", float("nan")),
        ("server_momentum", 1.0),
    ],
)
def test_settings_without_meaning_are_refused(field: str, value: object) -> None:
    config = FederationConfig(strategy="fedavgm")
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=field):
        averaging_optimizer(config)


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(optimizer="sgd", learning_rate=0.1),
        TrainConfig(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
        TrainConfig(optimizer="adam", learning_rate=0.01),
        TrainConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "rise", "cosine"])
def test_a_gradient_step_is_torchs_own_and_survives_a_checkpoint(train: TrainConfig, schedule: str) -> None:
    """The rate's fall is torch's too, and the average is one written out: sum of weights times adapters."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from fedtune.training.local import make_optimizer

    train = dataclasses.replace(train, schedule=schedule, averaging=0.35)
    falls = {
        "constant": lambda t: 1.0,
        "rise": lambda t: 0.5 + t / 20,
        # Twenty steps: two to rise, then from 1 to a tenth.
        "cosine": lambda t: (t + 1) / 2 if t < 2 else 0.1 + 0.9 * (1 + np.cos(np.pi * (t - 1) / 18)) / 2,
    }
    generator = np.random.default_rng(2)
    start = generator.normal(size=50).astype(np.float32)
    theta = torch.nn.Parameter(torch.from_numpy(start.copy()))
    mine, reference = GradientOptimizer(train, 20), make_optimizer(theta, train)
    if train.optimizer == "sgd":
        reference = torch.optim.SGD(
            [theta], lr=train.learning_rate or 0.0, momentum=train.momentum, weight_decay=train.weight_decay
        )
    fall = LambdaLR(reference, falls[schedule])
    adapter, iterates = start, []
    np.testing.assert_array_equal(mine.result(start), start)
    for _ in range(20):
        gradient = generator.normal(size=50).astype(np.float32)
        theta.grad = torch.from_numpy(gradient)
        reference.step()
        fall.step()
        adapter = mine.step(adapter, -gradient.astype(np.float64))
        resumed = GradientOptimizer(train, 20)
        resumed.load_state_dict(mine.state_dict())
        mine = resumed
        np.testing.assert_allclose(adapter, theta.detach().numpy(), rtol=2e-5, atol=2e-6)
        iterates.append(adapter.astype(np.float64))
    kept = [min(0.35, t / (t + 9)) for t in range(1, 21)]  # in step t; the first adapter is the first average
    weights = [np.prod(kept[t + 1 :]) * ((1.0 - kept[t]) if t else 1.0) for t in range(20)]
    assert sum(weights) == pytest.approx(1.0)
    np.testing.assert_allclose(mine.result(adapter), np.tensordot(weights, iterates, 1), rtol=1e-5, atol=1e-6)


def test_one_second_moment_for_all_coordinates() -> None:
    """Against Adam in torch on one number, whose square is the mean of the squares."""
    mini = GradientOptimizer(TrainConfig(optimizer="adam_mini", learning_rate=0.1, averaging=0.0), 3)
    generator = np.random.default_rng(3)
    adapter, m, v = np.zeros(5, np.float32), np.zeros(5), 0.0
    for t in range(1, 4):
        gradient = generator.normal(size=5)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * float(np.mean(gradient**2))
        want = adapter - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        adapter = mine = mini.step(adapter, -gradient)
        np.testing.assert_allclose(mine, want, rtol=1e-5)
    assert mini.state_dict()["v"].shape == (1,)


def test_without_averaging_the_last_adapter_is_the_result() -> None:
    plain = GradientOptimizer(TrainConfig(optimizer="adam", learning_rate=0.1, averaging=0.0), 3)
    adapter = plain.step(np.zeros(4, np.float32), np.ones(4))
    np.testing.assert_array_equal(plain.result(adapter), adapter)
    assert "mean" not in plain.state_dict()


def test_a_gradient_optimizer_refuses_what_it_cannot_do() -> None:
    for train in (TrainConfig(optimizer="lion", learning_rate=0.1), TrainConfig(learning_rate=0.0)):
        with pytest.raises(ConfigError):
            GradientOptimizer(train, 3)
    with pytest.raises(ConfigError, match="None"):
        GradientOptimizer(TrainConfig(optimizer="adam"), 3)
    adam = GradientOptimizer(TrainConfig(optimizer="adam", learning_rate=0.01), 3)
    with pytest.raises(FederationError, match="shape"):
        adam.step(np.zeros(3, np.float32), np.zeros(4))
    with pytest.raises(FederationError, match="NaN"):
        adam.step(np.zeros(3, np.float32), np.full(3, np.nan))
    assert adam.state_dict() == {}
    with pytest.raises(CheckpointError):
        adam.load_state_dict({"momentum": np.zeros(3)})


def test_a_damped_step_is_that_part_of_a_whole_one() -> None:
    settings = TrainConfig(optimizer="adam_mini", learning_rate=0.3, schedule="rise", averaging=0.9)
    whole, damped = GradientOptimizer(settings, 5), GradientOptimizer(settings, 5)
    damped.damping = 0.1
    x = y = np.zeros(5, dtype=np.float32)
    for update in UPDATES:
        x, y = whole.step(x, update), damped.step(y, update)
    np.testing.assert_allclose(y, 0.1 * x, rtol=1e-5)
    np.testing.assert_allclose(damped.result(y), 0.1 * whole.result(x), rtol=1e-5)


@pytest.mark.parametrize("make", [local_plan, distributed_plan])
def test_the_rate_is_damped_where_noise_hides_what_each_class_says(make: Any) -> None:
    """Noise on a class over what its gradient can be: s sqrt(P / T) / C against 1 / sqrt(K)."""
    numbers, classes, steps = 1000, 25, 60
    settings = {"num_rounds": steps, "nodes": 2, "declared_size": 100, "max_grad_norm": 0.9}
    settings |= {"sample_rate": 1.0} | ({"local_steps": 1} if make is local_plan else {})

    def share(noise: float, damped: bool = True, classes: int = classes) -> float:
        plan, sizes = make(**settings, noise_multiplier=noise), {"a": 100, "b": 100}
        return damping(TrainConfig(damped=damped), plan, sizes, numbers, classes)

    # One node's noise is on a mean over 100 records, the mean of two has it over sqrt(2). The secure sum was
    # sized for a union of 100, to which each of two nodes adds all that must be there without the other.
    nodes = 2.0 if make is distributed_plan else 0.5
    one = math.sqrt(numbers / steps) / 100 * math.sqrt(nodes)
    edge = 1.7 / math.sqrt(classes) / one
    assert (share(0.98 * edge), share(1.02 * edge)) == (1.0, 0.1)
    assert share(1.02 * edge, damped=False) == 1.0
    assert share(1.02 * edge, classes=24) == 1.0


@pytest.mark.parametrize("plan", [public_plan(), central_plan(noise_multiplier=900.0)])
def test_nothing_is_damped_where_no_gradient_is_noised(plan: PrivacyPlan) -> None:
    assert damping(TrainConfig(damped=True), plan, {"a": 1}, 10**6, 100) == 1.0
