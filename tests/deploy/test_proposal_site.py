"""As a site sees it: a whole run is proposed, checked and logged; to refuse is free."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedtune.federation.client import release
from fedtune.federation.client.going_on import SILENT_SECONDS, GoingOn
from fedtune.federation.messages import Consent, Proposal
from fedtune.federation.resources import run_resources
from fedtune.federation.server.agreement import read_consent
from fedtune.privacy.accounting.filter import order_of, renyi_budget, renyi_of_terms
from fedtune.privacy.ledger.ledger import PrivacyBudget, PrivacyLedger
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.site_parts import SIZE, Site
from tests.support.tiny_federation import make_model, one_thread


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one_thread()
    return make_model(tmp_path_factory.mktemp("model"))


def propose(site: Site, plan: PrivacyPlan, run: str = "r") -> Consent:
    proposal = Proposal(run, 1, plan, run_resources(site.settings.own(site.config)).digest())
    return read_consent(site.send(proposal.to_records(), "query.propose"), "clinic-1", proposal)


def test_a_site_tells_the_delta_of_its_budget_and_the_plan_takes_it(tmp_path: Path, model: Path) -> None:
    """As shipped: no privacy.delta, and a budget of epsilon 8 at delta 1e-5."""
    from flwr.app import RecordDict

    from fedtune.federation.messages import NodeHello, RoundRequest

    site = Site(tmp_path, model, budget_epsilon=8, budget_delta=1e-5)
    site.config.privacy.epsilon, site.config.privacy.delta = 8.0, None
    told = NodeHello.from_records(site.send(RecordDict(), "query.hello").content)
    assert told.delta == 1e-5
    # What `submit` did: the budget reached for the first round, and was gone.
    assert propose(site, make_plan(site.config, [SIZE])).refusal is not None
    plan = make_plan(site.config, [told.declared_size], told.delta)
    assert plan.delta == 1e-5 and propose(site, plan).refused is None
    assert site.charged() == 0
    for round in range(1, plan.num_rounds + 1):
        assert "update" in site.send(RoundRequest("r", round, 1, plan, site.start()).to_records()).content
    assert site.charged() == plan.num_rounds
    ledger = PrivacyLedger.open(Path(site.settings.ledger))
    spent = [ledger.epsilon(dataset=one.dataset, fingerprint=one.fingerprint) for one in ledger.releases()]
    assert all(7.0 < epsilon <= 8.0 for epsilon in spent)


def test_an_explicit_delta_above_the_budgets_is_refused(tmp_path: Path, model: Path) -> None:
    site = Site(tmp_path, model, budget_epsilon=50, budget_delta=1e-5)
    site.config.privacy.delta = 1e-4
    answer = propose(site, make_plan(site.config, [SIZE], 1e-5))
    assert answer.refusal == "PrivacyError" and "1e-05" in str(answer.refused) and site.charged() == 0
    assert "leave it out" in str(answer.refused)
    site.config.privacy.delta = 1e-5
    assert propose(site, make_plan(site.config, [SIZE])).refused is None


def test_a_run_over_the_budget_is_refused_whole_without_its_numbers_and_logged(
    tmp_path: Path, model: Path
) -> None:
    site = Site(tmp_path, model, budget_epsilon=3.0, budget_delta=1e-3)
    site.config.privacy.epsilon, site.config.privacy.delta = 8.0, 1e-3
    plan = site.plan()
    assert dataclasses.replace(plan, num_rounds=1).epsilon() < 8.0
    answer = propose(site, plan)
    assert answer.refusal == "BudgetExhausted" and site.charged() == 0
    assert "3" not in str(answer.refused).replace("clinic-1", ""), "what is left there is the site's own"
    entry = site.log()[-1]
    assert (entry["event"], entry["message"]) == ("refused", "query.propose")
    assert entry["asked"]["num_rounds"] == plan.num_rounds and "before" not in entry


def test_a_plan_for_more_nodes_than_memory_holds_is_refused(tmp_path: Path, model: Path) -> None:
    """A plan is made from a size for each node: a server that names 10^12 of them asks for terabytes."""
    site = Site(tmp_path, model)
    answer = propose(site, site.plan(nodes=10**12))
    assert answer.refusal == "PrivacyError" and "for 1,000,000,000,000 nodes" in str(answer.refused)


def test_what_the_owners_file_does_not_permit_is_refused_before_round_1(tmp_path: Path, model: Path) -> None:
    site = Site(tmp_path, model, permit={"max_rounds": 2})
    answer = propose(site, site.plan())
    assert answer.refusal == "PrivacyError" and "3 rounds are more than the permitted 2" in str(
        answer.refused
    )


def test_answers_about_held_out_data_are_part_of_the_run(tmp_path: Path, model: Path) -> None:
    """A budget for the training alone is not enough, unless the site answers no such questions."""

    def answer(root: Path, most: int) -> Consent:
        site = Site(root, model, budget_epsilon=50.0, budget_delta=1e-3, permit={"max_evaluations": most})
        site.config.federation.evaluation = "private"
        site.config.privacy.epsilon, site.config.privacy.delta = 8.0, 1e-3
        plan = make_plan(site.config, [SIZE])
        budget = (plan.epsilon() + plan.epsilon(plan.num_rounds, 0)) / 2  # more than training alone
        poor = dataclasses.replace(site.settings, budget_epsilon=budget)
        PrivacyLedger.open(Path(site.settings.ledger)).set_budget(poor.budget)
        return propose(site, plan)

    assert answer(tmp_path / "asks", 10).refusal == "BudgetExhausted"
    assert answer(tmp_path / "none", 0).refused is None


def test_a_site_that_answers_nothing_is_asked_round_by_round_for_what_it_agreed_to(
    tmp_path: Path, model: Path
) -> None:
    """It agrees to the training alone, and each round is held to the same: not to answers it never gives."""
    from fedtune.federation.messages import RoundRequest

    site = Site(tmp_path, model, budget_epsilon=50.0, budget_delta=1e-3, permit={"max_evaluations": 0})
    site.config.federation.evaluation = "private"
    site.config.privacy.epsilon, site.config.privacy.delta = 8.0, 1e-3
    plan = make_plan(site.config, [SIZE])
    poor = dataclasses.replace(site.settings, budget_epsilon=plan.epsilon(plan.num_rounds, 0) * 1.0001)
    PrivacyLedger.open(Path(site.settings.ledger)).set_budget(poor.budget)
    assert propose(site, plan).refused is None
    for round in range(1, plan.num_rounds + 1):
        content = site.send(RoundRequest("r", round, 1, plan, site.start()).to_records()).content
        assert "update" in content, (round, content["reply"])


def least_budget(plan: PrivacyPlan, releases: int, delta: float) -> float:
    """Epsilon of the smallest budget whose filter lets so many releases of several runs through."""
    low, high = 0.1, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        order = order_of(middle, delta)
        fits = renyi_of_terms(plan.terms(releases) or {}, order) <= renyi_budget(middle, delta, order)
        low, high = (low, middle) if fits else (middle, high)
    return high


@pytest.mark.slow
def test_40_two_runs_that_fit_one_by_one_do_not_starve_one_another(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedtune.node")
    now = [0.0]
    monkeypatch.setattr(release, "going_on", GoingOn(lambda: now[0]))
    site = Site(tmp_path, model, budget_epsilon=50, budget_delta=1e-3)
    site.config.privacy.epsilon, site.config.privacy.delta = 4.0, 1e-3
    plan = site.plan()
    budget = PrivacyBudget(least_budget(plan, 5, 1e-3), 1e-3, "record")  # of six that both would make
    PrivacyLedger.open(Path(site.settings.ledger)).set_budget(budget)
    assert plan.num_rounds == 3
    for run in ("a", "b"):  # neither has begun, and nobody knows which will
        assert propose(site, plan, run).refused is None
    assert site.ask(1, run="a")["update"]
    late = site.ask(1, run="b")
    assert late["refusal"] == "BudgetExhausted" and not late["update"] and site.charged() == 1
    assert "other run" not in late["refused"], "what else goes on is the site's own"
    caplog.clear()
    assert propose(site, plan, "c").refusal == "BudgetExhausted"
    assert "1 other run(s) that go on" in caplog.text, "which its owner reads"
    now[0] = SILENT_SECONDS - 1
    assert site.ask(2, run="a")["update"]  # it has gone on, and counts for as long again
    now[0] = 2 * SILENT_SECONDS - 2
    assert propose(site, plan, "b").refusal == "BudgetExhausted"
    now[0] = 2 * SILENT_SECONDS
    assert propose(site, plan, "b").refused is None and propose(site, plan, "a").refused is None
    for round in range(1, 4):
        assert site.ask(round, run="b")["update"]
