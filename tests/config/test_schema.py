"""The schema says of each setting what it may be and what it means; messages and checks follow from it."""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import schema
from fedtune.config.convert import build, check_value, nearest, settings, to_dict
from fedtune.config.schema import Config, Group, setting
from fedtune.errors import ConfigError
from tests.support.golden import Golden

NUMBERS = [one for one in settings().values() if one.kind in (int, float)]


def test_every_number_has_a_range() -> None:
    """A number without one would let a negative count through."""
    assert [one.name for one in NUMBERS if not one.range] == []


def test_every_setting_is_explained() -> None:
    assert [one.name for one in settings().values() if not one.description] == []


def test_defaults_are_allowed() -> None:
    assert build(Config, to_dict(Config()), "") == Config()


@pytest.mark.parametrize("name", sorted(settings()))
def test_what_is_never_allowed(name: str) -> None:
    wrong: list[Any] = [math.nan, math.inf, -math.inf, {}, [[]], [None], object()]
    known = settings()[name]
    wrong += [True] if known.kind is not bool else [0, 1, "true"]
    wrong += [None] if not known.optional else []
    wrong += ["1", ""] if known.kind is not str else [1.5]
    wrong += ["?"] if known.choices else []
    wrong += ["abc"] if known.kind is list else [["a"]]
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            check_value(name, value)
        assert caught.value.setting == name and str(caught.value).startswith(name)
        assert "\n" not in str(caught.value)


@dataclass
class Edges(Group):
    """Every kind of bound."""

    rate: float = setting(0.5, "", gt=0, le=1)
    share: float = setting(0.5, "", gt=0, lt=1)
    momentum: float = setting(0.5, "", ge=0, lt=1)
    count: int | None = setting(None, "", ge=1)
    scale: float = setting(1.0, "", gt=0)


@pytest.mark.parametrize(
    ("name", "inside", "outside", "words"),
    [
        ("rate", (1e-9, 1), (0, 1 + 1e-9), "a finite number that is in (0, 1]"),
        ("share", (1e-9, 1 - 1e-9), (0, 1), "a finite number that is in (0, 1)"),
        ("momentum", (0, 1 - 1e-9), (-1e-9, 1), "a finite number that is in [0, 1)"),
        ("count", (1, 2**60, None), (0, -1), "a whole number that is 1 or more or null"),
        ("scale", (1e-300, 1e300), (0, math.inf, math.nan), "a finite number that is above 0"),
    ],
)
def test_edges_of_ranges(name: str, inside: tuple[Any, ...], outside: tuple[Any, ...], words: str) -> None:
    assert settings(Edges)[name].allowed == words
    for value in inside:
        assert getattr(build(Edges, {name: value}, ""), name) == value
    for value in outside:
        with pytest.raises(ConfigError) as caught:
            build(Edges, {name: value}, "a test")
        assert caught.value.setting == name
        assert f" in a test is not allowed: it must be {words}." in str(caught.value)


def test_message_has_value_and_way_out(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        check_value("train.sample_rate", 1.5)
    assert raised.value.setting == "train.sample_rate"
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        check_value("model.quantization", "int4")
    assert "int8" in str(raised.value)
    assert "nf4" in str(raised.value)
    assert "model.quantization=int8" in str(raised.value)
    golden(raised)


def test_a_column_may_be_called_0() -> None:
    assert check_value("data.text", 0) == "0"
    assert check_value("data.labels", (0, "x")) == ["0", "x"]


def test_a_number_arrives_as_its_type() -> None:
    assert type(check_value("privacy.epsilon", 3)) is float


def test_all_that_is_misspelt_is_named_before_values(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        build(Edges, {"rate": 7, "cuont": 1}, "a test")
    assert "'cuont'" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        build(Edges, [], "a test")
    golden(raised)


def test_nearest() -> None:
    names = ["privacy.epsilon", "privacy.delta", "data.name", "model.name"]
    assert nearest("epsilon", names) == "privacy.epsilon"
    assert nearest("PRIVACY.EPSILON", names) == "privacy.epsilon"
    assert nearest("privcy.delta", names) == "privacy.delta"
    assert nearest("delt", names) == "privacy.delta"
    assert nearest("xyzzy", names) is None


def test_a_schema_has_no_field_that_is_no_setting() -> None:
    groups = {item.name for item in dataclasses.fields(Config)} - set(settings())
    assert groups == {name.partition(".")[0] for name in settings() if "." in name}


def changes(source: str) -> list[int]:
    """Lines that assign to a setting of something that is called a configuration."""
    groups = {item.name for item in dataclasses.fields(Config)} - set(settings())
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            words = ast.unparse(node).split(".")
            if words[-2] == "config" or (len(words) > 2 and words[-2] in groups):
                found.append(node.lineno)
    return sorted(found)


@pytest.mark.slow
def test_nothing_in_the_package_changes_a_config() -> None:
    """A configuration is made once; whoever needs another makes one, by dataclasses.replace."""
    found = {
        path.name: changes(path.read_text(encoding="utf-8"))
        for path in Path(schema.__file__).parents[1].rglob("*.py")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert changes("config.output = 1\nconfig.engine.name, x = 1, 2\njob.config.seed = 3") == [1, 2, 3]
