"""Server optimizers against their equations, computed another way."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.config.schema import FederationConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError
from fedtune.federation.server.optimizers import OPTIMIZERS, FedAdam, FedAvg, FedAvgM, averaging_optimizer
from tests.support.golden import Golden

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
