"""A site's private part of the model: an offset of its own that never leaves the node (`train.personalize`).

A site trains and uses w + d_i: w is common, d_i its own. Each round the node takes its gradient *at* w + d_i,
and that one noised gradient, which it releases and is charged for anyway, moves both: w on the server as
ever, and d_i on the node, with the same optimizer, schedule and average. Each has half of the rate, so that
their sum moves as one model would. This is the mixture of a common model and a site's own (Hanzely and
Richtarik 2020) without a weight between them to be tuned: what sites have in common moves w, the rest d_i.
An interpolation of a site's own model and the common one is in it.

Privacy: d_i is a function of what the node released, and of what the server sent. It costs nothing beyond
that, and is in no message, checkpoint or record. That holds where a node's noised gradient is a release by
itself (trust local; trust none has nothing to protect). Elsewhere there is no d_i (`check_together`).

Where it is kept, whole or not at all, mode 0600: at a real site in the folder of its ledger,
`personal/RUN.npz`; in a simulation in `RUN_DIR/offsets/NODE.npz`. It moves once for each release, before that
is answered: a round that was charged and whose answer was lost has moved it, and one that is asked again, and
charged again, moves it again. A node that was given up (`federation.round_timeout`) may have moved it before
the next begins, never after. A file that is gone, unreadable or older than the ledger changes no charge: the
node's log and the run's notices say so, and d_i goes on from what there is, for w + d_i is a model whatever
d_i is, and the gradient is taken there.

A real site's own model as a whole (`folder`) is written after each step: with the average of the common parts
that it was sent, which ends one step before the server's; where it is asked about held-out data, with what
it is asked about, which at the end of a run is the server's result.

What it does not do: give a new site a part. It begins with w, which by itself is less accurate than a model
that is common altogether (0.3 to 1.6 points at four sites, `simulations/private_accuracy/personal`).
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Context

from fedtune.config.files import replace_whole
from fedtune.config.recipe import centre_rounds, head_rounds
from fedtune.errors import CheckpointError, FederationError
from fedtune.federation.run_folder import OFFSETS, PERSONAL
from fedtune.federation.server.optimizers import server_optimizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedtune.config.schema import Config
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["PersonalPart", "place_of_part", "place_of_simulated"]

_log = logging.getLogger("fedtune.node")
_RUN = re.compile(r"[0-9A-Za-z_-]{1,64}")  # a server chooses it, and it names a file of the site's


class PersonalPart:
    """One node's offset in one run, and the optimizer that moves it; both as its file has them.

    Args:
        path: the file; there may be none yet.
        run: of which run.
        config: complete.
        head: which numbers of the adapter are the head's, bool [P].

    Attributes:
        releases: how many the node had made, by its ledger, when the offset last moved.
        steps: how often it has moved.
    """

    def __init__(self, path: Path, run: str, config: Config, head: NDArray[np.bool_]) -> None:
        self._path, self._run = path, run
        self._config, self._optimizer = config, server_optimizer(config)
        # bool [P]; beside a centre there is only the head, and the centre is common.
        own = config.train.personalize == "head" or centre_rounds(config)
        self._where = head if own else np.ones_like(head)
        self._offset = np.zeros(int(self._where.sum()), dtype=np.float32)
        self._common: NDArray[np.float32] | None = None  # its average, as far as this node was sent it
        self._sent: NDArray[np.float32] | None = None
        self.releases, self.steps, self._round = 0, 0, 1
        self._read()

    def training(self, adapter: NDArray[np.float32], round: int) -> NDArray[np.float32]:
        """Where the gradient of `round` is taken, float32 [P], if the common adapter is `adapter` [P]."""
        self._begin(round)
        self._sent = adapter
        return self._added(adapter, self._offset)

    def so_far(self) -> NDArray[np.float32] | None:
        """What the site would use if the run ended here, float32 [P], one step of the common part behind;
        None before the first step."""
        return None if self._common is None else self.result(self._common)

    def result(self, adapter: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the site uses, float32 [P], where `adapter` [P] is the result of the common part."""
        return self._added(adapter, self._optimizer.result(self._offset))

    def move(self, update: NDArray[np.float32], round: int, releases: int, damping: float = 1.0) -> None:
        """Takes the step of one release, durably.

        Args:
            update: what is released, minus a noised gradient, float32 [P].
            round: in which, from 1.
            releases: the node's number of releases in this run, this one included.
            damping: share of the rate that the step takes, for the noise of this node alone.

        Raises:
            FederationError: the step is not finite.
            OSError: the file cannot be written; the offset in it is as it was.
        """
        if self.releases != releases - 1:
            _log.warning(
                "The personal part in %s has moved for %d of %d releases of run %s: it was lost, is an older "
                "copy, or a round was charged and not trained. It goes on from what there is.",
                self._path, self.steps, releases - 1, self._run,
            )  # fmt: skip
        self._begin(round)
        if round > centre_rounds(self._config):  # else there is no gradient in it, only noise on the head
            self._optimizer.damping = damping
            self._offset = self._optimizer.step(self._offset, update[self._where])
            if self._sent is not None:
                self._common = self._optimizer.averaged(self._common, self._sent)
        self.releases, self.steps = releases, self.steps + 1
        buffer = io.BytesIO()
        saved: dict[str, Any] = {"run": self._run, "round": round, "releases": releases, "steps": self.steps}
        saved["offset"] = self._offset
        if self._common is not None:
            saved["common"] = self._common
        saved |= {f"optimizer.{name}": array for name, array in self._optimizer.state_dict().items()}
        np.savez(buffer, **saved)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_whole(self._path, buffer.getvalue(), mode=0o600)

    @property
    def folder(self) -> Path:
        """Where a site keeps the model that it uses, in PEFT's format: beside the file."""
        return self._path.with_suffix("")

    def _begin(self, round: int) -> None:
        """As on the server: rounds of the head alone end with their average, and then all begins anew."""
        first = head_rounds(self._config)
        if self._round <= first < round:
            self._offset = self._optimizer.result(self._offset)
            self._optimizer, self._common = server_optimizer(self._config, round - 1), None
        self._round = round

    def _added(self, adapter: NDArray[np.float32], offset: NDArray[np.float32]) -> NDArray[np.float32]:
        whole = adapter.copy()
        whole[self._where] += offset
        return whole

    def _read(self) -> None:
        """Goes on from the file, if it holds a part of this run."""
        try:
            with np.load(self._path, allow_pickle=False) as saved:
                if str(saved["run"]) != self._run:
                    return
                offset, common = saved["offset"], saved["common"] if "common" in saved.files else None
                counts = [int(saved[name]) for name in ("releases", "steps", "round")]
                state = {
                    name.removeprefix("optimizer."): saved[name]
                    for name in saved.files
                    if name.startswith("optimizer.")
                }
            if offset.shape != self._offset.shape or not np.isfinite(offset).all():
                raise ValueError(f"an offset of shape {offset.shape}, and not {self._offset.shape}")
            optimizer = server_optimizer(self._config, counts[-1] - 1)
            optimizer.load_state_dict(state)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, CheckpointError) as error:
            _log.warning("The personal part in %s is unreadable, and begins anew: %s", self._path, error)
            return
        self._offset, self._optimizer, self._common = offset.astype(np.float32), optimizer, common
        self.releases, self.steps, self._round = counts


def place_of_part(
    config: Config, context: Context, site: SiteSettings | None, run: str, node: str
) -> Path | None:
    """Where the node keeps its part of a run; None where it has none (`train.personalize=none`).

    Raises:
        FederationError: it has no place for one, which is asked before anything is charged.
    """
    if config.train.personalize == "none":
        return None
    if site is not None:
        if not _RUN.fullmatch(run):
            raise FederationError(
                "The run's number is no word of letters and digits, and a site's personal part is kept under "
                "it. Start a new run."
            )
        return Path(site.ledger).parent / PERSONAL / f"{run}.npz"
    folder = config.resume or str(context.run_config.get("output", "")) or config.output
    if not folder:
        raise FederationError(
            f"Node {node!r} does not know the run's folder, where it would keep its personal part. Name it "
            "(output), or use train.personalize=none."
        )
    return place_of_simulated(Path(folder), node)


def place_of_simulated(run_dir: Path, node: str) -> Path:
    """Where a simulated node keeps its part of the run in `run_dir`."""
    return run_dir / OFFSETS / f"{node}.npz"
