"""A damaged database of the server says what to do."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from fedtune.deploy import join
from fedtune.deploy.admission import Admission
from fedtune.deploy.database import NAME, check_database
from fedtune.deploy.flower import superlink_app
from fedtune.deploy.operators import Operators
from fedtune.deploy.provision import read_token
from fedtune.deploy.server import run_server
from fedtune.deploy.trail import Trail
from fedtune.errors import ResourceError
from tests.support.golden import Golden
from tests.support.real_superlink import SITES, Real


def made(folder: Path) -> Path:
    path = folder / NAME
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE node (name TEXT)")
        connection.executemany("INSERT INTO node VALUES (?)", [(f"clinic-{i}" * 40,) for i in range(200)])
        connection.commit()
    return path


def test_none_and_a_whole_one_are_fine(tmp_path: Path) -> None:
    check_database(tmp_path)
    assert not (tmp_path / NAME).exists()
    made(tmp_path)
    check_database(tmp_path)


@pytest.mark.parametrize("how", ["a page of noise", "another file", "cut"])
def test_a_damaged_one_says_what_to_do(how: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    content = path.read_bytes()
    noise = bytes(range(256)) * 16
    path.write_bytes(
        {
            "a page of noise": content[:8192] + noise + content[8192 + len(noise) :],
            "another file": noise,
            "cut": content[: len(content) // 2],
        }[how]
    )
    with pytest.raises(ResourceError, match=r"is damaged .*Move superlink.sqlite\* away and start"):
        check_database(tmp_path)


@pytest.mark.slow
def test_a_server_does_not_start_with_it_and_a_new_one_knows_the_sites(
    tmp_path: Path, golden: Golden
) -> None:
    real = Real(tmp_path)
    try:
        join.check_in(real.site("clinic-1"), real.keys["clinic-1"], pytest.fail)
    finally:
        real.close()
    for path in real.folder.glob(f"{NAME}*"):
        path.write_bytes(b"no database any more" * 500)
    with pytest.raises(ResourceError) as raised:
        run_server(real.folder, print)
    golden(raised)
    for path in list(real.folder.glob(f"{NAME}*")):
        path.rename(tmp_path / path.name)
    again = superlink_app(real.folder, "127.0.0.1", real.port).state.linkstate_factory.state()
    people, trail = Operators(real.folder, read_token(real.folder)), Trail(real.folder)
    assert Admission(again, real.folder, print, people, trail).update() == len(SITES)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is read-only; Flower would fail with an error of SQLite's."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    with pytest.raises(ResourceError, match=r"cannot be written.*superlink\.sqlite.*permission"):
        check_database(tmp_path)
