"""Writes the commit that a wheel or sdist is built from into it (`fedtune/_commit`), where git knows one."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before a build."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the file. An sdist brings its own, and what is editable is the checkout itself."""
        if version == "editable" or not (Path(self.root) / ".git").exists():
            return
        try:
            head, changes = (
                subprocess.run(
                    ["git", "-C", self.root, *words], capture_output=True, text=True, check=True
                ).stdout.strip()
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
            )
        except (OSError, subprocess.SubprocessError):
            return
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "commit"
        file.write_text(f"{head}{' changed' if changes else ''}\n", encoding="ascii")
        build_data["force_include"][str(file)] = "fedtune/_commit"
