"""The text of `fedtune run --help`: groups with their options, and every setting with its default.

Nothing here is written by hand a second time: options are the files in `conf/`, defaults are composed
from them, and what is said of a setting stands in `fedtune/config/schema.py`.
"""

from __future__ import annotations

import textwrap

import yaml

from fedtune.config.convert import as_written, settings, to_dict
from fedtune.config.groups import GROUPS, conf_dir, group_options

__all__ = ["default_options", "groups_text", "settings_text"]


def default_options() -> dict[str, str | None]:
    """Which option of each group is used if none is named, from the defaults of `conf/config.yaml`."""
    page = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    chosen: dict[str, str | None] = {}
    for entry in page["defaults"]:
        if isinstance(entry, dict):
            chosen.update({key: value for key, value in entry.items() if key in GROUPS})
    return chosen


def groups_text(width: int = 100) -> str:
    """One paragraph a group: its options, the default marked with a star."""
    chosen = default_options()
    lines = []
    for group in GROUPS:
        options = [f"*{name}" if name == chosen[group] else name for name in group_options(group)]
        lines += textwrap.wrap(
            " ".join(options), width, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14
        )
    return "\n".join(lines)


def settings_text(width: int = 100) -> str:
    """One paragraph a setting: name=default, what it means, and which values it may have."""
    from fedtune.config.loader import load

    defaults = to_dict(load())
    lines = []
    for name, setting in settings().items():
        group, _, last = name.rpartition(".")
        value = defaults[group][last] if group else defaults[last]
        head = f"  {name}={as_written(value)}"
        meaning = f"{setting.unit} {setting.description}" if setting.unit else setting.description
        parts = [meaning, " | ".join(setting.choices), setting.range]
        if setting.optional and value is not None and "null" not in setting.description:
            parts.append("may be null")
        text = f"{head:<42}  " + "; ".join(part for part in parts if part)
        lines += textwrap.wrap(text, width, subsequent_indent=" " * 46)
    return "\n".join(lines)
