"""Server optimizers: how an aggregated update becomes the next adapter. Pure numpy, resumable.

Flower's own strategies keep no state that could be saved and have no first round, so a run could not
be resumed with them. Here a strategy is a small object with `step`, `state_dict` and
`load_state_dict`; moments are float64, whatever travels.

With x the adapter, D the aggregated update (mean of node updates, *new minus old*, so a step adds it),
s the server learning rate, all element-wise:

* FedAvg (McMahan et al. 2017): x <- x + s D. With s = 1 the mean of the nodes' adapters.
* FedAvgM (Hsu, Qi, Brown 2019): m <- b m + D; x <- x + s m.
* FedAdam (Reddi et al. 2021, Algorithm 2): m <- b1 m + (1 - b1) D; v <- b2 v + (1 - b2) D^2;
  x <- x + s m / (sqrt(v) + tau). No bias correction, and v starts at tau^2, as in the paper.

What goes in is already private under trust `local`, `distributed` and `central`, so all of this is
post-processing and costs no epsilon. Clipping and noise are not here.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from fedtune.config.schema import FederationConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError

__all__ = ["STRATEGIES", "FedAdam", "FedAvg", "FedAvgM", "Strategy", "make_strategy"]


class Strategy(Protocol):
    """A server optimizer."""

    name: str

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """Adapter float32 [P] and aggregated update float [P] -> next adapter, float32 [P], a new array.

        Raises FederationError if the update has another shape or the result is not finite; the
        strategy's state is then as it was.
        """

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, as arrays; copies."""

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Inverse of `state_dict`. Raises CheckpointError for a state of another strategy."""


def _check(adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
    if adapter.ndim != 1 or update.shape != adapter.shape:
        raise FederationError(
            f"The aggregated update has shape {update.shape} and the adapter {adapter.shape}; "
            "server and nodes run different models. Start all of them with the same configuration."
        )
    return update.astype(np.float64)


def _next(adapter: np.ndarray, change: np.ndarray) -> np.ndarray:
    result: np.ndarray = (adapter.astype(np.float64) + change).astype(np.float32)
    if not np.isfinite(result).all():
        raise FederationError(
            f"The server step would make {int((~np.isfinite(result)).sum())} of {result.size} adapter values "
            "infinite or NaN. Lower federation.server_learning_rate or federation.max_update_norm."
        )
    return result


def _load(state: dict[str, np.ndarray], names: tuple[str, ...], strategy: str) -> list[np.ndarray]:
    if set(state) != set(names):
        raise CheckpointError(
            f"The checkpoint holds the server optimizer state {sorted(state)}, and {strategy} needs "
            f"{sorted(names)}. Resume with the configuration that the run was started with."
        )
    return [np.array(state[name], dtype=np.float64) for name in names]


class FedAvg:
    """x <- x + s D (McMahan et al. 2017)."""

    name = "fedavg"

    def __init__(self, learning_rate: float = 1.0) -> None:
        self.learning_rate = learning_rate

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """See `Strategy`."""
        return _next(adapter, self.learning_rate * _check(adapter, update))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Empty: nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `Strategy`."""
        _load(state, (), self.name)


class FedAvgM:
    """m <- b m + D; x <- x + s m (Hsu, Qi, Brown 2019)."""

    name = "fedavgm"

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.9) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._m: np.ndarray | None = None  # float64 [P]

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """See `Strategy`."""
        delta = _check(adapter, update)
        m = delta if self._m is None else self.momentum * self._m + delta
        result = _next(adapter, self.learning_rate * m)
        self._m = m
        return result

    def state_dict(self) -> dict[str, np.ndarray]:
        """`m` [P]; empty before the first step."""
        return {} if self._m is None else {"m": self._m.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `Strategy`."""
        self._m = _load(state, ("m",), self.name)[0] if state else None


class FedAdam:
    """Adam on the server (Reddi et al. 2021, Algorithm 2, FedAdam)."""

    name = "fedadam"

    def __init__(
        self, learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        self.learning_rate, self.beta_1, self.beta_2, self.tau = learning_rate, beta_1, beta_2, tau
        self._m: np.ndarray | None = None  # float64 [P]
        self._v: np.ndarray | None = None  # float64 [P]

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """See `Strategy`."""
        delta = _check(adapter, update)
        m = np.zeros_like(delta) if self._m is None else self._m
        v = np.full_like(delta, self.tau**2) if self._v is None else self._v
        m = self.beta_1 * m + (1.0 - self.beta_1) * delta
        v = self.beta_2 * v + (1.0 - self.beta_2) * delta**2
        result = _next(adapter, self.learning_rate * m / (np.sqrt(v) + self.tau))
        self._m, self._v = m, v
        return result

    def state_dict(self) -> dict[str, np.ndarray]:
        """`m` and `v` [P]; empty before the first step."""
        if self._m is None or self._v is None:
            return {}
        return {"m": self._m.copy(), "v": self._v.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `Strategy`."""
        self._m, self._v = _load(state, ("m", "v"), self.name) if state else (None, None)


STRATEGIES = ("fedavg", "fedavgm", "fedadam")


def make_strategy(config: FederationConfig) -> Strategy:
    """The server optimizer that `config.strategy` names. Raises ConfigError if there is none such."""
    rate, momentum = config.server_learning_rate, config.server_momentum
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"federation.server_learning_rate={rate} must be a positive number.")
    if not 0 <= momentum < 1:
        raise ConfigError(f"federation.server_momentum={momentum} must be at least 0 and below 1.")
    if config.strategy == "fedavg":
        return FedAvg(rate)
    if config.strategy == "fedavgm":
        return FedAvgM(rate, momentum)
    if config.strategy == "fedadam":
        return FedAdam(rate, beta_1=momentum)
    raise ConfigError(
        f"federation.strategy={config.strategy!r} is not known; it can be {', '.join(STRATEGIES)}."
    )
