"""A run whose accuracy comes from the nodes: the record, the statement and the summary say so."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tests.support.tiny_federation as tiny
from fedtune.federation.events import RoundSummary
from fedtune.privacy.accounting.epsilon import Term, conversions
from fedtune.privacy.statement.facts import statement_json, statement_markdown
from fedtune.report.collect import run_of
from fedtune.runs import display, summary
from fedtune.runs.audit import plan_of
from fedtune.runs.record import read
from fedtune.runs.run import run


@pytest.fixture(scope="module")
def made(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.private(tiny.make_config(world["model"], world["data"], federation__num_rounds=2))
    config.output = str(tmp_path_factory.mktemp("noised") / "run")
    config.federation.evaluation, config.federation.evaluation_share = "private", 0.3
    return run(config, console=Console(file=io.StringIO(), width=80))


@pytest.fixture
def noised(made: Path) -> dict[str, Any]:
    return copy.deepcopy(read(made))


def test_the_record_marks_the_metrics_and_counts_the_answers(noised: dict[str, Any]) -> None:
    privacy, metrics = noised["privacy"], noised["metrics"]
    about = metrics["evaluation"]
    assert about["data"] == "private"
    assert about["noise_multiplier"] == privacy["evaluation"]["noise_multiplier"] > 0
    assert about["epsilon"] <= 2.0  # a quarter of 8
    assert about["delta"] == privacy["delta"]
    assert privacy["evaluation_data"].startswith("data that the nodes hold out")
    for node in privacy["per_node"]:
        assert (node["releases"], node["answers"]) == (2, 1)
        assert node["epsilon"] <= 8.0
    assert privacy["epsilon"] <= 8.0
    # No count of a real shard: what is there is noised, or not there.
    assert metrics["num_records"] is None
    assert metrics["loss"] is None
    assert metrics["majority_rate"] is None
    assert noised["data"]["test_records"] == 0
    for site in metrics["per_site"].values():
        assert site["num_records"] is None
        assert site["units"] != round(site["units"])
        assert (site["accuracy"] is None) == (site["standard_error"] is None)


def test_what_a_reader_composes_from_the_record_is_what_was_charged(
    noised: dict[str, Any], made: Path
) -> None:
    found = run_of(noised, made, {})
    (node, *_) = noised["privacy"]["per_node"]
    terms = found.terms[node["node"]]
    assert terms is not None
    answer = Term(1.0, noised["privacy"]["evaluation"]["noise_multiplier"])
    assert terms[answer] == 1
    assert found.task.endswith("measured by the nodes")
    facts = statement_json(noised)
    assert facts["accounting"]["zcdp_rho"] == pytest.approx(conversions(terms).rho)
    # The audit is of the training, whose own epsilon is below the claim.
    _, plan, releases = plan_of(noised)
    assert plan.evaluation() is None
    assert plan.epsilon(releases) < noised["privacy"]["epsilon"]


def test_the_statement_names_the_evaluation(noised: dict[str, Any]) -> None:
    text = statement_markdown(noised)
    assert "accuracy comes from noised counts that the nodes release" in text
    assert "holds out a share of 0.3 of its units and once releases two counts" in text
    assert "are not noised" not in text
    noised["privacy"]["evaluation"] = None
    assert "are not noised" in statement_markdown(noised)


def shown(record: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    summary.summary(record, Path("outputs/x"), console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_the_summary_shows_no_noised_number_bare(noised: dict[str, Any]) -> None:
    noised["metrics"] |= {
        "accuracy": 0.781,
        "per_site": {"north": {"accuracy": None, "standard_error": None, "units": 3.4, "num_records": None}},
    }
    noised["metrics"]["evaluation"] |= {
        "standard_error": 0.021, "units": 211.6, "missing": [{"node": "south", "reason": "permits none"}],
    }  # fmt: skip
    text = shown(noised)
    assert "all 212 78.1 ± 2.1 %" in text
    assert "north 3 -" in text
    assert "From noised counts of the nodes" in text
    assert "No answer: south" in text
    noised["metrics"]["evaluation"] = {"data": "none"}
    assert "The model was not evaluated" in shown(noised)


def test_progress_shows_no_noised_number_bare() -> None:
    one = RoundSummary(3, 3, 2.0, accuracy=0.7812, accuracy_error=0.0213, epsilon=2.0)
    assert "0.78±0.02" in display._round_line(one).plain
    assert len(display._round_line(one).plain) <= 80
    bare = RoundSummary(3, 3, 2.0, accuracy=0.7812)
    assert "0.781" in display._round_line(bare).plain
