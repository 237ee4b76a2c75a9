"""What Docker would make of `.dockerignore` and a Dockerfile, for tests where there is no Docker."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

__all__ = ["instructions", "sent"]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, its words) of a Dockerfile, in order, without comments."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    parts = [line.split(None, 1) for line in joined]
    return [(name.upper(), words) for name, words in parts]


def sent(path: str, ignored: str) -> bool:
    """Whether the file `path` reaches Docker by the `.dockerignore` with the text `ignored`.

    By Docker's rules: the last pattern that matches the path, or a folder above it, decides.
    """
    whole = PurePosixPath(path)
    above = [str(whole), *(str(parent) for parent in whole.parents if str(parent) != ".")]
    goes = True
    for line in ignored.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        expression = _expression(pattern.removeprefix("!").strip("/"))
        if any(expression.fullmatch(one) for one in above):
            goes = pattern.startswith("!")
    return goes


def _expression(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern)
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(words.get(part) or (part if part[:1] == "[" else re.escape(part)) for part in parts)
    )
