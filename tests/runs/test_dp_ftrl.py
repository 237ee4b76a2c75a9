"""A run with correlated noise from end to end: real nodes, their ledgers, the record and the statement."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.config.schema import PrivacyConfig
from fedtune.federation.client.node_context import node_ledger
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.statement.facts import statement_json, statement_markdown
from fedtune.report.collect import run_of
from fedtune.runs import record as records
from fedtune.runs.audit import plan_of
from fedtune.runs.run import run
from tests.support import tiny_federation as tiny


@pytest.mark.slow
def test_a_whole_run_says_and_charges_what_it_did(world: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = tiny.make_config(
        world["model"], world["data"], output=str(folder), federation__num_rounds=6,
        federation__cohort_size=2,
        privacy=PrivacyConfig(
            trust="central", unit="client", epsilon=6.0, mechanism="dp_ftrl", min_separation=2, delta=0.01
        ),
    )  # fmt: skip
    run(config, console=Console(file=io.StringIO(), width=80))
    made = records.read(folder)
    privacy, root = made["privacy"], BandedRoot(6, 2, 2)
    assert privacy["matrix"] == {"num_rounds": 6, "bands": 2, "min_separation": 2}
    assert [one["releases"] for one in privacy["per_node"]] == [3, 3, 3, 3]
    assert 0.98 * 6.0 <= privacy["epsilon"] <= 6.0
    assert privacy["epsilon"] <= privacy["epsilon_rdp"]
    assert privacy["mechanism"].startswith("DP-FTRL")
    assert "over 2 rounds" in privacy["mechanism"] and "3 times in all" in privacy["mechanism"]
    whole = epsilon_of_terms({Term(1.0, privacy["noise_multiplier"]): 1}, 0.01)
    for node, held in zip(privacy["per_node"], privacy["ledger"], strict=True):
        assert node["epsilon"] == pytest.approx(whole, rel=2e-3)
        assert held["epsilon"] == pytest.approx(whole, rel=2e-3)
        releases = node_ledger().releases(run=made["run"]["id"], node=node["node"])
        rounds = [release.round for release in releases]
        assert all(later - sooner >= 2 for sooner, later in itertools.pairwise(rounds))

    facts = statement_json(made)
    assert facts["accounting"]["zcdp_rho"] == pytest.approx(0.5 / privacy["noise_multiplier"] ** 2, rel=1e-6)
    assert facts["accounting"]["zcdp_is"] == "exact"
    text = statement_markdown(made)
    assert "DP-FTRL" in text and "accounted as one Gaussian mechanism" in text
    assert f"{root.sensitivity():.4g} clipping norms, for 3 of 6 rounds" in text
    assert "each at most once in 2 rounds" in text
    assert "replace all that one client holds by nothing" in text

    assert not (folder / "checkpoint" / "noise.secret").exists()
    _, plan, releases = plan_of(made)
    assert plan.root() == root and releases == 3
    assert plan.epsilon(releases) == pytest.approx(privacy["epsilon"], rel=1e-3)
    terms = run_of(made, folder / "record.json", {}).terms
    assert len(terms) == 4
    for one in terms.values():
        assert epsilon_of_terms(one, 0.01) == pytest.approx(whole, rel=2e-3)
