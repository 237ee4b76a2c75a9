"""What is said of the package in several places agrees: version, extras, pins, the source archive."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet

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


def test_every_pin_takes_the_oldest_python_that_is_promised() -> None:
    """Debian 12 has 3.11.2: a pin that asks for 3.11.5 makes scripts/setup fail there."""
    (oldest,) = re.findall(r"[\d.]+", PROJECT["project"]["requires-python"])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    checked = 0
    for found in distributions():
        if found.version == pins.get(found.metadata["Name"].lower().replace("_", "-")):
            asked = found.metadata.get("Requires-Python") or ""
            assert SpecifierSet(asked).contains(f"{oldest}.0"), (found.metadata["Name"], asked)
            checked += 1
    assert checked > 20
