"""Issue 10, item 3: the server keeps the head of each site's books, and refuses one that went back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.cli.app import main
from fedtune.deploy.admission import BookHeads
from fedtune.errors import ConfigError


def head(row: int, line: int, mark: str = "a", other: str = "b") -> str:
    return f"L{row}-{mark * 24}.A{line}-{other * 24}"


def test_heads_that_grow_or_stay_are_kept(tmp_path: Path) -> None:
    heads = BookHeads(tmp_path)
    for one in (head(3, 2), head(3, 2), head(5, 4, "c", "d"), head(5, 6, "c", "e")):
        heads.note("clinic-1", one)
        assert heads.kept("clinic-1") == one and heads.refusal("clinic-1") is None
    assert heads.kept("clinic-2") is None and heads.refusal("clinic-2") is None
    assert (tmp_path / "heads.json").stat().st_mode & 0o077 == 0
    assert BookHeads(tmp_path).kept("clinic-1") == head(5, 6, "c", "e"), "it outlives the server"


@pytest.mark.parametrize(
    "lower",
    [head(4, 6, "c", "e"), head(5, 5, "c", "e"), head(5, 6, "x", "e"), head(5, 6, "c", "x"), head(9, 1)],
)
def test_a_head_that_went_back_or_is_another_is_refused_until_the_books_are_restored(
    tmp_path: Path, lower: str
) -> None:
    lower = lower.replace("x", "0")
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", head(5, 6, "c", "e"))
    heads.note("clinic-1", lower)
    assert heads.kept("clinic-1") == head(5, 6, "c", "e")
    for one in (heads, BookHeads(tmp_path)):
        said = str(one.refusal("clinic-1"))
        assert lower in said and head(5, 6, "c", "e") in said and "--accept-restore clinic-1" in said
    heads.note("clinic-1", head(6, 7, "c", "e"))  # the newest copy was found
    assert heads.refusal("clinic-1") is None


def test_a_restore_that_is_meant_is_acknowledged_by_the_operator_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", head(5, 6))
    with pytest.raises(ConfigError, match="did not go back"):
        heads.accept("clinic-1")
    heads.note("clinic-1", head(2, 3))
    with pytest.raises(SystemExit) as done:
        main(["server", str(tmp_path), "--accept-restore", "clinic-1"])
    assert not done.value.code and "noted in heads.log" in capsys.readouterr().out
    (line,) = (tmp_path / "heads.log").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["site"], noted["kept"], noted["accepted"]) == ("clinic-1", head(5, 6), head(2, 3))
    heads.reload()  # the server that runs
    assert heads.refusal("clinic-1") is None and heads.kept("clinic-1") == head(2, 3)


def test_a_broken_file_of_heads_is_named_and_nonsense_from_a_site_is_not_kept(tmp_path: Path) -> None:
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", "L1-zz")
    assert heads.kept("clinic-1") is None and not (tmp_path / "heads.json").exists()
    for content in ("", "[]", '{"clinic-1": {"head": "no"}}'):
        (tmp_path / "heads.json").write_text(content)
        with pytest.raises(ConfigError, match="heads.json cannot be read"):
            BookHeads(tmp_path)
