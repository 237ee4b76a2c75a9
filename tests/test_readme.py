"""README.md is short, and what it shows is so; tests/test_documents.py runs its commands."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.documents import DEFAULT_JOB, run_summary
from tests.support.pages import PAGES
from tests.support.studies import import_script

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "simulations"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = [
    tuple(cell.strip() for cell in row.strip("|").split("|"))
    for row in README[README.index("<!-- claims -->") : README.index("<!-- end -->")].splitlines()[3:]
]


def test_it_can_be_read_in_one_sitting() -> None:
    assert len(README.split()) <= 900


def test_the_output_that_it_shows_is_what_the_default_job_said() -> None:
    (block,) = re.findall(r"<!-- output: of the run in [\w/]+ -->\n```text\n(.*?)```", README, re.DOTALL)
    said = [line.rstrip() for line in run_summary().splitlines()]
    places = [said.index(line) for line in block.splitlines() if line]
    assert len(places) > 8 and places == sorted(places)


def test_the_picture_of_what_it_promised_is_of_its_record() -> None:
    from fedtune.privacy.statement.facts import statement_picture

    kept = DEFAULT_JOB.with_name("strength.svg").read_text(encoding="utf-8")
    assert kept == statement_picture(json.loads(DEFAULT_JOB.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "script",
    sorted({name for page in PAGES for name in re.findall(r"scripts/(\w+)\b(?!\.)", page.read_text())}),
)
def test_scripts_that_are_named_exist(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.is_dir() or (path.is_file() and path.stat().st_mode & 0o111)


# --- claims: each number from its records ------------------------------------------------------------------


def record(path: str) -> Any:
    return json.loads((STUDIES / path).read_text(encoding="utf-8"))


def percent(values: list[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f}"


def default_job() -> str:
    from fedtune.runs.summary import duration

    made = json.loads(DEFAULT_JOB.read_text(encoding="utf-8"))
    assert made["privacy"]["unit"] == "person" and made["privacy"]["target_epsilon"] == 8
    return f"{percent([made['metrics']['accuracy']])} percent in {duration(made['run']['seconds'])}"


def accuracies(folder: str, name: str) -> list[float]:
    """Of the three seeds of one cell of a study."""
    found = sorted((STUDIES / folder / "records").glob(f"{name}-seed*.json"))
    assert len(found) == 3, name
    return [json.loads(path.read_text(encoding="utf-8"))["metrics"]["accuracy"] for path in found]


def many_classes() -> str:
    private, free = (
        accuracies("private_accuracy", f"banking77-head-{cell}") for cell in ("local-epsilon3", "none-none")
    )
    return f"{percent(private)} percent; {percent(free)} without privacy"


def joining() -> str:
    sites = ("editorials", "movies", "products", "tweets")
    together, pooled, *alone = (
        accuracies("first_federation", f"{name}-epsilon8")
        for name in ("federation", "pooled", *(f"alone_{site}" for site in sites))
    )
    best = max(alone, key=statistics.fmean)
    return f"{percent(together)}, {percent(best)}, {percent(pooled)} percent"


def own_part(monkeypatch: pytest.MonkeyPatch) -> str:
    folder = STUDIES / "private_accuracy" / "personal"
    study = import_script(folder, "study", monkeypatch)
    found = study.accuracies(folder / "records")
    gains = []
    for site in study.SITES:
        pairs = zip(found["personal", site], found[f"alone_{site}", site], strict=True)
        gains.append(100 * statistics.fmean(own - alone for own, alone in pairs))
    return f"{min(gains):+.1f} to {max(gains):+.1f} points"


def audits() -> str:
    made = [json.loads(path.read_text()) for path in (STUDIES / "audit" / "records").glob("*.json")]
    bounds = [
        bound["epsilon_lower"] > one["audit"]["epsilon_claimed"]
        for one in made
        if one["bug"] is None
        for bound in one["audit"]["bounds"]
    ]
    bugs: dict[str, list[bool]] = {}
    for one in made:
        if one["bug"]:
            bugs.setdefault(one["bug"], []).append(one["audit"]["violated"])
    return f"{sum(bounds)} of {len(bounds)}; {sum(map(all, bugs.values()))} of {len(bugs)}"


def step() -> str:
    return f"{record('speed/records/step.json')['adapters']['all layers']['ratio_median']:.2f} times"


def real_round() -> str:
    return f"{record('deployment/records/round_cost_default.json')['median']['over_training']:.2f} s"


def student() -> str:
    made = record("cheaper/records/student2-seed0.json")
    found, whole = made["formats"]["onnx-int8"], made["original"]["bytes"]
    less, error = -100 * found["difference"], 100 * found["difference_error"]
    return f"{found['bytes'] / 1e6:.1f} of {whole / 1e6:.1f} MB; {less:.1f} ± {error:.1f} points less"


def serving() -> str:
    made = record("speed/records/serving.json")
    return f"{made['texts_a_second']['onnx-int8']:.0f} requests a second; {made['ratio_median']:.1f} times"


MEASURED: dict[str, Callable[..., str]] = {
    "fedtune run": default_job,
    "simulations/private_accuracy/study.py": many_classes,
    "simulations/first_federation/study.py": joining,
    "simulations/private_accuracy/personal/study.py": own_part,
    "simulations/audit/study.py": audits,
    "scripts/bench step": step,
    "simulations/deployment/round_cost.py default": real_round,
    "simulations/cheaper/study.py --run RUN_DIR": student,
    "scripts/bench serving": serving,
}


def test_every_claim_is_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails since a record was made anew, put its number into the table of README.md."""
    assert [again.strip("`") for _, _, again in CLAIMS] == list(MEASURED)
    for _, measured, again in CLAIMS:
        command = again.strip("`")
        made = MEASURED[command]
        assert measured == (made(monkeypatch) if made is own_part else made()), command
        if command.startswith(("simulations", "scripts")):
            assert (ROOT / command.split()[0]).is_file()
