"""Files that other programs read: each YAML names no key twice, and GitHub takes the forms for issues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pages import ROOT

FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
ELEMENTS = {  # of GitHub's forms: the attributes that each may have
    "markdown": {"value"},
    "input": {"label", "description", "placeholder", "value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
}


class Strict(yaml.SafeLoader):
    """As Docker Compose, Kubernetes and GitHub read a mapping: a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"{sorted(twice)} twice, from line {node.start_mark.line + 1}"
        return super().construct_mapping(node, deep)


def _yaml_files() -> list[Path]:
    found = [*ROOT.glob("*.y*ml"), *ROOT.glob("*.cff")]
    for folder in (".github", "conf", "deploy", "examples"):
        found += (ROOT / folder).rglob("*.y*ml")
    return sorted(found)


@pytest.mark.parametrize("path", _yaml_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_yaml_names_a_key_twice(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("!!python/name:", "")  # mkdocs.yml: a function's name
    list(yaml.load_all(text, Strict))


def test_a_key_that_stands_twice_is_found() -> None:
    shared = "base: &base {a: 1}\none: {<<: *base, a: 2}\n"
    assert yaml.load(shared, Strict)["one"] == {"a": 2}
    with pytest.raises(AssertionError, match="'a'.* twice, from line 2"):
        yaml.load("one:\n  a: 1\n  a: 2\n", Strict)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_github_takes_and_nothing_else(path: Path) -> None:
    form = yaml.load(path.read_text(encoding="utf-8"), Strict)
    assert set(form) == {"name", "description", "labels", "body"}
    asked = [one for one in form["body"] if one["type"] != "markdown"]
    assert asked and len({one["id"] for one in asked}) == len(asked)
    for one in form["body"]:
        assert set(one) <= {"type", "id", "attributes", "validations"}
        assert set(one["attributes"]) <= ELEMENTS[one["type"]], one
        assert all(isinstance(text, str) and text for text in one["attributes"].values())
        assert one["type"] == "markdown" or one["validations"] == {"required": True}
