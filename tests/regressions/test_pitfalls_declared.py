"""Bugs about what nobody declared public: held-out data, sizes, and the unit that a default protects.

Numbers are those of the list of privacy bugs that frameworks of this kind have shipped.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.config.convert import to_json
from fedtune.config.loader import load
from fedtune.config.schema import Config, DataConfig, PartitionConfig, PrivacyConfig
from fedtune.errors import BudgetExhausted, CalibrationError, ConfigError, FederationError
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.resources import RunResources, run_resources
from fedtune.federation.server import loop as server
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.mechanisms.counts import SIZE_NOISE, SizePlan
from fedtune.privacy.statement.facts import statement_json, statement_markdown
from fedtune.runs import record
from fedtune.runs.run import run
from tests.support import tiny_federation
from tests.support.golden import Golden


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tiny_federation.one_thread()
    folder = tmp_path_factory.mktemp("declared")
    return tiny_federation.make_model(folder / "model"), tiny_federation.make_data(folder / "data")


def undeclared(parts: tuple[Path, Path], **changes: Any) -> Config:
    """Private data of which nothing is declared but the labels."""
    config = tiny_federation.make_config(*parts, federation__num_rounds=2, **changes)
    config.data = dataclasses.replace(config.data, test_split=None, test_public=False, declared_size=None)
    config.privacy = PrivacyConfig(trust="local", epsilon=8.0)
    return config


def finish(config: Config, folder: Path) -> dict[str, Any]:
    config.output = str(folder)
    return record.read(run(config, console=Console(file=io.StringIO())))


# --- 32: held-out private data evaluated without noise as a "public test split" ----------------------


def test_32_held_out_private_data_is_not_a_public_test_split(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(self: RunResources, adapter: Any) -> Any:
        raise AssertionError("private data was evaluated without noise")

    monkeypatch.setattr(RunResources, "evaluate", looked)
    config = undeclared(parts)
    made = finish(config, tmp_path / "run")
    assert made["config"]["federation"]["evaluation"] == "private"
    assert made["metrics"]["evaluation"]["data"] == "private"
    assert "public test split" not in statement_markdown(made)
    # No learning curve but of noised answers, no loss, and no count of what was tested on.
    assert [one["accuracy"] for one in made["metrics"]["by_round"]][:-1] == [None]
    assert {one["loss"] for one in made["metrics"]["by_round"]} == {None}
    assert (made["metrics"]["loss"], made["metrics"]["num_records"], made["data"]["test_records"]) == (
        None, None, 0,
    )  # fmt: skip
    # Nothing is cut off to be tested on: every record is trained on, or held out by its node.
    data = run_resources(config).prepared
    assert data.test.num_records == 0
    assert sum(part.data.num_records for part in (*data.shards, *data.held_out)) == 120
    assert all(one["answers"] == 1 for one in made["privacy"]["per_node"])


def test_32_public_is_refused_where_nobody_declared_it_and_the_way_out_works(
    parts: tuple[Path, Path], golden: Golden
) -> None:
    words = ["data=files", f"data.path={parts[1]}", "data.labels=[negative,positive]"]
    with pytest.raises(ConfigError) as refusal:
        load([*words, "federation.evaluation=public"])
    way_out = re.findall(r"data\.test_\w+=\w+", str(refusal.value))
    assert way_out == ["data.test_split=test", "data.test_public=true"]
    assert load([*words, "federation.evaluation=public", *way_out]).federation.evaluation == "public"
    assert load([*words, *way_out]).federation.evaluation == "public"
    assert load(words).federation.evaluation == "private"
    assert load([*words, "data.test_split=test"]).federation.evaluation == "private"  # named, not declared
    with pytest.raises(ConfigError) as raised:
        load([*words, "data.test_public=true"])
    assert "data.test_split" in str(raised.value)
    golden(raised)


@pytest.mark.parametrize(
    ("words", "evaluation"),
    [
        (["privacy=none"], "held_out"),
        (["privacy=central"], "none"),
        (["privacy=distributed"], "private"),
        (["privacy.noise_multiplier=1"], "none"),
        (["privacy.noise_multiplier=1", "federation.evaluation_epsilon=1"], "private"),
        (["data.public=true"], "public"),
    ],
)
def test_32_what_auto_becomes_on_private_data(words: list[str], evaluation: str) -> None:
    assert load(["data=files", "data.path=x", *words]).federation.evaluation == evaluation


def test_32_a_run_without_privacy_calls_held_out_data_what_it_is(
    parts: tuple[Path, Path], tmp_path: Path, golden: Golden
) -> None:
    config = undeclared(parts)
    config.privacy = PrivacyConfig(trust="none", epsilon=None)
    made = finish(config, tmp_path / "run")
    assert made["metrics"]["evaluation"]["data"] == "held_out"
    assert made["metrics"]["accuracy"] is not None
    assert "public" not in made["privacy"]["evaluation_data"].replace("declared public", "")
    with pytest.raises(ConfigError) as raised:
        load(["data=files", "data.path=x", "federation.evaluation=held_out"])
    assert "held_out" in str(raised.value)
    golden(raised)


# --- 19: settings derived from private data: sizes, and what follows from them ------------------------


def test_19_sizes_that_nobody_declared_are_noised_and_charged_before_they_are_counted(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    told = SizePlan.told

    def watched(self: SizePlan, units: int, entropy: Any) -> int:
        rows = node_ledger().releases(purpose="size")
        assert len(rows) == len(counted) + 1  # this node's row is on the disk before its data is counted
        counted.append(units)
        return told(self, units, entropy)

    monkeypatch.setattr(SizePlan, "told", watched)
    config = undeclared(parts)
    made = finish(config, tmp_path / "run")
    assert counted == [30, 30, 30, 30]  # of whole shards: what is held out is not told apart
    sizes = made["data"]["declared_sizes"]
    assert len(set(sizes.values())) > 1  # 30 each in truth; of four noised counts two differ, but for luck
    assert made["privacy"]["sizes"]["noise_multiplier"] == SIZE_NOISE
    # The books and the record say the same, and the sizes are in it.
    assert made["privacy"]["epsilon"] <= 8.0
    assert {round(one["epsilon"], 9) for one in made["privacy"]["ledger"]} == {
        round(made["privacy"]["epsilon"], 9)
    }
    assert {one["releases"] for one in made["privacy"]["ledger"]} == {2 + 1 + 1}
    assert any(line.startswith("Sizes: nobody declared") for line in statement_json(made)["covered"])
    # Noise and delta were fixed before, whatever the sizes are.
    again = finish(undeclared(parts), tmp_path / "again")
    for name in ("noise_multiplier", "delta"):
        assert again["privacy"][name] == made["privacy"][name]


def test_19_a_resumed_run_goes_on_with_the_size_that_it_has(parts: tuple[Path, Path], tmp_path: Path) -> None:
    config = undeclared(parts)
    config.output = str(tmp_path / "run")
    first = finish(config, tmp_path / "run")
    kept = {path.name: path.read_text() for path in (tmp_path / "run" / "sizes").iterdir()}
    config.resume = str(tmp_path / "run")
    second = finish(config, tmp_path / "run")
    assert {path.name: path.read_text() for path in (tmp_path / "run" / "sizes").iterdir()} == kept
    assert second["data"]["declared_sizes"] == first["data"]["declared_sizes"]
    assert len(node_ledger().releases(purpose="size")) == 4  # one a node, once


def test_19_a_run_that_begins_anew_in_a_folder_tells_its_sizes_anew(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the number of the run that ended before its first checkpoint. With another partition its sizes
    were then those of "other nodes of one run", which are other people's data, and charged to nobody; with
    another unit, the count of records was taken for that of persons."""

    def stopped(*_: object, **__: object) -> Any:
        raise FederationError("stopped after discovery")

    with monkeypatch.context() as patched:
        patched.setattr(server, "agree", stopped)
        with pytest.raises(FederationError, match="stopped after discovery"):
            finish(undeclared(parts), tmp_path / "run")
    config = undeclared(parts)
    config.partition = PartitionConfig(name="iid")
    config.federation.nodes = 3
    made = finish(config, tmp_path / "run")
    rows = node_ledger().releases(purpose="size")
    assert len(rows) == 4 + 3 and {one.run == made["run"]["id"] for one in rows[:4]} == {False}
    assert {one.run for one in rows[4:]} == {made["run"]["id"]}
    assert {path.stem for path in (tmp_path / "run" / "sizes").iterdir()} == {one.node for one in rows[4:]}
    # All that any record was charged: both sizes, and the run.
    total = max(one["epsilon"] for one in made["privacy"]["ledger"])
    assert total > made["privacy"]["epsilon"]


def test_19_a_budget_that_does_not_hold_the_run_is_not_spent_on_a_size(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    node_ledger().set_budget(PrivacyBudget(4.0, 1e-5))
    with pytest.raises((FederationError, BudgetExhausted), match="budget"):
        finish(undeclared(parts), tmp_path / "run")
    assert node_ledger().releases() == []


def test_19_nothing_is_charged_for_a_run_that_cannot_be_planned(
    parts: tuple[Path, Path], tmp_path: Path, golden: Golden
) -> None:
    config = undeclared(parts)
    config.privacy.epsilon = 0.05
    with pytest.raises(CalibrationError) as raised:
        finish(config, tmp_path / "run")
    assert "privacy.epsilon=0.05" in str(raised.value)
    assert "data.declared_size=N" in str(raised.value)
    golden(raised)
    assert node_ledger().releases() == []


@pytest.mark.parametrize(("trust", "sizes"), [("none", {26}), ("central", {1})])
def test_19_where_no_size_is_noised(
    parts: tuple[Path, Path], tmp_path: Path, trust: str, sizes: set[int]
) -> None:
    """Without privacy nothing is; a trusted server protects whole clients, and their sizes stay with them."""
    config = undeclared(parts)
    config.privacy = PrivacyConfig(trust=trust, epsilon=None if trust == "none" else 8.0)
    made = finish(config, tmp_path / "run")
    assert set(made["data"]["declared_sizes"].values()) == sizes
    assert made["privacy"]["sizes"] is None
    assert not (tmp_path / "run" / "sizes").exists()


def test_19_a_declared_size_is_the_owners_and_shared_out(parts: tuple[Path, Path], tmp_path: Path) -> None:
    made = finish(undeclared(parts, data__declared_size=None), tmp_path / "told")
    config = undeclared(parts)
    config.data.declared_size = 1000
    declared = finish(config, tmp_path / "declared")
    assert set(declared["data"]["declared_sizes"].values()) == {200}  # of 250 each, a fifth is held out
    assert declared["privacy"]["sizes"] is None
    assert made["privacy"]["sizes"] is not None
    assert "the declared sizes" in statement_markdown(declared)
    assert "the declared sizes" not in statement_markdown(made)


def test_19_a_flower_simulation_without_a_folder_asks_for_a_declared_size(parts: tuple[Path, Path]) -> None:
    from flwr.app import Context, RecordDict

    from fedtune.federation.client.release import declare_size

    config = undeclared(parts)
    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {"fedtune": to_json(config)})
    with pytest.raises(FederationError, match=r"data\.declared_size=N"):
        declare_size(config, context)
    assert node_ledger().releases() == []


# --- 20: a guarantee per record where a person has many ----------------------------------------------


def test_20_persons_are_protected_by_default_where_the_data_names_them(golden: Golden) -> None:
    assert load().privacy.unit == "person"
    assert load(["data=files", "data.path=x", "data.unit=who"]).privacy.unit == "person"
    assert load(["data=files", "data.path=x"]).privacy.unit == "record"
    assert load(["privacy=central"]).privacy.unit == "client"
    assert load(["privacy.unit=record"]).privacy.unit == "record"
    with pytest.raises(ConfigError) as raised:
        load(["data=files", "data.path=x", "privacy.unit=person"])
    assert "data.unit" in str(raised.value)
    golden(raised)


def with_persons(folder: Path) -> Path:
    tiny_federation.make_data(folder)
    for split in ("train", "test"):
        rows = list(csv.DictReader((folder / f"{split}.csv").open(newline="")))
        with (folder / f"{split}.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, [*rows[0], "who"])
            writer.writeheader()
            for i, row in enumerate(rows):
                writer.writerow({**row, "who": f"{split} {row['site']} {i // 8}"})
    return folder


def test_20_the_statement_says_when_records_were_chosen_although_persons_are_named(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    config = undeclared((parts[0], with_persons(tmp_path / "data")))
    config.data.unit = "who"
    chosen = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, unit="record"))
    default, record_level = finish(config, tmp_path / "default"), finish(chosen, tmp_path / "record")
    assert default["privacy"]["unit"] == default["config"]["privacy"]["unit"] == "person"
    words = "single records were chosen as the unit all the same"
    assert words in statement_markdown(record_level)
    assert words not in statement_markdown(default)
    # Sizes are in persons then: 15 of two records each at each site, told with noise.
    assert all(entry["unit"] == "person" for entry in [default["privacy"]])


def test_20_pages_whose_shipped_records_are_per_record_say_so_in_words() -> None:
    for name in ("privacy_frontier", "quantization_frontier", "adapters", "trust"):
        assert load([f"experiment={name}"]).privacy.unit == "record", name
    assert load(["privacy=person"]).privacy.unit == "person"
    assert DataConfig().public is False
