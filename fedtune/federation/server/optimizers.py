"""Server optimizers: how an aggregated update becomes the next adapter. Pure numpy, resumable.

Flower's own strategies keep no state that could be saved and have no first round, so a run could not
be resumed with them. Here a server optimizer is a small object with `step`, `state_dict` and
`load_state_dict`; moments are float64, whatever travels.

With x the adapter, D the aggregated update (mean of node updates, *new minus old*, so a step adds it),
s the server learning rate, all element-wise:

* FedAvg (McMahan et al. 2017): x <- x + s D. With s = 1 the mean of the nodes' adapters.
* FedAvgM (Hsu, Qi, Brown 2019): m <- b m + D; x <- x + s m.
* FedAdam (Reddi et al. 2021, Algorithm 2): m <- b1 m + (1 - b1) D; v <- b2 v + (1 - b2) D^2;
  x <- x + s m / (sqrt(v) + tau). No bias correction, and v starts at tau^2, as in the paper.

Under `trust=distributed` the nodes do not train: together they give one noised gradient over the union of
all shards, and `GradientOptimizer` takes the step that DP-SGD on pooled data would take, with the settings of
`train`. Its formulas are those of torch.optim (a test compares).

What goes in is already private under trust `local`, `distributed` and `central`, so all of this is
post-processing and costs no epsilon. Clipping and noise are not here.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from fedtune.config.schema import Config, FederationConfig, TrainConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError
from fedtune.privacy.mechanisms.registry import mechanism_of

__all__ = [
    "OPTIMIZERS",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "GradientOptimizer",
    "ServerOptimizer",
    "averaging_optimizer",
    "server_optimizer",
]

_STEPS = ("sgd", "adam", "adamw")
_BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8  # torch's defaults, which training on a node uses


class ServerOptimizer(Protocol):
    """A server optimizer."""

    name: str

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """Adapter float32 [P] and aggregated update float [P] -> next adapter, float32 [P], a new array.

        Raises:
            FederationError: the update has another shape or the result is not finite; the optimizer's state
                is then as it was.
        """

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, as arrays; copies."""

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the state is another optimizer's.
        """


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
        """See `ServerOptimizer`."""
        return _next(adapter, self.learning_rate * _check(adapter, update))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Empty: nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `ServerOptimizer`."""
        _load(state, (), self.name)


class FedAvgM:
    """m <- b m + D; x <- x + s m (Hsu, Qi, Brown 2019)."""

    name = "fedavgm"

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.9) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._m: np.ndarray | None = None  # float64 [P]

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """See `ServerOptimizer`."""
        delta = _check(adapter, update)
        m = delta if self._m is None else self.momentum * self._m + delta
        result = _next(adapter, self.learning_rate * m)
        self._m = m
        return result

    def state_dict(self) -> dict[str, np.ndarray]:
        """`m` [P]; empty before the first step."""
        return {} if self._m is None else {"m": self._m.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """See `ServerOptimizer`."""
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
        """See `ServerOptimizer`."""
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
        """See `ServerOptimizer`."""
        self._m, self._v = _load(state, ("m", "v"), self.name) if state else (None, None)


OPTIMIZERS = ("fedavg", "fedavgm", "fedadam")


def averaging_optimizer(config: FederationConfig) -> ServerOptimizer:
    """The server optimizer that `config.strategy` names.

    Raises:
        ConfigError: there is none such.
    """
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
        f"federation.strategy={config.strategy!r} is not known; it can be {', '.join(OPTIMIZERS)}."
    )


class GradientOptimizer:
    """SGD with momentum, Adam or AdamW, as in torch.optim; the update is minus a gradient."""

    def __init__(self, train: TrainConfig) -> None:
        if train.optimizer not in _STEPS:
            raise ConfigError(
                f"train.optimizer={train.optimizer!r} is not known; it can be {', '.join(_STEPS)}."
            )
        if not (math.isfinite(train.learning_rate) and train.learning_rate > 0):
            raise ConfigError(f"train.learning_rate={train.learning_rate} must be a positive number.")
        self.name = f"gradient_{train.optimizer}"
        self._train = train
        self._state: dict[str, np.ndarray] = {}

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """Adapter float32 [P] and minus the gradient, float [P] -> next adapter, float32 [P], a new array.

        Raises:
            FederationError: shapes differ or the result is not finite; the state is then as it was.
        """
        if adapter.ndim != 1 or update.shape != adapter.shape:
            raise FederationError(
                f"The aggregated gradient has shape {update.shape} and the adapter {adapter.shape}; server "
                "and nodes run different models. Start all of them with the same configuration."
            )
        train, rate = self._train, self._train.learning_rate
        x, gradient = adapter.astype(np.float64), -update.astype(np.float64)
        if train.optimizer == "sgd":
            gradient = gradient + train.weight_decay * x
            momentum = gradient
            if train.momentum and "momentum" in self._state:
                momentum = train.momentum * self._state["momentum"] + gradient
            state = {"momentum": momentum} if train.momentum else {}
            x = x - rate * momentum
        else:
            if train.optimizer == "adamw":
                x = x * (1.0 - rate * train.weight_decay)
            steps = float(self._state["steps"][0]) + 1.0 if self._state else 1.0
            m = (1.0 - _BETA_1) * gradient + _BETA_1 * self._state.get("m", np.zeros_like(x))
            v = (1.0 - _BETA_2) * gradient**2 + _BETA_2 * self._state.get("v", np.zeros_like(x))
            state = {"m": m, "v": v, "steps": np.array([steps])}
            x = x - rate * (m / (1.0 - _BETA_1**steps)) / (np.sqrt(v / (1.0 - _BETA_2**steps)) + _EPS)
        result: np.ndarray = x.astype(np.float32)
        if not np.isfinite(result).all():
            raise FederationError(
                f"The step would make {int((~np.isfinite(result)).sum())} of {result.size} adapter values "
                f"infinite or NaN. Lower train.learning_rate, which is {rate:g}."
            )
        self._state = state
        return result

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on; empty before the first."""
        return {name: array.copy() for name, array in self._state.items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the state is another optimizer's.
        """
        momentum = {"momentum"} if self._train.momentum else set()
        names = momentum if self._train.optimizer == "sgd" else {"m", "v", "steps"}
        if state and set(state) != names:
            raise CheckpointError(
                f"The checkpoint holds the server optimizer state {sorted(state)}, and {self.name} needs "
                f"{sorted(names)}. Resume with the configuration that the run was started with."
            )
        self._state = {name: np.array(array, dtype=np.float64) for name, array in state.items()}


def server_optimizer(config: Config) -> ServerOptimizer:
    """What turns a round's aggregate into the next adapter, by trust model and configuration.

    Raises:
        ConfigError: the settings have no meaning.
    """
    if not mechanism_of(config.privacy.trust).sums_gradients:
        return averaging_optimizer(config.federation)
    federation = config.federation
    if federation.strategy != "fedavg" or federation.server_learning_rate != 1.0:
        raise ConfigError(
            f"federation.strategy={federation.strategy} and federation.server_learning_rate="
            f"{federation.server_learning_rate:g} average updates, and under privacy.trust=distributed there "
            "are none: each round is one step on the server with train.optimizer and train.learning_rate. "
            "Leave them out."
        )
    return GradientOptimizer(config.train)
