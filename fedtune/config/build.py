"""Which fedtune this is: its version, and the commit that it was built from.

Two builds of one version are told apart by their commits, where a version is what a person has heard of. A
wheel has its commit in `fedtune/_commit` (`hatch_build.py` writes it); a checkout asks git.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from fedtune import __version__

__all__ = ["build", "commit"]

_PACKAGE = Path(__file__).resolve().parents[1]


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether files were changed since) of fedtune's code; (None, None) where nobody knows."""
    folder = _PACKAGE.parent
    if (folder / ".git").exists():
        head = _git(folder, "rev-parse", "HEAD")
        if head is None:
            return None, None
        changes = _git(folder, "status", "--porcelain")
        return head.strip(), None if changes is None else bool(changes.strip())
    try:
        head, _, changed = (_PACKAGE / "_commit").read_text(encoding="ascii").strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return None, None
    return head, changed == "changed"


@functools.cache
def build() -> str:
    """Version and commit in one word, such as `0.2.0+1a2b3c4d5e6f`; the version where no commit is known."""
    head, _ = commit()
    return __version__ if head is None else f"{__version__}+{head[:12]}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        # --no-optional-locks: reading the state must not disturb a git command that runs beside it.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
