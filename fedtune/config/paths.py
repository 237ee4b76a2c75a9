"""Where fedtune keeps what outlives a run: privacy ledgers (state) and what can be made again (cache).

`FEDTUNE_HOME` puts both below one folder (`$FEDTUNE_HOME/state`, `$FEDTUNE_HOME/cache`); without it
they are the platform's own user folders. The two are apart because a cache may be deleted at any
time, while deleting a ledger deletes what is known about privacy already spent.

Nothing is made at import, and run folders are not here: those are the user's, named by `hydra.run.dir`.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from fedtune.errors import ResourceError

__all__ = ["cache_dir", "state_dir"]


def state_dir() -> Path:
    """Folder of what must not be lost (ledgers); made, readable by its owner only, if it is missing.

    Raises `ResourceError` if it cannot be made or is no folder.
    """
    return _folder("state", platformdirs.user_state_dir("fedtune", appauthor=False))


def cache_dir() -> Path:
    """Folder of what can be made again (data, tokens, calibrations); made if it is missing.

    Raises `ResourceError` if it cannot be made or is no folder.
    """
    return _folder("cache", platformdirs.user_cache_dir("fedtune", appauthor=False))


def _folder(kind: str, default: str) -> Path:
    home = os.environ.get("FEDTUNE_HOME", "").strip()
    path = Path(home).expanduser().absolute() / kind if home else Path(default)
    try:
        # Others on the machine have no business in ledgers or in cached private texts.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        whose = f"FEDTUNE_HOME={home}" if home else "the platform's default"
        raise ResourceError(
            f"The {kind} folder {path} ({whose}) cannot be made: {error.strerror or error}. "
            "Set FEDTUNE_HOME to a folder that you may write to."
        ) from error
    return path
