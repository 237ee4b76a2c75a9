"""`fedtune provision`: what it makes, what is secret in it, and what it says of bad input."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from fedtune import __version__
from fedtune.cli.app import main
from fedtune.deploy import certificates
from fedtune.deploy.admission import enrol, enrolled, revoke
from fedtune.deploy.provision import provision
from fedtune.errors import ConfigError
from tests.support.golden import Golden

FEDERATION = {"name": "hospitals", "server": "127.0.0.1:9443", "sites": ["clinic-1", "clinic-2"]}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(FEDERATION))
    provision(tmp_path / "federation.yaml", tmp_path / "out")
    return tmp_path / "out"


def change(made: Path, **changes: object) -> Path:
    path = made.parent / "federation.yaml"
    path.write_text(yaml.safe_dump({**FEDERATION, **changes}))
    return path


def test_secrets_are_for_their_owner_only_and_do_not_travel(made: Path) -> None:
    secret = [
        made / "authority" / "ca.key",
        made / "server" / "server.key",
        made / "server" / "operator.token",
    ]
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not (made / "server" / "ca.key").exists()
    for site in FEDERATION["sites"]:
        with zipfile.ZipFile(made / "sites" / f"{site}.zip") as archive:
            assert sorted(archive.namelist()) == sorted(
                f"{site}/{n}" for n in ("node.yaml", "ca.crt", "README.md", "archive.sig")
            )
            content = b"".join(archive.read(name) for name in archive.namelist())
            node = yaml.safe_load(archive.read(f"{site}/node.yaml"))
        assert b"PRIVATE" not in content and (made / "server" / "operator.token").read_bytes() not in content
        assert node["site"] == site and node["server"] == FEDERATION["server"]


def test_again_keeps_what_there_is_and_adds_a_site(made: Path) -> None:
    before = (made / "authority" / "ca.crt").read_bytes(), (made / "server" / "server.crt").read_bytes()
    done = provision(change(made, sites=["clinic-1", "clinic-2", "clinic-3"]), made)
    assert done.new == ("archive of clinic-3",)
    assert before == (
        (made / "authority" / "ca.crt").read_bytes(),
        (made / "server" / "server.crt").read_bytes(),
    )


def test_renewal_is_by_the_same_authority(made: Path) -> None:
    old = (made / "server" / "server.crt").read_bytes()
    provision(change(made, certificate_days=30), made, renew=True)
    assert (made / "server" / "server.crt").read_bytes() != old
    assert 28 <= certificates.check_server_certificate(made / "server") <= 30


def test_expired_and_foreign_certificates_are_named(made: Path, tmp_path: Path) -> None:
    certificates.make_server_certificate(made / "authority", made / "server", ["localhost"], -1)
    with pytest.raises(ConfigError, match="expired on .* --renew"):
        certificates.check_server_certificate(made / "server")
    other = tmp_path / "other"
    other.mkdir()
    certificates.make_authority(other, "other")
    certificates.make_server_certificate(other, made / "server", ["localhost"], 9)
    with pytest.raises(ConfigError, match="not signed by the authority"):
        certificates.check_server_certificate(made / "server")


def test_certificate_is_for_the_address_that_nodes_use(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "server" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "127.0.0.1" in [str(one) for one in names.get_values_for_type(x509.IPAddress)]


def test_enrolment_and_revocation(made: Path, tmp_path: Path, golden: Golden) -> None:
    server = made / "server"
    key = certificates.make_node_key(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert (
        enrol(server, certificates.public_line(certificates.public_key_of(key), "clinic-1"))[0] == "clinic-1"
    )
    assert enrolled(server) == {"clinic-1": certificates.public_key_of(key)}
    with pytest.raises(ConfigError) as raised:
        enrol(server, certificates.public_line(certificates.public_key_of(key), "clinic-2"))
    assert "clinic-1" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        enrol(server, certificates.public_line(certificates.public_key_of(key), "elsewhere"))
    assert "'elsewhere'" in str(raised.value)
    assert "clinic-1" in str(raised.value)
    assert "clinic-2" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        enrol(server, "ssh-rsa AAAA")
    golden(raised)
    revoke(server, "clinic-1")
    assert enrolled(server) == {}
    with pytest.raises(ConfigError) as raised:
        revoke(server, "clinic-1")
    assert "clinic-1" in str(raised.value)
    golden(raised)


def test_the_administrators_first_steps_work_as_the_archive_tells_them(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unpack, make the key, and only then say where the data is."""
    with zipfile.ZipFile(made / "sites" / "clinic-1.zip") as archive:
        archive.extractall(tmp_path)
    config = ["--config", str(tmp_path / "clinic-1" / "node.yaml")]
    with pytest.raises(SystemExit) as done:
        main(["node", "init", *config])
    assert not done.value.code
    line = capsys.readouterr().out.splitlines()[0]
    assert stat.S_IMODE((tmp_path / "clinic-1" / "node.key").stat().st_mode) == 0o600
    assert enrol(made / "server", line)[0] == "clinic-1"
    with pytest.raises(SystemExit) as done:
        main(["node", *config])
    assert done.value.code == 2
    assert "data.csv, and there is no such file or folder. Name there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["node", "init", *config])  # as with the archive of another authority
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_site_is_told_to_install_the_operators_wheel_and_no_public_package(made: Path) -> None:
    wheel = f"fedtune-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(made / "sites" / "clinic-1.zip") as archive:
        site = archive.read("clinic-1/README.md").decode()
    for text in (site, (made / "server" / "README.md").read_text()):
        assert wheel in text and "sha256sum" in text
        installed = re.findall(r"pip install (\S+)", text)
        assert all(name == f"./{wheel}" for name in installed), installed
    assert "Linux" in site and f"pip install ./{wheel}" in site


def test_folders_of_the_federation_are_for_their_owner_only(made: Path) -> None:
    for name in ("authority", "server", "server/nodes", "sites"):
        assert stat.S_IMODE((made / name).stat().st_mode) & 0o077 == 0, name


def test_a_key_is_not_replaced_and_not_read_when_others_may(tmp_path: Path, golden: Golden) -> None:
    path = tmp_path / "node.key"
    certificates.make_node_key(path)
    with pytest.raises(ConfigError) as raised:
        certificates.make_node_key(path)
    golden(raised)
    path.chmod(0o640)
    with pytest.raises(ConfigError) as raised:
        certificates.load_private_key(path)
    assert "600" in str(raised.value)
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        certificates.load_private_key(tmp_path / "none.key")
    golden(raised)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"server": "nowhere"}, "HOST:PORT"),
        ({"server": "host:99999"}, "HOST:PORT"),
        ({"sites": []}, "list of names"),
        ({"sites": ["a", "a"]}, "twice"),
        ({"sites": ["../x"]}, r"sites=\.\./x.*a word such as"),
        ({"site": ["a"]}, "no setting 'site'.*Did you mean sites"),
        ({"certificate_days": 0}, "certificate_days"),
        ({"name": ""}, "name='' in .* must be a word"),
    ],
)
def test_bad_federation_files(made: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        provision(change(made, **changes), made)
