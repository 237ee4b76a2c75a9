"""The pages of `conf/`: which groups there are, which options each has, and what `fedtune run --help` says.

Nothing is written by hand a second time: options are the files in `conf/`, and what is said of a setting
stands in `fedtune/config/schema.py`. Without Hydra, because help and error messages need it fast.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedtune.config.convert import settings, value_text
from fedtune.config.schema import Config
from fedtune.errors import ConfigError

__all__ = ["GROUPS", "conf_dir", "default_options", "group_options", "groups_text", "settings_text"]

GROUPS = (
    "data",
    "partition",
    "model",
    "adapter",
    "privacy",
    "train",
    "federation",
    "engine",
    "pricing",
    "tracker",
    "experiment",
    "sweep",
)

_UNBROKEN = "\N{NO-BREAK SPACE}"  # in a range, which is not to be cut at the end of a line


@functools.cache
def conf_dir() -> Path:
    """The folder of Hydra groups: inside an installed wheel, or beside the package in a checkout.

    Raises `ConfigError` if neither is there (a broken installation).
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"fedtune's configuration folder is missing: neither {package / 'conf'} nor "
        f"{package.parent / 'conf'} holds a config.yaml. Install fedtune again."
    )


def group_options(group: str, extra_dirs: Sequence[Path] = ()) -> list[str]:
    """Names that `group=NAME` may take, from conf/ and from the folders a user adds."""
    names: set[str] = set()
    for root in (conf_dir(), *extra_dirs):
        folder = root / group
        names.update(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    return sorted(names)


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


def settings_text(defaults: Mapping[str, Any], width: int = 100, schema: type = Config) -> str:
    """One paragraph a setting: name=default, what it means, and which values it may have.

    Args:
        defaults: as nested dictionaries.
        width: of a line; on a narrow terminal, below 96, the meaning stands below the name.
        schema: whose settings they are.
    """
    lines = []
    beside = width >= 96
    for name, setting in settings(schema).items():
        group, _, last = name.rpartition(".")
        value = defaults[group][last] if group else defaults[last]
        head = f"  {name}={value_text(value)}"
        meaning = f"{setting.unit} {setting.description}" if setting.unit else setting.description
        parts = [meaning, " | ".join(setting.choices), setting.range.replace(" ", _UNBROKEN)]
        if setting.optional and value is not None and "null" not in setting.description:
            parts.append("may be null")
        said = "; ".join(part for part in parts if part)
        if beside:
            lines += textwrap.wrap(f"{head:<42}  {said}", width, subsequent_indent=" " * 46)
        else:
            lines += [head, *textwrap.wrap(said, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines).replace(_UNBROKEN, " ")
