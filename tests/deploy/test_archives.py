"""A site's archive: that it is as the authority signed it, or is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from fedtune.cli.app import main
from fedtune.deploy import certificates
from fedtune.deploy.archives import check_archive, holds, write_archive
from fedtune.deploy.authorities import authority_fingerprint
from fedtune.deploy.provision import provision
from fedtune.errors import ConfigError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder that `provision` made; the archive of clinic-1 is unpacked beside it."""
    file = tmp_path / "federation.yaml"
    file.write_text(yaml.safe_dump({"name": "trial", "server": "127.0.0.1:9", "sites": ["clinic-1"]}))
    folder = provision(file, tmp_path / "out").folder
    with zipfile.ZipFile(folder / "sites" / "clinic-1.zip") as archive:
        archive.extractall(tmp_path)
    return folder


def test_what_was_signed_is_whole_and_what_a_site_edits_is_named(made: Path) -> None:
    site = made.parent / "clinic-1"
    authority, changed = check_archive(site)
    assert authority == authority_fingerprint(made / "authority" / "ca.crt") and changed == ()
    node = site / "node.yaml"
    node.write_text(node.read_text().replace("127.0.0.1:9", "evil.example:9"))
    assert check_archive(site)[1] == ("node.yaml",)
    (site / "README.md").unlink()
    assert check_archive(site)[1] == ("README.md", "node.yaml")


def test_an_archive_that_was_changed_on_its_way_is_refused(made: Path, tmp_path: Path) -> None:
    site = made.parent / "clinic-1"
    seal, ca = site / "archive.sig", site / "ca.crt"
    whole, mine = seal.read_text(), ca.read_bytes()
    values = json.loads(whole)
    values["files"]["node.yaml"] = "0" * 64  # as if another node.yaml had been signed
    for content in (json.dumps(values), whole[:-30], "", "[]", "{}"):
        seal.write_text(content)
        with pytest.raises(ConfigError, match="not signed by the authority"):
            check_archive(site)
    seal.write_text(whole)
    other = tmp_path / "other"
    other.mkdir()
    certificates.make_authority(other, "trial")
    ca.write_bytes((other / "ca.crt").read_bytes())  # of somebody who would pose as the server
    with pytest.raises(ConfigError, match="not signed by the authority"):
        check_archive(site)
    ca.write_bytes(mine + b"\n")  # the same key, and not the file that was signed
    with pytest.raises(ConfigError, match="is not the one that was signed"):
        check_archive(site)
    ca.write_bytes(mine)
    assert check_archive(site)[1] == ()


@pytest.mark.parametrize("name", ["\x1b[2Kfingerprint of the authority    7f3a", "a\nb", "../node.yaml", ""])
def test_a_name_in_a_signature_writes_no_line_of_its_own(made: Path, tmp_path: Path, name: str) -> None:
    files = {"ca.crt": (made / "authority" / "ca.crt").read_bytes(), name: b"x"}
    write_archive(tmp_path / "evil.zip", "evil", files, made / "authority")
    site = made.parent / "clinic-1"
    with zipfile.ZipFile(tmp_path / "evil.zip") as archive:
        (site / "archive.sig").write_bytes(archive.read("evil/archive.sig"))
    with pytest.raises(ConfigError, match="not signed by the authority"):
        check_archive(site)


def test_init_says_whose_files_these_are_before_it_makes_a_key(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = made.parent / "clinic-1"

    def init() -> int:
        with pytest.raises(SystemExit) as left:
            main(["node", "init", "--config", str(site / "node.yaml")])
        return int(str(left.value.code or 0))

    seal = (site / "archive.sig").read_text()
    (site / "archive.sig").write_text("{}")
    assert init() == 2 and not (site / "node.key").exists()
    (site / "archive.sig").write_text(seal)
    capsys.readouterr()
    assert init() == 0 and (site / "node.key").exists()
    said = capsys.readouterr().out
    assert authority_fingerprint(made / "authority" / "ca.crt") in said and "authority signed" in said


def test_an_archive_of_before_is_made_again_with_a_signature(made: Path) -> None:
    path = made / "sites" / "clinic-1.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clinic-1/node.yaml", "")
    certificate = (made / "authority" / "ca.crt").read_bytes()
    assert not holds(path, certificate)
    done = provision(made.parent / "federation.yaml", made)
    assert "archive of clinic-1" in done.new and holds(path, certificate)
    assert holds(made / "operator.zip", certificate) and not holds(path, certificate[:-1])
