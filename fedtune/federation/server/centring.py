"""The server's part of centring: which round sets the centre, and what others do with it.

A head sees a text from the centre of all texts (`fedtune.models.classifier.Centring`). The centre is their
mean, which is private, so a round of its own asks for it: each unit contributes where its texts lie in place
of a gradient, clipped, noised and charged as one (`PrivacyPlan.centres`). What the server does with it is
post-processing: it moves the centre to the noised mean, but for how much of the way is noise (James and Stein
1961, the positive part), not at all where that is all of it. Before that it is at zero, where the head sees
what it would see without, or, after public texts, at their mean; and there it stays if the round comes to
nothing. In other rounds nodes put nothing on the centre's numbers, which then hold noise and are left out:
the optimizer does not see them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.federation.server.optimizers import ServerOptimizer
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["next_adapter", "shrunk"]


def next_adapter(
    optimizer: ServerOptimizer,
    adapter: np.ndarray,
    aggregate: np.ndarray,
    plan: PrivacyPlan,
    round: int,
    sizes: Mapping[str, int],
    centre: int,
) -> np.ndarray:
    """The adapter after `round` (from 1), float32 [P].

    Args:
        optimizer: takes the step, in every round but one that sets the centre.
        adapter: before the round, float32 [P].
        aggregate: what the round gave, float [P]: minus a noised average.
        plan: the run's.
        sizes: declared sizes of the nodes that are in the aggregate, by name.
        centre: how many of the adapter's numbers, its last ones, are the centre.

    Raises:
        FederationError: as `ServerOptimizer.step`.
    """
    if not plan.centres(round):
        return optimizer.step(adapter, aggregate, fixed=centre)
    mean = -aggregate[adapter.size - centre :].astype(np.float64) / plan.clipping.whole
    noise_std = plan.mechanism.noise_on_average(plan, sizes) / plan.clipping.whole
    following = adapter.copy()
    before = adapter[adapter.size - centre :].astype(np.float64)
    following[adapter.size - centre :] = before + shrunk(mean - before, noise_std)
    return following


def shrunk(mean: np.ndarray, noise_std: float) -> np.ndarray:
    """`mean` [d] times max(0, 1 - d s^2 / |mean|^2): without the share of its square that noise of standard
    deviation s on each number is expected to have."""
    square = float(mean @ mean)
    share = mean.size * noise_std**2 / square if square > 0.0 else 1.0
    return mean * max(0.0, 1.0 - share)
