"""A run goes on while 550 connections without a credential hold on to the server that it needs."""

from __future__ import annotations

import base64
import datetime
import time
from collections.abc import Iterator

import psutil
import pytest

from fedtune.deploy import certificates
from fedtune.deploy.client import status
from tests.support.crowd import crowd, half_a_body
from tests.support.real_federation import SITES, Federation, record
from tests.support.tiny_federation import one_thread


@pytest.fixture
def federation(tmp_path: object) -> Iterator[Federation]:
    one_thread()
    made = Federation(tmp_path)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def megabytes(federation: Federation) -> float:
    return float(psutil.Process(federation.processes["server"].pid).memory_info().rss) / 1e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_under_500_idle_and_50_fat_connections(federation: Federation) -> None:
    # A process has 256 descriptors by default on some systems, and what it may have is not for us to say.
    federation.start_all()
    psutil.Process(federation.processes["server"].pid).rlimit(psutil.RLIMIT_NOFILE, (1024, 1024))
    before = megabytes(federation)
    path = federation.root / SITES[0] / "node.key"
    public = certificates.public_key_of(certificates.load_private_key(path))
    # Whoever has read the enrolment line knows the public key, and it is all that they know.
    named = {
        "flwr-public-key": base64.b64encode(public).decode(), "flwr-signature": "AAAA",
        "flwr-timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
    }  # fmt: skip
    folder = federation.root / "loaded"
    with crowd(("127.0.0.1", federation.port), idle=250, greeted=250, fat=50, sends=half_a_body(named)):
        begun = time.monotonic()
        found = status(federation.server)
        assert time.monotonic() - begun < 10
        assert sorted(site["state"] for site in found.sites) == ["online"] * 3
        during = megabytes(federation)
        more = ["privacy=none", "federation.num_rounds=2", f"hydra.run.dir={folder}"]
        done = federation.run("loaded", "submit", federation.server, *federation.settings("public", *more))
        assert done == 0, federation.log("loaded")[-3000:]
    after = megabytes(federation)
    print(f"server: {before:.0f} MB before, {during:.0f} with 550 connections, {after:.0f} after")
    assert record(folder)["federation"]["rounds"] == 2
    assert [one["updates"] for one in record(folder)["metrics"]["by_round"]] == [3, 3]
    assert during - before < 100 and after - before < 60, (before, during, after)
