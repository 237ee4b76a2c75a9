"""The node decides: everything that its own file does not permit is refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import Config
from fedtune.errors import ConfigError, PrivacyError
from fedtune.federation.client.audit_log import AuditLog
from fedtune.federation.client.policy import SiteSettings
from fedtune.privacy.ledger.chain import hash_entry
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.golden import Golden
from tests.support.plans import changed

VALUES: dict[str, Any] = {
    "federation": "trial", "site": "clinic-1", "server": "127.0.0.1:9443",
    "ca": "/x/ca.crt", "key": "/x/node.key",
    "data": {"name": "visits", "declared_size": 1000, "path": "/x/data.csv"},
    "ledger": "/x/ledger.sqlite", "audit_log": "/x/audit.jsonl", "budget_epsilon": 3, "budget_delta": 1e-5,
    "permit": {"trust": ["local"], "max_rounds": 10, "max_local_steps": 5, "max_sample_rate": 0.1},
}  # fmt: skip


def site(**changes: Any) -> SiteSettings:
    return SiteSettings.from_dict({**VALUES, **changes}, "node.yaml")


def asked(**privacy: Any) -> Config:
    config = Config()
    config.data.name = "visits"
    config.privacy.epsilon, config.privacy.noise_multiplier = None, 1.0
    for name, value in privacy.items():
        setattr(config.privacy, name, value)
    config.federation.num_rounds = 10
    config.train.sample_rate, config.train.local_steps = 0.1, 4
    config.adapter.name = "head"
    return config


def plan_of(config: Config, **changes: Any) -> PrivacyPlan:
    return changed(make_plan(config, [1000, 800]), **changes)


def test_a_permitted_run_passes() -> None:
    config = asked()
    site().check(config, plan_of(config), ["f"], "f")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: setattr(c.data, "name", "other"), "data 'other'.*offers 'visits'"),
        (lambda c: setattr(c.model, "name", "bert-large"), "model 'bert-large' is not among"),
        (lambda c: setattr(c.model, "pickle", True), "model.pickle=true has weights read from a pickle"),
        (lambda c: setattr(c.adapter, "name", "everything"), "adapter everything"),
        (
            lambda c: vars(c.privacy).update(trust="central", unit="client"),
            "privacy.trust=central is not among the permitted local",
        ),
        (lambda c: setattr(c.privacy, "noise_multiplier", 0.2), "noise_multiplier=0.2 is below"),
        (lambda c: setattr(c.privacy, "max_grad_norm", 11.0), "max_grad_norm=11 is above"),
        (lambda c: setattr(c.privacy, "reproducible_noise", True), "simulations only"),
        (lambda c: setattr(c.train, "local_steps", 6), "6 local steps"),
        (lambda c: setattr(c.train, "sample_rate", 0.2), "sample_rate=0.2"),
        (lambda c: setattr(c.federation, "num_rounds", 11), "11 rounds"),
        (lambda c: setattr(c.adapter, "rank", 65), "adapter.rank=65 is more than the permitted 64"),
        (lambda c: setattr(c.data, "max_length", 513), "data.max_length=513 is more than the permitted 512"),
        (
            lambda c: vars(c.data).update(max_length=65, long_text="window"),
            "8 windows of data.max_length, together=520 is more than the permitted 512",
        ),
        (lambda c: setattr(c.train, "micro_batch_tokens", 16385), "train.micro_batch_tokens=16385 is more"),
        (lambda c: setattr(c.model, "revision", "main"), "'embedded:minilm' of revision 'main' is not among"),
    ],
)
def test_what_is_not_permitted_is_refused(change: Callable[[Config], None], says: str) -> None:
    config = asked()
    change(config)
    with pytest.raises(PrivacyError, match=says):
        site().check(config, plan_of(config))


def test_a_revision_is_permitted_by_name() -> None:
    config = asked()
    config.model.revision = "4f2a"
    permit = {**VALUES["permit"], "models": ["embedded:minilm@4f2a"]}
    site(permit=permit).check(config, plan_of(config))
    config.model.revision = None  # which may be any
    with pytest.raises(PrivacyError, match="model 'embedded:minilm' is not among"):
        site(permit=permit).check(config, plan_of(config))


def test_one_run_may_be_bounded_below_the_budget() -> None:
    config = asked()
    plan = plan_of(config)
    site(permit={**VALUES["permit"], "max_epsilon": plan.epsilon()}).check(config, plan)
    least = site(permit={**VALUES["permit"], "max_epsilon": plan.epsilon() * 0.99})
    with pytest.raises(PrivacyError, match=r"epsilon \S+ of this run is more than the permitted"):
        least.check(config, plan)
    public = {**VALUES["data"], "public": True}
    site(permit={**VALUES["permit"], "max_epsilon": 0.01}, data=public).check(config, plan)


def test_a_worker_has_a_bound_on_memory_unless_its_owner_takes_it_off() -> None:
    assert site().limits.memory_gb == 8.0
    assert site(limits={"memory_gb": None}).limits.memory_gb is None


def test_no_noise_at_all_is_refused(golden: Golden) -> None:
    config = asked(trust="none", epsilon=None, noise_multiplier=None)
    with pytest.raises(PrivacyError) as raised:
        site().check(config, plan_of(config))
    assert "trust=none" in str(raised.value)
    golden(raised)


def test_changed_data_is_refused(golden: Golden) -> None:
    config = asked()
    with pytest.raises(PrivacyError) as raised:
        site().check(config, plan_of(config), ["before", "before"], "now")
    golden(raised)


def test_all_reasons_are_told_at_once(golden: Golden) -> None:
    config = asked(noise_multiplier=0.1)
    config.federation.num_rounds = 99
    with pytest.raises(PrivacyError) as raised:
        site().check(config, plan_of(config))
    assert "99" in str(raised.value)
    assert "noise_multiplier=0.1" in str(raised.value)
    golden(raised)


def test_what_can_be_refused_before_anything_is_loaded(golden: Golden) -> None:
    config = asked()
    site().admit(config)
    config.model.name = "somebody/elses-model"
    with pytest.raises(PrivacyError) as raised:
        site().admit(config)
    assert "somebody/elses-model" in str(raised.value)
    golden(raised)


def test_the_data_section_is_the_sites_own() -> None:
    config = asked()
    config.data.path, config.data.public, config.data.only_site = "/etc", True, "another"
    config.data.labels = ["no", "yes"]
    config.public.path = "/etc/shadow"
    own = site().own(config)
    assert own.public.path is None  # the submitter's own file: not even looked for at a site
    assert (own.data.path, own.data.public, own.data.only_site) == ("/x/data.csv", False, "clinic-1")
    assert own.data.labels == ["no", "yes"] and own.data.declared_size == 1000
    assert config.data.path == "/etc"


def test_a_run_must_name_the_labels_that_the_file_names() -> None:
    mine = site(data={**VALUES["data"], "labels": ["no", "yes"]})
    config = asked()
    for labels, says in (
        (["no", "yes", "maybe"], "its labels are no, yes, maybe, and the site's no, yes, in this order"),
        (["yes", "no"], "its labels are yes, no"),
        (None, "its labels are none"),
    ):
        config.data.labels = labels
        with pytest.raises(PrivacyError, match=says):
            mine.admit(config)  # before anything of the data is read
    config.data.labels = ["no", "yes"]
    mine.admit(config)
    assert mine.own(config).data.labels == ["no", "yes"]


def test_settings_travel_as_json() -> None:
    for one in (site(), site(data={**VALUES["data"], "labels": ["no", "yes"]})):
        assert SiteSettings.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"permit": {"trust": ["none"]}}, "protects nobody"),
        (
            {"permit": {"trust": ["magic"]}},
            r"permit.trust=magic in node.yaml is not allowed: it must be a list of local",
        ),
        (
            {"permit": {"min_noise_multiplier": float("nan")}},
            "min_noise_multiplier=nan.* must be a finite number",
        ),
        ({"permit": {"max_rounds": True}}, "max_rounds=true.* must be a whole number"),
        ({"budget_delta": 2.0}, "delta"),
        ({"data": {"name": "visits"}}, "data.declared_size in node.yaml is missing"),
        ({"data": {"name": "visits", "declared_size": 0}}, "1 or more"),
        ({"data": {**VALUES["data"], "labels": ["yes"]}}, "two classes or more"),
        ({"data": {**VALUES["data"], "labels": ["yes", "no", "yes"]}}, "each once"),
        ({"data": {**VALUES["data"], "labels": [False, True]}}, "a bare no, yes or 1 as something else"),
        ({"colour": "red"}, "no setting 'colour'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, PrivacyError), match=says):
        site(**changes)


def test_audit_log_shows_what_was_changed(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "state" / "audit.jsonl")
    for number in range(4):
        log.append("released", round=number, text="x" * 3000 * number)
    assert [entry["round"] for entry in log.entries()] == [0, 1, 2, 3]
    assert log.verify() == []
    assert log.path.stat().st_mode & 0o077 == 0
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1].replace(b"released", b"refused_") + lines[2] + lines[3])
    assert log.verify() == ["line 3 does not follow line 2: one of them was replaced"]
    log.path.write_bytes(lines[0] + lines[2] + lines[3])
    assert log.verify() == ["line 2 does not follow line 1: one of them was replaced"]


def test_a_line_that_does_not_name_the_one_before_it_is_a_problem(tmp_path: Path) -> None:
    """Else a line is taken out unseen by whoever takes what it names out of the others, too."""
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(4):
        log.append("released", round=number)
    kept = [{**entry, "previous": None} for entry in log.entries() if entry["round"] != 2]
    del kept[0]["previous"]
    log.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    assert log.verify() == [f"line {number} does not say which line it follows" for number in (1, 2, 3)]


def test_a_log_of_the_time_before_its_lines_were_ascii_is_still_whole(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("refused", reason="x")
    last = hash_entry(log.path.read_bytes()[:-1])
    entry = {"event": "refused", "reason": "Gef\u00e4hrlich", "previous": last}
    with log.path.open("ab") as file:
        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    log.append("refused", reason="\ud800")
    assert log.verify() == []
    assert [one["reason"] for one in log.entries()] == ["x", "Gef\u00e4hrlich", "\ud800"]


def test_a_site_whose_data_names_persons_refuses_record_privacy_by_default(golden: Golden) -> None:
    """A server cannot choose the finer promise: the budget is for persons, unless the file says otherwise."""
    named = {**VALUES["data"], "unit": "patient"}
    assert site().budget.unit is None
    assert site(data=named).budget.unit == "person"
    assert site(data=named, budget_unit="record").budget.unit == "record"  # the owner's choice, in words
    config = asked(unit="record")
    with pytest.raises(PrivacyError) as raised:
        site(data=named).check(config, plan_of(config))
    assert "privacy.unit=person" in str(raised.value)
    golden(raised)
    site(data=named, budget_unit="record").check(config, plan_of(config))
    persons = asked(unit="person")
    site(data=named).check(persons, plan_of(persons))


def test_a_site_whose_file_names_no_persons_does_not_promise_to_protect_them(golden: Golden) -> None:
    persons = asked(unit="person")
    with pytest.raises(PrivacyError) as raised:
        site().check(persons, plan_of(persons))
    golden(raised)
