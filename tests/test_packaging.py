"""What is said of the package in several places agrees: version, extras, pins, the source archive."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml

import fedtune
from tests.support.pages import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _kustomization(side: str) -> Any:
    path = ROOT / "deploy" / "kubernetes" / side / "kustomization.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_the_same_wherever_it_stands() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    image = (ROOT / "deploy" / "serving" / "kubernetes" / "deployment.yaml").read_text(encoding="utf-8")
    service = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    found = {
        fedtune.__version__,
        PROJECT["project"]["version"],
        citation["version"],
        *re.findall(r"fedtune-serve:([\d.]+)", image),
        *(image["newTag"] for side in ("server", "node") for image in _kustomization(side)["images"]),
        *re.findall(r"(?:fedtune-serving:|detach v)([\d.]+\d)", service),
    }
    assert found == {fedtune.__version__}


def test_the_page_for_beginners_names_every_extra() -> None:
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    table = page[page.index("| extra |") : page.index("Completion of")]
    assert set(re.findall(r"`(\w+)`", table)) == set(PROJECT["project"]["optional-dependencies"])


def test_every_pin_is_one_version_and_stands_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines if not line.startswith("#")
    ]
    assert len(names) == len(set(names)) and all("==" in line for line in lines if not line.startswith("#"))


def test_a_source_archive_has_what_its_readers_need() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / path.lstrip("/")).exists() for path in included)
    assert {"/docs", "/examples", "/SECURITY.md", "/CITATION.cff", "/mkdocs.yml"} <= set(included)
