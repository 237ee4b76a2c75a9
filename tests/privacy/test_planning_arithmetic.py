"""What a plan is made of, setting by setting, with the calibration noted instead of run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedtune.config.schema import Config, DataConfig
from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy import plan as planning
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.mechanisms import counts, distributed
from fedtune.privacy.mechanisms.counts import DELTA
from fedtune.privacy.plan import default_delta, make_plan
from tests.support.golden import Golden

Asked = list[tuple[float, float, float, int, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the calibration is asked for: (epsilon, delta, sampling rate, steps, also); its answer is 2."""
    found: Asked = []

    def answer(epsilon: float, delta: float, *, sample_rate: float, steps: int, also: Any = None) -> float:
        found.append((epsilon, delta, sample_rate, steps, also))
        return 2.0

    monkeypatch.setattr(planning, "noise_multiplier_for", answer)

    def noise(of: Config, delta: float, answers: int) -> float:
        return 30.0 + answers if of.seed == 7 and 0.0 < delta < 1.0 else math.nan

    monkeypatch.setattr(planning, "evaluation_noise", noise)
    return found


def config(declared: Any = 1000, **changes: Any) -> Config:
    made = Config(data=DataConfig(declared_size=declared), seed=7)
    made.federation.evaluation = "none"
    made.federation.num_rounds = 12
    made.train.sample_rate, made.train.local_steps, made.privacy.max_grad_norm = 0.05, 3, 1.0
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(made, part or "privacy"), field, value)
    return made


USUAL = {
    "unit": "record", "num_rounds": 12, "seed": 7, "records_per_unit": 1, "reproducible_noise": False,
    "evaluation_share": 0.0, "evaluation_answers": 0, "evaluation_noise": 0.0, "size_noise": 0.0,
    "head_norm": 0.0, "head_share": 0.0, "head_rounds": 0, "centre_rounds": 0,
}  # fmt: skip
PRIVATE = {**USUAL, "noise_multiplier": 2.0, "max_grad_norm": 1.0, "target_epsilon": 8.0}


def test_every_field_of_a_local_plan(asked: Asked) -> None:
    plan = make_plan(config(), [300, 900, 500])
    assert plan.settings() == {
        **PRIVATE, "trust": "local", "sample_rate": 0.05, "local_steps": 3, "declared_size": 900,
        "weighting": "uniform", "delta": 900**-1.1, "nodes": 3,
    }  # fmt: skip
    assert asked == [(8.0, 900**-1.1, 0.05, 36, {})]


def test_every_field_of_a_distributed_plan(asked: Asked) -> None:
    made = config(trust="distributed", max_dropouts=1, federation__cohort_size=5)
    plan = make_plan(made, [300, 900, 500, 200, 100])
    assert plan.settings() == {
        **PRIVATE, "trust": "distributed", "sample_rate": 0.05, "declared_size": 2000, "delta": 2000**-1.1,
        "nodes": 5, "max_dropouts": 1, "max_colluders": 1, "centre_rounds": 1,
    }  # fmt: skip
    assert [one[2:4] for one in asked] == [(0.05, 12)]


def test_every_field_of_a_central_plan(asked: Asked) -> None:
    made = config(trust="central", federation__cohort_size=4, max_dropouts=1, max_colluders=1)
    plan = make_plan(made, [300] * 8)
    assert plan.settings() == {
        **PRIVATE, "trust": "central", "unit": "client", "declared_size": 8, "delta": 1e-3, "nodes": 8,
        "cohort_size": 4, "training_sample_rate": 0.05, "training_steps": 3, "adaptive_clipping": False,
        "clip_quantile": 0.5, "quantile_noise": 0.0, "method": "gaussian", "bands": 1, "min_separation": 1,
    }  # fmt: skip
    assert [one[2:4] for one in asked] == [(1.0, 12)]


def test_every_field_of_a_plan_without_privacy(asked: Asked) -> None:
    made = config(
        trust="none", noise_multiplier=0.0, adaptive_clipping=True, reproducible_noise=True,
        mechanism="dp_ftrl", bands=3, min_separation=4,
    )  # fmt: skip
    assert make_plan(made, [300, 900]).settings() == {
        **USUAL, "trust": "none", "sample_rate": 0.05, "local_steps": 3, "weighting": "uniform",
        "declared_size": 900, "delta": 0.0, "nodes": 2, "noise_multiplier": 0.0, "max_grad_norm": math.inf,
        "target_epsilon": None,
    }  # fmt: skip
    assert asked == []


def test_settings_that_are_passed_on(asked: Asked) -> None:
    said: dict[str, Any] = {
        "records_per_unit": 5,
        "reproducible_noise": True,
        "max_grad_norm": 0.5,
    }
    plan = make_plan(config(unit="person", **said), [900]).settings()
    assert {name: plan[name] for name in said} == said
    assert make_plan(config(records_per_unit=5), [900]).records_per_unit == 1
    quantile = make_plan(config(trust="central", clip_quantile=0.25), [900] * 40)
    assert quantile.settings()["clip_quantile"] == 0.25
    weighted = make_plan(config(federation__weighting="declared"), [900])
    assert weighted.settings()["weighting"] == "declared"
    assert make_plan(config(records_per_unit=0), [900]).records_per_unit == 1  # no persons: not asked


def test_correlated_noise_is_one_gaussian_to_the_calibration(asked: Asked) -> None:
    made = config(trust="central", mechanism="dp_ftrl", min_separation=3, federation__cohort_size=8)
    plan = make_plan(made, [300] * 24)
    said = plan.settings()
    assert (said["method"], said["bands"], said["min_separation"]) == ("dp_ftrl", 3, 3)
    assert [one[2:4] for one in asked] == [(1.0, 1)]
    made.privacy.bands = 2
    assert make_plan(made, [300] * 24).settings()["bands"] == 2


def test_answers_are_part_of_the_target_and_who_is_held_out_is_counted(asked: Asked) -> None:
    made = config(federation__evaluation="private", federation__evaluation_share=0.25)
    made.federation.evaluation_rounds = 2
    plan = make_plan(made, [900])
    assert (plan.evaluation_share, plan.evaluation_answers, plan.evaluation_noise) == (0.25, 2, 32.0)
    assert plan.delta == 1200**-1.1
    assert asked == [(8.0, plan.delta, 0.05, 36, {Term(1.0, 32.0): 2})]


def test_sizes_told_with_noise_are_part_of_the_target_and_leave_delta_alone(asked: Asked) -> None:
    plan = make_plan(config(None), [900])
    assert (plan.size_noise, plan.delta) == (20.0, DELTA)
    assert asked == [(8.0, DELTA, 0.05, 36, {Term(1.0, 20.0): 1})]
    assert make_plan(config(None), [1]).delta == DELTA  # nobody knows that it is one
    assert make_plan(config(None, delta=1e-7), [1]).delta == 1e-7


def test_so_many_units_that_the_fixed_delta_is_too_large(asked: Asked, golden: Golden) -> None:
    made = config(None, federation__evaluation="private", federation__evaluation_share=0.5)
    with pytest.raises(PrivacyError) as raised:
        make_plan(made, [250_000, 500_000, 100, 100])
    assert "1,000,200" in str(raised.value)
    assert "1e-06" in str(raised.value)
    assert "3e-07" in str(raised.value)
    golden(raised)
    made.privacy.delta = 1e-7
    assert make_plan(made, [250_000, 500_000, 100, 100]).delta == 1e-7


def test_the_largest_that_the_fixed_delta_is_good_for(golden: Golden) -> None:
    counts.check_told(None, 1000.0**-1.1, None, 1000.0)
    with pytest.raises(PrivacyError) as raised:
        counts.check_told(None, 1000.0**-1.1, None, 1001.0)
    assert "1,001" in str(raised.value)
    golden(raised)
    counts.check_told(0.1, 0.1, None, 1001.0)  # a delta of the owner's own: checked by the plan


def test_a_target_that_the_size_uses_up_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []

    def cost(terms: Any, delta: float) -> float:
        composed.append((terms, delta))
        return 0.16

    monkeypatch.setattr(counts, "epsilon_of_terms", cost)
    counts.check_told(None, 1e-6, math.nextafter(0.16, 1.0), 10.0)
    counts.check_told(None, 1e-6, None, 10.0)
    assert composed == [({Term(1.0, 20.0): 1}, 1e-6)] * 2
    for target in (0.16, 0.1):
        with pytest.raises(
            CalibrationError, match=rf"epsilon 0\.16, .*epsilon={target:g} for training\. Dec"
        ):
            counts.check_told(None, 1e-6, target, 10.0)


def test_the_owners_delta_bounds_the_default_alone(asked: Asked) -> None:
    assert make_plan(config(), [900], 1e-5).delta == 1e-5
    assert make_plan(config(), [900], 0.1).delta == 900**-1.1
    assert make_plan(config(delta=1e-4), [900], 1e-5).delta == 1e-4
    assert make_plan(config(), [1], 1e-5).delta == 1e-5  # one unit, and its owner said which delta
    assert default_delta(2) == 1e-3 and default_delta(1e6) == 1e6**-1.1


def test_one_client_of_a_trusted_server_is_a_plan(asked: Asked) -> None:
    assert make_plan(config(trust="central"), [900]).delta == 1e-3


@pytest.mark.parametrize(("unit", "advice"), [("record", r"say\)\.$"), ("person", "say\\), privacy.unit=re")])
def test_one_unit_with_all_the_data_is_told_what_to_do(asked: Asked, unit: str, advice: str) -> None:
    with pytest.raises(PrivacyError, match=rf"One {unit} holds.*{advice}"):
        make_plan(config(unit=unit), [1])


@pytest.mark.parametrize(
    ("nodes", "dropouts", "said", "found"),
    [
        (1, 0, None, 0),
        (2, 0, None, 1),  # 2 answers of 2
        (2, 1, None, 0),
        (3, 0, None, 1),
        (3, 1, None, 0),  # 3 are needed, 2 come
        (4, 1, None, 1),  # 3 are needed, 3 come
        (4, 2, None, 0),
        (5, 1, None, 1),  # 4 are needed, 4 come
        (5, 2, None, 0),
        (9, 3, None, 1),
        (5, 2, 3, 3),
        (5, 0, 0, 0),
    ],
)
def test_one_colluder_where_so_many_answer(nodes: int, dropouts: int, said: int | None, found: int) -> None:
    privacy = config(max_dropouts=dropouts, max_colluders=said).privacy
    assert distributed._colluders(privacy, nodes) == found


@pytest.mark.parametrize(("noise", "spread"), [(0.7, 1.0), (1.0, 1.0), (1.5, 1.5)])
def test_noise_on_the_quantile_is_a_twentieth_of_the_cohort_or_more(
    monkeypatch: pytest.MonkeyPatch, noise: float, spread: float
) -> None:
    monkeypatch.setattr(planning, "noise_multiplier_for", lambda *_, **__: noise)
    made = config(trust="central", adaptive_clipping=True, federation__cohort_size=20)
    plan = make_plan(made, [900] * 40)
    said = plan.settings()
    assert (said["adaptive_clipping"], plan.noise_multiplier) == (True, noise)
    assert said["quantile_noise"] == spread
    made.privacy.epsilon, made.privacy.noise_multiplier = None, noise
    given = make_plan(made, [900] * 40)
    assert (given.settings()["quantile_noise"], given.noise_multiplier, given.target_epsilon) == (
        spread,
        noise,
        None,
    )


def test_which_of_the_two_is_said(asked: Asked, golden: Golden) -> None:
    with pytest.raises(PrivacyError) as raised:
        make_plan(config(noise_multiplier=1.0), [900])
    golden(raised)
    with pytest.raises(PrivacyError) as raised:
        make_plan(config(epsilon=None), [900])
    golden(raised)
    with pytest.raises(PrivacyError) as raised:
        make_plan(config(trust="none", noise_multiplier=1.0), [900])
    assert "noise_multiplier" in str(raised.value)
    assert "1.0" in str(raised.value)
    golden(raised)


def test_no_noise_is_found_for_clients_who_are_seen(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    def fails(*_: Any, **__: Any) -> float:
        raise CalibrationError("There is none.")

    monkeypatch.setattr(planning, "noise_multiplier_for", fails)
    with pytest.raises(CalibrationError, match=r"^There is none\.$"):
        make_plan(config(), [900])
    with pytest.raises(CalibrationError) as raised:
        make_plan(config(trust="central"), [300] * 24)
    assert "24" in str(raised.value)
    golden(raised)
    made = config(trust="central", mechanism="dp_ftrl", min_separation=3, federation__cohort_size=8)
    with pytest.raises(CalibrationError, match="each of 24 takes part in 4 of 12 rounds in sight of all"):
        make_plan(made, [300] * 24)


def test_what_is_named_in_a_refusal(asked: Asked, golden: Golden) -> None:
    for changes, named in (
        ({"unit": "person", "records_per_unit": 0}, "privacy.records_per_unit"),
        ({"epsilon": None, "noise_multiplier": "x"}, "privacy.noise_multiplier"),
        ({"trust": "central", "adaptive_clipping": True, "federation__cohort_size": 0},
         "federation.cohort_size"),
        ({"trust": "central", "adaptive_clipping": True, "epsilon": None, "noise_multiplier": "x"},
         "privacy.noise_multiplier"),
    ):  # fmt: skip
        with pytest.raises(PrivacyError) as raised:
            make_plan(config(**changes), [900, 300])
        assert raised.value.setting == named and str(raised.value).startswith(f"{named} must")
    with pytest.raises(PrivacyError) as raised:
        make_plan(config(), [0])
    assert raised.value.setting == "declared size of a node"
    assert str(raised.value).startswith("declared size of a node must")
    with pytest.raises(PrivacyError, match="^privacy.trust must be one of local") as raised:
        make_plan(config(trust="secret"), [1])  # before it is told that one unit has nobody to hide among
    assert raised.value.setting == "privacy.trust"
    with pytest.raises(PrivacyError) as raised:
        make_plan(config(), [])
    golden(raised)
    assert asked == []
