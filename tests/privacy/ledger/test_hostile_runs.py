"""What a server, a restored folder or an absurd number may try on a ledger and a plan."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.chain import GENESIS, Chain
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.golden import Golden
from tests.support.ledgers import identity
from tests.support.plans import distributed_plan, local_plan

DELTA = 1e-5


def test_a_run_that_began_by_person_goes_on_by_person(tmp_path: Path, golden: Golden) -> None:
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
    with pytest.raises(PrivacyError) as raised:
        release("record", 2)
    golden(raised)
    release("person", 2)
    assert len(ledger.releases()) == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"noise_multiplier": 1e-9}, "noise_multiplier is 1e-09"),
        ({"noise_multiplier": 1e-300}, "noise_multiplier is 1e-300"),
        ({"noise_multiplier": 1e300}, "noise_multiplier is 1e[+]300"),
        ({"evaluation_share": 0.1, "evaluation_answers": 1, "evaluation_noise": 1e-9}, "evaluation_noise is"),
        ({"num_rounds": 10**12}, "5,000,000,000,000 noised steps"),
    ],
)
def test_a_plan_that_no_accountant_can_bound_is_refused(changes: dict[str, Any], what: str) -> None:
    """These ended in a MemoryError of exabytes, a division by zero or an overflow."""
    with pytest.raises(PrivacyError, match=what):
        local_plan(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 1e-6},
        {"noise_multiplier": 1e-3},
        {"noise_multiplier": 1e-3, "sample_rate": 1.0},
        {"noise_multiplier": 1e6},
        {"num_rounds": 10**6, "local_steps": 1000},
    ],
)
def test_the_least_and_the_most_that_a_plan_may_ask_have_an_epsilon(
    changes: dict[str, Any],
) -> None:
    plan = local_plan(**changes)
    epsilon = plan.epsilon()
    # Without sampling: Bun and Steinke 2016, Proposition 1.3.
    rho = plan.steps() / (2.0 * plan.noise_multiplier**2)
    assert 0.0 <= epsilon <= (rho + 2.0 * math.sqrt(rho * math.log(1.0 / plan.delta))) * 1.001
    assert (plan.cautions() == []) == (epsilon < 10.0)
    ledger = PrivacyLedger(Path(tempfile.mkdtemp()) / "site.sqlite")
    ledger.set_budget(PrivacyBudget(1e308, plan.delta))
    ledger.reserve(dataset="visits", fingerprint=identity("ab"), node="n", run="r", round=1, plan=plan)


@pytest.mark.parametrize("target", [1e-300, 1e-12, 1e6, 1e308])
def test_an_absurd_target_is_refused_in_a_sentence(target: float) -> None:
    with pytest.raises(CalibrationError, match="epsilon"):
        noise_multiplier_for(target, DELTA, sample_rate=0.1, steps=48, use_cache=False)


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_distributed_rows_of_0_1_are_charged_as_another_node_sees_them(tmp_path: Path, purpose: str) -> None:
    """They name the noise towards the server; another of two honest nodes knows half of its variance. Answers
    about held-out data are each node's own, noise included."""
    plan = distributed_plan(num_rounds=4)
    old = {
        "dataset": "visits", "fingerprint": "1f" * 32, "node": "clinic", "round": 1, "public": False,
        "trust": "distributed", "unit": "record", "delta": DELTA, "num_rounds": 4,
        "reproducible_noise": False, "purpose": purpose,
        "steps": [{"sample_rate": 0.05, "noise_multiplier": 1.0, "count": 3}],
    }  # fmt: skip
    chain = Chain(tmp_path / "clinic.sqlite")
    with chain.writing() as connection:
        chain.append(connection, "reserved", old, run="old", previous=GENESIS)
    chain.close()
    noise = math.sqrt(0.5) if purpose == "training" else 1.0
    ledger = PrivacyLedger(tmp_path / "clinic.sqlite")
    found = ledger.epsilon(dataset="visits", fingerprint="1f" * 32, delta=DELTA)
    assert found == pytest.approx(epsilon_of_terms({Term(0.05, noise): 3}, DELTA), rel=1e-6)
    # This version's plans count with that themselves.
    new = PrivacyLedger(tmp_path / "new.sqlite")
    new.reserve(dataset="visits", fingerprint="f", node="clinic", run="new", round=1, plan=plan)
    assert new.epsilon(dataset="visits", fingerprint="f", delta=DELTA) == plan.epsilon(1)
