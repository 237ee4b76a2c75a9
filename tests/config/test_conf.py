"""Every page of conf/ composes, by itself and by the command that its first comment gives."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.config import Config, compression
from fedtune.config.choices import resolved
from fedtune.config.convert import to_dict
from fedtune.config.loader import load
from fedtune.config.pages import GROUPS, conf_dir, group_options

PAGES = [(group, name) for group in GROUPS for name in group_options(group)]
IDS = ["=".join(pair) for pair in PAGES]


def page(group: str, name: str) -> Path:
    return conf_dir() / group / f"{name}.yaml"


def first_comment(path: Path) -> list[str]:
    """The lines of a page's first comment, without their '#': its command, then what it is."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].strip())
    return lines


def test_every_group_has_pages() -> None:
    assert {group for group, _ in PAGES} == set(GROUPS)
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert folders == {*GROUPS, compression.GROUP}  # that one is for 'fedtune compress'


@pytest.mark.parametrize("name", group_options(compression.GROUP))
def test_a_page_of_a_compression_is_what_its_command_does_and_repeats_no_default(name: str) -> None:
    path = page(compression.GROUP, name)
    command = shlex.split(first_comment(path)[0])
    assert command[:3] == ["fedtune", "compress", "RUN_DIR"]
    assert command[3:] == ([] if name == compression.PAGE else [f"compress={name}"])
    assert compression.load(command[3:]) == compression.load([f"compress={name}"])
    assert compression.load(command[3:]) != compression.Compression()
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert repeated(values, to_dict(compression.Compression())) == []


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


def repeated(values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Settings that a page gives the value that they have anyway."""
    return [
        name
        for key, value in values.items()
        for name in (
            [f"{key}.{below}" for below in repeated(value, defaults[key])]
            if isinstance(value, dict) and isinstance(defaults.get(key), dict)
            else [key] * (key in defaults and type(value) is type(defaults[key]) and value == defaults[key])
        )
    ]


@pytest.mark.parametrize(("group", "name"), PAGES, ids=IDS)
def test_page_repeats_no_default(group: str, name: str) -> None:
    text = page(group, name).read_text(encoding="utf-8")
    values = yaml.safe_load(text) or {}
    inside = text.startswith("# @package _global_")
    assert repeated(values if inside else {group: values}, to_dict(Config())) == []


def test_the_test_of_repeated_defaults_can_fail() -> None:
    assert repeated({"train": {"compute": "standard", "momentum": 0.1}, "seed": 0}, to_dict(Config())) == [
        "train.compute",
        "seed",
    ]


def test_schema_defaults_are_those_of_conf() -> None:
    """Two sources of one default would let a partial JSON mean something else than the command line."""
    composed = load()
    # What `auto` and the recipe make of it follows from the data, which is another one in conf/.
    schema = resolved(dataclasses.replace(Config(), data=composed.data))
    composed_values, schema_values = to_dict(composed), to_dict(schema)
    # A price has no default worth writing into code, and data is private until a page says that it is public.
    for group in ("data", "pricing"):
        composed_values.pop(group), schema_values.pop(group)
    assert composed_values == schema_values


@pytest.mark.slow
def test_prices_say_where_and_when() -> None:
    for name in group_options("pricing"):
        pricing = load([f"pricing={name}"]).pricing
        assert pricing.name == name
        assert pricing.currency and pricing.source
        assert len(pricing.date) == len("2026-11-21")


@pytest.mark.slow
def test_page_names_are_what_they_set() -> None:
    for group in ("adapter", "partition", "engine"):
        for name in set(group_options(group)) - {"auto"}:
            assert to_dict(load([f"{group}={name}"]))[group]["name"] == name
