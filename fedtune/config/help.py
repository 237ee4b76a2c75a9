"""The text of `fedtune run --help`: groups with their options, and every setting with its default.

Nothing here is written by hand a second time: options are the files in `conf/`, defaults are composed
from them, and meanings are the comments in `fedtune/config/schema.py`.
"""

from __future__ import annotations

import functools
import inspect
import io
import textwrap
import tokenize

import yaml

from fedtune.config import schema
from fedtune.config.convert import settings, to_dict
from fedtune.config.groups import GROUPS, conf_dir, group_options
from fedtune.config.values import RULES, Choice

__all__ = ["default_options", "groups_text", "meanings", "settings_text"]


@functools.cache
def meanings() -> dict[str, str]:
    """The comment beside each setting in the schema, by dotted name; empty where there is none."""
    comments: dict[tuple[str, str], str] = {}
    schema_class, name = "", ""
    source = inspect.getsource(schema)
    previous = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            if previous == "class":
                schema_class = token.string
            elif token.start[1] == 4:
                name = token.string
        elif token.type == tokenize.COMMENT and token.line.startswith(f"    {name}:"):
            comments[schema_class, name] = token.string.lstrip("# ").replace("None: ", "null: ")
        previous = token.string
    found = {}
    for setting in settings():
        group, _, last = setting.rpartition(".")
        owner = f"{group.capitalize()}Config" if group else "Config"
        found[setting] = comments.get((owner, last), "")
    return found


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
        head = f"  {name}={_shown(value)}"
        meaning, rule = meanings()[name], RULES.get(name)
        parts = [meaning] if meaning else []
        if setting.optional and value is not None and "null" not in meaning:
            parts.append("may be null")
        # Where the comment lists the words already there is nothing to add.
        if rule is not None and not (isinstance(rule, Choice) and " | ".join(rule.options) in meaning):
            parts.append(rule.describe())
        text = f"{head:<44}" + ("; ".join(parts) if parts else "")
        lines += textwrap.wrap(text.rstrip(), width, subsequent_indent=" " * 46, drop_whitespace=True)
    return "\n".join(lines)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return f"'{text}'" if " " in text or not text else text
