"""Over a real SuperLink: two runs whose sites hold other records leave the same bytes.

As `tests/regressions/test_byte_for_byte.py`, with processes, TLS and Flower's server between the parts. What
the mechanisms release is a constant, messages are kept in the sites' workers, and in the run folder only the
number of the run and the time of its start may differ.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedtune.federation.server.checkpoint import _read
from tests.support.byte_for_byte import Left, differences
from tests.support.real_federation import SITES, Federation, write
from tests.support.tiny_federation import one_thread

_LEFT_OUT = ("local.json", ".lock", "server-run")  # the owner's; a lock; Flower's random number of the run
CONSTANT = Path(__file__).parents[1] / "support" / "constant"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three sites with private data and budgets, whose workers keep what they are sent and send."""
    one_thread()
    made = Federation(tmp_path_factory.mktemp("constant"))
    made.environment["PYTHONPATH"] = f"{CONSTANT}:{made.environment['PYTHONPATH']}"
    made.environment["PYTHONHASHSEED"] = "0"  # PEFT writes a set of names in the order of their hashes
    made.environment["FEDTUNE_TEST_KEPT"] = str(made.root / "kept" / "server")
    try:
        made.start_server()
        for site in SITES:
            path = made.root / site / "node.yaml"
            node = yaml.safe_load(path.read_text())
            # Where persons are asked for, each text is one: the data names no others.
            node["data"] |= {"public": False, "unit": "text"}
            node["permit"]["trust"] = ["local", "distributed", "central"]
            node["budget"] = {"epsilon": 500, "delta": 1e-3, "unit": "record"}
            path.write_text(yaml.safe_dump(node))
            (made.root / "kept" / site).mkdir(parents=True)
            kept = {"FEDTUNE_TEST_KEPT": str(made.root / "kept" / site)}
            made.start(site, "node", "--config", path, **kept)
        for site in SITES:
            made.until(site, "joined")
        yield made
    finally:
        made.close()


def settings(federation: Federation, *more: str) -> list[str]:
    """Of a run that has no public test data at all."""
    kept = [
        one
        for one in federation.settings("public")
        if not one.startswith(("data.path=", "data.test_split=", "data.test_public="))
    ]
    return [
        *kept, "federation.num_rounds=2", f"hydra.run.dir={federation.root / 'run'}", "privacy.epsilon=20",
        "privacy.delta=1e-3", *more,
    ]  # fmt: skip


def public_of_time(text: bytes, run: str) -> bytes:
    """`text` without the number of the run and the times at which it was started and logged."""
    text = text.replace(run.encode(), b"RUN")
    return re.sub(rb"\d{4}-\d\d-\d\d[T ]\d\d[:-]\d\d[:-]\d\d[^\s\"]*", b"TIME", text)


def left(federation: Federation, name: str, *more: str) -> Left:
    """What leaves a run: messages of all sites, and files of its folder, which is removed."""
    folder, found = federation.root / "run", Left()
    status = federation.run(name, "submit", federation.server, *settings(federation, *more))
    assert status == 0, federation.log(name)[-3000:]
    run = json.loads((folder / "record.json").read_text())["run"]["id"]
    for path in sorted((federation.root / "kept").rglob("*")):
        if path.is_file():
            content = public_of_time(path.read_bytes(), run)
            if b"secagg" in content:  # fresh keys, and what they mask
                content = re.sub(rb"'bytes [0-9a-f]*'", b"KEY", content)
                content = re.sub(rb"masked\.masked [^\n]*\n?.*", b"MASKED", content, flags=re.DOTALL)
            found.messages.append(content)
            path.unlink()
    found.messages.sort()
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in _LEFT_OUT:
            continue
        content = path.read_bytes()
        if path.suffix == ".ckpt":
            saved = _read(path)
            content = json.dumps([saved.round, saved.meta]).encode() + saved.adapter.tobytes()
        found.files[str(path.relative_to(folder))] = public_of_time(content, run)
    shutil.rmtree(folder)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("trust", "unit"),
    [("local", "record"), ("local", "person"), ("distributed", "record"), ("central", "client")],
)
def test_other_records_at_a_site_leave_the_same_bytes(federation: Federation, trust: str, unit: str) -> None:
    """Without `none`: a site with private data permits no run without privacy."""
    more = [f"privacy.trust={trust}", f"privacy.unit={unit}", "data.unit=text"]
    if trust != "central":
        more += ["federation.evaluation=private", "federation.evaluation_share=0.25"]
    path = federation.root / "data" / SITES[0] / "train.csv"
    before = left(federation, f"submit-{trust}-{unit}-0", *more)
    assert {"record.json", "statement.md"} <= set(before.files) and len(before.messages) >= 3 * 3
    rows = [dict(zip(("text", "label", "site"), line.split(","), strict=True))
            for line in path.read_text().splitlines()[1:]]  # fmt: skip
    original = path.read_bytes()
    rows[0]["text"] = " ".join(["film"] * 300)
    write(path, [*rows, {"text": "", "label": "positive", "site": SITES[0]}, rows[1] | {"text": "so sad"}])
    try:
        after = left(federation, f"submit-{trust}-{unit}-1", *more)
    finally:
        path.write_bytes(original)
    found = differences(before, after)
    assert not found, "\n".join(found)
