"""The table of allowed values names real settings, allows their defaults and agrees with the comments."""

from __future__ import annotations

import math

import pytest

from fedtune.config.convert import settings
from fedtune.config.help import meanings
from fedtune.config.values import RULES, Choice, Range, check_value, nearest
from fedtune.errors import ConfigError


def test_rules_are_about_settings() -> None:
    assert set(RULES) <= set(settings())


def test_every_number_has_a_rule() -> None:
    """A number without a range would let NaN or a negative count through."""
    numbers = {name for name, setting in settings().items() if setting.kind in (int, float)}
    assert numbers <= set(RULES)


@pytest.mark.parametrize("name", sorted(RULES))
def test_default_is_allowed(name: str) -> None:
    default = settings()[name].default
    if default is not None:
        check_value(name, default)


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if isinstance(rule, Choice)))
def test_comment_lists_the_words(name: str) -> None:
    rule = RULES[name]
    assert isinstance(rule, Choice)
    assert " | ".join(rule.options) in meanings()[name]


def test_range_edges() -> None:
    rate = Range(0, 1, low_included=False)
    assert [rate.contains(x) for x in (0, 1e-9, 1, 1 + 1e-9)] == [False, True, True, False]
    assert not Range(0).contains(math.inf) and not Range(0).contains(math.nan)
    assert Range(0).contains(0) and not Range(0, low_included=False).contains(0)
    assert Range(0, 1, high_included=False).describe() == "in [0, 1)"


def test_message_has_value_and_way_out() -> None:
    with pytest.raises(ConfigError, match=r"train\.sample_rate=1\.5 .* in \(0, 1\]"):
        check_value("train.sample_rate", 1.5)
    with pytest.raises(ConfigError, match=r"one of none, int8, nf4\. Did you mean model\.quantization=int8"):
        check_value("model.quantization", "int4")


def test_nearest() -> None:
    names = ["privacy.epsilon", "privacy.delta", "data.name", "model.name"]
    assert nearest("epsilon", names) == "privacy.epsilon"
    assert nearest("PRIVACY.EPSILON", names) == "privacy.epsilon"
    assert nearest("privcy.delta", names) == "privacy.delta"
    assert nearest("delt", names) == "privacy.delta"
    assert nearest("xyzzy", names) is None
