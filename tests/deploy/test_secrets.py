"""Pitfall 41: no secret is empty, short or torn. Written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedtune.config.files import create_whole, replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.client import Server
from fedtune.deploy.provision import provision, read_token
from fedtune.errors import ConfigError, FedtuneError
from tests.support.golden import Golden

SECRETS = ("authority/ca.key", "server/server.key", "server/operator.token")


def federation(root: Path) -> Path:
    file = root / "federation.yaml"
    file.write_text(yaml.safe_dump({"name": "trial", "server": "127.0.0.1:9", "sites": ["a", "b"]}))
    return file


class FullDisk:
    """Nothing can be synced from the `after`-th file on: the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left, self.fsync = after, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return
        self.left -= 1
        if self.left < 0:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(handle)


@pytest.mark.parametrize("after", range(9))
def test_a_full_disk_at_any_file_of_provision_leaves_no_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, golden: Golden
) -> None:
    file, out = federation(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        FullDisk(patch, after)
        with pytest.raises(FedtuneError) as raised:
            provision(file, out)
        golden(raised)
    for path in out.rglob("*"):
        if path.is_file():
            assert path.stat().st_size > 0 and not path.name.endswith(".tmp"), path
    provision(file, out)  # goes on where it was stopped
    read_token(out / "server")
    certificates.check_authority(out / "authority")
    assert certificates.check_server_certificate(out / "server") > 0


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("content", ["", "\n", "-----BEGIN PRIVATE KEY-----\nMIG2", "abc"])
def test_a_torn_secret_is_named_and_not_kept(tmp_path: Path, name: str, content: str) -> None:
    file = federation(tmp_path)
    path = provision(file, tmp_path / "out").folder / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=path.name):
        provision(file, tmp_path / "out")
    assert path.read_text() == content, "nothing is lost by it"


@pytest.mark.parametrize("change", [lambda text: "", lambda text: text[:20], lambda text: text + "x"])
def test_submit_and_status_refuse_a_torn_token_before_they_ask(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    folder = provision(federation(tmp_path), tmp_path / "out").folder / "server"
    token = folder / "operator.token"
    token.write_text(change(token.read_text().strip()))
    with pytest.raises(ConfigError, match="operator.token"):
        Server.of(folder)
    # The way out, as it is told.
    token.unlink()
    provision(tmp_path / "federation.yaml", tmp_path / "out")
    assert len(read_token(folder)) == 43


@pytest.mark.parametrize("name", SECRETS)
def test_an_empty_secret_is_called_empty(tmp_path: Path, name: str) -> None:
    file = federation(tmp_path)
    path = provision(file, tmp_path / "out").folder / name
    path.write_text("\n")
    with pytest.raises(ConfigError, match=f"{path.name} is empty"):
        provision(file, tmp_path / "out")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, golden: Golden) -> None:
    folder = provision(federation(tmp_path), tmp_path / "out").folder / "server"
    (folder / "operator.token").chmod(0o644)
    with pytest.raises(ConfigError) as raised:
        read_token(folder)
    assert "600" in str(raised.value)
    golden(raised)


def test_an_authority_without_its_key_is_not_replaced(tmp_path: Path, golden: Golden) -> None:
    """Its key is kept offline: another authority would lock every site out."""
    file = federation(tmp_path)
    folder = provision(file, tmp_path / "out").folder
    trusted = (folder / "server" / "ca.crt").read_bytes()
    (folder / "authority" / "ca.key").rename(tmp_path / "ca.key")
    with pytest.raises(ConfigError) as raised:
        provision(file, tmp_path / "out")
    golden(raised)
    assert (folder / "server" / "ca.crt").read_bytes() == trusted


def test_a_whole_file_has_its_mode_before_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def look(handle: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    old = os.umask(0)
    try:
        create_whole(tmp_path / "new", b"secret")
        replace_whole(tmp_path / "new", b"other", mode=0o600)
    finally:
        os.umask(old)
    assert seen[0] == 0o600 and seen[2] == 0o600 and (tmp_path / "new").read_bytes() == b"other"
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "new", b"x")
    assert (tmp_path / "new").read_bytes() == b"other" and [one.name for one in tmp_path.iterdir()] == ["new"]


def test_a_file_system_without_links_has_new_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    create_whole(tmp_path / "new", b"secret")
    assert (tmp_path / "new").read_bytes() == b"secret" and [one.name for one in tmp_path.iterdir()] == [
        "new"
    ]
