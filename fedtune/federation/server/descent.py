"""One optimizer step on the server, with the gradient of a distributed round.

Under `trust=distributed` the nodes do not train: together they give one noised gradient over the union of all
shards, and the server takes the step that DP-SGD on pooled data would take, with `train.optimizer`,
`train.learning_rate`, `train.momentum` and `train.weight_decay`. The formulas are those of torch.optim (a
test compares), in float64 numpy, with a state that goes into checkpoints. All of it is post-processing.
"""

from __future__ import annotations

import math

import numpy as np

from fedtune.config.schema import Config, TrainConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError
from fedtune.federation.server.optimizers import Strategy, make_strategy

__all__ = ["Descent", "server_optimizer"]

OPTIMIZERS = ("sgd", "adam", "adamw")
_BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8  # torch's defaults, which training on a node uses


class Descent:
    """A `Strategy` whose update is minus a gradient: SGD with momentum, Adam or AdamW as in torch.optim."""

    def __init__(self, train: TrainConfig) -> None:
        if train.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"train.optimizer={train.optimizer!r} is not known; it can be {', '.join(OPTIMIZERS)}."
            )
        if not (math.isfinite(train.learning_rate) and train.learning_rate > 0):
            raise ConfigError(f"train.learning_rate={train.learning_rate} must be a positive number.")
        self.name = f"descent_{train.optimizer}"
        self._train = train
        self._state: dict[str, np.ndarray] = {}

    def step(self, adapter: np.ndarray, update: np.ndarray) -> np.ndarray:
        """Adapter float32 [P] and minus the gradient, float [P] -> next adapter, float32 [P], a new array.

        Raises FederationError if shapes differ or the result is not finite; the state is then as it was.
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
        """Inverse of `state_dict`. Raises CheckpointError for a state of another optimizer."""
        momentum = {"momentum"} if self._train.momentum else set()
        names = momentum if self._train.optimizer == "sgd" else {"m", "v", "steps"}
        if state and set(state) != names:
            raise CheckpointError(
                f"The checkpoint holds the server optimizer state {sorted(state)}, and {self.name} needs "
                f"{sorted(names)}. Resume with the configuration that the run was started with."
            )
        self._state = {name: np.array(array, dtype=np.float64) for name, array in state.items()}


def server_optimizer(config: Config) -> Strategy:
    """What turns a round's aggregate into the next adapter, by trust model and configuration.

    Raises ConfigError for settings without meaning.
    """
    if config.privacy.trust != "distributed":
        return make_strategy(config.federation)
    federation = config.federation
    if federation.strategy != "fedavg" or federation.server_learning_rate != 1.0:
        raise ConfigError(
            f"federation.strategy={federation.strategy} and federation.server_learning_rate="
            f"{federation.server_learning_rate:g} average updates, and under privacy.trust=distributed there "
            "are none: each round is one step on the server with train.optimizer and train.learning_rate. "
            "Leave them out."
        )
    return Descent(config.train)
