"""Whom a server lets in: only `--revoke` revokes, what is missing or broken suspends, and comes back.

And the heads of the sites' books: one that went back is refused.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.cli.app import main
from fedtune.deploy import certificates
from fedtune.deploy.admission import Admission, enrol, enrolled, revoke, revoked
from fedtune.deploy.flower import superlink_app
from fedtune.deploy.heads import BookHeads
from fedtune.deploy.provision import provision
from fedtune.errors import ConfigError
from tests.support.golden import Golden

SITES = ["clinic-1", "clinic-2", "clinic-3"]


class Books:
    """A server folder with three enrolled sites, and Flower's database beside it; no server answers."""

    def __init__(self, root: Path) -> None:
        file = root / "federation.yaml"
        file.write_text(yaml.safe_dump({"name": "trial", "server": "127.0.0.1:9", "sites": SITES}))
        self.folder = provision(file, root / "out").folder / "server"
        self.said: list[str] = []
        self.lines: dict[str, str] = {}
        self.keys: dict[str, bytes] = {}
        for site in SITES:
            key = certificates.make_node_key(root / f"{site}.key")
            self.lines[site] = certificates.public_line(certificates.public_key_of(key), site)
            self.keys[site] = certificates.public_key_of(key)
            enrol(self.folder, self.lines[site])
        self.restart()

    def restart(self) -> None:
        self.state = superlink_app(self.folder, "127.0.0.1", 9).state.linkstate_factory.state()
        self.admission = Admission(self.state, self.folder, self.said.append)
        self.admission.update()

    def let_in(self) -> set[str]:
        return {site for site in SITES if self.admission.refusal(self.keys[site]) is None}

    def status_of(self, site: str) -> str:
        return next(str(one.status) for one in self.state.get_node_info() if one.name == site)

    def connect(self, site: str) -> None:
        node = next(one for one in self.admission.nodes() if one.name == site)
        assert self.state.activate_node(node.node_id, 30.0)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_folder_that_is_gone_for_four_seconds_suspends_and_comes_back(
    books: Books, restarted: bool
) -> None:
    books.connect("clinic-1")
    assert books.let_in() == set(SITES)
    away = books.folder / "away"
    (books.folder / "nodes").rename(away)
    books.restart() if restarted else books.admission.update()
    assert books.let_in() == set()
    found = books.admission.refusal(books.keys["clinic-1"])
    assert found is not None and found[0] == 503 and "is missing at the server" in found[1]
    assert books.status_of("clinic-1") == "offline", "and a round does not wait for it"
    away.rename(books.folder / "nodes")
    books.restart() if restarted else books.admission.update()
    assert books.let_in() == set(SITES) and revoked(books.folder) == {}


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [False, True])
def test_a_key_under_another_sites_name_lets_nobody_in_by_that_name(books: Books, renamed: bool) -> None:
    """A file that was copied: what the server keeps of clinic-1's books would go under the other name."""
    line = books.lines["clinic-1"]
    copied = line.replace("clinic-1", "clinic-2") if renamed else line
    (books.folder / "nodes" / "clinic-2.pub").write_text(copied + "\n")
    broken: dict[str, str] = {}
    enrolled(books.folder, broken)
    books.admission.update()
    assert books.admission.site_of(books.keys["clinic-1"]) in (None, "clinic-1")
    assert books.let_in() == ({"clinic-3"} if renamed else {"clinic-1", "clinic-3"})
    assert ("also that of clinic-1" if renamed else "holds the key of site 'clinic-1'") in broken["clinic-2"]
    enrol(books.folder, books.lines["clinic-2"])
    books.admission.update()
    assert books.let_in() == set(SITES) and revoked(books.folder) == {}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"ecdsa-sha2-nistp384 AAAA clinic-1\n"])
def test_one_broken_file_at_start_suspends_its_site_alone(books: Books, content: bytes) -> None:
    (books.folder / "nodes" / "clinic-1.pub").write_bytes(content)
    books.said.clear()
    books.restart()
    assert books.let_in() == {"clinic-2", "clinic-3"}
    assert len(books.said) == 1 and "clinic-1 is not let in for now" in books.said[0]
    assert set(enrolled(books.folder)) == {"clinic-2", "clinic-3"}
    (books.folder / "nodes" / "clinic-1.pub").write_text(books.lines["clinic-1"] + "\n")
    books.admission.update()
    assert books.let_in() == set(SITES) and "clinic-1 is let in again" in books.said[-1]


def test_a_broken_file_keeps_no_other_site_from_being_revoked(books: Books) -> None:
    (books.folder / "nodes" / "clinic-1.pub").write_text("")
    revoke(books.folder, "clinic-2")
    books.admission.update()
    assert books.let_in() == {"clinic-3"}
    assert books.admission.refusal(books.keys["clinic-2"]) == (
        403,
        "This key is not enrolled at this server, or was revoked.",
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "broken", "missing"])
def test_revoking_is_for_good_whatever_has_become_of_the_file(books: Books, how: str) -> None:
    path = books.folder / "nodes" / "clinic-1.pub"
    if how == "broken":
        path.write_text("half a l")
    elif how == "missing":
        path.unlink()
    revoke(books.folder, "clinic-1")
    books.admission.update()
    assert books.let_in() == {"clinic-2", "clinic-3"} and books.status_of("clinic-1") == "unregistered"
    path.write_text(books.lines["clinic-1"] + "\n")  # a backup of nodes/ is put back
    books.restart()
    assert books.let_in() == {"clinic-2", "clinic-3"}
    with pytest.raises(ConfigError, match="was revoked, and a key that was revoked stays so"):
        enrol(books.folder, books.lines["clinic-1"])
    (books.folder / "superlink.sqlite").unlink()  # nor does another database let it in
    books.restart()
    assert books.let_in() == {"clinic-2", "clinic-3"}


def test_revoking_twice_and_of_nobody_is_told(books: Books, golden: Golden) -> None:
    revoke(books.folder, "clinic-1")
    books.admission.update()
    for site in ("clinic-1", "elsewhere", "../x"):
        with pytest.raises(ConfigError) as raised:
            revoke(books.folder, site)
        assert "clinic-2" in str(raised.value)
        assert "clinic-3" in str(raised.value)
        golden(raised)


def test_a_new_key_of_a_site_takes_the_place_of_its_old_one_for_good(books: Books, tmp_path: Path) -> None:
    new = certificates.make_node_key(tmp_path / "new.key")
    enrol(books.folder, certificates.public_line(certificates.public_key_of(new), "clinic-1"))
    books.admission.update()
    assert books.let_in() == {"clinic-2", "clinic-3"}
    assert books.admission.refusal(certificates.public_key_of(new)) is None
    assert set(revoked(books.folder).values()) == {"clinic-1"}


def test_a_record_of_revoked_keys_that_cannot_be_read_lets_in_nobody_new(books: Books) -> None:
    revoke(books.folder, "clinic-1")
    (record,) = (books.folder / "revoked").glob("*.pub")
    record.write_text("")
    with pytest.raises(ConfigError, match="names a key that must not be let in"):
        books.admission.update()
    told: list[str] = []

    class Looks(threading.Event):
        number = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.number += 1
            return self.number > 3

    admission = Admission(books.state, books.folder, told.append)
    admission.keep_updated(Looks())
    assert len(told) == 1 and "must not be let in" in told[0], "said once, and the server goes on"


def test_a_stranger_and_nonsense_are_let_in_nowhere(books: Books, tmp_path: Path) -> None:
    stranger = certificates.public_key_of(certificates.make_node_key(tmp_path / "s.key"))
    assert books.admission.refusal(stranger) is not None
    header: Any
    for header in (b"", b"%%%", b"AAAA"):
        found = books.admission.refusal_of_request(header)
        assert found is not None and found[0] == 403


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], golden: Golden
) -> None:
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", head(5, 6))
    with pytest.raises(ConfigError) as raised:
        heads.accept("clinic-1")
    golden(raised)
    heads.note("clinic-1", head(2, 3))
    with pytest.raises(SystemExit) as done:
        main(["server", str(tmp_path), "--accept-restore", "clinic-1"])
    assert not done.value.code and "noted in heads.log" in capsys.readouterr().out
    (line,) = (tmp_path / "heads.log").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["site"], noted["kept"], noted["accepted"]) == ("clinic-1", head(5, 6), head(2, 3))
    heads.reload()  # the server that runs
    assert heads.refusal("clinic-1") is None and heads.kept("clinic-1") == head(2, 3)


def test_a_broken_file_of_heads_is_named_and_nonsense_from_a_site_is_not_kept(
    tmp_path: Path, golden: Golden
) -> None:
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", "L1-zz")
    assert heads.kept("clinic-1") is None and not (tmp_path / "heads.json").exists()
    for content in ("", "[]", '{"clinic-1": {"head": "no"}}'):
        (tmp_path / "heads.json").write_text(content)
        with pytest.raises(ConfigError) as raised:
            BookHeads(tmp_path)
        assert "heads.json" in str(raised.value)
        golden(raised)
