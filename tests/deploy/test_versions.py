"""Server, sites and submitter of different versions and one protocol, each in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_federation import NO_ENERGY, REPOSITORY, SITES, Federation, record
from tests.support.tiny_federation import one_thread


def other_version(folder: Path, version: str, *changes: tuple[str, str, str]) -> Path:
    """A copy of this fedtune with another version, and `changes` (file, text, other text)."""
    for name in ("fedtune", "conf"):  # with what Python compiled: it knows by their times which files changed
        shutil.copytree(REPOSITORY / name, folder / name)
    page = folder / "fedtune" / "__init__.py"
    lines = page.read_text().splitlines()
    assert any(line.startswith("__version__ = ") for line in lines)
    page.write_text(
        "\n".join(
            f'__version__ = "{version}"' if line.startswith("__version__ = ") else line for line in lines
        )
    )
    for name, old, new in changes:
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    return folder


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    one_thread()
    made = Federation(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sites_of_the_version_before_and_after_take_part(federation: Federation, tmp_path: Path) -> None:
    """The next version has a setting that this one lacks; the one after that speaks another protocol."""
    before = other_version(tmp_path / "before", "0.0.9")
    setting = '    momentum: float = setting(0.0, "sgd'
    future = '    of_the_future: int = setting(0, "what nobody knows yet", ge=0)\n'
    after = other_version(
        tmp_path / "after", "99.1.0", ("fedtune/config/schema.py", setting, future + setting)
    )
    protocol = "fedtune/federation/protocol.py"
    strange = other_version(tmp_path / "strange", "99.2.0", (protocol, "PROTOCOL = ", "PROTOCOL = 1000 + "))
    federation.start_server()
    for site, code in zip(SITES, (before, REPOSITORY, after), strict=True):
        federation.start_node(site, code)
    for site in SITES:
        federation.until(site, "joined")

    def submitted(name: str, code: Path, *more: str) -> int:
        words = [*federation.settings("public", "privacy.epsilon=8", "privacy.delta=1e-3", *more)]
        words += ["federation.num_rounds=1", f"hydra.run.dir={federation.root / name}"]
        federation.start(name, "submit", federation.server, *words, PYTHONPATH=f"{NO_ENERGY}:{code}")
        return federation.processes[name].wait(600)

    for name, code in (("now", REPOSITORY), ("later", after)):
        assert submitted(name, code) == 0, federation.log(name)[-3000:]
        assert [node["releases"] for node in record(federation.root / name)["privacy"]["per_node"]] == [1] * 3
    # What only the newer ones know is refused by its name where it is used.
    assert submitted("used", after, "train.of_the_future=1", "federation.min_updates=3") == 1
    assert "of_the_future" in federation.log("used")
    # Another protocol: said by both numbers, when a node joins and when a run is submitted.
    assert submitted("strange", strange) == 1
    federation.kill("clinic-3")
    federation.start_node("clinic-3", strange)
    federation.processes["clinic-3"].wait(300)
    assert "They must speak the same" in federation.log("clinic-3")[federation.began["clinic-3"] :]
