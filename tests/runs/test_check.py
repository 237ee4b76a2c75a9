"""What `fedtune data check` says is what a run would do, and nothing is spent for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.app import main
from fedtune.config.convert import from_dict, to_dict
from fedtune.config.schema import Config
from fedtune.data import reading
from fedtune.errors import BudgetExhausted, ConfigError
from fedtune.federation.resources import run_resources
from fedtune.privacy.ledger.budget_report import set_budgets
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.runs.check import check, in_text, plan_of
from tests.support import tiny_federation as tiny


@pytest.fixture
def config(world: dict[str, Path]) -> Config:
    return from_dict(to_dict(tiny.private(tiny.make_config(world["model"], world["data"]))))


def test_what_was_understood_and_what_would_be_spent(config: Config, fedtune_home: Path) -> None:
    found = check(config)
    train = found["data"]["train"]
    assert train["records"] == 120 and train["labels"] == {"negative": 60, "positive": 60}
    assert train["sites"] == dict.fromkeys(("site-0", "site-1", "site-2", "site-3"), 30)
    assert train["persons"] is None and found["data"]["test"]["records"] == 40
    assert found["privacy"]["epsilon"] == pytest.approx(config.privacy.epsilon, rel=0.05)
    assert len(found["data"]["sample"]) == 3 and found["run"]["nodes"] == 4
    text = in_text(found)
    assert "site-0 30, site-1 30" in text and "epsilon" in text and "Nothing was trained" in text
    assert not list((fedtune_home / "state").iterdir())  # no ledger, so no charge


def test_a_budget_that_does_not_allow_the_run_refuses_it_before_it_is_typed(
    config: Config, fedtune_home: Path
) -> None:
    folder = fedtune_home / "state" / "ledgers"
    folder.mkdir(parents=True)
    set_budgets(folder, epsilon=1e-3, delta=1e-5)
    with pytest.raises(BudgetExhausted, match="over its budget"):
        check(config)
    set_budgets(folder, epsilon=100.0, delta=1e-5)
    assert check(config)["privacy"]["epsilon"] == pytest.approx(config.privacy.epsilon, rel=0.05)


def test_a_node_whose_budget_does_not_allow_the_run_is_named(
    config: Config, fedtune_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fedtune_home / "state" / "ledgers"
    folder.mkdir(parents=True)
    set_budgets(folder, epsilon=100.0, delta=1e-5)

    def check_run(ledger: PrivacyLedger, *, node: str, plans: list[Any], **_: object) -> None:
        assert plans[0].num_rounds == config.federation.num_rounds
        if node in refusing:
            raise BudgetExhausted(f"node {node!r} refuses")

    names = [shard.node for shard in run_resources(config).prepared.shards]
    refusing = set(names[:1])
    monkeypatch.setattr(PrivacyLedger, "check_run", check_run)
    assert f"node {names[0]!r} refuses" in check(config)["cautions"]
    config.federation.min_updates = 4
    with pytest.raises(BudgetExhausted, match=names[0]):
        check(config)


def test_the_plan_is_the_runs_own(config: Config) -> None:
    plan = plan_of(config, run_resources(config).prepared)
    assert plan is not None and check(config)["privacy"]["noise_multiplier"] == plan.noise_multiplier
    config.federation.min_updates = 5
    with pytest.raises(ConfigError, match="can never be met: there are 4 nodes"):
        check(config)


@pytest.mark.parametrize("public", [True, False])
def test_a_length_follows_from_public_texts_alone(
    config: Config, public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder takes 32 tokens, which both are then; of public texts it is said that they all fit."""
    config.data.max_length, config.data.public = None, public
    if not public:
        monkeypatch.setattr(reading, "chosen_length", lambda *_: pytest.fail("private texts were asked"))
    found = check(config)
    assert found["model"]["max_length"] == 32
    said = "data.max_length=32 was chosen from the texts, which are public: it holds 100%"
    assert any(said in note for note in found["cautions"]) == public
    config.data.max_length = 8
    found = check(config)
    assert found["model"]["max_length"] == 8 and not any("was chosen" in note for note in found["cautions"])


@pytest.mark.slow
def test_both_commands_say_it(world: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=files", f"data.path={world['data']}", f"model.name={world['model']}", "data.max_length=16"]
    for command in (["data", "check", *words, "--json"], ["run", "--dry-run", *words]):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert "Nobody declared the label set" in shown
    assert "120 records" in shown
    with pytest.raises(SystemExit):
        main(["data", "check", *words, "--json"])
    assert json.loads(capsys.readouterr().out)["data"]["train"]["records"] == 120
