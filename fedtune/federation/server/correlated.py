"""What DP-FTRL keeps from round to round: who was asked when, and the noise that later rounds take back.

Two files beside the checkpoint, both replaced whole and synced:

- `rounds.json` is written *before* the first message of a round: the round's number, and the last round that
  each node was asked for. A round that it names is never begun again, by this run folder: if the process died
  in the middle, its result may have been seen and its nodes have charged it, so a resumed run leaves it out
  (nothing is published for it) and goes on with the next. It also says which nodes may be asked: those whose
  last round is `min_separation` ago, whether they answered or not.
- `noise.secret` (mode 0600) is written before the checkpoint that its noise is in. It holds the noise of the
  last rounds, with which what was published can be undone: the server's secret, like the raw updates that it
  sees. It is removed when the run ends. It is stored and not regenerated from a key: a key would give a round
  that is repeated by mistake the same noise on other data, and their difference is the data. If it is lost,
  later rounds take nothing back: accuracy, and no privacy (`fedtune.privacy.mechanisms.matrix` says why).

A run folder that was wound back (a copy, a backup) would begin rounds anew with another cohort, whose nodes
do not know of the first time, and take back noise that was taken back before: those whose updates that noise
covers would be published twice under it. So the last round that was begun stands in two other places too, and
a folder that knows less is refused (`check_newest`): in fedtune's state folder on this machine
(`rounds/RUN.json`, written before the first message too, and after `rounds.json`: the folder of a process
that died between the two knows more, and does not look wound back), and in the nodes' ledgers, which tell it
when the run is proposed to them again. What may still slip through is a folder that was wound back, on
another machine, while every node that knows better is away; their ledgers refuse a second participation
within `min_separation` rounds, and a round that any node refuses so is discarded whole
(`fedtune.federation.server.rounds.CentralRound`).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.config.files import state_dir
from fedtune.errors import CheckpointError, ResourceError
from fedtune.federation.events import NodeInfo
from fedtune.federation.run_folder import write_durably
from fedtune.privacy.mechanisms.matrix import CorrelatedNoise
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["CorrelatedRounds"]


class CorrelatedRounds:
    """The rounds of one dp_ftrl run. `round`: the last that was begun; `noise`: what its rounds draw from."""

    def __init__(self, run_dir: Path, run: str, plan: PrivacyPlan, size: int) -> None:
        root = plan.root()
        assert root is not None, "only a plan with mechanism dp_ftrl has correlated rounds"
        self._rounds_file = run_dir / "checkpoint" / "rounds.json"
        self._noise_file = run_dir / "checkpoint" / "noise.secret"
        self._machine_file = state_dir() / "rounds" / f"{run}.json"
        self._run, self._root, self._size = run, root, size
        self._saved_round = 0  # round of the noise that is on the disk
        self.round = 0
        self.last_asked: dict[str, int] = {}
        self.noise = CorrelatedNoise(root, size)

    @classmethod
    def start(cls, run_dir: Path, run: str, plan: PrivacyPlan, size: int) -> CorrelatedRounds:
        """A new run's, on the disk.

        Raises:
            ResourceError: they cannot be written.
        """
        rounds = cls(run_dir, run, plan, size)
        rounds._forget_noise()
        rounds.begin(0, [])
        return rounds

    @classmethod
    def resume(
        cls, run_dir: Path, run: str, plan: PrivacyPlan, size: int
    ) -> tuple[CorrelatedRounds, list[str]]:
        """The rounds that a run was stopped with, and a notice if its noise is lost.

        Raises:
            CheckpointError: `rounds.json` is missing or another run's (without it nobody knows which rounds
                were published), or this machine knows that later rounds were begun.
        """
        rounds = cls(run_dir, run, plan, size)
        try:
            values = json.loads(rounds._rounds_file.read_text(encoding="utf-8"))
            if values["run"] != run:
                raise ValueError(f"it is of run {values['run']}")
            rounds.round = int(values["round"])
            rounds.last_asked = {str(name): int(round) for name, round in values["asked"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{rounds._rounds_file} cannot be read ({type(error).__name__}: {error}), and without it "
                "nobody knows which rounds were begun: with dp_ftrl each is published once. Restore the "
                "file, or start a new run."
            ) from error
        notices = []
        try:
            rounds._restore()
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            rounds.noise.restore(rounds.round, np.zeros((0, size)))
            if 0 < rounds.round < plan.num_rounds and rounds._root.bands > 1:
                notices.append(
                    f"The noise of earlier rounds is lost ({rounds._noise_file.name}: "
                    f"{type(error).__name__}), so later rounds cannot take it back: the result is less "
                    "accurate, its privacy as promised."
                )
        rounds.round = max(rounds.round, rounds.noise.round)
        rounds.check_newest(rounds._begun(), "this machine")
        return rounds, notices

    def check_newest(self, round: int, who: str) -> None:
        """Refuses a folder that was wound back: `who` knows that `round` was begun.

        Raises:
            CheckpointError: that round is later than any that this folder knows.
        """
        if round <= self.round:
            return
        raise CheckpointError(
            f"The run folder {self._rounds_file.parents[1]} was wound back, by a backup or a copy: it knows "
            f"of round {self.round}, and {who} of round {round} of this run. With dp_ftrl a round is "
            "published once, and noise that was taken back once must not be taken back again. Go on in the "
            "newest copy of the folder, or start a new run; what was released stays charged."
        )

    def separated(self, nodes: Sequence[NodeInfo], round: int) -> list[NodeInfo]:
        """Those of `nodes` that may be asked in `round`: their last round is long enough ago."""
        apart = self._root.min_separation
        return [node for node in nodes if round - self.last_asked.get(node.name, round - apart) >= apart]

    def begin(self, round: int, cohort: Sequence[NodeInfo]) -> None:
        """Notes, durably, that `cohort` is about to be asked in `round`.

        Raises:
            ResourceError: it cannot be written.
        """
        self.last_asked |= {node.name: round for node in cohort}
        values = {"run": self._run, "round": round, "asked": self.last_asked}
        write_durably(self._rounds_file, json.dumps(values).encode())
        write_durably(self._machine_file, json.dumps({"round": round}).encode())
        self.round = round

    def save_noise(self) -> None:
        """Writes the noise to the disk, if there is new noise.

        Raises:
            ResourceError: it cannot be written.
        """
        if self._saved_round == self.noise.round or self._root.bands == 1:
            return
        buffer = io.BytesIO()
        rows = self.noise.rows()
        np.savez(buffer, allow_pickle=False, run=self._run, round=self.noise.round, rows=rows)
        write_durably(self._noise_file, buffer.getvalue(), mode=0o600)
        self._saved_round = self.noise.round

    def finish(self) -> None:
        """Forgets the noise: no round is to come. Raises ResourceError if it cannot be removed."""
        self._forget_noise()

    def _forget_noise(self) -> None:
        try:
            self._noise_file.unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{self._noise_file}, the noise of a run's last rounds, cannot be removed: {error.strerror}. "
                "Make its folder writable, and go on with `fedtune run resume=RUN_DIR`."
            ) from error

    def _begun(self) -> int:
        """The last round of this run that was begun on this machine; 0 if it knows of none."""
        try:
            return int(json.loads(self._machine_file.read_text(encoding="utf-8"))["round"])
        except FileNotFoundError:
            return 0  # the folder was moved here
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._machine_file} cannot be read ({type(error).__name__}), and it says which rounds of "
                "this run were begun. Restore it, or start a new run."
            ) from error

    def _restore(self) -> None:
        with np.load(self._noise_file, allow_pickle=False) as arrays:
            if str(arrays["run"]) != self._run:
                raise ValueError("it is another run's")
            self.noise.restore(int(arrays["round"]), arrays["rows"])
