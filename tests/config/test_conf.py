"""Every page of conf/ composes, by itself and by the command that its first comment gives."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fedtune.config import Config
from fedtune.config.convert import to_dict
from fedtune.config.groups import GROUPS, conf_dir, first_comment, group_options
from fedtune.config.loader import load

PAGES = [(group, name) for group in GROUPS for name in group_options(group)]
IDS = ["=".join(pair) for pair in PAGES]
# Only what is overridden belongs on experiment and sweep pages; the others are complete.
COMPLETE = [pair for pair in PAGES if pair[0] not in ("experiment", "sweep")]


def page(group: str, name: str) -> Path:
    return conf_dir() / group / f"{name}.yaml"


def test_every_group_has_pages() -> None:
    assert {group for group, _ in PAGES} == set(GROUPS)
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert folders == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), PAGES, ids=IDS)
def test_page_composes_alone_and_by_the_command_of_its_first_comment(group: str, name: str) -> None:
    command = shlex.split(first_comment(page(group, name))[0])
    assert command[:2] == ["fedtune", "run"], command
    assert f"{group}={name}" in command[2:]
    # A sweep's own options, and what a search is asked to choose, are not settings of one run.
    words = [word for word in command[2:] if not word.startswith("sweep.") and "interval(" not in word]
    assert isinstance(load(words), Config)
    if command[2:] != [f"{group}={name}"]:
        load([f"{group}={name}"])


@pytest.mark.parametrize(("group", "name"), COMPLETE, ids=["=".join(pair) for pair in COMPLETE])
def test_page_is_complete(group: str, name: str) -> None:
    import yaml

    written = set(yaml.safe_load(page(group, name).read_text(encoding="utf-8")))
    wanted = set(to_dict(Config())[group])
    assert written == wanted, f"missing {wanted - written}, unknown {written - wanted}"


def test_schema_defaults_are_those_of_conf() -> None:
    """Two sources of one default would let a partial JSON mean something else than the command line."""
    composed, schema = to_dict(load()), to_dict(Config())
    # A price has no default worth writing into code, and data is private until a page says that it is public.
    for group in ("data", "pricing"):
        composed.pop(group), schema.pop(group)
    # What `auto` becomes follows from the data, which is another one here.
    assert (composed["privacy"]["unit"], composed["federation"]["evaluation"]) == ("person", "public")
    assert (schema["privacy"]["unit"], schema["federation"]["evaluation"]) == ("auto", "auto")
    for values in (composed, schema):
        values["privacy"].pop("unit"), values["federation"].pop("evaluation")
    assert composed == schema


def test_prices_say_where_and_when() -> None:
    for name in group_options("pricing"):
        pricing = load([f"pricing={name}"]).pricing
        assert pricing.name == name
        assert pricing.currency and pricing.source
        assert len(pricing.date) == len("2026-11-21")


def test_page_names_are_what_they_set() -> None:
    for group in ("adapter", "partition", "engine"):
        for name in group_options(group):
            assert to_dict(load([f"{group}={name}"]))[group]["name"] == name
