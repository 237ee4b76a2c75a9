"""The groups of `conf/`: which there are, and which options each offers.

Pure file listing, without Hydra, because `fedtune run --help` and error messages need it fast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from fedtune.errors import ConfigError

__all__ = ["GROUPS", "conf_dir", "group_options"]

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
