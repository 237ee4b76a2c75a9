"""The federation of `small_clients` in Apple's pfl, which the benchmark `clients` installs for this alone.

python -m scripts.benchmarks.pfl_clients FEATURES.npz COHORT ROUNDS BATCH EPOCHS NOISE

The head is a linear layer on the same kept outputs, trained by pfl's own loop (`FederatedAveraging`, a
simulated backend in one process). NOISE 0: its own SGD. Above 0: each step clips every example's gradient to
norm 1 and adds noise of that standard deviation, as fedtune does, in closed form and by torch's generator,
which is the fastest that one can write for it: pfl itself has no DP-SGD on clients. No ledger, no messages,
no checkpoint. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset, get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

__all__ = ["main"]

RATE = 0.2


class Head(torch.nn.Linear):
    """The classifier, with what pfl asks of a model."""

    def loss(self, x: Any, y: Any) -> torch.Tensor:
        """Mean over the batch, as one writes it."""
        return torch.nn.functional.cross_entropy(self(x), y.long())

    def metrics(self, x: Any, y: Any) -> dict[str, Any]:
        """None: nothing is evaluated."""
        return {}


class _Private(FederatedAveraging):  # type: ignore[misc]
    """Federated averaging of clients whose steps are clipped and noised."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self._noise = noise

    def train_one_user(self, initial: Any, model: Any, user: Any, context: Any) -> Any:
        model.do_multiple_epochs_of(user, context.model_train_params, self._step)
        return model.get_model_difference(initial), Metrics()

    def _step(self, head: Head, optimizer: Any, batch: Any, *_: Any) -> None:
        x, y = batch[0], batch[1].long()
        with torch.no_grad():
            error = torch.softmax(head(x), dim=1)
            error[torch.arange(len(y)), y] -= 1.0
            norms = (error.square().sum(1) * (x.square().sum(1) + 1.0)).sqrt()
            error *= (1.0 / norms).clamp(max=1.0)[:, None]
            for parameter, total in ((head.weight, error.T @ x), (head.bias, error.sum(0))):
                parameter.grad = (total + self._noise * torch.randn(total.shape)) / len(y)
        optimizer.step()


class _Clock(TrainingProcessCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *, model: Any) -> Any:
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> Any:
        self.marks.append(time.perf_counter())
        return False, Metrics()


def main(arguments: list[str]) -> None:
    """Runs the federation and prints what its rounds took."""
    path, cohort, rounds, batch, epochs = arguments[0], *map(int, arguments[1:5])
    noise = float(arguments[5])
    kept = np.load(path)
    begin = time.perf_counter()
    ends = np.cumsum(kept["sizes"])[:-1]
    users = dict(enumerate(zip(np.split(kept["x"], ends), np.split(kept["y"], ends), strict=True)))
    data = FederatedDataset.from_slices(users, get_user_sampler("minimize_reuse", list(users)))
    head = Head(kept["x"].shape[1], 2)
    model = PyTorchModel(head, torch.optim.SGD, torch.optim.SGD(head.parameters(), lr=1.0))
    clock, algorithm = _Clock(), _Private(noise) if noise else FederatedAveraging()
    algorithm.run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(local_batch_size=batch or None, local_num_epochs=epochs, local_learning_rate=RATE),
        callbacks=[clock],
    )
    marks = clock.marks
    print(
        "RESULT",
        json.dumps(
            {
                "start_seconds": marks[0] - begin,
                "round_seconds": [after - before for before, after in itertools.pairwise(marks)],
                "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        ),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
