"""`fedtune audit`: what it writes, what it says, and how it leaves when the claim does not stand."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.cli import app as cli
from fedtune.errors import AuditError, RecordError
from fedtune.runs import audit, record
from tests.support.golden import Golden


@pytest.fixture
def folder(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def change(folder: Path, **values: Any) -> None:
    made = record.read(folder)
    made["privacy"].update(values)
    record.write(made, folder / record.RECORD_NAME)


@pytest.mark.slow
def test_bound_goes_into_record_statement_and_figure(folder: Path) -> None:
    output = io.StringIO()
    before = record.read(folder)
    found = audit.audit(folder, canaries=2000, console=Console(file=output, width=100, highlight=False))
    made = record.read(folder)
    assert made["privacy"]["audit"] == found
    assert 0.0 < found["epsilon_lower"] <= before["privacy"]["epsilon"] == found["epsilon_claimed"]
    assert found["steps"] == before["privacy"]["steps"] and found["delta"] == before["privacy"]["delta"]
    assert found["epsilon_accounted"] == pytest.approx(before["privacy"]["epsilon"])
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "epsilon is at least" in (folder / "statement.md").read_text()
    # Nothing else of the record is touched.
    made["privacy"]["audit"], made["artifacts"] = None, before["artifacts"]
    assert made == before
    printed = output.getvalue()
    for words in ("claimed", "95 percent confidence", "add or remove one record", "Private data used: none"):
        assert words in " ".join(printed.split())
    audit.check(found)


def test_plan_is_that_of_the_run(folder: Path, golden: Golden) -> None:
    made = record.read(folder)
    config, plan, releases = audit.plan_of(made)
    privacy = made["privacy"]
    assert releases == 3 and plan.steps(releases) == privacy["steps"]
    for name in ("noise_multiplier", "max_grad_norm", "sample_rate", "delta", "unit", "trust"):
        assert getattr(plan, name) == privacy[name]
    assert plan.epsilon(releases) == pytest.approx(privacy["epsilon"])
    assert config.data.name == made["config"]["data"]["name"]
    del made["data"]["declared_sizes"]
    with pytest.raises(RecordError) as raised:
        audit.plan_of(made)
    golden(raised)


def leave(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.slow
def test_a_claim_that_does_not_stand_leaves_loudly_after_it_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, epsilon=0.2)
    assert leave("audit", str(folder), "--canaries", "2000", "--json") == 1
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert found["violated"] and found["epsilon_lower"] > 0.2
    assert record.read(folder)["privacy"]["audit"] == found
    assert streams.err.startswith("AuditError: THE GUARANTEE DOES NOT HOLD.")
    for words in (
        "epsilon 0.2 at delta",
        "95 percent confidence",
        "Do not publish",
        "add or remove one record",
    ):
        assert words in streams.err
    assert len(streams.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_claim_below_the_accountants_own_number_is_refused_even_if_no_attack_shows_it(
    folder: Path, golden: Golden
) -> None:
    change(folder, epsilon=record.read(folder)["privacy"]["epsilon"] - 0.1)
    with pytest.raises(AuditError) as raised:
        audit.check(audit.audit(folder, canaries=200))
    golden(raised)


@pytest.mark.slow
def test_less_noise_than_the_plans_is_convicted_by_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedtune.privacy.plan import PrivacyPlan

    right = PrivacyPlan.noise
    monkeypatch.setattr(PrivacyPlan, "noise", lambda self, size, entropy: right(self, size, entropy) / 2.0)
    assert leave("audit", str(folder), "--seeds", "2", "--canaries", "4000") == 1
    assert "THE GUARANTEE DOES NOT HOLD" in capsys.readouterr().err


@pytest.mark.slow
def test_model_is_audited_by_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave("audit", str(folder), "--model", "--canaries", "100") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 rounds" in printed and "public test split" in printed
    assert record.read(folder)["privacy"]["audit"]["audited"] == "model"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--canaries", "3"], "take 20 canaries"),
        (["--seeds", "0"], "one repetition"),
        (["--confidence", "1"], "0.95 is usual"),
    ],
)
def test_numbers_that_allow_no_audit_are_refused(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave("audit", str(folder), *arguments) == 1
    assert words in capsys.readouterr().err
    assert record.read(folder)["privacy"]["audit"] is None


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave("audit", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("RecordError: ")


def test_a_record_with_another_name_is_refused_before_time_is_spent(folder: Path, golden: Golden) -> None:
    (folder / record.RECORD_NAME).rename(folder / "kept.json")
    with pytest.raises(RecordError) as raised:
        audit.audit(folder / "kept.json")
    assert "record.json" in str(raised.value)
    golden(raised)


@pytest.mark.slow
def test_a_run_without_a_claim_is_measured_and_not_convicted(folder: Path) -> None:
    made = record.read(folder)
    made["privacy"].update(trust="none", noise_multiplier=0.0, epsilon=None, delta=None)
    made["config"]["privacy"].update(trust="none", epsilon=None)
    for one in made["privacy"]["per_node"]:
        one.update(epsilon=None, delta=None)
    record.write(made, folder / record.RECORD_NAME)
    found = audit.audit(folder, canaries=1000)
    assert found["epsilon_claimed"] is None and found["epsilon_lower"] > 3.0 and not found["violated"]
    audit.check(found)
