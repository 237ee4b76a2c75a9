"""The study script: which runs it makes, how it goes on where it stopped, and that its words are true."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.errors import RecordError
from tests.support.studies import import_script

FOLDER = Path(__file__).resolve().parents[2] / "simulations" / "first_federation"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return import_script(FOLDER, "report", monkeypatch)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, report: ModuleType) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return import_script(FOLDER, "study", monkeypatch)


@pytest.mark.slow
def test_every_run_of_the_study_is_a_valid_configuration(study: ModuleType) -> None:
    from fedtune.config.loader import load

    shared: dict[str, Any] = {}
    everything = study.cells([0, 1, 2], list(study.ARRANGEMENTS), list(study.PRIVACY))
    assert len(everything) == 36 and len({cell.name for cell in everything}) == 36
    configs = {cell: load(cell.overrides()) for cell in everything if cell.seed == 1}
    for cell, config in configs.items():
        site = cell.arrangement.removeprefix("alone_") if cell.arrangement in study.ALONE else None
        assert config.seed == 1 and config.data.only_site == site
        assert (config.privacy.trust == "none") == (cell.privacy == "none")
        assert (config.federation.nodes == 1) == (cell.arrangement == "pooled")
        if cell.privacy != "none":
            assert (config.privacy.epsilon, config.privacy.delta) == (8.0, 2.5e-5)
            assert config.privacy.unit == "record"
        same = [vars(part) for part in (config.train, config.model, config.adapter)]
        same.append({"num_rounds": config.federation.num_rounds})
        assert same == shared.setdefault("all", same)


def records_by_hand(folder: Path, template: dict[str, Any], accuracy: Any) -> None:
    """36 records whose accuracies are `accuracy(arrangement, privacy, seed, site)`."""
    sites = ("editorials", "movies", "products", "tweets")
    folder.mkdir()
    for seed in range(3):
        for privacy in ("none", "epsilon8"):
            for arrangement in (*(f"alone_{site}" for site in sites), "federation", "pooled"):
                one = copy.deepcopy(template)
                one["run"] |= {"seed": seed, "seconds": 60.0}  # the template's data is private: no times
                per_site = {site: accuracy(arrangement, privacy, seed, site) for site in sites}
                one["metrics"]["per_site"] = {
                    site: {"accuracy": value, "num_records": 10} for site, value in per_site.items()
                }
                one["metrics"]["accuracy"] = sum(per_site.values()) / 4
                (folder / f"{arrangement}-{privacy}-seed{seed}.json").write_text(json.dumps(one))


def simple(arrangement: str, privacy: str, seed: int, site: str) -> float:
    value = {"federation": 0.80, "pooled": 0.84}.get(arrangement, 0.70)
    value += 0.06 if arrangement == f"alone_{site}" else 0.0
    value += (seed - 1) * 0.01  # a seed moves all alike, so that paired differences have no spread
    return value - (0.1 if privacy == "epsilon8" else 0.0)


@pytest.mark.slow
def test_table_and_sentences_are_made_from_the_records(
    report: ModuleType, record: dict[str, Any], tmp_path: Path
) -> None:
    records_by_hand(tmp_path / "records", record, simple)
    assert "36 records" in report.write(tmp_path / "records", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| federation | without privacy | 80.0 ± 1.0 | 80.0 ± 1.0 |" in text
    assert "| movies alone | epsilon 8 per record | 61.5 ± 1.0 | 60.0 ± 1.0 | **66.0 ± 1.0** |" in text
    assert "the federation is right on 80.0 ± 1.0 percent" in text
    assert "+4.0 points for movies (better)" in text
    assert "**The price of privacy** at epsilon 8 is 10.0 points in the federation" in text
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    assert "{" not in text


def test_a_federation_that_is_no_good_is_called_that(
    report: ModuleType, record: dict[str, Any], tmp_path: Path
) -> None:
    def worse(arrangement: str, privacy: str, seed: int, site: str) -> float:
        return 0.6 if arrangement == "federation" else 0.7 + 0.001 * seed

    records_by_hand(tmp_path / "records", record, worse)
    said = report.learnt(report.read(tmp_path / "records")[0])
    assert "better" not in said and said.count("(worse)") == 8


def test_a_difference_within_the_noise_is_not_called_one(report: ModuleType) -> None:
    values = report.Values
    assert values((0, 1, 2), (0.01, -0.02, 0.015)).verdict() == "no clear difference"
    assert values((0, 1, 2), (0.01, 0.012, 0.011)).verdict() == "better"
    assert values((0, 1, 2), (-0.01, -0.012, -0.011)).verdict() == "worse"
    paired = values((0, 1, 2), (0.5, 0.6, 0.7)).minus(values((1, 2), (0.5, 0.6)))
    assert paired.seeds == (1, 2) and paired.values == pytest.approx((0.1, 0.1))


def test_a_study_cut_short_is_reported_as_far_as_it_goes(
    report: ModuleType, record: dict[str, Any], tmp_path: Path
) -> None:
    records_by_hand(tmp_path / "records", record, simple)
    for path in (tmp_path / "records").glob("*"):
        if not path.name.startswith(("federation-none-seed0", "alone_movies-none-seed0")):
            path.unlink()
    report.write(tmp_path / "records", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "2 runs" in text and "one seed" in text
    assert "| pooled | without privacy | - | - | - | - | - |" in text
    assert "price of privacy" not in text


@pytest.fixture
def small(world: dict[str, Path], tmp_path: Path) -> list[str]:
    """Overrides that make a run of the study take a second."""
    data = tmp_path / "data"
    data.mkdir()
    text = (world["data"] / "train.csv").read_text()
    for number, site in enumerate(("editorials", "movies", "products", "tweets")):
        text = text.replace(f"site-{number}", site)
    (data / "train.csv").write_text(text)
    return [
        *("data=files", f"data.path={data}", "data.text=text", "data.label=label", "data.site=site"),
        "data.public=true",
        *("data.labels=[negative,positive]", "data.max_length=16", f"model.name={world['model']}"),
        *("model.quantization=none", "federation.num_rounds=1", "train.sample_rate=0.3"),
    ]


@pytest.mark.slow
def test_finished_runs_are_skipped_and_other_settings_refused(
    study: ModuleType, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "records"
    words = ["--records", str(kept), "--work", str(tmp_path / "work"), "--seeds", "0", "--privacy", "none"]
    words += ["--only", "alone_movies,federation"]
    assert study.main([*words, "--max-runs", "1", *small]) == 0
    assert sorted(path.name for path in kept.glob("*.json")) == ["alone_movies-none-seed0.json"]
    first = (kept / "alone_movies-none-seed0.json").read_bytes()
    assert study.main([*words, *small]) == 0
    assert "done before" in capsys.readouterr().out
    assert len(list(kept.glob("*.json"))) == 2
    assert (kept / "alone_movies-none-seed0.json").read_bytes() == first
    assert (kept / "README.md").exists() and (kept / "figure.png").exists()
    with pytest.raises(RecordError, match=r"train\.learning_rate"):
        study.main([*words, *small, "train.learning_rate=0.5"])


def test_parts_share_the_work_without_overlap(study: ModuleType) -> None:
    wanted = study.cells([0, 1], ["federation", "pooled"], ["none"])
    parts = [wanted[index::2] for index in range(2)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(cell.name for cell in wanted)


def test_a_misspelt_arrangement_is_refused(study: ModuleType) -> None:
    with pytest.raises(SystemExit, match="alone_tweets"):
        study.main(["--only", "alone_twets"])
