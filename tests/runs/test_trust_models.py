"""The trust model study: its runs are what their names say, and its words follow the numbers, both ways."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.studies import import_script

FOLDER = Path(__file__).resolve().parents[2] / "simulations" / "trust_models"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return import_script(FOLDER, "study", monkeypatch)


@pytest.fixture
def report(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return import_script(FOLDER, "report", monkeypatch)


@pytest.mark.slow
def test_every_run_is_the_recipes_and_promises_what_its_name_says(study: ModuleType) -> None:
    from fedtune.config.loader import load
    from fedtune.config.recipe import in_words

    everything = study.cells([0, 1, 2], list(study.ARRANGEMENTS), [None, *study.EPSILONS])
    assert len({cell.name for cell in everything}) == len(everything) == 42
    for cell in (cell for cell in everything if cell.seed == 1):
        config = load(cell.overrides())
        privacy = config.privacy
        assert in_words(config).endswith("given, not by the recipe: adapter")
        assert (config.adapter.name, config.model.quantization) == ("head", "int8")
        assert privacy.epsilon == cell.epsilon and config.seed == 1
        assert privacy.unit == ("client" if cell.arrangement == "central" else "record")
        if cell.epsilon is None:
            assert privacy.trust == "none"
        else:
            pooled = cell.arrangement == "pooled"
            assert privacy.trust == ("local" if pooled else cell.arrangement)
            assert privacy.delta == (0.005 if cell.arrangement == "central" else 2.5e-5)


def made_up(report: ModuleType, gap: float) -> dict[tuple[str, str, str], object]:
    """Accuracies in which distributed exceeds pooled by `gap` and some noise."""
    table = {}
    for epsilon in report.EPSILONS:
        for name in ("pooled", "distributed"):
            noise = (0.001, -0.001, 0.0005) if name == "distributed" else (0.0, 0.0, 0.0)
            shift = gap if name == "distributed" else 0.0
            values = tuple(0.76 + shift + wobble for wobble in noise)
            table[name, f"epsilon{epsilon}", "all"] = report._first.Values((0, 1, 2), values)
    return table


@pytest.mark.parametrize(("gap", "words"), [(0.0, "equal within noise"), (-0.02, "worse"), (0.02, "better")])
def test_the_claim_says_what_the_numbers_say(report: ModuleType, gap: float, words: str) -> None:
    said = report.claim(made_up(report, gap))
    assert words in said
    assert ("equal" in said) == (gap == 0.0)


def test_a_table_of_half_the_runs_has_dashes(report: ModuleType) -> None:
    text = report.table_markdown(made_up(report, 0.0))
    assert "| local | a record | - | - | - |" in text
    assert "| *distributed minus pooled* | | +0.02 ± 0.06 |" in text


def test_the_interval_is_students(report: ModuleType) -> None:
    from scipy import stats

    for count in (3, 9):
        values = [0.01 * value for value in range(count)]
        low, high = stats.t.interval(0.95, count - 1, loc=0.0, scale=stats.sem(values))
        assert report.half_interval(values) == pytest.approx((high - low) / 2, rel=1e-3)
    assert report.half_interval([0.5]) is None
