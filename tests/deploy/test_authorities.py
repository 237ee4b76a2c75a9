"""Another authority in the place of the former: sites of a real server over TLS, and notices that lie."""

from __future__ import annotations

import base64
import json
import ssl
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.cli.app import main
from fedtune.deploy import authorities, certificates, join, rotation
from fedtune.deploy.archives import check_archive
from fedtune.deploy.authorities import authority_fingerprints, learn, make_notice, trusted
from fedtune.deploy.certificates import check_server
from fedtune.deploy.client import Server
from fedtune.deploy.operator_key import operator_line
from fedtune.deploy.operators import add
from fedtune.deploy.provision import provision
from fedtune.deploy.served_certificate import ServedCertificate
from fedtune.errors import ConfigError, FederationError, ResourceError
from fedtune.federation.client.audit_log import Books
from tests.support.real_superlink import Real
from tests.support.site_parts import settings


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Real]:
    made = Real(tmp_path)
    yield made
    made.close()


def own(real: Real, name: str) -> Any:
    """A site in a folder of its own, with its ca.crt; its key is enrolled."""
    folder = real.root / f"at-{name}"
    folder.mkdir()
    (folder / "ca.crt").write_bytes((real.folder / "ca.crt").read_bytes())
    return settings(folder, site=name, server=real.address, key=str(real.root / f"{name}.key"))


def joins(real: Real, site: Any) -> None:
    books = Books(Path(site.ledger), Path(site.audit_log))
    join.check_in(site, real.keys[site.site], lambda line: None, books=books)


def asks(real: Real, site: Any) -> None:
    """As a node that has joined does every minute."""
    books = Books(Path(site.ledger), Path(site.audit_log))
    assert join.suspension(site, real.keys[site.site], books) is None


def rotate(real: Real, step: str, *without: str) -> Any:
    return provision(real.file, real.root / "out", rotate=step, without=without)


def test_sites_move_to_a_new_authority_and_none_is_locked_out(real: Real, tmp_path: Path) -> None:
    served = ServedCertificate(real.folder, real.config.ssl)
    here, late = own(real, "clinic-1"), own(real, "clinic-2")
    (operators := tmp_path / "alice").mkdir()
    alice = real.operator_folder(operators)
    add(real.folder, operator_line(alice, "alice")[0], ["read"])
    (former,) = authority_fingerprints(real.folder / "ca.crt")
    joins(real, here)
    assert trusted(here) == Path(here.ca)

    # Announced: who joins or asks learns of it, and the server's certificate is the former's yet.
    new = rotate(real, "announce").authority
    assert new != former and not served.renew()
    asks(real, here)
    assert authority_fingerprints(trusted(here)) == [new, former]
    assert "authorities" in Path(here.audit_log).read_text() and new in Path(here.audit_log).read_text()
    with pytest.raises(ConfigError, match="clinic-1, clinic-2, clinic-3 have not joined"):
        rotate(real, "switch")  # it has learned, and its connections are by the former yet
    joins(real, here)
    joins(real, late)
    with pytest.raises(ConfigError, match="clinic-3 have not joined.*--without clinic-3"):
        rotate(real, "switch")
    real.admission.update()
    assert Server.of(alice).runs() is not None  # an operator with the former ca.crt
    alice.joinpath("ca.crt").write_bytes((real.folder / "ca.crt").read_bytes())
    assert Server.of(alice).runs() is not None

    # Switched: a running server shows the new one; who was left behind is told what to do.
    rotate(real, "switch", "clinic-3")
    assert served.renew() and certificates.check_server_certificate(real.folder) > 0
    for site in (here, late):
        joins(real, site)
        asks(real, site)
    behind = settings(tmp_path, site="clinic-3", server=real.address, ca=here.ca)
    with pytest.raises(FederationError, match="not the one that the authority in .* vouches for"):
        check_server(real.address, trusted(behind))
    assert Server.of(alice).runs() is not None
    with zipfile.ZipFile(real.root / "out" / "sites" / "clinic-3.zip") as archive:
        archive.extractall(tmp_path)
    assert check_archive(tmp_path / "clinic-3") == (new, ())
    check_server(real.address, tmp_path / "clinic-3" / "ca.crt")

    # Retired: who joins trusts the new one alone.
    rotate(real, "retire")
    joins(real, here)
    assert authority_fingerprints(trusted(here)) == [new] == authority_fingerprints(real.folder / "ca.crt")
    assert '"site trusts"' in (real.folder / "trail.jsonl").read_text()
    # And another can follow.
    third = rotate(real, "announce").authority
    joins(real, here)
    assert authority_fingerprints(trusted(here)) == [third, new]


def test_a_new_ca_crt_by_hand_counts_more_than_what_was_learned(real: Real) -> None:
    site = own(real, "clinic-1")
    rotate(real, "announce")
    joins(real, site)
    assert trusted(site) != Path(site.ca)
    other = real.root / "other"
    other.mkdir()
    certificates.make_authority(other, "trial")
    Path(site.ca).write_bytes((other / "ca.crt").read_bytes())
    assert trusted(site) == Path(site.ca)


# --- notices that lie -----------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Any, dict[str, Path], dict[str, bytes]]:
    """A site that trusts `former`; the folders and certificates of that, of `new` and of `evil`."""
    folders = {name: tmp_path / name for name in ("former", "new", "evil")}
    for folder in folders.values():
        folder.mkdir()
        certificates.make_authority(folder, "trial")
    (tmp_path / "ca.crt").write_bytes((folders["former"] / "ca.crt").read_bytes())
    site = settings(tmp_path)
    return site, folders, {name: (folder / "ca.crt").read_bytes() for name, folder in folders.items()}


def notice(made: Any, number: int, names: str, signer: str, federation: str = "trial") -> str:
    _, folders, crt = made
    return make_notice(federation, number, [crt[name] for name in names.split()], folders[signer]).decode()


def refuses(made: Any, text: str) -> None:
    site = made[0]
    before = trusted(site).read_bytes()
    with pytest.raises(FederationError, match="does not trust"):
        learn(site, text)
    assert trusted(site).read_bytes() == before


def test_a_notice_that_is_not_signed_by_the_newest_authority_is_nothing(made: Any) -> None:
    site = made[0]
    refuses(made, notice(made, 1, "evil former", "evil"))
    refuses(made, notice(made, 1, "evil", "evil"))
    refuses(made, notice(made, 1, "new", "former"))  # it would leave out who signs it
    refuses(made, notice(made, 1, "new former", "former", federation="another"))
    refuses(made, notice(made, 1, "new evil former", "former"))
    good = json.loads(notice(made, 1, "new former", "former"))
    for change in (
        {"signature": ""}, {"number": 2}, {"federation": "other"}, {"authorities": []},
        {"authorities": [good["authorities"][0] + "x"]}, {"authorities": "x"}, {"number": None},
        {"number": float("inf"), "authorities": [made[2]["former"].decode()]}, {"number": True},
        {"authorities": [made[2]["evil"].decode(), made[2]["former"].decode()]},
    ):  # fmt: skip
        refuses(made, json.dumps({**good, **change}))
    for text in ("", "[]", "null", "{}", "[" * 100_000, json.dumps(good)[:-40]):
        refuses(made, text)
    assert learn(site, json.dumps(good)) and learn(site, json.dumps(good)) is None
    # The former one, whose key may have got out, has no say any more.
    refuses(made, notice(made, 2, "evil former", "former"))
    refuses(made, notice(made, 2, "former", "former"))
    assert learn(site, notice(made, 2, "new", "new"))


def test_an_old_notice_that_is_told_again_is_nothing(made: Any) -> None:
    site, _, crt = made
    first, last = notice(made, 3, "new former", "former"), notice(made, 4, "new", "new")
    assert learn(site, first) and learn(site, last)
    refuses(made, first)
    refuses(made, notice(made, 4, "evil new", "new"))  # signed, and its number was used
    refuses(made, notice(made, 3, "former new", "new"))
    assert trusted(site).read_bytes().endswith(crt["new"]) and crt["former"] not in trusted(site).read_bytes()


def test_a_certificate_that_is_no_authoritys_or_has_expired_is_refused(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folders, crt = made
    certificates.make_server_certificate(folders["former"], folders["new"], ["127.0.0.1"], 9)
    crt["leaf"] = (folders["new"] / "server.crt").read_bytes()
    refuses(made, notice(made, 1, "leaf former", "former"))
    (gone := folders["new"] / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "AUTHORITY_DAYS", -1)
        certificates.make_authority(gone, "trial")
    crt["gone"] = (gone / "ca.crt").read_bytes()
    refuses(made, notice(made, 1, "gone former", "former"))


def test_a_torn_or_foreign_file_is_not_trusted(made: Any) -> None:
    site, _, crt = made
    learn(site, notice(made, 1, "new former", "former"))
    learned = trusted(site)
    whole = learned.read_bytes()
    # Nor is its ca.crt, which may name an authority that was retired since.
    for content in (b"", whole[:40], whole[:300], whole.replace(b"notice 1", b"notice x"), crt["evil"]):
        learned.write_bytes(content)
        with pytest.raises(ConfigError, match="retired since.*move this file away"):
            trusted(site)
    learned.unlink()
    learned.mkdir()  # root may read any file
    with pytest.raises(ConfigError, match="retired since"):
        trusted(site)
    learned.rmdir()
    assert trusted(site) == Path(site.ca)  # nothing was learned
    learned.write_bytes(whole)
    assert trusted(site) == learned
    ssl.create_default_context(cafile=str(learned))  # as the node's own requests do, and Flower's
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=whole.decode("ascii"))


def test_a_state_folder_that_cannot_be_written_says_so_and_changes_nothing(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(authorities, "replace_whole", full)
    with pytest.raises(ResourceError, match="cannot be kept.*No space left.*cannot join any more"):
        learn(made[0], notice(made, 1, "new former", "former"))
    assert trusted(made[0]) == Path(made[0].ca)


# --- the operator's side --------------------------------------------------------------------------------


def test_steps_come_in_their_order_and_an_interrupted_one_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text("name: trial\nserver: 127.0.0.1:9\nsites: [clinic-1]\n")

    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["provision", str(file), "-o", str(tmp_path / "out"), *words])
        said = capsys.readouterr()
        return int(str(left.value.code or 0)), said.out + said.err

    assert call()[0] == 0
    for step in ("switch", "retire", "back"):
        status, said = call("--rotate", step)
        assert status == 2 and "it is the turn of 'announce'" in " ".join(said.split())
    server, authority = tmp_path / "out" / "server", tmp_path / "out" / "authority"
    before = (server / "server.crt").read_bytes()

    def dies(*args: object) -> None:
        raise OSError(28, "No space left on device", "there")

    write = rotation.Held.write
    with monkeypatch.context() as patch:  # a full disk when the step is written down, and after it
        patch.setattr(rotation.Held, "write", lambda held: dies() if held.notices else write(held))
        assert call("--rotate", "announce")[0] != 0
    assert not (server / rotation.NOTICE).exists()
    made = (authority / "2" / "ca.key").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(rotation, "make_notice", dies)
        assert call("--rotate", "announce")[0] != 0
    assert (authority / "2" / "ca.key").read_bytes() == made  # the one that was made, and told to nobody
    status, said = call()
    assert status == 0 and "notice 1 to the sites" in said
    assert (server / "server.crt").read_bytes() == before
    assert call("--rotate", "switch")[0] == 0  # no site is enrolled
    after = (server / "server.crt").read_bytes()
    assert certificates.is_issued_by(server / "server.crt", authority / "2" / "ca.crt") and after != before
    assert call("--rotate", "retire")[0] == 0 and call("--renew")[0] == 0
    assert certificates.is_issued_by(server / "server.crt", authority / "2" / "ca.crt")
    (authority / "ca.key").unlink()  # as the last step says
    assert call()[0] == 0
    (authority / rotation._FILE).rename(tmp_path / "lost")
    for words in ((), ("--rotate", "announce"), ("--renew",)):
        status, said = call(*words)
        assert status == 2 and "authority/2 is a later authority" in "".join(said.split("\n"))
    assert (server / "server.crt").read_bytes() and not (authority / rotation._FILE).exists()
    (authority / rotation._FILE).write_text('{"trusted": [2')
    status, said = call()
    assert status == 2 and "which authorities the sites trust" in " ".join(said.split())


def test_a_signature_is_checked_over_all_that_it_says(made: Any) -> None:
    folders = made[1]
    values = json.loads(notice(made, 1, "new former", "former"))
    key = certificates.load_private_key(folders["former"] / "ca.key")
    # What the authority signs for other purposes (an archive) is no notice.
    told = {name: values[name] for name in ("federation", "number", "authorities")}
    for purpose, good in (("", False), ("fedtune-archive:", False), ("fedtune-authorities:", True)):
        signed = f"{purpose}{json.dumps(told, sort_keys=True)}".encode()
        signature = base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
        text = json.dumps({**values, "signature": signature})
        if good:
            assert learn(made[0], text)
        else:
            refuses(made, text)
