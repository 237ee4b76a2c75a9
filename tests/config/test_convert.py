"""Dictionaries and JSON to Config and back: equal after the round trip, strict on the way in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.config.choices import resolved
from fedtune.config.convert import config_from_json, from_dict, read_yaml, settings, to_dict, to_json
from fedtune.errors import ConfigError


def test_round_trip() -> None:
    config = Config()
    config.data.labels = ["a", "ü"]
    config.privacy.delta = 1e-5
    text = to_json(config)
    assert "\n" not in text
    assert config_from_json(text) == resolved(config)
    assert from_dict(to_dict(config)) == resolved(config)
    assert config_from_json(to_json(resolved(config))) == resolved(config)


@given(
    epsilon=st.floats(min_value=1e-6, max_value=1e6),
    seed=st.integers(0, 2**32 - 1),
    name=st.text(min_size=1).filter(lambda text: text.strip() != ""),
)
def test_round_trip_of_any_value(epsilon: float, seed: int, name: str) -> None:
    config = Config(seed=seed)
    config.privacy.epsilon = epsilon
    config.data.name = name
    assert config_from_json(to_json(config)) == resolved(config)


def test_left_out_keys_take_defaults() -> None:
    assert config_from_json('{"seed": 3}') == resolved(Config(seed=3))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"sed": 3}',
        '{"privacy": {"epsilom": 3}}',
        '{"privacy": 3}',
        '{"privacy": null}',
        '{"seed": true}',
        '{"seed": 1.0}',
        '{"seed": "1"}',
        '{"seed": null}',
        '{"privacy": {"epsilon": NaN}}',
        '{"privacy": {"epsilon": Infinity}}',
        '{"privacy": {"epsilon": "2"}}',
        '{"privacy": {"epsilon": true}}',
        '{"privacy": {"reproducible_noise": 1}}',
        '{"data": {"labels": "ab"}}',
        '{"data": {"labels": [1.5]}}',
        '{"data": {"name": true}}',
        '{"train": {"sample_rate": 2}}',
        '{"privacy": {"trust": "none"}}',
        '{"seed": 1, "seed": 2}',
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_json(text)
    assert "\n" not in str(caught.value)


def test_json_never_carries_what_json_lacks() -> None:
    config = Config()
    config.privacy.max_grad_norm = float("inf")
    with pytest.raises(ValueError, match="JSON"):
        to_json(config)


def test_settings_cover_the_schema() -> None:
    def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in values.items()
            for name in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
        ]

    assert list(settings()) == leaves(json.loads(to_json(Config())))
    assert settings()["data.labels"].kind is list and settings()["data.labels"].optional
    assert settings()["privacy.epsilon"].kind is float
    assert settings()["seed"].kind is int and not settings()["seed"].optional


@pytest.mark.parametrize(
    "text",
    [
        *["seed: !!map 3", "seed: !!set 3", "data: !!map [1]", "seed: 1\nseed: 2", "? [a]"],
        *["data:\n  labels: &a [*a]", "data: &a {labels: *a}", "seed: " + 3000 * "["],
    ],
)
def test_yaml_that_is_no_settings(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "file.yaml")
