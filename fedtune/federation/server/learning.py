"""Whether a run has learned anything: one that has not is no success, whatever it went through.

What can be foreseen is refused before anything is charged (`fedtune.federation.server.agreement`). What shows
itself only then ends the run: too many void rounds in a row, a last round after which the adapter is where it
began.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtune.config.schema import Config
from fedtune.errors import FederationError
from fedtune.federation.server.checkpoint import RunState
from fedtune.federation.server.rounds import RoundOutcome

__all__ = ["LEAST_MOVE", "MAX_VOID_ROUNDS", "check_learned", "most_void", "too_many_void_rounds"]

MAX_VOID_ROUNDS = 3
LEAST_MOVE = 1e-9  # of a number of the adapter; less is below what float32 tells beside a weight


def most_void(state: RunState, dynamic: bool) -> int:
    """Void rounds in a row that end a run.

    A simulated node fails in the next round as it did in this one; real ones (`dynamic`) come and go.
    """
    if dynamic or any(not summary.void for summary in state.history):
        return MAX_VOID_ROUNDS
    return 1


def check_learned(state: RunState, config: Config) -> None:
    """Checks that a run whose rounds are over has moved its adapter from where it began.

    Raises:
        FederationError: it has not; with the reasons of its last round.
    """
    if state.history and all(summary.void for summary in state.history):
        lost = state.history[-1].dropped
        reasons = "; ".join(f"{node}: {reason}" for node, reason in lost[:4]) or str(state.ended_early)
        raise FederationError(
            f"The run learned nothing: none of its {len(state.history)} rounds had "
            f"federation.min_updates={config.federation.min_updates} usable updates, and what they released "
            f"stays charged. {reasons}"
        )
    start = state.start
    moved = float(np.abs(state.optimizer.result(state.adapter) - start).max(initial=0.0))
    if moved <= LEAST_MOVE * max(1.0, float(np.abs(start).max(initial=0.0))):
        raise FederationError(
            f"The run learned nothing: after {len(state.history)} rounds no number of the adapter has "
            f"moved by more than {moved:.1g}, and what they released stays charged. Raise "
            f"train.learning_rate ({config.train.learning_rate}), or leave it out: the recipe has one.",
            setting="train.learning_rate",
        )


def too_many_void_rounds(
    count: int, outcome: RoundOutcome, config: Config, run_dir: Path, round: int
) -> FederationError:
    """The error that ends a run after so many void rounds in a row, the last of them `round`."""
    reasons = "; ".join(f"{node}: {reason}" for node, reason in outcome.dropped[:4])
    many = "The first round" if count == 1 else f"{count} rounds in a row"
    return FederationError(
        f"{many} had fewer than federation.min_updates="
        f"{config.federation.min_updates} usable updates, the last of them round {round}, for these "
        f"reasons: {reasons}. The adapter is as after the last good round; correct the cause and go on with "
        f"`fedtune run resume={run_dir}`."
    )
