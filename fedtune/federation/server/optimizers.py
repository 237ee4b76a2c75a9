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

With `federation.strategy=fedsgd` (McMahan et al. 2017) the nodes do not train: together they give one noised
gradient a round, and `GradientOptimizer` takes the step that DP-SGD on pooled data would take, with the
settings of `train`. It lives for the whole run; its formulas are those of torch.optim (a test compares). What
it ends with is an average of the late adapters (Polyak and Juditsky 1992), which noise moves less.

What goes in is already private under trust `local`, `distributed` and `central`, so all of this is
post-processing and costs no epsilon. Clipping and noise are not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedtune.config.recipe import centre_rounds, head_rounds
from fedtune.config.schema import Config, FederationConfig, TrainConfig
from fedtune.errors import CheckpointError, ConfigError, FederationError
from fedtune.privacy.plan import PrivacyPlan

__all__ = [
    "OPTIMIZERS",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "GradientOptimizer",
    "ServerOptimizer",
    "averaging_optimizer",
    "damping",
    "server_optimizer",
]

MAX_STEP_NORM = 1e4  # of one step; useful adapters have norms of hundreds

State = dict[str, np.ndarray]
OPTIMIZERS = ("fedavg", "fedavgm", "fedadam")
_STEPS = ("sgd", "adam", "adamw", "adam_mini")
_RISE, _FLOOR = 0.1, 0.1  # of the cosine schedule: share of the steps, share of the rate
_WARM_UP = 9.0  # the average begins as that of all adapters: 1/10 is new in the first step, at most
_COMMON_SHARE = 0.5  # of the rate, where each site has a part of its own with as much
_HEAVY, _DAMPED = 1.7, 0.1  # noise over gradients, times the root of the classes; share of the rate beyond
_BETA_1, _BETA_2, _EPS = 0.9, 0.999, 1e-8  # torch's defaults, which training on a node uses


class ServerOptimizer:
    """Adapter and aggregated update -> next adapter. What differs is `_next`.

    Attributes:
        damping: share of the rate that the next step takes, where it is a gradient's (`damping`).
    """

    name: str
    damping: float = 1.0
    arrays: tuple[str, ...] = ()  # of the state, once there was a step
    settings = (
        "federation.server_learning_rate or federation.max_update_norm"  # to lower if a step is too large
    )

    def __init__(self) -> None:
        self._state: State = {}

    def _next(self, x: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, State]:
        """The next adapter and the next state, float64 [P] each."""
        raise NotImplementedError

    def step(self, adapter: np.ndarray, update: np.ndarray, *, fixed: int = 0) -> np.ndarray:
        """Adapter float32 [P] and aggregated update float [P] -> next adapter, float32 [P], a new array.

        The last `fixed` numbers are not trained: they stay, whatever the update has for them.

        Raises:
            FederationError: the shapes differ, or the step is not finite or beyond all measure; the state is
                then as it was.
        """
        if adapter.ndim != 1 or update.shape != adapter.shape:
            raise FederationError(
                f"The aggregated update has shape {update.shape} and the adapter {adapter.shape}; "
                "server and nodes run different models. Start all of them with the same configuration."
            )
        free = adapter.size - fixed
        x, state = self._next(adapter[:free].astype(np.float64), update[:free].astype(np.float64))
        result: np.ndarray = np.concatenate([x.astype(np.float32), adapter[free:]])
        if not np.isfinite(result).all():
            raise FederationError(
                f"The server step would make {int((~np.isfinite(result)).sum())} of {result.size} adapter "
                f"values infinite or NaN. Lower {self.settings}."
            )
        moved = float(np.linalg.norm(result.astype(np.float64) - adapter))
        if moved > MAX_STEP_NORM:
            raise FederationError(
                f"The server step would move the adapter by a norm of {moved:.2g}, after which no text's "
                f"class can be told any more (limit {MAX_STEP_NORM:g}). The round is charged and the run "
                f"ends here. Lower {self.settings}."
            )
        self._state = state
        return result

    def result(self, adapter: np.ndarray) -> np.ndarray:
        """What is evaluated and saved where the run is at `adapter`, float32 [P]."""
        return adapter

    def averaged(self, mean: np.ndarray | None, adapter: np.ndarray) -> np.ndarray:
        """The average of late adapters, float32 [P], that goes on from `mean` (None: it begins) with what the
        run is at after as many steps as this optimizer has taken."""
        return adapter

    def state_dict(self) -> State:
        """Everything that the next step depends on, as copies; empty before the first step."""
        return {name: array.copy() for name, array in self._state.items()}

    def load_state_dict(self, state: State) -> None:
        """Inverse of `state_dict`.

        Raises:
            CheckpointError: the state is another optimizer's.
        """
        if state and set(state) != set(self.arrays):
            raise CheckpointError(
                f"The checkpoint holds the server optimizer state {sorted(state)}, and {self.name} needs "
                f"{sorted(self.arrays)}. Resume with the configuration that the run was started with."
            )
        self._state = {name: np.array(array, dtype=np.float64) for name, array in state.items()}


class FedAvg(ServerOptimizer):
    """x <- x + s D (McMahan et al. 2017)."""

    name = "fedavg"

    def __init__(self, learning_rate: float = 1.0) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def _next(self, x: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, State]:
        return x + self.learning_rate * update, {}


class FedAvgM(ServerOptimizer):
    """m <- b m + D; x <- x + s m (Hsu, Qi, Brown 2019)."""

    name, arrays = "fedavgm", ("m",)

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__()
        self.learning_rate, self.momentum = learning_rate, momentum

    def _next(self, x: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, State]:
        m = self.momentum * self._state["m"] + update if self._state else update
        return x + self.learning_rate * m, {"m": m}


class FedAdam(ServerOptimizer):
    """Adam on the server (Reddi et al. 2021, Algorithm 2, FedAdam)."""

    name, arrays = "fedadam", ("m", "v")

    def __init__(
        self, learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        super().__init__()
        self.learning_rate, self.beta_1, self.beta_2, self.tau = learning_rate, beta_1, beta_2, tau

    def _next(self, x: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, State]:
        m = self._state.get("m", np.zeros_like(x))
        v = self._state.get("v", np.full_like(x, self.tau**2))
        m = self.beta_1 * m + (1.0 - self.beta_1) * update
        v = self.beta_2 * v + (1.0 - self.beta_2) * update**2
        return x + self.learning_rate * m / (np.sqrt(v) + self.tau), {"m": m, "v": v}


class GradientOptimizer(ServerOptimizer):
    """SGD with momentum, Adam or AdamW, as in torch.optim; the update is minus a gradient.

    `adam_mini` is Adam whose second moment is the mean over all coordinates (Zhang et al. 2024, Adam-mini,
    arXiv 2406.16793): where noise of one size is on each, a moment for each tells noise from noise.

    The rate of step t of T is `rate`; by the schedule `rise` it is 1/2 + (t - 1) / T of it; by `cosine` it
    rises in proportion to t over W = max(1, T / 10) steps, and is then
    1/10 + 9/10 (1 + cos(pi (t - W) / (T - W))) / 2 of it. With `averaging` a > 0 the result is
    mean_t = s mean_(t-1) + (1 - s) x_t, where s = min(a, t / (t + 9)): early adapters are soon forgotten.

    Args:
        train: optimizer, schedule and average, complete.
        num_rounds: T.
    """

    settings = "train.learning_rate"

    def __init__(self, train: TrainConfig, num_rounds: int) -> None:
        super().__init__()
        if train.optimizer not in _STEPS:
            raise ConfigError(
                f"train.optimizer={train.optimizer!r} is not known; it can be {', '.join(_STEPS)}."
            )
        rate = train.learning_rate
        if rate is None or not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"train.learning_rate={rate} must be a positive number.")
        self.name = f"gradient_{train.optimizer}"
        self._train, self._rate, self._num_rounds = train, rate, num_rounds
        self._averaging = train.averaging or 0.0
        moments = ("m", "v") if train.optimizer != "sgd" else ("momentum",) if train.momentum else ()
        self.arrays = ("steps", *moments, *(("mean",) if self._averaging else ()))

    def result(self, adapter: np.ndarray) -> np.ndarray:
        """The average of late adapters; `adapter` itself before the first step, or without averaging."""
        mean = self._state.get("mean")
        # What is not trained has no average.
        return adapter if mean is None else np.concatenate([mean.astype(np.float32), adapter[mean.size :]])

    def _next(self, x: np.ndarray, update: np.ndarray) -> tuple[np.ndarray, State]:
        steps = float(self._state["steps"][0]) + 1.0 if self._state else 1.0
        x, state = self._stepped(x, -update, steps, self.damping * self._rate * self._share(steps))
        state["steps"] = np.array([steps])
        if self._averaging:
            state["mean"] = self._mean(self._state.get("mean", x), x, steps)
        return x, state

    def averaged(self, mean: np.ndarray | None, adapter: np.ndarray) -> np.ndarray:
        """See `ServerOptimizer`."""
        if mean is None or not self._state:
            return adapter
        return self._mean(mean, adapter, float(self._state["steps"][0])).astype(np.float32)

    def _mean(self, before: np.ndarray, x: np.ndarray, steps: float) -> np.ndarray:
        share = min(self._averaging, steps / (steps + _WARM_UP))
        return share * before + (1.0 - share) * x

    def _share(self, steps: float) -> float:
        """Of the rate, at step `steps` (from 1)."""
        if self._train.schedule == "rise":
            return 0.5 + min(1.0, (steps - 1.0) / self._num_rounds)
        if self._train.schedule != "cosine":
            return 1.0
        rise = max(1.0, _RISE * self._num_rounds)
        if steps <= rise:
            return steps / rise
        done = min(1.0, (steps - rise) / max(1.0, self._num_rounds - rise))
        return _FLOOR + (1.0 - _FLOOR) * (1.0 + math.cos(math.pi * done)) / 2.0

    def _stepped(
        self, x: np.ndarray, gradient: np.ndarray, steps: float, rate: float
    ) -> tuple[np.ndarray, State]:
        train = self._train
        if train.optimizer == "sgd":
            gradient = gradient + train.weight_decay * x
            if not train.momentum:
                return x - rate * gradient, {}
            momentum = gradient
            if self._state:
                momentum = train.momentum * self._state["momentum"] + gradient
            return x - rate * momentum, {"momentum": momentum}
        if train.optimizer == "adamw":
            x = x * (1.0 - rate * train.weight_decay)
        m = (1.0 - _BETA_1) * gradient + _BETA_1 * self._state.get("m", np.zeros_like(x))
        square = gradient**2
        if train.optimizer == "adam_mini":
            square = np.array([square.mean()])
        v = (1.0 - _BETA_2) * square + _BETA_2 * self._state.get("v", np.zeros_like(square))
        x = x - rate * (m / (1.0 - _BETA_1**steps)) / (np.sqrt(v / (1.0 - _BETA_2**steps)) + _EPS)
        return x, {"m": m, "v": v}


def damping(
    train: TrainConfig, plan: PrivacyPlan, sizes: Mapping[str, int], numbers: int, classes: int
) -> float:
    """Share of the rate that a run takes: all of it, or a tenth where noise is heavy (`train.damped`).

    A head of many classes starts by their names and is right more often than not. Steps have one length,
    whatever they are made of (Adam), and where noise is nearly all of that the head walks away from its
    start at random. Each of K classes has about 1/K of the records, its gradient that part of the length,
    and its noise is as long as ever: what decides is the noise over the gradients, times sqrt(K). Measured
    on parts of three corpora (`simulations/LOG.md`); from public numbers.

    Args:
        train: complete.
        plan: the run's.
        sizes: declared sizes of the nodes that take part, by name.
        numbers: that are trained.
        classes: K.
    """
    ratio = plan.mechanism.noise_over_gradients(plan, sizes, numbers)
    return _DAMPED if train.damped and ratio * math.sqrt(classes) > _HEAVY else 1.0


def averaging_optimizer(config: FederationConfig) -> ServerOptimizer:
    """The server optimizer that `config.strategy` names.

    Raises:
        ConfigError: there is no server optimizer of that name, or a rate has no meaning.
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


def server_optimizer(config: Config, after: int = 0) -> ServerOptimizer:
    """What turns the aggregates of the rounds after `after` into adapters, by `federation.strategy`.

    With FedSGD the rounds in which the head alone is trained have an optimizer of their own, with a rate of
    their own: moments of the head say nothing of the rest, which begins when they end. `config` is complete.

    Where sites have a part of their own (`train.personalize`), this moves the common part, and one like it
    each site's (`fedtune.federation.personal`): with half of the rate each.

    Raises:
        ConfigError: the settings have no meaning.
    """
    if config.federation.strategy != "fedsgd":
        return averaging_optimizer(config.federation)
    train, rounds, first = config.train, config.federation.num_rounds or 1, head_rounds(config)
    rate = train.learning_rate
    if after < first:
        rate, rounds = train.head_learning_rate or rate, first
        train = replace(train, schedule="constant")
    else:
        rounds = max(1, rounds - first - centre_rounds(config))
    if rate is not None and train.personalize != "none":
        rate *= _COMMON_SHARE
    return GradientOptimizer(replace(train, learning_rate=rate), rounds)
