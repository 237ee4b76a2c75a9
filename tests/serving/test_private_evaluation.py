"""`fedtune evaluate --epsilon`: charged before anything is computed, noised, and refused over a budget."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from fedtune.cli.app import main
from fedtune.config.files import state_dir
from fedtune.deploy.site import check_books, open_ledger, read_site
from fedtune.errors import BudgetExhausted, CalibrationError, ConfigError, DataError
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.simulation import simulation_ledger
from fedtune.privacy.mechanisms.confusion import ConfusionPlan, Votes
from fedtune.serving.classifier import Classifier
from fedtune.serving.evaluation import evaluate, keep
from fedtune.serving.private_evaluation import Told, _plan, _privacy, evaluate_private, show
from fedtune.serving.private_measures import private_measures


@pytest.fixture
def visits(world: dict[str, Path], tmp_path: Path) -> Path:
    """The test texts 10 times, each time of other persons, four texts a person: 100 persons."""
    with (world["data"] / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "visits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "patient"])
        for time in range(10):
            writer.writerows([r["text"], r["label"], f"p{time}-{i // 4}"] for i, r in enumerate(rows))
    return tmp_path / "visits.csv"


def printed(told: Told) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show(told, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def releases() -> int:
    return len(simulation_ledger(state_dir() / "ledgers").releases())


@pytest.mark.slow
def test_it_tells_about_what_is_true_and_the_ledger_has_it(
    exported: Path, visits: Path, fedtune_home: Path
) -> None:
    told = evaluate_private(exported, visits, ["data.unit=patient"], "hf", epsilon=1.0)
    found, true = told.found, evaluate(exported, visits, [], "hf")
    privacy = found["privacy"]
    assert 0.98 <= privacy["epsilon"] <= 1.0 and privacy["delta"] == 1e-6 and privacy["unit"] == "person"
    assert privacy["adjacency"] == "add or remove one person"
    # Everybody has four texts, so that a person's share is a text's: the rates are nearly the same.
    accuracy = found["accuracy"]
    assert abs(accuracy["value"] - true["accuracy"]) < 5 * accuracy["standard_error"]
    noise = privacy["noise_std"]["confusion"]
    assert np.abs(np.array(found["confusion"]) - np.array(true["confusion"]) / 4).max() < 6 * noise
    assert found["units"] == pytest.approx(100, abs=6 * 2 * noise) and found["units"] != 100
    (release,) = simulation_ledger(state_dir() / "ledgers").releases()
    assert (release.purpose, release.unit, release.committed) == ("confusion", "person", True)
    ((term, count),) = release.steps or ()
    assert (term.noise_multiplier, count) == (privacy["noise_multiplier"], 1)
    assert told.total[0] == pytest.approx(privacy["epsilon"], rel=0.01)
    text = printed(told)
    for words in (
        "macro F1",
        "positive",
        f"epsilon {privacy['epsilon']:.3g} at delta 1e-06",
        "one vote a person",
        "persons of files",
    ):
        assert words in text


@pytest.mark.parametrize(("units", "said"), [(100.0, False), (200.0, True)])
def test_a_delta_that_so_few_persons_do_not_bear_is_said(units: float, said: bool) -> None:
    """How many there are is known when it is too late to refuse: from the noised counts."""
    plan = _plan(1.0, 0.009, "person", 2, 0)
    cells = {part: np.zeros(shape) for part, shape in plan.shapes.items()}
    cells["confusion"] = np.array([[90.0, 10.0], [20.0, 80.0]]) * units / 200
    found = {"data": "visits", "format": "hf", "privacy": _privacy(plan, units)}
    told = Told(found | private_measures(cells, plan, ("no", "yes"), ()), (), (1.0, 0.009))
    assert ("Caution: delta 0.009 is not below one over the about 200 persons" in printed(told)) == said


@pytest.mark.parametrize(
    ("unit", "way_out"),
    [("person", r"data\.unit=COLUMN"), ("client", "tells the owner everything")],
)
def test_a_budget_of_persons_is_told_how_this_command_keeps_it(
    exported: Path, visits: Path, unit: str, way_out: str
) -> None:
    """It named privacy.unit, a setting of runs that evaluate refuses."""
    ledger = simulation_ledger(state_dir() / "ledgers")
    ledger.set_budget(PrivacyBudget(8.0, 1e-6, unit), dataset="visits")
    with pytest.raises(BudgetExhausted, match=way_out) as caught:
        evaluate_private(exported, visits, ["data.name=visits"], "hf", epsilon=1.0)
    assert "privacy.unit" not in str(caught.value) and releases() == 0
    if unit == "person":
        evaluate_private(exported, visits, ["data.name=visits", "data.unit=patient"], "hf", epsilon=1.0)
        assert releases() == 1


@pytest.mark.slow
def test_calibration_threshold_and_sites_come_from_the_same_release(
    exported: Path, visits: Path, tmp_path: Path
) -> None:
    rows = visits.read_text().splitlines()
    sites = [f"{row},{'north' if i % 2 else 'west'}" for i, row in enumerate(rows[1:])]
    visits.write_text("\n".join([rows[0] + ",ward", *sites]) + "\n")
    words, named = ["data.site=ward"], ["north", "south"]
    told = evaluate_private(exported, visits, words, "hf", epsilon=20.0, sites=named)
    found, true = told.found, evaluate(exported, visits, words, "hf")
    assert releases() == 1 and told.total[0] <= 20.5
    error = found["calibration_error"]
    assert abs(error["value"] - true["calibration_error"]) <= 3 * error["noise"] + 0.02  # other bins
    best = found["threshold"]
    assert abs(best["f1_macro"] - true["threshold"]["f1_macro"]) < 6 * best["standard_error"] + 0.02
    north, noise = found["per_site"]["north"], found["privacy"]["noise_std"]["sites"]
    assert north["units"] == pytest.approx(200, abs=6 * 1.5 * noise)
    assert abs(north["accuracy"]["value"] - true["per_site"]["north"]["accuracy"]) < (
        6 * north["accuracy"]["standard_error"]
    )
    assert "west" not in json.dumps(found)  # only what was named
    assert abs(found["per_site"]["south"]["units"]) < 6 * 1.5 * noise  # and nobody is there
    text = printed(told)
    for shown in ("Calibration error", "macro F1", "north", "which the noise moved by"):
        assert shown in text
    assert [path.name for path in keep(found, tmp_path / "out")] == ["evaluation.json", "evaluation.png"]
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 10_000


def test_what_the_noise_hides_is_said_in_words(exported: Path, visits: Path) -> None:
    told = evaluate_private(exported, visits, [], "hf", epsilon=0.01)
    assert told.found["calibration_error"] is None
    assert "The calibration error is not told" in printed(told)


@pytest.mark.slow
def test_two_of_them_compose_and_the_second_is_refused_over_a_budget(exported: Path, visits: Path) -> None:
    ledger = simulation_ledger(state_dir() / "ledgers")
    ledger.set_budget(PrivacyBudget(1.5, 1e-6, None), dataset="visits")
    words = ["data.unit=patient", "data.name=visits"]
    one = evaluate_private(exported, visits, words, "hf", epsilon=1.0)
    assert one.found["privacy"]["delta"] == 1e-6
    with pytest.raises(
        BudgetExhausted, match=r"refuses to tell how right.* over its\s+budget of 1.5.*--epsilon"
    ):
        evaluate_private(exported, visits, words, "hf", epsilon=1.0)
    assert releases() == 1


def test_it_is_charged_before_the_model_is_asked(
    exported: Path, visits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Classifier, *args: object) -> None:
        raise RuntimeError(f"{releases()} charged")

    monkeypatch.setattr(Classifier, "logits", crash)
    with pytest.raises(RuntimeError, match="1 charged"):
        evaluate_private(exported, visits, [], epsilon=1.0)
    (left,) = simulation_ledger(state_dir() / "ledgers").releases()
    assert not left.committed  # and counts all the same


@pytest.mark.slow
def test_what_leaves_was_noised_and_only_the_plan_saw_the_texts(
    exported: Path, visits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mechanism's answer held still, other texts leave the same words."""
    still = {"confusion": np.array([[90.0, 10.0], [20.0, 80.0]]), "sites": np.array([[90.0, 10.0]])}
    fixed = lambda *args: {**still, "bins": np.full((2, 20), 5.0), "offsets": np.zeros(20)}  # noqa: E731
    monkeypatch.setattr(ConfusionPlan, "answer", fixed)
    words = ["data.name=a", "data.site=patient"]
    first = evaluate_private(exported, visits, words, epsilon=1.0, sites=["p0-1"]).found
    rows = visits.read_text().splitlines()
    visits.write_text("\n".join([*rows[:50], *rows[60:90], ",positive,p"]) + "\n")
    second = evaluate_private(exported, visits, words, epsilon=1.0, sites=["p0-1"])
    assert second.found == first
    assert second.notes and "dropped" in second.notes[0]
    assert "For you alone: " in printed(second)


@pytest.mark.slow
def test_what_is_said_of_a_text_does_not_depend_on_the_others(
    exported: Path, visits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one person more or less would move others' votes, uncharged: here by kernels that round so badly
    that the shape of a batch decides."""
    opened = Classifier.open

    def rounding(*args: object) -> Classifier:
        model = opened(*args)  # type: ignore[arg-type]

        def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            first = ids.shape[0] * ids.shape[1] % 2 == 0
            return np.tile(np.array([[first, not first]], dtype=np.float32), (len(ids), 1))

        return dataclasses.replace(model, forward=forward)

    seen: list[np.ndarray] = []

    def answer(self: ConfusionPlan, votes: Votes, entropy: object) -> dict[str, np.ndarray]:
        seen.append(votes.said)
        return {part: np.ones(shape) for part, shape in self.shapes.items()}

    monkeypatch.setattr(Classifier, "open", rounding)
    monkeypatch.setattr(ConfusionPlan, "answer", answer)
    evaluate_private(exported, visits, ["data.name=a"], epsilon=1.0)
    rows = visits.read_text().splitlines()
    visits.write_text("\n".join([rows[0], *rows[2:]]) + "\n")
    evaluate_private(exported, visits, ["data.name=a"], epsilon=1.0)
    whole, less = seen
    assert len(set(whole)) == 2 and np.array_equal(whole[1:], less)


@pytest.mark.slow
def test_what_it_does_not_take_costs_nothing(exported: Path, visits: Path, tmp_path: Path) -> None:
    for words, error in ((["data.public=true"], ConfigError), (["data.unit=nobody"], DataError)):
        with pytest.raises(error):
            evaluate_private(exported, visits, words, epsilon=1.0)
    for words, sites in ((["data.site=patient"], []), ([], ["a"]), (["data.site=patient"], ["a", "a"])):
        with pytest.raises(ConfigError, match=r"--sites north,south"):
            evaluate_private(exported, visits, words, epsilon=1.0, sites=sites)
    for epsilon, delta in ((0.0, None), (-1.0, None), (float("nan"), None), (1.0, 0.01), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="promises nothing"):
            evaluate_private(exported, visits, [], epsilon=epsilon, delta=delta)
    with pytest.raises(Exception, match=r"meets --epsilon 1e-07"):
        evaluate_private(exported, visits, [], epsilon=1e-7)
    assert releases() == 0


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


@pytest.mark.slow
def test_on_the_command_line_as_a_program_and_with_delta_alone(
    exported: Path, visits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = ["evaluate", exported, visits, "data.unit=patient", "--epsilon", 1, "--format", "hf"]
    assert command(*private, "--json", "-o", tmp_path / "out") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "notes" not in found and "total" not in found
    for option in (("--delta", 1e-5), ("--sites", "a")):
        assert command("evaluate", exported, visits, *option) == 2
        assert "--epsilon" in capsys.readouterr().err
    assert command(*private, "data.site=patient", "--sites", "p0-1, p0-2", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["per_site"]) == ["p0-1", "p0-2"]


@pytest.fixture
def node(visits: Path, world: dict[str, Path], tmp_path: Path) -> Path:
    values = {
        "federation": "trial", "site": "clinic-1", "server": "127.0.0.1:9", "ca": "ca.crt", "key": "node.key",
        "data": {
            "name": "visits", "path": "visits.csv", "declared_size": 500, "unit": "patient",
            "labels": ["negative", "positive"],
        },
        "budget": {"epsilon": 2.0, "delta": 1e-4},
        "ledger": "state/ledger.sqlite", "audit_log": "state/audit.jsonl",
    }  # fmt: skip
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "node.yaml"


@pytest.mark.slow
def test_a_real_site_s_ledger_is_charged_and_its_audit_log_says_so(
    exported: Path, visits: Path, node: Path
) -> None:
    site = read_site(node)
    with pytest.raises(Exception, match="budget"):  # before the node was ever started
        evaluate_private(exported, visits, [], "hf", epsilon=1.0, node=node)
    open_ledger(site, setting=True)
    told = evaluate_private(exported, visits, [], "hf", epsilon=1.0, node=node)
    privacy = told.found["privacy"]
    assert (privacy["unit"], privacy["delta"]) == ("person", 1e-4) and told.found["data"] == "visits"
    (release,) = open_ledger(site).releases()
    assert (release.node, release.purpose) == ("clinic-1", "confusion")
    check_books(site)  # the two books vouch for one another
    last = json.loads(Path(site.audit_log).read_text().splitlines()[-1])
    assert (last["event"], last["message"]) == ("released", "fedtune evaluate")
    with pytest.raises(BudgetExhausted, match="over its\\s+budget of 2"):
        evaluate_private(exported, visits, [], "hf", epsilon=1.9, node=node)
    with pytest.raises(CalibrationError, match=r"declares 500 persons.*hides the\s+accuracy of fewer than"):
        evaluate_private(exported, visits, [], "hf", epsilon=0.005, node=node)
    for word in ("data.unit=null", "data.name=other"):
        with pytest.raises(ConfigError, match="leave data.unit and data.name out"):
            evaluate_private(exported, visits, [word], "hf", epsilon=0.1, node=node)
    assert releases() == 0  # not the ledger of simulations
