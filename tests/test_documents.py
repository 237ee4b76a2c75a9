"""What README and docs/ show is run: every command and every block of Python, or the page says why not.

`tests/support/pages.py` says how a block is marked. The site itself is built by `test_the_site`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import fedtune
from fedtune.cli.app import command
from scripts.documents import GENERATED
from tests.support.pages import CODE, PAGES, ROOT, Block, Folder, blocks, commands

BLOCKS = [block for page in PAGES for block in blocks(page)]
MARKS = {"", "slow", "small", "settings only", "not run", "file", "output"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(*, slow: bool) -> list[Path]:
    return [page for page in PAGES if any(block.runs and block.slow == slow for block in blocks(page))]


# --- every block is run, or says why not -------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a fence does not end"
    marked = re.findall(r"-->\n```\w", text)
    assert len(marked) == sum(bool(block.mark) for block in blocks(page)), "a comment is no mark"
    for block in blocks(page):
        assert block.mark in MARKS, f"{block.where}: {block.mark!r}"
        assert block.language in (*CODE, "text", "yaml", "csv", "json"), f"{block.where}: name its language"
        assert (block.mark in ("file", "output")) <= (block.language not in CODE), block.where
        if block.mark in ("small", "settings only", "not run"):
            assert block.language in CODE and len(block.reason) > 8, f"{block.where}: say why it is not run"
        for cited in re.findall(r"\b(?:tests|scripts|docs)/[\w./-]+", block.reason):
            assert (ROOT / cited.rstrip(".")).exists(), f"{block.where}: there is no {cited}"


@pytest.fixture
def folder(
    tmp_path: Path,
    world: dict[str, Path],
    run_dir: Path,
    finished: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Folder:
    """Has what the pages speak of: a finished run RUN_DIR, a sweep `frontier`, test.csv and visits.csv."""
    place = tmp_path / "place"
    shutil.copytree(run_dir, place / "RUN_DIR")
    for number, made in enumerate((finished[0], run_dir)):
        shutil.copytree(made, place / "frontier" / str(number))
    shutil.copy(world["data"] / "test.csv", place / "test.csv")
    shutil.copy(ROOT / "examples" / "visits.csv", place / "visits.csv")
    monkeypatch.chdir(place)
    words = [
        *(f"model.name={world['model']}", "model.quantization=none", "federation.num_rounds=1", "device=cpu"),
        *("data=files", f"data.path={world['data']}", "data.name=made-up", "data.labels=[negative,positive]"),
        *("data.site=site", "data.test_split=test", "data.test_public=true", "data.declared_size=120"),
        *("data.max_length=16", "train.local_steps=1", "train.sample_rate=0.3"),
    ]
    run, sweep = fedtune.run, fedtune.sweep

    def small(patch: pytest.MonkeyPatch) -> None:
        def small_run(*settings: str, **options: Any) -> Any:
            return run(*settings, *words, progress=False, **options)

        def small_sweep(grid: Any, *overrides: str, **options: Any) -> Any:
            return sweep(grid, *overrides, *words, progress=False, **options)

        patch.setattr(fedtune, "run", small_run)
        patch.setattr(fedtune, "sweep", small_sweep)

    return Folder(place, monkeypatch, capsys, small)


@pytest.mark.parametrize("page", pages_with(slow=False), ids=name)
def test_what_a_page_shows_works(page: Path, folder: Folder) -> None:
    for block in blocks(page):
        if not block.slow:
            folder.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True), ids=name)
def test_what_a_page_shows_works_although_it_takes_long(page: Path, folder: Folder) -> None:
    for block in blocks(page):
        folder.run(block)


def test_a_command_that_fails_is_noticed(folder: Folder) -> None:
    block = Block(ROOT / "README.md", 1, "bash", "fedtune predict NOWHERE x\n", "", "")
    with pytest.raises(AssertionError, match=r"README\.md:1: fedtune predict NOWHERE x ended with 1"):
        folder.run(block)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.mark == "settings only"], ids=lambda block: block.where
)
def test_settings_that_are_shown_can_be_composed(block: Block) -> None:
    from fedtune.config.loader import load

    for words in commands(block.text):
        checked(words)
        overrides = [word for word in words[2:] if "=" in word]
        sweeps = "-m" in words or any(word.startswith("sweep=") for word in overrides)
        load(first_of_each(overrides) if sweeps else overrides)


def first_of_each(overrides: list[str]) -> list[str]:
    """The settings of one run of a sweep: of each range or list the first number."""
    kept = [word for word in overrides if not word.startswith(("sweep", "hydra"))]
    return [re.sub(r"=.*?([\d.]+).*", r"=\1", word) for word in kept]


# --- commands in the text --------------------------------------------------------------------------------


def inline(page: Path) -> list[str]:
    """Commands of fedtune in backticks, in running text."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`(fedtune [^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    for code in inline(page):
        checked(shlex.split(code))
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block.text):
                if words[0] == "fedtune":
                    checked(words)


def checked(words: list[str]) -> None:
    """The command and the options of a line exist, and so do settings that it names."""
    from fedtune.config.convert import settings
    from fedtune.config.pages import GROUPS

    found: click.Command = command()
    path, given = "fedtune", list(words[1:])
    while isinstance(found, click.Group) and given and not given[0].startswith("-"):
        if given[0] in ("COMMAND", "X"):
            return
        assert given[0] in found.commands, f"{shlex.join(words)}: there is no '{path} {given[0]}'"
        path, found = f"{path} {given[0]}", found.commands[given.pop(0)]
    options = {"--help", "-h", "--debug", *(opt for parameter in found.params for opt in parameter.opts)}
    for word in given:
        if word.startswith("-") and word != "-" and not re.match(r"-\d", word):
            assert word.partition("=")[0] in options, f"{shlex.join(words)}: {path} has no {word}"
    if path == "fedtune run":
        for word in given:
            setting, sign, _ = word.partition("=")
            if sign and not setting.startswith(("hydra", "sweep")):
                assert setting in settings() or setting in GROUPS, f"{shlex.join(words)}: no {setting}"


def all_commands(group: click.Group, path: str = "fedtune") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, groups too."""
    yield path, group
    for name, found in group.commands.items():
        if isinstance(found, click.Group):
            yield from all_commands(found, f"{path} {name}")
        else:
            yield f"{path} {name}", found


COMMANDS = dict(all_commands(command()))


@pytest.mark.parametrize("path", COMMANDS)
def test_the_help_of_each_command_has_an_example_and_the_way_on(path: str) -> None:
    text = COMMANDS[path].help or ""
    about, examples, then = re.split(r"^(?:Examples|Next):$", text, flags=re.MULTILINE)
    assert about.strip() and f"  {path} " in examples.replace("\n", " \n")
    shown = [line.replace(r"\[", "[") for line in f"{examples}\n{then}".splitlines()]
    typed = [re.split(r" {2,}", line.strip())[0] for line in shown if line.startswith("  fedtune ")]
    assert len(typed) > 1
    for line in typed:
        checked(shlex.split(line))


# --- what is generated -----------------------------------------------------------------------------------


def test_every_mark_has_a_maker_and_every_maker_a_mark() -> None:
    asked = {
        mark
        for page in PAGES
        for mark in re.findall(r"<!-- generated: ([\w. ]+) -->", page.read_text(encoding="utf-8"))
    }
    assert asked == set(GENERATED)


def test_the_file_that_is_shown_is_the_one_that_is_shipped() -> None:
    page = ROOT / "docs" / "own-data.md"
    (shown,) = [block.text for block in blocks(page) if block.reason == "the head of examples/visits.csv"]
    visits = (ROOT / "examples" / "visits.csv").read_text(encoding="utf-8")
    assert visits.startswith(shown) and shown.count("\n") > 3
