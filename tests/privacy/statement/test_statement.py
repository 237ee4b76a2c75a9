"""The statement: complete, true to the record, and plain about what is not promised."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import pytest

from fedtune.errors import RecordError
from fedtune.privacy.accounting.filter import FILTER
from fedtune.privacy.statement.facts import statement_json, statement_markdown, statement_picture
from fedtune.runs import summary
from tests.support.golden import Golden
from tests.support.synthetic import make_record


def record(trust: str = "local", unit: str = "record", **privacy: Any) -> dict[str, Any]:
    private = trust != "none"
    return {
        "schema": 1,
        "run": {
            "id": "r-1", "started": "2026-11-21T19:00:00+00:00", "seconds": 3.0, "engine": "local", "seed": 0,
            "versions": {"fedtune": "0.1.0", "torch": "2.13.0"}, "commit": "abc1234", "dirty": False,
            "hardware": {},
        },
        "config": {},
        "data": {"name": "visits"},
        "federation": {"nodes": 4, "rounds": 12, "cohort_size": 4, "dropped": []},
        "privacy": {
            "unit": unit,
            "adjacency": f"add or remove one {unit}",
            "trust": trust,
            "mechanism": "DP-SGD on each node" if private else "none",
            "noise_multiplier": 1.0 if private else 0.0,
            "max_grad_norm": 0.7 if private else None,
            "sample_rate": 0.05,
            "steps": 60,
            "accountant": "PLD (fedtune 0.1.0, checked against dp-accounting)" if private else None,
            "epsilon": 2.857 if private else None,
            "delta": 1e-5 if private else None,
            "epsilon_rdp": 3.368 if private else None,
            "per_node": [{"node": "north", "epsilon": 2.857, "delta": 1e-5, "releases": 12}][:private],
            "ledger": [
                {"node": "north", "dataset": "visits", "fingerprint": "f" * 64, "releases": 36,
                 "epsilon": 4.9, "delta": 1e-5},
            ],
            "reproducible_noise": False,
            "audit": None,
            **privacy,
        },
        "metrics": {},
        "cost": {},
        "artifacts": {},
    }  # fmt: skip


def first_paragraph(text: str) -> str:
    return next(part for part in text.split("\n\n")[2:] if not part.startswith("#"))


def test_it_answers_everything_that_is_asked_of_a_dp_result() -> None:
    """Ponomareva et al. 2023, section 5.3, item by item; a number that is missing would be found here."""
    text = statement_markdown(record())
    for asked in (
        "Epsilon 2.857 at delta 1e-05",  # formal statement
        "Unit of privacy: record",
        "add or remove one record",  # adjacency
        "already private when they leave",  # setting: who is trusted
        "Mechanism: DP-SGD on each node",
        "Poisson",  # sampling as run
        "probability 0.05",
        "Noise multiplier (standard deviation over clipping norm): 1;",
        "clipping norm (L2): 0.7",
        "accounted steps: 60",
        "PLD (fedtune 0.1.0, checked against dp-accounting)",  # type of accounting
        "upper bound",
        "epsilon 3.368",  # RDP beside it
        "zero-concentrated DP: rho 30",
        "Gaussian DP: mu",
        "all adapters of all rounds",  # what is released
        "Evaluation",  # data accesses not covered
        "pretrained encoder",
        "Choice of settings",  # hyperparameter tuning
        "Side channels",  # NIST SP 800-226
        "Security and exposure",
        "fedtune 0.1.0, torch 2.13.0",
        "abc1234",
        "| north | visits | 36 | 4.9 |",  # other uses of the same data
        "counted by Renyi DP, and so are budgets enforced: by a Renyi filter",
        "that of one run whose plan was fixed before its first release",
        "Not audited",
    ):
        assert asked in text, asked


def test_the_first_paragraph_is_for_people() -> None:
    text = first_paragraph(statement_markdown(record()))
    for symbol in ("sigma", "PLD", "SGD", "RDP", "Poisson", "zCDP", "multiplier"):
        assert symbol not in text
    assert "any single text" in text and "(`visits`)" in text
    assert "17.5 times as likely" in text  # exp(2.857) is 17.41: rounded up
    assert "1 in 100,000" in text
    assert "94.6 percent" in text  # 1 / (1 + exp(-2.857)) is 0.9457
    assert "moderate protection" in text


@pytest.mark.parametrize(
    ("unit", "words"), [("record", "any single text"), ("person", "any one person contributed")]
)
def test_the_unit_is_named_in_words(unit: str, words: str) -> None:
    text = statement_markdown(record(unit=unit, records_per_unit=8))
    assert words in first_paragraph(text)
    assert ("At most 8 records of a person" in text) == (unit == "person")
    assert ("A person with several records" in text) == (unit == "record")


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        ("local", "neither the server"),
        ("distributed", "secure aggregation"),
        ("central", "must be trusted"),
        ("none", "Nobody is protected"),
    ],
)
def test_who_sees_what(trust: str, words: str) -> None:
    unit = "client" if trust == "central" else "record"
    assert words in " ".join(statement_json(record(trust, unit))["trust"]["sees"])


def test_no_noise_is_called_no_guarantee() -> None:
    text = statement_markdown(record("none"))
    assert "without any privacy guarantee" in first_paragraph(text)
    assert "formally, epsilon is infinite" in text
    facts = statement_json(record("none"))
    assert facts["private"] is False
    assert facts["accounting"]["epsilon"] is facts["accounting"]["delta"] is None
    assert facts["covered"] == ["Nothing: there is no guarantee."]
    assert "protection (" not in text


def test_a_leftover_epsilon_of_a_run_without_noise_is_not_believed() -> None:
    facts = statement_json(record("none", epsilon=1.0, delta=1e-5))
    assert facts["accounting"]["epsilon"] is None and not facts["private"]


def test_a_missing_epsilon_of_a_private_run_is_not_passed_over() -> None:
    facts = statement_json(record(epsilon=None))
    assert not facts["private"]
    assert any("treat the run as not private" in caution for caution in facts["cautions"])
    assert "without any privacy guarantee" in statement_markdown(record(epsilon=None))


def test_reproducible_noise_is_the_first_caution() -> None:
    text = statement_markdown(record(reproducible_noise=True))
    assert text.index("this one protects nobody") < text.index("## The guarantee")
    assert statement_json(record(reproducible_noise=True))["reproducible_noise"] is True
    assert "reproducible" in statement_json(record(reproducible_noise=True))["mechanism"]["randomness"]
    assert "**Caution.**" not in statement_markdown(record())


def test_a_large_epsilon_is_called_weak_and_a_small_one_strong() -> None:
    assert "strong protection" in statement_markdown(record(epsilon=0.9))
    weak = statement_markdown(record(epsilon=14.0))
    assert "**Caution.** A weak protection at best, epsilon 14 at delta 1e-05" in weak
    assert "This is a weak protection at best" in weak and "more than a million" in weak
    # once: the plan has said it already
    said = record(epsilon=14.0, cautions=["A weak protection at best, epsilon 13.9 at delta 1e-05: ..."])
    assert statement_markdown(said).count("**Caution.** A weak protection") == 1
    assert "more than 99.99 percent" in weak
    # 14 is more than the record's steps cost, so that they are not all: their curve would promise too much
    assert "from epsilon and delta alone" in weak and "from this run's own trade-off curve" not in weak


@pytest.mark.parametrize(
    "change", [{"reproducible_noise": True}, {"audit": {"violated": True}}, {"epsilon": None}]
)
def test_nothing_is_praised_where_nothing_is_promised(change: dict[str, Any]) -> None:
    text = statement_markdown(record(**change))
    assert (
        statement_json(record(**change))["strength"] is None and statement_picture(record(**change)) is None
    )
    assert "strong protection" not in text and "moderate protection" not in text


def test_strength_is_a_table_of_what_is_recognised_and_a_picture() -> None:
    text = statement_markdown(record(unit="person"), "strength.svg")
    # the run's steps: rate 0.05, noise 1, 60 times
    assert "| 1 in 1,000 | 0.65 percent |" in text and "of the persons in it" in text
    assert "![What an attacker can find out, at most](strength.svg)" in text
    assert "strength.svg" not in statement_markdown(record(unit="person"))
    image = statement_picture(record(unit="person"))
    assert image is not None and image.startswith("<svg") and "at most 7 of 1,000 persons in it" in image
    assert "A moderate protection: epsilon 2.857 at delta 1e-05; add or remove one person" in image


def test_the_statement_says_how_budgets_stop() -> None:
    text = statement_markdown(record())
    assert FILTER in text and "proven for runs whose settings are chosen after looking" in text
    assert "It is that of one run whose plan was fixed before its first release" in text


def test_central_claims_no_amplification() -> None:
    facts = statement_json(record("central", "client"))
    assert "no amplification" in facts["mechanism"]["sampling"]
    assert facts["accounting"]["zcdp_is"] == "exact"
    assert facts["accounting"]["gdp_mu"] == pytest.approx(math.sqrt(60))


def test_distributed_says_how_many_may_fail() -> None:
    text = statement_markdown(record("distributed", max_dropouts=2, max_colluders=1))
    assert (
        "2 of the nodes may drop out of a round" in text and "1 node may tell the server what noise" in text
    )
    assert "the guarantee holds towards it too" in text and "honest but curious" in text
    text = statement_markdown(
        record("distributed", max_dropouts=0, max_colluders=0, epsilon_towards_nodes=3.4)
    )
    assert "No node may drop out of a round" in text and "none may help the server to unmask" in text
    assert "**towards another node epsilon is 3.4** at the same delta" in text
    assert "towards it epsilon is 3.4" in first_paragraph(text)
    assert "by how much the record does not say" in statement_markdown(record("distributed"))
    # Since epsilon is the largest over all who see the output, the smaller one stands beside it.
    now = record("distributed", max_dropouts=0, max_colluders=0, epsilon=3.4, epsilon_towards_nodes=3.4)
    text = statement_markdown({**now, "privacy": {**now["privacy"], "epsilon_towards_server": 2.1}})
    assert "the guarantee holds towards it too. Towards the server alone it is 2.1." in text
    assert "and the noise of one of the other nodes" in first_paragraph(text)


def test_evaluation_under_secure_aggregation_is_not_called_a_sum() -> None:
    about = {"share": 0.2, "answers": 1, "mechanism": "two counts", "noise_multiplier": 4.0, "unit": "record",
             "epsilon": 0.7}  # fmt: skip
    assert "does not go through secure aggregation" in statement_markdown(
        record("distributed", evaluation=about)
    )
    assert "through secure aggregation: the" not in statement_markdown(record("local", evaluation=about))


def test_the_first_paragraph_tells_of_other_uses() -> None:
    uses = [
        {"node": "n", "dataset": "visits", "fingerprint": "f", "releases": 9, "epsilon": 4.9, "delta": 1e-5}
    ]
    assert "other uses of the same data that are known, epsilon is 4.9" in first_paragraph(
        statement_markdown(record(ledger=uses))
    )
    alone = statement_markdown(record(ledger=[{**uses[0], "epsilon": 2.857}]))
    assert "other uses" not in first_paragraph(alone)
    without = statement_markdown(record(ledger=[{**uses[0], "epsilon": None}]))
    assert "no guarantee" in first_paragraph(without)


def test_a_total_over_runs_that_protected_less_is_not_said_to_be_about_more() -> None:
    """Runs that protect single records promise nothing to a person; 'epsilon is 9.3' was said of persons."""
    used = {"node": "n", "dataset": "visits", "releases": 9, "epsilon": 9.3, "delta": 1e-5, "unit": "record"}
    text = statement_markdown(record(unit="person", ledger=[used]))
    assert (
        "protected single records only.** Over all uses that are known epsilon is 9.3 at delta 1e-05 for one "
        "record; for one person they promised nothing" in first_paragraph(text)
    )
    assert "| 9.3 | 1e-05 | record |" in text and "For one person there is no total" in text
    same = statement_markdown(record(unit="person", ledger=[{**used, "unit": "person"}]))
    assert "that are known, epsilon is 9.3 at delta 1e-05.**" in first_paragraph(same)
    assert "no total" not in same and "| 9.3 | 1e-05 | person |" in same


def test_the_first_paragraph_of_a_simulation_with_noise_from_the_seed_promises_nothing() -> None:
    text = first_paragraph(statement_markdown(record(reproducible_noise=True)).replace("**Caution.**", "#"))
    assert "protects nobody" in text
    for promise in ("times as likely", "percent sure", "protection (epsilon"):
        assert promise not in text
    assert "does not say how many" in statement_markdown(record("distributed"))


def test_an_audit_is_reported_as_a_lower_bound() -> None:
    bounds = [{"method": "one-run", "epsilon_lower": 0.61}, {"method": "two-sample", "epsilon_lower": 0.2}]
    audit = {"epsilon_lower": 0.61, "confidence": 0.95, "audited": "mechanism", "bounds": bounds}
    text = statement_markdown(record(audit={**audit, "violated": False}))
    assert "at least 0.61 with 95 percent confidence" in text and "one-run bound" in text
    assert "does not hold" not in text
    assert "fedtune audit --model" in text  # what was not attacked is said
    trained = statement_markdown(record(audit={**audit, "audited": "model", "violated": False}))
    assert "fedtune audit --model" not in trained


def test_an_audit_that_convicts_is_the_first_thing_said() -> None:
    audit = {"epsilon_lower": 4.2, "confidence": 0.95, "audited": "mechanism", "violated": True}
    text = statement_markdown(record(audit=audit, reproducible_noise=True))
    assert "**an audit has shown that it does not**" in first_paragraph(text)
    assert "times as likely" not in text
    assert text.index("Do not publish the model") < text.index("this one protects nobody")
    assert "the guarantee on this page does not hold" in text.split("## Audit")[1]


def test_uses_without_noise_are_infinite_and_unknown_uses_are_unknown() -> None:
    ledger = [
        {"node": "n", "dataset": "d", "fingerprint": "f", "releases": 3, "epsilon": None, "delta": None}
    ]
    assert "| infinite |" in statement_markdown(record(ledger=ledger))
    assert "does not say what else" in statement_markdown(record(ledger=None))


def test_what_no_ledger_knows_is_told_of_and_whom_to_ask() -> None:
    assert "Uses of the same data that went through no ledger" in statement_markdown(record())
    unknown = {"node": "north", "dataset": None, "releases": None, "epsilon": None, "delta": 1e-5}
    text = statement_markdown(record(ledger=[unknown]))
    assert "ask its owner for `fedtune node proof" in text, "`budget show` does not read a site's ledger"
    assert "Composed over everything" not in text, "nothing that is known was composed"
    made = record()
    assert "`fedtune budget verify` checks" in statement_markdown(made)
    made["run"]["engine"] = "deployment"
    assert "budget verify" not in statement_markdown(made)


def test_a_clipping_norm_that_follows_the_data_is_not_called_fixed_before() -> None:
    fixed = "The step count, clipping norm, sampling rate and noise were fixed by settings"
    assert fixed in statement_markdown(record())
    text = statement_markdown(record("central", "client", adaptive_clipping=True))
    assert fixed not in text and "step count, sampling rate and noise were fixed" in text


def test_one_answer_is_given_once_and_two_at_most_twice() -> None:
    about = {
        "mechanism": "two counts",
        "unit": "record",
        "share": 0.2,
        "noise_multiplier": 2.0,
        "epsilon": 2.0,
    }
    assert "and once releases two" in statement_markdown(record(evaluation={**about, "answers": 1}))
    assert "at most 2 times releases two" in statement_markdown(record(evaluation={**about, "answers": 2}))


def test_names_cannot_break_the_table() -> None:
    per_node = [{"node": "a|b", "epsilon": 1.0, "delta": 1e-5, "releases": 1}]
    assert "| a\\|b |" in statement_markdown(record(per_node=per_node))


def test_json_is_json_and_comes_from_the_record_alone() -> None:
    made = record()
    before = copy.deepcopy(made)
    text = json.dumps(statement_json(made), allow_nan=False)
    assert made == before
    assert json.loads(text)["accounting"]["epsilon"] == 2.857
    assert statement_markdown(json.loads(json.dumps(made))) == statement_markdown(made)


def test_optional_keys_may_be_missing() -> None:
    made = record()
    del made["data"], made["privacy"]["ledger"]
    assert "private texts that 4 nodes hold" in statement_markdown(made)


@pytest.mark.parametrize("spoil", [
    lambda r: r.pop("privacy"),
    lambda r: r["privacy"].pop("unit"),
    lambda r: r["privacy"].pop("delta"),
    lambda r: r["run"].pop("versions"),
    lambda r: r.update(privacy=None),
    lambda r: r["privacy"].update(unit="user"),
    lambda r: r["privacy"].update(trust="blind"),
])  # fmt: skip
def test_a_record_that_lacks_something_is_refused_not_guessed(spoil: Any, golden: Golden) -> None:
    made = record()
    spoil(made)
    with pytest.raises(RecordError) as raised:
        statement_markdown(made)
    golden(raised)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "of an earlier version"])
def test_who_took_no_part_is_named_with_the_reason_and_not_counted(listed: bool) -> None:
    made = make_record(left_out={"movies": "BudgetExhausted: node 'movies' gives no answer"})
    if not listed:
        del made["federation"]["left_out"]
    text = statement_markdown(made)
    assert "that 3 nodes hold (and without `movies`, which took no part)" in first_paragraph(text)
    assert "`movies` took no part: its data was not used" in text and "BudgetExhausted" in text
    assert re.search(r"\| movies \| \S+ \| \S+ \| 0 \(took no part\) \|", text)
    assert list(statement_json(made)["left_out"]) == ["movies"]
    assert "took no part" not in statement_markdown(make_record())
    assert summary.facts_and_notes(made)[1][0] == (
        "left out",
        "movies took no part (BudgetExhausted: node 'movies' gives no answer)",
    )


def test_a_size_that_was_told_adds_to_steps_of_the_very_same_noise() -> None:
    """privacy.noise_multiplier=20 at rate 1 is the mechanism by which a size is told, too."""
    told = {"noise_multiplier": 20.0}
    both = record(sample_rate=1.0, noise_multiplier=20.0, sizes=told)
    near = record(sample_rate=1.0, noise_multiplier=20.0, sizes={"noise_multiplier": 20.0 + 1e-9})
    found, wanted = (statement_json(one)["accounting"]["zcdp_rho"] for one in (both, near))
    assert found == pytest.approx(61 / (2 * 20.0**2)) == pytest.approx(wanted)


def test_a_run_on_pairs_promises_a_pair_and_no_text() -> None:
    made = record() | {"config": {"data": {"text": "premise", "text_pair": "hypothesis"}}}
    text = statement_markdown(made)
    assert "Unit of privacy: record: one pair of texts with its label." in text
    assert "hardly depends on any single pair of texts" in first_paragraph(text)
    assert "A text that is in several pairs" in text
    single = statement_markdown(record())
    assert "pair" not in single and "Unit of privacy: record: one text with its label." in single
