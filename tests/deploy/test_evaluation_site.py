"""Private evaluation at a real site: answered by its worker, written down, refused as its file says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord

from fedtune.deploy.site import dry_run
from fedtune.errors import ConfigError, DataError
from fedtune.federation.messages import RoundRequest
from fedtune.federation.resources import run_resources
from tests.support import tiny_federation
from tests.support.golden import Golden
from tests.support.site_parts import SIZE, Site, settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_federation.one_thread()
    return tiny_federation.make_model(tmp_path_factory.mktemp("site") / "model")


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> Callable[..., Site]:
    def make(**changes: Any) -> Site:
        site = Site(tmp_path, model, **changes)
        site.config.federation.evaluation, site.config.federation.evaluation_share = "private", 0.25
        return site

    return make


def question(site: Site, round: int = 1) -> dict[str, Any]:
    shard = run_resources(site.settings.own(site.config)).prepared.shards[0]
    from fedtune.privacy.plan import make_plan

    plan = make_plan(site.config, [shard.declared_size])
    request = RoundRequest("r", round, 1, plan, site.start())
    answer = site.send(request.to_records(), "query.evaluate")
    record = answer.content["evaluation"]
    assert isinstance(record, ConfigRecord)
    return dict(record)


def test_a_site_answers_and_writes_down_what_left_it(asked: Callable[..., Site]) -> None:
    site = asked()
    prepared = run_resources(site.settings.own(site.config)).prepared
    assert prepared.shards[0].declared_size == 0.75 * SIZE  # of the declared size, never a count
    said = question(site)
    assert (said["refused"], said["error"]) == ("", "")
    assert site.charged() == 1
    entry = site.log()[-1]
    assert (entry["event"], entry["message"]) == ("released", "query.evaluate")
    assert entry["left"] == {"right": said["right"], "wrong": said["wrong"]}
    assert entry["asked"]["evaluation_answers"] == 1
    assert entry["after"]["epsilon"] > entry["before"]["epsilon"] == 0.0
    text = dry_run(site.settings, site.config).text()
    assert "a share of 0.25 is not trained on; 1 times two counts leave" in text


def test_a_site_may_refuse_to_answer_and_still_train(asked: Callable[..., Site]) -> None:
    site = asked(permit={"max_evaluations": 0})
    said = question(site)
    assert "asks for 1 answers about held-out data, and the site permits none" in said["refused"]
    assert said["refusal"] == "PrivacyError"
    assert site.charged() == 0
    assert site.log()[-1]["event"] == "refused"
    assert "permits none" in dry_run(site.settings, site.config).text()
    from fedtune.privacy.plan import make_plan

    assert site.ask(plan=None) is not None
    shard = run_resources(site.settings.own(site.config)).prepared.shards[0]
    request = RoundRequest("r", 2, 1, make_plan(site.config, [shard.declared_size]), site.start())
    assert "update" in site.send(request.to_records()).content


def test_a_site_s_least_noise_holds_for_answers_too(asked: Callable[..., Site]) -> None:
    site = asked(permit={"min_noise_multiplier": 0.01})
    site.config.privacy.epsilon, site.config.privacy.noise_multiplier = None, 1.0
    site.config.federation.evaluation_epsilon = 40.0
    assert question(site)["refused"] == ""
    site = asked(permit={"min_noise_multiplier": 0.9})
    site.config.privacy.epsilon, site.config.privacy.noise_multiplier = None, 1.0
    site.config.federation.evaluation_epsilon = 40.0
    assert "below the least permitted" in question(site, round=2)["refused"]


def test_the_budget_refuses_an_answer_that_would_exceed_it(asked: Callable[..., Site]) -> None:
    site = asked(budget_epsilon=0.5)
    said = question(site)
    assert said["refusal"] == "BudgetExhausted"
    assert "its owner's budget does not allow it" in said["refused"] and "epsilon" not in said["refused"]
    assert site.charged() == 0


def test_a_server_needs_no_test_data_where_nodes_evaluate(asked: Callable[..., Site], golden: Golden) -> None:
    site = asked()
    site.config.data.path = None
    server = run_resources(site.config).prepared
    assert server.test.num_records == 0
    assert server.label_names == ("negative", "positive")
    site.config.data.labels = None
    with pytest.raises(DataError) as raised:
        _ = run_resources(site.config).prepared
    golden(raised)


def test_less_than_no_answer_cannot_be_permitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_evaluations=-1"):
        settings(tmp_path, permit={"max_evaluations": -1})


@pytest.mark.parametrize("full", [False, True])
def test_a_site_keeps_its_own_part_and_its_model_beside_its_ledger(
    asked: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Where the disk is full there is no model, and the answer, which is charged, is given all the same."""
    site = asked()
    site.config.train.personalize, site.config.train.local_steps = "head", 1
    from fedtune.privacy.plan import make_plan

    if full:

        def save(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fedtune.federation.resources.RunResources.save", save)
    shard = run_resources(site.settings.own(site.config)).prepared.shards[0]
    plan = make_plan(site.config, [shard.declared_size])
    released = site.send(RoundRequest("r", 1, 1, plan, site.start()).to_records())
    assert "update" in released.content
    folder = Path(site.settings.ledger).parent / "personal"
    assert {path.name for path in folder.iterdir()} == ({"r.npz"} if full else {"r", "r.npz"})
    after_round = None if full else (folder / "r" / "adapter_model.safetensors").read_bytes()
    assert (folder / "r.npz").stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    answer = question(site)
    assert (answer["refused"], answer["error"]) == ("", "")
    assert (folder / "r" / "adapter_config.json").exists() is not full
    if not full:
        assert (folder / "r" / "adapter_model.safetensors").read_bytes() == after_round  # both at the start
    assert site.charged() == 2  # a round and an answer, as without
    assert "personal" not in str(site.log())
