"""What a server, a restored folder or an absurd number may try on a ledger and a plan, as a reviewer tried it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.budget_file import PrivacyBudget
from fedtune.privacy.ledger import PrivacyLedger
from tests.privacy.identities import identity
from tests.privacy.plans import local_plan

DELTA = 1e-5


def test_a_run_that_began_by_person_goes_on_by_person(tmp_path: Path) -> None:
    """Admitted whole by its own epsilon, a run could switch to records: each record was then charged by both,
    6.4 of a budget of 5.1, because a release by person counts as a replacement for a single record."""
    plans = {
        unit: local_plan(unit=unit, sample_rate=0.1, local_steps=10, num_rounds=5)
        for unit in ("person", "record")
    }
    ledger = PrivacyLedger(tmp_path / "site.sqlite")
    ledger.set_budget(PrivacyBudget(plans["person"].epsilon() * 1.000001, DELTA))
    data = identity(range(40), [f"person {i // 2}" for i in range(40)])

    def release(unit: str, round: int) -> None:
        plan = plans[unit]
        ledger.reserve(
            dataset="visits", fingerprint=data, node="clinic", run="run-1", round=round, plan=plan,
            whole=[plan],
        )  # fmt: skip

    release("person", 1)
    with pytest.raises(PrivacyError, match="protects one record .*the run began with .*one person"):
        release("record", 2)
    release("person", 2)
    assert len(ledger.releases()) == 2
