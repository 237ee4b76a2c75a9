"""record.json: complete, strict, whole or not there, and never more optimistic than what ran."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import Config
from fedtune.cost.meter import Cost, EnergyReading
from fedtune.data.sources.load import LABELS_TAKEN
from fedtune.errors import RecordError, ResourceError
from fedtune.federation.events import Dropped, RoundSummary
from fedtune.privacy.plan import PrivacyPlan
from fedtune.runs import record as records
from fedtune.runs.assemble import Metrics, NodePrivacy, RunFacts, assemble
from tests.support.golden import Golden
from tests.support.plans import local_plan, public_plan

# The contract, typed in from the design and not taken from the module.
CONTRACT = {
    "run": "id started seconds engine seed versions commit dirty hardware",
    "config": "seed data partition model adapter privacy train federation engine pricing",
    "federation": "nodes rounds cohort_size dropped",
    "privacy": (
        "unit adjacency trust mechanism noise_multiplier max_grad_norm sample_rate steps accountant "
        "epsilon delta epsilon_rdp per_node reproducible_noise audit"
    ),
    "metrics": "accuracy precision_macro recall_macro f1_macro loss by_round per_site",
    "cost": (
        "train_seconds flops peak_memory_bytes encoder_bytes adapter_bytes bytes_up bytes_down "
        "energy_kwh money pricing"
    ),
    "artifacts": "adapter statement",
}


def plan(**changes: Any) -> PrivacyPlan:
    return local_plan(**({"noise_multiplier": 0.9, "target_epsilon": 8.0} | changes))


def node(name: str, epsilon: float | None = 7.5, releases: int = 2, **changes: Any) -> NodePrivacy:
    values: dict[str, Any] = {
        "node": name, "epsilon": epsilon, "epsilon_rdp": None if epsilon is None else epsilon + 1,
        "delta": 1e-5, "releases": releases, "dataset": "data", "fingerprint": name * 4,
        "total_epsilon": 9.0, "total_releases": 4,
    }  # fmt: skip
    return NodePrivacy(**(values | changes))


def build(**changes: Any) -> dict[str, Any]:
    result = SimpleNamespace(
        plan=changes.pop("plan", plan()),
        history=changes.pop(
            "history", [RoundSummary(1, 2, 1.5, 0.7, 0.6, 4.0), RoundSummary(2, 2, 1.0, 0.8, 0.5, 7.5)]
        ),
        dropped=changes.pop("dropped", []),
        unusable=changes.pop("unusable", []),
        notices=changes.pop("notices", []),
        left_out=changes.pop("left_out", {}),
        ended_early=None,
    )
    parts: dict[str, Any] = {
        "config": Config(),
        "facts": RunFacts(
            "abc", "2026-01-01T00:00:00+00:00", 3.0, "local", 0, {"torch": "2"}, None, None, {"cores": 2}
        ),
        "result": result,
        "nodes": [node("a"), node("b", 3.0, 1)],
        "metrics": Metrics(0.8, 0.8, 0.8, 0.8, 0.5, {"x": {"accuracy": 0.8, "num_records": 10}}),
        "data": {"name": "data", "public": False, "labels": ["n", "p"], "notes": ["a note"]},
        "cost": Cost(seconds=3.0, train_seconds=2.0, flops=5, bytes_up=7, bytes_down=8, energy_kwh=None),
        "energy": EnergyReading(None, "not installed"),
        "money": None,
        "carbon_kg": None,
        "memory_note": "here",
        "encoder_bytes": 10,
        "adapter_bytes": 20,
        "num_parameters": 5,
        "artifacts": {"adapter": "adapter", "statement": "statement.md"},
        "accountant": "PLD",
    }
    return assemble(**(parts | changes))


@pytest.mark.parametrize("public", [True, False])
def test_a_label_set_that_nobody_declared_is_cautioned_of_once(public: bool) -> None:
    data = {"name": "data", "public": public, "labels": ["n", "p"], "notes": [LABELS_TAKEN]}
    made = build(data={**data, "labels_declared": False})
    assert made["privacy"]["cautions"].count(LABELS_TAKEN) == 1
    # The terminal shows a note of the data only where the cautions do not have the same words.
    assert sum("label set" in text for text in {*made["privacy"]["cautions"], *data["notes"]}) == 1


def test_it_has_every_key_of_the_contract() -> None:
    made = build()
    assert made["schema"] == 1
    for section, keys in CONTRACT.items():
        assert set(keys.split()) <= set(made[section]), section
    assert set(made["privacy"]["per_node"][0]) >= {"node", "epsilon", "delta", "releases"}
    assert set(made["metrics"]["by_round"][0]) >= {"round", "seconds", "accuracy", "loss", "epsilon"}


def test_epsilon_is_the_largest_of_the_nodes_and_never_their_average() -> None:
    privacy = build(nodes=[node("a", 2.0), node("b", 6.0), node("c", 4.0)])["privacy"]
    assert privacy["epsilon"] == 6.0 and privacy["epsilon_rdp"] == 7.0


def test_a_node_whose_epsilon_is_unknown_makes_the_runs_unknown() -> None:
    assert build(nodes=[node("a", 2.0), node("b", None)])["privacy"]["epsilon"] is None


def test_steps_are_those_of_the_node_that_released_most() -> None:
    assert build(nodes=[node("a", releases=2), node("b", releases=3)])["privacy"]["steps"] == 15


def test_without_privacy_there_is_no_epsilon_even_if_someone_hands_one_in() -> None:
    privacy = build(plan=public_plan())["privacy"]
    assert privacy["epsilon"] is None and privacy["delta"] is None and privacy["epsilon_rdp"] is None
    assert all(one["epsilon"] is None and one["delta"] is None for one in privacy["per_node"])
    assert privacy["max_grad_norm"] is None


def test_what_was_dropped_is_named() -> None:
    made = build(dropped=[Dropped("b", 2, "NaN in its update")])
    assert made["federation"]["dropped"] == [{"node": "b", "round": 2, "reason": "NaN in its update"}]
    assert made["federation"]["left_out"] == []
    assert build(left_out={"c": "no"})["federation"]["left_out"] == [{"node": "c", "reason": "no"}]


def test_notices_of_the_run_become_cautions_and_notes_on_the_data_where_it_is_public() -> None:
    assert build(notices=["a notice"])["privacy"]["cautions"] == ["a notice"]
    data = {"name": "data", "public": True, "labels": ["n", "p"], "notes": ["a note"]}
    assert build(notices=["a notice"], data=data)["privacy"]["cautions"] == ["a note", "a notice"]


def test_the_audit_is_empty_until_there_was_one() -> None:
    assert build()["privacy"]["audit"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_that_json_lacks_become_null(value: float) -> None:
    made = build(metrics=Metrics(value, 0.1, 0.1, 0.1, value, {}, num_records=10, majority_rate=0.5))
    assert made["metrics"]["accuracy"] is None and made["metrics"]["loss"] is None
    json.dumps(made, allow_nan=False)


def test_clean_leaves_only_what_json_has() -> None:
    dirty = {
        1: np.int64(3),
        "a": (np.float32(0.5), np.array([1.0, np.nan])),
        "b": Path("x"),
        "c": True,
        "d": None,
    }
    assert records.clean(dirty) == {"1": 3, "a": [0.5, [1.0, None]], "b": "x", "c": True, "d": None}
    assert type(records.clean(np.int64(3))) is int and type(records.clean(np.float32(0.5))) is float


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    made = build(data={"name": "data", "public": True, "labels": ["n", "p"], "notes": ["a note"]})
    records.write(made, tmp_path / "deep" / "record.json")
    assert records.read(tmp_path / "deep") == records.read(tmp_path / "deep" / "record.json") == made
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["record.json"]


def test_what_is_the_owners_of_private_data_is_kept_beside_the_record(tmp_path: Path) -> None:
    made = build(unusable=[Dropped("b", 2, "its norm is over 100")])
    assert records.publish(made, tmp_path) == records.read(tmp_path)
    published = records.read(tmp_path)
    assert published["run"]["seconds"] is None and published["cost"]["flops_counted"] is None
    assert published["data"]["notes"] is None and published["federation"]["unusable"] is None
    assert all(one["seconds"] is None for one in published["metrics"]["by_round"])
    assert records.whole(tmp_path) == made
    assert (tmp_path / "local.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("found", [0, 2, "1", None, True, 1.5])
def test_another_schema_is_refused_with_both_versions(tmp_path: Path, found: Any) -> None:
    (tmp_path / "record.json").write_text(json.dumps(build() | {"schema": found}))
    with pytest.raises(RecordError, match=r"schema .*" + str(found) + r".* reads schema 1"):
        records.read(tmp_path)


def test_half_written_is_refused_at_every_length(tmp_path: Path) -> None:
    text = json.dumps(build())
    for length in range(0, len(text) - 1, 97):
        (tmp_path / "record.json").write_text(text[:length])
        with pytest.raises(RecordError, match="half-written or damaged"):
            records.read(tmp_path)


@pytest.mark.parametrize("section", list(CONTRACT))
def test_a_missing_part_is_named(section: str) -> None:
    made = build()
    del made[section]
    with pytest.raises(RecordError, match=section):
        records.validate(made)


@pytest.mark.parametrize(
    "name", ["privacy.delta", "privacy.per_node", "cost.money", "run.commit", "metrics.by_round"]
)
def test_a_missing_key_is_named(name: str) -> None:
    made = build()
    section, key = name.split(".")
    del made[section][key]
    with pytest.raises(RecordError, match=name):
        records.validate(made)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null"])
def test_json_that_is_no_record_is_refused(tmp_path: Path, content: str, golden: Golden) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(RecordError) as raised:
        records.read(tmp_path)
    golden(raised)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError) as raised:
        records.read(tmp_path)
    golden(raised)


def test_folders_without_a_record_are_told_apart(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(RecordError) as raised:
        records.read(tmp_path)
    golden(raised)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(RecordError) as raised:
        records.read(tmp_path)
    assert "resume=" in str(raised.value)
    golden(raised)
    with pytest.raises(RecordError) as raised:
        records.read(tmp_path / "nowhere")
    golden(raised)


def test_a_writer_that_dies_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    path = tmp_path / "record.json"
    records.write(build(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError) as raised:
        records.write(build(notices=["other"]), path)
    golden(raised)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_a_record_for_which_there_is_no_room_at_all(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError) as raised:
        records.write(build(), tmp_path / "file" / "record.json")
    golden(raised)
