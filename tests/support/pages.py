"""The fenced blocks of README and docs/, and a folder in which they run as typed.

What a page shows is marked in its source, by a comment on the line above the fence:

    (nothing)                       run it: commands one after another, Python as one program
    <!-- slow -->                   the same, in the slow tests
    <!-- small: REASON -->          Python in which `fedtune.run` and `fedtune.sweep` mean a tiny one; slow
    <!-- settings only: REASON -->  commands are read and settings composed; nothing trains
    <!-- not run: REASON -->        neither
    <!-- file: NAME -->             no code: what the file NAME holds in the folder
    <!-- output: REASON -->         no code: what is printed. Held to that by `of the command above`;
                                    the first words of its lines by `like that of ...`

Blocks of `bash` and `python` are code. `text`, `yaml`, `csv` and `json` are not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["CODE", "PAGES", "ROOT", "Block", "Folder", "blocks", "commands"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
CODE = ("bash", "python")
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+?)(?:: (?P<reason>[^>]*?))? -->\n)?"
    r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: of which page, from which line on, in which language, what it says, and its mark."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    reason: str

    @property
    def where(self) -> str:
        """For a person."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is code that a test runs."""
        return self.language in CODE and self.mark in ("", "slow", "small")

    @property
    def slow(self) -> bool:
        """Whether that takes long."""
        return self.mark in ("slow", "small")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["mark"] or "",
            found["reason"] or "",
        )
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block, in words; lines that end in a backslash are joined, comments are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@dataclass
class Folder:
    """Where the blocks of one page run, one after another: a folder, and the names that Python has so far."""

    path: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    small: Callable[[pytest.MonkeyPatch], None]
    names: dict[str, Any] = field(default_factory=dict)
    printed: str = ""

    def run(self, block: Block) -> None:
        """Runs a block, or writes its file; what is printed is kept.

        Raises:
            AssertionError: a command ended with another status than 0; it says where and what was printed.
        """
        if block.mark == "file":
            (self.path / block.reason).write_text(block.text, encoding="utf-8")
        elif block.mark == "output" and block.reason == "of the command above":
            assert block.text.strip() == self.printed.strip(), block.where
        elif block.mark == "output" and block.reason == "like that of the command above":
            shown, real = (
                [line.split()[0] for line in text.splitlines() if line.split()]
                for text in (block.text, self.printed)
            )
            assert shown == real, f"{block.where}: lines begin with {real}"
        elif block.runs and block.language == "bash":
            self.printed = ""
            for words in commands(block.text):
                self._command(words, block.where)
        elif block.runs:
            with self.monkeypatch.context() as patch:
                if block.mark == "small":
                    self.small(patch)
                exec(compile(block.text, block.where, "exec"), self.names)

    def _command(self, words: list[str], where: str) -> None:
        if words[0] == "cd":
            self.monkeypatch.chdir(words[1])
            return
        words, source, target = _streams(words)
        with contextlib.ExitStack() as stack, self.monkeypatch.context() as patch:
            if source is not None:
                patch.setattr(sys, "stdin", stack.enter_context(Path(source).open(encoding="utf-8")))
            self.capture.readouterr()
            status = _fedtune(words[1:]) if words[0] == "fedtune" else _other(words)
            said, complaint = self.capture.readouterr()
        assert status == 0, f"{where}: {shlex.join(words)} ended with {status}\n{said}\n{complaint}"
        if target is not None:
            Path(target).write_text(said, encoding="utf-8")
        self.printed += said


def _streams(words: list[str]) -> tuple[list[str], str | None, str | None]:
    """Words without `< FILE` and `> FILE`, and the two files."""
    found: dict[str, str | None] = {"<": None, ">": None}
    for sign in found:
        if sign in words:
            at = words.index(sign)
            found[sign] = words[at + 1]
            words = words[:at] + words[at + 2 :]
    return words, found["<"], found[">"]


def _fedtune(words: list[str]) -> int:
    from fedtune.cli.app import main

    try:
        main(words)
    except SystemExit as left:
        return int(left.code or 0)


def _other(words: list[str]) -> int:
    """A command that is not fedtune's; `python` is the one that runs this."""
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ.copy())
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode
