"""What an operator cannot do with the rights that they have: stop, starve or speak for another."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import utils
from flwr.proto.control_pb2 import StopRunRequest

from fedtune.deploy import operators as people
from fedtune.deploy import server, signing, submit
from fedtune.deploy.certificates import tls_context
from fedtune.deploy.client import Server
from fedtune.deploy.operator_key import OperatorKey, operator_line
from fedtune.deploy.runs import RUN_HEADER
from fedtune.deploy.submit import submitted_run
from fedtune.deploy.view import run_row, site_row
from fedtune.errors import ConfigError, FederationError, FedtuneError, ResourceError
from tests.support.real_superlink import Real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


@pytest.fixture
def mallory(real: Real, tmp_path: Path) -> Server:
    """An operator who may start runs, and nothing else."""
    real.operator_folder(tmp_path)
    people.add(real.folder, operator_line(tmp_path, "mallory")[0], ["submit"])
    real.people.reload()
    return Server.of(tmp_path)


def post(whom: Server, path: str, body: bytes = b"", **headers: bytes) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = {**{name: value.encode() for name, value in whom.headers().items()}, **named}
    verify = tls_context(whom.folder / "ca.crt")
    return httpx.post(f"https://{whom.address}{path}", content=body, headers=asked, verify=verify)


def test_flowers_own_stop_is_for_who_may_stop_any_run(real: Real, mallory: Server, tmp_path: Path) -> None:
    with submitted_run(Server.of(real.folder), "{}", tmp_path / "run", None) as (grid, lost):
        number = submit.run_number_in(tmp_path / "run" / "checkpoint" / submit.NOTE)
        body = StopRunRequest(run_id=int(str(number))).SerializeToString()
        said = post(mallory, "/v1/control/stop-run", body, **{RUN_HEADER: b"1"})
        assert said.status_code == 403 and "no right to stop" in said.json()["error"]
        assert post(mallory, server.STOP_PATH, **{RUN_HEADER: str(number).encode()}).status_code == 403
        assert list(grid.get_node_ids()) == [] and not lost.is_set()


def test_what_is_signed_for_one_server_opens_no_other(real: Real, mallory: Server) -> None:
    credential = mallory.credential
    assert isinstance(credential, OperatorKey)
    for key, name in ((credential, "mallory"), (dataclasses.replace(credential, audience=b"another"), None)):
        headers = {word.encode(): value.encode() for word, value in key.headers().items()}
        known = real.people.who(headers, server.TOKEN_HEADER)
        assert (known and known.name) == name


def test_a_request_that_was_recorded_is_not_taken_again(real: Real, mallory: Server) -> None:
    headers = mallory.headers()
    verify = tls_context(mallory.folder / "ca.crt")
    url = f"https://{mallory.address}{server.STOP_PATH}"
    first, second = (httpx.post(url, headers=headers, verify=verify) for _ in range(2))
    assert "no right to stop" in first.json()["error"] and second.status_code == 403
    assert "This needs an operator's key" in second.json()["error"]
    # Of one signature anybody makes another that is as good: it is the same request all the same.
    r, s = utils.decode_dss_signature(base64.b64decode(headers[signing.SIGNATURE]))
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    twin = base64.b64encode(utils.encode_dss_signature(r, order - s)).decode()
    third = httpx.post(url, headers={**headers, signing.SIGNATURE: twin}, verify=verify)
    assert third.status_code == 403 and "This needs an operator's key" in third.json()["error"]
    assert len({mallory.headers()[signing.TIME] for _ in range(2000)}) == 2000  # no two at one moment


def test_what_was_signed_before_a_server_began_waits_for_it(real: Real, mallory: Server) -> None:
    headers = {word.encode(): value.encode() for word, value in mallory.headers().items()}
    again = people.Operators(real.folder, "token")  # a server that was restarted meanwhile
    with pytest.raises(ResourceError, match=r"signed 0 s before what the server remembers"):
        again.who(headers, server.TOKEN_HEADER)
    later = {word.encode(): value.encode() for word, value in mallory.headers().items()}
    known = again.who(later, server.TOKEN_HEADER)
    assert known is not None and known.name == "mallory"


@pytest.mark.parametrize("run", [b"\xb2", b"", b"1" * 500, b"-1", b"1.5"])
def test_a_run_that_is_no_number_is_told_so(real: Real, mallory: Server, run: bytes) -> None:
    assert post(mallory, server.STOP_PATH, **{RUN_HEADER: run}).status_code == 403
    assert post(Server.of(real.folder), server.STOP_PATH, **{RUN_HEADER: run}).status_code == 404


@pytest.mark.parametrize("name", ["server", "operator"])
def test_nobody_takes_the_name_of_another_in_the_trail(real: Real, mallory: Server, name: str) -> None:
    line = operator_line(mallory.folder, name)[0]
    with pytest.raises(ConfigError, match="named in the trail"):
        people.add(real.folder, line, ["read"])


# --- what a server, or another operator through it, writes to a person's terminal --------------------


def test_what_others_say_is_shown_as_one_line(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(status="finished", sub_status="failed", details="gone\n\x1b[2Jserver ok")
    run: Any = SimpleNamespace(run_id=7, status=status, pending_at="2026")
    assert run_row(run, "bob\x9b8m")["details"] == "gone ?[2Jserver ok"
    node = SimpleNamespace(name="clinic-1\r", status="online\x1b", last_activated_at=None)
    assert all(
        value.isprintable() for value in (*run_row(run, "\x07").values(), site_row(node, None)["state"])
    )
    whom = Server.of(real.folder)
    for status_code, kind in ((403, FederationError), (404, ConfigError)):
        answer = httpx.Response(status_code, json={"error": "Operator x\x1b[31m"})
        monkeypatch.setattr(httpx, "request", lambda *_, answer=answer, **__: answer)
        with pytest.raises(kind) as raised:
            whom.runs()
        assert "x?[31m" in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("content", [b"[1]", b"1", b"null", b'"x"', b"{", b"[[1, 2, 3]]"])
def test_an_answer_of_another_kind_ends_no_run(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    whom = Server.of(real.folder)
    for status_code in (200, 403, 404):
        request = httpx.Request("GET", "https://x")
        answer = httpx.Response(status_code, content=content, request=request)
        monkeypatch.setattr(httpx, "request", lambda *_, answer=answer, **__: answer)
        assert whom.report({"run": "7"}) is False
        assert submit._asked_to_stop(whom, tmp_path) is None and submit._stopped_by(whom, tmp_path) is None
        with pytest.raises(FedtuneError):
            whom.runs()
