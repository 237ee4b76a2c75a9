"""What a sweep says that it will spend: its own plans, composed by Renyi DP, before any of them is
charged."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.search import Axis
from fedtune.errors import ConfigError
from fedtune.federation.client.node_context import node_ledger
from fedtune.privacy.accounting.epsilon import compose_terms, epsilon_rdp_of_terms
from fedtune.privacy.accounting.filter import least_epsilon
from fedtune.privacy.plan import make_plan
from fedtune.sweeps.search import _refuse_blind
from fedtune.sweeps.spending import costliest_run, spending_text
from fedtune.sweeps.sweep import run_sweep
from tests.support import tiny_federation as tiny
from tests.support.golden import Golden
from tests.support.synthetic import make_record, write


@pytest.fixture
def base(world: dict[str, Path]) -> Any:
    return tiny.private(tiny.make_config(world["model"], world["data"], privacy__unit="record"))


def shown(text: str) -> float:
    return float(re.findall(r"epsilon ([\d.]+)", text)[0])


def with_epsilon(base: Any, epsilon: float, **changes: Any) -> Any:
    return dataclasses.replace(base, privacy=dataclasses.replace(base.privacy, epsilon=epsilon), **changes)


def test_the_cost_of_a_sweep_is_all_of_its_runs_composed(base: Any) -> None:
    own = dataclasses.replace(base.data, declared_size=None)  # told with noise: the plan is known beforehand
    configs = [with_epsilon(base, 2.0), with_epsilon(base, 8.0), with_epsilon(base, 8.0, seed=1)]
    configs = [with_epsilon(one, one.privacy.epsilon, data=own) for one in configs]
    plans = [make_plan(config, [30] * 4) for config in configs]
    total = compose_terms(*(plan.everything(plan.num_rounds, plan.evaluation_answers) for plan in plans))
    text = spending_text(configs)
    # As ledgers and the report count several runs: no less than they will show afterwards.
    assert shown(text) == pytest.approx(least_epsilon(total, plans[0].delta), rel=0.01)
    assert shown(text) > epsilon_rdp_of_terms(total, plans[0].delta)
    assert shown(text) > 8.0  # more than any run alone, and than the last
    for word in ("3 runs together", "Renyi DP", f"delta {plans[0].delta:.1e}", "add or remove one record"):
        assert word in text
    assert "ledgers charge it" in text


def test_public_data_is_recorded_and_runs_without_noise_promise_nothing(base: Any) -> None:
    declared = dataclasses.replace(base, data=dataclasses.replace(base.data, public=True))
    assert "declared public, so ledgers record it and refuse nothing" in spending_text([declared, declared])
    free = dataclasses.replace(base, privacy=dataclasses.replace(base.privacy, trust="none", epsilon=None))
    assert "with them epsilon is infinite" in spending_text([base, free])
    assert "1 run spends about epsilon 7.9" in spending_text([base])
    assert "1 run cannot be planned yet" in spending_text([base, None])
    assert spending_text([]) == ""


def test_units_are_not_added_up_as_one(base: Any) -> None:
    person = dataclasses.replace(base, privacy=dataclasses.replace(base.privacy, unit="person"))
    person = dataclasses.replace(person, data=dataclasses.replace(person.data, unit="text"))
    text = spending_text([base, person])
    assert "add or remove one record" in text and "add or remove one person" in text


def test_a_search_is_priced_at_its_dearest(base: Any) -> None:
    found = costliest_run(
        base, [Axis("privacy.epsilon", (), 0.5, 4.0), Axis("train.learning_rate", ("1", "2"))]
    )
    assert found is not None and found.privacy.epsilon == 4.0
    least = costliest_run(base, [Axis("privacy.noise_multiplier", ("2", "0.7"))])
    assert least is not None and (least.privacy.noise_multiplier, least.privacy.epsilon) == (0.7, None)
    given = dataclasses.replace(base.privacy, epsilon=None, noise_multiplier=1.0)
    noised = dataclasses.replace(base, privacy=given)
    assert costliest_run(noised, [Axis("train.local_steps", ("1", "9"))]) is None
    assert costliest_run(base, [Axis("privacy.unit", ("record", "person"))]) is None
    assert costliest_run(None, []) is None
    assert "at most" in spending_text([found] * 3, most=True)


@pytest.mark.slow
def test_a_sweep_says_its_price_before_its_first_run_and_a_resumed_one_what_is_left(
    world: dict[str, Path], tmp_path: Path
) -> None:
    words = [
        "data=files", f"data.path={world['data']}", "data.name=tiny", "data.labels=[negative,positive]",
        "data.max_length=16", "data.declared_size=120", f"model.name={world['model']}",
        "model.quantization=none", "federation.num_rounds=1", "privacy.epsilon=2,4", "device=cpu",
        "train.sample_rate=0.1",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    said: list[str] = []

    class Stop(Exception):
        pass

    def start(*_: Any) -> Path:
        assert len(said) == 1  # the price is known before anything runs
        assert node_ledger().releases() == []
        raise Stop

    def describe(error: Exception) -> str:
        if not isinstance(error, Stop):
            raise error
        return "stopped"

    run_sweep(words, start, describe=describe, say=said.append, warn=lambda _: None)
    assert said[0].startswith("2 runs in")
    assert "Privacy: 2 runs together, by Renyi DP, spend about epsilon" in said[0]
    # One of the two is there by now: only the other is still to be paid for.
    write(tmp_path / "sweep" / "1", make_record(epsilon=4.0))
    again: list[str] = []
    run_sweep(
        [f"sweep.resume={tmp_path / 'sweep'}"],
        lambda *_: (_ for _ in ()).throw(Stop()),
        describe=describe, say=again.append, warn=lambda _: None,
    )  # fmt: skip
    assert "Privacy: 1 run spends about epsilon 1.9" in again[0]


def test_a_search_by_an_accuracy_that_no_run_will_have_is_refused(base: Any, golden: Golden) -> None:
    _refuse_blind(base)
    blind = dataclasses.replace(base, federation=dataclasses.replace(base.federation, evaluation="none"))
    with pytest.raises(ConfigError) as raised:
        _refuse_blind(blind)
    golden(raised)
