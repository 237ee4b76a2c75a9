"""The studies that are shipped: their claims, read again from their records."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import RecordError
from fedtune.report.advice import advise, family
from fedtune.report.collect import collect
from fedtune.report.difference import by_seed, difference, paired
from fedtune.report.frontier import Point, points_of, price_book, varied_settings
from fedtune.report.tuning import tuning_of
from tests.support.studies import import_script

STUDIES = Path(__file__).resolve().parents[1] / "simulations"
FRONTIERS = ("privacy_frontier", "quantization_frontier")


def points(study: str) -> list[Point]:
    """The points of the study's records; none of them may be left out."""
    found = collect([STUDIES / study / "records"])
    assert found.notes == []
    return points_of(found.runs, price_book(found.runs, None))


def falls(alike: list[Point]) -> list[tuple[float, float, float]]:
    """(epsilon, larger epsilon, standard errors by which accuracy falls from one to the other, by seed)."""
    found = []
    for low, high in itertools.combinations(sorted(alike, key=lambda point: point.epsilon), 2):
        fall = difference(low, high)
        assert fall.seeds == 3 and fall.error is not None
        found.append((low.epsilon, high.epsilon, fall.mean / fall.error))
    return found


@pytest.mark.parametrize("study", FRONTIERS)
def test_accuracy_rises_with_epsilon_within_two_standard_errors(study: str) -> None:
    members = points(study)
    families = {
        tuple(point.id for point in family(one, members)): family(one, members)
        for one in members
        if math.isfinite(one.epsilon)
    }
    assert len(families) == (1 if study == "privacy_frontier" else 3)
    for alike in families.values():
        assert len(alike) >= 4 and math.isinf(alike[-1].epsilon)
        assert [fall for fall in falls(alike) if fall[2] > 2.0] == []
        first, last = alike[0].accuracy, alike[-1].accuracy
        assert first is not None and last is not None and first.mean < last.mean
        for point in alike:
            assert len(point.seeds) == len(point.runs) == 3
    assert not any(
        "Accuracy falls" in doubt for doubt in advise(members, varied_settings(members), "USD").caveats
    )


def test_the_frontier_covers_what_was_asked() -> None:
    targets = {run.config["privacy"]["epsilon"] for point in points("privacy_frontier") for run in point.runs}
    assert targets == {0.5, 1.0, 2.0, 4.0, 8.0, None}


@pytest.mark.slow
@pytest.mark.parametrize(("study", "count"), [("privacy_frontier", 15), ("quantization_frontier", 27)])
def test_what_the_frontiers_private_runs_cost_together_is_of_their_records(study: str, count: int) -> None:
    runs = [run for point in points(study) for run in point.runs]
    chosen = next(run for run in runs if math.isfinite(run.epsilon))
    found = tuning_of(runs, chosen, {})
    assert found is not None and found.runs == count
    others = {"privacy_frontier": [STUDIES.parent / "docs" / "epsilon.md"]}
    for page in [STUDIES / study / "README.md", *others.get(study, [])]:
        text = " ".join(page.read_text(encoding="utf-8").split())
        assert f"cost epsilon {found.epsilon_composed:.1f}" in text, page


def test_what_quantization_costs_is_said_seed_by_seed() -> None:
    of = {
        (point.settings["model.quantization"], point.settings["privacy.epsilon"]): by_seed(point)
        for point in points("quantization_frontier")
    }

    def cost(quantization: str, *epsilons: float | None) -> str:
        """Points that it loses beside float32, of a seed the mean over `epsilons`."""
        each = [
            {seed: statistics.fmean(of[name, epsilon][seed] for epsilon in epsilons) for seed in range(3)}
            for name in ("none", quantization)
        ]
        return paired(*each).points().removesuffix(" points")

    text = " ".join((STUDIES / "quantization_frontier" / "README.md").read_text(encoding="utf-8").split())
    every = (1.0, 2.0, 8.0, None)
    assert f"show, {cost('int8', *every)} points beside" in text
    assert f"in a seventh, costs {cost('nf4', *every)}:" in text
    assert f"({cost('nf4', 1.0)} and {cost('nf4', 2.0)}), at 8" in text
    assert f"({cost('nf4', 8.0)} and {cost('nf4', None)})" in text
    measured = (STUDIES.parent / "docs" / "measured.md").read_text(encoding="utf-8")
    assert f"nf4 {cost('nf4', *every)} points, seed by seed" in measured


@pytest.mark.parametrize("study", FRONTIERS)
def test_the_shipped_table_is_of_the_shipped_records(study: str) -> None:
    with (STUDIES / study / "frontier.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["configuration"]: row for row in csv.DictReader(file)}
    members = points(study)
    assert set(rows) == {point.id for point in members}
    for point in members:
        assert point.accuracy is not None
        assert float(rows[point.id]["accuracy"]) == pytest.approx(point.accuracy.mean, rel=1e-5)
        assert float(rows[point.id]["epsilon"] or math.inf) == pytest.approx(point.epsilon, rel=1e-5)


@pytest.mark.slow
def test_the_table_of_private_accuracy_is_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = STUDIES / "private_accuracy"
    study = import_script(folder, "study", monkeypatch)
    values, _ = study.table.read(folder / "records")
    text = study.table.table(values, study.earlier(folder / "records"))
    assert text in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_head_of_before_its_damping_is_marked_where_that_bites(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = import_script(STUDIES / "private_accuracy", "study", monkeypatch)
    name = "clinc150-head-local-epsilon1-seed0.json"
    kept = json.loads((STUDIES / "private_accuracy" / "records" / name).read_text(encoding="utf-8"))
    assert "damped" not in kept["config"]["train"]
    for factor, marked in ((1.0, False), (1.2, True)):  # 1.53 of 1.7, and more
        noisier = kept["privacy"] | {"noise_multiplier": factor * kept["privacy"]["noise_multiplier"]}
        (tmp_path / name).write_text(json.dumps(kept | {"privacy": noisier}), encoding="utf-8")
        found = study.earlier(tmp_path)
        assert found == ({("clinc150", "head", "local", 1): ["train.damped"]} if marked else {})


def test_a_cell_with_settings_of_before_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    study = import_script(STUDIES / "private_accuracy", "study", monkeypatch)
    values = {("opinions", "head", "local", 8): [0.5], ("opinions", "head", "none", None): [0.5]}
    text = study.table.table(values, {("opinions", "head", "none", None): ["train.damped"]})
    assert "| head | local | not run | not run | 50.0 (one seed) | 50.0 (one seed) † |" in text
    assert text.endswith("opinions head none: `train.damped`.")


def test_no_site_loses_by_joining_with_a_part_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = STUDIES / "private_accuracy" / "personal"
    personal = import_script(folder, "study", monkeypatch)
    text = personal.table(folder / "records")
    assert text in (folder / "README.md").read_text(encoding="utf-8")
    found = personal.accuracies(folder / "records")
    for site in personal.SITES:
        gains = [a - b for a, b in zip(found["personal", site], found[f"alone_{site}", site], strict=True)]
        assert len(gains) == 3
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        assert statistics.fmean(gains) > -error, site


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (None, 0),
        (RecordError("There is none."), "RecordError: There is none."),
        (KeyboardInterrupt("x"), 130),
    ],
)
def test_a_script_of_a_study_ends_in_words(
    ends: BaseException | None, status: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> int:
        if ends is not None:
            raise ends
        return 0

    with pytest.raises(SystemExit) as raised:
        import_script(STUDIES, "cells", monkeypatch).script(main)
    assert raised.value.code == status


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"federation.evaluate_every": 7}, None),
        ({"train.damped": ...}, None),  # of a version that had no such setting
        ({"data.long_text": ...}, None),
        ({"pricing.serving_load": ...}, None),
        ({"data.max_length": 64}, None),
        ({"data.max_length": 96}, "(data.max_length)"),
        ({"train.learning_rate": 7.0}, "(train.learning_rate)"),
        ({"train.averaging": ...}, "(train.averaging)"),
    ],
)
def test_a_record_of_another_run_is_not_mixed_in(
    change: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fedtune.config.loader import load
    from fedtune.errors import RecordError
    from fedtune.runs import record

    cells = import_script(STUDIES, "cells", monkeypatch)
    cell = SimpleNamespace(name="one", overrides=lambda: ["adapter=ffa_lora", "privacy.unit=record"])
    kept = record.clean(dataclasses.asdict(load(cell.overrides())))
    for name, value in change.items():
        group, _, setting = name.partition(".")
        assert setting in kept[group]
        kept[group][setting] = value
        if value is ...:
            del kept[group][setting]
    monkeypatch.setattr(record, "read", lambda path: {"config": kept})
    (tmp_path / "one.json").touch()
    if says is None:
        assert not cells.run_cell(cell, tmp_path, tmp_path, [])
    else:
        with pytest.raises(RecordError, match=re.escape(says)):
            cells.run_cell(cell, tmp_path, tmp_path, [])
