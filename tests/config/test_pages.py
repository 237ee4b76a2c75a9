"""`fedtune run --help` lists every group, option and setting, with the defaults of a real run."""

from __future__ import annotations

import pytest

from fedtune.config.convert import from_dict, settings, value_text
from fedtune.config.loader import defaults, load
from fedtune.config.pages import GROUPS, default_options, group_options, groups_text, settings_text


def test_groups_and_options() -> None:
    text = groups_text()
    for group in GROUPS:
        assert f"  {group}" in text
        for option in group_options(group):
            assert option in text
    assert "*minilm" in text and "*opinions" in text and "*local" in text


@pytest.mark.slow
def test_marked_defaults_are_the_defaults() -> None:
    chosen = [f"{group}={name}" for group, name in default_options().items() if name is not None]
    assert set(default_options()) == set(GROUPS)
    assert load(chosen) == load() == from_dict(defaults())


def test_no_line_is_wider_than_the_terminal() -> None:
    """At 80 columns the meaning stands below the name, and no range is cut in two."""
    text = settings_text(defaults(), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(
        line.count("(") + line.count("[") == line.count(")") + line.count("]")
        for line in text.splitlines()
        if " in (" in line or " in [" in line
    )
    assert "\n  privacy.epsilon=8\n      target" in text
    assert max(len(line) for line in settings_text(defaults(), width=100).splitlines()) > 80


def test_settings_with_defaults() -> None:
    text = settings_text(defaults(), width=1000)
    lines = {line.strip().split("=")[0]: line for line in text.splitlines()}
    assert set(lines) == set(settings())
    config = load()
    assert f"privacy.epsilon={value_text(config.privacy.epsilon)}" in lines["privacy.epsilon"]
    assert "in (0, 1]" in lines["train.sample_rate"]
    assert "local | distributed | central | none" in lines["privacy.trust"]
