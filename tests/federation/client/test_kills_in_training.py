"""`kill -9` in real reservations and real trainings: no ledger shows less than was done with the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.config.convert import to_json
from fedtune.config.schema import Config, PrivacyConfig
from fedtune.federation.client.node_context import node_ledger
from fedtune.privacy.accounting.epsilon import Term
from tests.support.killed_trainings import ENOUGH
from tests.support.ledgers import charged

REPOSITORY = Path(__file__).parents[3]


def killed(config: Config, folder: Path, kills: int, seed: int, broken: str = "nothing") -> dict[str, int]:
    """What `killed_trainings` found."""
    config.privacy = PrivacyConfig(trust="local", epsilon=None, noise_multiplier=5.0)
    config.federation.num_rounds = 10_000
    arguments = [to_json(config), str(folder), str(kills), str(seed), broken]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_trainings", *arguments],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3, 4])  # 220 kills in all
def test_kills_in_real_trainings_leave_nothing_uncharged(
    seed: int, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    found = killed(tiny(), tmp_path, 55, seed)
    assert found["kills"] >= 55 and found["forgotten"] == 0
    # Else they were killed where nothing is at stake.
    assert all(found[what] >= least for what, least in ENOUGH), found
    # What is composed is all of it, unfinished releases too, and the books go on.
    ledger = node_ledger()
    releases = ledger.releases()
    assert len(releases) == found["shown"]
    (first, *_) = releases
    terms = charged(ledger, first.dataset, first.fingerprint)
    assert terms == {Term(0.3, 5.0): 2 * len(releases)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_charges_after_it_has_trained_is_found_out(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """The mutant: without a durable reservation before the data is touched, kills leave it uncharged."""
    found = killed(tiny(), tmp_path, 12, 5, "charge")
    assert found["forgotten"] > 0
