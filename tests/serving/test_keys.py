"""A file of keys lets in who has a key, holds none of them, and shuts out whose line is taken out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from fedtune.serving import keys as module
from fedtune.serving.keys import Keys, make_key
from tests.support.golden import Golden


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "keys.txt"


def test_a_key_lets_its_client_in_and_is_not_in_the_file(path: Path) -> None:
    made = {name: make_key(path, name) for name in ("clinic-1", "clinic-2")}
    keys = Keys.open(path)
    assert {name: keys.name_of(key) for name, key in made.items()} == {name: name for name in made}
    assert len(set(made.values())) == 2 and all(len(key) > 40 for key in made.values())
    written = path.read_text()
    for key in made.values():
        assert key not in written and key[3:] not in written
        (other,) = set(written.split()) & {f"sha256:{module._hash(key)}"}
        assert keys.name_of(other) is None and keys.name_of(other.removeprefix("sha256:")) is None
    for wrong in ("", "x", made["clinic-1"][:-1], made["clinic-1"] + "a", "clinic-1", "\ud800"):
        assert keys.name_of(wrong) is None
    assert path.stat().st_mode & 0o077 == 0
    assert not any(key in repr(keys) for key in made.values())


def test_a_line_that_is_taken_out_shuts_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_key(path, "a"), make_key(path, "b")
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    keys = Keys.open(path)
    lines = path.read_text().splitlines()
    path.write_text(f"# kept\n\n{lines[1]}\n")
    assert keys.name_of(first) == "a"  # it looks once a second
    now += 2
    assert keys.name_of(first) is None and keys.name_of(second) == "b"


@pytest.mark.parametrize("broken", [None, "", "nonsense\n", b"\xff"])
def test_a_file_that_cannot_be_read_any_more_shuts_out_everybody(
    path: Path, monkeypatch: pytest.MonkeyPatch, broken: str | bytes | None
) -> None:
    key = make_key(path, "a")
    keys = Keys.open(path)
    whole = path.read_bytes()
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    now += 2
    assert keys.name_of(key) is None
    path.write_bytes(whole)
    now += 2
    assert keys.name_of(key) == "a"


def test_what_is_no_file_of_keys(path: Path, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        Keys.open(path)
    golden(raised)
    make_key(path, "a")
    path.write_text(path.read_text() + "b: secret\n")
    with pytest.raises(ConfigError) as raised:
        Keys.open(path)
    golden(raised)
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError) as raised:
        Keys.open(path)
    golden(raised)


def test_names_of_clients(path: Path, golden: Golden) -> None:
    make_key(path, "a.b_c-1")
    with pytest.raises(ConfigError) as raised:
        make_key(path, "a.b_c-1")
    golden(raised)
    for name in ("", "a b", "-a", "a\nb", "a" * 65, "ä"):
        with pytest.raises(ConfigError, match="no name of a client"):
            make_key(path, name)
    assert len(path.read_text().splitlines()) == 1
